"""SCC, TTC and the controls on the ops, in the passes that plan.py lists.

The text follows scc_fast/reference step by step; what it shares with it are the ops' meaning and
nothing else. It runs without gradients: who differentiates takes the reference. `begin` and
`repair` branch on nothing that a tensor holds, so that graph.py can capture them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import IDENTITY, MethodConfig, RNConfig, SCCConfig, TTCConfig, View
from scc_fast.engine.encoder import Encoder, Modules, Runner, Way, not_served
from scc_fast.models import VisionLanguage
from scc_fast.reference import philox, step
from scc_fast.reference.ttc import Outcome
from scc_fast.reference.views import from_patches, preprocess, to_patches

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

Mark = Callable[[str], None]  # told the name of each part of a pass when it is done


def served_by(device: torch.device, backend: str | None) -> str:
    """The backends that serve a defense, joined by "+".

    Raises:
        ValueError, RuntimeError: an unknown backend, or one that lacks an op; says why.
    """
    return "+".join(sorted({ops.choose(op, device.type, backend) for op in OPS}))


def _unmarked(part: str) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method works with: the frozen encoder, the classes, and who serves the ops.

    Args:
        encoder: f.
        size: (height, width) of the encoder's pictures.
        mean, std: the model's normalisation.
        table: the classes.
        backend: who serves the ops; None: the best.
        modules: f by the model's modules, for where the runner cannot stand for them. It holds the
            model, with which encoders and their graphs are kept: a graph must not hold it.
        insists: the engine that was asked for by name.
        mark: told the parts of a pass.
    """

    encoder: Encoder
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    table: ops.ClassTable
    backend: str | None = None
    modules: Modules | None = None
    insists: str = ""
    mark: Mark = _unmarked

    def now(self) -> Setting:
        """This one, on the modules where something has changed that the runner does not see.

        Raises:
            RuntimeError: the runner was asked for by name; says what has changed.
        """
        reason = self.mistrust
        if not reason or self.modules is None:
            return self
        if self.insists:
            raise RuntimeError(not_served(self.modules.model, self.insists, reason))
        return replace(self, encoder=self.modules)

    @property
    def mistrust(self) -> str:
        """Why the runner does not stand for the modules any more; "" where it does, or is none."""
        if self.modules is None or not isinstance(self.encoder, Runner):
            return ""
        return self.encoder.trust.reason(self.modules.model)

    @classmethod
    def of(
        cls,
        model: VisionLanguage,
        encoder: Encoder,
        table: ops.ClassTable,
        backend: str | None,
        modules: Modules | None = None,
        insists: str = "",
    ) -> Setting:
        """That of a model, whose snapshot has `encoder` and `modules`."""
        height, width = model.image_size
        mean, std = (tuple(map(float, values)) for values in (model.mean, model.std))
        return cls(encoder, (height, width), mean, std, table, backend, modules, insists)


