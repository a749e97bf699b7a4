"""
Where samples come from, and the views, masks and tokens made of them.

A sample is a canvas, uint8 (3, C, C), a caption, and a label (-1: none). A batch is a dict, as
make_loader(SampleStream(open_source(...), ...)) gives it:

    images  uint8 (b, 3, C, C)      this rank's share of the global batch
    tokens  int64 (b, L), or None   captions as the text tower reads them
    labels  int64 (b,)
    reader, state                   who made it, and where that reader stands now (see SampleStream)

Crops, colours and masks are drawn on the device from (seed, step) for the global batch, of which rank r takes
every W-th sample: the number of ranks changes nothing.

How fast all this is on a machine and a set, and how many loader processes an H100 takes:
    python data.py --benchmark --data 'train-{00000..00041}.tar'
"""
import argparse
import functools
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import signal
import tarfile
import time
import unicodedata
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from losses import gather_objects, keep_freed_memory, one_line_errors, rank, world_size
from vtp import UserError, constant, download, normalize

# ----- Sources --------------------------------------------------------------------------------------------
# Each has name, class_names, fingerprint(), and for random access len() and load(), or walk() and decode().

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
# Captions of images that have only a class, and zero-shot classification's default.
TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a good photo of a {}",
             "a close-up photo of a {}", "a small {}", "a large {}", "{}")


LONGEST = 16  # of an image's long side by its short one; what is longer is cut to its middle
LARGEST = 90_000_000  # pixels of an image, up to 16 bytes each while it is decoded; Pillow allows twice that


class BadSample(Exception):
    """A sample that cannot be used; its message is the reason that is counted."""


def open_source(where, canvas, split="train", train_size=8192, classnames=None, label="cls",
                needs_caption=True, folders=None, squash=False, hold_out_pairs=False):
    """The source that --data means: the built-in set (None), a folder of class folders, or tars.
    classnames: a file of class names, a line each. hold_out_pairs: of the built-in set, see HELD_OUT_PAIRS.
    Raises FileNotFoundError or ValueError."""
    lines = Path(classnames).read_text("utf-8").split("\n") if classnames else []
    names = [line.strip() for line in lines if line.strip()] if classnames else None
    if where is None:
        return BuiltinSource(train_size if split == "train" else 2048, canvas, split, hold_out_pairs)
    tars = sorted(glob.glob(os.path.join(where, "*.tar"))) if os.path.isdir(where) else find_tars(where)
    if tars:
        return TarSource(tars, canvas, names, label, needs_caption, squash=squash)
    return FolderSource(where, canvas, names, folders, squash)


