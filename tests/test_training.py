"""The training script: what a step computes, counted FLOPs, exact resume, ranks that change nothing, steps
that are not finite, the command line, files."""
import copy
import errno
import functools
import gc
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import train_dit
import train_tokenizer as train
import vtp
from conftest import ROOT, NothingAsked, run_script
from losses import LPIPS
from test_data import sample, write_tar
from vtp import VTP, read_safetensors, samples_kept, vtp_config

FAST = ["--samples", "48", "--batch_size", "4", "--ssl_batch_size", "2", "--rec_batch_size", "2",
        "--prototypes", "32", "--n_local", "2", "--train_size", "64", "--eval_samples", "16",
        "--log_every", "1", "--precision", "fp32", "--teacher_momentum", "0.992",
        "--teacher_temp", "0.04", "0.07"]
AUTOENCODER = ["--lambda_clip", "0", "--lambda_ssl", "0"]


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    """An SSL head as small as the micro model."""
    monkeypatch.setattr(train, "TINY_HEAD_SIZE", (32, 16))


def setting(micro_model, out, *more, device="cpu", common=FAST):
    """Arguments, config and state of a micro run, and the function step -> its batch of views."""
    args, config = train.read_settings(["--init", micro_model, "--out", str(out), *common, *more])
    state = train.build_state(args, config, torch.device(device))
    source = data.BuiltinSource(args.batch_size, config.image_size)
    images = torch.tensor(source.images, device=device)
    tokens = data.word_tokenizer(source.captions, config.text_context_length).to(device)
    return args, config, state, lambda step: train.make_views(args, config, step, images, tokens)


def chunks_of(views):
    """[views of a chunk]"""
    return [dict(zip(views, tensors)) for tensors in zip(*views.values())]


def everything_in(state):
    """Copies of all tensors that training changes."""
    modules = state.modules().values()
    tensors = [t for module in modules for t in module.state_dict().values()]
    tensors += [t for moments in state.optimizer.state.values() for t in moments.values()]
    return [t.clone() for t in tensors]


def rows_of(out, kind, *fields):
    rows = [r for r in evaluate.read_metrics(str(out)) if r["kind"] == kind]
    return [[r[f] for f in ("step", *fields)] for r in rows]


# ----- Counted FLOPs --------------------------------------------------------------------------------------

def blocks_flops(depth, dim, ffn, n_samples, n_tokens, drop_path=0.0):
    """Forward FLOPs of transformer blocks: 2 for each weight of a linear and token, two N x N products of
    attention. ffn: weights of a block's feed-forward layer. Norms, activations and softmax are left out."""
    kept = samples_kept(n_samples, drop_path) if drop_path else n_samples
    return depth * kept * (2 * n_tokens * (4 * dim * dim + ffn) + 4 * n_tokens * n_tokens * dim)


def ffn_weights(dim, kind):
    """Weights, without biases, of a block's feed-forward layer at ratio 4."""
    inner = 4 * dim
    if kind == "mlp":
        return 2 * dim * inner
    inner = int(inner * 2 / 3)
    return 3 * dim * (inner + -inner % 8)


def lpips_flops(side):
    """Forward FLOPs of LPIPS' convolutions on one image."""
    width, total = 3, 0
    for layer in LPIPS.LAYERS:
        if layer == "pool":
            side //= 2
        else:
            total += 2 * 9 * width * layer * side ** 2
            width = layer
    return total


