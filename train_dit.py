"""
Train a class-conditional DiT on the frozen latents of a tokenizer, and generate images with it (VTP, arXiv
2512.13687, which follows LightningDiT).

On any machine, a few minutes, on the tokenizer and the data of `python train_tokenizer.py`:
    python train_dit.py

The paper's run: the released VTP-L, ImageNet, 8 GPUs. Latents are cached first (1.28M images, twice, 84 GB in
bf16):
    torchrun --nproc_per_node=8 train_dit.py --tokenizer MiniMaxAI/VTP-Large-f16d64 --data imagenet/train \\
        --model XL/1 --mu -0.75 --sigma 1.0 --out runs/dit-xl

50,000 samples for FID, from its EMA weights: a folder of PNGs, or a .npz with arr_0. An interrupted call goes
on:
    torchrun --nproc_per_node=8 train_dit.py --sample 50000 --checkpoint runs/dit-xl --out samples.npz \\
        --steps 250 --shift 0.075

Go on after a stop, bit for bit: the same command with --resume (or just --out FOLDER --resume). The folder
gets run.json, metrics.jsonl, checkpoint.pt (loads in LightningDiT: {'ema': ...}), latents_stats.pt and
samples_*.png.
"""
import argparse
import functools
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
from losses import (barrier, first_on_node, gather_objects, init_distributed, leave_distributed, rank,
                    world_size)
from train_tokenizer import (CapturedStep, Log, Settings, add_to_totals, check_paths, compile_blocks, count,
                             count_flops, finite_on_all_ranks, keep_freed_memory, load_checkpoint,
                             not_negative, part, positive, save_checkpoint, share, warmed_up_cosine, whole,
                             wrap_in_ddp)
from vtp import VTP, find_checkpoint, normalize, read_config, write_atomically

# ----- Settings -------------------------------------------------------------------------------------------
# The defaults are the paper's, which are LightningDiT's; tiny= is tuned for minutes on 2 CPU cores,
# B= is the paper's, with Heun's method in place of dopri5.

BETAS = (0.9, 0.95)             # of AdamW, which has no weight decay (LightningDiT)


def make_parser():
    """The command line; --help is the recipe's documentation."""
    parser = Settings(__doc__)
    section, option, flag = parser.section, parser.option, parser.flag
    section("tokenizer and data")
    option("--tokenizer", "runs/tokenizer", "a run of train_tokenizer.py, a released folder, or a hub id")
    option("--data", None, "a folder of class folders, or tars (a folder, glob or braces); default: built in")
    option("--label", "cls", "tars: where the class is, 'cls' (KEY.cls) or a field of KEY.json")
    option("--classnames", None, "a file with a class name on each line, in the order of the labels")
    option("--train_size", 65536, "scenes in the built-in set", count, tiny=8192)
    option("--image_size", None, "side in pixels; default: the tokenizer's own", count)
    option("--cache", None, "folder of the latents; default: latents/ in --tokenizer, or in runs/ID")
    option("--latents_stats", None, "a latents_stats.pt to normalise with; default: the cache's own")
    option("--max_skipped", 0.1, "largest share of unusable samples", share)

    section("training")
    option("--model", "tiny", f"size: {', '.join(DIT_SIZES)}", choices=DIT_SIZES)
    flag("--qk_norm", "normalise queries and keys, against NaNs (LightningDiT's variant; paper: without)")
    option("--samples", 102_400_000, "latents seen in all (paper: 100k steps of 1,024)", count, tiny=110_000)
    option("--batch_size", 1024, "latents a step over all ranks", count, tiny=64)
    option("--lr", 2e-4, "learning rate (LightningDiT)", positive, tiny=1.5e-3)
    option("--lr_end", 2e-4, "where its cosine ends (LightningDiT: constant)", not_negative, tiny=0.0)
    option("--warmup", 0.0, "linear warm-up, as a part of the run (LightningDiT: none)", share)
    option("--clip_grad", 0.0, "largest gradient norm; 0: any (the paper's configs)", not_negative, tiny=1.0)
    option("--ema", 0.9999, "decay of the averaged weights, which are those that sample", share, tiny=0.995)
    option("--mu", -0.5, "of t = sigmoid(mu + sigma normal) (paper: VTP-L -0.75)", float, tiny=-0.4)
    option("--sigma", 1.25, "see --mu (paper: VTP-L 1.0)", positive, tiny=1.0)
    option("--label_dropout", 0.1, "share of labels replaced by the null class, for guidance", share)
    option("--seed", 0, "of initialisation, data order and every draw; with --sample, of the noise", whole)

    section("sampling (also of the pictures while training)")
    option("--sample", None, "images to generate from --checkpoint into --out, instead of training", count)
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
    option("--checkpoint_every", None, "steps between checkpoints; default: as --eval_every", count)
    option("--eval_samples", 500, "images generated at the end, for the judge's accuracy; 0: no judge", whole)
    flag("--compile", "torch.compile the blocks; default: on CUDA only", yes_or_no=True, default=None)
    flag("--cuda_graph", "capture the step on CUDA", yes_or_no=True, default=True)
    return parser


