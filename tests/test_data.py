"""Data: the built-in set, text, files of every kind, broken ones, how a run goes on; views and
masks made in batch."""
import colorsys
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import weakref
import zlib
from collections import Counter

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

import data
from conftest import FIXTURES, ROOT, SHARED
from data import (BadSample, ClipBPE, EvaluationSet, FolderSource, SampleStream, TarSource, augment,
                  clip_view, colour_jitter, draw_boxes, draw_mask_counts, draw_masks, each_sample,
                  expand_paths, gaussian_blur, load_canvas, make_loader, open_source, read_tar,
                  render_scenes, resample, rows_at, ssl_views, step_generator, total_skipped, word_tokenizer)
from vtp import UserError, denormalize

# --- the built-in set ---

def test_a_scene_depends_on_seed_split_and_index_only():
    images, captions, labels = render_scenes(np.arange(40), "train")
    some = [7, 3, 39]
    again = render_scenes(np.array(some), "train")
    assert (again[0] == images[some]).all()
    assert again[1] == [captions[i] for i in some]
    assert (again[2] == labels[some]).all()
    other_split = render_scenes(np.arange(40), "val")
    other_seed = render_scenes(np.arange(40), "train", seed=1)
    for other in (other_split, other_seed):
        assert not any((a == b).all() for a, b in zip(images, other[0]))
    large = render_scenes(np.arange(40), "train", size=128)[0]
    halved = large.reshape(40, 3, 64, 2, 64, 2).mean(axis=(3, 5))
    # Of 255: the same scene but for how edges are sampled, which are a few percent of it. Of two scenes: 95.
    assert np.abs(halved - images).mean() < 2


def test_captions_are_true_short_and_varied_and_labels_balanced():
    p = data.draw_parameters(np.arange(4000), "val")
    captions = [data.write_caption(p, i)[0] for i in range(4000)]
    # with start and end it fits the tiny model's 64
    assert max(len(c.encode()) for c in captions) <= 62
    assert len(set(captions[:1000])) > 950
    for i, caption in enumerate(captions):
        words = caption.replace(",", "").split()
        assert data.SHAPES[p["shape"][i]] in words and data.COLOUR_NAMES[p["colour"][i]] in words
        # said of the main object, seen from the second
        for sign, phrases in ((1, ("left of",)), (-1, ("right of",))):
            if any(f in caption for f in phrases):
                assert sign * (p["x2"][i] - p["x"][i]) > 0
    counts = np.bincount(p["shape"], minlength=10)
    # binomial: standard deviation 19
    assert counts.min() > 400 - 5 * 19 and counts.max() < 400 + 5 * 19


def test_what_captions_say_of_the_attributes_is_what_their_words_say():
    source = data.BuiltinSource(1000, 8)
    shown, said = source.attributes(), source.attributes_said()
    assert ((said == shown) | (said == -1)).all() and (said[:, :2] == shown[:, :2]).all()
    for caption, scene, of_caption in zip(source.captions, shown, said):
        words = caption.replace(",", "").split()
        assert data.SHAPES[scene[0]] in words and data.COLOUR_NAMES[scene[1]] in words
        _, _, size, place, background = of_caption
        if scene[2] >= 0:       # one object alone
            assert (size >= 0) == any(word in words for word in data.SIZE_WORDS[scene[2]])
            assert (place >= 0) == any(phrase in caption for phrase in data.PLACE_WORDS[scene[3]])
        else:
            assert size == place == -1
        # the object's colour is said once, so is that of a second one; a third or second word is the ground's
        n_colours = sum(word in data.COLOUR_NAMES for word in words)
        assert (background >= 0) == (n_colours == 2 + (scene[2] < 0))
        assert background == -1 or data.COLOUR_NAMES[background] in words
    assert ((said >= 0).mean(axis=0) > 0.2).all()


def test_pairs_that_are_held_out_are_in_no_training_scene_and_all_else_is():
    source, whole = data.BuiltinSource(3000, 8, hold_out_pairs=True), data.BuiltinSource(3600, 8)
    p = data.draw_parameters(source.indices, "train")
    pairs = set(zip(p["shape"], p["colour"])) | {(s, c) for s, c, two in zip(p["shape2"], p["colour2"],
                                                                             p["pair"]) if two}
    assert not pairs & set(data.HELD_OUT_PAIRS) and len(pairs) == 110 and len(source) == 3000
    for i in range(0, 3000, 500):
        assert source.captions[i] == whole.captions[source.indices[i]]
    for values, n in ((p["shape"], 10), (p["colour"], 12)):       # each is still there, and on its own
        assert np.bincount(values, minlength=n).min() > 0.7 * 3000 / n
    held_out = data.BuiltinSource(500, 8, "val", hold_out_pairs=True)
    assert held_out.captions == data.BuiltinSource(500, 8, "val").captions
    assert source.fingerprint() != data.BuiltinSource(3000, 8).fingerprint()


def test_a_text_that_is_false_of_the_mirror_image_is_known_by_its_words():
    for text in ("at the bottom left", "a cat on the RIGHT", "left-handed", "to the leftmost one"):
        assert data.names_a_side(text)
    for text in ("a bright star", "the cleft", "above a heart", "", "frightened"):
        assert not data.names_a_side(text)


def test_pixels_do_not_give_the_shape_away():
    from evaluate import linear_probe
    x, _, y = render_scenes(np.arange(3000), "train")
    v, _, w = render_scenes(np.arange(1000), "val")

    def coarse(images):                                           # means of 8 x 8 pixels
        return torch.tensor(images).float().view(-1, 3, 8, 8, 8, 8).mean(dim=(3, 5)).flatten(1)
    accuracy = linear_probe(coarse(x), torch.tensor(y), coarse(v), torch.tensor(w))
    # chance 0.1, and of 1,000 images a standard deviation of 0.015; what says more than that are sizes and
    # colours. A small ConvNet reads shapes at over 0.99 (evaluate.py's judge).
    assert accuracy["linear_probe_balanced"] < 0.35


# --- text ---

