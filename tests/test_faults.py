"""What is damaged on disk is skipped and counted, or ends in one line; a run that is killed goes on to the
result that it would have had.

More of both, by hand: FAULT_SEED=1 FAULT_CASES=2000 FAULT_KILLS=50 pytest -s tests/test_faults.py"""
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the optimizer needs it, and each forked process would import it
from PIL import Image
from tqdm import tqdm

import data
import dit
import evaluate
import train_dit
import train_tokenizer
from data import (BadSample, EvaluationSet, SampleStream, TarSource, each_sample, read_tar,
                  word_tokenizer)
from test_data import write_tar
from vtp import UserError

SEED = int(os.environ.get("FAULT_SEED", 0))
KILLS = int(os.environ.get("FAULT_KILLS", 2))
CASES = int(os.environ.get("FAULT_CASES", 0))
CPU = torch.device("cpu")


def damage(raw, rng):
    """Bytes with one to three faults: bits flipped, bytes written over, a block swapped with another, put in
    once more, removed or zeroed, the end cut off."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        n = rng.choice((1, 2, 4, 16, 128, 512))
        kind = rng.choice(("bits", "bits", "bytes", "text", "swap", "again", "remove", "zero", "cut"))
        if kind == "bits":
            for k in range(i, min(i + rng.choice((1, 3)), len(raw))):
                raw[k] ^= 1 << rng.randrange(8)
        elif kind in ("bytes", "text"):  # such as JSON and numbers in headers are made of
            signs = bytes(range(256)) if kind == "bytes" else b'0123456789-.eE"{}[],: '
            raw[i:i + 2] = rng.choices(signs, k=len(raw[i:i + 2]))
        elif kind == "swap":
            raw[i:i + n], raw[j:j + n] = raw[j:j + n], raw[i:i + n]
        elif kind == "again":
            raw[i:i] = raw[j:j + n]
        elif kind == "remove":
            del raw[i:i + n]
        elif kind == "zero":
            raw[i:i + n] = bytes(len(raw[i:i + n]))
        else:
            del raw[i:]
    return bytes(raw)


def cases(what, n):
    """(number, generator) of each of n cases, or of as many as the environment says."""
    return ((k, random.Random(f"{what} {SEED} {k}")) for k in range(CASES or n))


def first_difference(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def peak_memory():
    """Of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(what, seen):
    print(f"\n{what}: {dict(sorted(seen.items()))}", end="")


# ----- Images ---------------------------------------------------------------------------------------------

def noise(mode, size, seed=0):
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2 ** 16, (size, size), np.uint16))
    return Image.fromarray(rng.integers(0, 256, (size, size, 4), np.uint8), "RGBA").convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FORMATS = {
    "png": [("RGB", {}), ("RGBA", {}), ("LA", {}), ("L", dict(transparency=7)), ("P", dict(transparency=3)),
            ("1", {}), ("I;16", {})],
    "jpeg": [("RGB", {}), ("L", dict(progressive=True)), ("CMYK", {})],
    "webp": [("RGB", {}), ("RGBA", dict(lossless=True))],
    "gif": [("P", {}), ("P", dict(transparency=3))],
    "tiff": [("RGB", {}), ("RGBA", dict(compression="tiff_lzw")), ("I;16", {}), ("CMYK", {}),
             ("RGB", dict(compression="jpeg"))],
    "bmp": [("RGB", {}), ("P", {})],
    "ppm": [("RGB", {}), ("L", {})]}


def with_checksums(png):
    """A PNG whose chunks have right checksums again: else each fault in a header would end there."""
    png, i = bytearray(png), 8
    while i + 12 <= len(png):
        end = i + 8 + int.from_bytes(png[i:i + 4], "big")
        png[end:end + 4] = zlib.crc32(png[i + 4:end]).to_bytes(4, "big")
        i = end + 4
    return bytes(png)


