"""DOC, directional orthogonal counterattack: ascent with momentum, random turns and a soft gate.

"Diversifying Counterattacks: Orthogonal Exploration for Robust CLIP Inference", AAAI 2026
(arXiv 2511.09064), Algorithm 1. Values that the text leaves to a supplement are those of a
third party's implementation, the runner of NAC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast import ops
from scc_fast.config import MethodConfig, shown, whole, within
from scc_fast.engine.batch import Batch, ascend, gradient_of, uniform_start
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.session import Session

PROBES, TURNS = 101, 102  # Philox purposes


@dataclass(frozen=True)
class DOCConfig(MethodConfig):
    """Config of DOC; ε, α and N are the paper's, the others a third party's.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1).
        steps: N, counterattack steps.
        tau: threshold of the gate, on a mean cosine distance.
        gamma: steepness of the gate, in [0, 1e6].
        probes: M, noisy pictures for the sensitivity, in [1, 1000].
        probe_noise: "sign", ±ε per pixel, as in the paper's text, or "uniform", U(−ε, ε), as in
            its Algorithm 1.
        orthogonal: λ, length of the random part relative to the unit gradient, in [0, 1e6].
        momentum: μ, share of the old direction, in [0, 1).
    """

    epsilon: float = 4 / 255
    alpha: float = 3 / 255
    steps: int = 4
    tau: float = 0.3
    gamma: float = 20.0
    probes: int = 5
    probe_noise: Literal["sign", "uniform"] = "sign"
    orthogonal: float = 0.05
    momentum: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("probes", self.probes, 1, 1000)
        for name, top in (("gamma", 1e6), ("orthogonal", 1e6), ("momentum", 1.0)):
            within(name, getattr(self, name), 0.0, top)
        if self.momentum == 1:
            raise ValueError("momentum must be below 1: from a start of 0 it never moves")
        if self.probe_noise not in ("sign", "uniform"):
            raise ValueError(
                f'probe_noise must be "sign" or "uniform", got {shown(self.probe_noise)}'
            )


class DOC(Defense):
    """Directional orthogonal counterattack.

    Steps: f(x) and its probes give the sensitivity τ̂ and the gate w = σ(γ(τ − τ̂)); N steps push
    f(x + δ) away from f(x), along a momentum that starts at 0; δ = w·δᴺ + (1 − w)·δ⁰. A low τ̂
    means attacked, by this formula and TTC's false stability; the paper's text says the opposite.
    Probes and steps share f(x): M + N + 2 forward passes.
    """

    name, Config = "doc", DOCConfig
    config: DOCConfig
    has_gate = True
    repairs: Literal["all"] = "all"

    def width(self, session: Session, size: tuple[int, int]) -> int:
        """Pictures per image in the encoder at once: it and its probes."""
        return 1 + self.config.probes

    def traits(self, session: Session) -> Traits:
        return Traits(
            forward=self.config.probes + self.config.steps + 2,
            backward=self.config.steps,
            random=True,
            dynamic=True,
            text=False,
            gradients=True,
            source="arXiv 2511.09064; λ, μ, M, τ and γ of a third party's implementation",
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        features = session.features(self._probes(session, batch))
        drift = sensitivity(features)
        return State(drift, margin=self.config.tau - drift, rows={"anchor": features[0]})

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        config, still, seeds = self.config, batch.x.detach(), batch.seeds
        on = torch.sigmoid(config.gamma * (config.tau - state.drift))[:, None, None, None]
        start = uniform_start(still, seeds, config.epsilon, backend=session.backend)
        anchor, heading = state.rows["anchor"], torch.zeros_like(start)

        def away(delta: Tensor) -> Tensor:
            """‖f(x + δ) − f(x)‖²."""
            return (session.encode(still + delta) - anchor).square()

        def direction(delta: Tensor, at: int) -> Tensor:
            nonlocal heading
            heading = self._heading(session, gradient_of(away, delta), seeds, at, heading)
            return heading

        delta = ascend(
            still,
            start,
            direction,
            steps=config.steps,
            alpha=config.alpha,
            epsilon=config.epsilon,
        )
        delta = on * delta + (1 - on) * start
        looked = (batch.x + delta)[None]
        return Repaired(session.mean_logits(session.features(looked)), delta)

    def _probes(self, session: Session, batch: Batch) -> Tensor:
        """x and x + n_m, not clamped: (1 + M, B, 3, H, W)."""
        x, numel, backend = batch.x, batch.x.shape[1:].numel(), session.backend
        pictures = [x]
        for probe in range(self.config.probes):
            noise = 2 * ops.philox_uniform(batch.seeds, PROBES, probe, numel, backend=backend) - 1
            if self.config.probe_noise == "sign":
                noise = 1 - 2 * (noise < 0).float()
            pictures.append(x + self.config.epsilon * noise.view_as(x))
        return torch.stack(pictures)

    def _heading(
        self, session: Session, gradient: Tensor, seeds: Tensor, at: int, old: Tensor
    ) -> Tensor:
        """m = μ·m + (1 − μ)·d with d = g/‖g‖ + λ·r/‖r‖, r random and orthogonal to g."""
        numel, backend = gradient.shape[1:].numel(), session.backend
        along = unit(gradient)
        turn = ops.philox_normal(seeds, TURNS, at, numel, backend=backend).view_as(gradient)
        overlap = (turn * along).sum(dim=(1, 2, 3), keepdim=True)
        heading = along + self.config.orthogonal * unit(turn - overlap * along)
        return torch.lerp(heading, old, float(self.config.momentum))


def unit(x: Tensor) -> Tensor:
    """x (B, 3, H, W) normalised per image; zero stays zero."""
    # Scale by a power of two against underflow of squares.
    largest = x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(2.0**-100)
    lifted = x * torch.exp2(-torch.floor(torch.log2(largest)))
    length = lifted.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return lifted / length.clamp_min(1e-30)


def sensitivity(features: Tensor) -> Tensor:
    """τ̂ = 1 − (1/M) Σ_m cos(f(x + n_m), f(x)): (1 + M, B, D) → (B,)."""
    return 1 - F.cosine_similarity(features[1:], features[:1], dim=-1).mean(dim=0)
