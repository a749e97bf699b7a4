"""
Train a DiT on the frozen latents of a tokenizer, and generate images with it (VTP, arXiv 2512.13687, which
follows LightningDiT): of a class, or of a text, by the tokenizer's own text tower.

On any machine, a few minutes, on the tokenizer and the data of `python train_tokenizer.py`; then from text:
    python train_dit.py
    python train_dit.py --condition text --out runs/text
    python train_dit.py --sample 8 --checkpoint runs/text --out runs/stars --prompt "a red star on blue"

The paper's run: the released VTP-L, ImageNet, 8 GPUs. Latents are cached first (1.28M images, twice, 84 GB in
bf16):
    torchrun --nproc_per_node=8 train_dit.py --tokenizer MiniMaxAI/VTP-Large-f16d64 --data imagenet/train \\
        --model XL/1 --mu -0.75 --sigma 1.0 --out runs/dit-xl

50,000 samples for FID, from its EMA weights: a folder of PNGs, or a .npz with arr_0. An interrupted call goes
on:
    torchrun --nproc_per_node=8 train_dit.py --sample 50000 --checkpoint runs/dit-xl --out samples.npz \\
        --steps 250 --shift 0.075

Go on after a stop, bit for bit: the same command with --resume (or just --out FOLDER --resume). Ctrl-C and
SIGTERM stop a run after its step, with a checkpoint. The folder gets run.json, metrics.jsonl, checkpoint.pt
(of classes, it loads in LightningDiT: {'ema': ...}), latents_stats.pt and samples_*.png.
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import data
import evaluate
from dit import (DIT_SIZES, METHODS, SAMPLING, DiT, draw_timesteps, flow_loss, flow_path, generate,
                 noise_and_labels, read_lightningdit)
from losses import (barrier, by_first_rank, first_on_node, gather_objects, init_distributed,
                    keep_freed_memory, leave_distributed, one_line_errors, rank, world_size)
from train_tokenizer import (CapturedStep, Log, Saving, Settings, absolute, add_to_totals, check_paths,
                             compile_blocks, count, count_flops, finite_on_all_ranks, folder_or_name,
                             load_checkpoint, not_negative, part, positive, save_checkpoint, share,
                             should_compile, warmed_up_cosine, whole, wrap_in_ddp)
from vtp import (VTP, UserError, claim_folder, find_checkpoint, is_leftover, normalize, read_config,
                 release_folder, write_atomically)

# ----- Settings -------------------------------------------------------------------------------------------
# The defaults are the paper's, which are LightningDiT's; tiny= is tuned for minutes on 2 CPU cores,
# B= is the paper's, with Heun's method in place of dopri5.

BETAS = (0.9, 0.95)             # of AdamW, which has no weight decay (LightningDiT)


def make_parser():
    """The command line; --help is the recipe's documentation."""
    parser = Settings(__doc__)
    section, option, flag = parser.section, parser.option, parser.flag
    section("tokenizer and data")
    option("--tokenizer", "runs/tokenizer", "a run of train_tokenizer.py, a released folder, or a hub id; "
           "with --sample default: the run's", folder_or_name)
    option("--data", None, "a folder of class folders, or tars (a folder, glob or braces); default: "
           "built in", absolute)
    option("--label", "cls", "tars: where the class is, 'cls' (KEY.cls) or a field of KEY.json")
    option("--classnames", None, "a file with a class name on each line, in the order of the labels",
           absolute)
    option("--train_size", 65536, "scenes in the built-in set", count, tiny=8192)
    flag("--hold_out_pairs", "leave scenes with 10 of the 120 pairs of shape and colour out of it")
    option("--image_size", None, "side in pixels; default: the tokenizer's own", count)
    option("--cache", None, "folder of the latents; default: latents/ in --tokenizer, or in runs/ID; of "
           "texts latents_text/", absolute)
    option("--latents_stats", None, "a latents_stats.pt to normalise with; default: the cache's own",
           absolute)
    option("--max_skipped", 0.1, "largest share of unusable samples", share)

    option("--bpe", None, "path of CLIP's bpe_simple_vocab_16e6.txt.gz; default: fetched once", absolute)

    section("training")
    option("--condition", "class", "what the DiT draws: a class, or a text, by the feature that the text "
           "tower of --text_from has of it", choices=("class", "text"))
    option("--text_from", None, "a tokenizer with a text tower, if it is another than --tokenizer",
           folder_or_name)
    option("--model", "tiny", f"size: {', '.join(DIT_SIZES)}", choices=DIT_SIZES)
    flag("--qk_norm", "normalise queries and keys, against NaNs (LightningDiT's variant; paper: without)")
    option("--samples", 102_400_000, "latents seen in all (paper: 100k steps of 1,024)", count, tiny=98_304)
    option("--batch_size", 1024, "latents a step over all ranks", count, tiny=64)
    option("--lr", 2e-4, "learning rate (LightningDiT)", positive, tiny=3e-3)
    option("--lr_end", 2e-4, "where its cosine ends (LightningDiT: constant)", not_negative, tiny=0.0)
    option("--warmup", 0.0, "linear warm-up, as a part of the run (LightningDiT: none)", share)
    option("--clip_grad", 0.0, "largest gradient norm; 0: any (the paper's configs)", not_negative, tiny=1.0)
    option("--ema", 0.9999, "decay of the averaged weights, which are those that sample", share, tiny=0.995)
    option("--mu", -0.5, "of t = sigmoid(mu + sigma normal) (paper: VTP-L -0.75)", float, tiny=-0.4)
    option("--sigma", 1.25, "see --mu (paper: VTP-L 1.0)", positive, tiny=1.0)
    flag("--mirror", "learn images' mirror images too (LightningDiT), but for texts that say left or right; "
         "default: not if built in, where arrows point right", yes_or_no=True, default=None)
    option("--label_dropout", 0.1, "share of classes or texts replaced by the null, for guidance", share)
    option("--seed", 0, "of initialisation, data order and every draw; with --sample, of the noise", whole)

    section("sampling (also of the pictures while training)")
    option("--sample", None, "images to generate from --checkpoint into --out, instead of training", count)
    parser.group.add_argument("--prompt", nargs="+", help="texts to draw, or a file with one on each line: "
                              "image i is of text i modulo their number; OUT.png shows them together")
    option("--checkpoint", "runs/dit", "a run, or a LightningDiT file, with --tokenizer and --latents_stats")
    option("--steps", 250, "points of the time grid, one more than steps (paper: with XL)", count,
           tiny=20, B=100)
    option("--method", "euler", "of integration; adams: for few steps; heun: in 100 points as exact as the "
           "paper's dopri5 (rms errors on small models up to 3e-5, 8e-5)", choices=METHODS,
           tiny="adams", B="heun")
    option("--shift", 0.075, "time shift t -> s t / (1 + (s - 1) t) (paper: with XL)", positive,
           tiny=1.0, B=1.0)
    option("--guidance", 1.0, "classifier-free guidance; 1: none", not_negative, tiny=4.0)
    option("--interval", [0.0, 1.0], "times at which guidance applies", part, tiny=[0.0, 1.0])
    option("--channels", None, "guide the first channels alone (the authors' code: 3); default: all", count)
    option("--sample_batch", 256, "images generated together by a rank", count)

    section("run")
    option("--out", "runs/dit", "folder for all that the run leaves; with --sample: of PNGs, or a .npz")
    flag("--resume", "go on from --out's checkpoint, with its recorded arguments")
    option("--precision", "bf16", "bf16 autocast over fp32 weights, or fp32", choices=("bf16", "fp32"))
    option("--workers", None, "loader processes for the cache; default: 0 if built in, else up to 8", whole)
    option("--log_every", 50, "steps between log lines", count)
    option("--eval_every", None, "steps between sample pictures; default: a quarter of the run", count)
    option("--checkpoint_every", None, "steps between checkpoints, 15 minutes being the longest time without "
           "one; default: as --eval_every", count)
    option("--eval_samples", None, "images generated at the end, for the accuracy of a judge, which rank 0 "
           "trains on the data's classes meanwhile; default: 500 if built in, else 0: no judge", whole)
    flag("--compile", "torch.compile the blocks; default: on CUDA to train, or to sample 10,000 images, on a "
         "CPU for 10,000 steps (tiny: half a minute, then 1.25 times as fast)", yes_or_no=True, default=None)
    flag("--cuda_graph", "capture the step on CUDA", yes_or_no=True, default=True)
    return parser


