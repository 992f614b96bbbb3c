"""Everything that docs/results.md shows, with the public runner on the bundled model.

    python benchmarks/tiny_results.py run         # a night; goes on where it stopped
    python benchmarks/tiny_results.py times       # on a machine that does nothing else
    python benchmarks/tiny_results.py gather      # into results/cpu/evaluation, and the page

Runs are in --out (with the attacked images); `gather` copies what the page is made of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scc_fast._files import atomic, write_json
from scc_fast.evaluate import command
from scc_fast.evaluate.report import make_report
from scc_fast.evaluate.results import NO_BUDGET, Row, cell, wilson
from scc_fast.evaluate.runner import Asked
from scc_fast.evaluate.worker import Setting, Worker, environment

HERE = Path(__file__).parent
STORED = HERE / "results" / "cpu" / "evaluation"
PAGE, README = HERE.parent / "docs" / "results.md", HERE.parent / "README.md"
ALL = (1 / 255, 2 / 255, 4 / 255)
FOUR = ALL[-1:]
BUDGETS = ("1/255", "2/255", "4/255")
BUDGET = BUDGETS[-1]
TABLE = (
    "none", "rn", "views", "tte", "anti_adv", "hd", "ttc", "doc", "r_tpt", "scc", "csr", "dbd",
    "mac", "agc", "extrapolate",
)  # fmt: skip
CONSTANT = "extrapolate:rule=constant:strength=1.5"
INFORMED = ("none", "views", "extrapolate", CONSTANT)
ABLATION = (
    "scc:gate=false",
    "scc:semantic=false",
    "scc:spatial=false",
    "scc:semantic=false:spatial=false",
    "scc:views=paper",
    "scc:views=paper:semantic=false",
)
CONTROLS = ("pgd-own10", "pgd-random10")


def flips_and_shifts(count: int) -> str:
    """SCC with the first `count` of identity, flip, and shifts of growing size with their flips."""
    views: list[dict[str, Any]] = [{}, {"flip": True}]
    for p in (2, 4, 6):
        views += [{"shift": [p, p]}, {"flip": True, "shift": [-p, -p]}]
    return "scc" + json.dumps({"views": views[:count], "gate": False})


# What is varied, its values, and the spec of each: around the bundled model's own defaults.
SWEEPS: dict[str, dict[str, str]] = {
    "warm-up steps": {str(n): f"scc:gate=false:warmup_steps={n}" for n in (0, 1, 2, 3)},
    "semantic steps": {str(n): f"scc:gate=false:semantic_steps={n}" for n in (0, 1, 2, 3)},
    "views": {str(n): flips_and_shifts(n) for n in (1, 2, 4, 6, 8)},
    "temperature": {str(t): f"scc:gate=false:temperature={t}" for t in (0.25, 0.5, 1.0)},
    "budget, n/255": {str(n): f"scc:gate=false:epsilon={n}/255" for n in (1, 2, 4, 6, 8)},
}
CHEAP = {  # what a latency budget may choose from, by passes
    "none": "none",
    "views": "views",
    "N_w 1, S 0": "scc:gate=false:warmup_steps=1:semantic=false",
    "N_w 1, S 1": "scc:gate=false:warmup_steps=1:semantic_steps=1",
    "N_w 2, S 0": "scc:gate=false:semantic=false",
    "N_w 1, S 2": "scc:gate=false:warmup_steps=1",
    "N_w 2, S 1": "scc:gate=false:semantic_steps=1",
    "N_w 2, S 2": "scc:gate=false:semantic_steps=2",
    "N_w 3, S 2": "scc:gate=false:warmup_steps=3",
    "6 views": flips_and_shifts(6),
}


def stages(adaptive_n: int) -> dict[str, list[tuple[str, Asked]]]:
    """(split, what is asked) of each stage; the validation split is asked for half the pictures."""
    every = [spec for values in (*SWEEPS.values(), CHEAP) for spec in values.values()]
    swept = tuple(dict.fromkeys(every))
    return {
        "table": [
            ("test", Asked(TABLE, ("damaged", "pgd10"), ALL)),
            ("test", Asked(TABLE, ("pgd100", "aa"), FOUR)),
        ],
        "controls": [("test", Asked(TABLE, CONTROLS, ALL))],
        "knowing": [("test", Asked(TABLE, ("adaptive",), FOUR, adaptive_n))],
        "informed": [
            ("test", Asked((CONSTANT,), ("damaged", "pgd10", *CONTROLS), ALL)),
            ("test", Asked(INFORMED, ("adaptive",), ALL, adaptive_n)),
            ("test", Asked(("extrapolate",), ("autoattack-through",), FOUR, 5 * adaptive_n)),
        ],
        "ablation": [
            ("test", Asked(ABLATION, ("pgd10",), FOUR)),
            ("test", Asked(ABLATION[:1], ("pgd10",), ALL)),  # behind every gate
        ],
        "sweep": [("validation", Asked(swept, ("pgd10",), FOUR))],
    }


def run(names: list[str], out: Path, n: int, adaptive_n: int, precision: str) -> None:
    """Do the stages in turn; the same call goes on where it stopped."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip
    with bar:
        for name in names:
            for split, asked in stages(adaptive_n)[name]:
                share = n if split == "test" else n // 2
                setting = Setting(n_samples=share, split=split, precision=precision, device="cpu")
                task = bar.add_task(name, total=None)

                def start(_: str, total: int, done: int, task: Any = task) -> None:
                    bar.update(task, total=total, completed=done)

                def tick(what: str, task: Any = task, name: str = name) -> None:
                    bar.update(task, description=f"{name}: {what}", advance=1)

                command.run_all([setting], asked, out, None, start=start, tick=tick)