def load_canvas(file, canvas, draft=False, squash=False):
    """An image (path or binary file) -> uint8 array (3, canvas, canvas), as ADM and the authors make it:
    upright by EXIF, transparency on white, RGB; halved by a box filter while the short side is at least twice
    the canvas, bicubic to the canvas, centre crop. Raises what Pillow raises. draft: a JPEG may decode
    smaller, much faster and slightly different. squash: bicubic to the canvas at once, without a crop."""
    image = Image.open(file)
    if image.width * image.height > LARGEST:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if draft:
        image.draft("RGB", (2 * canvas, 2 * canvas))  # JPEG only, never below what the box filter leaves
    image = ImageOps.exif_transpose(image)
    if max(image.size) > LONGEST * min(image.size) and not squash:  # or its enlargement would fill the memory
        side = LONGEST * min(image.size)
        left, top = ((n - min(n, side)) // 2 for n in image.size)
        image = image.crop((left, top, left + min(image.width, side), top + min(image.height, side)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if squash:
        return np.asarray(image.resize((canvas, canvas), Image.BICUBIC)).transpose(2, 0, 1)
    while min(image.size) >= 2 * canvas:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, canvas / min(image.size), Image.BICUBIC)
    left, top = (image.width - canvas) // 2, (image.height - canvas) // 2
    return np.asarray(image.crop((left, top, left + canvas, top + canvas))).transpose(2, 0, 1)


def decode_canvas(file, *options):
    """load_canvas with BadSample for what Pillow raises."""
    try:
        return load_canvas(file, *options)
    except Exception as error:
        raise BadSample(f"broken image ({type(error).__name__})") from error


def digest_of(*parts):
    """A fingerprint, 16 hexadecimal digits, of anything that str can write."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def file_states(paths):
    """Size and time of each file: with its name, what tells that it is still the same."""
    with ThreadPoolExecutor(16) as pool:  # on a network each answer takes its time
        return [f"{s.st_size} {s.st_mtime_ns}" for s in pool.map(os.stat, paths)]


class BuiltinSource:
    """The procedural scenes, rendered once into memory. split: "train" or "val".
    hold_out_pairs: "train" is without the scenes that have one of HELD_OUT_PAIRS."""
    def __init__(self, size, canvas, split="train", hold_out_pairs=False):
        self.name, self.class_names = f"built-in scenes ({split}, {size:,})", list(SHAPES)
        self.split, self.indices = split, np.arange(size)
        if hold_out_pairs and split == "train":
            self.name = self.name.replace(")", f", without {len(HELD_OUT_PAIRS)} pairs of shape and colour)")
            p = draw_parameters(np.arange(2 * size + 100), split)
            self.indices = np.flatnonzero(~has_held_out_pair(p, either=True))[:size]
        self.images, self.captions, self.labels = render_scenes(self.indices, split, canvas)

    def __len__(self):
        return len(self.images)

    def fingerprint(self, with_captions=False):
        return digest_of("built-in", len(self), zlib.crc32(self.images[:64]), zlib.crc32(self.labels))

    def attributes(self):
        """What scenes show, as numbers in ATTRIBUTES: int64 (N, 5), -1 where there is no answer."""
        p = draw_parameters(self.indices, self.split)
        shown = np.stack([p["shape"], p["colour"], p["size"], p["place"], p["backdrop"]], axis=1)
        # of two objects the main one makes room for the other, whose place is given
        shown[p["pair"], 2:4] = -1
        return shown

    def attributes_said(self):
        """The same where captions say it, else -1."""
        p = draw_parameters(self.indices, self.split)
        is_said = np.stack([write_caption(p, i)[1] for i in range(len(self))])
        return np.where(is_said, self.attributes(), -1)

    def load(self, index, draft, rng):
        return self.images[index], self.captions[index], int(self.labels[index])


class FolderSource:
    """A folder of class folders of images. Captions: NAME.txt beside NAME.jpg, else the class in a template.
    folders: the class of each label (for held-out data, the training set's)."""
    def __init__(self, folder, canvas, class_names=None, folders=None, squash=False):
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.canvas, self.squash = canvas, squash
        self.name, self.folders = folder, folders or found
        if unknown := sorted(set(found) - set(self.folders)):
            raise ValueError(f"{folder} has classes that the training data lacks: {', '.join(unknown[:5])}")
        self.files = [(os.path.join(root, file), label)
                      for label, name in enumerate(self.folders)
                      for root, _, files in sorted(os.walk(os.path.join(folder, name), followlinks=True))
                      for file in sorted(files) if file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        if not self.files:
            raise ValueError(f"{folder} holds no images in class folders (CLASS/NAME.jpg), nor tars")
        self.class_names = class_names or [name.replace("_", " ") for name in self.folders]
        if class_names is not None and len(class_names) != len(self.folders):
            raise ValueError(f"{len(class_names)} class names for {len(self.folders)} folders in {folder}")

    def __len__(self):
        return len(self.files)

    def fingerprint(self, with_captions=False):
        start, states = len(os.path.join(self.name, "")), file_states(path for path, _ in self.files)
        files = [f"{p[start:]} {label} {x}" for (p, label), x in zip(self.files, states)]
        if with_captions:
            sidecars = [Path(path).with_suffix(".txt") for path, _ in self.files]
            sidecars = [path for path in sidecars if path.is_file()]
            names = [os.path.relpath(path, self.name) for path in sidecars]
            files += [*self.class_names, *names, *file_states(sidecars)]
        return digest_of("folder", *files)

    def load(self, index, draft, rng):
        path, label = self.files[index]
        image = decode_canvas(path, self.canvas, draft, self.squash)
        sidecar = Path(path).with_suffix(".txt")
        if sidecar.exists():
            return image, sidecar.read_text("utf-8", "replace").strip(), label
        return image, TEMPLATES[rng.integers(len(TEMPLATES))].format(self.class_names[label]), label


class TarSource:
    """WebDataset tars: KEY.jpg (or another image), KEY.txt or KEY.json (its "caption"), perhaps KEY.cls.
    label: "cls" or a field of KEY.json; a label is a number or one of class_names. In training a reader
    shuffles shuffle_buffer samples at a time, from at_once shards if it has so many in an epoch."""
    def __init__(self, paths, canvas, class_names=None, label="cls", needs_caption=True, shuffle_buffer=1024,
                 at_once=4, squash=False):
        self.paths, self.canvas, self.class_names, self.label = paths, canvas, class_names, label
        self.shuffle_buffer, self.at_once = shuffle_buffer, at_once
        self.needs_caption, self.squash = needs_caption, squash
        self.name = f"{len(paths)} tars, {os.path.basename(paths[0])} ..."

    def fingerprint(self, with_captions=False):
        names = (os.path.basename(path) for path in self.paths)
        return digest_of("tars", self.label, self.class_names, *names, *file_states(self.paths))

    def walk(self, visits, parts=1, seed=None, at_once=1):
        """The samples of visits (v, number in the shard to begin at): (open, shard, number in the shard,
        {extension: bytes}). Visit v reads every parts-th sample of a shard. v counts all parts of all shards,
        and on through epochs, each in a random order (seed None: in order). at_once visits of an epoch are
        open and give a sample each in turn; open has the next number of each, {v: number}, this sample's
        first; at the end of an epoch also of those that have ended."""
        def samples_of(visit, first):
            epoch, place = divmod(visit // parts, len(self.paths))
            shard = place if seed is None else int(permutation(seed, epoch, len(self.paths))[place])
            for number, sample in enumerate(read_tar(self.paths[shard])):
                if number >= first and number % parts == visit % parts:
                    yield shard, number, sample

        def begin(n):
            return [(*visit, samples_of(*visit)) for visit in itertools.islice(of_epoch, n)]
        n_empty = 0
        for _, of_epoch in itertools.groupby(visits, lambda item: item[0] // (parts * len(self.paths))):
            opened, ended = deque(begin(at_once)), {}
            while opened:
                visit, first, samples = opened.popleft()
                if found := next(samples, None):
                    shard, number, sample = found
                    yield {visit: number, **{v: n for v, n, _ in opened}, **ended}, shard, number, sample
                    opened.append((visit, number + 1, samples))
                elif following := begin(1):
                    opened += following
                else:
                    ended[visit] = first
                n_empty = 0 if found else n_empty + 1
                if n_empty > parts * len(self.paths) + 100:  # a reader may skip epochs, and meet few shards
                    raise UserError(f"{self.name}: a whole epoch had no sample for one of the readers")

    def decode(self, sample, draft):
        if "broken tar" in sample:
            raise BadSample(sample["broken tar"])
        image = image_of(sample)
        try:
            fields = json.loads(sample.get("json", "{}"))
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise BadSample("broken .json")
        text = {e: sample[e].decode(errors="replace").strip() for e in ("txt", "cls") if e in sample}
        caption = text.get("txt", str(fields.get("caption") or "").strip())
        if not caption and self.needs_caption:
            raise BadSample("no caption")
        label, names = (text if self.label == "cls" else fields).get(self.label, ""), self.class_names or []
        try:
            if label == "":
                label = -1
            label = names.index(label) if label in names else int(label)
        except (ValueError, TypeError, OverflowError):
            raise BadSample("label is neither a number nor one of the class names") from None
        return decode_canvas(io.BytesIO(image), self.canvas, draft, self.squash), caption, label


def image_of(sample):
    """The bytes of the image in {extension: bytes}. BadSample if there is none."""
    for extension, raw in sample.items():
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return raw
    raise BadSample("no image")


class TarHeader(tarfile.TarInfo):
    """tarfile ends without a word at a damaged header behind the first one: here it is an error."""
    @classmethod
    def frombuf(cls, buf, encoding, errors):
        if buf == bytes(tarfile.BLOCKSIZE):  # the archive's end
            return super().frombuf(buf, encoding, errors)
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0:
            raise tarfile.ReadError("negative size")
        return header


def read_tar(path, only_names=False):
    """A tar's samples, {extension: bytes or, if only_names, None}: members of one name up to the first dot.
    A tar that is unreadable, or ends before its end mark, or goes on after it, ends with {"broken tar":
    reason} in place of the sample being read."""
    sample, key = {}, None
    try:
        with tarfile.open(path, "r:*" if only_names else "r|*", tarinfo=TarHeader) as tar:
            # what a sparse file's header says of its size may be anything, and all of it would be zeros
            for member in (m for m in tar if m.isfile() and not m.issparse()):
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if sample and (folder, stem) != key:
                    yield sample
                    sample = {}
                key = (folder, stem)
                sample[extension.lower()] = None if only_names else tar.extractfile(member).read()
            while rest := tar.fileobj.read(2 ** 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("data behind the end mark")
    except Exception as error:  # on damaged bytes tarfile raises almost anything
        reason = f"cut-off or unreadable tar {os.path.basename(path)} ({type(error).__name__})"
        sample = {"broken tar": reason}
    if sample:
        yield sample


def expand_paths(pattern):
    """Paths of brace ranges {000..123}, brace lists {a,b} and globs, which are sorted."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    choices, span = match[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        choices = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
    return [path for choice in choices for path in expand_paths(pattern.replace(match[0], choice, 1))]


def find_tars(pattern):
    """The tars of a glob or brace pattern. FileNotFoundError if none, or one it names, is there."""
    paths = expand_paths(pattern)
    missing = [path for path in paths or [pattern] if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"no data at {missing[0]}: expected a folder of class folders, or tars by a "
                                "pattern like 'train-{00000..00041}.tar' (quoted, or the shell expands it)")
    return paths


# ----- The loader: its order follows from the seed, and a run can go on where it stopped ------------------

@functools.lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of n things in an epoch, int64 (n,)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def rows_at(places, n, seed):
    """Rows (of n) at places, int64 (b,), of an endless sequence: all rows in a new order each epoch."""
    rows = np.empty_like(places)
    for epoch in np.unique(places // n):
        here = places // n == epoch
        rows[here] = permutation(seed, int(epoch), n)[places[here] % n]
    return rows


def default_workers(where):
    """A rank's loader processes: none for the built-in set, else up to 8; a core is left to the rank."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if where is None else max(1, min(8, (os.cpu_count() or 2) // local_ranks - 1))


class SampleStream(torch.utils.data.IterableDataset):
    """Endless batches of this rank's share of the global batch, by readers (ranks x workers).

    Random access: global batch s takes places [s B, (s + 1) B) of an endless shuffled sequence,
    whatever the number of ranks and workers.
    Tars: reader k of n makes visits k, k + n, ... (TarSource.walk), some at once, and shuffles blocks of
    shuffle_buffer samples. With as many readers as before a run goes on exactly, else its open blocks come
    once more.
    place is where to go on:
        batches   how many are done
        parts     of each shard: in all at least as many as readers, in a new run
        readers   {reader: state}. Of tars: `given` samples are done of the block that begins with these
                  visits `open`, {visit: number in the shard of the first sample}
        next      when readers were last dealt out, every visit below this was done, but for those in
        open      {visit: number in the shard of the first sample to come}
        skipped   {reason: samples} before that; each reader's state has its own since"""
    def __init__(self, source, batch_size, tokenize, context_length, seed, n_workers, place=None,
                 max_skipped=0.1):
        self.source, self.global_batch, self.seed, self.max_skipped = source, batch_size, seed, max_skipped
        self.tokenize, self.context_length = tokenize, context_length
        self.rank, self.world, self.n_workers = rank(), world_size(), n_workers
        self.roles = max(n_workers, 1)  # readers of this rank
        n_readers = self.roles * self.world
        states = () if place is None else place["readers"].values()
        if isinstance(source, TarSource) and not all("open" in state for state in states):
            raise ValueError("the checkpoint's place in the tars is of an older version of data.py")
        if place is None:
            parts = math.ceil(n_readers / len(source.paths)) if isinstance(source, TarSource) else 1
            place = dict(batches=0, parts=parts, readers={}, next=0, open={}, skipped={})
        self.place = place if len(place["readers"]) == n_readers else deal_out(place, n_readers)

    def advance(self, place, batch):
        readers = {**place["readers"], batch["reader"]: batch["state"]}
        return {**place, "batches": place["batches"] + 1, "readers": readers}

    def gather_place(self, place):
        """The place with every rank's own readers."""
        own = [item for item in place["readers"].items() if item[0] % self.world == self.rank]
        return {**place, "readers": dict(sum(gather_objects(own), []))}

    def __iter__(self):
        info = torch.utils.data.get_worker_info()  # the loader asks its workers in turn, from 0 on
        first_step = self.place["batches"] + (info.id if info else 0)
        reader = first_step % self.roles * self.world + self.rank
        skipped = Counter(self.place["readers"][reader]["skipped"])
        if isinstance(self.source, TarSource):
            return self.tar_batches(reader, skipped)
        return self.indexed_batches(reader, skipped, itertools.count(first_step, self.roles))

    def indexed_batches(self, reader, skipped, steps):
        n, B = len(self.source), self.global_batch
        for step in steps:
            samples, places = [], np.arange(step * B + self.rank, (step + 1) * B, self.world)
            for place, index in zip(places, rows_at(places, n, self.seed)):
                rng = np.random.default_rng([self.seed, place // n, index])
                for attempt in range(n):  # a broken sample is replaced by the next one
                    try:
                        samples.append(self.source.load((index + attempt) % n, True, rng))
                        break
                    except BadSample as reason:
                        self.skip(skipped, reason, step // self.roles * len(places) + len(samples))
                else:
                    raise UserError(f"no sample of {self.source.name} can be used: {dict(skipped)}")
            yield self.collate(samples, reader, {}, skipped)

    def tar_batches(self, reader, skipped):
        samples, b = [], self.global_batch // self.world
        n_good = self.place["batches"] // self.roles * b
        for sample, state in self.shuffled_tar_samples(reader):
            try:
                samples.append(self.source.decode(sample, True))
                n_good += 1
            except BadSample as reason:
                self.skip(skipped, reason, n_good)
            if len(samples) == b:
                yield self.collate(samples, reader, state, skipped)
                samples = []

    def shuffled_tar_samples(self, reader):
        """Undecoded samples in the reader's order, with the state after each."""
        parts, given = self.place["parts"], self.place["readers"][reader]["given"]
        in_order = self.source.walk(visits_left(self.place, reader), parts, self.seed, self.source.at_once)
        visits_of_an_epoch = parts * len(self.source.paths)
        for _, epoch in itertools.groupby(in_order, key=lambda item: min(item[0]) // visits_of_an_epoch):
            while block := list(itertools.islice(epoch, self.source.shuffle_buffer)):
                start = block[0][0]
                rng = np.random.default_rng([self.seed, reader, *next(iter(start.items()))])
                order = rng.permutation(len(block))
                for place in range(given, len(block)):
                    yield block[order[place]][-1], dict(open=start, given=place + 1)
                given = 0

    def skip(self, skipped, reason, n_good):
        skipped[str(reason)] += 1
        n_bad = skipped.total()
        if n_bad > 10 and n_bad > self.max_skipped * (n_bad + n_good):
            raise UserError(f"{n_bad} of {n_bad + n_good} samples of {self.source.name} cannot be used; "
                               f"--max_skipped allows a share of {self.max_skipped}: {dict(skipped)}")

    def collate(self, samples, reader, state, skipped):
        images, captions, labels = zip(*samples)
        tokens = self.tokenize(captions, self.context_length) if self.tokenize else None
        return dict(images=torch.from_numpy(np.stack(images)), tokens=tokens, labels=torch.tensor(labels),
                    reader=reader, state={**state, "skipped": dict(skipped)})


def visits_left(place, reader):
    """A reader's visits from its state on: (visit, number in the shard of its next sample)."""
    opened, n_readers = place["readers"][reader]["open"], len(place["readers"])
    yield from opened.items()
    for visit in itertools.count(max(opened) + n_readers, n_readers):
        if visit >= place["next"] or visit in place["open"]:
            yield visit, place["open"].get(visit, 0)


def total_skipped(place):
    """{reason: samples} of a gathered place, by all readers since the run began."""
    counts = (Counter(state["skipped"]) for state in place["readers"].values())
    return dict(sum(counts, Counter(place["skipped"])))


def deal_out(place, n_readers):
    """A SampleStream's place for another number of readers."""
    following, begun = place["next"], {}
    if all("open" in state for state in place["readers"].values()):  # else random access
        following = max([following, *(1 + max(state["open"]) for state in place["readers"].values())])
        for reader in place["readers"]:
            begun |= itertools.takewhile(lambda item: item[0] < following, visits_left(place, reader))
    readers = {}
    for r in range(n_readers):
        visit = next(v for v in itertools.count(r, n_readers) if v >= following or v in begun)
        readers[r] = dict(open={visit: begun.get(visit, 0)}, given=0, skipped={})
    return {**place, "readers": readers, "next": following, "open": begun, "skipped": total_skipped(place)}


def make_loader(stream, pin_memory=False):
    """Batches of a SampleStream, made by its workers ahead of time (0: in this process)."""
    n = stream.n_workers
    return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=n, pin_memory=pin_memory,
                                       prefetch_factor=4 if n else None, persistent_workers=n > 0,
                                       worker_init_fn=functools.partial(begin_worker, os.getpid()))


def begin_worker(pid_of_rank, _):
    """For a loader process. Ctrl-C and SIGTERM may reach it, too: it serves on while its rank ends its step
    and saves, for 30 seconds, which is what schedulers leave it. PyTorch ends it when its rank has died, but
    not if that was before it began to watch."""
    if os.getppid() != pid_of_rank:
        os._exit(1)

    def serve_on(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(30)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, serve_on)


def each_sample(source, reader=0, n_readers=1, seed=None):
    """Every sample of a source once, shared out over readers: (shard, number in it, load). load() gives the
    sample or raises BadSample. Random access: shard 0. seed: a random order of samples, or of shards."""
    if isinstance(source, TarSource):
        parts = math.ceil(n_readers / len(source.paths))
        visits = ((visit, 0) for visit in range(reader, parts * len(source.paths), n_readers))
        for _, shard, number, sample in source.walk(visits, parts, seed):
            yield shard, number, functools.partial(source.decode, sample, False)
    else:
        order = np.arange(len(source)) if seed is None else permutation(seed, 0, len(source))
        for i in order[reader::n_readers].tolist():
            yield 0, i, functools.partial(source.load, i, False, np.random.default_rng([seed or 0, i]))


class EvaluationSet:
    """This rank's share of n samples (whole: all of them) in batches: images uint8 (b, 3, C, C), captions,
    labels int64 (b,). They are decoded anew at each reading, by threads a little ahead of their use.
    Random by the seed alone; of tars, the first n of shards in random order, which every rank reads and of
    which it decodes its share. Unusable ones are left out; UserError if none remains."""
    def __init__(self, source, n, batch_size=128, seed=0, whole=False):
        self.source, self.n, self.batch_size, self.seed = source, n, batch_size, seed
        self.first, self.every = (0, 1) if whole else (rank(), world_size())

    def __len__(self):
        n = self.n if isinstance(self.source, TarSource) else min(self.n, len(self.source))  # or fewer
        return math.ceil(len(range(self.first, n, self.every)) / self.batch_size)

    def __iter__(self):
        samples = itertools.islice(each_sample(self.source, seed=self.seed), self.first, self.n, self.every)
        n_cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Pillow decodes and resizes without the GIL; reading files takes its time, too
        pool, ahead = ThreadPoolExecutor(min(max(n_cores, 4), 16)), deque()

        def begin(n_more):
            ahead.extend(pool.submit(self.decode, item) for item in itertools.islice(samples, n_more))
        good, found_any, skipped = [], False, Counter()
        try:
            begin(2 * self.batch_size)
            while ahead:
                sample = ahead.popleft().result()
                begin(1)
                if isinstance(sample, BadSample):
                    skipped[str(sample)] += 1
                else:
                    good.append(sample)
                if good and (len(good) == self.batch_size or not ahead):
                    images, captions, labels = zip(*good)
                    yield torch.from_numpy(np.stack(images)), list(captions), torch.tensor(labels)
                    good, found_any = [], True
        finally:
            pool.shutdown(cancel_futures=True)
        if not found_any:
            raise UserError(f"no usable sample for evaluation in {self.source.name}: {dict(skipped)}")

    @staticmethod
    def decode(item):
        _, _, load = item
        try:
            return load()
        except BadSample as reason:
            return reason


# ----- Views, made on the device for the whole batch at once ----------------------------------------------

def step_generator(seed, step, device):
    """The generator of all that a training step draws, for the global batch."""
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(state)


def own_share(draws):
    """This rank's share of draws (..., B) for the global batch: every W-th, so that W changes nothing."""
    return draws[..., rank()::world_size()]


def draw_boxes(uniform, area):
    """torchvision's RandomResizedCrop: aspect 3/4 to 4/3, the first of 10 tries that fits, else the whole.
    uniform (22, B), area (lowest, highest) of 1 -> boxes (4, B): left, top, width, height, of a side of 1."""
    areas = area[0] + (area[1] - area[0]) * uniform[:10]
    aspects = torch.exp(math.log(4 / 3) * (2 * uniform[10:20] - 1))
    widths, heights = (areas * aspects).sqrt(), (areas / aspects).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=0, keepdim=True)
    width, height = (torch.where(fits.any(dim=0), v.gather(0, first)[0], 1.0) for v in (widths, heights))
    return torch.stack((uniform[20] * (1 - width), uniform[21] * (1 - height), width, height))


def resampling_taps(start, length, in_size, out_size, flip=None):
    """Bicubic resampling of spans of a line, antialiased as Pillow's: start, length (B,) in pixels, flip (B,)
    bool -> which K pixels make each of the span's, int64 (B, out_size, K), and their weights."""
    scale = (length / out_size)[:, None]
    stretch = scale.clamp(min=1)  # the kernel widens where the image shrinks
    places = torch.arange(out_size, device=start.device) + 0.5
    if flip is not None:
        places = torch.where(flip[:, None], out_size - places, places)
    centres = start[:, None] + places * scale  # (B, out)
    n_taps = min(2 * math.ceil(2 * max(in_size / out_size, 1)) + 1, in_size)  # as many as a whole line takes
    first = (centres - 2 * stretch).floor().clamp(0, in_size - n_taps)
    sources = first[:, :, None] + torch.arange(n_taps, device=start.device)
    x = (sources + 0.5 - centres[:, :, None]).abs() / stretch[:, :, None]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' cubic, a = -1/2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return sources.long(), weights / weights.sum(dim=-1, keepdim=True)


def filter_lines(x, sources, weights):
    """Weighted sums of K of the lines of images (B, 3, H, W), n of each: sources, weights (B, n, K) ->
    (B, 3, W, n): transposed, so that a second filter takes the columns. A product with a matrix of all lines
    takes a CPU 10 times as long at 256 px."""
    B, _, H, W = x.shape
    first = H * torch.arange(3 * B, device=x.device).view(B, 3, 1, 1)
    bags, weights = (first + sources[:, None]).flatten(0, 2), weights[:, None].expand(-1, 3, -1, -1)
    x = F.embedding_bag(bags, x.reshape(-1, W), mode="sum", per_sample_weights=weights.flatten(0, 2))
    return x.view(B, 3, -1, W).transpose(2, 3)


def resample(images, boxes, out_size, flip=None):
    """Images (B, 3, C, C) -> n crops of each, (n B, 3, out_size, out_size), crop by crop; boxes (4, n B),
    flip (n B,) bool."""
    (B, _, C, _), n = images.shape, boxes.shape[1] // len(images)
    left, top, width, height = boxes * C
    rows = (x.unflatten(0, (n, B)).transpose(0, 1).flatten(1, 2)
            for x in resampling_taps(top, height, C, out_size))  # (B, n out, K)
    x = filter_lines(images, *rows).unflatten(3, (n, out_size))  # (B, 3, C, n, out)
    x = x.permute(3, 0, 1, 2, 4).flatten(0, 1)  # (n B, 3, C, out)
    return filter_lines(x, *resampling_taps(left, width, C, out_size, flip))


def clip_view(canvases, generator, batch_size, size, n_decoded=0):
    """CLIP's and the decoder's view: uint8 canvases (b, 3, C, C) -> normalised (b, 3, size, size).
    A bicubic random crop of area 0.9 to 1, no flip (OpenCLIP). Where C > size, the first n_decoded images are
    cut out as they are: resampling would soften what the decoder learns, and rFID is not measured on soft
    images. batch_size is global."""
    uniform = own_share(torch.rand(22, batch_size, generator=generator, device=canvases.device))
    boxes, C = draw_boxes(uniform, (0.9, 1.0)), canvases.shape[-1]
    if C > size:
        corners = (uniform[20:] * (C - size + 1)).floor()  # (2, b), in whole pixels
        cuts = torch.cat((corners, torch.full_like(corners, size))) / C
        boxes = torch.where(torch.arange(len(canvases), device=boxes.device) < n_decoded, cuts, boxes)
    return normalize(resample(canvases.float() / 255, boxes, size).clamp(0, 1)).contiguous()


def to_grey(x):
    """RGB (B, 3, H, W) to brightness (B, 1, H, W) (ITU-R 601, as torchvision)."""
    return (x * constant((0.2989, 0.587, 0.114), x.device).view(3, 1, 1)).sum(dim=1, keepdim=True)


def adjust_brightness(x, change):
    """x (B, 3, H, W) in [0, 1] by a change (B, 1, 1, 1), 0 for none; so the others."""
    return (x * (1 + change)).clamp(0, 1)


def adjust_contrast(x, change):
    """Away from the mean brightness of each image."""
    return torch.lerp(to_grey(x).mean(dim=(2, 3), keepdim=True), x, 1 + change).clamp(0, 1)


def adjust_saturation(x, change):
    """Away from the brightness of each pixel."""
    return torch.lerp(to_grey(x), x, 1 + change).clamp(0, 1)


def adjust_hue(x, change):
    """Turn the hue, through HSV; a change of 1 is a whole turn."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = torch.where(chroma > 0, chroma, 1.0)
    below_red = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, below_red) + 6 * change[:, 0]  # in sixths of a turn
    k = (constant((5.0, 3.0, 1.0), x.device).view(3, 1, 1) + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, uniform, order):
    """DINOv2's colour jitter, with probability 0.8, then greyscale, with 0.2, of x (n, 3, H, W) in [0, 1] by
    uniform (6, n). order: of the adjustments, one for all, where torchvision draws one for each image: orders
    differ little, by clipping and where the hue is turned."""
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    strengths = constant((0.4, 0.4, 0.2, 0.1), x.device)[:, None]
    is_jittered, is_grey = uniform[0] < 0.8, uniform[1] < 0.2
    changes = torch.where(is_jittered, strengths * (2 * uniform[2:6] - 1), 0.0).view(4, -1, 1, 1, 1)
    for kind in order:
        x = adjustments[kind](x, changes[kind])
    return torch.where(is_grey.view(-1, 1, 1, 1), to_grey(x), x)


def gaussian_blur(x, sigma):
    """9-tap blur with reflected borders of (B, 3, S, S) by sigma (B,) in pixels; 0: none."""
    S, taps = x.shape[-1], torch.arange(-4, 5, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 9)
    period = max(2 * (S - 1), 1)
    sources = (torch.arange(S, device=x.device)[:, None] + taps).abs() % period  # (S, 9)
    sources = torch.minimum(sources, period - sources).expand(len(x), -1, -1)
    kernel = kernel[:, None].expand(-1, S, -1)
    return filter_lines(filter_lines(x, sources, kernel), sources, kernel)


def augment(canvases, uniform, size, area, blur_rates, solarize_rates, order):
    """DINOv2's crops of (b, 3, C, C) in [0, 1] -> normalised (n b, 3, size, size), crop by crop.
    uniform (32, n, b); rates: n probabilities."""
    u = uniform.flatten(1)  # (32, n b)
    x = resample(canvases, draw_boxes(u[:22], area), size, flip=u[22] < 0.5).clamp(0, 1)
    x = colour_jitter(x, u[23:29], order)
    is_blurred = (uniform[29] < constant(blur_rates, x.device)[:, None]).flatten()
    x = gaussian_blur(x, torch.where(is_blurred, 0.1 + 1.9 * u[30], 0.0))
    if any(solarize_rates):
        is_solarized = (uniform[31] < constant(solarize_rates, x.device)[:, None]).reshape(-1, 1, 1, 1)
        x = torch.where(is_solarized & (x >= 128 / 255), 1 - x, x)
    return normalize(x).contiguous()


def canvas_size(image_size):
    """The side of the canvases that views are cropped from."""
    return math.ceil(5 / 4 * image_size)


def local_crop_size(image_size, patch_size):
    """3/8 of the side in whole patches: of 256 pixels 96, as DINOv2's."""
    return max(1, math.floor(image_size // patch_size * 3 / 8 + 0.5)) * patch_size


def ssl_views(canvases, generator, batch_size, global_size, local_size, n_local):
    """Uint8 canvases (b, 3, C, C) -> DINOv2's normalised crops (2b, 3, G, G), (n_local b, 3, L, L), crop by
    crop; batch_size is global. Blur rates are the DINO paper's; DINOv2's code has them inverted."""
    canvases, device = canvases.float() / 255, canvases.device
    orders = np.random.default_rng(generator.initial_seed()).permuted([range(4)] * 2, axis=1)
    of_global, of_local = (own_share(torch.rand(32, n, batch_size, generator=generator, device=device))
                           for n in (2, n_local))
    blur, solarize = n_local * (0.5,), n_local * (0.0,)
    return (augment(canvases, of_global, global_size, (0.32, 1.0), (1.0, 0.1), (0.0, 0.2), orders[0]),
            augment(canvases, of_local, local_size, (0.05, 0.32), blur, solarize, orders[1]))


# ----- Masks in blocks, with exact counts -----------------------------------------------------------------

def draw_mask_counts(generator, batch_size, n_patches, ratio=(0.1, 0.5)):
    """How many patches of each global crop are masked: (2, B) int64, for the global batch. B must be even.
    Half of the 2B crops are masked, the i-th with a share uniform in the i-th of B equal slices of ratio
    (DINOv2). Slices i and B - 1 - i mirror each other: their counts add up to a constant. They go to two of
    the four crops of samples j and j + B/2: the rank that holds these always masks as many patches."""
    half, (low, high), device = batch_size // 2, ratio, generator.device
    slices = torch.arange(half, device=device) + torch.rand(half, generator=generator, device=device)
    first = ((low + (high - low) * slices / batch_size) * n_patches).round().long()
    none = torch.zeros_like(first)
    counts = torch.stack((first, round((low + high) * n_patches) - first, none, none))  # (4, B/2)
    counts = counts[:, torch.randperm(half, generator=generator, device=device)]  # over samples
    crops = torch.rand(4, half, generator=generator, device=device).argsort(dim=0)  # and their crops
    return counts.gather(0, crops).view(2, 2, half).flatten(1)


def draw_masks(generator, batch_size, grid, ratio=(0.1, 0.5), n_rounds=16):
    """Block masks of this rank's global crops: (2b, H*W) bool, b round((low + high) H W) / 2 of it True.
    As DINOv2: blocks of 4 patches to what is left of the count, log-uniform aspect 0.3 to 1/0.3, taken if
    they don't add too much. It stops where 10 tries fail; here n_rounds blocks are tried for all crops, and
    patches at the edge of the mask make up the rest. Crop by crop; batch_size is global."""
    (H, W), device = grid, generator.device
    counts = own_share(draw_mask_counts(generator, batch_size, H * W, ratio)).flatten()  # (2b,)
    uniform = own_share(torch.rand(n_rounds, 4, 2, batch_size, generator=generator, device=device)).flatten(2)
    noise = own_share(torch.rand(H * W, 2, batch_size, generator=generator, device=device)).flatten(1).T
    rows, columns = (torch.arange(n, device=device) for n in (H, W))
    masks, left = torch.zeros(len(counts), H, W, dtype=torch.bool, device=device), counts
    for area, aspect, y, x in uniform:
        area = 4 + area * (left - 4).clamp(min=0)
        aspect = torch.exp(math.log(1 / 0.3) * (2 * aspect - 1))
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top, leftmost = (y * (H - height + 1)).long()[:, None], (x * (W - width + 1)).long()[:, None]
        in_rows = (rows >= top) & (rows < top + height[:, None])  # (2b, H)
        in_columns = (columns >= leftmost) & (columns < leftmost + width[:, None])  # (2b, W)
        block = in_rows[:, :, None] & in_columns[:, None]
        added = (block & ~masks).sum(dim=(1, 2))
        accept = (height < H) & (width < W) & (added <= left)
        masks = masks | (block & accept[:, None, None])
        left = left - torch.where(accept, added, 0)
    # what is missing: unmasked patches with most masked neighbours first
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    score = torch.where(masks.flatten(1), -1.0, neighbours.flatten(1) + noise)
    position = score.argsort(dim=1, descending=True).argsort(dim=1)
    return masks.flatten(1) | (position < left[:, None])


# ----- Text to tokens -------------------------------------------------------------------------------------

WORD_VOCAB = 8192  # padding 0, words 1 to 8189, start 8190, end 8191
CLIP_VOCAB = 49408
CLIP_BPE_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def make_tokenizer(text_vocab_size, bpe_path=None):
    """The tokenizer of a text_vocab_size: 8,192 is words, 49,408 CLIP's BPE; else ValueError."""
    if text_vocab_size == WORD_VOCAB:
        return word_tokenizer
    if text_vocab_size == CLIP_VOCAB:
        return ClipBPE(bpe_path)
    raise ValueError(f"no tokenizer has {text_vocab_size} tokens: {WORD_VOCAB} is words, {CLIP_VOCAB} CLIP")


def pad_tokens(token_lists, context_length, start, end):
    """[start, ..., end] of each text, cut before the end to fit, then 0 -> int64 (n, context_length)."""
    tokens = torch.zeros(len(token_lists), context_length, dtype=torch.long)
    for row, ids in zip(tokens, token_lists):
        ids = [start, *ids[:context_length - 2], end]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def word_tokenizer(texts, context_length=77):
    """Words and other marks, in lower case, numbered by their CRC-32 -> int64 (n, context_length): any text
    without a vocabulary, for a text tower that sees too little of it to learn to spell. Two words that share
    a number are the same to it: of 100 words, that happens to a pair in 45 % of cases."""
    def number(word):
        return 1 + zlib.crc32(word.encode("utf-8", "replace")) % (WORD_VOCAB - 3)   # may be half a character
    lists = [[number(word) for word in re.findall(r"\w+|[^\w\s]", text.lower())] for text in texts]
    return pad_tokens(lists, context_length, WORD_VOCAB - 2, WORD_VOCAB - 1)


# Mojibake: UTF-8 that was read as latin-1 or cp1252, in which five bytes have no character.
CP1252 = {b: bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(128, 160)}
CP1252_BYTES = {ord(c): b for b, c in CP1252.items()}
UTF8_RUN = re.compile("(?:[Â-ß]_|[à-ï]__|[ð-ô]___)+".replace("_", "[\x80-\xbf]"))
PLAINER = {c: unicodedata.normalize("NFKC", chr(c)) for c in [  # ligatures, full-width and half-width forms
    0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07),
    *range(0xFF01, 0xFFF0)]}
PLAINER |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
PLAINER |= dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF,
                          *range(0xFFF9, 0xFFFD)])  # None: controls are dropped


def undo_mojibake(line):
    """Decode what was hardly meant as it stands: a line whose every character beyond ASCII is in one of at
    least two runs of UTF-8; else a run of several characters, or of one that is western or central European,
    punctuation, a symbol or an emoji. Not so in "café…»", where one run would make a Chinese character."""
    as_bytes = line.translate(CP1252_BYTES)
    is_whole = UTF8_RUN.subn("", as_bytes)
    is_whole = is_whole[0].isascii() and is_whole[1] > 1
    def decode(run):
        try:
            decoded = run[0].encode("latin-1").decode("utf-8")
        except UnicodeDecodeError:
            return run[0]
        is_common = decoded < "\u0180" or "\u2000" <= decoded < "\u2c00" or decoded >= "\U0001f000"
        return decoded if is_whole or is_common or len(decoded) > 1 else run[0]
    return UTF8_RUN.sub(decode, as_bytes).translate(CP1252)


def repair(line):
    """What ftfy.fix_text, which CLIP runs first, does to a line: over again, till nothing changes."""
    before, has_entities = None, "<" not in line
    while line != before:
        before = line
        if has_entities:
            line = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), line)
        line = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", undo_mojibake(line)).translate(PLAINER)
        line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins surrogates
        line = unicodedata.normalize("NFC", line)
    return line


def clean_caption(text):
    """A text as CLIP has it before its BPE: repaired, HTML unescaped twice, single spaces, lower case.
    Against ftfy 6.3.1: equal on 83,361 of 83,390 good texts in 283 languages (the rest: capitals before ®);
    of UTF-8 read as latin-1 or cp1252 on 94.7 % of sentences and 66 % of single names. Left: rare letters
    that stand alone, bytes lost on the way, other code pages."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape("\n".join(map(repair, text.split("\n")))))
    return " ".join(text.split()).lower()


class ClipBPE:
    """CLIP's tokenizer: texts -> int64 (n, context_length); clean_caption says how near its ftfy is.
    path: bpe_simple_vocab_16e6.txt.gz; None fetches it (checked) into the torch hub cache."""
    def __init__(self, path=None):
        if path is None:
            path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(CLIP_BPE_URL))
            download(CLIP_BPE_URL, path, CLIP_BPE_SHA256)
        with gzip.open(path, "rt", encoding="utf-8") as f:
            merges = [tuple(line.split()) for line in f.read().split("\n")[1:CLIP_VOCAB - 2 - 512 + 1]]
        # Every byte gets a printable character: itself where it is one, else the next from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.byte_chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        characters, special = list(self.byte_chars.values()), ["<|startoftext|>", "<|endoftext|>"]
        symbols = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges] + special
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.words = {word: (self.ids[word],) for word in special}
        letters, numbers = characters_of("L"), characters_of("N")  # \p{L} and \p{N}, which re lacks
        self.pattern = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                                  rf"[{letters}]+|[{numbers}]|[^\s{letters}{numbers}]+", re.IGNORECASE)

    def encode_word(self, word):
        """Token ids: merge the neighbours of lowest rank until there are none."""
        if word not in self.words:
            parts = [self.byte_chars[b] for b in word.encode()]
            parts[-1] += "</w>"
            while pairs := [(self.ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                            if pair in self.ranks]:
                _, i = min(pairs)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            self.words[word] = tuple(self.ids[p] for p in parts)
        return self.words[word]

    def __call__(self, texts, context_length=77):
        ids = [[i for word in self.pattern.findall(clean_caption(text)) for i in self.encode_word(word)]
               for text in texts]
        return pad_tokens(ids, context_length, CLIP_VOCAB - 2, CLIP_VOCAB - 1)


def names_a_side(text):
    """Would it be false of the mirror image? It says left or right, or may."""
    return re.search(r"\b(left|right)", text, re.IGNORECASE) is not None


def characters_of(category):
    """Characters of a Unicode category (its first letter) as ranges for a pattern's [...]."""
    categories = "".join(unicodedata.category(chr(c))[0] for c in range(0x110000))
    return "".join(f"{chr(m.start())}-{chr(m.end() - 1)}" for m in re.finditer(f"{category}+", categories))


# ----- The built-in set: procedural scenes with captions --------------------------------------------------
# A large object, whose shape is the label, at times a small second one, and a background. Pixel values say
# little about the shape: all else is drawn without regard to it; shapes of a size have equal areas. Most are
# large, central, nearly upright: a small DiT learns them fast. Lengths are parts of the side from the centre;
# y points up. Pixels are the same everywhere: + - * / and sqrt are IEEE 754's, sines are rounded to fp32.

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "arrow", "hourglass")
COLOURS_RGB = dict(
    red=(.86, .13, .13), orange=(.97, .53, .08), yellow=(.97, .87, .20), green=(.15, .60, .20),
    teal=(.10, .66, .66), blue=(.14, .27, .86), purple=(.50, .16, .66), pink=(.98, .60, .76),
    brown=(.45, .27, .12), black=(.07, .07, .08), white=(.96, .96, .95), grey=(.56, .56, .57))
COLOUR_NAMES, RGB = tuple(COLOURS_RGB), np.array(list(COLOURS_RGB.values()))
LUMINANCE = RGB @ [.30, .59, .11]
CONTRAST = np.sqrt(((RGB[:, None] - RGB) ** 2 * [.30, .45, .25]).sum(-1)) > .33  # may meet in a scene
TEXTURES = ("plain", "plain", "stripes", "dots", "checks")  # patterns on an object
BACKGROUNDS = ("plain", "plain", "stripes", "checks", "gradient", "clouds")  # and behind it
PATTERN_WORDS = dict(  # and how often they are said
    plain=(("plain",), .1), stripes=(("striped",), .5), dots=(("dotted", "spotted"), .5),
    checks=(("checked",), .5), gradient=(("shaded", "fading"), .5), clouds=(("cloudy", "misty"), .5))
SIZE_WORDS = (("small", "little"), (), ("large", "big"))  # a middle size is not named
PLACE_WORDS = (  # of places 0 to 8: three rows of three, from the bottom left
    ("at the bottom left", "in the lower left"), ("at the bottom", "near the bottom"),
    ("at the bottom right", "in the lower right"), ("on the left", "at the left"),
    ("in the centre", "in the middle"), ("on the right", "at the right"),
    ("at the top left", "in the upper left"), ("at the top", "near the top"),
    ("at the top right", "in the upper right"))
RELATION_WORDS = {1: ("above", "over"), 3: ("right of", "to the right of"), 5: ("left of", "to the left of"),
                  7: ("below", "under", "beneath")}  # of the main object to a second one in that place
OPENINGS = ("", "", "", "", "there is", "here is", "picture of", "an image of")
LONGEST_CAPTION = 62  # bytes
ATTRIBUTES = dict(shape=SHAPES, colour=COLOUR_NAMES, size=("small", "middle", "large"),
                  place=tuple(words[0] for words in PLACE_WORDS), background=COLOUR_NAMES)
# (shape, colour) that a model may be kept from seeing together, to ask whether it can compose them: each
# shape stays in 11 colours, each colour in 9 or 10 shapes
HELD_OUT_PAIRS = tuple((shape, (7 * shape + 3) % len(COLOUR_NAMES)) for shape in range(len(SHAPES)))


def uniforms(indices, split, seed):
    """Random columns, float64 (N,) in [0, 1): splitmix64 of (seed, split, index, column)."""
    def scramble(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        return z ^ (z >> 31)
    golden = 0x9E3779B97F4A7C15
    stream = np.array([2 * seed + ("train", "val").index(split) + 1], dtype=np.uint64)
    key = scramble(scramble(stream * golden) + np.asarray(indices).astype(np.uint64) * golden)
    while True:
        key = key + golden
        yield (scramble(key) >> 11) * 2.0 ** -53


def draw_parameters(indices, split, seed=0):
    """All that defines the scenes: a dict of arrays with first axis N. Shapes and colours are positions in
    SHAPES and COLOUR_NAMES, turns parts of a full turn; x2 and so on are the second object's, if "pair"."""
    columns = uniforms(indices, split, seed)
    def draw(low=0, high=1, count=None):  # (N,), or (N, count)
        u = next(columns) if count is None else np.stack([next(columns) for _ in range(count)], 1)
        return low + (high - low) * u
    def choose(options):
        return np.array(options)[(draw() * len(options)).astype(np.int64)]
    def choose_colour(allowed):  # allowed: (N, colours)
        return np.where(allowed, draw(count=len(RGB)), -1).argmax(1)
    pair, shapes, colours = draw() < .15, range(len(SHAPES)), np.arange(len(RGB))
    p = {"pair": pair, "shape": choose(shapes), "colour": choose(colours)}
    p["backdrop"], p["shape2"] = choose_colour(CONTRAST[p["colour"]]), choose(shapes)
    p["colour2"] = choose_colour(CONTRAST[p["backdrop"]] & (colours != p["colour"][:, None]))
    for name, strength in (("colour", .28), ("colour2", .28), ("backdrop", .14)):
        jitter = draw(-.04, .04, count=3) + draw(-.04, .04)[:, None]
        rgb = p[name + "_rgb"] = np.clip(RGB[p[name]] + jitter, 0, 1)
        p[name + "_rgb2"] = blend(rgb, LUMINANCE[p[name], None] < .30, strength)  # towards white or black
    p["texture"], p["ground"] = choose(TEXTURES), choose(BACKGROUNDS)
    for name, low, high in (("texture", .14, .18), ("ground", .18, .32)):
        p[name + "_turn"], p[name + "_period"] = draw(), draw(low, high)
        p[name + "_phase"], p[name + "_waves"] = draw(count=4), draw(-3, 3, count=8).reshape(-1, 4, 2)
    # One object is in the centre or, if small, in one of 3 x 3 places; of two, the main one makes room.
    p["size"] = np.where(pair, 1, choose([0, 1, 1, 1, 2, 2, 2]))
    p["radius"] = np.where(pair, draw(.235, .255), np.array([.21, .28, .33])[p["size"]] + draw(-.01, .01))
    p["radius2"], alone = draw(.098, .118), np.where(p["size"] == 0, choose(range(9)), 4)
    p["place"] = np.where(pair, choose([0, 1, 2, 3, 5, 6, 7, 8]), alone)  # the second's if there is one
    room = np.where(pair, -1, 1) * (.5 - 1.40 * p["radius"])
    for name, step in (("x", p["place"] % 3 - 1), ("y", p["place"] // 3 - 1)):
        p[name] = np.where(step == 0, draw(-.03, .03), step * room * draw(.7, 1))
        p[name + "2"] = np.where(step == 0, draw(-.12, .12), step * draw(.335, .36))
    p["turn"], p["turn2"], p["wording"] = draw(-.03, .03), draw(-.03, .03), draw(count=16)  # up to 11 degrees
    return p


def length(x, y):
    """Of the vectors (x, y), elementwise."""
    return np.sqrt(x * x + y * y)


def blend(first, second, weight):
    """From first, at weight 0, to second, at weight 1."""
    return first + (second - first) * weight


def rotate(x, y, turn, unit=1):
    """Coordinates along axes turned by a part of a full turn, in multiples of unit."""
    cos, sin = (float(f(2 * np.pi * turn) / unit) for f in (np.cos, np.sin))
    return cos * x + sin * y, cos * y - sin * x


def distance(shape, x, y):
    """Signed distance to a shape's outline, negative inside; minimum unites regions, maximum intersects."""
    ax, ay = abs(x), abs(y)
    if shape == "circle": return length(x, y) - 1
    if shape == "square": return np.maximum(ax, ay) - .886
    if shape == "triangle": return np.maximum(.866 * ax + .5 * (y + .39), -(y + .39)) - .778
    if shape == "cross": return np.maximum(np.minimum(ax, ay) - .415, np.maximum(ax, ay) - 1.153)
    if shape == "ring": return abs(length(x, y) - .928) - .269
    if shape == "crescent": return np.maximum(length(x - .2, y) - 1.352, .988 - length(x - .2 - .676, y))
    if shape == "hourglass": return np.maximum(ay - 1.2, .8575 * (ax - .294) - .5145 * ay)
    if shape == "heart":  # a square on its corner and two discs
        return np.minimum((ax + abs(y + .1) - .938) * .7071, length(ax - .469, y + .1 - .469) - .663)
    if shape == "arrow":
        head, shaft = np.maximum(.7071 * (x + ay - 1.4), -.05 - x), np.maximum(ay - .4, abs(x + .65) - .7)
        return np.minimum(head, shaft)
    if shape == "star":  # fold the ten mirror images onto one edge
        for cos in (.8090, -.8090):
            fold = 2 * np.maximum(cos * ax - .5878 * y, 0)
            ax, y = ax - cos * fold, y + .5878 * fold
        return .8845 * abs(ax) + .4666 * y - .669


def pattern(scene, name, x, y, size):
    """The mask in [0, 1] of a scene's "texture" or "ground" at x (1, size), y (size, 1)."""
    kind, phase, period = scene[name], scene[name + "_phase"], np.float32(scene[name + "_period"])
    if kind == "plain": return 0
    if kind == "clouds":  # soft waves in four random directions
        total = .5
        for (wave_x, wave_y), shift in zip(scene[name + "_waves"], phase):
            t = wave_x * x + wave_y * y + shift
            t = 2 * (t - np.floor(t)) - 1
            total = total + .75 * t * (1 - abs(t))  # parabolas that look like a sine
        return total.clip(0, 1)
    along, across = rotate(x, y, scene[name + "_turn"])
    if kind == "gradient": return (.5 + along).clip(0, 1)
    a, b = along / period + phase[0], across / period + phase[1]
    a, b = (abs(t - np.floor(t) - .5) for t in (a, b))  # 0 in the middle of a period, 1/2 at its ends
    if kind == "dots": return (.5 + size * period * (.3 - length(a, b))).clip(0, 1)
    a, b = ((2 * size * period * (t - .25)).clip(-1, 1) for t in (a, b))
    return (1 + (a if kind == "stripes" else a * b)) / 2


def draw_images(p, size):
    """The scenes of draw_parameters as uint8 (N, 3, size, size)."""
    line = (np.arange(size, dtype=np.float32) + .5) / size - .5
    x, y = line[None], -line[:, None]
    images = np.empty((len(p["pair"]), 3, size, size), np.uint8)
    # Arrays stay float32: colours become that, (N, 3, 1, 1), and all else Python's numbers.
    values = {k: v.astype(np.float32)[..., None, None] if "rgb" in k else v.tolist() for k, v in p.items()}
    for i in range(len(images)):
        scene = {name: v[i] for name, v in values.items()}
        ground = pattern(scene, "ground", x, y, size)
        image = blend(scene["backdrop_rgb"], scene["backdrop_rgb2"], ground)
        for end in ("2", "") if scene["pair"] else ("",):  # the main object comes last: in front
            dx, dy, radius = x - scene["x" + end], y - scene["y" + end], scene["radius" + end]
            d = distance(SHAPES[scene["shape" + end]], *rotate(dx, dy, scene["turn" + end], radius)) * radius
            colour = scene[f"colour{end}_rgb"]
            outline = blend(colour, LUMINANCE[scene["backdrop"]] < .45, .5)  # towards white or black
            if not end:
                colour = blend(colour, scene["colour_rgb2"], pattern(scene, "texture", x, y, size))
            colour = blend(colour, outline, (.5 + (d + .018) * size).clip(0, 1))  # edges a pixel wide
            image = blend(image, colour, (.5 - d * size).clip(0, 1))
        images[i] = image * 255 + .5
    return images


def has_held_out_pair(p, either=False):
    """Which scenes (N,) have one of HELD_OUT_PAIRS as main object; either: or as the second one, if any."""
    def of(end):
        return np.isin(p["shape" + end] * len(RGB) + p["colour" + end], codes)
    codes = [shape * len(RGB) + colour for shape, colour in HELD_OUT_PAIRS]
    return of("") | (of("2") & p["pair"] if either else False)


def write_caption(p, i):
    """A true phrase, always of the main object's colour and shape, of the rest at times -> it, and which of
    ATTRIBUTES it says, 5 bools."""
    u = iter(p["wording"][i].tolist())
    def pick(words, share=1):  # one of the words, or nothing
        word = words[int(next(u) * len(words))] if words else ""
        return word if share == 1 or next(u) < share else ""
    def phrase(opening, ground_texture, size2, size, on, texture, at):
        thing, behind = f"a {size} {texture} {colour} {shape}", f"{ground_texture} {ground}"
        thing2, on = f"a {size2} {colour2} {shape2}", on.format(behind)
        if p["pair"][i] and relation: return f"{opening} {thing} {relation} {thing2} {on}"
        if p["pair"][i]: return f"{opening} {thing} {'with' if at else beside} {thing2} {at} {on}"
        if template == 0 and at: return f"{at}, {thing} {on}"
        if template == 1 and on: return f"a {behind} background with {thing} {at}"
        if template == 2: return ", ".join(filter(None, (f"{colour} {shape}", size, texture, at, on)))
        if template == 3: return f"the {size} {shape} {at} is {colour} {texture and 'and ' + texture} {on}"
        return f"{opening} {thing} {at} {on}" if template < 6 else f"{opening} {thing} {on} {at}"
    colour, colour2, ground = (COLOUR_NAMES[p[name][i]] for name in ("colour", "colour2", "backdrop"))
    shape, shape2, place = SHAPES[p["shape"][i]], SHAPES[p["shape2"][i]], p["place"][i]
    details = [pick(OPENINGS), pick(*PATTERN_WORDS[p["ground"][i]]), pick(("", "small", "tiny", "little")),
               pick(SIZE_WORDS[p["size"][i]], .5), pick(("on a {} background", "on {}", "against {}"), .5),
               pick(*PATTERN_WORDS[p["texture"][i]]), pick(PLACE_WORDS[place], .3 if place == 4 else .7)]
    template, relation = int(next(u) * 8), pick(RELATION_WORDS.get(place, ("",)), .75)
    beside = pick(("with", "and", "next to"))
    for k in range(len(details) + 1):
        caption = " ".join(phrase(*details).split()).replace("a orange", "an orange")
        if len(caption) <= LONGEST_CAPTION:
            _, _, _, size, on, _, at = details
            is_alone = not p["pair"][i]
            said = (True, True, is_alone and size != "", is_alone and at != "", on != "")
            return caption, said
        details[k] = ""  # say less


def render_scenes(indices, split, size=64, seed=0):
    """Scenes number indices (N,) of split -> images uint8 (N, 3, size, size), captions, labels int64 (N,).
    Labels are positions in SHAPES. A scene depends on (seed, split, index); size is just its sharpness."""
    p = draw_parameters(indices, split, seed)
    return draw_images(p, size), [write_caption(p, i)[0] for i in range(len(p["shape"]))], p["shape"]


# ----- How fast it is: python data.py --benchmark ---------------------------------------------------------

H100_PAIRS = dict(small=1385, large=253)  # a second in training at 256 px, as measured


def plain_decode(raw, canvas):
    """A file's bytes -> a canvas, as Pillow makes it without more ado."""
    return ImageOps.fit(Image.open(io.BytesIO(raw)).convert("RGB"), (canvas, canvas), Image.BICUBIC)


def plain_view(image, size, area, rng, augmented):
    """A crop of an image by Pillow, as torchvision makes it, with DINOv2's colours and blur if augmented ->
    uint8 (size, size, 3)."""
    box = draw_boxes(torch.from_numpy(rng.random((22, 1))), area)[:, 0] * image.width
    left, top, width, height = box.tolist()
    image = image.resize((size, size), Image.BICUBIC, (left, top, left + width, top + height))
    if not augmented:
        return np.asarray(image)
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    if rng.random() < 0.8:
        for adjust, strength in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4),
                                 (ImageEnhance.Color, 0.2)):
            image = adjust(image).enhance(rng.uniform(1 - strength, 1 + strength))
        hue, *rest = image.convert("HSV").split()
        turn = round(rng.uniform(-0.1, 0.1) * 255)
        hue = hue.point([(h + turn) % 256 for h in range(256)])
        image = Image.merge("HSV", (hue, *rest)).convert("RGB")
    image = image.convert("L").convert("RGB") if rng.random() < 0.2 else image
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))) if rng.random() < 0.5 else image
    return np.asarray(image)


def seconds_of(works, rounds=5):
    """{name: function} -> {name: the median of the seconds that it takes}, in turn with the others."""
    taken = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[1:])) for name, seconds in taken.items()}  # the first warms up