def read_settings(argv=None):
    """Arguments, completed and checked: whatever is wrong ends the program here, with what to change."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.sample is None:
        args = parser.read(argv)
    with parser.errors():
        if args.sample is not None:
            follow_run(args)
        parser.complete(args, kind=args.model.split("/")[0])
        if args.sample is None:
            check_training(args)
        if args.steps < 2:
            raise ValueError(f"--steps {args.steps}: a time grid has at least 2 points")
        check_paths(args, ("data",), ("classnames", "latents_stats"))
        first_on_node(lambda: read_config(find_checkpoint(args.tokenizer)))
    return args


def check_training(args):
    """The place of the cache. Raises ValueError or FileNotFoundError that says what to change."""
    if args.tokenizer == "runs/tokenizer" and not os.path.isdir(args.tokenizer):
        raise FileNotFoundError("no tokenizer in runs/tokenizer yet. First: python train_tokenizer.py")
    if args.batch_size % world_size() or args.batch_size > args.samples:
        raise ValueError(f"--batch_size {args.batch_size}: must be a multiple of {world_size()}, the number "
                         f"of ranks, and at most --samples {args.samples}")
    if args.cache is None:
        is_local = os.path.isdir(args.tokenizer)
        folder = args.tokenizer if is_local else os.path.join("runs", args.tokenizer.replace("/", "--"))
        args.cache = os.path.join(folder, "latents")
    if os.path.isdir(args.cache) and os.listdir(args.cache) and not is_latent_cache(args.cache):
        raise ValueError(f"--cache {args.cache} is a folder with other things in it; choose another")


def follow_run(args):
    """--sample: what was not given is as in the run that --checkpoint is, or as its file's size has it."""
    if args.out == "runs/dit":
        raise ValueError("--sample needs --out: a folder for PNGs, or a file.npz")
    if os.path.isfile(args.checkpoint):
        if args.latents_stats is None:
            raise ValueError("--checkpoint is a file: give what normalised its latents, --latents_stats")
        _, sizes = read_lightningdit(args.checkpoint)
        args.model = next((name for name, size in DIT_SIZES.items()
                           if (size["dim"], size["depth"]) == (sizes["dim"], sizes["depth"])), "another")
        return
    if not os.path.isfile(os.path.join(args.checkpoint, "checkpoint.pt")):
        raise FileNotFoundError(f"--checkpoint {args.checkpoint}: neither a file nor a run that holds "
                                "checkpoint.pt. First: python train_dit.py")
    recorded = evaluate.recorded_arguments(args.checkpoint)
    if not recorded:
        raise FileNotFoundError(f"--checkpoint {args.checkpoint} has no run.json: give checkpoint.pt itself")
    args.tokenizer = recorded["tokenizer"]
    for name in SAMPLING:
        setattr(args, name, recorded[name] if getattr(args, name) is None else getattr(args, name))


def sampling_options(args):
    """What dit.generate takes of the arguments."""
    return dict(bf16=args.precision == "bf16", **{name: getattr(args, name) for name in SAMPLING})


# ----- The latents, once: each image and its mirror image -------------------------------------------------
#   latents.bin       (rows, 2, d, h, w) bfloat16; row i is sample i of the source, [i, 1] mirrored
#   labels.npy        int64 (rows,), -1 where there is none or the sample is broken: never drawn
#   cache.json        shape, class names, and the fingerprint that tells what the latents were made of
#   latents_stats.pt  {'mean', 'std'} of shape (1, d, 1, 1), the form of the authors' files

