"""Unrolled attack: the gradient through the steps of TTC and SCC.

BPDA with the identity ignores that δ depends on the image. Here the whole defense, with the
gradients of its ascent, is differentiated by autograd. Two operations get a straight-through
derivative (Bengio et al., arXiv 1308.3432; for defenses Athalye et al., arXiv 1802.00420):

- sign(g) of an ascent step has the derivative of c · g / mean|g|, with a constant mean per image.
  At c = 1 the surrogate has the sign's mean magnitude, and gradients over several steps explode;
  c = 0 is BPDA.
- the projection Π: the clamp to the ball has its own derivative; the clamp to the box has the
  identity's, for a pixel at the box can move away from it.

Decisions (the gate, ŷ, the hardest negative) count as constant; the soft pseudo-label does not.

All passes of the defense are kept and differentiated twice: activations of 1 + L·(N + S + 1)
pictures per image, with N warm-up and S semantic steps, about twice each. On a CPU it took three
times as long as the reference, and five to eight times as long as the runner. It uses the model's
modules in the weights' precision, with plain attention, which has a second derivative.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scc_fast.api import Defender
from scc_fast.attacks.adaptive import BPDA
from scc_fast.config import within
from scc_fast.defenses.scc import Ascent
from scc_fast.engine.batch import Backward, Batch, LiveViews
from scc_fast.engine.drive import dense
from scc_fast.reference import heads, step
from scc_fast.reference.views import make_views

MOST_STEPS = 8  # of the defense; beyond, the gradient is noise


@dataclass(frozen=True)
class Unrolled(BPDA):
    """Ascent along the gradient through all steps of TTC or SCC, at most 8.

    A step costs five to eight runs of the defense.

    Args:
        slope: c of the straight-through sign, in [0, 1].
    """

    steps: int = 10
    slope: float = 0.1

    name: ClassVar[str] = "unrolled"
    label: ClassVar[str] = "Unrolled"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("slope", self.slope, 0, 1)

    def suits(self, target: Defender) -> bool:
        return isinstance(target.defense, Ascent) and step_count(target) <= MOST_STEPS

    def through(
        self, target: Defender, point: Tensor, labels: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaf = point.detach().requires_grad_()
            logits = unrolled(target, leaf, keys, self.slope)
            (gradient,) = torch.autograd.grad(self.of(target, labels)(logits).sum(), leaf)
        return logits.detach(), gradient


def step_count(target: Defender) -> int:
    """Number of steps of TTC or SCC; 0 for another defense."""
    defense = target.defense
    if not isinstance(defense, Ascent):
        return 0
    return defense.warmup_steps + defense.semantic_steps


def unrolled(target: Defender, x: Tensor, seeds: Tensor, slope: float = 1.0) -> Tensor:
    """Logits of TTC or SCC, differentiable with respect to x as this module describes.

    Gradients must be on.

    Args:
        target: TTC or SCC.
        x: (B, 3, H, W) float32 in [0, 1], B >= 1.
        seeds: (B,) int64.
        slope: c of the straight-through sign.

    Returns:
        (B, K).

    Raises:
        ValueError: neither TTC nor SCC.
    """
    if not isinstance(target.defense, Ascent):
        raise ValueError(f"only ttc and scc can be unrolled, got {target.method!r}")
    session = target.session
    kind = functools.partial(UnrolledViews, slope=slope)
    exact = replace(session, kind=kind, encoded=session.reference.encode)
    return dense(exact, target.defense, Batch(x, seeds)).logits


class UnrolledViews(LiveViews):
    """Views with differentiable steps, to any order.

    Args:
        slope: c, of the straight-through sign.
    """

    def __init__(self, *given: Any, slope: float) -> None:
        super().__init__(*given)
        self.slope = slope

    def vjp(
        self, delta: Tensor | None, anchor: bool = False
    ) -> tuple[Tensor, Tensor | None, Backward]:
        pixels = self.batch.x if delta is None else self.batch.x + delta
        features = self._seen(pixels)

        def back(head: Tensor, retain: bool) -> Tensor:
            head = head.unflatten(0, features.shape[:2])
            return torch.autograd.grad(features, pixels, head, create_graph=True)[0]

        return features, self.session.encode(self.batch.x) if anchor else None, Backward(back)

    def step(
        self,
        delta: Tensor,
        gradient: Tensor,
        config: Any,
        weighted: Tensor | None = None,
        weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        moved = delta + config.alpha * straight_sign(gradient, self.slope)
        within_ball = moved.clamp(-config.epsilon, config.epsilon)
        boxed = step.project(moved, self.batch.x, config.epsilon)
        delta = within_ball + (boxed - within_ball).detach()
        return delta, weighted if weighted is None else weighted + weight * delta

    def drift(self, features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        drift = heads.relative_drift(features[0].detach(), anchor.detach())
        return drift, heads.drift_head(features, anchor)

    def pseudo_label(self, features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        _, label, soft = heads.pseudo_label(features, self.session.classes, temperature)
        return label, soft

    def margin(self, features: Tensor, soft: Tensor, label: Tensor) -> Tensor:
        classes = self.session.classes
        return heads.margin_head(features, soft, classes.negatives(label), classes)[1]

    def _seen(self, pixels: Tensor) -> Tensor:
        session, batch = self.session, self.batch
        seen = make_views(pixels, batch.seeds, self.views, pixels.new_tensor(session.mean))
        return self._stacked(session.encode(seen.flatten(0, 1)))


def straight_sign(gradient: Tensor, slope: float = 1.0) -> Tensor:
    """sign(g) with the derivative of c·g / mean|g|, the mean per image constant.

    Args:
        gradient: (B, 3, H, W).
        slope: c.
    """
    mean = gradient.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    surrogate = gradient * (slope * torch.where(mean > 0, 1 / mean, 0.0))
    return gradient.detach().sign() + (surrogate - surrogate.detach())
