"""Fixtures and rules for the whole suite."""

from __future__ import annotations

import os
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from command_line import Run

# What a test is marked with that is not quick; CONTRIBUTING.md says what each means.
NOT_QUICK = ("compile", "interpreted", "ray", "gpu", "slow")
LEFT_OUT = pytest.StashKey[int]()

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It is chosen for
# good when triton is imported, which importing torch does not do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # convolutions would round to TF32 by default, and differ from run to run
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _mend_interpreter() -> None:
    """Triton 3.6 makes a number of an array of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # the scope puts back what was there before
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended


interpreted = "TRITON_INTERPRET" in os.environ and util.find_spec("triton")
if interpreted and version("triton").startswith("3.6."):
    _mend_interpreter()

# Fresh memory is NaN, so that an element that a kernel leaves unwritten is seen. This is the mode
# that fills it; what it asks of torch's own operators is nothing on a CPU.
torch.use_deterministic_algorithms(True, warn_only=True)

# The workers of `-n` share the cores; so do the processes that their tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A pytest that a test starts is no worker: pytest-benchmark would not time anything in it.
    del os.environ["PYTEST_XDIST_WORKER"], os.environ["PYTEST_XDIST_WORKER_COUNT"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist chooses for itself
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-n` hands out whole files, so that what a module's tests share is made once."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # by the number of tests; see below


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU is not there without one, and what has no other marker is quick.

    Files with slow tests come first, those with Ray before all: no process then waits at the end.
    """
    left_out = []
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)
    for item in items:
        if not any(item.get_closest_marker(name) for name in NOT_QUICK):
            item.add_marker(pytest.mark.quick)
    rank: dict[Path, int] = {}
    for item in items:
        own = 0 if item.get_closest_marker("ray") else 2 if item.get_closest_marker("quick") else 1
        rank[item.path] = min(own, rank.get(item.path, 2))
    items.sort(key=lambda item: rank[item.path])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist: a worker has ended
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        why = f"torch {torch.__version__} finds no CUDA device"
        terminalreporter.write_line(f"{count} cases that need a GPU were left out: {why}")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line, in a folder of the test's own."""
    from command_line import Run

    monkeypatch.chdir(tmp_path)  # where repaired pictures and figures go by default
    monkeypatch.setenv("COLUMNS", "160")
    return Run(capsys)