def step_flops(config, args):
    """FLOPs of one training step of a micro model on one rank, by the sizes of its matrix products.

    Forward and backward: three times the forward, but two times for the patch embedding, whose input needs no
    gradient, once for the teacher and, of LPIPS' frozen network, twice for the reconstruction and once for
    the target.
    """
    dim, d, side = config.vision_embed_dim, config.vision_feature_bottleneck, config.image_size
    n_patches, patch_values, total = (side // 16) ** 2, 3 * 16 ** 2, 0
    B, b_rec, b_ssl = args.batch_size, args.rec_batch_size, args.ssl_batch_size

    def encoder(n_samples, side, drop_path=0.0, is_teacher=False):
        n, ffn = (side // 16) ** 2, ffn_weights(dim, config.vision_ffn_layer)
        embed = 2 * n_samples * n * patch_values * dim
        blocks = blocks_flops(config.vision_depth, dim, ffn, n_samples, n + 1, drop_path)
        return embed + blocks if is_teacher else 2 * embed + 3 * blocks
    if args.lambda_clip or args.lambda_rec:
        total += encoder(B if args.lambda_clip else b_rec, side, args.drop_path)
    if args.lambda_clip:
        D, L = config.text_embed_dim, config.text_context_length
        text = blocks_flops(config.text_depth, D, ffn_weights(D, "mlp"), B, L) + 2 * B * D * D
        total += 3 * (text + 2 * B * dim * D + 2 * (2 * B * B * D))     # the last: similarities, both ways
    if args.lambda_rec:
        D = config.decoder_embed_dim
        linears = 2 * b_rec * n_patches * (dim * d + d * D + D * patch_values)
        ffn = ffn_weights(D, config.decoder_ffn_layer)
        total += 3 * (linears + blocks_flops(config.decoder_depth, D, ffn, b_rec, n_patches))
        total += 3 * b_rec * lpips_flops(side) if args.lpips != "none" else 0
    if args.lambda_ssl:
        total += encoder(2 * b_ssl, side, args.drop_path_ssl) + encoder(2 * b_ssl, side, is_teacher=True)
        total += encoder(args.n_local * b_ssl, 2 * config.vision_patch_size, args.drop_path_ssl)
        hidden, out = train.TINY_HEAD_SIZE
        row = 2 * (dim * hidden + hidden * hidden + hidden * out + out * args.prototypes)
        masked = b_ssl * round(sum(train.MASK_RATIO) * n_patches) // 2
        total += row * (3 * args.n_local * b_ssl + 4 * (2 * b_ssl + masked))
        total += 2 * (2 * b_ssl * b_ssl * dim)      # KoLeo's search for neighbours, in two crops
    return total


@pytest.mark.parametrize("more", [
    [],
    AUTOENCODER,
    ["--lambda_rec", "0"],
    ["--lambda_clip", "0"],
    ["--drop_path", "0.5", "--drop_path_ssl", "0.5"]])
def test_counted_flops_are_those_of_the_matrix_products(micro_model, tmp_path, more):
    args, config, state, views = setting(micro_model, tmp_path / "o", *more)
    train.set_schedules(state, 0, 10)
    views = views(0)
    counted = train.count_flops(lambda: train.forward_backward(state, views))
    assert counted == pytest.approx(step_flops(config, args), rel=1e-3)


def test_counted_flops_include_those_of_lpips(micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LPIPS", lambda weights: LPIPS(None))
    folder = tmp_path / "weights"
    folder.mkdir()
    args, config, state, views = setting(micro_model, tmp_path / "o", *AUTOENCODER, "--lpips", str(folder))
    train.set_schedules(state, 0, 10)
    views = views(0)
    counted = train.count_flops(lambda: train.forward_backward(state, views))
    assert counted == pytest.approx(step_flops(config, args), rel=1e-3)


def test_counted_flops_include_recomputation_and_are_of_all_ranks(micro_model, tmp_path, monkeypatch):
    counts = []
    for more in ([], ["--checkpoint_blocks"]):
        args, config, state, views = setting(micro_model, tmp_path / "o", *AUTOENCODER, *more)
        train.set_schedules(state, 0, 10)
        batch = views(0)
        counts.append(train.count_flops(lambda: train.forward_backward(state, batch)))
    ffn, n = ffn_weights(config.vision_embed_dim, config.vision_ffn_layer), args.rec_batch_size
    blocks = blocks_flops(config.vision_depth, config.vision_embed_dim, ffn, n, 17)
    ffn = ffn_weights(config.decoder_embed_dim, config.decoder_ffn_layer)
    blocks += blocks_flops(config.decoder_depth, config.decoder_embed_dim, ffn, n, 16)
    # a block's last product is not needed again
    assert 0.7 * blocks < counts[1] - counts[0] <= blocks
    monkeypatch.setattr(train, "world_size", lambda: 8)
    assert train.count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 8 * 2 * 3 * 5 * 7


def test_counting_flops_changes_neither_weights_nor_the_steps_that_follow(micro_model, tmp_path):
    after = []
    for counts in (False, True):
        _, _, state, views = setting(micro_model, tmp_path / "o", "--drop_path", "0.5", "--warmup", "0")
        before = everything_in(state)
        train.set_schedules(state, 0, 10)
        if counts:
            batch = views(0)
            train.count_flops(lambda: train.forward_backward(state, batch))
            assert all(torch.equal(a, b) for a, b in zip(before, everything_in(state)))
            assert all(total == 0 for total in state.totals.values())
        losses = []
        for step in range(3):
            train.set_schedules(state, step, 10)
            train.train_step(state, views(step))
            losses.append({k: v.item() for k, v in state.totals.items()})
        after.append((losses, everything_in(state)))
    assert after[0][0] == after[1][0] and after[0][0][-1]["finite_steps"] == 3
    assert all(torch.equal(a, b) for a, b in zip(after[0][1], after[1][1]))


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once."""
    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}:
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, n_bytes):
        self.live -= n_bytes


def test_counting_flops_takes_no_more_memory_than_the_step(micro_model, tmp_path):
    _, _, state, views = setting(micro_model, tmp_path / "o", "--checkpoint_blocks")
    views, peaks = views(0), []
    train.forward_backward(state, views)        # gradients exist
    gc.collect()
    gc.disable()        # it would free what is kept, though too late
    try:
        for run in (lambda compute: compute(), train.count_flops):
            with LiveBytes() as mode:
                run(lambda: train.forward_backward(state, views))
            peaks.append(mode.peak)
    finally:
        gc.enable()
    assert peaks[1] == peaks[0]


# ----- The step -------------------------------------------------------------------------------------------

def test_the_loss_is_the_weighted_sum_of_the_objectives(micro_model, tmp_path, monkeypatch):
    weights = ["--lambda_rec", "0.3", "--lambda_ssl", "0.7", "--lambda_clip", "1.9"]
    _, _, state, views = setting(micro_model, tmp_path / "o", *weights)
    monkeypatch.setattr(train, "KOLEO_WEIGHT", 0.25)
    train.set_schedules(state, 0, 10)
    loss, values = train.forward_backward(state, views(0))
    losses = {name: x.item() for name, x in values.items() if name.startswith("loss")}
    assert list(losses) == ["loss_rec", "loss_dino", "loss_mim", "loss_clip", "loss_koleo"]
    rec, dino, mim, clip, koleo = losses.values()
    expected = 0.3 * rec + 0.7 * (dino + mim + 0.25 * koleo) + 1.9 * clip
    assert loss.item() == pytest.approx(expected, rel=1e-6)      # an fp32 sum of five


def test_one_step_is_adamw_with_decoupled_decay_clipping_and_ema(micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "FREEZE_PROTOTYPES", 0.5)
    more = ["--clip_grad", "0.5", "--layer_decay", "0.5", "--decoder_lr", "3", "--warmup", "0",
            "--lr", "0.01"]
    args, config, state, views = setting(micro_model, tmp_path / "o", *more)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    teacher_before = [p.clone() for p in state.teacher.parameters()]
    head = copy.deepcopy(state.head.state_dict())
    train.set_schedules(state, 1, 10)
    train.train_step(state, views(1))
    ends = ((0.01, 1e-6), (0.04, 0.4), (0.992, 1.0))
    lr, decay, momentum = (train.cosine(start, end, 0.1) for start, end in ends)
    after = state.model.state_dict()
    grads = {k: p.grad for k, p in state.model.named_parameters() if p.grad is not None}
    for prefixes in (("trunk", "visual_proj"), ("pixel_decoder",)):
        norms = torch.stack([g.norm() for k, g in grads.items() if k.startswith(prefixes)])
        assert torch.linalg.vector_norm(norms) <= 0.5 * (1 + 1e-4)     # the norms' rounding in fp32
    for name, factor, decays in (
            ("trunk.blocks.1.mlp.w1.weight", 0.5, True),
            ("trunk.blocks.0.attn.qkv.weight", 0.25, True),
            ("trunk.blocks.0.norm1.weight", 0.25, False),
            ("pixel_decoder.proj_in.bias", 3.0, False),
            ("trunk.cls_token", 0.125, True),
            ("trunk.patch_embed.proj.weight", 0.2 * 0.125, True),
            ("logit_scale", 1.0, False)):
        g = grads[name]
        step = g / (g.abs() + 1e-8)        # Adam's first step, both moments without bias
        expected = before[name] * (1 - lr * factor * decay * decays) - lr * factor * step
        # fp32: the optimizer takes the step from its two moments
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-4,
                                   msg=lambda m: f"{name}: {m}")
    for name, value in state.head.state_dict().items():      # prototypes are frozen at first, with their gain
        assert torch.equal(value, head[name]) == name.startswith("prototype"), name
    students = state.student.parameters()
    for old, teacher, student in zip(teacher_before, state.teacher.parameters(), students):
        # the step takes 1 - momentum in fp32, which keeps 5 digits of it
        expected = momentum * old + (1 - momentum) * student
        torch.testing.assert_close(teacher, expected, atol=1e-7, rtol=1e-5)


def test_without_layer_decay_all_of_the_encoder_learns_at_one_rate(micro_model, tmp_path):
    _, _, state, _ = setting(micro_model, tmp_path / "o", "--layer_decay", "1", "--decoder_lr", "3")
    names = {id(p): name for name, p in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        for name in (names.get(id(p), "head") for p in group["params"]):
            assert group["lr_factor"] == (3 if name.startswith("pixel_decoder") else 1), name


def test_schedules_have_their_ends_and_are_fractions_of_the_run(micro_model, tmp_path):
    args, _, state, _ = setting(micro_model, tmp_path / "o")
    for n in (100, 1000):
        values = [train.set_schedules(state, s, n) for s in range(n)]
        first, middle, last = values[0], values[n // 2], values[-1]
        # 14: a warm-up that is no whole number
        assert max(train.set_schedules(state, s, 14)["lr"] for s in range(14)) <= args.lr
        assert first["lr"] == pytest.approx(args.lr / (n / 10))
        assert max(v["lr"] for v in values) == pytest.approx(args.lr, rel=1e-3)
        assert middle["lr"] == pytest.approx(train.cosine(args.lr, 1e-6, 0.4 / 0.9), rel=1e-6)
        assert first["teacher_temp"] == 0.04
        assert values[3 * n // 10]["teacher_temp"] == pytest.approx(0.07) == last["teacher_temp"]
        # the last step is one short of the cosine's end, by (pi / n)^2 / 4 of the way
        assert first["teacher_momentum"] == pytest.approx(0.992)
        assert last["teacher_momentum"] == pytest.approx(1, abs=1e-4)
        assert first["weight_decay"] == pytest.approx(0.04)
        assert last["weight_decay"] == pytest.approx(0.4, abs=1e-3)
    for step, rests in ((9, True), (10, False)):      # prototypes, for 1 % of the run
        train.set_schedules(state, step, 1000)
        rates = {group["starts_frozen"]: group["lr"].item() for group in state.optimizer.param_groups}
        assert (rates[True] == 0) == rests and rates[False] > 0


def test_dino_loss_pairs_each_student_view_with_every_teacher_view_of_another_crop(micro_model, tmp_path):
    args, config, state, views = setting(micro_model, tmp_path / "o")
    views = views(0)
    train.set_schedules(state, 0, 10)
    views, = chunks_of(views)
    targets, = train.teacher_targets(state, [views])
    losses, _ = state.objectives(views, targets)
    model, masks, b = state.model, views["masks"], 2

    def cross_entropy(teacher, student):
        return -(teacher * (student / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    with torch.no_grad():
        cls, patches = model.features(views["global_crops"], masks)
        local_cls, _ = model.features(views["local_crops"])
        logits = [state.head(c) for c in (*cls.split(b), *local_cls.split(b))]
        teachers = targets[0].split(b)
        pairs = [cross_entropy(teachers[t], logits[s]).mean()
                 for t in range(2) for s in range(4) if s != t]
        assert len(pairs) == 2 + 2 * args.n_local
        expected = torch.stack(pairs).mean()
        # here and below: fp32 sums in another order
        torch.testing.assert_close(losses["dino"], expected, atol=1e-5, rtol=1e-5)
        # row-major
        rows = [(crop, patch) for crop in range(4) for patch in range(16) if masks[crop, patch]]
        assert views["mask_indices"].tolist() == [16 * crop + patch for crop, patch in rows]
        student = state.head(torch.stack([patches[r] for r in rows]))
        total = sum(cross_entropy(targets[1][i], student[i]) / masks[crop].sum()
                    for i, (crop, _) in enumerate(rows))
        torch.testing.assert_close(losses["mim"], total / 4, atol=1e-5, rtol=1e-5)


def test_the_head_in_chunks_has_the_losses_and_gradients_of_the_whole(micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HEAD_ROWS", 3)      # of 4, 4 and 10 rows
    results, n_logits = [], []
    for more in ([], ["--checkpoint_blocks"]):
        _, _, state, views = setting(micro_model, tmp_path / "o", "--lambda_clip", "0", *more)
        state.head.register_forward_hook(lambda head, inputs, logits: n_logits.append(len(logits)))
        train.set_schedules(state, 0, 10)
        _, losses = train.forward_backward(state, views(0))
        # further down, RoPE's bfloat16 makes jumps of differences in the last bit
        parameters = (*state.head.parameters(), *state.model.trunk.norm.parameters())
        results.append([*losses.values(), *(p.grad for p in parameters)])
    assert n_logits[:3] == [4, 4, 10] and max(n_logits[3:]) == 3
    for whole, in_chunks in zip(*results):
        torch.testing.assert_close(in_chunks, whole, atol=1e-5, rtol=1e-5)       # fp32 sums in another order


def test_autoencoder_baseline_builds_neither_teacher_nor_text_tower(micro_model, tmp_path):
    args, config, state, views = setting(micro_model, tmp_path / "o", *AUTOENCODER)
    assert state.teacher is None and state.head is None
    assert not hasattr(state.model, "text_transformer")
    train.set_schedules(state, 0, 10)
    assert set(views(0)) == {"images"}
    train.train_step(state, views(0))
    trained = [p for p in state.model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)                # DDP would stop otherwise


@pytest.mark.parametrize("more", [
    ["--lambda_rec", "0"],
    ["--lambda_clip", "0"],
    ["--lambda_ssl", "0"],
    []])
def test_every_trained_parameter_gets_a_gradient(micro_model, tmp_path, more):
    _, _, state, views = setting(micro_model, tmp_path / "o", *more)
    train.set_schedules(state, 0, 10)
    train.train_step(state, views(0))
    trained = [(n, p) for n, p in state.objectives.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None] == []


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(micro_model, tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr(train, "matmul_rate", lambda device: 1e9)
    args, _, state, views = setting(micro_model, tmp_path / "o")
    log = train.Log(args, state.model, "scenes", step=0, n_steps=10, flops_per_step=1e6)
    scheduled = train.set_schedules(state, 2, 10)
    train.train_step(state, views(0))
    before, totals = everything_in(state), {k: v.item() for k, v in state.totals.items()}
    broken = views(1)
    broken["images"] = broken["images"] * math.nan
    train.train_step(state, broken)
    assert all(torch.equal(a, b) for a, b in zip(before, everything_in(state)))
    totals["steps"] += 1
    assert {k: v.item() for k, v in state.totals.items()} == totals
    log.write_train(2, state.totals, scheduled, {"no caption": 3})
    row, = evaluate.read_metrics(args.out)
    assert row["skipped_steps"] == 1 and row["skipped_samples"] == 3
    for name in ("loss", "grad_norm", "loss_koleo"):      # of the other step
        assert row[name] == totals[name]
    printed = capsys.readouterr().out
    for words in ("1 steps (not finite)", "skipped 3 samples", "(3 no caption)"):
        assert words in printed
    assert all(total == 0 for total in state.totals.values())      # a new line starts anew
    train.train_step(state, broken)
    with pytest.raises(RuntimeError, match="not finite in all of the last 1 steps"):
        log.write_train(3, state.totals, scheduled, {})


# ----- Batches beyond memory ------------------------------------------------------------------------------

def joined(views, args):
    """Views of several chunks as one: every n-th sample is of the same chunk."""
    def join(x, n_crops):
        return x.unflatten(1, (n_crops, -1)).movedim(0, 2).flatten(0, 2)[None]

    def join_keep(keep, n_crops, m):        # rows of a chunk -> rows of the whole
        n = len(keep)
        crop, sample = keep // m, keep % m
        rows = crop * m * n + sample * n + torch.arange(n)[:, None, None, None]
        return rows.movedim(0, 2).flatten(2)[None]
    n_crops = dict(global_crops=2, masks=2, local_crops=args.n_local)
    names = [k for k in views if "keep" not in k and k != "mask_indices"]
    whole = {k: join(views[k], n_crops.get(k, 1)) for k in names}
    for name, of in dict(keep="images", keep_global="global_crops", keep_local="local_crops").items():
        if name in views:
            crops = n_crops.get(of, 1)
            whole[name] = join_keep(views[name], crops, views[of].shape[1] // crops)
    if "masks" in whole:
        whole["mask_indices"] = whole["masks"].flatten().nonzero().T
    return whole


@pytest.mark.parametrize("more", [
    [], ["--drop_path", "0.5", "--drop_path_ssl", "0.5"], ["--checkpoint_blocks"], AUTOENCODER,
    ["--lambda_clip", "0"], ["--lambda_ssl", "0", "--lambda_rec", "0"]], ids=lambda more: " ".join(more))
def test_chunks_have_the_losses_and_gradients_of_the_whole_batch(micro_model, tmp_path, more,
                                                                 rotation_in_fp32):
    sizes = ["--batch_size", "16", "--ssl_batch_size", "8", "--rec_batch_size", "8", *more]
    results = []
    chunks = setting(micro_model, tmp_path / "o", *sizes, "--micro_batch", "4")[3](0)
    for micro_batch in ("16", "4"):
        args, _, state, views = setting(micro_model, tmp_path / "o", *sizes, "--micro_batch", micro_batch)
        views = views(0)
        if micro_batch == "16":
            whole = joined(chunks, args)
            if "--drop_path" not in more:       # which samples a branch keeps, each chunk draws for itself
                assert whole.keys() == views.keys()
                assert all(torch.equal(x, views[k]) for k, x in whole.items())
            views = whole
        assert all(len(x) == 16 // int(micro_batch) for x in views.values())
        train.set_schedules(state, 0, 10)
        loss, values = train.forward_backward(state, views)
        results.append((dict(loss=loss, **values), {name: p.grad for name, p in state.parameters}))
    (whole, whole_grads), (in_chunks, grads) = results
    assert in_chunks.keys() == whole.keys() and grads.keys() == whole_grads.keys()
    for name, right in whole.items():           # fp32 sums in another order
        torch.testing.assert_close(in_chunks[name], right, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")
    for name, right in whole_grads.items():     # of gradients whose largest is taken as the size
        size = right.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(grads[name], right, atol=1e-5 * size, rtol=0, msg=lambda m: f"{name}: {m}")


def test_an_eighth_of_the_batch_at_a_time_takes_less_than_half_of_the_memory(micro_model, tmp_path):
    sizes, peaks = ["--samples", "64", "--batch_size", "64", "--ssl_batch_size", "16"], []
    for micro_batch in ("64", "8"):
        _, _, state, views = setting(micro_model, tmp_path / "o", *sizes, "--rec_batch_size", "8",
                                     "--micro_batch", micro_batch)
        views = views(0)
        train.forward_backward(state, views)        # gradients exist
        with LiveBytes() as mode:
            train.forward_backward(state, views)
        peaks.append(mode.peak)
    assert peaks[1] < peaks[0] / 2


# ----- Runs that stop, and ranks --------------------------------------------------------------------------

def leaves(value):
    """What nested dicts, lists and tuples hold, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


class Killed(BaseException):
    """As by a signal that no program sees."""


def kill_at(n, monkeypatch, arguments):
    """A run that stops before its n-th step."""
    real, calls = train.train_step, []

    def killed(state, views):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        real(state, views)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "train_step", killed)
        train.main(arguments)


@pytest.mark.parametrize("kind", ["built-in", "tars"])
def test_a_killed_run_resumes_bit_for_bit(micro_model, tmp_path, monkeypatch, capsys, kind):
    more = []
    if kind == "tars":
        write_tar(str(tmp_path / "t.tar"), [sample(i) for i in range(30)])
        more = ["--data", str(tmp_path / "t.tar"), "--workers", "0"]
    common = ["--init", micro_model, *FAST, "--checkpoint_every", "5", "--eval_every", "6",
              "--drop_path_ssl", "0.4", *more]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main([*common, "--out", str(whole)])
    kill_at(9, monkeypatch, [*common, "--out", str(cut)])
    with monkeypatch.context() as patch:
        patch.setattr(train, "count_flops", lambda compute: pytest.fail("the checkpoint knows the FLOPs"))
        train.main(["--out", str(cut), "--resume"])
    a, b = (leaves(torch.load(out / "checkpoint.pt", weights_only=True)) for out in (whole, cut))
    assert len(a) == len(b)
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))
    fields = ("loss", "grad_norm", "flops", "samples")
    assert rows_of(whole, "train", *fields) == rows_of(cut, "train", *fields)
    assert len(rows_of(cut, "train")) == 12
    # a finished run leaves what it promised, and the tokenizer is the student
    model = VTP.from_pretrained(str(cut))
    student = torch.load(cut / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(v, student[k]) for k, v in model.state_dict().items())
    record = json.load(open(cut / "run.json"))
    assert record["arguments"]["seed"] == 0 and record["torch"] == torch.__version__
    assert "git_commit" in record
    assert os.path.getsize(cut / "curves.png") > 0
    if kind == "built-in":
        measures = [row for row in evaluate.read_metrics(str(cut)) if row["kind"] == "eval"]
        assert [row["step"] for row in measures] == [0, 6, 12]
        assert set(measures[-1]) == {
            "kind", "step", "samples", "flops", "psnr", "ssim", "image_to_text", "text_to_image",
            "retrieval_chance", "linear_probe", "linear_probe_balanced", "linear_probe_rate", "knn",
            "class_share", "chance"}
        assert glob.glob(str(cut / "reconstructions_*.png"))
    capsys.readouterr()
    another_run, not_the_same = ["--init", micro_model, *FAST], ["--resume", "--seed", "5"]
    for more, words in ((another_run, "is not empty"), (not_the_same, "--seed (was ")):
        with pytest.raises(SystemExit) as stop:
            train.read_settings(["--out", str(cut), *more])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    args, _ = train.read_settings(["--out", str(cut), "--resume", "--log_every", "7"])      # this may change
    assert args.log_every == 7 and args.init == micro_model


