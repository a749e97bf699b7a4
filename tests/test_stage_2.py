"""Stage 2: the pixel decoder against a discriminator. What is frozen, whose gradient goes where, the adaptive
weight, the start of the adversarial term, ranks, resume, steps that are not finite."""
import math

import pytest
import torch
from PIL import Image

import evaluate
import train_tokenizer as train
from conftest import micro_config, run_script
from losses import (LPIPS, Discriminator, adaptive_weight, discriminator_loss, generator_loss,
                    reconstruction_loss)
from test_training import everything_in, kill_at, leaves, rows_of, setting
from vtp import VTP, UserError, denormalize, normalize

STAGE_2 = ["--stage", "2", "--warmup", "0", "--samples", "48", "--batch_size", "4", "--train_size", "64",
           "--eval_samples", "16", "--log_every", "1", "--precision", "fp32", "--decoder_ema", "0.9"]


def stage_2(micro_model, tmp_path, *more, device="cpu"):
    """State of a micro run, and the function step -> its batch of views."""
    return setting(micro_model, tmp_path / "o", *more, device=device, common=STAGE_2)[2:]


# ----- The losses -----------------------------------------------------------------------------------------

def test_a_logit_sees_a_patch_of_70_pixels_and_other_samples_never():
    torch.manual_seed(0)
    network = Discriminator().double()
    images = torch.randn(2, 3, 128, 128, dtype=torch.double, requires_grad=True)
    for layer in network.layers:        # GroupNorm sees all of an image: what is left are the convolutions
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    logits, _ = network(images, images)
    assert logits.shape == (2, 1, 14, 14)
    grad, = torch.autograd.grad(logits[0, 0, 7, 7], images)
    seen = grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70] and not grad[1].any()


@torch.no_grad()
def test_logits_of_a_sample_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network, images = Discriminator().double(), torch.randn(4, 3, 32, 32, dtype=torch.double)
    logits, _ = network(images, images)
    assert logits.shape == (4, 1, 2, 2)
    # float64: other batch sizes may choose other algorithms
    torch.testing.assert_close(network(images[1:2], images)[0], logits[1:2], atol=1e-12, rtol=1e-12)


def test_hinge_losses_are_their_definitions():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(((0.5 + 2) / 3 + (1 + 1.5) / 3) / 2)
    assert generator_loss(fake).item() == pytest.approx(2.5 / 3)


def test_the_adaptive_weight_is_the_ratio_of_norms_and_bounded():
    rec, gan = torch.tensor([3.0, 4.0]), torch.tensor([[0.6], [0.8]])
    assert adaptive_weight(rec, gan).item() == pytest.approx(5 / 1.0001)
    assert adaptive_weight(rec, 0 * gan).item() == 1e4      # 5 / 1e-4, cut


