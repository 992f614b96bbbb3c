"""make_views and its adjoint: every backend against the reference, to the bit, and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import op_cases
from op_cases import (
    FEW_VIEWS,
    FILL,
    MEAN,
    NOISY,
    NOISY_PICTURES,
    PICTURES,
    PLAIN,
    STD,
    Picture,
    same_bits,
)
from scc_fast import ops
from scc_fast.config import View
from scc_fast.reference import views as reference

COLOURS = {"mean": MEAN, "std": STD, "fill": FILL}
VIEWS_BACKENDS = list(op_cases.backends_under_test("make_views"))
ADJOINT_BACKENDS = list(op_cases.backends_under_test("make_views_adjoint"))
ON_BACKENDS = pytest.mark.parametrize(("device", "backend"), VIEWS_BACKENDS)
ADJOINT_ON_BACKENDS = pytest.mark.parametrize(("device", "backend"), ADJOINT_BACKENDS)
ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
ON_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("make_views", PICTURES)
)
ON_NOISY_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("make_views", NOISY_PICTURES)
)
ADJOINT_ON_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("make_views_adjoint", PICTURES)
)
ADJOINT_ON_NOISY_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("make_views_adjoint", NOISY_PICTURES)
)


def channels(values: tuple[float, ...]) -> Tensor:
    """Rounded to float32, as every op takes them, then widened."""
    return torch.tensor(values).double()


def exact(pixels: Tensor, seeds: Tensor, views: tuple[View, ...], patch: int = 0) -> Tensor:
    """The reference in float64; differentiable."""
    # σ is a float32 number to the ops.
    rounded = [View(v.flip, v.shift, torch.tensor(v.noise).item()) for v in views]
    seen = reference.make_views(pixels, seeds, rounded, channels(FILL)).flatten(0, 1)
    size = (pixels.shape[-2], pixels.shape[-1])
    seen = reference.preprocess(seen, size, channels(MEAN), channels(STD))
    return reference.to_patches(seen, patch) if patch else seen


def whole(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta


def run(picture: Picture, device: str, backend: str | None, **more: Any) -> Tensor:
    noisy = more.pop("noisy", False)
    views = picture.views(noisy)
    keywords = {**COLOURS, "patch": picture.patch, "backend": backend, **more}
    return ops.make_views(*picture.inputs(device), views, **keywords)


@ON_PICTURES
@ON_DTYPES
def test_equals_the_reference_to_the_bit(device, backend, picture: Picture, dtype) -> None:
    """In half precision too: it is the float32 result, rounded to nearest even."""
    got = run(picture, device, backend, dtype=dtype)
    assert got.device.type == device
    assert got.is_contiguous()
    single = run(picture, "cpu", "reference")
    assert same_bits(got, op_cases.rounded(single, dtype, device, backend))
    x, delta, seeds = picture.inputs()
    wide = whole(x.double(), delta)
    want = exact(wide, seeds, picture.views(), picture.patch)
    limit = op_cases.VIEW_ULPS if dtype == torch.float32 else op_cases.ULPS[dtype]
    assert op_cases.ulp_error(got.cpu(), want, floor=1.0) <= limit


@ON_NOISY_PICTURES
@ON_DTYPES
def test_noise_is_within_ulps_of_float64(device, backend, picture: Picture, dtype) -> None:
    got = run(picture, device, backend, dtype=dtype, noisy=True)
    x, delta, seeds = picture.inputs()
    want = exact(whole(x.double(), delta), seeds, picture.views(noisy=True), picture.patch)
    limit = op_cases.NOISY_VIEW_ULPS if dtype == torch.float32 else op_cases.ULPS[dtype]
    assert op_cases.ulp_error(got.cpu(), want, floor=1.0) <= limit


@ON_BACKENDS
def test_defaults_leave_pixels_as_they_are(device: str, backend: str) -> None:
    x, delta, seeds = Picture(2, 5, 6, 1).inputs(device)
    got = ops.make_views(x, None, seeds, [View(), View(flip=True)], backend=backend)
    assert same_bits(got, torch.cat([x, x.flip(-1)]))
    got = ops.make_views(x, delta, seeds, [View(shift=(5, 0))], mean=MEAN, backend=backend)
    assert same_bits(got, torch.zeros_like(x))  # fill is the mean
    assert got.data_ptr() != x.data_ptr()


@ON_BACKENDS
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "inference"])
@pytest.mark.parametrize("patch", [0, 2])
def test_layouts_do_not_matter(device: str, backend: str, layout: str, patch: int) -> None:
    x, delta, seeds = Picture(3, 5, 6, 2).inputs(device)
    want = ops.make_views(x, delta, seeds, FEW_VIEWS, patch=patch, backend=backend)
    given = [op_cases.layouts(tensor)[layout] for tensor in (x, delta)]
    wide = torch.stack([seeds, seeds], dim=1)[:, 0]
    assert not wide.is_contiguous()
    got = ops.make_views(*given, wide, FEW_VIEWS, patch=patch, backend=backend)
    assert same_bits(got, want)
    assert torch.equal(given[0], x)
    got = ops.make_views(given[0], delta, seeds, FEW_VIEWS, patch=patch, backend=backend)
    assert same_bits(got, want)


@ON_BACKENDS
def test_expanded_inputs(device: str, backend: str) -> None:
    """One picture under many seeds, and one colour for all."""
    seeds = op_cases.seeds(17, device)
    x = op_cases.pixels(1, 1, 5, 7).to(device).expand(17, 3, 5, 7)
    delta = op_cases.deltas(1, 3, 1, 7).to(device).expand(17, 3, 5, 7)
    got = ops.make_views(x, delta, seeds, FEW_VIEWS, **COLOURS, backend=backend)
    copies = x.contiguous(), delta.contiguous()
    assert same_bits(got, ops.make_views(*copies, seeds, FEW_VIEWS, **COLOURS, backend=backend))


@ON_BACKENDS
@pytest.mark.parametrize("patch", [0, 3])
def test_a_view_depends_on_its_own_image_and_seed(device: str, backend: str, patch: int) -> None:
    picture = Picture(17, 4, 6, 2, patch)
    x, delta, _ = picture.inputs(device)
    seeds = op_cases.seeds(17, device)

    def result(rows) -> Tensor:
        keywords = {**COLOURS, "patch": patch, "backend": backend}
        seen = ops.make_views(x[rows], delta[rows], seeds[rows], FEW_VIEWS, **keywords)
        return seen.unflatten(0, (len(FEW_VIEWS), -1))

    together = result(slice(None))
    for i in (0, 1, 8, 16):
        assert same_bits(together[:, i : i + 1], result(slice(i, i + 1)))
    order = torch.arange(17).flip(0)
    assert same_bits(together[:, order], result(order))


@ON_BACKENDS
@ON_DTYPES
@pytest.mark.parametrize("patch", [1, 2, 3, 7])
def test_patches_are_rows_of_unfold(device: str, backend: str, dtype, patch: int) -> None:
    picture = Picture(3, 8, 11, 5)
    pictures = run(picture, device, backend, dtype=dtype, noisy=True)
    rows = run(picture, device, backend, dtype=dtype, noisy=True, patch=patch)
    unfolded = F.unfold(pictures.float(), patch, stride=patch).mT.to(dtype)
    assert same_bits(rows, unfolded)
    # The embedding of a ViT is then one matrix product.
    weight = op_cases.random(4, 3, patch, patch).double().to(device)
    convolved = F.conv2d(pictures.double(), weight, stride=patch).flatten(2).mT
    torch.testing.assert_close(rows.double() @ weight.flatten(1).T, convolved)


# ---- The adjoint ---------------------------------------------------------------------------------


def adjoint(
    picture: Picture, gradient: Tensor, device: str, backend: str | None, noisy: bool = False
) -> Tensor:
    inputs, views = picture.inputs(device), picture.views(noisy)
    return ops.make_views_adjoint(
        gradient, *inputs, views, std=STD, patch=picture.patch, backend=backend
    )


def exact_adjoint(picture: Picture, gradient: Tensor, noisy: bool = False) -> tuple[Tensor, Tensor]:
    """By autograd in float64, and a bound of the error of float32.

    The mask of a clamp is that of float32 pixels, so x + delta is rounded first. A sum of L terms
    and a division round L + 1 times.
    """
    x, delta, seeds = picture.inputs()
    pixels = whole(x, delta).double().requires_grad_()
    views = picture.views(noisy)
    seen = exact(pixels, seeds, views, picture.patch)
    found = [
        torch.autograd.grad(seen, pixels, wide, retain_graph=True)[0]
        for wide in (gradient.cpu().double(), gradient.cpu().double().abs())
    ]
    return found[0], (picture.count + 1) * op_cases.UNIT * found[1]


@ADJOINT_ON_PICTURES
@ON_DTYPES
def test_adjoint_is_the_gradient(device, backend, picture: Picture, dtype) -> None:
    """To the bit that of the reference, and within rounding autograd's in float64."""
    gradient = picture.gradient(dtype, device)
    got = adjoint(picture, gradient, device, backend)
    assert got.device.type == device
    assert same_bits(got, adjoint(picture, gradient.cpu(), "cpu", "reference"))
    want, bound = exact_adjoint(picture, gradient)
    assert ((got.cpu() - want).abs() <= bound).all()


