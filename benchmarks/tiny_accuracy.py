"""The bundled model's accuracy: the sweep its defaults were chosen from, and the test table.

    python benchmarks/tiny_accuracy.py sweep     # validation split, chooses nothing by itself
    python benchmarks/tiny_accuracy.py test      # test split, everything the README quotes
    python benchmarks/tiny_accuracy.py gate      # drift of validation pictures beside tau
    python benchmarks/tiny_accuracy.py precision # the runner's labels beside the reference's

Either can be interrupted; the same command goes on. A JSON and a Markdown table land in
benchmarks/results/cpu/.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import scc_fast
from scc_fast import attacks, tiny
from scc_fast.api import Defender
from scc_fast.config import format_epsilon
from scc_fast.evaluate.report import atomic, markdown, table, write_json
from scc_fast.evaluate.runner import Attack, Row, evaluate, wilson

RESULTS = Path(__file__).parent / "results" / "cpu"
CHUNK = 20


def sweep_defenders(model: scc_fast.VisionLanguage) -> dict[str, Defender]:
    """Undefended, TTC as published, and SCC over N_w, S and T around METHOD.md's values."""
    prompts = tiny.prompts()
    found = {"none": Defender(model, prompts, method="none"), "ttc": published_ttc(model)}
    for warmup, semantic in ((1, 0), (1, 2), (2, 0), (2, 2), (2, 3), (3, 2)):
        config = scc_fast.SCCConfig(warmup_steps=warmup, semantic_steps=semantic)
        found[f"scc N_w {warmup}, S {semantic}"] = Defender(model, prompts, config=config)
    found["scc N_w 2, S 2, T 1"] = Defender(
        model, prompts, config=scc_fast.SCCConfig(temperature=1.0)
    )
    return found


def test_defenders(model: scc_fast.VisionLanguage) -> dict[str, Defender]:
    """What the table always shows: the controls, TTC as published, SCC and its ablations."""
    prompts = tiny.prompts()
    found = {m: Defender(model, prompts, method=m) for m in ("none", "rn", "tte")}
    found["ttc as published"] = published_ttc(model)
    found["scc"] = Defender(model, prompts)
    ablations = {
        "scc, semantic off": {"semantic": False},
        "scc, spatial off": {"spatial": False},
        "scc, paper's views": {"views": "paper"},
    }
    for name, change in ablations.items():
        found[name] = Defender(model, prompts, config=change)
    return found


def published_ttc(model: scc_fast.VisionLanguage) -> Defender:
    """TTC with the paper's values whatever the model's own defaults are."""
    return Defender(model, tiny.prompts(), method="ttc", config=scc_fast.TTCConfig())


