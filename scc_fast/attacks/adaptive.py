"""Adaptive attacks, which know the defense.

Each step runs the defense, or a part of it, with the attacker's own random draws. A defense's δ
depends on signs of gradients, which have no useful derivative: the gradient at the repaired
pictures is taken as that at the picture (BPDA with the identity, Athalye et al., arXiv
1802.00420), averaged over draws (EOT).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.attacks.base import Attack, Loss, prepared, slope
from scc_fast.attacks.margin import Distinct, margin
from scc_fast.attacks.pgd import cross_entropy as single
from scc_fast.config import shown, whole, within
from scc_fast.engine.batch import Batch, uniform_start
from scc_fast.engine.defense import Defense
from scc_fast.engine.drive import live
from scc_fast.reference import philox, step

# Philox purposes beside philox.EOT: views, and the pseudo-label's point.
VIEW_DRAWS, GUESS_DRAWS = 180, 181

# (x, step) -> gradient to ascend, and lead: > 0 if x fools the defense; None: unknown.
Survey = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]

_FADING = ((0.3, 1 / 2), (0.6, 1 / 4), (0.85, 1 / 8), (1.0, 1 / 16))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) → (B,) float64; in float32 the gradient vanishes at a lead of 17."""
    return single(logits.double(), labels)


def step_sizes(steps: int, alpha: float | None, epsilon: float) -> list[float]:
    """Step sizes: constant alpha, or from epsilon/2 down to epsilon/16 for None.

    At 4/255 they are 2, 1, 1/2 and 1/4 of 1/255, for 30, 30, 25 and 15 percent of the steps.
    """
    if alpha is not None:
        return [alpha] * steps
    return [
        epsilon * next(part for until, part in _FADING if (at + 0.5) / steps <= until)
        for at in range(steps)
    ]


def climb(
    survey: Survey,
    x: Tensor,
    delta: Tensor,
    *,
    epsilon: float,
    sizes: Sequence[float],
    momentum: float = 0.0,
) -> Tensor:
    """Signed ascent from x + `delta` in the ball around x and in the box.

    The direction is m ← momentum·m + g/mean|g|, scaled per image (MI-FGSM, Dong et al., arXiv
    1710.06081), which averages over the draws of earlier steps.

    Args:
        survey: gradient and lead at a point.
        x: (B, 3, H, W) float32 in [0, 1].
        delta: like x, within the ball and the box.
        epsilon: budget, pixel units.
        sizes: of the steps, pixel units.
        momentum: in [0, 1].

    Returns:
        (B, 3, H, W): per image the surveyed point with the largest lead if > 0, else the last
        point.
    """
    found, best = delta, x.new_zeros(len(x))
    along = torch.zeros_like(x)
    for at, size in enumerate(sizes):
        # Rounding may leave the box, where the gradient is 0.
        gradient, lead = survey((x + delta).clamp(0, 1), at)
        if lead is not None:
            better = lead > best
            best = torch.where(better, lead, best)
            found = torch.where(_each(better), delta, found)
        along = momentum * along + balanced(gradient)
        delta = step.pgd_step(delta, along, x, size, epsilon)
    return (x + torch.where(_each(best > 0), found, delta)).clamp(0, 1)


def balanced(gradient: Tensor) -> Tensor:
    """Gradient (B, 3, H, W) divided by its mean magnitude per image.

    Zero stays zero; non-finite values count as zero.
    """
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient / torch.where(mean > 0, mean, 1.0)


def _each(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]


