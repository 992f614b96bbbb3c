"""Transfer: images made against another encoder, by who has no access to the one under test."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from scc_fast.attacks.base import prepared
from scc_fast.attacks.pgd import PGD
from scc_fast.defenses.base import Defense
from scc_fast.defenses.served import Undefended
from scc_fast.models import VisionLanguage, load_model


@dataclass(frozen=True)
class Transfer(PGD):
    """PGD on the cross-entropy of another model, with the target's prompts as its classes.

    The pixels are the target's; the other encoder sees them through its own resize, which the
    gradient goes back through.

    Args:
        steps, alpha: as for PGD.
        source: the other model: an open_clip name with its weights, "ViT-B-16@openai"; "tiny";
            "hf-hub:org/repo"; or a folder. Loaded once and kept.
    """

    source: str = ""

    name: ClassVar[str] = "transfer"
    conclusive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, str) or not self.source.strip():
            raise ValueError(
                'transfer: source must name the other model, such as "ViT-B-16@openai", got '
                f"{self.source!r}"
            )
        split(self.source)

    @property
    def title(self) -> str:
        return f"Transfer PGD-{self.steps} ({self.source})"

    def suits(self, target: Defense) -> bool:
        return target.classes is not None

    def run(self, target: Defense, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        if target.classes is None:
            raise ValueError(
                "transfer: the other model needs the prompts; make the defense with classes=, not "
                "with text_features="
            )
        if len(x) == 0:
            return x.clone()
        other = Undefended(loaded(self.source, x.device), target.classes)
        return super().run(other, x, labels, seeds)


def split(source: str) -> tuple[str, str | None]:
    """Name and weights of "NAME@WEIGHTS"; what brings its weights along is a name alone.

    Raises:
        ValueError: no weights are named. load_model() would take random ones, which fool nobody.
    """
    if Path(source).expanduser().is_dir():
        return source, None
    name, at, pretrained = source.partition("@")
    if at and not (name and pretrained):
        raise ValueError(f"transfer: source must be NAME@WEIGHTS around its @, got {source!r}")
    if not at and name != "tiny" and not name.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(
            f"transfer: source {source!r} is no folder and names no weights; an open_clip name "
            f'needs them: "{source}@openai", or whichever tag or file it is'
        )
    return name, pretrained if at else None


@functools.lru_cache(maxsize=2)
def loaded(source: str, device: torch.device) -> VisionLanguage:
    """The model of a source spec."""
    name, pretrained = split(source)
    return load_model(name, pretrained, device=device)
