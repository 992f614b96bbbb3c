"""add_norm, add_norm_back, gelu and gelu_back: every backend against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import op_cases
from op_cases import KINDS, STREAM_SHAPES, UNIT, random, same_bits
from scc_fast import ops
from scc_fast.ops import encoder

ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
ON_KINDS = pytest.mark.parametrize("kind", KINDS)
EPSILON = 1e-5

# Of gelu, relative where |gelu| > 1e-4: the exponent is rounded, which exp makes a relative error.
GELU_ERROR = 1.25e-6
SLOPE_ERROR = 3e-7  # absolute


def on_shapes(op: str) -> Any:
    """Backends times shapes, less those that take Triton's interpreter long."""
    cases = [
        pytest.param(*backend.values, shape, marks=backend.marks, id=f"{backend.id}-{shape}")
        for backend in op_cases.backends_under_test(op)
        for shape in STREAM_SHAPES
        if math.prod(shape) < 20_000 or backend.values != ("cpu", "triton")
    ]
    return pytest.mark.parametrize(("device", "backend", "shape"), cases)


def on_backends(op: str, backends: tuple[str, ...] = ops.BACKENDS) -> Any:
    found = list(op_cases.backends_under_test(op, backends))
    return pytest.mark.parametrize(("device", "backend"), found)


