"""The methods of METHOD.md: no defense, random noise, SCC's views, TTC and SCC.

Each follows scc_fast/reference step by step, without shared code.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import (
    IDENTITY,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    ViewsConfig,
    resolve_views,
)
from scc_fast.engine.batch import Batch, Views
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.plan import Plan, ascent_plan, single_pass
from scc_fast.engine.session import Session, unmarked
from scc_fast.reference import baselines, heads, step
from scc_fast.reference.scc import scc
from scc_fast.reference.ttc import Outcome, ttc


class OnViews(Defense):
    """Base of the methods of METHOD.md, which use views of the image."""

    source: ClassVar[str]
    captures, uncaptured = True, ""

    def views(self, session: Session, size: int) -> tuple[View, ...]:
        """Views to average, for images with a shorter side of `size` pixels."""
        return (IDENTITY,)

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        views, x = self.views(session, min(batch.size)), batch.x
        # Clamp with an identity gradient: clamp() has none at 0 and 1.
        inside = x + (x.clamp(0, 1) - x).detach()
        seen = ops.make_views(
            inside, None, batch.seeds, views, fill=session.mean, backend=session.backend
        )
        return seen.unflatten(0, (len(views), len(x)))

    def width(self, session: Session, size: tuple[int, int]) -> int:
        return len(self.views(session, min(size)))

    def plan(self, session: Session, size: tuple[int, int]) -> Plan:
        return single_pass(self.name, self.width(session, size))

    def traits(self, session: Session) -> Traits:
        plan = self.plan(session, session.size)
        views = self.views(session, min(session.size))
        return Traits(
            forward=plan.forward,
            backward=plan.backward,
            random=any(view.noise > 0 for view in views),
            dynamic=False,
            text=False,
            gradients=False,
            source=self.source,
        )

    def _over(self, session: Session, batch: Batch) -> Views:
        return session.views(batch, self.views(session, min(batch.size)))


class Undefended(OnViews):
    """Undefended model."""

    name, Config, source = "none", NoneConfig, "the model itself"
    repairs: Literal["none"] = "none"

    def first_pass(self, session: Session, batch: Batch) -> State:
        views = self._over(session, batch)
        return State(no_drift(batch), logits=views.logits(views.forward(None)))

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        return baselines.none(session.reference, batch.x, batch.seeds)


class RandomNoise(OnViews):
    """Uniform noise: TTC with no step."""

    name, Config, source = "rn", RNConfig, "control of arXiv 2503.03613"
    repairs: Literal["none"] = "none"

    def first_pass(self, session: Session, batch: Batch) -> State:
        views = self._over(session, batch)
        delta = views.start(self.config.epsilon)
        return State(no_drift(batch), logits=views.logits(views.forward(delta)), delta=delta)

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        return baselines.rn(session.reference, batch.x, batch.seeds, self.config)

    def traits(self, session: Session) -> Traits:
        return replace(super().traits(session), random=True)


class SpatialViews(OnViews):
    """SCC's views averaged, without a perturbation."""

    name, Config, source = "views", ViewsConfig, "control: SCC without its perturbation"
    repairs: Literal["none"] = "none"

    def views(self, session: Session, size: int) -> tuple[View, ...]:
        return chosen_views(self.config, session, size)

    def first_pass(self, session: Session, batch: Batch) -> State:
        views = self._over(session, batch)
        logits = views.logits(views.forward(None), self.config.strength)
        return State(no_drift(batch), logits=logits)

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        views, strength = self.views(session, min(batch.size)), self.config.strength
        return baselines.views(session.reference, batch.x, batch.seeds, views, strength)


