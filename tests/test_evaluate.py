"""Every number of evaluate.py equals its definition, written out slowly; its pictures show what they say; the
command."""
import json
import math
import os
import shutil
import signal
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageColor

import data
import evaluate
import losses
from conftest import FP32, ROOT, free_port, micro_config, run_script
from data import TEMPLATES, permutation, step_generator, word_tokenizer
from evaluate import (ImageSet, InceptionFID, frechet_distance, inception_score, load_statistics,
                      mean_and_covariance, plot_runs, precision_recall, psnr,
                      ssim)
from vtp import VTP, UserError, denormalize, normalize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VTP(micro_config()).eval()


@pytest.fixture(scope="module")
def images():
    """Blobs of colours, uint8 (24, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    blobs = F.interpolate(torch.rand(24, 3, 4, 4, generator=generator), (64, 64), mode="bilinear")
    return (blobs * 255).byte()


# ----- SSIM, PSNR -----------------------------------------------------------------------------------------

def ssim_of_planes(x, y, data_range):
    """Two planes (H, W): the weighted mean, variance and covariance in each 11 x 11 window, one at a time."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5 ** 2))
    weights, values = weights / weights.sum(), []
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
            values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return np.mean(values)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_its_definition_over_windows_inside_the_image(data_range):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 15, 18)
    y = (0.7 * x + 0.3 * torch.rand(2, 3, 15, 18)) * data_range
    x = x * data_range
    expected = [np.mean([ssim_of_planes(a, b, data_range) for a, b in zip(*images)])
                for images in zip(x.double().numpy(), y.double().numpy())]
    # both are computed in float64; the result is rounded to float32 (6e-8)
    torch.testing.assert_close(ssim(x, y, data_range), torch.tensor(expected).float(), rtol=1e-6, atol=0)


def test_ssim_blurs_with_a_gaussian_of_sigma_one_and_a_half():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 32, 40))

    def blur(z):
        return scipy.ndimage.gaussian_filter(z, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
    mean_x, mean_y = blur(x), blur(y)
    top = (2 * mean_x * mean_y + 1e-4) * (2 * (blur(x * y) - mean_x * mean_y) + 9e-4)
    variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
    expected = (top / ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (variances + 9e-4))).mean()
    found = ssim(*torch.tensor(np.stack([x, y]))[:, None, None]).item()
    assert found == pytest.approx(expected, rel=1e-6)      # rounded to float32


def test_ssim_of_an_image_with_itself_is_1_and_flat_images_are_compared_by_luminance():
    x = torch.rand(1, 3, 16, 16)
    assert ssim(x, x).item() == 1
    bright, brighter = torch.full((1, 1, 11, 11), 0.90), torch.full((1, 1, 11, 11), 0.95)
    luminance = (2 * 0.9 * 0.95 + 1e-4) / (0.9 ** 2 + 0.95 ** 2 + 1e-4)
    assert ssim(bright, brighter).item() == pytest.approx(luminance, rel=1e-6)      # rounded to float32
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(x[..., :10], x[..., :10])


def test_psnr_is_its_definition():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    for a, b, value in zip(x, y, psnr(x, y)):
        expected = 10 * math.log10(1 / np.mean((a.double().numpy() - b.double().numpy()) ** 2))
        assert value.item() == pytest.approx(expected, rel=1e-5)      # a float32 mean of 105 squares


# ----- Frechet distance -----------------------------------------------------------------------------------

def rotation(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def test_frechet_distance_of_gaussians_with_common_axes_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b, mu1, mu2 = rng.random((4, 6)) + 0.1
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    exact = pytest.approx(expected, rel=1e-10)      # float64, well conditioned
    assert frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == exact
    Q = rotation(6)
    assert frechet_distance(Q @ mu1, Q * a @ Q.T, Q @ mu2, Q * b @ Q.T) == exact


def test_frechet_distance_of_two_planar_gaussians_is_the_closed_form():
    # 2 x 2: tr (M^1/2) = sqrt(tr M + 2 sqrt(det M)), here for covariances with different axes
    c, s = math.cos(0.7), math.sin(0.7)
    R = np.array([[c, -s], [s, c]])
    sigma1, sigma2 = np.diag([3.0, 0.5]), R @ np.diag([2.0, 0.1]) @ R.T
    M = sigma1 @ sigma2
    expected = 4.0 + 3.5 + 2.1 - 2 * math.sqrt(np.trace(M) + 2 * math.sqrt(np.linalg.det(M)))
    found = frechet_distance([0, 2], sigma1, [0, 0], sigma2)
    assert found == pytest.approx(expected, rel=1e-10)      # float64, well conditioned


def test_frechet_distance_is_the_definition_by_the_matrix_square_root():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24))
    y = rng.standard_normal((300, 24)) + 0.5
    (mu1, sigma1), (mu2, sigma2) = ((z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    exact = pytest.approx(expected, rel=1e-8)      # sqrtm is the less accurate one
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == exact
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == exact


@pytest.mark.parametrize("n", [10, 200, 1000])
def test_frechet_distance_of_a_set_to_itself_is_0(n):
    x = np.random.default_rng(0).standard_normal((n, 256)) * np.logspace(-4, 1, 256)
    mu, sigma = x.mean(axis=0), np.cov(x, rowvar=False)
    # traces of about 1,000 cancel, and their rounding is 1e-13 of them
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-6
    assert 0 <= frechet_distance(mu, 0 * sigma, mu, 0 * sigma) < 1e-6


def test_frechet_distance_of_fewer_samples_than_features_is_that_of_their_gram_matrix():
    # sigma = X^T X: the trace of (sigma1 sigma2)^1/2 is the nuclear norm of X Y^T, which is 12 x 9
    rng = np.random.default_rng(0)
    x, y = 3 * rng.standard_normal((12, 200)), rng.standard_normal((9, 200)) + 0.2
    X, Y = ((z - z.mean(axis=0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + (X ** 2).sum() + (Y ** 2).sum()
    expected -= 2 * np.linalg.norm(X @ Y.T, "nuc")
    found = frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False))
    assert isinstance(found, float) and found == pytest.approx(expected, rel=1e-8)  # float64
    # Against a full-rank one: the root by the eigenvalues of X sigma X^T. The tolerance is tight, because
    # directions without variance must add nothing: roots of their rounding errors would be 1e-8 each.
    X[0] *= 100
    sigma = np.cov(rng.standard_normal((1000, 200)), rowvar=False)
    roots = np.sqrt(np.linalg.eigvalsh(X @ sigma @ X.T).clip(0))
    expected = (X ** 2).sum() + np.trace(sigma) - 2 * roots.sum()
    found = frechet_distance(np.zeros(200), X.T @ X, np.zeros(200), sigma)
    assert found == pytest.approx(expected, rel=5e-11)


def test_frechet_distance_refuses_what_has_none():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(mu, sigma * np.nan, mu, sigma)
    with pytest.raises(ValueError, match="different features"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))


# ----- Statistics of features -----------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [0, 1e4])
def test_mean_and_covariance_are_their_definition_for_float32_features_far_from_0(offset):
    features = np.random.default_rng(0).standard_normal((50, 9)) @ rotation(9) * np.logspace(-2, 1, 9)
    features = torch.from_numpy(features + offset).float()
    mean, covariance = mean_and_covariance(features)
    rows = features.double().tolist()
    expected = [math.fsum(column) / 50 for column in zip(*rows)]
    deviations = [[x - m for x, m in zip(row, expected)] for row in rows]
    scatter = [[math.fsum(d[i] * d[j] for d in deviations) for j in range(9)] for i in range(9)]
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)      # sums in float64
    # a mean of 1e4 is rounded by 1e-12, which moves deviations of 0.01 by 1e-10 of their size
    np.testing.assert_allclose(covariance, np.array(scatter) / 49, rtol=1e-8, atol=1e-12)
    of_array = mean_and_covariance(features.numpy())
    assert np.array_equal(of_array[0], mean) and np.array_equal(of_array[1], covariance)
    with pytest.raises(ValueError, match="at least 2 images"):
        mean_and_covariance(features[:1])


def test_statistics_survive_their_file_and_those_of_adm_are_read(tmp_path):
    (mu, sigma), (mu_s, sigma_s) = (mean_and_covariance(torch.randn(5, D)) for D in (4, 2))
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    a = load_statistics(tmp_path / "a.npz")
    assert set(a) == {"mu", "sigma"}
    np.testing.assert_array_equal(a["mu"], mu)
    np.testing.assert_array_equal(a["sigma"], sigma)
    np.savez(tmp_path / "adm.npz", mu=mu.astype(np.float32), sigma=sigma, mu_s=mu_s, sigma_s=sigma_s,
             arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    adm = load_statistics(tmp_path / "adm.npz")
    assert set(adm) == {"mu", "sigma", "mu_s", "sigma_s"} and all(v.dtype == np.float64 for v in adm.values())
    np.testing.assert_array_equal(adm["mu_s"], mu_s)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(1))
    with pytest.raises(ValueError, match="no mu and sigma, but arr_0"):
        load_statistics(tmp_path / "images.npz")


# ----- Inception score ------------------------------------------------------------------------------------

def test_inception_score_of_known_distributions():
    def close(mean):
        return pytest.approx((mean, 0), abs=1e-9)      # exp and log in float64
    certain = torch.eye(8).repeat(10, 1) * 1000      # each image one class, each class as often
    assert inception_score(certain, splits=10) == close(8)
    assert inception_score(torch.randn(1, 8).repeat(80, 1), splits=10) == close(1)
    by_class = torch.eye(8).repeat_interleave(10, dim=0) * 1000      # unshuffled: a class in each split
    assert inception_score(by_class, splits=8) == close(1)
    assert inception_score(by_class, splits=1) == close(8)


def test_inception_score_is_its_definition_over_consecutive_splits():
    torch.manual_seed(0)
    logits, scores = 3 * torch.randn(40, 6), []
    for start in range(0, 40, 10):
        p = [[math.exp(z) for z in row] for row in logits[start:start + 10].double().tolist()]
        p = [[z / sum(row) for z in row] for row in p]
        marginal = [sum(row[k] for row in p) / 10 for k in range(6)]
        divergences = [sum(row[k] * math.log(row[k] / marginal[k]) for k in range(6)) for row in p]
        scores.append(math.exp(sum(divergences) / 10))
    mean = sum(scores) / 4
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / 4)
    assert inception_score(logits, splits=4) == pytest.approx((mean, std), rel=1e-6)  # both in float64
    with pytest.raises(ValueError, match="as many images"):
        inception_score(logits[:3], splits=4)


# ----- Precision and recall -------------------------------------------------------------------------------

def test_precision_and_recall_of_a_configuration_by_hand():
    # k = 1 on a line; balls of the real points 0, 1, 8, 12: [-1, 1], [0, 2], [4, 12], [8, 16]
    real = torch.tensor([0.0, 1.0, 8.0, 12.0])[:, None]
    # of the fakes 2 alone lies in one, on its border; balls of the fakes: [1, 3], [2, 4], [13, 20] and
    # [16.5, 23.5], of which the first alone holds a real point, 1
    fake = torch.tensor([2.0, 3.0, 16.5, 20.0])[:, None]
    assert precision_recall(real, fake, k=1) == (0.25, 0.25)
    fake = torch.tensor([2.0, 5.0, 9.0, 30.0])[:, None]      # balls [-1, 5], [2, 8], [5, 13], [9, 51]
    assert precision_recall(real, fake, k=1) == (0.75, 1)
    assert precision_recall(real, real + 100, k=1) == (0, 0)


