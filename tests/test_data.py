"""Data: the built-in set, text, files of every kind, broken ones, exact positions; views and masks made in batch."""
import colorsys
import io
import json
import math
import os
import tarfile

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

import data
from conftest import FIXTURES, SHARED
from data import (BadSample, ClipBPE, FolderSource, SampleStream, TarSource, augment, byte_tokenizer, clip_view, colour_jitter, draw_boxes,
                  draw_mask_counts, draw_masks, expand_paths, gaussian_blur, load_canvas, load_evaluation_set, make_loader, open_source,
                  render_scenes, resample, ssl_views, step_generator)

# --- the built-in set ---

def test_a_scene_depends_on_seed_split_and_index_only():
    images, captions, labels = render_scenes(np.arange(40), "train")
    some = [7, 3, 39]
    again = render_scenes(np.array(some), "train")
    assert (again[0] == images[some]).all() and again[1] == [captions[i] for i in some] and (again[2] == labels[some]).all()
    for other in (render_scenes(np.arange(40), "val"), render_scenes(np.arange(40), "train", seed=1)):
        assert not any((a == b).all() for a, b in zip(images, other[0]))
    large = render_scenes(np.arange(40), "train", size=128)[0].reshape(40, 3, 64, 2, 64, 2).mean(axis=(3, 5))
    assert np.abs(large - images).mean() < 2       # the same scene, of 255


def test_captions_are_true_short_and_varied_and_labels_balanced():
    p = data.draw_parameters(np.arange(4000), "val")
    captions = [data.write_caption(p, i) for i in range(4000)]
    assert max(len(c.encode()) for c in captions) <= 62          # with start and end it fits the tiny model's 64
    assert len(set(captions[:1000])) > 950
    for i, caption in enumerate(captions):
        words = caption.replace(",", "").split()
        assert data.SHAPES[p["shape"][i]] in words and data.COLOUR_NAMES[p["colour"][i]] in words
        for sign, phrases in ((1, ("left of",)), (-1, ("right of",))):      # said of the main object, seen from the second
            if any(f in caption for f in phrases):
                assert sign * (p["x2"][i] - p["x"][i]) > 0
    counts = np.bincount(p["shape"], minlength=10)
    assert counts.min() > 400 - 5 * 19 and counts.max() < 400 + 5 * 19     # binomial: standard deviation 19


def test_pixels_do_not_give_the_shape_away():
    from evaluate import balanced_accuracy, linear_predict
    (x, _, y), (v, _, w) = (render_scenes(np.arange(n), split) for n, split in ((3000, "train"), (1000, "val")))
    coarse = lambda images: torch.tensor(images).float().view(-1, 3, 8, 8, 8, 8).mean(dim=(3, 5)).flatten(1)
    accuracy = balanced_accuracy(linear_predict(coarse(x), torch.tensor(y), coarse(v), penalty=1e-2), torch.tensor(w))
    assert accuracy < 0.35     # chance 0.1; a small ConvNet reads it at over 0.99 (evaluate.py's judge)


# --- text ---

def test_byte_tokens():
    tokens = byte_tokenizer(["ab", "", "x" * 99], context_length=6)
    assert tokens.tolist() == [[257, 98, 99, 258, 0, 0], [257, 258, 0, 0, 0, 0], [257, 121, 121, 121, 121, 258]]


def test_clip_bpe_equals_clips():
    path = os.path.join(SHARED, "data", "bpe_simple_vocab_16e6.txt.gz")
    if not os.path.exists(path):
        path = os.path.join(torch.hub.get_dir(), "checkpoints", "bpe_simple_vocab_16e6.txt.gz")
    if not os.path.exists(path):
        pytest.skip("CLIP's vocabulary (1.3 MB) is not in the repository and not in the torch hub cache")
    tok = ClipBPE(path)
    for example in json.load(open(os.path.join(FIXTURES, "clip_bpe.json"))):
        assert tok([example["text"]])[0].tolist() == example["ids"], example["text"]
    ids = tok(["word " * 100], context_length=8)[0]
    assert len(ids) == 8 and ids[0] == 49406 and ids[-1] == 49407


