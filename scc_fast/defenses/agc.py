"""Adaptive geodesic correction: along the arc from a picture's feature to that of its views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import IDENTITY, MethodConfig, whole, within
from scc_fast.defenses.augment import perspectives
from scc_fast.engine.batch import Batch, warped
from scc_fast.engine.defense import Defense, State, Traits
from scc_fast.engine.session import Session

CORNERS = 150  # Philox purpose
_BLACK = {"mode": "bicubic", "fill": (0.0, 0.0, 0.0)}


@dataclass(frozen=True)
class AGCConfig(MethodConfig):
    """AGC (arXiv 2605.15584); the defaults are the published ones.

    Args:
        view_count: random perspectives beside the picture.
        distortion: of these, in [0, 1].
        least, most: β at scores of 0 and 1, in whole arcs from the picture to its views.
    """

    view_count: int = 32
    distortion: float = 0.5
    least: float = 0.45
    most: float = 2.25

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("view_count", self.view_count, 2, 1024)
        within("distortion", self.distortion, 0.0, 1.0)
        within("least", self.least, 0.0, 10.0)
        within("most", self.most, self.least, 10.0)


class AGC(Defense):
    """Adaptive geodesic correction.

    Unit features x of the picture and a_i of 32 random perspectives of it, and a their unit mean.
    With o the mean of 1 − ⟨a_i, x⟩, r that of ⟨a_i, a_j⟩ over pairs and t = (r + 1)/2, each in
    [0, 1], the score is o^0.9 · t and β = 0.45 + 1.8 · score. The point at β times the angle from
    x on the great circle through x and a is classified; above 1 that is beyond a.

    `delta` is zero, `drift` the mean of ⟨a_i, x⟩; there is no gate. Perspectives are on float
    pixels, and fade into black over a pixel where Pillow, which the released code calls, cuts.
    """

    name, Config = "agc", AGCConfig
    config: AGCConfig
    repairs: Literal["none"] = "none"
    uncaptured = "not tried as a graph"

    def width(self, session: Session, size: tuple[int, int]) -> int:
        return 1 + self.config.view_count

    def traits(self, session: Session) -> Traits:
        return Traits(
            forward=1 + self.config.view_count,
            backward=0,
            random=True,
            dynamic=False,
            text=False,
            gradients=False,
            source="arXiv 2605.15584",
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        features = session.warped(batch.x, self._maps(session, batch), **_BLACK)
        rule = self.config.least, self.config.most, math.inf
        views = session.views(batch, (IDENTITY,))
        logits, cosine, _ = views.extrapolated(features, rule, math.inf, geodesic=True)
        return State(cosine.detach(), logits=logits)

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """(33, B, 3, H, W): x, then its perspectives."""
        return warped(batch.x, self._maps(session, batch), session.backend, **_BLACK)

    def _maps(self, session: Session, batch: Batch) -> Tensor:
        """(33, B, 3, 3), the first of which leaves the picture as it is."""
        count = self.config.view_count
        draws = ops.philox_uniform(batch.seeds, CORNERS, 0, 8 * count, backend=session.backend)
        maps = perspectives(draws.unflatten(1, (count, 8)), batch.size, self.config.distortion)
        return torch.cat([torch.eye(3).to(maps).expand(1, len(batch), 3, 3), maps.transpose(0, 1)])
