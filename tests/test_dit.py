"""The DiT against the authors' numbers, flow matching and the samplers against closed forms, the
latent cache, train_dit.py."""
import functools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp

import data
import dit
import evaluate
import train_dit
from conftest import (FIXTURES, FP32, HERE, ROOT, NothingAsked, assert_close_but_for_roundings,
                      micro_config, run_script)
from dit import (DIT_SIZES, DiT, flow_loss, flow_path, generate, guide, integrate, noise_and_labels,
                 sample, time_grid)
from test_data import sample as tar_sample
from test_data import write_tar
from train_dit import LatentCache, complete_cache
from train_tokenizer import count_flops
from vtp import VTP, UserError, denormalize, read_safetensors

RELEASED = os.path.join(FIXTURES, "dit_released_style")
FAST = ["--samples", "96", "--batch_size", "8", "--train_size", "48", "--log_every", "2",
        "--eval_every", "6", "--checkpoint_every", "6", "--precision", "fp32", "--steps", "4",
        "--eval_samples", "0"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def released():
    model = DiT.from_lightningdit(os.path.join(RELEASED, "checkpoint.pt")).eval()
    return model, read_safetensors(os.path.join(RELEASED, "expected.safetensors"))


def lively(**sizes):
    """A small DiT whose zero-initialised layers are not zero, so that every part shows in its
    output."""
    torch.manual_seed(0)
    small = dict(dim=32, depth=2, n_heads=2, patch_size=1, input_size=4, in_channels=6,
                 num_classes=5)
    return with_lively_weights(DiT(**{**small, **sizes})).eval()


def with_lively_weights(model):
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model


def record_batch_sizes(model, monkeypatch):
    """A list to which every forward of the model appends the size of its batch."""
    sizes, velocity = [], model.velocity

    def recorded(x, *rest):
        sizes.append(len(x))
        return velocity(x, *rest)
    monkeypatch.setattr(model, "velocity", recorded)
    return sizes


# LightningDiT rotates in fp32, so that recorded numbers hold to fp32's rounding on any CPU.
def test_forward_is_lightningdits(released):
    model, expected = released
    out = model(expected["x"], expected["t"], expected["y"])
    torch.testing.assert_close(out, expected["out"], **FP32)


@torch.no_grad()
def test_every_norm_is_an_rms_norm_whose_eps_counts():
    """LightningDiT's eps is 1e-6; values of order 1 would not tell it from the encoder's 1e-5."""
    for name, norm in lively(use_qk_norm=True).named_modules():
        if isinstance(norm, torch.nn.RMSNorm):
            x = 2e-3 * torch.randn(4, len(norm.weight))
            expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            torch.testing.assert_close(norm(x), expected, **FP32, msg=lambda m: f"{name}: {m}")


def test_guidance_on_three_channels_is_the_authors(released):
    model, expected = released
    x = expected["cfg_z"][:2]
    out = model(torch.cat((x, x)), expected["cfg_t"], expected["cfg_y"])
    guided = guide(*out.chunk(2), 1.7, 3)
    torch.testing.assert_close(guided, expected["cfg_out"][:2], **FP32)
    # below the interval: the conditional branch alone
    off = model(x, torch.full((2,), 0.05), expected["cfg_y"][:2])
    torch.testing.assert_close(off, expected["cfg_off_out"][:2], **FP32)


def test_a_fresh_model_has_the_fixed_tables_and_names_of_lightningdit(released):
    fresh, loaded = DiT(48, 2, 2, 1, 4, 16, 10), released[0]
    state = torch.load(os.path.join(RELEASED, "checkpoint.pt"), weights_only=True)["ema"]
    assert fresh.state_dict().keys() == state.keys()
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        # angles are at most 3, in fp32
        torch.testing.assert_close(fresh.state_dict()[name], state[name], atol=1e-6, rtol=0)
    assert (loaded.blocks[0].attn.n_heads, loaded.num_classes) == (2, 10)
    assert (loaded.patch_size, loaded.latent_shape) == (1, (16, 4, 4))
    out = fresh(torch.randn(3, 16, 4, 4), torch.rand(3), torch.arange(3))
    assert torch.equal(out, torch.zeros(3, 16, 4, 4))                               # adaLN-zero


def test_patches_of_two_go_back_to_their_places():
    model = lively(patch_size=2, in_channels=3)
    state = {"module." + k: v for k, v in model.state_dict().items()}       # as DDP saves it
    again = DiT.from_lightningdit({"model": state})
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 4])
    assert torch.equal(again(x, t, y), model(x, t, y))
    # (B, 4, 3 * 2 * 2), channel first
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    proj = model.x_embedder.proj
    patches = model.x_embedder(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches, tokens @ proj.weight.flatten(1).T + proj.bias, **FP32)
    with torch.no_grad():        # an output that is constant for each place in a patch
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(torch.arange(12.0))
    out = model(x, t, y)[0]
    assert torch.equal(out[:, :2, :2], torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1))
    assert torch.equal(out[:, :2, :2], out[:, 2:, 2:])


