"""
Pre-train a visual tokenizer on three objectives at once: image-text contrastive, DINOv2-style
self-supervision, reconstruction (VTP, arXiv 2512.13687, stage 1). Then, if you like, train its pixel decoder
on against a discriminator, on frozen latents (stage 2).

On any machine, a few minutes, on built-in data; then the paper's autoencoder baseline:
    python train_tokenizer.py
    python train_tokenizer.py --lambda_clip 0 --lambda_ssl 0 --out runs/ae
Its pixel decoder on against a discriminator, its latents as they are:
    python train_tokenizer.py --stage 2 --init runs/tokenizer --out runs/stage2

8 GPUs of 80 GB on one node (256 pairs each; without --checkpoint_blocks 48, --batch_size 384), WebDataset
tars; then two such nodes (run on each, with its own --node_rank):
    torchrun --nproc_per_node=8 train_tokenizer.py --model large --data 'datacomp/{00000..09999}.tar' \\
        --val_data val.tar --batch_size 2048 --checkpoint_blocks --samples 1100000000 --out runs/vtp-l
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500 --nproc_per_node=8 \\
        train_tokenizer.py ...

Go on after a stop, bit for bit: the same command with --resume (or just --out FOLDER --resume). Ctrl-C and
SIGTERM stop a run after its step, with a checkpoint. The folder gets run.json (what produced it),
metrics.jsonl (fields: see Log), checkpoint.pt, pictures, and tokenizer/ in the released format.
"""
import argparse
import atexit
import contextlib
import copy
import functools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import timeit
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker
from tqdm import tqdm

import data
import evaluate
from losses import (LPIPS, Discriminator, adaptive_weight, by_first_rank, clip_loss, cross_entropy,
                    dino_loss, discriminator_loss, fail, first_on_node, gather_objects, generator_loss,
                    ibot_loss, init_distributed, keep_freed_memory, koleo_loss, leave_distributed,
                    one_line_errors, rank, reconstruction_loss, sinkhorn_knopp, sum_over_ranks, world_size)
from vtp import (VTP, VTP_SIZES, SSLHead, UserError, claim_folder, denormalize, find_checkpoint,
                 is_leftover, load_tensors, read_config, read_safetensors, run_block, samples_kept,
                 vtp_config, write_atomically)

# ----- Settings -------------------------------------------------------------------------------------------
# The help of an option gives its reason and source. Models narrower than `small`, such as tiny, have a recipe
# for minutes on 2 CPU cores: where it differs, its value stands beside the default of the others as tiny=.

TINY_WIDTH = 384                # encoders narrower than this take the recipe of tiny
BETAS = (0.9, 0.98)             # of AdamW (OpenCLIP; DINOv2: 0.9, 0.999)
DISCRIMINATOR_BETAS = (0.5, 0.9)    # (VQGAN)
ADAM_EPS = 1e-8                 # DINOv2; OpenCLIP: 1e-6
MIN_LR = 1e-6                   # where the cosine of the learning rate ends (DINOv2; OpenCLIP: 0)
PATCH_EMBED_LR = 0.2            # further factor of the patch embedding's rate under layer decay (DINOv2)
KOLEO_WEIGHT = 0.1              # of KoLeo within L_ssl (DINOv2)
MASK_RATIO = (0.1, 0.5)         # lowest and highest share of masked patches, in half of the crops (DINOv2)
TEMP_WARMUP = 0.3               # the teacher's temperature rises over this part of the run (DINOv2)
FREEZE_PROTOTYPES = 0.01        # the head's last layer rests for this part (DINOv2: 1 epoch of 100)
HEAD_SIZE = (2048, 256)         # hidden and output width of the SSL head's MLP (DINOv2, and the paper)
TINY_HEAD_SIZE = (512, 128)
NOT_IN_STAGE_2 = ("lambda_rec", "lambda_ssl", "lambda_clip", "drop_path", "bottleneck_ae_only",
                  "rec_batch_size", "micro_batch")          # of the options
HEAD_ROWS = 1024                # of the SSL head's at a time with --checkpoint_blocks: 256 MiB of logits


def make_parser():
    """The command line; --help is the recipe's documentation."""
    parser = Settings(__doc__)
    section, option, flag = parser.section, parser.option, parser.flag
    section("data")
    option("--data", None, "a folder of class folders, or tars (a folder, glob or braces); default: "
           "built in", absolute)
    option("--val_data", None, "held-out data of the same kinds; the built-in set has its own split",
           absolute)
    option("--label", "cls", "tars: where the class is, 'cls' (KEY.cls) or a field of KEY.json")
    option("--classnames", None, "a file with a class name on each line, in the order of the labels",
           absolute)
    option("--train_size", 65536, "scenes in the built-in set", count)
    flag("--hold_out_pairs", "leave scenes with 10 of the 120 pairs of shape and colour out of it")
    # A crop of a canvas of the image's own size is enlarged, and the decoder learns to blur: of white noise
    # it has half of the power that the image has in the highest quarter of frequencies, one cut out of a
    # larger canvas all of it (of images whose side is a power of 2 times the image size, 0.7).
    option("--canvas", None, "side of the images that views are cropped from; default: 5/4 of the image "
           "size, and what is decoded is cut out of it; if built in, the image size", count)
    option("--bpe", None, "path of CLIP's bpe_simple_vocab_16e6.txt.gz; default: fetched once", absolute)
    option("--max_skipped", 0.1, "largest share of unusable samples before the run stops", share)

    section("model")
    option("--stage", 1, "1: all of the model on all objectives. 2: of the model of --init the pixel decoder "
           "alone, on L1 + LPIPS and against a discriminator (paper: whose gradients are too large to train "
           "ViTs jointly)", int, choices=(1, 2))
    option("--model", "tiny", f"size: {', '.join(VTP_SIZES)}")
    option("--image_size", None, "side in pixels; default: the size's own", count)
    option("--latent_dim", None, "channels d of the latents; default: 64 (paper; 256 in one ablation)", count)
    flag("--bottleneck_ae_only", "CLIP and SSL read the encoder's full width, as in the released models, not "
         "the latents; default: as the size, or --init, has it", yes_or_no=True, default=None)
    option("--init", None, "start from a run, a folder or a hub id, whose config then gives the model",
           folder_or_name)
    # A small model starts too quiet for a run of minutes: an initial std of 0.02 is a gain of 0.64 a layer at
    # width 1024 but of 0.32 at 256. After 25,600 samples of the built-in set (seed 0; seed 1: 22.8 dB, 0.275,
    # 0.204) it has 23.0 dB, a probe of the class on latents 0.320 and images' captions found 0.224; without
    # block_gain 23.5 dB, 0.221, 0.131. When captions were in bytes, with a gain of 10 on their tokens, it had
    # 22.9 dB and 0.295; without io_gain and decoder_lr, at twice the rate, 19.1 dB and 0.290; without any of
    # the four, at four times the rate, 19.3 dB and 0.168.
    option("--io_gain", 1.0, "of patch embedding, bottleneck and the decoder's ends", positive, tiny=3.0)
    option("--block_gain", 1.0, "of the encoder's initial matrices", positive, tiny=2.0)

    section("objectives: L = lambda_rec L_rec + lambda_ssl L_ssl + lambda_clip L_clip")
    option("--lambda_rec", 0.1, "weight of L1 + LPIPS (arXiv v2); more without LPIPS", not_negative, tiny=3.0)
    option("--lambda_ssl", 1.0, "weight of self-distillation; 0 builds no teacher", not_negative)
    option("--lambda_clip", 1.0, "weight of the image-text loss; 0 builds no text tower", not_negative)
    option("--lpips", "auto", "auto fetches its files, a folder holds them, none is L1 alone",
           folder_or_name, tiny="none")
    option("--prototypes", 65536, "K, outputs of the SSL head (DINOv2)", count, tiny=1024)
    option("--n_local", 8, "local crops a sample, 3/8 of the side in whole patches (DINOv2)", count, tiny=4)

    section("stage 2: L = L_rec + gan_weight a L_gan, a adapted so that both move the decoder alike (VQGAN)")
    option("--gan_weight", 0.5, "of the adversarial term (latent diffusion; VQGAN: 0.8); 0 builds none",
           not_negative)
    # The decoder runs away from a discriminator that has not learned yet, which then never does: tiny's was
    # right in 50 % after a start at step 32 or 192, in 60 to 80 % after one at 320 or 480.
    option("--gan_start", 0.1, "part of the run before that term begins; the discriminator, which learns "
           "meanwhile, needs some 300 steps", share, tiny=0.5)
    option("--discriminator_lr", 1.0, "factor for the discriminator, which has no weight decay", positive)
    option("--decoder_ema", 0.999, "momentum of the averaged decoder, which is measured and exported", share,
           tiny=0.99)

    section("length and batch")
    option("--samples", 100_000_000, "image-text pairs seen in all", count, tiny=40_960)
    option("--batch_size", 1024, "pairs a step over all ranks: CLIP's (paper: 16k)", count, tiny=64)
    option("--ssl_batch_size", None, "of them for SSL; default: a quarter (paper), in tiny an eighth", count)
    option("--rec_batch_size", None, "of them to decode; default: an eighth (paper), all if tiny", count)
    option("--micro_batch", None, "pairs of a rank whose graph is held at once: less memory, the same "
           "gradients, features computed twice (GradCache); default: all", count)
    option("--seed", 0, "of initialisation, data order and every draw of a step", whole)

    section("recipe: one AdamW for all; schedules are fractions of the run")
    # 2e-4 at ViT-L/14 is DINOv2's; at 16k it gives 8e-4, within OpenCLIP's 5e-4 to 1e-3
    option("--lr", None, "peak learning rate; default: 2e-4 sqrt(batch_size / 1024)", positive, tiny=5e-4)
    option("--decoder_lr", 1.0, "factor for the decoder: it needs more than CLIP bears", positive, tiny=3.0)
    option("--warmup", 0.1, "linear warm-up (DINOv2)", part)
    option("--weight_decay", 0.04, "at the start; none on anything under 2 axes (DINOv2)", not_negative)
    option("--weight_decay_end", 0.4, "where its cosine ends (DINOv2; OpenCLIP: always 0.2)", not_negative)
    option("--clip_grad", 3.0, "largest gradient norm of each submodule (DINOv2)", positive)
    option("--layer_decay", 0.9, "of the rate, from block to block down (DINOv2 ViT-L/16)", part, tiny=1.0)
    option("--drop_path", 0.0, "stochastic depth in image passes (the authors' rate is unpublished)", share)
    option("--drop_path_ssl", 0.3, "the same in the student's SSL passes (DINOv2)", share, tiny=0.0)
    option("--teacher_momentum", 0.992, "of the EMA teacher, cosine to 1 (DINOv2)", part, tiny=0.99)
    # while views agree little, as in a run of minutes, a softer teacher's targets become uniform
    option("--teacher_temp", [0.04, 0.07], "first and last (DINOv2)", positive, tiny=[0.02, 0.02])

    section("run")
    option("--out", "runs/tokenizer", "folder for everything that the run leaves")
    flag("--resume", "go on from --out's checkpoint, with its recorded arguments")
    option("--precision", "bf16", "bf16 autocast over fp32 weights, or fp32", choices=("bf16", "fp32"))
    option("--workers", None, "loader processes a rank; default: 0 for the built-in set, else up to 8", whole)
    option("--log_every", 10, "steps between log lines", count)
    option("--eval_every", None, "steps between held-out measures; default: a fifth of the run", count)
    option("--checkpoint_every", None, "steps between checkpoints, 15 minutes being the longest time without "
           "one; default: as --eval_every", count)
    option("--eval_samples", 1024, "held-out samples; probes learn from four times as many", count)
    flag("--compile", "torch.compile the blocks; default: on CUDA, and on a CPU for 10,000 steps (tiny: two "
         "minutes, then 1.15 times as fast)", yes_or_no=True, default=None)
    flag("--cuda_graph", "capture the step on CUDA", yes_or_no=True, default=True)
    flag("--checkpoint_blocks", "recompute image blocks and SSL head in the backward: less memory, more time")
    return parser