@one_line_errors()
def read_settings(argv=None):
    """Arguments, completed and checked: whatever is wrong ends the program here, with what to change."""
    parser = make_parser()
    if parser.parse_args(argv).sample is None:
        args = parser.read(argv)
    else:
        parser.set_defaults(tokenizer=None, precision=None)     # to see what was given
        args = parser.parse_args(argv)
        follow_run(args)
    parser.complete(args, kind=args.model.split("/")[0])
    if args.sample is None:
        if args.eval_samples is None:
            args.eval_samples = 500 if args.data is None and args.condition == "class" else 0
        if args.mirror is None:
            args.mirror = args.data is not None
        check_training(args)
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: a time grid has at least 2 points")
    check_paths(args, ("data",), ("classnames", "latents_stats", "bpe"))
    first_on_node(lambda: read_config(find_checkpoint(args.tokenizer)))
    if args.condition == "text":
        where = args.text_from or args.tokenizer
        if not read_config(first_on_node(lambda: find_checkpoint(where))).train_clip:
            raise ValueError(f"{where} has no text tower: take that of another tokenizer, --text_from")
    if (args.prompt is not None) != (args.sample is not None and args.condition == "text"):
        raise ValueError("--prompt belongs to --sample of a DiT that draws texts (--condition text), which "
                         "needs it")
    if args.prompt is not None:
        args.prompt = read_prompts(args.prompt)
    return args


def check_training(args):
    """The place of the cache. Raises ValueError or FileNotFoundError that says what to change."""
    if args.tokenizer == "runs/tokenizer" and not os.path.isdir(args.tokenizer):
        raise FileNotFoundError("no tokenizer in runs/tokenizer yet. First: python train_tokenizer.py")
    if args.batch_size % world_size() or args.batch_size > args.samples:
        raise ValueError(f"--batch_size {args.batch_size}: must be a multiple of {world_size()}, the number "
                         f"of ranks, and at most --samples {args.samples}")
    if args.condition == "text" and args.eval_samples:
        raise ValueError("--eval_samples asks a judge for the class; evaluate.py measures a DiT of texts")
    if args.condition == "class" and args.text_from:
        raise ValueError("--text_from belongs to --condition text")
    if args.hold_out_pairs and args.data is not None:
        raise ValueError("--hold_out_pairs is of the built-in set, not of --data")
    if args.cache is None:
        is_local = os.path.isdir(args.tokenizer)
        folder = args.tokenizer if is_local else os.path.join("runs", args.tokenizer.replace("/", "--"))
        args.cache = os.path.join(folder, "latents_text" if args.condition == "text" else "latents")
    names = os.listdir(args.cache) if os.path.isdir(args.cache) else []
    if "cache.json" not in names and not all(map(is_leftover, names)):
        raise ValueError(f"--cache {args.cache} is a folder with other things in it; choose another")


