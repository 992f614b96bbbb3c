"""Ordinary damage in place of an attack: what each kind does, who gets which, and its rows."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from attack_toys import drawn, target_of
from runs import FOUR, run_in
from scc_fast import image_seeds
from scc_fast.attacks import Damaged, parse_attack
from scc_fast.attacks.damage import DAMAGES, kinds_of
from scc_fast.evaluate.results import tables
from scc_fast.evaluate.runner import STANDARDS, Asked
from scc_fast.evaluate.schema import misfits
from scc_fast.evaluate.worker import restored


def damaged(kind: str, x: Tensor, first: int = 0) -> Tensor:
    labels, seeds = torch.zeros(len(x)).long(), image_seeds(1, first + len(x))[first:]
    return Damaged(kind=kind).run(target_of(), x, labels, seeds)


# ---------------------------------------------------------------------------------- how it is asked


def test_names_and_the_way_back() -> None:
    for spec, title in {"damaged": "damaged", "damaged:kind=blur": "damaged (blur)"}.items():
        attack = parse_attack(spec, FOUR)
        assert (attack.title, attack.spec, attack.epsilon, attack.reach) == (title, spec, 0.0, 1.0)
        assert parse_attack(attack.spec, 1 / 255) == attack
        assert (attack.budgeted, attack.aware, attack.conclusive) == (False, False, False)
        kind = spec.partition("=")[2] or "any"
        assert attack.settings() == {"attack": "damaged", "kind": kind}
    assert parse_attack("pgd10", FOUR).reach == FOUR


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("damaged:kind=jpg50", "kind must be one of any, jpeg50.*'jpg50'.*mean 'jpeg50'"),
        ("damaged:kind=", "kind must be one of any, jpeg50.*got ''"),
        ("damaged:epsilon=4/255", "'damaged:epsilon=4/255': 'epsilon' must be one of kind$"),
        ("damaged10", "damaged has no steps; it has kind"),
    ],
)
def test_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_attack(spec, FOUR)


def test_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon must be 0: damaged has no budget; got 0\.5"):
        Damaged(epsilon=0.5)


# --------------------------------------------------------------------------------- what a kind does


@pytest.mark.parametrize(("kind", "quality"), [("jpeg50", 50), ("jpeg20", 20)])
def test_jpeg_is_pillows(kind: str, quality: int) -> None:
    x, _ = drawn(1)
    pixels = np.rint(255 * x[0].permute(1, 2, 0).numpy()).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).astype(np.float32) / 255
    np.testing.assert_array_equal(damaged(kind, x)[0].permute(1, 2, 0).numpy(), expected)
    assert 0.003 < np.abs(expected - pixels / 255.0).mean() < 0.1


def test_a_lower_quality_is_further_off() -> None:
    x, _ = drawn(4)
    fifty, twenty = ((damaged(kind, x) - x).abs().mean() for kind in ("jpeg50", "jpeg20"))
    assert twenty > 1.2 * fifty


@pytest.mark.parametrize(("kind", "sigma"), [("noise8", 8), ("noise16", 16)])
def test_noise_has_its_deviation_and_is_each_pictures_own(kind: str, sigma: int) -> None:
    x = torch.full((6, 3, 64, 64), 0.5)
    noise = 255 * (damaged(kind, x) - x)
    assert noise.std(dim=(1, 2, 3)) == pytest.approx([sigma] * 6, rel=0.03)
    assert noise.mean(dim=(1, 2, 3)).abs().max() < 0.05 * sigma
    # Normal: 68.3 % within one deviation, 95.4 % within two.
    within = [float((noise.abs() < d * sigma).float().mean()) for d in (1, 2)]
    assert within == pytest.approx([0.683, 0.954], abs=0.01)
    assert torch.corrcoef(noise.flatten(1)).triu(1).abs().max() < 0.05


def test_blur_is_a_gaussian_of_one_and_a_half_pixels() -> None:
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16, 16] = 1
    at = torch.arange(-5, 6).double()
    bell = torch.exp(-(at**2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    found = damaged("blur", x)[0]
    expected = (bell[:, None] * bell).float().expand(3, 11, 11)
    torch.testing.assert_close(found[:, 11:22, 11:22], expected, atol=1e-6, rtol=0)
    assert float(found.sum()) == pytest.approx(3, abs=1e-5)
    assert damaged("blur", torch.full((1, 3, 2, 40), 0.3)).numpy() == pytest.approx(0.3)


def test_half_the_resolution_has_no_finest_detail() -> None:
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    board = ((row + column) % 2).float().expand(1, 3, 32, 32)
    assert (damaged("half", board) - 0.5)[..., 4:-4, 4:-4].abs().max() < 1e-4
    slope = (column / 31).expand(1, 3, 32, 32)
    assert (damaged("half", slope) - slope)[..., 4:-4].abs().max() < 1e-3
    assert damaged("half", torch.rand(1, 3, 7, 5)).shape == (1, 3, 7, 5)


def test_dark_is_half_and_grey_is_luma() -> None:
    x, _ = drawn(2)
    assert torch.equal(damaged("dark", x), x / 2)
    grey = damaged("grey", x)
    assert torch.equal(grey, grey[:, :1].expand_as(grey))
    luma = 0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    torch.testing.assert_close(grey[:, 0], luma, atol=1e-6, rtol=0)


def test_rotation_is_fifteen_degrees_counter_clockwise() -> None:
    x = torch.zeros(1, 3, 65, 65)
    x[..., 31:34, 55:58] = 1  # 24 pixels to the right of the middle
    found = damaged("rotate", x)[0, 0]
    row, column = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    right = float((found * (column - 32)).sum() / found.sum())
    up = float((found * (32 - row)).sum() / found.sum())
    angle = np.deg2rad(15)
    assert (right, up) == pytest.approx((24 * np.cos(angle), 24 * np.sin(angle)), abs=0.1)
    corners = damaged("rotate", torch.ones(1, 3, 65, 65))[0, 0][[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------ who gets what


def test_shares_are_even_and_a_seed_decides() -> None:
    seeds = image_seeds(0, 9000)
    kinds = kinds_of(seeds)
    counts = Counter(kinds)
    assert set(counts) == set(DAMAGES)
    assert max(abs(count - 1000) for count in counts.values()) < 150  # five deviations: 149
    assert kinds_of(seeds[40:50]) == kinds[40:50]
    assert kinds_of(seeds.flip(0)) == kinds[::-1]
    assert kinds_of(image_seeds(1, 9000)) != kinds


def test_a_picture_has_its_damage_in_every_batch() -> None:
    x, labels = drawn(12)
    target, seeds, attack = target_of(), image_seeds(5, 12), parse_attack("damaged", FOUR)
    whole = attack.run(target, x, labels, seeds)
    assert (whole.dtype, whole.shape) == (torch.float32, x.shape)
    assert 0 <= whole.min() <= whole.max() <= 1
    assert torch.equal(whole, attack.run(target, x, labels, seeds))
    assert len(set(kinds_of(seeds))) >= 4
    for at, kind in enumerate(kinds_of(seeds)):
        one = slice(at, at + 1)
        alone = attack.run(target, x[one], labels[one], seeds[one])
        assert torch.equal(alone, whole[one])
        asked = Damaged(kind=kind).run(target, x[one], labels[one], seeds[one])
        assert torch.equal(asked, alone)
        assert not torch.equal(alone, x[one])
    empty = attack.run(target, x[:0], labels[:0], seeds[:0])
    assert (empty.shape, empty.dtype) == ((0, 3, 64, 64), torch.float32)


def test_the_callers_modes_do_not_reach_it() -> None:
    x, labels = drawn(9)
    seeds = torch.tensor([kinds_of(torch.arange(400)).index(kind) for kind in DAMAGES])
    attack = Damaged()
    expected = attack.run(target_of(), x, labels, seeds)
    for mode in (torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            found = attack.run(target_of(), x + 0, labels + 0, seeds + 0)
        assert torch.equal(found, expected)
        assert not found.is_inference()


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damage beside an attack of two budgets."""
    folder = tmp_path_factory.mktemp("damage")
    attacks = ("pgd1", "damaged", "damaged:kind=dark")
    run_in(folder).go(Asked(("none", "rn"), attacks, (1 / 255, FOUR), allow_weak=True))
    return folder


