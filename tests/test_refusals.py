"""Every refusal of Defender and DefendedCLIP names the argument and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from scc_fast import DefendedCLIP, Defender, RNConfig, TTCConfig
from toys import FIVE, defender_of, model_of

X = torch.full((2, 3, 32, 32), 0.5)


def _changed(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


IMAGES: list[tuple[Any, type[Exception], str]] = [
    (_changed(1.5), ValueError, r"images: values from 0.5 to 1.5, outside \[0, 1\]"),
    (_changed(-0.5), ValueError, r"images: values from -0.5 to 0.5.*is_normalized=True"),
    (X * 510, ValueError, r"images: values from 255 to 255.*divide by 255"),
    (_changed(float("nan")), ValueError, "images: NaN or infinity in 1 of 6144"),
    (_changed(float("inf")), ValueError, "images: NaN or infinity in 1 of 6144"),
    (X[:, :1], ValueError, r"images: 3 channels.*\(2, 1, 32, 32\)"),
    (torch.zeros(2, 4, 8, 8), ValueError, r"images: 3 channels.*\(2, 4, 8, 8\).*alpha"),
    (X.permute(0, 2, 3, 1), ValueError, r"images: .*\(2, 32, 32, 3\).*permute\(0, 3, 1, 2\)"),
    (X[0, 0], ValueError, r"images: .*2 dimensions"),
    (X[None], ValueError, r"images: .*5 dimensions"),
    (X[..., :0], ValueError, r"images: .*\(2, 3, 32, 0\)"),
    (X.long(), TypeError, "images: .*int64"),
    (X.numpy(), ValueError, r"images: .*\(2, 3, 32, 32\).*from_numpy"),
    (None, TypeError, "images: .*NoneType"),
    ([X[0], 3], TypeError, r"images\[1\]: .*int"),
    ([X[0], X[0, :, :5]], ValueError, r"images\[1\]: 5x32 pixels"),
]


@pytest.mark.parametrize(("images", "kind", "message"), IMAGES)
def test_refused_images(images: Any, kind: type[Exception], message: str) -> None:
    defender = defender_of("open_clip")
    with pytest.raises(kind, match=message):
        defender(images)
    message = message.replace("is_normalized=True", "clamp=True")  # its call has no is_normalized
    with pytest.raises(kind, match=message):
        DefendedCLIP(defender)(images)


SEEDS: list[tuple[Any, type[Exception], str]] = [
    (torch.tensor([1, 2, 3]), ValueError, r"seeds.*one whole number or 2.*\(3,\)"),
    (torch.tensor(1), ValueError, r"seeds.*one whole number or 2.*tensor\(1\)"),
    (torch.tensor([1.0, 2.0]), TypeError, "seeds.*whole number.*float32"),
    ("7", TypeError, "seeds.*'7'"),
    (1.5, TypeError, "seeds.*1.5"),
    (True, TypeError, "seeds.*True"),
    ([1, 2, 3], ValueError, r"seeds.*2, one per image.*\[1, 2, 3\], which holds 3"),
    ([1, 2.5], TypeError, r"seeds.*\[1, 2.5\]"),
    ([1, True], TypeError, r"seeds.*\[1, True\]"),
    ([1, 1 << 64], ValueError, "seeds.*64 bits.*18446744073709551616"),
]


@pytest.mark.parametrize(("seeds", "kind", "message"), SEEDS)
def test_refused_seeds(seeds: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        defender_of("open_clip")(X, seeds)


WIDE = torch.eye(24)  # the small open_clip model's D
ROW = torch.ones(3, 1)
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"classes": "a dog"}, TypeError, "classes.*'a dog'"),
    ({"classes": {"a", "b"}}, TypeError, "classes.*{'[ab]', '[ab]'}"),
    ({"classes": []}, ValueError, r"classes.*two.*\[\]"),
    ({"classes": ["a dog"]}, ValueError, r"classes.*two.*'a dog'"),
    ({"classes": ["a dog"] * 3}, ValueError, "classes.*two different.*'a dog'"),
    ({"classes": ["a dog", ""]}, ValueError, "classes.*non-empty.*''"),
    ({"classes": ["a dog", " "]}, ValueError, "classes.*non-empty.*' '"),
    ({"classes": ["a dog", 3]}, ValueError, "classes.*3"),
    ({"classes": None}, ValueError, "exactly one of classes= and text_features="),
    ({"text_features": WIDE}, ValueError, "exactly one of classes= and text_features="),
    ({"classes": None, "text_features": WIDE[:, :9]}, ValueError, r"text_features.*24.*\(24, 9\)"),
    ({"classes": None, "text_features": WIDE[0]}, ValueError, r"text_features.*24.*\(24,\)"),
    ({"classes": None, "text_features": [1.0]}, ValueError, r"text_features.*\[1.0\]"),
    ({"classes": None, "text_features": WIDE[:1]}, ValueError, "text_features.*two.*1"),
    ({"classes": None, "text_features": WIDE * torch.nan}, ValueError, r"text_features.*row 0"),
    (
        {"classes": None, "text_features": WIDE - ROW.new_ones(24, 1) * WIDE[1]},
        ValueError,
        r"text_features.*row 1",
    ),
    ({"method": "SCC"}, ValueError, "method.*none, rn, views, tte.*'SCC'"),
    ({"method": None}, ValueError, "method.*None"),
    ({"config": "scc"}, TypeError, "config.*SCCConfig.*'scc'"),
    ({"config": TTCConfig()}, TypeError, "config.*SCCConfig.*TTCConfig"),
    ({"method": "none", "config": RNConfig()}, TypeError, "config.*NoneConfig.*RNConfig"),
    ({"config": {"epsilom": 0.1}}, ValueError, "SCCConfig has no field 'epsilom'.*epsilon"),
    ({"config": {"epsilon": 4}}, ValueError, "epsilon.*4/255, got 4"),
    ({"config": {"epsilon": 1.0}}, ValueError, "epsilon.*4/255, got 1.0"),
    ({"config": {"epsilon": -0.1}}, ValueError, "epsilon.*-0.1"),
    ({"config": {"epsilon": float("nan")}}, ValueError, "epsilon.*nan"),
    ({"config": {"epsilon": None}}, ValueError, "epsilon.*None"),
    ({"config": {"alpha": 2}}, ValueError, "alpha.*got 2"),
    ({"config": {"semantic_steps": 1.5}}, ValueError, "semantic_steps.*1.5"),
    ({"config": {"temperature": 0}}, ValueError, "temperature.*0"),
    ({"config": {"gate": 1}}, ValueError, "gate.*1"),
    ({"config": {"views": []}}, ValueError, r"views.*\[\]"),
    ({"precision": "int8"}, ValueError, "precision.*fp32.*'int8'"),
    ({"backend": "cuda"}, ValueError, "backend.*reference.*'cuda'"),
    ({"backend": ""}, ValueError, "backend.*reference.*''"),
    ({"engine": "jit"}, ValueError, "engine.*eager.*'jit'"),
    ({"engine": None}, ValueError, "engine.*eager.*None"),
    (
        {"precision": "bf16", "backend": "reference"},
        RuntimeError,
        "precision='bf16' .*backend='reference'.*precision=\"fp32\"",
    ),
    (
        {"engine": "runner", "backend": "reference"},
        RuntimeError,
        "engine='runner' .*backend='reference'.*engine=\"eager\"",
    ),
    ({"engine": "graph"}, RuntimeError, "engine='graph'.*need a CUDA device.*on cpu"),
    ({"max_batch": 0}, ValueError, r"max_batch.*\[1, 2147483648\].*0"),
    ({"max_batch": 2.5}, ValueError, "max_batch.*2.5"),
    ({"max_batch": True}, ValueError, "max_batch.*True"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS)
def test_refused_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        Defender(model_of("open_clip"), **{"classes": FIVE, **options})
    assert re.search(message, str(caught.value)), str(caught.value)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match=r"model: .*int"):
        Defender(3, FIVE)
    with pytest.raises(ValueError, match=r"gradient.*through, bpda, identity.*'true'"):
        DefendedCLIP(defender_of("open_clip"), "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is_normalized.*uint8"):
        defender_of("open_clip")(X.to(torch.uint8), is_normalized=True)
    with pytest.raises(ValueError, match=r"outside \[0, 1\] after un-normalising"):
        defender_of("open_clip")(X * 9, is_normalized=True)
    auto = Defender(model_of("open_clip"), FIVE).backend
    assert Defender(model_of("open_clip"), FIVE, backend=None).backend == auto