@pytest.mark.filterwarnings("ignore")       # Pillow warns of much that it then reads
def test_a_damaged_image_is_a_canvas_or_a_bad_sample():
    whole = [(kind, encoded(noise(mode, 48), kind, **more))
             for kind in FORMATS for mode, more in FORMATS[kind]]
    for kind, raw in whole:
        assert data.decode_canvas(io.BytesIO(raw), 16, False).shape == (3, 16, 16), kind
    seen, slowest, memory_before = Counter(), 0.0, peak_memory()
    for case, rng in cases("images", 600):
        kind, raw = rng.choice(whole)
        head = rng.choice((64, 256, len(raw)))       # where sizes, modes and offsets stand
        broken = damage(raw[:head], rng) + raw[head:]
        if kind == "png" and rng.random() < 0.7:
            broken = with_checksums(broken)
        start = time.perf_counter()
        try:
            canvas = data.decode_canvas(io.BytesIO(broken), 16, rng.random() < 0.5, rng.random() < 0.2)
            assert canvas.shape == (3, 16, 16) and canvas.dtype == np.uint8, case
            seen[f"{kind} loaded"] += 1
        except BadSample as reason:
            assert str(reason).startswith("broken image"), case
            seen[f"{kind} skipped"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    report(f"images (slowest {slowest:.2f} s)", seen)
    # at most 2^27 pixels are decoded, a second or two of work
    assert slowest < 20 and peak_memory() - memory_before < 1.5 * 2 ** 20


@pytest.mark.filterwarnings("ignore")
def test_an_image_that_would_fill_the_memory_is_a_bad_sample():
    """Of 2 KB, with 9,500 x 9,500 pixels: 16 bytes each, as a WebP takes, are 1.4 GB."""
    raw = bytearray(encoded(Image.new("RGBA", (9500, 1)), "png"))
    raw[20:24] = (9500).to_bytes(4, "big")
    with pytest.raises(BadSample, match="DecompressionBomb"):
        data.decode_canvas(io.BytesIO(with_checksums(raw)), 16)


# ----- Tars -----------------------------------------------------------------------------------------------

def tar_samples(n):
    kinds = [(kind, encoded(noise(mode, 32, i), kind)) for i in range(n)
             for kind, mode in [(("png", "RGB"), ("jpeg", "RGB"), ("webp", "RGBA"))[i % 3]]]
    samples = [{kind.replace("jpeg", "jpg"): raw} for kind, raw in kinds]
    for i, sample in enumerate(samples):
        if i % 4 == 3:
            sample["json"] = json.dumps(dict(caption=f"number {i}", more=list(range(9)))).encode()
        else:
            sample["txt"] = f"number {i}".encode()
        sample["cls"] = str(i % 5).encode()
    return samples


def header_places(raw):
    """Where the headers of a tar stand, as (place, is it a sample's first)."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members = [(m.offset, m.name.partition(".")[0]) for m in tar]
    return [(place, k == 0 or name != members[k - 1][1]) for k, (place, name) in enumerate(members)]


def with_right_sums(raw, places):
    """The checksum of each header made right: else each fault in one would end there."""
    raw = bytearray(raw)
    for i in places:
        header = raw[i:i + 512]
        total = sum(header) - sum(header[148:156]) + 8 * 32
        raw[i + 148:i + 156] = b"%06o\0 " % total
    return bytes(raw)


def damaged_tar(raw, rng, is_zipped):
    """-> bytes, how many samples must still come: those whose next sample's header lies before the damage."""
    places = header_places(raw)
    kind = rng.choice(("anywhere", "header", "header", "zipped" if is_zipped else "anywhere"))
    broken, zipped = raw, None
    if kind == "anywhere":
        broken = damage(raw, rng)
    elif kind == "header":
        i = rng.choice(places)[0]
        header = damage(raw[i:i + 512], rng)[:512].ljust(512, b"\0")
        broken = with_right_sums(raw[:i] + header + raw[i + 512:], [i])
    if is_zipped:
        zipped = gzip.compress(broken, mtime=0)
    end = first_difference(raw, broken)
    if kind == "zipped":
        whole, zipped = zipped, damage(zipped, rng)
        # tarfile reads 10,240 bytes at a time, and what comes out of the last ones is lost
        end = len(zlib.decompressobj(31).decompress(whole[:max(first_difference(whole, zipped) - 10240, 0)]))
    n_before = sum(place + 512 <= end for place, is_first in places if is_first) - 1
    return zipped or broken, max(n_before, 0)


def outcomes(source):
    """Of each sample of a source the loaded one, or the reason why it is skipped."""
    for _, _, load in each_sample(source):
        try:
            yield load()
        except BadSample as reason:
            yield str(reason)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zipped", [False, True])
def test_of_a_damaged_tar_what_is_whole_comes_and_the_rest_is_counted(tmp_path, capsys, is_zipped):
    whole, path = tar_samples(16), tmp_path / "0.tar"
    write_tar(str(path), whole)
    raw, seen, slowest = path.read_bytes(), Counter(), 0.0
    source = TarSource([str(path)], 16)
    expected = list(outcomes(source))
    assert [caption for _, caption, _ in expected] == [f"number {i}" for i in range(16)]
    for case, rng in cases(f"tars {is_zipped}", 40):
        broken, n_before = damaged_tar(raw, rng, is_zipped)
        path.write_bytes(broken)
        start = time.perf_counter()
        samples = list(read_tar(str(path)))
        assert samples[:n_before] == whole[:n_before], case
        assert not any("broken tar" in sample for sample in samples[:-1]), case
        found = list(outcomes(source))
        good = [x for x in found if not isinstance(x, str)]
        assert len(found) == len(samples), case
        for (image, *rest), (of_whole, *rest_of_whole) in zip(found[:n_before], expected):
            assert np.array_equal(image, of_whole) and rest == rest_of_whole, case
        try:
            batches = EvaluationSet(source, 1000, batch_size=3)
            assert sum(len(labels) for _, _, labels in batches) == len(good) > 0, case
        except UserError as error:
            assert not good and str(path.name) in str(error), case
        n_bad = len(found) - len(good)
        try:
            stream = SampleStream(source, 4, word_tokenizer, 16, seed=0, n_workers=0, max_skipped=0.6)
            batches = [batch for batch, _ in zip(stream, range(len(good)))]         # four epochs
            counted = sum(batches[-1]["state"]["skipped"].values())
            assert 3 * n_bad <= counted <= 4 * n_bad, case
        except UserError as error:
            assert "cannot be used" in str(error) and n_bad > 0.6 * len(found) or not found, case
        check_cache(tmp_path / str(case), source, found, case)
        slowest = max(slowest, time.perf_counter() - start)
        ends = "broken tar" in samples[-1] if samples else False
        seen.update({"tars that end early": ends, "samples loaded": len(good), "samples skipped": n_bad,
                     "tars": 1, "tars without a good sample": not good, "tars that load whole": n_bad == 0})
    with capsys.disabled():
        report(f"tars{', zipped' * is_zipped} (slowest {slowest:.2f} s)", seen)
    assert slowest < 20


def test_a_member_of_a_tar_cannot_say_that_it_is_larger_than_its_file(tmp_path):
    """GNU's sparse files hold what is not zero, and a size, here of 256 MB."""
    path = tmp_path / "0.tar"
    write_tar(str(path), [dict(txt=b"abc", cls=b"1")])
    raw = bytearray(path.read_bytes())
    raw[156:157], raw[386:410], raw[483:495] = b"S", b"%011o\0%011o\0" % (0, 3), b"%011o\0" % 2 ** 28
    path.write_bytes(with_right_sums(raw, [0]))
    assert list(read_tar(str(path))) == [dict(cls=b"1")]


def check_cache(folder, source, found, case):
    """The cache has the labels of all good samples, each in its row."""
    source = TarSource(source.paths, source.canvas, needs_caption=False)
    found = list(outcomes(source))
    labels = [x if isinstance(x, str) else max(x[2], -1) for x in found]
    means = partial(torch.nn.functional.adaptive_avg_pool2d, output_size=2)
    try:
        encode = lambda images: means(images.float())
        cache, _ = train_dit.complete_cache(str(folder), source, encode, (3, 2, 2), {}, 0.6)
    except UserError as error:
        n_bad = sum(isinstance(label, str) for label in labels)
        assert "cannot be used" in str(error) and n_bad or "has a class" in str(error), (case, error)
    else:
        assert [label for label in cache.labels if label != train_dit.UNUSABLE] == \
            [label for label in labels if not isinstance(label, str)], case


# ----- Micro runs -----------------------------------------------------------------------------------------

LEARN = ["--samples", "24", "--batch_size", "4", "--ssl_batch_size", "2", "--rec_batch_size", "2",
         "--prototypes", "32", "--n_local", "2", "--train_size", "32", "--eval_samples", "8",
         "--log_every", "1", "--precision", "fp32", "--eval_every", "3", "--checkpoint_every", "2",
         "--drop_path_ssl", "0.4"]
DRAW = ["--samples", "48", "--batch_size", "8", "--train_size", "32", "--log_every", "1", "--eval_every", "3",
        "--checkpoint_every", "2", "--precision", "fp32", "--steps", "3", "--eval_samples", "8"]
MEASURE = ["--n_val", "16", "--n_train", "32", "--n_samples", "12", "--batch_size", "8"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """An SSL head, a DiT, a judge and probes that cost as little as the micro model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "TINY_HEAD_SIZE", (32, 16))
        patch.setitem(dit.DIT_SIZES, "tiny", dict(dim=32, depth=2, n_heads=2, patch_size=1))
        patch.setattr(evaluate, "linear_probe", partial(evaluate.linear_probe, n_steps=9))
        patch.setattr(train_tokenizer, "matmul_rate", lambda device: 1e9)
        patch.setattr(evaluate, "train_judge", partial(evaluate.train_judge, n_steps=2, batch_size=4))
        yield


def live_processes(group):
    """Ids of the processes of a group that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = place.read_text().rpartition(") ")[2].split()[:3]
            found += [place.parent.name] if int(its_group) == group and state != "Z" else []
    return found


class Run:
    """A script's main, in a process of its own, which is forked: it needs no second to import torch."""
    def __init__(self, main, arguments, log):
        def child():
            os.setsid()
            # tqdm's own lock is shared with all forked processes: one that is killed might hold it for ever
            tqdm.set_lock(threading.RLock())
            torch.set_num_threads(1)        # OpenMP's threads do not survive a fork
            sys.stdout = sys.stderr = open(log, "a", buffering=1)
            for descriptor in (1, 2):       # nor may a process that stays hold the pipe of whoever runs this
                os.dup2(sys.stdout.fileno(), descriptor)
            main([str(x) for x in arguments])
        self.log, self.process = log, multiprocessing.get_context("fork").Process(target=child)
        self.process.start()

    def end(self, seconds=None):
        """Wait, or after so many seconds kill -> did it end by itself?"""
        self.process.join(120 if seconds is None else seconds)
        if self.process.exitcode is None:
            assert seconds is not None, f"it hangs: {Path(self.log).read_text()[-2000:]}"
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
        return self.process.exitcode != -signal.SIGKILL


def run_to_the_end(main, arguments, log):
    run = Run(main, arguments, log)
    run.end()
    assert run.process.exitcode == 0, Path(log).read_text()[-2000:]


@pytest.fixture(scope="module")
def finished(micro_model, tmp_path_factory):
    """A folder with runs that nothing disturbed: tok, dit and its cache."""
    root = tmp_path_factory.mktemp("finished")
    (root / "tars").mkdir()
    for shard in range(3):
        write_tar(str(root / "tars" / f"{shard}.tar"), tar_samples(8))
    run_to_the_end(train_tokenizer.main, ["--init", micro_model, "--out", root / "tok", *LEARN], root / "log")
    run_to_the_end(train_dit.main, ["--tokenizer", root / "tok", "--cache", root / "cache", "--out",
                                    root / "dit", *DRAW], root / "log")
    return root


# ----- What runs leave: files -----------------------------------------------------------------------------

def damage_part(raw, rng):
    """Bytes with faults in their first part, their last one, or anywhere: there lie headers and lists."""
    n = rng.choice((200, 4000, len(raw)))
    start = rng.choice((0, max(len(raw) - n, 0), rng.randrange(len(raw))))
    return raw[:start] + damage(raw[start:start + n], rng) + raw[start + n:]


def reader_of(kind, finished, micro_model, folder):
    """A file that a run left, and what reads a damaged copy of it in a folder, to be compared."""
    if kind == "checkpoint of the tokenizer":
        args, config = train_tokenizer.read_settings(["--init", micro_model, "--out", str(folder), *LEARN])
        state = train_tokenizer.build_state(args, config, CPU)

        def read(path):
            place = train_tokenizer.load_checkpoint(path, state, CPU)
            modules = [module.state_dict() for module in state.modules().values()]
            return leaves([place, state.optimizer.state_dict(), *modules])
        return finished / "tok" / "checkpoint.pt", read
    if kind == "checkpoint of the DiT":
        read = lambda path: leaves(dit.DiT.from_lightningdit(path).state_dict())
        return finished / "dit" / "checkpoint.pt", read
    if kind == "latent statistics":
        return finished / "dit" / "latents_stats.pt", lambda path: leaves(evaluate.read_latent_stats(path))
    rng = np.random.default_rng(0)
    if kind == "images in a .npz":
        images = rng.integers(0, 256, (9, 4, 5, 3), np.uint8)
        np.savez(folder / "whole.npz", arr_0=images, arr_1=np.arange(9))
        return folder / "whole.npz", lambda path: leaves(evaluate.ImageSet(path).batch(range(9)))
    np.savez_compressed(folder / "whole.npz", mu=rng.normal(size=9), sigma=np.eye(9), arr_1=np.arange(9))
    read = lambda path: {name: x.tobytes() for name, x in evaluate.load_statistics(path).items()}
    return folder / "whole.npz", read


@pytest.mark.parametrize("kind", ["checkpoint of the tokenizer", "checkpoint of the DiT", "latent statistics",
                                  "images in a .npz", "statistics in a .npz"])
def test_a_damaged_file_is_read_as_it_was_written_or_named(finished, micro_model, tmp_path, kind, capsys):
    whole, read = reader_of(kind, finished, micro_model, tmp_path)
    raw, path, seen = whole.read_bytes(), tmp_path / f"broken{whole.suffix}", Counter()
    expected = read(str(whole))
    for case, rng in cases(kind, 60):
        path.write_bytes(damage_part(raw, rng))
        try:
            assert read(str(path)) == expected, case
            seen["loaded"] += 1
        except (ValueError, OSError, UserError) as error:
            assert str(path) in str(error) and "\n" not in str(error), (case, error)
            seen["one line"] += 1
    with capsys.disabled():
        report(kind, seen)


def test_a_damaged_judge_is_read_as_it_was_written_or_made_anew(finished, tmp_path, capsys):
    raw, path, seen = (finished / "cache" / "judge.pt").read_bytes(), tmp_path / "judge.pt", Counter()
    fingerprint = torch.load(finished / "cache" / "judge.pt", weights_only=True)["fingerprint"]
    expected = leaves(evaluate.read_judge(str(finished / "cache" / "judge.pt"), 10, fingerprint).state_dict())
    for case, rng in cases("judge", 30):
        path.write_bytes(damage_part(raw, rng))
        judge = evaluate.read_judge(str(path), 10, fingerprint)
        assert judge is None or leaves(judge.state_dict()) == expected, case
        seen["made anew" if judge is None else "loaded"] += 1
    with capsys.disabled():
        report("judge", seen)


def test_a_damaged_latent_cache_is_completed_to_what_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dit, "SHARD_ROWS", 8)
    source, folder, seen, n_encoded = data.BuiltinSource(20, 16), tmp_path / "cache", Counter(), []

    def complete():
        def means(images):
            n_encoded.append(len(images))
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2)
        n_encoded.clear()
        cache, _ = train_dit.complete_cache(str(folder), source, means, (3, 2, 2), dict(data="scenes"))
        return leaves([cache.latents_at(np.arange(20)), cache.labels.tolist(), cache.mean, cache.std,
                       cache.class_names])
    expected = complete()
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    assert len(whole) == 5
    for case, rng in cases("cache", 30):
        path = rng.choice(sorted(whole))
        broken = damage_part(whole[path], rng)
        if path.suffix == ".bin":                   # latents have no checksum: a kill could only cut them off
            broken = whole[path][:rng.randrange(len(whole[path]))]
        path.write_bytes(broken)
        assert complete() == expected, case
        seen[f"{path.name}, {sum(n_encoded) // 2} rows encoded"] += 1
        for path, raw in whole.items():
            path.write_bytes(raw)
    with capsys.disabled():
        report("cache", seen)