# ------------------------------------------------------------------------------------ what is shown


def gather(out: Path) -> None:
    """Store results, the gates' table and the figures, and write the page's tables."""
    folders = [path.parent for path in sorted(out.glob("*/results.json"))]
    for folder in folders:
        for file in ("results.json", "timings.json"):
            target = STORED / folder.name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)
    test = next(f for f in folders if "validation" not in f.name)
    write_json(STORED / "gates.json", gates(test))
    sweeps(STORED, PAGE.parent / "results-sweeps.png")
    report()
    write_page(STORED)


def report() -> None:
    """The page's figures are the report's, of the methods alone, without their variants."""
    with tempfile.TemporaryDirectory() as folder:
        for file in STORED.glob("*test*/results.json"):
            found = json.loads(file.read_text())
            found["rows"] = [row for row in found["rows"] if row["defense"] in TABLE]
            run = Path(folder) / file.parent.name
            run.mkdir()
            write_json(run / "results.json", found)
            shutil.copyfile(file.parent / "timings.json", run / "timings.json")
        make_report(Path(folder))
        for name in ("pareto", "adaptive", "epsilon"):
            picture = Path(folder) / "report" / f"{name}.png"
            shutil.copyfile(picture, PAGE.parent / f"results-{name}.png")


def bits(folder: Path, attack: str, defense: str) -> tuple[str, str, list[float]]:
    """Right, flagged and drift of every image, from the records of a run."""
    found: dict[int, dict[str, Any]] = {}
    for line in (folder / attack / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["defense"] == defense:
            found[record["batch"]] = record
    parts = [found[batch] for batch in sorted(found)]
    return (
        "".join(p["right"] for p in parts),
        "".join(p["flagged"] for p in parts),
        [value for p in parts for value in p["drift"]],
    )


def gates(folder: Path) -> list[dict[str, Any]]:
    """SCC behind each gate: what it flags, what remains, and how well it tells attacked images.

    The repaired answer is SCC's without a gate, the other that of the undefended model; the gates
    are those of TTC (attacked: the feature moves little under noise), CSR and MAC (much, under a
    mild transform), each on its own published threshold. AUC 0.5 is a coin.
    """
    rows = []
    for name, low in {"ttc": True, "csr": True, "mac": False, "none": True}.items():
        for attack in ("clean", "pgd10@1_255", "pgd10@2_255", "pgd10@4_255"):
            bare = bits(folder, attack, "none")[0]
            repaired = bits(folder, attack, "scc:gate=false")[0]
            if name == "none":
                flags, auc = "1" * len(bare), None
            else:
                _, flags, drift = bits(folder, attack, name)
                calm = torch.tensor(bits(folder, "clean", name)[2])
                auc = _auc(calm, torch.tensor(drift), low)
            right = [r if f == "1" else b for b, r, f in zip(bare, repaired, flags, strict=True)]
            hits = right.count("1")
            rows.append(
                {
                    "gate": name,
                    "attack": attack.replace("@", " ").replace("_", "/"),
                    "n": len(right),
                    "hits": hits,
                    "wilson_95": wilson(hits, len(right)),
                    "flagged": flags.count("1") / len(flags),
                    "auc": None if attack == "clean" else auc,
                }
            )
    return rows


def _auc(clean: torch.Tensor, attacked: torch.Tensor, low: bool) -> float:
    """The chance that an attacked image looks more attacked than a clean one (Mann-Whitney)."""
    pairs = attacked[:, None]
    below = ((pairs < clean).double() + (pairs == clean).double() / 2).mean()
    return float(below if low else 1 - below)


def write_page(stored: Path) -> None:
    """Put the tables between their marks in the page, and those that the README has, too."""
    found = tables(stored)
    _put(PAGE, found)
    shared = ("extrapolation", "informed", "photos")
    beside = {f"docs/results.md#{name}": found[name] for name in shared}
    _put(README, {"docs/results.md": found["methods"]} | beside)


def _put(path: Path, found: dict[str, list[str]]) -> None:
    page = path.read_text()
    for name, lines in found.items():
        mark = f"<!-- table {name} -->"
        if mark not in page:
            raise ValueError(f"{path} has no {mark}")
        body = "\n".join([mark, *lines, ""])
        page = re.sub(rf"{re.escape(mark)}\n(\|.*\n)*", lambda _, body=body: body, page)
    with atomic(path) as partial:
        partial.write_text(page)


def tables(stored: Path) -> dict[str, list[str]]:
    """The page's tables, by name, as lines of Markdown."""
    files = stored.glob("*/results.json")
    runs = {path.parent.name: json.loads(path.read_text()) for path in files}
    # Where two runs have a row, that of the larger one counts.
    runs = dict(sorted(runs.items(), key=lambda run: int(run[1]["run"]["dataset"]["n"])))
    test, swept = (
        {
            (r["defense"], r["attack"].split(":")[0], r["eps"]): Row(**r)
            for name, found in runs.items()
            if ("validation" in name) == validation
            for r in found["rows"]
        }
        for validation in (False, True)
    )
    oblivious = {
        "clean": ("clean", NO_BUDGET),
        "damaged": ("damaged", NO_BUDGET),
        **{f"PGD-10, {eps}": ("pgd10", eps) for eps in BUDGETS},
        "PGD-100, 4/255": ("pgd100", BUDGET),
        "own answer, 4/255": ("pgd-own10", BUDGET),
        "random class, 4/255": ("pgd-random10", BUDGET),
        "AutoAttack (apgd-ce, apgd-dlr), 4/255": ("aa", BUDGET),
        "worst of all, 4/255": ("worst", BUDGET),
    }
    aware = ("view-aware", "pseudo", "bpda", "surrogate", "gate", "unrolled", "worst")
    ablation = {
        "clean": ("clean", "0/255"),
        "PGD-10, 4/255": ("pgd10", BUDGET),
    }
    return {
        "methods": _grid(TABLE, oblivious, test),
        "cost": _cost(stored, test),
        "knowing": _grid(TABLE, {name: (name, BUDGET) for name in aware}, test),
        "ablation": _grid(("scc", *ABLATION, "ttc", "views"), ablation, test),
        "gates": _gates(json.loads((stored / "gates.json").read_text())),
        "controls": _controls(test),
        "leak": _leak(test),
        "extrapolation": _grid((*INFORMED, "scc"), _at_all_budgets("pgd10", *CONTROLS), test),
        "informed": _grid((*INFORMED, "scc"), _at_all_budgets("worst"), test),
        "photos": _photos(stored.parent / "photos.json"),
        "strength": _strength(json.loads((stored.parent / "scc-strength.json").read_text())),
        "budgets": _budgets(swept),
    }


def _at_all_budgets(*attacks: str) -> dict[str, tuple[str, str]]:
    """Columns: clean, damaged, and each attack at each budget."""
    first = (
        {}
        if attacks == ("worst",)
        else {"clean": ("clean", NO_BUDGET), "damaged": ("damaged", NO_BUDGET)}
    )
    named = {"pgd10": "PGD-10", "pgd-own10": "own answer", "pgd-random10": "random class"}
    columns = itertools.product(attacks, BUDGETS)
    return first | {f"{named.get(a, a)}, {eps}": (a, eps) for a, eps in columns}


def _photos(file: Path) -> list[str]:
    """View extrapolation on photographs, from a run of results.json's form."""
    found = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    rows = {(row.defense, row.attack, row.eps): row for row in found}
    return _grid(INFORMED[:3], _at_all_budgets("pgd10", *CONTROLS), rows)


def _strength(found: dict[str, Any]) -> list[str]:
    """SCC's steps beside the strength of its mean, from extrapolation.py."""
    columns = list(found["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --: |" * len(columns)]
    return lines + ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in found["rows"]]


def _cost(stored: Path, rows: dict[tuple[str, str, str], Row]) -> list[str]:
    times = json.loads((stored / "times.json").read_text())["ms_per_image"]
    lines = [
        "| defense | F | B | ms/image | random | optimises | needs text | needs gradients |",
        "| --- |" + " --: |" * 3 + " --- |" * 4,
    ]
    for name in TABLE:
        traits = rows[name, "clean", "0/255"].traits
        words = ["yes" if traits[k] else "no" for k in ("random", "dynamic", "text", "gradients")]
        head = [name, f"{traits['forward']:g}", f"{traits['backward']:g}", f"{times[name]:.1f}"]
        lines.append("| " + " | ".join(head + words) + " |")
    return lines


def _budgets(rows: dict[tuple[str, str, str], Row]) -> list[str]:
    lines = ["| what | F + B | clean | PGD-10, 4/255 |", "| --- |" + " --: |" * 3]
    for name, spec in CHEAP.items():
        clean, attacked = rows[spec, "clean", "0/255"], rows[spec, "pgd10", BUDGET]
        passes = clean.traits["forward"] + clean.traits["backward"]
        lines.append(f"| {name} | {passes:g} | {cell(clean)} | {cell(attacked)} |")
    return lines


def _gates(found: list[dict[str, Any]]) -> list[str]:
    attacks = list(dict.fromkeys(row["attack"] for row in found))
    lines = ["| gate | " + " | ".join(attacks) + " |", "| --- |" + " --: |" * len(attacks)]
    for gate in dict.fromkeys(row["gate"] for row in found):
        cells = []
        for row in (r for r in found if r["gate"] == gate):
            low, high = (100 * end for end in row["wilson_95"])
            text = f"{100 * row['hits'] / row['n']:.1f} [{low:.1f}, {high:.1f}]"
            text += f", flags {100 * row['flagged']:.1f} %"
            cells.append(text if row["auc"] is None else f"{text}, AUC {row['auc']:.2f}")
        lines.append(f"| {gate} | " + " | ".join(cells) + " |")
    return lines


def _controls(rows: dict[tuple[str, str, str], Row]) -> list[str]:
    """Accuracy under PGD that knows the label and under those that do not, where measured."""
    attacks = ("pgd10", *CONTROLS)
    lines = [
        "| defense | budget | clean | " + " | ".join(attacks) + " |",
        "| --- | --- |" + " --: |" * (1 + len(attacks)),
    ]
    for name in _controlled(rows):
        for eps in BUDGETS:
            cells = [cell(rows[name, "clean", "0/255"])]
            cells += [cell(rows[name, attack, eps]) for attack in attacks]
            lines.append(f"| {name} | {eps} | " + " | ".join(cells) + " |")
    return lines


def _controlled(rows: dict[tuple[str, str, str], Row]) -> list[str]:
    """The methods that both controls were measured on, at every budget."""
    asked = [(attack, eps) for attack in CONTROLS for eps in BUDGETS]
    return [name for name in TABLE if all((name, *one) in rows for one in asked)]


def _leak(rows: dict[tuple[str, str, str], Row]) -> list[str]:
    """Accuracy apart for what the undefended model gets right and wrong on clean pictures."""
    columns = {
        "right, clean": ("right", "clean"),
        "right, attacked": ("right", "pgd10"),
        "wrong, clean": ("wrong", "clean"),
        "wrong, attacked": ("wrong", "pgd10"),
        "wrong, by own label": ("wrong", "pgd-own10"),
        "wrong, to a random class": ("wrong", "pgd-random10"),
    }
    lines = [
        "| defense | budget | " + " | ".join(columns) + " |",
        "| --- | --- |" + " --: |" * len(columns),
    ]
    for name in _controlled(rows):
        for eps in BUDGETS:
            cells = []
            for side, attack in columns.values():
                row = rows[name, attack, "0/255" if attack == "clean" else eps]
                part = row.clean_right if side == "right" else row.clean_wrong
                low, high = (100 * end for end in wilson(part["hits"], part["n"]))
                cells.append(f"{part['hits']} of {part['n']} [{low:.1f}, {high:.1f}] %")
            lines.append(f"| {name} | {eps} | " + " | ".join(cells) + " |")
    return lines


def sweeps(stored: Path, path: Path) -> None:
    """One panel for each thing that is varied: clean, PGD-10 at 4/255, with intervals."""
    from matplotlib.figure import Figure

    file = next(p for p in stored.glob("*/results.json") if "validation" in p.parent.name)
    rows = {(r["defense"], r["attack"]): Row(**r) for r in json.loads(file.read_text())["rows"]}
    figure = Figure(figsize=(12, 2.9))
    for axis, (what, values) in zip(
        figure.subplots(1, len(SWEEPS), sharey=True), SWEEPS.items(), strict=True
    ):
        for attack, label in (("clean", "clean"), ("pgd10", "PGD-10, 4/255")):
            found = [rows[spec, attack] for spec in values.values()]
            middle = [100 * row.accuracy for row in found]
            low = [100 * (row.accuracy - row.ci_low) for row in found]
            high = [100 * (row.ci_high - row.accuracy) for row in found]
            axis.errorbar(list(values), middle, [low, high], marker="o", capsize=2, label=label)
        axis.set_title(what, fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"% right, n = {found[0].n}")
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130)