def test_tokenizer_follows_from_the_vocabulary():
    assert data.make_tokenizer(259) is byte_tokenizer
    with pytest.raises(ValueError, match="32000"):
        data.make_tokenizer(32000)


# --- files ---

def encoded(image, kind="PNG", **options):
    f = io.BytesIO()
    image.save(f, kind, **options)
    return f.getvalue()


def test_every_image_mode_becomes_rgb():
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    load = lambda raw: load_canvas(io.BytesIO(raw), 16)[:, 8, 8].tolist()
    assert load(encoded(red)) == [255, 0, 0]
    assert load(encoded(red.convert("L"))) == [76] * 3
    assert load(encoded(red.convert("P"))) == [255, 0, 0]
    assert load(encoded(Image.new("1", (40, 40), 1))) == [255] * 3
    assert load(encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)))) == [255, 255, 255]       # transparent: white
    assert load(encoded(Image.new("LA", (40, 40), (0, 128)))) == [127] * 3
    palette = Image.new("P", (40, 40), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert load(encoded(palette, transparency=3)) == [255] * 3
    assert load(encoded(Image.fromarray(np.full((40, 40), 40000, np.uint16)))) == [156] * 3      # 16-bit grey
    cmyk = load(encoded(red.convert("CMYK"), "JPEG"))
    assert cmyk[0] > 200 and cmyk[1] < 60
    exif = Image.Exif()
    exif[0x0112] = 6                                              # shown after a quarter turn clockwise
    half = Image.new("RGB", (40, 40), (255, 0, 0))
    half.paste((0, 0, 255), (0, 0, 40, 20))                       # blue above, red below -> blue on the right
    turned = load_canvas(io.BytesIO(encoded(half, "JPEG", exif=exif)), 40)
    assert turned[2, 20, 35] > 200 and turned[0, 20, 5] > 200


def test_canvas_is_box_halved_bicubic_and_centre_cropped():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 150, 3), dtype=np.uint8))
    halved = image.resize((75, 45), Image.Resampling.BOX).resize((37, 22), Image.Resampling.BOX)      # until the short side is under 40
    halved = halved.resize((34, 20), Image.Resampling.BICUBIC).crop((7, 0, 27, 20))
    assert (load_canvas(io.BytesIO(encoded(image)), 20) == np.asarray(halved).transpose(2, 0, 1)).all()
    smooth = Image.fromarray((np.mgrid[:512, :512].sum(0) / 4).astype(np.uint8)).convert("RGB")
    jpeg = encoded(smooth, "JPEG", quality=95)
    assert np.abs(load_canvas(io.BytesIO(jpeg), 64, draft=True).astype(int) - load_canvas(io.BytesIO(jpeg), 64)).max() <= 3


def write_tar(path, samples):
    """samples: list of {extension: bytes}."""
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, raw in sample.items():
                info = tarfile.TarInfo(f"{os.path.basename(path)[:-4]}/{i:05d}.{extension}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def sample(i, **changes):
    """A small image whose red channel is its number."""
    made = {"png": encoded(Image.new("RGB", (8, 8), (i, 0, 0))), "txt": f"number {i}".encode(), "cls": str(i % 3).encode(), **changes}
    return {k: v for k, v in made.items() if v is not None}


def numbers(batch):
    return batch["images"][:, 0, 0, 0].tolist()


@pytest.fixture
def tars(tmp_path):
    for shard in range(3):
        write_tar(str(tmp_path / f"s-{shard:03d}.tar"), [sample(20 * shard + i) for i in range(20)])
    return str(tmp_path / "s-{000..002}.tar")


def tar_stream(pattern, batch_size=4, position=None, n_workers=0, buffer=8, **kwargs):
    source = TarSource(expand_paths(pattern), 8, shuffle_buffer=buffer, **kwargs)
    return SampleStream(source, batch_size, byte_tokenizer, 16, seed=0, n_workers=n_workers, position=position)


def take(stream, n):
    batches = iter(make_loader(stream, stream.roles if stream.roles > 1 else 0))
    return [next(batches) for _ in range(n)]


def test_patterns(tmp_path, tars):
    assert [os.path.basename(p) for p in expand_paths(tars)] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert expand_paths(str(tmp_path / "*.tar")) == expand_paths(tars) == expand_paths(str(tmp_path / "s-00{0,1,2}.tar"))
    with pytest.raises(FileNotFoundError, match="s-003.tar"):       # a shard that a brace names must be there
        open_source(str(tmp_path / "s-{000..003}.tar"), 8)
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        open_source(str(tmp_path / "nothing-here-*.tar"), 8)
    os.mkdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="no images"):
        open_source(str(tmp_path / "empty"), 8)