def follow_run(args):
    """--sample: what was not given is as in the run that --checkpoint is, or as its file's size has it."""
    if args.out == "runs/dit":
        raise ValueError("--sample needs --out: a folder for PNGs, or a file.npz")
    if os.path.isfile(args.checkpoint):
        if args.latents_stats is None:
            raise ValueError("--checkpoint is a file: give what normalised its latents, --latents_stats")
        args.tokenizer, args.precision = args.tokenizer or "runs/tokenizer", args.precision or "bf16"
        _, sizes = read_lightningdit(args.checkpoint)
        args.condition = "class" if sizes.get("text_dim") is None else "text"
        args.model = next((name for name, size in DIT_SIZES.items()
                           if (size["dim"], size["depth"]) == (sizes["dim"], sizes["depth"])), "another")
        return
    if not os.path.isfile(os.path.join(args.checkpoint, "checkpoint.pt")):
        raise FileNotFoundError(f"--checkpoint {args.checkpoint}: neither a file nor a run that holds "
                                "checkpoint.pt. First: python train_dit.py")
    recorded = evaluate.recorded_arguments(args.checkpoint)
    if not recorded:
        raise FileNotFoundError(f"--checkpoint {args.checkpoint} has no run.json: give checkpoint.pt itself")
    for name in ("tokenizer", "precision", *SAMPLING):
        if name not in recorded:
            raise ValueError(f"--checkpoint {args.checkpoint} is no run of train_dit.py: it lacks {name}")
        setattr(args, name, recorded[name] if getattr(args, name) is None else getattr(args, name))
    args.condition = recorded.get("condition", "class")
    # with another --tokenizer, which decodes, texts are still read by the run's own
    args.text_from = args.text_from or recorded.get("text_from") or recorded["tokenizer"]
    args.bpe = args.bpe or recorded.get("bpe")


def read_prompts(prompts):
    """--prompt, texts or a file of them -> a list of texts. ValueError if there is none."""
    if len(prompts) == 1 and os.path.isfile(prompts[0]):
        with open(prompts[0], encoding="utf-8") as f:
            prompts = [line.strip() for line in f if line.strip()]
    elif len(prompts) == 1 and prompts[0].endswith(".txt"):
        raise ValueError(f"--prompt {prompts[0]}: no such file")
    if not prompts:
        raise ValueError("--prompt: no text in that file")
    return prompts


def sampling_options(args):
    """What dit.generate takes of the arguments."""
    return dict(bf16=args.precision == "bf16", **{name: getattr(args, name) for name in SAMPLING})


# ----- The latents, once: each image and its mirror image -------------------------------------------------
#   00000.bin ...     parts, each written by one rank and all at once: (rows, 2, d, h, w) bfloat16, [i, 1]
#                     mirrored (but not where the text says left or right), then a label int64 for each row,
#                     -1: it has none, -2: it cannot be used; of texts also their features (rows, text_dim)
#   cache.json        sizes of shards, slices of each, shape, class names, and of what the latents were made
#   latents_stats.pt  {'mean', 'std'} of shape (1, d, 1, 1), the form of the authors' files; written last
# A shard is a tar, or SHARD_ROWS images of a folder. Part k has every slices-th row of shard k // slices from
# row k % slices on: row i of all is sample i of the source, whatever wrote it.

SHARD_ROWS = 1024
NO_LABEL, UNUSABLE = -1, -2


def open_cache(args, tokenizer, source, device, tower=None):
    """The latents of a source in --cache, with a TextTower what it makes of captions -> LatentCache."""
    size = args.image_size or tokenizer.config.image_size
    side = size // tokenizer.config.vision_patch_size
    shape = (tokenizer.config.vision_feature_bottleneck, side, side)
    workers = data.default_workers(args.data) if args.workers is None else args.workers
    made_of = by_first_rank(lambda: dict(tokenizer=evaluate.file_digest(find_checkpoint(args.tokenizer)),
                                         data=source.fingerprint(with_captions=tower is not None),
                                         settings=f"{size} px",
                                         **({} if tower is None else {"text tower": tower.digest()})))
    encode_images = functools.partial(encode, tokenizer, device)
    return complete_cache(args.cache, source, encode_images, shape, made_of, args.max_skipped, workers,
                          tower)[0]


def complete_cache(folder, source, encode, latent_shape, made_of, max_skipped=0.1, n_workers=0, tower=None):
    """What is missing of the cache in folder, or broken, is encoded now, by all ranks -> LatentCache,
    {reason: samples skipped now}.
    encode: uint8 (b, 3, C, C) on the host -> latents (b, *latent_shape). made_of: what they are made of.
    tower: a TextTower; None: captions are left out.
    ValueError: the folder's are of something else. UserError: more than the share max_skipped cannot be used,
    or of classes no sample has one. OSError: the disk has no room for all."""
    if not by_first_rank(lambda: is_complete(folder)):
        by_first_rank(lambda: claim_folder(folder))
    about = by_first_rank(lambda: read_about(folder))
    if about is None:
        sizes = shard_sizes(source)
        is_tars, n_readers = isinstance(source, data.TarSource), max(n_workers, 1) * world_size()
        about = dict(sizes=sizes, slices=math.ceil(n_readers / len(sizes)) if is_tars else 1,
                     shape=latent_shape, class_names=source.class_names, made_of=made_of)
        if tower is not None:
            about["text_dim"] = tower.dim
        by_first_rank(lambda: begin_cache(folder, about))
    if differs := [k for k in {**made_of, **about["made_of"]} if about["made_of"].get(k) != made_of.get(k)]:
        raise ValueError(f"the latents in {folder} were made with another {' and '.join(differs)}: "
                         "choose another --cache, or delete that folder")
    skipped = encode_parts(folder, about, missing_parts(folder, about), source, encode, n_workers, tower)
    by_first_rank(lambda: is_complete(folder) or finish_cache(folder, source, max_skipped, skipped))
    by_first_rank(lambda: release_folder(folder))
    return LatentCache(folder), skipped