def times(out: Path, precision: str) -> None:
    """Milliseconds an image of each method on 50 clean pictures, median of 3 rounds in turns."""
    setting = Setting(n_samples=50, precision=precision, device="cpu")
    worker = Worker(setting)
    x, _ = worker.data.batch(0, 50)
    found: dict[str, list[float]] = {name: [] for name in TABLE}
    for turn in range(4):
        for name in TABLE:
            began = time.perf_counter()
            worker.defense(name)(x, 0)
            if turn:  # the first warms up
                found[name].append(1e3 * (time.perf_counter() - began) / 50)
    medians = {name: statistics.median(rounds) for name, rounds in found.items()}
    facts = {**environment(worker.model.device), "precision": precision, "batch": 50, "rounds": 3}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "times.json", {"ms_per_image": medians, "environment": facts})


def _grid(
    defenses: tuple[str, ...],
    columns: dict[str, tuple[str, str]],
    rows: dict[tuple[str, str, str], Row],
) -> list[str]:
    """Table of defenses by attacks; attacks measured on none of the defenses are left out."""
    heads = [
        head
        for head, column in columns.items()
        if any((name, *column) in rows for name in defenses)
    ]
    lines = ["| defense | " + " | ".join(heads) + " |", "| --- |" + " --: |" * len(heads)]
    for defense in defenses:
        cells = []
        for attack, eps in (columns[head] for head in heads):
            row = rows.get((defense, attack, eps))
            small = "" if row is None or row.n >= 1000 else f" (n={row.n})"
            cells.append(cell(row) + small)
        lines.append(f"| {defense} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "times", "gather"))
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("tiny_results"))
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--adaptive-n", type=int, default=100)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    if options.what == "run":
        names = options.stages or list(stages(1))
        run(names, options.out, options.n, options.adaptive_n, options.precision)
    elif options.what == "times":
        times(STORED, options.precision)
    else:
        gather(options.out)


if __name__ == "__main__":
    main()