class Ascent(OnViews):
    """Base of TTC and SCC: gated gradient ascent.

    Clean images keep δ⁰, whose first pass is their prediction.
    """

    has_gate = judged = True
    semantic_steps = 0  # S
    strength = 1.0  # c of the last mean

    @property
    def repairs(self) -> Literal["flagged", "all"]:
        return "flagged" if self.has_gate else "all"

    @property
    def warmup_steps(self) -> int:
        """N, steps on the drift."""
        return self.config.steps

    def first_pass(self, session: Session, batch: Batch) -> State:
        """Steps 1 and 2 of TTC, with the drift averaged over views (step 1 of SCC)."""
        views = self._over(session, batch)
        delta = views.start(self.config.epsilon)
        features, anchor, backward = views.vjp(delta, anchor=True)
        assert anchor is not None
        drift, slope = views.drift(features, anchor)
        if self.has_gate and session.judge is not None:
            # The gate of a fine-tuned encoder uses the original encoder (TTC).
            x = batch.x
            moved = x + ((x + delta).clamp(0, 1) - x).detach()
            judge = session.judge.encode
            drift = heads.relative_drift(judge(moved), judge(x))
        return State(
            drift,
            margin=self.config.tau - drift if self.has_gate else None,
            logits=views.logits(features, self.strength) if self.has_gate else None,
            delta=delta,
            rows={"anchor": anchor},
            views={"features": features, "slope": slope},
            backward=backward,
        )

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        config, views = self.config, self._over(session, batch)
        assert state.delta is not None
        delta, anchor = state.delta.clone(), state.rows["anchor"]
        features, backward = state.views["features"], state.backward
        if backward is None:  # the first pass's state cannot be indexed
            features, backward = self._again(session, batch, delta)
        steps, taken = self.warmup_steps, 0
        with torch.device("cpu"):  # on the host, whatever the default device
            weights = step.iterate_weights(steps, config.beta).tolist()
        slope, weighted = state.views["slope"], weights[0] * delta
        for weight in weights[1:]:
            if taken:
                del features, backward
                features, _, backward = views.vjp(delta)
                _, slope = views.drift(features, anchor)
            gradient = views.pull(backward, slope)
            delta, weighted = views.step(delta, gradient, config, weighted, weight)
            taken += 1
        delta = weighted if steps else delta

        for s in range(self.semantic_steps):
            if taken:
                del features, backward
                features, _, backward = views.vjp(delta)
            if s == 0:
                label, soft = views.pseudo_label(features, config.temperature)
            gradient = views.pull(backward, views.margin(features, soft, label))
            delta, _ = views.step(delta, gradient, config)
            taken += 1
        return Repaired(views.answer(delta, None if taken else features, self.strength), delta)

    def _again(self, session: Session, batch: Batch, delta: Tensor) -> tuple[Tensor, Any]:
        features, _, backward = self._over(replace(session, mark=unmarked), batch).vjp(delta)
        session.mark("forward")  # of the previous pass
        return features, backward

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        if session.judge is None or not self.has_gate:
            return self._plain_reference(session, batch, self.config)
        x, seeds, config = batch.x, batch.seeds, self.config
        with torch.no_grad():
            moved = x + step.initial_delta(x, seeds, config.epsilon)
            drift = heads.relative_drift(session.judge.encode(moved), session.judge.encode(x))
        flagged = drift < config.tau
        logits = x.new_zeros(len(x), len(session.classes.text))
        delta = torch.zeros_like(x)
        for rows, tau in ((flagged, math.inf), (~flagged, 0.0)):
            if rows.any():
                found = self._plain_reference(session, batch.rows(rows), replace(config, tau=tau))
                logits = logits.index_put((rows,), found.logits)
                delta = delta.index_put((rows,), found.delta)
        return Outcome(logits, delta, drift, flagged)

    @abstractmethod
    def _plain_reference(self, session: Session, batch: Batch, config: Any) -> Outcome:
        """Run scc_fast.reference, whose gate uses the session's own encoder."""

    def plan(self, session: Session, size: tuple[int, int]) -> Plan:
        views = self.width(session, size)
        return ascent_plan(self.name, views, self.warmup_steps, self.semantic_steps, self.has_gate)

    def traits(self, session: Session) -> Traits:
        found = super().traits(session)
        judged = self.has_gate and session.judge is not None
        return replace(
            found,
            forward=found.forward + 2 * judged,
            random=True,
            dynamic=True,
            text=self.semantic_steps > 0,
            gradients=True,
        )


class TTC(Ascent):
    """Test-time counterattack."""

    name, Config, source = "ttc", TTCConfig, "arXiv 2503.03613"
    config: TTCConfig

    def _plain_reference(self, session: Session, batch: Batch, config: Any) -> Outcome:
        return ttc(session.reference, batch.x, batch.seeds, config)


class SCC(Ascent):
    """Self-calibrated consistency."""

    name, Config, source = "scc", SCCConfig, "arXiv 2510.22785"
    config: SCCConfig

    def __init__(self, config: SCCConfig) -> None:
        super().__init__(config)
        self.has_gate = self.judged = config.gate
        self.semantic_steps = config.semantic_steps if config.semantic else 0
        self.strength = config.strength

    @property
    def warmup_steps(self) -> int:
        return self.config.warmup_steps

    def views(self, session: Session, size: int) -> tuple[View, ...]:
        return chosen_views(self.config, session, size) if self.config.spatial else (IDENTITY,)

    @property
    def guess(self) -> Defense | None:
        """Defense that answers at x_w, the image after the warm-up (step 2 of SCC)."""
        return SCC(replace(self.config, semantic=False)) if self.config.semantic else None

    def _plain_reference(self, session: Session, batch: Batch, config: Any) -> Outcome:
        views = self.views(session, min(batch.size))
        return scc(session.reference, batch.x, batch.seeds, views, config)

    def traits(self, session: Session) -> Traits:
        return replace(super().traits(session), text=self.config.semantic)


def chosen_views(config: Any, session: Session, size: int) -> tuple[View, ...]:
    """Views of a config, for images with a shorter side of `size` pixels."""
    flip = session.flip if config.flip is None else config.flip
    return resolve_views(config.views, size, flip=flip, sigma=getattr(config, "sigma", 0.0))


def no_drift(batch: Batch) -> Tensor:
    """Drift of a method without a gate: NaN (B,)."""
    return batch.x.new_full((len(batch),), torch.nan)
