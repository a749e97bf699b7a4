"""The training script: counted FLOPs, exact resume, ranks that change nothing, steps that are not finite, arguments, files."""
import glob
import json
import math
import os
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import train_tokenizer as train
from conftest import ROOT, run_script
from losses import LPIPS
from test_data import sample, write_tar
from vtp import VTP, preset, read_safetensors

FAST = ["--samples", "48", "--batch_size", "4", "--ssl_batch_size", "2", "--rec_batch_size", "2", "--prototypes", "32", "--head_hidden", "32", "--head_dim", "16",
        "--n_local", "2", "--train_size", "64", "--eval_samples", "16", "--log_every", "1", "--precision", "fp32", "--teacher_momentum", "0.992", "--teacher_temp", "0.04", "0.07"]


def setting(micro_model, out, *more):
    """Arguments, state and one batch of views of a micro run."""
    args = train.parse_args(["--init", micro_model, "--out", str(out), *FAST, *more])
    config, state = train.model_config(args), train.build_state(args, torch.device("cpu"))
    source = data.BuiltinSource(args.batch_size, config.image_size)
    tokens = data.byte_tokenizer(source.captions, config.text_context_length)
    views = lambda step: train.make_views(args, config, step, torch.tensor(source.images), tokens)
    return args, config, state, views


def rows_of(out, kind, *fields):
    return [[r[f] for f in ("step", *fields)] for r in evaluate.read_metrics(str(out)) if r["kind"] == kind]


@pytest.mark.parametrize("more", [[], ["--lambda_clip", "0", "--lambda_ssl", "0"], ["--lambda_rec", "0"], ["--lambda_clip", "0"], ["--drop_path", "0.5", "--drop_path_ssl", "0.5"]])
def test_counted_flops_are_torchs(micro_model, tmp_path, more):
    args, config, state, views = setting(micro_model, tmp_path / "o", *more)
    views = views(0)
    train.set_schedules(state, 0, 10)
    # the teacher runs without gradient, where a CPU takes the fused attention, which torch's counter does not know
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.train_step(state, views)
    assert counter.get_total_flops() == pytest.approx(train.training_flops(config, args), rel=1e-3)     # weight norms and the like


