"""Names are spelt exactly so: a near miss is refused with the nearest, wherever it is given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import scc_fast
from scc_fast import _devices, cli
from scc_fast.attacks import parse_attack
from scc_fast.config import SCCConfig, nearest, one_of
from scc_fast.defenses import parse_defense
from scc_fast.evaluate.data.catalogue import find
from scc_fast.evaluate.data.protocol import find_protocol
from scc_fast.models import load_model


def test_nearest() -> None:
    choices = ("scc", "ttc", "r_tpt")
    assert nearest("SCC ", choices) == "; did you mean 'scc'?"
    assert nearest("R-TPT", choices) == "; did you mean 'r_tpt'?"
    assert nearest("xyz", choices) == nearest(None, choices) == nearest(3, choices) == ""
    assert nearest("tc", choices, 2) == "; did you mean 'ttc'?"
    with pytest.raises(ValueError, match=r"method must be one of a, b; got 'x{76}\.\.\.$"):
        one_of("method", "x" * 1000, ("a", "b"))
    assert one_of("method", "a", ("a", "b")) == "a"


def defended(**options: Any) -> Any:
    return lambda: scc_fast.Defender(load_model("tiny", device="cpu"), ["a", "b"], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (defended(method="SCC"), "method .*got 'SCC'; did you mean 'scc'"),
        (defended(engine="eagre"), "engine .*did you mean 'eager'"),
        (defended(backend="refrence"), "backend .*did you mean 'reference'"),
        (defended(precision="BF16"), "precision .*did you mean 'bf16'"),
        (lambda: load_model("tiny", precision="pf32"), "precision.*did you mean 'fp32'"),
        (lambda: SCCConfig.from_dict({"epsilom": 0}), "'epsilom'; .*did you mean 'epsilon'"),
        (lambda: SCCConfig(views="Paper"), "views .*got 'Paper'; did you mean 'paper'"),  # type: ignore[arg-type]
        (lambda: parse_defense("R-TPT:steps=1"), "defense .*did you mean 'r_tpt'"),
        (lambda: parse_attack("PGD10", 0.1), "attack .*got 'PGD10'; did you mean 'pgd'"),
        (lambda: parse_attack("pgd:stepz=1", 0.1), "'stepz' .*did you mean 'steps'"),
        (lambda: find("cifra10"), "dataset: 'cifra10' .*did you mean 'cifar10'"),
        (lambda: find_protocol("openclip"), "protocol: .*did you mean 'open_clip'"),
    ],
)
def test_near_misses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("defend x.png --method SCC", "'--method': .*'SCC'; did you mean 'scc'"),
        ("bench --engine grph", "'--engine': .*did you mean 'graph'"),
        ("bench --device CPU", "'--device': .*did you mean 'cpu'"),
        ("bench --precision fp61", "'--precision': .*did you mean 'fp16'"),
        ("doctor --plan ttcc", "'--plan': .*did you mean 'ttc'"),
        ("evaluate --engine rya", "--engine .*did you mean 'ray'"),
        ("evaluate --defense sccc", "defense .*did you mean 'scc'"),
        ("evaluate --attack adaptve", "attack .*did you mean 'adaptive'"),
        ("evaluate --attack pdg10", "attack .*did you mean 'pgd'"),
    ],
)
def test_near_misses_on_the_command_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("cdua", ValueError, "'cdua' .*available: cpu.*did you mean 'cuda'"),
        ("CPU", ValueError, "did you mean 'cpu'"),
        ("gpu", ValueError, "GPUs of NVIDIA and AMD are 'cuda'"),
        ("cuda:99", ValueError, "'cuda:99' asked for.*available: cpu"),
        ("cuda:x", ValueError, "'cuda:x' asked for.*available: cpu"),
        ("meta", ValueError, "'meta' asked for.*available: cpu"),
        (torch.device("meta"), ValueError, "'meta' asked for.*available: cpu"),
        ("", ValueError, "'' asked for.*available: cpu"),
        ("0", ValueError, "'0' asked for.*available: cpu"),
        (0, TypeError, "a name such as 'cpu' or 'cuda:0' is needed, got 0"),
        (["cpu"], TypeError, r"is needed, got \['cpu'\]"),
    ],
)
def test_devices_that_are_none(device: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^device: .*{message}"):
        load_model("tiny", device=device)


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (
        _devices.find("cuda:1") == _devices.find(torch.device("cuda:1")) == torch.device("cuda:1")
    )
    assert _devices.find("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"'cuda:2' .*available: cpu, cuda, cuda:0, cuda:1"):
        _devices.find("cuda:2")
    for kind in ("mps", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
        with pytest.raises(ValueError, match=f"torch sees no {kind.upper()} device"):
            _devices.find(kind)
