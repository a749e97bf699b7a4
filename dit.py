"""
The DiT that generates latents, flow matching, and the samplers.

    model = DiT.from_lightningdit("lightningdit-xl.pt")                     # or DiT(**preset("XL/1"), input_size=16, in_channels=64, num_classes=1000)
    velocity = model(x, t, y)                                               # (B, d, h, w) at times t in [0, 1]: 0 is noise, 1 is data
    latents = sample(model, noise, labels, steps=250, shift=0.075)          # normalised latents: times std plus mean, then VTP.decode

Architecture and parameter names are those of LightningDiT (arXiv 2501.01423), which the paper trains on its latents, so a
checkpoint of either loads in the other.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from vtp import Attention, RMSNorm

# ----------------------------------------------------------------------------------------------------------------------
# The model. Where it differs from vtp.py's blocks: RMSNorm eps 1e-6 (there 1e-5), fused w12 with another inner width,
# RoPE in fp32 on interleaved pairs at grid positions (there in bf16 on halves at centred ones), and modulation.
# ----------------------------------------------------------------------------------------------------------------------

def rotate_pairs(x, sin, cos):
    """Rotate the neighbouring pairs of x (B, heads, N, head_dim) by tables (N, head_dim / 2), in fp32.

    All first members come out before all second ones: queries and keys are permuted alike, so attention does not change.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Rope(nn.Module):
    """Axial rotary tables of a grid of side n, (n*n, head_dim): each angle twice, for a pair; rows in the first half, columns in the second."""

    def __init__(self, head_dim, n, theta=10000.0):
        super().__init__()
        frequencies = 1 / theta ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))     # (head_dim / 4,)
        angles = (torch.arange(n).float()[:, None] * frequencies).repeat_interleave(2, dim=1)        # (n, head_dim / 2)
        angles = torch.cat((angles[:, None].expand(n, n, -1), angles[None].expand(n, n, -1)), dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def tables(self):
        return self.freqs_sin[:, ::2], self.freqs_cos[:, ::2]


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12 x; inner width 2/3 of 4 dim."""

    def __init__(self, dim):
        super().__init__()
        inner = int(2 / 3 * 4 * dim)
        self.w12, self.w3 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def modulate(x, shift, scale):
    """Normed x (B, N, dim) under the condition's shift and scale (B, 1, dim)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Pre-norm block whose norms are modulated and whose branches are gated by the condition (adaLN-zero, DiT)."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, n_heads, use_qk_norm=False, rotate=rotate_pairs)
        self.mlp = SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, conditions, rope, rows=None):
        """x (B, N, dim), conditions (C, dim); rows (B,) says which of them each sample has, None that C = B, in order."""
        modulation = self.adaLN_modulation(conditions)                              # (C, 6 dim)
        modulation = (modulation if rows is None else modulation[rows]).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, 1, dim) each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and linear: (B, N, dim) -> (B, N, n_out)."""

    def __init__(self, dim, n_out):
        super().__init__()
        self.norm_final = RMSNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, conditions, rows=None):
        modulation = self.adaLN_modulation(conditions)
        shift, scale = (modulation if rows is None else modulation[rows]).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    """(B, d, h, w) -> (B, N, dim)."""

    def __init__(self, in_channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t in [0, 1], (n,), unscaled -> 128 cosines and 128 sines -> MLP -> (n, dim)."""

    def __init__(self, dim, n_sinusoids=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(n_sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))
        half = n_sinusoids // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(half).float() / half), persistent=False)

    def forward(self, t):
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class LabelEmbedder(nn.Module):
    """Labels (B,) in 0..num_classes -> (B, dim); num_classes is the null class, for guidance."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels):
        return self.embedding_table(labels)


def sincos_positions(dim, n):
    """Fixed 2-d sin-cos positions of a grid of side n, (n*n, dim): columns in the first half, rows in the second, sines before cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    angles = np.arange(n)[:, None] * frequencies                                    # (n, dim / 4)
    line = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)                 # (n, dim / 2)
    columns, rows = np.broadcast_to(line[None], (n, n, dim // 2)), np.broadcast_to(line[:, None], (n, n, dim // 2))
    return torch.from_numpy(np.concatenate((columns, rows), axis=2).reshape(n * n, dim)).float()


class DiT(nn.Module):
    """Class-conditional diffusion transformer on normalised latents (B, in_channels, input_size, input_size).

    num_classes does not count the null class, whose label is num_classes. Sizes: PRESETS.
    """

    def __init__(self, dim, depth, n_heads, patch_size, input_size, in_channels, num_classes):
        super().__init__()
        if input_size % patch_size or dim % n_heads or dim // n_heads % 4:
            raise ValueError(f"a DiT of {dim} channels in {n_heads} heads with patches of {patch_size} on {input_size} x {input_size} latents: the "
                             "patch size must divide the side, and the head width be a whole multiple of 4")
        self.patch_size, self.input_size, self.in_channels, self.num_classes = patch_size, input_size, in_channels, num_classes
        self.dim, self.n_heads = dim, n_heads
        self.x_embedder = PatchEmbed(in_channels, dim, patch_size)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_positions(dim, input_size // patch_size)[None], requires_grad=False)
        self.feat_rope = Rope(dim // n_heads, input_size // patch_size)
        self.blocks = nn.ModuleList(DiTBlock(dim, n_heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)

        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for zero in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(zero.weight)         # every block starts as the identity

    def forward(self, x, t, y):
        """x (B, d, h, w), t (B,) in [0, 1], labels y (B,) -> velocity (B, d, h, w)."""
        return self.velocity(x, self.t_embedder(t) + self.y_embedder(y))

    def velocity(self, x, conditions, rows=None):
        """The same from conditions (C, dim), the sum of time and class embedding; rows: as in DiTBlock."""
        x = self.x_embedder(x) + self.pos_embed                                     # (B, N, dim)
        rope = self.feat_rope.tables()
        for block in self.blocks:
            x = block(x, conditions, rope, rows)
        x = self.final_layer(x, conditions, rows)                                   # (B, N, p*p*d)
        n, p = self.input_size // self.patch_size, self.patch_size
        x = x.view(-1, n, n, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)      # (B, d, n, p, n, p)
        return x.reshape(-1, self.in_channels, self.input_size, self.input_size)

    @classmethod
    def from_lightningdit(cls, where):
        """From a checkpoint of LightningDiT or of train_dit.py (a path; its EMA weights), or from a state dict. Strict.

        Every size follows from the tensors' shapes; the number of heads, from the rotary buffers. ValueError for a variant
        that is not the paper's (no RoPE, QK-norm, learned variance, ...).
        """
        state = torch.load(where, map_location="cpu", weights_only=True) if not isinstance(where, dict) else where
        state = state.get("ema", state.get("model", state))
        state = {k.removeprefix("module."): v for k, v in state.items()}
        if "x_embedder.proj.weight" not in state or "feat_rope.freqs_cos" not in state:
            raise ValueError(f"{where if not isinstance(where, dict) else 'the state dict'} is not that of a LightningDiT with RoPE")
        dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        n_positions, head_dim = state["feat_rope.freqs_cos"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        model = cls(dim, depth, dim // head_dim, patch_size, math.isqrt(n_positions) * patch_size, in_channels,
                    len(state["y_embedder.embedding_table.weight"]) - 1)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"this LightningDiT is not the paper's variant (RoPE, RMSNorm, SwiGLU, shifted adaLN, no QK-norm): {error}") from None
        return model


PRESETS = {   # width, depth, heads, patch size (LightningDiT; 1.0B: VA-VAE's appendix; tiny: for a CPU)
    "tiny": (256, 4, 4, 1),
    "B/1": (768, 12, 12, 1), "B/2": (768, 12, 12, 2),
    "XL/1": (1152, 28, 16, 1), "XL/2": (1152, 28, 16, 2),
    "1.0B/1": (1536, 24, 24, 1), "1.0B/2": (1536, 24, 24, 2),
}


def preset(name):
    """A named size as DiT's arguments dim, depth, n_heads and patch_size."""
    if name not in PRESETS:
        raise ValueError(f"no DiT of size {name!r}; there are {', '.join(PRESETS)}")
    return dict(zip(("dim", "depth", "n_heads", "patch_size"), PRESETS[name]))


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching: x_t = (1 - t) noise + t data, and the model learns d x_t / dt
# ----------------------------------------------------------------------------------------------------------------------

def draw_timesteps(normals, mu, sigma):
    """Standard normal numbers -> t = sigmoid(mu + sigma normal) in (0, 1): the times that training visits (logit-normal)."""
    return torch.sigmoid(mu + sigma * normals)


def flow_path(data, noise, t):
    """data, noise (B, d, h, w), t (B,) -> x_t and the velocity there, data - noise."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * noise + t * data, data - noise


def flow_loss(velocity, target):
    """Mean squared error, plus 1 - cosine similarity over channels, averaged over places and samples (LightningDiT)."""
    velocity, target = velocity.float(), target.float()
    # eps: at the start velocity is 0, where a cosine has no gradient to speak of, and without bound one that Adam long remembers
    return F.mse_loss(velocity, target) + (1 - F.cosine_similarity(velocity, target, dim=1, eps=0.1)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------

def time_grid(points, shift=1.0):
    """linspace(0, 1, points) under the time shift t -> s t / (1 + (s - 1) t), as float64 (points,). s < 1: small steps near the noise."""
    t = np.linspace(0.0, 1.0, points)
    return shift * t / ((1 - t) + shift * t)         # so written, 1 stays 1 exactly


def integrate(velocity, x, times, method="euler", jumps=()):
    """Solve dx/dt = velocity from times[0] to times[-1] in fp32.

    velocity(x, k) is the velocity at times[k]: every method evaluates it at points of the grid alone. method: "euler",
    "heun" (2 evaluations a step), or "adams" (Adams-Bashforth of order 3 on uneven steps, 1 evaluation a step but the first:
    the choice for few steps). jumps: the k from which on velocity is another function (guidance switched on or off); adams,
    which looks back, starts anew there, by a step of Heun's.
    """
    past = []                                                                       # the last velocities and their times
    for k in range(len(times) - 1):
        h = times[k + 1] - times[k]
        v = velocity(x, k).float()
        past = [(times[k], v), *([] if k in jumps else past[:2])]
        if method == "euler":
            x = x + h * v
        elif method == "heun" or len(past) == 1:
            x = x + h / 2 * (v + velocity(x + h * v, k + 1).float())
        else:
            # weights that integrate every polynomial through these points exactly, in units of h from times[k]
            nodes, powers = np.array([(t - times[k]) / h for t, _ in past]), np.arange(len(past))
            weights = np.linalg.solve(nodes[None] ** powers[:, None], 1 / (powers + 1))
            x = x + h * sum(w * v for w, (_, v) in zip(weights.tolist(), past))
    return x


METHODS = ("euler", "heun", "adams")


def guide(conditional, unconditional, guidance, channels=None):
    """Classifier-free guidance, uncond + w (cond - uncond), on the first `channels` channels (None: all; the authors' code: 3)."""
    guided = unconditional + guidance * (conditional - unconditional)
    return guided if channels is None else torch.cat((guided[:, :channels], conditional[:, channels:]), dim=1)


@torch.no_grad()
def sample(model, noise, labels, steps=250, method="euler", shift=1.0, guidance=1.0, interval=(0.0, 1.0), channels=None, null_label=None):
    """Normalised latents (B, d, h, w) from noise of that shape and labels (B,).

    steps: points of the time grid, so one integration step less (the authors' count). guidance > 1 is applied at times
    interval[0] <= t <= interval[1] on the first `channels` channels; outside, the null branch is not computed at all.
    null_label: default the model's last class. Positions and class embeddings are computed once, time embeddings in one
    batch; the modulation of a step, once for each class that occurs.
    """
    if method not in METHODS or steps < 2:
        raise ValueError(f"method {method!r} with {steps} steps: choose one of {', '.join(METHODS)} and at least 2 points")
    times = time_grid(steps, shift)
    is_guided = [guidance > 1 and interval[0] <= t <= interval[1] for t in times]
    classes, rows = labels.unique(return_inverse=True)
    null = torch.tensor([model.num_classes if null_label is None else null_label], device=labels.device)
    class_embedding = model.y_embedder(torch.cat((classes, null)))                  # (C + 1, dim)
    time_embedding = model.t_embedder(torch.tensor(times, device=labels.device))    # (steps, dim)
    both_rows = torch.cat((rows, torch.full_like(rows, len(classes))))              # then the null class for everyone

    def velocity(x, k):
        conditions = time_embedding[k] + class_embedding
        if not is_guided[k]:
            return model.velocity(x, conditions, rows)
        return guide(*model.velocity(torch.cat((x, x)), conditions, both_rows).chunk(2), guidance, channels)
    jumps = {k for k in range(1, steps) if is_guided[k] != is_guided[k - 1]}
    return integrate(velocity, noise.float(), times, method, jumps)
