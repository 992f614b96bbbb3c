"""Every Triton kernel compiles for Ampere and Hopper, as its host function launches it.

No GPU is needed: Triton's compiler and ptxas run anywhere. The other tests of the kernels interpret
them where there is none, and an interpreter forgives what a compiler refuses.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compile
KERNELS = Path(__file__).parents[1] / "kernels"
CAPABILITIES = (90, 80)
EXACT = ("_warp_kernel", "_views_kernel", "_adjoint_kernel", "_pgd_step_kernel")
ENCODER = ("_add_norm_kernel", "_add_norm_back_kernel", "_gelu_kernel", "_gelu_back_kernel")
GEOMETRIC = ([0, 0, 0, 1, 0, 0, 0, 7, 7, 1, -7, -7], [0.0] * 4)
NOISY = ([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, -70], [0.0, 0.0, 0.02, 0.02])

# Registers, and what is loaded twice, are a compiler's own choice: these have been looked at.
MEASURED = ("3.6.", "3.8.")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """One row a kernel and case; see _facts."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def choice(good: bool, row: Row) -> None:
    """Of the compiler: asserted where it has been measured, told of other releases."""
    if not good:
        triton = version("triton")
        assert not triton.startswith(MEASURED), row
        warnings.warn(f"triton {triton}: {row}", stacklevel=2)


def test_every_kernel_compiles(rows: list[Row]) -> None:
    written = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())
    }
    assert written
    for capability in CAPABILITIES:
        assert {row["kernel"] for row in rows if row["capability"] == capability} == written


def test_views_and_step_round_as_the_reference(rows: list[Row]) -> None:
    """No contraction, no approximate division, nothing flushed to zero."""
    exact = [row for row in rows if row["kernel"] in EXACT and "noisy" not in row["case"]]
    assert exact
    for row in exact:
        assert not row["fma"], row
        assert not row["ftz"], row
    for row in rows:
        assert not (row["kernel"] in EXACT and row["div.full"]), row


def test_views_and_step_store_16_bytes_at_once(rows: list[Row]) -> None:
    aligned = [row for row in rows if row["kernel"] in EXACT and "aligned" in row["case"]]
    assert aligned
    for row in aligned:
        choice(row["stores of 16 bytes"] == row["stores"], row)


def test_views_and_step_do_not_spill(rows: list[Row]) -> None:
    found = [row for row in rows if row["kernel"] in EXACT and row["stack"] is not None]
    if not found:
        pytest.skip("this triton brings no ptxas or cuobjdump: only the PTX was checked")
    for row in found:
        choice(row["stack"] == 0, row)


def test_the_encoder_loads_each_number_once_and_does_not_spill(rows: list[Row]) -> None:
    found = [row for row in rows if row["kernel"] in ENCODER]
    assert found
    for row in found:
        choice(not row["stack"], row)
        # Two loads each of x, y, weight and bias: a row is read once, though used four times.
        if row["kernel"] == "_add_norm_kernel" and row["case"] == "encoder, float32":
            choice(row["loads"] <= 8, row)


# What follows runs in a process of its own: with TRITON_INTERPRET set triton cannot compile.


def _facts(kernel: Any) -> Row:
    ptx = kernel.asm["ptx"]
    row: Row = {word: ptx.count(word) for word in ("fma", "ftz", "div.full")}
    row["loads"] = len(re.findall(r"ld\.global", ptx))
    row["stores"] = len(re.findall(r"st\.global", ptx))
    row["stores of 16 bytes"] = len(re.findall(r"st\.global\.v4\.b32", ptx))
    row["stack"] = _stack(kernel.asm["cubin"])
    return row


def _stack(cubin: bytes) -> int | None:
    """Bytes a thread has on its stack, where registers spill to."""
    tool = _nvidia_tool("cuobjdump")
    if not cubin or tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"STACK:(\d+)", output)
    assert match, output
    return int(match[1])


def _nvidia_tool(name: str) -> str | None:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else shutil.which(name)


def _calls(capability: int) -> dict[str, Callable[[], Any]]:
    """Calls of the host functions, by the name of their case."""
    import torch

    half = torch.bfloat16
    calls: dict[str, Callable[[], Any]] = {"philox": _call_philox}
    patches: dict[str, Any] = {
        "aligned": (224, 224, GEOMETRIC, half, 0, True),
        "noisy": (224, 224, NOISY, half, 0, True),
    }
    sizes: dict[str, Any] = {"heads": (4, 1000, 512, half)}
    streams: dict[str, Any] = {"encoder": (768, half)}
    if capability == 90:
        for dtype, patch in ((half, 14), (half, 32), (torch.float16, 0), (torch.float32, 0)):
            name = f"aligned, patch {patch}, {dtype}"
            patches[name] = (224, 224, GEOMETRIC, dtype, patch, True)
        patches |= {
            "noisy, patch 14": (224, 224, NOISY, torch.float32, 14, False),
            "odd": (33, 35, GEOMETRIC, torch.float32, 0, False),
            "odd, noisy, patch 7": (33, 35, NOISY, half, 7, True),
            "odd, noisy, patch 8": (33, 35, NOISY, half, 8, True),
            "one pixel": (1, 1, ([0, 0, 0], [0.0]), torch.float32, 1, False),
        }
        sizes |= {
            "heads, float32": (4, 1000, 512, torch.float32),
            "heads, one": (1, 1, 1, half),
            "heads, odd": (3, 5, 7, torch.float16),
            "heads, 64 views": (64, 100, 512, half),
            "heads, large": (8, 20011, 768, half),
        }
        streams |= {
            "encoder, float32": (768, torch.float32),
            "encoder, odd": (769, torch.float16),
            "encoder, one": (1, half),
            "encoder, widest": (8192, half),
            "encoder, in tiles": (9000, torch.float32),
        }
    calls |= {"warps": _call_warp}
    calls |= {name: lambda case=case: _call_encoder(*case) for name, case in streams.items()}
    calls |= {name: lambda case=case: _call_views(*case) for name, case in patches.items()}
    return calls | {name: lambda size=size: _call_heads(*size) for name, size in sizes.items()}