@ADJOINT_ON_NOISY_PICTURES
@ON_DTYPES
def test_adjoint_stops_at_a_clamp(device, backend, picture: Picture, dtype) -> None:
    """What a clamp cut off passes nothing on, be it infinite."""
    gradient = picture.gradient(dtype, device)
    cut = exact_mask(picture).to(device)
    got = adjoint(picture, torch.where(cut, torch.inf, gradient), device, backend, noisy=True)
    assert cut.any() or gradient.numel() < 100
    same = adjoint(picture, gradient.cpu(), "cpu", "reference", noisy=True)
    undecided = op_cases.undecided(picture)
    assert undecided.float().mean() < 1e-4 or not len(got)
    assert same_bits(got.cpu().masked_fill(undecided, 0.0), same.masked_fill(undecided, 0.0))
    want, bound = exact_adjoint(picture, gradient, noisy=True)
    assert (((got.cpu() - want).abs() <= bound) | undecided).all()


def exact_mask(picture: Picture) -> Tensor:
    """Of the views' gradient, what is cut off by a clamp at a pixel of noise."""
    x, delta, seeds = picture.inputs()
    views = picture.views(noisy=True)
    seen = exact(whole(x, delta).double(), seeds, views, picture.patch)
    black = (torch.zeros(3).double() - channels(MEAN)) / channels(STD)
    white = (torch.ones(3).double() - channels(MEAN)) / channels(STD)
    pictures = torch.stack([black, white]).view(2, 1, 3, 1, 1).expand(2, 1, 3, *x.shape[-2:])
    if picture.patch:
        pictures = torch.stack([reference.to_patches(p, picture.patch) for p in pictures])
    noisy = torch.tensor([view.noise > 0 for view in views]).repeat_interleave(len(x))
    noisy = noisy.view(-1, *[1] * (seen.dim() - 1))
    return noisy & ((seen == pictures[0]) | (seen == pictures[1]))