@torch.no_grad()
def encode(tokenizer, device, images):
    """uint8 images (b, 3, H, W) -> latents (b, d, h, w) in fp32, without autocast (the authors' code)."""
    return tokenizer.encode(normalize(images.to(device).float() / 255))


def read_about(folder):
    """cache.json, or None where it is not there or broken: then the cache is made anew."""
    try:
        found = evaluate.read_json(os.path.join(folder, "cache.json"))
        about = {k: found[k] for k in ("sizes", "slices", "shape", "class_names", "made_of")}
        about |= {k: found[k] for k in ("text_dim",) if k in found}
        return about if found["digest"] == data.digest_of(json.dumps(about)) else None
    except (ValueError, KeyError, FileNotFoundError):
        return None


def begin_cache(folder, about):
    """Write cache.json; parts of another are removed."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.bin")):
        os.remove(path)
    text = json.dumps({**about, "digest": data.digest_of(json.dumps(about))}, indent=2).encode()
    write_atomically(os.path.join(folder, "cache.json"), lambda f: f.write(text))


def is_complete(folder):
    """Has open_cache finished this folder, and are its files still whole?"""
    about = read_about(folder)
    try:
        return bool(about) and not missing_parts(folder, about) and bool(
            evaluate.read_latent_stats(os.path.join(folder, "latents_stats.pt")))
    except (ValueError, FileNotFoundError):
        return False


def part_path(folder, k):
    """Where part k lies."""
    return os.path.join(folder, f"{k:05d}.bin")


def part_rows(about, k):
    """How many rows part k has."""
    shard, first = divmod(k, about["slices"])
    return len(range(first, about["sizes"][shard], about["slices"]))


def row_bytes(about):
    """Bytes of a row's latents: two of them, of 2 bytes a number."""
    return 4 * math.prod(about["shape"])


def part_bytes(about, n_rows):
    """Bytes of n_rows: latents, labels, features of texts."""
    return n_rows * (row_bytes(about) + 8 + 2 * about.get("text_dim", 0))


def missing_parts(folder, about):
    """Parts that are not there, or broken: those whose file has not its length."""
    def is_whole(k):
        path, n_bytes = part_path(folder, k), part_bytes(about, part_rows(about, k))
        return os.path.isfile(path) and os.path.getsize(path) == n_bytes
    return [k for k in range(len(about["sizes"]) * about["slices"]) if not is_whole(k)]


def encode_parts(folder, about, parts, source, encode, n_workers, tower=None, batch_size=256):
    """Write parts of a cache, by all ranks -> {reason: samples skipped}; see complete_cache."""
    parts = gather_objects(parts)[0]            # as rank 0 sees them: others may write already
    if not parts:
        return {}
    n_rows = sum(part_rows(about, k) for k in parts)
    n_bytes = part_bytes(about, n_rows)
    free = by_first_rank(lambda: shutil.disk_usage(folder).free)
    if n_bytes > free:
        raise OSError(f"the latents need {n_bytes:,} bytes in {folder}, where {free:,} are free")
    reader, skipped, unfinished = PartReader(source, about, parts, n_workers), Counter(), {}
    loader = torch.utils.data.DataLoader(reader, batch_size, num_workers=n_workers, collate_fn=reader.collate,
                                         worker_init_fn=functools.partial(data.begin_worker, os.getpid()))
    bar = tqdm(total=math.ceil(n_rows / world_size()), unit=" images", desc="encoding", disable=rank() != 0,
               dynamic_ncols=True)
    for places, images, captions, labels, reasons, finished in loader:
        skipped.update(reasons)
        if len(places):
            pair = torch.stack((encode(images), encode(images.flip(-1))), dim=1)        # (b, 2, d, h, w)
            if tower is not None:
                texts = tower(captions).bfloat16().view(torch.int16).numpy()
                has_side = torch.tensor([data.names_a_side(caption) for caption in captions])
                pair[has_side, 1] = pair[has_side, 0]
            pair = pair.cpu().bfloat16().view(torch.int16).numpy()                # NumPy has no bfloat16
        try:
            for i, (k, index) in enumerate(places):
                if k not in unfinished:
                    unfinished[k] = begin_part(folder, about, k)
                file, of_part, texts_of_part = unfinished[k]
                file.seek(index * row_bytes(about))
                file.write(pair[i].tobytes())
                of_part[index] = labels[i]
                if tower is not None:
                    texts_of_part[index] = texts[i]
            for k in finished:      # it may have had no usable sample
                finish_part(folder, about, k, *unfinished.pop(k, None) or begin_part(folder, about, k))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, {n_bytes:,} bytes needed", folder) from error
        bar.update(len(places) + len(reasons))
    bar.close()
    skipped = dict(sum(gather_objects(skipped), Counter()))
    if rank() == 0:
        print(f"latents of {source.name} and of its mirror images are in {folder}; "
              f"{sum(skipped.values())} samples skipped {skipped or ''}")
    return skipped


def begin_part(folder, about, k):
    """A temporary file for part k, and labels and texts' features for its rows."""
    file, n_rows = open(f"{part_path(folder, k)}.{os.getpid()}.tmp", "wb"), part_rows(about, k)
    return file, np.full(n_rows, UNUSABLE), np.zeros((n_rows, about.get("text_dim", 0)), np.int16)


