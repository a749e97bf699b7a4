"""
The three objectives of VTP, and stage 2's adversary, each a function of tensors.

    L = lambda_rec L_rec + lambda_ssl L_ssl + lambda_clip L_clip   (section 3; arXiv v2: lambda_rec = 0.1)
    L_clip = symmetric cross-entropy of image-text similarities    (CLIP)
    L_ssl  = L_dino + L_mim + 0.1 L_koleo                          (DINOv2)
    L_rec  = L1 + LPIPS
    stage 2, the pixel decoder alone: L_rec + weight L_gan         (PatchGAN, hinge, adaptive weight: VQGAN)

In a process group every rank passes its share of the batch, all of one size, and a loss compares with the
whole batch where its definition does. It returns the mean over this rank's share: the mean of that over ranks
is the global batch's loss, and the mean of its gradients, as DDP computes it, that loss's gradient.
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from vtp import UserError, download, load_tensors

# ----- CLIP -----------------------------------------------------------------------------------------------

def clip_loss(image_features, text_features, logit_scale):
    """Mean of image-to-text and text-to-image cross-entropy over the global batch (CLIP).
    image_features, text_features (b, D), L2-normalised, in pairs; logit_scale is the factor itself,
    exp(model.logit_scale). A rank computes its own rows' logits only."""
    image_features, text_features = image_features.float(), text_features.float()
    all_images, all_texts = gather_with_grad(image_features), gather_with_grad(text_features)
    labels = torch.arange(len(image_features), device=image_features.device) + rank() * len(image_features)
    image_to_text = F.cross_entropy(logit_scale * image_features @ all_texts.T, labels)
    text_to_image = F.cross_entropy(logit_scale * text_features @ all_images.T, labels)
    return (image_to_text + text_to_image) / 2


# ----- Self-supervision: DINO on CLS tokens, masked patches (iBOT), KoLeo ---------------------------------

@torch.no_grad()
def sinkhorn_knopp(logits, temperature, n_iterations=3):
    """Teacher logits (b, K) -> probabilities (b, K), fp32, over the global batch (SwAV, DINOv2).
    Q = exp(logits / temperature); then n times: scale each prototype's sum over samples to 1/K, each sample's
    sum over prototypes to 1/B; return B Q. Here Q stays put and only the two vectors of scale factors change,
    which reads the matrix twice an iteration instead of rewriting it four times. At K = 65,536 a copy takes
    gigabytes: the first is written over."""
    logits = logits.to(torch.float32, copy=True).div_(temperature)
    row_max = logits.amax(dim=1)
    highest = row_max.max()
    if world_size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    # A common factor changes nothing; each sample's own is put back by its scale, so none can vanish.
    Q = logits.sub_(row_max[:, None]).exp_()
    B, K = len(Q) * world_size(), Q.shape[1]
    sample_scale = (row_max - highest).exp()  # (b,)
    for _ in range(n_iterations):
        prototype_sum = sum_over_ranks(sample_scale @ Q)  # (K,)
        prototype_scale = 1 / (K * prototype_sum.clamp(min=1e-30))
        sample_scale = 1 / (B * (Q @ prototype_scale))
    return Q.mul_((B * sample_scale)[:, None]).mul_(prototype_scale)


def cross_entropy(student_logits, teacher_probs, temperature=0.1):
    """Of the student's softmax at `temperature` against the teacher's probabilities: (..., K) -> (...)."""
    log_probs = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return -(teacher_probs * log_probs).sum(dim=-1)


def dino_loss(of_global, of_local):
    """Mean over all pairs of a student's crop and the teacher's view of another crop (DINOv2), from the
    student's cross-entropies: of_global (2b,), of its global crops, each against the teacher's other one;
    of_local (n_local b,), of local crops, each against the mean of the teacher's two, which stands for two
    pairs, since cross-entropy is linear in the teacher."""
    return (of_global.sum() + 2 * of_local.sum()) / (len(of_global) + 2 * len(of_local))


def ibot_loss(of_patches, masks):
    """Mean over a crop's masked patches, then over all crops (DINOv2), from the student's cross-entropies
    of_patches (M,), in row-major order of masks (crops, patches) bool, which has M True entries. Crops
    without a mask count as zero."""
    counts = masks.sum(dim=1)  # (crops,)
    # output_size: or the device must tell the host how long the result is
    weights = torch.repeat_interleave(1 / counts.clamp(min=1), counts, output_size=len(of_patches))
    return (of_patches * weights).sum() / len(masks)