@ADJOINT_ON_PICTURES
def test_adjoint_and_views_have_one_inner_product(device, backend, picture: Picture) -> None:
    """<adjoint(g), v> = <g, J v>, J v being a difference of the affine views in float64."""
    gradient = picture.gradient(torch.float32, device)
    x, delta, seeds = picture.inputs()
    views, direction = picture.views(), op_cases.random(*x.shape, seed=6).double()
    ends = [
        exact(whole(x.double(), delta) + step * direction, seeds, views, picture.patch)
        for step in (1, -1)
    ]
    along = (gradient.cpu() * (ends[0] - ends[1]) / 2).sum()
    _, bound = exact_adjoint(picture, gradient)
    got = (adjoint(picture, gradient, device, backend).cpu() * direction).sum()
    assert abs(got - along) <= (bound * direction.abs()).sum() + 1e-9


@ADJOINT_ON_BACKENDS
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "inference"])
def test_adjoint_takes_any_layout(device: str, backend: str, layout: str) -> None:
    picture = Picture(3, 5, 6, 2)
    x, delta, seeds = picture.inputs(device)
    gradient = picture.gradient(torch.float16, device)
    want = ops.make_views_adjoint(gradient, x, delta, seeds, FEW_VIEWS, std=STD, backend=backend)
    given = [op_cases.layouts(tensor)[layout] for tensor in (gradient, x, delta)]
    got = ops.make_views_adjoint(*given, seeds, FEW_VIEWS, std=STD, backend=backend)
    assert same_bits(got, want)
    constant = torch.ones(6, 1, 1, 1, device=device).expand(6, 3, 5, 6)  # as sum() gives
    got = ops.make_views_adjoint(constant, x, delta, seeds, FEW_VIEWS, std=STD, backend=backend)
    again = constant.contiguous()
    assert same_bits(
        got, ops.make_views_adjoint(again, x, delta, seeds, FEW_VIEWS, std=STD, backend=backend)
    )


@ADJOINT_ON_BACKENDS
def test_adjoint_depends_on_its_own_image_and_seed(device: str, backend: str) -> None:
    picture = Picture(17, 5, 6, 2)
    x, delta, _ = picture.inputs(device)
    seeds = op_cases.seeds(17, device)
    gradient = picture.gradient(torch.float32, device)

    def result(rows) -> Tensor:
        part = gradient.unflatten(0, (2, 17))[:, rows].flatten(0, 1)
        inputs = x[rows], delta[rows], seeds[rows]
        return ops.make_views_adjoint(part, *inputs, FEW_VIEWS, std=STD, backend=backend)

    together = result(slice(None))
    for i in (0, 8, 16):
        assert same_bits(together[i : i + 1], result(slice(i, i + 1)))


