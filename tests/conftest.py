"""What the tests share: where fixtures lie, a model small enough for a second of training, running a script
on ranks."""
import os
import subprocess
import sys

import pytest
import torch

from vtp import VTP, VTPConfig

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FIXTURES = os.path.join(HERE, "fixtures")
# data too large for the repository; may be absent
SHARED = os.path.join(os.path.dirname(ROOT), "shared")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    # the models are tiny, and threads that wait for each other cost more than they help
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def micro_config(**changes):
    """A model of the right structure that a test can afford."""
    fields = dict(
        image_size=64,
        vision_embed_dim=64, vision_depth=2, vision_num_heads=2,
        vision_feature_bottleneck=16, vision_use_qk_norm=True,
        decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2, decoder_use_qk_norm=True,
        text_embed_dim=32, text_depth=1, text_num_heads=2,
        text_context_length=64, text_vocab_size=259)
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout,
                          capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