def leads(target: Defender, labels: Tensor) -> Loss:
    """Loss: lead of the best wrong class over the true one, (B, K) → (B,), > 0 if wrong.

    A class with the true one's embedding is not wrong.
    """
    classes = Distinct.of(target, labels)
    return lambda logits: -margin(classes.logits(logits), classes.labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the views: (L, B, K), (B,) → (B,)."""
    every = labels.expand(len(logits), -1).flatten()
    losses = cross_entropy(logits.flatten(0, 1), every)
    return losses.unflatten(0, logits.shape[:2]).mean(dim=0)


@dataclass(frozen=True)
class Aware(Attack):
    """Base of adaptive attacks: steps, step sizes, start.

    Args:
        steps: at least 1.
        alpha: step, pixel units; None: from epsilon/2 down to epsilon/16 (step_sizes).
        momentum: of the direction, in [0, 1]; 0: the last gradient alone.
    """

    steps: int = 20
    alpha: float | None = None
    momentum: float = 0.75

    aware: ClassVar[bool] = True
    label: ClassVar[str]  # in tables

    def __post_init__(self) -> None:
        super().__post_init__()
        within("momentum", self.momentum, 0, 1)

    @property
    def title(self) -> str:
        return f"{self.label}-{self.steps}"

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        if len(x) == 0:
            return x.clone()
        # In pieces: a wide defense's pictures may not fit at once.
        some = [len(piece) for piece, _ in target.pieces(x, seeds)]
        if len(some) > 1:
            parts = zip(x.split(some), labels.split(some), seeds.split(some), strict=True)
            return torch.cat([self.run(target, *part) for part in parts])
        with plain(x.device):

            def survey(point: Tensor, at: int) -> tuple[Tensor, Tensor | None]:
                return self.survey(target, point, labels, seeds, at)

            return climb(
                survey,
                x,
                self.start(target, x, labels, seeds),
                epsilon=self.epsilon,
                sizes=step_sizes(self.steps, self.alpha, self.epsilon),
                momentum=self.momentum,
            )

    def start(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """Initial δ (B, 3, H, W)."""
        return uniform_start(x, seeds, self.epsilon, philox.ATTACK_START)

    @abstractmethod
    def survey(
        self, target: Defender, point: Tensor, labels: Tensor, seeds: Tensor, at: int
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient to ascend, and lead, at a point in step `at` (see climb)."""


@dataclass(frozen=True)
class ViewAware(Aware):
    """PGD on the defense's views without a repair, with new noise in each step.

    Args:
        of: "each": mean of the views' cross-entropies; "mean": cross-entropy of the views' mean
            logits, which is stronger against a defense that averages logits.
    """

    of: Literal["each", "mean"] = "mean"

    name: ClassVar[str] = "view-aware"
    label: ClassVar[str] = "View-aware"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.of, str) or self.of not in ("each", "mean"):
            raise ValueError(f'of must be "each" or "mean", got {shown(self.of)}')

    def survey(
        self, target: Defender, point: Tensor, labels: Tensor, seeds: Tensor, at: int
    ) -> tuple[Tensor, Tensor | None]:
        keys = philox.derive(seeds, VIEW_DRAWS, at)

        session, defense = target.session, target.defense

        def answer(pixels: Tensor) -> Tensor:
            seen = session.features(defense.pictures(session, Batch(pixels, keys)))
            return session.mean_logits(seen) if self.of == "mean" else session.logits(seen)

        loss = cross_entropy if self.of == "mean" else cross_entropies
        return slope(point, answer, lambda found: loss(found, labels))[1], None


