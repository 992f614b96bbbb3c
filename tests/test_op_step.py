"""pgd_step_: every backend against the reference, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import op_cases
from op_cases import ALPHA, EPSILON, NOISY, NOISY_PICTURES, PICTURES, Picture, same_bits
from scc_fast import ops
from scc_fast.config import View
from scc_fast.reference import step as reference

BACKENDS = list(op_cases.backends_under_test("pgd_step_"))
ON_BACKENDS = pytest.mark.parametrize(("device", "backend"), BACKENDS)
ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
ON_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("pgd_step_", PICTURES)
)
ON_NOISY_PICTURES = pytest.mark.parametrize(
    ("device", "backend", "picture"), op_cases.crossed("pgd_step_", NOISY_PICTURES)
)


def composite(
    picture: Picture, gradient: Tensor, weight: float, noisy: bool = False
) -> tuple[Tensor, Tensor]:
    """The new δ and weighted sum, by ops that are tested on their own, on the CPU."""
    x, delta, seeds = inputs(picture)
    adjoint = ops.make_views_adjoint(gradient.cpu(), x, delta, seeds, picture.views(noisy),
                                     patch=picture.patch, backend="reference")  # fmt: skip
    delta = reference.pgd_step(delta, adjoint, x, ALPHA, EPSILON)
    return delta, before(picture) + weight * delta


def inputs(picture: Picture, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x, delta, seeds = picture._replace(delta=True).inputs(device)
    assert delta is not None
    return x, delta, seeds


def before(picture: Picture) -> Tensor:
    return op_cases.deltas(picture.batch, 3, picture.height, picture.width, seed=5)


def step(delta: Tensor, gradient: Tensor, x: Tensor, **more: Any) -> Tensor:
    """One step of one identity view, unless told otherwise; a new δ."""
    delta, seeds = delta.clone(), torch.arange(len(x), device=x.device)
    keywords = {"views": [View()], "alpha": ALPHA, "epsilon": EPSILON, **more}
    assert ops.pgd_step_(delta, gradient, x, seeds, **keywords) is None
    return delta


@ON_PICTURES
@ON_DTYPES
def test_equals_the_reference_to_the_bit(device, backend, picture: Picture, dtype) -> None:
    """In place, and nothing else is written."""
    gradient = picture.gradient(dtype, device)
    x, delta, seeds = inputs(picture, device)
    weighted, kept = before(picture).to(device), (gradient.clone(), x.clone())
    places = delta.data_ptr(), weighted.data_ptr()
    given = delta, gradient, x, seeds, picture.views()
    keywords = {"alpha": ALPHA, "epsilon": EPSILON, "patch": picture.patch, "backend": backend}
    assert ops.pgd_step_(*given, weighted=weighted, weight=0.3, **keywords) is None
    want, total = composite(picture, gradient, 0.3)
    assert same_bits(delta, want)
    assert same_bits(weighted, total)
    assert (delta.data_ptr(), weighted.data_ptr()) == places
    assert same_bits(gradient, kept[0])
    assert same_bits(x, kept[1])
    delta.copy_(inputs(picture)[1])
    ops.pgd_step_(*given, **keywords)
    assert same_bits(delta, want)


@ON_NOISY_PICTURES
@ON_DTYPES
def test_a_clamp_stops_the_gradient(device, backend, picture: Picture, dtype) -> None:
    gradient = picture.gradient(dtype, device)
    x, delta, seeds = inputs(picture, device)
    ops.pgd_step_(delta, gradient, x, seeds, picture.views(noisy=True), alpha=ALPHA,
                  epsilon=EPSILON, patch=picture.patch, backend=backend)  # fmt: skip
    want, _ = composite(picture, gradient, 0.0, noisy=True)
    undecided = op_cases.undecided(picture._replace(delta=True)).cpu()
    assert undecided.float().mean() < 1e-4 or not len(x)
    assert same_bits(torch.where(undecided, 0.0, delta.cpu()), want.masked_fill(undecided, 0.0))
    if picture.batch == 17:
        plain = [View(view.flip, view.shift) for view in picture.views(noisy=True)]
        _, other, _ = inputs(picture, device)
        ops.pgd_step_(other, gradient, x, seeds, plain, alpha=ALPHA, epsilon=EPSILON)
        assert not torch.equal(delta, other)  # the clamps did stop some


SPECIAL = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 6e4, -6e4]


@ON_BACKENDS
@ON_DTYPES
def test_special_gradients(device: str, backend: str, dtype: torch.dtype) -> None:
    """sign(0) = sign(-0) = sign(NaN) = 0; the smallest denormals have a sign."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if op_cases.truncates(device, backend, dtype):  # and it loses denormals
        least = torch.finfo(dtype).smallest_normal
    values = torch.tensor([*SPECIAL, least, -least, 4 * least, -4 * least]).to(dtype)
    assert (values[-4:] != 0).all()
    signs = [0, 0, 0, 0, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]
    gradient = values.view(1, 1, 2, 7).expand(1, 3, 2, 7).to(device)
    x, delta = torch.full((1, 3, 2, 7), 0.5, device=device), torch.zeros(1, 3, 2, 7, device=device)
    got = step(delta, gradient, x, alpha=0.125, epsilon=0.25, backend=backend)
    want = 0.125 * torch.tensor(signs, device=device).float().view(1, 1, 2, 7).expand_as(got)
    assert same_bits(got + 0.0, want + 0.0)
    assert same_bits(got, step(delta.cpu(), gradient.cpu(), x.cpu(), alpha=0.125, epsilon=0.25,
                               backend="reference"))  # fmt: skip
    # Two views: infinities cancel to NaN, equal numbers to 0, and one NaN is enough.
    pairs = [(torch.inf, -torch.inf, 0), (1, -1, 0), (torch.nan, 1, 0), (torch.inf, -1, 1),
             (least, least, 1), (-3 * least, least, -1), (-0.0, -0.0, 0)]  # fmt: skip
    first, second, signs = (torch.tensor(row, device=device) for row in zip(*pairs, strict=True))
    gradient = torch.stack([first, second]).view(2, 1, 1, 7).expand(2, 3, 1, 7).to(dtype)
    x, delta = x[:, :, :1], delta[:, :, :1].contiguous()
    got = step(delta, gradient, x, views=[View(), View()], alpha=0.125, epsilon=0.25,
               backend=backend)  # fmt: skip
    assert torch.equal(got, 0.125 * signs.float().view(1, 1, 1, 7).expand_as(got))


