"""The runner: rows from whole batches, interruptions, refusals, and what is kept on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runs import FOUR, N, results, run_in
from scc_fast import Defender, image_seeds
from scc_fast.api import make_defense
from scc_fast.attacks import PGD
from scc_fast.evaluate import runner, store
from scc_fast.evaluate.data import open_dataset
from scc_fast.evaluate.results import AttackFailed, Row
from scc_fast.evaluate.runner import Asked, Run
from scc_fast.evaluate.schema import misfits
from scc_fast.evaluate.store import Busy, locked
from scc_fast.evaluate.worker import Judged, Made, Origin, Task, Worker, restored
from toys import model_of

ASKED = Asked(("none", "rn"), ("pgd3", "bpda:steps=1:warmup=1"), (FOUR,), adaptive_n=3)


class Stop(Exception):
    """The plug is pulled."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_in(folder).go(ASKED)
    return folder


def by_name(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.defense, row.attack): row for row in rows}


def put(run: Run, spec: str, epsilon: float, *right: str) -> None:
    """What "none" got right under an attack, batch by batch; "" is a batch that is not there."""
    folder = run.store.attack(spec, epsilon, runner._settings(spec, epsilon))
    for batch, bits in enumerate(right):
        if bits:
            task = Task(spec, epsilon, None, batch, len(bits), ("none",))
            folder.append_record(task, Judged("none", bits, "", (), 1.0))


def test_rows_are_what_the_defenses_say(whole: Path) -> None:
    rows = by_name(run_in(whole).rows())
    assert set(rows) == {
        (d, a) for d in ("none", "rn") for a in ("clean", "pgd3", "bpda:steps=1:warmup=1", "worst")
    }
    x, labels = open_dataset("emoji", model_of("tiny"), n_samples=N).batch(0, N)
    prompts = open_dataset("emoji", model_of("tiny"), n_samples=N).prompts
    judge, attacker = image_seeds(3, N), image_seeds(3 + (1 << 32), N)
    bare = make_defense("none", model_of("tiny"), prompts)
    attacked = PGD(epsilon=FOUR, steps=3).run(bare, x, labels, attacker)
    kept = x + (attacked - x).half().float()
    for name in ("none", "rn"):
        defense = make_defense(name, model_of("tiny"), prompts)
        right = defense(kept.clamp(0, 1), judge).labels == labels
        assert rows[name, "pgd3"].hits == int(right.sum())
        assert rows[name, "clean"].hits == int((defense(x, judge).labels == labels).sum())
    assert rows["rn", "pgd3"].n == 5
    assert rows["rn", "bpda:steps=1:warmup=1"].n == rows["rn", "worst"].n == 3
    assert rows["rn", "worst"].of == ["clean", "pgd3", "bpda:steps=1:warmup=1"]
    assert rows["rn", "worst"].hits <= rows["rn", "bpda:steps=1:warmup=1"].hits
    assert rows["rn", "pgd3"].traits["random"] is True
    assert rows["rn", "pgd3"].config == {"epsilon": "4/255"}
    assert rows["rn", "pgd3"].attack_settings["epsilon"] == "4/255"
    assert (rows["rn", "pgd3"].eps, rows["rn", "pgd3"].seed) == ("4/255", 3)
    clean = rows["none", "clean"]
    assert clean.clean_right == {"n": clean.hits, "hits": clean.hits}


def test_files(whole: Path) -> None:
    found = json.loads(results(whole))
    assert list(found) == ["format", "run", "environment", "images", "rows"]
    assert {image["undone_by_rounding"] for image in found["images"]} == {0}
    assert found["format"] == 1
    assert found["run"]["model"]["name"] == "tiny"
    assert len(found["run"]["model"]["weights_sha256"]) == 64
    assert found["run"]["dataset"]["name"] == "emoji"
    assert (found["run"]["seed"], found["run"]["batch"]) == (3, 2)
    assert "torch" in found["environment"]
    (timings,) = whole.glob("*/timings.json")
    times = {(r["defense"], r["attack"]): r for r in json.loads(timings.read_text())["rows"]}
    assert times["rn", "pgd3"]["ms_per_image"] > 0
    assert times["rn", "pgd3"]["attack_ms_per_image"] > 0
    assert times["rn", "bpda:steps=1:warmup=1"]["attack_ms_per_image"] > 0
    assert times["rn", "clean"]["attack_ms_per_image"] is None
    assert times["rn", "clean"]["rounds"] == 3  # batches
    for row in [*found["rows"], *times.values()]:
        assert misfits(row) == []
    images = sorted(path.relative_to(whole).parts[1:] for path in whole.rglob("*.safetensors"))
    assert [parts[-2:] for parts in images if parts[0].startswith("pgd3")] == [
        ("shared", f"0000{b}.safetensors") for b in range(3)
    ]
    assert {parts[2] for parts in images if parts[0].startswith("bpda")} == {"none", "rn"}


