"""Options of the benchmarks, and the rows they leave.

pytest benchmarks --benchmark-only                  # the table on the terminal
pytest benchmarks --benchmark-only --rows=auto      # and results/<device>/ops-<date>.{json,md}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rows
from session import Session


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scc_fast benchmarks")
    group.addoption(
        "--rows",
        metavar="PATH",
        help="write the rows to this JSON, and a table beside it, after every case; 'auto' is "
        "benchmarks/results/<device>/ops-<date>.json",
    )
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there"
    )
    group.addoption("--quick", action="store_true", help="small sizes, few rounds: a smoke test")
    group.addoption(
        "--require-reach", action="store_true", help="fail where a row misses what is asked of it"
    )
    group.addoption(
        "--budget", type=float, metavar="S", help="seconds of rounds per case (CPU 2, CUDA 0.5)"
    )
    group.addoption("--threads", type=int, default=2, help="of the CPU (default 2)")
    group.addoption(
        "--fresh-memory",
        action="store_true",
        help="CPU: leave the C library's allocator as it is (timing.keep_memory says why not)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device")


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """The one Session of this run; no autograd but where a case asks for it."""
    made = Session(pytestconfig)
    pytestconfig.stash[_SESSION] = made
    with torch.no_grad():
        yield made


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(_SESSION, None)
    if found is None or not found.rows:
        return
    terminalreporter.section(f"rows on {found.environment['device']}")
    terminalreporter.write_line(rows.markdown(found.rows))
    terminalreporter.write_line("")
    for row in found.rows:
        if row["reached"] is False:
            missed = ", ".join(rows.misses(row))
            where = f"{row['name']} ({row['shape']}, {row['precision']}, {row['backend']})"
            terminalreporter.write_line(f"MISSED {where}: {missed}")
    terminalreporter.write_line(rows.summary(found.rows))
    if found.path:
        terminalreporter.write_line(
            f"written: {found.path} and {found.path.with_suffix('.md').name}"
        )
