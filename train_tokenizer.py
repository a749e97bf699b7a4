"""
Pre-train a visual tokenizer on three objectives at once: image-text contrastive, DINOv2-style self-supervision, reconstruction
(VTP, arXiv 2512.13687, stage 1).

On any machine, a few minutes, on the built-in procedural data:
    python train_tokenizer.py

The paper's autoencoder baseline, which reconstructs and nothing else:
    python train_tokenizer.py --lambda_clip 0 --lambda_ssl 0 --out runs/ae

8 GPUs on one node, WebDataset tars:
    torchrun --nproc_per_node=8 train_tokenizer.py --model large --data 'datacomp/{00000..09999}.tar' --val_data val.tar \\
        --batch_size 4096 --checkpoint_blocks --samples 1100000000 --out runs/vtp-l

Two such nodes (run on each, with its own --node_rank):
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500 --nproc_per_node=8 train_tokenizer.py ...

Go on after a stop, bit for bit: the same command with --resume (or just --out FOLDER --resume).
The folder gets run.json (arguments, git state, versions), metrics.jsonl, checkpoint.pt, pictures, and tokenizer/ in the released format.
"""
import argparse
import copy
import ctypes
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
from losses import (LPIPS, barrier, clip_loss, dino_loss, first_on_node, gather_objects, ibot_loss, init_distributed, koleo_loss, mean_over_ranks,
                    rank, reconstruction_loss, sinkhorn_knopp, world_size)
from vtp import (PRESETS, VTP, SSLHead, denormalize, find_checkpoint, preset, read_config, read_safetensors, samples_kept,
                 write_atomically)

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------

# What depends on the model's size. tiny: tuned for 2 CPU cores and a few minutes. Others: the paper's batch ratios 8 : 2 : 1.
# lr None: 2e-4 sqrt(batch / 1024), DINOv2's rule at ViT-L/14, which at 16k gives 8e-4, inside OpenCLIP's 5e-4 to 1e-3.
RECIPES = {
    "tiny": dict(samples=30_720, batch_size=64, ssl_batch_size=8, rec_batch_size=64, n_local=4, lr=5e-4, decoder_lr=3.0,
                 layer_decay=1.0, patch_embed_lr=1.0, drop_path_ssl=0.0,
                 lambda_rec=3.0, teacher_temp=[0.02, 0.02], teacher_momentum=0.99, io_gain=3.0, block_gain=2.0, token_gain=10.0,
                 prototypes=1024, head_hidden=512, head_dim=128, lpips="none", train_size=16384),
    "other": dict(samples=100_000_000, batch_size=1024, ssl_batch_size=None, rec_batch_size=None, lr=None, decoder_lr=1.0,
                  layer_decay=0.9, patch_embed_lr=0.2, drop_path_ssl=0.3,
                  n_local=8, lambda_rec=0.1, teacher_temp=[0.04, 0.07], teacher_momentum=0.992, io_gain=1.0, block_gain=1.0, token_gain=1.0,
                  prototypes=65536, head_hidden=2048, head_dim=256, lpips="auto", train_size=65536),
}


