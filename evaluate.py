"""
Everything that is measured, and every picture.

The tokenizer of `python train_tokenizer.py` and, if there is one, the DiT of `python train_dit.py`:
    python evaluate.py
Any tokenizer on any data; several ranks (torchrun --nproc_per_node=8 ...) give the same numbers:
    python evaluate.py --tokenizer MiniMaxAI/VTP-Large-f16d64 --data imagenet/train \\
        --val_data imagenet/val --n_val 50000
Samples, a folder or a .npz with arr_0, against a reference (the same, or the statistics of an ADM batch):
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
One's own images through a tokenizer; the paper's figures for several runs:
    python evaluate.py --images my_photos
    python evaluate.py --plot runs/tokenizer runs/ae
The paper's finding in small: tokenizers of four kinds and four levels of compute, and a DiT on each:
    python evaluate.py --study runs/study --hours 2

It prints a table and leaves results.json and pictures in --out. A DiT of texts is measured on held-out
captions: do they find their images, and of the built-in set, do images show the shape, colour, size, place
and background that their captions name.
"""
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import (IMAGE_EXTENSIONS, EvaluationSet, draw_boxes, gaussian_blur, load_canvas, permutation,
                  resample, step_generator)
from dit import METHODS, SAMPLING, DiT, generate, noise_and_labels
from losses import (LPIPS, barrier, by_first_rank, fail, first_on_node, gather_at_first, gather_objects,
                    in_turn, init_distributed, leave_distributed, one_line_errors, rank, world_size)
from vtp import (VTP, UserError, check_zip, claim_folder, denormalize, download, find_checkpoint,
                 load_tensors, normalize, parse_json, release_folder, write_atomically)

# ----- Metrics --------------------------------------------------------------------------------------------

def psnr(images, references):
    """Peak signal-to-noise ratio in dB: two batches (B, C, H, W) in [0, 1] -> (B,)."""
    mse = ((images.float() - references.float()) ** 2).flatten(1).mean(dim=1)
    return 10 * torch.log10(1 / mse)


def ssim(images, references, data_range=1.0, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004): two batches (B, C, H, W) from 0 to data_range -> (B,).
    The mean over channels and Gaussian windows inside the image; in float64, as E[x^2] - E[x]^2 cancels."""
    if images.shape != references.shape or images.ndim != 4 or min(images.shape[-2:]) < window:
        raise ValueError(f"SSIM needs two (B, C, H, W) of at least {window} px: "
                         f"got {images.shape} and {references.shape}")
    weights = torch.exp(-0.5 * ((torch.arange(window).double() - window // 2) / sigma) ** 2)
    weights = (weights / weights.sum()).to(images.device)

    def windows(n):  # (n - window + 1, n): row i starts at pixel i
        return torch.stack([F.pad(weights, (i, n - window - i)) for i in range(n - window + 1)])
    rows, columns = map(windows, images.shape[-2:])
    x, y = images.double(), references.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (rows @ z @ columns.T for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, covariance = mean_xx - mean_x ** 2, mean_yy - mean_y ** 2, mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3)).float()


def mean_and_covariance(features):
    """Features (n, D), n at least 2 -> float64 arrays: mean (D,), unbiased covariance (D, D)."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, and there were {len(features)}")
    features = torch.as_tensor(features).double().cpu().numpy()
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def load_statistics(path):
    """An .npz of pytorch-fid or ADM -> dict of float64 mu, sigma and, where present, mu_s and sigma_s."""
    found = load_arrays(path, ("mu", "sigma"), ("mu_s", "sigma_s"))
    return {name: x.astype(np.float64) for name, x in found.items()}


def load_arrays(path, needed, others=()):
    """An .npz -> {name: array}. ValueError names a file that is broken, or lacks what is needed."""
    try:
        check_zip(path)
        with np.load(path) as archive:
            if not set(needed) <= set(archive.files):
                raise ValueError(f"it holds no {' and '.join(needed)}, but {', '.join(archive.files)}")
            found = {name: archive[name] for name in (*needed, *others) if name in archive}
            if not all(isinstance(x, np.ndarray) for x in found.values()):  # NumPy gives others as bytes
                raise ValueError("an entry is no array")
            return found
    except FileNotFoundError:
        raise
    except Exception as error:  # on broken bytes zipfile and NumPy raise almost anything
        raise ValueError(f"{path} cannot be read: {error}") from error


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians; the FID, if of Inception's pool3 (Heusel et al. 2017).
    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of mu (D,), sigma (D, D) -> float, at least 0.
    The trace of the root is the sum of the singular values of A1^T A2, where sigma = A A^T: accurate also for
    few samples, which a matrix root is not."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"different features: {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics with NaN or infinity have no Frechet distance: look for broken images")

    def factor(sigma):  # A (D, rank)
        values, vectors = np.linalg.eigh(sigma)
        is_kept = values > values[-1] * len(sigma) * np.finfo(np.float64).eps
        return vectors[:, is_kept] * np.sqrt(values[is_kept])
    trace_of_root = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def inception_score(logits, splits=10):
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al. 2016).
    Logits (n, K) -> mean and standard deviation over consecutive splits (ADM: 10 of 5,000 images)."""
    n, scores = len(logits), []
    if n < splits or not torch.isfinite(logits).all():
        raise ValueError(f"{splits} splits need as many images with finite logits: got {n}")
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


@torch.no_grad()
def precision_recall(real_features, fake_features, k=3, n_rows=512):
    """Improved precision and recall (Kynkaanniemi et al. 2019): (n, D), (m, D) on one device -> two floats.
    The share of fakes in a ball of a real point, and of real points in a ball of a fake; a ball reaches to
    the point's k-th nearest other of its set. n_rows at a time, in float64, as float32 cancels."""
    real, fake = real_features.double(), fake_features.double()
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) <= k:
        raise ValueError(f"not two sets of more than {k} features of one size: {real.shape}, {fake.shape}")

    def distances(a, b):  # squared; within rounding of 0 means 0, so that a copy lies on its original
        norms = (a ** 2).sum(dim=1)[:, None] + (b ** 2).sum(dim=1)
        squared = norms - 2 * a @ b.T
        return squared.masked_fill_(squared < 1e-13 * norms, 0)

    def share_inside(points, centres):
        # the nearest is the point itself
        radii = torch.cat([distances(rows, centres).kthvalue(k + 1).values for rows in centres.split(n_rows)])
        inside = [(distances(rows, centres) <= radii).any(dim=1) for rows in points.split(n_rows)]
        return torch.cat(inside).double().mean().item()
    return share_inside(fake, real), share_inside(real, fake)


def retrieval(image_features, text_features, captions):
    """Image-text retrieval, top-1: L2-normalised features (n, D), float32, of the same samples -> shares.
    Captions may repeat: a hit is any sample with the right one. retrieval_chance: of a random pick."""
    numbers = {caption: i for i, caption in enumerate(captions)}
    ids = torch.tensor([numbers[caption] for caption in captions], device=image_features.device)

    def hits(queries, others):
        best = torch.cat([(rows @ others.T).argmax(dim=1) for rows in queries.split(1024)])
        return (ids[best] == ids).float().mean().item()
    return dict(image_to_text=hits(image_features, text_features),
                text_to_image=hits(text_features, image_features),
                retrieval_chance=(ids.bincount().double() / len(ids)).square().sum().item())


def balanced_accuracy(predictions, labels):
    """Accuracy within each class that occurs in labels (n,), averaged over these classes."""
    accuracies = [(predictions[labels == c] == c).float().mean() for c in labels.unique()]
    return torch.stack(accuracies).mean().item()


def class_share(features, labels):
    """Share of the variance of features (n, D), labels int64 (n,), that lies between the means of classes, of
    1; 0 on average if the labels say nothing (epsilon squared). Where a probe tells whether the class can be
    read, this tells how much of the spread it is."""
    features, n = features.float(), len(labels)
    classes, numbers = labels.unique(return_inverse=True)
    counts = numbers.bincount().float()[:, None]
    sums = features.new_zeros(len(classes), features.shape[1]).index_add_(0, numbers, features)
    means = sums / counts
    within = sum((x - means[i]).square().sum() for x, i in zip(features.split(65536), numbers.split(65536)))
    within = within / max(n - len(classes), 1)
    return 1 - (within / features.var(dim=0).sum().clamp(min=1e-12)).item()


def knn_predict(train_features, train_labels, features, k=20, temperature=0.07):
    """k-NN by cosine, votes weighted by exp(cosine / temperature) (DINO): (n, D), (n,), (m, D) -> (m,)."""
    train_features, votes = train_features.float(), []
    norms = torch.linalg.vector_norm(train_features, dim=1).clamp(min=1e-12)
    for part in F.normalize(features.float(), dim=1).split(1024):
        cosines = (part @ train_features.T).div_(norms)
        similarity, nearest = cosines.topk(min(k, len(train_features)), dim=1)
        vote = similarity.new_zeros(len(part), int(train_labels.max()) + 1)
        votes.append(vote.scatter_add(1, train_labels[nearest], (similarity / temperature).exp()))
    return torch.cat(votes).argmax(dim=1)