def koleo_loss(features, eps=1e-8):
    """-mean log distance of features (b, D), L2-normalised here, to the nearest other of the global batch.
    It spreads one crop's CLS features evenly (DINOv2, which looks for neighbours on the same GPU: here on all
    ranks, so that the result does not depend on their number)."""
    features = F.normalize(features.float(), dim=-1, eps=eps)
    all_features = gather_with_grad(features)
    own = torch.arange(len(features), device=features.device) + rank() * len(features)
    with torch.no_grad():  # -2 rules out the sample itself: cosines are at least -1
        nearest = (features @ all_features.T).scatter(1, own[:, None], -2.0).argmax(dim=1)
    distances = torch.linalg.vector_norm(features - all_features[nearest], dim=-1)
    return -torch.log(distances + eps).mean()


# ----- Reconstruction -------------------------------------------------------------------------------------

def reconstruction_loss(reconstruction, target, lpips=None):
    """L1 + LPIPS (a module, or None for L1 alone), mean over images (b, 3, H, W) in [-1, 1]."""
    loss = (reconstruction.float() - target.float()).abs().mean()
    return loss if lpips is None else loss + lpips(reconstruction, target).mean()


VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SHA256 = "397923af"
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, v0.1) of images (B, 3, H, W) in [-1, 1]: (B,).
    weights: "auto" fetches torchvision's VGG16 and the LPIPS release's linear layers (checked) into the torch
    hub cache; a folder holds vgg16-397923af.pth and vgg.pth; None: random, for tests. The network is frozen;
    gradients flow to the first argument only."""

    LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
    TAPS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3 in torchvision's numbering

    def __init__(self, weights="auto"):
        super().__init__()
        layers, width = [], 3
        for channels in self.LAYERS:
            if channels == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
        self.features = nn.Sequential(*layers)
        for i, channels in enumerate((64, 128, 256, 512, 512)):  # released as linI.model.1, after a dropout
            linear = nn.Module()
            linear.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            nn.init.uniform_(linear.model[1].weight)  # not negative, as the released ones
            setattr(self, f"lin{i}", linear)
        for name, rgb in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(rgb).view(3, 1, 1), persistent=False)
        if weights is not None:
            self.load_weights(weights)
        self.requires_grad_(False).eval()

    def load_weights(self, weights):
        """Load both published files, strictly. FileNotFoundError: not there; RuntimeError: they don't fit."""
        folder = os.path.join(torch.hub.get_dir(), "checkpoints") if weights == "auto" else weights
        vgg, linear = os.path.join(folder, "vgg16-397923af.pth"), os.path.join(folder, "vgg.pth")
        if weights == "auto":
            download(VGG_URL, vgg, VGG_SHA256)
            download(LPIPS_URL, linear, LPIPS_SHA256)
        for path in (vgg, linear):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"LPIPS needs {path} (torchvision's vgg16-397923af.pth and the LPIPS "
                                        "release's vgg.pth in one folder)")
        vgg, linear = load_tensors(vgg), load_tensors(linear)
        vgg = {k: v for k, v in vgg.items() if k.startswith("features.")}
        self.load_state_dict(vgg | linear, strict=True)

    def feature_maps(self, images):
        """The five feature maps, channels at unit length."""
        x, maps = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                maps.append(x / (torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, images, targets):
        with torch.no_grad():
            target_maps = self.feature_maps(targets)
        distance = 0.0
        for i, (a, b) in enumerate(zip(self.feature_maps(images), target_maps)):
            weight = getattr(self, f"lin{i}").model[1].weight.view(1, -1, 1, 1)
            distance = distance + ((a - b) ** 2 * weight).sum(dim=1).mean(dim=(1, 2))
        return distance


# ----- Stage 2: an adversary ------------------------------------------------------------------------------

class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], of 24 px or more -> logits (B, 1, H/8 - 2, W/8 - 2): does a patch look
    real? The PatchGAN of the VQGAN line (Isola et al. 2017): three strided layers, convolutions that reach 70
    x 70 px. Theirs has BatchNorm: with GroupNorm a sample's logits depend neither on the other samples nor on
    the number of ranks."""
    def __init__(self, width=64):
        super().__init__()
        layers, of_input = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for channels, stride in ((2 * width, 2), (4 * width, 2), (8 * width, 1)):
            layers += [nn.Conv2d(of_input, channels, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(32, channels), nn.LeakyReLU(0.2)]
            of_input = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(of_input, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, real, fake):
        """Logits of both; a pass for each, so that the generator's gradient goes through one alone."""
        return self.layers(real), self.layers(fake)


def discriminator_loss(real_logits, fake_logits):
    """Hinge loss, the mean of both sides (VQGAN's code): no gradient from logits beyond +-1."""
    real, fake = F.relu(1 - real_logits.float()).mean(), F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def generator_loss(fake_logits):
    """-mean of the discriminator's logits: the other side of the hinge loss (VQGAN's code)."""
    return -fake_logits.float().mean()


