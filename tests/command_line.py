"""Calls of the command line within the process of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scc_fast import cli


class Run:
    """One call of main(): its exit code and both streams."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(caught.value.code or 0), captured.out, captured.err


def strict(path: Path) -> Any:
    """JSON as the standard has it: no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
