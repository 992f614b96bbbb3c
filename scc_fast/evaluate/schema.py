"""What a row of a JSON file means: the same name is the same thing in every command's file.

`scc-fast demo`, `defend`, `evaluate` and `bench` write {"rows": […], …} with --json; results.json
and timings.json hold rows of these fields, too. A row has those that its command knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One field.

    Args:
        kinds: its type; a number is an int or a float. With None: it may be null.
        text: what it means.
    """

    kinds: tuple[type, ...]
    text: str


_TEXT, _FLAG, _COUNT, _DICT = (str,), (bool,), (int,), (dict,)
_NUMBER, _MAYBE = (int, float), (int, float, type(None))

FIELDS: dict[str, Field] = {
    # who was measured
    "method": Field(_TEXT, "name of the defense, one of `scc_fast.defenses`"),
    "defense": Field(_TEXT, "the defense as it was asked for, such as `scc:semantic=false`"),
    "config": Field(_DICT, "its settings"),
    "traits": Field(_DICT, "what it costs and needs: see `scc_fast.defenses.Traits`"),
    "model": Field(_TEXT, "name of the model"),
    "classes": Field((int, type(None)), "how many"),
    "seed": Field(_COUNT, "of the noise"),
    # accuracy
    "attack": Field(_TEXT, "the attack as it was asked for; `clean` is none, `worst` is over `of`"),
    "title": Field(_TEXT, "name of the attack"),
    "aware": Field(_FLAG, "the attack knew the defense"),
    "eps": Field(_TEXT, "budget of the attack, such as `4/255`; `0/255` where it has none"),
    "attack_settings": Field(_DICT, "of the attack"),
    "of": Field((list,), "the attacks that a `worst` row is over: right only if right under each"),
    "n": Field(_COUNT, "pictures"),
    "hits": Field(_COUNT, "of these answered right"),
    "accuracy": Field(_NUMBER, "hits / n"),
    "ci_low": Field(_NUMBER, "lower end of the 95 % Wilson interval"),
    "ci_high": Field(_NUMBER, "upper end"),
    "clean_right": Field(_DICT, "n and hits of the pictures that the bare model gets right clean"),
    "clean_wrong": Field(_DICT, "n and hits of the others"),
    # the gate
    "flagged": Field(
        (bool, *_MAYBE), "share that the gate took as attacked; of one picture whether"
    ),
    "drift": Field(_MAYBE, "of one picture: what the gate measured; null without a gate"),
    # time: after a warm-up, so that loading, compiling and capturing are not in it
    "ms_per_image": Field(_MAYBE, "median time of a call over its pictures, of the defense alone"),
    "attack_ms_per_image": Field(_MAYBE, "of making the attacked pictures, not warmed up"),
    "rounds": Field((int, type(None)), "how many calls were timed, after a warm-up"),
    "p50_ms": Field(_MAYBE, "median time of a call with `batch` pictures"),
    "p99_ms": Field(_MAYBE, "its 99th percentile"),
    "images_per_s": Field(_MAYBE, "pictures a second: 1000 · batch / p50_ms"),
    "baseline": Field(_TEXT, "the row, or what `shape` names, that `ratio` is against"),
    "baseline_ms": Field(_MAYBE, "its median time of a call"),
    "ratio": Field(_MAYBE, "baseline_ms / p50_ms, of peaks where memory is measured"),
    "spread": Field(_MAYBE, "the larger interquartile range over median of the two"),
    "others": Field(_MAYBE, "cores that other processes kept busy meanwhile"),
    "loaded": Field(_FLAG, "too wide a spread, too busy a machine, too few rounds to conclude"),
    # what bounds it
    "bytes_moved": Field(_MAYBE, "bytes that an op must move"),
    "gb_per_s": Field(_MAYBE, "of these a second"),
    "copy_gb_per_s": Field(_MAYBE, "the same of a copy, measured in turns"),
    "share_of_copy": Field(_MAYBE, "gb_per_s / copy_gb_per_s"),
    "floor_ms": Field(_MAYBE, "no implementation is faster on this machine"),
    "share_of_floor": Field(_MAYBE, "floor_ms / p50_ms"),
    "peak_mib": Field(_MAYBE, "peak memory of a call beyond its result"),
    # of a benchmark
    "group": Field(_TEXT, "what is compared"),
    "name": Field(_TEXT, "the side: a method, an op, `reference` or `undefended`"),
    "batch": Field(_COUNT, "pictures of a call"),
    "shape": Field(_TEXT, "sizes and steps, in words"),
    "precision": Field(_TEXT, "of the encoder's products"),
    "backend": Field(_TEXT, "who served the ops"),
    "engine": Field(_TEXT, "who ran the encoder"),
    "device": Field(_TEXT, "the processor"),
    "threads": Field(_COUNT, "of torch"),
    "memory": Field(_TEXT, "`kept`, `fresh` or `cached`: where a call's memory comes from"),
    "quick": Field(_FLAG, "a run that proves no more than that it runs"),
    "versions": Field(_DICT, "of the packages"),
    "commit": Field(_TEXT, "of scc_fast"),
    "reach": Field((dict, type(None)), "what is asked of the row"),
    "reached": Field((bool, type(None)), "whether it is reached"),
    # of a picture file
    "picture": Field(_TEXT, "its path"),
    "repaired": Field(_TEXT, "path of the repaired picture"),
    "before": Field((list,), "labels and probabilities without a defense"),
    "after": Field((list,), "the same with it"),
}


def misfits(row: Mapping[str, Any]) -> list[str]:
    """What of a row is not as FIELDS has it, in words; empty where all is."""
    unknown = [f"{name} is no field" for name in row if name not in FIELDS]
    known = ((name, value, FIELDS[name].kinds) for name, value in row.items() if name in FIELDS)
    return unknown + [
        f"{name} is of type {type(value).__name__}"
        for name, value, kinds in known
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    ]


def table() -> str:
    """FIELDS as the Markdown table of docs/evaluate.md."""
    lines = ["| field | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {field.text} |" for name, field in FIELDS.items()]
    return "\n".join(lines)
