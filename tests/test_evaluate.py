"""Every number that evaluate.py prints equals its definition, written out slowly; its pictures; the command."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageColor

import data
import evaluate
from conftest import micro_config, run_script
from data import TEMPLATES, byte_tokenizer
from evaluate import (PENALTIES, FeatureStatistics, InceptionFID, cached_features, frechet_distance, image_batches, inception_score,
                      load_statistics, logistic_regression, plot_runs, precision_recall, psnr, ranked_reconstructions_picture, ssim)
from vtp import VTP, normalize
RELATIVE = dict(rtol=1e-4, atol=0)


# --- SSIM, PSNR ---

def ssim_of_planes(x, y, data_range):
    """Two planes (H, W): the weighted mean, variance and covariance in each 11 x 11 window, one window at a time."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5 ** 2))
    weights, values = weights / weights.sum(), []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            values.append((2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_its_definition_over_windows_inside_the_image(data_range):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 15, 18)
    y = (0.7 * x + 0.3 * torch.rand(2, 3, 15, 18)) * data_range
    x = x * data_range
    expected = [np.mean([ssim_of_planes(a.double().numpy(), b.double().numpy(), data_range) for a, b in zip(x[i], y[i])]) for i in range(2)]
    torch.testing.assert_close(ssim(x, y, data_range), torch.tensor(expected).float(), **RELATIVE)


def test_ssim_blurs_with_a_gaussian_of_sigma_one_and_a_half():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 32, 40))
    blur = lambda z: scipy.ndimage.gaussian_filter(z, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
    mean_x, mean_y = blur(x), blur(y)
    top = (2 * mean_x * mean_y + 1e-4) * (2 * (blur(x * y) - mean_x * mean_y) + 9e-4)
    bottom = (mean_x ** 2 + mean_y ** 2 + 1e-4) * (blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2 + 9e-4)
    assert ssim(*torch.tensor(np.stack([x, y]))[:, None, None]).item() == pytest.approx((top / bottom).mean(), rel=1e-5)


def test_ssim_of_an_image_with_itself_is_1_and_flat_images_are_compared_by_luminance():
    x = torch.rand(1, 3, 16, 16)
    assert ssim(x, x).item() == 1
    bright, brighter = torch.full((1, 1, 11, 11), 0.90), torch.full((1, 1, 11, 11), 0.95)
    assert ssim(bright, brighter).item() == pytest.approx((2 * 0.9 * 0.95 + 1e-4) / (0.9 ** 2 + 0.95 ** 2 + 1e-4), rel=1e-6)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(x[..., :10], x[..., :10])


def test_psnr_is_its_definition():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    for a, b, value in zip(x, y, psnr(x, y)):
        assert value.item() == pytest.approx(10 * math.log10(1 / np.mean((a.double().numpy() - b.double().numpy()) ** 2)), rel=1e-5)


# --- Frechet distance ---

def rotation(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def test_frechet_distance_of_gaussians_with_common_axes_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b, mu1, mu2 = rng.random((4, 6)) + 0.1
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, rel=1e-10)
    Q = rotation(6)
    assert frechet_distance(Q @ mu1, Q * a @ Q.T, Q @ mu2, Q * b @ Q.T) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_two_planar_gaussians_is_the_closed_form():
    # 2 x 2: tr (M^1/2) = sqrt(tr M + 2 sqrt(det M)), here for covariances with different axes
    c, s = math.cos(0.7), math.sin(0.7)
    R = np.array([[c, -s], [s, c]])
    sigma1, sigma2 = np.diag([3.0, 0.5]), R @ np.diag([2.0, 0.1]) @ R.T
    M = sigma1 @ sigma2
    expected = 4.0 + 3.5 + 2.1 - 2 * math.sqrt(np.trace(M) + 2 * math.sqrt(np.linalg.det(M)))
    assert frechet_distance([0, 2], sigma1, [0, 0], sigma2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_the_definition_by_the_matrix_square_root():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24)), rng.standard_normal((300, 24)) + 0.5
    (mu1, sigma1), (mu2, sigma2) = ((z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("n", [10, 200, 1000])
def test_frechet_distance_of_a_set_to_itself_is_0(n):
    x = np.random.default_rng(0).standard_normal((n, 256)) * np.logspace(-4, 1, 256)
    mu, sigma = x.mean(axis=0), np.cov(x, rowvar=False)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-6
    assert 0 <= frechet_distance(mu, 0 * sigma, mu, 0 * sigma) < 1e-6


def test_frechet_distance_of_fewer_samples_than_features_is_that_of_their_gram_matrix():
    # sigma = X^T X: the trace of (sigma1 sigma2)^1/2 is the nuclear norm of X Y^T, a matrix as small as the sets
    rng = np.random.default_rng(0)
    x, y = 3 * rng.standard_normal((12, 200)), rng.standard_normal((9, 200)) + 0.2
    X, Y = ((z - z.mean(axis=0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + (X ** 2).sum() + (Y ** 2).sum() - 2 * np.linalg.norm(X @ Y.T, "nuc")
    found = frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False))
    assert isinstance(found, float) and found == pytest.approx(expected, rel=1e-8)
    # against a full-rank one: the root by the eigenvalues of X sigma X^T; no direction without variance may add to it
    X[0] *= 100
    sigma = np.cov(rng.standard_normal((1000, 200)), rowvar=False)
    expected = (X ** 2).sum() + np.trace(sigma) - 2 * np.sqrt(np.linalg.eigvalsh(X @ sigma @ X.T).clip(0)).sum()
    assert frechet_distance(np.zeros(200), X.T @ X, np.zeros(200), sigma) == pytest.approx(expected, rel=5e-11)


def test_frechet_distance_refuses_what_has_none():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(mu, sigma * np.nan, mu, sigma)
    with pytest.raises(ValueError, match="different features"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))


# --- Inception score ---

def test_inception_score_of_known_distributions():
    certain = torch.eye(8).repeat(10, 1) * 1000                                   # each image one class, each class as often
    assert inception_score(certain, splits=10) == pytest.approx((8, 0), abs=1e-9)
    assert inception_score(torch.randn(1, 8).repeat(80, 1), splits=10) == pytest.approx((1, 0), abs=1e-9)
    by_class = torch.eye(8).repeat_interleave(10, dim=0) * 1000                   # one class in each split: nothing is shuffled
    assert inception_score(by_class, splits=8) == pytest.approx((1, 0), abs=1e-9)
    assert inception_score(by_class, splits=1) == pytest.approx((8, 0), abs=1e-9)


def test_inception_score_is_its_definition_over_consecutive_splits():
    torch.manual_seed(0)
    logits, scores = 3 * torch.randn(40, 6), []
    for start in range(0, 40, 10):
        p = [[math.exp(z) for z in row] for row in logits[start:start + 10].double().tolist()]
        p = [[z / sum(row) for z in row] for row in p]
        marginal = [sum(row[k] for row in p) / 10 for k in range(6)]
        scores.append(math.exp(sum(row[k] * math.log(row[k] / marginal[k]) for row in p for k in range(6)) / 10))
    mean = sum(scores) / 4
    assert inception_score(logits, splits=4) == pytest.approx((mean, math.sqrt(sum((s - mean) ** 2 for s in scores) / 4)), rel=1e-6)
    with pytest.raises(ValueError, match="as many images"):
        inception_score(logits[:3], splits=4)


# --- precision and recall ---

def test_precision_and_recall_of_a_configuration_by_hand():
    # k = 1 on a line; balls of real points: [-1, 1], [0, 2], [8, 16], [4, 12] around 0, 1, 12, 8
    real, fake = torch.tensor([0.0, 1.0, 8.0, 12.0])[:, None], torch.tensor([2.0, 3.0, 16.5, 20.0])[:, None]
    # of the fakes 2 alone lies in one (on its border); balls of fakes: [1, 3], [2, 4], [13, 20], [16.5, 23.5], which hold 1 alone
    assert precision_recall(real, fake, k=1) == (0.25, 0.25)
    assert precision_recall(real, torch.tensor([2.0, 5.0, 9.0, 30.0])[:, None], k=1) == (0.75, 1)      # [-1, 5], [2, 8], [5, 13], [9, 51]
    assert precision_recall(real, real + 100, k=1) == (0, 0)


@pytest.mark.parametrize("n_rows", [7, 512])
def test_precision_and_recall_are_their_definition(n_rows):
    torch.manual_seed(0)
    scales = torch.logspace(-2, 0, 40)
    real, fake = torch.randn(60, 40) * scales + 100, 1.1 * torch.randn(45, 40) * scales + 100       # far from the origin
    fake[:6] = real[:4] = 100 + 7.7 * torch.rand(40)                             # copies, apart from the rest: balls of radius 0

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[2]

    def share_inside(points, others):
        radii = [radius(others, i) for i in range(len(others))]
        return sum(any(math.dist(p, o) <= r for o, r in zip(others, radii)) for p in points) / len(points)
    a, b = real.double().tolist(), fake.double().tolist()
    expected = share_inside(b, a), share_inside(a, b)
    assert 0.2 < expected[0] < 0.98 and 0.2 < expected[1] < 0.98
    assert precision_recall(real, fake, n_rows=n_rows) == pytest.approx(expected, rel=1e-6)
    assert precision_recall(real, real) == (1, 1)


@pytest.mark.parametrize("dim", [256, 2048])
def test_a_copy_lies_exactly_on_its_original(dim):
    x = 100 + 7.7 * torch.rand(40, dim, generator=torch.Generator().manual_seed(0))
    distances = evaluate._squared_distances(x, x, n_columns=16)
    assert (distances.diagonal() == 0).all()
    torch.testing.assert_close(distances, ((x.double()[:, None] - x.double()) ** 2).sum(dim=2), rtol=1e-6, atol=0)


def test_precision_and_recall_need_more_than_k_features_of_one_size():
    for real, fake in (((3, 5), (9, 5)), ((9, 5), (9, 4))):
        with pytest.raises(ValueError, match="more than 3 features of one size"):
            precision_recall(torch.randn(real), torch.randn(fake))


# --- streaming statistics ---

@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 0, 13, 1, 29)])
def test_streamed_statistics_are_those_of_all_features_at_once(sizes, offset):
    features = np.random.default_rng(0).standard_normal((50, 9)) @ rotation(9) * np.logspace(-2, 1, 9) + offset
    statistics = FeatureStatistics(9)
    for batch in torch.from_numpy(features).split(sizes):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-12)


