import os
import signal
import sys
from functools import partial
from pathlib import Path

# one thread: the problems are tiny, bits repeat, and a busy machine does not starve spinning
# threads
os.environ["OMP_NUM_THREADS"] = "1"
# the same kernels on every processor, as stored values are compared
os.environ["MKL_CBWR"] = "AVX2,STRICT"
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

import pytest
import torch
from omegaconf import OmegaConf

torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as in a shell's background job; processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "helpers"))
OmegaConf.register_new_resolver("project_root", lambda: str(HERE.parent), replace=True)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: files are dealt out in this order, and the last to end decides
    how long all take.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Quick tests go to the process that is free. Slow ones stay together by file: some share a
    Slurm or what takes a minute to build.
    """
    from xdist.scheduler import WorkStealingScheduling

    quick = config.option.markexpr == "not slow"
    return WorkStealingScheduling(config, log) if quick else None  # None: --dist decides


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """`entry_point.call_entry` in a folder of its own."""
    from entry_point import call_entry

    monkeypatch.chdir(tmp_path)
    return partial(call_entry, monkeypatch, capfd)
