"""CSR, contrastive spectral rectification: away from the picture, towards its low-pass copy."""

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
        threshold: images with C(x) = cos(f(x), f(low-pass x)) < threshold are rectified.
        radius: of the Gaussian low-pass, in frequency bins for 224 pixels per side; scaled to
            other sizes.
        repulsion: λ, weight of the similarity to the original picture.
        fast: the released FastCSR, without the last step.
        published: as in the released code, the original picture (R = C − λ) is a candidate, too;
            by default, as in the paper, only the iterates.
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
        """Number of gradient steps."""
        return max(self.steps - 1, 0) if self.fast else self.steps


def low_pass(x: Tensor, radius: float) -> Tensor:
    """Gaussian low-pass of x (B, 3, H, W), clipped to [0, 1].

    Factor exp(−D²/(2r²)) at distance D from zero frequency, in bins for 224 pixels: r = 40 becomes
    40·S/224 for a side of S pixels.
    """
    if len(x) == 0:  # MKL's FFT needs an element
        return x.clone()
    height, width = x.shape[-2:]
    down = 224 * torch.fft.fftfreq(height, device=x.device)
    right = 224 * torch.fft.rfftfreq(width, device=x.device)
    mask = torch.exp(-(down[:, None] ** 2 + right**2) / (2 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=(height, width)).clamp(0, 1)


class CSR(Defense):
    """Contrastive spectral rectification.

    Images with C(x) < threshold count as attacked. They get N signed ascent steps from x on
    R(x') = cos(f(x'), f(x_low)) − λ cos(f(x'), f(x)), within epsilon of x; the prediction is that
    of the iterate with the highest R. Deterministic. A clean image takes 2F. The released code
    makes 8F instead of 7F: it encodes x again.
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
