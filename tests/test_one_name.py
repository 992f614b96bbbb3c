"""One name, one method: Defender(method=n) is the evaluation's defense n."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import scc_fast
from scc_fast import DefendedCLIP, Defender, ViewsConfig, defenses, image_seeds, tiny
from scc_fast.api import make_defense
from scc_fast.cli import main
from scc_fast.defenses import DEFENSES, PLANNED
from scc_fast.evaluate import presets
from scc_fast.reference import heads, step
from toys import FIVE, Tuned, defender_of, made, model_of, pictures

KIND = "open_clip"
SEEDS = image_seeds(7, 3)
OTHERS = sorted(set(DEFENSES) - set(PLANNED))


def named(method: str, kind: str = KIND, **options: Any) -> Defender:
    return defender_of(kind, method=method, **{"config": {}, **options})


@pytest.mark.parametrize("method", DEFENSES)
def test_a_name_means_one_method(method: str) -> None:
    x = pictures(KIND, 3)
    defender, defense = named(method), made(method, KIND)
    ours, theirs = defender(x, SEEDS), defense(x, SEEDS)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.delta, theirs.delta)
    assert (ours.method, ours.engine, ours.backend) == (method, theirs.engine, theirs.backend)
    assert defender.config == defense.config
    assert defender.is_randomized == defense.traits.random
    assert len(defender(x[:0])) == 0
    if method != "r_tpt":  # which tunes prompts
        text = Defender(
            model_of(KIND), text_features=defender.text_features, method=method, config={}
        )
        torch.testing.assert_close(text(x, SEEDS).logits, ours.logits)


def test_the_command_line_takes_the_same_names(tmp_path: Path) -> None:
    picture, row = tiny.samples()[0], tmp_path / "row.json"
    labels = tiny.prompts()[:5]
    options = ["--labels", ",".join(labels), "--output", str(tmp_path), "--json", str(row)]
    with pytest.raises(SystemExit, match="0"):
        main(["defend", str(picture), *options, "--method", "tte", "--top", "1"])
    (found,) = json.loads(row.read_text())["rows"]
    want = make_defense("tte", model_of("tiny"), labels)(picture, 0)
    assert found["method"] == "tte"
    assert found["after"][0]["probability"] == pytest.approx(float(want.probs.max()), abs=1e-4)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize(
    "options",
    [{"engine": "eager"}, {"backend": "reference"}, {"max_batch": 1}],
    ids=str,
)
def test_options_reach_the_method(method: str, options: dict[str, Any]) -> None:
    x = pictures(KIND, 2)
    defender = named(method, **options)
    ours, theirs = defender(x, SEEDS[:2]), made(method, KIND, **options)(x, SEEDS[:2])
    assert torch.equal(ours.logits, theirs.logits)
    for name, value in options.items():
        assert getattr(defender, name) == value
    if "max_batch" in options:
        assert [len(piece) for piece, _ in defender.pieces(x, SEEDS[:2])] == [1, 1]


def test_configs_reach_the_method() -> None:
    x = pictures(KIND, 2)
    config = {"crops": 1, "flip": False}
    ours = named("tte", config=config)
    theirs = make_defense("tte:crops=1:flip=false", model_of(KIND), ours.classes)
    assert torch.equal(ours(x, 0).logits, theirs(x, 0).logits)
    assert not torch.equal(ours(x, 0).logits, named("tte")(x, 0).logits)
    assert named("tte", config=ours.config).config == ours.config
    with pytest.raises(ValueError, match=r"EnsembleConfig has no field 'epsilon'; it has crops"):
        named("tte", config={"epsilon": 0.1})
    with pytest.raises(TypeError, match=r"config must be a HDConfig for method='hd', got Views"):
        named("hd", config=ViewsConfig())


@pytest.mark.parametrize("gradient", ["through", "bpda", "identity"])
@pytest.mark.parametrize("method", DEFENSES)
def test_attackers_get_the_defended_logits_and_a_gradient(method: str, gradient: Any) -> None:
    x, defender = pictures(KIND, 1), named(method)
    robust = DefendedCLIP(defender, gradient=gradient, seed=3)
    leaf = x.clone().requires_grad_()
    logits = robust(leaf)
    torch.testing.assert_close(logits.detach(), robust(x), rtol=1e-3, atol=2e-2)
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    if gradient == "bpda":
        leaf = x.clone().requires_grad_()
        defense = made(method, KIND)
        want = defense.live(leaf, image_seeds(3, 1)).logits[:, 0].sum()
        (other,) = torch.autograd.grad(want, leaf)
        cosine = torch.nn.functional.cosine_similarity(slope.flatten(), other.flatten(), dim=0)
        assert cosine > 0.999


@pytest.mark.parametrize("method", OTHERS)
def test_what_has_no_plan_says_so(method: str) -> None:
    x, defender = pictures(KIND, 1), named(method)
    for call in (
        defender.plan,
        lambda: defender.views(64),
        lambda: defender.memory_estimate(1),
        lambda: defender.waterfall(x),
    ):
        with pytest.raises(RuntimeError, match=f"not available for method='{method}'.*ttc, scc"):
            call()
    assert defender.cost() == named("none").cost()
    assert defender.view_logits(x, SEEDS[:1]).shape[1:] == (1, len(defender.text_features))


def test_the_old_meaning_of_tte_is_told() -> None:
    with pytest.warns(DeprecationWarning, match='published TTE.*method="views"') as seen:
        named("tte", config=None)
    assert seen[0].filename.endswith("toys.py")  # where Defender was called
    for config in ({"views": "paper"}, ViewsConfig()):
        told = pytest.raises((TypeError, ValueError), match="EnsembleConfig")
        with pytest.warns(DeprecationWarning, match='method="views"'), told:
            named("tte", config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in DEFENSES:
            named(method)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("TTEConfig", ViewsConfig),
        ("recommended", presets.recommended),
        ("PRESETS", presets.PRESETS),
        ("Preset", presets.Preset),
    ],
)
def test_old_names_warn_for_one_release(old: str, new: Any) -> None:
    with pytest.warns(DeprecationWarning, match=rf"scc_fast\.{old} is scc_fast\..* now"):
        assert getattr(scc_fast, old) is new
    with pytest.warns(DeprecationWarning, match=r"scc_fast\.api\.make_defense"):
        assert defenses.make_defense is make_defense
    with pytest.warns(DeprecationWarning, match=r"Defender\(model, classes, method='doc'\)"):
        made = DEFENSES["doc"](model_of(KIND), FIVE, config={"steps": 2})
    assert isinstance(made, Defender)
    assert (made.method, made.config.steps) == ("doc", 2)
    with pytest.raises(AttributeError, match="no attribute 'TTTConfig'"):
        _ = scc_fast.TTTConfig


@pytest.mark.parametrize("method", ["ttc", "scc"])
def test_a_fine_tuned_models_gate_is_one_too(method: str) -> None:
    model, x = Tuned(model_of("open_clip")), pictures("open_clip", 3)
    base = Defender(model.original, FIVE, method="none")
    delta = step.initial_delta(x, SEEDS, 4 / 255)
    tau = float(heads.relative_drift(base.encode(x + delta), base.encode(x)).median())
    ours = Defender(model, FIVE, method=method, config={"tau": tau}, engine="eager")
    theirs = make_defense(f"{method}:tau={tau!r}", model, FIVE, engine="eager")
    found, want = ours(x, SEEDS), theirs(x, SEEDS)
    assert torch.equal(found.logits, want.logits)
    assert torch.equal(found.delta, want.delta)
    assert 1 <= int(found.flagged.sum()) <= 2
    leaf = x.clone().requires_grad_()
    live = ours.run(leaf, SEEDS)
    torch.testing.assert_close(live.logits.detach(), want.logits, rtol=1e-3, atol=2e-2)
    (slope,) = torch.autograd.grad(live.logits[:, 0].sum(), leaf)
    assert slope.flatten(1).abs().amax(dim=1).min() > 0


def test_a_models_own_defaults_hold_in_both() -> None:
    model = copy.copy(model_of(KIND))
    model.defaults = {"ttc": {"steps": 1}, "tte": {"crops": 2}}
    for method, field, value in (("ttc", "steps", 1), ("tte", "crops", 2)):
        for one in (
            Defender(model, FIVE, method=method, config={}),
            make_defense(method, model, FIVE),
        ):
            assert getattr(one.config, field) == value