def test_word_tokens():
    tokens = word_tokenizer(["A dog, a cat", "", "x " * 99, "\ud83d 漢字"], context_length=7)
    a, dog, comma, again, cat = tokens[0, 1:6].tolist()
    assert a == again and len({a, dog, comma, cat}) == 4
    number = 1 + zlib.crc32(b"dog") % 8189
    assert dog == number and tokens[0, 0] == 8190 and tokens[0, 6] == 8191
    assert tokens[1].tolist() == [8190, 8191, 0, 0, 0, 0, 0]
    assert len(set(tokens[2, 1:6].tolist())) == 1 and tokens[2, 6] == 8191      # cut, with its end
    assert (tokens[3] > 0).sum() == 4                                       # half a character, a word


CAPTIONS = [  # as given, and as ftfy 6.3.1 and the rest of CLIP's cleaning leave them
    ("It’s a “nice” café – ‘café’…", "it's a \"nice\" café – 'café'…"),
    ("ＦＵＬＬ\u3000Ｗidth １！", "full width 1!"), ("ｶﾞﾗｽ", "ガラス"),
    ("\ufb01ne oﬃce ĳs ǆ", "fine office ijs dž"), ("cafe\u0301 A\u030a", "café å"),
    ("\ufeffBOM\ufeff", "bom"),
    ("nul\x00 tab\t ff\x0cesc\x1b[1;31mred\x1b[0m", "nul tab ff escred"),
    ("a\r\nb\u2028c\x0bd\x85e", "a b cd…e"), ("\ud83d\ude00 \ud83d", "😀 \ufffd"),
    ("x\ufffcy\ufffaz \u206ad", "xyz d"), ("it\x92s \x93so\x94 \x96 \x8050", "it's \"so\" – €50"),
    ("&ldquo;x&rdquo; &amp;rsquo; &#8217; &amp;amp;amp;lt;", "\"x\" ' ' <"),
    ("<b>it&rsquo;s</b>", "<b>it’s</b>"), ("cafÃ©", "café"),
    ("Ã\x80 la carte, dÃ©jÃ\xa0 vu", "à la carte, déjà vu"),
    ("voilÃ\xa0 le cafÃ©", "voilà le café"), ("GRÃ–ÃŸE", "größe"), ("itâ€™s â€œsoâ€\x9d", "it's \"so\""),
    ("itâ\x80\x99s", "it's"), ("25Â°C Â© 2019 Â½", "25°c © 2019 ½"),
    ("â˜… âœ”", "★ ✔"), ("ðŸ˜€ smile", "😀 smile"),
    ("Zielony Å¼Ã³Å‚w", "zielony żółw"), ("Ä°stanbul ÅŸehri", "i\u0307stanbul şehri"),
    ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "привет"), ("æ—¥æœ¬", "日本"), ("Tiáº¿ng Viá»‡t", "tiếng việt"), ("cafÃƒÂ©", "café"),
    ("日本 â€“ café", "日本 – café"), ("À la carte, naïve façade", "à la carte, naïve façade"),
    ("“café…”", '"café…"'), ("« voilà\xa0»", "« voilà »"), ("CAFÉ™ SÃO NESTLÉ®", "café™ são nestlé®"),
    ("«café…»", "«café…»"),
    ("Größe 3\xa0€, 5² ± 1°", "größe 3 €, 5² ± 1°"), ("İstanbul’da ğış", "i\u0307stanbul'da ğış"),
    ("Việt Łódź Česká", "việt łódź česká"), ("دبي של Мир 東京", "دبي של мир 東京"),
    ("❤\ufe0f 👩\u200d👧", "❤\ufe0f 👩\u200d👧"), ("Å is a word", "å is a word")]


def test_captions_are_cleaned_as_ftfy_does_for_clip():
    for given, cleaned in CAPTIONS:
        assert data.clean_caption(given) == cleaned, ascii(given)


def test_clip_bpe_equals_clips():
    path = os.path.join(SHARED, "data", "bpe_simple_vocab_16e6.txt.gz")
    if not os.path.exists(path):
        path = os.path.join(torch.hub.get_dir(), "checkpoints", "bpe_simple_vocab_16e6.txt.gz")
    if not os.path.exists(path):
        pytest.skip("CLIP's vocabulary (1.3 MB) is in neither the repository nor torch hub's cache")
    tok = ClipBPE(path)
    for example in json.load(open(os.path.join(FIXTURES, "clip_bpe.json"))):
        assert tok([example["text"]])[0].tolist() == example["ids"], example["text"]
    assert torch.equal(*tok([CAPTIONS[0][0], CAPTIONS[0][1]]))     # it cleans
    ids = tok(["word " * 100], context_length=8)[0]
    assert len(ids) == 8 and ids[0] == 49406 and ids[-1] == 49407


def test_tokenizer_follows_from_the_vocabulary():
    assert data.make_tokenizer(8192) is word_tokenizer
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
    transparent = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert load(encoded(transparent)) == [255, 255, 255]          # shown on white
    assert load(encoded(Image.new("LA", (40, 40), (0, 128)))) == [127] * 3
    palette = Image.new("P", (40, 40), 3)
    palette.putpalette([0, 0, 0] * 3 + [9, 9, 9])
    assert load(encoded(palette, transparency=3)) == [255] * 3
    grey_16_bit = Image.fromarray(np.full((40, 40), 40000, np.uint16))
    assert load(encoded(grey_16_bit)) == [156] * 3                # 40000 / 256
    cmyk = load(encoded(red.convert("CMYK"), "JPEG"))
    assert cmyk[0] > 200 and cmyk[1] < 60                         # red, through JPEG's loss
    exif = Image.Exif()
    exif[0x0112] = 6                                          # shown after a quarter turn clockwise
    half = Image.new("RGB", (40, 40), (255, 0, 0))
    half.paste((0, 0, 255), (0, 0, 40, 20))                   # blue above, red below: blue right
    turned = load_canvas(io.BytesIO(encoded(half, "JPEG", exif=exif)), 40)
    assert turned[2, 20, 35] > 200 and turned[0, 20, 5] > 200


