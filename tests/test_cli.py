"""The command line: what it prints and writes, its exit codes, and that errors are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scc_fast
from command_line import Run, strict
from scc_fast import cli, tiny
from scc_fast.defenses import DEFENSES
from scc_fast.evaluate import pictures as pictures_module
from scc_fast.evaluate.demo import Demo
from scc_fast.evaluate.runner import Asked
from scc_fast.evaluate.schema import misfits
from scc_fast.images import to_pil

LABELS = "a photo of a lemon,a photo of a cactus,a photo of a fly"


def sample(name: str) -> Path:
    return next(file for file in tiny.samples() if file.stem == name)


@pytest.fixture
def truncated(tmp_path: Path) -> Path:
    path = tmp_path / "a rather long name, so that eighty columns are not enough for it.png"
    path.write_bytes(sample("lemon").read_bytes()[:500])
    return path


# demo


@pytest.mark.slow
def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Demo.plan

    def short(self: Demo) -> list[Asked]:
        steps = {"pgd10": "pgd4", "view": "view-aware:steps=1", "bpda": "bpda:steps=1:warmup=1"}
        return [
            replace(
                asked, attacks=tuple(steps[a.split("-")[0].split(":")[0]] for a in asked.attacks)
            )
            for asked in plan(self)
        ]

    monkeypatch.setattr(Demo, "plan", short)
    figure, file = tmp_path / "f.png", tmp_path / "rows.json"
    sizes = ("--n", "4", "--adaptive-n", "1", "--seed", "5")
    code, out, err = run("demo", *sizes, "--json", file, "--figure", figure)
    assert (code, err.strip()) == (0, "")
    for word in ("none", "rn", "views", "ttc", "scc", "clean", "does not know", "f.png"):
        assert word in out
    with Image.open(figure) as picture:
        picture.load()
    found = strict(file)
    assert list(found) == ["rows"]
    assert len(found["rows"]) == 5 * 7  # clean, PGD at three budgets, two who know, the worst
    for row in found["rows"]:
        assert misfits(row) == []
        worst = row["attack"] == "worst"
        assert (row["ms_per_image"] is None) == (row["rounds"] is None) == worst
        assert worst or (row["ms_per_image"] > 0 and row["rounds"] == 1)
        assert row["defense"] in ("none", "rn", "views", "ttc", "scc")
        assert re.fullmatch(r"\d+/255", row["eps"])
        assert 0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1
        assert row["n"] == (1 if row["attack"].startswith(("bpda", "worst")) else 4)
        assert row["seed"] == 5
    assert {row["eps"] for row in found["rows"]} == {"0/255", "1/255", "2/255", "4/255"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "rows.json"]


def test_the_real_demos_plan() -> None:
    show = Demo(n=48, adaptive_n=16)
    assert [asked.attacks for asked in show.plan()] == [
        ("pgd10",), ("view-aware:steps=20",), ("bpda:steps=10",),
    ]  # fmt: skip
    assert [asked.adaptive_n for asked in show.plan()] == [None, 48, 16]
    assert {asked.eps[-1] for asked in show.plan()} == {4 / 255}


# defend


def test_defend_the_sample_pictures(run: Run, tmp_path: Path) -> None:
    files, output, file = tiny.samples()[:2], tmp_path / "out", tmp_path / "r.json"
    code, out, err = run("defend", *files, "--output", output, "--json", file, "--top", "2")
    assert (code, err) == (0, "")
    found = strict(file)
    assert list(found) == ["rows", "failed"]
    assert found["failed"] == []
    defender = scc_fast.Defender(scc_fast.load_model("tiny"), tiny.prompts())
    for path, row in zip(files, found["rows"], strict=True):
        expected = defender(path, 0)
        assert misfits(row) == []
        assert row["picture"] == str(path)
        assert row["picture"].rsplit("/", 1)[1][:5] in out
        assert row["flagged"] == bool(expected.flagged)
        assert row["drift"] == pytest.approx(float(expected.drift), rel=1e-3)
        assert row["after"][0]["label"] == tiny.prompts()[int(expected.labels)]
        assert row["after"][0]["label"] in out
        assert [len(row["before"]), len(row["after"])] == [2, 2]
        assert 0 <= row["after"][1]["probability"] <= row["after"][0]["probability"] <= 1
        repaired = output / f"{path.stem}.repaired.png"
        assert row["repaired"] == str(repaired)
        pixels = torch.from_numpy(np.array(Image.open(repaired))).permute(2, 0, 1)
        exact = expected.images[0] * 255
        assert torch.equal(pixels.float(), exact.round())
        assert not torch.equal(pixels.float(), exact.floor())  # truncation would undo the repair
        assert not torch.equal(pixels.float(), (expected.inputs[0] * 255).round())
    assert len(list(output.iterdir())) == 2


@pytest.mark.parametrize("epsilon", ["4/255", "0.0157", "8/255"])
@pytest.mark.parametrize("method", ["scc", "ttc", "rn"])
def test_epsilon_and_labels_reach_the_defense(run: Run, epsilon: str, method: str) -> None:
    file = Path("r.json")
    options = ("--labels", LABELS, "--epsilon", epsilon, "--method", method, "--seed", "3")
    code, out, _ = run("defend", sample("lemon"), *options, "--json", file)
    assert code == 0
    row = strict(file)["rows"][0]
    assert {item["label"] for item in row["after"]} == set(LABELS.split(","))
    assert sum(item["probability"] for item in row["after"]) == pytest.approx(1)
    assert (row["seed"], row["method"]) == (3, method)
    assert "a photo of a cactus" in out
    before = np.array(Image.open(sample("lemon")).convert("RGB")).astype(int)
    moved = np.abs(np.array(Image.open("lemon.repaired.png")).astype(int) - before).max()
    assert 2 <= moved <= (8 if epsilon == "8/255" else 4)
    assert (moved > 4) == (epsilon == "8/255" and method == "rn") or method != "rn"
    if method == "rn":
        assert row["drift"] is None


def test_labels_from_a_file(run: Run) -> None:
    Path("labels.txt").write_text("a photo of a lemon\n\n  a photo of Žluť  \na dog\n", "utf-8")
    figure = Path("new/f.svg")
    code, _, _ = run(
        "defend", sample("lemon"), "--labels", "@labels.txt", "--json", "r.json", "--figure", figure
    )
    assert code == 0
    labels = {item["label"] for item in strict(Path("r.json"))["rows"][0]["before"]}
    assert labels == {"a photo of a lemon", "a photo of Žluť", "a dog"}
    assert "<svg" in figure.read_text()


def test_labels_and_names_are_printed_as_they_are(run: Run) -> None:
    picture = Path("my [red] lemon.png")
    picture.write_bytes(sample("lemon").read_bytes())
    labels = "a lemon [young],a dog [/b],a fly"
    code, out, _ = run(
        "defend", picture, "--labels", labels, "--method", "none", "--figure", "f[red].png"
    )
    assert code == 0
    for text in ("my [red] lemon.png", "a lemon [young]", "a dog [/b]", "f[red].png"):
        assert text in out


def test_the_good_files_are_done_beside_the_bad(run: Run, truncated: Path) -> None:
    files = [sample("fly"), Path("nowhere.png"), truncated, sample("lemon")]
    code, _, err = run("defend", *files, "--labels", LABELS, "--method", "ttc", "--json", "r.json")
    assert code == 1
    assert len(err.strip().splitlines()) == 2
    assert "nowhere.png" in err
    found = strict(Path("r.json"))
    assert [Path(row["picture"]).stem for row in found["rows"]] == ["fly", "lemon"]
    assert found["failed"] == ["nowhere.png", str(truncated)]
    assert Path("fly.repaired.png").exists()
    assert Path("lemon.repaired.png").exists()


def test_a_truncated_picture_is_one_line(
    run: Run, truncated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("defend", truncated, "--labels", LABELS)
    assert (code, out.startswith("model tiny"), out.count("\n")) == (1, True, 1)
    assert len(err.strip().splitlines()) == 1
    assert "enough for it.png" in err
    assert "cannot be read" in err
    assert list(Path().iterdir()) == [Path(truncated.name)]


def test_two_pictures_of_one_name_do_not_overwrite_each_other(run: Run) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        source = sample("lemon" if folder == "a" else "fly")
        (Path(folder) / "x.png").write_bytes(source.read_bytes())
    options = ("--labels", LABELS, "--method", "none", "--json", "r.json")
    code, _, _ = run("defend", "a/x.png", "b/x.png", *options)
    assert code == 0
    repaired = [row["repaired"] for row in strict(Path("r.json"))["rows"]]
    assert len(set(repaired)) == 2
    for path, source in zip(repaired, ("lemon", "fly"), strict=True):
        given = np.array(Image.open(sample(source)).convert("RGB"))
        assert np.array_equal(np.array(Image.open(path)), given)


class HalfWritten:
    """A picture whose writing is broken off by Ctrl-C."""

    def save(self, path: Path) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_half_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(image: Any) -> Any:
        return to_pil(image) if not Path("out/lemon.repaired.png").exists() else HalfWritten()

    monkeypatch.setattr(pictures_module, "to_pil", interrupted)
    files = (sample("lemon"), sample("fly"))
    options = ("--labels", LABELS, "--method", "rn", "--output", "out", "--json", "out/r.json")
    code, _, err = run("defend", *files, *options)
    assert code in (1, 130)
    assert len(err.strip().splitlines()) <= 1
    assert [path.name for path in Path("out").iterdir()] == ["lemon.repaired.png"]

    def at_once(self: Demo, tick: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "run", at_once)
    assert run("demo", "--n", "1", "--json", "d.json")[0] in (1, 130)
    assert not Path("d.json").exists()


# Wrong usage is 2, failure is 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--labels", LABELS, "--epsilon", "4"), "4/255"),
        (("--labels", LABELS, "--epsilon", "four"), "four"),
        (("--labels", LABELS, "--epsilon", "-1/255"), "-1/255"),
        (("--labels", LABELS, "--epsilon", "1/0"), "1/0"),
        (("--labels", LABELS, "--epsilon", "4/255", "--method", "none"), "--epsilon"),
        (("--labels", "a photo of a lemon"), "--labels"),
        (("--labels", "a dog, a dog"), "--labels"),
        (("--labels", ""), "--labels"),
        (("--labels", "@nowhere.txt"), "nowhere.txt"),
        (("--model", "ViT-B-32"), "--labels"),
        (("--method", "sscc"), "sscc"),
        (("--top", "0"), "--top"),
        (("--seed", "x"), "--seed"),
        (("--figure", "f.gif"), "f.gif"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = run("defend", sample("lemon"), *arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert list(Path().iterdir()) == []


def test_wrong_usage_of_the_commands(run: Run) -> None:
    assert run("defend")[0] == 2
    assert run("deffend")[0] == 2
    assert run("demo", "--n", "0")[0] == 2
    assert run("--nonsense")[0] == 2
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "defend", "bench", "doctor"):
        assert command in out
    for option in (("--pretrained", "x"), ("--batch", "3"), ("--precision", "bf16")):
        code, out, err = run("doctor", *option)
        assert (code, out) == (2, "")
        assert option[0] in err


def test_a_failure_is_one_line_and_debug_shows_more(run: Run) -> None:
    failing = ("defend", sample("lemon"), "--labels", LABELS, "--model", "no-such-model")
    code, out, err = run(*failing)
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("scc-fast: ")
    assert "no-such-model" in err
    with pytest.raises((ValueError, RuntimeError), match="no-such-model") as caught:
        cli.main([str(argument) for argument in (*failing, "--debug")])
    assert "load_model" in {entry.name for entry in caught.traceback}


# doctor, and the installed command


def test_doctor(run: Run) -> None:
    code, out, err = run("doctor", "--model", "tiny", "--json", "d.json")
    assert (code, err) == (0, "")
    found = strict(Path("d.json"))
    assert found["versions"]["scc_fast"] == scc_fast.__version__
    version = torch.__version__.split("+")[0]
    assert found["versions"]["torch"].startswith(version)
    assert found["model"]["image_size"] == [64, 64]
    ops = {row["op"] for row in found["ops"]}
    assert {"philox_uniform", "philox_normal", "make_views", "margin_head"} <= ops
    for row in found["ops"]:
        assert row["why not"][row["served by"]] is None
        assert row["op"] in out
    methods = {row["method"]: row for row in found["methods"]}
    assert list(methods) == list(DEFENSES)
    assert "graph" in methods["scc"]["engines"]
    assert "graph" not in methods["r_tpt"]["engines"]
    assert methods["r_tpt"]["why no graph"].startswith("it tunes prompts")
    assert [name for name, row in methods.items() if row["repairs"] == "flagged"] == [
        "ttc", "scc", "csr",
    ]  # fmt: skip
    assert version in out
    assert found["model"]["encoder"] in (
        "runner",
        "graph",
        "eager, its own modules: no op is compiled",
    )
    code, out, _ = run("doctor", "--plan", "scc", "--batch", "2", "--json", "p.json")
    assert code == 0
    lines = strict(Path("p.json"))["plan"].splitlines()
    assert lines[1] == "scc, 4 views, batch 2"
    assert lines[-2].startswith("floor ")
    assert lines[1] in out
    code, _, err = run("doctor", "--model", "no-such-model")
    assert code == 1
    assert len(err.strip().splitlines()) == 1


def test_the_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "scc-fast"
    assert command.exists(), "the package is not installed in this environment"
    arguments = ["defend", "missing.png", "--labels", "a dog,a cat", "--json", "r.json", "--debug"]
    done = subprocess.run(
        [command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert re.fullmatch(r"model tiny .*: weights bundled .*; .*float32 on \w+\n", done.stdout)
    assert "missing.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert strict(tmp_path / "r.json") == {"rows": [], "failed": ["missing.png"]}