@pytest.mark.parametrize("n_tars", [1, 3])
def test_a_killed_run_on_tars_goes_on_with_two_workers_instead_of_none(micro_model, tmp_path, monkeypatch,
                                                                       n_tars):
    for shard in range(n_tars):
        samples = [sample(i, txt=None if i % 5 == 2 else b"a caption") for i in range(30)]
        write_tar(str(tmp_path / f"{shard}.tar"), samples)
    out = tmp_path / "out"
    of_tars = ["--data", str(tmp_path / "*.tar"), "--workers", "0", "--max_skipped", "0.5"]
    common = ["--init", micro_model, *FAST, "--out", str(out), "--checkpoint_every", "4"]
    kill_at(9, monkeypatch, [*common, *of_tars])
    train.main(["--out", str(out), "--resume", "--workers", "2"])
    rows = rows_of(out, "train", "samples", "skipped_samples", "loss")
    assert [row[:2] for row in rows] == [[step, 4 * step] for step in range(1, 13)]
    skipped = [row[2] for row in rows]
    assert 0 < skipped[7] < skipped[-1] and skipped == sorted(skipped)      # it counts on
    assert all(math.isfinite(row[3]) for row in rows)
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    assert content["step"] == content["place"]["batches"] == 12 and len(content["place"]["readers"]) == 2