def test_it_is_made_once_and_named_without_a_budget(folder: Path) -> None:
    (run,) = folder.iterdir()
    assert {path.parent.name for path in run.glob("*/attack.json")} == {
        "clean", "damaged", "pgd1@1_255", "pgd1@4_255",
        *(path.name for path in run.glob("damaged_kind=dark-*")),
    }  # fmt: skip
    found = json.loads((run / "results.json").read_text())
    rows = [row for row in found["rows"] if row["attack"] == "damaged"]
    assert [(row["defense"], row["title"], row["eps"], row["n"]) for row in rows] == [
        ("none", "damaged", "0/255", 5),
        ("rn", "damaged", "0/255", 5),
    ]
    assert all(misfits(row) == [] for row in rows)
    assert rows[0]["attack_settings"] == {"attack": "damaged", "kind": "any"}
    kept = [image for image in found["images"] if image["attack"] == "damaged:kind=dark"]
    assert [image["eps"] for image in kept] == ["0/255"]


def test_what_is_kept_is_the_damaged_picture(folder: Path) -> None:
    run = run_in(folder)
    x, labels = run.worker.data.batch(0, 2)
    (file,) = folder.glob("*/damaged_kind=dark-*/images/shared/00000.safetensors")
    attack, delta = parse_attack("damaged:kind=dark", FOUR), load_file(file)["delta"]
    assert (restored(x, delta, attack, 0) - x / 2).abs().max() < 2.0**-11
    with pytest.raises(ValueError, match=r"kept of damaged \(dark\), batch 7: not within"):
        restored(x, delta.abs() + 1.01, attack, 7)
    attacked = Damaged().run(run.worker.defense("none"), x, labels, image_seeds(3 + (1 << 32), 2))
    (file,) = folder.glob("*/damaged/images/shared/00000.safetensors")
    kept = restored(x, load_file(file)["delta"], parse_attack("damaged", FOUR), 0)
    assert (kept - attacked).abs().max() < 2.0**-11


def test_it_is_in_no_worst_row(tmp_path: Path) -> None:
    asked = Asked(("none",), ("damaged", "bpda:steps=1:warmup=0"), (FOUR,), allow_weak=True)
    rows = {row.attack: row for row in run_in(tmp_path, n_samples=2).go(asked)}
    assert rows["worst"].of == ["clean", "bpda:steps=1:warmup=0"]
    (drawn,) = tables([*rows.values()], "t")
    heads = [str(column.header).split("\n") for column in drawn.columns]
    assert heads[2] == ["damaged", "n=2"]


def test_the_standard_set() -> None:
    assert Asked(attacks=("standard",)).attacks == STANDARDS
    assert STANDARDS == ("damaged", "pgd10", "pgd-own10", "pgd-random10", "adaptive")
    asked = Asked(attacks=("pgd", "standard", "aa")).attacks
    assert asked == ("pgd", "damaged", "pgd-own10", "pgd-random10", "adaptive", "aa")
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        Asked(attacks=("standart",))
