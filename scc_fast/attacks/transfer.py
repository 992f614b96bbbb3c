"""Transfer attack: images made against another encoder."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from scc_fast.api import Defender
from scc_fast.attacks.base import prepared
from scc_fast.attacks.pgd import PGD
from scc_fast.config import shown
from scc_fast.models import VisionLanguage, load_spec, parse_model


@dataclass(frozen=True)
class Transfer(PGD):
    """PGD on the cross-entropy of another model, with the target's prompts as its classes.

    The other encoder gets the target's pixels through its own differentiable resize.

    Args:
        steps, alpha: as for PGD.
        source: spec of the other model, with weights: "ViT-B-16@openai", "hf-hub:org/repo",
            "tiny", a folder (see scc_fast.models.load_spec). Two models stay loaded.
    """

    source: str = ""

    name: ClassVar[str] = "transfer"
    conclusive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            name, pretrained, _ = parse_model(self.source)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'transfer: source must name the other model, such as "ViT-B-16@openai"; {error}'
            ) from None
        brings = name == "tiny" or name.startswith(("hf-hub:", "local-dir:"))
        if pretrained is None and not brings and not Path(name).expanduser().is_dir():
            # load_model() would use random weights.
            raise ValueError(
                f"transfer: source {shown(self.source)} is not a folder and names no weights; an "
                f'open_clip name needs them: "{name}@openai", or whichever tag or file it is'
            )

    @property
    def title(self) -> str:
        return f"Transfer PGD-{self.steps} ({self.source})"

    def suits(self, target: Defender) -> bool:
        return target.classes is not None

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        if target.classes is None:
            raise ValueError(
                "transfer: the other model needs the prompts; make the defense with classes=, not "
                "with text_features="
            )
        if len(x) == 0:
            return x.clone()
        other = Defender(loaded(self.source, x.device), target.classes, method="none")
        return super().run(other, x, labels, seeds)


@functools.lru_cache(maxsize=2)
def loaded(source: str, device: torch.device) -> VisionLanguage:
    """Model of a source, cached."""
    return load_spec(source, device)
