"""
The DiT that generates latents, flow matching, and the samplers.

    model = DiT.from_lightningdit("lightningdit-xl.pt")
    velocity = model(x, t, y)    # (B, d, h, w) at times t in [0, 1]: 0 is noise, 1 is data
    latents = sample(model, noise, labels, steps=250, shift=0.075)    # normalised: times std, plus mean

Architecture and names are LightningDiT's (arXiv 2501.01423), which the paper trains: checkpoints fit both.
In place of a class, y may be a text, by the feature that a tokenizer's text tower has of it.
"""
import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import step_generator
from vtp import Attention, PatchEmbed, RMSNorm, denormalize, load_tensors

# ----- The model ------------------------------------------------------------------------------------------
# Other than in vtp.py: modulation, RMSNorm eps 1e-6 (there 1e-5), fused w12 of another inner width, RoPE in
# fp32 on neighbouring pairs at grid positions (there in bf16 on halves at centred ones).

def rotate_pairs(x, sin, cos):
    """Rotate neighbouring pairs of x (B, heads, N, head_dim) by tables (N, head_dim / 2), in fp32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    # First members, then second ones: queries and keys are permuted alike, so attention stays.
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Rope(nn.Module):
    """Axial rotary tables of a grid of side n, each angle twice, for a pair, as in LightningDiT."""
    def __init__(self, head_dim, n, theta=10000.0):
        super().__init__()
        exponents = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)  # (head_dim / 4,)
        line = torch.arange(n).float()[:, None] * (1 / theta ** exponents)
        line = line.repeat_interleave(2, dim=1)  # (n, head_dim / 2)
        rows, columns = line[:, None].expand(n, n, -1), line[None].expand(n, n, -1)
        angles = torch.cat((rows, columns), dim=-1).flatten(0, 1)  # (n*n, head_dim)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())


class FusedSwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12 x; inner width 2/3 of 4 dim."""
    def __init__(self, dim):
        super().__init__()
        inner = int(2 / 3 * 4 * dim)
        self.w12, self.w3 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Modulation(nn.Sequential):
    """adaLN: conditions (C, dim) -> n vectors (B, 1, dim); rows as in DiT.velocity."""
    def __init__(self, dim, n):
        super().__init__(nn.SiLU(), nn.Linear(dim, n * dim))
        self.n = n

    def forward(self, conditions, rows):
        vectors = super().forward(conditions)  # (C, n dim)
        return (vectors if rows is None else vectors.index_select(0, rows)).unsqueeze(1).chunk(self.n, dim=-1)


