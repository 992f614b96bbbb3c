"""Results of every method, engine, attack and data set, to be compared before and after a change.

    python benchmarks/sample.py make FILE        # on the commit before
    python benchmarks/sample.py compare FILE     # on the commit after: what is not equal to the bit

What is made is a function of the code and the machine: both sides belong on one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from scc_fast import image_seeds, load_model, tiny
from scc_fast.api import make_defense
from scc_fast.attacks import parse_attack
from scc_fast.defenses import DEFENSES
from scc_fast.evaluate.data import NAMES, open_dataset

SPECS = (
    *DEFENSES,
    *("scc:gate=false", "scc:semantic=false", "scc:spatial=false", "scc:views=paper"),
    *("scc:tau=0.03", "ttc:tau=0.03", "ttc:steps=0", "scc:semantic_steps=0:warmup_steps=0"),
    *("hd:published=true", "anti_adv:published=true", "csr:published=true", "csr:threshold=0.9"),
    *("dbd:published=true", "tte:published=true:blur=true", "doc:probe_noise=uniform"),
)
SERVED = ({}, {"engine": "eager"}, {"backend": "reference"}, {"backend": "triton"})
SIZES = ((64, 64), (45, 70))
OBLIVIOUS = ("pgd3", "cw3", "apgd-ce3", "apgd-dlr3", "pgd-own3", "pgd-random3", "square:queries=10")
AWARE = ("view-aware3", "view-aware3:of=each", "bpda2", "bpda2:loss=margin", "gate2", "pseudo2")


def results() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Name and tensors of each part of the sample."""
    model, prompts = load_model("tiny"), tiny.prompts()
    drawn, labels = tiny.generate("test", range(5))
    seeds, attacker = image_seeds(3, 5), image_seeds(4, 5)
    for size, spec, options in itertools.product(SIZES, SPECS, SERVED):
        if options.get("backend") == "triton" and spec not in ("scc", "ttc", "rn", "views"):
            continue
        x = torch.nn.functional.interpolate(drawn, size) if size != SIZES[0] else drawn
        found = make_defense(spec, model, prompts, **options)(x, seeds)
        parts = (found.logits, found.delta, found.drift, found.flagged.float())
        yield f"{spec} {options} {size}", parts
    for spec in OBLIVIOUS:
        target = make_defense("none", model, prompts)
        yield spec, (parse_attack(spec, 4 / 255).run(target, drawn, labels, attacker),)
    for name, spec in itertools.product(SPECS, (*AWARE, "unrolled2")):
        target, attack = make_defense(name, model, prompts), parse_attack(spec, 4 / 255)
        if attack.suits(target):
            yield f"{name} {spec}", (attack.run(target, drawn, labels, attacker),)
    for name in NAMES:
        try:
            data = open_dataset(name, model, n_samples=4)
        except Exception:  # not on this disk
            continue
        yield f"data {name}", data.batch(0, 4)


def main() -> int:
    what, file = sys.argv[1], Path(sys.argv[2])
    if what == "make":
        torch.save(dict(results()), file)
        return 0
    before, unequal = torch.load(file), 0
    for name, parts in results():
        if name not in before:
            print(f"{name}: new")
            continue
        pairs = [
            (a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before[name], parts, strict=True)
        ]
        if not all(torch.equal(*pair) for pair in pairs):
            off = [float((a - b).abs().max()) for a, b in pairs]
            print(f"{name}: off by at most {', '.join(f'{value:.3g}' for value in off)}")
            unequal += 1
    print(f"{len(before)} in the sample, {unequal} not equal to the bit")
    return unequal > 0


if __name__ == "__main__":
    sys.exit(main())