def test_an_epoch_of_tars_has_every_sample_once_shuffled_and_reproducible(tars):
    first, again = ([n for b in take(tar_stream(tars), 15) for n in numbers(b)] for _ in range(2))
    assert sorted(first) == list(range(60)) and first == again and first != sorted(first)
    second = [n for b in take(tar_stream(tars), 30)[15:] for n in numbers(b)]
    assert sorted(second) == list(range(60)) and second != first
    batch = take(tar_stream(tars), 1)[0]
    assert batch["tokens"][0].tolist() == byte_tokenizer([f"number {numbers(batch)[0]}"], 16)[0].tolist()
    assert batch["labels"].tolist() == [n % 3 for n in numbers(batch)]


@pytest.mark.parametrize("n_readers", [2, 3, 5])       # fewer, as many, more than there are shards
def test_readers_share_tars_without_overlap(tars, n_readers):
    source, seen = TarSource(expand_paths(tars), 8, shuffle_buffer=7), []
    for reader in range(n_readers):
        stream = SampleStream(source, 4, byte_tokenizer, 16, 0, 0)
        for raw, state in stream.stream_samples(reader, n_readers, None, data.Counter()):
            if state[0] == 1:
                break
            seen.append(int(raw["txt"].split()[1]))
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_tars_resume_exactly(tars, n_workers):
    whole, position = take(tar_stream(tars, n_workers=n_workers), 25), None
    stream = tar_stream(tars, n_workers=n_workers)
    position = stream.position
    for batch in whole[:9]:
        position = stream.advance(position, batch)
    rest = take(tar_stream(tars, n_workers=n_workers, position=position), 16)
    assert [numbers(b) for b in rest] == [numbers(b) for b in whole[9:]]
    with pytest.raises(ValueError, match="readers"):
        tar_stream(tars, n_workers=4, position=position)


def test_tars_are_read_once_an_epoch(tars, monkeypatch):
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    take(tar_stream(tars, buffer=4), 14)
    assert len(opened) == 3 and len(set(opened)) == 3


def test_what_is_broken_is_skipped_and_counted(tmp_path):
    good = [sample(i) for i in range(40)]
    bad = [sample(104, json=b"[1, 2]"), sample(100, png=good[0]["png"][:30]), sample(101, txt=None), sample(102, png=None), sample(103, cls=b"zebra")]
    write_tar(str(tmp_path / "a-0.tar"), good[:20] + bad)
    write_tar(str(tmp_path / "a-1.tar"), good[20:])
    raw = (tmp_path / "a-1.tar").read_bytes()
    (tmp_path / "a-1.tar").write_bytes(raw[:raw.index(b"00015.png") + 600])        # cut inside the sixteenth sample
    batches = take(tar_stream(str(tmp_path / "a-*.tar"), batch_size=5), 7)
    assert sorted(n for b in batches for n in numbers(b)) == list(range(35))
    skipped = take(tar_stream(str(tmp_path / "a-*.tar"), batch_size=5), 8)[-1]["skipped"]     # one into the second epoch
    reasons = " ".join(skipped)
    assert all(word in reasons for word in ("broken image", "broken .json", "no caption", "no image", "label", "a-1.tar"))