def finish_part(folder, about, k, file, labels, features):
    """Write labels and features behind the latents, and give the part its name."""
    with file:
        file.seek(len(labels) * row_bytes(about))
        file.write(labels.astype(np.int64).tobytes())
        file.write(features.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, part_path(folder, k))


def shard_sizes(source):
    """Samples in each shard of a source, of tars counted by all ranks together."""
    if not isinstance(source, data.TarSource):
        return [min(SHARD_ROWS, len(source) - start) for start in range(0, len(source), SHARD_ROWS)]
    sizes = {k: sum(1 for _ in data.read_tar(source.paths[k], only_names=True))
             for k in range(rank(), len(source.paths), world_size())}
    sizes = {k: n for part in gather_objects(sizes) for k, n in part.items()}
    return [sizes[k] for k in range(len(source.paths))]


class PartReader(torch.utils.data.IterableDataset):
    """This rank's share of parts, sample by sample: (part, index in it, canvas, caption, label); after one
    that cannot be used (part, None, reason), at the end of a part (part, None, None)."""
    def __init__(self, source, about, parts, n_workers):
        self.source, self.slices, self.parts, self.roles = source, about["slices"], parts, max(n_workers, 1)
        self.starts, self.n_rows = np.cumsum([0, *about["sizes"]]), [part_rows(about, p) for p in parts]
        self.rank, self.world = rank(), world_size()

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        reader = (info.id if info else 0) * self.world + self.rank
        for k, n_rows in list(zip(self.parts, self.n_rows))[reader::self.roles * self.world]:
            for number, load in self.samples_of(k):
                try:
                    if number // self.slices >= n_rows:
                        raise data.BadSample("more samples than before")        # a tar that has changed
                    image, caption, label = load()
                    yield k, number // self.slices, torch.tensor(image), caption, max(label, NO_LABEL)
                except data.BadSample as reason:
                    yield k, None, str(reason)
            yield k, None, None

    def samples_of(self, k):
        """(number in the shard, function that loads it) of each sample of part k."""
        if isinstance(self.source, data.TarSource):
            for _, _, number, sample in self.source.walk([(k, 0)], self.slices):
                yield number, functools.partial(self.source.decode, sample, False)
        else:
            for number, row in enumerate(range(self.starts[k], self.starts[k + 1])):
                yield number, functools.partial(self.source.load, row, False, np.random.default_rng(row))

    @staticmethod
    def collate(samples):
        """-> [(part, index)] (b), images uint8 (b, 3, C, C) or (), captions, labels (b), reasons, finished
        parts."""
        good = [s for s in samples if s[1] is not None]
        reasons = [s[2] for s in samples if s[1] is None and s[2] is not None]
        finished = [s[0] for s in samples if s[1] is None and s[2] is None]
        images = torch.stack([s[2] for s in good]) if good else ()
        return [s[:2] for s in good], images, [s[3] for s in good], [s[4] for s in good], reasons, finished


def finish_cache(folder, source, max_skipped, skipped):
    """Check the labels, and write statistics of the latents of up to 10,000 images (the authors)."""
    stats = os.path.join(folder, "latents_stats.pt")
    with contextlib.suppress(FileNotFoundError):        # a broken one
        os.remove(stats)
    cache = LatentCache(folder)
    n_unusable = int((cache.labels == UNUSABLE).sum())
    if n_unusable > max_skipped * len(cache.labels):
        raise UserError(f"{n_unusable} of {len(cache.labels)} samples of {source.name} cannot be used, more "
                        f"than the share of {max_skipped} that --max_skipped allows: {skipped or ''}")
    if not len(cache):
        raise UserError(f"no sample of {source.name} has a class, which this model needs: class folders, "
                        ".cls files, or --label" if cache.text_dim is None else
                        f"no sample of {source.name} can be used")
    some = cache.rows[np.linspace(0, len(cache) - 1, min(len(cache), 10_000)).astype(np.int64)]
    x = cache.latents_at(some)[:, 0].double()
    std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
    write_stats(stats, mean, std)


def write_stats(path, mean, std):
    """Latent statistics, each (1, d, 1, 1), as LightningDiT's file, atomically."""
    write_atomically(path, lambda f: torch.save({"mean": mean.float().cpu(), "std": std.float().cpu()}, f))