def run(
    name: str, defenders: dict[str, Defender], split: str, n: int, plan: list[Attack], seed: int
) -> list[Row]:
    """Evaluate with a progress bar; resumable through a state file beside the results."""
    total = sum(-(-min(n, a.limit or n) // CHUNK) for a in plan)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        for so_far in evaluate(
            defenders,
            "scc" if "scc" in defenders else "scc N_w 2, S 2",
            lambda start, stop: tiny.generate(split, range(start, stop)),
            n,
            plan,
            seed=seed,
            chunk=CHUNK,
            state=RESULTS / f".{name}.state.jsonl",
        ):
            rows = so_far
            bar.advance(task)
    return rows


def gate(model: scc_fast.VisionLanguage, n: int, seed: int) -> None:
    """How far the drift of clean and attacked pictures stays from the gate's threshold."""
    x, labels = tiny.generate("validation", range(n))
    scc = Defender(model, tiny.prompts())
    keys = scc_fast.image_seeds(seed, n)
    found = {}
    for epsilon in (0.0, 2 / 255, 4 / 255):
        seen = x if epsilon == 0 else attacks.pgd(scc, x, labels, keys, epsilon=epsilon)
        # No step: the drift is read from the noise alone.
        looked = Defender(model, tiny.prompts(), method="ttc", config={"steps": 0})(seen, keys + 1)
        found[format_epsilon(epsilon)] = {
            "n": n,
            "flagged": int(looked.flagged.sum()),
            "median_drift": float(looked.drift.median()),
            "max_drift": float(looked.drift.max()),
        }
    write_json(RESULTS / "tiny-gate.json", {"tau": scc_fast.TTCConfig().tau, "pgd_10": found})


def precision(model: scc_fast.VisionLanguage, n: int, seed: int) -> None:
    """SCC's accuracy on the runner, and how many of its labels are the reference's."""
    prompts = tiny.prompts()
    defenders = {"reference, fp32": Defender(model, prompts, backend="reference")}
    for name in ("fp32", "bf16"):
        defenders[f"runner, {name}"] = Defender(model, prompts, engine="runner", precision=name)
    rows: list[Row] = []
    keys = scc_fast.image_seeds(seed, n)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("precision", total=2 * -(-n // CHUNK))
        for epsilon in (0.0, 4 / 255):
            right, same = dict.fromkeys(defenders, 0), dict.fromkeys(defenders, 0)
            for start in range(0, n, CHUNK):
                x, labels = tiny.generate("test", range(start, min(start + CHUNK, n)))
                key = keys[start : start + CHUNK]
                if epsilon:
                    x = attacks.pgd(next(iter(defenders.values())), x, labels, key, epsilon=epsilon)
                found = {name: one(x, key + 1).labels for name, one in defenders.items()}
                first = next(iter(found.values()))
                for name, got in found.items():
                    right[name] += int((got == labels).sum())
                    same[name] += int((got == first).sum())
                bar.advance(task)
            attack = f"pgd 10 {format_epsilon(epsilon)}, oblivious" if epsilon else "clean"
            for name in defenders:
                share = {"n": n, "right": right[name], "wilson_95": list(wilson(right[name], n))}
                rows.append({"encoder": name, "attack": attack, **share, "same": same[name]})
    lines = ["| encoder | attack | right | 95 % | labels as the reference |"]
    lines.append("| --- | --- | --: | --: | --: |")
    for row in rows:
        low, high = (100 * end for end in row["wilson_95"])
        lines.append(
            f"| {row['encoder']} | {row['attack']} | {100 * row['right'] / n:.1f} "
            f"| [{low:.1f}, {high:.1f}] | {100 * row['same'] / n:.1f} % |"
        )
    write_json(RESULTS / "tiny-precision.json", {"n": n, "seed": seed, "rows": rows})
    title = f"# Bundled model, SCC, test pictures, n = {n}: precision of the encoder"
    with atomic(RESULTS / "tiny-precision.md") as partial:
        partial.write_text("\n".join([title, "", *lines, ""]))


def save(name: str, rows: list[Row], title: str) -> None:
    """JSON and Markdown side by side, and the table on the terminal."""
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scc_fast": scc_fast.__version__,
    }
    write_json(RESULTS / f"{name}.json", {"title": title, "machine": machine, "rows": rows})
    with atomic(RESULTS / f"{name}.md") as partial:
        partial.write_text(f"# {title}\n\n{markdown(rows)}\n\nPercent correct, 95 % Wilson.\n")
    Console(width=220).print(table(rows, title))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sweep", "test", "gate", "precision"))
    parser.add_argument("--n", type=int, help="pictures; 500 for the sweep, 1000 for the test")
    parser.add_argument("--adaptive-n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = scc_fast.load_model("tiny", device="cpu")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.what == "gate":
        gate(model, options.n or 500, options.seed)
        return
    if options.what == "precision":
        precision(model, options.n or 1000, options.seed)
        return
    if options.what == "sweep":
        n = options.n or 500
        plan = [Attack(), Attack("pgd", 4 / 255)]
        rows = run("tiny-sweep", sweep_defenders(model), "validation", n, plan, options.seed)
        save("tiny-sweep", rows, f"Bundled model, validation, n = {n}: choice of defaults")
        return
    n = options.n or 1000
    plan = [Attack(), *(Attack("pgd", steps / 255) for steps in (1, 2, 4))]
    rows = run("tiny-test", test_defenders(model), "test", n, plan, options.seed)
    save("tiny-test", rows, f"Bundled model, test, n = {n}")
    few = options.adaptive_n
    aware = [
        Attack("pgd", 4 / 255, limit=few),
        Attack("view-aware", 4 / 255, steps=30, limit=few),
        Attack("adaptive", 4 / 255, steps=30, eot=2, limit=few),
    ]
    names = ("none", "tte", "ttc as published", "scc")
    some = {k: d for k, d in test_defenders(model).items() if k in names}
    rows = run("tiny-adaptive", some, "test", few, aware, options.seed)
    save("tiny-adaptive", rows, f"Bundled model, test, n = {few}: attacks that know the defense")


if __name__ == "__main__":
    main()