def time_parts(source, args, tokenize, canvas):
    """Images a second of what a loader process does, and the device: {name: rate}, medians of 5 rounds."""
    raw, captions, canvases, skipped = [], [], [], Counter()
    for _, _, load in itertools.islice(each_sample(source, seed=0), 32):
        try:
            image, caption, _ = load()
        except BadSample as reason:
            skipped[str(reason)] += 1
            continue
        item, is_tar = load.args[0], isinstance(source, TarSource)  # the tar's sample, or the file's number
        raw.append(image_of(item) if is_tar else Path(source.files[item][0]).read_bytes())
        captions.append(caption)
        canvases.append(image)
    if not raw:
        raise UserError(f"{source.name}: none of its first samples can be used: {dict(skipped)}")
    images = [Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0))) for x in canvases]
    device, rng = "cuda" if torch.cuda.is_available() else "cpu", np.random.default_rng(0)
    canvases, generator = torch.tensor(np.stack(canvases), device=device), step_generator(0, 0, device)
    n, size, local = len(images), args.image_size, local_crop_size(args.image_size, 16)
    crops = [(size, (0.9, 1.0), rng, False), *2 * [(size, (0.32, 1.0), rng, True)],
             *8 * [(local, (0.05, 0.32), rng, True)]]

    def make_views():
        clip_view(canvases, generator, n, size)
        ssl_views(canvases, generator, n, size, local, 8)
    seconds = seconds_of({
        "decode": lambda: [load_canvas(io.BytesIO(x), canvas, True) for x in raw],
        "plain decode": lambda: [plain_decode(x, canvas) for x in raw],
        "tokens": lambda: tokenize(captions),
        "views": make_views,
        "plain views": lambda: [plain_view(image, *crop) for image in images for crop in crops]})
    print(f"{source.name}: {n} images of {sum(map(len, raw)) / n / 1e3:.0f} kB on average, views on {device}")
    return {name: n / s for name, s in seconds.items()}