# ----- The step -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["before its start", "on", "on, with LPIPS and recomputation"])
def test_gradients_are_those_of_both_losses_and_none_leaks(micro_model, tmp_path, monkeypatch, kind,
                                                           rotation_in_fp32):
    """Against one loss for each network, written down as VQGAN's and differentiated whole."""
    monkeypatch.setattr(train, "LPIPS", lambda weights: LPIPS(None))
    (tmp_path / "weights").mkdir()
    with_lpips = ["--lpips", str(tmp_path / "weights"), "--checkpoint_blocks"]
    more, gan_weight = with_lpips if "LPIPS" in kind else [], 0.8 * kind.startswith("on")
    state, views = stage_2(micro_model, tmp_path, "--gan_weight", "0.8", "--gan_start", "0.1", *more)
    train.set_schedules(state, 1 if kind.startswith("on") else 0, 10)
    batch = views(0)
    loss, values = train.forward_backward(state, batch)
    ours = [p.grad.clone() for _, p in state.parameters]
    assert all(p.grad is None for p in state.model.parameters())

    decoder, discriminator, (images,) = state.student, state.discriminator, batch["images"]
    latents = state.model.encode(images).detach()
    fake, real = (2 * denormalize(x) - 1 for x in (decoder(latents), images))
    rec, logits = reconstruction_loss(fake, real, state.lpips), discriminator.layers(fake)
    assert (state.lpips is not None) == ("LPIPS" in kind)
    last = decoder.proj_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rec, -logits.mean())]
    weight = (norms[0] / (norms[1] + 1e-4)).item()
    expected = rec + gan_weight * weight * -logits.mean()
    grads = torch.autograd.grad(expected, list(decoder.parameters()))
    own = discriminator_loss(discriminator.layers(real), discriminator.layers(fake.detach()))
    grads += torch.autograd.grad(own, list(discriminator.parameters()))
    # fp32 sums in another order, of gradients whose largest is taken as the size
    for (name, _), grad, right in zip(state.parameters, ours, grads, strict=True):
        size = right.abs().max().item()
        torch.testing.assert_close(grad, right, atol=1e-4 * size, rtol=1e-4, msg=lambda m: f"{name}: {m}")
    assert values["adaptive_weight"].item() == pytest.approx(weight, rel=1e-4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert values["loss_discriminator"].item() == pytest.approx(own.item(), rel=1e-5)


def test_before_its_start_the_adversarial_term_is_off_to_the_bit(micro_model, tmp_path):
    ends = []
    for more in (["--gan_weight", "0"], ["--gan_start", "0.5"]):
        state, views = stage_2(micro_model, tmp_path, *more)
        for step in range(6):
            if step == 5:       # the first of the second half
                ends.append([p.clone() for p in state.student.parameters()])
            train.set_schedules(state, step, 10)
            train.train_step(state, views(step))
        ends.append(list(state.student.parameters()))
        if state.discriminator is not None:
            moments = [state.optimizer.state[p]["exp_avg"] for p in state.discriminator.parameters()]
            assert all(m.any() for m in moments)        # it learned from the first step on
    without, without_after, before, after = ends
    assert all(torch.equal(a, b) for a, b in zip(without, before))
    assert not any(torch.equal(a, b) for a, b in zip(without_after, after))


def test_what_is_exported_is_the_average_of_the_decoders(micro_model, tmp_path):
    more = ["--decoder_ema", "0.75", "--decoder_lr", "3", "--lr", "0.01", "--clip_grad", "1e9"]
    state, views = stage_2(micro_model, tmp_path, *more)
    average = [p.clone() for p in state.student.parameters()]
    for step in range(3):
        train.set_schedules(state, step, 10)
        train.train_step(state, views(step))
        average = [0.75 * a + 0.25 * p for a, p in zip(average, state.student.parameters())]
    for a, p in zip(average, state.model.pixel_decoder.parameters()):
        torch.testing.assert_close(p, a, atol=1e-6, rtol=1e-5)         # three roundings in fp32
    rates = {name.partition(".")[0]: group["lr_factor"] for group in state.optimizer.param_groups
             for name, p in state.parameters if any(p is q for q in group["params"])}
    assert rates == {"pixel_decoder": 3.0, "discriminator": 1.0}


@pytest.mark.parametrize("side", ["images", "discriminator's gradient", "discriminator's loss"])
def test_a_step_that_is_not_finite_on_either_side_changes_neither(micro_model, tmp_path, monkeypatch, side):
    broken = {"discriminator's gradient": lambda *logits: math.nan * discriminator_loss(*logits),
              "discriminator's loss": lambda *logits: math.inf + discriminator_loss(*logits)}
    state, views = stage_2(micro_model, tmp_path)
    for step in range(3):
        train.set_schedules(state, step, 10)
        batch = views(step)
        if step == 1:
            before = everything_in(state)
            if side == "images":
                batch["images"] = batch["images"] * math.nan
            else:
                monkeypatch.setattr(train, "discriminator_loss", broken[side])
        train.train_step(state, batch)
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, everything_in(state)))
            monkeypatch.setattr(train, "discriminator_loss", discriminator_loss)
    assert state.totals["finite_steps"] == 2 and state.totals["steps"] == 3


# ----- Runs -----------------------------------------------------------------------------------------------

def test_a_killed_run_resumes_bit_for_bit_and_all_but_the_decoder_stays(micro_model, tmp_path, monkeypatch):
    common = ["--init", micro_model, *STAGE_2, "--checkpoint_every", "5", "--eval_every", "6"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main([*common, "--out", str(whole)])
    kill_at(9, monkeypatch, [*common, "--out", str(cut)])
    train.main(["--out", str(cut), "--resume"])
    checkpoints = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, cut)]
    a, b = map(leaves, checkpoints)
    assert len(a) == len(b)
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))
    fields = ("loss", "loss_gan", "loss_discriminator", "adaptive_weight", "logits_real", "logits_fake",
              "discriminator_accuracy", "grad_norm_decoder", "grad_norm_discriminator")
    assert rows_of(whole, "train", *fields) == rows_of(cut, "train", *fields)
    assert checkpoints[0].keys() >= {"model", "decoder", "discriminator", "optimizer"}

    before, after = VTP.from_pretrained(micro_model), VTP.from_pretrained(str(cut))
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()         # the text tower as well
    for name, value in old.items():
        assert torch.equal(value, new[name]) or name.startswith("pixel_decoder."), name
    changed = [name for name, value in old.items() if not torch.equal(value, new[name])]
    assert len(changed) == len([*before.pixel_decoder.parameters()])
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(before.encode(normalize(pixels)), after.encode(normalize(pixels)))
    # optimiser state of decoder and discriminator alone
    n_learning = len([*before.pixel_decoder.parameters(), *Discriminator().parameters()])
    assert len(checkpoints[0]["optimizer"]["state"]) == n_learning
    # input, stage 1, stage 2: two times three rows of 12 and 4 images
    picture = Image.open(cut / "reconstructions_0000012.png")
    assert picture.height == 2 * 3 * (64 + 2) - 2 and (cut / "curves.png").exists()