def test_statistics_survive_their_file_and_those_of_adm_are_read(tmp_path):
    statistics, spatial = FeatureStatistics(4), FeatureStatistics(2)
    with pytest.raises(ValueError, match="at least 2 images"):
        statistics.save(tmp_path / "none.npz")
    assert not os.listdir(tmp_path)
    statistics.update(torch.randn(5, 4))
    spatial.update(torch.randn(5, 2))
    statistics.save(tmp_path / "a.npz")
    statistics.save(tmp_path / "b.npz", spatial)
    a, b = load_statistics(tmp_path / "a.npz"), load_statistics(tmp_path / "b.npz")
    assert set(a) == {"mu", "sigma"} and set(b) == {"mu", "sigma", "mu_s", "sigma_s"}
    np.testing.assert_array_equal(a["sigma"], statistics.covariance)
    np.testing.assert_array_equal(b["mu_s"], spatial.mean)
    np.savez(tmp_path / "adm.npz", **{**b, "mu": a["mu"].astype(np.float32), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)})
    adm = load_statistics(tmp_path / "adm.npz")
    assert set(adm) == set(b) and all(v.dtype == np.float64 for v in adm.values())
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(1))
    with pytest.raises(ValueError, match="mu and sigma missing"):
        load_statistics(tmp_path / "images.npz")


