"""DBD, directional bias-guided defense: follow the common feature shift of transforms."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scc_fast import ops
from scc_fast.config import MethodConfig, whole, within
from scc_fast.defenses.augment import (
    BOX_DRAWS,
    crop_resize,
    random_boxes,
    straight,
    weighted_blur,
)
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, State, Traits
from scc_fast.engine.session import Session
from scc_fast.reference import philox

# Philox purposes.
CROPS, NOISE = 130, 131

SPATIAL, NOISES = 16, 6
QUALITIES = (50, 60, 75)
ROUNDINGS: tuple[Callable[[Tensor], Tensor], ...] = (torch.floor, torch.round, torch.ceil)
PICTURES = 1 + SPATIAL + len(ROUNDINGS) + len(QUALITIES) + NOISES + 3
# OpenCV's automatic sigma for a 5x5 Gaussian.
GAUSSIAN = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
MEAN = (1 / 5,) * 5


@dataclass(frozen=True)
class DBDConfig(MethodConfig):
    """DBD (ICLR 2026, arXiv 2606.06186); the defaults are the published ones.

    Args:
        keep: number of the 31 views that count, those with the lowest entropy.
        threshold: on the DB-score; above it an image counts as attacked.
        strength: c for attacked images; 1 for others (the mean of the kept views).
        published: first round the picture down to 8 bits, as the released code stores attacked
            pictures. (Its class texts, by a language model, are up to the caller.)
    """

    keep: int = 16
    threshold: float = 0.8
    strength: float = 2.5
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("keep", self.keep, 1, PICTURES - 1)
        within("threshold", self.threshold, -1.0, 1.0)
        within("strength", self.strength, 0.0, 1e3)


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Pillow's JPEG of x (B, 3, H, W) in [0, 1], straight-through."""
    pixels = (x.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    back = np.empty_like(pixels)
    for i, picture in enumerate(pixels):
        with io.BytesIO() as file:
            Image.fromarray(picture).save(file, format="JPEG", quality=quality)
            back[i] = np.asarray(Image.open(file).convert("RGB"))
    changed = torch.from_numpy(back).to(x.device).permute(0, 3, 1, 2).float() / 255
    return straight(x, changed)


def bit_depth(x: Tensor, rounding: Callable[[Tensor], Tensor], bits: int = 3) -> Tensor:
    """Quantise x in [0, 1] to 2^bits levels k/(2^bits − 1), straight-through."""
    top = 2**bits - 1
    return straight(x, rounding(x * top) / top)


def median(x: Tensor, size: int = 5) -> Tensor:
    """Median of size x size pixels, with replicated border, straight-through."""
    with torch.no_grad():
        wide = F.pad(x, (size // 2,) * 4, mode="replicate")
        windows = wide.unfold(2, size, 1).unfold(3, size, 1)
        middle = windows.flatten(-2).median(dim=-1).values
    return straight(x, middle)


def blur(x: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Separable blur of x (B, 3, H, W), reflected at the border."""
    return weighted_blur(x, x.new_tensor(weights).expand(len(x), -1))


class DBD(Defense):
    """Directional bias-guided defense.

    An image and 31 transforms: 16 random crops (scale 0.5 to 1, mirrored half the time), 12 of
    pixels (3 bits by floor, round and ceil; JPEG 50, 60 and 75; six times noise of sigma 0.1) and
    3 of frequencies (5x5 median, mean, Gaussian). With unit features z_0 of the
    image and z_i of the 16 copies with the lowest entropy, d_i = z_i − z_0 and d̄ their mean:
    DB-score = mean cos(d_i, d̄), and z_0 + c·d̄ is classified, c = 2.5 for a score above 0.8.

    `delta` is zero, `drift` the DB-score. Crops are resized on float pixels; the released code
    rounds every copy to 8 bits. Rounding, JPEG and median have straight-through gradients.
    """

    name, Config = "dbd", DBDConfig
    config: DBDConfig
    has_gate = True
    repairs: Literal["none"] = "none"
    uncaptured = "its JPEG copies are made on the host"

    def width(self, session: Session, size: tuple[int, int]) -> int:
        return PICTURES

    def traits(self, session: Session) -> Traits:
        return Traits(
            forward=PICTURES,
            backward=0,
            random=True,
            dynamic=False,
            text=True,
            gradients=False,
            source="arXiv 2606.06186; one text per class as given"
            + (", pictures truncated to 8 bits" * self.config.published),
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        features = session.features(self.pictures(session, batch))
        start, mean, score = self._direction(session, features)
        strong = torch.full_like(score, self.config.strength)
        factor = torch.where(score > self.config.threshold, strong, torch.ones_like(score))
        logits = session.logits(start + factor[:, None] * mean)
        return State(score.detach(), margin=score - self.config.threshold, logits=logits)

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """(32, B, 3, H, W): x, then its transforms."""
        x, seeds = batch.x, batch.seeds
        if len(x) == 0:
            return x.expand(PICTURES, *x.shape)
        if self.config.published:
            x = straight(x, torch.floor(x * 255) / 255)
        draws = philox.uniform(seeds, CROPS, 0, SPATIAL * (BOX_DRAWS + 1))
        draws = draws.unflatten(1, (SPATIAL, BOX_DRAWS + 1))
        boxes = random_boxes(draws[..., 1:], (x.shape[-2], x.shape[-1]), (0.5, 1.0))
        crops = crop_resize(x, boxes, draws[..., 0] < 0.5, session.backend)
        pixel = [bit_depth(x, rounding) for rounding in ROUNDINGS]
        pixel += [jpeg(x, quality) for quality in QUALITIES]
        for at in range(NOISES):
            noise = ops.philox_normal(seeds, NOISE, at, x[0].numel(), backend=session.backend)
            pixel.append((x + 0.1 * noise.view_as(x)).clamp(0, 1))
        frequency = [median(x), blur(x, MEAN), blur(x, GAUSSIAN)]
        return torch.cat([x[None], crops, torch.stack(pixel + frequency)])

    def _direction(self, session: Session, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_0 (B, D), d̄ (B, D) and the DB-score (B,) of features (32, B, D)."""
        unit = F.normalize(features, dim=-1)
        with torch.no_grad():
            logs = session.logits(features[1:]).log_softmax(dim=-1)
            entropy = -(logs.exp() * logs).sum(dim=-1)
            kept = entropy.argsort(dim=0, stable=True)[: self.config.keep]
        copies = unit[1:].gather(0, kept[..., None].expand(-1, -1, unit.shape[-1]))
        shifts = copies - unit[0]
        mean = shifts.mean(dim=0)
        # A full crop is no shift; its rounding error has no direction.
        moved = shifts.detach().norm(dim=-1) > 1e-5
        along = F.cosine_similarity(shifts, mean[None], dim=-1) * moved
        return unit[0], mean, along.mean(dim=0)
