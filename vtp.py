"""
VTP, the visual tokenizer of "Towards Scalable Pre-training of Visual Tokenizers for Generation" (arXiv 2512.13687).

    model = VTP.from_pretrained("MiniMaxAI/VTP-Large-f16d64")   # or a folder: released, or written by train_tokenizer.py
    latents = model.encode(normalize(pixels))                   # (B, 64, H/16, W/16)
    pixels = denormalize(model.decode(latents))                 # (B, 3, H, W)

An encoder, a pixel decoder and a text tower, all ViTs, and the self-supervised head that only training needs.
Module and parameter names are the released checkpoint's tensor names, so loading is a strict load_state_dict.
"""
import functools
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.lru_cache(maxsize=None)
def constant(values, device):
    """A tuple of numbers as an fp32 tensor on a device, copied there once: a copy in every step would wait for the device."""
    with torch.inference_mode(False):      # or it could not be used in training later
        return torch.tensor(values, dtype=torch.float32, device=device)


def normalize(pixels):
    """Pixels in [0, 1], (B, 3, H, W), to what the models read and write: minus ImageNet's mean, over its std."""
    mean, std = (constant(v, pixels.device).to(pixels.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def denormalize(images):
    """The inverse of normalize. Reconstructions may leave [0, 1]: clamp them before they are shown or measured."""
    mean, std = (constant(v, images.device).to(images.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return images * std + mean


# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the fields of the released config.json, and the model sizes of the paper
# ----------------------------------------------------------------------------------------------------------------------

@dataclass
class VTPConfig:
    """The fields of the released config.json, with the released models' values as defaults (base size).

    Raises ValueError, naming the field, for a value that this project does not implement.
    """
    image_size: int = 256
    train_clip: bool = True
    train_reconstruction: bool = True

    vision_patch_size: int = 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: str = "swiglu"            # or "mlp"
    vision_norm_layer: str = "rmsnorm"          # or "layernorm"
    vision_init_values: float | None = None     # LayerScale's first value; None: no LayerScale
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int = 64         # d, the latent's channels
    vision_bottleneck_ae_only: bool = True      # False: CLIP and SSL read the d channels too
    vision_clip_feat: str = "cls"               # or "pooled", the mean of the patches

    text_context_length: int = 77
    text_vocab_size: int = 49408                # CLIP's BPE; 259: bytes (see data.py)
    text_embed_dim: int = 768
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: float | None = None
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: str = "argmax"
    text_proj_type: str = "linear"
    text_proj_bias: bool = False
    text_output_tokens: bool = False
    text_quick_gelu: bool = False

    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: str = "swiglu"
    decoder_norm_layer: str = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False

    init_logit_scale: float | None = None       # None: ln(1 / 0.07)
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False

    def __post_init__(self):
        implemented = dict(
            vision_ffn_layer=("swiglu", "mlp"), decoder_ffn_layer=("swiglu", "mlp"),
            vision_norm_layer=("rmsnorm", "layernorm"), decoder_norm_layer=("rmsnorm", "layernorm"),
            vision_clip_feat=("cls", "pooled"),
            text_ls_init_value=(None,), text_embed_cls=(False,), text_pad_id=(0,), text_no_causal_mask=(False,),
            text_pool_type=("argmax",), text_proj_type=("linear",), text_proj_bias=(False,),
            text_output_tokens=(False,), text_quick_gelu=(False,),
            init_logit_bias=(None,), nonscalar_logit_scale=(False,),
        )
        for name, values in implemented.items():
            if getattr(self, name) not in values:
                raise ValueError(f"config field {name} = {getattr(self, name)!r} is not implemented here (only {', '.join(map(repr, values))})")
        for tower, is_used in (("vision", True), ("decoder", self.train_reconstruction), ("text", self.train_clip)):
            dim, heads = getattr(self, f"{tower}_embed_dim"), getattr(self, f"{tower}_num_heads")
            if is_used and (dim % heads or (tower != "text" and dim // heads % 4)):
                raise ValueError(f"config fields {tower}_embed_dim = {dim} and {tower}_num_heads = {heads}: the width of a head "
                                 "must be a whole number" + ("" if tower == "text" else ", and a multiple of 4 for axial RoPE"))
        if self.image_size % self.vision_patch_size:
            raise ValueError(f"config field image_size = {self.image_size} is not a multiple of vision_patch_size = {self.vision_patch_size}")
        if self.train_reconstruction and self.vision_patch_size != PixelDecoder.UPSCALE:
            raise ValueError(f"config field vision_patch_size = {self.vision_patch_size}: the pixel decoder upscales by {PixelDecoder.UPSCALE}, "
                             "as the released one, so with train_reconstruction the patch size is that too")

    @property
    def semantic_dim(self):
        """Width of the features that CLIP and SSL read."""
        return self.vision_embed_dim if self.vision_bottleneck_ae_only else self.vision_feature_bottleneck

    @classmethod
    def from_dict(cls, values):
        """From a parsed config.json. The hub's bookkeeping is ignored; any other unknown field is a ValueError that names it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(k for k in values if k not in known and k not in HUB_FIELDS and not k.startswith("_"))
        if unknown:
            raise ValueError(f"config has fields that this project does not know: {', '.join(unknown)}")
        return cls(**{k: v for k, v in values.items() if k in known})


# What the hub's library writes beside the model's own fields: ignored when read, written so that the authors' loader
# finds what it looks for. (transformers_version is the one whose config format ours follows.)
HUB_FIELDS = dict(architectures=["VTPModel"], dtype="float32", model_type="vtp", transformers_version="5.23.0",
                  torch_dtype=None, auto_map=None, id2label=None, label2id=None, output_attentions=None,
                  output_hidden_states=None, return_dict=None, problem_type=None, chunk_size_feed_forward=None,
                  is_encoder_decoder=None, use_cache=None, tie_word_embeddings=None)


def _towers(vision, decoder, text=(768, 12, 12), **other):
    """A config from (width, depth, heads) of its three towers. QK-norm is on from scratch (paper: for stability)."""
    names = ("embed_dim", "depth", "num_heads")
    sizes = {f"{tower}_{n}": v for tower, size in (("vision", vision), ("decoder", decoder), ("text", text)) for n, v in zip(names, size)}
    return VTPConfig(**sizes, vision_use_qk_norm=True, decoder_use_qk_norm=True, **other)


def preset(name, **changes):
    """The config of a named size, with fields changed by keyword. Sizes: PRESETS' keys (the paper's, and tiny for a CPU)."""
    if name not in PRESETS:
        raise ValueError(f"no model size {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name](), **changes)


PRESETS = {
    # f16d64 at 64 px with byte text: wide and shallow, since 16 patches leave little else for a CPU's matrix units to do
    "tiny": lambda: _towers((320, 3, 5), (320, 2, 5), (192, 2, 3), vision_clip_feat="pooled", vision_bottleneck_ae_only=False, image_size=64, text_context_length=64, text_vocab_size=259),
    "small": lambda: _towers((384, 12, 6), (384, 12, 6)),
    "base": lambda: _towers((768, 12, 12), (768, 12, 12)),
    "large": lambda: _towers((1024, 24, 16), (1024, 24, 16)),
    "large-light": lambda: _towers((1024, 24, 16), (1024, 4, 16)),   # the paper's scaling studies
}


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; statistics in fp32, cast back before the weight multiplies (METHOD: DINOv3)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # the weight joins the kernel in fp32; in bf16 it must come after the cast
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


def make_norm(kind, dim):
    """Norm by its name in the config; eps goes with the type."""
    return RMSNorm(dim, eps=1e-5) if kind == "rmsnorm" else nn.LayerNorm(dim, eps=1e-6)


class RopeEmbedding(nn.Module):
    """Axial rotary embedding of DINOv3, without learned part: sin and cos of every patch centre, (H*W, head_dim) each.

    All of it is in bfloat16, rounded after every operation, because the released weights were trained so.
    """

    def __init__(self, head_dim, base=100.0):
        super().__init__()
        exponents = 2 * torch.arange(head_dim // 4, dtype=torch.bfloat16) / (head_dim // 2)
        self.register_buffer("periods", base ** exponents)
        self.tables = {}   # (H, W, number of prefix tokens, device) -> (sin, cos): they never change

    def forward(self, height, width, n_prefix):
        """-> sin, cos, each (n_prefix + H*W, head_dim) bfloat16; prefix tokens (CLS) get the identity rotation."""
        key = (height, width, n_prefix, self.periods.device)
        if key not in self.tables:
            rows, cols = (2 * (torch.arange(0.5, n, dtype=torch.bfloat16, device=self.periods.device) / n) - 1 for n in (height, width))
            coords = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)     # (H*W, 2)
            angles = 2 * math.pi * coords[:, :, None] / self.periods                                  # (H*W, 2, head_dim/4)
            angles = angles.flatten(1).tile(2)                                                        # (H*W, head_dim)
            sin, cos = angles.sin(), angles.cos()
            self.tables[key] = (F.pad(sin, (0, 0, n_prefix, 0)), F.pad(cos, (0, 0, n_prefix, 0), value=1.0))
        return self.tables[key]


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin; its transpose is the rotation by the opposite angle, so nothing is kept for it."""

    @staticmethod
    def forward(ctx, x, sin, cos):
        ctx.save_for_backward(sin, cos)
        return _Rotate.rotate(x, sin, cos)

    @staticmethod
    def backward(ctx, grad):
        sin, cos = ctx.saved_tensors
        return _Rotate.rotate(grad.to(sin.dtype), -sin, cos).to(grad.dtype), None, None

    @staticmethod
    def rotate(x, sin, cos):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


def apply_rope(x, sin, cos):
    """Rotate x (..., N, head_dim) in the tables' bfloat16 and cast back."""
    return _Rotate.apply(x.to(sin.dtype), sin, cos).to(x.dtype)


def attention(q, k, v, causal=False):
    """softmax(q k' / sqrt(d)) v for q, k, v (B, heads, N, d) -> (B, heads, N, d)."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # On a CPU the fused kernel's backward is 2 to 7 times slower than these three lines at 5 to 257 tokens.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                        # (B, heads, N, N)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu(1)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with fused qkv, optional QK-norm and RoPE: (B, N, dim) -> (B, N, dim).

    rotate: how rope's (sin, cos) turn queries and keys.
    """

    def __init__(self, dim, n_heads, use_qk_norm, rotate=apply_rope):
        super().__init__()
        self.n_heads, self.rotate = n_heads, rotate
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if use_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim // n_heads), RMSNorm(dim // n_heads)

    def forward(self, x, rope):
        B, N, dim = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_heads, dim // self.n_heads).permute(2, 0, 3, 1, 4)   # (B, heads, N, d) each
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, *rope), self.rotate(k, *rope)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, dim))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), three biased linears; inner width 2/3 of the ratio, rounded up to a multiple of 8."""

    def __init__(self, dim, ratio):
        super().__init__()
        inner = int(int(dim * ratio) * 2 / 3)
        inner += -inner % 8
        self.w1, self.w2, self.w3 = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), GELU by erf."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * ratio)), nn.Linear(int(dim * ratio), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch."""

    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm ViT block: x + attn(norm(x)), then x + ffn(norm(x)), with optional LayerScale on each branch.

    keep: None, or (2, kept) sample indices: stochastic depth as in DINOv2. Only these samples go through the attention
    (row 0) and the ffn branch (row 1), scaled by B / kept. Their number is fixed, so shapes are static.
    """

    def __init__(self, dim, n_heads, ffn_ratio, ffn_layer, norm_layer, init_values, use_qk_norm):
        super().__init__()
        self.norm1, self.norm2 = make_norm(norm_layer, dim), make_norm(norm_layer, dim)
        self.attn = Attention(dim, n_heads, use_qk_norm)
        self.mlp = (SwiGLU if ffn_layer == "swiglu" else Mlp)(dim, ffn_ratio)
        self.ls1, self.ls2 = (nn.Identity() if init_values is None else LayerScale(dim, init_values) for _ in range(2))

    def attn_branch(self, x, rope):
        return self.ls1(self.attn(self.norm1(x), rope))

    def ffn_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, rope, keep=None):
        if keep is None:
            x = x + self.attn_branch(x, rope)
            return x + self.ffn_branch(x)
        scale = x.shape[0] / keep.shape[1]
        x = x.index_add(0, keep[0], self.attn_branch(x[keep[0]], rope).to(x.dtype), alpha=scale)
        return x.index_add(0, keep[1], self.ffn_branch(x[keep[1]]).to(x.dtype), alpha=scale)


def samples_kept(batch_size, drop_path):
    """How many samples of a batch a branch processes under stochastic depth (DINOv2): max(floor(B (1 - p)), 1)."""
    return max(int(batch_size * (1 - drop_path)), 1)


def _init_linears(module, std=0.02):
    """Linears (and 1x1 convolutions) from a truncated normal, biases 0: encoder, pixel decoder and SSL head."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ----------------------------------------------------------------------------------------------------------------------
# The towers
# ----------------------------------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Convolution with stride = kernel = patch size: (B, 3, H, W) -> (B, dim, H/p, W/p)."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images)


class Encoder(nn.Module):
    """The vision transformer (DINOv3 layout) with the bottleneck d behind it. METHOD section 2."""

    def __init__(self, config):
        super().__init__()
        dim = config.vision_embed_dim
        self.patch_size = config.vision_patch_size
        self.patch_embed = PatchEmbed(self.patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.rope_embed = RopeEmbedding(dim // config.vision_num_heads)
        self.blocks = nn.ModuleList(
            Block(dim, config.vision_num_heads, config.vision_mlp_ratio, config.vision_ffn_layer, config.vision_norm_layer,
                  config.vision_init_values, config.vision_use_qk_norm) for _ in range(config.vision_depth))
        self.norm = make_norm(config.vision_norm_layer, dim)
        if config.vision_feature_bottleneck != dim:
            self.feature_bottleneck = nn.Linear(dim, config.vision_feature_bottleneck, bias=False)
        self.checkpoint_blocks = False   # recompute each block in the backward: a third more time, far less memory

        _init_linears(self.blocks)
        if hasattr(self, "feature_bottleneck"):
            nn.init.trunc_normal_(self.feature_bottleneck.weight, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        bound = (3 * self.patch_size ** 2) ** -0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)

    def forward(self, images, masks=None, keep=None, n_last=1):
        """Final-normed outputs of the last n_last blocks: a list of (cls (B, dim), patches (B, N, dim)).

        images (B, 3, H, W) normalised, H and W multiples of the patch size; masks (B, N) bool, True where the mask token
        replaces the patch; keep (depth, 2, kept) sample indices for stochastic depth.
        """
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"images are {H} x {W}; both must be multiples of the patch size {self.patch_size}")
        if not 1 <= n_last <= len(self.blocks):
            raise ValueError(f"asked for the last {n_last} layers of {len(self.blocks)}")
        x = self.patch_embed(images)                                                # (B, dim, H/p, W/p)
        rope = self.rope_embed(*x.shape[-2:], n_prefix=1)
        x = x.flatten(2).transpose(1, 2)                                            # (B, N, dim)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)        # (B, 1 + N, dim)
        outputs = []
        for i, block in enumerate(self.blocks):
            inputs = (x, rope, None if keep is None else keep[i])
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
            if i >= len(self.blocks) - n_last:
                normed = self.norm(x)
                outputs.append((normed[:, 0], normed[:, 1:]))
        return outputs

    def bottleneck(self, features):
        """(..., dim) -> (..., d)."""
        return self.feature_bottleneck(features) if hasattr(self, "feature_bottleneck") else features


class PixelDecoder(nn.Module):
    """Latents (B, d, h, w) -> images (B, 3, 16h, 16w): 1x1 convolution, RoPE blocks without CLS, 1x1 convolution, pixel shuffle."""

    UPSCALE = 16

    def __init__(self, config):
        super().__init__()
        dim = config.decoder_embed_dim
        self.proj_in = nn.Conv2d(config.vision_feature_bottleneck, dim, 1)
        self.rope_embed = RopeEmbedding(dim // config.decoder_num_heads)
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_num_heads, 4.0, config.decoder_ffn_layer, config.decoder_norm_layer,
                  config.decoder_init_values, config.decoder_use_qk_norm) for _ in range(config.decoder_depth))
        self.norm = make_norm(config.decoder_norm_layer, dim)
        self.proj_out = nn.Conv2d(dim, 3 * self.UPSCALE ** 2, 1)
        _init_linears(self)

    def forward(self, latents):
        x = self.proj_in(latents)                                                   # (B, dim, h, w)
        h, w = x.shape[-2:]
        rope = self.rope_embed(h, w, n_prefix=0)
        x = x.flatten(2).transpose(1, 2)                                            # (B, h*w, dim)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x).transpose(1, 2).unflatten(2, (h, w))                       # (B, dim, h, w)
        return F.pixel_shuffle(self.proj_out(x), self.UPSCALE)


class TextAttention(nn.Module):
    """Causal self-attention under the names of nn.MultiheadAttention, as CLIP's checkpoints have it."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, dim = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, L, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out_proj(attention(q, k, v, causal=True).transpose(1, 2).reshape(B, L, dim))


class TextBlock(nn.Module):
    """CLIP's residual block."""

    def __init__(self, dim, n_heads, mlp_ratio):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.attn = TextAttention(dim, n_heads)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(dim, int(dim * mlp_ratio)), c_proj=nn.Linear(int(dim * mlp_ratio), dim)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class TextTransformer(nn.Module):
    """The blocks of CLIP's text tower. Embeddings, final norm and projection lie on the VTP module, as in the release."""

    def __init__(self, dim, depth, n_heads, mlp_ratio):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(dim, n_heads, mlp_ratio) for _ in range(depth))
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=dim ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=dim ** -0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=dim ** -0.5 * (2 * depth) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class SSLHead(nn.Module):
    """DINO's projection head, one for CLS and masked patches: (M, in_dim) -> logits over prototypes (M, K).

    MLP of three linears with GELU, L2-normalise, weight-normalised linear without bias whose gain starts at 1
    (trainable, as in DINOv2). Sizes in DINOv2 and the paper: hidden 2048, out 256, K = 65,536.
    """

    def __init__(self, in_dim, n_prototypes, hidden_dim=2048, out_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
        _init_linears(self.mlp)
        bound = out_dim ** -0.5
        self.prototypes = nn.Parameter(torch.empty(n_prototypes, out_dim).uniform_(-bound, bound))   # directions
        self.prototype_gain = nn.Parameter(torch.ones(n_prototypes, 1))

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-12)
        return F.linear(x, self.prototype_gain * F.normalize(self.prototypes, dim=-1, eps=1e-12))


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------------------

