"""Arguments of another place or name, and NumPy's numbers where Python's are meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import scc_fast
from scc_fast import DefendedCLIP, Defender, View, defend
from scc_fast.api import make_defense
from scc_fast.attacks import ATTACKS
from scc_fast.config import MethodConfig, whole, within
from scc_fast.defenses import DEFENSES
from scc_fast.evaluate.presets import recommended
from toys import FIVE, model_of

X = torch.rand(1, 3, 32, 32)


def defender(*args: Any, **options: Any) -> Defender:
    return Defender(model_of("open_clip"), FIVE, *args, **options)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a field": (lambda: defender(epsilon=0.1), r'Defender.*config=\{"epsilon"'),
    "a field's other name": (lambda: defender(eps=0.1), r'config=\{"epsilon"'),
    "a field of another method": (lambda: defender(method="ttc", steps=2), r'config=\{"steps"'),
    "a field of r_tpt": (lambda: defender(view_count=3), r'config=\{"view_count"'),
    "views": (lambda: defender(views="paper"), r'config=\{"views"'),
    "device": (lambda: defender(device="cpu"), r"device= belongs to load_model\(\)"),
    "batch_size": (lambda: defender(batch_size=8), "it is called max_batch="),
    "a seed": (lambda: defender(seed=0), r"seeds= belongs to the call, defender\(images, ...\)"),
    "a misspelt name": (lambda: defender(metod="scc"), "did you mean 'method'"),
    "no known name": (lambda: defender(zzz=1), "it has model, classes, text_features, method"),
    "a method by position": (lambda: defender("ttc"), "model, classes by position.* method="),
    "a seed of a call": (lambda: defender()(X, seed=0), r"Defender.__call__.* called seeds="),
    "a field of a call": (lambda: defender()(X, tau=0), r'of Defender\(\): config=\{"tau"'),
    "a method of a call": (lambda: defender()(X, method="ttc"), r"belongs to Defender\(\)"),
    "no images": (lambda: defender()(), "Defender.__call__.*missing.*images"),
    "defend": (lambda: defend(X, model_of("open_clip"), FIVE, tau=0.1), r'config=\{"tau"'),
    "defend by position": (lambda: defend(X, "tiny", FIVE, "ttc"), "images, model, classes by"),
    "make_defense": (
        lambda: make_defense("scc", model_of("open_clip"), FIVE, epsilon=1),
        r'config=\{"epsilon"',
    ),
    "a model defended": (
        lambda: DefendedCLIP(model_of("open_clip")),
        "defender must be a Defender",
    ),
    "with classes": (lambda: DefendedCLIP(model_of("open_clip"), FIVE), "defender must be a Def"),
    "seeds of a module": (lambda: DefendedCLIP(defender(), seeds=0), "it is called seed="),
    "seeds of a module's call": (
        lambda: DefendedCLIP(defender())(X, seeds=0),
        r"forward.* seed= belongs to DefendedCLIP\(\)",
    ),
    "recommended": (lambda: recommended("tiny", FIVE, budget=3), "did you mean 'budget_ms'"),
    "an array for a choice": (lambda: defender(method=np.array(["scc", "ttc"])), "method must be"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_another_place(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert len(str(error.value)) < 300


def test_a_type_error_from_inside_is_not_touched() -> None:
    with pytest.raises(TypeError, match="seeds must be None"):
        defender()(X, 1.5)


# Numbers

CONFIGS = {kind.Config for kind in DEFENSES.values()}
SCALARS: dict[type, tuple[Callable[[Any], Any], ...]] = {
    bool: (np.bool_, torch.tensor),
    int: (np.int64, np.int32, np.int16, torch.tensor),
    float: (np.float64, np.float32, np.float16, torch.tensor),
}


def fields() -> list[tuple[type[Any], str, Any]]:
    """Every field of every config and attack that holds a number or a switch, with its default."""
    kinds = sorted({*CONFIGS, *ATTACKS.values()}, key=lambda kind: kind.__name__)
    plain = (bool, int, float)
    return [
        (kind, field.name, field.default)
        for kind in kinds
        for field in dataclasses.fields(kind)
        if isinstance(field.default, plain)
    ]


@pytest.mark.parametrize(("kind", "name", "default"), fields())
def test_numpy_s_numbers_are_python_s(kind: type[Any], name: str, default: Any) -> None:
    required = {"source": "tiny"} if kind.__name__ == "Transfer" else {}
    for scalar in SCALARS[type(default)]:
        value = scalar(default)
        made = kind(**{name: value}, **required)
        want = kind(**{name: value.item()}, **required)
        assert made == want
        assert repr(made) == repr(want)
        assert type(getattr(made, name)) in (bool, int, float)
        if isinstance(made, MethodConfig):
            assert made.to_json() == want.to_json()


def test_numbers_of_a_view() -> None:
    view = View(np.True_, (np.int64(1), np.int8(-2)), np.float32(0.5))  # type: ignore[arg-type]
    assert repr(view) == repr(View(True, (1, -2), 0.5))


def test_numbers_elsewhere() -> None:
    made = defender(max_batch=np.int64(8))
    assert type(made.max_batch) is int
    assert made.memory_estimate(np.int32(2), (np.int64(32), 32)) == made.memory_estimate(2)
    assert made.warmup(np.int64(1)) > 0
    assert made.plan((np.int64(32), np.int64(32))) == made.plan()
    x = torch.rand(2, 3, 32, 32)
    seeded = DefendedCLIP(made, seed=np.int64(3))
    assert torch.equal(seeded(x), DefendedCLIP(made, seed=3)(x))
    for wrong in (1.5, True, "1", [1], 1 << 64):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            DefendedCLIP(made, seed=wrong)  # type: ignore[arg-type]
    for wrong in (np.float64("nan"), 0, -1.0, True, "3"):
        with pytest.raises(ValueError, match="budget_ms must be milliseconds > 0"):
            recommended("tiny", FIVE, budget_ms=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        {"epsilon": "1" * 5000},
        {"epsilon": np.array([0.1, 0.2])},
        {"epsilon": False},
        {"tau": np.array([1.0, 2.0])},
        {"views": np.array([1, 2])},
        {"views": [{"shift": (2**63, 0)}]},
        {"views": [View(), {"shift": (0, -(2**63))}]},
        {"views": ["flip"] * 5000},
        {"views": [View(noise=0.5)] * 5000},
        {"beta": 10**400},
        {"warmup_steps": 10**5000},
        {"x" * 5000: 1},
        ["epsilon"] * 1000,
    ],
)
def test_extreme_settings_are_refused_in_few_words(config: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        defender(config=config)
    assert len(str(error.value)) < 400
    assert "truth value" not in str(error.value)


def test_a_shift_as_far_as_it_may_be_shows_nothing_of_the_picture() -> None:
    far = [View(), View(shift=(2**40, -(2**40)))]
    logits = {
        backend: defender(method="views", config={"views": far}, backend=backend)(X).logits
        for backend in ("auto", "reference")
    }
    torch.testing.assert_close(logits["auto"], logits["reference"], atol=1e-3, rtol=1e-4)


def test_checks_of_numbers() -> None:
    assert whole("n", np.uint8(3), 0) == 3
    assert within("n", torch.tensor(0.5), 0, 1) == 0.5
    for wrong in (2.0, True, "2", None, np.array([2]), -1, 6):
        with pytest.raises(ValueError, match=r"n must be a whole number of steps in \[0, 5\]"):
            whole("n", wrong, 0, 5, " of steps")
    for wrong in (float("nan"), True, "1", None, 1.5, 1j):
        with pytest.raises(ValueError, match=r"n must be a number in \[0, 1\]"):
            within("n", wrong, 0, 1)


def test_mean_of_a_model_is_not_repeated() -> None:
    for wrong in (list(range(5000)), "x" * 5000, 5):
        with pytest.raises((ValueError, TypeError), match=r"^mean: three") as error:
            scc_fast.load_model("tiny", mean=wrong)
        assert len(str(error.value)) < 300
