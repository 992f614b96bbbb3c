"""All defenses by name, and those that Defender serves; the encoder as autograd sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scc_fast import Defender, image_seeds
from scc_fast.api import make_defense
from scc_fast.defenses import DEFENSES, parse_defense
from scc_fast.engine.batch import Batch, Encode
from scc_fast.engine.drive import live
from scc_fast.reference import heads, step
from toys import FIVE, Tuned, defender_of, made, model_of, pictures

pytestmark = pytest.mark.slow  # together more than a minute

SEEDS = image_seeds(7, 3)


def test_every_method_of_the_tables_is_there() -> None:
    assert set(DEFENSES) == {
        "none", "rn", "views", "tte", "anti_adv", "hd", "ttc", "doc", "r_tpt", "scc", "csr", "dbd",
        "mac", "agc", "extrapolate",
    }  # fmt: skip
    assert all(kind.name == name for name, kind in DEFENSES.items())


def test_specs() -> None:
    assert parse_defense("scc") == ("scc", {})
    assert parse_defense("ttc:steps=5:tau=0.1:epsilon=4/255") == (
        "ttc", {"steps": 5, "tau": 0.1, "epsilon": "4/255"},
    )  # fmt: skip
    assert parse_defense('scc{"views": [{}, {"flip": true}], "gate": false}') == (
        "scc", {"views": [{}, {"flip": True}], "gate": False},
    )  # fmt: skip
    defense = made("scc:semantic=false:epsilon=8/255")
    assert (defense.config.semantic, defense.config.epsilon) == (False, 8 / 255)
    assert made("scc").config.temperature == model_of("tiny").defaults["scc"]["temperature"]
    assert made("ttc").config == DEFENSES["ttc"].Config()  # as published


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sccc", r"defense must be one of none, rn, .*; got 'sccc'"),
        ("scc:steps", r"'steps' must be FIELD=VALUE"),
        ("scc:=3", r"'=3' must be FIELD=VALUE"),
        ("scc{3}", r"is not JSON"),
        ("scc:taus=1", r"has no field 'taus'"),
        ("scc:epsilon=4", r"write 4/255"),
        ('scc:semantic=false{"gate": false}', r"either :FIELD=VALUE or in {…}, got both"),
        ("scc:tau=0.1:tau=0.9", r"tau is given twice"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(spec)


@pytest.mark.parametrize("method", DEFENSES)
def test_a_callers_autocast_changes_nothing(method: str) -> None:
    x, defense = pictures("tiny", 2), made(method)
    calm = defense.run(x, SEEDS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(defense.run(x, SEEDS[:2]).logits, calm.logits)


@pytest.mark.parametrize("method", ["none", "rn", "views", "ttc", "scc"])
def test_served_is_what_defender_gives(method: str) -> None:
    x = pictures("tiny", 3)
    defense = made(method)
    expected = defender_of("tiny", method=method)(x, SEEDS)
    found = defense(x, SEEDS)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.delta, expected.delta)
    assert found.method == method
    leaf = x.clone().requires_grad_()
    logits = defense.live(leaf, SEEDS).logits
    torch.testing.assert_close(logits.detach(), expected.logits, rtol=1e-4, atol=1e-3)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    assert gradient.isfinite().all()
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    plan = defender_of("tiny", method=method).plan()
    assert (defense.traits.forward, defense.traits.backward) == (plan.forward, plan.backward)
    assert defense.traits.dynamic == (method in ("ttc", "scc"))


def guessed(defender: Defender, x: Tensor) -> Tensor:
    """The logits that the pseudo-label is taken from."""
    guess = defender.defense.guess
    assert guess is not None
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        return live(defender.session, guess, Batch(leaf, SEEDS)).logits.detach()


def test_gate_and_guess_of_scc() -> None:
    x = pictures("tiny", 3)
    scc = made("scc")
    margin, result = scc.live(x, SEEDS).margin, scc(x, SEEDS)
    torch.testing.assert_close(margin, 0.2 - result.drift, rtol=1e-4, atol=1e-5)
    # The guess is read at x_w: SCC without its semantic step
    warm = made("scc:semantic=false")(x, SEEDS)
    torch.testing.assert_close(guessed(scc, x), warm.logits, rtol=1e-4, atol=1e-3)
    for spec in ("scc:gate=false", "none", "views"):
        assert made(spec).live(x, SEEDS).margin is None
        assert not made(spec).has_gate
    assert made("scc:semantic=false").defense.guess is None


@pytest.mark.parametrize("method", ["ttc", "scc"])
def test_a_fine_tuned_models_gate_is_the_original_encoders(method: str) -> None:
    model = Tuned(model_of("open_clip"))
    x = pictures("open_clip", 3)
    delta = step.initial_delta(x, SEEDS, 4 / 255)
    base = Defender(model.original, FIVE, method="none")
    drift = heads.relative_drift(base.encode(x + delta), base.encode(x))
    tau = float(drift.sort().values[1])  # one is flagged, and one lies on the threshold
    defense = make_defense(f"{method}:tau={tau!r}", model, FIVE, engine="eager")
    found = defense(x, SEEDS)
    torch.testing.assert_close(found.drift, drift, rtol=1e-3, atol=1e-6)
    for row in range(3):
        one, key = x[row : row + 1], SEEDS[row : row + 1]
        whole = {"tau": 1e9 if found.flagged[row] else 0.0}
        expected = Defender(model, FIVE, method=method, config=whole, engine="eager")(one, key)
        torch.testing.assert_close(found.logits[row], expected.logits[0], rtol=1e-4, atol=1e-3)
    assert 1 <= int(found.flagged.sum()) <= 2
    assert defense.traits.forward == Defender(model, FIVE, method=method).plan().forward + 2
    margin = defense.live(x, SEEDS).margin
    torch.testing.assert_close(margin, tau - found.drift, rtol=1e-3, atol=1e-6)
    if method == "scc":  # an attacker of the pseudo-label sees what that gate lets through
        tau *= 1 + 1e-4  # where no rounding decides
        target, warm = (
            make_defense(f"scc:tau={tau!r}:semantic={on}", model, FIVE, engine="eager")
            for on in ("true", "false")
        )
        torch.testing.assert_close(guessed(target, x), warm(x, SEEDS).logits, rtol=1e-4, atol=1e-3)


def test_max_batch_counts_views() -> None:
    x = pictures("tiny", 4)
    defense = made("scc", max_batch=8)
    assert [len(piece) for piece, _ in defense.pieces(x, image_seeds(0, 4))] == [2, 2]
    assert [len(piece) for piece, _ in made("dbd", max_batch=64).pieces(x, image_seeds(0, 4))] == [
        2,
        2,
    ]


@pytest.mark.parametrize("size", [(32, 32), (40, 27)])
@pytest.mark.parametrize("kind", ["open_clip", "hf_clip"])
def test_encode_is_the_models_own_with_its_gradient(kind: str, size: tuple[int, int]) -> None:
    bare = defender_of(kind, method="none")
    x = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(1))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    encode = Encode(bare.session, at_once=2)
    found, expected = encode(ours), bare.encode(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    weights[1] *= 1e-12  # each picture's own scale is kept
    (a,) = torch.autograd.grad((found * weights).sum(), ours)
    (b,) = torch.autograd.grad((expected * weights).sum(), theirs)
    for row in range(5):
        assert float((a - b)[row].abs().max()) <= 1e-4 * float(b[row].abs().max())
    with torch.no_grad():
        assert not encode(x).requires_grad
    assert not encode(x).requires_grad  # nothing asks for it


def test_a_second_derivative_is_refused() -> None:
    bare = defender_of("open_clip", method="none")
    x = pictures("open_clip", 1).requires_grad_()
    (slope,) = torch.autograd.grad(Encode(bare.session)(x).sum(), x, create_graph=True)
    assert not slope.requires_grad
    (slope,) = torch.autograd.grad(Encode(bare.session)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("method", sorted(DEFENSES))
def test_an_image_does_not_see_another(method: str) -> None:
    x = pictures("tiny", 3)
    defense = made(method)
    together = defense(x, SEEDS)
    for row in (0, 2):
        alone = defense(x[row : row + 1], SEEDS[row : row + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-3, atol=2e-2)
        assert alone.labels[0] == together.labels[row]
    again = defense(x, SEEDS)
    assert torch.equal(again.logits, together.logits)
    assert len(defense(x[:0])) == 0


@pytest.mark.parametrize("method", sorted(DEFENSES))
def test_an_attacker_gets_gradients(method: str) -> None:
    x = pictures("tiny", 1)
    defense = made(method)
    for look in (defense.live, defense.view_logits):
        leaf = x.clone().requires_grad_()
        found = look(leaf, SEEDS[:1])
        logits = found if isinstance(found, Tensor) else found.logits
        (gradient,) = torch.autograd.grad(logits[..., 0].sum(), leaf)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
