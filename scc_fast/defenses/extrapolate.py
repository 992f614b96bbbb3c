"""View extrapolation: a correction in feature space, without a gradient (METHOD.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from scc_fast.config import MethodConfig, View, ViewPreset, one_of, shown, within
from scc_fast.defenses.scc import OnViews, chosen_views
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, State
from scc_fast.engine.plan import Plan, single_pass
from scc_fast.engine.session import Session
from scc_fast.reference.extrapolate import extrapolate
from scc_fast.reference.ttc import Outcome

LEAST_BETA = 0.45  # AGC's smallest β


@dataclass(frozen=True)
class ExtrapolateConfig(MethodConfig):
    """View extrapolation: z = u_1 + c · (mean of the views' unit features − u_1).

    Args:
        views: "geometric" or a list of View without noise that begins with the identity, at least
            three for "agreement", else two; shifts as shares of the side serve all sizes.
        strength: c of z = u_1 + c · (m − u_1), m the mean of the other views; with "geodesic"
            AGC's largest β.
        rule: "agreement": c where the views' drifts agree, else 1 (after DBD, arXiv 2606.06186);
            "constant": c for all; "geodesic": AGC's arc (arXiv 2605.15584).
        threshold: of "agreement": θ on the mean cosine of the drifts with their mean.
        slope: of "agreement": of a sigmoid instead of the switch; None: the switch.
        flip: whether views may mirror; None asks the model.
    """

    views: ViewPreset | tuple[View, ...] = "geometric"
    strength: float = 2.5
    rule: Literal["agreement", "constant", "geodesic"] = "agreement"
    threshold: float = 0.85
    slope: float | None = None
    flip: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rule", self.rule, ("agreement", "constant", "geodesic"))
        within("threshold", self.threshold, -1.0, 1.0)
        if self.slope is not None:
            object.__setattr__(self, "slope", within("slope", self.slope, 1e-3, 1e6))
        if self.rule == "geodesic":
            within("strength", self.strength, LEAST_BETA, 1e3)
        views = self.views
        if views == "paper" or (not isinstance(views, str) and any(v.noise > 0 for v in views)):
            raise ValueError(
                "views must be without noise: extrapolation follows where a picture's views moved, "
                f'got {shown(views)}; "geometric" is'
            )
        least = 3 if self.rule == "agreement" else 2  # one drift agrees with itself
        if len(views) < least:
            raise ValueError(
                f"views must be at least {least} for rule={self.rule!r}, got {shown(views)}"
            )


class Extrapolate(OnViews):
    """View extrapolation.

    One forward pass of L pictures, without noise, optimisation or perturbation: seeds have no
    effect, `images` is the input, `delta` is zero. `drift` is the mean cosine of a picture's
    features with its views'; `flagged`: the rule went beyond the mean. The gradient is exact:
    attacks need no BPDA.
    """

    name, Config, source = "extrapolate", ExtrapolateConfig, "METHOD.md, View extrapolation"
    repairs: Literal["none"] = "none"
    config: ExtrapolateConfig

    def __init__(self, config: ExtrapolateConfig) -> None:
        super().__init__(config)
        self.has_gate = config.rule == "agreement"
        geodesic = config.rule == "geodesic"
        low = {"agreement": 1.0, "constant": config.strength, "geodesic": LEAST_BETA}[config.rule]
        threshold = config.threshold if self.has_gate else math.inf
        self._rule = (low, config.strength, threshold)
        self._form = (math.inf if config.slope is None else config.slope, geodesic)

    def views(self, session: Session, size: int) -> tuple[View, ...]:
        return chosen_views(self.config, session, size)

    def first_pass(self, session: Session, batch: Batch) -> State:
        views = self._over(session, batch)
        logits, cosine, agreement = views.extrapolated(views.forward(None), self._rule, *self._form)
        margin = agreement - self.config.threshold if self.has_gate else None
        return State(cosine, margin=margin, logits=logits)

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        views = self.views(session, min(batch.size))
        low, high, threshold = self._rule
        slope, geodesic = self._form
        return extrapolate(
            session.reference,
            batch.x,
            batch.seeds,
            views,
            low=low,
            high=high,
            threshold=threshold,
            slope=slope,
            geodesic=geodesic,
        )

    @property
    def surrogates(self) -> tuple[Defense, ...]:
        """Of the switch: two sigmoids, and c for all; of every rule: the mean of the views.

        Those that equal the defense are left out: its own gradient is attacked already.
        """
        config = self.config
        constant = replace(config, rule="constant", slope=None)
        found = [replace(constant, strength=1.0)]
        if config.rule == "agreement" and config.strength != 1:
            found = [replace(config, slope=20.0), replace(config, slope=5.0), constant, *found]
            return tuple(Extrapolate(one) for one in found if one != config)
        is_mean = config.rule != "geodesic" and config.strength == 1
        return () if is_mean else tuple(map(Extrapolate, found))

    def plan(self, session: Session, size: tuple[int, int]) -> Plan:
        return single_pass(self.name, self.width(session, size), "view_weights, mean_logits")