def test_nothing_usable_or_too_much_broken_is_an_error(tmp_path):
    write_tar(str(tmp_path / "b.tar"), [sample(i, txt=None) for i in range(30)])
    with pytest.raises(RuntimeError, match="no caption"):
        take(tar_stream(str(tmp_path / "b.tar")), 1)
    assert len(take(tar_stream(str(tmp_path / "b.tar"), needs_caption=False), 3)) == 3      # an autoencoder needs none
    (tmp_path / "c.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(RuntimeError, match="c.tar"):
        take(tar_stream(str(tmp_path / "c.tar")), 1)


def test_json_captions_and_labels(tmp_path):
    write_tar(str(tmp_path / "j.tar"), [{"png": sample(i)["png"], "json": json.dumps(dict(caption=f"c{i}", kind=["cat", "dog"][i % 2])).encode()} for i in range(8)])
    source = TarSource([str(tmp_path / "j.tar")], 8, class_names=["cat", "dog"], label="kind")
    images, captions, labels = load_evaluation_set(source, 8)
    assert captions == [f"c{i}" for i in range(8)] and labels.tolist() == [0, 1] * 4


def make_folder(path, n=6):
    for c, name in enumerate(("ant", "bee_fly")):
        os.makedirs(path / name)
        for i in range(n):
            (path / name / f"{i}.png").write_bytes(sample(100 * c + i)["png"])
    (path / "ant" / "0.txt").write_text("an ant of its own\n")
    return str(path)


def test_folder_captions_labels_and_broken_files(tmp_path):
    folder = make_folder(tmp_path / "f")
    source = open_source(folder, 8)
    _, caption, label = source.load(0, True, np.random.default_rng(0))
    assert (caption, label) == ("an ant of its own", 0)
    _, caption, label = source.load(7, True, np.random.default_rng(0))
    assert "bee fly" in caption and label == 1
    (tmp_path / "f" / "ant" / "3.png").write_bytes(b"broken")
    with pytest.raises(BadSample):
        source.load(3, True, np.random.default_rng(0))
    batches = take(SampleStream(source, 6, byte_tokenizer, 32, 0, 0, max_skipped=0.5), 2)
    assert sum(batches[-1]["skipped"].values()) == 1 and all(len(b["images"]) == 6 for b in batches)
    os.makedirs(tmp_path / "val" / "bee_fly")
    (tmp_path / "val" / "bee_fly" / "0.png").write_bytes(sample(1)["png"])
    assert open_source(str(tmp_path / "val"), 8, folders=source.folders).files[0][1] == 1       # labels are the training set's
    os.makedirs(tmp_path / "val" / "cow")
    with pytest.raises(ValueError, match="cow"):
        open_source(str(tmp_path / "val"), 8, folders=source.folders)
    with pytest.raises(ValueError, match="3 class names"):
        FolderSource(folder, 8, ["a", "b", "c"])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_indexed_sources_resume_exactly_and_do_not_depend_on_workers(n_workers):
    source = data.BuiltinSource(20, 16)
    whole = [b["images"] for b in take(SampleStream(source, 6, byte_tokenizer, 64, 0, 0), 9)]
    epoch = torch.cat(whole)[:20]
    assert len({tuple(image.flatten().tolist()) for image in epoch}) == 20          # 20 scenes, each once
    position = {"batches": 4, "states": {}}
    rest = [b["images"] for b in take(SampleStream(source, 6, byte_tokenizer, 64, 0, n_workers, position), 5)]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[4:]))


