"""Schema of rows: fields common to all JSON files.

`scc-fast demo`, `defend`, `evaluate` and `bench` write {"rows": […], …} with --json; results.json
and timings.json have the same fields. Each command writes some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """Field of a row.

    Args:
        kinds: allowed types.
        text: meaning.
    """

    kinds: tuple[type, ...]
    text: str


_TEXT, _FLAG, _COUNT, _DICT = (str,), (bool,), (int,), (dict,)
_NUMBER, _MAYBE = (int, float), (int, float, type(None))

FIELDS: dict[str, Field] = {
    # who was measured
    "method": Field(_TEXT, "name of the defense, one of `scc_fast.defenses`"),
    "defense": Field(_TEXT, "requested spec, such as `scc:semantic=false`"),
    "config": Field(_DICT, "settings of the defense"),
    "traits": Field(_DICT, "cost and requirements: see `scc_fast.defenses.Traits`"),
    "model": Field(_TEXT, "name of the model"),
    "classes": Field((int, type(None)), "number of classes"),
    "seed": Field(_COUNT, "seed of the noise"),
    # accuracy
    "attack": Field(_TEXT, "requested spec; `clean`: none, `worst`: over `of`"),
    "title": Field(_TEXT, "name of the attack"),
    "aware": Field(_FLAG, "the attack knew the defense"),
    "eps": Field(_TEXT, "budget of the attack, such as `4/255`; `0/255` where it has none"),
    "attack_settings": Field(_DICT, "settings of the attack"),
    "of": Field((list,), "attacks of a `worst` row: right only if right under each"),
    "n": Field(_COUNT, "pictures"),
    "hits": Field(_COUNT, "correct answers"),
    "accuracy": Field(_NUMBER, "hits / n"),
    "ci_low": Field(_NUMBER, "lower end of the 95 % Wilson interval"),
    "ci_high": Field(_NUMBER, "upper end"),
    "clean_right": Field(
        _DICT, "n and hits of the pictures that the undefended model gets right when clean"
    ),
    "clean_wrong": Field(_DICT, "n and hits of the others"),
    # the gate
    "flagged": Field((bool, *_MAYBE), "share flagged by the gate; for one picture: whether"),
    "drift": Field(_MAYBE, "the gate's measure of one picture; null without a gate"),
    # time: after a warm-up, so that loading, compiling and capturing are not in it
    "ms_per_image": Field(_MAYBE, "median time of a call per picture, of the defense alone"),
    "attack_ms_per_image": Field(_MAYBE, "time to make the attacked pictures, not warmed up"),
    "rounds": Field((int, type(None)), "number of timed calls, after a warm-up"),
    "p50_ms": Field(_MAYBE, "median time of a call with `batch` pictures"),
    "p99_ms": Field(_MAYBE, "its 99th percentile"),
    "images_per_s": Field(_MAYBE, "pictures per second: 1000 · batch / p50_ms"),
    "baseline": Field(_TEXT, "baseline of `ratio`: a row, or described in `shape`"),
    "baseline_ms": Field(_MAYBE, "median time of a call of the baseline"),
    "ratio": Field(_MAYBE, "baseline_ms / p50_ms, or ratio of peaks where memory is measured"),
    "spread": Field(_MAYBE, "larger interquartile range over median of the two"),
    "others": Field(_MAYBE, "cores kept busy by other processes"),
    "loaded": Field(_FLAG, "spread too wide, machine too busy or rounds too few to conclude from"),
    # what bounds it
    "bytes_moved": Field(_MAYBE, "bytes that an op must move"),
    "gb_per_s": Field(_MAYBE, "bytes_moved per second"),
    "copy_gb_per_s": Field(_MAYBE, "the same for an interleaved copy"),
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
    "backend": Field(_TEXT, "backend of the ops"),
    "engine": Field(_TEXT, "engine of the encoder"),
    "device": Field(_TEXT, "the processor"),
    "threads": Field(_COUNT, "threads of torch"),
    "memory": Field(_TEXT, "`kept`, `fresh` or `cached`: where a call's memory comes from"),
    "quick": Field(_FLAG, "smoke test, not meaningful"),
    "versions": Field(_DICT, "versions of packages"),
    "commit": Field(_TEXT, "commit of scc_fast"),
    "reach": Field((dict, type(None)), "targets of the row"),
    "reached": Field((bool, type(None)), "whether they are reached"),
    # of a picture file
    "picture": Field(_TEXT, "path of the picture"),
    "repaired": Field(_TEXT, "path of the repaired picture"),
    "before": Field((list,), "labels and probabilities without a defense"),
    "after": Field((list,), "the same with it"),
}


def misfits(row: Mapping[str, Any]) -> list[str]:
    """Violations of FIELDS in a row, as text."""
    unknown = [f"{name} is not a field" for name in row if name not in FIELDS]
    known = ((name, value, FIELDS[name].kinds) for name, value in row.items() if name in FIELDS)
    return unknown + [
        f"{name} is of type {type(value).__name__}"
        for name, value, kinds in known
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    ]


def table() -> str:
    """Markdown table of FIELDS, in docs/evaluate.md."""
    lines = ["| field | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {field.text} |" for name, field in FIELDS.items()]
    return "\n".join(lines)
