"""The gradient through a defense's own steps: TTC and SCC unrolled, for attack purposes.

What BPDA with the identity leaves out is that a point moved changes what the defense adds to it.
Here the defense is written out under autograd, its ascent's gradients included, and differentiated
as a whole. Two of its operations have no useful derivative and get a straight-through one (Bengio
et al., arXiv 1308.3432; for defenses Athalye et al., arXiv 1802.00420):

- sign(g) of an ascent step: on the way back it counts as c · g / mean|g|, with the mean of each
  image taken as a constant. At c = 1 the surrogate's mean magnitude is that of the sign, and the
  gradient of step upon step grows a thousandfold and points anywhere; at c = 0 this is BPDA.
- the projection Π: its clamp to the ball passes gradients inside, which is its own derivative; its
  clamp to the box passes them all, for a pixel at the box is free to move away from it.

What is decided (the gate, ŷ, the hardest negative) counts as constant; the soft pseudo-label
does not.

Memory and time: every pass of the defense and its way back are kept, and differentiated once
more: the encoder's activations of 1 + L·(N + S + 1) pictures of one image, N steps of
warm-up, S semantic ones, about twice each. On a CPU it took three times as long as the
reference of the defense, and five to eight times as long as the runner.
It runs through the model's own modules in the weights' precision, whatever engine serves the
defense, and takes attention in plain products, whose second derivative PyTorch has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scc_fast.attacks.adaptive import BPDA
from scc_fast.config import IDENTITY, SCCConfig, TTCConfig, View, within
from scc_fast.defenses.base import Defense
from scc_fast.defenses.served import SCC, TTC
from scc_fast.reference import heads, step
from scc_fast.reference.views import make_views

MOST_STEPS = 8  # of the defense: more do not fit, and their gradient is noise


@dataclass(frozen=True)
class Unrolled(BPDA):
    """Ascent of the loss along the gradient through all of TTC's or SCC's steps.

    Only defenses of at most 8 steps in total. A step costs some five to eight runs of the defense.

    Args:
        slope: c, of the straight-through sign, in [0, 1].
    """

    steps: int = 10
    slope: float = 0.1

    name: ClassVar[str] = "unrolled"
    label: ClassVar[str] = "Unrolled"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("slope", self.slope, 0, 1)

    def suits(self, target: Defense) -> bool:
        return isinstance(target, TTC | SCC) and step_count(target) <= MOST_STEPS

    def through(
        self, target: Defense, point: Tensor, labels: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaf = point.detach().requires_grad_()
            logits = unrolled(target, leaf, keys, self.slope)
            (gradient,) = torch.autograd.grad(self.of(target, labels)(logits).sum(), leaf)
        return logits.detach(), gradient


def step_count(target: Defense) -> int:
    """Steps that TTC or SCC takes in all; 0 for another defense."""
    config = target.config
    if isinstance(config, SCCConfig):
        return config.warmup_steps + (config.semantic_steps if config.semantic else 0)
    return config.steps if isinstance(config, TTCConfig) else 0


def unrolled(target: Defense, x: Tensor, seeds: Tensor, slope: float = 1.0) -> Tensor:
    """The logits of TTC or SCC as a differentiable function of x.

    Their values are the defense's own (METHOD.md's steps 1 to 5), their derivative is the one
    this module describes. To be called where gradients are on.

    Args:
        target: TTC or SCC.
        x: (B, 3, H, W) float32 in [0, 1], B >= 1.
        seeds: (B,) int64.
        slope: c, of the straight-through sign.

    Returns:
        (B, K).

    Raises:
        ValueError: another defense.
    """
    if not isinstance(target, TTC | SCC):
        raise ValueError(f"only ttc and scc can be unrolled, got {target.name!r}")
    config = target.config
    views = target.defender.views(min(x.shape[-2:])) if isinstance(config, SCCConfig) else None
    sight = _Sight(target, x, seeds, views or (IDENTITY,), slope)
    anchor = target.bare.encode(x)
    start = step.initial_delta(x.detach(), seeds, config.epsilon)
    features, pixels = sight.look(start)
    left = target.mean_logits(features)
    gate = target.gate(x.detach(), seeds)
    open_ = target.answer(gate) > 0 if gate else torch.ones(len(x), dtype=torch.bool).to(x.device)
    if not open_.any():
        return left

    warm_up = config.warmup_steps if isinstance(config, SCCConfig) else config.steps
    weights = step.iterate_weights(warm_up, config.beta).tolist()
    delta, weighted = start, weights[0] * start
    for t in range(warm_up):
        if t > 0:
            features, pixels = sight.look(delta)
        delta = sight.step(delta, features, pixels, heads.drift_head(features, anchor))
        weighted = weighted + weights[t + 1] * delta
    delta = weighted if warm_up else start

    soft = negatives = anchor  # set in the first semantic step
    for s in range(step_count(target) - warm_up):
        features, pixels = sight.look(delta)
        if s == 0:
            _, label, soft = heads.pseudo_label(features, target.table, config.temperature)
            negatives = target.table.negatives(label)
        _, head = heads.margin_head(features, soft, negatives, target.table)
        delta = sight.step(delta, features, pixels, head)
    repaired = target.mean_logits(sight.look(delta)[0])
    return torch.where(open_[:, None], repaired, left)


class _Sight:
    """Images x with gradients, the views of x + δ, and the defense's step."""

    def __init__(
        self, target: TTC | SCC, x: Tensor, seeds: Tensor, views: Sequence[View], slope: float
    ) -> None:
        self.target, self.x, self.seeds, self.views, self.slope = target, x, seeds, views, slope
        self.fill = x.new_tensor(target.model.mean)

    def look(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Features (L, B, D) of the views of x + δ, and the pixels that they are of."""
        pixels = self.x + delta
        seen = make_views(pixels, self.seeds, self.views, self.fill)
        encoded = self.target.bare.encode(seen.flatten(0, 1))
        return encoded.unflatten(0, seen.shape[:2]), pixels

    def step(self, delta: Tensor, features: Tensor, pixels: Tensor, head: Tensor) -> Tensor:
        """Π(δ + α·sign(g)) with g the pull-back of ∂J/∂f, all of it differentiable."""
        config = self.target.config
        (gradient,) = torch.autograd.grad(features, pixels, head, create_graph=True)
        moved = delta + config.alpha * straight_sign(gradient, self.slope)
        within_ball = moved.clamp(-config.epsilon, config.epsilon)
        boxed = step.project(moved, self.x, config.epsilon)
        return within_ball + (boxed - within_ball).detach()


def straight_sign(gradient: Tensor, slope: float = 1.0) -> Tensor:
    """sign(g), with the derivative of c·g / mean|g|, the mean of each image a constant.

    Args:
        gradient: (B, 3, H, W).
        slope: c.
    """
    mean = gradient.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    surrogate = gradient * (slope * torch.where(mean > 0, 1 / mean, 0.0))
    return gradient.detach().sign() + (surrogate - surrogate.detach())