RANKS_SCRIPT = """
import sys; sys.path.insert(0, {root!r})
import vtp, train_tokenizer
train_tokenizer.TINY_HEAD_SIZE, train_tokenizer.ADAM_EPS = (512, 64), 1e-6
tables = vtp.RopeEmbedding.forward
if {in_fp32}:
    vtp.RopeEmbedding.forward = lambda *a, **k: tuple(t.float() for t in tables(*a, **k))
train_tokenizer.main()
"""


@pytest.mark.parametrize("rotation", ["fp32", "bf16", "fp32, in chunks"])
def test_two_ranks_have_the_loss_curve_of_one(micro_model, tmp_path, rotation):
    """With everything in fp32, RoPE's rotation too, and with the rotation in bfloat16 as released models
    have it."""
    script = tmp_path / "script.py"
    script.write_text(RANKS_SCRIPT.format(root=ROOT, in_fp32=rotation != "bf16"))
    common = [script, "--init", micro_model, *FAST, "--samples", "160", "--batch_size", "8",
              "--ssl_batch_size", "8", "--rec_batch_size", "4", "--eval_every", "20", "--lr", "3e-4"]
    fields = ("loss", "loss_clip", "loss_rec", "loss_dino", "loss_mim", "loss_koleo")
    for n in (1, 2):
        more = ["--micro_batch", "2"] if n == 2 and rotation == "fp32, in chunks" else []
        done = run_script([*common, *more, "--out", tmp_path / f"r{n}"], n_ranks=n)
        assert "Warning" not in done.stderr      # of a gradient that DDP must copy, of a deprecated call
    one, two = (torch.tensor(rows_of(tmp_path / f"r{n}", "train", *fields)) for n in (1, 2))
    assert len(one) == 20 and (one[0, 1] - one[-1, 1]).abs() > 0.5
    if rotation != "bf16":
        # losses of up to 10 in fp32, each of features that differ by 2e-6
        torch.testing.assert_close(two, one, atol=2e-5, rtol=0)
    else:
        # Roundings that turn move features by 1.5e-4 (see conftest), and temperatures of 1/14 and 1/10
        # multiply that. KoLeo divides it by distances between features, which are 0.03 at first.
        torch.testing.assert_close(two[:, :-1], one[:, :-1], atol=2e-3, rtol=0)
        torch.testing.assert_close(two[:, -1], one[:, -1], atol=1e-2, rtol=0)
    measures = [evaluate.read_metrics(str(tmp_path / f"r{n}"))[-1] for n in (1, 2)]
    # in dB: 8.7 times the relative change of the error, which is at most that of the losses
    assert measures[0]["psnr"] == pytest.approx(measures[1]["psnr"], abs=2e-2)
    one, two = (measure["flops"] for measure in measures)
    assert one < two < 1.5 * one if more else one == two        # chunks compute features twice


