"""
Train a class-conditional DiT on the frozen latents of a tokenizer (VTP, arXiv 2512.13687, section 6 of the paper's set-up:
LightningDiT), and generate images with it.

On any machine, a few minutes, on the tokenizer and the data of `python train_tokenizer.py`:
    python train_dit.py

The paper's run: the released VTP-L, ImageNet, 8 GPUs (latents are cached first: 1.28M images, twice, 84 GB in bf16):
    torchrun --nproc_per_node=8 train_dit.py --tokenizer MiniMaxAI/VTP-Large-f16d64 --data imagenet/train --model XL/1 \\
        --mu -0.75 --sigma 1.0 --out runs/dit-xl

50,000 samples for FID, from its EMA weights (a folder of PNGs, or a .npz with arr_0; an interrupted call goes on where it was):
    torchrun --nproc_per_node=8 train_dit.py --sample 50000 --checkpoint runs/dit-xl --out samples.npz --steps 250 --shift 0.075

Go on after a stop, bit for bit: the same command with --resume (or just --out FOLDER --resume).
The folder gets run.json, metrics.jsonl, checkpoint.pt (loads in LightningDiT: {'ema': ...}), latents_stats.pt and samples_*.png.
"""
import argparse
import functools
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import data
import evaluate
from dit import METHODS, PRESETS, DiT, draw_timesteps, flow_loss, flow_path, preset
from losses import barrier, first_on_node, gather_objects, init_distributed, mean_over_ranks, rank, world_size
from train_tokenizer import (CapturedStep, Log, add_argument, blocks_flops, keep_freed_memory, load_checkpoint, matmul_rate, means_since_log,
                             parse_new_or_resumed, record_run, save_checkpoint, wrap_in_ddp)
from vtp import VTP, find_checkpoint, normalize, read_config

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------

# tiny: tuned for 2 CPU cores and a few minutes; others: the paper's, which are LightningDiT's.
RECIPES = {
    "tiny": dict(samples=110_000, batch_size=64, lr=1.5e-3, lr_end=0.0, clip_grad=1.0, ema=0.995, mu=-0.4, sigma=1.0, train_size=8192, steps=20,
                 method="adams", shift=1.0, guidance=4.0, interval=[0.0, 1.0]),
    "other": dict(samples=102_400_000, batch_size=1024, lr=2e-4, lr_end=2e-4, clip_grad=0.0, ema=0.9999, mu=-0.5, sigma=1.25, train_size=65536, steps=250, method="euler",
                  shift=0.075, guidance=1.0, interval=[0.0, 1.0]),
}