@dataclass(frozen=True)
class BPDA(Aware):
    """BPDA with the identity, and EOT, through the whole defense.

    Each step costs `eot` runs of the defense and the gradient of its final pass.

    Args:
        eot: random draws per step; momentum averages over steps, too.
        loss: of the defense's logits: "ce", cross-entropy of the true class; "margin", lead of
            the best wrong class.
        warmup: steps of the cheaper view-aware attack that give the start.
        best: return the point with the largest lead in the attacker's draws, if any fooled the
            defense, instead of the last one.
    """

    eot: int = 1
    loss: Literal["ce", "margin"] = "ce"
    warmup: int = 10
    best: bool = True

    name: ClassVar[str] = "bpda"
    label: ClassVar[str] = "BPDA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.loss, str) or self.loss not in ("ce", "margin"):
            raise ValueError(f'loss must be "ce" or "margin", got {shown(self.loss)}')
        whole("warmup", self.warmup, 0, 10_000)
        if type(self.best) is not bool:
            raise ValueError(f"best must be true or false, got {shown(self.best)}")

    def start(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        if self.warmup == 0:
            return super().start(target, x, labels, seeds)
        first = ViewAware(self.epsilon, self.warmup, self.alpha, self.momentum)
        return step.project(first.run(target, x, labels, seeds) - x, x, self.epsilon)

    def survey(
        self, target: Defender, point: Tensor, labels: Tensor, seeds: Tensor, at: int
    ) -> tuple[Tensor, Tensor | None]:
        ahead = leads(target, labels)
        gradient, lead = torch.zeros_like(point), point.new_zeros(len(point))
        for draw in range(self.eot):
            keys = philox.derive(seeds, philox.EOT, at * self.eot + draw)
            logits, part = self.through(target, point, labels, keys)
            gradient += part
            lead += ahead(logits) / self.eot
        return gradient, lead if self.best else None

    def through(
        self, target: Defender, point: Tensor, labels: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Defended logits (B, K) at a point, and the gradient to ascend."""
        return slope(point, lambda x: target.live(x, keys).logits, self.of(target, labels))

    def of(self, target: Defender, labels: Tensor) -> Loss:
        """Loss of logits: (B, K) → (B,)."""
        if self.loss == "margin":
            return leads(target, labels)
        return lambda logits: cross_entropy(logits, labels)


@dataclass(frozen=True)
class GateEvasion(BPDA):
    """BPDA that also lowers the gate's margin, so that the image is not repaired.

    The margin is descended where it is above 0. Both gradients are scaled to equal mean magnitude.

    Args:
        weight: of the gate's gradient relative to the loss's.
    """

    weight: float = 1.0

    name: ClassVar[str] = "gate"
    label: ClassVar[str] = "Gate evasion"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("weight", self.weight, 0, 1000)

    def suits(self, target: Defender) -> bool:
        return target.has_gate

    def through(
        self, target: Defender, point: Tensor, labels: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        def opening(x: Tensor) -> Tensor:
            found = target.live(x, keys).margin
            if found is None:
                raise ValueError(
                    f"attack 'gate' needs a defense with a gate; {target.method} has none"
                )
            return found

        logits, gradient = super().through(target, point, labels, keys)
        _, back = slope(point, opening, torch.relu)
        return logits, balanced(gradient) - self.weight * balanced(back)


@dataclass(frozen=True)
class Surrogate(BPDA):
    """BPDA through each of a defense's surrogates, which are smoother or simpler, in turn.

    The defense itself says, in the attacker's own draws, how far a point fools it; of each image
    the point that does by most is returned. Cost: a whole BPDA for each surrogate.
    """

    name: ClassVar[str] = "surrogate"
    label: ClassVar[str] = "Surrogate"

    def suits(self, target: Defender) -> bool:
        return bool(target.defense.surrogates)

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        if not self.suits(target):
            raise ValueError(
                f"attack 'surrogate' needs a defense with surrogates; {target.method} has none"
            )
        x, labels, seeds = prepared(target, x, labels, seeds)
        best, lead = x.clone(), x.new_full((len(x),), -torch.inf)
        keys = philox.derive(seeds, philox.EOT, self.steps * self.eot)
        for stand_in in target.defense.surrogates:
            point = _Through(**vars(self), stand_in=stand_in).run(target, x, labels, seeds)
            with torch.no_grad():
                parts = [target.run(*part).logits for part in target.pieces(point, keys)]
            ahead = leads(target, labels)(torch.cat(parts))
            best = torch.where(_each(ahead > lead), point, best)
            lead = torch.maximum(ahead, lead)
        return best


@dataclass(frozen=True)
class _Through(BPDA):
    """BPDA with the gradient of another defense."""

    stand_in: Defense | None = None

    def through(
        self, target: Defender, point: Tensor, labels: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.stand_in is not None
        session, stand_in = target.session, self.stand_in

        def answer(x: Tensor) -> Tensor:
            return live(session, stand_in, Batch(x, keys)).logits

        gradient = slope(point, answer, self.of(target, labels))[1]
        with torch.no_grad():
            return target.run(point, keys).logits, gradient


@dataclass(frozen=True)
class PseudoLabel(Aware):
    """Attack on the pseudo-label: the defense then repairs towards a wrong class.

    Ascends the lead of the best wrong class at the pseudo-label's point (SCC's x_w), which costs
    the defense's steps up to there.

    Args:
        eot: random draws per step.
    """

    eot: int = 1

    name: ClassVar[str] = "pseudo"
    label: ClassVar[str] = "Pseudo-label"

    def suits(self, target: Defender) -> bool:
        return target.defense.guess is not None

    def survey(
        self, target: Defender, point: Tensor, labels: Tensor, seeds: Tensor, at: int
    ) -> tuple[Tensor, Tensor | None]:
        guess, session = target.defense.guess, target.session
        if guess is None:
            raise ValueError(
                f"attack 'pseudo' needs a defense with a pseudo-label; {target.method} has none"
            )
        ahead, gradient = leads(target, labels), torch.zeros_like(point)
        for draw in range(self.eot):
            keys = philox.derive(seeds, GUESS_DRAWS, at * self.eot + draw)

            def answer(x: Tensor, keys: Tensor = keys) -> Tensor:
                return live(session, guess, Batch(x, keys)).logits

            gradient += slope(point, answer, ahead)[1]
        return gradient, None
