"""TTE, test-time transformation ensembling: logits averaged over fixed transforms.

Pérez et al., ICCV workshops 2021 (arXiv 2107.14110), and the authors' repository juancprzs/TTE.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast import ops
from scc_fast.config import MethodConfig, View, whole
from scc_fast.defenses.scc import no_drift
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, State, Traits
from scc_fast.engine.session import Session
from scc_fast.reference import philox

CROP_ORIGINS = 100  # Philox purpose


@dataclass(frozen=True)
class EnsembleConfig(MethodConfig):
    """Transforms of TTE; the default is the paper's best set, 10 pictures.

    Identity, mirror, `crops` crops, and as many crops of the mirrored picture. A crop has
    the picture's size, out of the picture padded by an eighth of its shorter side (4 of 32, 28 of
    224). As in the authors' code the padding is zero after normalisation (the model's mean), and a
    crop's upper left corner is uniform on {0, …, 2·pad − 1}².

    Args:
        crops: number of crops, in [0, 64].
        flip: whether transforms may mirror; None asks the model.
        seed: of the crops, common to all images; any int64.
        blur: add the authors' 5x5 Gaussian blur of sigma 1.
        published: all crops are the last one, as in the authors' code (late binding) and the
            paper's numbers. By default the crops differ.
    """

    crops: int = 4
    flip: bool | None = None
    seed: int = 0
    blur: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("crops", self.crops, 0, 64)
        whole("seed", self.seed, -(1 << 63), (1 << 63) - 1)


class TTE(Defense):
    """Test-time transformation ensembling: no gradient, no noise, nothing optimised."""

    name, Config = "tte", EnsembleConfig

    config: EnsembleConfig
    repairs: Literal["none"] = "none"
    uncaptured = "not tried as a graph"

    def width(self, session: Session, size: tuple[int, int]) -> int:
        config = self.config
        return (1 + config.crops) * (1 + self._mirrors(session)) + config.blur

    def _mirrors(self, session: Session) -> bool:
        return session.flip if self.config.flip is None else self.config.flip

    def traits(self, session: Session) -> Traits:
        return Traits(
            forward=self.width(session, session.size),
            backward=0,
            random=False,
            dynamic=False,
            text=False,
            gradients=False,
            source="arXiv 2107.14110; published: all crops are one",
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        features = session.features(self.pictures(session, batch))
        return State(no_drift(batch), logits=session.mean_logits(features))

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        x, (height, width) = batch.x, batch.size
        pad = max(1, round(min(height, width) / 8))
        origins = crop_origins(self.config.seed, self.config.crops, pad)
        if self.config.published:
            origins = origins[-1:] * len(origins)
        mirrors = (False, True) if self._mirrors(session) else (False,)
        views = [View(flip) for flip in mirrors]
        # A view is shifted before it is mirrored, a crop of the mirrored picture after.
        views += [
            View(flip, (pad - t, s - pad if flip else pad - s))
            for flip in mirrors
            for t, s in origins
        ]
        seen = ops.make_views(
            x, None, batch.seeds, views, fill=session.mean, backend=session.backend
        ).unflatten(0, (len(views), len(x)))
        return torch.cat([seen, blurred(x)[None]]) if self.config.blur else seen


@functools.lru_cache(maxsize=64)
def crop_origins(seed: int, crops: int, pad: int) -> tuple[tuple[int, int], ...]:
    """Distinct upper left corners (row, column) of the crops in {0, …, 2·pad − 1}².

    Raises:
        ValueError: fewer corners than crops.
    """
    side = 2 * pad
    if crops > side**2:
        raise ValueError(
            f"crops must be at most {side**2} for pictures that are padded by {pad}, got {crops}"
        )
    with torch.inference_mode(False):
        keys = philox.uniform(torch.tensor([seed]), CROP_ORIGINS, 0, side**2)[0]
        places = torch.argsort(keys, stable=True)[:crops].tolist()
    return tuple(divmod(place, side) for place in places)


def blurred(x: Tensor) -> Tensor:
    """5x5 Gaussian blur of x (B, 3, H, W) with sigma 1, reflected at the border.

    Taps as in the authors' code: SciPy's filter of an impulse on 5 pixels.

    Raises:
        ValueError: the picture is smaller than 3x3.
    """
    if min(x.shape[-2:]) < 3:
        raise ValueError(
            f"blur must be False for pictures smaller than 3x3, got {x.shape[-2]}x{x.shape[-1]}"
        )
    bell = torch.exp(-0.5 * torch.arange(5, dtype=torch.float64) ** 2)
    bell = bell / (bell[0] + 2 * bell[1:].sum())
    taps = torch.stack([bell[2] + bell[3], bell[1] + bell[4], bell[0]])
    taps = torch.cat([taps, taps[:2].flip(0)]).to(x)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, [2] * 4, mode="reflect"), kernel, groups=x.shape[1])
