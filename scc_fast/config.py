"""Configurations of the methods: frozen, validated when made, to and from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

ViewPreset = Literal["geometric", "paper"]
C = TypeVar("C", bound="MethodConfig")


def shown(value: Any) -> str:
    """repr of a value for a message, cut to 80 characters; shape and type of an array."""
    try:
        if getattr(value, "shape", ()) and hasattr(value, "dtype"):
            return f"{type(value).__qualname__} of shape {tuple(value.shape)} and {value.dtype}"
        text = " ".join(repr(value).split("\n"))
    except Exception:  # a repr that fails, or a number of thousands of digits
        return f"an object of type {type(value).__qualname__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(value: object, choices: Iterable[str], most: int = 1) -> str:
    """What a message says of choices close to a value: "; did you mean 'scc'?", or ""."""
    if not isinstance(value, str):
        return ""
    spelled = {_letters(choice): choice for choice in choices}
    close = difflib.get_close_matches(_letters(value), spelled, most, 0.6)
    return f"; did you mean {' or '.join(repr(spelled[c]) for c in close)}?" if close else ""


def _letters(name: str) -> str:
    return re.sub(r"[\s_./-]", "", name.lower())


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """The value of an argument that is one of a few names, spelt exactly so.

    Raises:
        ValueError: it is none; lists them, and the nearest.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}; got {shown(value)}"
            f"{nearest(value, choices)}"
        )
    return value


def _check_number(name: str, value: Any, low: float, high: float, what: str = "") -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # NaN is not
        raise ValueError(
            f"{name} must be {what or f'a number in [{low:g}, {high:g}]'}, got {value!r}"
        )


@dataclass(frozen=True)
class View:
    """One view of an image: shift by whole pixels, then flip, then add noise and clamp.

    Args:
        flip: mirror left to right.
        shift: (down, right) in pixels; what is uncovered takes the normalisation mean.
        noise: standard deviation of Gaussian pixel noise, pixels in [0, 1].
    """

    flip: bool = False
    shift: tuple[int, int] = (0, 0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        shift = tuple(self.shift) if isinstance(self.shift, list | tuple) else ()
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip must be True or False, got {self.flip!r}")
        if len(shift) != 2 or not all(type(s) is int for s in shift):
            raise ValueError(f"shift must be two whole numbers of pixels, got {self.shift!r}")
        object.__setattr__(self, "shift", shift)
        _check_number("noise", self.noise, 0.0, 1.0)


IDENTITY = View()


def parse_epsilon(value: str | float) -> float:
    """A budget in pixel units from "4/255", "0.0157" or a number; ValueError outside [0, 1)."""
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f'epsilon must be a number such as "4/255", got {value!r}') from None
    if not 0 <= number < 1:
        raise ValueError(
            f"epsilon must be in [0, 1): pixels are in [0,1]; write 4/255, got {value}"
        )
    return number


def format_epsilon(value: float) -> str:
    """0.0157 as "4/255" where it is a multiple of 1/255, else as a decimal."""
    steps = value * 255
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-6 else f"{value:g}"


def resolve_views(
    views: ViewPreset | tuple[View, ...], size: int, *, flip: bool = True, sigma: float = 0.01
) -> tuple[View, ...]:
    """The list of views a preset stands for on images whose shorter side is `size` pixels."""
    if not isinstance(views, str):
        return views
    if views == "paper":
        noisy = View(noise=sigma)
        return (IDENTITY, View(flip=True), noisy, noisy) if flip else (IDENTITY, noisy, noisy)
    p = max(1, round(size / 32))
    if flip:
        return (IDENTITY, View(flip=True), View(shift=(p, p)), View(flip=True, shift=(-p, -p)))
    return (IDENTITY, View(shift=(p, p)), View(shift=(-p, -p)), View(shift=(p, -p)))


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1000:
        raise ValueError(f"{name} must be a whole number of steps in [0, 1000], got {value!r}")


@dataclass(frozen=True)
class MethodConfig:
    """What every method's configuration can do."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("epsilon", "alpha"):
                object.__setattr__(self, field.name, parse_budget(field.name, value))
            elif field.name.endswith("steps"):
                _check_count(field.name, value)
            elif field.name == "views":
                object.__setattr__(self, "views", _check_views(value))
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
            elif field.name == "flip" and not (value is None or isinstance(value, bool)):
                raise ValueError(f"flip must be True, False or None (ask the model), got {value!r}")
            elif field.name in _RANGES:
                _check_number(field.name, value, *_RANGES[field.name])

    def to_json(self) -> str:
        """All fields as one JSON object; from_json() makes an equal config of it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """The inverse of to_json(); unknown names are refused."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """A config from a plain dict; unknown names are refused."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is made from a JSON object, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{cls.__name__} has no field {shown(name)}; it has {', '.join(known)}"
                    f"{nearest(name, known)}"
                )
        return cls(**values)