def parameters(width: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * random(width, seed=11), 0.5 * random(width, seed=12)


def stream(shape: tuple[int, ...], seed: int = 2) -> Tensor:
    return 3 * random(*shape, seed=seed) + 1.5


def assert_close(got: Tensor, want: Tensor, limit: Tensor | float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).abs()
    assert (error <= limit).all(), f"off by {(error - limit).max():.3g} too much"


def store_error(want: Tensor, dtype: torch.dtype, device: str, backend: str) -> Tensor:
    """Half a unit in the last place, a whole one where it is cut."""
    info = torch.finfo(dtype)
    units = 1.0 if op_cases.truncates(device, backend, dtype) else 0.5
    return units * info.eps * want.abs() + units * info.tiny * info.eps


def to(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


# ---- Norm ----------------------------------------------------------------------------------------


def check_add_norm(
    device: str, backend: str, x: Tensor, y: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One call against float64; total, mean and scale."""
    weight, bias = parameters(x.shape[-1])
    given = to(device, x, y, weight, bias)
    total, normed, mean, scale = ops.add_norm(*given, EPSILON, dtype=dtype, backend=backend)
    assert [t.dtype for t in (total, normed, mean, scale)] == [
        torch.float32, dtype, torch.float32, torch.float32,
    ]  # fmt: skip
    assert all(t.device.type == device for t in (total, normed, mean, scale))
    if y is None:
        assert total is given[0]
    else:
        assert same_bits(total, x + y.float())
    wide = total.cpu().double()
    want, middle, factor = encoder.norm_of(wide, weight.double(), bias.double(), EPSILON)
    # Sums of `width` terms; the mean is kept in float32, and what it is off moves the whole row.
    lost = op_cases.sum_error(x.shape[-1]) + 4 * UNIT
    off = 2 * UNIT * middle.abs() + lost * wide.abs().mean(dim=-1)
    assert_close(mean, middle, off)
    assert_close(scale, factor, factor * lost)
    shift = (off * factor)[..., None] * weight.abs()
    limit = (lost + 4 * UNIT) * (want - bias).abs() + 4 * UNIT * bias.abs() + shift
    assert_close(normed, want, limit + store_error(want, dtype, device, backend))
    return total.cpu(), mean.cpu(), scale.cpu()


@on_shapes("add_norm")
@ON_DTYPES
def test_add_norm(device: str, backend: str, shape, dtype: torch.dtype) -> None:
    check_add_norm(device, backend, stream(shape), stream(shape, 3).to(dtype), dtype)
    check_add_norm(device, backend, stream(shape), None, dtype)


@on_backends("add_norm")
@ON_DTYPES
def test_y_need_not_have_the_dtype_of_the_result(device: str, backend: str, dtype) -> None:
    for other in op_cases.DTYPES:
        check_add_norm(device, backend, stream((3, 33)), random(3, 33).to(other), dtype)


@on_shapes("add_norm_back")
@ON_DTYPES
def test_add_norm_back(device: str, backend: str, shape, dtype: torch.dtype) -> None:
    total, weight = stream(shape), parameters(shape[-1])[0]
    _, mean, scale = encoder.norm_of(total, weight, weight, EPSILON)
    for other, residual in ((dtype, random(*shape, seed=5)), (torch.float32, None)):
        gradient = random(*shape, seed=4).to(other)
        given = to(device, gradient, total, mean, scale, weight, residual)
        whole, low = ops.add_norm_back(*given, dtype=dtype, backend=backend)
        assert (whole.dtype, low.dtype) == (torch.float32, dtype)
        assert low is whole or dtype != torch.float32
        assert same_bits(low, op_cases.rounded(whole.cpu(), dtype, device, backend))
        wide = [t.double() for t in (gradient, total, mean, scale, weight)]
        want = encoder.norm_back_of(*wide)
        g, factor = (wide[0] * wide[4]).abs(), wide[3][..., None]
        unit = ((wide[1] - wide[2][..., None]) * factor).abs()
        size = g + g.mean(-1, True) + unit * (g * unit).mean(-1, True)
        limit = factor * size * (op_cases.sum_error(shape[-1]) + 8 * UNIT)
        # One column: the mean is the number itself, and what is left is rounding.
        beside = 0.0 if residual is None else residual.double()
        assert_close(whole, want + beside, limit + 2 * UNIT * (want + beside).abs())


def test_the_reference_is_torchs_layer_norm() -> None:
    x, gradient = stream((3, 5, 65)).double().requires_grad_(), random(3, 5, 65, seed=4).double()
    weight, bias = (t.double() for t in parameters(65))
    normed, mean, scale = encoder.norm_of(x.detach(), weight, bias, EPSILON)
    want = F.layer_norm(x, (65,), weight, bias, EPSILON)
    torch.testing.assert_close(normed, want.detach(), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(want, x, gradient)
    found = encoder.norm_back_of(gradient, x.detach(), mean, scale, weight)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-12)


@on_backends("add_norm")
def test_norm_of_torch_in_float32(device: str, backend: str) -> None:
    x, (weight, bias) = stream((7, 768)).requires_grad_(), parameters(768)
    want = F.layer_norm(x, (768,), weight, bias, EPSILON)
    given = to(device, x.detach(), None, weight, bias)
    total, normed, mean, scale = ops.add_norm(*given, EPSILON, backend=backend)
    torch.testing.assert_close(normed.cpu(), want.detach())
    gradient = random(7, 768, seed=4)
    (slope,) = torch.autograd.grad(want, x, gradient)
    kept = (gradient.to(device), total, mean, scale, given[2])
    whole, low = ops.add_norm_back(*kept, backend=backend)
    torch.testing.assert_close(whole.cpu(), slope)
    assert low is whole


@on_backends("add_norm")
@ON_DTYPES
def test_rows_do_not_depend_on_each_other(device: str, backend: str, dtype: torch.dtype) -> None:
    """To the bit, wherever in memory a row lies."""
    x, y = stream((33, 77)).to(device), random(33, 77, seed=3).to(dtype).to(device)
    weight, bias = to(device, *parameters(77))

    def results(rows: slice) -> list[Tensor]:
        made = ops.add_norm(x[rows], y[rows], weight, bias, EPSILON, dtype=dtype, backend=backend)
        total, _, mean, scale = made
        back = (y[rows], total, mean, scale, weight, x[rows])
        active = ops.gelu(y[rows], bias, backend=backend)
        slope = ops.gelu_back(y[rows], active, bias, backend=backend)
        return [*made, *ops.add_norm_back(*back, dtype=dtype, backend=backend), active, slope]

    whole = results(slice(None))
    for rows in (slice(5, 6), slice(3, 32)):
        for one, other in zip(results(rows), whole, strict=True):
            assert same_bits(one, other[rows].cpu())


@on_backends("add_norm")
@pytest.mark.parametrize("width", [1, 3, 64, 769])
def test_constant_rows(device: str, backend: str, width: int) -> None:
    """Variance 0: nothing is left but the bias, and the gradient's mean is taken off."""
    value = torch.tensor([0.0, 1.0, -3.7, 1e4 / 3])
    x, (weight, bias) = value[:, None].expand(4, width), parameters(width)
    given = to(device, x, None, weight, bias)
    total, normed, mean, scale = ops.add_norm(*given, EPSILON, backend=backend)
    assert_close(mean, value.double(), 2 * UNIT * value.abs())
    # A mean that is one unit off counts 1/√ε times as much.
    off = 4 * UNIT * value.abs().double()[:, None] * weight.abs() / math.sqrt(EPSILON)
    assert_close(normed, bias.double().expand(4, width), off + 2 * UNIT * bias.abs())
    kept = (random(4, width).to(device), total, mean, scale, given[2])
    assert ops.add_norm_back(*kept, backend=backend)[0].isfinite().all()


@on_backends("add_norm")
def test_a_great_offset_leaves_the_variance(device: str, backend: str) -> None:
    x, ones = 1e4 + random(5, 768), torch.ones(768)
    given = to(device, x, None, ones, 0 * ones)
    _, normed, mean, scale = ops.add_norm(*given, EPSILON, backend=backend)
    want, middle, factor = encoder.norm_of(x.double(), ones.double(), 0 * ones, EPSILON)
    assert_close(mean, middle, 2 * UNIT * middle)
    assert_close(scale, factor, 2e-5 * factor)
    assert_close(normed, want, 2 * UNIT * 1e4 * factor[:, None] + 2e-5 * want.abs())


# ---- Activation ----------------------------------------------------------------------------------


def activation_error(want: Tensor, device: str, backend: str) -> Tensor:
    relative = GELU_ERROR * (2 if device == "cuda" else 1)
    # torch's own 1 + erf and 1 + tanh, which the reference takes, are exact to 1 alone.
    return relative * want.abs() + (2e-6 if backend == "reference" else 1e-4 * relative)


def slope_error(device: str, backend: str) -> float:
    return 2e-6 if backend == "reference" else SLOPE_ERROR * (2 if device == "cuda" else 1)


def biases(width: int, dtype: torch.dtype) -> list[Tensor | None]:
    return [None, random(width, seed=6), random(width, seed=7).to(dtype)]


@on_shapes("gelu")
@ON_KINDS
@ON_DTYPES
def test_gelu(device: str, backend: str, shape, kind: str, dtype: torch.dtype) -> None:
    """And gelu_back, with every kind of bias."""
    x, gradient = (3 * random(*shape)).to(dtype), random(*shape, seed=4).to(dtype)
    for bias in biases(shape[-1], dtype):
        z = (x.float() if bias is None else x.float() + bias.float()).double()
        given = to(device, x, bias)
        got = ops.gelu(*given, kind=kind, backend=backend)
        assert (got.dtype, got.device.type) == (dtype, device)
        want = encoder.gelu_of(z, kind)
        limit = activation_error(want, device, backend)
        assert_close(got, want, limit + store_error(want, dtype, device, backend))
        got = ops.gelu_back(gradient.to(device), *given, kind=kind, backend=backend)
        assert (got.dtype, got.device.type) == (dtype, device)
        want = gradient.double() * encoder.slope_of(z, kind)
        limit = gradient.double().abs() * slope_error(device, backend) + 2 * UNIT * want.abs()
        assert_close(got, want, limit + store_error(want, dtype, device, backend))


@on_backends("gelu", ("cpp", "triton"))
@ON_KINDS
def test_accuracy_of_gelu(device: str, backend: str, kind: str) -> None:
    """The tail too keeps its relative accuracy, unlike that of torch in float32."""
    x = torch.cat([torch.linspace(-14, 14, 100_001), torch.linspace(-1e-3, 1e-3, 1001)])
    got = ops.gelu(x.to(device), kind=kind, backend=backend).cpu().double()
    want = exact(x.double(), kind)
    factor = 2 if device == "cuda" else 1
    large = want.abs() > 1e-4
    assert ((got - want).abs() / want.abs())[large].max() <= GELU_ERROR * factor
    assert (got - want).abs()[~large].max() <= 2e-10 * factor
    ones = torch.ones_like(x).to(device)
    slope = ops.gelu_back(ones, x.to(device), kind=kind, backend=backend)
    assert_close(slope, encoder.slope_of(x.double(), kind), SLOPE_ERROR * factor)
    if kind == "erf":  # as an approximation of erf, where gelu / x does not enlarge its rounding
        inner = x.abs() > 0.1
        erf = (2 * got / x.double() - 1)[inner]
        assert_close(erf, torch.erf(x.double() / math.sqrt(2))[inner], 5e-7 * factor)


def exact(z: Tensor, kind: str) -> Tensor:
    """gelu in float64 without a difference in the tail."""
    if kind == "erf":
        return 0.5 * z * torch.erfc(-z / math.sqrt(2))
    if kind == "tanh":
        return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    return encoder.gelu_of(z, kind)


@ON_KINDS
def test_the_reference_is_torchs_gelu(kind: str) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    approximate = "tanh" if kind == "tanh" else "none"
    want = x * torch.sigmoid(1.702 * x) if kind == "quick" else F.gelu(x, approximate=approximate)
    assert torch.equal(encoder.gelu_of(x, kind), want)
    torch.testing.assert_close(want.detach(), exact(x.detach(), kind), rtol=1e-9, atol=1e-15)
    (slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(encoder.slope_of(x.detach(), kind), slope, rtol=1e-12, atol=1e-12)


@on_backends("gelu", ("cpp", "triton"))
@ON_KINDS
def test_numbers_at_the_ends(device: str, backend: str, kind: str) -> None:
    """As torch has them in float64; torch's own kernels differ in float32."""
    ends = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e19, -1e19, 1e-40, -1e-40, 0.0, -0.0]
    x = torch.tensor([*ends, 200.0, -200.0, 14.0, -14.0, 9.3, -9.3] * 3)
    got = ops.gelu(x.to(device), kind=kind, backend=backend).cpu()
    slope = ops.gelu_back(torch.ones_like(x).to(device), x.to(device), kind=kind, backend=backend)
    for one, want in (
        (got, encoder.gelu_of(x.double(), kind)),
        (slope.cpu(), encoder.slope_of(x.double(), kind)),
    ):
        torch.testing.assert_close(one.double(), want, equal_nan=True, rtol=2e-6, atol=3e-7)
    assert torch.equal(got.signbit()[9:11], torch.tensor([False, True]))


# ---- All -----------------------------------------------------------------------------------------


def all_results(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, backend: str | None
) -> list[Tensor]:
    made = ops.add_norm(x, y, weight, bias, EPSILON, dtype=y.dtype, backend=backend)
    total, _, mean, scale = made
    back = ops.add_norm_back(y, total, mean, scale, weight, x, dtype=y.dtype, backend=backend)
    alone = ops.add_norm(x, None, weight, bias, EPSILON, backend=backend)
    active = ops.gelu(y, bias, kind="erf", backend=backend)
    slope = ops.gelu_back(y, y, None, kind="quick", backend=backend)
    return [*made, *back, *alone[1:], active, slope]


@on_backends("add_norm_back")
@ON_DTYPES
def test_layouts_do_not_matter(device: str, backend: str, dtype: torch.dtype) -> None:
    x, y = stream((5, 33)).to(device), random(5, 33, seed=3).to(dtype).to(device)
    weight, bias = to(device, *parameters(33))
    want = all_results(x, y, weight, bias, backend)
    wide = torch.stack([weight, bias], dim=-1)
    for layout, given in op_cases.layouts(x).items():
        other = op_cases.layouts(y)[layout]
        for got in (
            all_results(given, other, weight, bias, backend),
            all_results(given, y, wide[..., 0], wide[..., 1], backend),
        ):
            for one, two in zip(got, want, strict=True):
                assert one.is_contiguous()
                assert same_bits(one, two.cpu()), layout


@on_backends("gelu_back")
def test_constants_build_no_graph(device: str, backend: str) -> None:
    x, y = stream((5, 33)).to(device).requires_grad_(), random(5, 33).to(device).requires_grad_()
    weight, bias = (t.to(device).requires_grad_() for t in parameters(33))
    assert not any(t.requires_grad for t in all_results(x, y, weight, bias, backend))


@on_backends("gelu")
@ON_DTYPES
def test_one_row_without_dimensions(device: str, backend: str, dtype: torch.dtype) -> None:
    """(W,) is a row, and an activation takes any shape, () and empty ones too."""
    weight, bias = to(device, *parameters(13))
    x = stream((13,)).to(device)
    _, normed, mean, scale = ops.add_norm(x, None, weight, bias, EPSILON, backend=backend)
    assert (normed.shape, mean.shape, scale.shape) == ((13,), (), ())
    for shape in ((), (0,), (3, 0), (1, 1, 1, 1, 1)):
        z = torch.ones(shape, dtype=dtype, device=device)
        assert ops.gelu(z, backend=backend).shape == shape
        assert ops.gelu_back(z, z, backend=backend).shape == shape
    z = torch.ones(3, 0, dtype=dtype, device=device)
    assert ops.gelu(z, z[0], backend=backend).shape == (3, 0)


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit
    weight, bias = to(device, *parameters(13))

    def run(x: Tensor, y: Tensor) -> list[Tensor]:
        return all_results(x, y, weight, bias, backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 3):
        x, y = stream((batch, 2, 13)).to(device), random(batch, 2, 13).bfloat16().to(device)
        torch.testing.assert_close(compiled(x, y), run(x, y))


def test_meta() -> None:
    x, y = torch.empty(2, 3, 13, device="meta"), torch.empty(2, 3, 13, device="meta").half()
    row = torch.empty(13, device="meta")
    found = all_results(x, y, row, row, None)
    whole, half, one = ((2, 3, 13), torch.float32), ((2, 3, 13), torch.float16), (2, 3)
    rows = (one, torch.float32)
    assert [(tuple(t.shape), t.dtype) for t in found] == [
        whole, half, rows, rows, whole, half, whole, rows, rows, half, half,
    ]  # fmt: skip
    assert all(t.device.type == "meta" for t in found)