@one_line_errors()
def read_settings(argv=None):
    """Arguments and the model's config: parsed, completed and checked, each once.
    Whatever is wrong ends the program with a message that says what to change."""
    parser = make_parser()
    args = parser.read(argv)
    config = vtp_config(args.model)
    if args.init:                           # a hub id is fetched
        config = read_config(first_on_node(lambda: find_checkpoint(args.init)))
    is_tiny = config.vision_embed_dim < TINY_WIDTH
    if args.stage == 2 and not args.resume:
        given = [f"--{name}" for name in NOT_IN_STAGE_2 if getattr(args, name) != parser.get_default(name)]
        if given:
            raise ValueError(f"--stage 2 has no use for {', '.join(given)}: leave it out")
    parser.complete(args, "tiny" if is_tiny else None)
    if args.stage == 2:
        args.lambda_clip = args.lambda_ssl = 0.0
    follow_batch_size(args, is_tiny)
    latent_dim = args.latent_dim or config.vision_feature_bottleneck
    if args.init and latent_dim != config.vision_feature_bottleneck:
        raise ValueError(f"--latent_dim {latent_dim}: the model of --init has another; leave it out")
    if args.bottleneck_ae_only is not None:
        config = replace(config, vision_bottleneck_ae_only=args.bottleneck_ae_only)
    config = replace(config, image_size=args.image_size or config.image_size,
                     vision_feature_bottleneck=latent_dim)
    if args.stage == 1:         # what no objective trains is left out
        config = replace(config, train_clip=args.lambda_clip > 0, train_reconstruction=args.lambda_rec > 0)
    check(parser, args)
    if args.stage == 2 and not (args.init and config.train_reconstruction):
        raise ValueError("--stage 2 trains the pixel decoder of a model: give one that has it, --init")
    if args.stage == 2 and config.image_size < 24 and args.gan_weight > 0:
        raise ValueError(f"--image_size {config.image_size}: the discriminator needs 24 or more")
    return args, config


