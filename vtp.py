"""
VTP, the tokenizer of "Towards Scalable Pre-training of Visual Tokenizers for Generation" (arXiv 2512.13687).

    model = VTP.from_pretrained("MiniMaxAI/VTP-Large-f16d64")   # or a folder, such as a run's
    latents = model.encode(normalize(pixels))                   # (B, 64, H/16, W/16)
    pixels = denormalize(model.decode(latents))                 # (B, 3, H, W)

Three ViTs, and an SSLHead for training only. All names are the released checkpoint's: loading is strict.
"""
import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def constant(values, device):
    """Numbers as an fp32 tensor, copied to the device once: a copy in each step would make the host wait."""
    with torch.inference_mode(False):  # or training could not use it later
        return torch.tensor(values, dtype=torch.float32, device=device)


def _per_channel(values, images):
    return constant(values, images.device).to(images.dtype).view(3, 1, 1)


def normalize(pixels):
    """Pixels (B, 3, H, W) in [0, 1] -> the normalised images that models read and write."""
    return (pixels - _per_channel(IMAGENET_MEAN, pixels)) / _per_channel(IMAGENET_STD, pixels)


def denormalize(images):
    """The inverse. Reconstructions may leave [0, 1]: clamp before you show or measure them."""
    return images * _per_channel(IMAGENET_STD, images) + _per_channel(IMAGENET_MEAN, images)


class UserError(RuntimeError):
    """What whoever runs a script can mend: it ends with this message alone."""


# ----- Configuration --------------------------------------------------------------------------------------

MAX_FIELD = 2 ** 18  # above any number in use; three such sizes are multiplied, and must fit in 63 bits


def _is_of(value, kind):
    """Whether a field's value is of a type, or is a Literal's value. Strictly, as 0 == False."""
    if isinstance(kind, type):
        return type(value) is kind or (type(value), kind) == (int, float)
    return type(value) is type(kind) and value == kind


