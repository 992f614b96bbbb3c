"""SCC, TTC and the controls on the ops, one call after the other.

The text follows scc_fast/reference step by step; what it shares with it are the ops' meaning and
nothing else. It runs without gradients: who differentiates takes the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import IDENTITY, RNConfig, SCCConfig, TTCConfig, View
from scc_fast.engine.vit import Tower, tower_of
from scc_fast.models import VisionLanguage
from scc_fast.reference import philox, step
from scc_fast.reference.ttc import Outcome
from scc_fast.reference.views import preprocess

# What a whole defense needs.
OPS = (
    "philox_uniform",
    "make_views",
    "make_views_adjoint",
    "pgd_step_",
    "drift_head",
    "pseudo_label",
    "margin_head",
    "mean_logits",
)


def served_by(device: torch.device, backend: str | None) -> str:
    """The backends that serve a defense, joined by "+".

    Raises:
        ValueError, RuntimeError: an unknown backend, or one that lacks an op; says why.
    """
    return "+".join(sorted({ops.choose(op, device.type, backend) for op in OPS}))


def runner_of(model: VisionLanguage, engine: str, backend: str) -> Tower | None:
    """Our runner for the model's encoder; None where its own modules serve it.

    Raises:
        RuntimeError: an engine asked for by name cannot serve this model; says why.
    """
    if engine == "eager":
        return None
    if engine not in ("auto", "runner"):
        found: Tower | str = "it is not written yet"
    elif backend == "reference":
        found = "the runner works with the ops, not with backend='reference'"
    elif model.device.type != "cpu":
        found = f"the runner is for CPUs so far, the model is on {model.device}"
    else:
        found = tower_of(model)
    if isinstance(found, Tower):
        return found
    if engine == "auto":
        return None
    raise RuntimeError(
        f"engine={engine!r} cannot serve {model.name} in this version: {found}; "
        f'use engine="eager" or "auto"'
    )


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method works with: the frozen encoder, the classes, and who serves the ops."""

    model: VisionLanguage
    table: ops.ClassTable
    mean: Tensor  # (3,), the model's normalisation, on its device
    std: Tensor
    backend: str | None = None
    tower: Tower | None = None  # our runner, where it serves the encoder


