"""Projected gradient descent (Madry et al., arXiv 1706.06083) against three opponents.

The protocol is that of TTC and SCC: random start in the ball, sum of cross-entropies, sign steps,
no restarts, the last iterate is the answer. `pgd` knows the undefended model alone, `view_aware`
also the views a defense averages over, `adaptive` the whole defense.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.api import Defender
from scc_fast.config import IDENTITY, View, parse_budget
from scc_fast.reference import philox, step

# (x, step) -> gradient of the loss to ascend, the shape of x.
Gradient = Callable[[Tensor, int], Tensor]


def pgd(
    defender: Defender,
    x: Tensor,
    labels: Tensor,
    seeds: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    alpha: float = 1 / 255,
) -> Tensor:
    """PGD on the undefended model: what the literature calls robust accuracy is measured on this.

    Args:
        defender: any Defender of the model; only its model and classes are used.
        x: (B, 3, H, W) float32 in [0, 1].
        labels: (B,) int64 true classes.
        seeds: (B,) int64, for the random start.
        epsilon, alpha: budget and step, pixel units in [0, 1).
        steps: at least 1.

    Returns:
        Attacked images (B, 3, H, W) in [0, 1], within epsilon of x.
    """
    x, labels, seeds = _checked(defender, x, labels, seeds)

    def gradient(point: Tensor, _: int) -> Tensor:
        return _loss_gradient(defender, point, labels, seeds, (IDENTITY,))

    return _ascend(gradient, x, seeds, epsilon, steps, alpha)


def view_aware(
    defender: Defender,
    x: Tensor,
    labels: Tensor,
    seeds: Tensor,
    *,
    epsilon: float,
    steps: int = 30,
    alpha: float = 1 / 255,
) -> Tensor:
    """PGD on the mean cross-entropy over the defense's views, without its perturbation.

    Arguments and result as for pgd(); where views are noisy, the noise is the attacker's own.
    """
    x, labels, seeds = _checked(defender, x, labels, seeds)

    def gradient(point: Tensor, _: int) -> Tensor:
        return _loss_gradient(defender, point, labels, seeds)

    return _ascend(gradient, x, seeds, epsilon, steps, alpha)


def adaptive(
    defender: Defender,
    x: Tensor,
    labels: Tensor,
    seeds: Tensor,
    *,
    epsilon: float,
    steps: int = 30,
    alpha: float = 1 / 255,
    eot: int = 2,
) -> Tensor:
    """BPDA-identity PGD with EOT through the whole defense.

    Each step runs the defense on the current point, takes the loss gradient of its prediction at
    the defended pixels, and applies it to the point (Athalye et al., arXiv 1802.00420); averaged
    over `eot` draws of the defense's noise. The draws are the attacker's own: they never include
    the seed the defense is then judged with. Other arguments and result as for pgd().
    """
    if eot < 1:
        raise ValueError(f"eot must be at least 1, got {eot}")
    x, labels, seeds = _checked(defender, x, labels, seeds)

    def gradient(point: Tensor, at: int) -> Tensor:
        total = torch.zeros_like(point)
        for draw in range(eot):
            keys = philox.derive(seeds, philox.EOT, at * eot + draw)
            delta = defender.run(point, keys).delta
            # The gradient at the defended pixels is passed on as it is: BPDA's identity.
            total += _loss_gradient(defender, point + delta, labels, keys, mean_first=True)
        return total

    return _ascend(gradient, x, seeds, epsilon, steps, alpha)


def _loss_gradient(
    defender: Defender,
    point: Tensor,
    labels: Tensor,
    seeds: Tensor,
    views: tuple[View, ...] | None = None,
    *,
    mean_first: bool = False,
) -> Tensor:
    """Of the mean of the views' cross-entropies, or of that of their mean logits: like point."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        logits = defender.view_logits(leaf, seeds, views)
        if mean_first:
            logits = logits.mean(dim=0, keepdim=True)
        every = labels.repeat(len(logits))
        loss = F.cross_entropy(logits.flatten(0, 1), every, reduction="sum") / len(logits)
    return torch.autograd.grad(loss, leaf)[0]


def _ascend(
    gradient: Gradient, x: Tensor, seeds: Tensor, epsilon: float, steps: int, alpha: float
) -> Tensor:
    epsilon, alpha = parse_budget("epsilon", epsilon), parse_budget("alpha", alpha)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(x) == 0:
        return x.clone()
    # A backward pass too would follow the caller's autocast.
    plain = torch.autocast(x.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), plain:
        start = 2 * philox.uniform_like(x, seeds, philox.ATTACK_START) - 1
        delta = step.project(start * epsilon, x, epsilon)
        for at in range(steps):
            delta = step.pgd_step(delta, gradient(x + delta, at), x, alpha, epsilon)
        return (x + delta).clamp(0, 1)


def _checked(
    defender: Defender, x: Tensor, labels: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three on the model's device, as ordinary tensors."""
    for name, value in (("labels", labels), ("seeds", seeds)):
        if value.shape != (len(x),) or value.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 of shape ({len(x)},), got {value.dtype} {tuple(value.shape)}"
            )
    classes = len(defender.text_features)
    if len(x) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be in [0, {classes}), got {labels.tolist()}")
    with torch.inference_mode(False), torch.no_grad():
        device = defender.model.device
        return x.detach().to(device).clone(), labels.to(device).clone(), seeds.to(device).clone()
