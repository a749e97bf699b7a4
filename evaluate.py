"""
Everything that is measured, and every picture.

The tokenizer of `python train_tokenizer.py` and, if there is one, the DiT of `python train_dit.py`:
    python evaluate.py

Any tokenizer on any data (several ranks give the same numbers: torchrun --nproc_per_node=8 evaluate.py ...):
    python evaluate.py --tokenizer MiniMaxAI/VTP-Large-f16d64 --data imagenet/train --val_data imagenet/val --n_val 50000

A folder of samples, or a .npz with arr_0, against a reference (a folder, arr_0, or the mu and sigma of an ADM batch):
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz

One's own images through a tokenizer; the paper's figures for several runs:
    python evaluate.py --tokenizer runs/tokenizer --images my_photos
    python evaluate.py --plot runs/tokenizer runs/ae

It prints a table and leaves results.json and pictures in --out. An interrupted evaluation goes on from the features it has kept.
"""
import argparse
import hashlib
import json
import math
import os
import struct
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import IMAGE_EXTENSIONS, draw_boxes, gaussian_blur, load_canvas, load_evaluation_set, permutation, resample, step_generator
from dit import METHODS, DiT, sample
from losses import LPIPS, barrier, first_on_node, gather_objects, init_distributed, rank, sum_over_ranks, world_size
from vtp import VTP, denormalize, download, find_checkpoint, normalize, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------

def psnr(images, references, data_range=1.0):
    """Peak signal-to-noise ratio in dB of each image: (B, C, H, W) twice, of that data range -> (B,)."""
    mse = ((images.float() - references.float()) ** 2).flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range ** 2 / mse)


def ssim(images, references, data_range=1.0, window=11, sigma=1.5):
    """Structural similarity of each image: (B, C, H, W) twice, of that data range -> (B,) (Wang et al. 2004).

    Local statistics under a Gaussian window whose weights add up to 1, K1 = 0.01 and K2 = 0.03; the mean over channels and
    over the places where the whole window lies inside the image. In float64: E[x^2] - E[x]^2 cancels, and TF32 would ruin it.
    """
    if images.shape != references.shape or images.ndim != 4 or min(images.shape[-2:]) < window:
        raise ValueError(f"SSIM compares (B, C, H, W) with as many, at least {window} px high and wide: "
                         f"got {tuple(images.shape)} and {tuple(references.shape)}")

    def band(n):                                                                     # (n - 10, n): row i weighs what window i holds
        offset = torch.arange(n, device=images.device) - torch.arange(n - window + 1, device=images.device)[:, None]
        weights = torch.exp(-0.5 * ((offset - window // 2).double() / sigma) ** 2) * ((offset >= 0) & (offset < window))
        return weights / weights.sum(dim=1, keepdim=True)
    x, y, (rows, columns) = images.double(), references.double(), (band(n) for n in images.shape[-2:])
    blur = lambda z: rows @ z @ columns.T
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3)).float()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2).

    mu (D,), sigma (D, D), arrays or CPU tensors -> float, at least 0 (Heusel et al. 2017: the FID, on Inception's pool3
    features). With sigma = A A^T by eigenvectors, the trace of the root is the sum of the singular values of A1^T A2. That
    is real and accurate however few samples a covariance comes from, while roots of the tiny eigenvalues of a product
    would add 1e-8 of the largest each. ValueError: shapes that differ, or something not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"statistics of different features: means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics with NaN or infinity have no Frechet distance: look for broken images, or too few of them (2 at least)")

    def root(sigma):       # (D, r), r the numerical rank
        values, vectors = np.linalg.eigh(sigma)
        kept = values > values[-1] * len(sigma) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])
    overlap = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap), 0.0)


def inception_score(logits, splits=10):
    """exp of the mean KL divergence of p(class | image) from p(class), in each split: logits (n, K) -> (mean, std) over splits.

    Splits are consecutive, unshuffled and equal (to one image, if n does not divide); std is that of the splits, not of the
    mean, with no correction (Salimans et al. 2016). ADM's figure is the mean over parts of 5,000: 10 splits at 50,000 images.
    """
    n, scores = len(logits), []
    if n < splits or not torch.isfinite(logits).all():
        raise ValueError(f"the Inception score over {splits} splits needs as many images and finite logits: got {n} images")
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def _squared_distances(a, b, n_columns=8192):
    """(m, D), (n, D) -> float64 (m, n). Points nearer than float32 can tell are at 0, so that a copy lies on its original."""
    def block(a, b):
        norms = (a ** 2).sum(dim=1)[:, None] + (b ** 2).sum(dim=1)
        distances = norms - 2 * a @ b.T
        return distances.masked_fill_(distances < 1e-13 * norms, 0)
    return torch.cat([block(a.double(), part.double()) for part in b.split(n_columns)], dim=1)


def _neighbour_radii(features, k, n_rows):
    """Squared distance of each point to its k-th nearest other point: (n, D) -> (n,)."""
    radii = []
    for start in range(0, len(features), n_rows):
        distances = _squared_distances(features[start:start + n_rows], features)
        distances.diagonal(start).fill_(torch.inf)                           # itself
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


@torch.no_grad()
def precision_recall(real_features, fake_features, k=3, n_rows=512):
    """Improved precision and recall (Kynkaanniemi et al. 2019): (n, D) and (m, D) on one device -> two shares.

    A set's manifold is the union of closed balls around its points, each reaching to the point's k-th neighbour, itself not
    counted. Precision: the share of fakes in the manifold of the real ones; recall: of real ones in that of the fakes.
    n_rows: rows of the distance matrix at a time; 50,000 x 50,000 in 2,048 dimensions takes about 2 GiB with the features.
    Distances are float64, since float32 cancels (and may be TF32); ADM's tool takes float16 where that does not overflow.
    """
    if real_features.ndim != 2 or real_features.shape[1:] != fake_features.shape[1:] or min(len(real_features), len(fake_features)) <= k:
        raise ValueError(f"precision and recall with k = {k} need two sets of more than {k} features of one size: "
                         f"got {tuple(real_features.shape)} and {tuple(fake_features.shape)}")
    real_radii, fake_radii = _neighbour_radii(real_features, k, n_rows), _neighbour_radii(fake_features, k, n_rows)
    n_precise, recalled = 0, torch.zeros(len(real_features), dtype=torch.bool, device=real_features.device)
    for fakes, radii in zip(fake_features.split(n_rows), fake_radii.split(n_rows)):
        distances = _squared_distances(fakes, real_features)
        n_precise += (distances <= real_radii).any(dim=1).sum()
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return float(n_precise) / len(fake_features), recalled.float().mean().item()


def retrieval(image_features, text_features, captions):
    """Image-text retrieval: features (n, D), L2-normalised, row i of both from sample i -> dict of top-1 shares.

    A hit is a sample with the same caption, since a set may hold the same caption twice; chance is what a random pick hits.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([ids[c] for c in captions])
    similarity = image_features.float() @ text_features.float().T
    return dict(image_to_text=(ids[similarity.argmax(dim=1)] == ids).float().mean().item(),
                text_to_image=(ids[similarity.argmax(dim=0)] == ids).float().mean().item(),
                retrieval_chance=(ids[:, None] == ids).float().mean().item())


def balanced_accuracy(predictions, labels):
    """Mean over the classes that occur of the share of a class that is right; chance is 1 / number of classes."""
    return torch.stack([(predictions[labels == c] == c).float().mean() for c in labels.unique()]).mean().item()


def knn_predict(train_features, train_labels, features, k=20, temperature=0.07):
    """k-nearest-neighbour classes by cosine, votes weighted by exp(cosine / temperature) (DINO): (n, D) -> (n,)."""
    train_features, features = (F.normalize(f.float(), dim=1) for f in (train_features, features))
    similarity, nearest = (features @ train_features.T).topk(min(k, len(train_features)), dim=1)
    votes = torch.zeros(len(features), int(train_labels.max()) + 1).scatter_add(1, train_labels[nearest], (similarity / temperature).exp())
    return votes.argmax(dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# The FID network: TensorFlow's Inception-v3 of 2015-12-05
# ----------------------------------------------------------------------------------------------------------------------

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU. Padding keeps the size where that is `same`; else none, as wherever the stride is 2."""

    def __init__(self, in_channels, channels, kernel, stride=1, same=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 if same and stride == 1 else 0 for k in kernel]
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x):
    """3 x 3 at stride 1; a window over the border is the mean of what lies inside, as TensorFlow has it."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """3 x 3 at stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def shrinking_pool(x):
    """3 x 3 at stride 2, only where the whole window fits."""
    return F.max_pool2d(x, 3, stride=2)


# A mixed block is a list of branches whose results are concatenated. A branch is a list of steps, one after the other: a
# pooling function, a unit (name, channels, kernel, stride 1 unless given), or a list of units on the same input, concatenated.

def _mixed_35(pooled):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [average_pool, ("branch_pool", pooled, 1)]]


def _mixed_17(c):
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            [average_pool, ("branch_pool", 192, 1)]]


def _mixed_8(pool):
    fork = lambda name: [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), fork("branch3x3_2")],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
            [pool, ("branch_pool", 192, 1)]]


MIXED_BLOCKS = {
    "Mixed_5b": _mixed_35(32), "Mixed_5c": _mixed_35(64), "Mixed_5d": _mixed_35(64),
    "Mixed_6a": [[("branch3x3", 384, 3, 2)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
                 [shrinking_pool]],
    "Mixed_6b": _mixed_17(128), "Mixed_6c": _mixed_17(160), "Mixed_6d": _mixed_17(160), "Mixed_6e": _mixed_17(192),
    "Mixed_7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
                 [shrinking_pool]],
    "Mixed_7b": _mixed_8(average_pool), "Mixed_7c": _mixed_8(max_pool),      # the 2015 graph has a max pool here
}


