"""attention and attention_back: every backend against the reference in float64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import op_cases
from op_cases import random, same_bits
from scc_fast import ops

reference: Any = importlib.import_module("scc_fast.ops.attention")  # ops has a function of its name

ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)

# B, H, Tq, Tk, d: one number; odd sides; towers' lengths and widths, past a block of queries; one
# query; nothing at all.
SHAPES = (
    (1, 1, 1, 1, 1), (2, 3, 5, 7, 9), (17, 2, 65, 65, 64), (1, 12, 50, 50, 64), (2, 2, 1, 50, 64),
    (2, 2, 197, 197, 72), (1, 1, 300, 257, 33), (3, 1, 82, 3, 130), (0, 3, 5, 7, 9),
    (2, 0, 5, 7, 9), (2, 3, 0, 7, 9), (2, 3, 5, 0, 9),
)  # fmt: skip


def on_backends(*backends: str) -> Any:
    found = list(op_cases.backends_under_test("attention_back", backends or ops.BACKENDS))
    return pytest.mark.parametrize(("device", "backend"), found)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v and the gradient."""
    batch, heads, queries, keys, width = shape
    counts = (queries, keys, keys, queries)
    made = (random(batch, heads, n, width, seed=3 + i) for i, n in enumerate(counts))
    return tuple(each.to(dtype) for each in made)


def results(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, backend: str | None
) -> tuple[Tensor, ...]:
    """o, lse, dq, dk, dv."""
    o, lse = ops.attention(q, k, v, backend=backend)
    return o, lse, *ops.attention_back(gradient, q, k, v, lse, backend=backend)