@dataclass(frozen=True, eq=False)
class Sight:
    """Images x (B, 3, H, W) in [0, 1] with seeds (B,) and their L views, for one setting."""

    setting: Setting
    x: Tensor
    seeds: Tensor
    views: Sequence[View]

    def rows(self, index: Tensor) -> Sight:
        """Some of the images."""
        return replace(self, x=self.x[index], seeds=self.seeds[index])

    def look(self, delta: Tensor | None) -> Tensor:
        """f of every view of x + δ, (L, B, D)."""
        pictures, _ = self._pictures(delta)
        self.setting.mark("views")
        features = self._stacked(self.setting.encoder.look(pictures))
        self.setting.mark("forward")
        return features

    def look_at(
        self, delta: Tensor | None, anchor: bool = False
    ) -> tuple[Tensor, Tensor | None, Way]:
        """As look; f(x) with them where `anchor` is asked for; and the way back to the views.

        The way takes ∂J/∂f (L·B, D) to what `step` takes.
        """
        pictures, undo = self._pictures(delta)
        beside = replace(self, views=(IDENTITY,))._pictures(None)[0] if anchor else None
        self.setting.mark("views")
        features, plain, way = self.setting.encoder.look_at(pictures, beside)
        self.setting.mark("forward")
        if undo is not None:
            whole = way.back
            way = Way(lambda slope: undo(whole(slope)))
        return self._stacked(features), plain, way

    def back(self, way: Way, slope: Tensor) -> Tensor:
        """The gradient that `step` takes, from ∂J/∂f (L, B, D)."""
        if self.setting.encoder.products == torch.float16:
            # Its sign is all that is asked, so an image's own power of two may lift it.
            largest = slope.abs().amax(dim=(0, 2), keepdim=True).clamp_min(1e-30)
            slope = slope * torch.exp2(-torch.floor(torch.log2(largest)))
        gradient = way.back(slope.flatten(0, 1))
        self.setting.mark("backward")
        return gradient

    def step(
        self,
        delta: Tensor,
        gradient: Tensor,
        config: TTCConfig | SCCConfig,
        weighted: Tensor | None = None,
        weight: float = 0.0,
    ) -> None:
        """δ moves in place along the sign of the gradient that its views have."""
        ops.pgd_step_(
            delta,
            gradient,
            self.x,
            self.seeds,
            self.views,
            alpha=config.alpha,
            epsilon=config.epsilon,
            weighted=weighted,
            weight=weight,
            patch=self.setting.encoder.patch if self.fits else 0,
            backend=self.setting.backend,
        )
        self.setting.mark("step")

    @property
    def fits(self) -> bool:
        """Whether the images have the encoder's size, so that nothing is resized."""
        return tuple(self.x.shape[-2:]) == self.setting.size

    def _stacked(self, features: Tensor) -> Tensor:
        return features.unflatten(0, (len(self.views), len(self.x)))

    def _pictures(self, delta: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The views of x + δ as the encoder takes them.

        And where they had to be resized, the map of a gradient back to them.
        """
        setting = self.setting
        encoder = setting.encoder
        options: dict[str, Any] = {"backend": setting.backend}
        if self.fits:
            options |= {"mean": setting.mean, "std": setting.std}
            options |= {"dtype": encoder.dtype, "patch": encoder.patch}
            return ops.make_views(self.x, delta, self.seeds, self.views, **options), None
        views = ops.make_views(self.x, delta, self.seeds, self.views, fill=setting.mean, **options)
        live = torch.is_grad_enabled()  # a caller who differentiates goes through the views
        with torch.enable_grad():
            leaf = views if live else views.requires_grad_()
            mean, std = (views.new_tensor(values) for values in (setting.mean, setting.std))
            sized = preprocess(leaf, setting.size, mean, std)
        pictures = sized if live else sized.detach()
        if encoder.patch:
            pictures = to_patches(pictures, encoder.patch)

        def undo(gradient: Tensor) -> Tensor:
            gradient = gradient.float()
            if encoder.patch:
                gradient = from_patches(gradient, encoder.patch, setting.size)
            return torch.autograd.grad(sized, leaf, gradient)[0]

        return pictures.to(encoder.dtype), undo


def initial_delta(sight: Sight, epsilon: float) -> Tensor:
    """δ⁰ = Π(uniform(−ε, ε)) from each image's own stream."""
    x = sight.x
    numel = x[0].numel()
    backend = sight.setting.backend
    uniform = ops.philox_uniform(sight.seeds, philox.DELTA, 0, numel, backend=backend)
    return step.project((2 * uniform.view_as(x) - 1) * epsilon, x, epsilon)


@dataclass(frozen=True, eq=False)
class Begun:
    """The first pass: what decides about an image, and what its repair goes on from.

    `features` (L, B, D) are those of the views of x + δ⁰, `anchor` f(x), `slope` their drift's.
    """

    delta: Tensor
    drift: Tensor
    features: Tensor
    anchor: Tensor
    slope: Tensor
    way: Way


def begin(sight: Sight, epsilon: float) -> Begun:
    """TTC's steps 1 and 2, with the drift averaged over the views (SCC's step 1)."""
    delta = initial_delta(sight, epsilon)
    features, anchor, way = sight.look_at(delta, anchor=True)
    assert anchor is not None
    drift, slope = ops.drift_head(features, anchor, backend=sight.setting.backend)
    sight.setting.mark("head")
    return Begun(delta, drift, features, anchor, slope, way)


def repair(sight: Sight, config: TTCConfig | SCCConfig, begun: Begun) -> tuple[Tensor, Tensor]:
    """The steps that the method takes, and its prediction: δ and logits of every image."""
    setting, backend = sight.setting, sight.setting.backend
    delta, features, way = begun.delta.clone(), begun.features, begun.way
    fresh = True  # whether features are those of δ

    def look() -> tuple[Tensor, Way]:
        if fresh:
            return features, way
        found, _, back = sight.look_at(delta)
        return found, back

    steps = config.warmup_steps if isinstance(config, SCCConfig) else config.steps
    with torch.device("cpu"):  # the host's numbers, whatever the default device is
        weights = step.iterate_weights(steps, config.beta).tolist()
    weighted = weights[0] * delta
    for t in range(steps):
        features, way = look()
        slope = begun.slope
        if t > 0:
            _, slope = ops.drift_head(features, begun.anchor, backend=backend)
            setting.mark("head")
        sight.step(delta, sight.back(way, slope), config, weighted, weights[t + 1])
        fresh = False
    delta = weighted if steps else delta

    for s in range(semantic_steps(config)):
        features, way = look()
        assert isinstance(config, SCCConfig)
        if s == 0:
            _, label, soft = ops.pseudo_label(
                features, setting.table, config.temperature, backend=backend
            )
        _, slope = ops.margin_head(features, soft, label, setting.table, backend=backend)
        setting.mark("head")
        sight.step(delta, sight.back(way, slope), config)
        fresh = False

    if not fresh:
        features = sight.look(delta)
    return delta, predict(sight, features)


def predict(sight: Sight, features: Tensor) -> Tensor:
    """Mean logits over the views, (B, K)."""
    logits = ops.mean_logits(features, sight.setting.table, backend=sight.setting.backend)
    sight.setting.mark("head")
    return logits


def semantic_steps(config: TTCConfig | SCCConfig) -> int:
    """S; none where they are switched off."""
    return config.semantic_steps if isinstance(config, SCCConfig) and config.semantic else 0


def has_gate(config: TTCConfig | SCCConfig) -> bool:
    """Whether an image with τ ≥ τ* is left at δ⁰."""
    return isinstance(config, TTCConfig) or config.gate


def ascent(sight: Sight, config: TTCConfig | SCCConfig) -> Outcome:
    """TTC (`sight` has the identity view alone) or SCC: METHOD.md's steps 1 to 5.

    The gate leaves images at δ⁰, whose first pass is their prediction; the others go on alone.
    """
    begun = begin(sight, config.epsilon)
    gate = has_gate(config)
    flagged = begun.drift < config.tau if gate else torch.ones_like(begun.drift, dtype=torch.bool)
    repaired = int(flagged.sum()) if gate else len(flagged)
    if repaired == len(flagged):
        delta, logits = repair(sight, config, begun)
        return Outcome(logits, delta, begun.drift, flagged)
    logits, delta = predict(sight, begun.features), begun.delta
    if repaired:
        index = flagged.nonzero().squeeze(1)
        some = sight.rows(index)
        mended, answer = repair(some, config, _rows(begun, some, index))
        delta = delta.index_copy(0, index, mended)
        logits = logits.index_copy(0, index, answer)
    return Outcome(logits, delta, begun.drift, flagged)


def _rows(begun: Begun, sight: Sight, index: Tensor) -> Begun:
    """Some of the images, which `sight` is of; a way that cannot be cut is made again."""
    delta, features = begun.delta[index], begun.features[:, index]
    views, batch = begun.features.shape[:2]
    pictures = torch.arange(views, device=index.device)[:, None] * batch + index
    way = begun.way.rows(pictures.flatten())
    if way is None:
        quiet = replace(sight, setting=replace(sight.setting, mark=_unmarked))
        features, _, way = quiet.look_at(delta)
        sight.setting.mark("forward")  # of the pass before, still
    return Begun(
        delta, begun.drift[index], features, begun.anchor[index], begun.slope[:, index], way
    )


def control(sight: Sight, config: RNConfig | None) -> Outcome:
    """No defense, or views alone (config None), or uniform noise."""
    delta = None if config is None else initial_delta(sight, config.epsilon)
    logits = predict(sight, sight.look(delta))
    drift = logits.new_full((len(logits),), torch.nan)
    flagged = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return Outcome(logits, torch.zeros_like(sight.x) if delta is None else delta, drift, flagged)


def run(sight: Sight, config: MethodConfig) -> Outcome:
    """The method of a config."""
    if isinstance(config, SCCConfig | TTCConfig):
        return ascent(sight, config)
    return control(sight, config if isinstance(config, RNConfig) else None)