def on_rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    features, statistics = torch.load(os.path.join(folder, "features.pt"), weights_only=True), []
    for seen in ((features[:30], features[30:]), (features, features[:0])):     # in the second, rank 1 has seen nothing
        statistics.append(FeatureStatistics(6))
        statistics[-1].update(seen[rank])
    merged = [(torch.from_numpy(m.mean), torch.from_numpy(m.covariance)) for m in (s.merge_ranks() for s in statistics)]
    images = torch.cat(list(image_batches(os.path.join(folder, "images.npz"), 2)))
    torch.save((merged, images), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_ranks_share_the_images_and_merge_to_the_statistics_of_one(tmp_path):
    features = np.random.default_rng(0).standard_normal((100, 6)) + np.array([1e4, 0, 0, 5, 0, -1e4])
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    torch.save(torch.from_numpy(features), tmp_path / "features.pt")
    np.savez(tmp_path / "images.npz", arr_0=images)
    mp.spawn(on_rank, args=(2, str(tmp_path)), nprocs=2)
    for r in range(2):
        merged, share = torch.load(tmp_path / f"{r}.pt", weights_only=True)
        for mean, covariance in merged:
            np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)
        np.testing.assert_array_equal(share.numpy(), images[r::2].transpose(0, 3, 1, 2))


# --- where images come from ---

def test_images_come_from_a_folder_sorted_and_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    for name, image in zip(("a/1.png", "a/2.PNG", "b/c/0.png", "d.png", "e.bmp"), images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    batches = image_batches(str(tmp_path), 2)
    assert len(batches) == 3 and [b.shape for b in batches] == [(2, 3, 9, 12), (2, 3, 9, 12), (1, 3, 9, 12)]
    found = torch.cat(list(batches))
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy().transpose(0, 2, 3, 1), images)
    Image.new("RGB", (12, 8)).save(tmp_path / "f.png")
    with pytest.raises(ValueError, match=r"f.png is 12 x 8, .*a/1.png is 12 x 9"):
        list(image_batches(str(tmp_path), 2))
    assert torch.cat(list(image_batches(str(tmp_path), 4, size=8))).shape == (6, 3, 8, 8)
    (tmp_path / "g.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="g.png is not an image"):
        list(image_batches(str(tmp_path), 2, size=8))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_come_from_an_npz_mapped_or_compressed(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", np.asarray(images), labels=np.arange(5))
    assert np.array_equal(torch.cat(list(image_batches(str(tmp_path / "a.npz"), 3))).numpy().transpose(0, 2, 3, 1), images)
    assert isinstance(evaluate._open_arr_0(tmp_path / "a.npz"), np.memmap) == (save is np.savez)


def test_a_bad_place_for_images_is_an_error_before_the_first_batch(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_batches(str(tmp_path / "nowhere"), 2)
    with pytest.raises(ValueError, match="holds no images"):
        image_batches(str(tmp_path), 2)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="neither a folder of images nor an .npz"):
        image_batches(str(tmp_path / "a.txt"), 2)
    for name, arrays, message in (("b", dict(mu=np.zeros(3)), "no arr_0 in it"), ("c", dict(arr_0=np.zeros((2, 4, 4, 3))), "must be uint8"),
                                  ("d", dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), "must be uint8"),
                                  ("e", dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "holds no images")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            image_batches(str(tmp_path / f"{name}.npz"), 2)


# --- the FID network ---

@pytest.fixture(scope="module")
def inception():
    """The network with weights by a formula: sines of index and layer, at a scale that keeps activations alive to the end."""
    model = InceptionFID(None)
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) ** 1.3 * 0.37 + i).view(tensor.shape)
        if name.endswith("conv.weight"):
            wave = 2 * wave / math.sqrt(tensor[0].numel())
        elif name.endswith(("bn.weight", "running_var")):
            wave = 1 + 0.3 * wave
        elif name.endswith(("bn.bias", "running_mean")):
            wave = 0.2 * wave
        if tensor.is_floating_point():
            tensor.copy_(wave)
    return model