class DiTBlock(nn.Module):
    """Pre-norm block (B, N, dim); conditions modulate its norms and gate its branches (adaLN-zero)."""
    def __init__(self, dim, n_heads, use_qk_norm=False):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, n_heads, use_qk_norm=False, rotate=rotate_pairs)
        if use_qk_norm:  # Attention's own would have eps 1e-5
            self.attn.q_norm, self.attn.k_norm = (RMSNorm(dim // n_heads, eps=1e-6) for _ in range(2))
        self.mlp = FusedSwiGLU(dim)
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, x, conditions, rope, rows=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(conditions, rows)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Modulated norm and linear: (B, N, dim) -> (B, N, n_out)."""
    def __init__(self, dim, n_out):
        super().__init__()
        self.norm_final = RMSNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, n_out)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x, conditions, rows=None):
        shift, scale = self.adaLN_modulation(conditions, rows)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    """t (n,) in [0, 1], unscaled -> 128 cosines, 128 sines -> MLP -> (n, dim)."""
    def __init__(self, dim, n_sinusoids=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(n_sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))
        half = n_sinusoids // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half).float() / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class TextEmbedder(nn.Module):
    """Features of texts (B, text_dim), with a mean square of 1 -> MLP -> (B, dim); zeros are no text."""
    def __init__(self, text_dim, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(text_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.null = nn.Parameter(torch.zeros(dim))

    def forward(self, features):
        embedded, is_null = self.mlp(features), (features == 0).all(dim=-1, keepdim=True)
        return torch.where(is_null, self.null.to(embedded.dtype), embedded)


def sincos_positions(dim, n):
    """Positions (n*n, dim) of a grid of side n: columns, then rows; of each sines, then cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    angles = np.arange(n)[:, None] * frequencies  # (n, dim / 4)
    line = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)  # (n, dim / 2)
    columns, rows = (np.broadcast_to(x, (n, n, dim // 2)) for x in (line[None], line[:, None]))
    return torch.from_numpy(np.concatenate((columns, rows), axis=2).reshape(n * n, dim)).float()


class DiT(nn.Module):
    """Diffusion transformer on normalised latents, conditional on one of num_classes classes, less the null
    class, or, with text_dim in place of num_classes, on a text's feature.
    use_qk_norm: RMSNorm of each head's queries and keys, LightningDiT's remedy for NaNs; off in the paper."""
    def __init__(self, dim, depth, n_heads, patch_size, input_size, in_channels, num_classes=None,
                 use_qk_norm=False, text_dim=None):
        super().__init__()
        if input_size % patch_size or dim % n_heads or dim // n_heads % 4:
            raise ValueError(f"patches of {patch_size} must divide the latents' side, {input_size}, and "
                             f"{dim} channels give each of {n_heads} heads a multiple of 4")
        self.patch_size, self.input_size = patch_size, input_size
        self.in_channels, self.num_classes, self.text_dim = in_channels, num_classes, text_dim
        n = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        if text_dim is None:
            table = nn.Embedding(num_classes + 1, dim)  # the last row is the null class's
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=table))
        else:
            self.y_embedder = TextEmbedder(text_dim, dim)
        self.pos_embed = nn.Parameter(sincos_positions(dim, n)[None], requires_grad=False)
        self.feat_rope = Rope(dim // n_heads, n)
        self.blocks = nn.ModuleList(DiTBlock(dim, n_heads, use_qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        y_layers = self.y_embedder.mlp[::2] if text_dim else (self.y_embedder.embedding_table,)
        for embedding in (*y_layers, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        for modulated in (*self.blocks, self.final_layer):
            nn.init.zeros_(modulated.adaLN_modulation[1].weight)  # every block starts as the identity
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def latent_shape(self):
        return self.in_channels, self.input_size, self.input_size

    @property
    def null(self):
        """The number of which y is without a condition: the null class, or 0 of a text."""
        return self.num_classes if self.text_dim is None else 0.0

    def forward(self, x, t, y):
        """x (B, d, h, w), t (B,) in [0, 1], y labels (B,) or texts' features (B, text_dim) -> velocity
        (B, d, h, w)."""
        return self.velocity(x, self.t_embedder(t) + self.y_embedder(y))

    def velocity(self, x, conditions, rows=None):
        """The same from conditions (C, dim), the sums of the embeddings of time and of class or text.
        rows (B,): which of them each sample has; None: C = B, in order."""
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, dim)
        rope = (self.feat_rope.freqs_sin[:, ::2], self.feat_rope.freqs_cos[:, ::2])  # (N, head_dim / 2)
        for block in self.blocks:
            x = block(x, conditions, rope, rows)
        x = self.final_layer(x, conditions, rows)  # (B, N, p*p*d)
        n, p = self.input_size // self.patch_size, self.patch_size
        x = x.view(-1, n, n, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)  # (B, d, n, p, n, p)
        return x.reshape(-1, *self.latent_shape)

    @classmethod
    def from_lightningdit(cls, where):
        """From the path of LightningDiT's or train_dit.py's checkpoint (EMA), or a state dict, strictly."""
        state, sizes = read_lightningdit(where)
        model, name = cls(**sizes), "the state dict" if isinstance(where, dict) else where
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{name} is not the paper's variant of LightningDiT (RoPE, RMSNorm, SwiGLU, "
                             f"shifted adaLN, with QK-norm or without): {error}") from None
        if broken := [k for k, x in model.state_dict().items() if not x.isfinite().all()]:
            raise ValueError(f"{name}: {broken[0]} holds NaN or infinity")
        return model


def read_lightningdit(where):
    """What DiT.from_lightningdit takes -> the state dict and, from its names and shapes, DiT's arguments.
    A file is mapped, so that of a large one only what is used is read."""
    is_file = not isinstance(where, dict)
    state = load_tensors(where) if is_file else where
    state = state.get("ema", state.get("model", state)) if isinstance(state, dict) else {}
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if not {"x_embedder.proj.weight", "feat_rope.freqs_cos"} <= state.keys():
        raise ValueError(f"{where if is_file else 'the state dict'} is of no LightningDiT with RoPE")
    dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    n_positions, head_dim = state["feat_rope.freqs_cos"].shape
    if "y_embedder.mlp.0.weight" in state:
        condition = dict(text_dim=state["y_embedder.mlp.0.weight"].shape[1])
    else:
        condition = dict(num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
    return state, dict(
        dim=dim, depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        n_heads=dim // head_dim, patch_size=patch_size, input_size=math.isqrt(n_positions) * patch_size,
        in_channels=in_channels, use_qk_norm="blocks.0.attn.q_norm.weight" in state, **condition)


DIT_SIZES = {  # LightningDiT; 1.0B: VA-VAE's appendix; tiny: for a CPU
    "tiny": dict(dim=256, depth=4, n_heads=4, patch_size=1),
    "B/1": dict(dim=768, depth=12, n_heads=12, patch_size=1),
    "B/2": dict(dim=768, depth=12, n_heads=12, patch_size=2),
    "XL/1": dict(dim=1152, depth=28, n_heads=16, patch_size=1),
    "XL/2": dict(dim=1152, depth=28, n_heads=16, patch_size=2),
    "1.0B/1": dict(dim=1536, depth=24, n_heads=24, patch_size=1),
    "1.0B/2": dict(dim=1536, depth=24, n_heads=24, patch_size=2),
}


# ----- Flow matching: x_t = (1 - t) noise + t data, and the model learns d x_t / dt -----------------------

def draw_timesteps(normals, mu, sigma):
    """Standard normal numbers -> logit-normal t in (0, 1): where training looks."""
    return torch.sigmoid(mu + sigma * normals)


def flow_path(latents, noise, t):
    """latents, noise (B, d, h, w), t (B,) -> x_t and the velocity there."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * noise + t * latents, latents - noise


def flow_loss(velocity, target):
    """Mean squared error plus the mean of 1 - cosine similarity over channels (LightningDiT)."""
    velocity, target = velocity.float(), target.float()
    # eps: a cosine has hardly a gradient at the velocity 0 of the start, and one without bound beside it,
    # which Adam long remembers
    return F.mse_loss(velocity, target) + (1 - F.cosine_similarity(velocity, target, dim=1, eps=0.1)).mean()


# ----- Sampling -------------------------------------------------------------------------------------------

METHODS = ("euler", "heun", "adams")
SAMPLING = ("steps", "method", "shift", "guidance", "interval", "channels")  # options of sample


def time_grid(points, shift=1.0):
    """linspace(0, 1, points) under t -> s t / (1 + (s - 1) t). s < 1: small steps near the noise."""
    t = np.linspace(0.0, 1.0, points)
    return shift * t / ((1 - t) + shift * t)  # so written, 1 stays 1 exactly


def integrate(velocity, x, times, method="euler", jumps=()):
    """Solve dx/dt = velocity(x, k) at times[k] from times[0] to times[-1], in fp32.
    method: "euler", "heun" (2 evaluations a step) or, for few steps, "adams" (Adams-Bashforth of order 3 on
    uneven steps, 1 evaluation). jumps: the k from which on velocity is another function (guidance on or off):
    adams, which looks back, starts anew there, by a step of Heun's."""
    past = []  # last times and velocities
    for k in range(len(times) - 1):
        h = times[k + 1] - times[k]
        v = velocity(x, k).float()
        past = [(times[k], v), *([] if k in jumps else past[:2])]
        if method == "euler":
            x = x + h * v
        elif method == "heun" or len(past) == 1:
            x = x + h / 2 * (v + velocity(x + h * v, k + 1).float())
        else:
            # weights that integrate every polynomial through these points exactly; times in units of h
            nodes, powers = np.array([(t - times[k]) / h for t, _ in past]), np.arange(len(past))
            weights = np.linalg.solve(nodes[None] ** powers[:, None], 1 / (powers + 1))
            x = x + h * sum(w * v for w, (_, v) in zip(weights.tolist(), past))
    return x


def guide(conditional, unconditional, guidance, channels=None):
    """Classifier-free guidance of the first `channels` channels (authors' code: 3) or all (paper)."""
    guided = unconditional + guidance * (conditional - unconditional)
    return guided if channels is None else torch.cat((guided[:, :channels], conditional[:, channels:]), dim=1)


@torch.no_grad()
def sample(model, noise, y, steps=250, method="euler", shift=1.0, guidance=1.0, interval=(0.0, 1.0),
           channels=None):
    """Normalised latents (B, d, h, w) from noise of that shape and y, labels (B,) or texts' features.
    steps: points of the time grid, one more than integration steps (the authors' count). guidance > 1 acts at
    times interval[0] <= t <= interval[1]; elsewhere the null branch is not computed. Embeddings are computed
    once, and modulations once for each step and class, or for each sample of texts or of more classes."""
    if method not in METHODS or steps < 2:
        raise ValueError(f"method {method!r}, steps {steps}: not of {', '.join(METHODS)}, or under 2 points")
    times = time_grid(steps, shift)
    is_guided = [guidance > 1 and interval[0] <= t <= interval[1] for t in times]
    # as many conditions in each batch of a size: their number is a shape that compiled blocks are made for
    known, rows = y, torch.arange(len(y), device=y.device)
    if y.ndim == 1 and model.num_classes < len(y):
        known, rows = torch.arange(model.num_classes, device=y.device), y
    y_embedding = model.y_embedder(torch.cat((known, torch.full_like(known[:1], model.null))))
    time_embedding = model.t_embedder(torch.tensor(times, device=y.device))  # (steps, dim)
    both_rows = torch.cat((rows, torch.full_like(rows, len(known))))  # then all the null

    def velocity(x, k):
        conditions = time_embedding[k] + y_embedding
        if not is_guided[k]:
            return model.velocity(x, conditions, rows)
        return guide(*model.velocity(torch.cat((x, x)), conditions, both_rows).chunk(2), guidance, channels)
    jumps = {k for k in range(1, steps) if is_guided[k] != is_guided[k - 1]}
    return integrate(velocity, noise.float(), times, method, jumps)


def noise_and_labels(indices, seed, shape, num_classes=1):
    """Noise (n, *shape) and random labels (n,) of images `indices`: the same alone, and on any rank."""
    noise, labels = [], []
    for i in indices:
        generator = step_generator(seed, int(i), "cpu")
        labels.append(torch.randint(num_classes, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(labels)


@torch.no_grad()
def generate(model, tokenizer, stats, noise, y, bf16=True, **sampling):
    """Pixels in [0, 1] (b, 3, H, W) from noise (b, d, h, w) and y, as of sample; decoded in fp32.
    stats: (mean, std) of the latents; sampling: see SAMPLING."""
    device, (mean, std) = model.pos_embed.device, stats
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        latents = sample(model, noise.to(device), y.to(device), **sampling)
    return denormalize(tokenizer.decode(latents * std + mean)).clamp(0, 1)
