"""The three files of run_gpu.sh: python gpu_report.py OUT SCRATCH yes|no true|false.

Standard library alone: it must work on a broken machine.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def put(path: Path, text: str) -> None:
    """Write a file atomically."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "w") as partial:
            partial.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def said(*command: str) -> str:
    """Output of a command, or the reason why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known ({error})"
    return (done.stdout or done.stderr).strip() or f"exit status {done.returncode}"


def machine(scratch: Path, device: bool) -> dict[str, Any]:
    """Description of the machine, cached."""
    stored = scratch / "machine.json"
    if stored.exists():
        return dict(json.loads(stored.read_text()))
    facts: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version()}
    facts["cores"] = os.cpu_count()
    torch = "import torch; print(torch.__version__, torch.version.cuda)"
    facts["torch, its CUDA"] = said(sys.executable, "-c", torch)
    facts["packages"] = said(sys.executable, "-m", "pip", "freeze").splitlines() if device else []
    if device:
        query = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem"
        facts["gpu"] = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        facts["nvcc"] = said("nvcc", "--version").splitlines()[-1]
    stored.write_text(json.dumps(facts))
    return facts


def steps_of(scratch: Path) -> list[dict[str, Any]]:
    """Name, status, seconds and reason of every step so far."""
    lines = (scratch / "steps").read_text().splitlines()
    keys = ("name", "status", "seconds", "reason")
    steps = [dict(zip(keys, line.split("\t"), strict=True)) for line in lines]
    return [{**step, "seconds": int(step["seconds"])} for step in steps]


def main(out: Path, scratch: Path, device: bool, finished: bool) -> None:
    """Rewrite JSON, table and log."""
    found: dict[str, Any] = {"environment": {}, "rows": []}
    table = "No benchmark has left a row.\n"
    if (scratch / "rows.json").exists():
        found = json.loads((scratch / "rows.json").read_text())
        table = (scratch / "rows.md").read_text()
    found["environment"]["machine"] = machine(scratch, device)
    steps = steps_of(scratch)
    failed = [step["name"] for step in steps if step["status"] == "failed"]
    how = {"with_device": device, "finished": finished, "failed": failed, "steps": steps}
    page = "# run_gpu" + ("" if device else " --no-device")
    page += ("" if finished else ", not finished") + "\n\n| step | status | s | |\n"
    page += "| --- | --- | --: | --- |\n"
    for step in steps:
        page += f"| {step['name']} | {step['status']} | {step['seconds']} | {step['reason']} |\n"
    started = scratch / "date"
    if not started.exists():  # one name, also past midnight
        started.write_text(datetime.date.today().isoformat())
    path = out / started.read_text()
    put(path.with_suffix(".json"), json.dumps({**found, **how}, indent=1) + "\n")
    put(path.with_suffix(".md"), f"{page}\n{table}")
    put(path.with_suffix(".log"), (scratch / "log").read_text(errors="replace"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "yes", sys.argv[4] == "true")