def open_cache(args, tokenizer, source, device):
    """The cached latents of a source, encoded now if they are not there. ValueError: they are of others."""
    size = args.image_size or tokenizer.config.image_size
    fingerprint = dict(tokenizer=evaluate.file_digest(find_checkpoint(args.tokenizer)),
                       data=source.fingerprint(), settings=f"{size} px")
    if not gather_objects(is_latent_cache(args.cache))[0]:      # as rank 0 sees it: it is about to change
        side = size // tokenizer.config.vision_patch_size
        shape = (tokenizer.config.vision_feature_bottleneck, side, side)
        workers = data.default_workers(args.data) if args.workers is None else args.workers
        skipped = write_latent_cache(args.cache, source, functools.partial(encode, tokenizer, device), shape,
                                     fingerprint, args.max_skipped, workers)
        if rank() == 0:
            print(f"latents of {source.name} and of its mirror images are in {args.cache}; "
                  f"{sum(skipped.values())} samples skipped {skipped or ''}")
    return LatentCache(args.cache, fingerprint)


@torch.no_grad()
def encode(tokenizer, device, images):
    """uint8 images (b, 3, H, W) -> latents (b, d, h, w) in fp32, without autocast (the authors' code)."""
    return tokenizer.encode(normalize(images.to(device).float() / 255))


def is_latent_cache(folder):
    """Has write_latent_cache finished this folder?"""
    return os.path.isfile(os.path.join(folder, "cache.json"))


def write_latent_cache(folder, source, encode, latent_shape, fingerprint, max_skipped=0.1, n_workers=0,
                       batch_size=256):
    """Encode a source and its mirror images into folder, by all ranks -> {reason: samples skipped}.
    encode: uint8 (b, 3, C, C) on the host -> latents (b, *latent_shape). The folder appears when it is
    complete. RuntimeError: more than the share max_skipped cannot be used, or no sample has a class."""
    unfinished, sizes = folder.rstrip("/") + ".unfinished", shard_sizes(source)
    latents_path, labels_path = (os.path.join(unfinished, name) for name in ("latents.bin", "labels.npy"))
    n_rows = sum(sizes)
    shape = (n_rows, 2, *latent_shape)
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        np.memmap(latents_path, np.int16, "w+", shape=shape).flush()
        np.save(labels_path, np.full(n_rows, -1, np.int64))
    barrier()
    latents = np.memmap(latents_path, np.int16, "r+", shape=shape)
    labels, skipped = np.load(labels_path, mmap_mode="r+"), Counter()
    reader = CacheReader(source, np.cumsum([0, *sizes]), n_workers)
    loader = torch.utils.data.DataLoader(reader, batch_size, num_workers=n_workers, collate_fn=reader.collate)
    with tqdm(total=math.ceil(n_rows / world_size()), unit=" images", desc="encoding", disable=rank() != 0,
              dynamic_ncols=True) as bar:
        for rows, images, classes, reasons in loader:
            skipped.update(reasons)
            if len(rows):
                pair = torch.stack((encode(images), encode(images.flip(-1))), dim=1)        # (b, 2, d, h, w)
                latents[rows] = pair.cpu().bfloat16().view(torch.int16).numpy()     # NumPy has no bfloat16
                labels[rows] = classes
            bar.update(len(rows) + len(reasons))
    latents.flush()
    labels.flush()
    skipped = dict(sum(gather_objects(skipped), Counter()))
    usable = np.flatnonzero(np.load(labels_path) >= 0)
    if sum(skipped.values()) > max_skipped * n_rows:
        raise RuntimeError(f"{sum(skipped.values())} of {n_rows} samples of {source.name} cannot be used, "
                           f"more than the share of {max_skipped} that --max_skipped allows: {skipped}")
    if not len(usable):
        raise RuntimeError(f"no sample of {source.name} has a class, which this model needs: class folders, "
                           ".cls files, or --label")
    if rank() == 0:
        n = min(len(usable), 10_000)                                                        # as the authors
        some = usable[np.linspace(0, len(usable) - 1, n).astype(np.int64)]
        x = torch.from_numpy(latents[some, 0]).view(torch.bfloat16).double()
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        write_stats(os.path.join(unfinished, "latents_stats.pt"), mean, std)
        about = dict(shape=shape, class_names=source.class_names, fingerprint=fingerprint, skipped=skipped)
        with open(os.path.join(unfinished, "cache.json"), "w", encoding="utf-8") as f:
            json.dump(about, f, indent=2)
        os.rename(unfinished, folder)
    barrier()
    return skipped


