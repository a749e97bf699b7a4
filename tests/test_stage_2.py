"""Stage 2: the pixel decoder against a discriminator. What is frozen, whose gradient goes where, the adaptive
weight, the start of the adversarial term, ranks, resume, steps that are not finite."""
import math

import pytest
import torch
from PIL import Image

import train_tokenizer as train
from conftest import micro_config, run_script
from losses import (Discriminator, adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss)
from test_training import everything_in, kill_at, leaves, rows_of, setting
from vtp import VTP, denormalize, normalize

STAGE_2 = ["--stage", "2", "--rec_batch_size", "4", "--warmup", "0"]


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

@pytest.mark.parametrize("gan_is_on", [0.0, 1.0])
def test_gradients_are_those_of_both_losses_and_none_leaks(micro_model, tmp_path, gan_is_on):
    """Against one loss for each network, written down as VQGAN's and differentiated whole."""
    args, _, state, views = setting(micro_model, tmp_path / "o", *STAGE_2, "--gan_weight", "0.8")
    train.set_schedules(state, 0, 10)
    state.scheduled["gan_is_on"].fill_(gan_is_on)
    batch = views(0)
    loss, values = train.forward_backward(state, batch)
    ours = [p.grad.clone() for _, p in state.parameters]
    assert all(p.grad is None for p in state.model.parameters())

    decoder, discriminator = state.student, state.discriminator
    latents = state.model.encode(batch["images"]).detach()
    fake, real = (2 * denormalize(x) - 1 for x in (decoder(latents), batch["images"]))
    rec, logits = reconstruction_loss(fake, real), discriminator.layers(fake)
    last = decoder.proj_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rec, -logits.mean())]
    weight = (norms[0] / (norms[1] + 1e-4)).item()
    expected = rec + 0.8 * gan_is_on * weight * -logits.mean()
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
        _, _, state, views = setting(micro_model, tmp_path / "o", *STAGE_2, *more)
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
    _, _, state, views = setting(micro_model, tmp_path / "o", *STAGE_2, *more)
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


@pytest.mark.parametrize("side", ["images", "discriminator"])
def test_a_step_that_is_not_finite_on_either_side_changes_neither(micro_model, tmp_path, monkeypatch, side):
    _, _, state, views = setting(micro_model, tmp_path / "o", *STAGE_2)
    for step in range(3):
        train.set_schedules(state, step, 10)
        batch = views(step)
        if step == 1:
            before = everything_in(state)
            if side == "images":
                batch["images"] = batch["images"] * math.nan
            else:
                monkeypatch.setattr(train, "discriminator_loss",
                                    lambda real, fake: math.nan * discriminator_loss(real, fake))
        train.train_step(state, batch)
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(before, everything_in(state)))
            monkeypatch.setattr(train, "discriminator_loss", discriminator_loss)
    assert state.totals["finite_steps"] == 2 and state.totals["steps"] == 3


# ----- Runs -----------------------------------------------------------------------------------------------

def stage_2_run(micro_model, *more):
    return ["--init", micro_model, *STAGE_2, "--samples", "48", "--batch_size", "4", "--train_size", "64",
            "--eval_samples", "16", "--log_every", "1", "--precision", "fp32", "--decoder_ema", "0.9", *more]


def test_a_killed_run_resumes_bit_for_bit_and_all_but_the_decoder_stays(micro_model, tmp_path, monkeypatch):
    common = stage_2_run(micro_model, "--checkpoint_every", "5", "--eval_every", "6")
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
        common = stage_2_run(micro_model, "--gan_start", "0.3", "--lr", "1e-4", "--out", out)
        done = run_script(["train_tokenizer.py", *common], n_ranks=n)
        assert "Warning" not in done.stderr      # of a gradient that DDP must copy
        curves.append(torch.tensor(rows_of(out, "train", *fields)))
    # roundings of RoPE that turn move the pixels by 1.5e-4 of their size (see conftest)
    torch.testing.assert_close(*curves, atol=2e-3, rtol=2e-3)


def test_stage_2_needs_a_model_with_a_decoder(micro_model, tmp_path, capsys):
    torch.manual_seed(0)
    without = str(tmp_path / "without")
    VTP(micro_config(train_reconstruction=False)).save_pretrained(without)
    for more in ([], ["--init", without]):
        with pytest.raises(SystemExit) as stop:
            train.read_settings(["--stage", "2", *more, "--out", str(tmp_path / "o")])
        assert stop.value.code == 2 and "trains the pixel decoder of a model" in capsys.readouterr().err
    args, config = train.read_settings(["--stage", "2", "--init", micro_model, "--out", str(tmp_path / "o")])
    assert args.rec_batch_size == args.batch_size and config.train_clip


@pytest.mark.gpu
def test_captured_steps_of_stage_2_equal_eager_ones(micro_model, tmp_path):
    curves = []
    for capture in (False, True):
        _, _, state, views = setting(micro_model, tmp_path / "o", *STAGE_2, "--no-compile", device="cuda")
        step, curve = train.CapturedStep(lambda batch: train.train_step(state, batch), capture), []
        for i in range(train.CapturedStep.WARM_UP + 10):
            train.set_schedules(state, i, 40)
            step(views(i))
            curve.append([state.totals[k].item() for k in ("loss", "loss_discriminator")])
        curves.append(torch.tensor(curve).diff(dim=0))
        step.close()
    torch.testing.assert_close(*curves, atol=2e-3, rtol=2e-3)      # fp32 kernels may be chosen anew in a graph