def slow_attention(x, tensors, n_heads):
    """LightningDiT's attention in fp64, one head of one image after another: x (B, N, dim) -> the
    same. QK-norm where it has tensors; RoPE as a product of complex numbers."""
    x, tensors = x.double(), {name: tensor.double() for name, tensor in tensors.items()}
    (B, N, dim), side = x.shape, math.isqrt(x.shape[1])
    qkv = x @ tensors["qkv.weight"].T + tensors["qkv.bias"]
    qkv = qkv.view(B, N, 3, n_heads, dim // n_heads)
    n_angles = dim // n_heads // 4                          # of rows, and as many of columns
    frequencies = 10000.0 ** (-torch.arange(n_angles).double() / n_angles)
    places = torch.arange(N)[:, None]
    angles = torch.cat((places // side * frequencies, places % side * frequencies), dim=1)
    rotation = torch.polar(torch.ones_like(angles), angles)

    def prepare(z, norm):
        if norm in tensors:
            z = z / (z.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * tensors[norm]
        pairs = torch.view_as_complex(z.reshape(N, -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(1)
    out = torch.empty_like(qkv[:, :, 0])
    for b in range(B):
        for h in range(n_heads):
            q, k, v = qkv[b, :, :, h].unbind(1)
            q, k = prepare(q, "q_norm.weight"), prepare(k, "k_norm.weight")
            out[b, :, h] = (q @ k.T / math.sqrt(dim // n_heads)).softmax(dim=1) @ v
    return out.flatten(2) @ tensors["proj.weight"].T + tensors["proj.bias"]


def with_slow_attention(state):
    """The model of a state dict, its attention replaced by the slow one."""
    model = DiT.from_lightningdit(state).eval()
    for i, block in enumerate(model.blocks):
        start = f"blocks.{i}.attn."
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        n_heads = block.attn.n_heads
        block.attn.forward = lambda x, rope, own=own, n_heads=n_heads: (
            slow_attention(x, own, n_heads).float())
    return model


def normed_state(released):
    """A state dict with QK-norm. Queries and keys are so small, 0.001, that its eps of 1e-6
    counts."""
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor.clone() for name, tensor in released[0].state_dict().items()}
    for i in range(2):
        for name in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{name}"][:96] *= 1e-3       # of 48 channels each
        for name in ("q_norm", "k_norm"):
            weight = 1 + torch.rand(24, generator=generator)
            state[f"blocks.{i}.attn.{name}.weight"] = weight
    return state


def test_qk_norm_is_lightningdits(released):
    """Against a slow attention, which without QK-norm gives the authors' numbers."""
    expected, state = released[1], normed_state(released)
    inputs = [expected[name] for name in ("x", "t", "y")]
    with torch.no_grad():
        plain = with_slow_attention(released[0].state_dict())(*inputs)
        slow, fast = with_slow_attention(state)(*inputs), DiT.from_lightningdit(state)(*inputs)
    torch.testing.assert_close(plain, expected["out"], atol=1e-4, rtol=0)
    # fp32 beside fp64
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_qk_norm_loads_where_all_its_tensors_are(released, tmp_path):
    state, path = normed_state(released), str(tmp_path / "a.pt")
    torch.save(dict(ema=state), path)
    again = DiT.from_lightningdit(path).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert not any("_norm" in name for name in released[0].state_dict() if ".attn." in name)
    for name in [k for k in state if "q_norm" in k or "k_norm" in k]:
        torch.save(dict(ema={k: v for k, v in state.items() if k != name}), path)
        with pytest.raises(ValueError, match=re.escape(path)):
            DiT.from_lightningdit(path)


def test_another_variant_is_an_error_that_says_so(released):
    state = dict(released[0].state_dict())
    state["blocks.0.attn.q_norm.bias"] = torch.zeros(24)
    with pytest.raises(ValueError, match="q_norm.bias"):
        DiT.from_lightningdit(state)
    with pytest.raises(ValueError, match="LightningDiT"):
        DiT.from_lightningdit({"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="patches of 3"):
        DiT(**DIT_SIZES["tiny"] | dict(patch_size=3), input_size=16, in_channels=4, num_classes=5)


def test_sizes_are_lightningdits():
    """Its millions of parameters, on the 32 channels of its latents and ImageNet's classes."""
    for name, millions, rounding in (("B/1", 130, 1), ("XL/1", 675, 1), ("1.0B/1", 1000, 50)):
        with torch.device("meta"):
            model = DiT(**DIT_SIZES[name], input_size=16, in_channels=32, num_classes=1000)
        n = sum(p.numel() for p in model.parameters())
        assert n / 1e6 == pytest.approx(millions, abs=rounding)


def test_flow_matching_is_its_definition():
    x, noise, t = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), torch.tensor([0.0, 0.75])
    x_t, target = flow_path(x, noise, t)
    assert torch.equal(x_t[0], noise[0])
    assert torch.allclose(x_t[1], 0.25 * noise[1] + 0.75 * x[1])
    assert torch.equal(target, x - noise)
    v, cosines = torch.randn(2, 3, 2, 2), 0.0
    for b in range(2):
        for i in range(2):
            for j in range(2):
                a, c = v[b, :, i, j], target[b, :, i, j]
                cosines += float(a @ c / (a.norm() * c.norm()))
    expected = ((v - target) ** 2).mean().item() + 1 - cosines / 8
    assert flow_loss(v, target).item() == pytest.approx(expected, rel=1e-5)         # fp32 sums
    assert flow_loss(target, target).item() == pytest.approx(0, abs=1e-6)           # 1 - 1 in fp32
    short = 0.04 * target / target.norm(dim=1, keepdim=True)        # of a cosine's eps of 0.1
    expected = ((short - target) ** 2).mean().item() + 1 - 0.4
    assert flow_loss(short, target).item() == pytest.approx(expected, rel=1e-5)
    normals = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    logits = torch.logit(dit.draw_timesteps(normals, -0.5, 1.25))
    # 5 standard errors
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(1.25, abs=0.02)


def test_the_losss_minimum_is_the_conditional_mean_of_the_velocity():
    """With data d ~ N(0, s^2) in one channel of many equal ones, E[d - noise | x_t] is linear in
    x_t, with a known slope and a known remaining squared error; any other slope costs more."""
    s, t, n = 0.5, 0.3, 200_000
    generator = torch.Generator().manual_seed(0)
    d = s * torch.randn(n, 1, 1, 1, generator=generator)
    noise = torch.randn(n, 1, 1, 1, generator=generator)
    x_t, target = flow_path(d, noise, torch.full((n,), t))
    variance = (1 - t) ** 2 + (t * s) ** 2
    slope = (t * s ** 2 - (1 - t)) / variance
    remaining = 1 + s ** 2 - slope ** 2 * variance
    mse = lambda k: ((k * x_t - target) ** 2).mean().item()
    # 200,000 draws: 0.3 % of standard error
    assert mse(slope) == pytest.approx(remaining, rel=0.02)
    assert mse(slope) < min(mse(slope * 0.9), mse(slope * 1.1))
    # in one channel the cosine is the sign's agreement; its eps softens the few draws whose
    # velocity is below 0.1
    cosine = flow_loss(slope * x_t, target).item() - mse(slope)
    disagree = (torch.sign(slope * x_t) != torch.sign(target)).float().mean().item()
    assert cosine == pytest.approx(2 * disagree, abs=0.01)


def test_the_grid_is_the_authors():
    assert np.array_equal(time_grid(250), np.linspace(0, 1, 250))
    t = time_grid(11, 0.075)
    assert t[0] == 0 and t[-1] == 1
    assert t[5] == pytest.approx(0.075 * 0.5 / (1 - 0.925 * 0.5), rel=1e-12)
    calls = []
    integrate(lambda x, k: calls.append(k) or x, torch.ones(1), time_grid(250))
    assert calls == list(range(249))        # as many points as steps, so 249 steps


def test_samplers_solve_a_closed_form_at_their_order():
    """dx/dt = -3 cos(3 t) x has x(1) = exp(-sin 3) x(0). Half the step divides the error by 2 to
    the power of the order."""
    def error(method, points, shift):
        times = time_grid(points, shift)
        velocity = lambda x, k: -3 * math.cos(3 * times[k]) * x
        x = integrate(velocity, torch.ones(1, dtype=torch.float64), times, method)
        return abs(x.item() - math.exp(-math.sin(3)))
    # velocities are taken in fp32, so errors must stay well above 1e-6 to show an order
    for method, order, points in (("euler", 1, 401), ("heun", 2, 51), ("adams", 3, 51)):
        for shift in (1.0, 0.4):
            ratio = error(method, points, shift) / error(method, 2 * points - 1, shift)
            assert 2 ** order * 0.7 < ratio < 2 ** order * 1.5, (method, shift, ratio)
    # at the same number of evaluations
    assert error("adams", 41, 1.0) < error("heun", 21, 1.0) < error("euler", 41, 1.0)


def test_heun_of_the_sizes_b_is_as_exact_as_dopri5(micro_model, tmp_path):
    """The paper's dopri5 (SciPy's RK45) at its tolerances is the yardstick, the same at small ones
    the exact solution. The model is in fp64: rounding is then below 1e-6."""
    method, points, shift = sampling_of(micro_model, "--out", str(tmp_path), "--model", "B/1")
    model = DiT.from_lightningdit(os.path.join(RELEASED, "checkpoint.pt")).double()
    noise, labels = noise_and_labels(range(4), 0, model.latent_shape, 10)
    times = time_grid(points, shift)

    @torch.no_grad()
    def velocity(t, x):
        x = torch.as_tensor(x).double().view(noise.shape)
        return model(x, torch.full((4,), t, dtype=torch.float64), labels)

    def dopri5(rtol, atol):
        derivative = lambda t, x: velocity(t, x).numpy().ravel()
        start = noise.double().numpy().ravel()
        return solve_ivp(derivative, (0, 1), start, "RK45", rtol=rtol, atol=atol).y[:, -1]
    exact = dopri5(1e-8, 1e-10)
    heun = integrate(lambda x, k: velocity(times[k], x), noise, times, method).numpy().ravel()
    error = lambda x: np.sqrt(np.mean((x - exact) ** 2))
    # the help of --method has 3e-5 and 8e-5, of a trained model; this one is smoother
    assert error(heun) < error(dopri5(1e-3, 1e-6)) < 3e-5


def test_sampling_is_the_plain_loop(released):
    """Sharing embeddings and modulations over samples and steps changes nothing but rounding."""
    model, expected = released
    x, y = expected["x"], torch.tensor([3, 3, 9, 0])
    times = time_grid(5, 0.3)
    with torch.no_grad():
        plain = x.clone()
        for a, b in zip(times, times[1:]):
            t = torch.full((4,), a, dtype=torch.float32)
            conditional, unconditional = model(plain, t, y), model(plain, t, torch.full_like(y, 10))
            plain = plain + (b - a) * guide(conditional, unconditional, 2.5, 3)
    sampled = sample(model, x, y, 5, "euler", 0.3, 2.5, channels=3)
    torch.testing.assert_close(sampled, plain, **FP32)


def test_guidance_of_one_is_none_and_computes_no_null_branch(released, monkeypatch):
    model, expected = released
    sizes = record_batch_sizes(model, monkeypatch)
    one = sample(model, expected["x"], expected["y"], 5, guidance=1.0)
    assert sizes == [4] * 4
    branches = sample(model, expected["x"], expected["y"], 5, guidance=1.0 + 1e-9)
    assert sizes[4:] == [8] * 4
    # fp32 in batches of another size
    torch.testing.assert_close(one, branches, **FP32)


@pytest.mark.parametrize("method", dit.METHODS)
def test_skipping_the_interval_equals_computing_and_discarding(released, monkeypatch, method):
    model, expected = released
    x, y = expected["x"], expected["y"]
    sizes = record_batch_sizes(model, monkeypatch)
    skipped = sample(model, x, y, 11, method, guidance=3.0, interval=(0.25, 0.65))
    # 0.3, 0.4, 0.5, 0.6; Heun is at each twice, adams at 0.4 once more, for its start
    assert sizes.count(8) == dict(euler=4, heun=8, adams=5)[method]
    times = time_grid(11)

    def velocity_of_both(x, k):
        t = torch.full((4,), times[k], dtype=torch.float32)
        c, u = model(x, t, y), model(x, t, torch.full_like(y, 10))
        return guide(c, u, 3.0) if 0.25 <= times[k] <= 0.65 else c
    with torch.no_grad():
        discarded = integrate(velocity_of_both, x, times, method, jumps={3, 7})
    # fp32 in batches of another size
    torch.testing.assert_close(skipped, discarded, **FP32)


def test_a_texts_feature_is_a_condition_and_zeros_are_the_null():
    model, y = lively(num_classes=None, text_dim=8), torch.randn(3, 8)
    embedder = model.y_embedder
    assert torch.equal(embedder(torch.zeros(2, 8)), embedder.null.expand(2, -1))
    torch.testing.assert_close(embedder(y), embedder.mlp(y), **FP32)
    assert (model.null, lively().null) == (0.0, 5)
    embedder(torch.cat((y, torch.zeros(1, 8)))).sum().backward()
    assert torch.equal(embedder.null.grad, torch.ones(32))          # of the one text that is none
    y, x, times = y[[2, 0, 2, 1]], torch.randn(4, 6, 4, 4), time_grid(5, 0.3)
    with torch.no_grad():
        plain = x.clone()
        for a, b in zip(times, times[1:]):
            t = torch.full((4,), a, dtype=torch.float32)
            plain = plain + (b - a) * guide(model(plain, t, y), model(plain, t, torch.zeros_like(y)), 2.5)
    torch.testing.assert_close(sample(model, x, y, 5, "euler", 0.3, 2.5), plain, **FP32)


def test_what_a_dit_reads_of_a_text_is_the_text_towers(micro_model):
    model, texts = VTP.from_pretrained(micro_model), ["a red star", "", "a much longer text " * 9]
    y = text_tower(micro_model)(texts, batch_size=2)
    torch.testing.assert_close(y / 32 ** 0.5, model.encode_text(data.word_tokenizer(texts, 20)), **FP32)
    torch.testing.assert_close(y.square().mean(dim=1), torch.ones(3), **FP32)


def test_a_checkpoint_says_what_its_dit_draws(tmp_path):
    for sizes in (dict(num_classes=7), dict(num_classes=None, text_dim=8)):
        model = lively(**sizes)
        torch.save({"ema": model.state_dict()}, tmp_path / "c.pt")
        again = DiT.from_lightningdit(str(tmp_path / "c.pt"))
        assert (again.num_classes, again.text_dim) == (model.num_classes, model.text_dim)
        before, after = model.state_dict(), again.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_images_noise_and_label_are_its_own():
    """Whatever else is generated with it, by whom and in which order."""
    noise, labels = noise_and_labels(range(40), 3, (2, 4, 4), 10)
    some = [7, 31, 2]
    again = noise_and_labels(np.array(some), 3, (2, 4, 4), 10)
    assert torch.equal(again[0], noise[some]) and torch.equal(again[1], labels[some])
    assert len(noise.flatten(1)[:, 0].unique()) == 40 and len(labels.unique()) == 10
    assert labels.min() == 0 and labels.max() == 9
    assert not torch.equal(noise_and_labels(some, 4, (2, 4, 4), 10)[0], again[0])


def test_generated_pixels_are_decoded_samples(micro_model):
    tokenizer, model = VTP.from_pretrained(micro_model).eval(), lively(in_channels=16)
    noise, labels = noise_and_labels(range(3), 0, model.latent_shape, 5)
    mean, std = torch.randn(1, 16, 1, 1), torch.rand(1, 16, 1, 1) + 0.5
    sampling = dict(steps=4, method="adams", shift=0.4, guidance=2.0, interval=(0.2, 0.9),
                    channels=3)
    pixels = generate(model, tokenizer, (mean, std), noise, labels, bf16=False, **sampling)
    with torch.no_grad():
        images = tokenizer.decode(sample(model, noise, labels, **sampling) * std + mean)
    assert torch.equal(pixels, denormalize(images).clamp(0, 1)) and pixels.shape == (3, 3, 64, 64)
    assert 0 <= pixels.min() and pixels.max() <= 1
    rounded = generate(model, tokenizer, (mean, std), noise, labels, bf16=True, **sampling)
    assert 0 < (rounded - pixels).abs().mean() < 0.1


# --------------------------------------------------------------------------------------------------
# The latent cache
# --------------------------------------------------------------------------------------------------

def tars(folder, n=20):
    """Three small tars of labelled images, one of them cut in the middle of a member and one image
    broken."""
    folder.mkdir(exist_ok=True)
    for k in range(3):
        samples = [tar_sample(20 * k + i, cls=str((k + i) % 4).encode()) for i in range(n)]
        if k == 1:
            samples[3]["png"] = b"not an image"
        write_tar(folder / f"{k}.tar", samples)
    with open(folder / "2.tar", "r+b") as f:
        f.truncate(os.path.getsize(folder / "2.tar") // 2 - 400)        # within a member
    return str(folder / "{0,1,2}.tar")


def text_tower(micro_model):
    return evaluate.TextTower(micro_model, CPU)


def write_cache(folder, source, model, **options):
    encode = lambda images: train_dit.encode(model, CPU, images)
    made_of = dict(data=source.fingerprint(), tokenizer="a")
    return complete_cache(str(folder), source, encode, (16, 4, 4), made_of, **options)


def test_cached_latents_are_fresh_ones(micro_model, tmp_path, monkeypatch):
    model, source = VTP.from_pretrained(micro_model), data.BuiltinSource(40, 64)
    monkeypatch.setattr(train_dit, "SHARD_ROWS", 16)       # three parts
    cache, _ = write_cache(tmp_path / "c", source, model)
    assert cache.latent_shape == (16, 4, 4) and cache.class_names == source.class_names
    images = torch.from_numpy(source.images)
    seen = []
    for step in range(5):        # an epoch, in an order of its own
        latents, labels = cache.batch(step, 8, seed=3)
        order = data.permutation(3, 0, 40)[8 * step:8 * step + 8]
        seen += order.tolist()
        for part, view in ((latents[:, 0], images[order]), (latents[:, 1], images[order].flip(-1))):
            fresh = train_dit.encode(model, CPU, view)
            assert_close_but_for_roundings(part.float(), fresh, stored=True)
        assert torch.equal(labels, torch.from_numpy(source.labels[order]))
    assert sorted(seen) == list(range(40))
    everything = train_dit.encode(model, CPU, images)
    std, mean = torch.std_mean(everything, dim=(0, 2, 3), keepdim=True)
    # the authors' form
    stats = torch.load(tmp_path / "c" / "latents_stats.pt", weights_only=True)
    assert set(stats) == {"mean", "std"} and stats["mean"].shape == (1, 16, 1, 1)
    # of the latents as they are stored, in bf16
    torch.testing.assert_close(stats["std"], std, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(cache.mean, mean, atol=1e-3, rtol=1e-2)
    assert torch.equal(cache.mean, stats["mean"]) and torch.equal(cache.std, stats["std"])


def test_a_cache_of_texts_has_their_features_and_no_false_mirror_images(micro_model, tmp_path, monkeypatch):
    model, tower = VTP.from_pretrained(micro_model), text_tower(micro_model)
    source = data.BuiltinSource(40, 64)
    monkeypatch.setattr(train_dit, "SHARD_ROWS", 16)
    cache, _ = write_cache(tmp_path / "c", source, model, tower=tower)
    plain, _ = write_cache(tmp_path / "p", source, model)
    assert cache.text_dim == 32 and plain.text_dim is None
    rows = np.array([39, 0, 17, 16])
    fresh = tower([source.captions[i] for i in rows])
    torch.testing.assert_close(cache.conditions_at(rows).float(), fresh, rtol=2 ** -8, atol=1e-5)   # in bf16
    assert cache.conditions_at(rows).shape == (4, 32) and plain.conditions_at(rows).dtype == torch.int64
    latents, of_plain = (x.latents_at(np.arange(40)) for x in (cache, plain))
    has_side = torch.tensor([data.names_a_side(text) for text in source.captions])
    assert 3 < has_side.sum() < 30
    assert torch.equal(latents[:, 0], of_plain[:, 0])
    assert torch.equal(latents[has_side, 1], latents[has_side, 0])
    assert torch.equal(latents[~has_side, 1], of_plain[~has_side, 1])
    # a lost part is made anew, features and all; a cut one is seen
    whole = (tmp_path / "c" / "00001.bin").read_bytes()
    assert len(whole) == 16 * (2 * 2 * 16 * 16 + 8 + 2 * 32)
    for broken in (None, whole[:-1]):
        (tmp_path / "c" / "00001.bin").unlink()
        if broken:
            (tmp_path / "c" / "00001.bin").write_bytes(broken)
        write_cache(tmp_path / "c", source, model, tower=tower)
        assert (tmp_path / "c" / "00001.bin").read_bytes() == whole


def test_a_cache_of_texts_takes_images_without_a_class_but_none_without_a_caption(micro_model, tmp_path):
    write_tar(tmp_path / "t.tar", [tar_sample(i, cls=None, txt=b" " if i == 2 else b"a") for i in range(6)])
    source = data.open_source(str(tmp_path / "t.tar"), 64)
    cache, skipped = write_cache(tmp_path / "c", source, VTP.from_pretrained(micro_model), max_skipped=0.5,
                                 tower=text_tower(micro_model))
    assert skipped == {"no caption": 1} and cache.rows.tolist() == [0, 1, 3, 4, 5]


def test_a_cache_of_tars_leaves_out_what_is_broken_and_says_so(micro_model, tmp_path):
    model, source = VTP.from_pretrained(micro_model), data.open_source(tars(tmp_path / "t"), 64)
    cache, skipped = write_cache(tmp_path / "c", source, model, max_skipped=0.2)
    assert sum(v for k, v in skipped.items() if "broken image" in k) == 1
    assert sum(v for k, v in skipped.items() if "tar" in k) == 1
    # 39 of the two whole tars, and of the third what lies before the cut
    assert 39 + 5 <= len(cache) < 39 + 20
    assert cache.num_classes == 4 and (cache.labels == train_dit.UNUSABLE).sum() == 2
    for _ in range(2):      # another try finds the latents there, but no statistics: it fails as well
        with pytest.raises(UserError, match="max_skipped"):
            write_cache(tmp_path / "d", source, model, max_skipped=0.01)


def test_a_cache_is_completed_where_it_is_broken(micro_model, tmp_path, monkeypatch):
    """A part that is lost or cut short is encoded again, and it alone; without cache.json all are."""
    model, folder = VTP.from_pretrained(micro_model), tmp_path / "c"
    monkeypatch.setattr(train_dit, "SHARD_ROWS", 10)
    source, encoded = data.BuiltinSource(30, 64), []
    encode = train_dit.encode
    monkeypatch.setattr(train_dit, "encode", lambda *a: encoded.append(len(a[2])) or encode(*a))
    whole, _ = write_cache(folder, source, model)
    latents = whole.latents_at(np.arange(30))
    assert sum(encoded) == 60
    for harm, n_encoded in (
            (lambda: os.truncate(folder / "00001.bin", 1000), 20),
            (lambda: os.remove(folder / "00002.bin"), 20),
            (lambda: (folder / "latents_stats.pt").write_bytes(b"PK"), 0),
            (lambda: (folder / "cache.json").write_text("{"), 60),
            (lambda: None, 0)):
        harm()
        encoded.clear()
        again, _ = write_cache(folder, source, model)
        assert sum(encoded) == n_encoded
        # a batch of other images may turn a last bit of bf16
        torch.testing.assert_close(again.latents_at(np.arange(30)), latents, atol=1e-3, rtol=2 ** -6)
        assert np.array_equal(again.labels, whole.labels) and torch.equal(again.mean, whole.mean)


def test_a_disk_without_room_for_the_latents_is_an_error_before_any_work(micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("", (), dict(free=10_000)))
    n_bytes = 30 * (2 * 16 * 4 * 4 * 2 + 8)
    with pytest.raises(OSError, match=f"{n_bytes:,} bytes in .*c, where 10,000 are free"):
        write_cache(tmp_path / "c", data.BuiltinSource(30, 64), VTP.from_pretrained(micro_model))
    assert not list(tmp_path.glob("c/*.bin*"))


WRITE_CACHE = """
import sys; sys.path[:0] = [{root!r}, {here!r}]
import data, losses
from test_dit import text_tower, write_cache
from vtp import VTP
losses.init_distributed()
source, model = data.open_source({pattern!r}, 64), VTP.from_pretrained({model!r})
write_cache(sys.argv[1], source, model, n_workers=int(sys.argv[2]), tower=text_tower({model!r}))
losses.leave_distributed()
"""


def test_two_ranks_write_the_cache_of_one(micro_model, tmp_path):
    pattern, code = tars(tmp_path / "t"), tmp_path / "write.py"
    code.write_text(WRITE_CACHE.format(root=ROOT, here=HERE, pattern=pattern, model=micro_model))
    run_script([code, tmp_path / "one", 0])
    # four readers of three tars: split by member
    run_script([code, tmp_path / "two", 2], n_ranks=2)
    one, two = (LatentCache(str(tmp_path / name)) for name in ("one", "two"))
    assert np.array_equal(one.labels, two.labels) and (two.slices, len(two.parts)) == (2, 6)
    a, b = (cache.latents_at(np.arange(len(one.labels))).float() for cache in (one, two))
    assert_close_but_for_roundings(a, b, stored=True)     # in batches of another size
    a, b = (cache.conditions_at(cache.rows).float() for cache in (one, two))
    torch.testing.assert_close(a, b, rtol=2 ** -7, atol=1e-5)       # stored in bf16


def test_a_stale_cache_is_an_error_that_names_what_differs(micro_model, tmp_path):
    source = data.BuiltinSource(8, 64)
    write_cache(tmp_path / "c", source, VTP.from_pretrained(micro_model))
    for tokenizer, digest, what in (("b", source.fingerprint(), "tokenizer"), ("a", "another", "data")):
        made_of = dict(data=digest, tokenizer=tokenizer)
        with pytest.raises(ValueError, match=f"another {what}:"):
            complete_cache(str(tmp_path / "c"), source, None, (16, 4, 4), made_of)
    assert data.BuiltinSource(8, 64).fingerprint() != data.BuiltinSource(9, 64).fingerprint()


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_changed_labels_and_content_of_equal_size_make_other_data(tmp_path, kind):
    """A file's time tells. A copy that keeps names and times is the same data."""
    if kind == "tars":
        path, where = tmp_path / "d" / "0.tar", str(tmp_path / "d")
        path.parent.mkdir()
        write_tar(path, [tar_sample(i, cls=b"1") for i in range(3)])
        write_other = lambda: write_tar(path, [tar_sample(i, cls=b"2") for i in range(3)])
    else:
        path, where = tmp_path / "d" / "ants" / "1.bmp", str(tmp_path / "d")
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(path)
        write_other = lambda: Image.new("RGB", (8, 8), "blue").save(path)
    fingerprint = lambda where: data.open_source(where, 64).fingerprint()
    before, size = fingerprint(where), os.path.getsize(path)
    shutil.copytree(tmp_path / "d", tmp_path / "copy", copy_function=shutil.copy2)
    write_other()
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))       # whatever the clock's grain
    assert os.path.getsize(path) == size and fingerprint(where) != before
    assert fingerprint(str(tmp_path / "copy")) == before


# --------------------------------------------------------------------------------------------------
# train_dit.py
# --------------------------------------------------------------------------------------------------

def run(micro_model, out, *more, n_ranks=1):
    cache = os.path.join(os.path.dirname(str(out)), "cache")
    arguments = ["--tokenizer", micro_model, "--cache", cache, "--out", out, *FAST, *more]
    return run_script(["train_dit.py", *arguments], n_ranks)


@pytest.fixture(scope="module")
def finished(micro_model, tmp_path_factory):
    """A run of 12 steps, and its cache beside it."""
    out = tmp_path_factory.mktemp("dit") / "one"
    run(micro_model, out)
    return out


def checkpoint(out):
    return torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)


def losses_of(out):
    return [r["loss"] for r in evaluate.read_metrics(str(out)) if r["kind"] == "train"]


def micro_args(micro_model, finished, *more):
    out = str(finished.parent / "none")
    return train_dit.read_settings(["--tokenizer", micro_model, "--out", out, *FAST, *more])


def setting(micro_model, finished, *more, device="cpu"):
    """Arguments and state of a micro run on the cache of `finished`, and the function step -> its
    batch."""
    args = micro_args(micro_model, finished, *more)
    cache = LatentCache(str(finished.parent / "cache"))
    state = train_dit.build_state(args, cache, torch.device(device))
    mean, std = cache.mean.to(device), cache.std.to(device)

    def make_batch(step):
        latents, labels = (x.to(device) for x in cache.batch(step, args.batch_size, 0))
        return train_dit.make_batch(args, step, latents, labels, mean, std, state.model.null)
    return args, state, make_batch


def test_compiled_steps_follow_eager_ones(micro_model, finished):
    """To fp32's rounding: kernels of several operations round less often, and sum in another order. Adam's
    first steps are signs, which turn where a gradient is nearly 0: so the rate is small."""
    curves = []
    for more in ("--no-compile", "--compile"):
        _, state, make_batch = setting(micro_model, finished, more)
        if more == "--compile" and state.model.blocks[0]._compiled_call_impl is None:
            pytest.skip("torch.compile does not work here: it needs a C++ compiler and Python's headers")
        torch.manual_seed(0)
        with_lively_weights(state.model)        # else blocks are the identity
        state.optimizer.param_groups[0]["lr"].fill_(1e-5)
        curves.append([])
        for step in range(3):
            train_dit.train_step(state, make_batch(step))
            curves[-1].append([state.totals[name].item() for name in ("loss", "grad_norm")])
    torch._dynamo.reset()
    torch.testing.assert_close(*map(torch.tensor, curves), **FP32)


@pytest.mark.parametrize("num_classes", [3, 50])       # fewer and more than samples
def test_sampling_asks_the_device_nothing_and_compiles_nothing_anew(num_classes, monkeypatch):
    model = lively(num_classes=num_classes)
    batches = [(torch.randn(6, 6, 4, 4), torch.randint(num_classes, (6,))) for _ in range(3)]
    settings = dict(steps=5, method="adams", guidance=2.0, interval=(0.3, 1.0))
    expected = [sample(model, *batch, **settings) for batch in batches]
    monkeypatch.setattr(torch.nn.Module, "compile",
                        functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    train_dit.compile_blocks(model)
    try:
        for batch, latents in zip(batches, expected):
            torch.testing.assert_close(sample(model, *batch, **settings), latents, **FP32)
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    with NothingAsked():
        sample(lively(num_classes=num_classes), *batches[0], **settings)


def test_a_run_leaves_what_it_says(finished):
    assert {"run.json", "metrics.jsonl", "checkpoint.pt", "latents_stats.pt", "samples_0000006.png",
            "samples_0000012.png"} <= set(os.listdir(finished))
    rows = evaluate.read_metrics(str(finished))
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["flops"] == 12 * rows[0]["flops"] / 2
    fields = {"loss", "grad_norm", "lr", "samples_per_second", "matmul_share", "data_share"}
    assert all(fields <= r.keys() for r in rows)
    model = DiT.from_lightningdit(str(finished / "checkpoint.pt"))      # its EMA weights, strictly
    assert model.num_classes == 10
    trained = checkpoint(finished)["model"]["final_layer.linear.weight"]
    assert not torch.equal(model.final_layer.linear.weight, trained)


# a killed run is a folder with the checkpoint of an earlier step and the rows after it
KILLED = """
import sys; sys.path.insert(0, {root!r})
import train_dit
save = train_dit.save_checkpoint


def stop(*arguments):
    save(*arguments)
    raise SystemExit(3)
train_dit.save_checkpoint = stop
train_dit.main(sys.argv[1:])
"""


def test_resume_is_bit_exact(micro_model, finished, tmp_path):
    out = finished.parent / "stopped"
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=ROOT))
    cache = str(finished.parent / "cache")
    arguments = ["--tokenizer", micro_model, "--cache", cache, "--out", out, *FAST]
    assert run_script([script, *arguments], check=False).returncode == 3
    assert checkpoint(out)["step"] == 6
    run_script(["train_dit.py", "--out", out, "--resume"])
    one, two = checkpoint(finished), checkpoint(out)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    assert losses_of(out) == losses_of(finished)


def test_two_ranks_train_as_one(micro_model, finished):
    out = finished.parent / "two"
    run(micro_model, out, n_ranks=2)
    # fp32 sums in another order, over 12 steps of Adam at lr 1e-3, whose first steps turn gradients
    # near 0 into +-lr: 1e-3 of the loss
    np.testing.assert_allclose(losses_of(out), losses_of(finished), rtol=1e-3)
    # the first row is of two steps, before differences have fed back
    np.testing.assert_allclose(losses_of(out)[0], losses_of(finished)[0], rtol=FP32["rtol"])


def test_samples_do_not_depend_on_ranks_and_resume(finished):
    folder, npz = finished.parent / "png", finished.parent / "set.npz"
    common = ["train_dit.py", "--sample", 10, "--checkpoint", finished, "--sample_batch", 4,
              "--steps", 4, "--method", "heun", "--precision", "fp32"]
    run_script([*common, "--out", folder])
    run_script([*common, "--out", npz], n_ranks=2)
    images = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(10)])
    saved = np.load(npz)
    assert saved["arr_0"].shape == (10, 64, 64, 3) and saved["arr_0"].dtype == np.uint8
    assert saved["arr_1"].shape == (10,)
    # a truncation to 8 bits turns rounding of batches into a difference of 1 at most
    assert np.abs(saved["arr_0"].astype(int) - images).max() <= 1
    assert not os.path.exists(str(npz) + ".partial")
    assert "images are in" in run_script([*common, "--out", npz]).stdout
    with pytest.raises(AssertionError, match="there already"):      # of these, but with other settings
        run_script([*common, "--out", npz, "--seed", "1"])
    os.remove(folder / "000003.png")
    kept = os.path.getmtime(folder / "000004.png")
    run_script([*common, "--out", folder])
    again = np.asarray(Image.open(folder / "000003.png")).astype(int)
    assert np.abs(again - images[3]).max() <= 1
    assert os.path.getmtime(folder / "000004.png") == kept


def sample_into(folder, finished, *more, n=4):
    train_dit.main(["--sample", str(n), "--checkpoint", str(finished), "--out", str(folder), "--steps", "2",
                    "--method", "euler", "--sample_batch", "2", *more])


def test_a_set_of_samples_is_of_one_making(micro_model, finished, tmp_path, capsys):
    """Into a folder with images of another seed, setting, model or number no image is written."""
    folder = tmp_path / "set"
    sample_into(folder, finished)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "other.pt"
    content = checkpoint(finished)
    content["ema"]["final_layer.linear.bias"] += 1
    torch.save(content, other)
    stats = ["--latents_stats", str(finished / "latents_stats.pt"), "--tokenizer", micro_model]
    for more, words in ((["--seed", "1"], "another seed"), (["--guidance", "2"], "another guidance"),
                        (["--precision", "bf16"], "another bf16"),
                        (["--checkpoint", str(other), *stats, "--precision", "fp32"], "another model")):
        with pytest.raises(SystemExit) as stop:
            sample_into(folder, finished, *more)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample_into(folder, finished, n=3)
    assert "does not ask for, such as 000003.png" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sample_into(folder, finished, n=5)      # more of the same go on
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    unknown = tmp_path / "unknown"
    shutil.copytree(folder, unknown)
    os.remove(unknown / "made_with.json")
    with pytest.raises(SystemExit):
        sample_into(unknown, finished, n=5)


def test_a_given_tokenizer_decodes_the_samples_and_precision_is_the_runs(micro_model, finished, tmp_path,
                                                                         capsys, monkeypatch):
    torch.manual_seed(1)
    model = VTP.from_pretrained(micro_model)
    torch.nn.init.normal_(model.pixel_decoder.proj_out.weight)
    model.save_pretrained(str(tmp_path / "t"))
    sample_into(tmp_path / "a", finished)
    sample_into(tmp_path / "b", finished, "--tokenizer", str(tmp_path / "t"))
    made = [json.load(open(tmp_path / name / "made_with.json")) for name in "ab"]
    assert made[0]["model"] == made[1]["model"] and made[0]["tokenizer"] != made[1]["tokenizer"]
    assert made[0]["bf16"] is False                             # FAST has --precision fp32
    one, two = (np.asarray(Image.open(tmp_path / name / "000000.png")) for name in "ab")
    assert (one != two).any()
    # what the run recorded holds from another folder, too
    monkeypatch.chdir(os.path.dirname(micro_model))
    out = tmp_path / "relative"
    args = train_dit.read_settings(["--tokenizer", os.path.basename(micro_model), "--out", str(out), *FAST])
    assert args.tokenizer == micro_model and os.path.isabs(args.cache)
    narrow = VTP(micro_config(vision_feature_bottleneck=8))
    narrow.save_pretrained(str(tmp_path / "narrow"))
    with pytest.raises(SystemExit):
        sample_into(tmp_path / "c", finished, "--tokenizer", str(tmp_path / "narrow"))
    assert "latents of 8 channels" in capsys.readouterr().err


def test_a_run_that_stopped_before_its_evaluation_ends_on_resume(micro_model, finished, tmp_path):
    """Between its last checkpoint and the judge."""
    out, cache = tmp_path / "o", str(finished.parent / "cache")
    shutil.copytree(finished, out)
    record = json.load(open(out / "run.json"))
    record["arguments"]["eval_samples"] = 4
    (out / "run.json").write_text(json.dumps(record))
    judge = dict(judge=evaluate.Judge(10).state_dict(), accuracy=0.5,       # one that need not be trained
                 fingerprint=f"{data.BuiltinSource(48, 64).fingerprint()} 10 classes")
    torch.save(judge, os.path.join(cache, "judge.pt"))
    for _ in range(2):      # the second finds it measured
        run_script(["train_dit.py", "--out", out, "--resume"])
        row, = [row for row in evaluate.read_metrics(str(out)) if row["kind"] == "eval"]
        assert row["real_accuracy"] == 0.5


def test_a_step_that_is_not_finite_changes_nothing(micro_model, finished):
    _, state, make_batch = setting(micro_model, finished)
    train_dit.set_lr(state, 0, 10)
    batch = make_batch(0)
    batch["latents"][0, 0, 0, 0] = math.nan
    before = [p.clone() for p in state.model.parameters()]
    train_dit.train_step(state, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))
    assert state.totals["finite_steps"] == 0 and state.totals["loss"] == 0
    train_dit.train_step(state, make_batch(1))
    has_changed = not torch.equal(before[0], next(state.model.parameters()))
    assert has_changed or state.totals["finite_steps"] == 1


def test_the_batch_is_the_global_draw(micro_model, finished):
    """Noise, times, mirrors and dropped labels of a step: as their definition, from a generator of
    (seed, step)."""
    more = ["--batch_size", "64", "--label_dropout", "0.5", "--samples", "640"]
    args = micro_args(micro_model, finished, *more, "--mirror")
    latents = torch.stack((torch.zeros(64, 3, 2, 2), torch.ones(64, 3, 2, 2)), dim=1)
    labels = torch.arange(64) % 10
    mean, std = torch.full((1, 3, 1, 1), 2.0), torch.full((1, 3, 1, 1), 4.0)
    batch = train_dit.make_batch(args, 5, latents, labels, mean, std, 10)
    # (0 - 2) / 4 and (1 - 2) / 4: either image
    assert sorted(set(batch["latents"].flatten().tolist())) == [-0.5, -0.25]
    assert (batch["latents"].flatten(1).std(dim=1) == 0).all()
    is_dropped = batch["y"] == 10
    assert 16 <= is_dropped.sum() <= 48                     # 4 standard deviations
    assert torch.equal(batch["y"][~is_dropped], labels[~is_dropped])
    assert abs(batch["noise"].mean()) < 0.2                 # 768 draws: 5 standard errors
    assert 0 < batch["t"].min() and batch["t"].max() < 1
    args.mirror = micro_args(micro_model, finished).mirror      # the built-in set is not mirrored
    batch = train_dit.make_batch(args, 5, latents, labels, mean, std, 10)
    assert (batch["latents"] == -0.5).all()


def test_counted_flops_are_three_times_the_forwards_products(micro_model, finished):
    """The forward's and the backward's two; the first layers' inputs need no gradient: twice."""
    _, state, make_batch = setting(micro_model, finished)
    batch, (d, h, w) = make_batch(0), state.model.latent_shape
    dim, depth, B, N = 256, 4, 8, h * w
    inner, n_sinusoids = state.model.blocks[0].mlp.w3.in_features, 256
    attention = 2 * N * dim                                         # of a token: q k and (q k) v
    block = B * N * (3 * dim * dim + dim * dim + 3 * dim * inner + attention) + B * 6 * dim * dim
    last = B * 2 * dim * dim + B * N * dim * d
    first = B * N * d * dim + B * n_sinusoids * dim
    products = 3 * (depth * block + B * dim * dim + last) + 2 * first
    counted = count_flops(lambda: state.objective(batch).backward())
    assert counted == 2 * products


def test_counting_flops_changes_nothing(micro_model, finished):
    results = []
    for is_counted in (False, True):
        _, state, make_batch = setting(micro_model, finished)
        train_dit.set_lr(state, 5, 10)
        before = [p.clone() for p in state.model.parameters()]
        if is_counted:
            assert count_flops(lambda: state.objective(make_batch(0)).backward()) > 0
            assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters()))
        for step in range(3):
            train_dit.train_step(state, make_batch(step))
        assert state.totals["finite_steps"] == 3
        results.append([*state.totals.values(), *state.model.parameters(), *state.ema.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_qk_norm_trains_and_comes_back(micro_model, finished, tmp_path):
    _, plain, _ = setting(micro_model, finished)
    assert not any("q_norm" in name for name in plain.model.state_dict())
    _, state, make_batch = setting(micro_model, finished, "--qk_norm")
    train_dit.set_lr(state, 5, 10)
    for step in range(4):        # the first ones move what starts at 0 and lets no gradient through
        train_dit.train_step(state, make_batch(step))
    for block in state.model.blocks:
        assert (block.attn.q_norm.weight != 1).any() and (block.attn.k_norm.weight != 1).any()
    path = str(tmp_path / "checkpoint.pt")
    train_dit.save_checkpoint(train_dit.Saving(path, 1), state, 4, False, 0)
    again = DiT.from_lightningdit(path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.ema.state_dict().items())


@pytest.fixture(scope="module")
def from_text(micro_model, tmp_path_factory):
    """A run of 12 steps on texts, its cache beside it."""
    out = tmp_path_factory.mktemp("text") / "one"
    run(micro_model, out, "--condition", "text")
    return out


def test_a_run_on_texts_resumes_bit_for_bit_and_is_that_of_two_ranks(micro_model, from_text, tmp_path):
    assert {"checkpoint.pt", "samples_0000012.png"} <= set(os.listdir(from_text))
    out, script = from_text.parent / "stopped", tmp_path / "killed.py"
    script.write_text(KILLED.format(root=ROOT))
    arguments = ["--tokenizer", micro_model, "--cache", from_text.parent / "cache", "--out", out, *FAST,
                 "--condition", "text"]
    assert run_script([script, *arguments], check=False).returncode == 3
    run_script(["train_dit.py", "--out", out, "--resume"])
    assert losses_of(out) == losses_of(from_text)
    one, two = checkpoint(from_text)["ema"], checkpoint(out)["ema"]
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one["y_embedder.null"].abs().sum() > 0
    run(micro_model, from_text.parent / "two", "--condition", "text", n_ranks=2)
    # as with classes
    np.testing.assert_allclose(losses_of(from_text.parent / "two"), losses_of(from_text), rtol=1e-3)


def test_dropped_texts_are_the_null_and_others_stay(micro_model, from_text):
    more = ["--batch_size", "64", "--label_dropout", "0.5", "--samples", "640"]
    args = micro_args(micro_model, from_text, *more)
    y = torch.randn(64, 32).bfloat16()
    batch = train_dit.make_batch(args, 5, torch.zeros(64, 2, 3, 2, 2), y, 0, 1, 0.0)
    is_null = (batch["y"] == 0).all(dim=1)
    assert 16 <= is_null.sum() <= 48 and batch["y"].dtype == torch.float32
    assert torch.equal(batch["y"][~is_null], y[~is_null].float())


def test_prompts_become_images_with_a_picture_of_both(micro_model, from_text, tmp_path, capsys):
    lively_run = tmp_path / "run"        # after 12 steps a text changes next to nothing
    shutil.copytree(from_text, lively_run)
    content = checkpoint(from_text)
    torch.manual_seed(0)
    for name, weight in content["ema"].items():
        if name.startswith(("y_embedder", "final_layer")) or "adaLN" in name:
            torch.nn.init.normal_(weight, std=0.3)
    torch.save(content, lively_run / "checkpoint.pt")
    from_text, prompts = lively_run, ["a red star", "", "два зелёных круга " * 20]
    common = ["--prompt", *prompts]
    sample_into(tmp_path / "a", from_text, *common, n=7)
    assert len(list((tmp_path / "a").glob("*.png"))) == 7
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 3 * 66 - 2 and picture.width > 3 * 66      # 7 images of 64 px, 3 in a row
    # alone: what a prompt gives is its own, but for how a batch's sums and the 8 bits round
    (tmp_path / "p.txt").write_text("\n".join(prompts[:1]))
    sample_into(tmp_path / "b", from_text, "--prompt", str(tmp_path / "p.txt"), n=4)
    a, b = (np.asarray(Image.open(tmp_path / name / "000003.png")).astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1
    c = np.asarray(Image.open(tmp_path / "b" / "000002.png")).astype(int)
    # number 2 has another prompt there
    assert np.abs(c - np.asarray(Image.open(tmp_path / "a" / "000002.png"))).max() > 10
    sample_into(tmp_path / "a", from_text, *common, n=7)        # again: of the same making
    with pytest.raises(SystemExit):
        sample_into(tmp_path / "a", from_text, "--prompt", "a blue star", n=7)
    assert "another prompts" in capsys.readouterr().err
    (tmp_path / "own.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        sample_into(tmp_path / "own", from_text, *common, n=7)
    assert "own.png, where the picture of prompts belongs, is there" in capsys.readouterr().err
    sample_into(tmp_path / "s.npz", from_text, *common, n=4)
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [0, 1, 2, 0] and (tmp_path / "s.png").exists()


def test_a_cache_of_texts_is_none_of_classes(micro_model, finished, from_text, tmp_path, capsys):
    for run_folder, more in ((from_text, []), (finished, ["--condition", "text"])):
        cache = str(run_folder.parent / "cache")
        with pytest.raises(SystemExit):
            train_dit.main(["--tokenizer", micro_model, "--cache", cache, *FAST, *more,
                            "--out", str(tmp_path / "o")])
        assert "were made with another text tower" in capsys.readouterr().err


def test_new_captions_of_a_folder_make_new_features(tmp_path):
    """Its images are the same, so that latents of classes stay."""
    def fingerprints(class_names=None):
        source = data.FolderSource(str(tmp_path / "d"), 8, class_names)
        return source.fingerprint(), source.fingerprint(with_captions=True)
    (tmp_path / "d" / "ants").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "ants" / "1.png")
    first = fingerprints()
    (tmp_path / "d" / "ants" / "1.txt").write_text("two ants")
    second, third = fingerprints(), fingerprints(["wasps"])
    assert first[0] == second[0] == third[0] and len({first[1], second[1], third[1]}) == 3
    shutil.copytree(tmp_path / "d", tmp_path / "e", copy_function=shutil.copy2)     # a copy is the same
    shutil.rmtree(tmp_path / "d")
    os.rename(tmp_path / "e", tmp_path / "moved")
    moved = data.FolderSource(str(tmp_path / "moved"), 8)
    assert (moved.fingerprint(), moved.fingerprint(with_captions=True)) == second


def test_a_run_resumes_without_options_that_it_did_not_know(micro_model, finished, tmp_path, capsys):
    out = tmp_path / "o"
    shutil.copytree(finished, out)
    record = json.load(open(out / "run.json"))
    for name in ("hold_out_pairs", "condition", "text_from"):       # as an older version has it
        del record["arguments"][name]
    (out / "run.json").write_text(json.dumps(record))
    assert train_dit.read_settings(["--out", str(out), "--resume"]).condition == "class"
    with pytest.raises(SystemExit):
        train_dit.read_settings(["--out", str(out), "--resume", "--hold_out_pairs"])
    assert "--hold_out_pairs (was False, now True)" in capsys.readouterr().err


def test_prompts_belong_to_texts(micro_model, finished, from_text, tmp_path, capsys):
    for run_folder, more in ((finished, ["--prompt", "a star"]), (from_text, [])):
        with pytest.raises(SystemExit):
            sample_into(tmp_path / "a", run_folder, *more)
        assert "--prompt belongs to --sample of a DiT that draws texts" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, error in (("empty.txt", "no text in that file"), ("none.txt", "none.txt: no such file")):
        with pytest.raises(SystemExit):
            sample_into(tmp_path / "a", from_text, "--prompt", str(tmp_path / name))
        assert error in capsys.readouterr().err
    VTP(micro_config(train_clip=False)).save_pretrained(str(tmp_path / "blind"))
    arguments = ["--tokenizer", str(tmp_path / "blind"), "--condition", "text", "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        train_dit.read_settings(arguments)
    assert "blind has no text tower" in capsys.readouterr().err
    args = train_dit.read_settings([*arguments, "--text_from", micro_model])
    assert (args.text_from, args.cache) == (micro_model, str(tmp_path / "blind" / "latents_text"))


@pytest.mark.parametrize("wrong, message", [
    (["--tokenizer", "nowhere/at/all"], "nowhere"),
    (["--model", "huge"], "XL/1"),
    (["--steps", "1"], "2 points"),
    (["--batch_size", "0"], "positive"),
    (["--label_dropout", "1"], "below 1"),
    (["--data", "missing-{0..3}.tar"], "missing-0"),
    (["--sample", "5"], "--out"),
    (["--sample", "5", "--out", "x.npz", "--checkpoint", "nowhere"], "First: python train_dit.py"),
    (["--latents_stats", "no.pt"], "no such file"),
    (["--condition", "text", "--eval_samples", "5"], "evaluate.py measures a DiT of texts"),
    (["--text_from", "runs/other"], "belongs to --condition text"),
    (["--hold_out_pairs", "--data", os.path.dirname(__file__)], "is of the built-in set"),
    (["--cache", os.path.dirname(__file__)], "other things")])
def test_a_wrong_argument_is_an_error_before_any_work(micro_model, tmp_path, capsys, wrong,
                                                      message):
    common = ["--tokenizer", micro_model]
    if "--sample" not in wrong:
        common += ["--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        train_dit.read_settings(common + wrong)
    assert message in capsys.readouterr().err


def sampling_of(micro_model, *more):
    args = train_dit.read_settings(["--tokenizer", micro_model, *more])
    return args.method, args.steps, args.shift


def test_sampling_defaults_are_the_sizes(micro_model, tmp_path):
    """The paper: B by dopri5 without shift, here Heun's method; XL by Euler's with a shift."""
    out = ["--out", str(tmp_path / "o"), "--model"]
    assert sampling_of(micro_model, *out, "tiny") == ("adams", 20, 1.0)
    assert sampling_of(micro_model, *out, "B/1") == ("heun", 100, 1.0)
    assert sampling_of(micro_model, *out, "B/2") == ("heun", 100, 1.0)
    assert sampling_of(micro_model, *out, "XL/1") == ("euler", 250, 0.075)
    assert sampling_of(micro_model, *out, "B/1", "--steps", "9") == ("heun", 9, 1.0)


def test_a_file_is_sampled_as_its_size_and_a_run_as_it_was(micro_model, finished, tmp_path):
    path, heun, euler = str(tmp_path / "b.pt"), ("heun", 100, 1.0), ("euler", 250, 0.075)
    more = ["--sample", "1", "--out", str(tmp_path / "o"), "--checkpoint"]
    for dim, depth, expected in ((768, 12, heun), (1152, 28, euler), (768, 11, euler)):
        shapes = {"x_embedder.proj.weight": (dim, 16, 1, 1), "feat_rope.freqs_cos": (16, 64),
                  "y_embedder.embedding_table.weight": (11, dim),
                  f"blocks.{depth - 1}.norm1.weight": (dim,)}       # all that tells the size
        torch.save(dict(ema={name: torch.zeros(shape) for name, shape in shapes.items()}), path)
        file = [*more, path, "--latents_stats", str(finished / "latents_stats.pt")]
        assert sampling_of(micro_model, *file) == expected
        assert sampling_of(micro_model, *file, "--method", "adams")[0] == "adams"
    file[file.index(path)] = str(finished / "checkpoint.pt")
    assert sampling_of(micro_model, *file) == ("adams", 20, 1.0)
    assert sampling_of(micro_model, *more, str(finished)) == ("adams", 4, 1.0)


def test_without_a_tokenizer_the_message_says_what_to_run_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train_dit.read_settings([])
    assert "python train_tokenizer.py" in capsys.readouterr().err


def test_the_judge_learns_and_is_cached(tmp_path):
    """On two classes that differ plainly, 40 steps are enough for it to be right far above chance (20
    were not with every CPU's kernels)."""
    source = data.BuiltinSource(200, 64)
    source.labels = (np.arange(200) % 2).astype(np.int64)
    brightness = np.where(source.labels == 1, 200, 60).astype(np.uint8)
    source.images[:] = brightness[:, None, None, None]
    images, labels = torch.from_numpy(source.images), torch.from_numpy(source.labels)
    judge = evaluate.train_judge(images, labels, 2, CPU, n_steps=40, batch_size=16)
    assert judge.accuracy > 0.9
    path = str(tmp_path / "judge.pt")
    torch.save(dict(judge=judge.state_dict(), accuracy=judge.accuracy,
                    fingerprint=f"{source.fingerprint()} 2 classes"), path)
    again = evaluate.open_judge(path, source, 2, CPU)
    assert again.accuracy == judge.accuracy
    whole, fingerprint = open(path, "rb").read(), f"{source.fingerprint()} 2 classes"
    for broken in (b"", whole[:500], whole[:-30]):        # it is made anew
        open(path, "wb").write(broken)
        assert evaluate.read_judge(path, 2, fingerprint) is None
    assert torch.equal(again.classify(images[:8] / 255), judge.classify(images[:8] / 255))


def test_a_step_asks_the_device_nothing(micro_model, finished):
    """See NothingAsked: it does not make a GPU wait, and can be captured."""
    _, state, make_batch = setting(micro_model, finished)
    train_dit.set_lr(state, 0, 100)
    batch = make_batch(0)
    with NothingAsked() as mode:
        train_dit.train_step(state, batch)
    assert mode.n_operations > 100


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_step_equals_the_eager_one(micro_model, finished, compiled):
    results, more = [], ["--compile" if compiled else "--no-compile"]
    for graph in (False, True):
        _, state, make_batch = setting(micro_model, finished, *more, device="cuda")
        step_fn = train_dit.CapturedStep(lambda batch: train_dit.train_step(state, batch), graph)
        for step in range(15):
            train_dit.set_lr(state, step, 100)
            step_fn(make_batch(step))
        results.append([p.detach().clone() for p in state.model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