@ON_BACKENDS
def test_limits_of_step_and_budget(device: str, backend: str) -> None:
    picture = Picture(2, 5, 7, 1)
    x, delta, _ = inputs(picture, device)
    gradient = picture.gradient(torch.float32, device)
    keywords = {"backend": backend}
    assert (x == 0).any()
    assert (x == 1).any()
    still = step(delta, gradient, x, alpha=0, **keywords)  # Python ints are numbers too
    assert same_bits(still, reference.project(delta, x, EPSILON))
    assert (step(delta, gradient, x, epsilon=0, **keywords) == 0).all()
    assert (step(delta, gradient, x, alpha=0.0, epsilon=0.0, **keywords) == 0).all()
    far = step(delta, gradient, x, alpha=9.0, epsilon=5.0, **keywords)  # the box decides
    assert torch.equal(x + far, (gradient > 0).float())
    outside = step(delta, gradient, x + 1.0, **keywords)
    assert ((x + 1.0 + outside) <= 1.0).all()
    weighted = before(picture).to(device)
    step(delta, gradient, x, weighted=weighted, weight=0, **keywords)
    assert same_bits(weighted, before(picture))


SIDES = st.integers(1, 9)


@ON_BACKENDS
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    picture=st.tuples(st.integers(1, 3), SIDES, SIDES, st.integers(1, 5)).map(
        lambda sizes: Picture(*sizes)
    ),
    layout=st.sampled_from(["contiguous", "strided", "transposed", "channels_last"]),
    dtype=st.sampled_from(op_cases.DTYPES),
    seed=st.integers(0, 99),
    epsilon=st.floats(0, 1),
    alpha=st.floats(0, 1),
)
def test_stays_in_ball_and_box(
    device, backend, picture: Picture, layout, dtype, seed, epsilon, alpha
) -> None:
    """The box exactly; the ball to the rounding of x + δ, which is half an ulp below 1."""
    shape = (picture.batch, 3, picture.height, picture.width)
    x, delta = op_cases.pixels(*shape, seed=seed), op_cases.random(*shape, seed=seed + 1)
    x, delta = x.to(device), delta.to(device)
    gradient = picture.gradient(dtype, device, seed=seed)
    if layout != "contiguous":
        x, gradient = op_cases.layouts(x)[layout], op_cases.layouts(gradient)[layout]
    found = [
        step(delta, gradient, x, views=picture.views(), alpha=alpha, epsilon=epsilon,
             backend=name)
        for name in (backend, "reference")
    ]  # fmt: skip
    assert same_bits(found[0], found[1])
    assert ((x + found[0] >= 0) & (x + found[0] <= 1)).all()
    assert found[0].abs().max() <= epsilon + 2**-24


@ON_BACKENDS
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "inference"])
@pytest.mark.parametrize("noisy", [False, True])
def test_layouts_do_not_matter(device: str, backend: str, layout: str, noisy: bool) -> None:
    picture = Picture(3, 5, 6, 2)
    x, delta, _ = inputs(picture, device)
    gradient = picture.gradient(torch.bfloat16, device)
    views = picture.views(noisy)
    want = step(delta, gradient, x, views=views, backend=backend)
    given = [op_cases.layouts(tensor)[layout] for tensor in (gradient, x)]
    assert same_bits(step(delta, *given, views=views, backend=backend), want)
    with torch.inference_mode():
        assert same_bits(step(delta, *given, views=views, backend=backend), want)
    constant = torch.ones(6, 1, 1, 1, device=device).expand(6, 3, 5, 6)
    got = step(delta, constant, x, views=views, backend=backend)
    assert same_bits(got, step(delta, constant.contiguous(), x, views=views, backend=backend))