@pytest.mark.filterwarnings("ignore")
def test_of_damaged_metrics_whole_rows_are_read_and_drawn(finished, tmp_path, capsys):
    raw, path, seen = (finished / "tok" / "metrics.jsonl").read_bytes(), tmp_path / "metrics.jsonl", Counter()
    rows = [json.loads(line) for line in raw.splitlines()]
    for case, rng in cases("metrics", 20):
        path.write_bytes(broken := damage(raw, rng))
        found, whole = evaluate.read_metrics(str(tmp_path)), set(raw.splitlines()) & set(broken.splitlines())
        assert all(json.loads(line) in found for line in whole), case
        seen.update(rows_kept=len(found), rows_lost=len(rows) - len(found))
        evaluate.training_curves(str(tmp_path))
        with contextlib.suppress(ValueError):       # no row of kind eval is left
            evaluate.plot_runs([str(tmp_path)])
    with capsys.disabled():
        report("metrics", seen)


def test_damaged_arguments_of_a_run_are_taken_or_named_in_one_line(finished, tmp_path, capsys):
    """run.json, by all that read it."""
    def ways(run):
        tok = str(finished / "tok")
        if run == "tok":
            return [lambda: train_tokenizer.read_settings(["--out", str(tmp_path), "--resume"])[0],
                    lambda: evaluate.read_settings(["--tokenizer", str(tmp_path)])]
        return [lambda: train_dit.read_settings(["--out", str(tmp_path), "--resume"]),
                lambda: train_dit.read_settings(["--sample", "4", "--checkpoint", str(tmp_path),
                                                 "--out", "x.npz"]),
                lambda: evaluate.read_settings(["--tokenizer", tok, "--dit", str(tmp_path)])]
    seen = Counter()
    for run in ("tok", "dit"):
        shutil.copytree(finished / run, tmp_path, dirs_exist_ok=True)
        raw = (finished / run / "run.json").read_bytes()
        of_whole = [vars(read()) for read in ways(run)]
        start = raw.index(b"arguments")
        for case, rng in cases(run, 30):
            broken = raw[:start] + damage(raw[start:raw.index(b"}") + 1], rng) + raw[raw.index(b"}") + 1:]
            (tmp_path / "run.json").write_bytes(broken)
            for way, (read, whole) in enumerate(zip(ways(run), of_whole)):
                try:
                    assert vars(read()).keys() == whole.keys(), (case, way)
                    seen["taken"] += 1
                except SystemExit as stop:
                    assert stop.code == 2, (case, way)
                    seen["one line"] += 1
    capsys.readouterr()
    with capsys.disabled():
        report("run.json", seen)