@dataclass
class VTPConfig:
    """The released config.json, as of the base model. ValueError names a field at fault. The annotations are
    what is checked: an int is a size, a float a ratio, and both are positive; float | None may be any."""
    image_size: int = 256
    train_clip: bool = True
    train_reconstruction: bool = True
    vision_patch_size: int = 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: Literal["swiglu", "mlp"] = "swiglu"
    vision_norm_layer: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    vision_init_values: float | None = None  # LayerScale's first value; None: no LayerScale
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int = 64  # d, the latent's channels
    vision_bottleneck_ae_only: bool = True  # False: CLIP and SSL read the d channels too
    vision_clip_feat: Literal["cls", "pooled"] = "cls"  # pooled: the mean of the patches
    text_context_length: int = 77
    text_vocab_size: int = 49408  # CLIP's BPE; 8192: words
    text_embed_dim: int = 768
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: Literal[None] = None
    text_embed_cls: Literal[False] = False
    text_pad_id: Literal[0] = 0
    text_no_causal_mask: Literal[False] = False
    text_pool_type: Literal["argmax"] = "argmax"
    text_proj_type: Literal["linear"] = "linear"
    text_proj_bias: Literal[False] = False
    text_output_tokens: Literal[False] = False
    text_quick_gelu: Literal[False] = False
    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: Literal["swiglu", "mlp"] = "swiglu"
    decoder_norm_layer: Literal["layernorm", "rmsnorm"] = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False
    init_logit_scale: float | None = None  # None: ln(1 / 0.07)
    init_logit_bias: Literal[None] = None
    nonscalar_logit_scale: Literal[False] = False

    def __post_init__(self):
        for f in fields(self):
            value, kinds = getattr(self, f.name), get_args(f.type) or (f.type,)
            if not any(_is_of(value, kind) for kind in kinds):
                names = (kind.__name__ if isinstance(kind, type) else repr(kind) for kind in kinds)
                raise ValueError(f"config field {f.name} = {value!r:.80}: expected {' or '.join(names)}")
            low = 0 if f.type in (int, float) else -MAX_FIELD
            if type(value) in (int, float) and not low < value <= MAX_FIELD:
                raise ValueError(f"config field {f.name} = {value!r:.80}: expected more than {low}, "
                                 f"and at most {MAX_FIELD}")
        for tower, used in dict(vision=True, decoder=self.train_reconstruction, text=self.train_clip).items():
            dim, heads = getattr(self, f"{tower}_embed_dim"), getattr(self, f"{tower}_num_heads")
            if used and (dim % heads or (tower != "text" and dim // heads % 4)):
                raise ValueError(f"{tower}_embed_dim = {dim} by {tower}_num_heads = {heads}: a head's "
                                 "width must be whole and, for RoPE (not text), a multiple of 4")
        if self.image_size % self.vision_patch_size:
            raise ValueError(f"vision_patch_size = {self.vision_patch_size} must divide image_size = "
                             f"{self.image_size}")

    @property
    def semantic_dim(self):
        """Width of what CLIP and SSL read."""
        return self.vision_embed_dim if self.vision_bottleneck_ae_only else self.vision_feature_bottleneck

    @classmethod
    def from_dict(cls, values):
        """From a parsed config.json, less HUB_FIELDS. ValueError names unknown fields."""
        values = {k: v for k, v in values.items() if k not in HUB_FIELDS and not k.startswith("_")}
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown config fields: {', '.join(map(repr, unknown))}")
        return cls(**values)


# The hub library's own fields of config.json: those that the authors' loader reads, and all, to be ignored.
HUB_FIELDS_WRITTEN = dict(architectures=["VTPModel"], dtype="float32", model_type="vtp",
                          transformers_version="5.23.0")
HUB_FIELDS = {*HUB_FIELDS_WRITTEN, "torch_dtype", "auto_map", "id2label", "label2id", "output_attentions",
              "output_hidden_states", "return_dict", "problem_type", "chunk_size_feed_forward",
              "is_encoder_decoder", "use_cache", "tie_word_embeddings"}

# not the paper's, for a CPU: as many channels for a pixel as matter, d = 64 for patches of 8 x 8
_TINY = dict(image_size=32, vision_patch_size=8, vision_clip_feat="pooled", vision_bottleneck_ae_only=False,
             text_context_length=20, text_vocab_size=8192)
VTP_SIZES = {  # width, depth and heads of encoder, pixel decoder and text tower; other fields
    "tiny": ((256, 3, 4), (256, 2, 4), (128, 2, 2), _TINY),
    "tiny-192": ((192, 3, 3), (256, 2, 4), (128, 2, 2), _TINY),  # smaller encoders, to compare
    "tiny-128": ((128, 3, 2), (256, 2, 4), (128, 2, 2), _TINY),
    "small": ((384, 12, 6), (384, 12, 6), (768, 12, 12), {}),
    "base": ((768, 12, 12), (768, 12, 12), (768, 12, 12), {}),
    "large": ((1024, 24, 16), (1024, 24, 16), (768, 12, 12), {}),
    "large-light": ((1024, 24, 16), (1024, 4, 16), (768, 12, 12), {}),  # the paper's scaling studies
}


def vtp_config(name, **changes):
    """The VTPConfig of a size in VTP_SIZES, or ValueError; changes: fields by keyword."""
    if name not in VTP_SIZES:
        raise ValueError(f"no model size {name!r}; there are {', '.join(VTP_SIZES)}")
    *towers, other = VTP_SIZES[name]
    values = dict(vision_use_qk_norm=True, decoder_use_qk_norm=True, **other)  # for stability (paper)
    for tower, (dim, depth, heads) in zip(("vision", "decoder", "text"), towers):
        values |= {f"{tower}_embed_dim": dim, f"{tower}_depth": depth, f"{tower}_num_heads": heads}
    return VTPConfig(**values | changes)


# ----- Blocks ---------------------------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight; statistics in fp32, cast back before the weight (DINOv3)."""
    def __init__(self, dim, eps=1e-5):
        super().__init__(dim, eps)

    def forward(self, x):
        if x.dtype == torch.float32:  # one kernel, as nothing is cast
            return super().forward(x)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


def make_norm(kind, dim):
    """RMSNorm for "rmsnorm", else LayerNorm, over the last axis, of size dim."""
    return RMSNorm(dim) if kind == "rmsnorm" else nn.LayerNorm(dim, eps=1e-6)


class RopeEmbedding(nn.Module):
    """Axial RoPE of DINOv3. Each operation rounds to bfloat16, as in the released training."""
    def __init__(self, head_dim, base=100.0):
        super().__init__()
        exponents = 2 * torch.arange(head_dim // 4, dtype=torch.bfloat16) / (head_dim // 2)
        self.register_buffer("periods", base ** exponents)
        self.tables = {}  # (H, W, n_prefix, device) -> (sin, cos): they never change

    def forward(self, H, W, n_prefix):
        """-> sin and cos for H x W patches; the prefix (CLS) before them is not rotated."""
        device = self.periods.device
        key = (H, W, n_prefix, device)
        if key not in self.tables:
            centres = (torch.arange(0.5, n, dtype=torch.bfloat16, device=device) / n for n in (H, W))
            coords = 2 * torch.cartesian_prod(*centres) - 1  # (H*W, 2), in (-1, 1)
            angles = 2 * math.pi * coords[:, :, None] / self.periods  # (H*W, 2, head_dim/4)
            angles = F.pad(angles.flatten(1).tile(2), (0, 0, n_prefix, 0))  # (n_prefix + H*W, head_dim)
            self.tables[key] = (angles.sin(), angles.cos())
        return self.tables[key]


def apply_rope(x, sin, cos):
    """Rotate x (..., N, head_dim) in the tables' bfloat16 and cast back."""
    rounded = x.to(sin.dtype)
    first, second = rounded.chunk(2, dim=-1)
    return (rounded * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attention(q, k, v, causal=False):
    """softmax(q k' / sqrt(d)) v for q, k, v (B, heads, N, d) -> (B, heads, N, d)."""
    if q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # On a CPU the fused kernel's backward is 2 to 7 times slower than these lines at 5 to 257 tokens.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu(1)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Self-attention, (B, N, dim) -> (B, N, dim), with optional QK-norm; rotate(q, sin, cos) is RoPE."""
    def __init__(self, dim, n_heads, use_qk_norm, rotate=apply_rope):
        super().__init__()
        self.n_heads, self.rotate = n_heads, rotate
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        norm = RMSNorm if use_qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(dim // n_heads), norm(dim // n_heads)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        q, k = self.rotate(self.q_norm(q), *rope), self.rotate(self.k_norm(k), *rope)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, dim)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x); inner width 2/3 ratio * dim, rounded up to a multiple of 8 (DINOv3)."""
    def __init__(self, dim, ratio):
        super().__init__()
        inner = 8 * math.ceil(int(int(dim * ratio) * 2 / 3) / 8)
        self.w1, self.w2, self.w3 = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def make_mlp(dim, ratio, first, second):
    """Two linears of these names with GELU (by erf) between them, ratio * dim wide."""
    inner = int(dim * ratio)
    layers = {first: nn.Linear(dim, inner), "gelu": nn.GELU(), second: nn.Linear(inner, dim)}
    return nn.Sequential(OrderedDict(layers))


class LayerScale(nn.Module):
    """A learned gain for each channel."""
    def __init__(self, dim, init_value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm ViT block, (B, N, dim) -> (B, N, dim), with optional LayerScale."""
    def __init__(self, dim, n_heads, ffn_ratio, ffn_layer, norm_layer, init_values, use_qk_norm):
        super().__init__()
        self.norm1, self.norm2 = make_norm(norm_layer, dim), make_norm(norm_layer, dim)
        self.attn = Attention(dim, n_heads, use_qk_norm)
        self.mlp = SwiGLU(dim, ffn_ratio) if ffn_layer == "swiglu" else make_mlp(dim, ffn_ratio, "fc1", "fc2")
        scale = nn.Identity if init_values is None else LayerScale
        self.ls1, self.ls2 = scale(dim, init_values), scale(dim, init_values)

    def attn_branch(self, x, rope):
        return self.ls1(self.attn(self.norm1(x), rope))

    def ffn_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, rope, keep=None):
        """keep (2, kept): samples that pass attention and ffn, scaled by B / kept (stochastic depth)."""
        if keep is None:
            x = x + self.attn_branch(x, rope)
            return x + self.ffn_branch(x)
        scale = len(x) / keep.shape[1]
        x = x.index_add(0, keep[0], self.attn_branch(x[keep[0]], rope).to(x.dtype), alpha=scale)
        return x.index_add(0, keep[1], self.ffn_branch(x[keep[1]]).to(x.dtype), alpha=scale)


def run_block(block, is_recomputed, *inputs):
    """block(*inputs), computed again in the backward if is_recomputed: more time, far less memory."""
    if is_recomputed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def samples_kept(batch_size, drop_path):
    """How many samples pass a branch at stochastic depth: a fixed number, for static shapes (DINOv2)."""
    return max(int(batch_size * (1 - drop_path)), 1)


def _init_linears(module):
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ----- The towers -----------------------------------------------------------------------------------------

class PatchEmbed(nn.Sequential):
    """Linear map of patches: (B, in_channels, H, W) -> (B, dim, H/p, W/p)."""
    def __init__(self, patch_size, in_channels, dim):
        super().__init__(OrderedDict(proj=nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)))


class Encoder(nn.Module):
    """DINOv3's vision transformer, and the linear bottleneck from its width to d channels."""
    def __init__(self, config):
        super().__init__()
        dim, d = config.vision_embed_dim, config.vision_feature_bottleneck
        self.patch_size = config.vision_patch_size
        self.patch_embed = PatchEmbed(self.patch_size, 3, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.rope_embed = RopeEmbedding(dim // config.vision_num_heads)
        options = (config.vision_num_heads, config.vision_mlp_ratio, config.vision_ffn_layer,
                   config.vision_norm_layer, config.vision_init_values, config.vision_use_qk_norm)
        self.blocks = nn.ModuleList(Block(dim, *options) for _ in range(config.vision_depth))
        self.norm = make_norm(config.vision_norm_layer, dim)
        self.feature_bottleneck = nn.Linear(dim, d, bias=False) if d != dim else nn.Identity()
        self.checkpoint_blocks = False
        _init_linears(self.blocks)
        _init_linears(self.feature_bottleneck)
        nn.init.normal_(self.cls_token, std=0.02)
        bound = (3 * self.patch_size ** 2) ** -0.5
        for p in self.patch_embed.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(self, images, masks=None, keep=None, n_last=1):
        """-> list of (cls (B, dim), patches (B, N, dim)) of the last n_last blocks, normed."""
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"images of {H} x {W}: not multiples of the patch size {self.patch_size}")
        if not 1 <= n_last <= len(self.blocks):
            raise ValueError(f"asked for the last {n_last} layers of {len(self.blocks)}")
        x = self.patch_embed(images)  # (B, dim, H/p, W/p)
        rope = self.rope_embed(*x.shape[-2:], n_prefix=1)
        x = x.flatten(2).transpose(1, 2)  # (B, N, dim)
        if masks is not None:  # (B, N) bool, True where a patch is masked
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  # (B, 1 + N, dim)
        outputs = []
        for i, block in enumerate(self.blocks):
            of_block = None if keep is None else keep[i]  # of keep (depth, 2, kept)
            x = run_block(block, self.checkpoint_blocks, x, rope, of_block)
            if i >= len(self.blocks) - n_last:
                outputs.append(self.norm(x))
        return [(x[:, 0], x[:, 1:]) for x in outputs]

    def bottleneck(self, features):
        return self.feature_bottleneck(features)  # (..., d)


class PixelDecoder(nn.Module):
    """Latents (B, d, h, w) -> images (B, 3, p h, p w). Blocks with RoPE, without CLS. p is the encoder's
    patch size: 16 in every released model (the authors' decoder knows no other)."""
    def __init__(self, config):
        super().__init__()
        dim, self.patch_size = config.decoder_embed_dim, config.vision_patch_size
        self.proj_in = nn.Conv2d(config.vision_feature_bottleneck, dim, 1)
        self.rope_embed = RopeEmbedding(dim // config.decoder_num_heads)
        options = (config.decoder_num_heads, 4.0, config.decoder_ffn_layer,
                   config.decoder_norm_layer, config.decoder_init_values, config.decoder_use_qk_norm)
        self.blocks = nn.ModuleList(Block(dim, *options) for _ in range(config.decoder_depth))
        self.norm = make_norm(config.decoder_norm_layer, dim)
        self.proj_out = nn.Conv2d(dim, 3 * self.patch_size ** 2, 1)
        self.checkpoint_blocks = False
        _init_linears(self)

    def forward(self, latents):
        # The 1x1 convolutions run as linears: on these layouts their weights' gradients would not have the
        # weights' strides, and DDP would copy them.
        linear = lambda conv, x: F.linear(x, conv.weight.flatten(1), conv.bias)
        x = linear(self.proj_in, latents.flatten(2).transpose(1, 2))  # (B, h*w, dim)
        rope = self.rope_embed(*latents.shape[-2:], n_prefix=0)
        for block in self.blocks:
            x = run_block(block, self.checkpoint_blocks, x, rope)
        x = linear(self.proj_out, self.norm(x))  # (B, h*w, 3 p^2)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, latents.shape[-2:]), self.patch_size)


class TextAttention(nn.Module):
    """Causal self-attention under the names of nn.MultiheadAttention, as in CLIP."""
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        return self.out_proj(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """CLIP's residual block: (B, L, dim) -> (B, L, dim)."""
    def __init__(self, dim, n_heads, mlp_ratio):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = TextAttention(dim, n_heads)
        self.mlp = make_mlp(dim, mlp_ratio, "c_fc", "c_proj")

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Sequential):
    """The blocks of CLIP's text tower. In the release its other parts lie on VTP."""
    def __init__(self, config):
        dim, depth = config.text_embed_dim, config.text_depth
        blocks = (TextBlock(dim, config.text_num_heads, config.text_mlp_ratio) for _ in range(depth))
        super().__init__(OrderedDict(resblocks=nn.Sequential(*blocks)))
        residual_std = dim ** -0.5 * (2 * depth) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=dim ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)


class SSLHead(nn.Module):
    """DINO's head, one for CLS and masked patches: (M, in_dim) -> logits (M, K); K = 65,536 in the paper."""
    def __init__(self, in_dim, n_prototypes, hidden_dim=2048, out_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim),
                                 nn.GELU(), nn.Linear(hidden_dim, out_dim))
        _init_linears(self.mlp)
        bound = out_dim ** -0.5
        self.prototypes = nn.Parameter(torch.empty(n_prototypes, out_dim).uniform_(-bound, bound))
        self.prototype_gain = nn.Parameter(torch.ones(n_prototypes, 1))  # trained, as in DINOv2

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, self.prototype_gain * F.normalize(self.prototypes, dim=-1))


# ----- The tokenizer --------------------------------------------------------------------------------------

class VTP(nn.Module):
    """The visual tokenizer. Images are normalised (B, 3, H, W), H and W multiples of the patch size p."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Encoder(config)
        if config.train_reconstruction:
            self.pixel_decoder = PixelDecoder(config)
        if config.train_clip:
            dim = config.text_embed_dim
            self.visual_proj = nn.Linear(config.semantic_dim, dim, bias=False)
            self.text_transformer = TextTransformer(config)
            self.token_embedding = nn.Embedding(config.text_vocab_size, dim)
            self.positional_embedding = nn.Parameter(torch.empty(config.text_context_length, dim))
            self.ln_final = nn.LayerNorm(dim)
            self.text_projection = nn.Parameter(torch.empty(dim, dim))
            init = config.init_logit_scale
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07) if init is None else float(init)))
            _init_linears(self.visual_proj)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.text_projection, std=dim ** -0.5)

    def semantic(self, features):
        """Encoder features (..., dim) -> what CLIP and SSL read: (..., semantic_dim)."""
        return features if self.config.vision_bottleneck_ae_only else self.trunk.bottleneck(features)

    def project_image(self, cls, patches):
        """Encoder features -> CLIP features (B, text_embed_dim), not normalised."""
        feature = cls if self.config.vision_clip_feat == "cls" else patches.mean(dim=1)
        return self.visual_proj(self.semantic(feature))

    def to_latents(self, patches, height, width):
        """Patches (B, h*w, dim) of images of height x width pixels -> latents (B, d, h, w)."""
        grid = (height // self.trunk.patch_size, width // self.trunk.patch_size)
        return self.trunk.bottleneck(patches).transpose(1, 2).unflatten(2, grid)

    def features(self, images, masks=None, keep=None):
        """-> cls (B, dim), patches (B, N, dim); masks and keep as in Encoder.forward."""
        return self.trunk(images, masks, keep)[-1]

    def intermediate_layers(self, images, n):
        """-> list of (patches (B, N, dim), cls (B, dim)) of the last n blocks."""
        return [(patches, cls) for cls, patches in self.trunk(images, n_last=n)]

    def encode(self, images):
        """-> latents (B, d, H/p, W/p)."""
        return self.to_latents(self.features(images)[1], *images.shape[-2:])

    def decode(self, latents):
        """-> images (B, 3, H, W). RuntimeError without train_reconstruction."""
        if not self.config.train_reconstruction:
            raise RuntimeError("no pixel decoder: train_reconstruction = False")
        return self.pixel_decoder(latents)

    def encode_image(self, images, normalize=True):
        """-> CLIP features (B, text_embed_dim), L2-normalised. RuntimeError without train_clip."""
        if not self.config.train_clip:
            raise RuntimeError("no CLIP projection: train_clip = False")
        features = self.project_image(*self.features(images))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens, normalize=True):
        """The same for tokens (B, L), padded with 0; L at most the context length."""
        if not self.config.train_clip:
            raise RuntimeError("no text tower: train_clip = False")
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        x = self.text_transformer(x)  # (B, L, dim)
        # Only the end token, which has the highest id, is read, so only it needs the norm.
        end = tokens.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])
        features = self.ln_final(x.gather(1, end).squeeze(1)) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    @classmethod
    def from_pretrained(cls, where):
        """From a folder or a hub id. FileNotFoundError; ValueError: broken; UserError: does not fit."""
        folder = find_checkpoint(where)
        config, path = read_config(folder), Path(folder, "model.safetensors")
        tensors = read_safetensors(path)
        n_blocks = (config.vision_depth + config.train_reconstruction * config.decoder_depth
                    + config.train_clip * config.text_depth)
        if n_blocks > len(tensors):  # to build too many would take hours, even on "meta"
            raise UserError(f"{path} has {len(tensors)} tensors, config.json asks for {n_blocks} blocks")
        with torch.device("meta"):  # no memory, whatever the config asks for, and no initial values
            model = cls(config)
        describe = lambda tensors: {name: f"{'' if t.is_floating_point() else t.dtype}{list(t.shape)}"
                                    for name, t in tensors.items()}
        ours, theirs = describe(model.state_dict()), describe(tensors)
        if wrong := sorted({name for name, _ in ours.items() ^ theirs.items()}):
            some = (f"{name!r} is {theirs.get(name, 'missing')}, not {ours.get(name, 'known')}"
                    for name in wrong[:3])
            raise UserError(f"{path} does not fit config.json in {len(wrong)} tensors: {'; '.join(some)}")
        model.to_empty(device=torch.get_default_device()).load_state_dict(tensors)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which the authors' code can load too."""
        os.makedirs(folder, exist_ok=True)
        text = json.dumps({**asdict(self.config), **HUB_FIELDS_WRITTEN}, indent=2, sort_keys=True) + "\n"
        write_atomically(Path(folder, "config.json"), lambda f: f.write(text.encode()))
        write_safetensors(Path(folder, "model.safetensors"), self.state_dict())


# ----- Files: released checkpoints, safetensors, downloads ------------------------------------------------

SAFETENSORS_DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
    I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def parse_json(text):
    """The JSON object in bytes, as a dict. ValueError: there is none, or a name stands in it twice."""
    def to_dict(pairs):
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} stands there twice")
            values[name] = value
        return values
    try:
        values = json.loads(text, object_pairs_hook=to_dict)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object but {type(values).__name__}")
    return values


def read_safetensors(path):
    """A safetensors file as {name: tensor}, memory-mapped copy-on-write.
    ValueError names a tensor at fault: its entry, its place, or NaN or infinity in it (as float32)."""
    try:
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8], "little")  # where the header ends
        if start > min(len(data), 10 ** 8):  # the format's own limit
            raise ValueError(f"{len(data)} bytes, of which a header of {start - 8}")
        header = parse_json(data[8:start].tobytes())
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file, or cut short: {error}") from None
    header.pop("__metadata__", None)
    is_sizes = lambda values: isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
    entries, tensors, end = [], {}, 0
    for name, info in header.items():
        info = info if isinstance(info, dict) else {}
        code, shape, place = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
        dtype = SAFETENSORS_DTYPES.get(str(code))
        if dtype is None:
            raise ValueError(f"{path}: {name!r} has dtype {code!r:.80}, which is not read here")
        # torch's strides must fit in 63 bits, even where a size of 0 makes the tensor empty
        if (not is_sizes(shape) or not is_sizes(place) or len(place) != 2
                or math.prod(shape) * dtype.itemsize != place[1] - place[0]
                or math.prod(n or 1 for n in shape) >= 2 ** 63):
            raise ValueError(f"{path}: {name!r} is broken: {code} of shape {shape!r:.80} at {place!r:.80}")
        entries.append((*place, name, dtype, shape))
    entries.sort()
    for first, last, name, *_ in entries:
        if first != end:
            raise ValueError(f"{path}: {name!r} begins at byte {first}, not {end}: a hole or an overlap")
        end = last
    if start + end != len(data):
        raise ValueError(f"{path} has {len(data)} bytes, not {start + end}: is it cut short?")
    for first, last, name, dtype, shape in entries:
        raw = torch.from_numpy(data[start + first:start + last])
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()  # the format does not promise alignment
        tensors[name] = t = raw.view(dtype).view(shape)
        # smallest and largest, as they are found without a copy of the weights
        if dtype.is_floating_point and len(raw) and not torch.stack(t.aminmax()).float().isfinite().all():
            raise ValueError(f"{path}: {name!r} holds NaN or infinity")
    return tensors


def write_safetensors(path, tensors):
    """The inverse of read_safetensors, atomically. Wider types first, so that all are aligned."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    tensors = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors:
        end += t.nbytes
        header[name] = dict(dtype=codes[t.dtype], shape=list(t.shape), data_offsets=[end - t.nbytes, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in tensors)
    write_atomically(path, lambda f: f.writelines((len(text).to_bytes(8, "little"), text, *data)))


def write_atomically(path, write, n_bytes=0):
    """Call write(file) on a temporary file and move it to path: a reader sees the old file or the new.
    n_bytes: how many it will write. OSError names path and n_bytes if the disk lacks room for them."""
    temporary, folder = f"{path}.{os.getpid()}.tmp", os.path.dirname(path) or "."
    try:
        if n_bytes > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except Exception as error:
        reason = error                      # torch.save hides a full disk behind an error of its own
        while reason is not None and getattr(reason, "errno", None) not in DISK_FULL:
            reason = reason.__cause__ or reason.__context__
        if reason is None:
            raise
        needed = f", {n_bytes:,} bytes needed" if n_bytes else ""
        raise OSError(reason.errno, f"{reason.strerror}{needed}", str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_claimed = {}                               # folder: its open lock, which the process holds until it ends


def is_leftover(name):
    """Is a file of this name a folder's lock, or what a killed write_atomically has left?"""
    return name == ".lock" or re.search(r"\.\d+\.tmp$", name) is not None


def claim_folder(folder):
    """Make a folder, keep other processes out of it, and sweep the temporary files of killed ones -> was it
    not claimed yet? ValueError: another process has it. Where a file system has no locks, there are none."""
    os.makedirs(folder, exist_ok=True)
    if os.path.realpath(folder) in _claimed:
        return False
    lock = open(os.path.join(folder, ".lock"), "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            raise ValueError(f"{folder} is in use by another process: wait, or choose another") from None
    _claimed[os.path.realpath(folder)] = lock
    for root, _, names in os.walk(folder):
        for name in filter(is_leftover, names):
            if name != ".lock":
                os.remove(os.path.join(root, name))
    return True


def release_folder(folder):
    """Let other processes claim it."""
    if lock := _claimed.pop(os.path.realpath(folder), None):
        lock.close()


def check_zip(path):
    """ValueError or zipfile's errors: not all of a zip file is as it was written. Neither torch.load nor
    NumPy looks at its checksums, and a flipped bit would be another weight."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
        # its flag of a folder makes torch leave a tensor's memory as it was
        broken = broken or next((x.filename for x in archive.infolist() if x.external_attr & 16), None)
        if broken:
            raise ValueError(f"{broken!r} in it is not as it was written")


def load_tensors(path, map_location="cpu"):
    """torch.load of tensors and plain values. ValueError names a file that is broken."""
    try:
        if zipfile.is_zipfile(path):        # else of torch before 1.6, or cut off, which torch.load finds
            check_zip(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:              # on broken bytes torch raises almost anything
        raise ValueError(f"{path} is no file of torch.save, or broken ({type(error).__name__})") from error


def download(url, path, sha256="", check=None):
    """Fetch url to path, atomically, unless it is there. UserError: that, sha256 or check(file) fails."""
    def fetch(file):
        torch.hub.download_url_to_file(url, file.name, hash_prefix=sha256 or None)
        if check is not None:
            check(file.name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            write_atomically(path, fetch)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"could not fetch {url}: {error}. If offline, put it at {path}.") from error
    return path


def find_checkpoint(where):
    """The folder `where`, its tokenizer/ (a run), or a hub id's copy, fetched once. Or FileNotFoundError."""
    for folder in (where, os.path.join(where, "tokenizer")):
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    if os.path.isdir(where) or where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no config.json in {where} or its tokenizer/, and it is not a hub id")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = os.path.join(torch.hub.get_dir(), "checkpoints", where.replace("/", "--"))
    read_json = lambda file: json.loads(Path(file).read_bytes())
    for name, check in (("model.safetensors", read_safetensors), ("config.json", read_json)):
        download(f"{endpoint}/{where}/resolve/main/{name}", os.path.join(folder, name), check=check)
    return folder


def read_config(folder):
    """VTPConfig of a checkpoint folder. ValueError names the file and the field at fault."""
    path = Path(folder, "config.json")
    try:
        return VTPConfig.from_dict(parse_json(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