def test_two_ranks_have_the_run_of_one(micro_model, tmp_path):
    fields = ("loss_rec", "loss_gan", "loss_discriminator", "adaptive_weight", "logits_real")
    curves = []
    for n in (1, 2):
        out = tmp_path / f"r{n}"
        more = ["--gan_start", "0.3", "--lr", "1e-4", "--out", out]
        done = run_script(["train_tokenizer.py", "--init", micro_model, *STAGE_2, *more], n_ranks=n)
        assert "Warning" not in done.stderr      # of a gradient that DDP must copy
        curves.append(torch.tensor(rows_of(out, "train", *fields)))
    # roundings of RoPE that turn move the pixels by 1.5e-4 of their size (see conftest)
    torch.testing.assert_close(*curves, atol=2e-3, rtol=2e-3)


def test_without_an_adversary_a_run_is_one_of_reconstruction_alone(micro_model, tmp_path, monkeypatch):
    """And of a model without text tower; bf16, and the FLOPs that are counted."""
    folder, out = str(tmp_path / "autoencoder"), tmp_path / "o"
    torch.manual_seed(0)
    VTP(micro_config(train_clip=False)).save_pretrained(folder)
    more = ["--init", folder, *STAGE_2, "--gan_weight", "0", "--precision", "bf16", "--out", str(out)]
    kill_at(9, monkeypatch, [*more, "--checkpoint_every", "5"])
    train.main(["--out", str(out), "--resume"])
    row = evaluate.read_metrics(str(out))[-2]
    assert row["kind"] == "train" and row["loss"] == row["loss_rec"] and "loss_gan" not in row
    assert row["grad_norm"] == row["grad_norm_decoder"] and "grad_norm_discriminator" not in row
    state, views = stage_2(folder, tmp_path / "b", "--gan_weight", "0")
    batch, decoder = views(0), sum(p.numel() for p in state.student.parameters() if p.ndim >= 2)
    encoder = sum(p.numel() for p in state.model.trunk.parameters() if p.ndim >= 2)
    # 2 FLOPs a weight and token, thrice where there is a backward, and attention's: 16 or 17 tokens of width
    # 64 that weigh a little beside blocks of 12 x 64 weights a token and channel
    train.set_schedules(state, 0, 10)
    counted = train.count_flops(lambda: train.forward_backward(state, batch))
    assert counted == pytest.approx(2 * 4 * 16 * (3 * decoder + encoder), rel=0.1)


@pytest.mark.parametrize("more, words", [
    (["--model", "tiny"], "trains the pixel decoder of a model"),
    (["--init", "WITHOUT"], "trains the pixel decoder of a model"),
    (["--init", "MODEL", "--lambda_ssl", "2", "--drop_path", "0.1"], "no use for --lambda_ssl, --drop_path"),
    (["--init", "MODEL", "--no-bottleneck_ae_only"], "no use for --bottleneck_ae_only"),
    (["--init", "MODEL", "--image_size", "16"], "the discriminator needs 24"),
    (["--init", "MODEL", "--gan_start", "1"], "below 1")])
def test_what_stage_2_cannot_do_is_an_error_before_any_work(micro_model, tmp_path, capsys, more, words):
    folders = dict(WITHOUT=str(tmp_path / "without"), MODEL=micro_model)
    VTP(micro_config(train_reconstruction=False)).save_pretrained(folders["WITHOUT"])
    more = [folders.get(word, word) for word in more]
    with pytest.raises(SystemExit) as stop:
        train.read_settings(["--stage", "2", *more, "--out", str(tmp_path / "o")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_model_that_lacks_tensors_is_not_completed_with_random_ones(micro_model, tmp_path):
    folder = str(tmp_path / "cut")
    model = VTP.from_pretrained(micro_model)
    del model.trunk.blocks[1].norm1
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="lacks trunk.blocks.1.norm1.weight"):
        stage_2(folder, tmp_path)


def test_stage_2_keeps_the_config_and_decodes_all_of_a_batch(micro_model, tmp_path):
    args, config = train.read_settings(["--stage", "2", "--init", micro_model, "--out", str(tmp_path / "o")])
    assert args.rec_batch_size == args.batch_size and config == VTP.from_pretrained(micro_model).config


@pytest.mark.gpu
def test_captured_steps_of_stage_2_equal_eager_ones(micro_model, tmp_path):
    curves = []
    for capture in (False, True):
        state, views = stage_2(micro_model, tmp_path, "--no-compile", device="cuda")
        step, curve = train.CapturedStep(lambda batch: train.train_step(state, batch), capture), []
        for i in range(train.CapturedStep.WARM_UP + 10):
            train.set_schedules(state, i, 40)
            step(views(i))
            curve.append([state.totals[k].item() for k in ("loss", "loss_discriminator")])
        curves.append(torch.tensor(curve).diff(dim=0))
        step.close()
    torch.testing.assert_close(*curves, atol=2e-3, rtol=2e-3)      # kernels may be chosen anew in a graph
