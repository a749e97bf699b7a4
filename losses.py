"""
The three objectives of VTP, each a function of tensors, and the collectives they rest on.

    L = lambda_rec L_rec + lambda_ssl L_ssl + lambda_clip L_clip          (paper, section 3; lambda_rec = 0.1 in v2)
    L_clip = symmetric cross-entropy of image-text similarities           (CLIP)
    L_ssl  = L_dino + L_mim + 0.1 L_koleo                                 (DINOv2)
    L_rec  = L1 + LPIPS

In a process group every rank passes its share of the batch (shares of equal size) and every loss returns the value of
the global batch; the mean over ranks of the parameters' gradients, which is what DDP computes, is the gradient that one
process would get from the whole batch.
"""
import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn as nn
import torch.nn.functional as F

from vtp import download

# ----------------------------------------------------------------------------------------------------------------------
# Collectives
# ----------------------------------------------------------------------------------------------------------------------

def init_distributed():
    """Join the process group that torchrun announces, if any; returns this process's device (its own GPU, or the CPU)."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def world_size():
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait for every rank; nothing outside a process group."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(x):
    """[x of rank 0, x of rank 1, ...] on every rank, for anything that can be pickled."""
    parts = [x]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, x)
    return parts


def first_on_node(make):
    """make() on the first rank of each node, then on its others, who find there what the first one fetched."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    made = make()
    if is_first:
        barrier()
    return made


def gather_with_grad(x):
    """Concatenate x (b, ...) over ranks, in the order of ranks -> (W b, ...); the gradient comes back summed over ranks."""
    return torch.cat(dist_nn.all_gather(x.contiguous())) if world_size() > 1 else x