def test_a_run_drops_its_graph_before_it_leaves_and_times_the_loader_alone(micro_model, tmp_path,
                                                                           monkeypatch):
    calls, make_views = [], train.make_views
    monkeypatch.setattr(train.CapturedStep, "close", lambda self: calls.append("close"))
    monkeypatch.setattr(train, "leave_distributed", lambda: calls.append("leave"))
    monkeypatch.setattr(train, "make_views", lambda *args: time.sleep(0.1) or make_views(*args))
    common = ["--init", micro_model, *FAST, *AUTOENCODER, "--samples", "20", "--eval_every", "20"]
    train.main([*common, "--out", str(tmp_path / "o")])
    assert calls == ["close", "leave"]
    # the first step waits for the loader to begin; a view takes 0.1 s, a step of the micro model 0.03 s
    assert all(share < 0.3 for _, share in rows_of(tmp_path / "o", "train", "data_share")[1:])


# ----- The command line -----------------------------------------------------------------------------------

def test_initial_gains_are_those_asked_for(tmp_path):
    """Each gain is a factor on its own tensors, all others start as they would without."""
    ends = ("trunk.patch_embed.proj.weight", "trunk.feature_bottleneck.weight",
            "pixel_decoder.proj_in.weight", "pixel_decoder.proj_out.weight")

    def initial(io_gain, block_gain):
        settings = train.read_settings(["--out", str(tmp_path / "o"), "--io_gain", io_gain,
                                        "--block_gain", block_gain])
        return train.build_state(*settings, torch.device("cpu")).model.state_dict()
    plain = initial("1", "1")
    for name, value in initial("2", "4").items():
        if name in ends:
            factor = 2
        else:
            factor = 4 if name.startswith("trunk.blocks") and value.ndim == 2 else 1
        assert torch.equal(value, factor * plain[name]), name      # powers of two: exact


def parse(out, *arguments):
    """The arguments of a run as they are completed."""
    args, _ = train.read_settings(["--out", str(out), *arguments])
    return args


def test_recipe_follows_the_model_and_what_is_given_wins(micro_model, tmp_path):
    out = tmp_path / "o"
    recipe = {"prototypes": 1024, "lambda_rec": 3.0, "layer_decay": 1.0, "lr": 5e-4}
    assert recipe.items() <= vars(parse(out)).items()
    assert recipe.items() <= vars(parse(out, "--init", micro_model)).items()
    assert parse(out, "--init", micro_model, "--lambda_rec", "0.5").lambda_rec == 0.5
    assert parse(out, "--model", "small", "--lpips", "none").prototypes == 65536
    small = VTP(vtp_config("small", vision_depth=1, decoder_depth=1, text_depth=1))
    small.save_pretrained(str(tmp_path / "s"))
    args, config = train.read_settings(["--out", str(out), "--init", str(tmp_path / "s"), "--lpips", "none"])
    assert (args.prototypes, args.lambda_rec, args.layer_decay) == (65536, 0.1, 0.9)
    assert args.lr == pytest.approx(2e-4) and config == small.config
    assert parse(out, "--model", "small", "--batch_size", "4096").lr == pytest.approx(4e-4)
    with pytest.raises(SystemExit):
        parse(out, "--init", micro_model, "--latent_dim", "32")


def test_what_clip_and_ssl_read_is_as_the_size_or_init_has_it_unless_it_is_given(micro_model, tmp_path):
    def reads_features(*arguments):
        args, config = train.read_settings(["--out", str(tmp_path / "o"), *arguments])
        state = train.build_state(args, config, torch.device("cpu"))
        width = config.vision_embed_dim if config.vision_bottleneck_ae_only else 64
        assert state.head.mlp[0].in_features == state.model.visual_proj.in_features == width
        return config.vision_bottleneck_ae_only
    assert not reads_features() and reads_features("--bottleneck_ae_only")
    few = ["--init", micro_model, *FAST]        # read before the bottleneck, as the released models
    assert train.read_settings(["--out", str(tmp_path / "o"), *few])[1].vision_bottleneck_ae_only
    assert not train.read_settings(["--out", str(tmp_path / "o"), *few, "--no-bottleneck_ae_only"]
                                   )[1].vision_bottleneck_ae_only


def test_the_subsets_follow_the_batch_and_what_is_given_wins(micro_model, tmp_path, monkeypatch):
    def sizes(*arguments):
        args = parse(tmp_path / "o", *arguments)
        return args.batch_size, args.ssl_batch_size, args.rec_batch_size
    small = ["--model", "small", "--lpips", "none"]
    assert sizes() == (64, 8, 64) and sizes("--batch_size", "32") == (32, 4, 32)
    assert sizes(*small) == (1024, 256, 128)      # the paper's 8 : 2 : 1
    assert sizes(*small, "--batch_size", "32") == (32, 8, 4)
    assert sizes(*small, *AUTOENCODER)[2] == 1024      # nothing else is trained
    assert sizes("--batch_size", "32", "--ssl_batch_size", "10", "--rec_batch_size", "6") == (32, 10, 6)
    monkeypatch.setattr(train, "world_size", lambda: 3)
    assert sizes(*small, "--batch_size", "33") == (33, 6, 3)      # pairs, in equal shares for the ranks