def shard_sizes(source):
    """Samples in each tar of a source, counted by all ranks together; [n] where there is random access."""
    if not isinstance(source, data.TarSource):
        return [len(source)]
    sizes = {}
    for k in range(rank(), len(source.paths), world_size()):
        samples = data.read_tar(source.paths[k], only_names=True)
        sizes[k] = sum("broken tar" not in sample for sample in samples)
    sizes = {k: n for part in gather_objects(sizes) for k, n in part.items()}
    return [sizes[k] for k in range(len(source.paths))]


class CacheReader(torch.utils.data.IterableDataset):
    """This rank's samples of a source, each once: (row, canvas, label), or (-1, reason, -1) if unusable.
    A row is the place in the whole source; starts: the row of each shard's first sample."""
    def __init__(self, source, starts, n_workers):
        self.source, self.starts, self.roles = source, starts, max(n_workers, 1)
        self.rank, self.world = rank(), world_size()

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        reader = (info.id if info else 0) * self.world + self.rank
        for shard, number, load in data.each_sample(self.source, reader, self.roles * self.world):
            try:
                image, _, label = load()
                yield int(self.starts[shard]) + number, torch.tensor(image), label
            except data.BadSample as reason:
                yield -1, str(reason), -1

    @staticmethod
    def collate(samples):
        """-> rows (b,), images uint8 (b, 3, C, C) or (), labels (b,), reasons of the samples left out."""
        good, reasons = [s for s in samples if s[0] >= 0], [s[1] for s in samples if s[0] < 0]
        rows, images, labels = zip(*good) if good else ((), (), ())
        return np.array(rows, int), torch.stack(images) if good else (), np.array(labels, int), reasons


def write_stats(path, mean, std):
    """Latent statistics, each (1, d, 1, 1), as LightningDiT's file, atomically."""
    write_atomically(path, lambda f: torch.save({"mean": mean.float().cpu(), "std": std.float().cpu()}, f))


class LatentCache:
    """A folder that write_latent_cache made. fingerprint: what it must be; ValueError names what is not."""
    def __init__(self, folder, fingerprint=None):
        with open(os.path.join(folder, "cache.json"), encoding="utf-8") as f:
            about = json.load(f)
        differs = [k for k, v in (fingerprint or {}).items() if about["fingerprint"].get(k) != v]
        if differs:
            raise ValueError(f"the latents in {folder} were made with another {' and '.join(differs)}: "
                             "choose another --cache, or delete that folder")
        shape = tuple(about["shape"])
        self.latents = np.memmap(os.path.join(folder, "latents.bin"), np.int16, "r", shape=shape)
        self.labels = np.load(os.path.join(folder, "labels.npy"))
        self.rows = np.flatnonzero(self.labels >= 0)
        self.latent_shape, self.class_names, self.skipped = shape[2:], about["class_names"], about["skipped"]
        self.num_classes = max(int(self.labels.max()) + 1, len(self.class_names or ()))
        self.mean, self.std = evaluate.read_latent_stats(os.path.join(folder, "latents_stats.pt"))
        self.ahead, self.next = ThreadPoolExecutor(1), {}

    def __len__(self):
        return len(self.rows)

    def read(self, step, batch_size, seed):
        """This rank's share of global batch `step` of an endless shuffle: (b, 2, d, h, w), labels (b,)."""
        places = np.arange(step * batch_size + rank(), (step + 1) * batch_size, world_size())
        rows = self.rows[data.rows_at(places, len(self.rows), seed)]
        latents = torch.from_numpy(self.latents[rows]).view(torch.bfloat16)
        return latents, torch.from_numpy(self.labels[rows])

    def batch(self, step, batch_size, seed):
        """The same, with the next step's batch read in the meantime."""
        wanted, following = (step, batch_size, seed), (step + 1, batch_size, seed)
        pending = self.next.get(wanted) or self.ahead.submit(self.read, *wanted)
        self.next = {following: self.ahead.submit(self.read, *following)}
        return pending.result()