@ON_BACKENDS
def test_a_step_depends_on_its_own_image_and_seed(device: str, backend: str) -> None:
    picture = Picture(17, 5, 6, 2)
    x, delta, _ = inputs(picture, device)
    gradient, seeds = picture.gradient(torch.float32, device), op_cases.seeds(17, device)

    def result(rows: slice) -> Tensor:
        moved = delta[rows].clone()
        part = gradient.unflatten(0, (2, 17))[:, rows].flatten(0, 1)
        inputs = moved, part, x[rows], seeds[rows], op_cases.FEW_VIEWS
        ops.pgd_step_(*inputs, alpha=ALPHA, epsilon=EPSILON, backend=backend)
        return moved

    together = result(slice(None))
    for i in (0, 8, 16):
        assert same_bits(together[i : i + 1], result(slice(i, i + 1)))


@ON_BACKENDS
def test_builds_no_graph(device: str, backend: str) -> None:
    """δ may be the leaf that the gradient was taken of."""
    picture = Picture(2, 5, 6, 5)
    x, delta, seeds = inputs(picture, device)
    want = step(delta, picture.gradient(torch.float32, device), x, views=NOISY, backend=backend)
    leaf = delta.clone().requires_grad_()
    gradient = picture.gradient(torch.float32, device).requires_grad_()
    with torch.no_grad():
        ops.pgd_step_(leaf, gradient, x, seeds - 1000, NOISY, alpha=ALPHA, epsilon=EPSILON,
                      backend=backend)  # fmt: skip
    assert same_bits(leaf.detach(), want)
    assert leaf.is_leaf
    plain = delta.clone()
    ops.pgd_step_(plain, gradient, x, seeds - 1000, NOISY, alpha=ALPHA, epsilon=EPSILON,
                  backend=backend)  # fmt: skip
    assert same_bits(plain, want)
    assert not plain.requires_grad


# ---- The op as torch sees it ---------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit
    views = op_cases.FEW_VIEWS

    def moved(delta: Tensor, gradient: Tensor, x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        weighted = torch.zeros_like(delta)
        ops.pgd_step_(delta, 2 * gradient, x, seeds, views, alpha=ALPHA, epsilon=EPSILON,
                      weighted=weighted, weight=0.5, backend=backend)  # fmt: skip
        return weighted + 1.0, delta

    compiled = torch.compile(moved, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for picture in (Picture(3, 5, 6, len(views)), Picture(2, 7, 6, len(views))):
        x, delta, seeds = inputs(picture, device)
        gradient, other = picture.gradient(torch.float32, device), delta.clone()
        for got, want in zip(compiled(delta, gradient, x, seeds), moved(other, gradient, x, seeds),
                             strict=True):  # fmt: skip
            assert same_bits(got, want)
        assert same_bits(delta, other)


def test_meta() -> None:
    x = torch.empty(2, 3, 5, 7, device="meta")
    seeds = torch.empty(2, dtype=torch.int64, device="meta")
    weighted = torch.empty_like(x)
    assert ops.pgd_step_(torch.empty_like(x), x, x, seeds, [View()], alpha=0.1, epsilon=0.2,
                         weighted=weighted, weight=0.5) is None  # fmt: skip


@pytest.mark.parametrize(("device", "backend"), list(op_cases.backends_under_test("pgd_step_")))
def test_autograd_knows_that_delta_was_written(device: str, backend: str) -> None:
    """What autograd saved of δ is gone: using it raises instead of giving a wrong gradient."""
    x = torch.rand(1, 3, 4, 4, device=device)
    delta, weighted = torch.zeros_like(x), torch.zeros_like(x)
    weight = torch.ones_like(x, requires_grad=True)
    saved = (weight * delta).sum() + (weight * weighted).sum()
    step = {"alpha": 0.1, "epsilon": 0.1, "weighted": weighted, "weight": 1.0}
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    ops.pgd_step_(delta, torch.ones_like(x), x, seeds, (View(),), backend=backend, **step)
    with pytest.raises(RuntimeError, match="inplace operation"):
        saved.backward()
    leaf = delta.requires_grad_()
    with pytest.raises(ValueError, match="delta is written in place and must not require grad"):
        ops.pgd_step_(leaf, torch.ones_like(x), x, seeds, (View(),), backend=backend, **step)


@pytest.mark.parametrize(("device", "backend"), list(op_cases.backends_under_test("make_views")))
def test_forward_mode_is_refused_or_right(device: str, backend: str) -> None:
    x = torch.rand(1, 3, 4, 4, device=device)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)

    def seen(pixels: torch.Tensor) -> torch.Tensor:
        return ops.make_views(pixels, None, seeds, (View(),), std=(0.5, 0.5, 0.5), backend=backend)

    if backend == "reference":
        _, slope = torch.func.jvp(seen, (x,), (torch.ones_like(x),))
        assert torch.equal(slope, torch.full_like(slope, 2.0))
    else:
        with pytest.raises(NotImplementedError, match="make_views: forward-mode"):
            torch.func.jvp(seen, (x,), (torch.ones_like(x),))