class MixedBlock(nn.Module):
    """Branches as in MIXED_BLOCKS, on (B, in_channels, H, W); out_channels is the width of what they give together."""

    def __init__(self, in_channels, branches):
        super().__init__()
        self.branches, self.out_channels = branches, 0
        for branch in branches:
            width = in_channels
            for step in branch:
                width = width if callable(step) else self._add(width, step)
            self.out_channels += width

    def _add(self, width, step):
        if isinstance(step, list):
            return sum(self._add(width, unit) for unit in step)
        name, channels, *shape = step
        self.add_module(name, ConvUnit(width, channels, *shape))
        return channels

    def _run(self, x, steps):
        for step in steps:
            if isinstance(step, list):
                x = torch.cat([self._run(x, [unit]) for unit in step], dim=1)
            else:
                x = step(x) if callable(step) else getattr(self, step[0])(x)
        return x

    def forward(self, x):
        return torch.cat([self._run(x, branch) for branch in self.branches], dim=1)


class InceptionFID(nn.Module):
    """The network of FID, sFID and the Inception score (METHOD section 7), in the PyTorch port's conventions (pytorch-fid).

    weights: "auto" fetches pt_inception-2015-12-05-6726825d.pth (checked) into the torch hub cache; a path is that file;
    None leaves the layers random, for tests. The 566 tensor names are the file's. It differs from torchvision's Inception-v3
    in its pools and its 1,008 classes. ADM's own tool resizes and scales otherwise: do not mix statistics of the two.
    """

    SIDE = 299

    def __init__(self, weights="auto"):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, same=False)
        width = 192
        for name, branches in MIXED_BLOCKS.items():
            self.add_module(name, MixedBlock(width, branches))
            width = getattr(self, name).out_channels
        self.fc = nn.Linear(width, 1008)
        if weights is not None:
            self.load_weights(weights)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def load_weights(self, weights):
        """Strictly load the published file. FileNotFoundError, RuntimeError: not there, cannot be fetched, does not fit."""
        if weights == "auto":
            weights = download(INCEPTION_URL, os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(INCEPTION_URL)), INCEPTION_SHA256)
        if not os.path.isfile(weights):
            raise FileNotFoundError(f"no Inception weights at {weights}: get {INCEPTION_URL}")
        self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)

    def prepare(self, images):
        """uint8, or floats in [0, 1], (B, 3, H, W) -> (B, 3, 299, 299) in [-1, 1]; bilinear, without antialias, as pytorch-fid."""
        pixels = images.float() if images.is_floating_point() else images.float() / 255
        pixels = F.interpolate(pixels, (self.SIDE, self.SIDE), mode="bilinear", align_corners=False, antialias=False)
        return (2 * pixels - 1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        """uint8, or floats in [0, 1], (B, 3, H, W) -> pool3 (B, 2048), spatial (B, 2023), logits (B, 1008), all float32.

        spatial: the first 7 channels of the 17 x 17 map of mixed_6 in TensorFlow's numbering, which is Mixed_6d, after its
        1x1 branch; in the order (row, column, channel) of ADM's mu_s. logits: without the bias, as ADM and torch-fidelity
        take the Inception score. Always in full float32: TF32 and autocast are off.
        """
        with torch.autocast(images.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(self.prepare(images)))          # (B, 32, 147, 147)
            x = shrinking_pool(self.Conv2d_2b_3x3(x))                                 # (B, 64, 73, 73)
            x = shrinking_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))             # (B, 192, 35, 35)
            for name in MIXED_BLOCKS:
                x = getattr(self, name)(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                 # the 1x1 branch comes first
            pool3 = x.mean(dim=(2, 3))                                                # of 8 x 8
            logits = (pool3.double() @ self.fc.weight.double().T).float()             # float64 has no TF32
        return pool3, spatial, logits


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of features, and where images come from
# ----------------------------------------------------------------------------------------------------------------------

class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64 on a device; nothing is kept per image.

    Sums are of deviations from the mean so far (Chan et al. 1979), so a large common offset costs no digits, and neither the
    sizes of batches nor the number of ranks changes the result beyond rounding.
    """

    def __init__(self, n_features, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mu = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(n_features, n_features, dtype=torch.float64, device=device)    # sum of (x - mu) (x - mu)^T

    def update(self, features):
        """Take in a batch (b, D); b may be 0."""
        if not len(features):
            return
        features = features.detach().to(self.mu)
        total, mean = self.count + len(features), features.mean(dim=0)
        centred, shift = features - mean, mean - self.mu
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mu += shift * (len(features) / total)
        self.count = total

    def merge_ranks(self):
        """-> new FeatureStatistics of the samples of all ranks, on every rank; some ranks may have none."""
        merged = FeatureStatistics(len(self.mu), self.mu.device)
        merged.count = sum_over_ranks(self.count)
        merged.mu = sum_over_ranks(self.mu * self.count) / merged.count.clamp(min=1)
        shift = self.mu - merged.mu
        merged.scatter = sum_over_ranks(self.scatter + self.count * torch.outer(shift, shift))
        return merged

    @property
    def mean(self):
        """float64 array (D,)."""
        return self.mu.cpu().numpy()

    @property
    def covariance(self):
        """Unbiased, float64 array (D, D). ValueError with fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, and there were {int(self.count)}")
        return (self.scatter / (self.count - 1)).cpu().numpy()

    def save(self, path, spatial=None):
        """Write an .npz with mu and sigma, atomically; and those of spatial, another FeatureStatistics, as mu_s and sigma_s."""
        arrays = dict(mu=self.mean, sigma=self.covariance)
        if spatial is not None:
            arrays.update(mu_s=spatial.mean, sigma_s=spatial.covariance)
        write_atomically(path, lambda f: np.savez(f, **arrays))


def load_statistics(path):
    """The .npz of FeatureStatistics.save, pytorch-fid or ADM -> dict of float64 mu, sigma and, if it has them, mu_s, sigma_s."""
    with np.load(path) as archive:
        missing = {"mu", "sigma"} - set(archive.files)
        if missing:
            raise ValueError(f"{path} holds no statistics: {' and '.join(sorted(missing))} missing, there is {', '.join(archive.files)}")
        return {k: archive[k].astype(np.float64) for k in ("mu", "sigma", "mu_s", "sigma_s") if k in archive.files}


def _open_arr_0(path):
    """arr_0 of an .npz: mapped into memory where it is stored as it is (np.savez; 50,000 images are 10 GB), else read whole."""
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"{path} holds no images: no arr_0 in it, but {', '.join(archive.namelist())}")
        entry = archive.getinfo("arr_0.npy")
        with archive.open(entry) as f:
            version = np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f) if version == (1, 0) else (None, True, None)
            header = f.tell()
    if entry.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path) as archive:
            return archive["arr_0"]
    with open(path, "rb") as f:
        f.seek(entry.header_offset + 26)                   # the zip's local header: 30 bytes, the name, the extra field
        name, extra = struct.unpack("<HH", f.read(4))
    return np.memmap(path, dtype, "r", entry.header_offset + 30 + name + extra + header, shape)


