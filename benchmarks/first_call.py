"""A process that makes a defender and calls it: python first_call.py MODEL DEVICE THREADS yes|no.

Prints what took how long as one line of JSON; the last argument says whether warmup() is called.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

CALLS = 3


def main(name: str, kind: str, threads: int, warm: bool) -> None:
    """Time it from the import on."""
    started = time.perf_counter()
    import torch

    import scc_fast
    from scc_fast.bench import measure

    torch.set_num_threads(threads)
    imported = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*random weights.*")
    model = scc_fast.load_model(name, device=kind)
    loaded = time.perf_counter()
    text = measure.unit_features(1000, model.embed_dim, model.device)
    config = scc_fast.SCCConfig(gate=False)
    defender = scc_fast.Defender(model, text_features=text, config=config)
    images = measure.pictures(1, model)
    ready = time.perf_counter()
    if warm:
        defender.warmup()
    warmed = time.perf_counter()
    calls = []
    for _ in range(CALLS):
        began = time.perf_counter()
        defender(images, 1)  # synchronises
        calls.append((time.perf_counter() - began) * 1e3)
    found = {
        "import": (imported - started) * 1e3,
        "load": (loaded - imported) * 1e3,
        "defender": (ready - loaded) * 1e3,
        "warmup": (warmed - ready) * 1e3,
        "calls": calls,
        "precision": defender.precision,
        "backend": defender.backend,
        "engine": defender.engine,
        "shape": f"{'×'.join(map(str, images.shape))}, {measure.setting(defender)}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "yes")
