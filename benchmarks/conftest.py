"""Options of the benchmarks, and the rows they leave.

pytest benchmarks --benchmark-only                  # the table on the terminal
pytest benchmarks --benchmark-only --rows=auto      # and benchmarks/results/<device>/*.{json,md}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scc_fast.bench import rows, tables
from session import Session


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scc_fast benchmarks")
    group.addoption(
        "--rows",
        metavar="PATH",
        help="write the rows to this JSON, and tables beside it, after every case; 'auto' is "
        "benchmarks/results/cpu/<suite>-<date>.json, on a GPU results/<device>/<date>.json",
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
    group.addoption(
        "--max-seconds",
        type=float,
        metavar="S",
        help="of the whole run: as these pass, cases get fewer rounds; none is left out but what "
        "would be compiled by torch.compile",
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
def session(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Session]:
    """The one Session of this run; no autograd but where a case asks for it."""
    made = Session(pytestconfig)
    made.cases_left = request.session.testscollected
    pytestconfig.stash[_SESSION] = made
    with torch.no_grad():
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # torch.compile takes a minute: what else there is comes first.
    items.sort(key=lambda item: "bench_engines" in item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Count the cases that are left, which share what is left of --max-seconds."""
    result = yield
    found = item.config.stash.get(_SESSION, None)
    if found is not None:
        found.cases_left -= 1
    return result


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(_SESSION, None)
    if found is None or not found.rows:
        return
    terminalreporter.section(f"rows on {found.machine.environment['device']}")
    terminalreporter.write_line(tables.markdown(found.rows))
    terminalreporter.write_line("")
    for row in found.rows:
        if row["reached"] is False:
            missed = ", ".join(rows.misses(row))
            where = f"{row['name']} ({row['shape']}, {row['precision']}, {row['backend']})"
            terminalreporter.write_line(f"MISSED {where}: {missed}")
    for line in (rows.summary(found.rows), *rows.warnings(found.rows)):
        terminalreporter.write_line(line)
    for path in found.paths():
        terminalreporter.write_line(f"written: {path} and {path.with_suffix('.md').name}")