# ----- State and step -------------------------------------------------------------------------------------

def make_batch(args, step, latents, labels, mean, std, num_classes):
    """What a step reads: this rank's data, noise, times and labels, drawn for the global batch from (seed,
    step).

    latents (b, 2, d, h, w), an image's and its mirror image's, of which one is taken; labels (b,)."""
    generator, B = data.step_generator(args.seed, step, latents.device), args.batch_size
    drawn = dict(generator=generator, device=latents.device)
    normals, (is_mirrored, is_dropped) = torch.randn(B, **drawn), torch.rand(2, B, **drawn)
    noise = torch.randn(B, *latents.shape[2:], **drawn)
    normals, is_mirrored, is_dropped = (data.own_share(x) for x in (normals, is_mirrored, is_dropped))
    latents = torch.where((is_mirrored < 0.5).view(-1, 1, 1, 1), latents[:, 0], latents[:, 1])
    return dict(latents=(latents.float() - mean) / std, noise=noise[rank()::world_size()],
                t=draw_timesteps(normals, args.mu, args.sigma),
                labels=torch.where(is_dropped < args.label_dropout, num_classes, labels))


class FlowMatching(nn.Module):
    """The forward that DDP wraps: batch -> loss."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.bf16 = model, args.precision == "bf16"

    def forward(self, batch):
        x_t, target = flow_path(batch["latents"], batch["noise"], batch["t"])
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            velocity = self.model(x_t, batch["t"], batch["labels"])
        return flow_loss(velocity, target)


@dataclass
class State:
    """What training changes."""
    model: DiT
    ema: DiT
    objective: nn.Module             # FlowMatching, in DDP where there are ranks
    optimizer: torch.optim.Optimizer
    totals: dict                     # sums over this rank's finite steps since the last log line
    args: argparse.Namespace

    def modules(self):
        """{name in a checkpoint: module}."""
        return dict(model=self.model, ema=self.ema)


def build_state(args, cache, device):
    """Model, its average and optimizer; the same weights on every rank."""
    torch.manual_seed(args.seed)
    d, h, _ = cache.latent_shape
    sizes = dict(**DIT_SIZES[args.model], input_size=h, in_channels=d, num_classes=cache.num_classes,
                 use_qk_norm=args.qk_norm)
    model, ema = DiT(**sizes).to(device), DiT(**sizes).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    if device.type == "cuda" if args.compile is None else args.compile:
        compile_blocks(model, ema)
    group = dict(params=[p for p in model.parameters() if p.requires_grad], lr=torch.zeros((), device=device))
    optimizer = torch.optim.AdamW([group], betas=BETAS, weight_decay=0.0, fused=True,
                                  capturable=device.type == "cuda")
    return State(model, ema, wrap_in_ddp(FlowMatching(model, args), device), optimizer, {}, args)


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
    state.optimizer.found_inf = (~is_finite).float()     # where this is 1 the fused kernel skips the step
    state.optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - state.args.ema)
        add_to_totals(state.totals, dict(loss=loss, grad_norm=grad_norm), is_finite)


# ----- The run --------------------------------------------------------------------------------------------

def train(args, device):
    """Cache the latents, train, leave pictures and a checkpoint."""
    tokenizer = VTP.from_pretrained(first_on_node(lambda: find_checkpoint(args.tokenizer))).to(device)
    if not tokenizer.config.train_reconstruction:
        raise SystemExit(f"--tokenizer {args.tokenizer} has no decoder: its latents could not be shown")
    size = args.image_size or tokenizer.config.image_size
    source = data.open_source(args.data, size, "train", args.train_size, args.classnames, args.label,
                              needs_caption=False)
    cache = open_cache(args, tokenizer, source, device)
    stats = evaluate.read_latent_stats(args.latents_stats) if args.latents_stats else (cache.mean, cache.std)
    stats = tuple(x.to(device) for x in stats)
    mean, std = stats
    state = build_state(args, cache, device)
    n_steps, checkpoint = args.samples // args.batch_size, os.path.join(args.out, "checkpoint.pt")
    step, flops_per_step, _ = load_checkpoint(checkpoint, state, device) if args.resume else (0, 0, None)
    what = f"{len(cache)} latents of {cache.num_classes} classes"
    log = Log(args, state.model, what, step, n_steps, flops_per_step)
    if rank() == 0:
        write_stats(os.path.join(args.out, "latents_stats.pt"), mean, std)
    run_step = CapturedStep(lambda batch: train_step(state, batch), device.type == "cuda" and args.cuda_graph)
    eval_every = args.eval_every or math.ceil(n_steps / 4)
    checkpoint_every = args.checkpoint_every or eval_every

    while step < n_steps:
        with log.timing("data"):
            latents, labels = (x.to(device, non_blocking=True)
                               for x in cache.batch(step, args.batch_size, args.seed))
            batch = make_batch(args, step, latents, labels, mean, std, cache.num_classes)
        lr = set_lr(state, step, n_steps)
        if not log.flops_per_step:
            log.flops_per_step = count_flops(lambda: state.objective(batch).backward())
        run_step(batch)
        step += 1
        log.bar.update(args.batch_size)

        is_last = step == n_steps
        if step % args.log_every == 0 or is_last:
            log.write_train(step, state.totals, dict(lr=lr), {})
        with log.timing("pause"):
            if rank() == 0 and (step % eval_every == 0 or is_last):
                picture = evaluate.sample_picture(state.ema, tokenizer, stats, cache.class_names, args.seed,
                                                  **sampling_options(args))
                evaluate.save_image(picture, os.path.join(args.out, f"samples_{step:07d}.png"))
            if step % checkpoint_every == 0 or is_last:
                save_checkpoint(checkpoint, state, step, log.flops_per_step)
    log.bar.close()
    if args.eval_samples and not any(row["kind"] == "eval" for row in evaluate.read_metrics(args.out)):
        log.write("eval", step, judge_samples(state, tokenizer, stats, source, cache, device))
    if rank() == 0:
        print(f"done: samples_{n_steps:07d}.png, checkpoint.pt ('ema' loads in LightningDiT) in {args.out}")


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
    """--sample: images number 0 to N - 1 as PNGs, by all ranks; those that are there stay. Then the .npz."""
    is_npz, run = args.out.endswith(".npz"), args.checkpoint
    folder = args.out + ".partial" if is_npz else args.out
    model = DiT.from_lightningdit(run if os.path.isfile(run) else os.path.join(run, "checkpoint.pt"))
    model = model.to(device)
    tokenizer = VTP.from_pretrained(find_checkpoint(args.tokenizer)).to(device)
    stats = evaluate.read_latent_stats(args.latents_stats or os.path.join(run, "latents_stats.pt"))
    stats = tuple(x.to(device) for x in stats)
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f"{i:06d}.png") for i in range(args.sample)]
    missing = [i for i, path in enumerate(paths) if not os.path.exists(path)]
    missing = gather_objects(missing)[0]                        # as rank 0 saw it: others may write already
    own, writers = missing[rank()::world_size()], ThreadPoolExecutor(4)
    bar = tqdm(total=len(own), unit=" images", desc="sampling", disable=rank() != 0, dynamic_ncols=True)
    for indices in (own[k:k + args.sample_batch] for k in range(0, len(own), args.sample_batch)):
        noise, labels = noise_and_labels(indices, args.seed, model.latent_shape, model.num_classes)
        images = evaluate.to_uint8(generate(model, tokenizer, stats, noise, labels, **sampling_options(args)))
        images = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
        list(writers.map(evaluate.save_image, images, [paths[i] for i in indices]))
        bar.update(len(indices))
    bar.close()
    barrier()
    if rank() == 0:
        if is_npz:
            images = np.stack([np.asarray(Image.open(path)) for path in paths])
            _, labels = noise_and_labels(range(args.sample), args.seed, model.latent_shape, model.num_classes)
            write_atomically(args.out, lambda f: np.savez(f, arr_0=images, arr_1=labels.numpy()))
            shutil.rmtree(folder)
        print(f"{args.sample} images in {args.out}")


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
