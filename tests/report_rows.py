"""Results as the runner writes them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRAITS = {"none": (1, 0), "ttc": (4, 2), "scc": (21, 16)}
HOSTILE = "<x>&_%|"


def row(
    defense: str, attack: str = "clean", hits: int = 800, n: int = 1000, **more: Any
) -> dict[str, Any]:
    """A row of results.json; its interval is round, so that what is read can be told apart."""
    method = defense.split(":")[0]
    forward, backward = TRAITS.get(method, (1, 0))
    share = hits / n
    return {
        "defense": defense,
        "method": method,
        "attack": attack,
        "title": {"clean": "clean", "pgd10": "PGD-10", "worst": "worst per image"}.get(
            attack, attack
        ),
        "aware": attack in ("bpda", "worst"),
        "eps": "0/255" if attack == "clean" else "1/255",
        "seed": 0,
        "n": n,
        "hits": hits,
        "accuracy": share,
        "ci_low": max(0.0, share - 0.02),
        "ci_high": min(1.0, share + 0.03),
        "clean_right": {"n": n - n // 5, "hits": hits // 2},
        "clean_wrong": {"n": n // 5, "hits": hits // 10},
        "flagged": None,
        "traits": {
            "forward": forward,
            "backward": backward,
            "random": method == "scc",
            "dynamic": backward > 0,
            "source": "arXiv 2510.22785",
        },
        "config": {"semantic": "semantic=false" not in defense} if method == "scc" else {},
        "attack_settings": {"attack": "pgd", "steps": 10, "alpha": 1 / 255}
        if attack == "pgd10"
        else {},
        **more,
    }


def write(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A results.json as the runner writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = {"name": "ViT-B-32", "source": "open_clip openai", "weights_sha256": "ab" * 32}
    dataset = {
        "name": "cifar10",
        "paper": "CIFAR-10",
        "split": "test",
        "protocol": "ttc",
        "template": "This is a photo of a {}.",
        "n": 1000,
        "pictures": 10000,
        "pictures_expected": 10000,
        "classes": [str(digit) for digit in range(10)],
        "sampling_seed": 0,
        "prompts_sha256": "cd" * 32,
        "duplicate_prompts": [],
    }
    content = {
        "format": 1,
        "run": {
            "model": {**name, "image_size": [224, 224], "precision": "fp32", **(model or {})},
            "dataset": {**dataset, **(data or {})},
            "seed": seed,
            "batch": 50,
        },
        "environment": {"torch": "2.15.0", "scc_fast": "0.1.0", "device": "cpu"},
        "rows": [{**one, "seed": seed} for one in rows],
    }
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    return path