def make_parser():
    """The command line; --help is the recipe's documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(add_argument, RECIPES)
    g = parser.add_argument_group("tokenizer and data")
    add(g, "--tokenizer", "runs/tokenizer", "a run of train_tokenizer.py, a released folder, or a hub id")
    add(g, "--data", None, "a folder of class folders, a folder of tars, or tars by glob or brace pattern, in quotes; default: the built-in set")
    add(g, "--label", "cls", "tars: where the class is, 'cls' (KEY.cls) or a field of KEY.json")
    add(g, "--classnames", None, "a file with a class name on each line, in the order of the labels")
    add(g, "--train_size", None, "how many scenes the built-in set has", type=int)
    add(g, "--image_size", None, "side in pixels; default: the tokenizer's own", type=int)
    add(g, "--cache", None, "folder of the cached latents, made if it is not there; default: latents/ in --tokenizer, or in runs/ for a hub id")
    add(g, "--cache_dtype", "bf16", "precision of the cached latents", choices=("bf16", "fp32"))
    add(g, "--latents_stats", None, "a latents_stats.pt to normalise with, such as the authors'; default: that of the cache")
    add(g, "--max_skipped", 0.1, "largest share of unusable samples")
    g = parser.add_argument_group("training")
    add(g, "--model", "tiny", f"size: {', '.join(PRESETS)}")
    add(g, "--samples", None, "latents seen in all (paper: 100k steps of 1,024 = 80 epochs of ImageNet)", type=int)
    add(g, "--batch_size", None, "latents a step over all ranks", type=int)
    add(g, "--lr", None, "learning rate (LightningDiT: 2e-4)", type=float)
    add(g, "--lr_end", None, "where it ends, along a cosine (LightningDiT: constant)", type=float)
    add(g, "--warmup", 0.0, "linear warm-up, as a part of the run (LightningDiT: none)")
    add(g, "--betas", [0.9, 0.95], "of AdamW, which has no weight decay (LightningDiT)", type=float, nargs=2)
    add(g, "--clip_grad", None, "largest gradient norm, 0: any (the paper's configs)", type=float)
    add(g, "--ema", None, "decay of the averaged weights, which are those that sample", type=float)
    add(g, "--mu", None, "t = sigmoid(mu + sigma normal): where in time training looks (paper: -0.5 for VTP-S and -B, -0.75 for -L)", type=float)
    add(g, "--sigma", None, "see --mu (paper: 1.25 for VTP-S and -B, 1.0 for -L)", type=float)
    add(g, "--label_dropout", 0.1, "share of labels replaced by the null class, for guidance")
    add(g, "--seed", 0, "of initialisation, data order and every draw of a step; with --sample, of the noise")
    g = parser.add_argument_group("sampling (also of the pictures while training)")
    add(g, "--sample", None, "how many images to generate from --checkpoint into --out, instead of training", type=int)
    add(g, "--checkpoint", "runs/dit", "a run of this script, or a LightningDiT checkpoint file (then with --tokenizer and --latents_stats)")
    add(g, "--steps", None, "points of the time grid: one step less (paper: 250)", type=int)
    add(g, "--method", None, f"{', '.join(METHODS)}: adams for few steps", choices=METHODS)
    add(g, "--shift", None, "time shift t -> s t / (1 + (s - 1) t) (paper: 0.075 with XL, none = 1 with B)", type=float)
    add(g, "--guidance", None, "classifier-free guidance; 1: none", type=float)
    add(g, "--interval", None, "times at which guidance applies; else the null branch is not computed", type=float, nargs=2)
    add(g, "--channels", None, "guide the first channels alone (the authors' code: 3); default: all", type=int)
    add(g, "--sample_batch", 256, "images generated together by a rank")
    g = parser.add_argument_group("run")
    add(g, "--out", "runs/dit", "folder for everything that the run leaves; with --sample: a folder of PNGs, or a .npz file")
    g.add_argument("--resume", action="store_true", help="go on from --out's checkpoint, with its recorded arguments")
    add(g, "--precision", "bf16", "bf16 autocast over fp32 weights, or fp32 (the tokenizer encodes in fp32 always)", choices=("bf16", "fp32"))
    add(g, "--workers", None, "loader processes a rank while latents are cached; default: none for the built-in set, else up to 8", type=int)
    add(g, "--log_every", 50, "steps between log lines")
    add(g, "--eval_every", None, "steps between sample pictures; default: a quarter of the run", type=int)
    add(g, "--checkpoint_every", None, "steps between checkpoints; default: as --eval_every", type=int)
    add(g, "--eval_samples", 500, "images generated at the end, for the judge's accuracy; 0: no judge")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile the blocks; default: on CUDA only [None]")
    g.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=True, help="capture the step on CUDA [True]")
    return parser


def parse_args(argv=None):
    """Arguments, completed and checked: whatever is wrong with them ends the program here, with what to change."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.sample is None:
        args = parse_new_or_resumed(parser, argv)
    if args.model not in PRESETS:
        parser.error(f"--model {args.model}: choose one of {', '.join(PRESETS)}")
    try:
        if args.sample is None:
            complete_args(args)
        check_args(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    return args


def complete_args(args):
    """Fill in what was not given: the recipe of the model's size, and the place of the cache."""
    for name, value in RECIPES["tiny" if args.model == "tiny" else "other"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.cache is None:
        args.cache = os.path.join(args.tokenizer if os.path.isdir(args.tokenizer) else os.path.join("runs", args.tokenizer.replace("/", "--")), "latents")


def check_args(args):
    """Raises ValueError or FileNotFoundError that says what to change."""
    for name in ("samples", "batch_size", "lr", "sigma", "train_size", "log_every", "image_size", "eval_every", "checkpoint_every", "shift", "channels",
                 "sample", "sample_batch"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive")
    for name in ("lr_end", "clip_grad", "eval_samples", "guidance"):
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must not be negative")
    if not (0 <= args.label_dropout < 1 and 0 <= args.warmup < 1 and 0 <= args.max_skipped < 1 and all(0 <= b < 1 for b in args.betas)) or (args.ema is not None and not 0 <= args.ema < 1):
        raise ValueError("--label_dropout, --warmup, --max_skipped, --betas and --ema must be at least 0 and below 1")
    if args.steps is not None and args.steps < 2:
        raise ValueError(f"--steps {args.steps}: a time grid has at least 2 points")
    if args.sample is not None:
        if args.out == "runs/dit":
            raise ValueError("--sample needs --out: a folder for PNGs, or a file.npz")
        if not os.path.isfile(args.checkpoint) and not os.path.isfile(os.path.join(args.checkpoint, "checkpoint.pt")):
            raise FileNotFoundError(f"--checkpoint {args.checkpoint}: neither a checkpoint file nor a run that holds checkpoint.pt. First: python train_dit.py")
        if os.path.isfile(args.checkpoint) and args.latents_stats is None:
            raise ValueError("--checkpoint is a file: say what its latents were normalised with, --latents_stats FILE")
    elif args.samples < args.batch_size or args.batch_size % world_size():
        raise ValueError(f"--batch_size {args.batch_size}: must be a multiple of the {world_size()} ranks and at most --samples {args.samples}")
    if args.sample is None and os.path.isdir(args.cache) and os.listdir(args.cache) and not data.is_latent_cache(args.cache):
        raise ValueError(f"--cache {args.cache}: a folder with other things in it; choose another, or delete it")
    if args.sample is None and args.tokenizer == "runs/tokenizer" and not os.path.isdir(args.tokenizer):
        raise FileNotFoundError("there is no tokenizer in runs/tokenizer yet. First: python train_tokenizer.py (or give --tokenizer WHERE)")
    if args.sample is None or os.path.isfile(args.checkpoint):
        read_config(first_on_node(lambda: find_checkpoint(args.tokenizer)))
    if args.data is not None and not os.path.isdir(args.data):
        data.find_tars(args.data)
    for name in ("classnames", "latents_stats"):
        if getattr(args, name) is not None and not os.path.isfile(getattr(args, name)):
            raise FileNotFoundError(f"--{name} {getattr(args, name)}: no such file")


# ----------------------------------------------------------------------------------------------------------------------
# Stage one, once: the latents
# ----------------------------------------------------------------------------------------------------------------------

def open_training_set(args, config):
    """The labelled source that --data means, as canvases of the image size."""
    size = args.image_size or config.image_size
    return data.open_source(args.data, size, "train", args.train_size, args.classnames, args.label, needs_caption=False)


def open_cache(args, tokenizer, source, device):
    """The cached latents of a source, which are encoded now if --cache is not there. ValueError if they are of something else."""
    size = args.image_size or tokenizer.config.image_size
    fingerprint = dict(tokenizer=evaluate.file_digest(find_checkpoint(args.tokenizer)), data=source.fingerprint(), settings=f"{size} px, {args.cache_dtype}")
    is_there = gather_objects(data.is_latent_cache(args.cache))[0]      # rank 0 decides: its answer may be about to change
    if not is_there:
        workers = args.workers
        if workers is None:
            workers = 0 if args.data is None else max(1, min(8, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
        side = size // tokenizer.config.vision_patch_size
        shape = (tokenizer.config.vision_feature_bottleneck, side, side)
        total = None if source.is_stream else -(-len(source) // world_size())
        bar = tqdm(total=total, unit=" images", desc="encoding", disable=rank() != 0, dynamic_ncols=True)
        start = time.perf_counter()
        skipped = data.write_latent_cache(args.cache, source, functools.partial(encode, tokenizer, device), shape, fingerprint, args.cache_dtype,
                                          n_workers=workers, max_skipped=args.max_skipped, progress=bar.update)
        bar.close()
        if rank() == 0:
            print(f"latents of {source.name} and their mirror images in {args.cache}: {time.perf_counter() - start:.0f} s, {sum(skipped.values())} "
                  f"samples skipped {skipped or ''}")
    return data.LatentCache(args.cache, fingerprint)


@torch.no_grad()
def encode(tokenizer, device, images):
    """uint8 images (b, 3, H, W) -> latents (b, d, h, w) in fp32, without autocast (the authors')."""
    return tokenizer.encode(normalize(images.to(device).float() / 255))


# ----------------------------------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------------------------------

def make_batch(args, step, latents, labels, mean, std, num_classes):
    """What a step's computation reads: this rank's data, noise, times and labels, drawn for the global batch from (seed, step).

    latents (b, 2, d, h, w), an image's and its mirror image's, of which one is taken; labels (b,).
    """
    generator, B, device = data.step_generator(args.seed, step, latents.device), args.batch_size, latents.device
    normals = torch.randn(B, generator=generator, device=device)
    is_mirrored, is_dropped = torch.rand(2, B, generator=generator, device=device)
    noise = torch.randn(B, *latents.shape[2:], generator=generator, device=device)
    mine = slice(rank(), None, world_size())
    one = torch.where((is_mirrored[mine] < 0.5).view(-1, 1, 1, 1), latents[:, 0], latents[:, 1])
    return dict(data=(one.float() - mean) / std, noise=noise[mine], t=draw_timesteps(normals[mine], args.mu, args.sigma),
                labels=torch.where(is_dropped[mine] < args.label_dropout, num_classes, labels))


class FlowMatching(nn.Module):
    """The forward that DDP wraps: batch -> loss."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, batch):
        x_t, target = flow_path(batch["data"], batch["noise"], batch["t"])
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            velocity = self.model(x_t, batch["t"], batch["labels"])
        return flow_loss(velocity, target)


@dataclass
class State:
    """What training changes."""
    model: DiT
    ema: DiT
    objective: nn.Module             # FlowMatching, in DDP where there are ranks
    optimizer: torch.optim.Optimizer
    totals: dict                     # sums since the last log line, over the steps that were finite
    args: argparse.Namespace

    def modules(self):
        """{name in a checkpoint: module}."""
        return dict(model=self.model, ema=self.ema)


def train_step(state, batch):
    """One update. Nothing here reads a value on the host or has a shape that depends on data, so it can be captured."""
    args = state.args
    state.optimizer.zero_grad(set_to_none=True)
    loss = state.objective(batch)
    loss.backward()
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
    loss = mean_over_ranks(loss.detach())
    is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    state.optimizer.found_inf = (~is_finite).float()     # the fused kernel skips where this is 1
    state.optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - args.ema)
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            state.totals[name] += torch.where(is_finite, value, 0.0)
        state.totals["finite_steps"] += is_finite
        state.totals["steps"] += 1


def build_state(args, cache, device):
    """Model, its average and optimizer; the same weights on every rank."""
    torch.manual_seed(args.seed)
    d, h, _ = cache.latents.shape[2:]
    sizes = dict(**preset(args.model), input_size=h, in_channels=d, num_classes=cache.num_classes)
    model, ema = DiT(**sizes).to(device), DiT(**sizes).to(device).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    if device.type == "cuda" if args.compile is None else args.compile:
        for block in (*model.blocks, *ema.blocks):
            block.compile()
    objective = FlowMatching(model, args)
    if dist.is_initialized():
        objective = wrap_in_ddp(objective, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=parameters, lr=torch.zeros((), device=device))], betas=tuple(args.betas), weight_decay=0.0, fused=True,
                                  capturable=device.type == "cuda")
    totals = {k: torch.zeros((), device=device) for k in ("loss", "grad_norm", "finite_steps", "steps")}
    return State(model, ema, objective, optimizer, totals, args)


def set_lr(state, step, n_steps):
    """Write this step's learning rate (from step 0) into the tensor that the optimizer reads; returns it."""
    args, progress = state.args, step / n_steps
    if progress < args.warmup:
        lr = args.lr * (step + 1) / math.ceil(args.warmup * n_steps)
    else:
        lr = args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * (progress - args.warmup) / (1 - args.warmup)))
    state.optimizer.param_groups[0]["lr"].fill_(lr)
    return lr


def training_flops(model, batch_size):
    """FLOPs of a training step over all ranks: three times the forward's matrix products."""
    dim, n = model.dim, (model.input_size // model.patch_size) ** 2
    inner = model.blocks[0].mlp.w3.in_features
    blocks = blocks_flops(len(model.blocks), dim, 3 * dim * inner, batch_size, n)
    per_sample = len(model.blocks) * 6 * dim * dim + 2 * dim * dim + 256 * dim + dim * dim       # modulations, time embedding
    ends = 2 * n * dim * model.in_channels * model.patch_size ** 2
    return 3 * (blocks + 2 * batch_size * (per_sample + ends))


# ----------------------------------------------------------------------------------------------------------------------
# Generating
# ----------------------------------------------------------------------------------------------------------------------

def generate_set(args, device):
    """--sample: generate images number 0 to N - 1 into a folder of PNGs or a .npz, by all ranks; those that are there stay."""
    run, args = args.checkpoint, sampling_args(args)
    checkpoint = run if os.path.isfile(run) else os.path.join(run, "checkpoint.pt")
    model = DiT.from_lightningdit(checkpoint).to(device).eval()
    tokenizer = VTP.from_pretrained(args.tokenizer).to(device)
    stats = tuple(x.to(device) for x in data.read_latent_stats(args.latents_stats or os.path.join(run, "latents_stats.pt")))
    store = SampleStore(args.out, args.sample, model.input_size * tokenizer.config.vision_patch_size)
    shape = (model.in_channels, model.input_size, model.input_size)
    todo = gather_objects(store.missing())[0][rank()::world_size()]      # rank 0 looked: others may have begun to write
    bar = tqdm(total=len(todo), unit=" images", desc="sampling", disable=rank() != 0, dynamic_ncols=True)
    for indices in (todo[k:k + args.sample_batch] for k in range(0, len(todo), args.sample_batch)):
        noise, labels = evaluate.noise_and_labels(indices, args.seed, shape, model.num_classes)
        images = evaluate.to_uint8(evaluate.generate(model, tokenizer, stats, noise, labels, args))
        store.write(indices, images.permute(0, 2, 3, 1).cpu().numpy(), labels.numpy())
        bar.update(len(indices))
    bar.close()
    barrier()
    store.finish()
    if rank() == 0:
        print(f"{args.sample} images in {args.out}")


def sampling_args(args):
    """--sample's arguments, completed from the run that --checkpoint is."""
    recorded = {}
    if os.path.isdir(args.checkpoint):
        with open(os.path.join(args.checkpoint, "run.json"), encoding="utf-8") as f:
            recorded = json.load(f)["arguments"]
        args.tokenizer = recorded["tokenizer"]
    for name in ("steps", "method", "shift", "guidance", "interval", "channels"):
        if getattr(args, name) is None:
            setattr(args, name, recorded.get(name, RECIPES["other"].get(name)))
    return args


class SampleStore:
    """Generated images by number: PNGs in a folder, or the rows of a .npz, kept in OUT.partial until it is whole."""

    def __init__(self, out, n, side):
        self.out, self.n, self.is_npz = out, n, out.endswith(".npz")
        if not self.is_npz:
            os.makedirs(out, exist_ok=True)
            self.writers = ThreadPoolExecutor(4)
            return
        self.partial = out + ".partial"
        paths = {k: os.path.join(self.partial, k + ".npy") for k in ("arr_0", "arr_1", "done")}
        if rank() == 0 and not os.path.isfile(paths["done"]):
            os.makedirs(self.partial, exist_ok=True)
            for name, shape, dtype in (("arr_0", (n, side, side, 3), np.uint8), ("arr_1", (n,), np.int64), ("done", (n,), bool)):
                np.lib.format.open_memmap(paths[name], "w+", dtype, shape).flush()
        barrier()
        self.arrays = {k: np.load(path, mmap_mode="r+") for k, path in paths.items()}
        if len(self.arrays["done"]) != n:
            raise ValueError(f"{self.partial} is of a set of {len(self.arrays['done'])} images: delete it, or choose another --out")

    def missing(self):
        if self.is_npz:
            return np.flatnonzero(~self.arrays["done"])
        there = set(os.listdir(self.out))
        return np.array([i for i in range(self.n) if f"{i:06d}.png" not in there], np.int64)

    def write(self, indices, images, labels):
        """images uint8 (b, H, W, 3), labels int64 (b,)."""
        if self.is_npz:
            self.arrays["arr_0"][indices], self.arrays["arr_1"][indices] = images, labels
            self.arrays["arr_0"].flush()
            self.arrays["done"][indices] = True
        else:
            names = [os.path.join(self.out, f"{i:06d}.png") for i in indices]
            list(self.writers.map(lambda image, path: evaluate.save_image(Image.fromarray(image), path), images, names))

    def finish(self):
        if self.is_npz and rank() == 0:
            temporary = self.out.removesuffix(".npz") + f".{os.getpid()}.npz"
            np.savez(temporary, arr_0=self.arrays["arr_0"], arr_1=self.arrays["arr_1"])
            os.replace(temporary, self.out)
            shutil.rmtree(self.partial)


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------

def judge_samples(state, tokenizer, stats, source, cache, args, device):
    """Class accuracy of samples and, beside it, of real images that the judge has not seen -> dict of shares."""
    judge = evaluate.open_judge(os.path.join(args.cache, "judge.pt"), source, cache.num_classes, device, args.seed)
    shape, mine = cache.latents.shape[2:], np.arange(rank(), args.eval_samples, world_size())
    right = [torch.zeros(0)]
    for indices in (mine[k:k + args.sample_batch] for k in range(0, len(mine), args.sample_batch)):
        noise, labels = evaluate.noise_and_labels(indices, args.seed + 1, shape, cache.num_classes)
        pixels = evaluate.generate(state.ema, tokenizer, stats, noise, labels, args)
        right.append((judge.classify(pixels).cpu() == labels).float())
    right = torch.cat(gather_objects(torch.cat(right)))
    return dict(sample_accuracy=right.mean().item(), real_accuracy=judge.accuracy, accuracy_chance=1 / cache.num_classes)


def train(args, device):
    """Cache the latents, train, leave pictures and a checkpoint."""
    out = args.out
    tokenizer = VTP.from_pretrained(first_on_node(lambda: find_checkpoint(args.tokenizer))).to(device)
    if not tokenizer.config.train_reconstruction:
        raise SystemExit(f"--tokenizer {args.tokenizer} has no decoder: its latents could not be shown")
    source = open_training_set(args, tokenizer.config)
    cache = open_cache(args, tokenizer, source, device)
    mean, std = data.read_latent_stats(args.latents_stats) if args.latents_stats else (cache.mean, cache.std)
    mean, std = mean.to(device), std.to(device)
    state = build_state(args, cache, device)
    n_steps, flops_per_step, peak = args.samples // args.batch_size, training_flops(state.model, args.batch_size), matmul_rate(device) * world_size()
    eval_every = args.eval_every or max(1, -(-n_steps // 4))
    checkpoint_every = args.checkpoint_every or eval_every
    step, checkpoint = 0, os.path.join(out, "checkpoint.pt")
    if args.resume:
        step, _ = load_checkpoint(checkpoint, state, device)
    elif rank() == 0:
        os.makedirs(out, exist_ok=True)
        record_run(out, args)
        torch.save({"mean": mean.cpu(), "std": std.cpu()}, os.path.join(out, "latents_stats.pt"))
    log = Log(out, step)
    if rank() == 0:
        print(f"{args.model}: {sum(p.numel() for p in state.model.parameters()) / 1e6:.1f}M parameters on {len(cache)} latents of {cache.num_classes} classes; "
              f"{n_steps} steps of {args.batch_size}, {flops_per_step / 1e9:.0f} GFLOPs each; {world_size()} x {device.type}, matmul {peak / 1e9:.0f} GFLOP/s", flush=True)

    run_step = CapturedStep(lambda batch: train_step(state, batch), device.type == "cuda" and args.cuda_graph)
    bar = tqdm(total=args.samples, initial=step * args.batch_size, unit=" samples", disable=rank() != 0, smoothing=0.05, dynamic_ncols=True)
    last_log, clock, data_seconds = step, time.perf_counter(), 0.0
    while step < n_steps:
        start = time.perf_counter()
        latents, labels = (x.to(device, non_blocking=True) for x in cache.batch(step, args.batch_size, args.seed))
        batch = make_batch(args, step, latents, labels, mean, std, cache.num_classes)
        data_seconds += time.perf_counter() - start
        lr = set_lr(state, step, n_steps)
        run_step(batch)
        step += 1
        bar.update(args.batch_size)

        row = dict(step=step, samples=step * args.batch_size, flops=step * flops_per_step)
        if step % args.log_every == 0 or step == n_steps:
            means, n_skipped = means_since_log(state, step)
            seconds, n = time.perf_counter() - clock, step - last_log
            row_of_train = {"kind": "train", **row, **means, "lr": lr, "samples_per_second": n * args.batch_size / seconds,
                            "matmul_share": n * flops_per_step / seconds / peak, "data_share": data_seconds / seconds, "skipped_steps": n_skipped}
            log.write(row_of_train, "step {step:>6}  loss {loss:.4f}  grad {grad_norm:.2f}  lr {lr:.1e}  {samples_per_second:.0f} samples/s  {matmul_share:.0%} of matmul"
                      "  data {data_share:.0%}".format(**row_of_train) + (f"  skipped {n_skipped} steps (not finite)" if n_skipped else ""))
            last_log, clock, data_seconds = step, time.perf_counter(), 0.0
        pause = time.perf_counter()
        if rank() == 0 and (step % eval_every == 0 or step == n_steps):
            evaluate.save_image(evaluate.sample_picture(state.ema, tokenizer, (mean, std), cache.class_names, args), os.path.join(out, f"samples_{step:07d}.png"))
        if step % checkpoint_every == 0 or step == n_steps:
            save_checkpoint(checkpoint, state, step)
        clock += time.perf_counter() - pause        # rates are of training alone
    bar.close()
    if args.eval_samples and not any(r["kind"] == "eval" for r in evaluate.read_metrics(out)):
        measured = judge_samples(state, tokenizer, (mean, std), source, cache, args, device)
        log.write({"kind": "eval", **row, **measured}, "class by the judge: samples {sample_accuracy:.1%}, real images {real_accuracy:.1%} (chance {accuracy_chance:.1%})".format(**measured))
    if rank() == 0:
        print(f"done: {out}/samples_{n_steps:07d}.png, {checkpoint} ('ema' loads in LightningDiT), {out}/metrics.jsonl")


def main(argv=None):
    """Train, or with --sample generate, as the arguments say."""
    device = init_distributed()
    args = parse_args(argv)
    if device.type == "cpu":
        keep_freed_memory()
    generate_set(args, device) if args.sample is not None else train(args, device)
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