def time_loader(source, args, tokenize, seconds=10):
    """Images a second of a rank's loader as a whole."""
    batches = iter(make_loader(SampleStream(source, args.batch_size, tokenize, 77, 0, args.workers)))
    for _ in range(6 * max(args.workers, 1)):  # made ahead, and not at the pace
        next(batches)
    start = time.perf_counter()
    for n_batches in itertools.count(1):
        next(batches)
        if (taken := time.perf_counter() - start) > seconds:
            return n_batches * args.batch_size / taken


@one_line_errors()
def main(argv=None):
    """Print how many images a second each part of the way from the disk to a step takes."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    option = parser.add_argument
    option("--benchmark", action="store_true", required=True, help="what this file does if it is run")
    option("--data", required=True, help="a folder of class folders, or tars, as in training")
    option("--label", default="cls", help="tars: where the class is, as in training [cls]")
    option("--classnames", help="a file with a class name on each line, as in training")
    option("--bpe", help="path of CLIP's bpe_simple_vocab_16e6.txt.gz [fetched once]")
    option("--image_size", type=int, default=256, help="side in pixels [256]")
    option("--batch_size", type=int, default=64, help="of a rank [64]")
    option("--workers", type=int, default=default_workers("data"), help="loader processes [as in training]")
    args = parser.parse_args(argv)
    if min(args.image_size, args.batch_size) < 1 or args.workers < 0:
        raise ValueError("sizes and numbers must be positive")
    torch.set_num_threads(1)
    keep_freed_memory()
    canvas, tokenize = canvas_size(args.image_size), ClipBPE(args.bpe)
    source = open_source(args.data, canvas, classnames=args.classnames, label=args.label, needs_caption=False)
    rates = time_parts(source, args, tokenize, canvas)
    one_process = 1 / (1 / rates["decode"] + 1 / rates["tokens"])
    needed = [f"{math.ceil(pairs / one_process)} for {name} ({pairs:,} pairs a second)"
              for name, pairs in H100_PAIRS.items()]
    views = f"1 + 2 + 8 views of {args.image_size} px, a thread or GPU"
    print(f"{'images a second':<52}{'here':>10}{'Pillow, one by one':>22}")
    for name, part, plain in ((f"decoded to {canvas} px, a process", "decode", "plain decode"),
                              ("captions to tokens, a process", "tokens", None),
                              (views, "views", "plain views")):
        print(f"{name:<52}{rates[part]:>10,.0f}" + (f"{rates[plain]:>22,.0f}" if plain else ""))
    print(f"{f'loader, {args.workers} processes':<52}{time_loader(source, args, tokenize):>10,.0f}")
    if args.image_size == 256:
        print(f"processes that keep one H100 busy: {', '.join(needed)}")


if __name__ == "__main__":
    main()