class VTP(nn.Module):
    """The visual tokenizer. Images everywhere: normalised (B, 3, H, W), H and W multiples of the patch size p.

    Without train_clip there is no text tower, without train_reconstruction no pixel decoder (encode_image, encode_text
    or decode then raise RuntimeError).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Encoder(config)
        if config.train_reconstruction:
            self.pixel_decoder = PixelDecoder(config)
        if config.train_clip:
            dim = config.text_embed_dim
            self.visual_proj = nn.Linear(config.semantic_dim, dim, bias=False)
            self.text_transformer = TextTransformer(dim, config.text_depth, config.text_num_heads, config.text_mlp_ratio)
            self.token_embedding = nn.Embedding(config.text_vocab_size, dim)
            self.positional_embedding = nn.Parameter(torch.empty(config.text_context_length, dim))
            self.ln_final = nn.LayerNorm(dim, eps=1e-5)
            self.text_projection = nn.Parameter(torch.empty(dim, dim))
            scale = math.log(1 / 0.07) if config.init_logit_scale is None else config.init_logit_scale
            self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
            nn.init.trunc_normal_(self.visual_proj.weight, std=0.02)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.text_projection, std=dim ** -0.5)

    # features -> what each objective reads

    def semantic(self, features):
        """What CLIP and SSL read of encoder features (..., dim): all of them, or the bottleneck's d (vision_bottleneck_ae_only)."""
        return features if self.config.vision_bottleneck_ae_only else self.trunk.bottleneck(features)

    def project_image(self, cls, patches):
        """Encoder features -> CLIP's image features (B, text_embed_dim), not normalised."""
        return self.visual_proj(self.semantic(cls if self.config.vision_clip_feat == "cls" else patches.mean(dim=1)))

    def to_latents(self, patches, height, width):
        """Patches (B, h*w, dim) of an image of that height and width in pixels -> latents (B, d, h, w)."""
        grid = (height // self.trunk.patch_size, width // self.trunk.patch_size)
        return self.trunk.bottleneck(patches).transpose(1, 2).unflatten(2, grid)

    # the public methods

    def features(self, images, masks=None, keep=None):
        """-> cls (B, dim), patches (B, N, dim): after the final norm, full width. masks and keep as in Encoder.forward."""
        return self.trunk(images, masks, keep)[-1]

    def intermediate_layers(self, images, n):
        """-> list of (patches (B, N, dim), cls (B, dim)) of the last n blocks, in order, each after the final norm."""
        return [(patches, cls) for cls, patches in self.trunk(images, n_last=n)]

    def encode(self, images):
        """-> latents (B, d, H/p, W/p)."""
        return self.to_latents(self.features(images)[1], *images.shape[-2:])

    def decode(self, latents):
        """-> normalised images (B, 3, H, W)."""
        if not self.config.train_reconstruction:
            raise RuntimeError("this model has no pixel decoder (config: train_reconstruction is false)")
        return self.pixel_decoder(latents)

    def encode_image(self, images, normalize=True):
        """-> CLIP image features (B, text_embed_dim), L2-normalised unless told."""
        if not self.config.train_clip:
            raise RuntimeError("this model has no CLIP projection (config: train_clip is false)")
        image_features = self.project_image(*self.features(images))
        return F.normalize(image_features, dim=-1) if normalize else image_features

    def encode_text(self, tokens, normalize=True):
        """tokens (B, L) int, L at most the context length, padded with 0 -> CLIP text features (B, text_embed_dim)."""
        if not self.config.train_clip:
            raise RuntimeError("this model has no text tower (config: train_clip is false)")
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]          # (B, L, dim)
        x = self.text_transformer(x)
        end = tokens.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])                   # the end token has the highest id
        # the norm acts on each token by itself, so only the one that is read goes through it
        text_features = self.ln_final(x.gather(1, end).squeeze(1)) @ self.text_projection
        return F.normalize(text_features, dim=-1) if normalize else text_features

    # released weights in and out

    @classmethod
    def from_pretrained(cls, where):
        """Load from a folder (config.json and model.safetensors) or a hub id such as MiniMaxAI/VTP-Large-f16d64.

        A hub id is fetched once into the torch hub cache, from $HF_ENDPOINT or the public default. Errors: FileNotFoundError
        (no such folder or hub id), ValueError (unknown config or broken file), RuntimeError (names or shapes that do not fit).
        """
        folder = find_checkpoint(where)
        model = cls(read_config(folder))
        model.load_state_dict(read_safetensors(os.path.join(folder, "model.safetensors")), strict=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as the authors' loader reads them (fp32 weights, bfloat16 RoPE periods)."""
        os.makedirs(folder, exist_ok=True)
        written = {k: v for k, v in HUB_FIELDS.items() if v is not None}
        write_atomically(os.path.join(folder, "config.json"),
                         lambda f: f.write(json.dumps(dict(sorted({**asdict(self.config), **written}.items())), indent=2).encode() + b"\n"))
        write_safetensors(os.path.join(folder, "model.safetensors"), self.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Files: released checkpoints, safetensors, downloads
# ----------------------------------------------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                      "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A safetensors file as {name: tensor}, memory-mapped copy-on-write. ValueError if it is not one or is cut short."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{path} is not a safetensors file, or is cut short ({size} bytes)")
        try:
            header = json.loads(f.read(start - 8))
        except ValueError:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    end = start + max((info["data_offsets"][1] for info in header.values()), default=0)
    if end != size:
        raise ValueError(f"{path} has {size} bytes where its header says {end}: an incomplete download or copy?")
    data = np.memmap(path, np.uint8, mode="c", offset=start) if end > start else np.empty(0, np.uint8)
    tensors = {}
    for name, info in header.items():
        if info["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {info['dtype']}, which is not read here")
        a, b = info["data_offsets"]
        dtype = SAFETENSORS_DTYPES[info["dtype"]]
        raw = torch.from_numpy(data[a:b])
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()   # the format does not promise alignment
        tensors[name] = raw.view(dtype).view(info["shape"]) if b > a else torch.empty(info["shape"], dtype=dtype)
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, atomically. Wider types first, so that every tensor is aligned."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    tensors = {k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            f.write(t.reshape(-1).view(torch.uint8).numpy().data)
    write_atomically(path, write)


def write_atomically(path, write):
    """Call write(file) on a temporary file beside path, then put it in path's place: a reader sees the old file or the new."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def download(url, path, sha256="", check=None):
    """Fetch url to path unless it is there, with a progress bar, atomically.

    sha256: (a prefix of) the digest it must have; check: called with the temporary file's path, raises if it is broken.
    Raises RuntimeError that names the url and the cause.
    """
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        torch.hub.download_url_to_file(url, temporary, hash_prefix=sha256 or None)
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"could not fetch {url}: {error}. Without a network, put the file at {path} yourself.") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return path


def find_checkpoint(where):
    """The folder with config.json and model.safetensors that `where` means: itself, its tokenizer/ (a run), or a hub id's copy."""
    for folder in (where, os.path.join(where, "tokenizer")):
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    if os.path.isdir(where):
        raise FileNotFoundError(f"{where} holds no tokenizer: no config.json in it, nor in {where}/tokenizer (a finished run has that)")
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {where}, and it is no hub id of the form owner/name, such as MiniMaxAI/VTP-Large-f16d64")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = os.path.join(torch.hub.get_dir(), "checkpoints", where.replace("/", "--"))
    download(f"{endpoint}/{where}/resolve/main/model.safetensors", os.path.join(folder, "model.safetensors"), check=read_safetensors)
    download(f"{endpoint}/{where}/resolve/main/config.json", os.path.join(folder, "config.json"), check=_read_json)
    return folder


def read_config(folder):
    """VTPConfig of a checkpoint folder. ValueError names the file and the field at fault."""
    path = os.path.join(folder, "config.json")
    try:
        return VTPConfig.from_dict(_read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)