def slow_inception(state, x, used):
    """Prepared images (B, 3, 299, 299) -> pool3, spatial, logits, written branch by branch from a state dict; used: names of units."""
    def unit(x, name, stride=1, pad=(0, 0)):
        used.append(name)
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=pad)
        weight, bias, mean, var = (state[f"{name}.bn.{k}"].view(-1, 1, 1) for k in ("weight", "bias", "running_mean", "running_var"))
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)

    def chain(x, *names, stride=1):       # units that keep the size; a stride at the last one, which then has no padding
        for name in names:
            h, w = state[f"{name}.conv.weight"].shape[-2:]
            last = stride == 2 and name == names[-1]
            x = unit(x, name, 2 if last else 1, (0, 0) if last else ((h - 1) // 2, (w - 1) // 2))
        return x

    def windows(x, fill, stride=1, pad=1):                                        # (B, C, h, w, 9)
        x = F.pad(x, (pad,) * 4, value=fill).unfold(2, 3, stride).unfold(3, 3, stride)
        return x.flatten(-2)
    mean_inside = lambda x: windows(x, 0).sum(dim=-1) / windows(torch.ones_like(x), 0).sum(dim=-1)
    highest = lambda x: windows(x, -torch.inf).amax(dim=-1)
    shrink = lambda x: windows(x, 0, stride=2, pad=0).amax(dim=-1)
    numbered = lambda block, stem, *suffixes: [f"{block}.{stem}_{s}" for s in suffixes]

    x = unit(unit(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = shrink(unit(x, "Conv2d_2b_3x3", pad=(1, 1)))
    x = shrink(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"))
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([chain(x, f"{b}.branch1x1"), chain(x, *numbered(b, "branch5x5", 1, 2)), chain(x, *numbered(b, "branch3x3dbl", 1, 2, 3)),
                       chain(mean_inside(x), f"{b}.branch_pool")], dim=1)
    x = torch.cat([chain(x, "Mixed_6a.branch3x3", stride=2), chain(x, *numbered("Mixed_6a", "branch3x3dbl", 1, 2, 3), stride=2), shrink(x)], dim=1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        point = chain(x, f"{b}.branch1x1")
        if b == "Mixed_6d":
            spatial = torch.stack([point[:, c, i, j] for i in range(17) for j in range(17) for c in range(7)], dim=1)
        x = torch.cat([point, chain(x, *numbered(b, "branch7x7", 1, 2, 3)), chain(x, *numbered(b, "branch7x7dbl", 1, 2, 3, 4, 5)),
                       chain(mean_inside(x), f"{b}.branch_pool")], dim=1)
    x = torch.cat([chain(x, *numbered("Mixed_7a", "branch3x3", 1, 2), stride=2), chain(x, *numbered("Mixed_7a", "branch7x7x3", 1, 2, 3, 4), stride=2),
                   shrink(x)], dim=1)
    for b, pool in (("Mixed_7b", mean_inside), ("Mixed_7c", highest)):
        short, long = chain(x, f"{b}.branch3x3_1"), chain(x, *numbered(b, "branch3x3dbl", 1, 2))
        x = torch.cat([chain(x, f"{b}.branch1x1"), chain(short, f"{b}.branch3x3_2a"), chain(short, f"{b}.branch3x3_2b"),
                       chain(long, f"{b}.branch3x3dbl_3a"), chain(long, f"{b}.branch3x3dbl_3b"), chain(pool(x), f"{b}.branch_pool")], dim=1)
    assert x.shape[1:] == (2048, 8, 8)
    pool3 = x.sum(dim=(2, 3)) / 64
    return pool3, spatial, pool3 @ state["fc.weight"].T


@torch.no_grad()
def test_inception_gives_all_three_outputs_as_its_definition_does(inception):
    images = torch.randint(0, 256, (2, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    used, found = [], inception(images)
    expected = slow_inception(inception.state_dict(), inception.prepare(images).contiguous(), used)
    assert [tuple(x.shape) for x in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    for x, y in zip(found, expected):
        assert y.std() > 0.05 and (y[0] - y[1]).abs().mean() > 1e-3              # alive, and not the same for every image
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
    tensors = ["conv.weight"] + [f"bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names = {f"{name}.{k}" for name in used for k in tensors}
    assert len(used) == 94 and set(inception.state_dict()) == names | {"fc.weight", "fc.bias"} and len(names) + 2 == 566
    for x, y in zip(found, inception(images.float() / 255)):
        torch.testing.assert_close(x, y)


def test_pools_of_inception_differ_at_the_border_and_by_block():
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    assert evaluate.average_pool(x)[0, 0, 0, 0] == (1 + 2 + 5 + 6) / 4 and evaluate.average_pool(x)[0, 0, 1, 1] == 6
    assert evaluate.max_pool(-x)[0, 0, 3, 3] == -11 and evaluate.shrinking_pool(x).tolist() == [[[[11.0]]]]
    pools = {name: [b[0] for b in branches if callable(b[0])] for name, branches in evaluate.MIXED_BLOCKS.items()}
    assert [name for name, (pool,) in pools.items() if pool is evaluate.max_pool] == ["Mixed_7c"]
    assert [name for name, (pool,) in pools.items() if pool is evaluate.shrinking_pool] == ["Mixed_6a", "Mixed_7a"]


@pytest.mark.parametrize("side", [37, 299, 400])
def test_inception_sees_plain_bilinear_samples_at_half_pixel_centres(inception, side):
    image = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    at = ((np.arange(299) + 0.5) * side / 299 - 0.5).clip(0, side - 1)           # no averaging, whatever the scale
    low, part = np.floor(at).astype(int), at - np.floor(at)
    high = np.minimum(low + 1, side - 1)
    rows = image[:, low] * (1 - part)[:, None] + image[:, high] * part[:, None]
    expected = 2 * (rows[:, :, low] * (1 - part) + rows[:, :, high] * part) / 255 - 1
    np.testing.assert_allclose(inception.prepare(torch.from_numpy(image)[None])[0].numpy(), expected, atol=5e-5)


def test_inception_loads_the_published_file_strictly_and_never_learns(inception, tmp_path):
    state = inception.state_dict()
    torch.save(state, tmp_path / "inception.pth")
    loaded = InceptionFID(str(tmp_path / "inception.pth")).train(False)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters()) and not any(m.training for m in InceptionFID(None).modules())
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch1x1.bn.running_mean": (64,),
              "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1), "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
              "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="fc.bias"):
        InceptionFID(str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        InceptionFID(str(tmp_path / "nowhere.pth"))


def test_inception_is_fetched_once_with_its_digest(monkeypatch, tmp_path):
    calls = []

    def fetch(url, path, sha256):
        calls.append((url, os.path.basename(path), sha256))
        return str(tmp_path / "missing")
    monkeypatch.setattr(evaluate, "download", fetch)
    with pytest.raises(FileNotFoundError):
        InceptionFID("auto")
    (url, name, sha256), = calls
    assert name == "pt_inception-2015-12-05-6726825d.pth" and url.endswith("/mseitzer/pytorch-fid/releases/download/fid_weights/" + name)
    assert sha256.startswith("6726825d") and len(sha256) == 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VTP(micro_config()).eval()


@pytest.fixture(scope="module")
def images():
    """Blobs of four colours, uint8 (24, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    return (F.interpolate(torch.rand(24, 3, 4, 4, generator=generator), (64, 64), mode="bilinear") * 255).byte()


def clusters(n, n_classes=4, dim=12, seed=0, spread=1.5):
    """Correlated features of different scales around class centres, which overlap -> (n, dim) float64, labels (n,)."""
    generator = torch.Generator().manual_seed(7)
    centres, mix = (torch.randn(k, dim, generator=generator, dtype=torch.float64) for k in (n_classes, dim))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    return (centres[labels] + spread * torch.randn(n, dim, generator=generator, dtype=torch.float64)) @ mix * torch.logspace(-2, 2, dim) + 50, labels


# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_probe_features_are_the_latents_mean_and_cls_of_the_last_layers_with_the_mean_of_the_last_patches(model, images):
    x = normalize(images[:3].float() / 255)
    (_, cls_1), (patches, cls_2) = model.intermediate_layers(x, 2)                 # this model has two layers: dino_4 takes both
    features, cls, last = evaluate.probe_features(model, x)
    torch.testing.assert_close(features["dino_4"], torch.cat((cls_1, cls_2, patches.mean(dim=1)), dim=1))
    torch.testing.assert_close(features["dino_1"], torch.cat((cls_2, patches.mean(dim=1)), dim=1))
    torch.testing.assert_close(features["latents"], model.encode(x).mean(dim=(2, 3)))
    assert torch.equal(cls, cls_2) and torch.equal(last, patches)


def test_cached_features_resume_where_they_stopped_and_another_fingerprint_starts_anew(tmp_path):
    calls, broken = [], [2]

    def compute(k):
        if k in broken:
            raise KeyboardInterrupt
        calls.append(k)
        return dict(features=torch.full((2 + k, 3), float(k)), labels=torch.arange(2 + k))
    with pytest.raises(KeyboardInterrupt):
        cached_features(str(tmp_path), "weights A", 4, compute)
    assert calls == [0, 1]
    broken.clear()
    found = cached_features(str(tmp_path), "weights A", 4, compute)
    assert calls == [0, 1, 2, 3]
    assert found["features"][:, 0].tolist() == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 5 and found["labels"].tolist() == [*range(2), *range(3), *range(4), *range(5)]
    again = cached_features(str(tmp_path), "weights A", 4, compute)
    assert len(calls) == 4 and torch.equal(again["features"], found["features"])
    cached_features(str(tmp_path), "weights B", 4, compute)
    assert calls[4:] == [0, 1, 2, 3]


def test_cached_features_of_two_ranks_are_each_computed_once_and_come_in_order(tmp_path, monkeypatch):
    calls = {0: [], 1: []}
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)

    def run(r):
        monkeypatch.setattr(evaluate, "rank", lambda: r)
        return cached_features(str(tmp_path), "x", 3, lambda k: calls[r].append(k) or dict(features=torch.tensor([k])))
    monkeypatch.setattr(evaluate, "barrier", lambda: None if evaluate.rank() else run(1))      # rank 0 waits until rank 1 is done
    assert run(0)["features"].tolist() == [0, 1, 2]
    assert calls == {0: [0, 2], 1: [1]}


# ----------------------------------------------------------------------------------------------------------------------
# Zero-shot
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_zero_shot_equals_a_loop_over_classes_and_templates(model):
    names = ["cat", "dog", "red apple", "tree", "house", "car", "boat"]
    labels = torch.arange(40) % len(names)
    classes = []
    for name in names:
        total = 0
        for template in TEMPLATES:
            feature = model.encode_text(byte_tokenizer([template.format(name)], 64), normalize=False)[0]
            total = total + feature / feature.norm()
        classes.append(total / total.norm())
    torch.manual_seed(0)      # features near their class, so that accuracy is neither 0 nor 1: classes of an untrained model lie close together
    spread = torch.stack(classes).std(dim=0).norm()
    features = F.normalize(torch.stack(classes)[labels] + spread * 0.3 * torch.randn(40, classes[0].numel()), dim=1)
    top1 = top5 = 0
    for feature, label in zip(features, labels.tolist()):
        order = sorted(range(len(names)), key=lambda c: -float(feature @ classes[c]))
        top1, top5 = top1 + (order[0] == label) / 40, top5 + (label in order[:5]) / 40
    assert 0.2 < top1 < 0.9
    found = evaluate.zero_shot(model, features, labels, names, TEMPLATES, byte_tokenizer)
    assert found["zero_shot_top1"] == pytest.approx(top1) and found["zero_shot_top5"] == pytest.approx(top5) and found["zero_shot_chance"] == 1 / 7
    # Wilson's bounds are where the score test is at its limit: |p - measured| = 1.96 sqrt(p (1 - p) / n)
    low, high = (scipy.optimize.brentq(lambda p: abs(p - top1) - 1.96 * np.sqrt(p * (1 - p) / 40), *bracket) for bracket in ((1e-9, top1), (top1, 1 - 1e-9)))
    assert found["zero_shot_interval"] == pytest.approx((high - low) / 2, rel=1e-6)
    assert "zero_shot_top5" not in evaluate.zero_shot(model, features, labels % 5, names[:5], TEMPLATES, byte_tokenizer)


def test_class_embeddings_do_not_depend_on_the_size_of_a_batch(model):
    arguments = (model, ["cat", "dog", "tree"], TEMPLATES, byte_tokenizer)
    torch.testing.assert_close(evaluate.class_embeddings(*arguments, batch_size=5), evaluate.class_embeddings(*arguments))


def test_zero_shot_refuses_labels_without_a_name_and_templates_without_a_place(model):
    features = torch.randn(2, 32)
    with pytest.raises(ValueError, match="labels are 0 to 3, and there are 2 class names"):
        evaluate.zero_shot(model, features, torch.tensor([0, 3]), ["a", "b"], TEMPLATES, byte_tokenizer)
    with pytest.raises(ValueError, match="a picture"):
        evaluate.zero_shot(model, features, torch.tensor([0, 1]), ["a", "b"], ["a picture"], byte_tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# The linear probe
# ----------------------------------------------------------------------------------------------------------------------

def objective(weight, bias, x, labels, penalty, sample_weights=None):
    """The probe's objective at standardised features x, in float64."""
    losses = F.cross_entropy(x @ weight + bias, labels, reduction="none")
    sample_weights = torch.full_like(losses, 1 / len(losses)) if sample_weights is None else sample_weights / sample_weights.sum()
    return (losses * sample_weights).sum() + penalty * (weight ** 2).sum()


@pytest.mark.parametrize("balanced", (False, True))
def test_logistic_regression_is_scipys_minimum_of_the_objective(balanced):
    features, labels = clusters(300)
    features[labels == 2, 0] += features[:, 0].std()
    keep = (labels != 3) | (torch.arange(300) % 5 == 0)                 # one class is rare
    features, labels = features[keep], labels[keep]
    x, penalties = (features - features.mean(dim=0)) / features.std(dim=0), (1e-4, 1e-1, 1e-2)
    sample_weights = 1 / labels.bincount()[labels].double() if balanced else None
    mean, weights, biases = logistic_regression(features, labels, 4, penalties, balanced=balanced, tolerance=1e-9)
    in_practice = logistic_regression(features, labels, 4, penalties, balanced=balanced)
    for penalty, weight, bias, usual_weight, usual_bias in zip(penalties, weights, biases, *in_practice[1:]):
        def value_and_gradient(flat):
            w = torch.from_numpy(flat.copy()).view(13, 4).requires_grad_()
            loss = objective(w[:-1], w[-1], x, labels, penalty, sample_weights)
            loss.backward()
            return loss.item(), w.grad.flatten().numpy()
        found = scipy.optimize.minimize(value_and_gradient, np.zeros(52), jac=True, method="BFGS", options=dict(gtol=1e-9, maxiter=5000))
        expected = torch.from_numpy(found.x).view(13, 4)
        torch.testing.assert_close(weight * features.std(dim=0)[:, None], expected[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias - bias.mean(), expected[-1] - expected[-1].mean(), rtol=1e-4, atol=1e-4)     # a shift of all changes nothing
        torch.testing.assert_close(((features - mean) @ usual_weight + usual_bias).softmax(dim=1), (x @ expected[:-1] + expected[-1]).softmax(dim=1), rtol=0, atol=1e-4)


def test_logistic_regression_in_float32_ends_where_the_gradient_vanishes_at_every_penalty():
    features, labels = clusters(2000, spread=2.5)
    x = (features - features.mean(dim=0)) / features.std(dim=0)
    mean, weights, biases = logistic_regression(features.float(), labels, 4, PENALTIES)
    for penalty, weight, bias in zip(PENALTIES, weights.double(), biases.double()):
        weight, bias = (weight * features.std(dim=0)[:, None]).requires_grad_(), bias.requires_grad_()
        gradients = torch.autograd.grad(objective(weight, bias, x, labels, penalty), (weight, bias))
        assert max(g.abs().max().item() for g in gradients) < 1e-4


def test_logistic_regression_takes_absent_classes_constant_features_and_large_means():
    features, labels = clusters(400)
    reference = logistic_regression(features, labels, 4, [1e-3])
    expected = ((features - reference[0]) @ reference[1][0] + reference[2][0]).argmax(dim=1)
    features = torch.cat((features, torch.ones(400, 1)), dim=1)
    mean, weight, bias = logistic_regression(features, labels + 1, 7, [1e-3])       # classes 0, 5 and 6 do not occur
    logits = (features - mean) @ weight[0] + bias[0]
    assert logits.isfinite().all() and torch.equal(logits.argmax(dim=1), expected + 1)


def test_linear_probe_chooses_its_penalty_without_the_test_labels_and_refits_on_all_of_the_training_set():
    train, test = clusters(250, spread=2.5, seed=1), clusters(400, spread=2.5, seed=2)
    found = evaluate.linear_probe(*train, *test)
    shuffled = evaluate.linear_probe(*train, test[0], test[1][torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert shuffled["linear_probe_penalty"] == found["linear_probe_penalty"] and shuffled["linear_probe"] < found["linear_probe"]
    order = evaluate.permutation(0, 0, 250)
    kept_back, fitted = order[:50], order[50:]

    def accuracy(rows, penalty, features, labels):
        mean, weight, bias = logistic_regression(train[0][rows], train[1][rows], 4, [penalty])
        return (((features - mean) @ weight[0] + bias[0]).argmax(dim=1) == labels).double().mean().item()
    trials = [accuracy(fitted, p, train[0][kept_back], train[1][kept_back]) for p in PENALTIES]
    assert len(set(trials)) > 1
    best = max(p for p, a in zip(PENALTIES, trials) if a == max(trials))
    assert found["linear_probe_penalty"] == best
    assert found["linear_probe"] == pytest.approx(accuracy(slice(None), best, *test))
    assert found["linear_probe_balanced"] == pytest.approx(found["linear_probe"], abs=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

def test_principal_colours_follow_the_directions_of_largest_variance():
    torch.manual_seed(0)
    values = torch.rand(2, 3, 8, 8) * torch.tensor([9.0, 4.0, 1.0]).view(3, 1, 1)
    axes = torch.linalg.qr(torch.randn(6, 3)).Q                                             # three directions of six
    colours = evaluate.principal_colours(torch.einsum("dk,bkhw->bdhw", axes, values) + 5)
    assert colours.shape == (2, 3, 8, 8) and 0 <= colours.min() and colours.max() <= 1
    for k in range(3):
        assert abs(np.corrcoef(colours[:, k].flatten(), values[:, k].flatten())[0, 1]) > 0.97


def test_pca_picture_has_each_row_of_images_above_its_colours(model, images):
    picture = np.asarray(evaluate.pca_picture(model, images[:5], per_row=3))
    assert picture.shape == (4 * 66 - 2, 3 * 66 - 2, 3)
    assert np.array_equal(picture[132:196, 66:130], images[4].permute(1, 2, 0).numpy())     # third row, second column
    below = picture[66:130, :64]
    assert np.array_equal(below, below[::16, ::16].repeat(16, axis=0).repeat(16, axis=1)) and below.std() > 10      # one colour for each patch


def test_ranked_picture_holds_the_worst_the_median_and_the_best(images):
    inputs = images.float() / 255
    reconstructions = 1 - inputs
    psnrs = torch.randperm(24, generator=torch.Generator().manual_seed(3)).float() + 10     # 10 to 33 dB
    picture = ranked_reconstructions_picture(inputs, reconstructions, psnrs, n=4)
    cells = np.asarray(picture)[:, picture.width - (4 * 66 - 2):]
    assert cells.shape[0] == 6 * 66 - 2
    for row, dbs in ((0, (10, 11, 12, 13)), (2, (20, 21, 22, 23)), (4, (30, 31, 32, 33))):
        for column, db in enumerate(dbs):
            i = int((psnrs == db).nonzero())
            for down, of in ((0, inputs), (1, reconstructions)):
                cell = cells[(row + down) * 66:(row + down) * 66 + 64, column * 66:column * 66 + 64]
                assert np.array_equal(cell, (of[i] * 255).round().byte().permute(1, 2, 0).numpy())
    some = evaluate.worst_median_best(psnrs, 4).flatten()
    assert np.array_equal(ranked_reconstructions_picture(inputs[some], reconstructions[some], psnrs[some], n=4), picture)
    assert ranked_reconstructions_picture(inputs[:2], reconstructions[:2], psnrs[:2], n=4).height == 6 * 66 - 2


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [dict(kind="train", step=1, flops=1e12, loss=1.0), *rows]))
    return str(folder)


def dots(panel, colour):
    """Centres (x, y) of the dots of a colour in a panel of a chart, left of the legend's first column."""
    inside = (np.asarray(panel) == ImageColor.getrgb(colour)).all(axis=2)
    whole = sum(inside[2 + dy:len(inside) - 2 + dy, 2 + dx:inside.shape[1] - 2 + dx].astype(int) for dy in (-2, 0, 2) for dx in (-2, 0, 2)) == 9
    ys, xs = np.nonzero(whole)
    groups = []
    for x, y in sorted(zip(xs + 2, ys + 2)):
        if groups and x - groups[-1][-1][0] <= 2:
            groups[-1].append((x, y))
        else:
            groups.append([(x, y)])
    return [tuple(np.mean(g, axis=0)) for g in groups]


def test_plot_has_a_line_for_each_run_with_training_flops_on_a_log_axis(tmp_path):
    def row(flops, gfid, probe, **more):
        return dict(kind="eval", step=1, flops=flops, gfid=gfid, linear_probe=probe, fid_features="judge", **more)
    start = dict(kind="eval", step=0, flops=0, psnr=None)
    runs = [write_run(tmp_path / "a" / "all", [start, row(1e16, 40, 0.4), row(1e18, 30, 0.6), row(1e17, 34, 0.5)]),
            write_run(tmp_path / "AE", [row(1e16, 55, 0.2), row(1e18, 58, 0.1)])]
    picture = plot_runs(runs)
    assert picture.size == (900, 290)                                    # two panels: what no run has measured is left out
    for left in (0, 450):
        panel = picture.crop((left, 0, left + 450, 290))
        ours, theirs = (dots(panel, c) for c in evaluate.COLOURS[:2])
        assert len(ours) == 3 and len(theirs) == 2
        xs = [x for x, _ in ours]
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=1.5) and xs[2] - xs[0] > 300       # decades are equally far apart
        assert (ours[0][1] < ours[2][1]) == (left == 0)                  # gFID falls, accuracy rises
    assert len(dots(plot_runs(runs[::-1]).crop((0, 0, 450, 290)), evaluate.COLOURS[1])) == 3


def test_plot_keeps_distances_in_different_features_apart(tmp_path):
    runs = [write_run(tmp_path / name, [dict(kind="eval", step=1, flops=1e16, rfid=2.0, fid_features=features)]) for name, features in (("a", "judge"), ("b", "inception"))]
    picture = plot_runs(runs)
    assert picture.size == (900, 290) and plot_runs(runs[:1]).size == (450, 290)
    assert [len(dots(picture.crop((left, 0, left + 450, 290)), colour)) for left in (0, 450) for colour in evaluate.COLOURS[:2]] == [0, 1, 1, 0]


def test_plot_says_that_there_is_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="no row of kind eval"):
        plot_runs([write_run(tmp_path / "x", [])])


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

SMALL = ["--train_size", "48", "--n_train", "48", "--n_val", "24", "--n_samples", "12", "--batch_size", "8"]


@pytest.fixture(scope="module")
def evaluated(micro_model, tmp_path_factory):
    """A tokenizer's run with metrics, a DiT's run on it, a judge, and what `evaluate.py` makes of them -> folder."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(micro_model, root / "tok")
    (root / "tok" / "metrics.jsonl").write_text(json.dumps(dict(kind="train", step=5, samples=40, flops=1e12)) + "\n")
    run_script(["train_dit.py", "--tokenizer", root / "tok", "--out", root / "dit", "--samples", "32", "--batch_size", "8", "--train_size", "48", "--steps", "4",
                "--eval_samples", "0", "--precision", "fp32"])
    source, judge = data.BuiltinSource(48, 64), evaluate.Judge(10)
    content = dict(judge=judge.state_dict(), accuracy=0.5, fingerprint=f"{source.fingerprint()} 10 classes")
    torch.save(content, root / "tok" / "latents" / "judge.pt")
    run_script(["evaluate.py", "--tokenizer", root / "tok", "--dit", root / "dit", *SMALL])
    return root


def results(folder):
    with open(os.path.join(folder, "results.json"), encoding="utf-8") as f:
        return json.load(f)["figures"]


def test_the_command_measures_everything_and_names_the_features(evaluated):
    row = results(evaluated / "tok" / "evaluation")
    assert {"rfid", "psnr", "ssim", "zero_shot_top1", "zero_shot_top5", "zero_shot_interval", "image_to_text", "linear_probe", "dino_1_linear_probe", "dino_4_linear_probe",
            "knn", "gfid", "inception_score", "precision", "recall", "sample_accuracy"} <= row.keys()
    assert row["fid_features"] == "judge" and "gFID (judge)" in evaluate.table(row)
    assert {"reconstructions.png", "latents_pca.png", "samples.png"} <= set(os.listdir(evaluated / "tok" / "evaluation"))
    last = evaluate.read_metrics(str(evaluated / "tok"))[-1]
    assert last["kind"] == "eval" and last["flops"] == 1e12 and last["gfid"] == row["gfid"]


def test_the_commands_figures_are_those_of_the_functions(evaluated):
    """PSNR, rFID and gFID computed from images, without chunks, caches or streams."""
    row, model = results(evaluated / "tok" / "evaluation"), VTP.from_pretrained(str(evaluated / "tok")).eval()
    images, _, _ = data.load_evaluation_set(data.BuiltinSource(2048, 64, "val"), 24)
    with torch.no_grad():
        reconstructions = evaluate.denormalize(model.decode(model.encode(normalize(images / 255)))).clamp(0, 1)
    judge = evaluate.open_judge(str(evaluated / "tok" / "latents" / "judge.pt"), data.BuiltinSource(48, 64), 10, torch.device("cpu"))
    features = [judge(x.float() / 255)[0].double().numpy() for x in (images, (reconstructions * 255).byte())]
    moments = [(f.mean(axis=0), np.cov(f.T)) for f in features]
    assert row["psnr"] == pytest.approx(psnr(reconstructions, images / 255).mean().item(), rel=1e-4)
    assert row["rfid"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-3, abs=1e-6)        # fp32 features of another batch size


def test_two_ranks_measure_the_same_and_an_evaluation_resumes(evaluated):
    args = ["evaluate.py", "--tokenizer", evaluated / "tok", "--dit", evaluated / "dit", *SMALL]
    run_script([*args, "--out", evaluated / "two"], n_ranks=2)
    one, two = results(evaluated / "tok" / "evaluation"), results(evaluated / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)      # sums in another order
        assert two[name] == same, name
    chunk = evaluated / "two" / "features" / "samples" / "00001.pt"
    kept = [os.path.getmtime(chunk.parent / f"0000{k}.pt") for k in (0, 1)]
    os.remove(chunk)
    os.remove(evaluated / "two" / "results.json")
    run_script([*args, "--out", evaluated / "two"])
    assert os.path.getmtime(chunk.parent / "00000.pt") == kept[0] and results(evaluated / "two")["gfid"] == pytest.approx(one["gfid"], rel=1e-4)


def test_samples_own_images_and_plots(evaluated):
    rng, tok = np.random.default_rng(0), evaluated / "tok"
    np.savez(evaluated / "set.npz", arr_0=rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
    run_script(["evaluate.py", "--tokenizer", tok, "--dit", evaluated / "dit", "--samples", evaluated / "set.npz", *SMALL, "--out", evaluated / "a"])
    row = results(evaluated / "a")
    assert row["gfid"] > 0 and row["precision"] <= 1 and "psnr" not in row
    (evaluated / "mine").mkdir()
    for i, size in enumerate(((80, 120), (64, 64), (200, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(evaluated / "mine" / f"{i}.png")
    run_script(["evaluate.py", "--tokenizer", tok, "--images", evaluated / "mine", "--out", evaluated / "b"])
    assert results(evaluated / "b")["n_images"] == 3 and (evaluated / "b" / "reconstructions.png").exists()
    run_script(["evaluate.py", "--plot", tok, "--out", evaluated / "c"])
    assert Image.open(evaluated / "c" / "figures.png").width >= 600


def test_without_inception_fid_is_an_error_that_says_what_to_do(evaluated, tmp_path):
    done = run_script(["evaluate.py", "--tokenizer", evaluated / "tok", "--fid_features", "inception", "--inception", tmp_path / "no.pth", *SMALL, "--out", tmp_path / "o"], check=False)
    assert done.returncode != 0 and "no such file" in done.stderr


@pytest.mark.parametrize("wrong, message", [([], "First: python train_tokenizer.py"), (["--tokenizer", "nowhere/at/all", "--images", "x"], "no such place"),
                                            (["--plot", "nowhere"], "metrics.jsonl"), (["--n_val", "0"], "positive")])
def test_a_wrong_argument_is_an_error_before_any_work(wrong, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        evaluate.parse_args(wrong)
    assert message in capsys.readouterr().err
