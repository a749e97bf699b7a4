"""Each loss equals its definition, written out slowly; the mean over two ranks equals one rank on
the same global batch."""
import math
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import losses
from conftest import free_port
from losses import (LPIPS, clip_loss, cross_entropy, dino_loss, ibot_loss, koleo_loss,
                    reconstruction_loss, sinkhorn_knopp)

# fp32 sums in another order. Here logits reach 40, in steps of 4e-6, so that losses differ by as much, and by
# 1e-7 of their size (seen: 1e-7).
CLOSE = dict(atol=5e-6, rtol=2e-6)


def test_clip_loss_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    total = 0.0
    for i in range(5):
        for a, others in ((x[i], y), (y[i], x)):
            logits = [7.0 * float(a @ o) for o in others]
            total += -logits[i] + math.log(sum(math.exp(l) for l in logits))
    loss = clip_loss(x, y, torch.tensor(7.0))
    torch.testing.assert_close(loss, torch.tensor(total / 10), **CLOSE)


def test_sinkhorn_knopp_is_the_alternating_normalisation():
    torch.manual_seed(0)
    logits = torch.randn(6, 10)
    Q = (logits.double() / 0.07).exp()
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(dim=0, keepdim=True) / 10
        Q = Q / Q.sum(dim=1, keepdim=True) / 6
    # relative: the smallest probabilities are e^-60, and fp32 has 1e-7 of the exponent's 60
    probs = sinkhorn_knopp(logits, torch.tensor(0.07))
    torch.testing.assert_close(probs.double(), Q * 6, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(sinkhorn_knopp(20 * torch.randn(6, 10), 0.5)).all()
    # a constant changes nothing but the exponents' rounding: fp32 has steps of 1e-3 at 1000 / 0.07
    shifted = sinkhorn_knopp(logits + 1000, 0.07)
    torch.testing.assert_close(shifted, sinkhorn_knopp(logits, 0.07), atol=2e-3, rtol=0.02)


def slow_cross_entropy(student, teacher, temperature):
    logits = [float(s) / temperature for s in student]
    log_z = math.log(sum(math.exp(l) for l in logits))
    return -sum(float(p) * (l - log_z) for p, l in zip(teacher, logits))


def test_dino_loss_is_the_mean_over_all_pairs_of_views_of_two_crops():
    torch.manual_seed(0)
    n_local, b = 3, 4
    student, teacher = torch.randn(2 + n_local, b, 6), torch.randn(2, b, 6).softmax(dim=-1)
    of_global = cross_entropy(student[:2], teacher.flip(0)).flatten()
    of_local = cross_entropy(student[2:], teacher.mean(dim=0)).flatten()
    pairs = [slow_cross_entropy(student[s, i], teacher[t, i], 0.1)
             for s in range(2 + n_local) for t in range(2) if s != t for i in range(b)]
    assert len(pairs) == b * (2 + 2 * n_local)
    loss = dino_loss(of_global, of_local)
    torch.testing.assert_close(loss, torch.tensor(sum(pairs) / len(pairs)), **CLOSE)


def test_ibot_loss_averages_over_a_crops_patches_then_over_all_crops():
    torch.manual_seed(0)
    masks = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6).softmax(dim=-1)
    rows = [slow_cross_entropy(s, t, 0.1) for s, t in zip(student, teacher)]
    expected = (sum(rows[:3]) / 3 + 0 + rows[3]) / 3
    loss = ibot_loss(cross_entropy(student, teacher), masks)
    torch.testing.assert_close(loss, torch.tensor(expected), **CLOSE)


def test_koleo_loss_is_the_mean_log_distance_to_the_nearest_other():
    torch.manual_seed(0)
    x = torch.randn(6, 5).requires_grad_()
    u = F.normalize(x, dim=1)
    nearest = [min((u[i] - u[j]).norm() for j in range(6) if j != i) for i in range(6)]
    expected = -sum((d + 1e-8).log() for d in nearest) / 6
    torch.testing.assert_close(koleo_loss(x), expected, **CLOSE)
    ours, theirs = (torch.autograd.grad(loss, x)[0] for loss in (koleo_loss(x), expected))
    torch.testing.assert_close(ours, theirs, **CLOSE)      # the neighbour is pushed away as well
    # identical samples: large, but finite, and no NaN gradient
    twins = torch.ones(2, 3, requires_grad=True)
    koleo_loss(twins).backward()
    assert torch.isfinite(twins.grad).all()


def test_reconstruction_loss_is_l1_and_adds_lpips():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    lpips = LPIPS(None)
    l1 = (x - y).abs()
    torch.testing.assert_close(reconstruction_loss(x, y), l1.sum() / x.numel(), **CLOSE)
    both = l1.mean() + lpips(x, y).mean()
    torch.testing.assert_close(reconstruction_loss(x, y, lpips), both, **CLOSE)


