"""The methods that scc_fast.Defender itself serves: none, rn, views, ttc and scc."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.api import Defender
from scc_fast.config import MethodConfig, NoneConfig, RNConfig, SCCConfig, TTCConfig, ViewsConfig
from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.reference import heads, step
from scc_fast.reference.ttc import Outcome


class Served(Defense):
    """A method that scc_fast.Defender serves pass by pass."""

    source: str

    def __init__(
        self,
        model: Any,
        classes: Sequence[str] | None = None,
        *,
        config: MethodConfig | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.defender = Defender(model, classes, method=self.name, config=config, **options)
        config, bare = self.defender.config, self.defender.variant(NoneConfig(), "none")
        super().__init__(self.defender.model, classes, config=config, bare=bare)

    @property
    def traits(self) -> Traits:
        plan = self.defender.plan()
        ascent = isinstance(self.config, SCCConfig | TTCConfig)
        return Traits(
            forward=plan.forward + 2 * (self.defender.gate_encoder is not None),
            backward=plan.backward,
            random=self.defender.is_randomized,
            dynamic=ascent,
            text=isinstance(self.config, SCCConfig) and self.config.semantic,
            gradients=ascent,
            source=self.source,
        )

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        with torch.inference_mode(False), torch.no_grad():
            return self.defender.run(x, seeds)

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self.defender.pieces(x, seeds)

    def serves(self, size: tuple[int, int]) -> str:
        return self.defender.serves(size)

    def out_of_memory(self, x: Tensor) -> RuntimeError:
        return self.defender.out_of_memory(x)

    def _gate_features(self, look: Look) -> Tensor:
        views, batch = look.pictures.shape[:2]
        encode = self.defender.gate_encoder or self.encode
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
        if not self.defender.has_gate:
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
            warm = self.defender.variant(replace(self.config, semantic=False))
            delta = warm.run(x.detach(), seeds).delta
        return self._views(x + delta, seeds)

    def _views(self, x: Tensor, seeds: Tensor) -> Look:
        views = self.defender.views(min(x.shape[-2:]))
        # clamp() has no gradient at 0 and 1 themselves, where many pixels are; this one passes it.
        inside = x + (x.clamp(0, 1) - x).detach()
        pictures = ops.make_views(inside, None, seeds, views, fill=self.model.mean)
        return Look(pictures.unflatten(0, (len(views), len(x))), self.mean_logits)


class _Gate(Look):
    """A look of the gate's: through the original encoder where the model was fine-tuned."""


class Undefended(Served):
    """The model's own prediction."""

    name, Config = "none", NoneConfig
    source = "the model itself"


class RandomNoise(Served):
    """Uniform noise: TTC with no step."""

    name, Config = "rn", RNConfig
    source = "control of arXiv 2503.03613"


class Views(Served):
    """SCC's views averaged, without a perturbation."""

    name, Config = "views", ViewsConfig
    source = "control: SCC without its perturbation"


class TTC(Served):
    """Test-time counterattack."""

    name, Config = "ttc", TTCConfig
    source = "arXiv 2503.03613"


class SCC(Served):
    """Self-calibrated consistency."""

    name, Config = "scc", SCCConfig
    source = "arXiv 2510.22785"
