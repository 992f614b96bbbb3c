"""Parsing of command-line options; an invalid one is a usage error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from scc_fast import config as names


def one_of(help: str, choices: Iterable[str]) -> Any:
    """Typer option for one of several names; the error suggests the nearest."""

    def parsed(text: str) -> str:
        try:
            return names.one_of("the name", text, tuple(choices))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(help=help, parser=parsed, metavar=f"[{'|'.join(choices)}]")


def classes(labels: str | None, model: str) -> list[str]:
    """Prompts of --labels: "a dog,a wolf", @FILE, or the bundled model's own."""
    if labels is None:
        if model != "tiny":
            raise typer.BadParameter('--labels is needed, such as --labels "a dog,a wolf"')
        from scc_fast import tiny

        return tiny.prompts()
    if labels.startswith("@"):
        path = Path(labels[1:])
        if not path.is_file():
            raise typer.BadParameter(f"--labels: no file {path}; it holds one label a line")
        parts = path.read_text().splitlines()
    else:
        parts = labels.split(",")
    found = [part.strip() for part in parts if part.strip()]
    if len(set(found)) < 2:
        raise typer.BadParameter(
            f"--labels must name at least two different classes, got {names.shown(labels)}"
        )
    return found


def config(method: str, kind: type[Any], epsilon: str | None) -> dict[str, Any]:
    """Config overrides from --epsilon, for a config of class `kind`."""
    if epsilon is None:
        return {}
    if "epsilon" not in (field.name for field in dataclasses.fields(kind)):
        raise typer.BadParameter(f"--epsilon has no meaning for --method {method}")
    from scc_fast.config import parse_epsilon

    try:
        return {"epsilon": parse_epsilon(epsilon)}
    except ValueError as error:
        raise typer.BadParameter(f"--epsilon: {error}") from None


def batches(text: str) -> tuple[int, ...]:
    """Sizes of "1,8,64"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--batch must be sizes such as 1,8,64; got {names.shown(text)}")
    return tuple(sorted({int(part) for part in parts}))


def device_is_there(device: str | None) -> None:
    """Reject "cuda" without a CUDA device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch {torch.__version__} finds no CUDA device")


def figure_format(figure: Path) -> None:
    """Reject a format that matplotlib cannot write."""
    if figure.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"--figure must end in .png, .pdf or .svg, got {figure}")


def engine_suits(engine: str, distributed: bool) -> None:
    """Reject unknown engines, and Ray's options with another engine."""
    if engine not in ("local", "ray"):
        raise typer.BadParameter(
            f"--engine must be local or ray, got {names.shown(engine)}"
            f"{names.nearest(engine, ('local', 'ray'))}"
        )
    if engine == "local" and distributed:
        raise typer.BadParameter(
            "--workers, --cores, --gpus and --ray-address need --engine ray, got --engine local"
        )