def _call_philox() -> None:
    import torch

    from scc_fast.kernels import philox

    for twin in (philox.philox_uniform, philox.philox_normal):
        twin(torch.zeros(2, dtype=torch.int64), 1, 0, 999)


def _call_views(height: int, width: int, views: Any, dtype: Any, patch: int, full: bool) -> None:
    import torch

    from scc_fast.kernels import step
    from scc_fast.kernels import views as twins

    x, seeds = torch.zeros(2, 3, height, width), torch.zeros(2, dtype=torch.int64)
    delta = torch.zeros_like(x)
    other = delta if full else None
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    seen = twins.make_views(x, other, seeds, *views, mean, mean, std, dtype, patch)
    twins.make_views_adjoint(seen, x, other, seeds, *views, std, patch)
    step.pgd_step_(delta, other, seen, x, seeds, *views, 0.004, 0.016, 0.5, patch)


def _call_warp() -> None:
    import torch

    from scc_fast.kernels.warp import warp_views

    x, matrix = torch.zeros(2, 3, 224, 224), torch.zeros(4, 2, 3, 3)
    box, samples = torch.zeros(4, 2, 4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int64)
    colours = ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
    for given, fill in (((None, None), [0.0] * 3), ((box, None), []), ((box, samples), [0.5] * 3)):
        for cubic, dtype, patch in ((False, torch.float32, 0), (True, torch.bfloat16, 32)):
            warp_views(x, matrix, *given, [224, 224], cubic, fill, *colours, dtype, patch)


def _call_heads(views: int, classes: int, width: int, dtype: Any) -> None:
    import torch

    from scc_fast.kernels import heads

    features, text = torch.zeros(views, 2, width, dtype=dtype), torch.zeros(classes, width)
    label, count = torch.zeros(2, dtype=torch.int64), torch.ones(classes, dtype=torch.int64)
    heads.drift_head(features, features[0])
    heads.pseudo_label(features, text, None, 100.0, 0.0, 0.5)
    heads.pseudo_label(features, text, count, 100.0, 0.0, 0.5)
    heads.margin_head(features, text.new_zeros(2, width), label, text, None, 100.0)
    heads.margin_head(features, text.new_zeros(2, width), label, text, count, 100.0)
    heads.mean_logits(features, text, None, 100.0, -10.0, False)
    weights = heads.view_weights(features, 1.0, 2.5, 0.85, float("inf"), False)[0]
    heads.view_weights(features, 0.45, 2.25, 0.0, 5.0, True)
    heads.mean_logits(features, text, weights, 100.0, -10.0, True)


def _call_encoder(width: int, dtype: Any) -> None:
    import torch

    from scc_fast.kernels import encoder

    x, row, one = torch.zeros(3, width), torch.zeros(width), torch.zeros(3)
    y = x.to(dtype)
    encoder.add_norm(x, y, row, row, 1e-5, dtype)
    encoder.add_norm(x, None, row, row, 1e-5, dtype)
    encoder.add_norm_back(y, x, one, one, row, x, dtype)
    encoder.add_norm_back(y, x, one, one, row, None, dtype)
    for kind in ("quick", "erf", "tanh"):
        encoder.gelu(y, row, kind)
        encoder.gelu(y, None, kind)
        encoder.gelu_back(y, y, row, kind)
        encoder.gelu_back(y, y, None, kind)


def _compile_all() -> list[Row]:
    """Launch everything on a driver that has no device: compiled, then dropped."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self) -> int:
            return now["capability"]  # the key of a kernel's cache

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", now["capability"], 32)

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        rows.append({"kernel": self.__name__, **now, **_facts(kernel)})

    rows: list[Row] = []
    now: Row = {}
    run, JITFunction.run = JITFunction.run, compile_only
    driver.set_active(Driver())
    if _nvidia_tool("ptxas") is None:
        CUDABackend.make_cubin = lambda *arguments: b""
    for capability in CAPABILITIES:
        for case, call in _calls(capability).items():
            now = {"capability": capability, "case": case}
            call()
    return rows


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
