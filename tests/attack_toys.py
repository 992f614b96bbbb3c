"""Defenses small enough to attack by hand: no encoder, a linear head, and what a test adds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast import Defender, ops, tiny
from scc_fast.api import make_defense
from scc_fast.config import NoneConfig
from scc_fast.defenses import Defense, State, Traits
from scc_fast.defenses.scc import no_drift
from scc_fast.engine.batch import Batch
from scc_fast.engine.session import Session
from scc_fast.reference import heads, philox
from toys import FIVE, model_of

SIDE = 2  # pictures are (3, 2, 2), 12 numbers


def weights(classes: int = 3, seed: int = 0) -> Tensor:
    """(K, 12): what a class's logit is of the pixels."""
    return torch.randn(classes, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int = 1) -> Tensor:
    """(n, 3, 2, 2), away from the box."""
    drawn = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return 0.3 + 0.4 * drawn


@dataclass(frozen=True, eq=False)
class Linear(Session):
    """A session whose logits are linear in the features."""

    w: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        assert self.w is not None
        return features @ self.w.T


class Noisy(Defense):
    """Adds noise and looks; what it was asked is noted."""

    name, Config = "toy", NoneConfig
    repairs: Literal["none"] = "none"

    def __init__(self, noise: float, views: Callable[[Tensor], Tensor]) -> None:
        super().__init__(NoneConfig())
        self.noise, self.views = noise, views
        self.keys: list[int] = []
        self.points: list[Tensor] = []

    def traits(self, session: Session) -> Traits:
        return Traits(1, 0, True, False, False, False, "a toy")

    def repaired(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The picture that it answers from, and the noise in it."""
        x, seeds = batch.x, batch.seeds
        noise = self.noise * (2 * philox.uniform_like(x, seeds, philox.DELTA) - 1)
        return x + noise, noise

    def first_pass(self, session: Session, batch: Batch) -> State:
        self.keys += batch.seeds.tolist()
        self.points.append(batch.x.detach().clone())
        picture, noise = self.repaired(batch)
        logits = session.mean_logits(session.features(picture[None]))
        return State(no_drift(batch), logits=logits, delta=noise)

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        return self.views(batch.x)


class Fenced(Noisy):
    """Where the gate is open it answers from a picture that no attacker can change."""

    has_gate = True

    def first_pass(self, session: Session, batch: Batch) -> State:
        plain = super().first_pass(session, batch)
        margin = Gated.tau - batch.x.mean(dim=(1, 2, 3))
        safe = 10 * session.w[0]  # type: ignore[attr-defined]  # class 0, beyond doubt
        flagged = (margin > 0)[:, None]
        assert plain.logits is not None
        logits = torch.where(flagged, session.logits(safe), plain.logits)
        return replace(plain, margin=margin, logits=logits)


class Mirrored(Noisy):
    """Answers from the mirrored negative of the picture."""

    def repaired(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return 1 - batch.x.flip(-1), torch.zeros_like(batch.x)


class Labelled(Noisy):
    """Its pseudo-label is read off the mirrored negative of the picture."""

    @property
    def guess(self) -> Defense:
        other = Mirrored(0.0, self.views)
        other.keys = self.keys
        return other


class FencedAndLabelled(Fenced, Labelled):
    """A gate and a pseudo-label."""


class Toy(Defender):
    """Features are the pixels, logits are linear in them.

    Args:
        w: (K, 12).
        noise: the repair adds noise of this size.
        views: the views of x (B, 3, 2, 2), (L, B, 3, 2, 2).
    """

    kind: type[Noisy] = Noisy

    def __init__(
        self,
        w: Tensor,
        noise: float = 0.0,
        views: Callable[[Tensor], Tensor] = lambda x: x[None],
    ) -> None:
        self.w, self.defense = w, self.kind(noise, views)
        device, size = torch.device("cpu"), (SIDE, SIDE)
        model: Any = SimpleNamespace(device=device, image_size=size, mean=(0, 0, 0))
        classes = heads.Classes(torch.eye(len(w)), 1.0)
        eager: Any = SimpleNamespace(name="eager", products=torch.float32)
        self.session = Linear(
            *(model, model, eager, None, classes, ops.ClassTable.of(classes), None, "cpp", "eager"),
            *("fp32", size, (0.0,) * 3, (1.0,) * 3, True),
            encoded=lambda pixels: pixels.flatten(1),
            w=w,
        )
        self.model, self.method, self.classes, self.max_batch = model, "toy", None, 64

    @property
    def keys(self) -> list[int]:
        """The seeds of all calls."""
        return self.defense.keys

    @property
    def points(self) -> list[Tensor]:
        """Where it was called."""
        return self.defense.points


class Gated(Toy):
    """The gate opens where the mean pixel is below `tau`."""

    tau = 0.5
    kind = Fenced


class Guessing(Toy):
    kind = Labelled


def target_of(kind: str = "tiny", classes: Any = None) -> Defender:
    prompts = classes or (tiny.prompts() if kind == "tiny" else FIVE)
    return make_defense("none", model_of(kind), prompts)


@functools.cache
def drawn(n: int) -> tuple[Tensor, Tensor]:
    return tiny.generate("test", range(n))


def by_hand(model: Any, text: Tensor, pixels: Tensor) -> Tensor:
    """Logits of open_clip's own module under autograd: nothing of the engine's."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    features = F.normalize(model.module.encode_image((pixels - mean) / std), dim=-1)
    return model.logit_scale * features @ text.T + model.logit_bias


def moved(a: Tensor, b: Tensor) -> float:
    """Share of pixels that differ: the sign of a gradient near zero may turn."""
    return float(((a - b).abs() > 1e-5).float().mean())
