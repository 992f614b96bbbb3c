"""Configs of methods: frozen, validated, convertible to JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, TypeVar, cast

ViewPreset = Literal["geometric", "paper"]
C = TypeVar("C", bound="MethodConfig")


def shown(value: Any) -> str:
    """Short repr of a value for a message; shape and dtype of an array."""
    try:
        if getattr(value, "shape", ()) and hasattr(value, "dtype"):
            return f"{type(value).__qualname__} of shape {tuple(value.shape)} and {value.dtype}"
        text = " ".join(repr(value).split("\n"))
    except Exception:  # a failing repr, or an int with thousands of digits
        return f"an object of type {type(value).__qualname__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(value: object, choices: Iterable[str], most: int = 1) -> str:
    """Suggestion of close choices for a message: "; did you mean 'scc'?", or ""."""
    if not isinstance(value, str):
        return ""
    spelled = {_letters(choice): choice for choice in choices}
    close = difflib.get_close_matches(_letters(value), spelled, most, 0.6)
    return f"; did you mean {' or '.join(repr(spelled[c]) for c in close)}?" if close else ""


def _letters(name: str) -> str:
    return re.sub(r"[\s_./-]", "", name.lower())


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Check that a value is one of several names.

    Raises:
        ValueError: it is not; suggests the nearest.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}; got {shown(value)}"
            f"{nearest(value, choices)}"
        )
    return value


def python_number(value: Any) -> Any:
    """Convert a NumPy number or 0-d array or tensor to Python's; return others unchanged."""
    if type(value) in (bool, int, float, str):  # the usual case, and all that Dynamo can trace
        return value
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def within(name: str, value: Any, low: float, high: float) -> float:
    """Check that `value` is a number in [low, high]; returns Python's.

    Raises:
        ValueError: it is not.
    """
    number = python_number(value)
    good = isinstance(number, int | float) and not isinstance(number, bool)
    if not good or not low <= number <= high:  # false for NaN
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {shown(value)}")
    return number


def whole(name: str, value: Any, low: int, high: int | None = None, of: str = "") -> int:
    """Check that `value` is a whole number in [low, high], or >= low; returns Python's int.

    Raises:
        ValueError: it is not.
    """
    number = python_number(value)
    if type(number) is not int or number < low or (high is not None and number > high):
        wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be a whole number{of} {wanted}, got {shown(value)}")
    return number


@dataclass(frozen=True)
class View:
    """View of an image: shift by whole pixels, then flip, then add noise and clamp.

    Args:
        flip: mirror left to right.
        shift: (down, right) in whole pixels or, as fractions in (-1, 1), in shares of the shorter
            side, at least one pixel; uncovered pixels take the normalisation mean.
        noise: standard deviation of Gaussian pixel noise, pixels in [0, 1].
    """

    flip: bool = False
    shift: tuple[float, float] = (0, 0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        flip, shift = python_number(self.flip), self.shift
        if not isinstance(flip, bool):
            raise ValueError(f"flip must be True or False, got {shown(flip)}")
        pair = tuple(map(python_number, shift)) if isinstance(shift, list | tuple) else ()
        if len(pair) != 2 or not all(
            abs(s) < 1 if type(s) is float else type(s) is int and abs(s) <= _FARTHEST for s in pair
        ):
            raise ValueError(
                "shift must be two whole numbers of pixels in [-2^40, 2^40], or shares of the "
                f"shorter side in (-1, 1), got {shown(shift)}"
            )
        object.__setattr__(self, "flip", flip)
        object.__setattr__(self, "shift", pair)
        object.__setattr__(self, "noise", within("noise", self.noise, 0.0, 1.0))

    def at(self, size: int) -> View:
        """View for a shorter side of `size` pixels: shares become whole pixels, at least one."""
        if not any(isinstance(part, float) for part in self.shift):
            return self
        down, right = (
            int(math.copysign(max(1, round(abs(part) * size)), part))
            if isinstance(part, float) and part
            else int(part)
            for part in self.shift
        )
        return dataclasses.replace(self, shift=(down, right))


_FARTHEST = 2**40  # beyond any picture, within int64 index arithmetic
IDENTITY = View()


def parse_epsilon(value: Any) -> float:
    """Parse a budget in pixel units: "4/255", "0.0157" or a number; ValueError outside [0, 1)."""
    given, number = python_number(value), math.nan
    try:
        if isinstance(given, str):
            number = float(Fraction(given.replace(" ", "")))
        elif isinstance(given, Real) and not isinstance(given, bool):
            number = float(given)
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    if number != number:
        raise ValueError(f'epsilon must be a number such as "4/255", got {shown(value)}')
    if not 0 <= number < 1:
        raise ValueError(
            f"epsilon must be in [0, 1): pixels are in [0,1]; write 4/255, got {shown(value)}"
        )
    return number


def format_epsilon(value: float) -> str:
    """Budget as "4/255" if a multiple of 1/255, else as a decimal."""
    steps = value * 255
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-6 else f"{value:g}"


def resolve_views(
    views: ViewPreset | tuple[View, ...], size: int, *, flip: bool = True, sigma: float = 0.01
) -> tuple[View, ...]:
    """Views in whole pixels, for images with a shorter side of `size` pixels."""
    if not isinstance(views, str):
        whole = tuple(view.at(size) for view in views)
        return views if whole == views else whole
    if views == "paper":
        noisy = View(noise=sigma)
        return (IDENTITY, View(flip=True), noisy, noisy) if flip else (IDENTITY, noisy, noisy)
    p = max(1, round(size / 32))
    if flip:
        return (IDENTITY, View(flip=True), View(shift=(p, p)), View(flip=True, shift=(-p, -p)))
    return (IDENTITY, View(shift=(p, p)), View(shift=(-p, -p)), View(shift=(p, -p)))


@dataclass(frozen=True)
class MethodConfig:
    """Base of configs: validation and JSON."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = python_number(getattr(self, field.name))
            if field.name in ("epsilon", "alpha"):
                value = parse_budget(field.name, value)
            elif field.name.endswith("steps"):
                value = whole(field.name, value, 0, 1000, " of steps")
            elif field.name == "views":
                value = _check_views(value)
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False, got {shown(value)}")
            elif field.name == "flip" and not (value is None or isinstance(value, bool)):
                raise ValueError(
                    f"flip must be True, False or None (ask the model), got {shown(value)}"
                )
            elif field.name in _RANGES:
                value = within(field.name, value, *_RANGES[field.name])
            object.__setattr__(self, field.name, value)

    def to_json(self) -> str:
        """JSON object of all fields; inverse of from_json()."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Config from to_json(); ValueError for unknown fields."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Config from a dict; ValueError for unknown fields."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is made from a JSON object, got {shown(values)}")
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
    "strength": (0.0, 1e3),
}