_RANGES: dict[str, tuple[float, float]] = {
    "beta": (-100.0, 100.0),
    "tau": (0.0, math.inf),
    "sigma": (0.0, 1.0),
    "temperature": (1e-3, 1.0),
}


def parse_budget(name: str, value: Any) -> float:
    """parse_epsilon() for an argument of another name."""
    try:
        return parse_epsilon(value)
    except ValueError as error:
        raise ValueError(str(error).replace("epsilon", name, 1)) from None


def _check_views(value: Any) -> ViewPreset | tuple[View, ...]:
    if value in ("geometric", "paper"):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'views must be "geometric", "paper" or a list of View, got {shown(value)}'
            f"{nearest(value, ('geometric', 'paper'))}"
        )
    try:
        views = tuple(View(**view) if isinstance(view, dict) else view for view in value)
    except TypeError as error:
        raise ValueError(f"views: a View has flip, shift and noise; {error}") from None
    if not all(isinstance(view, View) for view in views):
        raise ValueError(f"views must hold View objects, got {value!r}")
    if views[0] != IDENTITY:
        raise ValueError(
            f"views must begin with the identity View(), which tau is read from, got {views[0]}"
        )
    return views


@dataclass(frozen=True)
class NoneConfig(MethodConfig):
    """No defense: the model's own prediction."""


@dataclass(frozen=True)
class RNConfig(MethodConfig):
    """Random noise, U(-epsilon, epsilon), one prediction.

    Args:
        epsilon: max |noise|, pixel units in [0, 1).
    """

    epsilon: float = 4 / 255


@dataclass(frozen=True)
class ViewsConfig(MethodConfig):
    """Logits averaged over SCC's views, no perturbation.

    Args:
        views: a preset or a list of views.
        sigma: noise of the "paper" preset's copies, pixels in [0, 1].
        flip: whether views may mirror; None asks the model.
    """

    views: ViewPreset | tuple[View, ...] = "geometric"
    sigma: float = 0.01
    flip: bool | None = None


@dataclass(frozen=True)
class TTCConfig(MethodConfig):
    """Test-time counterattack (arXiv 2503.03613); the defaults are the published ones.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1).
        steps: N, counterattack steps.
        beta: weight of iterate t is proportional to exp(beta t).
        tau: images whose drift is below it are taken as attacked.
    """

    epsilon: float = 4 / 255
    alpha: float = 1 / 255
    steps: int = 2
    beta: float = 2.0
    tau: float = 0.2


@dataclass(frozen=True)
class SCCConfig(MethodConfig):
    """Self-calibrated consistency (arXiv 2510.22785) as METHOD.md states it.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1).
        warmup_steps: N_w, steps of the view-averaged counterattack.
        beta: weight of warm-up iterate t is proportional to exp(beta t).
        tau: gate; an image with drift >= tau is taken as clean and left at its noise.
        views: "geometric", "paper" or a list of View that begins with the identity.
        sigma: noise of the "paper" preset's copies, pixels in [0, 1].
        temperature: T, sharpens the pseudo-label; in (0, 1].
        semantic_steps: S, ascent steps on the margin to the hardest negative.
        semantic, spatial, gate: switches; spatial=False uses the identity view alone.
        flip: whether views may mirror; None asks the model.
    """

    epsilon: float = 4 / 255
    alpha: float = 1 / 255
    warmup_steps: int = 2
    beta: float = 2.0
    tau: float = 0.2
    views: ViewPreset | tuple[View, ...] = "geometric"
    sigma: float = 0.01
    temperature: float = 0.5
    semantic_steps: int = 2
    semantic: bool = True
    spatial: bool = True
    gate: bool = True
    flip: bool | None = None


METHODS: dict[str, type[MethodConfig]] = {
    "scc": SCCConfig,
    "ttc": TTCConfig,
    "views": ViewsConfig,
    "rn": RNConfig,
    "none": NoneConfig,
}


def method_config(
    defaults: Mapping[str, dict[str, Any]],
    method: str,
    config: MethodConfig | dict[str, Any] | None,
    kind: type[MethodConfig] | None = None,
) -> MethodConfig:
    """The config of `method`, from an object, a dict or None, over a model's own defaults.

    `kind` is its class; None: that of Defender's methods.
    """
    kind = kind or METHODS[method]
    if isinstance(config, MethodConfig):
        if not isinstance(config, kind):
            raise TypeError(
                f"config must be a {kind.__name__} for method={method!r}, "
                f"got {type(config).__name__}"
            )
        return config
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"config must be a {kind.__name__}, a dict or None, got {config!r}")
    return kind.from_dict({**defaults.get(method, {}), **(config or {})})