def adaptive_weight(rec_grad, gan_grad):
    """Of the adversarial loss: the ratio of both losses' gradient norms at the decoder's last layer, 0-d.
    ||rec_grad|| / (||gan_grad|| + 1e-4), at most 1e4 (Esser et al. 2021, eq. 7; numbers of their code)."""
    rec_norm, gan_norm = (torch.linalg.vector_norm(grad.float()) for grad in (rec_grad, gan_grad))
    return (rec_norm / (gan_norm + 1e-4)).clamp(max=1e4)


# ----- Processes ------------------------------------------------------------------------------------------
# joining the group, and the collectives that the losses rest on

LONGEST_WAIT = timedelta(hours=12)  # of a rank for the others


def init_distributed():
    """Join the process group that torchrun announces, if any -> this process's device.

    A rank may wait for long at a barrier: for another that fetches weights, encodes its share of a set, or
    trains a judge. NCCL's own limit of 10 minutes would end the run there. The price of a long one: a rank
    that hangs is noticed late. A process that dies is not: torchrun then ends the others at once."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return device


def leave_distributed():
    """Wait for the others and leave the process group; a captured step must be closed before. Not for a rank
    that an exception ends: the others are not at this barrier, and torchrun ends them."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number among the ranks, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def first_on_node(make):
    """make() on a node's first rank, then on its others, which find what the first one fetched."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier()
    made = make()
    if is_first:
        barrier()
    return made


def gather_objects(x):
    """[x of rank 0, x of rank 1, ...] on every rank; x is anything picklable."""
    parts = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, x)
    return parts


def in_turn(counts):
    """Where rows of all ranks go, rank after rank, if these take turns: the first of each, then the second of
    each, ...: a tensor of places for each rank. counts: rows of each."""
    order = torch.cat([torch.arange(count) for count in counts]).argsort(stable=True)
    return order.argsort().split(counts)


def gather_at_first(own):
    """{name: tensor (b, ...)} of each rank, in host memory, b of its own; of one without rows, {} -> on rank
    0, which must have rows, {name: (n, ...)} of all, who take turns (in_turn); on the others {}. It goes
    tensor by tensor, through the device of the process group, and empties own: no other rank ever holds more
    than its own rows."""
    counts = gather_objects(len(next(iter(own.values()), ())))
    if world_size() == 1:
        return own
    places, whole = in_turn(counts), {}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"

    def wait_for(operation, tensor, peer):      # in a batch, or NCCL opens a communicator for each pair
        for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
            work.wait()
    for name in list(own):
        x = own.pop(name)
        if rank() > 0:
            wait_for(dist.isend, x.to(device), 0)
            continue
        whole[name] = x.new_empty(sum(counts), *x.shape[1:])
        whole[name][places[0]] = x
        for r in range(1, world_size()):
            if counts[r] > 0:
                part = torch.empty(counts[r], *x.shape[1:], dtype=x.dtype, device=device)
                wait_for(dist.irecv, part, r)
                whole[name][places[r]] = part.cpu()
                del part        # before room is made for the next
    return whole


def by_first_rank(make):
    """make() by rank 0 alone -> its result, or its error, on every rank."""
    result, error = None, None
    if rank() == 0:
        try:
            result = make()
        except Exception as raised:
            error = raised
    of_first = gather_objects((result, error))[0]
    if rank() > 0:      # rank 0 keeps its own error, with its traceback
        result, error = of_first
    if error is not None:
        raise error
    return result


def fail(message):
    """End the program: one line on stderr, by rank 0 alone, and exit code 2.
    Another rank waits before it speaks: if rank 0 met the same error, torchrun ends it meanwhile."""
    if rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank()}: {message}"
    if "Original Traceback" in message:         # of a loader process: the error is its last line
        message = message.strip().rpartition("\n")[2].partition(": ")[2]
    if sys.stderr.isatty():
        print(file=sys.stderr)                  # behind a progress bar
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def keep_freed_memory():
    """Let the C library keep freed blocks: else the kernel hands each activation of a CPU step out anew."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 30)          # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)      # M_TRIM_THRESHOLD


@contextlib.contextmanager
def one_line_errors():
    """What a user can mend ends the program by fail(). `python -X dev` shows where it arose."""
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for loader in multiprocessing.active_children():        # they outlive the signal that exit sends them
            loader.kill()
        if isinstance(error, (UserError, ValueError, OSError)) and not sys.flags.dev_mode:
            fail(str(error))
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)                                       # as a shell has it
        raise


class _Gather(torch.autograd.Function):
    """torch.distributed.nn's all_gather is deprecated, and so is all_gather_into_tensor (torch 2.14)."""
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_ranks(grad.contiguous()).chunk(world_size())[rank()]  # gloo has no reduce_scatter


def gather_with_grad(x):
    """x (b, ...) of all ranks, in order -> (W b, ...); the gradient comes back summed over ranks."""
    return _Gather.apply(x) if world_size() > 1 else x


def sum_over_ranks(x):
    """Sum of a tensor over ranks, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x