def parse_budget(name: str, value: Any) -> float:
    """parse_epsilon() with another name in the message."""
    try:
        return parse_epsilon(value)
    except ValueError as error:
        raise ValueError(str(error).replace("epsilon", name, 1)) from None


def _check_views(value: Any) -> ViewPreset | tuple[View, ...]:
    if isinstance(value, str) and value in ("geometric", "paper"):
        return cast(ViewPreset, value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'views must be "geometric", "paper" or a list of View, got {shown(value)}'
            f"{nearest(value, ('geometric', 'paper'))}"
        )
    try:
        views = tuple(View(**view) if isinstance(view, dict) else view for view in value)
    except TypeError:
        raise ValueError(f"views: a View has flip, shift and noise, got {shown(value)}") from None
    if not all(isinstance(view, View) for view in views):
        raise ValueError(f"views must hold View objects, got {shown(value)}")
    if views[0] != IDENTITY:
        raise ValueError(
            "views must begin with the identity View(), which tau is read from, got "
            f"{shown(views[0])}"
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
        strength: c of ℓ_1 + c · (ℓ − ℓ_1), ℓ the mean of all views' logits, the first's ℓ_1
            among them; 1 is the mean.
    """

    views: ViewPreset | tuple[View, ...] = "geometric"
    sigma: float = 0.01
    flip: bool | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class TTCConfig(MethodConfig):
    """Test-time counterattack (arXiv 2503.03613); the defaults are the published ones.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1).
        steps: N, counterattack steps.
        beta: weight of iterate t is proportional to exp(beta t).
        tau: gate; an image with drift < tau counts as attacked.
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
        tau: gate; an image with drift >= tau counts as clean and keeps δ⁰.
        views: "geometric", "paper" or a list of View that begins with the identity.
        sigma: noise of the "paper" preset's copies, pixels in [0, 1].
        temperature: T, sharpens the pseudo-label; in (0, 1].
        semantic_steps: S, ascent steps on the margin to the hardest negative.
        semantic, spatial, gate: switches; spatial=False uses the identity view alone.
        flip: whether views may mirror; None asks the model.
        strength: c of the final logits, as ViewsConfig has it; 1 as published.
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
    strength: float = 1.0


def method_config(
    defaults: Mapping[str, dict[str, Any]],
    method: str,
    config: MethodConfig | dict[str, Any] | None,
    kind: type[MethodConfig],
) -> MethodConfig:
    """Config of `method` (class `kind`) from an object, a dict or None, over a model's defaults."""
    if isinstance(config, MethodConfig):
        if not isinstance(config, kind):
            raise TypeError(
                f"config must be a {kind.__name__} for method={method!r}, "
                f"got {type(config).__name__}"
            )
        return config
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"config must be a {kind.__name__}, a dict or None, got {shown(config)}")
    return kind.from_dict({**defaults.get(method, {}), **(config or {})})