@pytest.mark.parametrize("n_rows", [7, 512])
def test_precision_and_recall_are_their_definition(n_rows):
    torch.manual_seed(0)
    scales = torch.logspace(-2, 0, 40)
    real = torch.randn(60, 40) * scales + 100      # far from the origin
    fake = 1.1 * torch.randn(45, 40) * scales + 100
    fake[:6] = real[:4] = 100 + 7.7 * torch.rand(40)      # copies, apart from the rest: balls of radius 0

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[2]

    def share_inside(points, others):
        radii = [radius(others, i) for i in range(len(others))]
        hits = sum(any(math.dist(p, o) <= r for o, r in zip(others, radii)) for p in points)
        return hits / len(points)
    a, b = real.double().tolist(), fake.double().tolist()
    expected = share_inside(b, a), share_inside(a, b)
    assert 0.2 < expected[0] < 0.98 and 0.2 < expected[1] < 0.98
    # equal counts: the tolerance is for recall's float32, and far below 1 / 60
    assert precision_recall(real, fake, n_rows=n_rows) == pytest.approx(expected, rel=1e-6)
    assert precision_recall(real, real) == (1, 1)


@pytest.mark.parametrize("dim", [256, 2048])
def test_a_copy_lies_exactly_on_its_original(dim):
    x = 100 + 7.7 * torch.rand(40, dim, generator=torch.Generator().manual_seed(0))
    real = x.repeat(4, 1)      # the third nearest other point is a copy as well: balls of radius 0
    # a product with few rows is summed in another order than one with many, and must not leave a rest
    for n in (4, 5, 40):
        assert precision_recall(real, x[:n], k=3)[0] == 1
    # what lies beside does not count as a copy, not even at 1e-11 of the norms, which float32 would not tell
    fake = torch.cat((x.double(), x.double() + 3e-4))
    assert precision_recall(real, fake, k=3, n_rows=7)[0] == 0.5


def test_precision_and_recall_need_more_than_k_features_of_one_size():
    for real, fake in (((3, 5), (9, 5)), ((9, 5), (9, 4))):
        with pytest.raises(ValueError, match="more than 3 features of one size"):
            precision_recall(torch.randn(real), torch.randn(fake))


# ----- Retrieval and accuracy -----------------------------------------------------------------------------

def test_retrieval_counts_every_sample_with_the_right_caption():
    images = torch.eye(4)
    texts = torch.eye(4)[[1, 0, 2, 2]]      # texts point at images 1, 0, 2 and 2
    texts[2, 2:] = torch.tensor([0.8, 0.6])      # the third less so, and at image 3 as well
    found = evaluate.retrieval(images, texts, ["cat", "cat", "dog", "bird"])
    # Images 0 and 1 find each other's text, which has the same caption; 2 and 3 find texts 3 and 2. Of the
    # texts 3 alone finds another's image.
    assert found == dict(image_to_text=0.5, text_to_image=0.75, retrieval_chance=6 / 16)


def test_balanced_accuracy_weighs_every_class_alike():
    labels, predictions = torch.tensor([0, 0, 0, 0, 5]), torch.tensor([0, 0, 0, 1, 1])
    assert evaluate.balanced_accuracy(predictions, labels) == (0.75 + 0) / 2


def test_knn_lets_the_nearest_neighbours_vote_with_weights_by_cosine():
    angles = torch.tensor([0.0, 0.3, 0.32, 2.0])
    train, labels = torch.stack((angles.cos(), angles.sin()), dim=1) * 3, torch.tensor([2, 1, 1, 0])
    query = torch.tensor([[1.0, 0.1]])
    votes = torch.exp(torch.cos(angles - math.atan2(0.1, 1)) / 0.07)
    assert votes[0] > votes[1] and votes[0] < votes[1] + votes[2]
    assert [evaluate.knn_predict(train, labels, query, k=k).item() for k in (1, 3, 20)] == [2, 1, 1]


def test_knn_has_20_neighbours_and_a_temperature_of_7_percent():
    """One neighbour of label 2 at a cosine of 1, n of label 1, which weigh as much at 1 - 0.07 ln n."""
    def winner(n, weight):
        cosines = torch.tensor([1.0] + n * [1 - 0.07 * math.log(1 / weight)])
        train = torch.stack((cosines, (1 - cosines ** 2).sqrt()), dim=1)
        return evaluate.knn_predict(train, torch.tensor([2] + n * [1]), torch.tensor([[1.0, 0.0]])).item()
    assert winner(2, 1 / 1.9) == 1 and winner(2, 1 / 2.1) == 2
    assert winner(19, 1 / 18.5) == winner(20, 1 / 18.5) == 1 and winner(20, 1 / 19.5) == 2


# ----- Where images come from -----------------------------------------------------------------------------

def stacked(image_set):
    return image_set.batch(range(len(image_set)))


