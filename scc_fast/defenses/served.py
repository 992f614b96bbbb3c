"""The methods that scc_fast.Defender itself serves: none, rn, views, ttc and scc."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.api import Defender
from scc_fast.config import MethodConfig, NoneConfig, RNConfig, SCCConfig, TTCConfig, TTEConfig
from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.engine.differentiable import Encode
from scc_fast.reference import heads, step
from scc_fast.reference.ttc import Outcome


class Served(Defense):
    """A method of Defender; `method` is its name there."""

    served: str
    source: str

    def __init__(
        self,
        model: Any,
        classes: Sequence[str] | None = None,
        *,
        config: MethodConfig | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.defender = Defender(
            model, classes, method=self.served, config=self._own(config), **options
        )
        super().__init__(self.defender.model, classes, config=self.defender.config, **options)
        # Of a fine-tuned encoder the gate looks through the one that it was tuned from (TTC).
        original = getattr(self.model, "original", None) if self.has_gate else None
        self._judge = None if original is None else Defender(original, classes, **_bare(options))

    @property
    def has_gate(self) -> bool:
        return isinstance(self.config, SCCConfig | TTCConfig) and getattr(self.config, "gate", True)

    @classmethod
    def _own(
        cls, config: MethodConfig | dict[str, Any] | None
    ) -> MethodConfig | dict[str, Any] | None:
        """What Defender gets: with a dict or None a model's own defaults come in."""
        return config

    @property
    def traits(self) -> Traits:
        plan = self.defender.plan()
        ascent = isinstance(self.config, SCCConfig | TTCConfig)
        return Traits(
            forward=plan.forward + 2 * (self._judge is not None),
            backward=plan.backward,
            random=self.defender.is_randomized,
            dynamic=ascent,
            text=isinstance(self.config, SCCConfig) and self.config.semantic,
            gradients=ascent,
            source=self.source,
        )

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        with torch.inference_mode(False), torch.no_grad():
            return self._ran(self.config, x, seeds)

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self.defender.pieces(x, seeds)

    def out_of_memory(self, x: Tensor) -> RuntimeError:
        return self.defender.out_of_memory(x)

    def _ran(self, config: MethodConfig, x: Tensor, seeds: Tensor) -> Outcome:
        if self._judge is None:
            return self.defender.variant(config).run(x, seeds)
        return self._judged(config, x, seeds)

    def _judged(self, config: Any, x: Tensor, seeds: Tensor) -> Outcome:
        """The method with τ from the original encoder: what it flags is repaired, all else kept."""
        margin = self.gate(x, seeds)
        assert margin is not None
        drift = self.config.tau - margin.read(self._gate_features(margin))
        flagged = drift < self.config.tau
        logits = x.new_zeros(len(x), len(self.text_features))
        delta = torch.zeros_like(x)
        for rows, tau in ((flagged, math.inf), (~flagged, 0.0)):
            if rows.any():
                found = self.defender.variant(replace(config, tau=tau)).run(x[rows], seeds[rows])
                logits[rows], delta[rows] = found.logits, found.delta
        return Outcome(logits, delta, drift, flagged)

    def _gate_features(self, look: Look) -> Tensor:
        views, batch = look.pictures.shape[:2]
        encode = self.encode if self._judge is None else Encode(self._judge.setting)
        return encode(look.pictures.flatten(0, 1)).unflatten(0, (views, batch))

    def answer(self, look: Look) -> Tensor:
        if isinstance(look, _Gate):
            return look.read(self._gate_features(look))
        return super().answer(look)

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        found = self.run(x.detach(), seeds)
        look = self._views(x + found.delta, seeds)
        return Repair(look.pictures, look.read, found.delta, found.drift, found.flagged)

    def views(self, x: Tensor, seeds: Tensor) -> Look:
        return self._views(x, seeds)

    def gate(self, x: Tensor, seeds: Tensor) -> Look | None:
        config = self.config
        if not self.has_gate:
            return None
        delta = step.initial_delta(x.detach(), seeds, config.epsilon)

        def read(features: Tensor) -> Tensor:
            return config.tau - heads.relative_drift(features[1], features[0])

        moved = x + ((x + delta).clamp(0, 1) - x).detach()  # clamp has no slope at its bounds
        return _Gate(torch.stack([x, moved]), read)

    def guess(self, x: Tensor, seeds: Tensor) -> Look | None:
        """The views of x_w, the image after the warm-up (SCC's step 2)."""
        if not isinstance(self.config, SCCConfig) or not self.config.semantic:
            return None
        with torch.inference_mode(False), torch.no_grad():
            delta = self._ran(replace(self.config, semantic=False), x.detach(), seeds).delta
        return self._views(x + delta, seeds)

    def _views(self, x: Tensor, seeds: Tensor) -> Look:
        views = self.defender.views(min(x.shape[-2:]))
        # clamp() has no gradient at 0 and 1 themselves, where many pixels are; this one passes it.
        inside = x + (x.clamp(0, 1) - x).detach()
        pictures = ops.make_views(inside, None, seeds, views, fill=self.model.mean)
        return Look(pictures.unflatten(0, (len(views), len(x))), self.mean_logits)


class _Gate(Look):
    """A look of the gate's: through the original encoder where the model was fine-tuned."""


def _bare(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "method": "none"}


class Undefended(Served):
    """The model's own prediction."""

    name, served, Config = "none", "none", NoneConfig
    source = "the model itself"


class RandomNoise(Served):
    """Uniform noise: TTC with no step."""

    name, served, Config = "rn", "rn", RNConfig
    source = "control of arXiv 2503.03613"


class Views(Served):
    """SCC's views averaged, without a perturbation."""

    name, served, Config = "views", "tte", TTEConfig
    source = "control: SCC without its perturbation"


class TTC(Served):
    """Test-time counterattack, with the published values whatever the model carries."""

    name, served, Config = "ttc", "ttc", TTCConfig
    source = "arXiv 2503.03613"

    @classmethod
    def _own(cls, config: MethodConfig | dict[str, Any] | None) -> MethodConfig:
        return cls._configured(config)


class SCC(Served):
    """Self-calibrated consistency."""

    name, served, Config = "scc", "scc", SCCConfig
    source = "arXiv 2510.22785"