@torch.no_grad()
def test_lpips_is_its_definition_on_given_weights():
    torch.manual_seed(0)
    lpips = LPIPS(None)
    for p in lpips.features.parameters():       # PyTorch's own values would let the signal die on its way
        torch.nn.init.kaiming_normal_(p) if p.ndim == 4 else torch.nn.init.normal_(p, std=0.1)
    state = lpips.state_dict()
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    # torchvision's numbers of VGG16's convolutions
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

    def maps(z):
        z = (z - shift) / scale
        out = []
        for stage in stages:
            z = F.max_pool2d(z, 2) if out else z
            for i in stage:
                weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
                z = F.relu(F.conv2d(z, weight, bias, padding=1))
            out.append(z)
        return out
    expected = 0.0
    for k, (a, b) in enumerate(zip(maps(x), maps(y))):
        a, b = (m / ((m ** 2).sum(dim=1, keepdim=True).sqrt() + 1e-10) for m in (a, b))
        distance = F.conv2d((a - b) ** 2, state[f"lin{k}.model.1.weight"])          # (2, 1, h, w)
        expected = expected + distance.mean(dim=(2, 3))[:, 0]
    torch.testing.assert_close(lpips(x, y), expected, **CLOSE)
    assert torch.equal(lpips(x, x), torch.zeros(2)) and (lpips(x, y) > 0).all()


def test_lpips_loads_the_two_published_files_by_their_names(tmp_path):
    torch.manual_seed(0)
    source = LPIPS(None)
    state = source.state_dict()
    vgg = {k: v for k, v in state.items() if k.startswith("features")}
    vgg["classifier.0.weight"] = torch.zeros(1)
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    with pytest.raises(FileNotFoundError, match="vgg.pth"):
        LPIPS(str(tmp_path))
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert torch.equal(LPIPS(str(tmp_path))(x, y), source(x, y))
    assert [n for n in state if n.startswith("lin")] == [f"lin{i}.model.1.weight" for i in range(5)]
    shapes = [tuple(state[f"features.{i}.weight"].shape[:2]) for i in (0, 2, 5, 28)]
    assert shapes == [(64, 3), (64, 64), (128, 64), (512, 512)]


def test_lpips_gradient_reaches_the_first_argument_only():
    x, y = (torch.rand(1, 3, 32, 32).requires_grad_() for _ in range(2))
    lpips = LPIPS(None)
    lpips(x, y).sum().backward()
    assert x.grad.abs().sum() > 0 and y.grad is None
    assert all(p.grad is None for p in lpips.parameters())


# --- two ranks ---

LOSSES = ("clip", "dino", "ibot", "koleo", "rec")


def every_loss(weight, inputs, share):
    """Losses of a share of the batch, from inputs that pass through one weight -> {name: loss}."""
    x = {k: v[share] for k, v in inputs.items()}
    masks = x["masks"]
    student, rows = (x["student"] @ weight), (x["rows"] @ weight)[masks]
    targets = sinkhorn_knopp(x["teacher"], 0.07)
    row_targets = sinkhorn_knopp(x["row_teacher"][masks], 0.07)
    normed = [F.normalize(x[k] @ weight, dim=-1) for k in ("images", "texts")]
    reconstruction = (x["images"] @ weight).view(-1, 1, 2, 3)
    original = x["texts"][:, :6].reshape(-1, 1, 2, 3)
    return dict(clip=clip_loss(*normed, weight.sum().abs() + 3),
                dino=dino_loss(cross_entropy(student, targets),
                               cross_entropy((x["rows"] @ weight).transpose(0, 1), targets).flatten()),
                ibot=ibot_loss(cross_entropy(rows, row_targets), masks),
                koleo=koleo_loss(student),
                rec=reconstruction_loss(reconstruction, original))


def batch():
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)
    inputs = dict(student=r(6, 8), rows=r(6, 3, 8), teacher=r(6, 6), row_teacher=r(6, 3, 6),
                  images=r(6, 8), texts=r(6, 8))
    # 3 rows on each rank
    masks = [[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    inputs["masks"] = torch.tensor(masks, dtype=torch.bool)
    return inputs, r(8, 6)


def loss_and_gradient(name, share):
    """A loss of a share of the batch, and its gradient with respect to the shared weight."""
    inputs, weight = batch()
    weight.requires_grad_()
    loss = every_loss(weight, inputs, share)[name]
    loss.backward()
    return loss.detach(), weight.grad


def on_rank(rank, world, address, results):
    warnings.simplefilter("error")      # a collective that PyTorch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(address),
                      RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    values, grads = {}, {}
    for name in LOSSES:
        values[name], grad = loss_and_gradient(name, slice(rank, None, world))
        dist.all_reduce(grad)
        grads[name] = grad / world
    results[rank] = (values, grads)
    if rank == 1:
        time.sleep(0.5)
        results["last rank is done"] = True
    losses.leave_distributed()
    assert results["last rank is done"] and not dist.is_initialized()       # each waited for it
    assert (losses.rank(), losses.world_size()) == (0, 1)


def test_two_ranks_have_the_loss_and_the_gradient_of_one():
    """A rank's value is that of its own share; the mean of them is that of the global batch."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, args=(2, free_port(), results), nprocs=2)
        (values, grads), (other_values, other_grads) = results[0], results[1]
    for name in LOSSES:
        loss, grad = loss_and_gradient(name, slice(None))
        mean = (values[name] + other_values[name]) / 2
        torch.testing.assert_close(mean, loss, **CLOSE, msg=lambda m: f"{name}: {m}")
        assert abs(values[name] - other_values[name]) > 1e-3, name
        for average in (grads[name], other_grads[name]):
            torch.testing.assert_close(average, grad, **CLOSE,
                                       msg=lambda m: f"{name} gradient: {m}")


def test_a_rank_may_wait_for_hours(monkeypatch):
    given = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: given.update(kwargs))
    losses.init_distributed()
    assert given["timeout"].total_seconds() >= 3600       # NCCL's own: 600


def test_outside_a_process_group_a_script_may_leave_it():
    losses.leave_distributed()
    assert (losses.rank(), losses.world_size()) == (0, 1)