def test_canvas_is_box_halved_bicubic_and_centre_cropped():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 150, 3), dtype=np.uint8))
    # halved until the short side is under 40
    halved = image.resize((75, 45), Image.Resampling.BOX).resize((37, 22), Image.Resampling.BOX)
    expected = halved.resize((34, 20), Image.Resampling.BICUBIC).crop((7, 0, 27, 20))
    canvas = load_canvas(io.BytesIO(encoded(image)), 20)
    assert (canvas == np.asarray(expected).transpose(2, 0, 1)).all()
    smooth = Image.fromarray((np.mgrid[:512, :512].sum(0) / 4).astype(np.uint8)).convert("RGB")
    jpeg = encoded(smooth, "JPEG", quality=95)
    draft = load_canvas(io.BytesIO(jpeg), 64, draft=True).astype(int)
    # of 255: the decoder scales in place of the box filter, and the image is smooth
    assert np.abs(draft - load_canvas(io.BytesIO(jpeg), 64)).max() <= 3


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
    made = {"png": encoded(Image.new("RGB", (8, 8), (i, 0, 0))),
            "txt": f"number {i}".encode(),
            "cls": str(i % 3).encode(),
            **changes}
    return {k: v for k, v in made.items() if v is not None}


def numbers(batch):
    return batch["images"][:, 0, 0, 0].tolist()


@pytest.fixture
def tars(tmp_path):
    for shard in range(3):
        write_tar(str(tmp_path / f"s-{shard:03d}.tar"), [sample(20 * shard + i) for i in range(20)])
    return str(tmp_path / "s-{000..002}.tar")


def tar_stream(pattern, batch_size=4, place=None, n_workers=0, buffer=8, **kwargs):
    source = TarSource(expand_paths(pattern), 8, shuffle_buffer=buffer, **kwargs)
    return SampleStream(source, batch_size, word_tokenizer, 16, seed=0, n_workers=n_workers,
                        place=place)


def take(stream, n):
    return list(itertools.islice(make_loader(stream), n))


def place_after(stream, batches):
    place = stream.place
    for batch in batches:
        place = stream.advance(place, batch)
    return place


def test_patterns(tmp_path, tars):
    paths = expand_paths(tars)
    assert [os.path.basename(p) for p in paths] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    for same in ("*.tar", "s-00{0,1,2}.tar"):
        assert expand_paths(str(tmp_path / same)) == paths
    # a shard that a brace names must be there
    with pytest.raises(FileNotFoundError, match="s-003.tar"):
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
    caption = f"number {numbers(batch)[0]}"
    assert batch["tokens"][0].tolist() == word_tokenizer([caption], 16)[0].tolist()
    assert batch["labels"].tolist() == [n % 3 for n in numbers(batch)]


def test_a_block_holds_as_much_of_each_shard_that_is_open(tmp_path):
    """So a batch is mixed where each tar is of one kind: here a caption is its tar's."""
    for shard in range(8):
        write_tar(str(tmp_path / f"{shard}.tar"), [sample(i, txt=f"number {shard}".encode())
                                                   for i in range(16)])
    stream = tar_stream(str(tmp_path / "*.tar"), buffer=32)     # 8 samples of each of 4 tars
    kinds = [number(given) for given, _ in itertools.islice(stream.shuffled_tar_samples(0), 128)]
    blocks = [Counter(kinds[k:k + 32]) for k in range(0, 128, 32)]
    assert all(sorted(block.values()) == [8] * 4 for block in blocks)
    assert blocks[0] == blocks[1] and not blocks[0] & blocks[2] and blocks[2] == blocks[3]
    batches = [set(kinds[k:k + 8]) for k in range(0, 128, 8)]
    # 3 % of random draws of 8 have fewer than 3 kinds, and 16 batches have it more than twice in 1 of 100
    assert sum(len(kinds) < 3 for kinds in batches) <= 2


@pytest.mark.parametrize("n_readers", [2, 3, 5])       # fewer, as many, more than there are tars
def test_readers_share_tars_without_overlap(tars, n_readers):
    source = TarSource(expand_paths(tars), 8, shuffle_buffer=7)
    assert give_out(source, n_readers, until_epoch=2)[0] == each_once(n_epochs=2)
    captions = [load()[1] for reader in range(n_readers)
                for _, _, load in each_sample(source, reader, n_readers, seed=1)]
    assert sorted(captions) == sorted(f"number {i}" for i in range(60))


