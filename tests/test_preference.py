"""The preference lists follow the stored benchmarks, and how they are derived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import preference
from scc_fast import ops


def row(name: str, backend: str, ratio: float, **values: Any) -> dict[str, Any]:
    fixed = {
        "group": "ops",
        "shape": "a",
        "precision": "fp32",
        "baseline": "eager reference",
        "engine": "eager",
        "loaded": False,
        "quick": False,
    }
    return {**fixed, "name": name, "backend": backend, "ratio": ratio, **values}


@pytest.mark.parametrize("path", preference.newest().values(), ids=lambda path: path.stem)
def test_preference_is_what_was_measured(path: Path) -> None:
    results = json.loads(path.read_text())
    found = preference.scores(results["rows"])
    assert found
    kind = results["environment"]["kind"]
    assert not preference.disagreements(ops._PREFERENCE, kind, found)


def test_every_present_ranking_names_backends_once() -> None:
    for kind in ops._PREFERENCE:
        for op in ops.names():
            ranking = preference.ranking_of(ops._PREFERENCE, kind, op)
            assert len(set(ranking)) == len(ranking)
            assert set(ranking) <= set(ops.BACKENDS)
            assert ranking[-1] == "reference" or "reference" in ranking


def test_scores_are_over_complete_and_calm_configurations() -> None:
    rows = [
        row("make_views", "cpp", 4.0),
        row("make_views", "triton", 2.0),
        row("make_views patch 32", "cpp", 1.0, shape="b"),
        row("make_views patch 32", "triton", 4.0, shape="b"),
        row("make_views", "triton", 99.0, shape="alone"),
        row("make_views", "cpp", 1.0, shape="c", loaded=True),
        row("make_views", "triton", 99.0, shape="c"),
        row("make_views", "cpp", 99.0, quick=True),
        row("drift_head", "cpp", 1.0, loaded=True),
        row("drift_head", "triton", 2.0),
    ]
    found = preference.scores(rows)
    assert found["make_views"] == pytest.approx({"cpp": 0.25**0.5, "triton": 0.5**0.5})
    assert found["drift_head"] == pytest.approx({"cpp": 0.5, "triton": 1.0})


def test_simplest_form_that_agrees() -> None:
    alike = {"a": {"cpp": 1.0, "reference": 0.2}, "b": {"cpp": 0.97, "reference": 1.0}}
    assert preference.proposal(alike) == ("cpp", "reference")
    apart = {**alike, "c": {"cpp": 0.5, "reference": 1.0}}
    proposed = preference.proposal(apart)
    assert proposed == {"default": ("cpp", "reference"), "c": ("reference", "cpp")}
    assert preference.ranking_of({"cpu": proposed}, "cpu", "c") == ("reference", "cpp")
    assert preference.ranking_of({"cpu": proposed}, "cpu", "a") == ("cpp", "reference")
    assert preference.ranking_of({"cpu": ("cpp",)}, "cpu", "c") == ("cpp",)
    assert not preference.disagreements({"cpu": proposed}, "cpu", apart)
    (line,) = preference.disagreements({"cpu": ("cpp", "reference")}, "cpu", apart)
    assert line.startswith("c on cpu: ")


def test_a_backend_without_a_rank_is_a_disagreement() -> None:
    found = {"a": {"triton": 1.0, "cpp": 0.5, "reference": 0.1}}
    assert preference.disagreements({"cuda": ("triton", "reference")}, "cuda", found)
    assert not preference.disagreements({"cuda": ("triton", "cpp", "reference")}, "cuda", found)


def test_newest_skips_quick_runs_and_files_without_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gpu = tmp_path / "cpu", tmp_path / "nvidia-h200"
    folder.mkdir()
    gpu.mkdir()
    for date, quick in (("2026-01-01", False), ("2026-01-02", False), ("2026-01-03", True)):
        text = json.dumps({"rows": [row("a", "cpp", 1.0, quick=quick)]})
        (folder / f"ops-{date}.json").write_text(text)
    for date, group in (("2026-01-01", "ops"), ("2026-01-04", "memory")):
        text = json.dumps({"rows": [row("a", "cpp", 1.0, group=group)]})
        (gpu / f"{date}.json").write_text(text)
    (folder / "defense-2026-01-05.json").write_text(text)
    monkeypatch.setattr(preference, "RESULTS", tmp_path)
    assert preference.newest() == {
        "cpu": folder / "ops-2026-01-02.json",
        "nvidia-h200": gpu / "2026-01-01.json",
    }