def test_ranks_share_the_global_batch(monkeypatch):
    source = data.BuiltinSource(20, 16)
    whole = take(SampleStream(source, 6, byte_tokenizer, 64, 0, 0), 4)
    monkeypatch.setattr(data, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(data, "rank", lambda: r)
        for a, b in zip(whole, take(SampleStream(source, 6, byte_tokenizer, 64, 0, 0), 4)):
            assert torch.equal(a["images"][r::3], b["images"]) and torch.equal(a["tokens"][r::3], b["tokens"])


# --- views ---

def test_resampling_is_pillows_bicubic_of_a_box():
    images = render_scenes(np.arange(4), "train", 64)[0]
    boxes = torch.tensor([[0.1, 0.3, 0.0, 0.5], [0.2, 0.05, 0.0, 0.4], [0.7, 0.5, 1.0, 0.2], [0.5, 0.9, 1.0, 0.3]])
    for size in (24, 64, 100):
        ours = resample(torch.tensor(images).float(), boxes, size)
        flipped = resample(torch.tensor(images).float(), boxes, size, flip=torch.tensor([True, False, True, False]))
        both = resample(torch.tensor(images).float(), torch.cat((boxes, boxes.flip(1)), dim=1), size)       # two crops of each
        for i in range(4):
            left, top, width, height = (boxes[:, i].double() * 64).tolist()
            for channel in range(3):      # mode F: with 8 bits Pillow rounds and clips between its two passes
                pillow = Image.fromarray(images[i, channel].astype(np.float32)).resize(
                    (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
                assert np.abs(ours[i, channel].numpy() - np.asarray(pillow)).max() < 0.01       # of 255
            torch.testing.assert_close(flipped[i], ours[i].flip(-1) if i % 2 == 0 else ours[i], atol=1e-2, rtol=0)
        torch.testing.assert_close(both[:4], ours, atol=1e-2, rtol=0)


def test_boxes_have_the_area_and_aspect_asked_for():
    left, top, width, height = draw_boxes(torch.rand(22, 5000, generator=step_generator(0, 0, "cpu")), (0.32, 1.0))
    area, aspect = width * height, width / height
    assert (left >= 0).all() and (left + width <= 1 + 1e-6).all() and (top >= 0).all() and (top + height <= 1 + 1e-6).all()
    assert 0.32 - 1e-5 <= area.min() < 0.34 and area.max() > 0.95 and 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.34
    whole = draw_boxes(torch.ones(22, 1) * 0.999, (1.0, 1.0))      # nothing fits: the whole image
    assert torch.allclose(whole[:, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def slow_jitter(image, u):
    """The definition, one image (3, H, W) and one operation at a time: torchvision's blends, hue through colorsys."""
    luma = lambda x: 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    if u[0] < 0.8:
        for op in np.argsort(u[6:10]):
            factor = (0.4, 0.4, 0.2, 0.1)[op] * (2 * u[2 + op] - 1)
            if op == 3:
                flat = image.reshape(3, -1).T
                image = np.array([colorsys.hsv_to_rgb((h + factor) % 1, s, v) for h, s, v in (colorsys.rgb_to_hsv(*p) for p in flat)]).T.reshape(image.shape)
            else:
                reference = (0 * image, np.full_like(image, luma(image).mean()), np.stack([luma(image)] * 3))[op]
                image = np.clip(reference + (1 + factor) * (image - reference), 0, 1)
    return np.stack([luma(image)] * 3) if u[1] < 0.2 else image


def test_colour_jitter_equals_the_definition_in_every_order():
    images = torch.tensor(render_scenes(np.arange(48), "train", 8)[0]).float() / 255
    uniform = torch.rand(10, 48, generator=step_generator(0, 1, "cpu"))
    ours = colour_jitter(images, uniform)
    for i in range(48):
        expected = slow_jitter(images[i].double().numpy(), uniform[:, i].double().numpy())
        assert np.abs(ours[i].numpy() - expected).max() < 2e-5         # fp32 against double, seven operations
    assert len({tuple(o) for o in uniform[6:].argsort(dim=0).T.tolist()}) > 15      # of 24 orders


def test_gaussian_blur_is_nine_taps_with_reflected_borders():
    images = torch.tensor(render_scenes(np.arange(3), "train", 16)[0]).float() / 255
    sigma = torch.tensor([0.0, 0.7, 2.0])
    ours = gaussian_blur(images, sigma)
    assert torch.allclose(ours[0], images[0], atol=1e-6)
    for i in (1, 2):
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma[i].item()) ** 2)
        expected = images[i].double().numpy()
        for axis in (1, 2):
            expected = scipy.ndimage.correlate1d(expected, kernel / kernel.sum(), axis=axis, mode="mirror")
        assert np.abs(ours[i].numpy() - expected).max() < 1e-5


def test_views_depend_on_seed_and_step_not_on_the_number_of_ranks(monkeypatch):
    canvases = torch.tensor(render_scenes(np.arange(8), "train", 32)[0])

    def views(images, step=3):
        g = step_generator(0, step, "cpu")
        return [clip_view(images, g, 8, 32).unsqueeze(0), *(v.view(-1, len(images), 3, *v.shape[-2:]) for v in ssl_views(images, g, 8, 32, 16, 3)),
                draw_masks(g, 8, (4, 4)).view(2, len(images), 16)]
    whole, other = views(canvases), views(canvases, step=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, views(canvases))) and not any(torch.equal(a, b) for a, b in zip(whole, other))
    assert [tuple(v.shape[:2]) for v in whole] == [(1, 8), (2, 8), (3, 8), (2, 8)]
    monkeypatch.setattr(data, "world_size", lambda: 4)
    for r in range(4):
        monkeypatch.setattr(data, "rank", lambda: r)
        for a, b in zip(whole, views(canvases[r::4])):
            torch.testing.assert_close(b.float(), a[:, r::4].float(), atol=1e-5, rtol=1e-5)      # matrix products of another size


def test_solarise_and_blur_rates():
    canvases = torch.full((400, 3, 16, 16), 0.9)
    uniform = torch.rand(36, 1, 400, generator=step_generator(0, 0, "cpu"))
    uniform[22 + 1] = uniform[22 + 2] = 0.99              # no jitter, no greyscale
    from vtp import denormalize
    out = denormalize(augment(canvases, uniform, 16, (0.32, 1.0), (0.5,), (0.2,)))[:, 0, 8, 8]
    solarised = (out - 0.1).abs() < 1e-3
    assert 0.14 < solarised.float().mean() < 0.26 and torch.allclose(out[~solarised], torch.tensor(0.9), atol=1e-3)


# --- masks ---

@pytest.mark.parametrize("grid, batch_size", [((4, 4), 8), ((16, 16), 64), ((3, 5), 6)])
def test_mask_counts_are_exact_and_spread_as_dinov2_wants(grid, batch_size):
    n = grid[0] * grid[1]
    for step in range(5):
        masks = draw_masks(step_generator(0, step, "cpu"), batch_size, grid)
        counts = draw_mask_counts(step_generator(0, step, "cpu"), batch_size, n).flatten()
        assert torch.equal(masks.sum(dim=1), counts)
        assert counts.sum() == batch_size // 2 * round(0.6 * n)                # whatever the step: static shapes
        assert (counts > 0).sum() == batch_size                                # half of the 2B crops
        shares = sorted((counts[counts > 0] / n).tolist())
        for i, share in enumerate(shares):                                      # the i-th in the i-th slice, to rounding
            assert 0.1 + 0.4 * i / batch_size - 1.01 / n <= share <= 0.1 + 0.4 * (i + 1) / batch_size + 1.01 / n


def test_masks_come_in_blocks():
    masks = draw_masks(step_generator(0, 0, "cpu"), 64, (16, 16)).view(-1, 16, 16).float()
    masks = masks[masks.sum(dim=(1, 2)) > 0]
    same = (masks[:, 1:] == masks[:, :-1]).float().mean()
    shuffled = masks.flatten(1)[:, torch.randperm(256)].view_as(masks)
    assert same > 0.85 > 0.65 > (shuffled[:, 1:] == shuffled[:, :-1]).float().mean()
