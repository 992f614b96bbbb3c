"""Milliseconds of a call of each method, all in one run, interleaved: ratios to none and to SCC.

    python benchmarks/method_times.py [MODEL] [--batch 1,8] [--precision fp32,bf16] [--threads 1]

The gate is off where there is one that would spare pictures, so that all are repaired. Written to
results/cpu/method-times-MODEL.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from scc_fast import Defender, load_model, tiny
from scc_fast._files import write_json
from scc_fast._progress import with_progress
from scc_fast.bench.machine import commit, device_name, versions
from scc_fast.defenses import DEFENSES

STORED = Path(__file__).parent / "results" / "cpu"
METHODS: dict[str, dict[str, Any]] = {
    "none": {}, "views": {}, "extrapolate": {}, "ttc": {"tau": 1e9}, "scc": {"gate": False},
    "agc": {}, "dbd": {},
}  # fmt: skip


def timed(model: Any, prompts: list[str], batch: int, precision: str, seconds: float) -> list[Any]:
    """A row for each method: median and quartiles of rounds in which every method has a turn."""
    x = torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(batch))
    made = {
        name: Defender(model, prompts, method=name, config=config, precision=precision)
        for name, config in METHODS.items()
        if name in DEFENSES
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for defender in made.values():
        defender(x, 0)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times["none"]) < 5:
        for name, defender in made.items():
            start = time.perf_counter()
            defender(x, 0)
            times[name].append(1e3 * (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "model": model.name,
            "batch": batch,
            "precision": precision,
            "method": name,
            "engine": made[name].engine,
            "F": made[name].traits.forward,
            "B": made[name].traits.backward,
            "ms": round(median[name], 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(values, n=4)[::2]],
            "rounds": len(values),
            "times none": round(median[name] / median["none"], 3),
            "scc over it": round(median["scc"] / median[name], 3),
        }
        for name, values in times.items()
    ]


def main() -> None:
    say = argparse.ArgumentParser(description=__doc__)
    say.add_argument("model", nargs="?", default="tiny")
    say.add_argument("--batch", default="1,8")
    say.add_argument("--precision", default="fp32,bf16")
    say.add_argument("--seconds", type=float, default=10.0)
    say.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = say.parse_args()
    torch.set_num_threads(asked.threads)
    model = load_model(asked.model)
    made_up = [f"a photo of a thing {i}" for i in range(1000)]
    prompts = tiny.prompts() if asked.model == "tiny" else made_up
    cases = [(int(b), p) for p in asked.precision.split(",") for b in asked.batch.split(",")]
    rows = []
    for batch, precision in with_progress(cases, asked.model):
        rows += timed(model, prompts, batch, precision, asked.seconds)
    where = {"device": device_name("cpu"), "versions": versions(), "commit": commit()}
    found = {**where, "threads": asked.threads, "rows": rows}
    write_json(STORED / f"method-times-{asked.model}.json", found)
    print("| precision | batch | method | F + B | ms | × none | SCC over it |")
    print("| --- | --: | --- | --: | --: | --: | --: |")
    for row in rows:
        cells = [row["precision"], row["batch"], row["method"], f"{row['F']:g} + {row['B']:g}"]
        cells += [f"{row[name]:.2f}" for name in ("ms", "times none", "scc over it")]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