# ----- Kills ----------------------------------------------------------------------------------------------

def leaves(value):
    """All that a checkpoint holds, tensors as bytes."""
    if isinstance(value, dict):
        return {str(k): leaves(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [leaves(v) for v in value]
    if torch.is_tensor(value):
        return value.dtype, value.shape, value.flatten().view(torch.uint8).numpy().tobytes()
    return value


FIELDS = {"samples_per_second", "flops_per_second", "matmul_share", "data_share"}       # of this machine


def results(folder):
    """{file: what must be the same, whatever happened on the way} of all that lies in a folder."""
    found = {}
    for path in sorted(x for x in Path(folder).rglob("*") if x.is_file() and x.name != ".lock"):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        if path.suffix == ".pt":
            content = leaves(torch.load(path, weights_only=True))
        elif path.name == "metrics.jsonl":
            rows = map(json.loads, content.splitlines())
            content = [{k: v for k, v in row.items() if k not in FIELDS} for row in rows]
        elif path.name in ("run.json", "results.json"):
            content = json.loads(content).get("figures")
        elif path.suffix == ".npz":
            content = {k: v.tobytes() for k, v in np.load(path).items()}
        found[name] = content
    return found


def command_of(kind, finished, micro_model, folder):
    """A script's main, and arguments with which all that it leaves lies in a folder."""
    out, sample = folder / "out", ["--sample", 10, "--checkpoint", finished / "dit", "--sample_batch", 4]
    if kind == "tokenizer":
        return train_tokenizer.main, ["--init", micro_model, "--out", out, *LEARN]
    if kind == "tokenizer of tars":
        tars = ["--data", finished / "tars", "--val_data", finished / "tars", "--workers", 2]
        return train_tokenizer.main, ["--init", micro_model, "--out", out, *LEARN, *tars]
    if kind == "DiT":
        cache = ["--tokenizer", finished / "tok", "--cache", folder / "cache"]
        return train_dit.main, [*cache, "--out", out, *DRAW]
    if kind == "evaluation":
        shutil.copytree(finished / "tok", folder / "tok")
        (finished / "cache" / "judge.pt").unlink(missing_ok=True)       # it is made anew
        runs = ["--tokenizer", folder / "tok", "--dit", finished / "dit"]
        return evaluate.main, [*runs, "--out", out, *MEASURE]
    return train_dit.main, [*sample, "--out", f"{out}.npz" if kind == "samples in a .npz" else out]


KINDS = ("tokenizer", "tokenizer of tars", "DiT", "images", "samples in a .npz", "evaluation")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_ends_as_one_that_is_not(finished, micro_model, tmp_path, kind, capsys):
    """Killed, and started again at once by the command that its state asks for, until it ends."""
    rng, n_kills, wanted, seen = random.Random(f"{kind} {SEED}"), 0, KILLS, Counter()
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.monotonic()
    run_to_the_end(*command_of(kind, finished, micro_model, whole), tmp_path / "log")
    seconds, expected = time.monotonic() - start, results(whole)
    while n_kills < wanted:
        folder, killed = tmp_path / f"chain {n_kills}", []
        folder.mkdir()
        main, arguments = command_of(kind, finished, micro_model, folder)
        while True:
            can_resume = (folder / "out" / "run.json").exists()
            seen["resumed" if can_resume else "started"] += 1
            go_on = ["--out", folder / "out", "--resume"]
            run = Run(main, go_on if can_resume else arguments, tmp_path / "log")
            if run.end(rng.random() * seconds if n_kills < wanted else None):
                break
            n_kills += 1
            killed.append(run.process.pid)
        assert run.process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
        ended = time.monotonic()
        while any(map(live_processes, killed)):     # loader processes look every 5 s if their rank lives
            assert time.monotonic() < ended + 10
            time.sleep(0.1)
        found = results(folder)
        assert sorted(found) == sorted(expected)
        for name in expected:
            assert found[name] == expected[name], name
        shutil.rmtree(folder)
        seen["chains"] += 1
    with capsys.disabled():
        report(f"{kind}, {seconds:.1f} s, {n_kills} kills", seen)
