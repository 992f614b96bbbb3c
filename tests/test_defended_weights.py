"""A DefendedCLIP is one function, with gradients and without, whatever becomes of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from scc_fast import DefendedCLIP
from toys import defender_of, pictures


def robust_of(kind: str = "open_clip") -> DefendedCLIP:
    """One with a snapshot of its own, which a test may spoil."""
    return copy.deepcopy(DefendedCLIP(defender_of(kind, method="none"), "bpda", seed=0))


def answer(robust: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The logits, which are the same with gradients and without."""
    with torch.no_grad():
        logits = robust(x)
    live = robust(x.clone().requires_grad_())
    assert live.requires_grad
    torch.testing.assert_close(live.detach(), logits, atol=1e-3, rtol=1e-4)
    return logits


def linear(robust: nn.Module) -> nn.Linear:
    return next(m for m in robust.modules() if type(m) is nn.Linear)


def smaller(robust: nn.Module) -> dict[str, Tensor]:
    return {name: 0.8 * value for name, value in robust.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda robust: robust, nn.Sequential])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_other_weights_is_refused(wrap: Any, assign: bool) -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    expected, module = answer(robust, x), wrap(robust)
    with pytest.raises(ValueError, match=r"state_dict: encoder\.\w+ is not the Defender's"):
        module.load_state_dict(smaller(module), assign=assign)
    torch.testing.assert_close(answer(robust, x), expected)
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    torch.testing.assert_close(answer(robust, x), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "hf_siglip"])
def test_functional_call_counts(kind: str) -> None:
    robust, x = robust_of(kind), pictures(kind, 2)
    expected, other = answer(robust, x), smaller(robust)
    found = answer(lambda y: torch.func.functional_call(robust, other, (y,)), x)
    assert (found - expected).abs().max() > 0.01
    torch.testing.assert_close(answer(robust, x), expected, atol=1e-3, rtol=1e-4)


def _scaled(robust: DefendedCLIP) -> None:
    with torch.no_grad():
        for parameter in robust.parameters():
            parameter.mul_(0.8)


def _replaced(robust: DefendedCLIP) -> None:
    for parameter in robust.parameters():
        parameter.data = 0.8 * parameter.data


CHANGES: dict[str, Callable[[DefendedCLIP], Any]] = {
    "in place": _scaled,
    "data": _replaced,
    "pruned": lambda robust: prune.l1_unstructured(linear(robust), "weight", amount=0.9),
    "quantised": lambda robust: torch.ao.quantization.quantize_dynamic(
        robust.encoder, {nn.Linear}, inplace=True
    ),
    "hooked": lambda robust: linear(robust).register_forward_hook(lambda *call: 0.5 * call[-1]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_its_encoder_counts(change: str) -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    before = answer(robust, x)
    CHANGES[change](robust)
    assert (answer(robust, x) - before).abs().max() > 0.01
    untouched = DefendedCLIP(defender_of("open_clip", method="none"), "bpda", seed=0)
    torch.testing.assert_close(answer(untouched, x), before)
