"""What the tests share: where fixtures lie, how near numbers of two CPUs can be, a model small enough for a
second of training, running a script on ranks."""
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtp import VTP, RopeEmbedding, VTPConfig

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FIXTURES = os.path.join(HERE, "fixtures")
# data too large for the repository; may be absent
SHARED = os.path.join(os.path.dirname(ROOT), "shared")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device: python -m pytest -m gpu")
    # all others are stated for a CPU, bit for bit or by ranks that would be as many GPUs
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # the models are tiny, and threads that wait for each other cost more than they help
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and -m gpu"))


# Two CPUs sum in different orders. A sum of n products then differs by sqrt(n) 2^-24 of its size, 2e-6 at
# n = 768. The errors of a model's 20 such layers add as their squares do, to 7e-6 of values of up to 4.
FP32 = dict(atol=3e-5, rtol=3e-5)


def assert_close_but_for_roundings(ours, expected, stored=False, name=""):
    """What two CPUs may make of one model whose RoPE rounds q and k to bfloat16, and nothing more.

    An error of 2e-6 in q or k turns a rounding, of 2^-8, with a chance of 2e-6 / 2^-8, thrice for each value:
    a share of 1.5e-3. If all turned, outputs would move by 2^-8 of their size, so they move by sqrt(1.5e-3)
    of that, 1.5e-4, on average. One output may move more: a q of 4 that turns by 1/64, against a k of 4, in a
    head 32 wide, moves a score by 1e-2. stored: one of the two was also rounded to bfloat16.
    """
    error, size = (ours - expected).detach().float().abs(), expected.detach().float().std()
    rounded = 2 ** -8 if stored else 0.0
    torch.testing.assert_close(ours.detach(), expected.detach(), atol=1e-2 * size.item(), rtol=rounded,
                               check_dtype=False, msg=lambda m: f"{name}: {m}")
    assert error.mean() <= (2e-4 + rounded / 2) * size, f"{name}: {error.mean() / size:.1e} on average"


@pytest.fixture
def rotation_in_fp32(monkeypatch):
    """RoPE's tables keep bfloat16's values, but q and k are rotated in fp32."""
    tables = RopeEmbedding.forward
    monkeypatch.setattr(RopeEmbedding, "forward",
                        lambda *args, **kwargs: tuple(t.float() for t in tables(*args, **kwargs)))


class NothingAsked(TorchDispatchMode):
    """AssertionError at an operation that reads a value on the host, or whose result's shape is a value. On a
    CPU tolist() and numpy() are no operations, and copies between devices do not show."""
    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
              "unique_consecutive", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.n_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        asks = name in self.ASKING or name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_"):
            asks = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not asks, f"{func} asks the device"
        self.n_operations += 1
        return func(*args, **kwargs)


def micro_config(**changes):
    """A model of the right structure that a test can afford."""
    fields = dict(
        image_size=64,
        vision_embed_dim=64, vision_depth=2, vision_num_heads=2,
        vision_feature_bottleneck=16, vision_use_qk_norm=True,
        decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2, decoder_use_qk_norm=True,
        text_embed_dim=32, text_depth=1, text_num_heads=2,
        text_context_length=20, text_vocab_size=8192)
    return VTPConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory):
    """A folder with a micro model in the released format, for --init."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("micro"))
    VTP(micro_config()).save_pretrained(folder)
    return folder


def run_script(arguments, n_ranks=1, timeout=300, check=True):
    """Run a script in processes of its own, under torchrun if n_ranks is more than 1."""
    launcher = []
    if n_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