# ----- The FID network: TensorFlow's Inception-v3 of 2015-12-05, as ported by pytorch-fid -----------------

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# at the border the mean is of what lies inside the image, as TensorFlow has it
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrinking_pool = partial(F.max_pool2d, kernel_size=3, stride=2)  # only where the whole window fits


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU. same: padding keeps the size, but for stride 2."""
    def __init__(self, in_channels, out_channels, kernel, stride=1, same=True):
        super().__init__()
        padding = "same" if same and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class MixedBlock(nn.Module):
    """Branches side by side, whose channels are concatenated; branch_pool starts with pool.
    branches: {name: [(channels, kernel, stride if not 1) of its units]}; units are name_1, name_2, ..., or
    name if there is one, as in the published file."""
    def __init__(self, width, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, units in branches.items():
            names = [f"{branch}_{i + 1}" for i in range(len(units))] if len(units) != 1 else [branch]
            self.branches[branch], in_channels = names, width
            for name, (channels, *shape) in zip(names, units):
                self.add_module(name, ConvUnit(in_channels, channels, *shape))
                in_channels = channels

    def parts(self, x):
        for branch, names in self.branches.items():
            part = self.pool(x) if branch == "branch_pool" else x
            for name in names:
                part = getattr(self, name)(part)
            yield part

    def forward(self, x):
        return torch.cat(list(self.parts(x)), dim=1)


def Mixed35(width, pooled):
    """Mixed_5b, 5c, 5d: (B, width, 35, 35) -> (B, 224 + pooled, 35, 35)."""
    return MixedBlock(width, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                      branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])


def Mixed17(c):
    """Mixed_6b to 6e: (B, 768, 17, 17) -> the same, with c channels inside."""
    return MixedBlock(768, average_pool, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                      branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                      branch_pool=[(192, 1)])


class Mixed8(MixedBlock):
    """Mixed_7b, 7c: (B, width, 8, 8) -> (B, 2048, 8, 8). pool: average_pool or max_pool."""
    def __init__(self, width, pool):
        super().__init__(width, pool, branch1x1=[(320, 1)], branch3x3_1=[(384, 1)],
                         branch3x3dbl=[(448, 1), (384, 3)], branch_pool=[(192, 1)])
        for name in ("branch3x3_2", "branch3x3dbl_3"):  # two units side by side
            self.add_module(f"{name}a", ConvUnit(384, 384, (1, 3)))
            self.add_module(f"{name}b", ConvUnit(384, 384, (3, 1)))

    def forward(self, x):
        point, short, long, pooled = self.parts(x)
        return torch.cat((point, self.branch3x3_2a(short), self.branch3x3_2b(short),
                          self.branch3x3dbl_3a(long), self.branch3x3dbl_3b(long), pooled), dim=1)


class InceptionFID(nn.Module):
    """The frozen network of FID, sFID and the Inception score, with the tensor names of pytorch-fid.
    weights: "auto" fetches the published file, a path is that file, None leaves the layers random, for tests.
    ADM's own tool scales images differently: do not mix statistics of the two."""
    def __init__(self, weights="auto"):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed35(192, 32), Mixed35(256, 64), Mixed35(288, 64)
        self.Mixed_6a = MixedBlock(288, shrinking_pool, branch3x3=[(384, 3, 2)],
                                   branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(Mixed17, (128, 160, 160, 192))
        self.Mixed_7a = MixedBlock(
            768, shrinking_pool, branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b = Mixed8(1280, average_pool)
        self.Mixed_7c = Mixed8(2048, max_pool)  # a max pool, as in the graph of 2015
        self.fc = nn.Linear(2048, 1008)
        if weights == "auto":
            path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(INCEPTION_URL))
            weights = download(INCEPTION_URL, path, INCEPTION_SHA256)
        if weights is not None:
            self.load_state_dict(load_tensors(weights))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def prepare(self, images):
        """(B, 3, H, W), uint8 or float in [0, 1] -> (B, 3, 299, 299) in [-1, 1]; no antialiasing."""
        pixels = images.float() if images.is_floating_point() else images.float() / 255
        pixels = F.interpolate(pixels, 299, mode="bilinear", antialias=False)
        return (2 * pixels - 1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W), uint8 or float in [0, 1] -> pool3 (B, 2048), spatial (B, 2023), logits (B, 1008).
        In full float32. spatial, for sFID: the first 7 channels of Mixed_6d, of its 1x1 branch, as ADM orders
        them. logits: without the bias, as ADM takes the Inception score."""
        full_precision = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), full_precision:
            x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(self.prepare(images)))  # (B, 32, 147, 147)
            x = shrinking_pool(self.Conv2d_2b_3x3(x))  # (B, 64, 73, 73)
            x = shrinking_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
            x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
            pool3 = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))  # (B, 2048)
            logits = (pool3.double() @ self.fc.weight.double().T).float()  # float64 has no TF32
        return pool3, spatial, logits


# ----- Images from a folder or an .npz --------------------------------------------------------------------

class NpzRows:
    """arr_0 of an .npz, of which each row is read when it is asked for, fast if they rise: NumPy would read
    all of it, 10 GB of 50,000 images. ValueError names a file that is broken, or holds none."""
    def __init__(self, path):
        try:
            check_zip(path)
            archive = zipfile.ZipFile(path)
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise ValueError(f"it holds no arr_0, but {names}")
            self.file = archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self.file)
            read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
            self.shape, self.is_fortran, self.dtype = read_header(self.file)
            self.start, self.row_bytes = self.file.tell(), math.prod(self.shape[1:]) * self.dtype.itemsize
            if self.start + len(self) * self.row_bytes != archive.getinfo("arr_0.npy").file_size:
                raise ValueError(f"arr_0 is not as large as its shape, {self.shape}, says")
        except Exception as error:  # on broken bytes zipfile and NumPy raise almost anything
            raise ValueError(f"{path} cannot be read: {error}") from error

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        self.file.seek(self.start + int(index) * self.row_bytes)
        return np.frombuffer(self.file.read(self.row_bytes), self.dtype).reshape(self.shape[1:])


class ImageSet:
    """Images, each uint8 (3, H, W): of a folder and its subfolders, by path, or arr_0 of an .npz.
    size: what data.load_canvas brings a folder's images to; default: as they are, without alpha.
    FileNotFoundError, ValueError: nothing is there, or no such images."""
    def __init__(self, where, size=None):
        self.size = size
        if os.path.isdir(where):
            paths = (os.path.join(folder, name) for folder, _, names in os.walk(where, followlinks=True)
                     for name in names)
            self.items = sorted(x for x in paths if x.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
        elif zipfile.is_zipfile(where):
            self.items = NpzRows(where)
            if self.items.is_fortran:  # a row is not in one place
                self.items = load_arrays(where, ["arr_0"])["arr_0"]
            if self.items.dtype != np.uint8 or self.items.shape[3:] != (3,):
                raise ValueError(f"{where}: not uint8 (N, H, W, 3) but {self.items.dtype} {self.items.shape}")
        else:
            raise FileNotFoundError(f"no folder of images and no .npz at {where}")
        if not len(self):
            raise ValueError(f"{where} holds no images")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return torch.tensor(item.transpose(2, 0, 1))
        try:
            if self.size:
                return torch.tensor(load_canvas(item, self.size))
            with Image.open(item) as image:
                return torch.tensor(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        except Exception as error:  # Pillow's decoders raise almost anything on a broken file
            raise ValueError(f"{item} is not an image that can be read: {error}") from error

    def batch(self, numbers):
        """-> uint8 (n, 3, H, W). RuntimeError: they are of different sizes."""
        return torch.stack([self[i] for i in numbers])


# ----- Understanding: zero-shot classes and the linear probe ----------------------------------------------

@torch.no_grad()
def class_embeddings(model, class_names, templates, tokenize, batch_size=256):
    """(n_classes, D), L2-normalised: text features of every template, averaged, normalised again (CLIP)."""
    if not templates or not all("{}" in t for t in templates):
        raise ValueError(f"every template must hold {{}}, where the class name goes: got {templates}")
    texts = [t.format(name) for name in class_names for t in templates]
    tokens = tokenize(texts, model.config.text_context_length).to(model.token_embedding.weight.device)
    features = torch.cat([model.encode_text(part).float() for part in tokens.split(batch_size)])
    return F.normalize(features.unflatten(0, (-1, len(templates))).mean(dim=1), dim=1)


def zero_shot(model, image_features, labels, class_names, templates, tokenize):
    """Zero-shot classification (CLIP) -> dict of shares; top-5 if there are more than 5 classes.
    image_features (n, text_embed_dim) as encode_image gives them; labels int64 (n,), numbers of class_names.
    zero_shot_interval: half of Wilson's 95 % interval of top-1."""
    from scipy.stats import binomtest
    low, high, n_classes = int(labels.min()), int(labels.max()), len(class_names)
    if low < 0 or high >= n_classes:
        raise ValueError(f"labels are {low} to {high}, and there are {n_classes} class names")
    classes = class_embeddings(model, class_names, templates, tokenize)  # (n_classes, D)
    best = (image_features.to(classes) @ classes.T).topk(min(5, n_classes), dim=1).indices
    hits = (best == labels.to(best)[:, None]).float()
    interval = binomtest(int(hits[:, 0].sum()), len(hits)).proportion_ci(method="wilson")
    row = dict(zero_shot_top1=hits[:, 0].mean().item(), zero_shot_interval=(interval.high - interval.low) / 2,
               zero_shot_chance=1 / n_classes, zero_shot_templates=len(templates))
    return row | dict(zero_shot_top5=hits.sum(dim=1).mean().item()) if n_classes > 5 else row


PROBE_RATES = tuple(m * 10.0 ** e for e in range(-5, -1) for m in (1, 2, 5)) + (0.1,)  # DINOv2's 13


@torch.no_grad()
def train_probes(features, labels, n_classes, rates, n_steps, seed=0):
    """Linear classifiers of features (n, D), labels int64 (n,), one for each of G learning rates, at once.
    -> weight (G, D, C), bias (G, 1, C), for features standardised by the moments of these. SGD with momentum
    0.9, rates times batch / 256, cosine to 0, from zero weights (DINOv2). A batch is a sixteenth of the set,
    at most 1,024, so that a small set has many steps in an epoch too."""
    n, (mean, std) = len(features), moments(features)
    batch_size = min(1024, max(n // 16, 32))
    generator = step_generator(seed, 0, features.device)
    rates = torch.tensor(rates, device=features.device)[:, None] * batch_size / 256  # (G, 1)
    weight, bias = (features.new_zeros(d, len(rates), n_classes) for d in (features.shape[1], 1))
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(n_steps):
        rows = torch.randint(n, (batch_size,), generator=generator, device=features.device)
        x = (features[rows] - mean) / std  # (b, D)
        logits = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + bias  # (b, G, C)
        error = logits.softmax(dim=-1) - F.one_hot(labels[rows], n_classes)[:, None]
        gradients = (x.T @ error.flatten(1)).view_as(weight) / batch_size, error.mean(dim=0, keepdim=True)
        decay = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        for parameter, velocity, gradient in zip((weight, bias), velocities, gradients):
            velocity.mul_(0.9).add_(gradient)
            parameter.sub_(rates * decay * velocity)
    return weight.transpose(0, 1), bias.transpose(0, 1)


def moments(features):
    """Mean and standard deviation (D,) of features (n, D); a constant feature's is 1e-6."""
    std, mean = torch.std_mean(features, dim=0)
    return mean, std.clamp(min=1e-6)


def linear_probe(train_features, train_labels, features, labels, seed=0, n_steps=None):
    """Linear probe on frozen features -> dict(linear_probe, linear_probe_balanced, linear_probe_rate).
    train_features (n, D), features (m, D), labels int64, on one device. The rate is the best of 13 on a fifth
    of the training set, drawn by seed and kept back; with it, all of the set is learned (the authors report
    the best on the test set). n_steps: 10 epochs, from 1,000 to 12,500 steps (10 epochs of ImageNet)."""
    n = len(train_features)
    if n < 5:
        raise ValueError(f"a linear probe needs 5 training samples or more, and got {n}")
    train_features, features = train_features.float(), features.float()
    n_classes = int(torch.cat((train_labels, labels)).max()) + 1
    n_steps = n_steps or min(12_500, max(1000, 10 * n // 1024))
    order = torch.from_numpy(permutation(seed, 0, n)).to(train_labels.device)
    kept_back, fitted = order[:n // 5], order[n // 5:]

    def predict(rows, rates, features):  # (G, m)
        mean, std = moments(train_features[rows])
        weight, bias = train_probes(train_features[rows], train_labels[rows], n_classes, rates, n_steps, seed)
        return torch.stack([(((features - mean) / std) @ w + b).argmax(dim=1) for w, b in zip(weight, bias)])
    hits = predict(fitted, PROBE_RATES, train_features[kept_back]) == train_labels[kept_back]
    rate = PROBE_RATES[int(hits.sum(dim=1).argmax())]
    prediction = predict(order, [rate], features)[0]
    return dict(linear_probe=(prediction == labels).float().mean().item(),
                linear_probe_balanced=balanced_accuracy(prediction, labels), linear_probe_rate=rate)


# ----- The judge: a small classifier of a labelled set, trained on the set itself -------------------------

class Judge(nn.Module):
    """A small convolutional classifier on images scaled to 64 px.
    Its features stand in for Inception's where that is foreign to the data; its classes tell whether a sample
    shows what its label says. It learns from degraded images, so that it answers to content and is blind to
    blur. accuracy: on images that it has not learned from. n_classes: their number, or several numbers, of
    several questions at once."""
    SIDE = 64
    LAYERS = ((48, 5, 2), (96, 3, 2), (96, 3, 1), (192, 3, 2), (192, 3, 1), (256, 3, 2), (256, 3, 1))

    def __init__(self, n_classes):
        super().__init__()
        layers, width = [], 3
        for channels, kernel, stride in self.LAYERS:
            layers += [nn.Conv2d(width, channels, kernel, stride, padding=kernel // 2, bias=False),
                       nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.sizes = (n_classes,) if isinstance(n_classes, int) else tuple(n_classes)
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, sum(self.sizes))
        self.accuracy = math.nan

    def forward(self, pixels):
        """Pixels in [0, 1] (B, 3, H, W) -> features (B, 256), logits (B, n)."""
        pixels = F.interpolate(pixels, self.SIDE, mode="bilinear", antialias=True)
        features = self.body(normalize(pixels).contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def classify(self, pixels):
        """-> classes (B,), of several questions (B, questions)."""
        answers = [logits.argmax(dim=1) for logits in self(pixels)[1].split(self.sizes, dim=1)]
        return answers[0] if len(answers) == 1 else torch.stack(answers, dim=1)


def judge_view(images, generator, move=True):
    """uint8 (B, 3, S, S) -> degraded pixels in [0, 1]: what the judge learns from. move: crop and mirror."""
    u = torch.rand(28, len(images), generator=generator, device=images.device)
    pixels = images.float() / 255
    if move:
        pixels = resample(pixels, draw_boxes(u[:22], (0.8, 1.0)), images.shape[-1], flip=u[22] < 0.5)
    coarse = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    pixels = torch.where((u[23] < 0.3).view(-1, 1, 1, 1), coarse, pixels)
    pixels = gaussian_blur(pixels, torch.where(u[24] < 0.7, 2.5 * u[25], 0.0))
    noise = torch.randn(pixels.shape, generator=generator, device=images.device)
    return (pixels + 0.1 * u[26].view(-1, 1, 1, 1) * noise).clamp(0, 1)


def train_judge(images, labels, n_classes, device, seed=0, n_steps=200, batch_size=64, lr=3e-3):
    """A Judge of uint8 images (n, 3, S, S), labels (n,); a fifth is kept back, to measure its accuracy.
    Of several questions, labels (n, questions), -1 where one has no answer: among them are size and place, so
    nothing is cropped or mirrored."""
    n_train = len(images) * 4 // 5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(n_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    for step in tqdm(range(n_steps), desc="training the judge", unit=" steps", dynamic_ncols=True):
        generator = step_generator(seed, step, device)
        rows = torch.randint(n_train, (batch_size,), generator=generator, device=device).to(images.device)
        pixels = judge_view(images[rows].to(device), generator, move=labels.ndim == 1)
        with torch.autocast(device.type, torch.bfloat16):
            questions = zip(judge(pixels)[1].float().split(judge.sizes, dim=1),
                            labels[rows].to(device).view(len(rows), -1).unbind(dim=1))
            loss = sum(F.cross_entropy(logits, answers, ignore_index=-1, label_smoothing=0.1)
                       for logits, answers in questions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval().requires_grad_(False)
    predictions = [judge.classify(x.to(device).float() / 255).cpu() for x in images[n_train:].split(256)]
    right, is_answered = torch.cat(predictions) == labels[n_train:], labels[n_train:] >= 0
    judge.accuracy = right[is_answered].float().mean().item()
    return judge


def open_judge(path, source, n_classes, device, seed=0, most=16384):
    """The judge of a labelled source, from path, or trained on up to `most` of its images and kept there.
    A broken file is made anew. n_classes: several numbers for the built-in set's ATTRIBUTES."""
    fingerprint = by_first_rank(lambda: f"{source.fingerprint()} {n_classes} classes")
    is_of_classes = isinstance(n_classes, int)
    if rank() == 0 and read_judge(path, n_classes, fingerprint) is None:
        folder, is_claimed = os.path.dirname(path) or ".", False
        with suppress(ValueError):      # another process trains it, too; else what a kill left is swept
            is_claimed = claim_folder(folder)
        if is_of_classes:
            batches = EvaluationSet(source, most, whole=True)
        else:
            images, answers = (torch.from_numpy(x[:most]).split(256)
                               for x in (source.images, source.attributes()))
            batches = zip(images, itertools.repeat(None), answers)
        parts = [((to_image_size(images, Judge.SIDE) * 255).round().byte(), labels)
                 for images, _, labels in batches]
        images, labels = map(torch.cat, zip(*parts))
        if is_of_classes:
            images, labels = images[labels >= 0], labels[labels >= 0]
            if len(labels) == 0:
                raise UserError(f"a judge needs labels, and {source.name} has none: --fid_features inception "
                                "or none")
            if int(labels.max()) >= n_classes:
                raise UserError(f"{source.name} has a label {int(labels.max())}, and {n_classes} classes")
        options = {} if is_of_classes else dict(n_steps=600)
        judge = train_judge(images, labels, n_classes, device, seed, **options)
        content = dict(judge=judge.state_dict(), accuracy=judge.accuracy, fingerprint=fingerprint)
        write_atomically(path, lambda f: torch.save(content, f))
        if is_claimed:
            release_folder(folder)
    barrier()
    judge = read_judge(path, n_classes, fingerprint)
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def read_judge(path, n_classes, fingerprint):
    """The judge in a file; None if there is none of this fingerprint, or it is broken."""
    judge = Judge(n_classes)
    try:
        content = load_tensors(path)
        judge.load_state_dict(content["judge"])
        judge.accuracy = float(content["accuracy"])
        return judge if content["fingerprint"] == fingerprint else None
    except (FileNotFoundError, ValueError, RuntimeError, KeyError, TypeError, AttributeError):
        return None


# ----- Measuring a tokenizer: features of images, batch by batch, then the figures ------------------------

def collect(batches, compute, name=None):
    """What compute makes of each batch of this rank's share of a set, {name: tensor (b, ...)} -> on rank 0
    {name: (n, ...)} of the whole set, in host memory, on the others {}. A share is every W-th item: the order
    is that of the set. name: of a progress bar."""
    bar = tqdm(batches, name, unit=" batches", disable=name is None or rank() != 0, dynamic_ncols=True)
    parts = [{key: x.cpu() for key, x in compute(batch).items()} for batch in bar]
    own = {key: torch.cat([part.pop(key) for part in parts]) for key in list(parts[0] if parts else ())}
    return gather_at_first(own)


def own_numbers(n, batch_size):
    """This rank's share of the numbers below n, in batches."""
    own = range(rank(), n, world_size())
    return [own[k:k + batch_size] for k in range(0, len(own), batch_size)]


@torch.no_grad()
def probe_features(model, images, n_layers=4):
    """What probes learn from, of normalised images (B, 3, H, W) -> {name: (B, D)}, last cls, last patches.
    latents: the mean of the bottleneck, which the paper's scaling figures probe. dino_1, dino_4, of its final
    models: CLS of the last 1 or 4 layers, then the mean of the last patches. n_layers 1: latents alone."""
    layers = model.intermediate_layers(images, min(n_layers, model.config.vision_depth))
    patches, cls = layers[-1]
    features, mean = dict(latents=model.trunk.bottleneck(patches).mean(dim=1)), patches.mean(dim=1)
    if n_layers > 1:
        features.update(dino_1=torch.cat((cls, mean), dim=1),
                        dino_4=torch.cat([c for _, c in layers] + [mean], dim=1))
    return {name: x.float() for name, x in features.items()}, cls, patches


@torch.no_grad()
def reconstruct(model, pixels, latents=None, lpips=None):
    """Pixels in [0, 1] (B, 3, S, S) -> reconstructions in [0, 1]; {psnr, ssim, lpips if there is one}: (B,).
    latents: of these pixels, if they are known already."""
    latents = model.encode(normalize(pixels)) if latents is None else latents
    rebuilt = denormalize(model.decode(latents).float()).clamp(0, 1)
    distance = dict(lpips=lpips(2 * rebuilt - 1, 2 * pixels - 1)) if lpips else {}
    return rebuilt, dict(psnr=psnr(rebuilt, pixels), ssim=ssim(rebuilt, pixels), **distance)


def fid_features(network, images):
    """uint8 images (B, 3, H, W) -> {pool (B, D), logits (B, K)} and, of Inception, spatial (B, 2023)."""
    names = ("pool", "spatial", "logits") if isinstance(network, InceptionFID) else ("pool", "logits")
    return dict(zip(names, network(images.float() / 255)))


def caption_ids(captions):
    """A number for each caption, the same for the same text: int64 (n,)."""
    return torch.tensor([int(hashlib.sha256(text.encode()).hexdigest()[:14], 16) for text in captions])


@dataclass
class Subject:
    """A tokenizer and what it is measured with; figures of what is None are left out."""
    model: VTP
    tokenize: object = None  # of texts, if the model has a text tower
    size: int | None = None  # of images; None: the model's own
    bf16: bool = False  # under autocast, as in training
    n_layers: int = 4  # for DINO-style probes; 1: probe the latents alone
    network: nn.Module | None = None
    others: tuple = ()  # ((suffix of its figures of samples, network), ...): further networks
    lpips: nn.Module | None = None
    class_names: list | None = None
    templates: tuple = data.TEMPLATES
    squashed: object = None  # batches of the held-out set for zero-shot alone; None: those of the rest
    needs_reference: bool = False  # features of training images by the networks, for samples

    @torch.no_grad()
    def features(self, canvases, captions, labels, is_training_set=False):
        """uint8 canvases (B, 3, C, C), captions, labels (B,) -> {name: (B, ...)}: what figures are made of.
        Of training images: for probes and, with needs_reference, to compare samples with."""
        model, config, device = self.model, self.model.config, self.model.trunk.cls_token.device
        canvases = canvases.to(device)
        pixels = to_image_size(canvases, self.size or config.image_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            features, cls, patches = probe_features(model, normalize(pixels), self.n_layers)
            features["labels"] = labels
            if is_training_set:
                return features | (self.sample_features(canvases) if self.needs_reference else {})
            if config.train_reconstruction:
                latents = model.to_latents(patches, *pixels.shape[-2:])
                rebuilt, measured = reconstruct(model, pixels, latents, self.lpips)
                features.update(measured)
            if self.tokenize:
                tokens = self.tokenize(captions, config.text_context_length).to(device)
                text = model.encode_text(tokens, normalize=False)
                features["text_features"] = F.normalize(text.float(), dim=-1)
                features["image_features"] = F.normalize(model.project_image(cls, patches).float(), dim=-1)
                features["caption_ids"] = caption_ids(captions)
        if config.train_reconstruction and self.network:  # both in 8 bits, truncated (the authors)
            for name, images in (("real", canvases), ("rec", to_uint8(rebuilt))):
                features.update({f"{name}_{k}": x for k, x in fid_features(self.network, images).items()})
        return features

    @torch.no_grad()
    def zero_shot_features(self, canvases, labels):
        """What zero_shot takes of images."""
        device = self.model.trunk.cls_token.device
        pixels = to_image_size(canvases.to(device), self.size or self.model.config.image_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            features = self.model.encode_image(normalize(pixels), normalize=False)
        return dict(image_features=F.normalize(features.float(), dim=-1), labels=labels)

    @torch.no_grad()
    def sample_features(self, images):
        """fid_features of uint8 images by each network; those of `others` have their suffix."""
        networks = (("", self.network), *self.others) if self.network else ()
        return {f"{k}{suffix}": x for suffix, network in networks
                for k, x in fid_features(network, images).items()}


def measure(subject, held_out, gallery, seed=0, name=None):
    """All that is measured of a tokenizer, in training and here -> figures and, on rank 0, features of both
    sets. held_out, gallery (training images, for probes): each rank's share, in batches: images uint8
    (b, 3, C, C), captions, labels int64 (b,), -1 where there is none. name: of a progress bar. Figures: those
    of tokenizer_figures."""
    def features(batches, **options):
        return collect(batches, lambda batch: subject.features(*batch, **options), name)
    test, train = features(held_out), features(gallery, is_training_set=True)
    shown = test
    if subject.squashed is not None:
        shown = collect(subject.squashed, lambda batch: subject.zero_shot_features(batch[0], batch[2]), name)
    return by_first_rank(lambda: tokenizer_figures(subject, test, train, shown, seed)), test, train


def tokenizer_figures(subject, test, train, shown, seed):
    """psnr (dB), ssim, lpips, rfid, rsfid, those of retrieval, zero_shot and linear_probe, knn, chance, from
    features of held-out images, training images, and what zero_shot sees. Probes and k-NN are of the mean
    latent, or of the features in their name."""
    device = subject.model.trunk.cls_token.device
    row = {k: test[k].mean().item() for k in ("psnr", "ssim", "lpips") if k in test}
    for features, figure in (("pool", "rfid"), ("spatial", "rsfid")):
        if f"real_{features}" in test:
            real, rec = (mean_and_covariance(test[f"{kind}_{features}"]) for kind in ("real", "rec"))
            row[figure], row["n_val"] = frechet_distance(*real, *rec), len(test["labels"])
    is_labelled = test["labels"] >= 0
    test_labels = test["labels"][is_labelled].to(device)
    if "text_features" in test:
        if len(test["caption_ids"].unique()) > 1:
            row.update(retrieval(test["image_features"], test["text_features"], test["caption_ids"].tolist()))
        if subject.class_names and len(test_labels):
            is_shown = shown["labels"] >= 0
            row.update(zero_shot(subject.model, shown["image_features"][is_shown], shown["labels"][is_shown],
                                 subject.class_names, subject.templates, subject.tokenize))
    is_usable = train["labels"] >= 0
    train_labels = train["labels"][is_usable].to(device)
    if len(test_labels) and len(train_labels) >= 5:
        for name, prefix in (("latents", ""), ("dino_1", "dino_1_"), ("dino_4", "dino_4_")):
            if name in train:
                train_x, test_x = train[name][is_usable].to(device), test[name][is_labelled].to(device)
                figures = linear_probe(train_x, train_labels, test_x, test_labels, seed)
                is_right = knn_predict(train_x, train_labels, test_x) == test_labels
                figures["knn"] = is_right.float().mean().item()
                figures["class_share"] = class_share(train_x, train_labels)
                row.update({prefix + figure: x for figure, x in figures.items()})
        row["chance"] = 1 / len(test_labels.unique())
    return row


# ----- Measuring generated images -------------------------------------------------------------------------

def compare_samples(fake, reference):
    """Features of samples, and a reference -> gFID, sFID, IS, precision, recall; n_samples, n_references.
    A reference may have moments (mu, sigma and, for sFID, mu_s, sigma_s), features (pool, spatial) of images,
    or both: then, as ADM and the authors do, distances take the moments, which are of more images
    (reference_moments says so), and precision and recall the images."""
    if "logits" not in fake:
        raise ValueError("the samples must be images: a folder, or a .npz with arr_0")
    splits = min(10, len(fake["logits"]))
    row = dict(zip(("inception_score", "inception_score_std"), inception_score(fake["logits"], splits)))
    row.update(n_samples=len(fake["logits"]), reference_moments="mu" in reference)
    for name, figure, mu, sigma in (("pool", "gfid", "mu", "sigma"), ("spatial", "sfid", "mu_s", "sigma_s")):
        moments = reference.get(mu), reference.get(sigma)
        if moments[0] is None and "mu" not in reference and name in reference:
            moments = mean_and_covariance(reference[name])
        if name in fake and moments[0] is not None:
            row[figure] = frechet_distance(*mean_and_covariance(fake[name]), *moments)
    if "pool" in reference:
        row["n_references"] = len(reference["pool"])
        row["precision"], row["recall"] = precision_recall(reference["pool"], fake["pool"])
    return row


def features_of_set(where, network, device, batch_size):
    """Features of a folder or an .npz of images, and the statistics that the .npz has, or them alone."""
    moments = {}
    if zipfile.is_zipfile(where) and load_arrays(where, (), ["mu"]):
        moments = load_statistics(where)
        if "arr_0.npy" not in zipfile.ZipFile(where).namelist():
            return moments
    images = ImageSet(where)
    return moments | collect(own_numbers(len(images), batch_size),
                             lambda numbers: fid_features(network, images.batch(numbers).to(device)), where)


def read_latent_stats(path):
    """A file {'mean', 'std'} of shape (1, d, 1, 1), as LightningDiT writes it -> the two tensors, fp32."""
    stats = load_tensors(path)
    pair = [stats.get(k) for k in ("mean", "std")] if isinstance(stats, dict) else [None]
    if not all(torch.is_tensor(x) and x.ndim == 4 and x.isfinite().all() for x in pair):
        raise ValueError(f"{path} holds no latent statistics, mean and std of shape (1, d, 1, 1)")
    return stats["mean"].float(), stats["std"].float()


class TextTower:
    """The text tower of a tokenizer, a folder or hub id (model: its VTP, if it is loaded already). Called
    with n texts it gives what a DiT reads of them: features (n, dim) on the CPU, with a mean square of 1."""
    def __init__(self, where, device, bpe=None, model=None):
        self.where, self.folder = where, first_on_node(lambda: find_checkpoint(where))
        self.model, self.device = model or VTP.from_pretrained(self.folder).to(device).eval(), device
        config = self.model.config
        if not config.train_clip:
            raise ValueError(f"{where} has no text tower: take that of another tokenizer, --text_from")
        self.length, self.dim = config.text_context_length, config.text_embed_dim
        self.tokenize = first_on_node(lambda: data.make_tokenizer(config.text_vocab_size, bpe))

    @torch.no_grad()
    def __call__(self, texts, batch_size=256):
        tokens = self.tokenize(texts, self.length).split(batch_size)
        features = torch.cat([self.model.encode_text(part.to(self.device)).cpu() for part in tokens])
        return features * self.dim ** 0.5

    def digest(self):
        """A fingerprint of its weights."""
        return file_digest(self.folder)

    def check(self, dit):
        """ValueError if a DiT cannot read what it gives."""
        if dit.text_dim != self.dim:
            raise ValueError(f"the text tower of {self.where} gives {self.dim} numbers for a text, the DiT "
                             f"reads {dit.text_dim}: name the one that it was trained with, --text_from")


def sample_picture(model, tokenizer, stats, class_names, seed, per_class=8, most_classes=12, texts=None,
                   **sampling):
    """A named row of samples of each of the first classes, always from the same noise -> Pillow image.
    texts: (captions, their features), of which it draws instead."""
    if texts is None:
        y = torch.arange(min(model.num_classes, most_classes))
        names = [class_names[i] if class_names else f"class {i}" for i in range(len(y))]
    else:
        names, y = texts
    n = len(y)
    noise, _ = noise_and_labels(range(n * per_class), seed, model.latent_shape)
    y = y.repeat_interleave(per_class, dim=0)
    images = generate(model, tokenizer, stats, noise, y, **sampling).unflatten(0, (n, per_class))
    return named_rows(images, names)


def prompts_picture(prompts, paths, per_prompt=8, most=64):
    """Images at paths, image i of prompt i modulo their number: some of each beside it -> Pillow image."""
    n, rows = min(len(prompts), len(paths), most), []
    for k in range(n):
        images = [np.asarray(Image.open(path)) for path in paths[k::len(prompts)][:per_prompt]]
        rows.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
    return named_rows(rows, prompts[:n])


# ----- Pictures -------------------------------------------------------------------------------------------

def to_image_size(canvases, size):
    """uint8 canvases (B, 3, C, C) -> pixels in [0, 1] (B, 3, size, size), bicubic if the sizes differ."""
    pixels = canvases.float() / 255
    if pixels.shape[-1] == size:
        return pixels
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=pixels.device)[:, None].expand(4, len(pixels))
    return resample(pixels, whole, size).clamp(0, 1)


def to_uint8(pixels):
    """[0, 1] -> uint8, truncated as the authors' code does."""
    return (pixels * 255).to(torch.uint8)


def save_image(image, path):
    """Write a Pillow image as PNG, atomically."""
    write_atomically(path, lambda file: image.save(file, "PNG"))


def image_grid(rows, scale=None, gap=2):
    """Rows of images (n, 3, H, W) in [0, 1], n may differ -> Pillow image, enlarged to 96 px or by scale."""
    H, W = rows[0].shape[-2:]
    sheet = np.full((len(rows) * (H + gap) - gap, max(map(len, rows)) * (W + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate((row.clamp(0, 1) * 255).round().byte().cpu().numpy()):
            top, left = i * (H + gap), j * (W + gap)
            sheet[top:top + H, left:left + W] = image.transpose(1, 2, 0)
    scale = scale or max(1, 96 // W)
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


def stacked_rows(batches, per_row):
    """Batches (n, 3, H, W) in [0, 1], a row of each under one of the batch before -> Pillow image."""
    return image_grid([row for rows in zip(*(batch.split(per_row) for batch in batches)) for row in rows])


def named_rows(images, names):
    """Rows of images (n, 3, H, W) in [0, 1] -> Pillow image with a name before each row."""
    grid, font = image_grid(list(images)), ImageFont.load_default(13)
    lines_that_fit = max(1, grid.height // len(names) // 17)
    wrap = textwrap.TextWrapper(34, max_lines=lines_that_fit, placeholder=" ...")
    names = [wrap.fill(name) for name in names]
    width = int(max(font.getlength(line) for name in names for line in name.split("\n"))) + 12
    sheet = Image.new("RGB", (width + grid.width, grid.height), "white")
    sheet.paste(grid, (width, 0))
    for i, name in enumerate(names):
        middle = (width - 6, (i + 0.5) * grid.height / len(names))
        ImageDraw.Draw(sheet).text(middle, name, "black", font, anchor="rm", align="right")
    return sheet


@torch.no_grad()
def reconstruction_picture(model, images, per_row=12, size=None, before=None):
    """The first 2 per_row images, uint8 (n, 3, C, C), above their reconstructions at size -> Pillow image.
    before: an earlier pixel decoder, what it makes of the same latents comes in between."""
    canvases = images[:2 * per_row].to(model.trunk.cls_token.device)
    pixels = to_image_size(canvases, size or model.config.image_size)
    latents = model.encode(normalize(pixels))
    batches = [pixels, reconstruct(model, pixels, latents)[0]]
    if before is not None:
        batches.insert(1, denormalize(before(latents).float()))
    return stacked_rows(batches, per_row)


def principal_colours(latents, percent=1.0):
    """Latents (B, d, h, w), d >= 3 -> three principal components as colours (B, 3, h, w) in [0, 1].
    A component is 0 at its percentile `percent` and 1 at 100 - percent; its largest weight is positive."""
    places = latents.double().movedim(1, -1)  # (B, h, w, d)
    centred = places.flatten(0, 2) - places.flatten(0, 2).mean(dim=0)  # (B h w, d)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)  # (d, 3), largest first
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    values = (centred @ axes).cpu().numpy()
    low, high = np.percentile(values, (percent, 100 - percent), axis=0)
    colours = ((values - low) / (high - low).clip(1e-12)).clip(0, 1)
    return torch.from_numpy(colours).view(*places.shape[:3], 3).movedim(-1, 1).float()


@torch.no_grad()
def pca_picture(model, images, per_row=8):
    """Images, uint8 (n, 3, C, C), above the principal components of their latents -> Pillow image."""
    pixels = to_image_size(images.to(model.trunk.cls_token.device), model.config.image_size)
    colours = principal_colours(model.encode(normalize(pixels)).float())
    return stacked_rows((pixels, F.interpolate(colours, pixels.shape[-2:], mode="nearest")), per_row)


# ----- Charts ---------------------------------------------------------------------------------------------

CHART_COLOURS = ("#1f6fb4", "#d9641e", "#2e9a4b", "#b8332f", "#7d55b0", "#8a6d3b", "#c2569b", "#5f6a72")


def short_number(x):
    """1500 -> 1.5k, 2e9 -> 2G, 3e15 -> 3P."""
    thousands = min(max(int(math.log10(max(abs(x), 1)) + 1e-9) // 3, 0), 6)
    return f"{x / 1000 ** thousands:.4g}{' kMGTPE'[thousands].strip()}"


def nice_ticks(low, high, n=5):
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most n + 1 of them."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_chart(lines, title, x_label="", y_label="", log_x=False, size=(440, 300), bands=None, joined=True):
    """Lines {name: (xs, ys)}, xs rising (and positive for log_x) -> Pillow image; joined False: only dots.
    Several lines get a legend. A name that starts with "chance" is drawn thin and grey.
    bands {name: (xs, lows, highs)} are shaded behind the lines of these names."""
    image = Image.new("RGB", size, "white")
    draw, left, top, right, bottom = ImageDraw.Draw(image, "RGBA"), 52, 34, size[0] - 16, size[1] - 40
    draw.font, grey = ImageFont.load_default(11), "#555555"
    colours, legend_x = itertools.cycle(CHART_COLOURS), left
    draw.text((left, 6), title, "black", ImageFont.load_default(14))
    draw.text((right, 9), y_label, grey, anchor="ra")
    draw.text(((left + right) / 2, size[1] - 4), x_label, grey, anchor="mb")
    styles = {name: ("#999999", 1) if name.startswith("chance") else (next(colours), 2) for name in lines}
    for name in lines if len(lines) > 1 else ():
        width = draw.textlength(name) + 28
        if legend_x + width > right:  # a new row
            legend_x, top = left, top + 15
        draw.line([(legend_x, top), (legend_x + 14, top)], styles[name][0], width=2)
        draw.text((legend_x + 19, top), name, "black", anchor="lm")
        legend_x += width
    paths = {name: np.array([np.log10(xs) if log_x else xs, ys], float).T for name, (xs, ys) in lines.items()}
    paths = {name: path[np.isfinite(path).all(axis=1)] for name, path in paths.items()}  # each (n, 2)
    areas = {name: np.concatenate((np.array((xs, lows)).T, np.array((xs, highs)).T[::-1]))
             for name, (xs, lows, highs) in (bands or {}).items()}  # each (2 n, 2), around the band
    if log_x:
        areas = {name: np.stack((np.log10(area[:, 0]), area[:, 1]), axis=1) for name, area in areas.items()}
    points = np.concatenate([np.empty((0, 2)), *paths.values(), *areas.values()])
    if not len(points):
        return image
    low, high = points.min(axis=0), points.max(axis=0)
    high += high == low
    margin = 0.05 * (high - low)
    low, high, top = low - margin, high + margin, top + 14

    def to_pixels(points):
        return (left, bottom) + (points - low) / (high - low) * (right - left, top - bottom)
    for tick in nice_ticks(low[1], high[1]):
        y = to_pixels((low[0], tick))[1]
        draw.line([(left, y), (right, y)], "#e4e4e4")
        draw.text((left - 5, y), short_number(tick), grey, anchor="rm")
    decades = [d for d in range(math.floor(low[0]), math.ceil(high[0]) + 1)] if log_x else ()
    log_ticks = [d + math.log10(m) for d in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))]
    for tick in [t for t in log_ticks if low[0] <= t <= high[0]] if log_x else nice_ticks(low[0], high[0]):
        x = to_pixels((tick, low[1]))[0]
        draw.text((x, bottom + 6), short_number(10 ** tick if log_x else tick), grey, anchor="mt")
    for name, area in areas.items():
        draw.polygon([tuple(place) for place in to_pixels(area)], styles[name][0] + "30")
    for name, (colour, width) in styles.items():
        places = [tuple(place) for place in to_pixels(paths[name])]
        if joined:
            draw.line(places, colour, width)
        for x, y in places if width == 2 and (len(places) <= 12 or not joined) else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    return image


def chart_sheet(charts, columns):
    """Charts of one size, row by row, at most `columns` in a row -> Pillow image."""
    images = torch.stack([torch.from_numpy(np.array(chart)).movedim(-1, 0) / 255 for chart in charts])
    return image_grid(images.split(columns), scale=1, gap=0)


def read_metrics(run):
    """Rows of a run's metrics.jsonl, if it is there, without lines that a killed run has cut off."""
    rows, path = [], os.path.join(run, "metrics.jsonl")
    for line in open(path, "rb") if os.path.isfile(path) else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "kind" in row
            and all(isinstance(row.get(name, 0), (int, float)) for name in ("step", "samples", "flops"))]


def measured_points(rows, x_field, y_field):
    """(xs, ys) of the rows that have y_field, xs rising. Of rows with one x, the last counts."""
    values = {row[x_field]: row[y_field] for row in rows if x_field in row and row.get(y_field) is not None}
    return tuple(zip(*sorted(values.items()))) or ((), ())


TRAINING_PANELS = (  # title, unit, {name on the chart: field}
    ("objectives", "", {"L_clip": "loss_clip", "L_dino": "loss_dino", "L_mim": "loss_mim"}),
    ("reconstruction loss", "L1 (+ LPIPS)", {"L_rec": "loss_rec"}),
    ("held-out reconstruction", "PSNR, dB", {"PSNR": "psnr"}),
    ("held-out retrieval", "top-1", {"image to text": "image_to_text", "text to image": "text_to_image",
                                     "chance": "retrieval_chance"}),
    ("class from latents", "top-1", {"linear": "linear_probe", "k-NN": "knn", "chance": "chance"}),
    ("teacher", "nats", {"entropy of its targets": "teacher_entropy",
                         "chance (uniform)": "teacher_entropy_uniform"}),
    ("discriminator's logits", "mean", {"real images": "logits_real", "reconstructions": "logits_fake"}),
    ("discriminator", "share of logits that are right", {"of both": "discriminator_accuracy"}))


def training_curves(run):
    """A tokenizer's run against samples seen -> Pillow image, without empty panels."""
    rows, charts = read_metrics(run), []
    for title, unit, fields in TRAINING_PANELS:
        lines = {name: measured_points(rows, "samples", field) for name, field in fields.items()}
        lines = {name: points for name, points in lines.items() if points[0]}
        charts += [draw_chart(lines, title, "samples seen", unit)] if lines else []
    return chart_sheet(charts or [draw_chart({}, "no training rows")], columns=3)


PAPER_PANELS = (  # title, unit ({} is a row's fid_features), field, field of what chance gives
    ("generation", "gFID ({} features)", "gfid", None),
    ("reconstruction", "rFID ({} features)", "rfid", None),
    ("linear probe on latents", "top-1", "linear_probe", "chance"),
    ("zero-shot classes", "top-1", "zero_shot_top1", "zero_shot_chance"),
    ("image to text retrieval", "top-1", "image_to_text", "retrieval_chance"),
    ("pixels", "PSNR, dB", "psnr", None))


def plot_runs(runs):
    """The paper's figures: what was measured of runs (folders) against training FLOPs -> Pillow image.
    A panel that no run has is left out; distances in features of different networks get a panel each."""
    names = [os.path.basename(os.path.abspath(run)) for run in runs]
    names = [name if names.count(name) == 1 else run for name, run in zip(names, runs)]
    rows_of = {name: [row for row in read_metrics(run) if row["kind"] == "eval" and row.get("flops", 0) > 0]
               for name, run in zip(names, runs)}
    all_rows, charts = sum(rows_of.values(), []), []
    for title, unit, field, chance_field in PAPER_PANELS:
        def label(row):
            return unit.format(row.get("fid_features", "unnamed"))
        for y_label in sorted({label(row) for row in all_rows if row.get(field) is not None}):
            # a run without points stays in, so that its colour is the same in every panel
            lines = {name: measured_points([row for row in rows if label(row) == y_label], "flops", field)
                     for name, rows in rows_of.items()}
            chance = measured_points(all_rows, "flops", chance_field)
            if len(set(chance[1])) == 1:
                lines["chance"] = chance
            charts.append(draw_chart(lines, title, "training FLOPs", y_label, log_x=True))
    if not charts:
        raise ValueError(f"no row of kind eval with flops in {', '.join(runs)}: evaluate them first")
    return chart_sheet(charts, columns=2)


# ----- The study: does understanding drive generation? (the paper's figures 2, 4, 5, 6, 7) ----------------
# Each of its runs is an ordinary one of the three scripts, in FOLDER/NAME: tokenizer/, dit/ and evaluation/.
# commands.jsonl there says how it was made, and how long that took. All runs have one DiT budget, on one
# training set, and one pair of judges; what differs is the tokenizer. study.json keeps all figures.

# The AE has the best of its own learning rates: 5e-4, 1e-3, 2e-3 gave 25.1, 26.3, 26.8 dB after 25,600
# samples (one seed). With CLIP beside it a higher one is no better: 5e-4 and 1e-3 gave 22.8 and 22.7 dB, and
# probes of 0.343 and 0.298.
VARIANTS = {"AE": ("--lambda_clip", "0", "--lambda_ssl", "0", "--lr", "2e-3"),
            "SSL+AE": ("--lambda_clip", "0"), "CLIP+AE": ("--lambda_ssl", "0"), "CLIP+SSL+AE": ()}
ENDS = ("AE", "CLIP+SSL+AE")                        # what is compared where all four would take too long
STUDY_SAMPLES = (15_360, 30_720, 61_440, 122_880)   # seen by the tokenizer: the levels of compute
STUDY_LEVEL = STUDY_SAMPLES[2]                      # of what changes data, encoder or rate
STUDY_DIT_SAMPLES = 122_880                         # seen by each DiT
STUDY_SEEDS = 3                                     # at the highest level, and of ENDS at the lowest
STUDY_IMAGES = (256, 2048, 16_384)                  # in the tokenizer's training set, beside all of them
STUDY_ENCODERS = ("tiny-128", "tiny-192")           # beside tiny
STUDY_RATES = (5e-4, 4e-3)                          # of learning, for the AE, beside its own
SCRIPTS = ("train_tokenizer.py", "train_dit.py", "evaluate.py")


@dataclass(frozen=True)
class StudyRun:
    """A tokenizer of the study, the DiT on it, and their figures."""
    variant: str
    samples: int
    seed: int = 0
    change: str = ""        # what sets it apart from the runs of the ladder, in its name
    options: tuple = ()     # of train_tokenizer.py, and so are the variant's

    @property
    def name(self):
        change = "-" + self.change.replace(" ", "_") if self.change else ""
        return f"{self.variant}-{self.samples}-seed{self.seed}{change}"


def plan_study(is_quick, is_built_in):
    """Its runs, in an order in which those that were made say the most. Other data than the built-in set gets
    the two end points of the finding alone."""
    first, *middle, last = STUDY_SAMPLES
    seeds, between = range(STUDY_SEEDS), tuple(variant for variant in VARIANTS if variant not in ENDS)
    if is_quick:
        return [StudyRun(variant, last) for variant in ENDS]
    if not is_built_in:
        return [StudyRun(variant, STUDY_LEVEL, seed) for seed in seeds for variant in ENDS]
    runs = [StudyRun(variant, samples) for samples in reversed(STUDY_SAMPLES) for variant in ENDS]
    runs += [StudyRun(variant, samples, seed) for seed in seeds[1:] for samples in (last, first)
             for variant in ENDS]
    runs += [StudyRun(variant, last, seed) for seed in seeds for variant in between]
    runs += [StudyRun(variant, samples) for samples in (*reversed(middle), first) for variant in between]
    runs += [StudyRun("CLIP+SSL+AE", last, seed, "features", ("--bottleneck_ae_only",)) for seed in seeds]
    runs += [StudyRun(variant, STUDY_LEVEL, 0, f"{n} images", ("--train_size", f"{n}"))
             for n in STUDY_IMAGES for variant in ENDS]
    runs += [StudyRun(variant, STUDY_LEVEL, 0, model, ("--model", model))
             for model in STUDY_ENCODERS for variant in ENDS]
    return runs + [StudyRun("AE", STUDY_LEVEL, 0, f"lr {lr}", ("--lr", f"{lr}")) for lr in STUDY_RATES]


def study_commands(args, run):
    """[(script, its arguments)] of a run."""
    folder = os.path.join(args.study, run.name)
    tokenizer, dit, judge = (os.path.join(*path) for path in (
        (folder, "tokenizer"), (folder, "dit"), (args.study, "judge.pt")))
    of_data = [x for name in ("data", "label", "classnames") if getattr(args, name)
               for x in (f"--{name}", getattr(args, name))]
    held_out = ["--val_data", args.val_data] if args.val_data else []
    # a measure at the start and one at the end; evaluate.py measures on more
    few = ["--eval_samples", "256", "--eval_every", f"{run.samples}"]
    as_often = ["--sample_labels", "data"] if args.data else []     # the built-in set has as many of each
    return [
        (SCRIPTS[0], [*VARIANTS[run.variant], *run.options, "--samples", f"{run.samples}",
                      "--seed", f"{run.seed}", *few, *of_data, *held_out, "--out", tokenizer]),
        (SCRIPTS[1], ["--tokenizer", tokenizer, "--samples", f"{STUDY_DIT_SAMPLES}", "--seed", f"{run.seed}",
                      "--eval_samples", "0", *of_data, "--out", dit]),
        (SCRIPTS[2], ["--tokenizer", tokenizer, "--dit", dit, "--judge", judge, "--judges", "2",
                      "--fid_features", "judge", "--lpips", "none", "--guidance", "4", "1",
                      "--n_val", "1024", "--n_train", "4096", *as_often,
                      "--out", os.path.join(folder, "evaluation")])]


class Study:
    """Makes the runs of a plan, --jobs at a time, until all are there or --hours are over."""
    def __init__(self, args):
        self.args, self.runs = args, plan_study(args.quick, args.data is None)
        self.deadline, self.children, self.lock = time.time() + 3600 * args.hours, set(), threading.Lock()
        self.jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
        self.stop, self.judging = threading.Event(), threading.Lock()
        if args.hours == 0:
            self.stop.set()
        path = os.path.join(args.study, "study.json")
        self.known = read_json(path) if os.path.isfile(path) else {}    # figures of runs by name

    def make(self):
        """Run what is missing, until the time is over, or Ctrl-C or SIGTERM says so. UserError: a script
        failed."""
        handlers = {number: signal.signal(number, lambda *_: setattr(self, "deadline", 0.0))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        n_left = sum(script not in self.done(run) for run in self.runs for script in SCRIPTS)
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(total=n_left, unit=" commands", dynamic_ncols=True,
                                                         desc="study", smoothing=0) as self.bar:
            futures = [pool.submit(self.make_run, run) for run in self.runs]
            while not all(future.done() for future in futures):
                time.sleep(0.5)
                if time.time() > self.deadline or any(f.done() and f.exception() for f in futures):
                    self.end()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for future in futures:
            future.result()

    def end(self):
        """Begin nothing more; training scripts leave a checkpoint on SIGTERM."""
        self.stop.set()
        with self.lock:
            for child in self.children:
                child.terminate()
            self.children.clear()

    def done(self, run):
        """{script: seconds} of what a run has behind it, all calls of it together; 0 of one in study.json."""
        if run.name in self.known:
            return dict.fromkeys(SCRIPTS, 0)
        path = os.path.join(self.args.study, run.name, "commands.jsonl")
        rows = [json.loads(line) for line in open(path)] if os.path.isfile(path) else []
        return {script: sum(row["seconds"] for row in rows if row["script"] == script)
                for script in {row["script"] for row in rows if row["returncode"] == 0}}

    def make_run(self, run):
        for script, arguments in study_commands(self.args, run):
            has_judges = os.path.isfile(os.path.join(self.args.study, "judge_1.pt"))
            with self.judging if script == SCRIPTS[-1] and not has_judges else nullcontext():
                if script not in self.done(run) and not self.stop.is_set():
                    self.call(run, script, arguments)

    def call(self, run, script, arguments):
        """One script, as a person would call it, with its screen in a file; what came of it is noted."""
        folder = os.path.join(self.args.study, run.name)
        os.makedirs(folder, exist_ok=True)
        if script != "evaluate.py" and os.path.isfile(os.path.join(arguments[-1], "run.json")):
            arguments = ["--out", arguments[-1], "--resume"]
        here = os.path.dirname(os.path.abspath(__file__))
        command = [sys.executable, os.path.join(here, script), *arguments]
        environment = os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // self.jobs)))
        log, start = os.path.join(folder, f"{script[:-3]}.log"), time.time()
        with open(log, "a") as screen:
            with self.lock:
                if self.stop.is_set():
                    return
                child = subprocess.Popen(command, stdout=screen, stderr=screen, env=environment)
                self.children.add(child)
            code = child.wait()
        with self.lock:
            self.children.discard(child)
        row = dict(script=script, arguments=arguments, seconds=round(time.time() - start), returncode=code)
        with open(os.path.join(folder, "commands.jsonl"), "a") as f:
            f.write(json.dumps(row) + "\n")
        if code != 0 and not self.stop.is_set():
            raise UserError(f"{script} of {run.name} failed: see the end of {log}")
        if code == 0:
            self.bar.update()
            tqdm.write(f"{run.name}: {script} took {row['seconds']} s")

    def results(self):
        """A row for each run that has been made: its figures, its tokenizer's FLOPs, seconds of all."""
        rows = []
        for run in self.runs:
            if run.name in self.known:
                rows.append(self.known[run.name])
                continue
            folder, seconds = os.path.join(self.args.study, run.name), self.done(run)
            if SCRIPTS[-1] in seconds:
                figures = read_json(os.path.join(folder, "evaluation", "results.json"))["figures"]
                tokenizer = os.path.join(folder, "tokenizer")
                arguments, flops = recorded_arguments(tokenizer), read_metrics(tokenizer)[-1]["flops"]
                rows.append(dict(name=run.name, variant=run.variant, samples=run.samples, seed=run.seed,
                                 change=run.change, model=arguments["model"], flops=flops,
                                 train_size=arguments["train_size"], seconds=sum(seconds.values()),
                                 **figures))
        return rows


STUDY_PANELS = (  # title, unit, figure; the paper's ablations have no guidance
    ("generation, no guidance", "gFID (judge)", "gfid_guidance1"),
    ("samples of their class, no guidance", "by the judge", "sample_accuracy_guidance1"),
    ("generation, guidance 4", "gFID (judge)", "gfid"),
    ("understanding: class from latents", "linear probe", "linear_probe"),
    ("reconstruction", "PSNR, dB", "psnr"), ("reconstruction", "rFID (judge)", "rfid"))


def spread(rows, x_field, figure):
    """xs and, at each, the mean, lowest and highest of a figure over seeds."""
    values = {}
    for row in rows:
        if row.get(figure) is not None:
            values.setdefault(row[x_field], []).append(row[figure])
    xs = sorted(values)
    return xs, *([f(values[x]) for x in xs] for f in (lambda v: sum(v) / len(v), min, max))


def study_chart(groups, title, x_field, x_label, figure, unit):
    """Rows {name: rows} of a figure against x_field, seeds as a band -> Pillow image."""
    points = {name: spread(rows, x_field, figure) for name, rows in groups.items()}
    return draw_chart({name: (xs, means) for name, (xs, means, *_) in points.items()}, title, x_label, unit,
                      log_x=True, bands={name: (xs, *ends) for name, (xs, _, *ends) in points.items() if xs})


def draw_study(rows, folder):
    """Its figures from the rows of Study.results: compute.png (the paper's 2 and 5), understanding.png (its
    4 and 6), data_and_size.png (7a and 7b)."""
    def of(variant, **wanted):
        wanted["variant"] = variant
        return [row for row in rows if all(row[k] == value for k, value in wanted.items())]
    ladder = {variant: of(variant, change="") for variant in VARIANTS if of(variant, change="")}
    charts = [study_chart(ladder, title, "flops", "training FLOPs of the tokenizer", figure, unit)
              for title, unit, figure in STUDY_PANELS]
    save_image(chart_sheet(charts, columns=3), os.path.join(folder, "compute.png"))
    groups = dict(ladder)
    if before_bottleneck := of("CLIP+SSL+AE", change="features"):
        groups["CLIP+SSL+AE, read before the bottleneck"] = before_bottleneck
    charts = []
    for title, label, x in (("meaning", "linear probe on latents", "linear_probe"),
                            ("share of spread", "share of the latents' variance", "class_share"),
                            ("pixels", "PSNR, dB", "psnr")):
        dots = {name: sorted((row[x], row["gfid_guidance1"]) for row in group)
                for name, group in groups.items()}
        dots = {name: tuple(zip(*pairs)) or ((), ()) for name, pairs in dots.items()}
        charts.append(draw_chart(dots, title, label, "gFID (judge), no guidance", joined=False))
    save_image(chart_sheet(charts, columns=3), os.path.join(folder, "understanding.png"))
    rows_of = {variant: of(variant, samples=STUDY_LEVEL) for variant in ENDS}
    data_rows = {variant: [row for row in rows if row["change"] in ("", f"{row['train_size']} images")]
                 for variant, rows in rows_of.items()}
    size_rows = {variant: [row for row in rows if row["change"] in ("", row["model"])]
                 for variant, rows in rows_of.items()}
    charts = [study_chart(data_rows, "data", "train_size", "images in the tokenizer's training set",
                          "gfid_guidance1", "gFID (judge), no guidance"),
              study_chart(size_rows, "size of the encoder", "flops", "training FLOPs of the tokenizer",
                          "gfid_guidance1", "gFID (judge), no guidance")]
    save_image(chart_sheet(charts, columns=2), os.path.join(folder, "data_and_size.png"))


STUDY_TABLE = (("PSNR", "psnr", 1), ("rFID", "rfid", 3), ("linear probe", "linear_probe", 3),
               ("k-NN", "knn", 3), ("class share", "class_share", 3), ("zero-shot", "zero_shot_top1", 3),
               ("gFID", "gfid_guidance1", 2), ("second judge", "gfid_judge1_guidance1", 2),
               ("of their class", "sample_accuracy_guidance1", 3),
               ("by zero-shot", "sample_zero_shot_guidance1", 3),
               ("precision", "precision_guidance1", 3), ("recall", "recall_guidance1", 3),
               ("gFID, guidance 4", "gfid", 2), ("second judge", "gfid_judge1", 2),
               ("of their class, guidance 4", "sample_accuracy", 3))


def study_table(rows):
    """Markdown: a row for each kind of run, mean and, of several seeds, +- half of their range."""
    kinds = {}
    for row in rows:
        kinds.setdefault((row["variant"], row["samples"], row["change"]), []).append(row)
    names = [name for name, *_ in STUDY_TABLE]
    lines = ["| tokenizer | samples | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for (variant, samples, change), group in kinds.items():
        cells = []
        for _, figure, digits in STUDY_TABLE:
            values = [row[figure] for row in group if row.get(figure) is not None]
            half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.{digits}f}{half}" if values else "-")
        name = f"{variant}, {change}" if change else variant
        lines.append(f"| {name} | {samples} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_study_samples(args, rows):
    """samples.png: the AE and the full method at the lowest, a middle and the highest level; one noise,
    two samples of each class in a row."""
    chosen = [row for row in rows if row["variant"] in ENDS and not row["change"] and row["seed"] == 0
              and os.path.isfile(os.path.join(args.study, row["name"], "dit", "checkpoint.pt"))]
    levels = sorted({row["samples"] for row in chosen})
    levels = {levels[k] for k in (0, len(levels) // 2, -1)} if levels else ()
    images, names = [], []
    for row in sorted(chosen, key=lambda row: (row["variant"], row["samples"])):
        if row["samples"] in levels:
            folder = os.path.join(args.study, row["name"])
            model, stats = open_dit(os.path.join(folder, "dit"), "cpu")
            tokenizer = VTP.from_pretrained(find_checkpoint(os.path.join(folder, "tokenizer"))).eval()
            labels = torch.arange(min(model.num_classes, 10)).repeat_interleave(2)
            noise, _ = noise_and_labels(range(len(labels)), 0, model.latent_shape, 1)
            recorded = recorded_arguments(os.path.join(folder, "dit"))
            sampling = {name: recorded[name] for name in SAMPLING}
            images.append(generate(model, tokenizer, stats, noise, labels, **sampling))
            names.append(f"{row['variant']}, {short_number(row['samples'])}")
    if images:
        save_image(named_rows(images, names), os.path.join(args.study, "samples.png"))


def make_study(args):
    """Make the runs that are missing, then the figures and the table of all that are there."""
    study = Study(args)
    study.make()
    rows = study.results()
    figures = json.dumps(study.known | {row["name"]: row for row in rows}, indent=1) + "\n"
    write_atomically(os.path.join(args.study, "study.json"), lambda f: f.write(figures.encode()))
    text = study_table(rows) + "\n"
    write_atomically(os.path.join(args.study, "study.md"), lambda f: f.write(text.encode()))
    draw_study(rows, args.study)
    draw_study_samples(args, rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    print(f"{text}{len(rows)} of {len(study.runs)} runs are there ({hours:.1f} hours, {study.jobs} at a time)"
          + ("" if len(rows) == len(study.runs) else ": the same command makes the rest"))


# ----- The command ----------------------------------------------------------------------------------------

def make_parser():
    """The command line; --help says what each option defaults to."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = fail

    def option(name, help, default=None, type=str, **kwargs):
        group.add_argument(name, default=default, type=type, help=f"{help} [{default}]", **kwargs)
    group = parser.add_argument_group("what is measured")
    option("--tokenizer", "a run of train_tokenizer.py, a released folder, or a hub id", "runs/tokenizer")
    option("--dit", "a run of train_dit.py; default: runs/dit, if it is on --tokenizer")
    option("--samples", "a folder of images or a .npz with arr_0, instead of --tokenizer and --dit")
    option("--images", "a folder of one's own images: their reconstructions alone")
    option("--plot", "draw the paper's figures for these runs alone", nargs="+")
    option("--study", "a folder for the runs, figures and table of the study, which are made there alone; on "
           "--data, if given, else on the built-in set. The same command goes on after a stop; runs whose "
           "figures are in FOLDER/study.json are made, whether their folders are still there or not")
    group.add_argument("--quick", action="store_true", help="of the study, two variants, one level, one seed")
    option("--hours", "after which the study stops, for now; 0: figures of what is there", 1000.0, float)
    option("--jobs", "runs of the study at a time [on a GPU 1, else one a core]", type=int)
    group = parser.add_argument_group("data; default: what --tokenizer was trained on")
    option("--data", "training set, for probes and as a reference")
    option("--val_data", "held-out set")
    option("--label", "tars: where the class is")
    option("--classnames", "a file of class names, a line each")
    option("--templates", "a file of zero-shot templates, a line each; default: a few of ours")
    group.add_argument("--squash", action="store_true", help="zero-shot on images that are squashed to the "
                       "size, as the authors do; default: on those of the other figures, a centre crop")
    option("--train_size", "scenes in the built-in set, all pairs among them", type=int)
    option("--bpe", "path of CLIP's vocabulary")
    option("--text_from", "of a DiT of texts, the tokenizer with its text tower; default: as it was trained")
    option("--image_size", "side in pixels; default: the tokenizer's own", type=int)
    option("--n_val", "held-out images (paper: 50,000)", 2048, int)
    option("--n_train", "training images", 8192, int)
    option("--n_samples", "images generated by --dit (paper: 50,000; ablations: 10,000)", 1024, int)
    option("--sample_labels", "classes of what a --dit of classes draws: all alike, as the paper's, or as "
           "often as among the --n_train training images, for a set whose classes differ in size", "uniform",
           choices=("uniform", "data"))
    option("--reference", "for samples, in place of training images: a folder, or a .npz of arr_0, or of mu "
           "and sigma (of ADM), which gFID and sFID then take")
    group = parser.add_argument_group("how")
    option("--fid_features", "inception: FID proper; judge: a classifier trained on the set (default of the "
           "built-in one, foreign to Inception); none", choices=("inception", "judge", "none"))
    option("--judge", "its file, made if it is not there; default: judge.pt in the DiT's cache, or in --out")
    option("--judges", "how many, each of another seed; figures of the second end in _judge1", 1, int)
    option("--inception", "path of its weights; auto fetches them", "auto")
    option("--lpips", "folder of its two files, auto fetches them; default: auto, none for the built-in set")
    option("--steps", "points of the sampler's grid; default, here and below: as of --dit", type=int)
    option("--method", "of the sampler", choices=METHODS)
    option("--shift", "of the sampler's times", type=float)
    option("--guidance", "of the sampler; 1: none. Figures of a second one end in its value", type=float,
           nargs="+")
    option("--seed", "of samples, and of the probes' split", 0, int)
    option("--batch_size", "images together on a rank", 128, int)
    option("--out", "default: evaluation/ in --tokenizer, or runs/evaluation")
    return parser


def recorded_arguments(run):
    """The arguments of a run, from its run.json; {} for a folder without one, or None."""
    path = os.path.join(run or "", "run.json")
    if not run or not os.path.isfile(path):
        return {}
    arguments = read_json(path).get("arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{path} holds no arguments of a run")
    for name in ("tokenizer", "data", "val_data", "classnames", "bpe", "cache", "latents_stats", "init",
                 "condition", "text_from"):
        if not isinstance(arguments.get(name), (str, type(None))):
            raise ValueError(f"{path} is broken: {name} is no path but {arguments[name]!r:.80}")
    return arguments


def read_json(path):
    """The object in a JSON file; ValueError if it is broken."""
    try:
        with open(path, "rb") as f:
            return parse_json(f.read())
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): put a copy there, or start anew elsewhere") from None


@one_line_errors()
def read_settings(argv=None):
    """Arguments, completed from the runs they name; a wrong one ends the program here."""
    parser = make_parser()
    args = parser.parse_args(argv)
    is_local = os.path.isdir(args.tokenizer)
    args.tokenizer = os.path.abspath(args.tokenizer) if is_local else args.tokenizer    # as runs record it
    belongs = is_local and not args.samples and not args.plot
    args.out = args.out or os.path.join(args.tokenizer if belongs else "runs", "evaluation")
    if min(args.n_val, args.n_train, args.n_samples, args.batch_size, args.judges) < 1:
        parser.error("--n_val, --n_train, --n_samples, --batch_size and --judges must be positive")
    for name, run, file in [("dit", args.dit, "checkpoint.pt"),
                            *(("plot", run, "metrics.jsonl") for run in args.plot or ())]:
        if run is not None and not os.path.isfile(os.path.join(run, file)):
            parser.error(f"--{name} {run}: no {file} there, so it is no such run")
    for name in ("images", "samples", "reference", "classnames", "templates", "lpips", "inception"):
        path = getattr(args, name)
        if path not in (None, "auto", "none") and not os.path.exists(path):
            parser.error(f"--{name} {path}: no such place")
    if args.samples and args.fid_features == "none":
        parser.error("--samples needs --fid_features inception or judge")
    if args.samples and args.reference:
        if args.fid_features == "judge":
            parser.error("--samples with --reference takes Inception features; for the judge's, give --data")
        args.fid_features = "inception"
    if args.study and args.data and not args.val_data:
        parser.error("--study on --data needs held-out images: --val_data")
    if args.plot or args.study or (args.samples and args.reference):
        return args
    if args.tokenizer == "runs/tokenizer" and not is_local:
        parser.error("no tokenizer in runs/tokenizer yet. First: python train_tokenizer.py")
    if args.dit is None and os.path.isfile("runs/dit/checkpoint.pt"):
        its_own = recorded_arguments("runs/dit").get("tokenizer")
        if its_own and os.path.realpath(its_own) == os.path.realpath(args.tokenizer):
            args.dit = "runs/dit"
        elif rank() == 0:
            print(f"runs/dit is left out: it draws the latents of {its_own}")
    of_tokenizer, of_dit = recorded_arguments(args.tokenizer), recorded_arguments(args.dit)
    of_data = of_tokenizer if args.data is None else {}
    is_built_in = not (args.data or of_data.get("data"))
    defaults = {name: of_dit.get(name) for name in (*SAMPLING, "precision")}
    defaults |= {name: of_data.get(name) for name in ("data", "val_data", "classnames")}
    defaults |= dict(
        condition=of_dit.get("condition", "class"),
        text_from=of_dit.get("text_from") or of_dit.get("tokenizer"),
        label=of_data.get("label", "cls"), bpe=of_tokenizer.get("bpe") or of_dit.get("bpe"),
        train_size=of_dit.get("train_size") or of_tokenizer.get("train_size") or 8192,
        fid_features="judge" if is_built_in else "inception",
        lpips="none" if is_built_in or args.samples else "auto",
        judge=os.path.join(of_dit.get("cache") or args.out, "judge.pt"))
    defaults["guidance"] = [defaults["guidance"] or 1.0]
    # pairs are new to a DiT if nothing that it was made with has seen them
    of_tower = recorded_arguments(args.text_from or defaults["text_from"])
    args.hold_out_pairs = all(run.get("hold_out_pairs") for run in (of_dit, of_tokenizer, of_tower))
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not (is_built_in or args.val_data or args.images or args.samples):
        parser.error("--data without --val_data: say which held-out images to measure on")
    for path in {args.data, args.val_data} - {None}:
        if not os.path.isdir(path):
            data.find_tars(path)
    return args


def file_digest(folder):
    """A fingerprint of a tokenizer: of the bytes of its config and weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(np.memmap(os.path.join(folder, name), mode="r"))
    return digest.hexdigest()[:16]


def fetched(make, instead):
    """make(), on the first rank of a node first; if that fails, the message says what else to do."""
    try:
        return first_on_node(make)
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{error} Or {instead}") from error


def open_fid_network(args, source, n_classes, device):
    """The network of Frechet distances, or None. A judge learns n_classes of a source, or if that is 0 as
    many as its labels tell."""
    if args.fid_features == "inception":
        instead = ("take features of a classifier of your own data, which make no FID and are named so, "
                   "--fid_features judge, or leave these figures out, --fid_features none")
        return fetched(lambda: InceptionFID(args.inception), instead).to(device)
    if args.fid_features == "none":
        return None
    n_classes = n_classes or by_first_rank(lambda: 1 + max(
        int(labels.max()) for _, _, labels in EvaluationSet(source, 16384, whole=True)))
    if n_classes == 0:
        raise UserError("a judge needs classes, and the data has none: --fid_features inception or none")
    return open_judge(args.judge, source, n_classes, device)


def open_subject(args, device):
    """--tokenizer, and LPIPS as --lpips says -> Subject."""
    model = VTP.from_pretrained(first_on_node(lambda: find_checkpoint(args.tokenizer))).to(device).eval()
    subject = Subject(model, size=args.image_size or model.config.image_size)
    if model.config.train_reconstruction and args.lpips != "none":
        subject.lpips = fetched(lambda: LPIPS(args.lpips), "leave LPIPS out: --lpips none").to(device)
    return subject


class Passing:
    """The batches of an EvaluationSet. Of what passes, rank 0 keeps the first images, to show some of them,
    and all ranks keep their captions and labels."""
    def __init__(self, batches, most=2048):
        self.batches, self.most = batches, most

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.images, self.captions, self.labels = [], [], []
        for images, captions, labels in self.batches:
            if rank() == 0:
                self.images += images[:max(0, self.most - len(self.images))].clone()
            self.captions += captions
            self.labels += labels.tolist()
            yield images, captions, labels


def measure_runs(args, device):
    """--tokenizer and --dit, or --samples, against training images -> figures; pictures in --out."""
    if args.samples and args.reference:
        network = open_fid_network(args, None, 0, device)
        sets = [features_of_set(where, network, device, args.batch_size)
                for where in (args.samples, args.reference)]
        return by_first_rank(lambda: compare_samples(*sets))
    subject = open_subject(args, device)
    dit, stats = open_dit(args.dit, device) if args.dit and not args.samples else (None, None)
    model, size = subject.model, subject.size
    common = dict(classnames=args.classnames, label=args.label, needs_caption=False)
    source = data.open_source(args.data, size, "train", args.train_size, **common)
    common["needs_caption"] = args.condition == "text"
    if not args.samples:
        folders = getattr(source, "folders", None)
        val_source = data.open_source(args.val_data, size, "val", **common, folders=folders)
    if args.templates:
        with open(args.templates, encoding="utf-8") as f:
            subject.templates = [line.strip() for line in f if line.strip()]
    gallery = EvaluationSet(source, args.n_train, args.batch_size)
    subject.class_names = source.class_names
    n_classes = max(len(source.class_names or ()), getattr(dit, "num_classes", None) or 0)
    subject.network = network = open_fid_network(args, source, n_classes, device)
    if args.samples:
        real = collect(gallery, lambda batch: subject.sample_features(batch[0].to(device)), "features")
        fake = features_of_set(args.samples, network, device, args.batch_size)
        return by_first_rank(lambda: compare_samples(fake, real))
    for k in range(1, args.judges) if isinstance(network, Judge) else ():
        path = f"_{k}".join(os.path.splitext(args.judge))
        subject.others += ((f"_judge{k}", open_judge(path, source, network.sizes[0], device, seed=k)),)
    subject.needs_reference = dit is not None and not args.reference
    if model.config.train_clip:
        subject.tokenize = first_on_node(lambda: data.make_tokenizer(model.config.text_vocab_size, args.bpe))
        if args.squash and source.class_names:
            squashed = data.open_source(args.val_data, size, "val", **common, folders=folders, squash=True)
            subject.squashed = EvaluationSet(squashed, args.n_val, args.batch_size)
    held_out = Passing(EvaluationSet(val_source, args.n_val, args.batch_size))
    row, test, train = measure(subject, held_out, gallery, args.seed, "features")
    own = in_turn(gather_objects(len(held_out.labels)))[0][:len(held_out.images)]
    if rank() == 0:
        images = torch.stack(held_out.images)
        save_image(pca_picture(model, images[:16]), os.path.join(args.out, "latents_pca.png"))
        if "psnr" in test:  # 24 of them, evenly from the worst PSNR to the best
            order = test["psnr"][own].argsort()
            chosen = order[np.linspace(0, len(order) - 1, min(24, len(order))).round().astype(int)]
            picture = reconstruction_picture(model, images[chosen], size=size)
            save_image(picture, os.path.join(args.out, "reconstructions.png"))
    if dit is not None and network is not None:
        del test        # of the other, what samples are compared with
        train = {k: x for k, x in train.items() if k.startswith(("pool", "spatial", "logits", "labels"))}
        captions = Captions(args, device, source, held_out) if args.condition == "text" else None
        row.update(measure_dit(args, subject, dit, stats, train, device, captions))
    return row


def open_dit(run, device):
    """A run of train_dit.py -> its EMA model, the (mean, std) of its latents."""
    model = DiT.from_lightningdit(os.path.join(run, "checkpoint.pt")).to(device).eval()
    return model, [x.to(device) for x in read_latent_stats(os.path.join(run, "latents_stats.pt"))]


SECOND_FIGURES = ("gfid", "precision", "recall", "sample_accuracy", "sample_zero_shot")


class Captions:
    """What a DiT of texts is measured on: held-out samples (Passing), whose captions all ranks know. Of the
    built-in set a judge of its ATTRIBUTES says what an image shows of them."""
    def __init__(self, args, device, source, held_out):
        self.batches, val_source = held_out.batches, held_out.batches.source
        self.tower, self.device, self.judge = TextTower(args.text_from, device, args.bpe), device, None
        texts = held_out.captions
        own = dict(labels=torch.tensor(held_out.labels), caption_ids=caption_ids(texts))
        if isinstance(val_source, data.BuiltinSource):
            path, sizes = "_attributes".join(os.path.splitext(args.judge)), map(len, data.ATTRIBUTES.values())
            self.judge = open_judge(path, source, tuple(sizes), device)
            order = permutation(0, 0, len(val_source))      # as EvaluationSet has it
            order = order[rank()::world_size()][:len(texts)]
            own["said"] = torch.from_numpy(val_source.attributes_said()[order])
            if args.hold_out_pairs:
                p = data.draw_parameters(val_source.indices[order], "val")
                own["is_held_out"] = torch.from_numpy(data.has_held_out_pair(p))
        of_ranks = gather_objects((texts, own))
        places = in_turn([len(texts) for texts, _ in of_ranks])
        self.places, order = places[rank()].tolist(), torch.cat(places).argsort()
        texts = sum((texts for texts, _ in of_ranks), [])
        self.texts = [texts[i] for i in order]
        self.all = {k: torch.cat([own[k] for _, own in of_ranks])[order] for k in own}

    def of(self, numbers):
        """What images of these numbers should show, by name, and y, what a DiT reads of it. Numbers behind
        the last caption begin anew."""
        numbers = [number % len(self.texts) for number in numbers]
        y = self.tower([self.texts[number] for number in numbers])
        wanted = {k: x[numbers] for k, x in self.all.items()}
        return {**wanted, "text_features": F.normalize(y, dim=-1)}, y

    @torch.no_grad()
    def shown(self, images):
        """What uint8 images (b, 3, H, W) show, by name."""
        images, size = images.to(self.device), self.tower.model.config.image_size
        features = self.tower.model.encode_image(normalize(to_image_size(images, size))).float()
        answers = {} if self.judge is None else dict(answers=self.judge.classify(images.float() / 255))
        return dict(shown_features=features, **answers)

    def of_real_images(self, n):
        """Both, of the captions' own images, the first n of them, read once more; over all ranks."""
        def batches():
            own = iter([place for place in self.places if place < n])
            for images, _, _ in self.batches:
                if not (numbers := list(itertools.islice(own, len(images)))):
                    return
                yield numbers, images[:len(numbers)]
        return collect(batches(), lambda batch: self.of(batch[0])[0] | self.shown(batch[1]))


def text_figures(features):
    """Figures of what Captions says that images should show and show: do images find their caption among all,
    and captions their image, by the towers of --text_from; how many show what their caption says of each
    attribute, and both shape and colour, by pairs that --hold_out_pairs leaves in and those that it leaves
    out. A figure of which there is no case is left out."""
    row = retrieval(features["shown_features"], features["text_features"], features["caption_ids"].tolist())
    if "answers" in features:
        right, is_said = features["answers"] == features["said"], features["said"] >= 0
        cases = {name: right[is_said[:, k], k] for k, name in enumerate(data.ATTRIBUTES)}
        both = right[:, :2].all(dim=1)
        is_held_out = features.get("is_held_out", torch.zeros_like(both))
        cases |= dict(shape_and_colour=both[~is_held_out], held_out_pairs=both[is_held_out])
        row.update({name: case.float().mean().item() for name, case in cases.items() if len(case)})
    return row


def sample_figures(subject, fake, train, ending=""):
    """Of features of samples and of a reference: compare_samples, how many samples are of their class by a
    judge and by zero_shot, and text_figures. With an ending to their names, and of further networks, of the
    first two SECOND_FIGURES alone."""
    row = {}
    for of_network, network in (("", subject.network), *subject.others):
        part = lambda features: {k.removesuffix(of_network): x for k, x in features.items()
                                 if k.endswith(of_network)}
        figures = compare_samples(part(fake), part(train))
        if isinstance(network, Judge):
            right = fake[f"logits{of_network}"].argmax(dim=1) == fake["labels"]
            right = right[fake["labels"] >= 0].float()
            figures.update(real_accuracy=network.accuracy)
            figures.update(dict(sample_accuracy=right.mean().item()) if len(right) else {})
        if of_network == "" and "image_features" in fake:
            by_text = zero_shot(subject.model, fake["image_features"], fake["labels"], subject.class_names,
                                subject.templates, subject.tokenize)
            figures["sample_zero_shot"] = by_text["zero_shot_top1"]
        row.update({f"{k}{of_network}{ending}": x for k, x in figures.items()
                    if not (of_network or ending) or k in SECOND_FIGURES})
    of_texts = text_figures(fake) if "shown_features" in fake else {}
    return row | {f"drawn_{k}{ending}": x for k, x in of_texts.items()}


def measure_dit(args, subject, model, stats, train, device, captions=None):
    """Samples of --dit, a model of latents with these statistics, against features of training images ->
    figures; a picture in --out. Figures of a further --guidance W end in _guidanceW, those of a further judge
    N in _judgeN. captions: of a DiT of texts; then figures of text_figures, drawn_ before them, and
    real_drawn_ those of the captions' own images."""
    if captions is not None:
        captions.tower.check(model)
    tokenizer = subject.model
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    sampling["bf16"] = args.precision != "fp32"
    of_data = None
    if args.sample_labels == "data" and captions is None:
        of_data = by_first_rank(lambda: train["labels"][train["labels"] >= 0])
        if len(of_data) == 0:
            raise UserError("--sample_labels data: no training image has a label")
        if int(of_data.max()) >= model.num_classes:
            raise UserError(f"--sample_labels data: label {int(of_data.max())}, and a DiT of "
                            f"{model.num_classes} classes")

    def compute(numbers):
        noise, labels = noise_and_labels(numbers, args.seed, model.latent_shape, model.num_classes or 1)
        if of_data is not None:
            drawn = [np.random.default_rng([args.seed, number]).integers(len(of_data)) for number in numbers]
            labels = of_data[drawn]
        y = labels
        if captions is not None:
            wanted, y = captions.of(numbers)
            labels = wanted["labels"]
        images = to_uint8(generate(model, tokenizer, stats, noise, y, **sampling))
        features = dict(subject.sample_features(images), labels=labels)
        if captions is not None:
            features |= wanted | captions.shown(images)
        elif subject.tokenize and subject.class_names:
            features["image_features"] = tokenizer.encode_image(normalize(images.float() / 255)).float()
        return features
    if args.reference:
        train = features_of_set(args.reference, subject.network, device, args.batch_size)
    row = {} if of_data is None else dict(sample_labels="data")
    for guidance in args.guidance:
        sampling["guidance"] = guidance
        ending = "" if guidance == args.guidance[0] else f"_guidance{guidance:g}"
        fake = collect(own_numbers(args.n_samples, args.batch_size), compute, "samples")
        row.update(by_first_rank(lambda: sample_figures(subject, fake, train, ending)))
    shown = None
    if captions is not None:
        images = captions.of_real_images(args.n_samples)
        of_images = by_first_rank(lambda: text_figures(images))
        row.update({f"real_drawn_{k}": x for k, x in of_images.items()})
        shown = captions.texts[:8], captions.of(range(8))[1]
    if rank() == 0:
        sampling["guidance"] = args.guidance[0]
        picture = sample_picture(model, tokenizer, stats, subject.class_names, args.seed, texts=shown,
                                 **sampling)
        save_image(picture, os.path.join(args.out, "samples.png"))
    return row


def own_images(args, device):
    """Reconstruct --images, on every rank, as they are few -> figures; a picture in --out."""
    subject = open_subject(args, device)
    images, parts, rows = ImageSet(args.images, subject.size), [], []
    for numbers in tqdm(torch.arange(len(images)).split(8), desc="reconstructing", disable=rank() != 0):
        pixels = to_image_size(images.batch(numbers).to(device), subject.size)
        rebuilt, measured = reconstruct(subject.model, pixels, lpips=subject.lpips)
        parts.append(measured)
        rows += [pixels.cpu(), rebuilt.cpu()] if len(rows) < 6 else []  # the first 24 images
    if rank() == 0:
        save_image(image_grid(rows, max(1, 128 // subject.size)), os.path.join(args.out, "own_images.png"))
    figures = {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
    return figures | dict(n_images=len(images))


TABLE = {
    "reconstruction, held-out images": "rfid rsfid psnr ssim lpips",
    "understanding, held-out images":
        "zero_shot_top1 zero_shot_interval zero_shot_top5 zero_shot_chance zero_shot_templates image_to_text "
        "text_to_image retrieval_chance linear_probe linear_probe_balanced knn dino_1_linear_probe "
        "dino_4_linear_probe dino_1_knn class_share chance",
    "generation": "gfid sfid inception_score precision recall sample_accuracy sample_zero_shot real_accuracy",
    "images of held-out captions":
        "drawn_image_to_text drawn_text_to_image drawn_shape drawn_colour drawn_size drawn_place "
        "drawn_background drawn_shape_and_colour drawn_held_out_pairs"}


def table(row):
    """The figures of a row as text, under the names of measure; beside distances, what they compare."""
    lines = []
    for heading, names in TABLE.items():
        measured = [name for name in names.split() if row.get(name) is not None]
        lines += [heading] if measured else []
        lines += [f"  {name:<24}{row[name]:>10.4g}   {conditions(name, row)}".rstrip() for name in measured]
    return "\n".join(lines)


def conditions(name, row):
    """Features, numbers of images and convention of a distance, or "" for other figures."""
    names = dict(inception="Inception, resized as by pytorch-fid", judge="the judge")
    network = names.get(row["fid_features"])
    if name in ("rfid", "rsfid"):
        return f"{network}; {row['n_val']:,} images and their reconstructions"
    if name == "inception_score":
        return f"{network}; {row['n_samples']:,} samples"
    if name.startswith("drawn_"):
        return f"real images {row.get('real_' + name, math.nan):.4g}"
    against = f"{row.get('n_references', 0):,} reference images"
    if "sample_labels" in row:
        against += ", of classes as often as there"
    if name in ("gfid", "sfid") and row["reference_moments"]:
        against = "the moments in --reference, with the resizing of whoever made them"
    is_of_features = name in ("gfid", "sfid", "precision", "recall")
    return f"{network}; {row['n_samples']:,} samples against {against}" if is_of_features else ""


def write_results(args, row):
    """What was measured, as JSON in --out; of the tokenizer's run, a row in its metrics.jsonl as well."""
    path = os.path.join(args.out, "own_images.json" if args.images else "results.json")
    text = json.dumps(dict(figures=row, arguments=vars(args)), indent=2) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))
    metrics = os.path.join(args.tokenizer, "metrics.jsonl")
    if not args.samples and not args.images and os.path.isfile(metrics):
        last = [r for r in read_metrics(args.tokenizer) if r["kind"] == "train"][-1]
        row = dict(kind="eval", **{k: last[k] for k in ("step", "samples", "flops")}, **row)
        with open(metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


@one_line_errors()
def main(argv=None):
    device, args = init_distributed(), read_settings(argv)
    by_first_rank(lambda: claim_folder(args.study or args.out))
    if args.plot and rank() == 0:
        save_image(plot_runs(args.plot), os.path.join(args.out, "figures.png"))
    if args.study:
        make_study(args)
    elif not args.plot:
        row = own_images(args, device) if args.images else measure_runs(args, device)
        row["fid_features"] = args.fid_features
        if rank() == 0:
            print(table(row))
            write_results(args, row)
    if rank() == 0:
        print(f"results and pictures in {args.study or args.out}")
    leave_distributed()


if __name__ == "__main__":
    main()