@ON_BACKENDS
@ON_DTYPES
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("patch", [0, 2])
def test_autograd_through_the_views(device, backend, dtype, noisy: bool, patch: int) -> None:
    """Of x, of delta, of both and with none; for Triton through its twin."""
    picture = Picture(2, 5, 6, 3, patch)
    x, delta, seeds = picture.inputs(device)
    gradient = picture.gradient(dtype, device)
    want, bound = exact_adjoint(picture, gradient, noisy)
    for leaves in ((True, True), (True, False), (False, True)):
        inputs = [t.clone().requires_grad_(on) for t, on in zip((x, delta), leaves, strict=True)]
        seen = ops.make_views(*inputs, seeds, picture.views(noisy), **COLOURS, dtype=dtype,
                              patch=patch, backend=backend)  # fmt: skip
        assert seen.requires_grad
        seen.backward(gradient)
        for leaf, on in zip(inputs, leaves, strict=True):
            assert (leaf.grad is not None) == on
            # Autograd of the reference itself divides each view by std before the sum.
            assert not on or ((leaf.grad.cpu() - want).abs() <= 2 * bound).all()
    alone = x.clone().requires_grad_()
    seen = ops.make_views(alone, None, seeds, PLAIN, **COLOURS, backend=backend)
    (got,) = torch.autograd.grad(seen.sum(), alone)
    again = ops.make_views_adjoint(torch.ones_like(seen), x, None, seeds, PLAIN, std=STD)
    torch.testing.assert_close(got, again)
    with torch.no_grad():
        assert not ops.make_views(alone, None, seeds, PLAIN, backend=backend).requires_grad


COMPILED = list(op_cases.backends_under_test("make_views", ("cpp", "triton")))


@pytest.mark.parametrize(("device", "backend"), COMPILED)
def test_a_second_derivative_is_refused(device: str, backend: str) -> None:
    """Even where another term would hide that one is missing; autograd does the reference's."""
    x, delta, seeds = Picture(2, 5, 6, 1).inputs(device)
    delta.requires_grad_()
    seen = ops.make_views(x, delta, seeds, NOISY, backend=backend)
    with pytest.raises(RuntimeError, match="make_views: differentiable once"):
        torch.autograd.grad(seen.square().sum(), delta, create_graph=True)
    (first,) = torch.autograd.grad(seen.sum(), delta, create_graph=True)  # constant but for clamps
    assert not first.requires_grad


@ADJOINT_ON_BACKENDS
def test_adjoint_takes_constants(device: str, backend: str) -> None:
    picture = Picture(2, 5, 6, 5)
    x, delta, seeds = picture.inputs(device)
    gradient = picture.gradient(torch.float32, device).requires_grad_()
    got = ops.make_views_adjoint(gradient, x, delta.requires_grad_(), seeds, NOISY,
                                 backend=backend)  # fmt: skip
    assert not got.requires_grad


# ---- The ops as torch sees them ------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    """Both ops and the gradient of make_views, around something of an encoder."""
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit
    views, keywords = FEW_VIEWS, {"patch": 2, "backend": backend}

    def both(x: Tensor, delta: Tensor, seeds: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        seen = ops.make_views(x, delta, seeds, views, **COLOURS, **keywords)
        gradient = (seen * weight).tanh()
        whole = ops.make_views_adjoint(gradient, x, delta, seeds, views, std=STD, **keywords)
        return whole, gradient.sum()

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = op_cases.random(12).to(device)
    for picture in (Picture(3, 5, 6, 1), Picture(2, 7, 6, 1)):
        x, delta, seeds = picture.inputs(device)
        delta.requires_grad_()
        found = []
        for function in (compiled, both):
            whole, value = function(x, delta, seeds, weight)
            found.append((whole, torch.autograd.grad(value, delta)[0]))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("patch", [0, 2])
def test_meta(patch: int) -> None:
    x = torch.empty(2, 3, 5, 7, device="meta")
    seeds = torch.empty(2, dtype=torch.int64, device="meta")
    seen = ops.make_views(x, None, seeds, NOISY, dtype=torch.bfloat16, patch=patch)
    shape = (10, 6, 12) if patch else (10, 3, 5, 7)
    assert (seen.shape, seen.dtype, seen.device.type) == (shape, torch.bfloat16, "meta")
    whole = ops.make_views_adjoint(seen, x, None, seeds, NOISY, patch=patch)
    assert (whole.shape, whole.dtype, whole.device.type) == (x.shape, torch.float32, "meta")