def test_chunks_must_fit_the_batch_and_its_subsets(micro_model, tmp_path, capsys):
    for wrong, word in ((["--micro_batch", "24"], "must be a multiple of 24, --micro_batch times"),
                        (["--micro_batch", "128"], "must be a multiple of 128, --micro_batch times"),
                        (["--micro_batch", "16", "--ssl_batch_size", "12"], "--ssl_batch_size 12: must be a "
                         "multiple of 8, twice the number of ranks times the 4 chunks of --micro_batch"),
                        (["--micro_batch", "16", "--rec_batch_size", "2"], "a multiple of 4"),
                        (["--micro_batch", "0"], "positive"),
                        (["--micro_batch", "16", "--stage", "2", "--init", micro_model],
                         "no use for --micro_batch")):
        with pytest.raises(SystemExit):
            parse(tmp_path / "o", *wrong)
        assert word in capsys.readouterr().err


def test_an_error_about_a_default_says_that_it_is_one(tmp_path, capsys):
    for given, is_default in (([], True), (["--ssl_batch_size", "2"], False)):
        with pytest.raises(SystemExit):
            parse(tmp_path / "o", "--batch_size", "1", *given)      # SSL takes samples in pairs
        error = capsys.readouterr().err.rpartition("error: ")[2]
        assert error.startswith("--ssl_batch_size 2") and ("the default" in error) == is_default


def test_init_names_what_is_new_and_what_is_left_out(micro_model, tmp_path, capsys):
    folder = tmp_path / "ae"
    _, _, autoencoder, _ = setting(micro_model, tmp_path / "a", *AUTOENCODER)
    autoencoder.model.save_pretrained(str(folder))
    assert "left out" in capsys.readouterr().out
    _, _, state, _ = setting(str(folder), tmp_path / "b")
    printed = capsys.readouterr().out
    assert "new" in printed and "text_transformer" in printed and "visual_proj" in printed
    saved = read_safetensors(str(folder / "model.safetensors"))
    assert all(torch.equal(state.model.state_dict()[k], v) for k, v in saved.items())


@pytest.mark.parametrize("arguments, words", [
    (["--model", "huge"], "huge"),
    (["--data", "/nowhere/*.tar"], "/nowhere"),
    (["--val_data", "/nowhere"], "/nowhere"),
    (["--samples", "5"], "one batch"),
    (["--ssl_batch_size", "3"], "multiple of 2"),
    (["--rec_batch_size", "9999"], "at most"),
    (["--lambda_rec", "0", "--lambda_ssl", "0", "--lambda_clip", "0"], "nothing to train"),
    (["--lr", "-1"], "--lr: -1: must be positive"),
    (["--lr", "nan"], "--lr: nan: must be positive"),
    (["--lr", "fast"], "--lr: invalid float value"),
    (["--warmup", "2"], "--warmup: 2: must be between 0 and 1"),
    (["--teacher_temp", "0.04", "0"], "--teacher_temp: 0: must be positive"),
    (["--model", "small", "--batch_size", "-4"], "--batch_size: -4: must be positive"),
    (["--lpips", "/nowhere"], "lpips"),
    (["--init", "/nowhere/at/all"], "nowhere"),
    (["--resume"], "no run.json"),
    (["--classnames", "/nowhere"], "classnames"),
    (["--canvas", "-1"], "--canvas: -1: must be positive"),
    (["--image_size", "44"], "44"),
    (["--max_skipped", "1"], "--max_skipped: 1: must be between 0 and 1"),
    (["--workers", "-1"], "--workers: -1: must be positive or 0"),
    (["--bpe", "/nowhere", "--model", "small"], "bpe")])
