"""`scc-fast evaluate` and `scc-fast report`: what they write, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import data_on_disk
from command_line import Run, strict


def test_evaluate_and_report(run: Run, tmp_path: Path) -> None:
    out_folder = tmp_path / "results"
    what = ("evaluate", "--n-samples", "4", "--batch", "2", "--out", out_folder)
    asked = ("--defense", 'none,rn,scc{"warmup_steps": 1, "semantic": false}', "--attack", "pgd2")
    code, out, err = run(*what, *asked, "--eps", "4/255", "--seeds", "0,1")
    assert (code, err.strip()) == (0, "")
    assert "PGD-2" in out
    assert f"scc-fast report {out_folder}" in out
    files = sorted(out_folder.glob("*/results.json"))
    assert len(files) == 2
    found = strict(files[0])
    assert {row["defense"] for row in found["rows"]} == {
        "none", "rn", 'scc{"warmup_steps": 1, "semantic": false}',
    }  # fmt: skip
    before = [path.read_bytes() for path in files]
    assert run(*what, *asked, "--eps", "4/255", "--seeds", "0,1")[0] == 0
    assert [path.read_bytes() for path in files] == before
    code, out, err = run("report", out_folder)
    assert (code, err.strip()) == (0, "")
    assert (out_folder / "report" / "report.html").exists()
    code, out, err = run("report", tmp_path / "nothing")
    assert code == 1
    assert "nothing" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--workers", "2"), 2, "need --engine ray, got --engine local"),
        (("--out", "a-file"), 2, "--out must be a folder, a-file is a file"),
        (("--seeds", "-1"), 2, "--seeds must be whole numbers in [0, 2^32)"),
        (("--defense", "scx"), 2, "defense must be one of none, rn"),
        (("--defense", " , "), 2, "--defense must be a list such as none,scc"),
        (("--attack", "fgsm"), 2, "attack must be one of pgd"),
        (("--eps", "4"), 2, "write 4/255"),
        (("--eps", "0"), 2, "eps must be budgets"),
        (("--seeds", "a"), 2, "--seeds must be whole numbers"),
        (("--dataset", "cifar11"), 1, "cifar11"),
        (("--protocol", "mine"), 1, "protocol"),
        (("--model", "no-such-model@openai"), 1, "no-such-model"),
        (("--engine", "dask"), 2, "--engine must be local or ray"),
        (("--dataset", "cifar10", "--dataset-root", "nowhere"), 1, "nowhere"),
    ],
)
def test_evaluate_refuses(run: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    Path("a-file").touch()
    found, out, err = run("evaluate", "--n-samples", "2", *arguments)
    assert found == code
    assert message in " ".join((out + err).replace("│", " ").split())


@pytest.mark.parametrize("name", data_on_disk.NAMES)
def test_every_data_set_of_the_papers(run: Run, tmp_path: Path, name: str) -> None:
    """The whole way from files in the data set's format to its rows."""
    root, out = tmp_path / "data", tmp_path / "results"
    data_on_disk.write(name, root, 1, layout="webdataset")
    code, _, err = run(
        "evaluate", "--dataset", name, "--dataset-root", root, "--out", out, "--n-samples", "2",
        "--defense", "none,rn", "--attack", "pgd1", "--eps", "1/255", "--allow-weak-attack",
    )  # fmt: skip
    assert code == 0, err
    (file,) = out.glob("*/results.json")
    found = strict(file)
    assert found["run"]["dataset"]["name"] == name
    assert found["run"]["dataset"]["protocol"] == "ttc"
    assert {(r["defense"], r["attack"], r["n"]) for r in found["rows"]} == {
        (d, a, 2) for d in ("none", "rn") for a in ("clean", "pgd1")
    }


def test_a_report_without_pandas_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("scc_fast.evaluate.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    code, out, err = run("report", tmp_path)
    assert (code, out) == (1, "")
    assert err == (
        'scc-fast: scc-fast report needs pandas and Jinja2: pip install "scc_fast[evaluate]"\n'
    )


def test_an_evaluation_needs_no_pandas() -> None:
    modules = "scc_fast, scc_fast.cli, scc_fast.evaluate.command, scc_fast.evaluate.demo"
    code = f"import sys, {modules}; print({{'pandas'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