def test_samples_of_a_source_come_once_each_with_its_place_there(tmp_path, tars):
    source = open_source(tars, 8)
    items = [(shard, number, load()[1]) for shard, number, load in each_sample(source)]
    # in the source's order
    assert items == [(i // 20, i % 20, f"number {i}") for i in range(60)]
    shuffled = [(shard, number, load()[1]) for shard, number, load in each_sample(source, seed=3)]
    assert shuffled != items and sorted(shuffled) == items
    source = open_source(make_folder(tmp_path / "f"), 8)
    of_five = [(shard, i, load()[2])
               for r in range(5) for shard, i, load in each_sample(source, r, 5)]
    assert sorted(of_five) == [(0, i, i // 6) for i in range(12)]
    order = [i for _, i, _ in each_sample(source, seed=3)]
    assert order != sorted(order) == list(range(12))


def test_an_endless_sequence_has_every_row_once_an_epoch():
    rows = rows_at(np.arange(35), 10, seed=4)
    epochs = [rows[k:k + 10].tolist() for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert (rows != rows_at(np.arange(35), 10, seed=5)).any()
    some = np.array([31, 4, 17, 9])
    assert (rows_at(some, 10, seed=4) == rows[some]).all()


def test_the_benchmark_measures_what_it_names(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "f")
    write_tar(str(tmp_path / "a.tar"), [sample(1, png=b"broken"), *map(sample, range(20))])
    monkeypatch.setattr(data, "ClipBPE", lambda path: word_tokenizer)
    monkeypatch.setattr(data, "time_loader", functools.partial(data.time_loader, seconds=0.1))
    for where in (folder, str(tmp_path / "a.tar")):
        data.main(["--benchmark", "--data", where, "--image_size", "32", "--batch_size", "4",
                   "--workers", "0"])
        printed = capsys.readouterr().out
        rates = [int(n.replace(",", "")) for n in re.findall(r" {4}([\d,]+)", printed)]
        assert len(rates) == 6 and min(rates) > 0, printed
    for more, message in ((["--data", str(tmp_path / "nowhere")], "no data at"),
                          (["--data", folder, "--batch_size", "0"], "must be positive")):
        with pytest.raises(SystemExit):
            data.main(["--benchmark", *more])
        assert message in capsys.readouterr().err


# --- how a run goes on ---

def each_once(n_epochs):
    return Counter((epoch, n) for epoch in range(n_epochs) for n in range(60))


def number(tar_sample):
    return int(tar_sample["txt"].split()[1])


def give_out(source, n_readers, place=None, counts=None, until_epoch=None):
    """What readers give from a place on: counts[r] samples by reader r, or all until an epoch
    -> how often each (epoch, number of a sample) was given, and the place after it."""
    stream = SampleStream(source, 4, word_tokenizer, 16, seed=0, n_workers=n_readers, place=place)
    place, given = stream.place, Counter()
    readers, visits_of_an_epoch = dict(place["readers"]), place["parts"] * len(source.paths)
    for reader in range(n_readers):
        samples = stream.shuffled_tar_samples(reader)
        for sample, state in itertools.islice(samples, None if counts is None else counts[reader]):
            epoch = min(state["open"]) // visits_of_an_epoch
            if until_epoch is not None and epoch >= until_epoch:
                break
            given[epoch, number(sample)] += 1
            readers[reader] = dict(state, skipped={})
    return given, {**place, "readers": readers}


def given_of_open_blocks(source, place):
    """What readers had given at a place of the blocks that they were giving out."""
    starts = {r: {**state, "given": 0} for r, state in place["readers"].items()}
    counts = [place["readers"][r]["given"] for r in range(len(starts))]
    return give_out(source, len(starts), {**place, "readers": starts}, counts)[0]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_tars_go_on_exactly_with_as_many_readers(tars, n_workers):
    stream = tar_stream(tars, n_workers=n_workers)
    whole = take(stream, 25)
    for n in (1, 9, 17):        # within a first block, in the middle of an epoch, in the second one
        resumed = tar_stream(tars, n_workers=n_workers, place=place_after(stream, whole[:n]))
        rest = take(resumed, 25 - n)
        assert [numbers(b) for b in rest] == [numbers(b) for b in whole[n:]]


def test_a_place_of_an_older_version_is_an_error(tars):
    place = {**tar_stream(tars).place, "readers": {0: dict(visit=0, sample=0, given=3, skipped={})}}
    with pytest.raises(ValueError, match="older version"):
        tar_stream(tars, place=place)


@pytest.mark.parametrize("buffer", [4, 50])             # less and more than a tar
@pytest.mark.parametrize("readers", [(2, 3), (3, 1), (1, 4), (1, 8), (5, 2), (2, 3, 1), (4, 1, 5),
                                     (3, 2, 2, 3)])
def test_tars_go_on_with_another_number_of_readers(tars, readers, buffer):
    """However far each reader has come, and if the number changes again right away: no sample of an
    epoch is left out, and those of the blocks that were being given out come just once more."""
    source = TarSource(expand_paths(tars), 8, shuffle_buffer=buffer)
    for trial in range(6):
        rng, place = np.random.default_rng(trial), None
        given, again = Counter(), Counter()
        for k, n_readers in enumerate(readers[:-1]):
            most = 2 if k and trial % 2 else 30
            part, place = give_out(source, n_readers, place, rng.integers(0, most + 1, n_readers))
            given += part
            if readers[k + 1] != n_readers:
                repeated = given_of_open_blocks(source, place)
                assert repeated.total() <= n_readers * buffer
                again += repeated
        n_epochs = 1 + max((epoch for epoch, _ in given), default=0)
        given += give_out(source, readers[-1], place, until_epoch=n_epochs)[0]
        assert given == each_once(n_epochs) + again


def on_ranks(monkeypatch, n_ranks, make_stream, n):
    """n batches of each of n_ranks ranks in one list, and the place that they gather after them."""
    monkeypatch.setattr(data, "world_size", lambda: n_ranks)
    streams, places, batches, sent = [], [], [], []
    for r in range(n_ranks):
        monkeypatch.setattr(data, "rank", lambda: r)
        streams.append(make_stream())
        own = take(streams[-1], n)
        places.append(place_after(streams[-1], own))
        batches += own
    # each sends, then all receive
    for gather in (lambda own: sent.append(own) or [own], lambda own: sent):
        monkeypatch.setattr(data, "gather_objects", gather)
        gathered = [stream.gather_place(place) for stream, place in zip(streams, places)]
    last = {batch["reader"]: batch["state"] for batch in batches}
    assert all(place["readers"] == {**streams[0].place["readers"], **last} for place in gathered)
    return batches, gathered[0]


@pytest.mark.parametrize("before, after", [((2, 1), (3, 2)), ((3, 1), (1, 0)), ((1, 0), (2, 2)),
                                           ((1, 2), (2, 1))])
def test_ranks_and_workers_may_change_at_a_stop(tars, tmp_path, monkeypatch, before, after):
    """From (ranks, workers) to others: each reader, wherever it runs, goes on from its place."""
    def stream(n_workers, place=None):
        return lambda: tar_stream(tars, batch_size=6, n_workers=n_workers, buffer=4, place=place)
    place = None
    for n_ranks, n_workers in (before, after):
        n_readers, start = n_ranks * max(n_workers, 1), place
        batches, place = on_ranks(monkeypatch, n_ranks, stream(n_workers, start), 5)
        given = {r: [] for r in range(n_readers)}
        for batch in batches:
            assert len(batch["images"]) == 6 // n_ranks
            given[batch["reader"]] += numbers(batch)
        monkeypatch.setattr(data, "world_size", lambda: 1)
        of_all = tar_stream(tars, n_workers=n_readers, buffer=4, place=start)
        for r in range(n_readers):
            expected = itertools.islice(of_all.shuffled_tar_samples(r), len(given[r]))
            assert given[r] == [number(sample) for sample, _ in expected] != []
        torch.save(place, tmp_path / "place.pt")        # as a checkpoint keeps it
        place = torch.load(tmp_path / "place.pt", weights_only=True)
    assert place["batches"] == 10


def test_skipped_counts_survive_a_change_of_readers(tmp_path, monkeypatch):
    """Samples that cannot be used are counted on, those by readers that are gone as well."""
    for shard in range(3):
        good = [sample(20 * shard + i) for i in range(20)]
        bad = [sample(200, txt=None), sample(201, cls=b"x")]
        write_tar(str(tmp_path / f"{shard}.tar"), bad + good)

    def stream(place=None):
        return lambda: tar_stream(str(tmp_path / "*.tar"), place=place)
    batches, place = on_ranks(monkeypatch, 2, stream(), 10)
    # each rank's last batch
    of_ranks = [Counter(batches[k]["state"]["skipped"]) for k in (9, 19)]
    assert all(of_ranks) and total_skipped(place) == of_ranks[0] + of_ranks[1]
    _, unread = on_ranks(monkeypatch, 4, stream(place), 0)
    assert len(unread["readers"]) == 4 and total_skipped(unread) == total_skipped(place)
    batches, later = on_ranks(monkeypatch, 1, stream(unread), 30)               # two epochs more
    own = Counter(batches[-1]["state"]["skipped"])
    assert total_skipped(later) == own + Counter(total_skipped(place))
    assert len(own) == 2 and own.total() >= 2 * 6


def test_tars_are_read_once_an_epoch(tars, monkeypatch):
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    take(tar_stream(tars, buffer=4), 14)
    assert len(opened) == 3 and len(set(opened)) == 3


def test_a_loader_process_whose_rank_has_died_ends():
    """Also where that was before it could begin to watch its rank: it would wait for work for ever."""
    code = "import os, data; data.begin_worker({}, 0); print('serves')"
    for pid_of_rank, served in (("os.getppid()", "serves\n"), ("os.getppid() + 1", "")):
        done = subprocess.run([sys.executable, "-c", code.format(pid_of_rank)], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.stdout == served and (done.returncode == 0) == bool(served)


def test_what_is_broken_is_skipped_and_counted(tmp_path):
    good = [sample(i) for i in range(40)]
    bad = [sample(104, json=b"[1, 2]"),
           sample(100, png=good[0]["png"][:30]),
           sample(101, txt=None),
           sample(102, png=None),
           sample(103, cls=b"zebra")]
    write_tar(str(tmp_path / "a-0.tar"), good[:20] + bad)
    write_tar(str(tmp_path / "a-1.tar"), good[20:])
    raw = (tmp_path / "a-1.tar").read_bytes()
    cut = raw.index(b"00015.png") + 600                           # inside the sixteenth sample
    (tmp_path / "a-1.tar").write_bytes(raw[:cut])
    pattern = str(tmp_path / "a-*.tar")
    batches = take(tar_stream(pattern, batch_size=5), 7)
    assert sorted(n for b in batches for n in numbers(b)) == list(range(35))
    last = take(tar_stream(pattern, batch_size=5), 8)[-1]         # one into the second epoch
    reasons = " ".join(last["state"]["skipped"])
    for word in ("broken image", "broken .json", "no caption", "no image", "label", "a-1.tar"):
        assert word in reasons


def test_a_cut_off_tar_ends_with_the_reason_in_place_of_a_sample(tmp_path):
    path = str(tmp_path / "cut.tar")
    write_tar(path, [sample(i) for i in range(4)])
    whole = list(read_tar(path))
    assert whole == [sample(i) for i in range(4)]
    assert list(read_tar(path, only_names=True)) == 4 * [dict(png=None, txt=None, cls=None)]
    raw = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(raw[:raw.index(b"00002.txt") + 510])     # within its text
    samples = list(read_tar(path))
    assert samples[:-1] == whole[:2] and list(samples[-1]) == ["broken tar"]
    with pytest.raises(BadSample, match="cut.tar"):
        TarSource([path], 8).decode(samples[-1], True)


def test_no_cut_of_a_tar_goes_unnoticed(tmp_path):
    """Wherever it is cut before its end mark, in headers and between members too, and damaged headers, data
    behind the mark: one sample says so. Counting, which reads headers alone, finds as many samples."""
    path = tmp_path / "t.tar"
    write_tar(str(path), [sample(i) for i in range(4)])
    raw = path.read_bytes()
    members = tarfile.open(path).getmembers()
    end = members[-1].offset_data + 512                     # of the last member: here the mark begins
    cuts = [*range(1, end, 97), *(m.offset for m in members), *(m.offset + 300 for m in members), end]
    damaged = [raw[:cut] for cut in cuts]
    damaged += [raw[:m.offset + 100] + b"?" * 50 + raw[m.offset + 150:] for m in members]
    damaged += [raw + raw, raw[:members[3].offset] + bytes(1024) + raw[members[3].offset:]]
    for content in damaged:
        path.write_bytes(content)
        samples = list(read_tar(str(path)))
        assert ["broken tar" in s for s in samples] == [False] * (len(samples) - 1) + [True]
        assert samples[:-1] == [sample(i) for i in range(len(samples) - 1)]
        assert len(list(read_tar(str(path), only_names=True))) == len(samples)
    path.write_bytes(raw[:end + 512])                       # half of the mark will do
    assert list(read_tar(str(path))) == [sample(i) for i in range(4)]


def test_a_very_long_image_is_cut_to_its_middle_before_it_is_enlarged(monkeypatch):
    """10,000 x 1 pixels would take 3 GB at 256: no step may hold more than the cut image enlarged."""
    largest, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *a, **k: (
        largest.append(size[0] * size[1]), real(image, size, *a, **k))[1])
    for size in ((10_000, 1), (1, 10_000)):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels.reshape(-1, 3)[4992:5008] = 200              # the middle 16
        canvas = load_canvas(io.BytesIO(encoded(Image.fromarray(pixels))), 64)
        assert canvas.shape == (3, 64, 64) and (canvas == 200).all()
    assert max(largest) <= 16 * 64 * 64


def test_squashed_images_are_resized_without_a_crop(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    source = open_source(str(tmp_path), 20, squash=True)
    expected = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC)
    image, _, _ = source.load(0, False, np.random.default_rng(0))
    assert (image == np.asarray(expected).transpose(2, 0, 1)).all()


def test_what_is_decoded_is_cut_out_of_its_canvas_and_not_resampled():
    generator = torch.Generator().manual_seed(0)
    canvases = torch.randint(256, (6, 3, 40, 40), dtype=torch.uint8, generator=generator)
    views = denormalize(data.clip_view(canvases, data.step_generator(0, 0, "cpu"), 6, 32, n_decoded=4)) * 255
    windows = canvases.float().unfold(2, 32, 1).unfold(3, 32, 1)            # (6, 3, 9, 9, 32, 32)
    distances = (windows - views[:, :, None, None]).abs().amax(dim=(1, 4, 5)).flatten(1).amin(dim=1)
    # fp32: a place is right to 1e-6 of a pixel
    assert (distances[:4] < 0.01).all() and (distances[4:] > 10).all()
    plain = data.clip_view(canvases, data.step_generator(0, 0, "cpu"), 6, 32)
    assert torch.equal(data.clip_view(canvases, data.step_generator(0, 0, "cpu"), 6, 32, 4)[4:], plain[4:])


def test_what_is_decoded_is_as_sharp_as_what_is_measured():
    """By the power of white noise in the highest quarter of frequencies."""
    def power(images):
        spectrum = torch.fft.fft2(images - images.mean(dim=(2, 3), keepdim=True)).abs() ** 2
        frequencies = torch.fft.fftfreq(64).abs()
        return spectrum[..., torch.maximum(frequencies[:, None], frequencies) >= 3 / 8].mean().item()
    rng, noise = np.random.default_rng(0), []
    for _ in range(4):
        noise.append(encoded(Image.fromarray(rng.integers(0, 256, (150, 150, 3), dtype=np.uint8))))
    canvases = {C: torch.tensor(np.stack([load_canvas(io.BytesIO(x), C) for x in noise])) for C in (64, 80)}
    measured = power(canvases[64] / 255)
    of = {C: power(denormalize(data.clip_view(x, data.step_generator(0, 0, "cpu"), 4, 64, 4))) / measured
          for C, x in canvases.items()}
    assert of[64] < 0.6 and of[80] > 1


def test_nothing_usable_or_too_much_broken_is_an_error(tmp_path):
    write_tar(str(tmp_path / "b.tar"), [sample(i, txt=None) for i in range(30)])
    with pytest.raises(RuntimeError, match="no caption"):
        take(tar_stream(str(tmp_path / "b.tar")), 1)
    # an autoencoder needs none
    without = tar_stream(str(tmp_path / "b.tar"), needs_caption=False)
    assert len(take(without, 3)) == 3
    (tmp_path / "c.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(RuntimeError, match="c.tar"):
        take(tar_stream(str(tmp_path / "c.tar")), 1)
    write_tar(str(tmp_path / "d.tar"), [])
    with pytest.raises(RuntimeError, match="no sample"):
        take(tar_stream(str(tmp_path / "d.tar")), 1)


def test_json_captions_and_labels(tmp_path):
    about = [dict(caption=f"c{i}", kind=["cat", "dog"][i % 2]) for i in range(8)]
    samples = [{"png": sample(i)["png"], "json": json.dumps(about[i]).encode()} for i in range(8)]
    write_tar(str(tmp_path / "j.tar"), samples)
    source = TarSource([str(tmp_path / "j.tar")], 8, class_names=["cat", "dog"], label="kind")
    (images, captions, labels), = EvaluationSet(source, 8)
    assert captions == [f"c{i}" for i in range(8)] and labels.tolist() == [0, 1] * 4


def test_an_evaluation_set_is_read_as_often_as_asked_and_is_never_in_memory_whole():
    class Canvas(np.ndarray):
        """An array that can be counted."""
    alive, most = weakref.WeakValueDictionary(), 0

    class Source:
        name = "canvases"

        def __len__(self):
            return 64

        def load(self, index, draft, rng):
            if index % 8 == 0:
                raise BadSample("no image")
            alive[index] = canvas = np.full((3, 2, 2), index, np.uint8).view(Canvas)
            return canvas, f"number {index}", index
    source, seen = Source(), []
    batches = data.EvaluationSet(source, 60, batch_size=5)
    for images, captions, labels in batches:
        most = max(most, len(alive))
        assert images.dtype == torch.uint8 and (images == labels.view(-1, 1, 1, 1)).all()
        assert captions == [f"number {label}" for label in labels]
        seen.append(labels.tolist())
    expected = [i for i in data.permutation(0, 0, 64)[:60].tolist() if i % 8]
    assert sum(seen, []) == expected == sum((labels.tolist() for _, _, labels in batches), [])
    assert {len(labels) for labels in seen[:-1]} == {5} and len(batches) == 12 >= len(seen)
    assert 0 < most <= 2 * 5 + 5 + 1        # those decoded ahead, a batch, and the next one's first
    with pytest.raises(UserError, match="no usable sample for evaluation in canvases.*'no image': 1"):
        list(data.EvaluationSet(source, 1, seed=next(
            seed for seed in range(99) if data.permutation(seed, 0, 64)[0] % 8 == 0)))


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
    batches = take(SampleStream(source, 6, word_tokenizer, 32, 0, 0, max_skipped=0.5), 2)
    assert sum(batches[-1]["state"]["skipped"].values()) == 1
    assert all(len(b["images"]) == 6 for b in batches)
    os.makedirs(tmp_path / "val" / "bee_fly")
    (tmp_path / "val" / "bee_fly" / "0.png").write_bytes(sample(1)["png"])
    validation = open_source(str(tmp_path / "val"), 8, folders=source.folders)
    assert validation.files[0][1] == 1                            # labels are the training set's
    os.makedirs(tmp_path / "val" / "cow")
    with pytest.raises(ValueError, match="cow"):
        open_source(str(tmp_path / "val"), 8, folders=source.folders)
    with pytest.raises(ValueError, match="3 class names"):
        FolderSource(folder, 8, ["a", "b", "c"])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_indexed_sources_resume_exactly_and_do_not_depend_on_workers(n_workers):
    source = data.BuiltinSource(20, 16)
    first = SampleStream(source, 6, word_tokenizer, 64, 0, 0)
    batches = take(first, 9)
    whole = [b["images"] for b in batches]
    epoch = torch.cat(whole)[:20]
    assert len({tuple(image.flatten().tolist()) for image in epoch}) == 20    # 20 scenes, each once
    for n in (0, 3, 4):
        place = place_after(first, batches[:n])
        resumed = SampleStream(source, 6, word_tokenizer, 64, 0, n_workers, place)
        rest = [b["images"] for b in take(resumed, 9 - n)]
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[n:]))


def test_ranks_share_the_global_batch(monkeypatch):
    source = data.BuiltinSource(20, 16)
    whole = take(SampleStream(source, 6, word_tokenizer, 64, 0, 0), 4)
    monkeypatch.setattr(data, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(data, "rank", lambda: r)
        for a, b in zip(whole, take(SampleStream(source, 6, word_tokenizer, 64, 0, 0), 4)):
            assert torch.equal(a["images"][r::3], b["images"])
            assert torch.equal(a["tokens"][r::3], b["tokens"])


# --- views ---

def test_resampling_is_pillows_bicubic_of_a_box():
    images = render_scenes(np.arange(4), "train", 64)[0]
    boxes = torch.tensor([[0.1, 0.3, 0.0, 0.5],
                          [0.2, 0.05, 0.0, 0.4],
                          [0.7, 0.5, 1.0, 0.2],
                          [0.5, 0.9, 1.0, 0.3]])
    is_flipped = torch.tensor([True, False, True, False])
    pixels = torch.tensor(images).float()
    for size in (24, 64, 100):
        ours = resample(pixels, boxes, size)
        flipped = resample(pixels, boxes, size, flip=is_flipped)
        two_of_each = torch.cat((boxes, boxes.flip(1)), dim=1)
        both = resample(pixels, two_of_each, size)
        for i in range(4):
            left, top, width, height = (boxes[:, i].double() * 64).tolist()
            box = (left, top, left + width, top + height)
            for channel in range(3):
                # mode F: with 8 bits Pillow rounds and clips between its two passes
                pillow = Image.fromarray(images[i, channel].astype(np.float32))
                pillow = np.asarray(pillow.resize((size, size), Image.Resampling.BICUBIC, box=box))
                # Of 255: the weights are fp32 here, double in Pillow. Places of up to 64 px are rounded
                # by 4e-6, and pixels differ by up to 255 from their neighbours in two axes: 2e-3.
                assert np.abs(ours[i, channel].numpy() - pillow).max() < 0.01
            expected = ours[i].flip(-1) if is_flipped[i] else ours[i]
            torch.testing.assert_close(flipped[i], expected, atol=1e-2, rtol=0)
        torch.testing.assert_close(both[:4], ours, atol=1e-2, rtol=0)


def test_boxes_have_the_area_and_aspect_asked_for():
    uniform = torch.rand(22, 5000, generator=step_generator(0, 0, "cpu"))
    left, top, width, height = draw_boxes(uniform, (0.32, 1.0))
    area, aspect = width * height, width / height
    # 1e-5 and 1e-6 are fp32's rounding; the other bounds, how near to the ends 5,000 draws come
    assert (left >= 0).all() and (left + width <= 1 + 1e-6).all()
    assert (top >= 0).all() and (top + height <= 1 + 1e-6).all()
    assert 0.32 - 1e-5 <= area.min() < 0.34 and area.max() > 0.95
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.34
    whole = draw_boxes(torch.ones(22, 1) * 0.999, (1.0, 1.0))     # nothing fits: the whole image
    assert torch.allclose(whole[:, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def slow_jitter(image, u, order):
    """The definition, one image (3, H, W) and one adjustment at a time: torchvision's blends, hue
    through colorsys."""
    luma = lambda x: 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    if u[0] < 0.8:
        for op in order:
            factor = (0.4, 0.4, 0.2, 0.1)[op] * (2 * u[2 + op] - 1)
            if op == 3:
                pixels = [colorsys.rgb_to_hsv(*p) for p in image.reshape(3, -1).T]
                pixels = [colorsys.hsv_to_rgb((h + factor) % 1, s, v) for h, s, v in pixels]
                image = np.array(pixels).T.reshape(image.shape)
            else:
                black = 0 * image
                mean_brightness = np.full_like(image, luma(image).mean())
                grey = np.stack([luma(image)] * 3)
                reference = (black, mean_brightness, grey)[op]
                image = np.clip(reference + (1 + factor) * (image - reference), 0, 1)
    return np.stack([luma(image)] * 3) if u[1] < 0.2 else image


def test_colour_jitter_equals_the_definition_in_every_order():
    images = torch.tensor(render_scenes(np.arange(48), "train", 8)[0]).float() / 255
    uniform = torch.rand(6, 48, generator=step_generator(0, 1, "cpu"))
    results = []
    for order in itertools.permutations(range(4)):
        ours = colour_jitter(images, uniform, order)
        for i in range(48):
            image, u = images[i].double().numpy(), uniform[:, i].double().numpy()
            expected = slow_jitter(image, u, order)
            # fp32 against double: seven operations, each of which rounds by 1e-7 and may double what is there
            assert np.abs(ours[i].numpy() - expected).max() < 2e-5
        results.append(ours)
    # the order tells: by clipping, and by where the hue is turned
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(results, 2))


def test_the_order_of_colour_jitter_is_drawn_anew_for_each_step_and_kind_of_crop(monkeypatch):
    orders = []

    def recorded(x, uniform, order):
        orders.append(order)
        return colour_jitter(x, uniform, order)
    monkeypatch.setattr(data, "colour_jitter", recorded)
    canvases = torch.tensor(render_scenes(np.arange(2), "train", 16)[0])
    for step in (*range(60), 7):
        ssl_views(canvases, step_generator(0, step, "cpu"), 2, 16, 8, 1)
    orders = [tuple(map(int, order)) for order in orders]               # global, local, global, ...
    assert len(orders) == 2 * 61 and orders[-2:] == orders[14:16]       # by (seed, step)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    # of 24; 60 draws miss 2 of them on average
    assert len(set(orders[::2])) > 15 and len(set(orders[1::2])) > 15
    # of 60 pairs, 2.5 are equal on average
    assert sum(a == b for a, b in zip(orders[::2], orders[1::2])) < 15


def test_gaussian_blur_is_nine_taps_with_reflected_borders():
    images = torch.tensor(render_scenes(np.arange(3), "train", 16)[0]).float() / 255
    sigma = torch.tensor([0.0, 0.7, 2.0])
    ours = gaussian_blur(images, sigma)
    assert torch.allclose(ours[0], images[0], atol=1e-6)          # a kernel of a single 1
    for i in (1, 2):
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma[i].item()) ** 2)
        kernel = kernel / kernel.sum()
        expected = images[i].double().numpy()
        for axis in (1, 2):
            expected = scipy.ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
        assert np.abs(ours[i].numpy() - expected).max() < 1e-5    # fp32 against double: two sums of nine


def test_views_depend_on_seed_and_step_not_on_the_number_of_ranks(monkeypatch):
    canvases = torch.tensor(render_scenes(np.arange(8), "train", 32)[0])

    def views(images, step=3):
        g, b = step_generator(0, step, "cpu"), len(images)
        clip = clip_view(images, g, 8, 32)
        crops = ssl_views(images, g, 8, 32, 16, 3)
        masks = draw_masks(g, 8, (4, 4))
        return [clip.unsqueeze(0),
                *(v.view(-1, b, 3, *v.shape[-2:]) for v in crops),
                masks.view(2, b, 16)]
    whole, other = views(canvases), views(canvases, step=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, views(canvases)))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other))
    assert [tuple(v.shape[:2]) for v in whole] == [(1, 8), (2, 8), (3, 8), (2, 8)]
    monkeypatch.setattr(data, "world_size", lambda: 4)
    for r in range(4):
        monkeypatch.setattr(data, "rank", lambda: r)
        for a, b in zip(whole, views(canvases[r::4])):
            # the mean of an image's brightness may be summed in another order: 1e-7, over a deviation of 0.22
            torch.testing.assert_close(b.float(), a[:, r::4].float(), atol=1e-5, rtol=1e-5)


def test_solarise_and_blur_rates(monkeypatch):
    canvases, sigmas = torch.full((400, 3, 16, 16), 0.9), []

    def recorded(x, sigma):
        sigmas.append(sigma)
        return gaussian_blur(x, sigma)
    monkeypatch.setattr(data, "gaussian_blur", recorded)
    uniform = torch.rand(32, 2, 400, generator=step_generator(0, 0, "cpu"))
    uniform[22 + 1] = uniform[22 + 2] = 0.99              # no jitter, no greyscale
    out = denormalize(augment(canvases, uniform, 16, (0.32, 1.0), (0.5, 1.0), (0.2, 0.0), range(4)))
    out, is_blurred = out[:, 0, 8, 8].view(2, 400), (sigmas[0] > 0).view(2, 400)
    solarised = (out - 0.1).abs() < 1e-3       # values are exact but for fp32's rounding; the others are 0.9
    # 400 draws at a rate of 0.2: standard deviation 0.02
    assert 0.14 < solarised[0].float().mean() < 0.26 and not solarised[1].any()
    assert torch.allclose(out[~solarised], torch.tensor(0.9), atol=1e-3)
    # at a rate of 0.5: standard deviation 0.025
    assert 0.42 < is_blurred[0].float().mean() < 0.58 and is_blurred[1].all()
    sigmas = sigmas[0][sigmas[0] > 0]
    assert 0.1 <= sigmas.min() < 0.12 and 1.98 < sigmas.max() <= 2.0


# --- masks ---

@pytest.mark.parametrize("grid, batch_size", [((4, 4), 8), ((16, 16), 64), ((3, 5), 6)])
def test_mask_counts_are_exact_and_spread_as_dinov2_wants(grid, batch_size):
    n = grid[0] * grid[1]
    for step in range(5):
        masks = draw_masks(step_generator(0, step, "cpu"), batch_size, grid)
        counts = draw_mask_counts(step_generator(0, step, "cpu"), batch_size, n).flatten()
        assert torch.equal(masks.sum(dim=1), counts)
        assert counts.sum() == batch_size // 2 * round(0.6 * n)   # whatever the step: static shapes
        assert (counts > 0).sum() == batch_size                   # half of the 2B crops
        shares = sorted((counts[counts > 0] / n).tolist())
        for i, share in enumerate(shares):
            # the i-th in the i-th of B slices of 0.1 to 0.5, to rounding to whole patches
            low, high = 0.1 + 0.4 * i / batch_size, 0.1 + 0.4 * (i + 1) / batch_size
            assert low - 1.01 / n <= share <= high + 1.01 / n


def test_masks_come_in_blocks():
    masks = draw_masks(step_generator(0, 0, "cpu"), 64, (16, 16)).view(-1, 16, 16).float()
    masks = masks[masks.sum(dim=(1, 2)) > 0]
    same = (masks[:, 1:] == masks[:, :-1]).float().mean()
    shuffled = masks.flatten(1)[:, torch.randperm(256)].view_as(masks)
    # At random places two neighbours agree with 1 - 2 m (1 - m), 0.61 on average over shares m, with a
    # standard deviation of 0.007; in blocks, all but those at a border.
    assert same > 0.85 > 0.65 > (shuffled[:, 1:] == shuffled[:, :-1]).float().mean()
