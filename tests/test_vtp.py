"""The model is the authors': same numbers on the same weights, same files, every option as defined."""
import http.server
import json
import math
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vtp
from conftest import FIXTURES, FP32, assert_close_but_for_roundings, micro_config
from vtp import (VTP, Block, RopeEmbedding, VTPConfig, read_safetensors, samples_kept, vtp_config,
                 write_safetensors)

RELEASED = os.path.join(FIXTURES, "vtp_released_style")


@pytest.fixture(scope="module")
def released():
    return VTP.from_pretrained(RELEASED), read_safetensors(os.path.join(RELEASED, "expected.safetensors"))


# With gradients the attention on a CPU is written out, without them it is the fused kernel: both must agree
# with the authors'.
@pytest.mark.parametrize("grad", [False, True])
def test_every_output_equals_the_authors(released, grad):
    model, expected = released
    images = expected["images"]
    with torch.set_grad_enabled(grad):
        outputs = dict(latents=model.encode(images), reconstruction=model.decode(expected["latents"]),
                       image_features=model.encode_image(images),
                       text_features=model.encode_text(expected["text"]))
        image_features, text_features = outputs["image_features"], outputs["text_features"]
        outputs["logits_per_image"] = model.logit_scale.exp() * image_features @ text_features.T
        outputs["cls_token"], outputs["patch_tokens"] = model.features(images)
        outputs["masked_cls_token"], outputs["masked_patch_tokens"] = model.features(images, expected["mask"])
        for i, (patches, cls) in enumerate(model.intermediate_layers(images, 2)):
            outputs[f"intermediate_{i}_patch"], outputs[f"intermediate_{i}_cls"] = patches, cls
    assert set(outputs) == set(expected) - {"images", "text", "mask"}
    torch.testing.assert_close(outputs.pop("text_features").detach(), expected["text_features"], **FP32)
    for name, value in outputs.items():
        assert_close_but_for_roundings(value, expected[name], name=name)


# ------------------------------------------------------------------------------------------------------------
# An independent model, straight from the definitions, one sample and one head at a time
# ------------------------------------------------------------------------------------------------------------

def slow_norm(x, state, name, kind):
    if kind == "rmsnorm":
        return x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + 1e-5) * state[name + ".weight"]
    centred = x - x.mean(-1, keepdim=True)
    eps = 1e-5 if kind == "clip's layernorm" else 1e-6
    normed = centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + eps)
    return normed * state[name + ".weight"] + state[name + ".bias"]