def test_counted_flops_of_lpips_are_torchs(micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LPIPS", lambda weights: LPIPS(None))
    monkeypatch.setattr(train.LPIPS, "LAYERS", LPIPS.LAYERS, raising=False)
    folder = tmp_path / "weights"
    folder.mkdir()
    args, config, state, views = setting(micro_model, tmp_path / "o", "--lambda_clip", "0", "--lambda_ssl", "0", "--lpips", str(folder))
    train.set_schedules(state, 0, 10)
    with FlopCounterMode(display=False) as counter:
        train.train_step(state, views(0))
    assert counter.get_total_flops() == pytest.approx(train.training_flops(config, args), rel=1e-3)


def test_one_step_is_adamw_with_decoupled_decay_clipping_and_ema(micro_model, tmp_path):
    args, config, state, views = setting(micro_model, tmp_path / "o", "--clip_grad", "0.5", "--layer_decay", "0.5", "--decoder_lr", "3", "--warmup", "0", "--freeze_prototypes", "0.5", "--lr", "0.01")
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    teacher_before = [p.clone() for p in state.teacher.parameters()]
    prototypes = state.head.prototypes.clone()
    train.set_schedules(state, 1, 10)
    train.train_step(state, views(1))
    lr, decay, momentum = (train.cosine(a, b, 0.1) for a, b in ((0.01, 1e-6), (0.04, 0.4), (0.992, 1.0)))
    after, grads = state.model.state_dict(), {k: p.grad for k, p in state.model.named_parameters() if p.grad is not None}
    for part in ("trunk", "pixel_decoder"):
        parameters = [g for k, g in grads.items() if k.startswith(part) or (part == "trunk" and k.startswith("visual_proj"))]
        assert torch.linalg.vector_norm(torch.stack([g.norm() for g in parameters])) <= 0.5 * (1 + 1e-4)
    for name, factor, decays in (("trunk.blocks.1.mlp.w1.weight", 0.5, True), ("trunk.blocks.0.attn.qkv.weight", 0.25, True), ("trunk.blocks.0.norm1.weight", 0.25, False),
                                 ("pixel_decoder.proj_in.bias", 3.0, False), ("trunk.patch_embed.proj.weight", 0.125, True), ("logit_scale", 1.0, False)):
        g = grads[name]
        step = g / (g.abs() + args.eps)        # Adam's first step, both moments without bias
        expected = before[name] * (1 - lr * factor * decay * decays) - lr * factor * step
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    assert torch.equal(state.head.prototypes, prototypes)          # frozen at first
    for old, teacher, student in zip(teacher_before, state.teacher.parameters(), train.student_of_teacher(state)):
        torch.testing.assert_close(teacher, momentum * old + (1 - momentum) * student, atol=1e-7, rtol=1e-5)


def test_schedules_have_their_ends_and_are_fractions_of_the_run(micro_model, tmp_path):
    args, _, state, _ = setting(micro_model, tmp_path / "o")
    for n in (100, 1000):
        values = [train.set_schedules(state, s, n) for s in range(n)]
        assert max(train.set_schedules(state, s, 14)["lr"] for s in range(14)) <= args.lr      # a warm-up that is no whole number
        assert values[0]["lr"] == pytest.approx(args.lr / (n / 10)) and max(v["lr"] for v in values) == pytest.approx(args.lr, rel=1e-3)
        assert values[n // 2]["lr"] == pytest.approx(train.cosine(args.lr, 1e-6, 0.4 / 0.9), rel=1e-6)
        assert values[0]["teacher_temp"] == 0.04 and values[3 * n // 10]["teacher_temp"] == pytest.approx(0.07) == values[-1]["teacher_temp"]
        assert values[0]["teacher_momentum"] == pytest.approx(0.992) and values[-1]["teacher_momentum"] == pytest.approx(1, abs=1e-4)
        assert values[0]["weight_decay"] == pytest.approx(0.04) and values[-1]["weight_decay"] == pytest.approx(0.4, abs=1e-3)


def test_dino_loss_pairs_each_student_view_with_every_teacher_view_of_another_crop(micro_model, tmp_path):
    args, config, state, views = setting(micro_model, tmp_path / "o")
    views = views(0)
    train.set_schedules(state, 0, 10)
    targets = train.teacher_targets(state, views)
    losses = state.objectives(views, targets)
    model, b = state.model, 2
    with torch.no_grad():
        logits = [state.head(c) for c in (*model.features(views["global_crops"], views["masks"])[0].split(b), *model.features(views["local_crops"])[0].split(b))]
        teachers = targets[0].split(b)
        pairs = [-(teachers[t] * (logits[s] / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean() for t in range(2) for s in range(4) if s != t]
        assert len(pairs) == 2 + 2 * args.n_local
        torch.testing.assert_close(losses["loss_dino"], torch.stack(pairs).mean(), atol=1e-5, rtol=1e-5)
        rows = [(crop, patch) for crop in range(4) for patch in range(16) if views["masks"][crop, patch]]      # row-major
        patches = model.features(views["global_crops"], views["masks"])[1]
        student = state.head(torch.stack([patches[r] for r in rows]))
        total = sum(-(targets[1][i] * (student[i] / 0.1).log_softmax(dim=-1)).sum() / views["masks"][crop].sum() for i, (crop, _) in enumerate(rows))
        torch.testing.assert_close(losses["loss_mim"], total / 4, atol=1e-5, rtol=1e-5)


def test_autoencoder_baseline_builds_neither_teacher_nor_text_tower(micro_model, tmp_path):
    args, config, state, views = setting(micro_model, tmp_path / "o", "--lambda_clip", "0", "--lambda_ssl", "0")
    assert state.teacher is None and state.head is None and not hasattr(state.model, "text_transformer")
    train.set_schedules(state, 0, 10)
    assert set(views(0)) == {"images"}
    train.train_step(state, views(0))
    assert all(p.grad is not None for p in state.model.parameters() if p.requires_grad)      # DDP would stop otherwise


@pytest.mark.parametrize("more", [["--lambda_rec", "0"], ["--lambda_clip", "0"], ["--lambda_ssl", "0"], []])
def test_every_trained_parameter_gets_a_gradient(micro_model, tmp_path, more):
    _, _, state, views = setting(micro_model, tmp_path / "o", *more)
    train.set_schedules(state, 0, 10)
    train.train_step(state, views(0))
    assert [n for n, p in state.objectives.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(micro_model, tmp_path):
    args, _, state, views = setting(micro_model, tmp_path / "o")
    train.set_schedules(state, 2, 10)
    train.train_step(state, views(0))
    everything = lambda: [t.clone() for m in (state.model, state.head, state.teacher) for t in m.state_dict().values()] + \
        [t.clone() for s in state.optimizer.state.values() for t in s.values()]
    before, totals = everything(), {k: v.clone() for k, v in state.totals.items()}
    broken = views(1)
    broken["images"] = broken["images"] * math.nan
    train.train_step(state, broken)
    assert all(torch.equal(a, b) for a, b in zip(before, everything()))
    totals["steps"] += 1
    assert {k: v.item() for k, v in state.totals.items()} == {k: v.item() for k, v in totals.items()}
    arguments = (train.set_schedules(state, 2, 10), 2, 1.0, 0.0, 1, 1.0, {})
    row, line = train.train_row(state, dict(step=2, samples=8), *arguments)
    assert row["skipped_steps"] == 1 and "1 steps (not finite)" in line and math.isfinite(row["loss"])
    train.train_step(state, broken)
    with pytest.raises(RuntimeError, match="not finite"):
        train.train_row(state, dict(step=3, samples=12), *arguments)


def everything_in(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    flat = lambda v: [v] if not isinstance(v, (dict, list, tuple)) else [x for y in (v.values() if isinstance(v, dict) else v) for x in flat(y)]
    return flat(content)


@pytest.mark.parametrize("kind", ["built-in", "tars"])
def test_a_killed_run_resumes_bit_for_bit(micro_model, tmp_path, monkeypatch, kind):
    more = []
    if kind == "tars":
        write_tar(str(tmp_path / "t.tar"), [sample(i) for i in range(30)])
        more = ["--data", str(tmp_path / "t.tar"), "--workers", "0"]
    common = ["--init", micro_model, *FAST, "--checkpoint_every", "5", "--drop_path_ssl", "0.4", *more]
    train.main([*common, "--out", str(tmp_path / "whole")])
    real, calls = train.train_step, []

    def killed(state, views):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        real(state, views)
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*common, "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(train, "train_step", real)
    train.main(["--out", str(tmp_path / "cut"), "--resume"])
    a, b = (everything_in(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut"))
    assert len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))
    assert rows_of(tmp_path / "whole", "train", "loss", "grad_norm") == rows_of(tmp_path / "cut", "train", "loss", "grad_norm")
    assert len(rows_of(tmp_path / "cut", "train")) == 12
    # a finished run leaves what it promised, and the tokenizer is the student
    model, student = VTP.from_pretrained(str(tmp_path / "cut")), torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(v, student[k]) for k, v in model.state_dict().items())
    record = json.load(open(tmp_path / "cut" / "run.json"))
    assert record["arguments"]["seed"] == 0 and record["torch"] == torch.__version__ and "git_commit" in record
    assert os.path.getsize(tmp_path / "cut" / "curves.png") > 0
    if kind == "built-in":
        last = evaluate.read_metrics(str(tmp_path / "cut"))[-1]
        assert last["kind"] == "eval" and {"psnr", "image_to_text", "retrieval_chance", "latent_linear", "latent_knn", "accuracy_chance", "flops"} <= set(last)
        assert glob.glob(str(tmp_path / "cut" / "reconstructions_*.png"))
    with pytest.raises(SystemExit):      # another run in a used folder
        train.parse_args(["--init", micro_model, *FAST, "--out", str(tmp_path / "cut")])
    with pytest.raises(SystemExit):      # not the same run
        train.parse_args(["--out", str(tmp_path / "cut"), "--resume", "--lr", "0.5"])


@pytest.mark.parametrize("rotation", ["fp32", "bf16"])
def test_two_ranks_have_the_loss_curve_of_one(micro_model, tmp_path, rotation):
    """With everything in fp32, RoPE's rotation too, and with the rotation in bfloat16 as released models have it."""
    script = os.path.join(ROOT, "train_tokenizer.py")
    if rotation == "fp32":
        script = tmp_path / "in_fp32.py"
        script.write_text(f"import sys; sys.path.insert(0, {ROOT!r})\nimport vtp, train_tokenizer\ntables = vtp.RopeEmbedding.forward\n"
                          "vtp.RopeEmbedding.forward = lambda *a, **k: tuple(t.float() for t in tables(*a, **k))\ntrain_tokenizer.main()\n")
    common = [script, "--init", micro_model, *FAST, "--samples", "160", "--batch_size", "8", "--ssl_batch_size", "4", "--rec_batch_size", "4",
              "--eval_every", "20", "--head_hidden", "512", "--head_dim", "64", "--lr", "3e-4", "--eps", "1e-6"]
    fields = ("loss", "loss_clip", "loss_rec", "loss_dino", "loss_mim", "loss_koleo")
    for n in (1, 2):
        run_script([*common, "--out", tmp_path / f"r{n}"], n_ranks=n)
    one, two = (torch.tensor(rows_of(tmp_path / f"r{n}", "train", *fields)) for n in (1, 2))
    assert len(one) == 20 and (one[0, 1] - one[-1, 1]).abs() > 0.5
    if rotation == "fp32":                                                         # losses of 2 to 10, sums in another order: seen 2e-6
        torch.testing.assert_close(two, one, atol=2e-5, rtol=0)
    else:
        torch.testing.assert_close(two[:2], one[:2], atol=2e-5, rtol=0)            # before differences have fed back
        # Later bfloat16 turns differences in the last bit into jumps of 1/256 of a q or k here and there: 1e-4 of the losses at
        # most steps, seen up to 2e-4. KoLeo is the log of a distance between features that are nearly equal at first.
        torch.testing.assert_close(two[:, :-1], one[:, :-1], atol=1e-4, rtol=4e-4)
        torch.testing.assert_close(two[:, -1], one[:, -1], atol=5e-3, rtol=0)
    measures = [evaluate.read_metrics(str(tmp_path / f"r{n}"))[-1] for n in (1, 2)]
    assert measures[0]["psnr"] == pytest.approx(measures[1]["psnr"], abs=1e-2)
    assert measures[0]["flops"] == measures[1]["flops"]


def test_initial_gains_are_those_asked_for(tmp_path):
    """Each gain is a factor on its own tensors, all others start as they would without."""
    initial = lambda *gains: train.build_state(train.parse_args(["--out", str(tmp_path / "o"), *gains]), torch.device("cpu")).model.state_dict()
    plain = initial("--io_gain", "1", "--block_gain", "1", "--token_gain", "1")
    for name, value in initial("--io_gain", "2", "--block_gain", "4", "--token_gain", "8").items():
        factor = 2 if name in ("trunk.patch_embed.proj.weight", "trunk.feature_bottleneck.weight", "pixel_decoder.proj_in.weight", "pixel_decoder.proj_out.weight") else 1
        factor = 4 if name.startswith("trunk.blocks") and value.ndim == 2 else 8 if name == "token_embedding.weight" else factor
        assert torch.equal(value, factor * plain[name]), name                      # powers of two: exact


def test_recipe_follows_the_model_and_what_is_given_wins(micro_model, tmp_path):
    parse = lambda *a: train.parse_args(["--out", str(tmp_path / "o"), *a])
    assert parse().prototypes == 1024 and parse("--model", "small", "--lpips", "none").prototypes == 65536
    assert parse("--init", micro_model).lambda_rec == train.RECIPES["tiny"]["lambda_rec"]
    VTP(preset("small", vision_depth=1, decoder_depth=1, text_depth=1)).save_pretrained(str(tmp_path / "s"))
    args = parse("--init", str(tmp_path / "s"), "--lpips", "none")
    assert (args.prototypes, args.lambda_rec, args.layer_decay) == (65536, 0.1, 0.9) and args.lr == pytest.approx(2e-4)
    assert (args.ssl_batch_size, args.rec_batch_size) == (256, 128)                  # the paper's 8 : 2 : 1
    ae = ["--lambda_clip", "0", "--lambda_ssl", "0"]
    assert parse(*ae).rec_batch_size == parse().batch_size and parse(*ae, "--rec_batch_size", "6").rec_batch_size == 6
    with pytest.raises(SystemExit):
        parse("--init", micro_model, "--latent_dim", "32")


def test_init_names_what_is_new_and_what_is_left_out(micro_model, tmp_path, capsys):
    ae = tmp_path / "ae"
    setting(micro_model, tmp_path / "a", "--lambda_clip", "0", "--lambda_ssl", "0")[2].model.save_pretrained(str(ae))
    assert "left out" in capsys.readouterr().out
    state = setting(str(ae), tmp_path / "b")[2]
    printed = capsys.readouterr().out
    assert "new" in printed and "text_transformer" in printed and "visual_proj" in printed
    saved = read_safetensors(str(ae / "model.safetensors"))
    assert all(torch.equal(state.model.state_dict()[k], v) for k, v in saved.items())


@pytest.mark.parametrize("arguments, words", [
    (["--model", "huge"], "huge"), (["--data", "/nowhere/*.tar"], "/nowhere"), (["--val_data", "/nowhere"], "/nowhere"), (["--samples", "5"], "one batch"),
    (["--ssl_batch_size", "3"], "multiple of 2"), (["--rec_batch_size", "9999"], "at most"), (["--lambda_rec", "0", "--lambda_ssl", "0", "--lambda_clip", "0"], "nothing to train"),
    (["--lr", "-1"], "positive"), (["--warmup", "2"], "between"), (["--lpips", "/nowhere"], "lpips"), (["--init", "/nowhere/at/all"], "nowhere"),
    (["--resume"], "checkpoint"), (["--classnames", "/nowhere"], "classnames"), (["--mask_ratio", "0.6", "0.2"], "mask_ratio"), (["--mask_ratio", "0.01", "0.02"], "mask_ratio"), (["--betas", "0.9", "1"], "betas"),
    (["--canvas", "-1"], "canvas"), (["--max_skipped", "1"], "max_skipped"), (["--workers", "-1"], "workers"), (["--bpe", "/nowhere", "--model", "small"], "bpe")])
def test_a_wrong_argument_is_an_error_before_any_work(tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--out", str(out), *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not out.exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "torchrun --nproc_per_node=8" in text and "DINOv2" in text and "OpenCLIP" in text
    for action in train.make_parser()._actions:
        assert action.help and (action.option_strings[-1] in text)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(micro_model, tmp_path, monkeypatch):
    _, _, state, _ = setting(micro_model, tmp_path / "o")
    path = str(tmp_path / "c.pt")
    train.save_checkpoint(path, state, 1, {"batches": 1, "states": {}})
    before = open(path, "rb").read()

    def full_disk(content, f):
        f.write(b"half a checkpoint")
        raise OSError("no space left")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        train.save_checkpoint(path, state, 2, {"batches": 2, "states": {}})
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["c.pt"]


# --- CUDA: written to share all logic with the above; not yet run on a GPU (README says so) ---

@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_equal_eager_ones(micro_model, tmp_path, compiled):
    device, losses = torch.device("cuda"), []
    for capture in (False, True):
        args = train.parse_args(["--init", micro_model, "--out", str(tmp_path / "o"), *FAST, "--compile" if compiled else "--no-compile"])
        config, state = train.model_config(args), train.build_state(args, device)
        source = data.BuiltinSource(args.batch_size, config.image_size)
        images, tokens = torch.tensor(source.images, device=device), data.byte_tokenizer(source.captions, config.text_context_length).to(device)
        step = train.CapturedStep(lambda views: train.train_step(state, views), capture)
        curve = []
        for i in range(train.CapturedStep.WARM_UP + 10):
            train.set_schedules(state, i, 40)
            step(train.make_views(args, config, i, images, tokens))
            curve.append(state.totals["loss"].item())
        losses.append(torch.tensor(curve).diff())
    torch.testing.assert_close(losses[0], losses[1], atol=2e-3, rtol=2e-3)     # fp32 kernels may be chosen anew in a graph


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device(micro_model, tmp_path):
    args = train.parse_args(["--init", micro_model, "--out", str(tmp_path / "o"), *FAST, "--no-compile"])
    device = torch.device("cuda")
    config, state = train.model_config(args), train.build_state(args, device)
    source = data.BuiltinSource(args.batch_size, config.image_size)
    images, tokens = torch.tensor(source.images, device=device), data.byte_tokenizer(source.captions, config.text_context_length).to(device)
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i else "default")      # the first step may allocate and tune
        try:
            views = train.make_views(args, config, i, images, tokens)
            train.set_schedules(state, i, 10)
            train.train_step(state, views)
        finally:
            torch.cuda.set_sync_debug_mode("default")
