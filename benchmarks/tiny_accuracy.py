"""Labels and accuracy of SCC on the bundled model by the encoder's precision.

    python benchmarks/tiny_accuracy.py    # test split; the runner beside the reference

A JSON and a Markdown table land in benchmarks/results/cpu/. All else that is known of the bundled
model's accuracy is made by tiny_results.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import scc_fast
from scc_fast import tiny
from scc_fast._files import atomic, write_json
from scc_fast.api import Defender, make_defense
from scc_fast.attacks import PGD
from scc_fast.config import format_epsilon
from scc_fast.evaluate.results import wilson

RESULTS = Path(__file__).parent / "results" / "cpu"
CHUNK = 20


def precision(model: scc_fast.VisionLanguage, n: int, seed: int) -> None:
    """SCC's accuracy on the runner, and how many of its labels are the reference's."""
    prompts = tiny.prompts()
    defenders = {"reference, fp32": Defender(model, prompts, backend="reference")}
    for name in ("fp32", "bf16"):
        defenders[f"runner, {name}"] = Defender(model, prompts, engine="runner", precision=name)
    bare = make_defense("none", model, prompts)
    rows: list[dict[str, Any]] = []
    keys = scc_fast.image_seeds(seed, n)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("precision", total=2 * -(-n // CHUNK))
        for epsilon in (0.0, 4 / 255):
            right, same = dict.fromkeys(defenders, 0), dict.fromkeys(defenders, 0)
            for start in range(0, n, CHUNK):
                x, labels = tiny.generate("test", range(start, min(start + CHUNK, n)))
                key = keys[start : start + CHUNK]
                if epsilon:
                    x = PGD(epsilon=epsilon).run(bare, x, labels, key)
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


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    precision(scc_fast.load_model("tiny", device="cpu"), options.n, options.seed)


if __name__ == "__main__":
    main()