class LatentCache:
    """The latents in a folder that open_cache completed."""
    def __init__(self, folder):
        about = read_about(folder)
        self.slices, self.latent_shape = about["slices"], tuple(about["shape"])
        self.starts, self.class_names = np.cumsum([0, *about["sizes"]]), about["class_names"]
        self.text_dim = about.get("text_dim")
        self.parts, self.texts, self.labels = [], [], np.empty(self.starts[-1], np.int64)
        for k in range(len(about["sizes"]) * self.slices):
            n_rows, (shard, first) = part_rows(about, k), divmod(k, self.slices)
            path, shape = part_path(folder, k), (n_rows, 2, *self.latent_shape)
            self.parts.append(np.memmap(path, np.int16, "r", shape=shape) if n_rows else None)
            of_shard = self.labels[self.starts[shard]:self.starts[shard + 1]]
            start = n_rows * row_bytes(about)
            of_shard[first::self.slices] = np.fromfile(path, np.int64, n_rows, offset=start)
            if self.text_dim is not None and n_rows:
                self.texts.append(np.memmap(path, np.int16, "r", start + 8 * n_rows, (n_rows, self.text_dim)))
            else:
                self.texts.append(None)
        self.rows = np.flatnonzero(self.labels > (NO_LABEL if self.text_dim is None else UNUSABLE))
        self.num_classes = max(int(self.labels.max(initial=-1)) + 1, len(self.class_names or ()))
        stats = os.path.join(folder, "latents_stats.pt")
        self.mean, self.std = evaluate.read_latent_stats(stats) if os.path.isfile(stats) else (None, None)
        self.ahead, self.next = ThreadPoolExecutor(1), {}

    def __len__(self):
        return len(self.rows)

    def latents_at(self, rows):
        """Latents of rows (b,) of all: bfloat16 (b, 2, d, h, w), a copy in memory."""
        return self.found_in(self.parts, rows)

    def conditions_at(self, rows):
        """What a DiT draws of rows (b,): labels int64 (b,), or texts' features bfloat16 (b, text_dim)."""
        if self.text_dim is None:
            return torch.from_numpy(self.labels[rows])
        return self.found_in(self.texts, rows)

    def found_in(self, parts, rows):
        """Rows (b,) of what is in parts, bfloat16."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        numbers = rows - self.starts[shards]
        of_part = shards * self.slices + numbers % self.slices
        found = np.stack([parts[k][i] for k, i in zip(of_part, numbers // self.slices)])
        return torch.from_numpy(found).view(torch.bfloat16)

    def read(self, step, batch_size, seed):
        """This rank's share of global batch `step` of an endless shuffle: latents, conditions."""
        places = np.arange(step * batch_size + rank(), (step + 1) * batch_size, world_size())
        rows = self.rows[data.rows_at(places, len(self.rows), seed)]
        return self.latents_at(rows), self.conditions_at(rows)

    def batch(self, step, batch_size, seed):
        """The same, with the next step's batch read in the meantime."""
        wanted, following = (step, batch_size, seed), (step + 1, batch_size, seed)
        pending = self.next.get(wanted) or self.ahead.submit(self.read, *wanted)
        self.next = {following: self.ahead.submit(self.read, *following)}
        return pending.result()


# ----- State and step -------------------------------------------------------------------------------------

def make_batch(args, step, latents, y, mean, std, null):
    """What a step reads: this rank's data, noise, times and conditions, drawn for the global batch from
    (seed, step).

    latents (b, 2, d, h, w), an image's and its mirror image's, which half of them are with --mirror;
    y: labels (b,) or texts' features (b, text_dim); null: the number that some of them become."""
    generator, B = data.step_generator(args.seed, step, latents.device), args.batch_size
    drawn = dict(generator=generator, device=latents.device)
    normals, (is_mirrored, is_dropped) = torch.randn(B, **drawn), torch.rand(2, B, **drawn)
    noise = torch.randn(B, *latents.shape[2:], **drawn)
    normals, is_mirrored, is_dropped = (data.own_share(x) for x in (normals, is_mirrored, is_dropped))
    is_mirrored = is_mirrored < (0.5 if args.mirror else 0.0)
    latents = torch.where(is_mirrored.view(-1, 1, 1, 1), latents[:, 1], latents[:, 0])
    is_dropped = (is_dropped < args.label_dropout).view(-1, *[1] * (y.ndim - 1))
    return dict(latents=(latents.float() - mean) / std, noise=noise[rank()::world_size()],
                t=draw_timesteps(normals, args.mu, args.sigma),
                y=torch.where(is_dropped, null, y if y.ndim == 1 else y.float()))


class FlowMatching(nn.Module):
    """The forward that DDP wraps: batch -> loss."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.bf16 = model, args.precision == "bf16"

    def forward(self, batch):
        x_t, target = flow_path(batch["latents"], batch["noise"], batch["t"])
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            velocity = self.model(x_t, batch["t"], batch["y"])
        return flow_loss(velocity, target)


@dataclass
class State:
    """What training changes."""
    model: DiT
    ema: DiT
    objective: nn.Module             # FlowMatching, in DDP where there are ranks
    optimizer: torch.optim.Optimizer
    totals: dict                     # sums over this rank's finite steps since the last log line
    is_finite: torch.Tensor          # 0-d: was the last step, on all ranks
    args: argparse.Namespace

    def modules(self):
        """{name in a checkpoint: module}."""
        return dict(model=self.model, ema=self.ema)


def build_state(args, cache, device):
    """Model, its average and optimizer; the same weights on every rank."""
    torch.manual_seed(args.seed)
    d, h, _ = cache.latent_shape
    condition = dict(num_classes=cache.num_classes)
    if cache.text_dim is not None:
        condition = dict(text_dim=cache.text_dim)
    sizes = dict(**DIT_SIZES[args.model], input_size=h, in_channels=d, use_qk_norm=args.qk_norm, **condition)
    model, ema = DiT(**sizes).to(device), DiT(**sizes).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    if should_compile(args, device):
        compile_blocks(model, ema)
    group = dict(params=[p for p in model.parameters() if p.requires_grad], lr=torch.zeros((), device=device))
    optimizer = torch.optim.AdamW([group], betas=BETAS, weight_decay=0.0, fused=True,
                                  capturable=device.type == "cuda")
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    return State(model, ema, wrap_in_ddp(FlowMatching(model, args), device), optimizer, {}, is_finite, args)


def set_lr(state, step, n_steps):
    """Write this step's learning rate (from step 0) into the tensor that the optimizer reads; returns it."""
    args = state.args
    lr = warmed_up_cosine(args.lr, args.lr_end, args.warmup, step, n_steps)
    state.optimizer.param_groups[0]["lr"].fill_(lr)
    return lr