def test_a_wrong_argument_is_an_error_before_any_work(tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        train.read_settings(["--out", str(out), *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not out.exists()


def test_a_run_of_another_script_is_told_from_ones_own(micro_model, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "run.json").write_text(json.dumps(dict(arguments=vars(parse(tmp_path / "o")))))
    for arguments, words in ((["--out", str(tmp_path), "--resume"], "another script"),
                             (["--sample", "1", "--checkpoint", str(tmp_path), "--out", "x"], "no run of")):
        with pytest.raises(SystemExit) as stop:
            train_dit.read_settings(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_pairs_are_held_out_of_the_training_set_alone(micro_model, tmp_path):
    args, config = train.read_settings(["--init", micro_model, *FAST, "--hold_out_pairs",
                                        "--out", str(tmp_path / "o")])
    source, _, held_out, gallery = train.open_data(args, config)
    p = data.draw_parameters(source.indices, "train")
    assert len(source) == 64 and "without 10" in source.name and not data.has_held_out_pair(p, True).any()
    whole = data.BuiltinSource(2048, 64, "val").captions
    for batches, captions in ((held_out, whole), (gallery, source.captions)):
        assert {text for _, texts, _ in batches for text in texts} <= set(captions)


def test_resume_needs_the_checkpoint_and_the_arguments_of_a_run(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, "--resume")
    assert stop.value.code == 2 and "run.json" in capsys.readouterr().err


def test_a_judge_is_trained_by_default_only_for_the_built_in_set(micro_model, tmp_path):
    """The other ranks wait while rank 0 trains it."""
    def n_samples(*more):
        common = ["--tokenizer", micro_model, "--cache", str(tmp_path / "c")]
        common += ["--out", str(tmp_path / "o")]
        return train_dit.read_settings([*common, *more]).eval_samples
    own = ["--data", micro_model]
    assert [n_samples(), n_samples(*own), n_samples(*own, "--eval_samples", "9")] == [500, 0, 9]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        train.read_settings(["--help"])
    text = capsys.readouterr().out
    assert "torchrun --nproc_per_node=8" in text and "DINOv2" in text and "OpenCLIP" in text
    for action in train.make_parser()._actions:
        assert action.help and action.option_strings[-1] in text


def saving_to(path):
    return train.Saving(str(path), every=1)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(micro_model, tmp_path, monkeypatch, capsys):
    """A disk that is full costs a checkpoint, not the run; at its end it is an error of one line."""
    _, _, state, _ = setting(micro_model, tmp_path / "o")
    saving = saving_to(tmp_path / "c.pt")
    place = dict(batches=1, readers={0: dict(open={0: 0}, given=0, skipped={"no image": 1})})
    train.save_checkpoint(saving, state, 1, False, 1e9, place)
    assert train.load_checkpoint(saving.path, state, torch.device("cpu")) == (1, 1e9, place)
    before, real = open(saving.path, "rb").read(), torch.save

    def full_disk(content, f):      # torch's own writer turns the reason into a RuntimeError
        f.write(b"half a checkpoint")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed writing file") from error
    monkeypatch.setattr(torch, "save", full_disk)
    train.save_checkpoint(saving, state, 2, False, 1e9, place)
    printed = capsys.readouterr().out
    n_bytes = sum(t.nbytes for t in everything_in(state))
    for words in ("step 2", "goes on", "No space left", "c.pt", f"{n_bytes:,} bytes needed"):
        assert words in printed
    assert open(saving.path, "rb").read() == before and os.listdir(tmp_path) == ["c.pt"]
    with pytest.raises(OSError, match="No space left.*bytes needed.*c.pt"):
        train.save_checkpoint(saving, state, 3, True, 1e9, place)
    monkeypatch.setattr(torch, "save", real)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="No space left"):      # known before anything is written
        train.save_checkpoint(saving, state, 3, True, 1e9, place)


def test_a_broken_checkpoint_is_named(micro_model, tmp_path):
    _, _, state, _ = setting(micro_model, tmp_path / "o")
    saving = saving_to(tmp_path / "c.pt")
    train.save_checkpoint(saving, state, 1, False, 1e9)
    whole = open(saving.path, "rb").read()
    torch.save({"model": {}}, tmp_path / "other.pt")
    for content in (b"", whole[:1000], whole[:-50], open(tmp_path / "other.pt", "rb").read()):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(ValueError, match="c.pt"):
            train.load_checkpoint(saving.path, state, torch.device("cpu"))


def test_what_is_not_finite_is_not_saved(micro_model, tmp_path, capsys):
    """Not its weights, and not the end of a run whose last step was not finite."""
    args, _, state, views = setting(micro_model, tmp_path / "o")
    saving = saving_to(tmp_path / "c.pt")
    train.save_checkpoint(saving, state, 1, False, 1e9)
    before = open(saving.path, "rb").read()
    train.set_schedules(state, 0, 10)
    broken = views(0)
    broken["images"] = broken["images"] * math.inf
    train.train_step(state, broken)
    train.save_checkpoint(saving, state, 2, False, 1e9)
    assert "last step was not finite" in capsys.readouterr().out
    with pytest.raises(train.UserError, match="last step was not finite at step 2.*--resume --lr"):
        train.save_checkpoint(saving, state, 2, True, 1e9)
    train.train_step(state, views(1))
    with torch.no_grad():
        state.teacher["trunk"].cls_token[0, 0, 0] = math.nan
    with pytest.raises(train.UserError, match="weights are not finite at step 3"):
        train.save_checkpoint(saving, state, 3, False, 1e9)
    assert open(saving.path, "rb").read() == before


def test_a_run_that_is_not_finite_says_how_to_go_on_and_does(micro_model, tmp_path, capsys):
    """--lr 1e20 makes the second step infinite; with another rate --resume goes on, and run.json says so."""
    out = str(tmp_path / "o")
    common = ["--init", micro_model, *FAST, "--samples", "8", "--warmup", "0", *AUTOENCODER, "--out", out]
    with pytest.raises(SystemExit) as stop:
        train.main([*common, "--lr", "1e20", "--checkpoint_every", "2"])
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert stop.value.code == 2 and "not finite" in error and error.count("\n") == 1
    assert "from the start" in error and not {"tokenizer", "checkpoint.pt"} & set(os.listdir(out))
    train.main(["--out", out, "--resume", "--lr", "1e-4"])
    record = json.load(open(os.path.join(out, "run.json")))
    assert record["arguments"]["lr"] == 1e-4 and record["before"]["arguments"]["lr"] == 1e20
    assert record["before"]["until_step"] == 0 and VTP.from_pretrained(out)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(micro_model, tmp_path, monkeypatch, capsys):
    """--resume does it, and so does the same command while there is no run.json."""
    out = tmp_path / "o"
    common = ["--init", micro_model, *FAST, *AUTOENCODER, "--samples", "8", "--out", str(out)]
    kill_at(1, monkeypatch, common)
    assert not (out / "checkpoint.pt").exists() and (out / "run.json").exists()
    (out / "metrics.jsonl.123.tmp").write_text("left by a kill")
    with pytest.raises(SystemExit):
        train.read_settings(common)
    assert "--resume starts it anew" in capsys.readouterr().err
    vtp._claimed.clear()        # as another process has it
    train.main(["--out", str(out), "--resume"])
    steps = [(row["kind"], row["step"]) for row in evaluate.read_metrics(str(out))]
    assert len(set(steps)) == len(steps) and steps[-1][1] == 2
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    early = tmp_path / "early"
    early.mkdir()
    for name in (".lock", "run.json.77.tmp"):
        (early / name).touch()
    assert parse(early).out == str(early)


def test_two_processes_cannot_have_one_folder(micro_model, tmp_path):
    """The second is told so, before it writes anything; when the first has ended, even killed, it may."""
    claim = f"import time, vtp; vtp.claim_folder({str(tmp_path)!r}); print('mine', flush=True); "
    claim += "time.sleep(99)"
    first = subprocess.Popen([sys.executable, "-c", claim], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"mine\n"
    common = ["train_tokenizer.py", "--init", micro_model, *FAST, *AUTOENCODER, "--samples", "8",
              "--out", tmp_path]
    done = run_script(common, check=False)
    assert done.returncode == 2 and "in use by another process" in done.stderr
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == [".lock"]
    first.kill()
    first.wait()
    run_script(common)


SLOW_STEPS = """
import sys, time; sys.path.insert(0, {root!r})
import train_tokenizer
step = train_tokenizer.train_step
train_tokenizer.train_step = lambda *arguments: (time.sleep(.2), step(*arguments))
train_tokenizer.main()
"""


@pytest.mark.parametrize("number, n_ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(micro_model, tmp_path, number, n_ranks):
    """Loader processes get it, too, and serve on. The run goes on to the end that it would have had."""
    common = ["--init", micro_model, *FAST, *AUTOENCODER, "--samples", "160", "--eval_samples", "8",
              "--workers", "1"]
    script, out, whole = tmp_path / "script.py", tmp_path / "cut", tmp_path / "whole"
    script.write_text(SLOW_STEPS.format(root=ROOT))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if n_ranks == 2 else []
    process = subprocess.Popen([sys.executable, *launcher, script, *common, "--out", out],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    for _ in range(2):      # as a scheduler's that torchrun passes on as well
        os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert "stopped after step" in printed and "--resume" in printed
    assert process.returncode != 0 and (n_ranks > 1 or process.returncode == 128 + number)
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 40 and f"stopped after step {step}," in printed
    if number == signal.SIGTERM:
        run_script(["train_tokenizer.py", "--out", out, "--resume"], n_ranks)
        run_script(["train_tokenizer.py", *common, "--out", whole], n_ranks)
        assert rows_of(out, "train", "loss") == rows_of(whole, "train", "loss")


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    code = ("import time, train_tokenizer as t\nwith t.Saving('c.pt', 1):\n    print('mine', flush=True)\n"
            "    while True: time.sleep(.1)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"mine\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT
    assert b"once more stops it at once" in process.stderr.read()


@pytest.mark.parametrize("seconds, n_tried", [(1e-3, 4), (0.06, 1)])
def test_the_rate_of_matrix_products_is_measured_in_little_time(monkeypatch, seconds, n_tried):
    """On a CPU without instructions for bf16 one product of side 2048 takes more than a minute."""
    tried = []
    monkeypatch.setattr(train.timeit, "repeat", lambda *a, **k: tried.append(1) or [seconds] * 5)
    rate = train.matmul_rate(torch.device("cpu"))
    assert len(tried) == n_tried and rate == 2 * (256 * 2 ** (n_tried - 1)) ** 3 / seconds


def test_no_checkpoint_is_older_than_fifteen_minutes(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saving = train.Saving("nowhere", every=10)
    assert saving.is_due(10, True, False) and saving.is_due(7, False, True)
    clock[0] += 899
    assert not saving.is_due(11, True, False)
    clock[0] += 2
    assert saving.is_due(11, True, False)


def test_an_error_ends_the_program_and_its_loader_processes(micro_model, tmp_path):
    """At once, though they outlive the first signal."""
    write_tar(str(tmp_path / "t.tar"), [sample(i, png=b"broken") for i in range(40)])
    start = time.monotonic()
    done = run_script(["train_tokenizer.py", "--init", micro_model, *FAST, "--data", tmp_path / "t.tar",
                       "--workers", "2", "--out", tmp_path / "o"], check=False)
    assert done.returncode == 2 and "error: 11 of 11 samples of 1 tars" in done.stderr
    assert time.monotonic() - start < 30        # for which they would serve on


def test_an_error_is_one_line_on_stderr_by_rank_0(micro_model, tmp_path):
    done = run_script(["train_tokenizer.py", "--lr", "fast"], check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert done.stderr.startswith("train_tokenizer.py: error: argument --lr")
    done = run_script(["train_tokenizer.py", "--init", micro_model, "--data", "/nowhere/{0,1}.tar",
                       "--out", tmp_path / "o"], n_ranks=2, check=False)
    assert done.returncode != 0 and done.stderr.count("error: no data at /nowhere/0.tar") == 1
    assert "/train_tokenizer.py\", line" not in done.stderr        # no traceback of ours


# ----- CUDA -----------------------------------------------------------------------------------------------

class Recorder:
    """Stands in for torch.cuda where there is none: a capture notes what the step was called with and does
    nothing, a replay does it with what those tensors then hold."""
    def __init__(self, monkeypatch, step):
        self.step, self.is_recording, self.recorded, self.n_eager = step, False, [], 0
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(train, "capture_stream", lambda: None)

    def __call__(self, inputs):
        if self.is_recording:
            self.recorded.append(inputs)
        else:
            self.n_eager += 1
            self.step(inputs)

    def __enter__(self):
        self.is_recording = True

    def __exit__(self, *_):
        self.is_recording = False

    def replay(self):
        self.step(*self.recorded)

    def reset(self):
        self.recorded = None


@pytest.mark.parametrize("more", [["--drop_path", "0.2", "--drop_path_ssl", "0.3"],
                                  ["--drop_path_ssl", "0.3", "--checkpoint_blocks"],
                                  ["--ssl_batch_size", "4", "--micro_batch", "2"]])
def test_a_captured_step_reads_new_inputs_and_schedules_and_compiles_nothing_anew(micro_model, tmp_path,
                                                                                  monkeypatch, more):
    n_steps, curves = train.CapturedStep.WARM_UP + 4, []
    # dynamo's guards are what is tested: no C++ compiler is needed
    monkeypatch.setattr(train, "should_compile", lambda *_: True)
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    for captured in (False, True):
        _, _, state, views = setting(micro_model, tmp_path / "o", "--compile", *more)
        recorder = Recorder(monkeypatch, lambda inputs: train.train_step(state, inputs))
        step, curve = train.CapturedStep(recorder, captured), []
        try:
            for i in range(n_steps):
                train.set_schedules(state, i, n_steps)
                step(views(i))
                curve.append(state.totals["loss"].item())
                torch.compiler.set_stance("fail_on_recompile")
        finally:
            torch.compiler.set_stance("default")
            torch._dynamo.reset()
        assert recorder.n_eager == (train.CapturedStep.WARM_UP if captured else n_steps)
        step.close()
        assert (recorder.recorded is None) == captured and step.graph is None
        curves.append(curve)
    assert curves[0] == curves[1] and len(set(curves[0])) == n_steps


@pytest.mark.parametrize("kind", ["stage 1", "drop path", "chunks", "recomputation", "stage 2"])
def test_a_step_asks_the_device_nothing(micro_model, tmp_path, kind):
    """Views and step make no operation whose shape or branch the host must be told: on a GPU it would wait,
    and could not be captured."""
    more = {"stage 1": FAST, "drop path": [*FAST, "--drop_path", "0.3", "--drop_path_ssl", "0.3"],
            "chunks": [*FAST, "--ssl_batch_size", "4", "--micro_batch", "2"],
            "recomputation": [*FAST, "--checkpoint_blocks"],
            "stage 2": ["--stage", "2", "--samples", "48", "--batch_size", "4", "--precision", "fp32"]}[kind]
    _, _, state, views = setting(micro_model, tmp_path / "o", common=more)
    for step in range(2):
        train.set_schedules(state, step, 10)
        with NothingAsked() as mode:
            batch = views(step)
        with mode:
            train.train_step(state, batch)
    assert mode.n_operations > 500


def test_blocks_are_compiled_where_it_pays_and_works(micro_model, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", lambda *modules: compiled.append(modules))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    for more, is_wanted in ((["--samples", "39999"], False), (["--samples", "40000"], True),    # batches of 4
                            (["--samples", "40000", "--no-compile"], False), (["--compile"], True)):
        compiled.clear()
        setting(micro_model, tmp_path / "o", *more)
        assert bool(compiled) == is_wanted, more
    assert capsys.readouterr().out == ""

    def fails(_):
        raise RuntimeError("no compiler\nmore of it")
    compiled.clear()
    monkeypatch.setattr(torch, "compile", fails)
    setting(micro_model, tmp_path / "o", "--compile")
    assert not compiled and capsys.readouterr().out.endswith("compile fails here: no compiler\n")


def test_what_asks_the_device_is_noticed():
    x = torch.arange(4.0)
    for asks in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x.any()),
                 lambda: x.repeat_interleave(x.long()), lambda: x.unique()):
        with pytest.raises(AssertionError, match="asks"), NothingAsked():
            asks()
    with NothingAsked():
        x.repeat_interleave(x.long(), output_size=6), x[x.long()], torch.where(x > 1, x, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_equal_eager_ones(micro_model, tmp_path, compiled):
    losses, streams = [], set()
    for capture in (False, True):
        more = ["--compile" if compiled else "--no-compile"]
        _, _, state, views = setting(micro_model, tmp_path / "o", *more, device="cuda")

        def train_step(views):
            streams.add((capture, torch.cuda.current_stream().cuda_stream))
            train.train_step(state, views)
        step = train.CapturedStep(train_step, capture)
        curve = []
        for i in range(train.CapturedStep.WARM_UP + 10):
            train.set_schedules(state, i, 40)
            step(views(i))
            curve.append(state.totals["loss"].item())
        losses.append(torch.tensor(curve).diff())
        step.close()
    assert len(streams) == 2        # of the eager steps, and of warm-up and capture
    # fp32 kernels may be chosen anew in a graph
    torch.testing.assert_close(losses[0], losses[1], atol=2e-3, rtol=2e-3)


NCCL_SCRIPT = """
import os, sys; sys.path.insert(0, {root!r})
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(20000 + os.getpid() % 20000))
import train_tokenizer as train
train.TINY_HEAD_SIZE, set_schedules = (512, 64), train.set_schedules
def stop_at(state, step, n_steps):
    assert step != {stop}
    return set_schedules(state, step, n_steps)
train.set_schedules = stop_at
train.main()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("stop", [None, 14])
def test_a_run_that_captured_collectives_ends_also_by_an_exception(micro_model, tmp_path, stop):
    script = tmp_path / "script.py"
    script.write_text(NCCL_SCRIPT.format(root=ROOT, stop=stop))
    arguments = [script, "--init", micro_model, *FAST, "--samples", "64", "--out", tmp_path / "o"]
    done = run_script([*arguments, "--no-compile"], timeout=200, check=False)        # 16 steps
    assert (done.returncode == 0) == (stop is None) and ("AssertionError" in done.stderr) == (stop == 14)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_does_not_wait_for_the_device(micro_model, tmp_path, stage):
    common = FAST if stage == 1 else ["--stage", "2", "--samples", "48", "--batch_size", "4"]
    _, _, state, views = setting(micro_model, tmp_path / "o", "--no-compile", device="cuda", common=common)
    for i in range(3):
        # the first step may allocate and tune
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            batch = views(i)
            train.set_schedules(state, i, 10)
            train.train_step(state, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
