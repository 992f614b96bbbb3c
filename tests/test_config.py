"""Configurations: what is refused and in which words, JSON, budgets and views."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from scc_fast.config import (
    IDENTITY,
    MethodConfig,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    ViewsConfig,
    format_epsilon,
    parse_epsilon,
)

ALL = (NoneConfig, RNConfig, ViewsConfig, TTCConfig, SCCConfig)
EVERY = pytest.mark.parametrize("kind", ALL)
VIEWS = (IDENTITY, View(flip=True, shift=(-2, 3)), View(noise=0.015))


def test_defaults_are_those_of_method_md() -> None:
    assert vars(SCCConfig()) == {
        "epsilon": 4 / 255,
        "alpha": 1 / 255,
        "warmup_steps": 2,
        "beta": 2.0,
        "tau": 0.2,
        "views": "geometric",
        "sigma": 0.01,
        "temperature": 0.5,
        "semantic_steps": 2,
        "semantic": True,
        "spatial": True,
        "gate": True,
        "flip": None,
        "strength": 1.0,
    }
    ttc = {"epsilon": 4 / 255, "alpha": 1 / 255, "steps": 2, "beta": 2.0, "tau": 0.2}
    assert vars(TTCConfig()) == ttc


REFUSED: list[tuple[type[MethodConfig], dict[str, Any], tuple[str, ...]]] = [
    (SCCConfig, {"epsilon": 4}, ("epsilon", "got 4", "4/255", "[0,1]")),
    (RNConfig, {"epsilon": 8}, ("epsilon", "got 8", "4/255")),
    (RNConfig, {"epsilon": "8"}, ("epsilon", "got '8'", "4/255")),
    (RNConfig, {"epsilon": "four"}, ("epsilon", "'four'", "4/255")),
    (RNConfig, {"epsilon": None}, ("epsilon", "None", "4/255")),
    (RNConfig, {"epsilon": float("nan")}, ("epsilon", "nan")),
    (RNConfig, {"epsilon": "4/0"}, ("epsilon", "'4/0'", "4/255")),
    (TTCConfig, {"alpha": -1 / 255}, ("alpha", "-0.0039", "[0, 1)")),
    (TTCConfig, {"alpha": 1}, ("alpha", "got 1", "4/255")),
    (TTCConfig, {"alpha": "x"}, ("alpha", "'x'")),
    (TTCConfig, {"steps": -1}, ("steps", "-1", "whole number")),
    (TTCConfig, {"steps": 2.5}, ("steps", "2.5", "whole number")),
    (TTCConfig, {"steps": 2.0}, ("steps", "2.0", "whole number")),
    (TTCConfig, {"steps": True}, ("steps", "True", "whole number")),
    (TTCConfig, {"steps": "2"}, ("steps", "'2'", "whole number")),
    (TTCConfig, {"steps": 1001}, ("steps", "1001", "1000")),
    (SCCConfig, {"warmup_steps": -1}, ("warmup_steps", "-1")),
    (SCCConfig, {"semantic_steps": 1.5}, ("semantic_steps", "1.5")),
    (SCCConfig, {"temperature": 0}, ("temperature", "got 0", "0.001")),
    (SCCConfig, {"temperature": 1.01}, ("temperature", "1.01", "1]")),
    (SCCConfig, {"temperature": False}, ("temperature", "False")),
    (SCCConfig, {"tau": -0.1}, ("tau", "-0.1")),
    (SCCConfig, {"tau": float("nan")}, ("tau", "nan")),
    (SCCConfig, {"beta": "2"}, ("beta", "'2'")),
    (SCCConfig, {"beta": float("inf")}, ("beta", "inf")),
    (ViewsConfig, {"sigma": -0.01}, ("sigma", "-0.01")),
    (SCCConfig, {"gate": 1}, ("gate", "got 1", "True or False")),
    (SCCConfig, {"semantic": None}, ("semantic", "None", "True or False")),
    (ViewsConfig, {"flip": "no"}, ("flip", "'no'", "None")),
    (SCCConfig, {"views": "fancy"}, ("views", "'fancy'", "geometric", "paper")),
    (SCCConfig, {"views": ()}, ("views", "()")),
    (SCCConfig, {"views": View()}, ("views", "list of View")),
    (SCCConfig, {"views": ["flip"]}, ("views", "View objects", "'flip'")),
    (ViewsConfig, {"views": [View(flip=True)]}, ("views", "identity", "flip=True")),
    (SCCConfig, {"views": [View(noise=0.1), View()]}, ("views", "identity", "noise=0.1")),
]


@pytest.mark.parametrize(("kind", "values", "words"), REFUSED)
def test_errors_name_the_field_the_value_and_the_fix(kind, values: dict, words) -> None:
    for make in (lambda: kind(**values), lambda: kind.from_dict(values)):
        with pytest.raises(ValueError, match=next(iter(values))) as error:
            make()
        for word in words:
            assert word in str(error.value)


@EVERY
def test_unknown_fields_are_refused(kind: type[MethodConfig]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} has no field 'epsilom'"):
        kind.from_dict({"epsilom": 0.01})
    with pytest.raises(ValueError, match="'epsilom'") as error:
        kind.from_json('{"epsilom": 0.01}')
    for field in dataclasses.fields(kind):
        assert field.name in str(error.value)
    with pytest.raises(TypeError):
        kind(epsilom=0.01)


@pytest.mark.parametrize(
    "config",
    [
        *(kind() for kind in ALL),
        RNConfig("7/255"),
        ViewsConfig(views=VIEWS, flip=False),
        TTCConfig(epsilon="8/255", alpha=0.1, steps=0, beta=-1, tau=float("inf")),
        SCCConfig(views=VIEWS, temperature=0.3, semantic=False, gate=False, flip=True),
        SCCConfig(views="paper", sigma=0.02, spatial=False, warmup_steps=0),
    ],
)
def test_json_round_trip(config: MethodConfig) -> None:
    text = config.to_json()
    again = type(config).from_json(text)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(config)}


def test_views_come_as_lists_and_dicts_too() -> None:
    config = SCCConfig(views=[{}, {"flip": True, "shift": [-2, 3]}, View(noise=0.015)])
    assert config.views == VIEWS
    assert isinstance(config.views, tuple)


@EVERY
def test_configs_are_frozen(kind: type[MethodConfig]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().epsilon = 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shift": 3}, ("shift", "3")),
        ({"shift": (1, 2, 3)}, ("shift", "(1, 2, 3)")),
        ({"shift": (1.5, 0)}, ("shift", "1.5", "whole")),
        ({"shift": "ab"}, ("shift", "'ab'")),
        ({"noise": -0.1}, ("noise", "-0.1")),
        ({"noise": 2}, ("noise", "2", "[0, 1]")),
        ({"noise": True}, ("noise", "True")),
    ],
)
def test_wrong_views(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        View(**values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4/255", 4 / 255),
        (" 4 / 255 ", 4 / 255),
        ("0.0157", 0.0157),
        ("1e-3", 0.001),
        ("0", 0.0),
        (0, 0.0),
        (0.5, 0.5),
        (254 / 255, 254 / 255),
    ],
)
def test_parse_epsilon(text: str | float, value: float) -> None:
    assert parse_epsilon(text) == value
    assert isinstance(parse_epsilon(text), float)
    assert TTCConfig(epsilon=text, alpha=text).alpha == value


@pytest.mark.parametrize("value", [1, 1.0, "255/255", -0.001, "-4/255", "4", 4.0])
def test_budgets_outside_the_range(value: str | float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\).*write 4/255, got"):
        parse_epsilon(value)


def test_format_epsilon() -> None:
    for steps in range(255):
        assert format_epsilon(steps / 255) == f"{steps}/255"
        assert parse_epsilon(format_epsilon(steps / 255)) == steps / 255
    assert format_epsilon(0.01) == "0.01"
    assert format_epsilon(0.5 / 255) == "0.00196078"


@pytest.mark.parametrize("value", ["1e400", 10**400])
def test_a_budget_beyond_floats_is_refused_like_any_other(value):
    with pytest.raises(ValueError, match="epsilon"):
        parse_epsilon(value)


def test_views_refuse_what_is_no_view():
    with pytest.raises(ValueError, match="flip"):
        View(flip="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="views"):
        SCCConfig.from_dict({"views": [{"fip": True}]})
    with pytest.raises(ValueError, match="JSON object"):
        SCCConfig.from_json("[]")