def slow_rotation(height, width, head_dim):
    """cos, sin (H*W, head_dim), of bfloat16's values, an operation at a time."""
    bf = lambda v: torch.tensor(v, dtype=torch.bfloat16)
    periods = [bf(100.0) ** (bf(2.0 * k) / (head_dim // 2)) for k in range(head_dim // 4)]
    angles = []
    for row in range(height):
        for column in range(width):
            coords = [2 * (bf(place + 0.5) / n) - 1 for place, n in ((row, height), (column, width))]
            half = [2 * math.pi * coord / period for coord in coords for period in periods]
            angles.append(torch.stack(half + half))
    angles = torch.stack(angles)
    return angles.cos().float(), angles.sin().float()


def slow_blocks(x, state, prefix, depth, n_heads, config, grid, n_prefix):
    tower = "vision" if prefix.startswith("trunk") else "decoder"
    option = lambda name: getattr(config, f"{tower}_{name}")
    dim = x.shape[-1]
    d = dim // n_heads
    cos, sin = slow_rotation(*grid, d)

    def rotate(v):          # one head of one sample: (N, d)
        patches = v[n_prefix:]
        turned = torch.cat((-patches[:, d // 2:], patches[:, :d // 2]), dim=1)
        return torch.cat((v[:n_prefix], patches * cos + turned * sin))
    for i in range(depth):
        p = f"{prefix}.blocks.{i}."
        linear = lambda v, name: v @ state[p + name + ".weight"].T + state[p + name + ".bias"]
        qkv = linear(slow_norm(x, state, p + "norm1", option("norm_layer")), "attn.qkv")
        out = torch.zeros_like(x)
        for b in range(len(x)):
            for h in range(n_heads):
                q, k, v = (qkv[b, :, part * dim + h * d:part * dim + (h + 1) * d] for part in range(3))
                if option("use_qk_norm"):
                    q = slow_norm(q, state, p + "attn.q_norm", "rmsnorm")
                    k = slow_norm(k, state, p + "attn.k_norm", "rmsnorm")
                scores = rotate(q) @ rotate(k).T / math.sqrt(d)
                weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
                out[b, :, h * d:(h + 1) * d] = weights @ v
        scale = lambda name: state[p + name + ".gamma"] if option("init_values") is not None else 1.0
        x = x + scale("ls1") * linear(out, "attn.proj")
        y = slow_norm(x, state, p + "norm2", option("norm_layer"))
        if option("ffn_layer") == "swiglu":
            gate = linear(y, "mlp.w1")
            y = linear(gate * torch.sigmoid(gate) * linear(y, "mlp.w2"), "mlp.w3")
        else:
            y = linear(y, "mlp.fc1")
            y = linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), "mlp.fc2")
        x = x + scale("ls2") * y
    return slow_norm(x, state, prefix + ".norm", option("norm_layer"))


@torch.no_grad()
def slow_model(state, config, images):
    """-> cls, patches, CLIP image features, latents, reconstruction, by definition (DINOv3, the paper),
    but for the rotation in fp32: in bfloat16, another order of sums would turn roundings."""
    B, _, H, W = images.shape
    grid, p = (H // 16, W // 16), 16
    weight, bias = state["trunk.patch_embed.proj.weight"], state["trunk.patch_embed.proj.bias"]
    patch = lambda b, r, c: images[b, :, r * p:(r + 1) * p, c * p:(c + 1) * p]
    embedded = lambda b, r, c: (patch(b, r, c) * weight).sum(dim=(1, 2, 3)) + bias
    patches = torch.stack([torch.stack([embedded(b, r, c) for r in range(grid[0]) for c in range(grid[1])])
                           for b in range(B)])
    x = torch.cat((state["trunk.cls_token"].expand(B, 1, -1), patches), dim=1)
    x = slow_blocks(x, state, "trunk", config.vision_depth, config.vision_num_heads, config, grid, 1)
    narrow = lambda v: v @ state["trunk.feature_bottleneck.weight"].T
    feature = x[:, 0] if config.vision_clip_feat == "cls" else x[:, 1:].mean(dim=1)
    feature = feature if config.vision_bottleneck_ae_only else narrow(feature)
    feature = feature @ state["visual_proj.weight"].T
    latents = narrow(x[:, 1:])
    y = latents @ state["pixel_decoder.proj_in.weight"][:, :, 0, 0].T + state["pixel_decoder.proj_in.bias"]
    depth, n_heads = config.decoder_depth, config.decoder_num_heads
    y = slow_blocks(y, state, "pixel_decoder", depth, n_heads, config, grid, 0)
    y = y @ state["pixel_decoder.proj_out.weight"][:, :, 0, 0].T + state["pixel_decoder.proj_out.bias"]
    pixels = torch.zeros(B, 3, H, W)
    for i in range(grid[0] * grid[1]):
        r, c = divmod(i, grid[1])
        pixels[:, :, r * p:(r + 1) * p, c * p:(c + 1) * p] = y[:, i].view(B, 3, p, p)
    image_features = feature / feature.norm(dim=1, keepdim=True)
    return x[:, 0], x[:, 1:], image_features, latents.transpose(1, 2).view(B, -1, *grid), pixels


def assert_equals_definition(model, images):
    latents = model.encode(images)
    ours = (*model.features(images), model.encode_image(images), latents, model.decode(latents))
    expected = slow_model(model.state_dict(), model.config, images)
    for name, a, b in zip(("cls", "patches", "image features", "latents", "reconstruction"), ours, expected):
        torch.testing.assert_close(a.detach(), b, **FP32, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, dict(vision_use_qk_norm=False, decoder_use_qk_norm=False),
    dict(vision_init_values=0.1, decoder_init_values=0.2),
    dict(vision_ffn_layer="mlp", decoder_ffn_layer="mlp"),
    dict(vision_norm_layer="layernorm", decoder_norm_layer="rmsnorm"),
    dict(vision_clip_feat="pooled"), dict(vision_bottleneck_ae_only=False), dict(vision_mlp_ratio=3.0)])
def test_options_and_non_square_images_equal_the_definition(changes, rotation_in_fp32):
    torch.manual_seed(1)
    config = micro_config(**changes)
    model = VTP(config).eval()
    for p in model.parameters():      # initial norms and biases would hide mistakes
        if p.ndim < 2 and p is not model.logit_scale:
            torch.nn.init.normal_(p, 1.0 if p.min() > 0 else 0.0, 0.2)
    if "vision_mlp_ratio" in changes:
        assert len(model.trunk.blocks[0].mlp.w1.weight) == 128      # two thirds of 3 * 64
    assert_equals_definition(model, torch.randn(2, 3, 32, 64))


@pytest.mark.parametrize("grad", [False, True])
def test_the_released_model_equals_the_definition(released, rotation_in_fp32, grad):
    """The tight half of the comparison with the authors: to rounding in fp32."""
    with torch.set_grad_enabled(grad):
        assert_equals_definition(released[0], released[1]["images"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_norm_is_its_definition_where_its_eps_counts(dtype):
    """Values of order 1 would not show an eps of 1e-5 in place of 1e-6; these are as small as its root."""
    torch.manual_seed(0)
    model = VTP(micro_config())
    kinds = dict(trunk="rmsnorm", pixel_decoder="layernorm")
    for name, norm in model.named_modules():
        if isinstance(norm, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
            kind = kinds.get(name.partition(".")[0], "clip's layernorm")
            x = 2e-3 * torch.randn(4, len(norm.weight)).to(dtype)
            kind = "rmsnorm" if "attn" in name else kind        # of q and k
            expected = slow_norm(x.float(), {name + ".weight": 1, name + ".bias": 0}, name, kind)
            tolerance = FP32 if dtype == torch.float32 else dict(atol=0, rtol=2 ** -7)     # rounded twice
            torch.testing.assert_close(norm.to(dtype)(x).float(), expected, **tolerance)


@torch.no_grad()
def test_ssl_head_gives_cosines_with_prototypes_times_their_gains():
    torch.manual_seed(0)
    head, inputs = vtp.SSLHead(8, 5, hidden_dim=12, out_dim=6), torch.randn(3, 8)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    x = inputs
    for i in (0, 2, 4):
        x = x @ head.mlp[i].weight.T + head.mlp[i].bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if i < 4 else x
    cosines = F.cosine_similarity(x[:, None], head.prototypes, dim=2)
    torch.testing.assert_close(head.prototype_gain[:, 0] * cosines, head(inputs), **FP32)


def test_images_are_normalised_by_the_moments_of_imagenet():
    pixels = torch.rand(2, 3, 4, 5)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(vtp.normalize(pixels), (pixels - mean) / std, **FP32)
    torch.testing.assert_close(vtp.denormalize(vtp.normalize(pixels)), pixels, **FP32)


def test_the_temperature_of_clip_begins_at_7_percent():
    assert VTP(micro_config()).logit_scale.exp().item() == pytest.approx(1 / 0.07)      # fp32


def test_rope_periods_are_the_released_ones():
    released = read_safetensors(os.path.join(RELEASED, "model.safetensors"))["trunk.rope_embed.periods"]
    assert torch.equal(RopeEmbedding(32).periods, released)


def test_rope_gradient_is_the_transposed_rotation():
    sin, cos = RopeEmbedding(16)(2, 3, 1)
    x = torch.randn(2, 7, 16, requires_grad=True)
    first, second = x.to(torch.bfloat16).chunk(2, dim=-1)
    reference = (x.to(torch.bfloat16) * cos + torch.cat((-second, first), dim=-1) * sin).float()
    assert torch.equal(vtp.apply_rope(x, sin, cos), reference)
    g = torch.randn(2, 7, 16).bfloat16().float()
    expected = vtp.apply_rope(g, -sin, cos)       # the transpose turns by the opposite angle
    from_definition, = torch.autograd.grad(reference, x, g)
    ours, = torch.autograd.grad(vtp.apply_rope(x, sin, cos), x, g)
    for gradient in (expected, from_definition):  # bfloat16 rounds values of up to 4 to 1/64
        torch.testing.assert_close(ours, gradient, atol=0.04, rtol=0)


def test_stochastic_depth_processes_the_kept_samples_only_and_scales_them():
    torch.manual_seed(0)
    block = Block(32, 2, 4.0, "swiglu", "layernorm", None, True)
    x, rope, keep = torch.randn(4, 5, 32), RopeEmbedding(16)(2, 2, 1), torch.tensor([[0, 2], [2, 3]])
    out = block(x, rope, keep)
    after_attention = x.clone()
    after_attention[keep[0]] += 2 * block.attn_branch(x[keep[0]], rope)       # 4 samples, 2 kept
    expected = after_attention.clone()
    expected[keep[1]] += 2 * block.ffn_branch(after_attention[keep[1]])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)         # fp32 sums in another order
    assert torch.equal(out[1], x[1])
    assert [samples_kept(b, 0.3) for b in (1, 2, 10)] == [1, 1, 7]


def test_checkpointed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    model, images = VTP(micro_config()), torch.randn(2, 3, 64, 64)
    towers = (model.trunk, model.pixel_decoder)
    parameters = [p for tower in towers for p in tower.blocks.parameters()]
    results, kept = [], []
    for checkpointed in (False, True):
        for tower in towers:
            tower.checkpoint_blocks = checkpointed
        kept.append(0)

        def keep(x):
            kept[-1] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = model.decode(model.encode(images)).square().mean()
        results.append((value, *torch.autograd.grad(value, parameters)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert kept[1] < kept[0] / 2        # with one of the three blocks as before it would be more


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

def test_saved_checkpoint_has_the_released_names_shapes_dtypes_and_config(tmp_path, released):
    released[0].save_pretrained(tmp_path)
    ours, theirs = (read_safetensors(os.path.join(f, "model.safetensors")) for f in (tmp_path, RELEASED))
    shapes = lambda tensors: {k: (v.shape, v.dtype) for k, v in tensors.items()}
    assert shapes(ours) == shapes(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    configs = [json.load(open(os.path.join(f, "config.json"))) for f in (tmp_path, RELEASED)]
    assert configs[0] == configs[1]


def test_the_decoder_enlarges_by_the_patch_size():
    for patch_size in (8, 16):
        config = micro_config(vision_patch_size=patch_size, image_size=8 * patch_size)
        model = VTP(config)
        latents = torch.randn(1, 16, 3, 5)
        image = model.decode(latents)
        assert image.shape == (1, 3, 3 * patch_size, 5 * patch_size)
        # a patch's pixels are its own output's, so a bias alone repeats from patch to patch
        torch.nn.init.zeros_(model.pixel_decoder.proj_out.weight)
        torch.nn.init.normal_(model.pixel_decoder.proj_out.bias)
        tile = model.pixel_decoder.proj_out.bias.view(3, patch_size, patch_size)
        torch.testing.assert_close(model.decode(latents)[0], tile.tile(1, 3, 5), rtol=0, atol=0)


@pytest.mark.parametrize("field, value", [
    ("init_logit_bias", -10.0), ("text_quick_gelu", True), ("text_no_causal_mask", True),
    ("text_pool_type", "last"), ("vision_ffn_layer", "swiglu64"), ("nonscalar_logit_scale", True),
    ("vision_norm_layer", "layernormbf16"), ("text_ls_init_value", 0.1), ("a_field_of_tomorrow", 1),
    ("vision_patch_size", 14), ("vision_num_heads", 3)])
def test_what_is_not_implemented_is_an_error_that_names_it(tmp_path, field, value):
    config = json.load(open(os.path.join(RELEASED, "config.json")))
    config[field] = value
    json.dump(config, open(tmp_path / "config.json", "w"))
    with pytest.raises(ValueError, match=field):
        VTP.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("field, value", [
    ("vision_depth", "4"), ("vision_depth", 2.0), ("vision_depth", True), ("vision_depth", None),
    ("vision_depth", 0), ("vision_depth", -2), ("vision_num_heads", 0), ("text_vocab_size", 2 ** 18 + 1),
    ("image_size", [64]), ("train_clip", "false"), ("train_clip", 1), ("train_reconstruction", None),
    ("vision_mlp_ratio", math.nan), ("vision_mlp_ratio", math.inf), ("vision_mlp_ratio", 0),
    ("vision_mlp_ratio", True), ("vision_mlp_ratio", None), ("text_mlp_ratio", "4"), ("text_mlp_ratio", -4.0),
    ("text_mlp_ratio", 10 ** 400), ("vision_init_values", math.nan), ("vision_init_values", "1e-5"),
    ("init_logit_scale", -math.inf), ("decoder_init_values", False), ("text_pad_id", False),
    ("text_embed_cls", 0), ("vision_ffn_layer", ["mlp"]), ("vision_clip_feat", None)])
def test_a_field_of_a_wrong_type_or_range_is_an_error_that_names_field_and_file(tmp_path, field, value):
    config = json.loads(Path(RELEASED, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"config\.json: config field {field} = .*expected"):
        vtp.read_config(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"4", b"null", b'{"image_size": 64', b'{"image_size": "\xff"}',
                                  b"[" * 100_000, b'{"image_size": 64, "image_size": 32}'])
def test_a_config_that_is_no_json_object_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        vtp.read_config(tmp_path)


def test_an_int_does_for_a_float_field():
    model = VTP(micro_config(vision_mlp_ratio=4, vision_init_values=1, init_logit_scale=0))
    assert model.trunk.blocks[0].ls1.gamma.dtype == torch.float32 and model.logit_scale == 0


def test_hub_bookkeeping_is_ignored():
    config = json.load(open(os.path.join(RELEASED, "config.json")))
    bookkeeping = {"torch_dtype": "float32", "_name_or_path": "x", "auto_map": {}}
    assert VTPConfig.from_dict({**config, **bookkeeping}) == VTPConfig.from_dict(config)


def test_sizes_are_the_papers():
    sizes = {name: (c.vision_embed_dim, c.vision_depth, c.vision_num_heads,
                    c.decoder_embed_dim, c.decoder_depth, c.decoder_num_heads)
             for name in vtp.VTP_SIZES for c in [vtp_config(name)]}
    assert sizes["small"] == (384, 12, 6, 384, 12, 6) and sizes["base"] == (768, 12, 12, 768, 12, 12)
    assert sizes["large"] == (1024, 24, 16, 1024, 24, 16)
    assert sizes["large-light"] == (1024, 24, 16, 1024, 4, 16)
    configs = [vtp_config(name) for name in sizes]
    assert all(c.vision_use_qk_norm and c.vision_feature_bottleneck == 64 for c in configs)
    with pytest.raises(ValueError, match="huge"):
        vtp_config("huge")


def test_safetensors_round_trip_and_a_cut_file_is_an_error(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(1.5), "c": torch.arange(3),
               "d": torch.randn(7).bfloat16(), "e": torch.tensor([True, False])}
    path = str(tmp_path / "x.safetensors")
    write_safetensors(path, tensors)
    back = read_safetensors(path)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    for cut in (3, 40, os.path.getsize(path) - 1):
        shutil.copy(path, path + ".cut")
        os.truncate(path + ".cut", cut)
        with pytest.raises(ValueError, match="cut"):
            read_safetensors(path + ".cut")


WHOLE = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


# Of the two tensors "b" is whole, and "a" is this, or a float32 [2] in bytes 0 to 8 but for this.
@pytest.mark.parametrize("entry, says", [
    ([], "'a' has dtype None"), ({}, "'a' has dtype None"), (dict(dtype=None), "'a' has dtype None"),
    (dict(dtype=["F32"]), "'a' has dtype"), (dict(dtype="F4"), "'a' has dtype 'F4'"),
    *((dict(shape=shape), "'a' is broken") for shape in (
        None, 2, "2", [], [3], [2.0], ["2"], [True, 2], [-1, -2], [10 ** 400])),
    *((dict(data_offsets=place), "'a' is broken") for place in (
        None, 8, [8], [8, 0], [0, 8, 16], [0.0, 8.0], ["0", "8"], [-8, 0], [False, 8], [0, 7])),
    (dict(shape=[0, 10 ** 30], data_offsets=[0, 0]), "'a' is broken"),
    (dict(data_offsets=[4, 12]), "'a' begins at byte 4, not 0"),
    (dict(data_offsets=[8, 16]), "'a' begins at byte 8, not 0"),
    (dict(shape=[1], data_offsets=[0, 4]), "'b' begins at byte 8, not 4"),
    (dict(shape=[3], data_offsets=[0, 12]), "'b' begins at byte 8, not 12")])
def test_a_broken_entry_is_an_error_that_names_file_and_tensor(tmp_path, entry, says):
    a = {**WHOLE, **entry} if entry else entry
    text = json.dumps({"a": a, "b": {**WHOLE, "data_offsets": [8, 16]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match=rf"x\.safetensors: {says}"):
        read_safetensors(path)


A = json.dumps({"a": WHOLE}).encode()


@pytest.mark.parametrize("n, rest", [
    (2 ** 64 - 1, A + bytes(8)), (len(A) + 100, A + bytes(8)), (len(A) - 1, A + bytes(8)), (0, b""),
    (len(A), A + bytes(7)), (len(A), A + bytes(9)), (2, b"[]"), (4, b"null"), (4, b"\xff\xfe{}"),
    (100_000, b"[" * 100_000), (2 * len(A), A[:-1] + b", " + A[1:] + bytes(8))])
def test_a_broken_header_is_an_error_that_names_the_file(tmp_path, n, rest):
    path = tmp_path / "x.safetensors"
    path.write_bytes(n.to_bytes(8, "little") + rest)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype, value", [
    (torch.float64, 1e300),  # finite, but not in the model's float32
    *((getattr(torch, dtype), value) for dtype in ("float64", "float32", "float16", "bfloat16")
      for value in (math.nan, math.inf, -math.inf))])
def test_weights_that_are_not_finite_are_an_error_that_names_file_and_tensor(tmp_path, dtype, value):
    weights = torch.zeros(70, dtype=dtype)
    weights[33] = value
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"empty": weights[:0], "trunk.norm.weight": weights, "n": torch.arange(3)})
    with pytest.raises(ValueError, match=r"x\.safetensors: 'trunk\.norm\.weight' holds NaN or infinity"):
        read_safetensors(path)


@pytest.mark.parametrize("seed, n", [(0, 600)])  # more: 5,000 of each of several seeds, by hand
def test_broken_checkpoints_load_finite_weights_or_end_in_one_line_that_names_the_file(tmp_path, micro_model,
                                                                                       seed, n):
    rng, shapes = random.Random(seed), {k: v.shape for k, v in VTP(micro_config()).state_dict().items()}
    names, n_loaded = ("config.json", "model.safetensors"), 0
    whole = {name: Path(micro_model, name).read_bytes() for name in names}
    header = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")
    for case in range(n):
        name = rng.choice(names)
        broken = bytearray(whole[name])
        end = rng.choice((8, header, len(broken))) if name == "model.safetensors" else len(broken)
        for _ in range(rng.choice((1, 1, 2, 8))):
            i, j, length = rng.randrange(end), rng.randrange(end), rng.randrange(1, 40)
            kind = rng.choice(("bit", "bit", "sign", "sign", "swap", "remove", "cut"))
            if kind == "bit":
                broken[i:i + 1] = (byte ^ 1 << rng.randrange(8) for byte in broken[i:i + 1])
            elif kind == "sign":  # one that JSON knows
                broken[i:i + 1] = rng.choices(b'0123456789-.eE"{}[],: ')
            elif kind == "swap":
                broken[i:i + length], broken[j:j + length] = broken[j:j + length], broken[i:i + length]
            else:
                del broken[i:i + length if kind == "remove" else None]
        for other in names:
            (tmp_path / other).write_bytes(broken if other == name else whole[other])
        try:
            state = VTP.from_pretrained(str(tmp_path)).state_dict()
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), (case, error)
            continue
        n_loaded += 1
        # a config that leaves a part out would not fit, so these are the shapes, whatever was broken
        assert {k: v.shape for k, v in state.items()} == shapes, case
        assert all(v.isfinite().all() for v in state.values()), case
    assert n / 50 < n_loaded < n / 2  # both ends are reached


def test_weights_that_do_not_fit_and_missing_folders_are_errors(tmp_path, released):
    path = tmp_path / "model.safetensors"
    for change, message in (
            (dict(logit_scale=None), "in 1 tensors: 'logit_scale' is missing, not \\[\\]"),
            (dict(logit_scale=torch.ones(2)), r"in 1 tensors: 'logit_scale' is \[2\], not \[\]"),
            (dict(logit_scale=torch.tensor(3)), r"in 1 tensors: 'logit_scale' is torch.int64\[\], not \[\]"),
            (dict.fromkeys("abcde", torch.ones(2)), r"in 5 .*: 'a' is \[2\], not known; 'b' .* 'c' [^;]*$")):
        released[0].save_pretrained(tmp_path)
        tensors = {**read_safetensors(path), **change}
        write_safetensors(path, {k: v for k, v in tensors.items() if v is not None})
        with pytest.raises(RuntimeError, match=r"model\.safetensors does not fit config.json " + message):
            VTP.from_pretrained(str(tmp_path))
    for where in ("./nowhere", str(tmp_path / "missing"), "notahubid"):
        with pytest.raises(FileNotFoundError, match="nowhere|missing|notahubid"):
            VTP.from_pretrained(where)


@pytest.mark.parametrize("changes", [
    dict(vision_depth=2 ** 18), dict(text_vocab_size=2 ** 18), dict(vision_mlp_ratio=1e5),
    dict(vision_embed_dim=2 ** 18, decoder_embed_dim=2 ** 18, text_embed_dim=2 ** 18),
    dict.fromkeys(("image_size", "vision_patch_size", "vision_embed_dim"), 2 ** 18)
    | dict(train_reconstruction=False)])
def test_a_config_far_larger_than_its_weights_is_an_error_before_memory_is_taken(tmp_path, changes):
    VTP(micro_config()).save_pretrained(tmp_path)  # with the changes, up to 216 PB
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(RuntimeError, match=r"model\.safetensors (does not fit|has \d+ tensors,)"):
        VTP.from_pretrained(str(tmp_path))


def test_loading_draws_nothing(micro_model):
    """What a seed gives after it does not depend on the tokenizer's size."""
    before = torch.get_rng_state()
    VTP.from_pretrained(micro_model)
    assert torch.equal(torch.get_rng_state(), before)


def test_hub_id_is_downloaded_once_and_atomically(tmp_path, monkeypatch, released):
    served, hub = tmp_path / "served", tmp_path / "hub"
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass
    folder = served / "owner" / "name" / "resolve" / "main"
    shutil.copytree(RELEASED, folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(hub))
    try:
        whole = (folder / "model.safetensors").read_bytes()
        # a download that breaks off leaves nothing behind
        (folder / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(RuntimeError, match="model.safetensors"):
            VTP.from_pretrained("owner/name")
        assert not [f for _, _, files in os.walk(hub) for f in files]
        (folder / "model.safetensors").write_bytes(whole)
        model = VTP.from_pretrained("owner/name")
        assert torch.equal(model.visual_proj.weight, released[0].visual_proj.weight)
        n = len(requests)
        VTP.from_pretrained("owner/name")
        assert len(requests) == n
        with pytest.raises(RuntimeError, match="other"):
            VTP.from_pretrained("owner/other")
    finally:
        server.shutdown()