def sum_over_ranks(x):
    """Sum of a tensor over ranks, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean_over_ranks(x):
    """The value of the mean over ranks with the gradient of this rank's own x: DDP's averaging does the rest."""
    if world_size() == 1:
        return x
    return x + (sum_over_ranks(x.detach()) / world_size() - x.detach())


# ----------------------------------------------------------------------------------------------------------------------
# CLIP
# ----------------------------------------------------------------------------------------------------------------------

def clip_loss(image_features, text_features, logit_scale):
    """Mean of image-to-text and text-to-image cross-entropy over the global batch (CLIP; METHOD section 4).

    image_features, text_features (b, D), L2-normalised, row i of one belonging to row i of the other; logit_scale is the
    factor itself, exp(model.logit_scale). Each rank computes the logits of its own rows only.
    """
    image_features, text_features = image_features.float(), text_features.float()
    all_images, all_texts = gather_with_grad(image_features), gather_with_grad(text_features)
    labels = torch.arange(len(image_features), device=image_features.device) + rank() * len(image_features)
    image_to_text = F.cross_entropy(logit_scale * image_features @ all_texts.T, labels)
    text_to_image = F.cross_entropy(logit_scale * text_features @ all_images.T, labels)
    return mean_over_ranks((image_to_text + text_to_image) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Self-supervision: DINO on CLS tokens, masked patches (iBOT), KoLeo
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sinkhorn_knopp(logits, temperature, n_iterations=3):
    """Teacher logits (b, K) -> probabilities (b, K), fp32, by Sinkhorn-Knopp over the global batch (DINOv2, after SwAV).

    The definition: Q = exp(logits / temperature); then n times: scale each prototype's sum over samples to 1/K, each
    sample's sum over prototypes to 1/B; return B Q. Here Q stays put and only the two vectors of scale factors change,
    which reads the matrix twice an iteration instead of rewriting it four times.
    """
    logits = logits.float() / temperature
    row_max = logits.amax(dim=1)
    highest = row_max.max()
    if world_size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    # a common factor changes nothing; each sample's own is put back through its scale, so that none can vanish in fp32
    Q = (logits - row_max[:, None]).exp()
    B, K = len(Q) * world_size(), Q.shape[1]
    sample_scale = (row_max - highest).exp()                                           # (b,)
    for _ in range(n_iterations):
        prototype_sum = sum_over_ranks(sample_scale @ Q)                               # (K,)
        prototype_scale = 1 / (K * prototype_sum.clamp(min=1e-30))
        sample_scale = 1 / (B * (Q @ prototype_scale))
    return Q * (B * sample_scale)[:, None] * prototype_scale


def dino_loss(student_logits, teacher_probs, temperature=0.1):
    """Cross-entropy of the student's softmax at `temperature` against the teacher's probabilities, mean over the batch.

    For one pair of views both are (b, K). Leading axes broadcast, and cross-entropy is linear in the teacher: the mean
    over 8 local crops against 2 global ones is dino_loss(student (8, b, K), mean of the two teachers' probs (b, K)).
    """
    log_probs = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return mean_over_ranks(-(teacher_probs * log_probs).sum(dim=-1).mean())


def ibot_loss(student_logits, teacher_probs, masks, temperature=0.1):
    """The same cross-entropy on masked patches: averaged over a crop's masked patches, then over all crops (DINOv2).

    student_logits, teacher_probs (M, K), a row for each masked patch, in row-major order of masks (crops, patches) bool,
    which has M True entries. Crops without a mask count as zero in the second mean.
    """
    log_probs = F.log_softmax(student_logits.float() / temperature, dim=-1)
    cross_entropy = -(teacher_probs * log_probs).sum(dim=-1)                               # (M,)
    counts = masks.sum(dim=1)                                                              # (crops,)
    # output_size is known, so the device need not tell the host how long the result is
    weights = torch.repeat_interleave(1 / counts.clamp(min=1), counts, output_size=len(cross_entropy))
    return mean_over_ranks((cross_entropy * weights).sum() / len(masks))


def koleo_loss(features, eps=1e-8):
    """-mean log distance to the nearest other sample of the global batch, on L2-normalised features (b, D), fp32 (DINOv2).

    It spreads the CLS features of one crop evenly. DINOv2 looks for neighbours on the same GPU; here on all ranks, so
    that the result does not depend on their number.
    """
    features = F.normalize(features.float(), dim=-1, eps=eps)
    everyone = gather_with_grad(features)
    own = torch.arange(len(features), device=features.device) + rank() * len(features)
    with torch.no_grad():
        nearest = (features @ everyone.T).scatter(1, own[:, None], -2.0).argmax(dim=1)     # cosines are at least -1
    distances = torch.linalg.vector_norm(features - everyone[nearest], dim=-1)
    return mean_over_ranks(-torch.log(distances + eps).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction
# ----------------------------------------------------------------------------------------------------------------------

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SHA256 = "397923af"
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, version 0.1): images (B, 3, H, W) in [-1, 1] -> (B,).

    weights: "auto" fetches torchvision's VGG16 and the LPIPS release's linear layers (checked) into the torch hub cache; a
    folder holds vgg16-397923af.pth and vgg.pth; None leaves the layers random, for tests. The network is frozen; gradients
    flow to the first argument only.
    """

    LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
    TAPS = (3, 8, 15, 22, 29)             # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's numbering
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, weights="auto"):
        super().__init__()
        modules, width = [], 3
        for layer in self.LAYERS:
            if layer == "pool":
                modules.append(nn.MaxPool2d(2))
            else:
                modules += [nn.Conv2d(width, layer, 3, padding=1), nn.ReLU()]
                width = layer
        self.features = nn.Sequential(*modules)
        for i, channels in enumerate(self.CHANNELS):   # the release's names: linI.model.1.weight, after a dropout
            linear = nn.Module()
            linear.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            nn.init.uniform_(linear.model[1].weight)   # the released ones are not negative either
            setattr(self, f"lin{i}", linear)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if weights is not None:
            self.load_weights(weights)
        self.requires_grad_(False).eval()

    def load_weights(self, weights):
        """Strictly load the two published files. FileNotFoundError, RuntimeError: not there, cannot be fetched, do not fit."""
        folder = os.path.join(torch.hub.get_dir(), "checkpoints") if weights == "auto" else weights
        vgg, linear = os.path.join(folder, "vgg16-397923af.pth"), os.path.join(folder, "vgg.pth")
        if weights == "auto":
            download(VGG_URL, vgg, VGG_SHA256)
            download(LPIPS_URL, linear, LPIPS_SHA256)
        for path in (vgg, linear):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"LPIPS needs {path} (torchvision's vgg16-397923af.pth and the LPIPS release's vgg.pth in one folder)")
        state = {k: v for k, v in torch.load(vgg, map_location="cpu", weights_only=True).items() if k.startswith("features.")}
        state.update(torch.load(linear, map_location="cpu", weights_only=True))
        self.load_state_dict(state, strict=True)

    def taps(self, images):
        """The five feature maps, channels at unit length."""
        x, maps = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                maps.append(x / (torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, x, y):
        with torch.no_grad():
            targets = self.taps(y)
        distance = 0.0
        for i, (a, b) in enumerate(zip(self.taps(x), targets)):
            weight = getattr(self, f"lin{i}").model[1].weight.view(1, -1, 1, 1)
            distance = distance + ((a - b) ** 2 * weight).sum(dim=1).mean(dim=(1, 2))
        return distance


def reconstruction_loss(reconstruction, target, lpips=None):
    """L1 + LPIPS, mean over the batch; images (b, 3, H, W) in [-1, 1] (METHOD section 8: the range LPIPS takes).

    lpips: an LPIPS module, or None for L1 alone.
    """
    loss = (reconstruction.float() - target.float()).abs().mean()
    if lpips is not None:
        loss = loss + lpips(reconstruction, target).mean()
    return mean_over_ranks(loss)
