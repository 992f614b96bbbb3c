"""Contrastive spectral rectification: move away from the picture, towards its low-pass copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import MethodConfig, within
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.session import Session
from scc_fast.reference import step


@dataclass(frozen=True)
class CSRConfig(MethodConfig):
    """CSR (ICML 2026, arXiv 2601.19210).

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1).
        steps: gradient steps on R.
        threshold: images with C(x) = cos(f(x), f(low-pass x)) below it are rectified; at it or
            above they pass unchanged.
        radius: of the Gaussian low-pass, in frequency bins of a picture with 224 pixels a side;
            on another size the same share of the band passes.
        repulsion: λ, the weight of the similarity to the picture as it came.
        fast: the released FastCSR, which leaves out the last of the steps; there, too, the picture
            as it came is a candidate only where published.
        published: the released code's choice, where the picture as it came, with R = C − λ,
            competes with the iterates; without, as in the paper, the best of the steps' results
            is taken, even if it is worse than the picture.
    """

    epsilon: float = 4 / 255
    alpha: float = 2 / 255
    steps: int = 3
    threshold: float = 0.85
    radius: float = 40.0
    repulsion: float = 1.0
    fast: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("threshold", self.threshold, -1.0, 1.0)
        within("radius", self.radius, 0.1, 1e6)
        within("repulsion", self.repulsion, 0.0, 1e6)

    @property
    def taken(self) -> int:
        """The gradient steps that are made."""
        return max(self.steps - 1, 0) if self.fast else self.steps


def low_pass(x: Tensor, radius: float) -> Tensor:
    """Gaussian low-pass of x (B, 3, H, W), clipped to [0, 1].

    The factor of a frequency is exp(−D²/(2r²)), D its distance from zero in bins of a picture of
    224 pixels: r = 40 of 112 bins there is r = 40·S/224 on a side of S pixels.
    """
    if len(x) == 0:  # which MKL's FFT refuses
        return x.clone()
    height, width = x.shape[-2:]
    down = 224 * torch.fft.fftfreq(height, device=x.device)
    right = 224 * torch.fft.rfftfreq(width, device=x.device)
    mask = torch.exp(-(down[:, None] ** 2 + right**2) / (2 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=(height, width)).clamp(0, 1)


class CSR(Defense):
    """Contrastive spectral rectification.

    An image whose feature moves under the low-pass, C(x) < threshold, is taken as attacked. N
    signed ascent steps from x on R(x') = cos(f(x'), f(x_low)) − λ cos(f(x'), f(x)) follow, within
    epsilon of x, and the iterate with the highest R is predicted from. Deterministic: seeds do
    not matter. A picture that passes takes 2F. The released code makes 8F where 7F suffice,
    because it encodes x once more.
    """

    name, Config = "csr", CSRConfig
    config: CSRConfig
    has_gate = True

    @property
    def repairs(self) -> Literal["none", "flagged"]:
        return "flagged" if self.config.taken else "none"

    def traits(self, session: Session) -> Traits:
        taken = self.config.taken
        return Traits(
            forward=taken + 4 if taken else 2,
            backward=taken,
            random=False,
            dynamic=True,
            text=False,
            gradients=True,
            source="arXiv 2601.19210; the best of the steps' results"
            + (" and of the picture itself, as in the released code" * self.config.published),
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        pair = torch.stack([batch.x, low_pass(batch.x, self.config.radius)])
        came, low = session.features(pair)
        similarity = F.cosine_similarity(came, low, dim=-1)
        return State(
            similarity,
            margin=self.config.threshold - similarity,
            logits=session.mean_logits(came[None]),
            rows={"came": came, "low": low},
        )

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        plain = batch.x.detach()
        came, low = state.rows["came"], state.rows["low"]
        delta = self._rectify(session, plain, came, low) - plain
        looked = (batch.x + delta)[None]
        return Repaired(session.mean_logits(session.features(looked)), delta)

    def _rectify(self, session: Session, x: Tensor, came: Tensor, low: Tensor) -> Tensor:
        """The best iterate for flagged images x (b, 3, H, W) with their features (b, D)."""
        config = self.config
        best, point = x, x
        top = x.new_full((len(x),), -torch.inf)
        for at in range(config.taken + 1):
            last = at == config.taken
            with torch.set_grad_enabled(not last):
                leaf = point.detach().requires_grad_(not last)
                score = self._score(session.encode(leaf), came, low)
                total = score.sum()
            if at or config.published:
                better = score.detach() > top
                top = torch.where(better, score.detach(), top)
                best = torch.where(better[:, None, None, None], point, best)
            if not last:
                (slope,) = torch.autograd.grad(total, leaf)
                point = x + step.pgd_step(point - x, slope, x, config.alpha, config.epsilon)
        return best

    def _score(self, features: Tensor, came: Tensor, low: Tensor) -> Tensor:
        """R: (b, D) → (b,)."""
        towards = F.cosine_similarity(features, low, dim=-1)
        return towards - self.config.repulsion * F.cosine_similarity(features, came, dim=-1)