def follow_batch_size(args, is_tiny):
    """Defaults that depend on the batch: the subsets, in equal shares of the ranks, and the rate."""
    B, W, is_autoencoder = args.batch_size, world_size(), args.lambda_clip == args.lambda_ssl == 0
    if args.ssl_batch_size is None:
        args.ssl_batch_size = max(B // (8 if is_tiny else 4) // (2 * W), 1) * 2 * W
    if args.rec_batch_size is None:
        args.rec_batch_size = max(B // (1 if is_tiny or is_autoencoder else 8) // W, 1) * W
    if args.lr is None:
        args.lr = 2e-4 * math.sqrt(B / 1024)


def n_chunks(args):
    """In how many chunks a rank takes its share of the batch."""
    share_of_rank = max(args.batch_size // world_size(), 1)
    return max(share_of_rank // (args.micro_batch or share_of_rank), 1)


def check(parser, args):
    """Raises ValueError or FileNotFoundError that says what to change."""
    W, n = world_size(), n_chunks(args)
    if args.lambda_rec == args.lambda_ssl == args.lambda_clip == 0:
        raise ValueError("nothing to train: all of --lambda_rec, --lambda_ssl and --lambda_clip are 0")
    if args.hold_out_pairs and args.data is not None:
        raise ValueError("--hold_out_pairs is of the built-in set, not of --data")
    if args.samples < args.batch_size:
        raise ValueError(f"{parser.said('samples', args)} is less than one batch of {args.batch_size}")
    if args.micro_batch and args.batch_size != args.micro_batch * n * W:
        raise ValueError(f"{parser.said('batch_size', args)}: must be a multiple of {args.micro_batch * W}, "
                         "--micro_batch times the number of ranks")
    ranks = "the number of ranks" if n == 1 else f"the number of ranks times the {n} chunks of --micro_batch"
    pairs = f"twice {ranks} (masks are drawn in pairs of samples)"
    for name, divisor, what, is_used in (("batch_size", W, ranks, True),
                                         ("rec_batch_size", W * n, ranks, args.lambda_rec > 0),
                                         ("ssl_batch_size", 2 * W * n, pairs, args.lambda_ssl > 0)):
        size = getattr(args, name)
        if is_used and (size % divisor or size > args.batch_size):
            raise ValueError(f"{parser.said(name, args)}: must be a multiple of {divisor}, {what}, and at "
                             f"most --batch_size {args.batch_size}")
    if args.lpips not in ("auto", "none") and not os.path.isdir(args.lpips):
        raise FileNotFoundError(f"--lpips {args.lpips}: neither 'auto' nor 'none' nor a folder")
    check_paths(args, ("data", "val_data"), ("classnames", "bpe"))


# ----- Views: everything that a step's computation reads --------------------------------------------------

def make_views(args, config, step, images, tokens):
    """A dict of tensors of static shape, made on the device from (seed, step) for the global batch.
    images (b, 3, C, C) uint8 and tokens (b, L) are this rank's samples. CLIP takes all, SSL and
    reconstruction the first ones: the loader shuffles, so a prefix is a random subset. The first axis of
    each tensor is that of the chunks of --micro_batch."""
    generator = data.step_generator(args.seed, step, images.device)
    b_ssl, b_rec, n = args.ssl_batch_size // world_size(), args.rec_batch_size // world_size(), n_chunks(args)
    grid, depth, views = config.image_size // config.vision_patch_size, config.vision_depth, {}
    if args.lambda_clip > 0 or args.lambda_rec > 0:
        n_decoded = b_rec if args.lambda_rec > 0 else 0
        view = data.clip_view(images, generator, args.batch_size, config.image_size, n_decoded)
        views["images"] = in_chunks(view if args.lambda_clip > 0 else view[:b_rec], n)
        views["keep"] = draw_keep(generator, args.batch_size, args.drop_path, depth, views["images"])
    if args.lambda_clip > 0:
        views["tokens"] = in_chunks(tokens, n)
    if args.lambda_ssl > 0:
        B, n_local, drop_path = args.ssl_batch_size, args.n_local, args.drop_path_ssl
        local_size = data.local_crop_size(config.image_size, config.vision_patch_size)
        crops = data.ssl_views(images[:b_ssl], generator, B, config.image_size, local_size, n_local)
        views["global_crops"], views["local_crops"] = (in_chunks(x, n, len(x) // b_ssl) for x in crops)
        masks = in_chunks(data.draw_masks(generator, B, (grid, grid), MASK_RATIO), n, 2)
        views["masks"] = masks                                                      # (n, 2b / n, N)
        # where the masked patches are among a chunk's, as nonzero would say; draw_masks fixes their number
        n_masked = b_ssl // n * round(sum(MASK_RATIO) * grid * grid) // 2
        indices = masks.flatten(1).int().argsort(dim=1, descending=True, stable=True)
        views["mask_indices"] = indices[:, :n_masked]
        views["keep_global"] = draw_keep(generator, B, drop_path, depth, views["global_crops"], 2)
        views["keep_local"] = draw_keep(generator, B, drop_path, depth, views["local_crops"], n_local)
    return {k: v for k, v in views.items() if v is not None}


def in_chunks(x, n, n_crops=1):
    """Rows of all samples, crop by crop, (n_crops b, ...) -> those of every n-th, (n, n_crops b / n, ...).
    So each chunk, as each rank, has its share of the decoded samples and of masked patches."""
    return x.unflatten(0, (n_crops, -1, n)).movedim(2, 0).flatten(1, 2)


def draw_keep(generator, batch_size, drop_path, depth, images, n_crops=1):
    """Stochastic depth: which of a chunk's images (n, m, ...), n_crops of each sample, each branch processes,
    (n, depth, 2, kept), or None."""
    if drop_path == 0:
        return None
    n, m = images.shape[:2]
    keys = torch.rand(2 * depth, n_crops, batch_size, generator=generator, device=generator.device)
    keys = data.own_share(keys)[..., :n * m // n_crops].flatten(1).T            # (n m, 2 depth)
    keys = in_chunks(keys, n, n_crops).transpose(1, 2)                          # (n, 2 depth, m)
    return keys.argsort(dim=2)[..., :samples_kept(m, drop_path)].unflatten(1, (depth, 2))


# ----- The objectives: views and the teacher's targets -> losses ------------------------------------------

class Objectives(nn.Module):
    """The student's forward, which DDP wraps. Losses are of this rank's share, or of a chunk of it."""
    def __init__(self, model, head, lpips, args):
        super().__init__()
        self.model, self.head, self.lpips, self.args = model, head, lpips, args

    def forward(self, views, targets, only_features=False):
        """-> {name: loss} of losses that are means over samples, and {name: rows} of the features that
        compare_samples takes; with only_features no losses, and no work for them. targets: of teacher_targets
        for this chunk, or None."""
        model, args, losses, features = self.model, self.args, {}, {}
        device_type = model.trunk.cls_token.device.type
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=args.precision == "bf16")
        is_decoded = args.lambda_rec > 0 and not only_features
        if args.lambda_clip > 0 or is_decoded:      # one encoder pass serves CLIP and reconstruction
            images, b_rec = views["images"], args.rec_batch_size // world_size() // n_chunks(args)
            with autocast:
                cls, patches = model.features(images, keep=views.get("keep"))
                if args.lambda_clip > 0:
                    image_features = model.project_image(cls, patches)
                    text_features = model.encode_text(views["tokens"], normalize=False)
                if is_decoded:
                    latents = model.to_latents(patches[:b_rec], *images.shape[-2:])
                    reconstruction = model.decode(latents)
            if args.lambda_clip > 0:
                features.update(images=F.normalize(image_features.float(), dim=-1),
                                texts=F.normalize(text_features.float(), dim=-1),
                                logit_scale=model.logit_scale.exp().expand(len(images)))
            if is_decoded:              # on [-1, 1]
                pair = (2 * denormalize(x.float()) - 1 for x in (reconstruction, images[:b_rec]))
                with autocast:
                    losses["rec"] = reconstruction_loss(*pair, self.lpips)
        if args.lambda_ssl > 0:
            with autocast:
                cls, patches = model.features(views["global_crops"], views["masks"], views.get("keep_global"))
                if not only_features:
                    losses.update(self.ssl(cls, patches, views, targets))
            features["first_crops"], features["second_crops"] = cls.chunk(2)
        return losses, features

    def ssl(self, cls, patches, views, targets):
        """Student's tokens of masked global crops, and local ones; targets: (2b, K) of CLS, (M, K) of masked
        patches."""
        cls_targets, patch_targets = targets
        b = len(cls_targets) // 2
        # a student's global crop against the teacher's other one, a local one against the mean of both
        crossed = cls_targets.view(2, b, -1).flip(0)
        local_targets = crossed.mean(dim=0).repeat(self.args.n_local, 1)
        local_cls, _ = self.model.features(views["local_crops"], keep=views.get("keep_local"))
        of_global = self.cross_entropies(cls, crossed.flatten(0, 1))
        of_local = self.cross_entropies(local_cls, local_targets)
        of_patches = self.cross_entropies(masked_patches(patches, views), patch_targets)
        return dict(dino=dino_loss(of_global, of_local), mim=ibot_loss(of_patches, views["masks"]))

    def cross_entropies(self, rows, targets):
        """Of the head on tokens (M, dim) against targets (M, K): (M,). With --checkpoint_blocks the logits of
        HEAD_ROWS tokens at most exist at once: each chunk is computed again in the backward."""
        def of_chunk(rows, targets):
            return cross_entropy(ssl_logits(self.model.config, self.model.trunk, self.head, rows), targets)
        is_recomputed = self.args.checkpoint_blocks
        size = HEAD_ROWS if is_recomputed else len(rows)
        chunks = zip(rows.split(size), targets.split(size))
        return torch.cat([run_block(of_chunk, is_recomputed, *chunk) for chunk in chunks])


def compare_samples(features):
    """The losses that compare the samples of the whole batch with one another -> {name: loss}."""
    losses = {}
    if "texts" in features:
        losses["clip"] = clip_loss(features["images"], features["texts"], features["logit_scale"][0])
    if "first_crops" in features:
        losses["koleo"] = koleo_loss(features["first_crops"]) + koleo_loss(features["second_crops"])
    return losses


def weighted_sum(losses, args):
    """L, or the part of it that these losses make."""
    clip, rec, dino, mim, koleo = (losses.get(k, 0.0) for k in ("clip", "rec", "dino", "mim", "koleo"))
    return (args.lambda_rec * rec + args.lambda_ssl * (dino + mim + KOLEO_WEIGHT * koleo)
            + args.lambda_clip * clip)


def masked_patches(patches, views):
    """Of patches (crops, N, dim) those that the masks hide from the student: (M, dim)."""
    return patches.flatten(0, 1)[views["mask_indices"]]


def ssl_logits(config, trunk, head, rows):
    """The head on CLS tokens or patches (M, dim) -> logits (M, K)."""
    return head(rows if config.vision_bottleneck_ae_only else trunk.bottleneck(rows))


@torch.no_grad()
def teacher_targets(state, chunks):
    """The EMA teacher on unmasked global crops -> for each chunk, probabilities of CLS (2b, K) and of masked
    patches (M, K); Sinkhorn's are over all chunks and ranks."""
    teacher, args, rows = state.teacher, state.args, []
    with torch.autocast(chunks[0]["masks"].device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for views in chunks:
            cls, patches = teacher["trunk"](views["global_crops"])[-1]
            rows.append((cls.clone(), masked_patches(patches, views)))      # cls is a view of all tokens
        logits = [ssl_logits(state.config, teacher["trunk"], teacher["head"], torch.cat(x))
                  for x in zip(*rows)]
    probs = (sinkhorn_knopp(x, state.scheduled["teacher_temp"]) for x in logits)
    return list(zip(*(x.chunk(len(chunks)) for x in probs)))


# ----- State: the model, the teacher, the optimiser and its schedules -------------------------------------

@dataclass
class State:
    """What training changes. Schedules are 0-d tensors, since a captured step cannot read Python floats."""
    model: VTP
    head: SSLHead | None
    student: nn.Module | None        # the parts of model and head that have a teacher, its moving average
    teacher: nn.Module | None
    objectives: nn.Module            # the student's forward, in DDP where there are ranks; stage 2: decoder
    parameters: list                 # (name, parameter) of all that learns
    optimizer: torch.optim.Optimizer
    scheduled: dict                  # weight_decay, teacher_momentum, ...; rates are the optimizer's
    totals: dict                     # sums over this rank's finite steps since the last log line
    is_finite: torch.Tensor          # 0-d: was the last step, on all ranks
    config: object
    args: argparse.Namespace
    # of stage 2, where the student is the decoder that learns, and the teacher, its average, is the model's
    discriminator: nn.Module | None = None
    discriminate: nn.Module | None = None        # the same, in DDP where there are ranks
    first_decoder: nn.Module | None = None       # that of --init, for pictures
    lpips: LPIPS | None = None

    def modules(self):
        """{name in a checkpoint: module}."""
        modules = dict(model=self.model, head=self.head, teacher=self.teacher)
        if self.args.stage == 2:
            modules = dict(model=self.model, decoder=self.student, discriminator=self.discriminator)
        return {name: module for name, module in modules.items() if module is not None}


def build_state(args, config, device):
    """What a run trains, from scratch or from --init; the same weights on every rank."""
    torch.manual_seed(args.seed)
    model = VTP(config)
    (load_init if args.init else scale_initial_weights)(model, args)
    model.to(device)
    for tower in (model.trunk, getattr(model, "pixel_decoder", None)):
        if tower is not None:
            tower.checkpoint_blocks = args.checkpoint_blocks
    parts = (stage_2_parts if args.stage == 2 else stage_1_parts)(args, config, model, device)
    if should_compile(args, device):
        compile_blocks(model, parts["student" if args.stage == 2 else "teacher"])
    for name in ("objectives", "discriminate"):
        if parts.get(name) is not None:
            parts[name] = wrap_in_ddp(parts[name], device)
    scheduled = {name: torch.zeros((), device=device)
                 for name in ("weight_decay", "teacher_momentum", "teacher_temp", "gan_weight")}
    optimizer = make_optimizer(parts["parameters"], config.vision_depth, args, device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    return State(model, **parts, optimizer=optimizer, scheduled=scheduled, totals={}, is_finite=is_finite,
                 config=config, args=args)


def stage_1_parts(args, config, model, device):
    """What State has for stage 1: the SSL head, the teacher, the student's forward."""
    if args.lambda_ssl == 0:
        model.trunk.mask_token.requires_grad_(False)         # DDP wants a gradient for all that has one
    if args.lambda_rec == 0 and config.vision_bottleneck_ae_only:
        model.trunk.feature_bottleneck.requires_grad_(False)
    head, student, teacher = None, None, None
    if args.lambda_ssl > 0:
        sizes = TINY_HEAD_SIZE if config.vision_embed_dim < TINY_WIDTH else HEAD_SIZE
        head = SSLHead(config.semantic_dim, args.prototypes, *sizes).to(device)
        projection = dict(visual_proj=model.visual_proj) if config.train_clip else {}
        student = nn.ModuleDict(dict(trunk=model.trunk, head=head, **projection))
        teacher = copy.deepcopy(student).requires_grad_(False)
    return dict(head=head, student=student, teacher=teacher,
                objectives=Objectives(model, head, open_lpips(args, device), args),
                parameters=learning(model, "") + learning(head, "head"))


def stage_2_parts(args, config, model, device):
    """What State has for stage 2: a copy of the decoder, which learns, and the discriminator."""
    decoder = copy.deepcopy(model.pixel_decoder)
    model.requires_grad_(False)
    first = copy.deepcopy(model.pixel_decoder) if rank() == 0 else None
    discriminator = Discriminator().to(device) if args.gan_weight > 0 else None
    return dict(head=None, student=decoder, teacher=model.pixel_decoder, objectives=decoder,
                discriminator=discriminator, discriminate=discriminator, first_decoder=first,
                lpips=open_lpips(args, device),
                parameters=learning(decoder, "pixel_decoder") + learning(discriminator, "discriminator"))


def open_lpips(args, device):
    """--lpips, or None. It draws random numbers, so after all that learns."""
    if args.lambda_rec == 0 or args.lpips == "none":
        return None
    return first_on_node(lambda: LPIPS(args.lpips)).to(device)


def learning(module, prefix):
    """[(name, parameter)] of what learns in a module, or in None."""
    return [] if module is None else [(name, p) for name, p in module.named_parameters(prefix)
                                      if p.requires_grad]


def load_init(model, args):
    """--init: the weights of a model that may have other parts, and a line that says which."""
    path = os.path.join(find_checkpoint(args.init), "model.safetensors")
    try:
        missing, unused = model.load_state_dict(read_safetensors(path), strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {str(error)[:300]}") from error
    if missing and args.stage == 2:
        raise UserError(f"{path} lacks {missing[0]} and {len(missing) - 1} more tensors of its model")
    for names, what in ((missing, "new: --init lacks them"), (unused, "left out: no objective trains them")):
        if names and rank() == 0:
            print(f"{len(names)} tensors are {what} ({', '.join(sorted({n.split('.')[0] for n in names}))})")


@torch.no_grad()
def scale_initial_weights(model, args):
    """--io_gain and --block_gain."""
    ends = ("patch_embed.proj.weight", "feature_bottleneck.weight", "proj_in.weight", "proj_out.weight")
    for name, p in model.named_parameters():
        if name.endswith(ends):
            p.mul_(args.io_gain)
        elif name.startswith("trunk.blocks.") and p.ndim == 2:
            p.mul_(args.block_gain)


def make_optimizer(parameters, depth, args, device):
    """Fused AdamW of [(name, parameter)] in groups by learning-rate factor, weight decay, frozen start and
    betas; lr is a 0-d tensor."""
    groups = {}
    for name, p in parameters:
        layer, factor = depth + 1, 1.0          # DINOv2's numbers: 0 for the input, i + 1 for block i
        is_adversary = name.startswith("discriminator")
        if name.startswith("trunk.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("trunk.patch_embed", "trunk.cls_token", "trunk.mask_token")):
            layer = 0
            factor = PATCH_EMBED_LR if "patch_embed" in name and args.layer_decay < 1 else 1.0
        elif name.startswith("pixel_decoder"):
            factor = args.decoder_lr
        elif is_adversary:
            factor = args.discriminator_lr
        factor *= args.layer_decay ** (depth + 1 - layer)
        starts_frozen = name.startswith("head.prototype")   # the prototypes and their gain
        kind = (factor, p.ndim >= 2 and not is_adversary, starts_frozen, is_adversary)
        groups.setdefault(kind, []).append(p)
    groups = [dict(params=params, lr_factor=factor, decays=decays, starts_frozen=frozen,
                   lr=torch.zeros((), device=device), betas=DISCRIMINATOR_BETAS if is_adversary else BETAS)
              for (factor, decays, frozen, is_adversary), params in groups.items()]
    return torch.optim.AdamW(groups, eps=ADAM_EPS, weight_decay=0.0, fused=True,
                             capturable=device.type == "cuda")


def set_schedules(state, step, n_steps):
    """Write the values of this step (from 0) into the tensors that train_step reads -> values for the log."""
    args, progress = state.args, step / n_steps
    lr = warmed_up_cosine(args.lr, MIN_LR, args.warmup, step, n_steps)
    low, high = args.teacher_temp
    values = dict(weight_decay=cosine(args.weight_decay, args.weight_decay_end, progress))
    if args.stage == 2:
        values.update(teacher_momentum=args.decoder_ema,
                      gan_weight=args.gan_weight if progress >= args.gan_start else 0.0)
    else:
        values.update(teacher_momentum=cosine(args.teacher_momentum, 1.0, progress),
                      teacher_temp=low + (high - low) * min(1.0, progress / TEMP_WARMUP))
    for name, value in values.items():
        state.scheduled[name].fill_(value)
    for group in state.optimizer.param_groups:
        is_frozen = group["starts_frozen"] and progress < FREEZE_PROTOTYPES
        group["lr"].fill_(0.0 if is_frozen else lr * group["lr_factor"])
    return dict(lr=lr, **values)


# ----- The step -------------------------------------------------------------------------------------------

def forward_backward(state, views):
    """Gradients of a step's losses -> the loss, and what the log shows: {name: 0-d tensor}."""
    chunks = [dict(zip(views, tensors)) for tensors in zip(*views.values())]
    return stage_2_gradients(state, *chunks) if state.args.stage == 2 else stage_1_gradients(state, chunks)


def stage_1_gradients(state, chunks):
    """The teacher's targets, the student's losses, the gradient of their weighted sum."""
    args = state.args
    targets = teacher_targets(state, chunks) if args.lambda_ssl > 0 else [None] * len(chunks)
    if len(chunks) == 1:
        losses, features = state.objectives(chunks[0], targets[0])
        losses |= compare_samples(features)
        weighted_sum(losses, args).backward()
    else:
        losses = gradients_by_chunks(state, chunks, targets)
    values = {f"loss_{name}": x.detach() for name, x in losses.items()}
    if args.lambda_ssl > 0:
        entropies = [torch.special.entr(of_cls).sum(dim=-1).mean() for of_cls, _ in targets]
        values["teacher_entropy"] = torch.stack(entropies).mean()
    return weighted_sum(losses, args).detach(), values


def gradients_by_chunks(state, chunks, targets):
    """The same with the graph of one chunk at a time (GradCache, Gao et al. 2021) -> {name: loss}. First all
    features, without a graph, and the gradient at them of the losses that compare samples; then each chunk
    again, whose backward starts from that gradient and its own losses. Ranks exchange gradients once."""
    args, n = state.args, len(chunks)
    with torch.no_grad():
        parts = [{name: rows.clone() for name, rows in      # some are views of all tokens
                  state.objectives(views, None, only_features=True)[1].items()} for views in chunks]
    features = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    losses, grads = compare_samples(features), []
    if features:
        grads = torch.autograd.grad(weighted_sum(losses, args), list(features.values()))
    grads = [grad.chunk(n) for grad in grads]
    for i, (views, of_teacher) in enumerate(zip(chunks, targets)):
        is_local = i < n - 1 and dist.is_initialized()
        with state.objectives.no_sync() if is_local else contextlib.nullcontext():
            own, features = state.objectives(views, of_teacher)
            roots = [(x, grad[i]) for x, grad in zip(features.values(), grads)]
            if own:
                roots.append((weighted_sum(own, args) / n, None))
            torch.autograd.backward(*zip(*roots))
        for name, loss in own.items():
            losses[name] = losses.get(name, 0.0) + loss.detach() / n
    return losses


def stage_2_gradients(state, views):
    """The decoder on the frozen encoder's latents, and the discriminator on what the decoder drew.
    Each loss's gradient goes to the pixels first, where LPIPS and discriminator end: those two gradients
    give the adaptive weight by the last layer alone, and their weighted sum then goes through the decoder.
    The discriminator's own loss stops at the pixels."""
    args, images = state.args, views["images"]
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    with autocast:
        with torch.no_grad():
            latents = state.model.encode(images)
        reconstruction = state.objectives(latents)
    fake, real = (2 * denormalize(x.float()) - 1 for x in (reconstruction, images))
    with autocast:
        loss = reconstruction_loss(fake, real, state.lpips)
    pixel_grad, = torch.autograd.grad(loss, fake)
    values = dict(loss_rec=loss.detach())
    if state.discriminator is not None:
        with autocast:
            real_logits, fake_logits = state.discriminate(real, fake)
        gan_loss, own_loss = generator_loss(fake_logits), discriminator_loss(real_logits, fake_logits)
        gan_grad, = torch.autograd.grad(gan_loss, fake, retain_graph=True)
        weight = adaptive_weight(*(last_layer_grad(state, fake, grad) for grad in (pixel_grad, gan_grad)))
        own_loss.backward(inputs=list(state.discriminator.parameters()))
        is_right = torch.cat((real_logits.flatten() > 0, fake_logits.flatten() < 0))
        values.update(loss_gan=gan_loss, loss_discriminator=own_loss, adaptive_weight=weight,
                      logits_real=real_logits.float().mean(), logits_fake=fake_logits.float().mean(),
                      discriminator_accuracy=is_right.float().mean())
        weight = state.scheduled["gan_weight"] * weight         # 0 before its start
        loss, pixel_grad = loss + weight * gan_loss, pixel_grad + weight * gan_grad
    fake.backward(pixel_grad)
    return loss.detach(), {name: x.detach() for name, x in values.items()}


def last_layer_grad(state, fake, pixel_grad):
    """Gradient of the decoder's last layer's weight, of all ranks, from that of this rank's pixels."""
    grad, = torch.autograd.grad(fake, state.student.proj_out.weight, pixel_grad, retain_graph=True)
    return sum_over_ranks(grad) / world_size()


def train_step(state, views):
    """One update. It reads no value on the host and no shape in it depends on data, so it can be captured."""
    # chunks add to DDP's buckets, where gradients stay; new ones would be held beside these
    state.optimizer.zero_grad(set_to_none=n_chunks(state.args) == 1)
    loss, values = forward_backward(state, views)
    norms = clip_gradients(state)
    grad_norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    is_finite = finite_on_all_ranks(loss + values.get("loss_discriminator", 0.0), grad_norm)
    state.is_finite.copy_(is_finite)
    update(state, is_finite)
    values |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
    if state.args.lambda_clip > 0:
        values["logit_scale"] = state.model.logit_scale.detach().exp()
    add_to_totals(state.totals, dict(loss=loss, grad_norm=grad_norm, **values), is_finite)


def clip_gradients(state):
    """Clip the gradient of encoder, decoder, text tower, head and discriminator, each by itself (DINOv2)
    -> {part: norm}."""
    parts = {}
    for name, p in state.parameters:
        first = name.partition(".")[0]
        part = dict(trunk="encoder", visual_proj="encoder", pixel_decoder="decoder", head="head",
                    discriminator="discriminator").get(first, "text")
        parts.setdefault(part, []).append(p)
    return {part: nn.utils.clip_grad_norm_(parameters, state.args.clip_grad)
            for part, parameters in parts.items()}


@torch.no_grad()
def update(state, is_finite):
    """AdamW with decoupled weight decay, then the teacher; a step that is not finite changes nothing."""
    decay = state.scheduled["weight_decay"] * is_finite
    for group in state.optimizer.param_groups:
        if group["decays"]:          # AdamW's own takes only a Python float
            torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)
    state.optimizer.found_inf = (~is_finite).float()     # where this is 1 the fused kernel skips the step
    state.optimizer.step()
    if state.args.lambda_clip > 0:
        state.model.logit_scale.clamp_(0, math.log(100))     # OpenCLIP
    if state.teacher is not None:
        momentum = torch.where(is_finite, state.scheduled["teacher_momentum"], 1.0)
        teacher, student = list(state.teacher.parameters()), list(state.student.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, torch._foreach_mul(student, 1 - momentum))


# ----- The run --------------------------------------------------------------------------------------------

@one_line_errors()
def main(argv=None):
    """Train as the arguments say."""
    device = init_distributed()
    args, config = read_settings(argv)
    by_first_rank(lambda: claim_folder(args.out))
    if device.type == "cpu":
        keep_freed_memory()
    source, tokenize, held_out, gallery = open_data(args, config)
    state = build_state(args, config, device)
    n_steps, checkpoint = args.samples // args.batch_size, os.path.join(args.out, "checkpoint.pt")
    step, flops_per_step, place = load_checkpoint(checkpoint, state, device) if args.resume else (0, 0, None)
    what = f"{source.name}, {args.batch_size} images each"
    if args.stage == 1:
        what += f" ({args.ssl_batch_size} for SSL, {args.rec_batch_size} decoded)"
    log = Log(args, state.model, what, step, n_steps, flops_per_step)
    if held_out is None and rank() == 0:
        print("no --val_data: no measures on held-out data, no pictures")
    workers = data.default_workers(args.data) if args.workers is None else args.workers
    stream = data.SampleStream(source, args.batch_size, tokenize, config.text_context_length, args.seed,
                               workers, place, args.max_skipped)
    n_before, n_readers = len(place["readers"]) if place else 0, len(stream.place["readers"])
    if n_before not in (0, n_readers) and isinstance(source, data.TarSource) and rank() == 0:
        print(f"{n_readers} readers of tars instead of {n_before}: what lay in shuffle buffers comes again")
    batches, place = iter(data.make_loader(stream, pin_memory=device.type == "cuda")), stream.place
    run_step = CapturedStep(lambda views: train_step(state, views), device.type == "cuda" and args.cuda_graph)
    eval_every = args.eval_every or math.ceil(n_steps / 5)
    with log.timing("pause"):
        if held_out is not None and step == 0:
            log.write("eval", 0, measure_now(state, tokenize, held_out, gallery, args, 0))

    with Saving(checkpoint, args.checkpoint_every or eval_every) as saving:
        while step < n_steps and not saving.stop:
            with log.timing("data"):
                batch = next(batches)
            place = stream.advance(place, batch)
            images, tokens = (x if x is None else x.to(device, non_blocking=True)
                              for x in (batch["images"], batch["tokens"]))
            views = make_views(args, config, step, images, tokens)
            scheduled = set_schedules(state, step, n_steps)
            if not log.flops_per_step:
                log.flops_per_step = count_flops(lambda: forward_backward(state, views))
            run_step(views)
            step += 1
            log.bar.update(args.batch_size)

            is_last, is_logged = step == n_steps, step % args.log_every == 0 or step == n_steps
            if is_logged:
                log.write_train(step, state.totals, scheduled, data.total_skipped(stream.gather_place(place)))
            with log.timing("pause"):
                if held_out is not None and (step % eval_every == 0 or is_last):
                    log.write("eval", step, measure_now(state, tokenize, held_out, gallery, args, step))
                if saving.is_due(step, is_logged, is_last):
                    save_checkpoint(saving, state, step, is_last, log.flops_per_step,
                                    stream.gather_place(place))
    run_step.close()
    log.bar.close()
    saving.leave_if_stopped(args, step)
    if rank() == 0:
        state.model.save_pretrained(os.path.join(args.out, "tokenizer"))
        evaluate.save_image(evaluate.training_curves(args.out), os.path.join(args.out, "curves.png"))
        print(f"done: tokenizer/ (released format), curves.png, reconstructions_*.png in {args.out}")
    leave_distributed()


def open_data(args, config):
    """-> training source, text tokenizer, and this rank's held-out and gallery batches, or None for both."""
    needs_caption, size = args.lambda_clip > 0, config.image_size
    canvas = args.canvas or (size if args.data is None else data.canvas_size(size))
    common = dict(classnames=args.classnames, label=args.label, needs_caption=needs_caption,
                  hold_out_pairs=args.hold_out_pairs)
    tokenize = None
    if needs_caption:
        tokenize = first_on_node(lambda: data.make_tokenizer(config.text_vocab_size, args.bpe))
    source = data.open_source(args.data, canvas, "train", args.train_size, **common)
    if args.data is not None and args.val_data is None:
        return source, tokenize, None, None
    folders = getattr(source, "folders", None)
    val_source = data.open_source(args.val_data, size, "val", **common, folders=folders)
    held_out = list(data.EvaluationSet(val_source, args.eval_samples))
    gallery_source = source         # what is measured is read at the image's size, as evaluate.py does
    if canvas != size:
        gallery_source = data.open_source(args.data, size, "train", args.train_size, **common)
    return source, tokenize, held_out, list(data.EvaluationSet(gallery_source, 4 * args.eval_samples))


def measure_now(state, tokenize, held_out, gallery, args, step):
    """Measure on held-out data and draw reconstructions -> the fields of a row of kind eval."""
    subject = evaluate.Subject(state.model, tokenize, bf16=args.precision == "bf16", n_layers=1)
    row, *_ = evaluate.measure(subject, held_out, gallery)
    if rank() == 0 and state.config.train_reconstruction:
        picture = evaluate.reconstruction_picture(state.model, held_out[0][0], before=state.first_decoder)
        evaluate.save_image(picture, os.path.join(args.out, f"reconstructions_{step:07d}.png"))
    return row


# ----- Shared with train_dit.py: settings -----------------------------------------------------------------

MAY_CHANGE_ON_RESUME = {"out", "resume", "workers", "log_every", "eval_every", "checkpoint_every", "compile",
                        "cuda_graph", "max_skipped",
                        "lr", "clip_grad", "precision"}     # for a run that was not finite


def number(kind, is_right, words):
    """A type for argparse: a number that is right."""
    def parse(text):
        value = kind(text)
        if not is_right(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {words}")
        return value
    parse.__name__ = f"{kind.__name__} value"       # argparse names it where kind() fails
    return parse


count = number(int, lambda x: x >= 1, "positive")
whole = number(int, lambda x: x >= 0, "positive or 0")
positive = number(float, lambda x: 0 < x < math.inf, "positive")
not_negative = number(float, lambda x: 0 <= x < math.inf, "positive or 0")
part = number(float, lambda x: 0 <= x <= 1, "between 0 and 1")
share = number(float, lambda x: 0 <= x < 1, "between 0 and 1, and below 1")


def absolute(text):
    """A type for argparse: an absolute path, so that what a run records means the same from any folder."""
    return os.path.abspath(text)


def folder_or_name(text):
    """The same of a folder; a hub id, or a word such as "auto", stays."""
    return os.path.abspath(text) if os.path.isdir(text) else text


class Settings(argparse.ArgumentParser):
    """A command line whose help shows every default; some defaults depend on the size of the model."""
    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.group, self.by_size, self.given = self, {}, {}

    def section(self, title):
        self.group = self.add_argument_group(title)

    def option(self, name, default, help, type=str, tiny=None, B=None, **kwargs):
        """tiny, B: the default of models of that size, if it is another. A list as default takes as many
        values."""
        others = {kind: value for kind, value in dict(tiny=tiny, B=B).items() if value is not None}
        shown = default
        if others:
            self.by_size[name[2:]] = (others, default)
            shown = "".join(f"{value} for {kind}, " for kind, value in others.items())
            shown += f"else {'see text' if default is None else default}"
        if isinstance(default, list):
            kwargs["nargs"] = len(default)
        self.group.add_argument(name, default=None if others else default, type=type,
                                help=f"{help} [{shown}]".replace("%", "%%"), **kwargs)

    def flag(self, name, help, yes_or_no=False, default=False):
        action = argparse.BooleanOptionalAction if yes_or_no else "store_true"
        self.group.add_argument(name, action=action, default=default, help=f"{help} [{default}]")

    def error(self, message):
        fail(message)

    def read(self, argv):
        """Arguments of a new run, whose --out must be free; with --resume those that its run began with."""
        args = self.parse_args(argv)
        checkpoint = os.path.join(args.out, "checkpoint.pt")
        recorded = evaluate.recorded_arguments(args.out)
        if not args.resume:
            if recorded and not os.path.isfile(checkpoint):
                self.error(f"--out {args.out} has a run without a checkpoint: --resume starts it anew")
            if os.path.isdir(args.out) and not all(map(is_leftover, os.listdir(args.out))):
                self.error(f"--out {args.out} is not empty: choose another, or go on with --resume")
            return args
        if not recorded:
            self.error(f"--resume: {args.out} has no run.json of a run to go on with")
        if recorded.keys() - vars(args).keys():
            self.error(f"--resume: {args.out} is a run of another script, or of another version of this one")
        known = {name: self.get_default(name) for name in vars(args)} | recorded
        # as text, numbers are checked as those of the command line are
        self.set_defaults(**{k: str(v) if type(v) in (int, float) else v
                             for k, v in recorded.items() if k not in ("resume", "out")})
        args = self.parse_args(argv)
        changed = [f"--{k} (was {v}, now {getattr(args, k, None)})" for k, v in known.items()
                   if k not in MAY_CHANGE_ON_RESUME and getattr(args, k, None) != v]
        if changed:
            self.error(f"--resume continues a run that was started with other settings: {', '.join(changed)}")
        return args

    def complete(self, args, kind):
        """Fill in the defaults that depend on the size of the model: kind is "tiny", "B" or any other."""
        self.given = vars(args).copy()
        for name, (others, default) in self.by_size.items():
            if getattr(args, name) is None:
                setattr(args, name, others.get(kind, default))

    def said(self, name, args):
        """An option and its value for a message, and that it is a default where the user did not give it."""
        return f"--{name} {getattr(args, name)}" + (" (the default here)" if self.given[name] is None else "")


def check_paths(args, data_options, file_options):
    """FileNotFoundError if one of these options names data, or a file, that is not there."""
    for where in (getattr(args, name) for name in data_options):
        if where is not None and not os.path.isdir(where):
            data.find_tars(where)
    for name in file_options:
        if getattr(args, name) and not os.path.isfile(getattr(args, name)):
            raise FileNotFoundError(f"--{name} {getattr(args, name)}: no such file")


# ----- Shared with train_dit.py: schedules and the step on a device and on ranks --------------------------

def cosine(start, end, progress):
    """From start to end, along half a cosine, as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmed_up_cosine(peak, end, warmup, step, n_steps):
    """Learning rate of a step (from 0): linear to the peak over the part `warmup` of the run, then cosine."""
    if step / n_steps < warmup:
        return peak * (step + 1) / math.ceil(warmup * n_steps)
    return cosine(peak, end, (step / n_steps - warmup) / (1 - warmup + 1e-12))


def should_compile(args, device, pays=None):
    """--compile, or whether it pays: to train on CUDA, and on a CPU for 10,000 steps. Where torch.compile
    does not work, no, and a line says why."""
    if pays is None:
        pays = device.type == "cuda" or args.samples // args.batch_size >= 10_000
    wanted = pays if args.compile is None else args.compile
    try:
        if wanted:      # a C++ compiler, Python's headers or Triton may be missing
            torch.compile(torch.neg)(torch.ones(2, device=device))
        return wanted
    except Exception as error:
        if rank() == 0:
            reason = str(error).strip().removeprefix("backend='inductor' raised:").strip().split("\n")[0]
            print(f"blocks are not compiled, as torch.compile fails here: {reason}")
        return False


def compile_blocks(*modules):
    """torch.compile each transformer block in place: small graphs, compiled once for each shape."""
    torch._dynamo.config.recompile_limit = 64       # blocks share a cache, and passes differ in shape
    torch._dynamo.config.optimize_ddp = False       # else DDP's buckets would split each block's graph
    for module in modules:
        for name, child in module.named_modules() if module is not None else ():
            if re.search(r"blocks\.\d+$", name):
                child.compile(dynamic=False)


def wrap_in_ddp(module, device):
    """DistributedDataParallel where there are ranks; on CUDA made on the side stream, as capture requires."""
    if not dist.is_initialized():
        return module
    with side_stream():
        device_ids = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids, gradient_as_bucket_view=True)
    module.broadcast_buffers = False    # they never change; newer versions warn of the argument
    return module


@functools.cache
def capture_stream():
    """The one side stream. On several, each would keep its own freed memory, and a gradient would be added up
    on another stream than that on which DDP was made."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def side_stream():
    """On CUDA, a stream that waits for what is under way, and that the current one then waits for."""
    if not torch.cuda.is_available():
        yield
        return
    capture_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture_stream()):
        yield
    torch.cuda.current_stream().wait_stream(capture_stream())


class CapturedStep:
    """step(inputs), inputs a dict of tensors of static shape: eager on a CPU, a CUDA graph replayed on a GPU.
    The first WARM_UP calls run eagerly on the side stream (DDP needs 11), the next one captures; all read the
    same tensors, since for other strides a compiled block would be compiled anew, which a capture forbids.
    The step must leave its results in tensors that outlive it. Before leaving the process group, close() it.
    """

    WARM_UP = 11

    def __init__(self, step, enabled):
        self.step, self.enabled, self.calls, self.static, self.graph = step, enabled, 0, None, None

    def __call__(self, inputs):
        if not self.enabled:
            return self.step(inputs)
        if self.static is None:
            self.static = {k: torch.empty_like(v, memory_format=torch.contiguous_format)
                           for k, v in inputs.items()}
        for name, value in inputs.items():
            self.static[name].copy_(value)
        if self.calls < self.WARM_UP:
            self.calls += 1
            with side_stream():
                return self.step(self.static)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            atexit.register(self.close)
            # thread_local: the loader pins memory in a thread of its own
            with torch.cuda.graph(self.graph, stream=capture_stream(), capture_error_mode="thread_local"):
                self.step(self.static)
        self.graph.replay()

    def close(self):
        """Drop the graph: NCCL waits for ever when it is shut down under a graph that holds its work (PyTorch
        issue 115388). The end of the program does this too, so that one that an exception ends does end."""
        atexit.unregister(self.close)
        if self.graph is not None:
            torch.cuda.synchronize()
            self.graph.reset()
            self.graph = None


class NoModuleTracker(ModuleTracker):
    """For FLOPs of the whole, not by module."""
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def count_flops(compute):
    """FLOPs of compute(), backward included, over all ranks: of matrix products, convolutions, attention.
    Compiled blocks run eagerly meanwhile, or the counter would not see into them. It knows every fused
    attention but the CPU's, whose formula is that of the others."""
    def fused_attention(query_shape, key_shape, value_shape, *_, **__):
        return sdpa_flop_count(query_shape, key_shape, value_shape)
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: fused_attention})
    # hooks of the module tracker would keep what --checkpoint_blocks recomputes: 5 times the step's memory
    counter.mod_tracker = NoModuleTracker()
    is_compiled = "torch._dynamo" in sys.modules        # else its import, of a second, is spared
    with torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext(), counter:
        with side_stream():
            compute()
    return counter.get_total_flops() * world_size()


@torch.no_grad()
def finite_on_all_ranks(loss, grad_norm):
    """Are this step's loss and gradient finite on every rank? A 0-d bool tensor, the same on all of them."""
    return sum_over_ranks((~torch.isfinite(loss.detach() + grad_norm)).float()) == 0


def add_to_totals(totals, values, is_finite):
    """Add a step's values (0-d tensors) to the sums since the last log line, unless it was not finite.
    The sums are made in the first step and then changed in place, so that a captured step can add to them."""
    counts = dict(finite_steps=torch.ones_like(is_finite), steps=torch.ones_like(is_finite))
    for name, value in {**values, **counts}.items():
        totals.setdefault(name, torch.zeros((), device=value.device))
        totals[name] += value.detach() if name == "steps" else torch.where(is_finite, value.detach(), 0.0)


# ----- Shared with train_dit.py: checkpoints and the log --------------------------------------------------

class Saving:
    """When a run saves: every so many steps, 15 minutes after the last time, at the end, and when it is asked
    to stop. A first Ctrl-C or SIGTERM asks for that. A second one ends the process at once, if it comes more
    than a second later: a scheduler's signal may come twice, as torchrun passes it on."""

    SECONDS = 900
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, path, every):
        self.path, self.every, self.saved_at = path, every, time.monotonic()
        self.asked = self.stop = None       # signals: what this process got, what all ranks agreed on

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _):
        if self.asked is None:
            self.asked, self.asked_at = number, time.monotonic()
            if rank() == 0:     # a print could be under way
                os.write(2, b"\nstopping after this step, with a checkpoint; once more stops it at once\n")
        elif time.monotonic() > self.asked_at + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def is_due(self, step, is_logged, is_last):
        """Save after this step? Ranks must agree on that and on the step to stop after. They ask each other
        where they wait for each other anyway, at log lines."""
        is_late = False
        if is_logged or world_size() == 1:
            is_late = time.monotonic() > self.saved_at + self.SECONDS
            asked, is_late = zip(*gather_objects((self.asked, is_late)))
            self.stop, is_late = next(filter(None, asked), None), is_late[0]
        return step % self.every == 0 or is_last or is_late or self.stop is not None

    def leave_if_stopped(self, args, step):
        """End the program if a signal did not let the run come to its end."""
        if self.stop and step < args.samples // args.batch_size:
            if rank() == 0:
                print(f"stopped after step {step}, which checkpoint.pt holds. To go on: --out {args.out} "
                      "--resume")
            leave_distributed()
            sys.exit(128 + self.stop)


def save_checkpoint(saving, state, step, is_last, flops_per_step, place=None):
    """Everything needed to go on, by rank 0. place: as of SampleStream; None if the step says it.
    UserError: weights, or the last step of the run, are not finite. What a full disk prevents, or a step that
    was not finite, as the next ones may not be either, is tried again later; OSError if there is no later."""
    content = {name: module.state_dict() for name, module in state.modules().items()}
    content.update(optimizer=state.optimizer.state_dict(), totals=state.totals, step=step,
                   flops_per_step=flops_per_step, place=place)
    tensors = [t for name in state.modules() for t in content[name].values()]
    tensors += [t for moments in content["optimizer"]["state"].values() for t in moments.values()]
    are_finite = bool(torch.stack([t.isfinite().all() for t in tensors]).all())
    if not are_finite or is_last and not state.is_finite:
        what = "the last step was" if are_finite else "weights are"
        raise UserError(f"{what} not finite at step {step}. {how_to_go_on(state.args)}")
    can_wait = not is_last and not saving.stop

    def write():
        try:
            if can_wait and not state.is_finite:
                raise OSError("the last step was not finite")
            write_atomically(saving.path, lambda f: torch.save(content, f), sum(t.nbytes for t in tensors))
        except OSError as error:
            if not can_wait:
                raise
            tqdm.write(f"no checkpoint at step {step}, the run goes on and tries again: {error}")
    by_first_rank(write)
    saving.saved_at = time.monotonic()


def how_to_go_on(args):
    """Advice for a run that is no longer finite."""
    is_saved = os.path.isfile(os.path.join(args.out, "checkpoint.pt"))
    start = "its last checkpoint (or anew, if you delete that)" if is_saved else "the start"
    return (f"A lower rate may help, or --precision fp32: --out {args.out} --resume --lr {args.lr / 10:.2g} "
            f"goes on from {start}")


def load_checkpoint(path, state, device):
    """Restore what save_checkpoint wrote -> step, FLOPs of a step, place; (0, 0, None) if it wrote nothing.
    ValueError names a file that is broken, or of another model."""
    if not os.path.isfile(path):
        return 0, 0, None
    content = load_tensors(path, device)
    try:
        for name, module in state.modules().items():
            module.load_state_dict(content[name])
        state.optimizer.load_state_dict(content["optimizer"])
        state.totals.update(content["totals"])
        return content["step"], content["flops_per_step"], content["place"]
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is broken or of another model ({reason}): put a copy there, or delete it "
                         "and --resume starts the run anew") from error


def record_run(args, step):
    """Write run.json: arguments, git state, versions, machine. What made the numbers in this folder.
    Where --resume changes arguments, "before" keeps the record that held until then, with the step."""
    def git(command):
        folder = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(f"git {command}", shell=True, capture_output=True, text=True, cwd=folder).stdout
    path, arguments = os.path.join(args.out, "run.json"), {**vars(args), "resume": False}
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    record = dict(arguments=arguments, command=" ".join(sys.argv), world_size=world_size(),
                  started=time.strftime("%Y-%m-%d %H:%M:%S %z"), git_commit=git("rev-parse HEAD").strip(),
                  git_changes=git("status --short").splitlines(), python=platform.python_version(),
                  torch=torch.__version__, machine=platform.platform(),
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else device)
    if args.resume:
        with open(path, encoding="utf-8") as f:
            before = json.load(f)
        if {**before["arguments"], "out": args.out} == arguments:
            return
        record["before"] = {**before, "until_step": step}
    text = json.dumps(record, indent=2).encode() + b"\n"
    write_atomically(path, lambda f: f.write(text))


def matmul_rate(device):
    """FLOP/s of a bf16 matrix product, measured here and now: what a step's rate is compared with.
    A CPU tries larger ones until one takes 50 ms: without instructions for bf16 a large one takes minutes."""
    for n in (256, 512, 1024, 2048) if device.type == "cpu" else (8192,):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)

        def multiply():
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize()
        seconds = min(timeit.repeat(multiply, repeat=5, number=1))
        if seconds > 0.05:
            break
    return 2 * n ** 3 / seconds


class Log:
    """metrics.jsonl, the same on screen, and the progress bar, all by rank 0. Rows have the fields

    kind                  train (means since the last row) or eval (held-out data: see evaluate.measure)
    step, samples, flops  so far, over all ranks, with what --checkpoint_blocks or --micro_batch compute again
    loss, loss_clip, loss_rec, loss_dino, loss_mim, loss_koleo, logit_scale
    grad_norm             of all, before clipping; and _encoder, _decoder, _text, _head, _discriminator
    loss_gan, loss_discriminator, adaptive_weight, logits_real, logits_fake, discriminator_accuracy: stage 2;
                          an accuracy near 1, or of 0.5 for long, is a game that one side has lost
    teacher_entropy       nats, of the teacher's targets; teacher_entropy_uniform would be collapse
    lr, weight_decay, teacher_momentum (stage 2: --decoder_ema), teacher_temp, gan_weight
    samples_per_second, flops_per_second
    matmul_share          of the rate of a bf16 matrix product, measured at the start
    data_share            part of the time in which the loop waited for the loader
    skipped_samples       unusable ones since the run began; skipped_steps: not finite, since the last row"""

    LINE = ("loss {loss:.4f}", "clip {loss_clip:.3f}", "rec {loss_rec:.3f}", "dino {loss_dino:.3f}",
            "mim {loss_mim:.3f}", "koleo {loss_koleo:.3f}", "gan {loss_gan:.3f}",
            "times {adaptive_weight:.3f}", "grad {grad_norm:.2f}", "discriminator {loss_discriminator:.3f}",
            "grad {grad_norm_discriminator:.2f}", "logits {logits_real:.2f} of real,",
            "{logits_fake:.2f} of fake", "{discriminator_accuracy:.0%} right", "scale {logit_scale:.1f}",
            "teacher entropy {teacher_entropy:.2f} of {teacher_entropy_uniform:.2f}", "lr {lr:.1e}",
            "{samples_per_second:.0f} samples/s", "{matmul_share:.0%} of matmul", "data {data_share:.0%}",
            "skipped {skipped_samples} samples", "{skipped_steps} steps (not finite)",
            "held-out: PSNR {psnr:.2f} dB", "image to text {image_to_text:.1%}",
            "text to image {text_to_image:.1%} (chance {retrieval_chance:.1%})",
            "class from latents: linear {linear_probe:.1%}", "k-NN {knn:.1%} (chance {chance:.1%})",
            "class by the judge: samples {sample_accuracy:.1%}, real images {real_accuracy:.1%}")

    def __init__(self, args, model, what, step, n_steps, flops_per_step):
        """what: the data, in words. A resumed run drops the rows of steps that it will do again."""
        self.args, self.flops_per_step = args, flops_per_step
        self.path, device = os.path.join(args.out, "metrics.jsonl"), next(model.parameters()).device
        self.peak = matmul_rate(device) * world_size()
        if rank() == 0:
            os.makedirs(args.out, exist_ok=True)
            record_run(args, step)
            rows = evaluate.read_metrics(args.out) if step else []
            kept = "".join(json.dumps(row) + "\n" for row in rows if row.get("step", math.inf) <= step)
            write_atomically(self.path, lambda f: f.write(kept.encode()))
            n_parameters = sum(p.numel() for p in model.parameters())
            name = getattr(args, "init", None) or args.model
            print(f"{name}: {n_parameters / 1e6:.1f}M parameters, {n_steps} steps on {what}; "
                  f"{world_size()} x {device.type}, matmul {self.peak / 1e9:.0f} GFLOP/s", flush=True)
        self.bar = tqdm(total=n_steps * args.batch_size, initial=step * args.batch_size, unit=" samples",
                        disable=rank() != 0, smoothing=0.05, dynamic_ncols=True)
        self.reset(step)

    def reset(self, step):
        self.clock, self.seconds, self.last_step = time.perf_counter(), dict(data=0.0, pause=0.0), step

    @contextlib.contextmanager
    def timing(self, what):
        """Time that counts as "data", for data_share, or as "pause": rates are of training alone."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def write_train(self, step, totals, scheduled, skipped):
        """A row of kind train from totals, which start anew. UserError if not one step was finite."""
        sums = dict(zip(totals, (sum_over_ranks(torch.stack(list(totals.values()))) / world_size()).tolist()))
        for total in totals.values():
            total.zero_()
        n_finite, n_steps = sums.pop("finite_steps"), sums.pop("steps")
        if n_finite == 0:
            raise UserError(f"loss or gradient was not finite in all of the last {n_steps:.0f} steps. "
                            + how_to_go_on(self.args))
        means = {name: x / n_finite for name, x in sums.items()}
        if "teacher_entropy" in means:
            means["teacher_entropy_uniform"] = math.log(self.args.prototypes)
        seconds = time.perf_counter() - self.clock - self.seconds["pause"]
        steps_per_second = (step - self.last_step) / seconds
        rate = self.flops_per_step * steps_per_second
        rates = dict(samples_per_second=self.args.batch_size * steps_per_second, flops_per_second=rate,
                     matmul_share=rate / self.peak, data_share=self.seconds["data"] / seconds,
                     skipped_samples=sum(skipped.values()), skipped_steps=round(n_steps - n_finite))
        self.write("train", step, {**means, **scheduled, **rates}, skipped)
        self.reset(step)

    def write(self, kind, step, fields, skipped=()):
        """Append a row, and show its line above the progress bar."""
        if rank() != 0:
            return
        row = {"kind": kind, "step": step, "samples": step * self.args.batch_size,
               "flops": step * self.flops_per_step, **fields}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        texts = [f"step {step:>6}"]
        shown = {name: x for name, x in row.items() if x or not name.startswith("skipped")}
        for text in self.LINE:
            with contextlib.suppress(KeyError):                 # a row has only some of the fields
                texts.append(text.format(**shown))
        tqdm.write("  ".join([*texts, *(f"({n} {reason})" for reason, n in sorted(dict(skipped).items()))]))


if __name__ == "__main__":
    main()
