"""The CUDA kernels, compiled as plain C++ (cuda_on_host.h): their index mathematics needs no GPU.

What it cannot see: races between threads, the launches and their checks, cuBLAS.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from ctypes import c_bool, c_float, c_int, c_int64, c_uint32
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import op_cases
from op_cases import FILL, MEAN, NOISY, PLAIN, STD, same_bits
from scc_fast import ops
from scc_fast.reference.warp import shrinking

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[1]
WHOLE = {torch.float32: 4, torch.bfloat16: 8}  # lanes of 16 bytes

# (height, width, patch): runs of 1, 2, 4 and 8 lanes, and patches that leave a remainder.
PICTURES = [(1, 1, 0), (5, 7, 0), (33, 5, 0), (7, 64, 0), (64, 33, 0), (5, 36, 0), (3, 6, 0)]
PICTURES += [(1, 1, 1), (5, 7, 1), (33, 64, 3), (7, 20, 7), (33, 33, 32), (64, 64, 32)]
PICTURES += [(9, 20, 8), (30, 44, 14), (5, 12, 4)]


class Batch(ctypes.Structure):
    _fields_ = (
        ("seeds", ctypes.c_void_p),
        *((name, c_int64) for name in ("images", "height", "width", "patch")),
        *((name, ctypes.c_void_p) for name in ("plan", "noise")),
        *((name, c_int64) for name in ("views", "lanes")),
    )


class Shape(ctypes.Structure):
    _fields_ = (("views", c_int), ("classes", c_int), ("batch", c_int64), ("width", c_int64))


class Rule(ctypes.Structure):
    _fields_ = (
        *((name, c_float) for name in ("low", "high", "threshold", "slope")),
        ("geodesic", c_bool),
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or os.name == "nt":
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    source = ROOT / "tests" / "cuda_on_host.cpp"
    subprocess.run([compiler, *flags, *strict, *folders, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def lanes_of(dtype: torch.dtype, height: int, width: int, patch: int, most: int) -> list[int]:
    """Every number of lanes that a launcher may choose."""
    run = patch or width
    return [n for n in (1, 2, most) if run % n == 0 and width % min(n, 4) == 0]


def plan_of(views: Any, *rest: int) -> tuple[Batch, tuple[Tensor, ...]]:
    plan = torch.tensor([number for v in views for number in (int(v.flip), *v.shift)])
    noise = torch.tensor([v.noise for v in views])
    seeds = 7 - torch.arange(rest[0])
    height, width, patch, lanes = rest[1:]
    fields = (rest[0], height, width, patch, plan.data_ptr(), noise.data_ptr(), len(views), lanes)
    return Batch(seeds.data_ptr(), *fields), (plan, noise, seeds)


def close(got: Tensor, want: Tensor, noisy: bool, dtype: torch.dtype) -> None:
    """Equal to the bit, or with noise to some ulps but at a few pixels where a clamp may turn."""
    if not noisy:
        assert same_bits(got, want)
        return
    unit = 64 * 2.0**-24 if dtype == torch.float32 else 2.0**-7
    wrong = (got.float() - want.float()).abs() > unit * want.float().abs().clamp(min=1)
    assert wrong.float().mean() < 1e-3


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("picture", PICTURES)
def test_make_views(kernels, picture: tuple[int, int, int], dtype: torch.dtype, noisy: bool):
    height, width, patch = picture
    x = op_cases.pixels(2, 3, height, width)
    colours = torch.tensor([FILL, MEAN, STD])
    for views in (NOISY, NOISY[:1]) if noisy else (PLAIN, PLAIN[2:3]):
        for delta in (op_cases.deltas(*x.shape), None):
            for lanes in lanes_of(dtype, height, width, patch, WHOLE[dtype]):
                batch, held = plan_of(views, 2, height, width, patch, lanes)
                want = ops.make_views(
                    x, delta, held[2], views, mean=MEAN, std=STD, fill=FILL, dtype=dtype,
                    patch=patch, backend="reference",
                )  # fmt: skip
                got = torch.full_like(want, -77)
                half = c_bool(dtype != torch.float32)
                arrays = (at(x), at(delta), at(colours), at(got))
                kernels.make_views(ctypes.byref(batch), half, *arrays)
                close(got, want, noisy, dtype)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("picture", PICTURES)
def test_adjoint_and_step(kernels, picture: tuple[int, int, int], dtype: torch.dtype, noisy: bool):
    height, width, patch = picture
    x, delta = op_cases.pixels(2, 3, height, width), op_cases.deltas(2, 3, height, width)
    colours, size = torch.tensor([FILL, MEAN, STD]), torch.tensor([1 / 255, 4 / 255, 0.3])
    half = c_bool(dtype != torch.float32)
    for views in (NOISY, NOISY[:1]) if noisy else (PLAIN, PLAIN[1:3]):
        for lanes in lanes_of(dtype, height, width, patch, 4):
            batch, held = plan_of(views, 2, height, width, patch, lanes)
            plain = {"patch": patch, "backend": "reference"}
            shape = ops.make_views(x, delta, held[2], views, **plain).shape
            gradient = op_cases.random(*shape).to(dtype)
            want = ops.make_views_adjoint(gradient, x, delta, held[2], views, std=STD, **plain)
            got = torch.full_like(x, -77)
            first = (ctypes.byref(batch), half, at(gradient), at(x))
            kernels.gather_views(*first, at(delta), at(colours), at(size), at(got))
            close(got, want, noisy, torch.float32)

            for weighted in (op_cases.deltas(*x.shape, seed=5), None):
                moved, total = delta.clone(), None if weighted is None else weighted.clone()
                ops.pgd_step_(
                    moved, gradient, x, held[2], views, alpha=1 / 255, epsilon=4 / 255,
                    weighted=total, weight=0.3, **plain,
                )  # fmt: skip
                got, summed = delta.clone(), None if weighted is None else weighted.clone()
                kernels.gather_views(*first, at(got), at(None), at(size), at(summed))
                close(got, moved, noisy, torch.float32)
                if summed is not None:
                    close(summed, total, noisy, torch.float32)


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("warp", [case for case in op_cases.WARPS if not case.large], ids=str)
def test_warp_views(kernels, warp: op_cases.Warp, dtype: torch.dtype) -> None:
    x, matrix, box = warp.inputs()
    size = (warp.height, warp.width)
    samples = shrinking(matrix, size, warp.size) if warp.antialias else None
    want = ops.warp_views(
        x, matrix, box=box, **warp.options(), mean=MEAN, std=STD, dtype=dtype, backend="reference"
    )
    got, colours = torch.full_like(want, -77), torch.tensor([warp.fill or [0.0] * 3, MEAN, STD])
    shape = torch.tensor([*size, *warp.size, warp.patch])
    flags = (dtype != torch.float32, warp.mode == "bicubic", warp.fill is not None)
    arrays = (x, matrix, box, samples, colours, got)
    counts = (c_int64(len(matrix) * len(x)), c_int64(len(x)))
    kernels.warp_views(at(shape), *counts, *map(c_bool, flags), *map(at, arrays))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "case", [case for case in op_cases.HEADS if case.batch <= 3 and not case.large], ids=str
)
def test_heads(kernels, case: op_cases.Head) -> None:
    """Against the reference; the products that cuBLAS makes there are made by torch here."""
    features, table = case.features(), ops.ClassTable.of(case.classes_of())
    shape = Shape(case.views, len(table.text), case.batch, case.width)
    soft, label = case.soft(), torch.arange(case.batch) % len(table.text)
    dots, here = features @ table.text.T, ctypes.byref(shape)
    like = {"rtol": 1e-4, "atol": 2e-6 * case.scale}

    tau, gradient = torch.empty(case.batch), torch.empty_like(features)
    kernels.drift(here, at(features), at(soft), at(tau), at(gradient))
    want = ops.drift_head(features, soft, backend="reference")
    torch.testing.assert_close((tau, gradient), want)

    value, gradient = torch.empty(case.batch), torch.empty_like(features)
    arrays = (features, dots, soft, label, table.text, table.count, value, gradient)
    kernels.margin(here, *map(at, arrays), c_float(case.scale / case.views))
    want = ops.margin_head(features, soft, label, table, backend="reference")
    torch.testing.assert_close((value, gradient), want, **like)

    for temperature in (0.5, 2.0):
        q, found, scratch = torch.empty(case.batch, len(table.text)), label.clone(), dots.clone()
        arrays = (features, scratch, table.count, q, found)
        kernels.pseudo(here, *map(at, arrays), c_float(case.scale), c_float(1 / temperature))
        counted = q if table.count is None else scratch[0]
        along = counted @ table.text
        kernels.normalise(here, at(along))
        want = ops.pseudo_label(features, table, temperature, backend="reference")
        torch.testing.assert_close(q, want[0], rtol=1e-5 * case.scale, atol=1e-7)
        assert torch.equal(found, q.argmax(dim=-1))  # the reference may break a near tie otherwise
        torch.testing.assert_close(along, want[2], rtol=1e-4, atol=1e-5)

    mean = torch.empty(case.batch, case.width)
    factor = c_float(case.scale / case.views)
    kernels.mean_units(here, at(features), at(mean), factor)
    logits = mean @ table.text.T
    kernels.add(c_int64(logits.numel()), at(logits), c_float(case.bias))
    want = ops.mean_logits(features, table, backend="reference")
    torch.testing.assert_close(table.expand(logits), want, **like)
    if case.views < 2 or case.width < 2:
        return
    for numbers in ((1.0, 2.5, 0.0, math.inf, False), (1.0, 2.5, 0.0, 5.0, False),
                    (0.45, 2.25, 0.0, math.inf, True)):  # fmt: skip
        weights, scratch = torch.empty(case.views, case.batch), torch.empty_like(mean)
        cosine, agreement = torch.empty(case.batch), torch.empty(case.batch)
        arrays = (features, scratch, weights, cosine, agreement)
        kernels.view_weights(here, *map(at, arrays), ctypes.byref(Rule(*numbers)))
        low, high, threshold, slope, geodesic = numbers
        want = ops.view_weights(
            features, low, high, threshold, slope=slope, geodesic=geodesic, backend="reference"
        )
        torch.testing.assert_close((weights, cosine, agreement), want, rtol=1e-4, atol=1e-4)
        for unit in (False, True):
            kernels.weighted_units(
                here, at(features), at(weights), at(mean), c_float(case.scale), c_bool(unit)
            )
            logits = mean @ table.text.T + case.bias
            want = ops.mean_logits(features, table, weights, unit=unit, backend="reference")
            torch.testing.assert_close(table.expand(logits), want, **like)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("used", "rows"), [(1, 32), (2, 32), (33, 96)])
def test_absent_rows(kernels, used: int, rows: int, last: bool) -> None:
    """To the bit as if cut out, but where the sums take their terms in another order."""
    features, soft = op_cases.Head(3, 2, 16, 2).features(), op_cases.unit(2, 16, seed=4)
    table = ops.ClassTable(op_cases.unit(used, 16), None, None, 20.0)
    whole, here = op_cases.with_absent(table, rows, features, last)
    dots = torch.full((3, 2, rows), torch.inf)  # what no text could give less of
    dots[..., 1::2] = torch.nan
    dots[..., here] = features @ table.text.T
    cut = (torch.arange(used), table.text, None, dots[..., here].contiguous())
    found = []
    for places, text, count, scores in (cut, (here, whole.text, whole.count, dots)):
        shape, label = Shape(3, len(text), 2, 16), places[torch.tensor([0, used - 1])]
        value, gradient = torch.empty(2), torch.empty_like(features)
        arrays = (features, scores, soft, label, text, count, value, gradient)
        kernels.margin(ctypes.byref(shape), *map(at, arrays), c_float(2.0))
        found.append((value, gradient))
    for got, want in zip(*found, strict=True):
        assert same_bits(got, want)
    for broken in (False, True):
        found = []
        if broken:
            features[:, 1], dots[:, 1], cut[-1][:, 1] = torch.nan, torch.nan, torch.nan
        for places, text, count, scores in (cut, (here, whole.text, whole.count, dots)):
            shape, label = Shape(3, len(text), 2, 16), torch.empty(2, dtype=torch.int64)
            scratch, q = scores.clone(), torch.empty(2, len(text))
            arrays = (features, scratch, count, q, label)
            kernels.pseudo(ctypes.byref(shape), *map(at, arrays), c_float(20.0), c_float(2.0))
            counted = q if count is None else scratch[0]
            found.append((q[:, places], counted[:, places], label))
            for each in (q, counted) if count is not None else ():
                each[:, places] = 0.0
                assert torch.equal(each, torch.zeros_like(each))
        (want, _, first), (got, weighted, label) = found
        assert torch.equal(label, here[first])
        assert same_bits(got, weighted)
        assert same_bits(got, want) or not last
        torch.testing.assert_close(got, want, equal_nan=True)


def test_division(kernels) -> None:
    kernels.divide.restype = c_uint32
    ends = [1, 2, 3, 5, 7, 14, 224, 641, 2**16 - 1, 2**16, 2**30 + 1, 2**31 - 1]
    for divisor in ends:
        for dividend in {0, *ends, *(n * divisor + k for n in (1, 2, 97) for k in (-1, 0, 1))}:
            if dividend < 2**31:
                assert kernels.divide(dividend, divisor) == dividend // divisor


@pytest.mark.parametrize("std", [*STD, 1.0, 1e-3, 0.99999994, 3e-39, 1e38])
def test_normalise_rounds_as_a_division(kernels, std: float) -> None:
    values = op_cases.random(1 << 18) * 10.0 ** op_cases.random(1 << 18, seed=3)
    values[:6] = torch.tensor([0.5, -0.0, 1e-45, 1e-38, 1e-19, 1e18])
    for mean in (0.0, 0.5):
        got = values.clone()
        kernels.normalise_many(c_int64(len(got)), c_float(mean), c_float(std), at(got))
        with np.errstate(over="ignore"):
            want = (values.numpy() - np.float32(mean)) / np.float32(std)
        assert same_bits(got, torch.from_numpy(want))