@dataclass(frozen=True, eq=False)
class Sight:
    """Images x (B, 3, H, W) in [0, 1] with seeds (B,) and their L views, for one setting."""

    setting: Setting
    x: Tensor
    seeds: Tensor
    views: Sequence[View]

    def rows(self, chosen: Tensor) -> Sight:
        """Some of the images."""
        return Sight(self.setting, self.x[chosen], self.seeds[chosen], self.views)

    def look(self, delta: Tensor | None) -> Tensor:
        """f of every view of x + δ, (L, B, D)."""
        if self.setting.tower is not None and self._fits():
            return self._stacked(self.setting.tower(self._rows(delta))[0])
        return self._encode(self._pixels(delta))

    def look_at(self, delta: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """As look; and the map from ∂J/∂f (L, B, D) to the gradient that pgd_step_ takes."""
        if self.setting.tower is not None and self._fits():
            tower = self.setting.tower
            features, kept = tower(self._rows(delta))
            return self._stacked(features), lambda slope: tower.back(slope.flatten(0, 1), kept)
        pixels = self._pixels(delta)
        with torch.enable_grad():
            graph = self._encode(pixels.requires_grad_())
        return graph.detach(), lambda slope: torch.autograd.grad(graph, pixels, slope)[0]

    @property
    def patch(self) -> int:
        """The layout of that gradient: 0 pictures, else rows of patches of this side."""
        tower = self.setting.tower
        return tower.size if tower is not None and self._fits() else 0

    def _fits(self) -> bool:
        height, width = self.setting.model.image_size
        return self.x.shape[-2:] == (height, width)

    def _stacked(self, features: Tensor) -> Tensor:
        return features.unflatten(0, (len(self.views), len(self.x)))

    def _views(self, delta: Tensor | None, **options: Any) -> Tensor:
        backend = self.setting.backend
        return ops.make_views(self.x, delta, self.seeds, self.views, backend=backend, **options)

    def _normalisation(self) -> dict[str, Any]:
        model = self.setting.model
        return {"mean": tuple(map(float, model.mean)), "std": tuple(map(float, model.std))}

    def _rows(self, delta: Tensor | None) -> Tensor:
        """The views of x + δ, normalised, as the patches that the runner multiplies."""
        return self._views(delta, patch=self.patch, **self._normalisation())

    def _pixels(self, delta: Tensor | None) -> Tensor:
        """The views of x + δ, (L·B, 3, h, w): normalised, unless they are to be resized first."""
        if not self._fits():
            return self._views(delta, fill=self._normalisation()["mean"])
        dtype = getattr(self.setting.model, "dtype", torch.float32)
        return self._views(delta, dtype=dtype, **self._normalisation())

    def _encode(self, pixels: Tensor) -> Tensor:
        """f of what `_pixels` gave, (L, B, D), by the model's own modules."""
        if not self._fits():
            height, width = self.setting.model.image_size
            pixels = preprocess(pixels, (height, width), self.setting.mean, self.setting.std)
        return self._stacked(self.setting.model.encode_image(pixels))


def initial_delta(sight: Sight, epsilon: float) -> Tensor:
    """δ⁰ = Π(uniform(−ε, ε)) from each image's own stream."""
    x = sight.x
    numel = x[0].numel()
    backend = sight.setting.backend
    uniform = ops.philox_uniform(sight.seeds, philox.DELTA, 0, numel, backend=backend)
    return step.project((2 * uniform.view_as(x) - 1) * epsilon, x, epsilon)


@dataclass(frozen=True, eq=False)
class Counterattack:
    """The warm-up's outcome; `features` are those of the views of x + δ⁰, (L, B, D)."""

    delta: Tensor
    drift: Tensor
    flagged: Tensor
    features: Tensor
    repaired: int  # how many are flagged; asked of the device once, and not at all without a gate


def counterattack(
    sight: Sight, config: TTCConfig | SCCConfig, steps: int, gate: bool
) -> Counterattack:
    """TTC's steps 1 to 4, with the drift averaged over the views (SCC's step 1)."""
    setting = sight.setting
    delta0 = initial_delta(sight, config.epsilon)
    anchor = Sight(setting, sight.x, sight.seeds, (IDENTITY,)).look(None)[0]
    features0, pull_back = sight.look_at(delta0)
    drift, gradient = ops.drift_head(features0, anchor, backend=setting.backend)
    flagged = drift < config.tau if gate else torch.ones_like(drift, dtype=torch.bool)
    repaired = int(flagged.sum()) if gate else len(flagged)
    if steps == 0 or not repaired:
        return Counterattack(delta0, drift, flagged, features0, repaired)

    ascent = pull_back(gradient)
    delta = delta0.clone()
    everything = repaired == len(flagged)
    if not everything:
        shape = (len(sight.views), len(sight.x))
        ascent = ascent.unflatten(0, shape)[:, flagged].flatten(0, 1)
        sight, anchor, delta = sight.rows(flagged), anchor[flagged], delta0[flagged]
    weights = step.iterate_weights(steps, config.beta).tolist()
    weighted = weights[0] * delta
    for t in range(steps):
        if t > 0:
            features, pull_back = sight.look_at(delta)
            _, gradient = ops.drift_head(features, anchor, backend=setting.backend)
            ascent = pull_back(gradient)
        take_step(sight, delta, ascent, config, weighted, weights[t + 1])
    whole = weighted if everything else delta0.index_put((flagged,), weighted)
    return Counterattack(whole, drift, flagged, features0, repaired)


def take_step(
    sight: Sight,
    delta: Tensor,
    ascent: Tensor,
    config: TTCConfig | SCCConfig,
    weighted: Tensor | None = None,
    weight: float = 0.0,
) -> None:
    """δ moves in place along the sign of the gradient that its views have."""
    ops.pgd_step_(
        delta,
        ascent,
        sight.x,
        sight.seeds,
        sight.views,
        alpha=config.alpha,
        epsilon=config.epsilon,
        weighted=weighted,
        weight=weight,
        patch=sight.patch,
        backend=sight.setting.backend,
    )


def semantic_steps(sight: Sight, delta: Tensor, config: SCCConfig) -> None:
    """S ascent steps, in place, on the margin between t_soft and the hardest negative."""
    setting, backend = sight.setting, sight.setting.backend
    for s in range(config.semantic_steps):
        features, pull_back = sight.look_at(delta)
        if s == 0:
            _, label, soft = ops.pseudo_label(
                features, setting.table, config.temperature, backend=backend
            )
        _, gradient = ops.margin_head(features, soft, label, setting.table, backend=backend)
        take_step(sight, delta, pull_back(gradient), config)


def predict(sight: Sight, warm: Counterattack, delta: Tensor) -> Outcome:
    """Mean logits over the views; images left at δ⁰ have had their forward pass."""
    table, backend = sight.setting.table, sight.setting.backend
    rows = warm.flagged
    if warm.repaired == len(rows):
        logits = ops.mean_logits(sight.look(delta), table, backend=backend)
        return Outcome(logits, delta, warm.drift, rows)
    logits = ops.mean_logits(warm.features, table, backend=backend)
    if warm.repaired:
        repaired = ops.mean_logits(sight.rows(rows).look(delta[rows]), table, backend=backend)
        logits = logits.index_put((rows,), repaired)
    return Outcome(logits, delta, warm.drift, rows)


def ttc(sight: Sight, config: TTCConfig) -> Outcome:
    """The test-time counterattack; `sight` has the identity view alone."""
    warm = counterattack(sight, config, config.steps, gate=True)
    return predict(sight, warm, warm.delta)


def scc(sight: Sight, config: SCCConfig) -> Outcome:
    """Self-calibrated consistency: METHOD.md's steps 1 to 5."""
    warm = counterattack(sight, config, config.warmup_steps, config.gate)
    delta, rows = warm.delta, warm.flagged
    if config.semantic and config.semantic_steps:
        if warm.repaired == len(rows):
            semantic_steps(sight, delta, config)
        elif warm.repaired:
            some = delta[rows]
            semantic_steps(sight.rows(rows), some, config)
            delta = delta.index_put((rows,), some)
    return predict(sight, warm, delta)


def control(sight: Sight, config: RNConfig | None) -> Outcome:
    """No defense, or views alone (config None), or uniform noise."""
    delta = None if config is None else initial_delta(sight, config.epsilon)
    logits = ops.mean_logits(sight.look(delta), sight.setting.table, backend=sight.setting.backend)
    drift = logits.new_full((len(logits),), torch.nan)
    flagged = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return Outcome(logits, torch.zeros_like(sight.x) if delta is None else delta, drift, flagged)
