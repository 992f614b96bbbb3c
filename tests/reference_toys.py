"""A small smooth encoder, its images and a setting, on which TTC and SCC are worked out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import resolve_views
from scc_fast.reference.heads import Classes
from scc_fast.reference.ttc import Setting

HEIGHT, WIDTH, FEATURES = 6, 8, 12  # not square, so that no axis can stand for another
GEOMETRIC = resolve_views("geometric", HEIGHT)
PAPER = resolve_views("paper", HEIGHT, sigma=0.05)
# The projection rounds x + δ once, 2^-25 at most below 1, and δ's weighted sum each of its terms.
ROUNDING = 2.0**-22


class Toy:
    """A small smooth encoder with fixed weights, (B, 3, H, W) to (B, D); notes its batch sizes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(3 * HEIGHT * WIDTH, 24, generator=generator) / 6
        self.second = torch.randn(24, FEATURES, generator=generator) / 5
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        return torch.tanh((pixels - 0.5).flatten(1) @ self.first) @ self.second


def images(batch: int, seed: int = 1, low: float = -0.2, high: float = 1.2) -> Tensor:
    """Random images (B, 3, H, W); beyond [0, 1] they are cut, so that the box is met."""
    uniform = torch.rand(20, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * uniform[:batch]).clamp(0, 1)


def setting(bias: float = 0.0) -> Setting:
    """Seven classes, of which 2 and 5 have one embedding, near that of the first image."""
    toy, fill = Toy(), torch.tensor([0.48, 0.46, 0.41])
    text = F.normalize(torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(2)), dim=-1)
    text[2] = text[5] = F.normalize(F.normalize(toy(images(1))[0], dim=0) + text[0], dim=0)
    toy.batches.clear()
    return Setting(toy, Classes(text, 8.0, bias), fill)


def middle(drift: Tensor) -> float:
    """A gate that cuts a batch's drifts in two."""
    order = drift.sort().values
    return (order[len(order) // 2 - 1] + order[len(order) // 2]).item() / 2