def train_step(state, batch):
    """One update. It reads no value on the host and no shape in it depends on data, so it can be captured."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = state.objective(batch)
    loss.backward()
    parameters = state.optimizer.param_groups[0]["params"]
    grad_norm = nn.utils.clip_grad_norm_(parameters, state.args.clip_grad or math.inf)
    is_finite = finite_on_all_ranks(loss, grad_norm)
    state.is_finite.copy_(is_finite)
    state.optimizer.found_inf = (~is_finite).float()     # where this is 1 the fused kernel skips the step
    state.optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - state.args.ema)
        add_to_totals(state.totals, dict(loss=loss, grad_norm=grad_norm), is_finite)


# ----- The run --------------------------------------------------------------------------------------------

def train(args, device):
    """Cache the latents, train, leave pictures and a checkpoint."""
    by_first_rank(lambda: claim_folder(args.out))
    tokenizer = VTP.from_pretrained(first_on_node(lambda: find_checkpoint(args.tokenizer))).to(device)
    if not tokenizer.config.train_reconstruction:
        raise ValueError(f"--tokenizer {args.tokenizer} has no decoder: its latents could not be shown")
    size = args.image_size or tokenizer.config.image_size
    tower = None
    if args.condition == "text":
        where = args.text_from or args.tokenizer
        tower = evaluate.TextTower(where, device, args.bpe, None if args.text_from else tokenizer)
    source = data.open_source(args.data, size, "train", args.train_size, args.classnames, args.label,
                              needs_caption=tower is not None, hold_out_pairs=args.hold_out_pairs)
    cache = open_cache(args, tokenizer, source, device, tower)
    stats = evaluate.read_latent_stats(args.latents_stats) if args.latents_stats else (cache.mean, cache.std)
    stats = tuple(x.to(device) for x in stats)
    mean, std = stats
    state = build_state(args, cache, device)
    n_steps, checkpoint = args.samples // args.batch_size, os.path.join(args.out, "checkpoint.pt")
    step, flops_per_step, _ = load_checkpoint(checkpoint, state, device) if args.resume else (0, 0, None)
    what = f"{len(cache)} latents of {f'{cache.num_classes} classes' if tower is None else 'texts'}"
    shown = None if tower is None else texts_to_show(args, source, tower)
    tower = None        # its memory is free
    log = Log(args, state.model, what, step, n_steps, flops_per_step)
    if rank() == 0:
        write_stats(os.path.join(args.out, "latents_stats.pt"), mean, std)
    run_step = CapturedStep(lambda batch: train_step(state, batch), device.type == "cuda" and args.cuda_graph)
    eval_every = args.eval_every or math.ceil(n_steps / 4)

    with Saving(checkpoint, args.checkpoint_every or eval_every) as saving:
        while step < n_steps and not saving.stop:
            with log.timing("data"):
                latents, y = cache.batch(step, args.batch_size, args.seed)
            latents, y = (x.to(device, non_blocking=True) for x in (latents, y))
            batch = make_batch(args, step, latents, y, mean, std, state.model.null)
            lr = set_lr(state, step, n_steps)
            if not log.flops_per_step:
                log.flops_per_step = count_flops(lambda: state.objective(batch).backward())
            run_step(batch)
            step += 1
            log.bar.update(args.batch_size)

            is_last, is_logged = step == n_steps, step % args.log_every == 0 or step == n_steps
            if is_logged:
                log.write_train(step, state.totals, dict(lr=lr), {})
            with log.timing("pause"):
                if rank() == 0 and (step % eval_every == 0 or is_last):
                    picture = evaluate.sample_picture(state.ema, tokenizer, stats, cache.class_names,
                                                      args.seed, texts=shown, **sampling_options(args))
                    evaluate.save_image(picture, os.path.join(args.out, f"samples_{step:07d}.png"))
                if saving.is_due(step, is_logged, is_last):
                    save_checkpoint(saving, state, step, is_last, log.flops_per_step)
    run_step.close()
    log.bar.close()
    saving.leave_if_stopped(args, step)
    rows = by_first_rank(lambda: evaluate.read_metrics(args.out))
    if args.eval_samples and not any(row["kind"] == "eval" for row in rows):
        log.write("eval", step, judge_samples(state, tokenizer, stats, source, cache, device))
    if rank() == 0:
        loads = " ('ema' loads in LightningDiT)" if args.condition == "class" else ""
        print(f"done: samples_{n_steps:07d}.png, checkpoint.pt{loads} in {args.out}")


def texts_to_show(args, source, tower, n=8):
    """Captions for pictures, of held-out scenes where the set is the built-in one, and their features."""
    if args.data is None:
        source = data.open_source(None, 8, "val")
    _, captions, _ = next(iter(data.EvaluationSet(source, 8 * n, n, whole=True)))    # some may be unusable
    return captions, tower(captions)


def judge_samples(state, tokenizer, stats, source, cache, device):
    """Class accuracy of samples and, beside it, of real images that the judge has not seen -> dict of
    shares."""
    args, right = state.args, [torch.zeros(0)]
    path = os.path.join(args.cache, "judge.pt")
    judge = evaluate.open_judge(path, source, cache.num_classes, device, args.seed)
    own = np.arange(rank(), args.eval_samples, world_size())
    for indices in (own[k:k + args.sample_batch] for k in range(0, len(own), args.sample_batch)):
        noise, labels = noise_and_labels(indices, args.seed + 1, state.model.latent_shape, cache.num_classes)
        pixels = generate(state.ema, tokenizer, stats, noise, labels, **sampling_options(args))
        right.append((judge.classify(pixels).cpu() == labels).float())
    right = torch.cat(gather_objects(torch.cat(right)))
    return dict(sample_accuracy=right.mean().item(), real_accuracy=judge.accuracy,
                accuracy_chance=1 / cache.num_classes)


# ----- Generating a set of images -------------------------------------------------------------------------

def generate_set(args, device):
    """--sample: images 0 to N - 1 as PNGs, by all ranks; batches that are there stay. Then the .npz, and of
    texts a picture beside it."""
    is_npz, run = args.out.endswith(".npz"), args.checkpoint
    folder = args.out + ".partial" if is_npz else args.out
    model = DiT.from_lightningdit(run if os.path.isfile(run) else os.path.join(run, "checkpoint.pt"))
    model = model.to(device)
    tokenizer = VTP.from_pretrained(find_checkpoint(args.tokenizer)).to(device)
    if (d := tokenizer.config.vision_feature_bottleneck) != model.in_channels:
        raise ValueError(f"--tokenizer {args.tokenizer} has latents of {d} channels, but --checkpoint draws "
                         f"{model.in_channels}")
    stats = evaluate.read_latent_stats(args.latents_stats or os.path.join(run, "latents_stats.pt"))
    prompts, tower = [], None
    if args.condition == "text":
        tower, prompts = evaluate.TextTower(args.text_from or args.tokenizer, device, args.bpe), args.prompt
        tower.check(model)
    of_set = by_first_rank(lambda: open_set(args, folder, model, stats, tower))
    if of_set is None:
        return print(f"{args.sample} images are in {args.out} already") if rank() == 0 else None
    stats = tuple(x.to(device) for x in stats)
    if should_compile(args, device, device.type == "cuda" and args.sample >= 10_000):
        compile_blocks(model)
    paths = [os.path.join(folder, f"{i:06d}.png") for i in range(args.sample)]
    own, writers = range(rank(), args.sample, world_size()), ThreadPoolExecutor(4)
    bar = tqdm(total=len(own), unit=" images", desc="sampling", disable=rank() != 0, dynamic_ncols=True)
    for indices in (own[k:k + args.sample_batch] for k in range(0, len(own), args.sample_batch)):
        bar.update(len(indices))
        if all(os.path.exists(paths[i]) for i in indices):
            continue
        # What a killed call has begun is made anew as a whole: batches of another size round otherwise.
        noise, y = noise_and_labels(indices, args.seed, model.latent_shape, model.num_classes or len(prompts))
        if prompts:
            y = tower([prompts[i % len(prompts)] for i in indices])
        images = evaluate.to_uint8(generate(model, tokenizer, stats, noise, y, **sampling_options(args)))
        images = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
        list(writers.map(evaluate.save_image, images, [paths[i] for i in indices]))
    bar.close()
    barrier()
    if rank() == 0:
        if prompts:
            evaluate.save_image(evaluate.prompts_picture(prompts, paths), picture_beside(args.out))
        if is_npz:
            images = np.stack([np.asarray(Image.open(path)) for path in paths])
            y = np.arange(args.sample) % len(prompts) if prompts else noise_and_labels(
                range(args.sample), args.seed, model.latent_shape, model.num_classes)[1].numpy()
            content = dict(arr_0=images, arr_1=y, made_with=of_set)
            whole = os.path.join(folder, "whole.npz")       # here, what a kill leaves of it is swept
            write_atomically(whole, lambda f: np.savez(f, **content), images.nbytes)
            os.replace(whole, args.out)
            shutil.rmtree(folder)
        print(f"{args.sample} images in {args.out}")


def picture_beside(out):
    """Where prompts and their images are shown: beside the set, as a picture in it would be one of it."""
    return os.path.abspath(out).removesuffix(".npz") + ".png"


def open_set(args, folder, model, stats, tower=None):
    """A new folder for images, or one that was begun with the same weights and settings; else ValueError.
    -> what the .npz says of these and of its size; None: it is there already, and is of just these."""
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), *stats):
        digest.update(tensor.cpu().contiguous().numpy())
    tokenizer = evaluate.file_digest(find_checkpoint(args.tokenizer))
    made_with = dict(model=digest.hexdigest()[:16], tokenizer=tokenizer, seed=args.seed,
                     **sampling_options(args))
    if tower is not None:
        made_with |= {"prompts": data.digest_of(*args.prompt), "text tower": tower.digest()}
    of_set = json.dumps({**made_with, "sample": args.sample})
    if folder != args.out and os.path.exists(args.out):
        if evaluate.load_arrays(args.out, (), ["made_with"]).get("made_with") != of_set:
            raise ValueError(f"--out {args.out} is there already: choose another, or delete it")
        shutil.rmtree(folder, ignore_errors=True)       # a call that was killed may have left it
        return None
    claim_folder(folder)
    path = os.path.join(folder, "made_with.json")
    images = [name for name in os.listdir(folder) if name.endswith(".png")]
    if tower is not None and not os.path.isfile(path) and os.path.exists(picture_beside(args.out)):
        raise ValueError(f"{picture_beside(args.out)}, where the picture of prompts belongs, is there "
                         "already: choose another --out")
    before = evaluate.read_json(path) if os.path.isfile(path) else {} if images else made_with
    if differs := [name for name, value in made_with.items() if before.get(name) != value]:
        raise ValueError(f"--out {args.out} has images that were made with another {', '.join(differs)}: "
                         "choose another folder, or delete it")
    if unasked := set(images) - {f"{i:06d}.png" for i in range(args.sample)}:
        raise ValueError(f"--out {args.out} has images that --sample {args.sample} does not ask for, such as "
                         f"{min(unasked)}: choose another folder, or delete it")
    write_atomically(path, lambda f: f.write(json.dumps(made_with, indent=2).encode()))
    return of_set


@one_line_errors()
def main(argv=None):
    """Train, or with --sample generate, as the arguments say."""
    device = init_distributed()
    args = read_settings(argv)
    if device.type == "cpu":
        keep_freed_memory()
    if args.sample is not None:
        generate_set(args, device)
    else:
        train(args, device)
    leave_distributed()


if __name__ == "__main__":
    main()