def test_images_come_from_a_folder_sorted_and_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    for name, image in zip(("a/1.png", "a/2.PNG", "b/c/0.png", "d.png", "e.bmp"), images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    found = stacked(ImageSet(str(tmp_path)))
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy().transpose(0, 2, 3, 1), images)
    Image.new("RGB", (12, 8)).save(tmp_path / "f.png")
    with pytest.raises(RuntimeError, match=r"\[3, 9, 12\].* \[3, 8, 12\]"):
        stacked(ImageSet(str(tmp_path)))
    assert stacked(ImageSet(str(tmp_path), size=8)).shape == (6, 3, 8, 8)
    (tmp_path / "g.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="g.png is not an image"):
        stacked(ImageSet(str(tmp_path), size=8))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_come_from_an_npz_compressed_or_not(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for name, array in (("a", images), ("fortran", np.asfortranarray(images))):
        path = str(tmp_path / f"{name}.npz")
        save(path, array, labels=np.arange(5))
        assert np.array_equal(stacked(ImageSet(path)).numpy().transpose(0, 2, 3, 1), images)


def test_of_an_npz_no_more_is_in_memory_than_is_asked_for(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5000, 64, 64, 3), dtype=np.uint8)      # 61 MB
    np.savez(tmp_path / "a.npz", arr_0=images)
    tracemalloc.start()
    found = ImageSet(str(tmp_path / "a.npz"))
    for numbers in (range(1, 3), range(7, 4999, 900), [4999], [0]):     # the last goes back
        assert np.array_equal(found.batch(numbers).numpy().transpose(0, 2, 3, 1), images[list(numbers)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6      # what is skipped is read, too, at most 2 ** 24 bytes at a time


def test_a_bad_place_for_images_is_an_error_before_the_first_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageSet(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no images"):
        ImageSet(str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no folder of images and no .npz at .*a.txt"):
        ImageSet(str(tmp_path / "a.txt"))
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="no arr_0, but"):
        ImageSet(str(tmp_path / "a.npz"))
    for arrays, message in ((dict(arr_0=np.zeros((2, 4, 4, 3))), "not uint8"),
                            (dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), "not uint8"),
                            (dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "holds no images")):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            ImageSet(str(tmp_path / "a.npz"))


# ----- The FID network ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception():
    """Weights by a formula: sines of index and layer, at a scale that keeps activations alive to the end."""
    model = InceptionFID(None)
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        index = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        wave = torch.sin(index ** 1.3 * 0.37 + i)
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
    """Prepared images (B, 3, 299, 299) -> pool3, spatial, logits, written branch by branch from a state dict.

    used: a list that the names of units are added to.
    """
    def unit(x, name, stride=1, pad=(0, 0)):
        used.append(name)
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=pad)
        mean, var = (state[f"{name}.bn.running_{k}"].view(-1, 1, 1) for k in ("mean", "var"))
        weight, bias = (state[f"{name}.bn.{k}"].view(-1, 1, 1) for k in ("weight", "bias"))
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)

    def chain(x, *names, stride=1):
        """Units that keep the size; a stride is that of the last one, which then has no padding."""
        for name in names:
            h, w = state[f"{name}.conv.weight"].shape[-2:]
            last = stride == 2 and name == names[-1]
            x = unit(x, name, 2 if last else 1, (0, 0) if last else ((h - 1) // 2, (w - 1) // 2))
        return x

    def windows(x, fill, stride=1, pad=1):
        """(B, C, H, W) -> (B, C, h, w, 9)."""
        x = F.pad(x, (pad,) * 4, value=fill).unfold(2, 3, stride).unfold(3, 3, stride)
        return x.flatten(-2)

    def mean_inside(x):
        return windows(x, 0).sum(dim=-1) / windows(torch.ones_like(x), 0).sum(dim=-1)

    def highest(x):
        return windows(x, -torch.inf).amax(dim=-1)

    def shrink(x):
        return windows(x, 0, stride=2, pad=0).amax(dim=-1)

    def numbered(block, stem, n):
        return [f"{block}.{stem}_{i}" for i in range(1, n + 1)]

    x = unit(unit(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = shrink(unit(x, "Conv2d_2b_3x3", pad=(1, 1)))
    x = shrink(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"))
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([chain(x, f"{b}.branch1x1"), chain(x, *numbered(b, "branch5x5", 2)),
                       chain(x, *numbered(b, "branch3x3dbl", 3)),
                       chain(mean_inside(x), f"{b}.branch_pool")], dim=1)
    x = torch.cat([chain(x, "Mixed_6a.branch3x3", stride=2),
                   chain(x, *numbered("Mixed_6a", "branch3x3dbl", 3), stride=2), shrink(x)], dim=1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        point = chain(x, f"{b}.branch1x1")
        if b == "Mixed_6d":
            spatial = [point[:, c, i, j] for i in range(17) for j in range(17) for c in range(7)]
        x = torch.cat([point, chain(x, *numbered(b, "branch7x7", 3)),
                       chain(x, *numbered(b, "branch7x7dbl", 5)),
                       chain(mean_inside(x), f"{b}.branch_pool")], dim=1)
    x = torch.cat([chain(x, *numbered("Mixed_7a", "branch3x3", 2), stride=2),
                   chain(x, *numbered("Mixed_7a", "branch7x7x3", 4), stride=2), shrink(x)], dim=1)
    for b, pool in (("Mixed_7b", mean_inside), ("Mixed_7c", highest)):
        short, long = chain(x, f"{b}.branch3x3_1"), chain(x, *numbered(b, "branch3x3dbl", 2))
        x = torch.cat([chain(x, f"{b}.branch1x1"),
                       chain(short, f"{b}.branch3x3_2a"), chain(short, f"{b}.branch3x3_2b"),
                       chain(long, f"{b}.branch3x3dbl_3a"), chain(long, f"{b}.branch3x3dbl_3b"),
                       chain(pool(x), f"{b}.branch_pool")], dim=1)
    assert x.shape[1:] == (2048, 8, 8)
    pool3 = x.sum(dim=(2, 3)) / 64
    return pool3, torch.stack(spatial, dim=1), pool3 @ state["fc.weight"].T


@torch.no_grad()
def test_inception_gives_all_three_outputs_as_its_definition_does(inception):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 40, 56), generator=generator, dtype=torch.uint8)
    used, found = [], inception(images)
    expected = slow_inception(inception.state_dict(), inception.prepare(images).contiguous(), used)
    assert [tuple(x.shape) for x in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    for x, y in zip(found, expected):
        assert y.std() > 0.05 and (y[0] - y[1]).abs().mean() > 1e-3   # alive, and images differ
        # float32 sums in another order through 94 layers
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
    tensors = ["conv.weight"] + [f"bn.{k}" for k in ("weight", "bias", "running_mean", "running_var",
                                                     "num_batches_tracked")]
    names = {f"{name}.{k}" for name in used for k in tensors} | {"fc.weight", "fc.bias"}
    assert len(used) == 94 and set(inception.state_dict()) == names and len(names) == 566
    for x, y in zip(found, inception(images.float() / 255)):
        torch.testing.assert_close(x, y)      # the same pixels: default tolerance


def test_pools_of_inception_differ_at_the_border_and_by_block(inception):
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    assert evaluate.average_pool(x)[0, 0, 0, 0] == (1 + 2 + 5 + 6) / 4
    assert evaluate.average_pool(x)[0, 0, 1, 1] == 6
    assert evaluate.max_pool(-x)[0, 0, 3, 3] == -11
    assert evaluate.shrinking_pool(x).tolist() == [[[[11.0]]]]
    assert inception.Mixed_7b.pool is evaluate.average_pool and inception.Mixed_7c.pool is evaluate.max_pool
    for block, channels, side in ((inception.Mixed_6a, 288, 35), (inception.Mixed_7a, 768, 17)):
        x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
        assert torch.equal(block(x)[:, -channels:], evaluate.shrinking_pool(x))


@pytest.mark.parametrize("side", [37, 299, 400])
def test_inception_sees_plain_bilinear_samples_at_half_pixel_centres(inception, side):
    image = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    at = ((np.arange(299) + 0.5) * side / 299 - 0.5).clip(0, side - 1)   # no averaging, whatever the scale
    low, part = np.floor(at).astype(int), at - np.floor(at)
    high = np.minimum(low + 1, side - 1)
    rows = image[:, low] * (1 - part)[:, None] + image[:, high] * part[:, None]
    expected = 2 * (rows[:, :, low] * (1 - part) + rows[:, :, high] * part) / 255 - 1
    found = inception.prepare(torch.from_numpy(image)[None])[0].numpy()
    # positions up to 400 are float32: 1.5e-5 px off in two axes, between pixels that differ by up to 2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_inception_loads_the_published_file_strictly_and_never_learns(inception, tmp_path):
    state = inception.state_dict()
    torch.save(state, tmp_path / "inception.pth")
    loaded = InceptionFID(str(tmp_path / "inception.pth"))
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(m.training for m in loaded.modules())
    shapes = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch1x1.bn.running_mean": (64,),
              "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
              "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
              "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {k: tuple(state[k].shape) for k in shapes} == shapes
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="fc.bias"):
        InceptionFID(str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
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
    assert name == "pt_inception-2015-12-05-6726825d.pth"
    assert url.endswith("/mseitzer/pytorch-fid/releases/download/fid_weights/" + name)
    assert sha256.startswith("6726825d") and len(sha256) == 64


# ----- Pictures -------------------------------------------------------------------------------------------

def test_principal_colours_follow_the_directions_of_largest_variance():
    torch.manual_seed(0)
    values = torch.rand(2, 3, 8, 8) * torch.tensor([9.0, 4.0, 1.0]).view(3, 1, 1)
    axes = torch.linalg.qr(torch.randn(6, 3)).Q      # three directions of six
    colours = evaluate.principal_colours(torch.einsum("dk,bkhw->bdhw", axes, values) + 5)
    assert colours.shape == (2, 3, 8, 8) and 0 <= colours.min() and colours.max() <= 1
    # below 1, because colours are clipped and 128 random places are correlated a little by chance
    for k in range(3):
        assert abs(np.corrcoef(colours[:, k].flatten(), values[:, k].flatten())[0, 1]) > 0.97


def test_reconstruction_picture_has_inputs_above_reconstructions_in_two_double_rows(model, images,
                                                                                    rotation_in_fp32):
    picture = np.asarray(evaluate.reconstruction_picture(model, images[:9], per_row=4))
    assert picture.shape == (4 * 66 - 2, 4 * 66 - 2, 3)      # the ninth is left out
    assert np.array_equal(picture[132:196, 66:130], images[5].permute(1, 2, 0).numpy())   # row 2, column 1
    below = picture[198:262, 66:130]
    with torch.no_grad():
        decoded = model.decode(model.encode(normalize(images[5:6].float() / 255)))
    expected = (denormalize(decoded)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(below, expected, atol=0.51)      # rounded to 8 bits, in fp32


def test_pca_picture_has_each_row_of_images_above_its_colours(model, images):
    picture = np.asarray(evaluate.pca_picture(model, images[:5], per_row=3))
    assert picture.shape == (4 * 66 - 2, 3 * 66 - 2, 3)
    assert np.array_equal(picture[132:196, 66:130], images[4].permute(1, 2, 0).numpy())   # row 2, column 1
    below = picture[66:130, :64]
    one_colour_per_patch = below[::16, ::16].repeat(16, axis=0).repeat(16, axis=1)
    assert np.array_equal(below, one_colour_per_patch) and below.std() > 10


# ----- Charts ---------------------------------------------------------------------------------------------

PANEL = (440, 300)      # the size of a chart, px


def write_run(folder, rows):
    folder.mkdir(parents=True)
    rows = [dict(kind="train", step=1, samples=8, flops=1e12, loss_rec=1.0), *rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def panels(picture, columns):
    """The charts of a sheet, row by row."""
    width, height = PANEL
    return [picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            for y in range(picture.height // height) for x in range(columns)]


def dots(panel, colour):
    """Centres (x, y) of the dots of a colour in a chart: 3 x 3 pixels, 2 apart, that all have it."""
    inside = (np.asarray(panel) == ImageColor.getrgb(colour)).all(axis=2)
    height, width = inside.shape
    whole = sum(inside[2 + dy:height - 2 + dy, 2 + dx:width - 2 + dx].astype(int)
                for dy in (-2, 0, 2) for dx in (-2, 0, 2)) == 9
    ys, xs = np.nonzero(whole)
    groups = []
    for x, y in sorted(zip(xs + 2, ys + 2)):
        if groups and x - groups[-1][-1][0] <= 2:
            groups[-1].append((x, y))
        else:
            groups.append([(x, y)])
    return [tuple(np.mean(group, axis=0)) for group in groups]


def count_of_colour(panel, colour):
    """How many pixels below title and legend have a colour."""
    return int((np.asarray(panel)[48:] == ImageColor.getrgb(colour)).all(axis=2).sum())


def test_ticks_are_round_numbers_and_large_numbers_get_a_unit():
    ticks = evaluate.nice_ticks(0.03, 0.98)
    assert ticks == pytest.approx([0.2, 0.4, 0.6, 0.8])      # default tolerance: 3 * 0.2 is not exactly 0.6
    assert evaluate.nice_ticks(7, 31) == [10, 15, 20, 25, 30]
    numbers = [evaluate.short_number(x) for x in (0, 0.25, -1500, 1e6, 2e9, 3e15)]
    assert numbers == ["0", "0.25", "-1.5k", "1M", "2G", "3P"]


def test_chart_dots_few_points_draws_chance_thin_and_takes_no_data():
    few = {"a": (range(12), range(12)), "chance": (range(12), [-2] * 12)}
    chart = evaluate.draw_chart(few, "title")
    assert chart.size == PANEL and len(dots(chart, evaluate.CHART_COLOURS[0])) == 12
    # a line of 1 px, 372 / 1.1 px long: 5 % of margin on both sides
    assert 336 <= count_of_colour(chart, "#999999") < 366
    many = evaluate.draw_chart({"a": (range(13), range(13))}, "title")
    assert count_of_colour(many, evaluate.CHART_COLOURS[0]) and not dots(many, evaluate.CHART_COLOURS[0])
    for lines in ({}, {"a": ((), ())}, {"a": ((1,), (math.nan,))}):
        empty = evaluate.draw_chart(lines, "title", size=(200, 100))
        assert empty.size == (200, 100) and not count_of_colour(empty, evaluate.CHART_COLOURS[0])
    flat = evaluate.draw_chart({"a": ((2,), (0,))}, "title")   # neither axis has an extent
    assert len(dots(flat, evaluate.CHART_COLOURS[0])) == 1


def test_training_curves_show_the_panels_that_a_run_has(tmp_path):
    def row(samples, psnr, linear, knn):
        return dict(kind="eval", samples=samples, psnr=psnr, linear_probe=linear, knn=knn, chance=0.1)
    run = write_run(tmp_path / "run", [row(0, 8, 0.3, 0.2), row(100, 20, 0.5, 0.3), row(200, 22, 0.6, 0.4)])
    with open(os.path.join(run, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write('{"kind": "eval", "sam')      # the run was killed here
    picture = evaluate.training_curves(run)
    assert picture.size == (3 * 440, 300)      # reconstruction loss, PSNR, class from latents
    loss, pixels, classes = panels(picture, 3)
    linear, knn = (dots(classes, colour) for colour in evaluate.CHART_COLOURS[:2])
    assert [len(dots(panel, evaluate.CHART_COLOURS[0])) for panel in (loss, pixels)] == [1, 3]
    assert len(linear) == len(knn) == 3 and linear[2][1] < knn[2][1]
    assert count_of_colour(classes, "#999999") > 150      # chance


def test_plot_has_a_line_for_each_run_with_training_flops_on_a_log_axis(tmp_path):
    def row(flops, gfid, probe):
        return dict(kind="eval", step=1, flops=flops, gfid=gfid, linear_probe=probe, fid_features="judge")
    start = dict(kind="eval", step=0, flops=0, psnr=None)
    rows = [start, row(1e16, 40, 0.4), row(1e18, 30, 0.6), row(1e17, 34, 0.5)]
    runs = [write_run(tmp_path / "a" / "all", rows),
            write_run(tmp_path / "AE", [row(1e16, 55, 0.2), row(1e18, 58, 0.1)])]
    picture = plot_runs(runs)
    assert picture.size == (880, 300)      # two panels: what no run has measured is left out
    for i, panel in enumerate(panels(picture, 2)):
        ours, theirs = (dots(panel, colour) for colour in evaluate.CHART_COLOURS[:2])
        assert len(ours) == 3 and len(theirs) == 2
        xs = [x for x, _ in ours]
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=1.5)      # equal decades, in whole pixels
        assert xs[2] - xs[0] > 300
        assert (ours[0][1] < ours[2][1]) == (i == 0)      # gFID falls, accuracy rises
    assert len(dots(panels(plot_runs(runs[::-1]), 2)[0], evaluate.CHART_COLOURS[1])) == 3


def test_a_band_is_shaded_behind_its_line_and_dots_alone_have_no_line():
    line = {"a": ((1e3, 1e4, 1e5), (1, 2, 3))}
    plain = evaluate.draw_chart(line, "title", log_x=True)
    bands = {"a": ((1e3, 1e4, 1e5), (0, 1, 2), (2, 3, 4))}
    banded = evaluate.draw_chart(line, "title", log_x=True, bands=bands)
    dotted = evaluate.draw_chart(line, "title", log_x=True, joined=False)
    blue = [count_of_colour(x, evaluate.CHART_COLOURS[0]) for x in (plain, banded, dotted)]
    shade = tuple(round(255 + (c - 255) * 48 / 255) for c in ImageColor.getrgb(evaluate.CHART_COLOURS[0]))
    shaded = [count_of_colour(x, "#%02x%02x%02x" % shade) for x in (plain, banded)]
    # a strip of 2 units of height: half of the 3.6 or so that the band's chart is high
    assert shaded[0] == 0 and shaded[1] > 0.3 * 372 * 212
    assert blue[2] < blue[0] and len(dots(dotted, evaluate.CHART_COLOURS[0])) == 3


def test_plot_of_accuracies_has_chance_only_where_it_is_the_same_for_all(tmp_path):
    def row(flops, chance):
        return dict(kind="eval", flops=flops, linear_probe=0.3, chance=chance)
    same, other = ([row(1e16, 0.1), row(1e17, chance)] for chance in (0.1, 0.2))
    assert count_of_colour(plot_runs([write_run(tmp_path / "a", same)]), "#999999") > 150
    assert count_of_colour(plot_runs([write_run(tmp_path / "b", other)]), "#999999") < 20      # in letters


def test_plot_takes_the_last_of_two_measurements_at_the_same_flops():
    rows = [dict(flops=2, psnr=20), dict(flops=1, psnr=10), dict(flops=2, psnr=21), dict(flops=3, psnr=None)]
    assert evaluate.measured_points(rows, "flops", "psnr") == ((1, 2), (10, 21))
    assert evaluate.measured_points(rows, "flops", "ssim") == ((), ())


def test_plot_keeps_distances_in_different_features_apart(tmp_path):
    row, colours = dict(kind="eval", step=1, flops=1e16, rfid=2.0), evaluate.CHART_COLOURS[:2]
    runs = [write_run(tmp_path / name, [dict(row, fid_features=features)])
            for name, features in (("a", "judge"), ("b", "inception"))]
    picture = plot_runs(runs)
    assert picture.size == (880, 300) and plot_runs(runs[:1]).size == (440, 300)
    counts = [[len(dots(panel, colour)) for colour in colours] for panel in panels(picture, 2)]
    assert counts == [[0, 1], [1, 0]]      # inception comes first, by name


def test_plot_says_that_there_is_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="no row of kind eval"):
        plot_runs([write_run(tmp_path / "x", [])])


# ----- Features -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_probes_read_the_mean_latent_or_cls_of_the_last_layers_and_the_mean_of_their_patches(model, images):
    x = normalize(images[:3].float() / 255)
    (_, cls_1), (patches, cls_2) = model.intermediate_layers(x, 2)      # there are two: dino_4 takes both
    features, cls, last = evaluate.probe_features(model, x)
    torch.testing.assert_close(features["dino_4"], torch.cat((cls_1, cls_2, patches.mean(dim=1)), dim=1))
    torch.testing.assert_close(features["dino_1"], torch.cat((cls_2, patches.mean(dim=1)), dim=1))
    torch.testing.assert_close(features["latents"], model.encode(x).mean(dim=(2, 3)))
    assert torch.equal(cls, cls_2) and torch.equal(last, patches)
    alone, _, _ = evaluate.probe_features(model, x, n_layers=1)
    assert set(alone) == {"latents"} and torch.equal(alone["latents"], features["latents"])


def numbers_collected(n):
    """What collect makes of the numbers below n, and the sizes of this rank's batches."""
    sizes = []

    def compute(numbers):
        sizes.append(len(numbers))
        x = torch.tensor(numbers)
        return dict(x=x, y=x[:, None] * 2.0, is_odd=x % 2 == 1)
    return evaluate.collect(evaluate.own_numbers(n, 2), compute), sizes


def collect_on_rank(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    losses.init_distributed()
    results[rank] = [numbers_collected(n) for n in (8, 2)]
    n = (5, 2, 0)[rank]     # where samples were unusable
    results[f"unequal {rank}"] = losses.gather_at_first(dict(x=torch.arange(n) + 10 * rank) if n else {})
    losses.leave_distributed()


def test_collected_features_are_those_of_all_numbers_in_their_order_on_the_first_rank():
    found, sizes = numbers_collected(7)
    assert sizes == [2, 2, 2, 1] and found["x"].tolist() == [*range(7)]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(collect_on_rank, args=(free_port(), results), nprocs=3)
        of_ranks, unequal = [results[r] for r in range(3)], [results[f"unequal {r}"] for r in range(3)]
    assert [sizes for (_, sizes), _ in of_ranks] == [[2, 1], [2, 1], [2]]
    assert [sizes for _, (_, sizes) in of_ranks] == [[1], [1], []]      # one has none
    for k, n in enumerate((8, 2)):
        x = torch.arange(n)
        expected = dict(x=x, y=x[:, None] * 2.0, is_odd=x % 2 == 1)
        whole, *others = (of_rank[k][0] for of_rank in of_ranks)
        assert others == [{}, {}] and whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], expected[name]) for name in whole)
    assert unequal[0]["x"].tolist() == [0, 10, 1, 11, 2, 3, 4] and unequal[1:] == [{}, {}]


def test_real_images_keep_their_captions_where_samples_are_unusable(monkeypatch):
    """Of 6 and 3 images on two ranks: what the first one shows, and where among all it stands."""
    class Source:
        name = "numbers"

        def __len__(self):
            return 12

        def load(self, index, draft, rng):
            return np.full((3, 2, 2), index, np.uint8), f"number {index}", index
    monkeypatch.setattr(evaluate, "TextTower", lambda *_: lambda texts: torch.tensor(
        [[float(text.split()[1])] for text in texts]))
    held_out = evaluate.Passing(data.EvaluationSet(Source(), 6, batch_size=4))
    own = sum((captions for _, captions, _ in held_out), [])
    other = [f"number {100 + i}" for i in range(3)]
    theirs = dict(labels=torch.arange(100, 103), caption_ids=evaluate.caption_ids(other))
    monkeypatch.setattr(evaluate, "gather_objects", lambda own: [own, (other, theirs)])
    args = SimpleNamespace(text_from=None, bpe=None, judge="judge.pt")
    captions = evaluate.Captions(args, torch.device("cpu"), Source(), held_out)
    assert captions.texts == [own[0], other[0], own[1], other[1], own[2], other[2], *own[3:]]
    monkeypatch.setattr(captions, "shown", lambda images: dict(image=images[:, 0, 0, 0].long()))
    for n, n_own in ((9, 6), (8, 5), (5, 3), (1, 1), (99, 6)):
        found = captions.of_real_images(n)
        assert torch.equal(found["image"], found["labels"]) and len(found["labels"]) == n_own
        assert found["labels"].tolist() == [int(text.split()[1]) for text in own[:n_own]]
    captions.places = [9]       # a rank that has none of them
    assert captions.of_real_images(5) == {}


def test_a_judge_has_as_many_classes_as_are_named_or_as_labels_tell(monkeypatch, tmp_path):
    class Source:
        name, class_names = "numbers", None

        def __len__(self):
            return 30

        def fingerprint(self):
            return "numbers"

        def load(self, index, draft, rng):
            return np.zeros((3, 8, 8), np.uint8), "", index % 4 - 1
    monkeypatch.setattr(evaluate, "train_judge", quick_judge)
    args = SimpleNamespace(fid_features="judge", judge=str(tmp_path / "judge.pt"))
    sizes = [evaluate.open_fid_network(args, Source(), n, torch.device("cpu")).sizes for n in (0, 7)]
    assert sizes == [(3,), (7,)]
    with pytest.raises(UserError, match="numbers has a label 2, and 2 classes"):
        evaluate.open_fid_network(args, Source(), 2, torch.device("cpu"))
    monkeypatch.setattr(Source, "load", lambda *_: (np.zeros((3, 8, 8), np.uint8), "", -1))
    with pytest.raises(UserError, match="a judge needs classes, and the data has none"):
        evaluate.open_fid_network(args, Source(), 0, torch.device("cpu"))


def test_features_of_a_set_are_of_its_images_or_are_its_statistics(tmp_path):
    def network(pixels):
        return pixels.mean(dim=(2, 3)), pixels.mean(dim=(2, 3))
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "set.npz", arr_0=images)
    found = evaluate.features_of_set(str(tmp_path / "set.npz"), network, torch.device("cpu"), 2)
    torch.testing.assert_close(found["pool"][:, 0] * 255, torch.arange(3.0))
    np.savez(tmp_path / "set.npz", arr_0=images + 7)      # a set that was replaced is another one
    found = evaluate.features_of_set(str(tmp_path / "set.npz"), network, torch.device("cpu"), 2)
    torch.testing.assert_close(found["pool"][:, 0] * 255, torch.arange(3.0) + 7)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    moments = evaluate.features_of_set(str(tmp_path / "moments.npz"), network, None, 2)
    assert set(moments) == {"mu", "sigma"}
    with pytest.raises(ValueError, match="must be images"):
        evaluate.compare_samples(moments, found)


def test_a_reference_of_adm_gives_moments_to_distances_and_images_to_precision_and_recall():
    """Its mu and sigma are of 50,000 images or more, beside 10,000, to which distances are larger."""
    generator = torch.Generator().manual_seed(0)
    fake, few, many = (torch.randn(n, 16, generator=generator) for n in (4000, 100, 40_000))
    fake = dict(pool=fake, spatial=fake[:, :5], logits=fake)
    moments = dict(zip(("mu", "sigma"), mean_and_covariance(many)))
    moments |= dict(zip(("mu_s", "sigma_s"), mean_and_covariance(many[:, :5])))
    row = evaluate.compare_samples(fake, moments | dict(pool=few, spatial=few[:, :5]))
    of_pool, of_spatial = (mean_and_covariance(fake[name]) for name in ("pool", "spatial"))
    assert row["gfid"] == frechet_distance(*of_pool, moments["mu"], moments["sigma"])
    assert row["sfid"] == frechet_distance(*of_spatial, moments["mu_s"], moments["sigma_s"])
    assert (row["precision"], row["recall"]) == precision_recall(few, fake["pool"])
    assert (row["n_samples"], row["n_references"], row["reference_moments"]) == (4000, 100, True)
    of_few = evaluate.compare_samples(fake, dict(pool=few, spatial=few[:, :5]))
    assert of_few["gfid"] > 5 * row["gfid"] and not of_few["reference_moments"]
    without_spatial = {k: v for k, v in moments.items() if k in ("mu", "sigma")}
    assert "sfid" not in evaluate.compare_samples(fake, without_spatial | dict(pool=few, spatial=few[:, :5]))


# ----- Zero-shot classes ----------------------------------------------------------------------------------

@torch.no_grad()
def test_zero_shot_equals_a_loop_over_classes_and_templates(model):
    names = ["cat", "dog", "red apple", "tree", "house", "car", "boat"]
    labels = torch.arange(40) % len(names)
    classes = []
    for name in names:
        total = 0
        for template in TEMPLATES:
            feature = model.encode_text(word_tokenizer([template.format(name)], 20), normalize=False)[0]
            total = total + feature / feature.norm()
        classes.append(total / total.norm())
    classes = torch.stack(classes)
    # Features near their class, so that accuracy is neither 0 nor 1: those of an untrained model lie close
    # together.
    torch.manual_seed(0)
    noise = 0.3 * classes.std(dim=0).norm() * torch.randn(40, classes.shape[1])
    features = F.normalize(classes[labels] + noise, dim=1)
    top1 = top5 = 0
    for feature, label in zip(features, labels.tolist()):
        order = sorted(range(len(names)), key=lambda c: -float(feature @ classes[c]))
        top1, top5 = top1 + (order[0] == label) / 40, top5 + (label in order[:5]) / 40
    assert 0.2 < top1 < 0.9
    found = evaluate.zero_shot(model, features, labels, names, TEMPLATES, word_tokenizer)
    # Wilson's bounds are where the score test is at its limit: |p - measured| = z sqrt(p (1 - p) / n)
    z = scipy.stats.norm.ppf(0.975)

    def excess(p):
        return abs(p - top1) - z * math.sqrt(p * (1 - p) / 40)
    low, high = (scipy.optimize.brentq(excess, *bracket) for bracket in ((1e-9, top1), (top1, 1 - 1e-9)))
    # default tolerance: float32 means of 40 hits
    assert found == pytest.approx(dict(
        zero_shot_top1=top1, zero_shot_top5=top5, zero_shot_chance=1 / 7, zero_shot_interval=(high - low) / 2,
        zero_shot_templates=len(TEMPLATES)))
    few = evaluate.zero_shot(model, features, labels % 5, names[:5], TEMPLATES, word_tokenizer)
    assert "zero_shot_top5" not in few


def test_class_embeddings_do_not_depend_on_the_size_of_a_batch(model):
    arguments = (model, ["cat", "dog", "tree"], TEMPLATES, word_tokenizer)
    whole, parts = evaluate.class_embeddings(*arguments), evaluate.class_embeddings(*arguments, batch_size=5)
    torch.testing.assert_close(parts, whole, **FP32)      # products of another shape


def test_zero_shot_refuses_labels_without_a_name_and_templates_without_a_place(model):
    def classify(labels, templates):
        features, names = torch.randn(2, 32), ["a", "b"]
        evaluate.zero_shot(model, features, torch.tensor(labels), names, templates, word_tokenizer)
    for labels, words in (([0, 3], "are 0 to 3, and there are 2 class names"), ([-1, 0], "are -1 to 0")):
        with pytest.raises(ValueError, match=words):
            classify(labels, TEMPLATES)
    for templates, words in ((["a picture"], "a picture"), ([], "got")):
        with pytest.raises(ValueError, match=f"every template must hold .*{words}"):
            classify([0, 1], templates)


# ----- The share of meaning, the linear probe -------------------------------------------------------------

def clusters(n, n_classes=4, dim=12, seed=0, spread=1.5):
    """Correlated features of different scales around class centres, which overlap more with the spread ->
    (n, dim), labels (n,)."""
    generator = torch.Generator().manual_seed(7)
    centres, mix = (torch.randn(k, dim, generator=generator) for k in (n_classes, dim))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    noise = spread * torch.randn(n, dim, generator=generator)
    return (centres[labels] + noise) @ mix * torch.logspace(-2, 2, dim) + 50, labels


def standardised(features, like):
    """Features by the mean and standard deviation of others."""
    return (features - like.mean(dim=0)) / like.std(dim=0)


def test_class_share_is_the_variance_between_classes_over_all_of_it_and_0_where_labels_say_nothing():
    torch.manual_seed(0)
    labels, within, between = torch.randint(5, (20_000,)), 0.7, torch.randn(5, 8)
    features = between[labels] + within * torch.randn(20_000, 8) + 3
    weights = labels.bincount() / len(labels)
    mean = weights @ between
    of_classes = (weights @ (between - mean).square()).sum()
    expected = of_classes / (of_classes + 8 * within ** 2)
    # the variance of 20,000 draws is known to sqrt(2 / 20,000) = 1 % in each of 8 channels
    assert evaluate.class_share(features, labels) == pytest.approx(expected.item(), abs=0.01)
    moved = evaluate.class_share(7 * features, labels + 3)
    assert moved == pytest.approx(evaluate.class_share(features, labels))
    # 60 samples of 5 random classes: not corrected, eta squared would be 4 / 59 on average
    shares = [evaluate.class_share(torch.randn(60, 8), torch.randint(5, (60,))) for _ in range(200)]
    assert abs(np.mean(shares)) < 0.01          # 200 means, each within 0.03
    assert evaluate.class_share(labels[:, None].float() * torch.ones(1, 8), labels) == pytest.approx(1.0)


@pytest.mark.parametrize("n, batch_size", [(300, 32), (1000, 62)])      # a sixteenth, at least 32
def test_probes_trained_side_by_side_equal_one_run_of_sgd_for_each_rate(n, batch_size):
    features, labels = clusters(n)
    rates, n_steps = (1e-3, 0.1, 0.02), 40
    weights, biases = evaluate.train_probes(features, labels, 4, rates, n_steps, seed=3)
    assert weights.shape == (3, 12, 4) and biases.shape == (3, 1, 4)
    x = standardised(features.double(), features.double())
    for rate, weight, bias in zip(rates, weights, biases):
        probe, generator = torch.nn.Linear(12, 4).double(), step_generator(3, 0, "cpu")
        for parameter in probe.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(probe.parameters(), lr=1.0, momentum=0.9)
        for step in range(n_steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
            optimizer.param_groups[0]["lr"] = rate * batch_size / 256 * cosine
            rows = torch.randint(n, (batch_size,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(probe(x[rows]), labels[rows]).backward()
            optimizer.step()
        assert probe.weight.abs().max() > 1e-3      # it has learned something
        # float32 against float64
        torch.testing.assert_close(weight.double(), probe.weight.detach().T, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias[0].double(), probe.bias.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_linear_probe_reaches_what_logistic_regression_reaches(spread):
    (x, labels), (test_x, test_labels) = (clusters(600, seed=seed, spread=spread) for seed in (1, 2))
    train_x = standardised(x, x).double()

    def value_and_gradient(flat):
        w = torch.from_numpy(flat.copy()).view(13, 4).requires_grad_()
        loss = F.cross_entropy(train_x @ w[:-1] + w[-1], labels) + 1e-4 * (w[:-1] ** 2).sum()
        loss.backward()
        return loss.item(), w.grad.flatten().numpy()
    minimum = scipy.optimize.minimize(value_and_gradient, np.zeros(52), jac=True, method="L-BFGS-B")
    w = minimum.x.reshape(13, 4)
    prediction = (standardised(test_x, x).double().numpy() @ w[:-1] + w[-1]).argmax(axis=1)
    expected = (prediction == test_labels.numpy()).mean()
    assert (expected > 0.97) == (spread == 0.5)      # the clusters are separable, or they overlap
    found = evaluate.linear_probe(x, labels, test_x, test_labels)
    assert abs(found["linear_probe"] - expected) < 0.02


def test_linear_probe_takes_absent_classes_constant_features_and_large_scales():
    (x, labels), (test_x, test_labels) = (clusters(200, seed=seed, spread=0.2) for seed in (1, 2))
    assert evaluate.linear_probe(x, labels, test_x, test_labels, n_steps=200)["linear_probe"] == 1
    x, test_x = (torch.cat((1024 * f, torch.full((200, 1), 0.1)), dim=1) for f in (x, test_x))
    # classes 0 and 5 do not occur, 6 only once and only in the test
    labels, test_labels = labels + 1, test_labels + 1
    test_labels[0] = 6
    found = evaluate.linear_probe(x, labels, test_x, test_labels, n_steps=200)
    assert found["linear_probe"] == pytest.approx(199 / 200)      # default tolerance: a float32 mean
    assert found["linear_probe_balanced"] == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="5 training samples or more, and got 4"):
        evaluate.linear_probe(x[:4], labels[:4], test_x, test_labels)


def test_linear_probe_chooses_its_rate_without_the_test_labels_and_refits_on_all_of_the_training_set():
    x, labels = clusters(250, seed=3, spread=2.0)
    test_x, test_labels = clusters(400, seed=4, spread=2.0)
    found = evaluate.linear_probe(x, labels, test_x, test_labels, n_steps=400)
    mixed = test_labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    shuffled = evaluate.linear_probe(x, labels, test_x, mixed, n_steps=400)
    assert shuffled["linear_probe_rate"] == found["linear_probe_rate"]
    assert shuffled["linear_probe"] < found["linear_probe"]
    order = permutation(0, 0, 250)

    def accuracies(rows, rates, features, labels_of_features):
        weights, biases = evaluate.train_probes(x[rows], labels[rows], 4, rates, 400)
        logits = standardised(features, x[rows]) @ weights + biases                  # (G, m, C)
        return (logits.argmax(dim=2) == labels_of_features).double().mean(dim=1).tolist()
    rates = evaluate.PROBE_RATES
    trials = accuracies(order[50:], rates, x[order[:50]], labels[order[:50]])
    best = rates[trials.index(max(trials))]
    assert len(rates) == 13 and len(set(trials)) > 3 and found["linear_probe_rate"] == best
    on_test = accuracies(order, rates, test_x, test_labels)
    assert rates[on_test.index(max(on_test))] != best      # with the test labels it would be another
    accuracy, = accuracies(order, [best], test_x, test_labels)
    assert found["linear_probe"] == pytest.approx(accuracy)      # default tolerance: a float32 mean
    assert found["linear_probe_balanced"] == pytest.approx(found["linear_probe"], abs=0.1)


# ----- The judge ------------------------------------------------------------------------------------------

def test_the_judge_is_measured_on_images_that_it_has_not_learned_from(monkeypatch):
    images = torch.full((40, 3, 64, 64), 60, dtype=torch.uint8)
    images[32:] = 200      # the last fifth
    real, seen = evaluate.judge_view, []

    def view(canvases, generator, move):
        seen.append(canvases.unique().tolist())
        return real(canvases, generator, move)
    monkeypatch.setattr(evaluate, "judge_view", view)
    monkeypatch.setattr(evaluate.Judge, "LAYERS", ((8, 5, 2), (8, 3, 4)))
    monkeypatch.setattr(evaluate.Judge, "classify", lambda self, pixels: (pixels[:, 0, 0, 0] > 0.5).long())
    labels = torch.tensor([0] * 32 + [1] * 6 + [0] * 2)
    judge = evaluate.train_judge(images, labels, 2, torch.device("cpu"), n_steps=3, batch_size=8)
    assert seen == [[60]] * 3 and judge.accuracy == 6 / 8
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())


def test_a_judge_of_several_questions_learns_each_where_it_has_an_answer_and_moves_nothing():
    """Brightness and side: of the first every third is not answered, of the second every second one."""
    torch.manual_seed(0)
    labels = torch.randint(2, (200, 2))
    images = torch.where(labels[:, 0] == 1, 180, 70).view(-1, 1, 1, 1).repeat(1, 3, 64, 64).byte()
    for image, (_, side) in zip(images, labels):
        image[:, 20:40, 40 * side:40 * side + 20] = 255
    answers = labels.clone()
    answers[::3, 0], answers[::2, 1] = -1, -1
    judge = evaluate.train_judge(images, answers, (2, 2), torch.device("cpu"), n_steps=40, batch_size=16)
    assert judge.accuracy > 0.9
    found = judge.classify(images / 255)
    assert found.shape == (200, 2) and (found == labels).float().mean(dim=0).min() > 0.9


def test_figures_of_texts_are_shares_of_what_captions_say():
    features = dict(
        shown_features=torch.eye(4), text_features=torch.eye(4)[[0, 1, 3, 2]], caption_ids=torch.arange(4),
        said=torch.tensor([[0, 1, -1, 3, -1], [2, 2, 0, -1, 5], [1, 1, -1, -1, 5], [3, 0, 2, -1, -1]]),
        answers=torch.tensor([[0, 1, 1, 3, 0], [2, 0, 0, 0, 5], [1, 1, 0, 0, 4], [0, 0, 2, 0, 0]]),
        is_held_out=torch.tensor([False, True, False, True]))
    row = evaluate.text_figures(features)
    expected = dict(shape=0.75, colour=0.75, size=1.0, place=1.0, background=0.5, shape_and_colour=1.0,
                    held_out_pairs=0.0)
    assert {k: row[k] for k in expected} == expected
    assert row["image_to_text"] == row["text_to_image"] == 0.5 and row["retrieval_chance"] == 0.25
    assert "shape" not in evaluate.text_figures({k: features[k] for k in list(features)[:3]})


def test_the_judge_is_trained_once_for_a_set_and_its_classes(tmp_path, monkeypatch):
    calls = []

    def train_judge(images, labels, n_classes, device, seed):
        calls.append((tuple(images.shape), n_classes))
        judge = evaluate.Judge(n_classes)
        judge.accuracy = 0.75
        return judge
    monkeypatch.setattr(evaluate, "train_judge", train_judge)
    monkeypatch.setattr(evaluate.Judge, "LAYERS", ((8, 5, 2), (8, 3, 4)))

    def open_judge(n, n_classes):
        source = data.BuiltinSource(n, 32)
        return evaluate.open_judge(str(tmp_path / "judge.pt"), source, n_classes, torch.device("cpu"))
    first, second = open_judge(12, 10), open_judge(12, 10)
    assert calls == [((12, 3, 64, 64), 10)] and second.accuracy == 0.75 and not second.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    open_judge(12, 11)
    open_judge(13, 11)
    assert calls[1:] == [((12, 3, 64, 64), 11), ((13, 3, 64, 64), 11)]


# ----- Measuring ------------------------------------------------------------------------------------------

@torch.no_grad()
def test_images_become_8_bits_by_truncation_and_reconstructions_are_clamped(images):
    """As the authors have it: 0.9999 is 254."""
    assert evaluate.to_uint8(torch.tensor([0.0, 0.5, 0.9999, 1.0])).tolist() == [0, 127, 254, 255]
    pixels = images[:2] / 255
    twice = SimpleNamespace(encode=lambda x: denormalize(x), decode=lambda x: normalize(2 * x - 0.5))
    rebuilt, measured = evaluate.reconstruct(twice, pixels)
    expected = (2 * pixels - 0.5).clamp(0, 1)
    torch.testing.assert_close(rebuilt, expected, **FP32)      # there and back through normalize
    torch.testing.assert_close(measured["psnr"], psnr(expected, pixels), **FP32)


def test_each_image_keeps_its_caption(model, images):
    captions = [f"blob number {i}" for i in range(4)]
    subject = evaluate.Subject(model, word_tokenizer, n_layers=1)
    found = subject.features(images[:4], captions, torch.arange(4))["text_features"]
    for caption, feature in zip(captions, found):
        alone = model.encode_text(word_tokenizer([caption], 20)).float()[0]
        torch.testing.assert_close(feature, alone, **FP32)      # products of another shape


def test_measure_leaves_out_what_has_no_label_and_what_the_model_cannot_do(model, images, monkeypatch,
                                                                           rotation_in_fp32):
    probed = []

    def linear_probe(train_x, train_labels, x, labels, seed):
        probed.append((train_x, train_labels.tolist(), x, labels.tolist(), seed))
        return dict(linear_probe=0.5)
    monkeypatch.setattr(evaluate, "linear_probe", linear_probe)
    captions = [f"blob {i % 5}" for i in range(12)]
    labels = torch.tensor([0, 1, 2, -1] * 3)
    held_out, gallery = [(images[:12], captions, labels)], [(images[12:], captions, labels.roll(1))]
    subject = evaluate.Subject(model, word_tokenizer, class_names=["a", "b", "c"])
    row, test, _ = evaluate.measure(subject, held_out, gallery, seed=4)
    assert set(row) == {
        "psnr", "ssim", "image_to_text", "text_to_image", "retrieval_chance", "zero_shot_top1",
        "zero_shot_interval", "zero_shot_chance", "linear_probe", "knn", "dino_1_linear_probe", "dino_1_knn",
        "dino_4_linear_probe", "dino_4_knn", "chance", "zero_shot_templates", "class_share",
        "dino_1_class_share", "dino_4_class_share"}
    x = images.float() / 255
    latents = model.encode(normalize(x))
    mine, theirs = (latents.mean(dim=(2, 3))[part] for part in (slice(12, None), slice(12)))
    train_x, train_labels, test_x, test_labels, seed = probed[0]
    # in batches of another size
    torch.testing.assert_close(train_x, mine[labels.roll(1) >= 0], **FP32)
    torch.testing.assert_close(test_x, theirs[labels >= 0], **FP32)
    assert train_labels == test_labels == [0, 1, 2] * 3 and seed == 4
    assert row["chance"] == pytest.approx(1 / 3)
    pixels = denormalize(model.decode(latents[:12])).clamp(0, 1)
    # dB: 8.7 times the relative change of an error, which is that of a pixel at most
    torch.testing.assert_close(test["psnr"], psnr(pixels, x[:12]), atol=10 * FP32["atol"], rtol=0)
    assert row["ssim"] == pytest.approx(ssim(pixels, x[:12]).mean().item(), abs=FP32["atol"])
    # 12 captions of which 0 and 1 come three times, the others twice
    assert row["retrieval_chance"] == pytest.approx((2 * 9 + 3 * 4) / 144)
    unlabelled = torch.full((12,), -1)
    unlabelled = [(images[:12], captions, unlabelled)]
    nothing, *_ = evaluate.measure(evaluate.Subject(model), unlabelled, gallery)
    assert set(nothing) == {"psnr", "ssim"}
    encoder = VTP(micro_config(train_reconstruction=False, train_clip=False))
    few, *_ = evaluate.measure(evaluate.Subject(encoder, n_layers=1), held_out, gallery)
    assert set(few) == {"linear_probe", "knn", "class_share", "chance"}


def test_sample_picture_has_a_row_for_each_of_the_first_classes_from_the_same_noise(model, monkeypatch):
    asked = []

    def generate(dit, tokenizer, stats, noise, labels, **sampling):
        asked.append((noise, labels, sampling))
        return (labels.view(-1, 1, 1, 1) / 4).expand(-1, 3, 64, 64)
    monkeypatch.setattr(evaluate, "generate", generate)
    dit = SimpleNamespace(num_classes=5, latent_shape=(16, 4, 4))
    pictures = [evaluate.sample_picture(dit, model, None, names, 7, per_class=3, most_classes=4, steps=9)
                for names in (list("abcde"), None)]
    (noise, labels, sampling), (again, _, _) = asked
    assert noise.shape == (12, 16, 4, 4) and torch.equal(noise, again) and len(noise.unique(dim=0)) == 12
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and sampling == dict(steps=9)
    cells = np.asarray(pictures[0])[:, pictures[0].width - (3 * 66 - 2):]
    assert [cells[66 * row + 30, 30, 0] for row in range(4)] == [0, 64, 128, 191]
    assert pictures[1].width > pictures[0].width      # "class 0" is longer than "a"


def test_samples_are_of_all_classes_alike_or_as_often_as_in_the_training_set(monkeypatch, tmp_path):
    drawn = []

    def generate(model, tokenizer, stats, noise, labels, **_):
        drawn.extend(labels.tolist())
        return torch.zeros(len(labels), 3, 8, 8)
    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "sample_figures", lambda *_: {})
    monkeypatch.setattr(evaluate, "sample_picture", lambda *_, **__: Image.new("RGB", (8, 8)))
    subject = evaluate.Subject(model=None)
    dit = SimpleNamespace(latent_shape=(1, 1, 1), num_classes=3)
    train = dict(labels=torch.tensor([0] * 9 + [2] + [-1] * 30))

    def labels(sample_labels, batch_size, train=train):
        args = dict(reference=None, seed=0, guidance=[1.0], n_samples=600, batch_size=batch_size,
                    precision="fp32", out=str(tmp_path), sample_labels=sample_labels)
        args = SimpleNamespace(**dict.fromkeys(evaluate.SAMPLING) | args)
        drawn.clear()
        evaluate.measure_dit(args, subject, dit, None, train, torch.device("cpu"))
        return drawn.copy()
    of_data, uniform = labels("data", 64), labels("uniform", 64)
    assert of_data == labels("data", 7)
    counts = [np.bincount(x, minlength=3) / 600 for x in (of_data, uniform)]
    # shares of 600 draws: 5 standard deviations are 0.06 and 0.1
    assert counts[0] == pytest.approx([0.9, 0, 0.1], abs=0.06) and counts[0][1] == 0
    assert counts[1] == pytest.approx([1 / 3] * 3, abs=0.1)
    for train_labels, error in (([-1], "no training image has a label"), ([3], "label 3, and a DiT of 3")):
        with pytest.raises(UserError, match=error):
            labels("data", 64, dict(labels=torch.tensor(train_labels)))


def test_latent_statistics_are_read_and_other_files_refused(tmp_path):
    stats = dict(mean=torch.randn(1, 4, 1, 1).double(), std=torch.rand(1, 4, 1, 1).double())
    torch.save(stats, tmp_path / "stats.pt")
    mean, std = evaluate.read_latent_stats(tmp_path / "stats.pt")
    assert torch.equal(mean, stats["mean"].float()) and torch.equal(std, stats["std"].float())
    for other in (dict(mean=stats["mean"]), dict(mean=torch.zeros(4), std=torch.ones(4)), torch.zeros(4)):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="holds no latent statistics"):
            evaluate.read_latent_stats(tmp_path / "other.pt")


# ----- The command ----------------------------------------------------------------------------------------

SMALL = ["--train_size", "48", "--n_train", "48", "--n_val", "23", "--n_samples", "11", "--batch_size", "8"]

# The command with RoPE rotating in fp32, so that batches of another size change fp32's rounding alone; what
# it collects over ranks is kept in the folder that is the first argument.
IN_FP32 = """
import os, sys
sys.path.insert(0, {root!r})
import torch, evaluate, vtp
tables, collect, collected = vtp.RopeEmbedding.forward, evaluate.collect, []
vtp.RopeEmbedding.forward = lambda *a, **k: tuple(t.float() for t in tables(*a, **k))
evaluate.collect = lambda *a: collected.append(collect(*a)) or collected[-1]
folder = sys.argv.pop(1)
evaluate.main()
torch.save(collected, os.path.join(folder, "collected" + os.environ.get("RANK", "0")))
"""


@pytest.fixture(scope="module")
def evaluated(micro_model, tmp_path_factory):
    """A tokenizer's run with metrics, a DiT's run on it, a judge, and what evaluate.py makes of them ->
    folder."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(micro_model, root / "tok")
    row = dict(kind="train", step=5, samples=40, flops=1e12)
    (root / "tok" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run_script(["train_dit.py", "--tokenizer", root / "tok", "--out", root / "dit", "--samples", "32",
                "--batch_size", "8", "--train_size", "48", "--steps", "4", "--eval_samples", "0",
                "--precision", "fp32"])
    source, judge = data.BuiltinSource(48, 64), evaluate.Judge(10)
    content = dict(judge=judge.state_dict(), accuracy=0.5, fingerprint=f"{source.fingerprint()} 10 classes")
    torch.save(content, root / "tok" / "latents" / "judge.pt")
    (root / "in_fp32.py").write_text(IN_FP32.format(root=ROOT))
    run_script([root / "in_fp32.py", root, "--tokenizer", root / "tok", "--dit", root / "dit", *SMALL])
    return root


def results(folder, name="results.json"):
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return json.load(f)["figures"]


def test_the_command_measures_everything_and_names_the_features(evaluated):
    row = results(evaluated / "tok" / "evaluation")
    assert {"rfid", "psnr", "ssim", "zero_shot_top1", "zero_shot_top5", "zero_shot_interval", "image_to_text",
            "linear_probe", "dino_1_linear_probe", "dino_4_linear_probe", "knn", "gfid", "inception_score",
            "precision", "recall", "sample_accuracy", "sample_zero_shot", "class_share"} <= row.keys()
    assert row["fid_features"] == "judge"
    pictures = {"reconstructions.png", "latents_pca.png", "samples.png"}
    assert pictures <= set(os.listdir(evaluated / "tok" / "evaluation"))
    last = evaluate.read_metrics(str(evaluated / "tok"))[-1]
    assert last["kind"] == "eval" and last["flops"] == 1e12 and last["gfid"] == row["gfid"]


def test_further_judges_and_guidances_give_figures_of_their_own_and_change_no_other(evaluated, tmp_path,
                                                                                    monkeypatch):
    monkeypatch.setattr(evaluate, "train_judge", quick_judge)
    command = ["--tokenizer", str(evaluated / "tok"), "--dit", str(evaluated / "dit"), *SMALL]
    judge = ["--judges", "2", "--judge", str(tmp_path / "judge.pt")]
    for name, more in (("two", [*judge, "--guidance", "4", "1"]),
                       ("other", ["--judge", str(tmp_path / "judge_1.pt"), "--guidance", "1"])):
        shutil.copy(evaluated / "tok" / "latents" / "judge.pt", tmp_path / "judge.pt")
        evaluate.main([*command, *more, "--out", str(tmp_path / name)])
    both, other, first = (results(tmp_path / "two"), results(tmp_path / "other"),
                          results(evaluated / "tok" / "evaluation"))
    figures = ("gfid", "precision", "recall", "sample_accuracy")
    # the fixture was measured with RoPE rotating in fp32, and at the DiT's own guidance, which is 4
    assert both["gfid"] == pytest.approx(first["gfid"], rel=0.05)
    assert [both[f"{k}_judge1_guidance1"] for k in figures] == pytest.approx([other[k] for k in figures])
    assert both["sample_zero_shot_guidance1"] == other["sample_zero_shot"]
    assert both["gfid_judge1"] not in (both["gfid"], both["gfid_guidance1"], other["gfid"])


def quick_judge(images, labels, n_classes, device, seed=0, **_):
    """A judge that has learned nothing, another for each seed."""
    torch.manual_seed(seed)
    judge = evaluate.Judge(n_classes).eval()
    judge.accuracy = 0.5
    return judge


# ----- The study ------------------------------------------------------------------------------------------

def test_the_studys_plan_has_every_variant_on_every_level_seeds_at_the_ends_and_no_run_twice():
    runs = evaluate.plan_study(False, True)
    assert len({run.name for run in runs}) == len(runs)
    ladder = {(run.variant, run.samples, run.seed) for run in runs if not run.change}
    first, *middle, last = evaluate.STUDY_SAMPLES
    assert len(middle) >= 2
    wanted = {(v, last, s) for v in evaluate.VARIANTS for s in range(3)}
    wanted |= {(v, first, s) for v in evaluate.ENDS for s in range(3)}
    assert ladder == wanted | {(v, n, 0) for v in evaluate.VARIANTS for n in (first, *middle)}
    for changes in (evaluate.STUDY_ENCODERS, [f"{n} images" for n in evaluate.STUDY_IMAGES]):
        compared = {(run.variant, run.change, run.samples) for run in runs if run.change in changes}
        assert compared == {(v, change, middle[-1]) for v in evaluate.ENDS for change in changes}
    assert [run.variant for run in evaluate.plan_study(True, True)] == list(evaluate.ENDS)
    on_data = evaluate.plan_study(False, False)
    assert {(run.variant, run.seed) for run in on_data} == {(v, s) for v in evaluate.ENDS for s in range(3)}


def study_arguments(folder, **changes):
    values = dict(study=str(folder), quick=True, data=None, val_data=None, label=None, classnames=None,
                  hours=1.0, jobs=2)
    return SimpleNamespace(**values | changes)


def test_a_study_is_stopped_and_goes_on_and_leaves_figures_and_a_table(micro_model, tmp_path, monkeypatch,
                                                                      capsys):
    """Scripts of a few steps, each a process, as in a study; stopped by the clock, by a signal, then made."""
    commands = evaluate.study_commands

    def short(args, run):
        (train, of_train), (dit, of_dit), (measure, of_measure) = commands(args, run)
        few = ["--train_size", "48", "--log_every", "1"]
        return [(train, ["--init", micro_model, *of_train[:-2], *few, *of_train[-2:]]),
                (dit, ["--batch_size", "8", "--steps", "4", *few, *of_dit]),
                (measure, [*SMALL, *of_measure])]
    monkeypatch.setattr(evaluate, "study_commands", short)
    monkeypatch.setattr(evaluate, "STUDY_SAMPLES", (64, 128, 192, 256))
    monkeypatch.setattr(evaluate, "STUDY_DIT_SAMPLES", 16)
    folder, source, judge = tmp_path / "study", data.BuiltinSource(48, 64), evaluate.Judge(10)
    folder.mkdir()
    content = dict(judge=judge.state_dict(), accuracy=0.5, fingerprint=f"{source.fingerprint()} 10 classes")
    for name in ("judge.pt", "judge_1.pt"):
        torch.save(content, folder / name)

    evaluate.make_study(study_arguments(folder, hours=0.0))
    assert "0 of 2 runs are there" in capsys.readouterr().out and not [*folder.glob("AE*")]
    evaluate.make_study(study_arguments(folder, hours=1e-6))
    assert "0 of 2 runs are there" in capsys.readouterr().out
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    evaluate.make_study(study_arguments(folder))
    assert "0 of 2 runs are there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    evaluate.make_study(study_arguments(folder))
    screen = capsys.readouterr().out
    assert "2 of 2 runs are there" in screen
    rows = [*json.loads((folder / "study.json").read_text()).values()]
    assert [row["variant"] for row in rows] == ["AE", "CLIP+SSL+AE"]
    for row in rows:
        run = folder / row["name"]
        figures = results(run / "evaluation")
        assert row["gfid_guidance1"] == figures["gfid_guidance1"] and row["psnr"] == figures["psnr"]
        assert row["flops"] == evaluate.read_metrics(str(run / "tokenizer"))[-1]["flops"] > 0
        assert evaluate.recorded_arguments(str(run / "tokenizer"))["samples"] == 256
        assert f"| {row['variant']} | 256 | 1 | {row['psnr']:.1f} |" in screen
    of_autoencoder, of_all = (evaluate.recorded_arguments(str(folder / row["name"] / "tokenizer"))
                              for row in rows)
    assert {k for k, x in of_all.items() if of_autoencoder[k] != x} >= {"lambda_clip", "lambda_ssl"}
    for name in ("compute.png", "understanding.png", "data_and_size.png", "samples.png"):
        assert Image.open(folder / name).width > 300
    before = (folder / "study.json").read_text()
    monkeypatch.setattr(evaluate.Study, "call", None)       # nothing is left to do, here or elsewhere
    shutil.rmtree(folder / rows[0]["name"])
    evaluate.make_study(study_arguments(folder))
    assert (folder / "study.json").read_text() == before


def test_a_script_that_fails_ends_the_study_with_its_log_named(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "study_commands", lambda args, run: [("evaluate.py", ["--no_such_option"])])
    with pytest.raises(UserError, match="evaluate.py of AE-[0-9]*-seed0 failed: see the end of .*evaluate"):
        evaluate.make_study(study_arguments(tmp_path, jobs=1))


def test_the_table_of_the_study_has_means_and_half_of_their_range():
    rows = [dict(variant="AE", samples=100, change="", psnr=x) for x in (20.0, 21.0, 24.0)]
    line = evaluate.study_table(rows).splitlines()[-1]
    assert line.startswith("| AE | 100 | 3 | 21.7 ± 2.0 | - |")


# ----- The command, its table -----------------------------------------------------------------------------

def test_the_table_names_the_features_and_leaves_out_what_was_not_measured():
    row = dict(rfid=1.2345, n_val=2048, gfid=30.0, precision=0.5, zero_shot_top1=0.5, zero_shot_templates=80,
               chance=0.1, fid_features="judge", psnr=None, n_samples=1024, n_references=8192,
               reference_moments=False)
    lines = [" ".join(line.split()) for line in evaluate.table(row).splitlines()]
    assert lines == [
        "reconstruction, held-out images", "rfid 1.234 the judge; 2,048 images and their reconstructions",
        "understanding, held-out images", "zero_shot_top1 0.5", "zero_shot_templates 80", "chance 0.1",
        "generation", "gfid 30 the judge; 1,024 samples against 8,192 reference images",
        "precision 0.5 the judge; 1,024 samples against 8,192 reference images"]
    row.update(fid_features="inception", reference_moments=True)
    gfid = next(line for line in evaluate.table(row).splitlines() if "gfid" in line)
    assert "pytorch-fid" in gfid and "1,024 samples against the moments in --reference" in gfid


def test_the_commands_figures_are_those_of_the_functions(evaluated, rotation_in_fp32):
    """PSNR and rFID computed from images, without parts, files and ranks."""
    row, model = results(evaluated / "tok" / "evaluation"), VTP.from_pretrained(str(evaluated / "tok")).eval()
    (images, _, _), = data.EvaluationSet(data.BuiltinSource(2048, 64, "val"), 23)
    with torch.no_grad():
        reconstructions = denormalize(model.decode(model.encode(normalize(images / 255)))).clamp(0, 1)
    path, source = evaluated / "tok" / "latents" / "judge.pt", data.BuiltinSource(48, 64)
    judge = evaluate.open_judge(str(path), source, 10, torch.device("cpu"))
    in_8_bits = (images, (reconstructions * 255).byte())
    features = [judge(x.float() / 255)[0].double().numpy() for x in in_8_bits]
    real, made = ((f.mean(axis=0), np.cov(f.T)) for f in features)
    assert row["psnr"] == pytest.approx(psnr(reconstructions, images / 255).mean().item(), abs=3e-4)   # above
    # a pixel that moves by 2e-6 becomes another of 8 bits, by 1/255, in one case of 1,000
    assert row["rfid"] == pytest.approx(frechet_distance(*real, *made), rel=1e-3)


def test_two_ranks_measure_the_same(evaluated):
    """Each image, label, caption and sample once, in one order; what is made of them then knows no ranks."""
    two_ranks = evaluated / "two"
    two_ranks.mkdir()
    run_script([evaluated / "in_fp32.py", two_ranks, "--tokenizer", evaluated / "tok",
                "--dit", evaluated / "dit", *SMALL, "--out", two_ranks], n_ranks=2)
    one, two, of_rank_1 = (torch.load(folder / f"collected{r}", weights_only=True) for folder, r in (
        (evaluated, 0), (two_ranks, 0), (two_ranks, 1)))
    assert [len(collected["logits" if k else "psnr"]) for k, collected in enumerate(one)] == [23, 48, 11]
    assert of_rank_1 == [{}] * 3        # rank 0 alone has features of all
    assert [x.keys() for x in two] == [x.keys() for x in one]
    for name, x, y in ((name, x[name], y[name]) for x, y in zip(one, two) for name in x):
        # Of the largest value: fp32's rounding, and that of some pixels to another of 8 bits (seen: 3e-4;
        # two images differ by 1e-1). Numbers of labels and captions are exact.
        near = 3e-3 if name.endswith(("pool", "logits")) else FP32["atol"]
        near = near * x.abs().max().item() if x.is_floating_point() else 0
        torch.testing.assert_close(y, x, atol=near, rtol=0, msg=lambda m: f"{name}: {m}")
    one, two = results(evaluated / "tok" / "evaluation"), results(two_ranks)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name in ("psnr", "ssim", "inception_score"):
            assert two[name] == pytest.approx(value, rel=FP32["rtol"]), name
        elif name in ("rfid", "gfid"):      # of pixels in 8 bits, see above
            assert two[name] == pytest.approx(value, rel=1e-3), name
        elif "chance" in name or not isinstance(value, float):      # counts and names
            assert two[name] == value, name


@pytest.fixture(scope="module")
def of_texts(evaluated):
    """A DiT of texts on the tokenizer of `evaluated`, and judges of classes and attributes."""
    source, sizes = data.BuiltinSource(48, 64), tuple(map(len, data.ATTRIBUTES.values()))
    run_script(["train_dit.py", "--condition", "text", "--tokenizer", evaluated / "tok",
                "--out", evaluated / "text", "--samples", "32", "--batch_size", "8", "--train_size", "48",
                "--steps", "4", "--precision", "fp32"])
    shutil.copy(evaluated / "tok" / "latents" / "judge.pt", evaluated / "tok" / "latents_text")
    judge = evaluate.Judge(sizes)
    of_set = f"{source.fingerprint()} {sizes} classes"
    torch.save(dict(judge=judge.state_dict(), accuracy=0.5, fingerprint=of_set),
               evaluated / "tok" / "latents_text" / "judge_attributes.pt")
    run_script([evaluated / "in_fp32.py", evaluated / "text", "--tokenizer", evaluated / "tok", "--dit",
                evaluated / "text", *SMALL, "--out", evaluated / "text" / "figures"])
    return evaluated / "text"


def test_a_dit_of_texts_is_measured_on_the_held_out_captions(of_texts, capsys):
    row = results(of_texts / "figures")
    names = {*data.ATTRIBUTES, "shape_and_colour", "image_to_text", "text_to_image", "retrieval_chance"}
    assert {f"{kind}_{name}" for kind in ("drawn", "real_drawn") for name in names} <= row.keys()
    assert {"gfid", "sample_accuracy"} <= row.keys() and "sample_zero_shot" not in row
    assert "drawn_shape" in evaluate.table(row) and "real images" in evaluate.table(row)
    picture = Image.open(of_texts / "figures" / "samples.png")
    assert picture.height == 8 * 66 - 2
    # the real images are held-out scene 0, 1, ... in the order of the set, each with its own caption
    fake, real = torch.load(of_texts / "collected0", weights_only=True)[-2:]
    source = data.BuiltinSource(2048, 64, "val")
    order = data.permutation(0, 0, 2048)[:11]
    assert torch.equal(real["said"], torch.from_numpy(source.attributes_said()[order]))
    assert torch.equal(real["labels"], torch.from_numpy(source.labels[order]))
    tower = VTP.from_pretrained(str(of_texts.parent / "tok"))
    text = tower.encode_text(word_tokenizer([source.captions[i] for i in order], 20))
    torch.testing.assert_close(real["text_features"], text, **FP32)     # in batches of another size
    assert all(torch.equal(fake[k], real[k]) for k in ("said", "labels", "caption_ids", "text_features"))
    assert "is_held_out" not in real and "drawn_held_out_pairs" not in row      # it has seen all pairs


def test_pairs_are_held_out_if_nothing_has_seen_them(evaluated, of_texts, tmp_path):
    for run in ("tok", "text"):
        shutil.copytree(evaluated / run, tmp_path / run, ignore=lambda *_: ["latents", "latents_text"])
    (tmp_path / "tok" / "run.json").write_text(json.dumps(dict(arguments=dict(hold_out_pairs=True))))
    record = json.load(open(of_texts / "run.json"))
    arguments = record["arguments"] | dict(tokenizer=str(tmp_path / "tok"))
    common = ["--tokenizer", str(tmp_path / "tok"), "--dit", str(tmp_path / "text")]
    for hold_out_pairs in (False, True):
        record["arguments"] = arguments | dict(hold_out_pairs=hold_out_pairs)
        (tmp_path / "text" / "run.json").write_text(json.dumps(record))
        args = evaluate.read_settings(common)
        assert args.hold_out_pairs == hold_out_pairs and args.text_from == str(tmp_path / "tok")
    val_source, source = data.BuiltinSource(2048, 8, "val"), data.BuiltinSource(48, 64)
    args.judge, args.n_val = str(evaluated / "tok" / "latents_text" / "judge.pt"), 60
    held_out = evaluate.Passing(data.EvaluationSet(val_source, 60))
    (_, texts, _), = held_out
    captions = evaluate.Captions(args, torch.device("cpu"), source, held_out)
    found, pairs = captions.of(range(60))[0]["is_held_out"].tolist(), captions.all["said"][:, :2].tolist()
    assert found == [tuple(pair) in data.HELD_OUT_PAIRS for pair in pairs] and sum(found) >= 2
    assert captions.texts == texts


def test_an_attribute_judge_learns_the_built_in_sets_attributes(tmp_path, monkeypatch):
    asked = []

    def train_judge(images, labels, n_classes, device, seed, n_steps):
        asked.append((images.shape, labels, n_classes))
        return quick_judge(images, labels, n_classes, device)
    monkeypatch.setattr(evaluate, "train_judge", train_judge)
    source, sizes = data.BuiltinSource(24, 32), tuple(map(len, data.ATTRIBUTES.values()))
    judge = evaluate.open_judge(str(tmp_path / "j.pt"), source, sizes, torch.device("cpu"))
    (shape, labels, n_classes), = asked
    assert shape == (24, 3, 64, 64) and n_classes == judge.sizes == (10, 12, 3, 9, 12)
    assert torch.equal(labels, torch.from_numpy(source.attributes()))


def test_two_ranks_measure_the_same_of_texts(of_texts, evaluated, tmp_path):
    run_script([evaluated / "in_fp32.py", tmp_path, "--tokenizer", evaluated / "tok", "--dit", of_texts,
                *SMALL, "--n_samples", "31", "--out", tmp_path], n_ranks=2)
    one = torch.load(of_texts / "collected0", weights_only=True)
    two = torch.load(tmp_path / "collected0", weights_only=True)
    # 11 samples there, 31 here, of 23 captions: the last ones begin anew
    for name in ("said", "labels", "caption_ids"):
        assert torch.equal(two[-2][name][:11], one[-2][name])
        assert torch.equal(two[-2][name][23:], two[-2][name][:8])
        assert torch.equal(two[-1][name], two[-2][name][:23])
    assert len(two[-2]["answers"]) == 31 and len(two[-1]["answers"]) == 23
    torch.testing.assert_close(two[-1]["shown_features"][:11], one[-1]["shown_features"], **FP32)


def test_samples_own_images_and_plots(evaluated):
    rng, tok = np.random.default_rng(0), evaluated / "tok"
    np.savez(evaluated / "set.npz", arr_0=rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
    run_script(["evaluate.py", "--tokenizer", tok, "--dit", evaluated / "dit", *SMALL,
                "--samples", evaluated / "set.npz", "--out", evaluated / "a"])
    row = results(evaluated / "a")
    assert row["gfid"] > 0 and row["precision"] <= 1 and "psnr" not in row
    before = (evaluated / "a" / "results.json").read_bytes()
    (evaluated / "mine").mkdir()
    for i, size in enumerate(((80, 120), (64, 64), (200, 90))):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(evaluated / "mine" / f"{i}.png")
    rows_before = len(evaluate.read_metrics(str(tok)))
    run_script(["evaluate.py", "--tokenizer", tok, "--images", evaluated / "mine", "--out", evaluated / "a"])
    assert results(evaluated / "a", "own_images.json")["n_images"] == 3
    assert Image.open(evaluated / "a" / "own_images.png").size == (2 * (3 * 66 - 2), 2 * (2 * 66 - 2))
    # figures of other images are no measure of the run
    assert (evaluated / "a" / "results.json").read_bytes() == before
    assert len(evaluate.read_metrics(str(tok))) == rows_before
    run_script(["evaluate.py", "--plot", tok, "--out", evaluated / "c"])
    assert Image.open(evaluated / "c" / "figures.png").width >= 600


def test_without_inception_fid_is_an_error_that_says_what_to_do(evaluated, tmp_path):
    with_inception = ["--fid_features", "inception", "--inception", tmp_path / "no.pth"]
    done = run_script(["evaluate.py", "--tokenizer", evaluated / "tok", *with_inception, *SMALL,
                       "--out", tmp_path / "o"], check=False)
    assert done.returncode == 2 and "no such place" in done.stderr and not (tmp_path / "o").exists()


def test_zero_shot_takes_squashed_images_where_asked(model, images):
    """As the authors' protocol does; all other figures stay with the centre crop."""
    captions, labels = [f"blob {i}" for i in range(12)], torch.arange(12) % 3
    held_out, gallery = [(images[:12], captions, labels)], [(images[12:], captions, labels)]
    subject = evaluate.Subject(model, word_tokenizer, class_names=["a", "b", "c"], n_layers=1)
    plain, test, _ = evaluate.measure(subject, held_out, gallery)
    subject.squashed = [(images[:12].flip(-1), captions, labels)]
    row, again, _ = evaluate.measure(subject, held_out, gallery)
    assert all(torch.equal(x, again[name]) for name, x in test.items())
    features = model.encode_image(normalize(images[:12].flip(-1) / 255))
    expected = evaluate.zero_shot(model, features, labels, subject.class_names, subject.templates,
                                  word_tokenizer)
    changed = {name for name in row if row[name] != plain[name]}
    assert all(row[name] == expected[name] for name in expected)
    assert changed <= {"zero_shot_top1", "zero_shot_interval"}


def test_a_tokenizers_path_may_end_with_a_slash_or_be_relative(evaluated, tmp_path, monkeypatch, capsys):
    """runs/dit is found to be on it; on another tokenizer it is left out, and a line says so."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs")
    shutil.copytree(evaluated / "dit", "runs/dit")
    record = json.load(open("runs/dit/run.json"))
    for recorded in (str(evaluated / "tok"), os.path.relpath(evaluated / "tok")):
        record["arguments"]["tokenizer"] = recorded
        json.dump(record, open("runs/dit/run.json", "w"))
        for given in (evaluated / "tok", f"{evaluated}/tok/", os.path.relpath(evaluated / "tok")):
            assert evaluate.read_settings(["--tokenizer", str(given)]).dit == "runs/dit"
    shutil.copytree(evaluated / "tok", "other")
    assert evaluate.read_settings(["--tokenizer", "other"]).dit is None
    assert "runs/dit is left out" in capsys.readouterr().out


def test_a_broken_record_of_a_run_is_named(tmp_path):
    for content in ("{", "[]", '{"arguments": 3}', "", '{"arguments": {"tokenizer": 3}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="run.json"):
            evaluate.recorded_arguments(str(tmp_path))


def test_where_inception_cannot_be_fetched_the_error_names_the_alternatives(monkeypatch):
    def offline(weights):
        raise UserError("could not fetch it.")
    monkeypatch.setattr(evaluate, "InceptionFID", offline)
    args = SimpleNamespace(fid_features="inception", inception="auto")
    with pytest.raises(UserError, match="could not fetch it.*--fid_features judge.*--fid_features none"):
        evaluate.open_fid_network(args, None, 0, torch.device("cpu"))


def test_what_a_run_recorded_is_taken_and_what_is_given_wins(evaluated, tmp_path):
    tok, dit = str(evaluated / "tok"), str(evaluated / "dit")
    assert evaluate.recorded_arguments(None) == evaluate.recorded_arguments(tok) == {}
    assert evaluate.recorded_arguments(dit)["train_size"] == 48
    args = evaluate.read_settings(["--tokenizer", tok, "--dit", dit])
    assert (args.steps, args.precision, args.train_size) == (4, "fp32", 48)
    assert args.fid_features == "judge" and args.lpips == "none"      # for the built-in set
    assert args.out == os.path.join(tok, "evaluation")
    assert args.judge == os.path.join(tok, "latents", "judge.pt")
    args = evaluate.read_settings(["--tokenizer", tok, "--dit", dit, "--steps", "9", "--train_size", "50"])
    assert (args.steps, args.train_size, args.method) == (9, 50, evaluate.recorded_arguments(dit)["method"])
    args = evaluate.read_settings(["--tokenizer", tok, "--data", tok, "--val_data", tok])
    assert args.fid_features == "inception" and args.lpips == "auto" and args.label == "cls"


@pytest.mark.parametrize("wrong, message", [
    ([], "First: python train_tokenizer.py"),
    (["--tokenizer", "nowhere/at/all", "--images", "x"], "--images x: no such place"),
    (["--tokenizer", "a/b", "--data", "/nowhere/*.tar", "--val_data", "."], "/nowhere"),
    (["--tokenizer", "a/b", "--data", "."], "--data without --val_data"),
    (["--tokenizer", "a/b", "--dit", "nowhere"], "--dit nowhere: no checkpoint.pt there"),
    (["--tokenizer", "a/b", "--templates", "nowhere"], "--templates nowhere: no such place"),
    (["--samples", "nowhere"], "--samples nowhere: no such place"),
    (["--samples", ".", "--reference", ".", "--fid_features", "judge"], "give --data"),
    (["--samples", ".", "--fid_features", "none"], "needs --fid_features inception or judge"),
    (["--plot", "nowhere"], "metrics.jsonl"),
    (["--n_val", "0"], "must be positive")])
def test_a_wrong_argument_is_an_error_before_any_work(wrong, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate.read_settings(wrong)
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and message in error and not os.listdir(tmp_path)
