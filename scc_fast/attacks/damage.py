"""Ordinary damage without an attacker: compression, noise, blur, darkness, rotation.

A defense should not lose accuracy on it. Made by Pillow (JPEG) and torchvision on the CPU, picture
by picture: equal on every device and in every batch.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.attacks.base import Attack, prepared
from scc_fast.config import one_of
from scc_fast.reference import philox

KIND, NOISE = 163, 164  # Philox purposes: kind of damage, and its noise
ANY = "any"


def _jpeg(x: Tensor, _: Tensor, quality: int) -> Tensor:
    from torchvision.transforms import functional as tv  # type: ignore[import-untyped]

    pixels = (255 * x[0]).round().to(torch.uint8)
    with io.BytesIO() as file:
        tv.to_pil_image(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as picture:
            found: Tensor = tv.pil_to_tensor(picture)
    return found[None].float() / 255


def _noise(x: Tensor, seed: Tensor, sigma: float) -> Tensor:
    return x + sigma * philox.normal(seed, NOISE, 0, x.numel()).view_as(x)


def _blur(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms import functional as tv

    radius = min(5, *(side - 1 for side in x.shape[-2:]))  # the border is mirrored
    return tv.gaussian_blur(x, 2 * radius + 1, 1.5)


def _half(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms import functional as tv

    size = list(x.shape[-2:])
    small = tv.resize(x, [(side + 1) // 2 for side in size], antialias=True)
    return tv.resize(small, size, antialias=True)


def _dark(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms import functional as tv

    return tv.adjust_brightness(x, 0.5)


def _grey(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms import functional as tv

    return tv.rgb_to_grayscale(x, 3)


def _rotate(x: Tensor, _: Tensor) -> Tensor:
    from torchvision.transforms import functional as tv

    return tv.rotate(x, 15.0, tv.InterpolationMode.BILINEAR)


# (picture (1, 3, H, W), its seed (1,)) -> the damaged picture, before it is clamped.
DAMAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jpeg50": partial(_jpeg, quality=50),
    "jpeg20": partial(_jpeg, quality=20),
    "noise8": partial(_noise, sigma=8 / 255),
    "noise16": partial(_noise, sigma=16 / 255),
    "blur": _blur,
    "half": _half,
    "dark": _dark,
    "grey": _grey,
    "rotate": _rotate,
}


@dataclass(frozen=True)
class Damaged(Attack):
    """One of nine ordinary damages per picture, without an attacker.

    JPEG of quality 50 or 20, Gaussian noise of standard deviation 8/255 or 16/255, Gaussian blur
    of 1.5 pixels, half the resolution and back (bilinear), half the brightness, grey, 15° of
    rotation counter-clockwise with black corners. The kind is drawn uniformly from the picture's
    seed alone (111 ± 10 of 1000 pictures each).

    Args:
        epsilon: 0: no budget.
        kind: "any", or one of DAMAGES for all pictures.

    Raises:
        ValueError: unknown kind, or a budget.
    """

    epsilon: float = 0.0
    kind: str = ANY

    name: ClassVar[str] = "damaged"
    budgeted: ClassVar[bool] = False
    conclusive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, (ANY, *DAMAGES))
        if self.epsilon:
            raise ValueError(f"epsilon must be 0: {self.name} has no budget; got {self.epsilon!r}")

    @property
    def title(self) -> str:
        return self.name if self.kind == ANY else f"{self.name} ({self.kind})"

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """Damaged pictures, as Attack.run(), bounded only by [0, 1]."""
        x, _, seeds = prepared(target, x, labels, seeds)
        if len(x) == 0:
            return x.clone()
        with plain(torch.device("cpu")):
            kinds = kinds_of(seeds) if self.kind == ANY else [self.kind] * len(x)
            each = zip(kinds, x.cpu().split(1), seeds.cpu().split(1), strict=True)
            made = [DAMAGES[kind](picture, seed) for kind, picture, seed in each]
            return torch.cat(made).clamp(0, 1).to(x.device)


def kinds_of(seeds: Tensor) -> list[str]:
    """Index into DAMAGES per picture under "any", for seeds (B,) int64."""
    kinds = tuple(DAMAGES)
    drawn = philox.uniform(seeds, KIND, 0, 1)[:, 0].double() * len(kinds)  # below len(kinds)
    return [kinds[place] for place in drawn.long().tolist()]