class ImageSet(torch.utils.data.Dataset):
    """Images of one size, by number, each uint8 (3, H, W): those of a folder and its subfolders, sorted by path, or of an
    .npz with arr_0 uint8 (N, H, W, 3).

    size: bring a folder's images to it by the protocol of METHOD section 7 (data.load_canvas); by default they must agree.
    Alpha is dropped then, as by pytorch-fid. Raises FileNotFoundError, ValueError: nothing there, or not such images.
    """

    def __init__(self, where, size=None):
        self.where, self.size, self.files, self.array = where, size, None, None
        if os.path.isdir(where):
            self.files = sorted(os.path.join(root, f) for root, _, names in os.walk(where, followlinks=True) for f in names
                                if f.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
        elif not os.path.isfile(where):
            raise FileNotFoundError(f"no folder of images and no .npz at {where}")
        elif not zipfile.is_zipfile(where):
            raise ValueError(f"{where} is neither a folder of images nor an .npz")
        else:
            self.array = _open_arr_0(where)
            if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[-1] != 3:
                raise ValueError(f"arr_0 of {where} must be uint8 (N, H, W, 3): it is {self.array.dtype} {self.array.shape}")
        if not len(self):
            raise ValueError(f"{where} holds no images ({', '.join(IMAGE_EXTENSIONS)}, or rows of arr_0)")
        self.shape = self._read(0).shape

    def __len__(self):
        return len(self.array if self.files is None else self.files)

    def _read(self, index):
        if self.files is None:
            return np.ascontiguousarray(self.array[index].transpose(2, 0, 1))
        try:
            if self.size:
                return load_canvas(self.files[index], self.size)
            with Image.open(self.files[index]) as image:
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:     # Pillow's decoders raise almost anything on a broken file
            raise ValueError(f"{self.files[index]} is not an image that can be read: {error}") from error

    def __getitem__(self, index):
        image = self._read(index)
        if image.shape != self.shape:
            raise ValueError(f"{self.files[index]} is {image.shape[2]} x {image.shape[1]}, {self.files[0]} is {self.shape[2]} x {self.shape[1]}: "
                             "images must have one size; give a size to bring them to it")
        return torch.from_numpy(np.ascontiguousarray(image))


def image_batches(where, batch_size, size=None, n_workers=0):
    """Iterate over this rank's images, every W-th, in uint8 (b, 3, H, W); len() is the number of batches. As ImageSet else."""
    images = ImageSet(where, size)
    share = range(rank(), len(images), world_size())
    return torch.utils.data.DataLoader(images, batch_size=batch_size, sampler=share, num_workers=n_workers)


# ----------------------------------------------------------------------------------------------------------------------
# Understanding: features, zero-shot classes, the linear probe
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def probe_features(model, images):
    """What probes learn from, in one pass: normalised images (B, 3, H, W) -> {name: (B, D)}, and cls and patches of the last layer.

    latents: the mean over places of the bottleneck (METHOD section 7, a). dino_1 and dino_4 (b): CLS of the last 1 or 4
    layers (all, where there are fewer), first to last, then the mean of the last layer's patches.
    """
    layers = model.intermediate_layers(images, min(4, model.config.vision_depth))
    patches, cls = layers[-1]
    mean = patches.mean(dim=1)
    features = dict(latents=model.trunk.bottleneck(patches).mean(dim=1), dino_1=torch.cat((cls, mean), dim=1),
                    dino_4=torch.cat([c for _, c in layers] + [mean], dim=1))
    return {name: x.float() for name, x in features.items()}, cls, patches


def cached_features(folder, fingerprint, n_chunks, compute, description="features"):
    """The features that compute(k) makes of chunk k, for all n_chunks, in order -> {name: tensor (n, ...)} on the CPU of every rank.

    compute: k -> {name: tensor (m, ...)}. Rank r computes chunks r, r + W, ... and keeps each in a file of its own, so a run
    that was interrupted goes on where it stopped. fingerprint: a string that names all that the features depend on (weights,
    images, size of a chunk); a file of another fingerprint is made anew.
    """
    def path(k):
        return os.path.join(folder, f"{k:05d}.pt")

    def read(k):
        chunk = torch.load(path(k), mmap=True, weights_only=True) if os.path.isfile(path(k)) else dict(fingerprint=None)
        return chunk["features"] if chunk["fingerprint"] == fingerprint else None
    os.makedirs(folder, exist_ok=True)
    missing = [k for k in range(rank(), n_chunks, world_size()) if read(k) is None]
    for k in tqdm(missing, desc=description, unit=" chunks", disable=rank() != 0 or not missing, dynamic_ncols=True):
        chunk = dict(fingerprint=fingerprint, features={name: x.cpu() for name, x in compute(k).items()})
        write_atomically(path(k), lambda f: torch.save(chunk, f))
    barrier()
    chunks = [read(k) for k in range(n_chunks)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def accuracy_interval(accuracy, n):
    """Half the width of Wilson's 95 % interval for a share measured on n samples."""
    z = 1.96
    return z / (1 + z ** 2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z ** 2 / (4 * n ** 2))


@torch.no_grad()
def class_embeddings(model, class_names, templates, tokenize, batch_size=256):
    """Text features of classes -> (n_classes, D), L2-normalised: those of every template, averaged, normalised again (METHOD section 7)."""
    without = [t for t in templates if "{}" not in t]
    if without or not templates:
        raise ValueError(f"a template must hold {{}}, where the class name goes; without: {without or 'no template at all'}")
    texts, device = [t.format(name) for name in class_names for t in templates], model.token_embedding.weight.device
    features = [model.encode_text(tokenize(texts[i:i + batch_size], model.config.text_context_length).to(device)).float()
                for i in range(0, len(texts), batch_size)]
    return F.normalize(torch.cat(features).unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=1)


def zero_shot(model, image_features, labels, class_names, templates, tokenize):
    """Zero-shot classification (METHOD section 7) -> dict of shares: zero_shot_top1, zero_shot_top5 (of more than 5 classes),
    zero_shot_interval (half of Wilson's 95 % interval of top-1), zero_shot_chance.

    image_features (n, text_embed_dim) as encode_image gives them; labels int64 (n,), numbers of class_names; templates with {}.
    """
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, and there are {len(class_names)} class names")
    classes = class_embeddings(model, class_names, templates, tokenize)                             # (n_classes, D)
    order = (image_features.to(classes) @ classes.T).topk(min(5, len(classes)), dim=1).indices      # (n, 5)
    hits = order == labels.to(order)[:, None]
    top1 = hits[:, 0].float().mean().item()
    top5 = dict(zero_shot_top5=hits.any(dim=1).float().mean().item()) if len(classes) > 5 else {}
    return dict(zero_shot_top1=top1, **top5, zero_shot_interval=accuracy_interval(top1, len(labels)), zero_shot_chance=1 / len(classes))


PENALTIES = tuple(10.0 ** (e / 2) for e in range(-12, 1))      # 1e-6 to 1, 13 of them as of the paper's learning rates


def logistic_regression(features, labels, n_classes, penalties, balanced=False, tolerance=1e-6):
    """Multinomial logistic regression at each of G penalties -> mean (D,), weight (G, D, C), bias (G, C).

    features (n, D), labels int64 (n,); logits are (features - mean) @ weight + bias. Each of the G minimises the mean
    cross-entropy + penalty * |weight of the standardised features|^2 (scikit-learn's C is 1 / (2 n penalty)); balanced: every
    class weighs the same, however many samples it has. Solved until no entry of the scaled gradient is above tolerance.

    The G problems are solved by L-BFGS one after the other, from the strongest penalty, each from the last one's solution:
    side by side they would share one step size. Columns are scaled by a bound of the Hessian, X'X / 2 + 2 penalty (Boehning
    1992), in the axes where X'X is diagonal; without it, correlated features take many times as long.
    """
    n, dtype, device = len(features), torch.promote_types(features.dtype, torch.float32), features.device
    mean, std = features.to(dtype).mean(dim=0), features.to(dtype).std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    variances, axes = torch.linalg.eigh((x.T @ x / n).double())                             # (D,), (D, D)
    axes, ones = axes.to(dtype), torch.ones(n, 1, dtype=dtype, device=device)
    x = torch.cat((x @ axes, ones), dim=1).T.contiguous()                                   # (D + 1, n): the last row for the bias
    counts = labels.bincount(minlength=n_classes).to(dtype)
    sample_weights = (1 / counts[labels] if balanced else ones[:, 0])
    sample_weights = sample_weights / sample_weights.sum()
    w = torch.zeros(n_classes, len(x), dtype=dtype, device=device)
    share = torch.zeros(n_classes, dtype=dtype, device=device).index_add(0, labels, sample_weights)
    w[:, -1] = share.clamp(min=1e-12).log()                # best without features; a class that does not occur stays there
    columns = list(zip(*(t.split(max(1, 2 ** 26 // n_classes), dim=-1) for t in (x, labels, sample_weights))))
    decay, solutions = torch.ones_like(x[:, 0]).index_fill(0, torch.tensor(len(x) - 1, device=device), 0.0), {}
    for penalty in sorted(penalties, reverse=True):
        scale = (F.pad(variances.clamp(min=0), (0, 1), value=1.0).to(dtype) / 2 + 2 * penalty * decay).rsqrt()
        scaled = (w / scale).requires_grad_()
        solver = torch.optim.LBFGS([scaled], max_iter=1000, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=tolerance, tolerance_change=1e-12)

        @torch.enable_grad()
        def closure():
            solver.zero_grad()
            loss = penalty * (decay * (scaled * scale) ** 2).sum()
            loss.backward()
            for some, classes, weights in columns:
                part = -(((scaled * scale) @ some).log_softmax(dim=0).gather(0, classes[None])[0] * weights).sum()
                part.backward()
                loss = loss.detach() + part.detach()
            return loss
        solver.step(closure)
        solutions[penalty] = w = (scaled * scale).detach()
    w = torch.stack([solutions[penalty] for penalty in penalties]).transpose(1, 2)          # (G, D + 1, C)
    return mean, (axes / std[:, None]) @ w[:, :-1], w[:, -1]


def linear_probe(train_features, train_labels, features, labels, penalties=PENALTIES, seed=0):
    """Linear probe: logistic regression on features as they are -> dict(linear_probe, linear_probe_balanced, linear_probe_penalty).

    train_features (n, D), features (m, D), labels int64. The shares are of the m features: plain top-1 and the mean over
    classes. The penalty is the one that is best on a fifth of the training set, drawn by seed and kept back (of equals the
    strongest); then all of the training set is fitted with it. Labels of the m features decide nothing.
    """
    if len(train_features) < 5:
        raise ValueError(f"a linear probe needs 5 training samples or more to choose its penalty, and got {len(train_features)}")
    n_classes = int(torch.cat((train_labels, labels)).max()) + 1
    order = torch.from_numpy(permutation(seed, 0, len(train_features))).to(train_labels.device)
    kept_back, fitted = order[:len(order) // 5], order[len(order) // 5:]
    penalties = sorted(penalties, reverse=True)

    def predict(rows, penalties, features):
        mean, weight, bias = logistic_regression(train_features[rows], train_labels[rows], n_classes, penalties)
        return [((features - mean) @ w + b).argmax(dim=1) for w, b in zip(weight, bias)]
    trials = predict(fitted, penalties, train_features[kept_back])
    right = torch.stack([(trial == train_labels[kept_back]).sum() for trial in trials])
    penalty = penalties[int(right.argmax())]
    predictions = predict(order, [penalty], features)[0]
    return dict(linear_probe=(predictions == labels).float().mean().item(), linear_probe_balanced=balanced_accuracy(predictions, labels),
                linear_probe_penalty=penalty)


def linear_predict(train_features, train_labels, features, penalty=1e-3):
    """Classes by a linear probe in which every class weighs the same: (n, D), labels int64 (n,), features (m, D) -> (m,)."""
    mean, weight, bias = logistic_regression(train_features, train_labels, int(train_labels.max()) + 1, [penalty], balanced=True)
    return ((features - mean) @ weight[0] + bias[0]).argmax(dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# A tokenizer on held-out data
# ----------------------------------------------------------------------------------------------------------------------

def gather_from_ranks(tensors):
    """{name: CPU tensor (m, ...)} -> the same with the rows of all ranks; numbers of rows may differ."""
    parts = gather_objects(tensors)
    return {k: torch.cat([p[k] for p in parts]) for k in tensors}


@torch.no_grad()
def run_tokenizer(model, samples, tokenize, batch_size=128, only_latents=False, bf16=False):
    """What a tokenizer makes of samples (images uint8 (m, 3, C, C), captions, labels) -> dict of CPU tensors:

    latents (m, d), the mean over patches; labels; and, unless only_latents, psnr (m,) of reconstructions clamped to [0, 1]
    (if it has a decoder), image_features and text_features (if it has a text tower). bf16: under autocast, as in training.
    """
    images, captions, labels = samples
    config, device = model.config, model.trunk.cls_token.device
    out = dict(latents=[], psnr=[], image_features=[], text_features=[])
    for start in range(0, len(images), batch_size):
        pixels = to_image_size(images[start:start + batch_size].to(device), config.image_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            cls, patches = model.features(normalize(pixels))
            latents = model.to_latents(patches, *pixels.shape[-2:])
            if config.train_reconstruction and not only_latents:
                reconstructions = model.decode(latents)
                out["psnr"].append(psnr(denormalize(reconstructions.float()).clamp(0, 1), pixels))
            if config.train_clip and not only_latents:
                tokens = tokenize(captions[start:start + batch_size], config.text_context_length).to(device)
                out["image_features"].append(F.normalize(model.project_image(cls, patches).float(), dim=-1))
                out["text_features"].append(F.normalize(model.encode_text(tokens, normalize=False).float(), dim=-1))
        out["latents"].append(latents.float().mean(dim=(2, 3)))
    return {k: torch.cat(v).cpu() for k, v in out.items() if v} | dict(labels=labels)


def to_image_size(canvases, size):
    """uint8 canvases (B, 3, C, C) -> pixels in [0, 1] (B, 3, size, size), bicubic where the sizes differ."""
    pixels = canvases.float() / 255
    if pixels.shape[-1] == size:
        return pixels
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=pixels.device)[:, None].expand(4, len(pixels))
    return resample(pixels, whole, size).clamp(0, 1)


def evaluate_tokenizer(model, held_out, gallery, tokenize, bf16=False):
    """The measures that training reports, over all ranks -> dict of floats. Each rank passes its share of both sets.

    held_out, gallery: (images uint8 (m, 3, C, C), captions, labels int64 (m,)); the classifiers learn from the gallery's
    latents (training data) and are measured on the held-out ones; without labels (-1) they are left out.
    """
    ours, known = (gather_from_ranks(run_tokenizer(model, s, tokenize, only_latents=s is gallery, bf16=bf16)) for s in (held_out, gallery))
    captions, row = [c for part in gather_objects(held_out[1]) for c in part], {}
    if "psnr" in ours:
        row["psnr"] = ours["psnr"].mean().item()
    if "image_features" in ours:
        row.update(retrieval(ours["image_features"], ours["text_features"], captions))
    has_label, is_known = ours["labels"] >= 0, known["labels"] >= 0
    if has_label.any() and is_known.any():
        train, labels = (known["latents"][is_known], known["labels"][is_known]), ours["labels"][has_label]
        row["latent_linear"] = balanced_accuracy(linear_predict(*train, ours["latents"][has_label]), labels)
        row["latent_knn"] = balanced_accuracy(knn_predict(*train, ours["latents"][has_label]), labels)
        row["accuracy_chance"] = 1 / len(labels.unique())
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The judge: a small classifier of a labelled set, trained on the set itself
# ----------------------------------------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A small convolutional classifier on images scaled to 64 px. Its features stand in for Inception's where that is
    foreign to the data, its classes tell whether a sample shows what its label says.

    It learns from blurred, noisy, coarsened, shifted and mirrored images, so that it answers to content and not to how sharp
    an image is.
    """

    SIDE, WIDTHS, N_FEATURES = 64, (48, 96, 192, 256), 256

    def __init__(self, n_classes):
        super().__init__()
        layers, width = [], 3
        for i, out in enumerate(self.WIDTHS):
            layers += [nn.Conv2d(width, out, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()] * (i > 0)
            width = out
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, n_classes)
        self.accuracy = math.nan         # on images that it has not learned from

    def forward(self, pixels):
        """Pixels in [0, 1] (B, 3, H, W) -> features (B, 256), logits (B, n)."""
        if pixels.shape[-2:] != (self.SIDE, self.SIDE):
            pixels = F.interpolate(pixels, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        features = self.body(normalize(pixels).contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def classify(self, pixels):
        """-> predicted classes (B,)."""
        return self(pixels)[1].argmax(dim=1)


def judge_view(images, generator):
    """uint8 (B, 3, S, S) -> degraded pixels in [0, 1]: what the judge learns from."""
    B, device = len(images), images.device
    u = torch.rand(28, B, generator=generator, device=device)
    pixels = resample(images.float() / 255, draw_boxes(u[:22], (0.8, 1.0)), images.shape[-1], flip=u[22] < 0.5)
    coarse = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    pixels = torch.where((u[23] < 0.3).view(-1, 1, 1, 1), coarse, pixels)
    pixels = gaussian_blur(pixels, torch.where(u[24] < 0.7, 2.5 * u[25], 0.0))
    noise = torch.randn(pixels.shape, generator=generator, device=device)
    return (pixels + 0.1 * u[26].view(-1, 1, 1, 1) * noise).clamp(0, 1)


def train_judge(images, labels, n_classes, device, seed=0, n_steps=200, batch_size=64, lr=3e-3):
    """A Judge of uint8 images (n, 3, S, S) and labels (n,); a fifth of them is kept back, to measure its accuracy."""
    n_train = len(images) * 4 // 5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(n_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    for step in tqdm(range(n_steps), desc="training the judge", unit=" steps", dynamic_ncols=True):
        generator = step_generator(seed, step, device)
        rows = torch.randint(n_train, (batch_size,), generator=generator, device=device).to(images.device)
        pixels = judge_view(images[rows].to(device), generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(judge(pixels)[1].float(), labels[rows].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval().requires_grad_(False)
    predictions = [judge.classify(part.to(device).float() / 255).cpu() for part in images[n_train:].split(256)]
    judge.accuracy = (torch.cat(predictions) == labels[n_train:]).float().mean().item()
    return judge


def open_judge(path, source, n_classes, device, seed=0, most=16384):
    """The judge of a labelled source, from path, or trained now on up to `most` of its images and written there."""
    fingerprint = f"{source.fingerprint()} {n_classes} classes"
    if rank() == 0 and not (os.path.isfile(path) and torch.load(path, weights_only=True)["fingerprint"] == fingerprint):
        canvases, _, labels = load_evaluation_set(source, most, whole=True)
        usable = labels >= 0
        images = torch.cat([(to_image_size(part, Judge.SIDE) * 255).round().byte() for part in canvases[usable].split(256)])
        judge = train_judge(images, labels[usable], n_classes, device, seed)
        content = dict(judge=judge.state_dict(), accuracy=judge.accuracy, fingerprint=fingerprint)
        write_atomically(path, lambda f: torch.save(content, f))
    barrier()
    content, judge = torch.load(path, map_location=device, weights_only=True), Judge(n_classes)
    judge.load_state_dict(content["judge"])
    judge.accuracy = content["accuracy"]
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Images from a DiT
# ----------------------------------------------------------------------------------------------------------------------

def noise_and_labels(indices, seed, shape, num_classes):
    """Noise (n, *shape) and uniformly random labels (n,) of images number `indices`, each from a generator of its own, so
    that image i is the same whatever else is generated and by how many ranks."""
    noise, labels = [], []
    for i in indices:
        generator = step_generator(seed, int(i), "cpu")
        labels.append(torch.randint(num_classes, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(labels)


@torch.no_grad()
def generate(model, tokenizer, stats, noise, labels, args):
    """Pixels in [0, 1] (b, 3, H, W) from noise (b, d, h, w) and labels (b,), on the model's device.

    stats: (mean, std) of the latents; args: precision, steps, method, shift, guidance, interval and channels, as train_dit.py
    has them. The tokenizer decodes in fp32.
    """
    device, (mean, std) = model.pos_embed.device, stats
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        latents = sample(model, noise.to(device), labels.to(device), args.steps, args.method, args.shift, args.guidance, tuple(args.interval), args.channels)
    return denormalize(tokenizer.decode(latents * std + mean)).clamp(0, 1)


def to_uint8(pixels):
    """[0, 1] -> uint8, truncated as the authors' code does."""
    return (pixels * 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

def save_image(image, path):
    """Write a Pillow image as PNG, atomically."""
    write_atomically(path, lambda f: image.save(f, "PNG"))


def image_grid(rows, scale=1, gap=2):
    """Rows of images (lists of (n, 3, H, W) in [0, 1]) -> Pillow image, each row below the last, enlarged by pixels."""
    H, W = rows[0].shape[-2:]
    n = max(len(r) for r in rows)
    sheet = np.full((len(rows) * (H + gap) - gap, n * (W + gap) - gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate((row.clamp(0, 1) * 255).round().byte().cpu().numpy()):
            sheet[y * (H + gap):y * (H + gap) + H, x * (W + gap):x * (W + gap) + W] = image.transpose(1, 2, 0)
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def named_rows(images, names, scale=None, gap=2):
    """Images (rows, n, 3, H, W) in [0, 1] -> Pillow image with a name before each row."""
    scale = scale or max(1, 64 // images.shape[-1])
    grid, font = image_grid(list(images), scale, gap), ImageFont.load_default(13)
    width = int(max(font.getlength(name) for name in names)) + 12
    sheet = Image.new("RGB", (width + grid.width, grid.height), "white")
    sheet.paste(grid, (width, 0))
    for i, name in enumerate(names):
        ImageDraw.Draw(sheet).text((width - 6, ((images.shape[-2] + gap) * i + images.shape[-2] / 2) * scale), name, fill="black", font=font, anchor="rm")
    return sheet


@torch.no_grad()
def reconstruction_picture(model, images, per_row=12):
    """Inputs above reconstructions, in two double rows: images uint8 (n, 3, C, C) -> Pillow image."""
    pixels = to_image_size(images[:2 * per_row].to(model.trunk.cls_token.device), model.config.image_size)
    reconstructions = denormalize(model.decode(model.encode(normalize(pixels))).float())
    halves = [half for pair in zip(pixels.split(per_row), reconstructions.split(per_row)) for half in pair]
    return image_grid(halves, scale=max(1, 64 // model.config.image_size))


def principal_colours(latents, percent=1.0):
    """Latents (B, d, h, w), d >= 3 -> the first three principal components over all their places as colours (B, 3, h, w) in [0, 1].

    Each component runs from black to full between its percentiles `percent` and 100 - percent; its largest weight is positive.
    """
    places = latents.double().movedim(1, -1)                                                    # (B, h, w, d)
    centred = places.flatten(0, 2) - places.flatten(0, 2).mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)                  # (d, 3), the largest first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = (centred @ axes).cpu().numpy()
    low, high = (torch.from_numpy(np.percentile(values, q, axis=0)) for q in (percent, 100 - percent))
    colours = ((torch.from_numpy(values) - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(*places.shape[:3], 3).movedim(-1, 1).float()


@torch.no_grad()
def pca_picture(model, images, per_row=8):
    """Images above the first three principal components of their latents as RGB: images uint8 (n, 3, C, C) -> Pillow image."""
    pixels = to_image_size(images.to(model.trunk.cls_token.device), model.config.image_size)
    colours = F.interpolate(principal_colours(model.encode(normalize(pixels)).float()), pixels.shape[-2:], mode="nearest")
    rows = [row for pair in zip(pixels.split(per_row), colours.split(per_row)) for row in pair]
    return image_grid(rows, scale=max(1, 64 // model.config.image_size))


def worst_median_best(psnrs, n):
    """PSNRs (N,) -> indices (3, n') of the n' worst, middle and best, each from low to high; n' = min(n, N)."""
    order = psnrs.argsort()
    n, middle = min(n, len(order)), (len(order) - min(n, len(order))) // 2
    return torch.stack((order[:n], order[middle:middle + n], order[len(order) - n:]))


def ranked_reconstructions_picture(inputs, reconstructions, psnrs, n=8):
    """The worst, the median and the best reconstructions, each row below its inputs, from low to high PSNR -> Pillow image.

    inputs, reconstructions (N, 3, H, W) in [0, 1]; psnrs (N,) in dB. All that is needed of a large set are its 3 n images of
    worst_median_best: the picture is the same.
    """
    rows, names = [], []
    for which, indices in zip(("worst", "median", "best"), worst_median_best(psnrs, n)):
        low, high = psnrs[indices].min(), psnrs[indices].max()
        rows += [inputs[indices.to(inputs.device)].cpu().float(), reconstructions[indices.to(reconstructions.device)].cpu().float()]
        names += [f"{which}: inputs", f"{low:.1f} dB" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} dB"]
    return named_rows(torch.stack(rows), names)


COLOURS = ("#1f6fb4", "#d9641e", "#2e9a4b", "#b8332f", "#7d55b0", "#8a6d3b", "#c2569b", "#5f6a72")


def draw_chart(lines, title, x_label="", y_label="", log_x=False, size=(440, 300)):
    """Lines {name: (xs, ys)} -> Pillow image with ticks, labels and a legend (if there is more than one line, or dashes).

    A name that starts with "chance" is drawn dashed and grey.
    """
    image = Image.new("RGB", size, "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(14), ImageFont.load_default(11)
    left, top, right, bottom = 52, 28, size[0] - 12, size[1] - 40
    points = [(x, y) for xs, ys in lines.values() for x, y in zip(xs, ys) if math.isfinite(y) and (x > 0 or not log_x)]
    draw.text((left, 6), title, fill="black", font=font)
    if not points:
        draw.text((left + 10, top + 10), "no data", fill="grey", font=small)
        return image
    place = math.log10 if log_x else float
    x_low, x_high = (f(place(x) for x, _ in points) for f in (min, max))
    y_low, y_high = (f(y for _, y in points) for f in (min, max))
    if log_x:       # out to a round number on each side, so that there are ticks
        marks = [e + math.log10(m) for e in range(math.floor(x_low) - 1, math.ceil(x_high) + 1) for m in (1, 2, 5)]
        x_low, x_high = max(m for m in marks if m < x_low + 1e-9), min(m for m in marks if m > x_high - 1e-9)
    x_high += (x_high == x_low)
    margin = 0.05 * (y_high - y_low) or max(abs(y_high), 1) * 0.05
    y_low, y_high = y_low - margin, y_high + margin * (1 if len(lines) == 1 else 1 + 1.5 * len(lines))      # room for the legend

    def at(x, y):
        return (left + (place(x) - x_low) / (x_high - x_low) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top))
    for y in nice_ticks(y_low, y_high):
        draw.line([(left, at(points[0][0], y)[1]), (right, at(points[0][0], y)[1])], fill="#e4e4e4")
        draw.text((left - 5, at(points[0][0], y)[1]), f"{y:.4g}", fill="#444444", font=small, anchor="rm")
    if log_x:
        ticks = [m * 10.0 ** e for e in range(math.floor(x_low), math.ceil(x_high) + 1) for m in ((1, 2, 5) if x_high - x_low < 2 else (1,))]
        ticks = [t for t in ticks if x_low <= math.log10(t) <= x_high]
    else:
        ticks = nice_ticks(x_low, x_high)
    for x in ticks:
        draw.line([(at(x, 0)[0], bottom), (at(x, 0)[0], bottom + 4)], fill="#444444")
        draw.text((at(x, 0)[0], bottom + 6), short_number(x), fill="#444444", font=small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#444444")
    draw.text(((left + right) / 2, size[1] - 4), x_label, fill="#444444", font=small, anchor="mb")
    draw.text((right, 8), y_label, fill="#444444", font=small, anchor="ra")
    colours, legend = iter(COLOURS * 3), []
    for name, (xs, ys) in lines.items():
        is_chance = name.startswith("chance")
        colour = "#999999" if is_chance else next(colours)
        path = [at(x, y) for x, y in zip(xs, ys) if math.isfinite(y) and (x > 0 or not log_x)]
        if is_chance:
            path = [(x, np.interp(x, *zip(*path))) for x in np.arange(path[0][0], path[-1][0], 4)] if len(path) > 1 else path
        for a, b in list(zip(path, path[1:]))[::2 if is_chance else 1]:
            draw.line([a, b], fill=colour, width=1 if is_chance else 2)
        if len(path) <= 12 and not is_chance:
            for x, y in path:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        legend.append((name, colour))
    if len(legend) > 1:
        width = max(draw.textlength(name, font=small) for name, _ in legend) + 24
        # on the side where the lines leave more room at the top
        near_top = [x for x, y in (at(*p) for p in points) if y < top + 15 * len(legend)]
        is_left = 2 * sum(x < (left + right) / 2 for x in near_top) < len(near_top)
        x0 = left + 6 if is_left else right - width
        for i, (name, colour) in enumerate(legend):
            y0 = top + 8 + 15 * i
            draw.line([(x0, y0), (x0 + 14, y0)], fill=colour, width=2)
            draw.text((x0 + 19, y0), name, fill="#222222", font=small, anchor="lm")
    return image


def nice_ticks(low, high, n=5):
    """Round numbers between low and high, about n of them."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short_number(x):
    """1500 -> 1.5k, 2e9 -> 2G, 3e15 -> 3P, 4e21 -> 4e+21."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= abs(x) * (1 + 1e-9) < 1000 * limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def read_metrics(run):
    """The rows of a run's metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


TRAINING_PANELS = (   # title, unit, kind of row, {name on the chart: field}
    ("objectives", "", "train", {"L_clip": "loss_clip", "L_dino": "loss_dino", "L_mim": "loss_mim"}),
    ("reconstruction loss", "L1 (+ LPIPS)", "train", {"L_rec": "loss_rec"}),
    ("held-out reconstruction", "PSNR, dB", "eval", {"PSNR": "psnr"}),
    ("held-out retrieval", "top-1", "eval", {"image to text": "image_to_text", "text to image": "text_to_image", "chance": "retrieval_chance"}),
    ("class from latents", "balanced accuracy", "eval", {"linear": "latent_linear", "k-NN": "latent_knn", "chance": "accuracy_chance"}),
    ("teacher", "nats", "train", {"entropy of its targets": "teacher_entropy", "chance (uniform)": "teacher_entropy_uniform"}),
)


def training_curves(run):
    """The curves of a tokenizer's run against samples seen, from its metrics.jsonl -> Pillow image; empty panels are left out."""
    rows, charts = read_metrics(run), []
    for title, unit, kind, names in TRAINING_PANELS:
        lines = {}
        for name, field in names.items():
            points = [(r["samples"], r[field]) for r in rows if r["kind"] == kind and r.get(field) is not None]
            if points:
                lines[name] = tuple(zip(*points))
        if any(not name.startswith("chance") for name in lines):
            charts.append(draw_chart(lines, title, "samples seen", unit))
    columns = min(3, len(charts))
    sheet = Image.new("RGB", (columns * 440, -(-len(charts) // columns) * 300), "white")
    for i, chart in enumerate(charts):
        sheet.paste(chart, (i % columns * 440, i // columns * 300))
    return sheet


PAPER_PANELS = (   # title, unit, field of a row of kind eval, the field that holds what chance gives; {} is the row's fid_features
    ("generation", "gFID ({} features)", "gfid", None),
    ("reconstruction", "rFID ({} features)", "rfid", None),
    ("linear probe on latents", "top-1", "linear_probe", None),
    ("class from latents", "balanced accuracy", "latent_linear", "accuracy_chance"),
    ("zero-shot classes", "top-1", "zero_shot_top1", "zero_shot_chance"),
    ("image to text retrieval", "top-1", "image_to_text", "retrieval_chance"),
    ("pixels", "PSNR, dB", "psnr", None),
)


def measured_points(rows, field, fid_features=None):
    """(FLOPs, values) of the rows that have a field, by FLOPs, of two at the same FLOPs the later one; fid_features: only rows in these."""
    values = {r["flops"]: r[field] for r in rows if r.get(field) is not None and fid_features in (None, r.get("fid_features", "unnamed"))}
    return tuple(zip(*sorted(values.items()))) or ((), ())


def plot_runs(runs, width=900, height=290):
    """The paper's figures: what was measured of runs against training FLOPs -> Pillow image, one line for each run (folder).

    From the rows of kind eval of their metrics.jsonl with flops > 0; a panel that no run has is left out, and distances in
    different features get panels of their own. Raises ValueError if no run has such a row.
    """
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    names = [name if names.count(name) == 1 else run for name, run in zip(names, runs)]
    rows = {name: [r for r in read_metrics(run) if r["kind"] == "eval" and r.get("flops", 0) > 0] for name, run in zip(names, runs)}
    everything, panels = [r for run_rows in rows.values() for r in run_rows], []
    for title, unit, field, chance_field in PAPER_PANELS:
        measured = [r for r in everything if r.get(field) is not None]
        for features in sorted({r.get("fid_features", "unnamed") for r in measured}) if "{}" in unit else [None] * bool(measured):
            lines = {name: measured_points(run_rows, field, features) for name, run_rows in rows.items()}     # also runs without points: colours stay the same
            chance = measured_points(everything, chance_field)
            if len(set(chance[1])) == 1:
                lines["chance"] = chance
            panels.append((lines, title, unit.format(features)))
    if not panels:
        raise ValueError(f"nothing to plot: no row of kind eval with flops and a measure in metrics.jsonl of {', '.join(map(str, runs))}; "
                         "evaluate their tokenizers first")
    n_columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    size = (min(width // n_columns, 450), height)
    sheet = Image.new("RGB", (size[0] * n_columns, height * -(-len(panels) // n_columns)), "white")
    for i, (lines, title, unit) in enumerate(panels):
        sheet.paste(draw_chart(lines, title, "training FLOPs", unit, log_x=True, size=size), (i % n_columns * size[0], i // n_columns * height))
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, name, default, help, **kwargs):
        kwargs.setdefault("type", type(default) if default is not None else str)
        group.add_argument(name, default=default, help=f"{help} [{default}]".replace("%", "%%"), **kwargs)
    g = parser.add_argument_group("what is measured")
    add(g, "--tokenizer", "runs/tokenizer", "a run of train_tokenizer.py, a released folder, or a hub id")
    add(g, "--dit", None, "a run of train_dit.py, whose samples are measured; default: runs/dit, if --tokenizer is the one it was trained on")
    add(g, "--samples", None, "a folder of images or a .npz with arr_0, instead of --tokenizer and --dit")
    add(g, "--images", None, "a folder of one's own images: their reconstructions alone")
    add(g, "--plot", None, "draw the paper's figures for these runs, and do nothing else", nargs="+")
    g = parser.add_argument_group("data; by default what the run in --tokenizer was trained on")
    add(g, "--data", None, "training set, from which probes learn and to which samples are compared")
    add(g, "--val_data", None, "held-out set")
    add(g, "--label", None, "tars: where the class is")
    add(g, "--classnames", None, "a file with a class name on each line")
    add(g, "--templates", None, "a file with a zero-shot template on each line, such as 'a photo of a {}'; default: a small set of ours")
    add(g, "--train_size", None, "how many scenes the built-in set has", type=int)
    add(g, "--bpe", None, "path of CLIP's vocabulary")
    add(g, "--image_size", None, "side in pixels; default: the tokenizer's own", type=int)
    add(g, "--n_val", 2048, "held-out images (the paper: 50,000)")
    add(g, "--n_train", 8192, "training images: for probes, and as reference of samples")
    add(g, "--n_samples", 1024, "images generated by --dit (the paper: 50,000; 10,000 in ablations)")
    add(g, "--reference", None, "what samples are compared with: a folder, a .npz of images (arr_0) or of statistics (mu, sigma); default: --n_train training images")
    g = parser.add_argument_group("how")
    add(g, "--fid_features", None, "inception: FID proper; judge: a small classifier trained on the labelled set itself, for data that Inception does not know; "
        "none. Default: judge for the built-in set, else inception", choices=("inception", "judge", "none"))
    add(g, "--inception", "auto", "path of pt_inception-2015-12-05-6726825d.pth; auto fetches it")
    add(g, "--lpips", None, "auto fetches the two files, a folder holds them, none leaves it out; default: none for the built-in set, else auto")
    for name, kind in (("steps", int), ("method", str), ("shift", float), ("guidance", float)):
        add(g, f"--{name}", None, "of the sampler; default: as the run in --dit", type=kind, **(dict(choices=METHODS) if name == "method" else {}))
    add(g, "--seed", 0, "of samples, and of the split on which probes choose their penalty")
    add(g, "--batch_size", 128, "images together, and in each file of kept features")
    add(g, "--out", None, "folder; default: evaluation/ in --tokenizer, or runs/evaluation")
    return parser


def parse_args(argv=None):
    """Arguments, completed from the runs they name, and checked: whatever is wrong with them ends the program here."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        complete_args(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    return args


def recorded_arguments(run):
    """The arguments of a run, from its run.json; {} for a folder without one."""
    path = os.path.join(run, "run.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)["arguments"]


def complete_args(args):
    """Fill in what was not given. Raises ValueError, FileNotFoundError or RuntimeError that says what to change."""
    for name in ("n_val", "n_train", "n_samples", "batch_size"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be positive")
    is_local = os.path.isdir(args.tokenizer)
    if args.out is None:
        args.out = os.path.join(args.tokenizer, "evaluation") if is_local and not args.samples and not args.plot else "runs/evaluation"
    for path in args.plot or ():
        if not os.path.isfile(os.path.join(path, "metrics.jsonl")):
            raise FileNotFoundError(f"--plot {path}: no metrics.jsonl there, so it is no run")
    if args.plot or (args.samples and args.reference):
        args.fid_features = args.fid_features or "inception"
        if args.samples and args.fid_features != "inception":
            raise ValueError("--samples with --reference are compared in Inception features; for the judge's, leave --reference out and give --data")
        return
    if args.tokenizer == "runs/tokenizer" and not is_local:
        raise FileNotFoundError("there is no tokenizer in runs/tokenizer yet. First: python train_tokenizer.py (or give --tokenizer WHERE)")
    if args.dit is None and os.path.isfile("runs/dit/checkpoint.pt") and recorded_arguments("runs/dit").get("tokenizer") == args.tokenizer:
        args.dit = "runs/dit"
    if args.dit is not None and not os.path.isfile(os.path.join(args.dit, "checkpoint.pt")):
        raise FileNotFoundError(f"--dit {args.dit}: no checkpoint.pt there, so it is no run of train_dit.py")
    of_tokenizer, of_dit = recorded_arguments(args.tokenizer), recorded_arguments(args.dit) if args.dit else {}
    if args.data is None:
        for name in ("data", "val_data", "label", "classnames"):
            if getattr(args, name) is None:
                setattr(args, name, of_tokenizer.get(name))
    args.label, args.bpe = args.label or "cls", args.bpe or of_tokenizer.get("bpe")
    args.train_size = args.train_size or of_dit.get("train_size") or of_tokenizer.get("train_size") or 8192
    args.fid_features = args.fid_features or ("judge" if args.data is None else "inception")
    args.lpips = args.lpips or ("none" if args.data is None else "auto")
    args.judge = os.path.join(of_dit.get("cache") or args.out, "judge.pt")
    for name, fallback in (("steps", 250), ("method", "euler"), ("shift", 1.0), ("guidance", 1.0), ("interval", [0.0, 1.0]), ("channels", None), ("precision", "bf16")):
        if getattr(args, name, None) is None:
            setattr(args, name, of_dit.get(name, fallback))
    if args.data is not None and args.val_data is None and not args.images and not args.samples:
        raise ValueError("--data without --val_data: say which held-out images to measure on")
    for path in (args.data, args.val_data):
        if path is not None and not os.path.isdir(path):
            data.find_tars(path)
    for name in ("images", "classnames", "templates"):
        if getattr(args, name) is not None and not os.path.exists(getattr(args, name)):
            raise FileNotFoundError(f"--{name} {getattr(args, name)}: no such place")
    if args.lpips not in ("auto", "none") and not os.path.isdir(args.lpips):
        raise FileNotFoundError(f"--lpips {args.lpips}: neither 'auto' nor 'none' nor a folder")
    if args.inception != "auto" and not os.path.isfile(args.inception):
        raise FileNotFoundError(f"--inception {args.inception}: no such file")


def file_digest(folder):
    """A fingerprint of a tokenizer: of the bytes of its config and weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with open(os.path.join(folder, name), "rb") as f:
            while chunk := f.read(2 ** 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def open_fid_network(args, source, n_classes, device):
    """The network that Frechet distances are computed in, or None. RuntimeError that says what to do where Inception cannot be had."""
    if args.fid_features == "inception":
        try:
            return first_on_node(lambda: InceptionFID(args.inception)).to(device)
        except (RuntimeError, FileNotFoundError) as error:
            raise RuntimeError(f"{error} Or measure in the features of a classifier of your own data, which are no FID and are named so: "
                               "--fid_features judge; or leave these figures out: --fid_features none") from error
    if args.fid_features == "judge":
        if n_classes == 0:
            raise RuntimeError("a judge needs classes, and the training data has none: --fid_features inception or none")
        return open_judge(args.judge, source, n_classes, device)
    return None


def open_lpips(args, device):
    """LPIPS, or None for --lpips none. RuntimeError that says what to do where its files cannot be had."""
    if args.lpips == "none":
        return None
    try:
        return first_on_node(lambda: LPIPS(args.lpips)).to(device)
    except RuntimeError as error:
        raise RuntimeError(f"{error} Or leave LPIPS out: --lpips none") from error


def fid_features(network, images):
    """uint8 images (B, 3, H, W) -> {pool (B, D), logits (B, K)} and, of Inception, spatial (B, 2023)."""
    if isinstance(network, InceptionFID):
        return dict(zip(("pool", "spatial", "logits"), network(images)))
    return dict(zip(("pool", "logits"), network(images.float() / 255)))


def statistics_of(features):
    """Features (n, D) -> FeatureStatistics."""
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(1024):
        statistics.update(part)
    return statistics


def distance_of(a, b):
    """Frechet distance of two FeatureStatistics, or of one and (mu, sigma)."""
    moments = lambda x: (x.mean, x.covariance) if isinstance(x, FeatureStatistics) else x
    return frechet_distance(*moments(a), *moments(b))


class Measuring:
    """What all parts of an evaluation share: models, data, and where features are kept."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        folder = first_on_node(lambda: find_checkpoint(args.tokenizer))
        self.model = VTP.from_pretrained(folder).to(device).eval()
        self.size = args.image_size or self.model.config.image_size
        common = dict(classnames=args.classnames, label=args.label, needs_caption=False)
        self.source = data.open_source(args.data, self.size, "train", args.train_size, **common)
        self.val_source = None
        if args.data is None or args.val_data is not None:
            self.val_source = data.open_source(args.val_data, self.size, "val", **common, folders=getattr(self.source, "folders", None))
        self.gallery = load_evaluation_set(self.source, args.n_train, whole=True)
        self.n_classes = max(int(self.gallery[2].max()) + 1, len(self.source.class_names or ()))
        self.network = open_fid_network(args, self.source, self.n_classes, device)
        digest = f"{self.network.accuracy:.6f}" if isinstance(self.network, Judge) else ""
        self.fingerprint = f"{file_digest(folder)} {self.size} px, {args.fid_features} {digest}, batches of {args.batch_size}"

    def chunks(self, name, n, compute, fingerprint=""):
        """Features of n images in chunks of --batch_size, kept in --out: compute gets a range of numbers."""
        size, folder = self.args.batch_size, os.path.join(self.args.out, "features", name)
        return cached_features(folder, f"{self.fingerprint} {n} {fingerprint}", -(-n // size), lambda k: compute(range(k * size, min(n, (k + 1) * size))), name)

    def features_of_training_images(self):
        def compute(numbers):
            canvases = self.gallery[0][numbers.start:numbers.stop].to(self.device)
            features = probe_features(self.model, normalize(to_image_size(canvases, self.size)))[0]
            return features | (fid_features(self.network, canvases) if self.network is not None else {})
        return self.chunks("training images", len(self.gallery[0]), compute, self.source.fingerprint())


@torch.no_grad()
def reconstruct(model, canvases, size, lpips=None):
    """uint8 (B, 3, S, S) -> reconstructions in [0, 1], and {psnr, ssim and, with its network, lpips}: (B,) each (METHOD section 7)."""
    pixels = to_image_size(canvases, size)
    reconstructions = denormalize(model.decode(model.encode(normalize(pixels)))).clamp(0, 1)
    measured = dict(psnr=psnr(reconstructions, pixels), ssim=ssim(reconstructions, pixels))
    return reconstructions, measured | (dict(lpips=lpips(2 * reconstructions - 1, 2 * pixels - 1)) if lpips is not None else {})


def measure_tokenizer(m):
    """Reconstruction and understanding on held-out images -> dict of figures; pictures in --out."""
    args, model, config = m.args, m.model, m.model.config
    images, captions, labels = load_evaluation_set(m.val_source, args.n_val, whole=True)
    lpips = open_lpips(args, m.device) if config.train_reconstruction else None
    tokenize = data.make_tokenizer(config.text_vocab_size, args.bpe) if config.train_clip else None

    @torch.no_grad()
    def compute(numbers):
        canvases = images[numbers.start:numbers.stop].to(m.device)
        features, cls, patches = probe_features(model, normalize(to_image_size(canvases, m.size)))
        if config.train_reconstruction:
            reconstructions, measured = reconstruct(model, canvases, m.size, lpips)
            features.update(measured)
            if m.network is not None:       # both in 8 bits, the reconstruction truncated (the authors)
                features.update({f"real_{k}": v for k, v in fid_features(m.network, canvases).items()})
                features.update({f"rec_{k}": v for k, v in fid_features(m.network, to_uint8(reconstructions)).items()})
        if tokenize is not None:
            features["image_features"] = F.normalize(model.project_image(cls, patches).float(), dim=-1)
            tokens = tokenize(captions[numbers.start:numbers.stop], config.text_context_length).to(m.device)
            features["text_features"] = model.encode_text(tokens).float()
        return features
    ours = m.chunks("held-out images", len(images), compute, f"{m.val_source.fingerprint()} {args.lpips}")
    row = {k: ours[k].mean().item() for k in ("psnr", "ssim", "lpips") if k in ours}
    if "real_pool" in ours:
        row["rfid"] = distance_of(statistics_of(ours["real_pool"]), statistics_of(ours["rec_pool"]))
        if "real_spatial" in ours:
            row["rsfid"] = distance_of(statistics_of(ours["real_spatial"]), statistics_of(ours["rec_spatial"]))
    row.update(measure_understanding(m, ours, captions, labels, tokenize))
    if rank() == 0:
        draw_tokenizer(m, images, ours)
    return row


def measure_understanding(m, ours, captions, labels, tokenize):
    """Retrieval, zero-shot, linear probes and k-NN from features of held-out images (and of the training images, for probes)."""
    args, row, has_label = m.args, {}, labels >= 0
    if tokenize is not None and any(captions):
        row.update(retrieval(ours["image_features"], ours["text_features"], captions))
    names = m.source.class_names
    if tokenize is not None and names and has_label.any():
        templates = data.TEMPLATES
        if args.templates:
            with open(args.templates, encoding="utf-8") as f:
                templates = [line.strip() for line in f if line.strip()]
        row.update(zero_shot(m.model, ours["image_features"][has_label], labels[has_label], names, templates, tokenize))
    is_known = m.gallery[2] >= 0
    if has_label.any() and is_known.any():
        known, train_labels, test_labels = m.features_of_training_images(), m.gallery[2][is_known], labels[has_label]
        for name in ("latents", "dino_1", "dino_4"):
            train, test = known[name][is_known], ours[name][has_label]
            prefix = "" if name == "latents" else f"{name}_"
            row.update({prefix + k: v for k, v in linear_probe(train, train_labels, test, test_labels, seed=args.seed).items()})
            row[prefix + "knn"] = (knn_predict(train, train_labels, test) == test_labels).float().mean().item()
        row["chance"] = 1 / m.n_classes
    return row


def draw_tokenizer(m, images, ours):
    """Reconstructions, the worst and the median ones among them, and latents as colours."""
    out, device = m.args.out, m.device
    save_image(pca_picture(m.model, images[:16]), os.path.join(out, "latents_pca.png"))
    if "psnr" in ours:
        chosen = worst_median_best(ours["psnr"], 8).flatten()
        reconstructions = reconstruct(m.model, images[chosen].to(device), m.size)[0]
        picture = ranked_reconstructions_picture(to_image_size(images[chosen], m.size), reconstructions.cpu(), ours["psnr"][chosen])
        save_image(picture, os.path.join(out, "reconstructions.png"))


def compare_samples(network, fake, real, reference):
    """Features of samples -> gFID, Inception score and, with features or statistics of a reference, sFID, precision and recall."""
    row = dict(zip(("inception_score", "inception_score_std"), inception_score(fake["logits"], splits=min(10, len(fake["logits"])))))
    for name, figure, keys in (("pool", "gfid", ("mu", "sigma")), ("spatial", "sfid", ("mu_s", "sigma_s"))):
        if name in fake and (real is not None or keys[0] in reference):
            other = statistics_of(real[name]) if real is not None else tuple(reference[k] for k in keys)
            row[figure] = distance_of(statistics_of(fake[name]), other)
    if real is not None:
        row["precision"], row["recall"] = precision_recall(real["pool"], fake["pool"])
    return row


def open_reference(args, network, device, chunks):
    """--reference -> (features of its images or None, statistics or None)."""
    if args.reference.endswith(".npz"):
        with zipfile.ZipFile(args.reference) as archive:
            if "arr_0.npy" not in archive.namelist():
                return None, load_statistics(args.reference)
    return features_of_set(args.reference, network, device, chunks, "reference"), None


def features_of_set(where, network, device, chunks, name):
    """Features of a folder or .npz of images."""
    images = ImageSet(where)
    return chunks(name, len(images), lambda numbers: fid_features(network, torch.stack([images[i] for i in numbers]).to(device)), os.path.abspath(where))


def measure_dit(m):
    """Samples of --dit, generated as they are needed -> dict of figures; a grid by class in --out."""
    args, device = m.args, m.device
    model = DiT.from_lightningdit(os.path.join(args.dit, "checkpoint.pt")).to(device).eval()
    stats = tuple(x.to(device) for x in data.read_latent_stats(os.path.join(args.dit, "latents_stats.pt")))
    shape = (model.in_channels, model.input_size, model.input_size)

    def compute(numbers):
        noise, labels = noise_and_labels(numbers, args.seed, shape, model.num_classes)
        images = to_uint8(generate(model, m.model, stats, noise, labels, args))
        return dict(fid_features(m.network, images), labels=labels)
    settings = f"{args.method} {args.steps} {args.shift} {args.guidance} {args.interval} {args.channels} {args.seed} {os.path.getmtime(os.path.join(args.dit, 'checkpoint.pt'))}"
    fake = m.chunks("samples", args.n_samples, compute, settings)
    real, reference = (m.features_of_training_images(), None) if args.reference is None else open_reference(args, m.network, device, m.chunks)
    row = compare_samples(m.network, fake, real, reference)
    if isinstance(m.network, Judge):
        row.update(sample_accuracy=(fake["logits"].argmax(dim=1) == fake["labels"]).float().mean().item(), real_accuracy=m.network.accuracy)
    if rank() == 0:
        save_image(sample_picture(model, m.model, stats, m.source.class_names, args), os.path.join(args.out, "samples.png"))
    return row


def sample_picture(model, tokenizer, stats, class_names, args, per_class=8, most_classes=12):
    """The same noise at every call, one row for each of the first classes -> Pillow image with class names."""
    n_rows = min(model.num_classes, most_classes)
    noise, _ = noise_and_labels(range(n_rows * per_class), args.seed, (model.in_channels, model.input_size, model.input_size), 1)
    images = generate(model, tokenizer, stats, noise, torch.arange(n_rows).repeat_interleave(per_class), args)
    return named_rows(images.unflatten(0, (n_rows, per_class)), [class_names[i] if class_names else f"class {i}" for i in range(n_rows)])


TABLE = (   # heading, {field: (label, format)}; {} is the feature network
    ("reconstruction, held-out images", {"rfid": ("rFID ({})", "{:.3f}"), "rsfid": ("rsFID ({})", "{:.3f}"), "psnr": ("PSNR, dB", "{:.2f}"),
                                        "ssim": ("SSIM (data range 1)", "{:.4f}"), "lpips": ("LPIPS (VGG)", "{:.4f}")}),
    ("understanding, held-out images", {
        "zero_shot_top1": ("zero-shot top-1", "{:.1%}"), "zero_shot_top5": ("zero-shot top-5", "{:.1%}"), "image_to_text": ("image to text, top-1", "{:.1%}"),
        "text_to_image": ("text to image, top-1", "{:.1%}"), "linear_probe": ("linear probe, latents", "{:.1%}"),
        "linear_probe_balanced": ("  mean over classes", "{:.1%}"), "knn": ("k-NN, latents", "{:.1%}"),
        "dino_1_linear_probe": ("linear probe, DINO-style, last layer", "{:.1%}"), "dino_4_linear_probe": ("linear probe, DINO-style, last 4", "{:.1%}"),
        "dino_1_knn": ("k-NN, DINO-style, last layer", "{:.1%}"), "chance": ("chance (classes)", "{:.1%}"), "retrieval_chance": ("chance (retrieval)", "{:.2%}")}),
    ("generation", {"gfid": ("gFID ({})", "{:.3f}"), "sfid": ("sFID ({})", "{:.3f}"), "inception_score": ("Inception score ({})", "{:.2f}"),
                    "precision": ("precision ({}, k = 3)", "{:.3f}"), "recall": ("recall ({}, k = 3)", "{:.3f}"),
                    "sample_accuracy": ("samples of their class, by the judge", "{:.1%}"), "real_accuracy": ("real images of their class, by the judge", "{:.1%}")}),
)


def table(row):
    """The figures of a row as lines of text; each names the network of its features."""
    lines = []
    for heading, fields in TABLE:
        there = [(label.format(row.get("fid_features")), shown.format(row[field]), field) for field, (label, shown) in fields.items() if row.get(field) is not None]
        if there:
            lines += [heading] + [f"  {label:<42}{value:>9}" + (f"  +- {row['zero_shot_interval']:.1%} (95 %)" if field == "zero_shot_top1" else "")
                                  for label, value, field in there]
    return "\n".join(lines)


def own_images(args, device):
    """--images: reconstruct a folder's images -> figures; the picture in --out. (Every rank does all: such folders are small.)"""
    model = VTP.from_pretrained(first_on_node(lambda: find_checkpoint(args.tokenizer))).to(device).eval()
    size, lpips = args.image_size or model.config.image_size, open_lpips(args, device)
    images = ImageSet(args.images, size)
    inputs, outputs, measured = [], [], []
    for start in tqdm(range(0, len(images), args.batch_size), desc="reconstructing", unit=" batches", disable=rank() != 0, dynamic_ncols=True):
        canvases = torch.stack([images[i] for i in range(start, min(len(images), start + args.batch_size))])
        reconstructions, figures = reconstruct(model, canvases.to(device), size, lpips)
        measured.append(figures)
        inputs.append(canvases[:24])                     # a picture shows no more
        outputs.append(reconstructions[:24].cpu())
    figures = {k: torch.cat([f[k].cpu() for f in measured]) for k in measured[0]}
    rows = [half for pair in zip((torch.cat(inputs)[:24].float() / 255).split(8), torch.cat(outputs)[:24].split(8)) for half in pair]
    if rank() == 0:
        save_image(image_grid(rows, scale=max(1, 128 // size)), os.path.join(args.out, "reconstructions.png"))
    return {k: v.mean().item() for k, v in figures.items()} | dict(n_images=len(images))


def sample_set(args, device):
    """--samples: a folder or .npz against --reference, or against the training set in the judge's features."""
    if args.reference is None:
        m = Measuring(args, device)
        network, chunks, real, reference = m.network, m.chunks, m.features_of_training_images(), None
    else:
        network = open_fid_network(args, None, 0, device)
        chunks = lambda name, n, compute, fingerprint: cached_features(
            os.path.join(args.out, "features", name), f"inception {n} {fingerprint} {args.batch_size}", -(-n // args.batch_size),
            lambda k: compute(range(k * args.batch_size, min(n, (k + 1) * args.batch_size))), name)
        real, reference = open_reference(args, network, device, chunks)
    return compare_samples(network, features_of_set(args.samples, network, device, chunks, "samples"), real, reference)


def run(args, device):
    """Measure as the arguments say -> the row of figures."""
    if args.images:
        return own_images(args, device)
    if args.samples:
        return sample_set(args, device)
    m = Measuring(args, device)
    row = measure_tokenizer(m)
    if args.dit is not None and m.network is not None:
        row.update(measure_dit(m))
    return row


def main(argv=None):
    """The command."""
    device = init_distributed()
    args = parse_args(argv)
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
    barrier()
    if args.plot:
        path = os.path.join(args.out, "figures.png")
        if rank() == 0:
            try:
                save_image(plot_runs(args.plot), path)
            except ValueError as error:
                raise SystemExit(f"evaluate.py: {error}") from None
            print(path)
        return
    try:
        row = run(args, device) | dict(fid_features=args.fid_features)
    except RuntimeError as error:
        if "--fid_features" not in str(error) and "--lpips" not in str(error):
            raise
        raise SystemExit(f"evaluate.py: {error}") from None
    if rank() == 0:
        print(table(row))
        record = dict(figures=row, arguments=vars(args))
        write_atomically(os.path.join(args.out, "results.json"), lambda f: f.write(json.dumps(record, indent=2).encode() + b"\n"))
        metrics = os.path.join(args.tokenizer, "metrics.jsonl")
        if not args.samples and not args.images and os.path.isfile(metrics):
            last = [r for r in read_metrics(args.tokenizer) if r["kind"] == "train"][-1]
            with open(metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps({"kind": "eval", **{k: last[k] for k in ("step", "samples", "flops")}, **row}) + "\n")
        print(f"results and pictures in {args.out}")
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