def make_parser():
    """The command line; --help is the recipe's documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(add_argument, RECIPES)
    g = parser.add_argument_group("data")
    add(g, "--data", None, "a folder of class folders, a folder of tars, or tars by glob or brace pattern, in quotes; default: the built-in set")
    add(g, "--val_data", None, "held-out data of the same kinds, for the measures at intervals; the built-in set has its own split")
    add(g, "--label", "cls", "tars: where the class is, 'cls' (KEY.cls) or a field of KEY.json")
    add(g, "--classnames", None, "a file with a class name on each line, in the order of the labels")
    add(g, "--train_size", None, "how many scenes the built-in set has", type=int)
    add(g, "--canvas", None, "side of the square images that the loader makes, from which views are cropped; default: the image size", type=int)
    add(g, "--bpe", None, "path of CLIP's bpe_simple_vocab_16e6.txt.gz; default: fetched once")
    add(g, "--max_skipped", 0.1, "largest share of unusable samples before the run stops")
    g = parser.add_argument_group("model")
    add(g, "--model", "tiny", f"size: {', '.join(PRESETS)}")
    add(g, "--image_size", None, "side in pixels; default: the size's own (tiny 64, others 256)", type=int)
    add(g, "--latent_dim", None, "channels d of the latents; default 64 (the paper: 64, 256 in one ablation)", type=int)
    add(g, "--io_gain", None, "factor on the initial patch embedding, bottleneck and the decoder's first and last layer. The std of the last three is 0.02 "
        "at every width, a gain of 0.64 from width 1024 but of 0.32 from 256, each: details then stay unlearned for long", type=float)
    add(g, "--block_gain", None, "factor on the initial matrices of the encoder's blocks, whose std is 0.02 at every width too: at a small one their "
        "output is little beside the patch embedding", type=float)
    add(g, "--token_gain", None, "factor on the initial text tokens, which CLIP makes only twice as large as positions: with bytes for tokens a text "
        "then starts as where its letters are more than which they are", type=float)
    add(g, "--init", None, "start from a folder or hub id, released weights included; its config then gives the model")
    g = parser.add_argument_group("objectives: L = lambda_rec L_rec + lambda_ssl L_ssl + lambda_clip L_clip")
    add(g, "--lambda_rec", None, "weight of L1 + LPIPS (paper, v2: 0.1; more where there is no LPIPS)", type=float)
    add(g, "--lambda_ssl", 1.0, "weight of self-distillation; 0 builds no teacher")
    add(g, "--lambda_clip", 1.0, "weight of the image-text loss; 0 builds no text tower")
    add(g, "--lpips", None, "'auto' fetches VGG16 and the LPIPS layers, 'none' is L1 alone, or a folder that holds the two files")
    add(g, "--prototypes", None, "K, outputs of the SSL head (DINOv2: 65,536)", type=int)
    add(g, "--head_hidden", None, "width of the SSL head (DINOv2: 2048)", type=int)
    add(g, "--head_dim", None, "width before the prototypes (DINOv2: 256)", type=int)
    add(g, "--n_local", None, "local crops a sample (DINOv2: 8), 3/8 of the image's side", type=int)
    add(g, "--mask_ratio", [0.1, 0.5], "lowest and highest share of masked patches, in half of the global crops (DINOv2)", type=float, nargs=2)
    add(g, "--koleo", 0.1, "weight of KoLeo within L_ssl (DINOv2)")
    g = parser.add_argument_group("length and batch")
    add(g, "--samples", None, "image-text pairs seen in all", type=int)
    add(g, "--batch_size", None, "pairs a step over all ranks: CLIP's batch (paper: 16k)", type=int)
    add(g, "--ssl_batch_size", None, "how many of them SSL takes (paper: a quarter, the default for other sizes)", type=int)
    add(g, "--rec_batch_size", None, "how many of them are reconstructed (paper: an eighth); all, if nothing else is trained", type=int)
    add(g, "--seed", 0, "of initialisation, data order and every draw of a step")
    g = parser.add_argument_group("recipe: one AdamW for all (schedules are fractions of the run)")
    add(g, "--lr", None, "peak learning rate; for other sizes 2e-4 sqrt(batch_size / 1024) (DINOv2 ViT-L/14; at 16k inside OpenCLIP's range)", type=float)
    add(g, "--decoder_lr", None, "further factor of the pixel decoder, which in a run of minutes needs a higher rate than CLIP bears", type=float)
    add(g, "--min_lr", 1e-6, "where its cosine ends (DINOv2)")
    add(g, "--warmup", 0.1, "linear warm-up (DINOv2: 10 %)")
    add(g, "--weight_decay", 0.04, "at the start; cosine to --weight_decay_end; none on biases, norms, LayerScale, anything under 2 axes (DINOv2)")
    add(g, "--weight_decay_end", 0.4, "at the end (DINOv2; OpenCLIP: 0.2 throughout)")
    add(g, "--betas", [0.9, 0.98], "of AdamW (OpenCLIP; DINOv2: 0.9 0.999)", type=float, nargs=2)
    add(g, "--eps", 1e-8, "of AdamW (DINOv2; OpenCLIP: 1e-6)")
    add(g, "--clip_grad", 3.0, "largest gradient norm of each submodule (DINOv2)")
    add(g, "--layer_decay", None, "learning-rate factor from one block to the one before it (DINOv2 ViT-L/16)", type=float)
    add(g, "--patch_embed_lr", None, "further factor of the patch embedding (DINOv2)", type=float)
    add(g, "--drop_path", 0.0, "stochastic depth in image passes (CLIP and reconstruction; the authors' rate is unpublished)")
    add(g, "--drop_path_ssl", None, "stochastic depth in the student's SSL passes (DINOv2)", type=float)
    add(g, "--teacher_momentum", None, "of the EMA teacher, cosine to 1 (DINOv2)", type=float)
    add(g, "--teacher_temp", None, "of the teacher's softmax, linear from the first to the second (DINOv2). In a run of minutes its targets would "
        "become uniform: while views of an image agree little, they must be sharper", type=float, nargs=2)
    add(g, "--teacher_temp_warmup", 0.3, "over this part of the run (DINOv2: 30 of 100 epochs)")
    add(g, "--freeze_prototypes", 0.01, "the head's last layer does not learn before this part of the run (DINOv2: 1 epoch of 100)")
    g = parser.add_argument_group("run")
    add(g, "--out", "runs/tokenizer", "folder for everything that the run leaves")
    g.add_argument("--resume", action="store_true", help="go on from --out's checkpoint, with its recorded arguments")
    add(g, "--precision", "bf16", "bf16 autocast over fp32 weights, or fp32", choices=("bf16", "fp32"))
    add(g, "--workers", None, "loader processes a rank; default: none for the built-in set, else up to 8", type=int)
    add(g, "--log_every", 10, "steps between log lines")
    add(g, "--eval_every", None, "steps between measures on held-out data; default: a fifth of the run", type=int)
    add(g, "--checkpoint_every", None, "steps between checkpoints; default: as --eval_every", type=int)
    add(g, "--eval_samples", 1024, "held-out samples; the classifiers learn from four times as many training samples")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile the blocks; default: on CUDA only [None]")
    g.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=True, help="capture the step on CUDA [True]")
    g.add_argument("--checkpoint_blocks", action="store_true", help="recompute encoder blocks in the backward: less memory, more time")
    return parser


def parse_args(argv=None):
    """Arguments, completed and checked: whatever is wrong with them ends the program here, with what to change."""
    parser = make_parser()
    args = parse_new_or_resumed(parser, argv)
    if args.model not in PRESETS:
        parser.error(f"--model {args.model}: choose one of {', '.join(PRESETS)}")
    try:
        complete_args(args)
        check_args(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    return args


def complete_args(args):
    """Fill in what was not given: the recipe of the model's size, which with --init is that of its config."""
    is_tiny = preset_or_init(args).vision_embed_dim < PRESETS["small"]().vision_embed_dim
    everything = args.lambda_clip == args.lambda_ssl == 0 and args.rec_batch_size is None      # an autoencoder reconstructs all
    for name, value in RECIPES["tiny" if is_tiny else "other"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if everything:
        args.rec_batch_size = args.batch_size
    if args.ssl_batch_size is None:
        args.ssl_batch_size = args.batch_size // 4
    if args.rec_batch_size is None:
        args.rec_batch_size = args.batch_size // 8
    if args.lr is None:
        args.lr = 2e-4 * math.sqrt(args.batch_size / 1024)


def check_args(args):
    """Raises ValueError or FileNotFoundError that says what to change."""
    W = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("lambda_rec", "lambda_ssl", "lambda_clip", "koleo", "weight_decay", "weight_decay_end", "min_lr"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("samples", "batch_size", "log_every", "prototypes", "head_hidden", "head_dim", "lr", "decoder_lr", "eps", "clip_grad",
                 "io_gain", "block_gain", "token_gain", "train_size", "eval_samples", "n_local"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive")
    for name in ("warmup", "drop_path", "drop_path_ssl", "teacher_momentum", "teacher_temp_warmup", "freeze_prototypes", "max_skipped"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be between 0 and 1")
    for name in ("canvas", "image_size", "latent_dim", "eval_every", "checkpoint_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive")
    if not all(0 <= beta < 1 for beta in args.betas) or args.max_skipped == 1 or (args.workers or 0) < 0:
        raise ValueError("--betas and --max_skipped must be below 1, --workers not negative")
    if not 0 < args.mask_ratio[0] <= args.mask_ratio[1] <= 1 or min(args.teacher_temp) <= 0:
        raise ValueError("--mask_ratio needs 0 < lowest <= highest <= 1, and --teacher_temp two positive numbers")
    if args.lambda_rec == args.lambda_ssl == args.lambda_clip == 0:
        raise ValueError("nothing to train: all of --lambda_rec, --lambda_ssl and --lambda_clip are 0")
    if args.samples < args.batch_size:
        raise ValueError(f"--samples {args.samples} is less than one batch of {args.batch_size}")
    used = [("batch_size", W, "the number of ranks", True), ("rec_batch_size", W, "the number of ranks", args.lambda_rec > 0),
            ("ssl_batch_size", 2 * W, "twice the number of ranks (masks are drawn in pairs of samples)", args.lambda_ssl > 0)]
    for name, divisor, what, is_used in used:
        size = getattr(args, name)
        if is_used and (size <= 0 or size % divisor or size > args.batch_size):
            raise ValueError(f"--{name} {size}: must be a positive multiple of {divisor}, {what}, and at most --batch_size {args.batch_size}")
    config = model_config(args)
    if args.lambda_ssl > 0 and round(sum(args.mask_ratio) * (config.image_size // config.vision_patch_size) ** 2) == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: not one of {(config.image_size // config.vision_patch_size) ** 2} patches would be masked")
    if args.lambda_clip > 0:
        if config.text_vocab_size == data.CLIP_VOCAB and args.bpe and not os.path.isfile(args.bpe):
            raise FileNotFoundError(f"--bpe {args.bpe}: no such file")
    if args.lpips not in ("auto", "none") and not os.path.isdir(args.lpips):
        raise FileNotFoundError(f"--lpips {args.lpips}: neither 'auto' nor 'none' nor a folder")
    for path in (args.data, args.val_data):
        if path is not None and not os.path.isdir(path):
            data.find_tars(path)
    if args.classnames and not os.path.isfile(args.classnames):
        raise FileNotFoundError(f"--classnames {args.classnames}: no such file")


def preset_or_init(args):
    """The config of --model's size, or of --init's model, which is fetched if it is a hub id."""
    return read_config(first_on_node(lambda: find_checkpoint(args.init))) if args.init else preset(args.model)


def model_config(args):
    """The VTPConfig that the arguments mean: a preset, or --init's own; parts that no objective trains are left out."""
    config = preset_or_init(args)
    if args.latent_dim is not None:
        if args.init and args.latent_dim != config.vision_feature_bottleneck:
            raise ValueError(f"--latent_dim {args.latent_dim}: the model of --init has {config.vision_feature_bottleneck}; leave it out")
        config = replace(config, vision_feature_bottleneck=args.latent_dim)
    return replace(config, train_clip=args.lambda_clip > 0, train_reconstruction=args.lambda_rec > 0,
                   image_size=args.image_size or config.image_size)


def local_crop_size(config):
    """Side of a local crop: 3/8 of the image's (96 of 256), in whole patches."""
    patch = config.vision_patch_size
    return max(1, math.floor(config.image_size * 3 / 8 / patch + 0.5)) * patch


# ----------------------------------------------------------------------------------------------------------------------
# The step: views -> teacher's targets -> student's losses -> update
# ----------------------------------------------------------------------------------------------------------------------

def make_views(args, config, step, images, tokens):
    """Everything that a step's computation reads, as a dict of tensors of static shape.

    images (b, 3, C, C) uint8 and tokens (b, L) are this rank's samples on its device. CLIP takes all, SSL and
    reconstruction the first ones: the loader shuffles, so a prefix is a random subset.
    """
    generator = data.step_generator(args.seed, step, images.device)
    b_ssl, b_rec = args.ssl_batch_size // world_size(), args.rec_batch_size // world_size()
    grid, depth, views = config.image_size // config.vision_patch_size, config.vision_depth, {}
    if args.lambda_clip > 0 or args.lambda_rec > 0:
        view = data.clip_view(images, generator, args.batch_size, config.image_size)
        views["images"] = view if args.lambda_clip > 0 else view[:b_rec]
        views["keep"] = draw_keep(generator, depth, 1, args.batch_size, len(views["images"]), args.drop_path)
    if args.lambda_clip > 0:
        views["tokens"] = tokens
    if args.lambda_ssl > 0:
        crops = data.ssl_views(images[:b_ssl], generator, args.ssl_batch_size, config.image_size, local_crop_size(config), args.n_local)
        views["global_crops"], views["local_crops"] = crops
        views["masks"] = data.draw_masks(generator, args.ssl_batch_size, (grid, grid), args.mask_ratio)          # (2b, N)
        n_masked = b_ssl * round(sum(args.mask_ratio) * grid * grid) // 2
        views["masked"] = views["masks"].flatten().int().argsort(descending=True, stable=True)[:n_masked]        # row-major places
        for name, n_crops in (("keep_global", 2), ("keep_local", args.n_local)):
            views[name] = draw_keep(generator, depth, n_crops, args.ssl_batch_size, n_crops * b_ssl, args.drop_path_ssl)
    return {k: v for k, v in views.items() if v is not None}


def draw_keep(generator, depth, n_crops, batch_size, n_local, drop_path):
    """Stochastic depth: which of this rank's n_local images each branch processes, (depth, 2, kept) indices, or None."""
    if drop_path == 0:
        return None
    keys = torch.rand(2 * depth, n_crops, batch_size, generator=generator, device=generator.device)[..., rank()::world_size()]
    keys = keys.flatten(1)[:, :n_local]
    return keys.argsort(dim=1)[:, :samples_kept(n_local, drop_path)].view(depth, 2, -1)


def ssl_logits(config, trunk, head, cls, patches, masked):
    """The head on CLS tokens (M, dim) and on the masked ones of patches (crops, N, dim), together -> logits of each."""
    rows = torch.cat((cls, patches.flatten(0, 1)[masked]))
    rows = rows if config.vision_bottleneck_ae_only else trunk.bottleneck(rows)
    return head(rows).split((len(cls), len(masked)))


class Objectives(nn.Module):
    """The student's forward, which DDP wraps: views and teacher's targets -> {name: loss}, one forward for one backward."""

    def __init__(self, model, head, lpips, args):
        super().__init__()
        self.model, self.head, self.lpips, self.args = model, head, lpips, args

    def forward(self, views, targets):
        model, args = self.model, self.args
        losses, device_type = {}, model.trunk.cls_token.device.type
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=args.precision == "bf16")
        if "images" in views:       # one encoder pass serves CLIP and reconstruction
            images, n_rec = views["images"], args.rec_batch_size // world_size()
            with autocast:
                cls, patches = model.features(images, keep=views.get("keep"))
                if args.lambda_clip > 0:
                    image_features, text_features = model.project_image(cls, patches), model.encode_text(views["tokens"], normalize=False)
                if args.lambda_rec > 0:
                    reconstruction = model.decode(model.to_latents(patches[:n_rec], *images.shape[-2:]))
            if args.lambda_clip > 0:
                normed = (F.normalize(f.float(), dim=-1) for f in (image_features, text_features))
                losses["loss_clip"] = clip_loss(*normed, model.logit_scale.exp())
            if args.lambda_rec > 0:     # L1 and LPIPS on [-1, 1]
                pair = (2 * denormalize(x.float()) - 1 for x in (reconstruction, images[:n_rec]))
                with autocast:
                    losses["loss_rec"] = reconstruction_loss(*pair, self.lpips)
        if args.lambda_ssl > 0:
            losses.update(self.ssl(views, targets, autocast))
        return losses

    def ssl(self, views, targets, autocast):
        """Student on masked global and on local crops, against the teacher's targets (2b, K) of CLS and (M, K) of masked patches."""
        model, (cls_targets, patch_targets), n_local = self.model, targets, self.args.n_local
        with autocast:
            cls, patches = model.features(views["global_crops"], views["masks"], views.get("keep_global"))       # (2b, dim), (2b, N, dim)
            local_cls, _ = model.features(views["local_crops"], keep=views.get("keep_local"))                    # (n_local b, dim)
            cls_logits, patch_logits = ssl_logits(model.config, model.trunk, self.head, torch.cat((cls, local_cls)), patches, views["masked"])
        b = len(cls) // 2
        global_logits, local_logits = cls_logits.float().split((2 * b, n_local * b))
        # every student view against every teacher view of another crop: 2 global-global and 2 n_local local-global pairs
        crossed = cls_targets.view(2, b, -1).flip(0)
        global_loss = dino_loss(global_logits.view(2, b, -1), crossed)
        local_loss = dino_loss(local_logits.view(n_local, b, -1), crossed.mean(dim=0))
        return dict(loss_dino=(2 * global_loss + 2 * n_local * local_loss) / (2 + 2 * n_local),
                    loss_mim=ibot_loss(patch_logits, patch_targets, views["masks"]),
                    loss_koleo=koleo_loss(cls[:b]) + koleo_loss(cls[b:]))


@dataclass
class State:
    """What training changes. Schedules are 0-d tensors on the device, since a captured step cannot read Python floats."""
    model: VTP
    head: SSLHead | None
    teacher: nn.ModuleDict | None
    objectives: nn.Module            # the student's forward, in DDP where there are ranks
    optimizer: torch.optim.Optimizer
    scheduled: dict                  # weight_decay, teacher_momentum, teacher_temp; learning rates are in the optimizer's groups
    submodules: dict                 # {name: parameters whose gradients are clipped together}
    totals: dict                     # sums since the last log line, over the steps that were finite
    config: object
    args: argparse.Namespace

    def modules(self):
        """{name in a checkpoint: module}."""
        return {k: m for k, m in dict(model=self.model, head=self.head, teacher=self.teacher).items() if m is not None}


@torch.no_grad()
def teacher_targets(state, views):
    """The EMA teacher on unmasked global crops -> probabilities of CLS (2b, K) and of the masked places (M, K)."""
    teacher, args = state.teacher, state.args
    with torch.autocast(views["masks"].device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        cls, patches = teacher["trunk"](views["global_crops"])[-1]
        cls_logits, patch_logits = ssl_logits(state.config, teacher["trunk"], teacher["head"], cls, patches, views["masked"])
    temperature = state.scheduled["teacher_temp"]
    return sinkhorn_knopp(cls_logits, temperature), sinkhorn_knopp(patch_logits, temperature)


def train_step(state, views):
    """One update from views. Nothing here reads a value on the host or has a shape that depends on data, so it can be captured."""
    args, totals = state.args, state.totals
    state.optimizer.zero_grad(set_to_none=True)
    targets = teacher_targets(state, views) if args.lambda_ssl > 0 else None
    losses = state.objectives(views, targets)
    terms = []
    if args.lambda_rec > 0:
        terms.append(args.lambda_rec * losses["loss_rec"])
    if args.lambda_ssl > 0:
        terms.append(args.lambda_ssl * (losses["loss_dino"] + losses["loss_mim"] + args.koleo * losses["loss_koleo"]))
    if args.lambda_clip > 0:
        terms.append(args.lambda_clip * losses["loss_clip"])
    loss = sum(terms)
    loss.backward()
    norms = [nn.utils.clip_grad_norm_(parameters, args.clip_grad) for parameters in state.submodules.values()]
    grad_norm = torch.linalg.vector_norm(torch.stack(norms))
    is_finite = torch.isfinite(loss.detach()) & torch.isfinite(grad_norm)
    update(state, is_finite)

    with torch.no_grad():
        values = {"loss": loss, **losses, "grad_norm": grad_norm}
        if args.lambda_clip > 0:
            values["logit_scale"] = state.model.logit_scale.exp()
        if args.lambda_ssl > 0:
            values["teacher_entropy"] = mean_over_ranks(torch.special.entr(targets[0]).sum(dim=-1).mean())
        for name, value in values.items():
            totals[name] += torch.where(is_finite, value, 0.0)
        totals["finite_steps"] += is_finite
        totals["steps"] += 1


@torch.no_grad()
def update(state, is_finite):
    """AdamW with decoupled weight decay, then the teacher; a step whose loss or gradient is not finite changes nothing."""
    decay = state.scheduled["weight_decay"] * is_finite
    for group in state.optimizer.param_groups:
        if group["decays"]:          # AdamW's own takes only a Python float
            torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)
    state.optimizer.found_inf = (~is_finite).float()     # the fused kernel skips where this is 1, as for torch.amp's GradScaler
    state.optimizer.step()
    if state.args.lambda_clip > 0:
        state.model.logit_scale.clamp_(0, math.log(100))     # OpenCLIP
    if state.teacher is not None:
        momentum = torch.where(is_finite, state.scheduled["teacher_momentum"], 1.0)
        teacher, student = list(state.teacher.parameters()), student_of_teacher(state)
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, torch._foreach_mul(student, 1 - momentum))


def student_of_teacher(state):
    """The student's parameters in the order of the teacher's."""
    modules = {"trunk": state.model.trunk, "head": state.head}
    if state.config.train_clip:
        modules["visual_proj"] = state.model.visual_proj
    return [p for name in state.teacher for p in modules[name].parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# Building the state
# ----------------------------------------------------------------------------------------------------------------------

def build_state(args, device):
    """Model, head, teacher, optimizer, from scratch or from --init; the same weights on every rank."""
    torch.manual_seed(args.seed)
    config = model_config(args)
    model, lacking, left_out = VTP(config), [], []
    if args.init:
        lacking, left_out = model.load_state_dict(read_safetensors(os.path.join(find_checkpoint(args.init), "model.safetensors")), strict=False)
        for names, what in ((lacking, "new, since --init lacks them"), (left_out, "left out, since no objective trains them")):
            if names and rank() == 0:
                parts = sorted({n.split(".")[0] for n in names})
                print(f"{len(names)} tensors are {what}: {', '.join(parts)}")
    else:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("patch_embed.proj.weight", "feature_bottleneck.weight", "proj_in.weight", "proj_out.weight")):
                    p.mul_(args.io_gain)
                elif name.startswith("trunk.blocks.") and p.ndim == 2:
                    p.mul_(args.block_gain)
                elif name == "token_embedding.weight":
                    p.mul_(args.token_gain)
    head = SSLHead(config.semantic_dim, args.prototypes, args.head_hidden, args.head_dim) if args.lambda_ssl > 0 else None
    model.to(device)
    model.trunk.checkpoint_blocks = args.checkpoint_blocks
    if args.lambda_ssl == 0:
        model.trunk.mask_token.requires_grad_(False)         # DDP wants a gradient for all that has one
    if args.lambda_rec == 0 and config.vision_bottleneck_ae_only and hasattr(model.trunk, "feature_bottleneck"):
        model.trunk.feature_bottleneck.requires_grad_(False)
    teacher = None
    if head is not None:
        head.to(device)
        teacher = nn.ModuleDict({"trunk": model.trunk, "head": head, **({"visual_proj": model.visual_proj} if config.train_clip else {})})
        teacher = copy.deepcopy(teacher).requires_grad_(False)
    lpips = LPIPS(args.lpips).to(device) if args.lambda_rec > 0 and args.lpips != "none" else None
    objectives = Objectives(model, head, lpips, args)
    if device.type == "cuda" if args.compile is None else args.compile:
        compile_blocks(model, teacher)
    if dist.is_initialized():
        objectives = wrap_in_ddp(objectives, device)
    state = State(model, head, teacher, objectives, make_optimizer(model, head, args, device),
                  {k: torch.zeros((), device=device) for k in ("weight_decay", "teacher_momentum", "teacher_temp")},
                  clipped_together(model, head), {}, config, args)
    names = ["loss"] + ["loss_clip", "logit_scale"] * (args.lambda_clip > 0) + ["loss_rec"] * (args.lambda_rec > 0) + \
        ["loss_dino", "loss_mim", "loss_koleo", "teacher_entropy"] * (args.lambda_ssl > 0) + ["grad_norm", "finite_steps", "steps"]
    state.totals = {k: torch.zeros((), device=device) for k in names}
    return state


def compile_blocks(model, teacher):
    """torch.compile each transformer block in place: small graphs, compiled once for each shape."""
    torch._dynamo.config.recompile_limit = 64       # blocks share one cache, and passes differ in shape, gradient and precision
    stacks = [model.trunk.blocks]
    stacks += [model.pixel_decoder.blocks] if model.config.train_reconstruction else []
    stacks += [model.text_transformer.resblocks] if model.config.train_clip else []
    stacks += [teacher["trunk"].blocks] if teacher is not None else []
    for stack in stacks:
        for block in stack:
            block.compile(dynamic=False)


def wrap_in_ddp(module, device):
    """DistributedDataParallel; made on a side stream on CUDA, as capturing its collectives in a graph requires."""
    if device.type == "cpu":
        return DistributedDataParallel(module, broadcast_buffers=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module = DistributedDataParallel(module, device_ids=[device.index], broadcast_buffers=False, gradient_as_bucket_view=True)
    torch.cuda.current_stream().wait_stream(side)
    return module


def make_optimizer(model, head, args, device):
    """Fused AdamW, its groups split by learning-rate factor, weight decay and frozen start; lr is a 0-d tensor in each."""
    depth, groups = model.config.vision_depth, {}
    named = [("model." + n, p) for n, p in model.named_parameters()] + ([("head." + n, p) for n, p in head.named_parameters()] if head is not None else [])
    for name, p in named:
        if not p.requires_grad:
            continue
        layer, factor = depth + 1, 1.0
        if name.startswith("model.trunk.blocks."):
            layer = int(name.split(".")[3]) + 1
        elif name.startswith(("model.trunk.patch_embed", "model.trunk.cls_token", "model.trunk.mask_token")):
            layer = 0
            factor = args.patch_embed_lr if "patch_embed" in name else 1.0
        elif name.startswith("model.pixel_decoder"):
            factor = args.decoder_lr
        factor *= args.layer_decay ** (depth + 1 - layer)
        key = (factor, p.ndim >= 2, name.startswith("head.prototype"))      # prototypes and their gain start frozen
        groups.setdefault(key, []).append(p)
    groups = [dict(params=params, lr_factor=factor, decays=decays, starts_frozen=frozen, lr=torch.zeros((), device=device))
              for (factor, decays, frozen), params in groups.items()]
    return torch.optim.AdamW(groups, betas=tuple(args.betas), eps=args.eps, weight_decay=0.0, fused=True, capturable=device.type == "cuda")


def clipped_together(model, head):
    """{submodule: its parameters}: encoder, pixel decoder, text tower, SSL head (DINOv2 clips each submodule by itself)."""
    parts = {}
    for name, p in model.named_parameters():
        part = "encoder" if name.startswith(("trunk", "visual_proj")) else "decoder" if name.startswith("pixel_decoder") else "text"
        if p.requires_grad:
            parts.setdefault(part, []).append(p)
    return parts | ({"head": list(head.parameters())} if head is not None else {})


# ----------------------------------------------------------------------------------------------------------------------
# Shared with train_dit.py: arguments, schedules, the captured step, checkpoints, the log
# ----------------------------------------------------------------------------------------------------------------------

MAY_CHANGE_ON_RESUME = {"out", "resume", "workers", "log_every", "eval_every", "checkpoint_every", "compile", "cuda_graph", "max_skipped"}


def add_argument(recipes, group, name, default, help, **kwargs):
    """An argument whose help shows its default, from recipes {"tiny": {name: value}, "other": ...} where it depends on the model's size."""
    tiny, other = (recipes[k].get(name[2:]) for k in ("tiny", "other"))
    shown = f"{tiny} for tiny, else {'see text' if other is None else other}" if name[2:] in recipes["tiny"] else default
    kwargs.setdefault("type", type(default) if default is not None else str)
    group.add_argument(name, default=default, help=f"{help} [{shown}]".replace("%", "%%"), **kwargs)


def parse_new_or_resumed(parser, argv):
    """Arguments of a new run, whose --out must be free, or with --resume those that the run in --out was started with."""
    args = parser.parse_args(argv)
    if args.resume:
        path = os.path.join(args.out, "run.json")
        if not os.path.isfile(os.path.join(args.out, "checkpoint.pt")) or not os.path.isfile(path):
            parser.error(f"--resume: {args.out} holds no checkpoint.pt and run.json of a run to go on with")
        with open(path, encoding="utf-8") as f:
            recorded = json.load(f)["arguments"]
        parser.set_defaults(**{k: v for k, v in recorded.items() if k not in ("resume", "out")})
        args = parser.parse_args(argv)
        changed = [k for k, v in recorded.items() if k not in MAY_CHANGE_ON_RESUME and getattr(args, k, None) != v]
        if changed:
            parser.error("--resume continues the same run; these differ from what it was started with: " +
                         ", ".join(f"--{k} (was {recorded[k]}, now {getattr(args, k)})" for k in changed))
    elif os.path.isdir(args.out) and os.listdir(args.out):
        parser.error(f"--out {args.out} is not empty: add --resume to go on with that run, or choose another folder")
    return args


def cosine(start, end, progress):
    """From start at progress 0 to end at 1 along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def set_schedules(state, step, n_steps):
    """Write the values of this step (from 0) into the tensors that train_step reads; returns them for the log."""
    args, progress = state.args, step / n_steps
    if progress < args.warmup:
        lr = args.lr * (step + 1) / math.ceil(args.warmup * n_steps)
    else:
        lr = cosine(args.lr, args.min_lr, (progress - args.warmup) / (1 - args.warmup + 1e-12))
    low, high = args.teacher_temp
    values = dict(weight_decay=cosine(args.weight_decay, args.weight_decay_end, progress),
                  teacher_momentum=cosine(args.teacher_momentum, 1.0, progress),
                  teacher_temp=low + (high - low) * min(1.0, progress / max(args.teacher_temp_warmup, 1e-12)))
    for name, value in values.items():
        state.scheduled[name].fill_(value)
    for group in state.optimizer.param_groups:
        is_frozen = group["starts_frozen"] and progress < args.freeze_prototypes
        group["lr"].fill_(0.0 if is_frozen else lr * group["lr_factor"])
    return dict(lr=lr, **values)


class CapturedStep:
    """step(inputs), inputs a dict of tensors of static shape: eager on a CPU, a CUDA graph replayed on a GPU.

    The first WARM_UP calls run eagerly on a side stream (DDP needs 11), the next one captures. The step must leave its
    results in tensors that outlive it.
    """

    WARM_UP = 11

    def __init__(self, step, enabled):
        self.step, self.enabled, self.calls, self.graph = step, enabled, 0, None

    def __call__(self, inputs):
        if not self.enabled:
            return self.step(inputs)
        if self.calls < self.WARM_UP:
            self.calls += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(inputs)
            torch.cuda.current_stream().wait_stream(side)
            return
        if self.graph is None:
            self.static = {k: v.clone() for k, v in inputs.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):      # the loader pins memory in a thread of its own
                self.step(self.static)
        for name, value in inputs.items():
            self.static[name].copy_(value)
        self.graph.replay()


def save_checkpoint(path, state, step, position=None):
    """Everything needed to go on, atomically, by rank 0; position is this rank's place in the data, if step does not say it."""
    positions = gather_objects(position)
    if rank() == 0:
        content = {name: module.state_dict() for name, module in state.modules().items()}
        content.update(optimizer=state.optimizer.state_dict(), totals=state.totals, step=step, positions=positions)
        write_atomically(path, lambda f: torch.save(content, f))
    barrier()


def load_checkpoint(path, state, device):
    """Restore what save_checkpoint wrote -> step, this rank's position in the data."""
    content = torch.load(path, map_location=device, weights_only=True)
    for name, module in state.modules().items():
        module.load_state_dict(content[name])
    state.optimizer.load_state_dict(content["optimizer"])
    for name, total in content["totals"].items():
        state.totals[name].copy_(total)
    positions = content["positions"]
    reads_tars = positions[0] is not None and any(isinstance(s, tuple) for s in positions[0]["states"].values())
    if len(positions) != world_size() and reads_tars:
        raise ValueError(f"the run had {len(positions)} ranks reading tars, now there are {world_size()}: resume with the same number")
    return content["step"], positions[min(rank(), len(positions) - 1)]


def means_since_log(state, step):
    """The means of state.totals over the finite steps since the last call, which are then reset -> {name: mean}, steps that were not finite.

    RuntimeError if not one step was finite.
    """
    names = list(state.totals)
    sums = dict(zip(names, torch.stack([state.totals[k] for k in names]).tolist()))     # the only wait for the device
    for total in state.totals.values():
        total.zero_()
    n_finite, n_steps = sums.pop("finite_steps"), sums.pop("steps")
    if n_finite == 0:
        raise RuntimeError(f"loss or gradient was not finite in all of the last {n_steps:.0f} steps (up to step {step}): the last "
                           "checkpoint is from before or within them; try a lower --lr, a longer --warmup or --precision fp32")
    return {k: v / n_finite for k, v in sums.items()}, round(n_steps - n_finite)


def record_run(out, args):
    """Write run.json: arguments, git state, versions, machine. What made the numbers in this folder."""
    def git(*command):
        try:
            return subprocess.run(["git", *command], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
        except OSError:
            return ""
    record = dict(arguments=vars(args), command=" ".join(sys.argv), world_size=world_size(), started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
                  git_commit=git("rev-parse", "HEAD"), git_changes=git("status", "--short").splitlines(),
                  python=platform.python_version(), torch=torch.__version__, machine=platform.platform(),
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    write_atomically(os.path.join(out, "run.json"), lambda f: f.write(json.dumps(record, indent=2).encode() + b"\n"))


class Log:
    """metrics.jsonl in a run's folder and the same on screen, by rank 0. A resumed run drops rows of steps done again."""

    def __init__(self, out, step):
        self.path = os.path.join(out, "metrics.jsonl")
        if rank() == 0:
            rows = evaluate.read_metrics(out) if step and os.path.exists(self.path) else []
            kept = "".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step)
            write_atomically(self.path, lambda f: f.write(kept.encode()))

    def write(self, row, line):
        """Append a row {kind, step, samples, flops, ...} and show a line above the progress bar."""
        if rank() == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            tqdm.write(line)


def keep_freed_memory():
    """Let the C library keep large freed blocks: else a step on a CPU gets each activation anew from the kernel, which zeroes it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 30)          # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD


def matmul_rate(device):
    """FLOP/s of a bf16 matrix product, measured here and now (2048 cubed on a CPU): what a step's rate is compared with."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


# ----------------------------------------------------------------------------------------------------------------------
# Training FLOPs
# ----------------------------------------------------------------------------------------------------------------------

def blocks_flops(depth, dim, ffn, n_samples, n_tokens, drop_path=0.0):
    """Forward FLOPs of transformer blocks: 2 for each weight of a linear and token, and two N x N products of attention.

    ffn: weights of a block's feed-forward layer. Norms, activations and softmax are left out, as everywhere.
    """
    kept = samples_kept(n_samples, drop_path) if drop_path else n_samples
    return depth * kept * (2 * n_tokens * (4 * dim * dim + ffn) + 4 * n_tokens * n_tokens * dim)


def ffn_weights(dim, ratio, layer):
    """Weights (without biases) of a block's SwiGLU or MLP."""
    inner = int(dim * ratio)
    if layer == "mlp":
        return 2 * dim * inner
    inner = int(inner * 2 / 3)
    return 3 * dim * (inner + -inner % 8)


def training_flops(config, args):
    """FLOPs of one training step over all ranks, as a flop counter with plain matrix-product attention counts them.

    Forward and backward: three times the forward, but two times for the patch embedding, whose input needs no gradient,
    once for the teacher and, of LPIPS' frozen network, twice for the reconstruction and once for the target.
    """
    dim, patch, d = config.vision_embed_dim, config.vision_patch_size, config.vision_feature_bottleneck
    W, ffn = world_size(), ffn_weights(config.vision_embed_dim, config.vision_mlp_ratio, config.vision_ffn_layer)

    def encoder(n_samples, side, times, drop_path=0.0):
        n = (side // patch) ** 2
        embed = 2 * n_samples * n * 3 * patch ** 2 * dim
        blocks = W * blocks_flops(config.vision_depth, dim, ffn, n_samples // W, n + 1, drop_path)
        return (embed * 2 + blocks * 3) if times == 3 else embed + blocks
    n_patches = (config.image_size // patch) ** 2
    total, B, b_rec, b_ssl = 0, args.batch_size, args.rec_batch_size, args.ssl_batch_size
    if args.lambda_clip or args.lambda_rec:
        total += encoder(B if args.lambda_clip else b_rec, config.image_size, 3, args.drop_path)
    if args.lambda_clip:
        D, L = config.text_embed_dim, config.text_context_length
        projected = config.semantic_dim * D + (0 if config.vision_bottleneck_ae_only else dim * d)
        text = blocks_flops(config.text_depth, D, ffn_weights(D, config.text_mlp_ratio, "mlp"), B, L) + 2 * B * D * D
        total += 3 * (text + 2 * B * projected + 2 * (2 * B * B * D))
    if args.lambda_rec:
        D = config.decoder_embed_dim
        bottleneck = dim * d if d != dim else 0
        linears = 2 * b_rec * n_patches * (bottleneck + d * D + D * 3 * patch ** 2)
        total += 3 * (linears + blocks_flops(config.decoder_depth, D, ffn_weights(D, 4.0, config.decoder_ffn_layer), b_rec, n_patches))
        if args.lpips != "none":
            side, width, convolutions = config.image_size, 3, 0
            for layer in LPIPS.LAYERS:
                if layer == "pool":
                    side //= 2
                else:
                    convolutions += 2 * 9 * width * layer * side ** 2
                    width = layer
            total += 3 * b_rec * convolutions
    if args.lambda_ssl:
        local = local_crop_size(config)
        total += encoder(2 * b_ssl, config.image_size, 3, args.drop_path_ssl) + encoder(args.n_local * b_ssl, local, 3, args.drop_path_ssl)
        total += encoder(2 * b_ssl, config.image_size, 1)
        h, o = args.head_hidden, args.head_dim
        row = 2 * (config.semantic_dim * h + h * h + h * o + o * args.prototypes + (0 if config.vision_bottleneck_ae_only else dim * d))
        masked = b_ssl * round(sum(args.mask_ratio) * n_patches) // 2
        total += row * (3 * (args.n_local * b_ssl) + 4 * (2 * b_ssl + masked))
        total += 2 * (2 * b_ssl * b_ssl * dim)            # KoLeo's search for neighbours, in two crops
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------

def open_data(args, config, device):
    """-> training source, number of workers, text tokenizer, and (held-out, gallery) samples of this rank, or None."""
    canvas = args.canvas or config.image_size
    needs_caption = args.lambda_clip > 0
    common = dict(classnames=args.classnames, label=args.label, needs_caption=needs_caption)
    tokenize = data.make_tokenizer(config.text_vocab_size, args.bpe) if needs_caption else None
    source = data.open_source(args.data, canvas, "train", args.train_size, **common)
    workers = args.workers
    if workers is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if args.data is None else max(1, min(8, (os.cpu_count() or 2) // local_ranks - 1))
    if args.data is not None and args.val_data is None:
        return source, workers, tokenize, None
    val_source = data.open_source(args.val_data, canvas, "val", **common, folders=getattr(source, "folders", None))
    held_out = data.load_evaluation_set(val_source, args.eval_samples)
    return source, workers, tokenize, (held_out, data.load_evaluation_set(source, 4 * args.eval_samples))


def fetch_files(args, config):
    """Fetch what the run needs and the cache lacks."""
    if args.lambda_rec > 0 and args.lpips != "none":
        LPIPS(args.lpips)
    if args.lambda_clip > 0:
        data.make_tokenizer(config.text_vocab_size, args.bpe)


def evaluate_now(state, tokenize, samples, args, row, out):
    """Measure on held-out data and draw reconstructions -> a row of kind eval, and its line for the screen."""
    measured = evaluate.evaluate_tokenizer(state.model, *samples, tokenize, bf16=args.precision == "bf16")
    if rank() == 0 and state.config.train_reconstruction:
        picture = evaluate.reconstruction_picture(state.model, samples[0][0])
        evaluate.save_image(picture, os.path.join(out, f"reconstructions_{row['step']:07d}.png"))
    texts = []
    if "psnr" in measured:
        texts.append(f"PSNR {measured['psnr']:.2f} dB")
    if "image_to_text" in measured:
        texts.append("retrieval image to text {image_to_text:.1%}, text to image {text_to_image:.1%} (chance {retrieval_chance:.1%})".format(**measured))
    if "latent_linear" in measured:
        texts.append("class from latents: linear {latent_linear:.1%}, k-NN {latent_knn:.1%} (chance {accuracy_chance:.1%})".format(**measured))
    return {"kind": "eval", **row, **measured}, f"step {row['step']:>6}  held-out: " + "; ".join(texts)


def train_row(state, row, scheduled, n_steps_since, seconds, data_seconds, flops_per_step, peak, skipped):
    """Means since the last log line -> a row of kind train, and its line. RuntimeError if not one step was finite."""
    means, n_not_finite = means_since_log(state, row["step"])
    rate = flops_per_step * n_steps_since / seconds
    row = {"kind": "train", **row, **means, **scheduled, "samples_per_second": state.args.batch_size * n_steps_since / seconds,
           "flops_per_second": rate, "matmul_share": rate / peak, "data_share": data_seconds / seconds,
           "skipped_samples": sum(skipped.values()), "skipped_steps": n_not_finite}
    if "teacher_entropy" in row:
        row["teacher_entropy_uniform"] = math.log(state.args.prototypes)
    texts = [f"step {row['step']:>6}", f"loss {row['loss']:.3f}"]
    texts += [f"{label} {row[k]:.3f}" for label, k in (("clip", "loss_clip"), ("rec", "loss_rec"), ("dino", "loss_dino"), ("mim", "loss_mim"), ("koleo", "loss_koleo")) if k in row]
    texts.append(f"grad {row['grad_norm']:.2f}")
    if "logit_scale" in row:
        texts.append(f"scale {row['logit_scale']:.1f}")
    if "teacher_entropy" in row:
        texts.append(f"teacher entropy {row['teacher_entropy']:.2f} of {row['teacher_entropy_uniform']:.2f}")
    texts += [f"lr {row['lr']:.1e}", f"{row['samples_per_second']:.0f} samples/s", f"{row['matmul_share']:.0%} of matmul", f"data {row['data_share']:.0%}"]
    texts.append(f"skipped {row['skipped_samples']} samples" + (f", {row['skipped_steps']} steps (not finite)" if row["skipped_steps"] else ""))
    if skipped:
        texts.append("(" + ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) + ")")
    return row, "  ".join(texts)


def main(argv=None):
    """Train as the arguments say."""
    device = init_distributed()
    args = parse_args(argv)
    if device.type == "cpu":
        keep_freed_memory()
    config, out = model_config(args), args.out
    if rank() == 0:
        os.makedirs(out, exist_ok=True)
    first_on_node(lambda: fetch_files(args, config))
    source, workers, tokenize, samples = open_data(args, config, device)
    state = build_state(args, device)
    n_steps, flops_per_step, peak = args.samples // args.batch_size, training_flops(config, args), matmul_rate(device) * world_size()
    eval_every = args.eval_every or max(1, -(-n_steps // 5))
    checkpoint_every = args.checkpoint_every or eval_every
    step, position, checkpoint = 0, None, os.path.join(out, "checkpoint.pt")
    if args.resume:
        step, position = load_checkpoint(checkpoint, state, device)
    elif rank() == 0:
        record_run(out, args)
    log = Log(out, step)
    if rank() == 0:
        n_parameters = sum(p.numel() for p in state.model.parameters())
        print(f"{args.init or args.model}: {n_parameters / 1e6:.1f}M parameters on {source.name}; {n_steps} steps of {args.batch_size} "
              f"(SSL {args.ssl_batch_size if args.lambda_ssl else 0}, reconstruction {args.rec_batch_size if args.lambda_rec else 0}), "
              f"{flops_per_step / 1e9:.0f} GFLOPs each; {world_size()} x {device.type}, matmul {peak / 1e9:.0f} GFLOP/s", flush=True)
        if samples is None:
            print("no --val_data: no measures on held-out data, no pictures")

    stream = data.SampleStream(source, args.batch_size, tokenize, config.text_context_length, args.seed, workers, position, args.max_skipped)
    batches, position = iter(data.make_loader(stream, workers, pin_memory=device.type == "cuda")), stream.position
    run_step = CapturedStep(lambda views: train_step(state, views), device.type == "cuda" and args.cuda_graph)
    bar = tqdm(total=args.samples, initial=step * args.batch_size, unit=" samples", disable=rank() != 0, smoothing=0.05, dynamic_ncols=True)
    skipped_by, last_log, clock, data_seconds = {}, step, time.perf_counter(), 0.0
    if samples is not None and step == 0:
        log.write(*evaluate_now(state, tokenize, samples, args, dict(step=0, samples=0, flops=0), out))
        clock = time.perf_counter()

    while step < n_steps:
        start = time.perf_counter()
        batch = next(batches)
        position = stream.advance(position, batch)
        skipped_by[batch["position"][0]] = batch["skipped"]
        images, tokens = (None if batch[k] is None else batch[k].to(device, non_blocking=True) for k in ("images", "tokens"))
        views = make_views(args, config, step, images, tokens)
        data_seconds += time.perf_counter() - start
        scheduled = set_schedules(state, step, n_steps)
        run_step(views)
        step += 1
        bar.update(args.batch_size)

        row = dict(step=step, samples=step * args.batch_size, flops=step * flops_per_step)
        if step % args.log_every == 0 or step == n_steps:
            skipped = total_skipped(skipped_by)
            log.write(*train_row(state, row, scheduled, step - last_log, time.perf_counter() - clock, data_seconds, flops_per_step, peak, skipped))
            last_log, clock, data_seconds = step, time.perf_counter(), 0.0
        pause = time.perf_counter()
        if samples is not None and (step % eval_every == 0 or step == n_steps):
            log.write(*evaluate_now(state, tokenize, samples, args, row, out))
        if step % checkpoint_every == 0 or step == n_steps:
            save_checkpoint(checkpoint, state, step, position)
        clock += time.perf_counter() - pause        # rates are of training alone
    bar.close()
    if rank() == 0:
        state.model.save_pretrained(os.path.join(out, "tokenizer"))
        evaluate.save_image(evaluate.training_curves(out), os.path.join(out, "curves.png"))
        print(f"done: {out}/tokenizer (released format), {out}/curves.png, {out}/reconstructions_*.png, {out}/metrics.jsonl")
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def total_skipped(skipped_by):
    """{reader: {reason: count}} of this rank -> {reason: count} over all ranks."""
    return dict(sum((Counter(reasons) for part in gather_objects(skipped_by) for reasons in part.values()), Counter()))


if __name__ == "__main__":
    main()