class Unplugged(Run):
    """Stops when so many things have come of the tasks."""

    after = 0

    def execute(self, tasks: Any, kept: Any) -> Iterator[tuple[Task, Origin | Made | Judged]]:
        for found in super().execute(tasks, kept):
            if type(self).after == 0:
                raise Stop
            type(self).after -= 1
            yield found


@pytest.mark.parametrize(("after", "cut"), [(0, 0), (1, 0), (6, 0), (9, 3), (14, 40), (19, 0)])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, after: int, cut: int
) -> None:
    first = run_in(tmp_path)
    first.__class__ = Unplugged
    monkeypatch.setattr(Unplugged, "after", after)
    with pytest.raises(Stop):
        first.go(ASKED)
    if cut:  # a line was being written
        last = max(tmp_path.rglob("records.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        last.write_bytes(last.read_bytes()[:-cut])
    told: list[tuple[int, int]] = []
    ticks: list[str] = []
    run_in(tmp_path).go(ASKED, start=lambda *n: told.append(n), tick=ticks.append)
    assert results(tmp_path) == results(whole)
    ((total, done),) = told
    assert total == 2 * 6 + 2 * 2
    assert done + len(ticks) == total
    assert done > 0 or after < 2 or cut
    again: list[str] = []
    run_in(tmp_path).go(ASKED, tick=again.append)
    assert again == []
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9, as often as it takes; and then the same file as without."""
    command = [
        sys.executable, "-c", "from scc_fast.cli import main; main()", "evaluate",
        "--n-samples", "12", "--batch", "2", "--defense", "none,rn,ttc", "--attack", "pgd3",
        "--eps", "4/255", "--out",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "a")], env=environment, check=True)
    kills = 0
    while True:
        process = subprocess.Popen([*command, str(tmp_path / "b")], env=environment)
        before = len(list((tmp_path / "b").rglob("*.safetensors")))
        while process.poll() is None:
            lines = len(list((tmp_path / "b").rglob("*.safetensors")))
            if lines >= before + 2 and kills < 2:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.005)
        else:
            break
    assert process.returncode == 0
    assert kills == 2
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_more_defenses_attacks_and_images_come_to_what_is_there(
    tmp_path: Path, whole: Path
) -> None:
    run_in(tmp_path).go(Asked(("none",), ("pgd3",), (FOUR,)))
    small = Asked(("none", "rn"), ("bpda:steps=1:warmup=1",), (FOUR,), adaptive_n=1)
    rows = by_name(run_in(tmp_path).go(small))
    assert rows["rn", "bpda:steps=1:warmup=1"].n == 1
    made: list[str] = []
    run_in(tmp_path).go(ASKED, tick=made.append)
    assert results(tmp_path) == results(whole)
    # rn clean was there, and so was all of none but the images that bpda did not get
    assert (
        sorted(made)
        == ["none under bpda:steps=1:warmup=1"] * 2
        + ["rn under bpda:steps=1:warmup=1"] * 2
        + ["rn under pgd3"] * 3
    )


def test_rows_stay_while_more_images_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Asked(("none",), ("bpda:steps=1:warmup=1",), (FOUR,), adaptive_n=2)
    before = {key: row.n for key, row in by_name(run_in(tmp_path).go(some)).items()}
    assert before["none", "bpda:steps=1:warmup=1"] == before["none", "worst"] == 2
    more = run_in(tmp_path)
    more.__class__ = Unplugged
    monkeypatch.setattr(Unplugged, "after", 0)
    with pytest.raises(Stop):
        more.go(replace(some, adaptive_n=None))
    assert {key: row.n for key, row in by_name(more.publish()).items()} == before
    rows = by_name(run_in(tmp_path).go(replace(some, adaptive_n=None)))
    assert rows["none", "worst"].n == rows["none", "bpda:steps=1:warmup=1"].n == N


def test_the_fewest_images_asked_for_count(tmp_path: Path) -> None:
    store = run_in(tmp_path).store
    folder = store.attack("bpda", FOUR)
    store.keep_counts(folder, {"none": 1, "rn": 2})
    store.keep_counts(folder, {"none": 3})
    assert store.counts(folder) == {"none": 1, "rn": 2}


def test_a_row_that_is_not_whole_is_not_shown(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    put(run, "clean", 0.0, "11", "11", "1")
    put(run, "pgd3", FOUR, "11", "10")
    assert {row.attack for row in run.rows()} == {"clean"}
    put(run, "pgd3", FOUR, "", "", "0")
    assert by_name(run.rows())["none", "pgd3"].hits == 3


def test_images_behind_a_short_batch_do_not_count(tmp_path: Path) -> None:
    """Three images were asked for after one, and the second batch came first."""
    run = run_in(tmp_path)
    put(run, "clean", 0.0, "11", "11", "1")
    put(run, "bpda", FOUR, "1", "0")
    run.store.keep_counts(run.store.attack("bpda", FOUR), {"none": 1})
    row = by_name(run.rows())["none", "bpda"]
    assert (row.n, row.hits) == (1, 1)


def test_the_worst_is_over_every_attack_of_its_own_budget(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    put(run, "clean", 0.0, "11", "11", "0")
    put(run, "pgd3", 1 / 255, "01", "11", "1")
    put(run, "bpda", 1 / 255, "11", "01", "1")
    put(run, "pgd3", FOUR, "10", "11", "1")
    put(run, "bpda", FOUR, "10", "00", "0")
    worst = {row.eps: row for row in run.rows() if row.attack == "worst"}
    assert {eps: row.hits for eps, row in worst.items()} == {"1/255": 2, "4/255": 1}
    assert worst["1/255"].of == ["clean", "pgd3", "bpda"]


def test_lines_that_are_no_records_are_done_again(tmp_path: Path, whole: Path) -> None:
    run_in(tmp_path).go(ASKED)
    for file in tmp_path.rglob("records.jsonl"):
        first, *others = file.read_bytes().splitlines(keepends=True)
        record = json.loads(first)
        torn = [{**record, "right": 5}, {k: v for k, v in record.items() if k != "flagged"}, [], 7]
        bad = [json.dumps(line).encode() + b"\n" for line in torn]
        file.write_bytes(b"".join([*bad, b"\xff" + first, *others]))
    made: list[str] = []
    run_in(tmp_path).go(ASKED, tick=made.append)
    assert len(made) == len(list(tmp_path.rglob("records.jsonl")))
    assert results(tmp_path) == results(whole)


def test_one_attack_in_two_spellings_is_one(tmp_path: Path) -> None:
    asked = Asked(attacks=("pgd10", "pgd", "pgd:steps=10", "clean", "pgd100"))
    assert asked.attacks == ("pgd10", "clean", "pgd100")
    asked = Asked(("none",), ("adaptive", "view-aware30"), (FOUR,))
    owned = {task.attack for task in run_in(tmp_path, n_samples=1).tasks(asked) if task.owner}
    assert owned == {"view-aware30", "bpda"}


def test_nothing_is_flagged_where_there_is_no_gate(tmp_path: Path) -> None:
    asked = Asked(("ttc", "scc:gate=false"), ("clean",))
    run = run_in(tmp_path, n_samples=2)
    rows = by_name(run.go(asked))
    found = run.worker.defense("ttc")(run.worker.data.batch(0, 2)[0], image_seeds(3, 2))
    assert rows["ttc", "clean"].flagged == float(found.flagged.double().mean())
    assert rows["scc:gate=false", "clean"].flagged is None
    assert rows["none", "clean"].flagged is None


def test_other_settings_are_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path, n_samples=2)
    run.go(Asked(("none",), ("clean",)))
    (file,) = tmp_path.glob("*/run.json")
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"holds another run: batch is 2 there and 1 here; give another --out"
    ):
        run_in(tmp_path, n_samples=2, batch=1)
    assert file.read_bytes() == before
    file.write_bytes(before[:20])
    with pytest.raises(ValueError, match=r"run\.json: not JSON"):
        run_in(tmp_path, n_samples=2)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: not what the runner wrote there"):
        run_in(tmp_path, n_samples=2)
    file.write_bytes(before)


def test_an_attack_or_a_defense_with_other_settings_is_refused(tmp_path: Path) -> None:
    store = run_in(tmp_path).store
    facts = {"title": "PGD-3", "aware": False, "settings": {"alpha": 1}}
    for _ in range(2):
        store.attack("pgd3", FOUR, facts)
    with pytest.raises(ValueError, match="the attack had other settings"):
        store.attack("pgd3", FOUR, {**facts, "settings": {"alpha": 2}})
    store.add_defenses({"ttc": {"config": {"steps": 2}}})
    with pytest.raises(ValueError, match="ttc had other settings"):
        store.add_defenses({"ttc": {"config": {"steps": 3}}})
    assert store.defenses()["ttc"]["config"] == {"steps": 2}


def test_two_processes_do_not_do_the_same(tmp_path: Path) -> None:
    run = run_in(tmp_path, n_samples=2)
    asked = Asked(("none",), ("clean",))
    run.store.attack("clean", 0.0, {"title": "clean", "aware": False, "settings": {}})
    folder = run.store.attack("clean", 0.0)
    said: list[str] = []
    ticks: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with locked(folder.path, wait=False):  # the other one
            with pytest.raises(Busy, match="another process works in"), locked(folder.path, False):
                pass
            done = pool.submit(run.go, asked, say=said.append, tick=ticks.append)
            while not said and not done.done():
                time.sleep(0.01)
            (task,) = run.tasks(asked)
            for found in run.worker.work(task):
                assert isinstance(found, Judged)
                folder.append_record(task, found)
        rows = done.result()
    assert said == [f"waiting for another process that works in {folder.path}"]
    assert ticks == []
    assert rows[0].n == 2


def test_an_attack_that_does_nothing_stops_the_run(tmp_path: Path) -> None:
    weak = {"defenses": ("none", "rn"), "attacks": ("pgd1",), "eps": (1e-6,)}
    message = r"attack does not work.*PGD-1 at 1e-06.*keeps 5 of the 5.*--allow-weak-attack"
    with pytest.raises(AttackFailed, match=message):
        run_in(tmp_path).go(Asked(**weak))
    assert {row.attack for row in run_in(tmp_path).rows()} == {"clean", "pgd1"}  # kept
    assert len(run_in(tmp_path).go(Asked(**weak, allow_weak=True))) == 4
    # One that need not work does not stop it
    idle = Asked(("none",), ("pgd-random:steps=1:alpha=0.000001",), (1e-6,))
    assert len(run_in(tmp_path / "other").go(idle)) == 2


def test_the_seeds_are_fixed_and_the_judges_are_not_the_attackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[int]] = []
    attacked: list[int] = []
    call, attack = Defender.__call__, PGD.run

    def judge(self: Defender, images: Any, seeds: Any = None) -> Any:
        judged.append(seeds.tolist())
        return call(self, images, seeds)

    def run(self: PGD, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        attacked.extend(seeds.tolist())
        return attack(self, target, x, labels, seeds)

    monkeypatch.setattr(Defender, "__call__", judge)
    monkeypatch.setattr(PGD, "run", run)
    run_in(tmp_path).go(Asked(("none",), ("pgd3",), (FOUR,)))
    # The first batch of a size is shown once before it is timed.
    timed = [seeds for seeds, last in zip(judged, [[], *judged], strict=False) if seeds != last]
    assert [key for seeds in timed for key in seeds] == image_seeds(3, N).tolist() * 2
    assert len(set(attacked)) == N
    assert not set(attacked) & {key for seeds in judged for key in seeds}


def test_images_are_kept_rounded_and_held_to_the_ball(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.go(Asked(("none",), ("pgd3",), (FOUR,)))
    path = min(tmp_path.rglob("*.safetensors"))
    kept = load_file(path)["delta"]
    assert kept.dtype == torch.float16
    assert 0.9 * FOUR < float(kept.abs().max()) <= FOUR * (1 + 2**-11)
    x = torch.zeros(1, 3, 2, 2)
    attack = PGD(epsilon=FOUR)
    edge = torch.full_like(x, FOUR).half()
    assert float((restored(x, edge, attack, 0) - x).max()) <= FOUR
    for held in (restored(x, -edge, attack, 0), restored(x + 1, edge, attack, 0)):
        assert 0 <= held.min() <= held.max() <= 1
    for wrong, message in (
        (edge * 1.01, "not within the budget"),
        (edge * torch.nan, "not within the budget"),
        (edge[..., :1], r"shape \(1, 3, 2, 1\), the pictures have \(1, 3, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=rf"PGD-10 at 4/255, batch 7: .*{message}"):
            restored(x, wrong, attack, 7)
    # A file that is not what was written is never judged
    for records in tmp_path.rglob("pgd3*/records.jsonl"):
        records.unlink()
    save_file({"delta": kept * 2}, path)
    with pytest.raises(ValueError, match="not within the budget; remove the file"):
        run.go(Asked(("none",), ("pgd3",), (FOUR,)))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"00000\.safetensors: not a file of kept images"):
        run.go(Asked(("none",), ("pgd3",), (FOUR,)))
    path.unlink()
    run.go(Asked(("none",), ("pgd3",), (FOUR,)))
    assert torch.equal(load_file(path)["delta"], kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ("fgsm",)}, "attack must be one of"),
        ({"eps": ()}, "eps must be budgets"),
        ({"eps": (0.0,)}, "eps must be budgets"),
        ({"adaptive_n": 0}, "adaptive_n must be at least 1"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asked(**options)


def test_wrong_defenses_are_refused_before_any_work(tmp_path: Path) -> None:
    for spec, message in (("sccc", "defense must be one of"), ("scc:epsilon=2", "epsilon")):
        with pytest.raises(ValueError, match=message):
            run_in(tmp_path).go(Asked((spec,), ("pgd3",), (FOUR,)))
    assert not list(tmp_path.rglob("records.jsonl"))


def test_adaptive_is_what_suits_a_defense(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    asked = Asked(("none", "ttc", "scc"), ("adaptive",), (FOUR,))
    found = {(task.owner, task.attack.split(":")[0]) for task in run.tasks(asked) if task.owner}
    assert ("scc", "pseudo") in found
    assert ("ttc", "gate") in found
    assert ("none", "gate") not in found
    assert not [key for key in found if key[1] == runner.ADAPTIVE]


def test_where_numbers_were_made_is_not_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(("none",), ("clean",))
    run_in(tmp_path, n_samples=2).go(asked)
    before = results(tmp_path)
    elsewhere = Origin({"device": "another"})
    monkeypatch.setattr(Worker, "origin", lambda self: elsewhere)
    run_in(tmp_path, n_samples=2).go(asked)
    assert results(tmp_path) == before
    run_in(tmp_path, n_samples=2).go(Asked(("none", "rn"), ("clean",)))
    found = json.loads(results(tmp_path))
    assert elsewhere.environment in found["environments"]
    assert len(found["environments"]) == 2


def test_an_attack_that_suits_none_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    run_in(tmp_path, n_samples=2).go(Asked(("none", "rn"), ("gate",), (FOUR,)), say=said.append)
    assert said == ["attack gate applies to none of none, rn: left out"]


def test_budgets_on_the_grid_are_one() -> None:
    assert Asked(eps=(1 / 255, 0.00392157, 0.01)).eps == (1 / 255, 0.01)


def test_a_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path)
    parsed: list[bytes] = []
    parse = store._records
    monkeypatch.setattr(store, "_records", lambda lines: parsed.append(lines) or parse(lines))
    run.go(ASKED)
    files = list(tmp_path.rglob("records.jsonl"))
    assert sum(map(len, parsed)) == sum(file.stat().st_size for file in files)
    put(run, "clean", 0.0, "00", "00", "0")  # a later line counts, and one that is not whole
    assert by_name(run.rows())["none", "clean"].hits == 0
    file = run.store.attack("clean", 0.0).path / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink()
    file.write_bytes(b"".join(lines[:-3]))
    assert by_name(run.rows())["none", "clean"].hits == 5