def exact(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    q, k, v, gradient = (each.double() for each in (q, k, v, gradient))
    o, lse = reference.attention_of(q, k, v)
    return o, lse, *reference.attention_back_of(gradient, q, k, v, lse)


def assert_near(got: Tensor, want: Tensor, limit: float) -> None:
    """Relative to the whole tensor, and rounded once to the dtype of got."""
    assert got.shape == want.shape
    limit += torch.finfo(got.dtype).eps / 2
    off, size = (got.cpu().double() - want).norm(), want.norm()
    assert off <= limit * size + 2e-7, f"off by {off:.3g} of {size:.3g}"


def check(device: str, backend: str, *given: Tensor) -> tuple[Tensor, ...]:
    """One call of each op against float64."""
    q, k = given[:2]
    got = results(*(each.to(device) for each in given), backend)
    assert [each.dtype for each in got] == [q.dtype, torch.float32, *[q.dtype] * 3]
    assert all(each.device.type == device for each in got)
    assert got[1].is_contiguous()
    assert all(each.transpose(1, 2).is_contiguous() for each in (got[0], *got[2:]))
    for one, want in zip(got, exact(*given), strict=True):
        if k.shape[2]:
            assert_near(one, want, 2e-6)
        else:
            assert torch.equal(one.cpu().double(), want)
    return got


@on_backends()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ON_DTYPES
def test_against_float64(device: str, backend: str, shape, dtype: torch.dtype) -> None:
    check(device, backend, *inputs(shape, dtype))


@on_backends()
@ON_DTYPES
def test_parts_of_one_product(device: str, backend: str, dtype: torch.dtype) -> None:
    """q, k and v as a transformer has them: views of one tensor, which nothing writes to."""
    q, k, v = (part.transpose(1, 2) for part in random(2, 65, 3, 3, 33).to(dtype).unbind(2))
    check(device, backend, q, k, v, random(2, 65, 3, 33, seed=5).to(dtype).transpose(1, 2))


@on_backends()
@ON_DTYPES
def test_layouts_do_not_matter(device: str, backend: str, dtype: torch.dtype) -> None:
    given = [each.to(device) for each in inputs((2, 3, 5, 7, 9), dtype)]
    want = results(*given, backend)
    for layout in op_cases.layouts(given[0]):
        got = results(*(op_cases.layouts(each)[layout] for each in given), backend)
        for one, two in zip(got, want, strict=True):
            assert same_bits(one, two.cpu()), layout


@on_backends()
def test_a_query_of_all_images(device: str, backend: str) -> None:
    q, k, v, gradient = inputs((5, 2, 1, 50, 64))
    check(device, backend, q[:1].expand(5, -1, -1, -1), k, v, gradient)


@on_backends()
def test_torchs_attention(device: str, backend: str) -> None:
    q, k, v, gradient = (each.to(device) for each in inputs((2, 3, 65, 50, 64)))
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    o = F.scaled_dot_product_attention(*leaves)
    slopes = torch.autograd.grad(o, leaves, gradient)
    got = results(q, k, v, gradient, backend)
    for one, two in zip((got[0], *got[2:]), (o, *slopes), strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_backends("cpp")  # torch's products, which the reference takes, promise less
def test_images_do_not_depend_on_each_other(device: str, backend: str, dtype) -> None:
    given = [each.to(device) for each in inputs((6, 3, 97, 65, 33), dtype)]
    whole = results(*given, backend)
    for part in (slice(0, 1), slice(2, 5)):
        for one, two in zip(results(*(each[part] for each in given), backend), whole, strict=True):
            assert same_bits(one, two[part].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    if ops.backends_of("attention", "cpu")["cpp"] is not None:
        pytest.skip("no C++ kernel")
    given, threads = inputs((3, 3, 197, 197, 64), dtype), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(*given, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(same_bits(one, two) for one, two in zip(found[0], other, strict=True))


@on_backends()
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_scores(device: str, backend: str, size: float) -> None:
    """Up to ±1e4 nothing overflows; the scores' own rounding is what the weights are off by."""
    q, k, v, gradient = inputs((2, 2, 37, 65, 64))
    q *= size / (q @ k.mT / 8).abs().max()
    given = (each.to(device) for each in (q, k, v, gradient))
    off = 2e-6 + 4e-7 * size
    for one, want in zip(results(*given, backend), exact(q, k, v, gradient), strict=True):
        torch.testing.assert_close(one.cpu().double(), want, rtol=off, atol=off)


@on_backends()
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_query_spoils_its_own_row_alone(device: str, backend: str, value: float) -> None:
    q, k, v, gradient = inputs((2, 2, 21, 19, 33))
    good = results(*(each.to(device) for each in (q, k, v, gradient)), backend)
    bad = q.clone()
    bad[1, 0, 5] = value
    o, lse, dq, *_ = results(*(each.to(device) for each in (bad, k, v, gradient)), backend)
    for one, two in ((o, good[0]), (dq, good[2])):
        one = one.clone()
        assert one[1, 0, 5].isnan().all()
        one[1, 0, 5] = two[1, 0, 5]
        assert same_bits(one, two.cpu()) if backend == "cpp" else one.isfinite().all()
    assert not lse[1, 0, 5].isfinite()


@on_backends()
def test_an_infinite_key(device: str, backend: str) -> None:
    """A score of −∞ has no weight, of +∞ a NaN's; as softmax has it."""
    k, v = random(1, 1, 5, 1), random(1, 1, 5, 1, seed=3)
    k[0, 0, 3] = math.inf
    q = torch.tensor([-1.0, 1.0, -2.0]).reshape(1, 1, 3, 1)
    o, lse = ops.attention(q.to(device), k.to(device), v.to(device), backend=backend)
    want, sums = reference.attention_of(q.double(), k.double(), v.double())
    torch.testing.assert_close(o.cpu().double(), want, equal_nan=True, rtol=1e-5, atol=1e-6)
    rows = [0, 2]
    torch.testing.assert_close(lse.cpu().double()[..., rows], sums[..., rows], rtol=1e-5, atol=1e-6)


@on_backends()
def test_constants_build_no_graph(device: str, backend: str) -> None:
    given = [each.to(device).requires_grad_() for each in inputs((2, 3, 5, 7, 9))]
    assert not any(each.requires_grad for each in results(*given, backend))


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit

    def run(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return results(q, k, v, gradient, backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 3):
        given = [each.to(device) for each in inputs((batch, 2, 5, 7, 9))]
        torch.testing.assert_close(compiled(*given), run(*given))


def test_meta() -> None:
    given = [each.half().to("meta") for each in inputs((2, 3, 5, 7, 9))]
    found = results(*given, None)
    shapes = [(2, 3, 5, 9), (2, 3, 5), (2, 3, 5, 9), (2, 3, 7, 9), (2, 3, 7, 9)]
    assert [tuple(each.shape) for each in found] == shapes
    assert [each.dtype for each in found] == [torch.float16, torch.float32, *[torch.float16] * 3]
    assert all(each.device.type == "meta" for each in found)
