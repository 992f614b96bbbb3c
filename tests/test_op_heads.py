"""The heads: every backend against the reference in float64, and their gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import op_cases
from op_cases import HEADS, TEMPERATURES, UNIT, Head, random, same_bits, unit
from scc_fast import ops
from scc_fast.ops import ClassTable
from scc_fast.reference import heads as reference
from scc_fast.reference.heads import Classes

ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


def on_heads(op: str) -> Any:
    return pytest.mark.parametrize(("device", "backend", "case"), op_cases.crossed(op, HEADS))


def on_backends(op: str) -> Any:
    return pytest.mark.parametrize(("device", "backend"), list(op_cases.backends_under_test(op)))


def table_of(classes: Classes, device: str = "cpu") -> ClassTable:
    return ClassTable.of(Classes(classes.text.to(device), classes.scale, classes.bias))


@functools.cache
def exact(classes: Classes) -> Classes:
    return Classes(classes.text.double(), classes.scale, classes.bias)


def small_table(device: str = "cpu", count: int = 5, width: int = 13) -> ClassTable:
    return ClassTable(unit(count, width).to(device), None, None, 20.0, -1.0)


def assert_close(got: Tensor, want: Tensor, limit: Tensor | float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).abs()
    assert (error <= limit).all(), f"off by {error.max():.3g}"


def assert_gradient(got: Tensor, want: Tensor, limit: float) -> None:
    """Relative L2 error and cosine."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    wide = got.cpu().double()
    error = (wide - want).norm() / want.norm()
    assert error <= limit, f"off by {error:.3g} > {limit:.3g}"
    cosine = F.cosine_similarity(wide.flatten(), want.flatten(), dim=0)
    assert cosine >= 1 - limit**2 - 1e-14


def gradient_limit(case: Head, dtype: torch.dtype, device: str, backend: str) -> float:
    cut = op_cases.truncates(device, backend, dtype)
    return op_cases.gradient_error(case, dtype) * (2 if cut else 1)


@on_heads("drift_head")
@ON_DTYPES
def test_drift_head(device: str, backend: str, case: Head, dtype: torch.dtype) -> None:
    features = case.features(dtype)
    anchor = random(case.batch, case.width, seed=8).to(dtype)
    tau, gradient = ops.drift_head(features.to(device), anchor.to(device), backend=backend)
    assert (tau.dtype, tau.device.type) == (torch.float32, device)
    assert (gradient.dtype, gradient.device.type) == (dtype, device)
    wide, fixed = features.double(), anchor.double()
    want = reference.relative_drift(wide[0], fixed)
    assert_close(tau, want, want * (op_cases.sum_error(case.width) + 8 * UNIT))
    leaf = wide.clone().requires_grad_()
    objective = (leaf - fixed).square().sum(dim=-1).mean(dim=0)
    (slope,) = torch.autograd.grad(objective.sum(), leaf)
    # A difference and a division round once each; then the store.
    assert op_cases.ulp_error(gradient.cpu(), slope, floor=1e-4) <= op_cases.ULPS[dtype]
    assert_gradient(gradient, slope, gradient_limit(case, dtype, device, backend))


@on_heads("pseudo_label")
@ON_DTYPES
def test_pseudo_label(device: str, backend: str, case: Head, dtype: torch.dtype) -> None:
    features, classes = case.features(dtype), case.classes_of()
    table, wide = table_of(classes, device), exact(classes)
    every = dtype == torch.float32 and not case.large
    for temperature in TEMPERATURES if every else TEMPERATURES[:1]:
        q, label, soft = ops.pseudo_label(features.to(device), table, temperature, backend=backend)
        assert (q.dtype, label.dtype, soft.dtype) == (torch.float32, torch.int64, torch.float32)
        assert q.shape == (case.batch, len(table.text))
        want, first, direction = reference.pseudo_label(features.double(), wide, temperature)
        relative = op_cases.label_error(case, temperature)
        # What is below float32's normal numbers before the power may be lost, or stay there.
        lost = 2 * torch.finfo(torch.float32).tiny ** min(1.0, 1.0 / temperature)
        assert_close(table.expand(q), want, relative * want + lost)
        whole = table.expand(q).cpu().double().sum(dim=-1)
        assert_close(whole, torch.ones(case.batch).double(), 2 * relative + 1e-6)
        best = wide.group[want.argmax(dim=-1)]
        others = want.masked_fill(wide.group == best[:, None], 0.0).amax(dim=-1)
        clear = others < want.amax(dim=-1) * (1 - 4 * relative)
        # At a great scale views that disagree have nearly the same share of q̄.
        assert clear.double().mean() >= 0.5 or case.batch == 0
        chosen = torch.arange(len(table.text)) if table.group is None else table.group.cpu()
        assert torch.equal(label.cpu()[clear], chosen[first][clear])
        assert torch.equal(label, q.argmax(dim=-1))
        length = (want @ wide.text).norm(dim=-1, keepdim=True)
        limit = 2 * (relative + op_cases.sum_error(case.classes)) / length + 4 * UNIT
        assert_close(soft.cpu().double().norm(dim=-1), torch.ones(case.batch).double(), 1e-6)
        error = (soft.cpu().double() - direction).norm(dim=-1, keepdim=True)
        assert (error <= limit).all()


@on_heads("margin_head")
@ON_DTYPES
def test_margin_head(device: str, backend: str, case: Head, dtype: torch.dtype) -> None:
    features, classes, soft = case.features(dtype), case.classes_of(), case.soft()
    table, wide = table_of(classes, device), exact(classes)
    label = torch.arange(case.batch) % len(table.text)
    given = (features.to(device), soft.to(device), label.to(device), table)
    value, gradient = ops.margin_head(*given, backend=backend)
    assert (value.dtype, value.device.type) == (torch.float32, device)
    assert (gradient.dtype, gradient.device.type) == (dtype, device)

    group = torch.arange(case.classes) if table.group is None else table.group.cpu()
    negatives = group != label[:, None]
    leaf = features.double().requires_grad_()
    unit_length = F.normalize(leaf, dim=-1)
    cosines = unit_length @ wide.text.T
    rivals = cosines.masked_fill(~negatives, -2.0)
    towards = (unit_length * soft.double()).sum(dim=-1)
    objective = case.scale * (towards - rivals.max(dim=-1).values).mean(dim=0)
    assert_close(value, objective.detach(), 2 * op_cases.logit_error(case))
    same, slope = reference.margin_head(features.double(), soft.double(), negatives, wide)
    torch.testing.assert_close(same, objective.detach())
    # Where two rivals are within rounding of each other, either may give the gradient.
    best = rivals.amax(dim=-1, keepdim=True)
    nearest = rivals.masked_fill(group == group[rivals.argmax(dim=-1)][..., None], -2.0)
    clear = nearest.amax(dim=-1) < best[..., 0] - 4 * op_cases.sum_error(case.width)
    assert clear.double().mean() >= 0.95 or case.batch == 0
    limit = gradient_limit(case, dtype, device, backend)
    if case.width == 1:  # cosines are constant then, and the gradient is what rounding leaves
        assert gradient.abs().max() <= 8 * case.scale * UNIT / features.abs().min()
    else:
        assert_gradient(gradient.cpu()[clear], slope[clear], limit)
        (found,) = torch.autograd.grad(objective.sum(), leaf)
        assert_gradient(gradient.cpu()[clear], found[clear], limit)


@on_heads("mean_logits")
@ON_DTYPES
def test_mean_logits(device: str, backend: str, case: Head, dtype: torch.dtype) -> None:
    """Value and gradient, for Triton through its twin."""
    features, classes = case.features(dtype), case.classes_of()
    given = features.to(device).requires_grad_()
    got = ops.mean_logits(given, table_of(classes, device), backend=backend)
    assert (got.dtype, got.device.type) == (torch.float32, device)
    leaf = features.double().requires_grad_()
    want = reference.mean_logits(leaf, exact(classes))
    assert_close(got.detach(), want.detach(), op_cases.logit_error(case))
    upstream = random(case.batch, case.classes, seed=7)
    (gradient,) = torch.autograd.grad(got, given, upstream.to(device))
    (slope,) = torch.autograd.grad(want, leaf, upstream.double())
    assert gradient.dtype == dtype
    if case.width == 1:
        assert gradient.abs().max() <= 8 * case.scale * case.classes * UNIT / features.abs().min()
    else:
        limit = op_cases.gradient_error(case, dtype) + 2 * op_cases.sum_error(case.classes)
        assert_gradient(gradient, slope, limit)


@on_heads("mean_logits")
@ON_DTYPES
@pytest.mark.parametrize("unit_length", [False, True])
def test_weighted_logits(
    device: str, backend: str, case: Head, dtype: torch.dtype, unit_length: bool
) -> None:
    """Weights of each view and image, some below 0; both gradients."""
    if case.large and dtype != torch.float32:
        return
    features, classes = case.features(dtype), case.classes_of()
    weights = random(case.views, case.batch, seed=6)
    weights[0] += 3
    given = features.to(device).requires_grad_()
    shares = weights.to(device).requires_grad_()
    table = table_of(classes, device)
    got = ops.mean_logits(given, table, shares, unit=unit_length, backend=backend)
    leaf, exact_shares = features.double().requires_grad_(), weights.double().requires_grad_()
    want = reference.mean_logits(leaf, exact(classes), exact_shares, unit_length)
    whole = (exact_shares[..., None] * F.normalize(leaf, dim=-1)).sum(dim=0).norm(dim=-1).detach()
    grown = weights.abs().sum(dim=0).double() / (whole if unit_length else 1.0)
    limit = (case.views**0.5 * op_cases.logit_error(case) * (1 + grown))[:, None]
    assert_close(got.detach(), want.detach(), limit)
    upstream = random(case.batch, case.classes, seed=7)
    found = torch.autograd.grad(got, (given, shares), upstream.to(device))
    slopes = torch.autograd.grad(want, (leaf, exact_shares), upstream.double())
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    if case.width > 1 and case.batch:
        limit = op_cases.gradient_error(case, dtype) + 2 * op_cases.sum_error(case.classes)
        limit *= 4 * float(grown.detach().max())
        assert_gradient(found[0], slopes[0], limit)
        if case.views > 1 or not unit_length:  # of one view any weight is as good
            assert_gradient(found[1], slopes[1], limit)


@on_heads("view_weights")
@ON_DTYPES
@pytest.mark.parametrize("form", [{}, {"slope": 6.0}, {"geodesic": True}], ids=str)
def test_view_weights(
    device: str, backend: str, case: Head, dtype: torch.dtype, form: dict[str, Any]
) -> None:
    if case.views < 2 or (case.large and dtype != torch.float32):
        return
    own = case.features(dtype)[:1].float()
    # Views near the picture, whose drifts agree for some images and not for others.
    shared = random(1, case.batch, case.width, seed=11)
    spread = 3 * torch.rand(1, case.batch, 1, generator=torch.Generator().manual_seed(1))
    each = random(case.views - 1, case.batch, case.width, seed=12)
    features = torch.cat([own, own + 0.3 * (shared + spread * each)]).to(dtype)
    numbers = (0.5, 2.5, 0.7)
    found = ops.view_weights(features.to(device), *numbers, **form, backend=backend)
    want = reference.view_weights(features.double(), *numbers, **form)
    assert [part.dtype for part in found] == [torch.float32] * 3
    limit = 8 * op_cases.sum_error(case.width) + 8 * UNIT
    assert_close(found[1], want[1], limit)
    # r divides by drifts, which are what is left of a difference.
    units = F.normalize(features.double(), dim=-1)
    small = torch.minimum(
        (units[1:] - units[0]).norm(dim=-1).amin(dim=0),
        (units[1:].mean(dim=0) - units[0]).norm(dim=-1),
    )
    clear = small > 1e-3  # below, rounding decides
    assert_close(found[2].cpu()[clear], want[2][clear], (4 * limit / small)[clear])
    sure = clear if form else clear & ((want[2] - 0.7).abs() > 1e-3)
    assert sure.double().mean() >= 0.5 or case.batch == 0 or case.width == 1
    limit = (100 * limit / small)[sure]
    assert_close(found[0].cpu()[:, sure], want[0][:, sure], limit)
    if not form:
        chosen = torch.where(found[2].cpu() > 0.7, 2.5, 0.5)
        torch.testing.assert_close(1 - found[0][0].cpu(), chosen)


@on_backends("view_weights")
def test_views_that_did_not_move(device: str, backend: str) -> None:
    """Drifts within rounding agree in nothing, and z is the picture's own."""
    features = Head(1, 3, 13, 5).features(device=device).expand(4, 3, 13).contiguous()
    for form in ({}, {"slope": 6.0}, {"geodesic": True}):
        weights, cosine, agreement = ops.view_weights(
            features, 1.0, 2.5, 0.5, **form, backend=backend
        )
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
        assert agreement.tolist() == [0.0] * 3
        found = ops.mean_logits(features, small_table(device), weights, unit=True, backend=backend)
        alone = ops.mean_logits(features[:1], small_table(device), backend=backend)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@on_backends("mean_logits")
def test_what_is_no_number_is_not_hidden(device: str, backend: str) -> None:
    """A view that overflowed makes NaN of its picture's logits, of no other's."""
    features = Head(3, 3, 13, 5).features(device=device)
    features[1, 0] = torch.nan
    weights, _, agreement = ops.view_weights(features, 1.0, 2.5, -0.5, backend=backend)
    assert agreement.isnan().tolist() == [True, False, False]
    for unit_length in (False, True):
        found = ops.mean_logits(
            features, small_table(device), weights, unit=unit_length, backend=backend
        )
        assert found.isnan().all(dim=1).tolist() == [True, False, False]


@on_backends("view_weights")
def test_opposite_views_have_no_arc(device: str, backend: str) -> None:
    own = Head(1, 3, 13, 5).features(device=device)
    features = torch.cat([own, -own, -own])
    weights, *_ = ops.view_weights(features, 0.45, 2.25, 0.0, geodesic=True, backend=backend)
    assert weights.isfinite().all()


@on_backends("mean_logits")
def test_a_sum_of_zeros_leaves_the_picture_itself(device: str, backend: str) -> None:
    features = Head(2, 3, 13, 5).features(device=device)
    features[1] = features[0]
    weights = torch.tensor([[1.0, 1.0, 0.5], [-1.0, 0.0, 0.5]], device=device)
    table = small_table(device)
    leaf = features.clone().requires_grad_()
    found = ops.mean_logits(leaf, table, weights, unit=True, backend=backend)
    torch.testing.assert_close(found, ops.mean_logits(features[:1], table, backend=backend))
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    assert slope.isfinite().all()
    assert slope[0, 0].abs().sum() > 0


# ---- Ties, duplicates, zeros ---------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 64), (5, 299), (63, 64), (127, 128)])
@on_backends("margin_head")
def test_the_first_of_equal_maxima_wins(device, backend, first: int, second: int) -> None:
    """In a tile or across tiles; what is compared is computed exactly."""
    text = torch.zeros(300, 13)
    text[:, 4:] = unit(300, 9)
    text[first], text[second] = torch.eye(13)[1], torch.eye(13)[2]
    table = ClassTable(text.to(device), None, None, 4.0)
    feature = torch.tensor([1.0, 2.0, 2.0] + [0.0] * 10, device=device).expand(2, 3, 13)
    q, label, _ = ops.pseudo_label(feature, table, 0.5, backend=backend)
    assert label.tolist() == [first] * 3
    assert torch.equal(q[:, first], q[:, second])
    soft = torch.eye(13, device=device)[:1].expand(3, 13)
    _, gradient = ops.margin_head(feature, soft, label * 0 + 200, table, backend=backend)
    direction = soft.cpu() - text[first]
    want = 4 / 2 * (direction + feature.cpu() / 9) / 3  # u·(a − t) is −1/3
    assert_close(gradient, want.double().expand(2, 3, 13), 8 * UNIT)


@on_backends("pseudo_label")
def test_duplicates_count(device: str, backend: str) -> None:
    """As the reference has them; with all prompts alike nothing is left to choose from."""
    case = Head(3, 4, 13, 9, duplicates=True)
    classes, features = case.classes_of(), case.features(device=device)
    table = table_of(classes, device)
    q, label, soft = ops.pseudo_label(features, table, 0.5, backend=backend)
    want, first, direction = reference.pseudo_label(features.cpu(), classes, 0.5)
    torch.testing.assert_close(table.expand(q).cpu(), want)
    assert torch.equal(label.cpu(), table.group.cpu()[first])
    torch.testing.assert_close(soft.cpu(), direction)
    text = unit(1, 13).expand(2, 13).to(device)
    one = ClassTable.of(Classes(text, 20.0, -3.0))
    assert one.count.tolist() == [2]
    q, label, soft = ops.pseudo_label(features, one, 0.1, backend=backend)
    torch.testing.assert_close(q, torch.full((4, 1), 0.5, device=device))
    assert label.tolist() == [0] * 4
    torch.testing.assert_close(soft, one.text.expand(4, 13))
    value, gradient = ops.margin_head(features, soft, label, one, backend=backend)
    wide, only = features.cpu().double(), soft.cpu().double()
    none = torch.zeros(4, 2, dtype=torch.bool)
    double = Classes(text.cpu().double(), 20.0)
    want, slope = reference.margin_head(wide, only, none, double)
    assert_close(value, want, 2 * op_cases.logit_error(case))
    assert_gradient(gradient, slope, op_cases.gradient_error(case, torch.float32))
    logits = ops.mean_logits(features, one, backend=backend)
    assert same_bits(logits[:, 0], logits[:, 1])


@on_backends("mean_logits")
@ON_DTYPES
def test_features_of_zeros(device: str, backend: str, dtype: torch.dtype) -> None:
    """An encoder that gives nothing has no opinion, and its neighbours keep theirs."""
    features = Head(2, 3, 13, 5).features(dtype, device)
    whole = ops.mean_logits(features, small_table(device), backend=backend)
    features[:, 1] = 0
    table = small_table(device)
    logits = ops.mean_logits(features, table, backend=backend)
    assert torch.equal(logits[1], torch.full((5,), -1.0, device=device))
    torch.testing.assert_close(logits[::2], whole[::2])
    q, label, soft = ops.pseudo_label(features, table, 0.5, backend=backend)
    torch.testing.assert_close(q[1], torch.full((5,), 0.2, device=device))
    assert label[1] == 0
    assert soft.isfinite().all()


@on_backends("margin_head")
@ON_DTYPES
def test_layouts_do_not_matter(device: str, backend: str, dtype: torch.dtype) -> None:
    case, table = Head(2, 5, 13, 5), small_table(device)
    features, soft = case.features(dtype, device), case.soft().to(device)
    label = torch.arange(5, device=device)

    def results(features: Tensor, soft: Tensor, label: Tensor) -> list[Tensor]:
        return [
            *ops.drift_head(features, features[1], backend=backend),
            *ops.pseudo_label(features, table, 0.5, backend=backend),
            *ops.margin_head(features, soft, label, table, backend=backend),
            ops.mean_logits(features, table, backend=backend),
            *ops.view_weights(features, 1.0, 2.5, 0.5, backend=backend),
        ]

    want = results(features, soft, label)
    wide = torch.stack([label, label], dim=1)[:, 0]
    for layout, given in op_cases.layouts(features).items():
        got = results(given, op_cases.layouts(soft)[layout], wide)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, msg=layout)
    one = features[:1, :1].expand(2, 5, 13)
    torch.testing.assert_close(results(one, soft, label), results(one.contiguous(), soft, label))


@on_backends("margin_head")
def test_constants_build_no_graph(device: str, backend: str) -> None:
    case, table = Head(2, 5, 13, 5), small_table(device)
    features = case.features(device=device).requires_grad_()
    soft, label = case.soft().to(device), torch.arange(5, device=device)
    found = [
        *ops.drift_head(features, features[0], backend=backend),
        *ops.pseudo_label(features, table, 0.5, backend=backend),
        *ops.margin_head(features, soft, label, table, backend=backend),
        *ops.view_weights(features, 1.0, 2.5, 0.5, backend=backend),
    ]
    assert not any(tensor.requires_grad for tensor in found)


@on_backends("mean_logits")
def test_second_derivative_of_the_logits(device: str, backend: str) -> None:
    """It is right, and nothing is left out in silence, as with a penalty on the gradient."""
    features, found = Head(2, 3, 13, 5).features(device=device), []
    for name in (backend, "reference"):
        leaf = features.clone().requires_grad_()
        logits = ops.mean_logits(leaf, small_table(device), backend=name)
        (first,) = torch.autograd.grad(logits[:, 0].sum(), leaf, create_graph=True)
        found += torch.autograd.grad(first.square().sum() + logits.sum(), leaf)
    torch.testing.assert_close(found[0], found[1])


def test_class_table() -> None:
    """Rows in order of first appearance, and back."""
    rows = F.normalize(torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0]]), dim=-1)
    order = torch.tensor([2, 0, 0, 1, 2, 2])
    table = ClassTable.of(Classes(rows[order], 7.0, -2.0))
    assert torch.equal(table.text, rows[[2, 0, 1]])
    assert table.text.is_contiguous()
    assert table.count.tolist() == [3, 2, 1]
    assert table.group.tolist() == [0, 1, 1, 2, 0, 0]
    assert (table.scale, table.bias) == (7.0, -2.0)
    values = torch.arange(6.0).view(2, 3)
    assert table.expand(values).tolist() == [[0, 1, 1, 2, 0, 0], [3, 4, 4, 5, 3, 3]]
    plain = ClassTable.of(Classes(rows, 7.0))
    assert (plain.count, plain.group) == (None, None)
    assert torch.equal(plain.text, rows)
    assert plain.expand(values) is values
    with pytest.raises(ValueError, match="classes: K must be at least 2, got 1"):
        ClassTable.of(Classes(rows[:1], 7.0))


# ---- Absent rows ---------------------------------------------------------------------------------


def signs(*shape: int, seed: int) -> Tensor:
    """±1: of 16 the length is 4, and what the products add and divide is exact."""
    return torch.where(random(*shape, seed=seed) < 0, -1.0, 1.0)


def exact_table(count: int, device: str, scale: float, counted: bool = False) -> ClassTable:
    """Unit texts that are all different, their first some of several classes."""
    text = torch.unique(signs(2 * count + 9, 16, seed=5), dim=0)[:count] / 4
    times = torch.ones(count, dtype=torch.int64)
    times[: count // 2 + 1] += 1
    return ClassTable(text.to(device), times.to(device) if counted else None, None, scale, -1.0)


ROWS_OF = ((2, 32), (3, 32), (33, 96))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("used", "rows"), ROWS_OF)
@on_backends("margin_head")
@ON_DTYPES
def test_absent_rows_are_as_if_cut(
    device: str, backend: str, used: int, rows: int, last: bool, dtype: torch.dtype
) -> None:
    """Whatever stands in them: to the bit, but where a sum takes its terms in another order."""
    features = signs(3, 4, 16, seed=6).to(dtype).to(device)
    to_bits = backend == "reference" or (backend == "cpp" and last)
    for scale, temperature in ((20.0, 0.5), (100.0, 0.1), (0.0, 2.0)):
        for counted in (False, True):
            table = exact_table(used, device, scale, counted)
            whole, here = op_cases.with_absent(table, rows, features, last)
            want, first, soft = ops.pseudo_label(features, table, temperature, backend=backend)
            q, label, along = ops.pseudo_label(features, whole, temperature, backend=backend)
            assert torch.equal(label, here[first])
            if to_bits:
                assert same_bits(q[:, here], want)
            torch.testing.assert_close(q[:, here], want, rtol=1e-5, atol=1e-37)
            q[:, here] = 0.0
            assert torch.equal(q, torch.zeros_like(q))
            torch.testing.assert_close(along, soft, rtol=1e-5, atol=1e-6)

            for chosen in (first, (first + 1) % used):
                want = ops.margin_head(features, soft, chosen, table, backend=backend)
                got = ops.margin_head(features, soft, here[chosen], whole, backend=backend)
                assert same_bits(got[0], want[0])
                assert same_bits(got[1], want[1])


@on_backends("margin_head")
def test_one_class_beside_absent_rows(device: str, backend: str) -> None:
    """It has no rival: as with the table of its one row."""
    features = signs(3, 4, 16, seed=6).to(device)
    table = exact_table(1, device, 20.0, counted=True)
    for last in (True, False):
        whole, here = op_cases.with_absent(table, 32, features, last)
        q, label, soft = ops.pseudo_label(features, whole, 0.5, backend=backend)
        torch.testing.assert_close(q.sum(dim=-1), torch.full((4,), 0.5, device=device))
        torch.testing.assert_close(soft, table.text.expand(4, 16))
        assert torch.equal(label, here.expand(4))
        got = ops.margin_head(features, soft, label, whole, backend=backend)
        want = ops.margin_head(features, soft, label * 0, table, backend=backend)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


@on_backends("pseudo_label")
def test_no_class_and_no_number(device: str, backend: str) -> None:
    """A table of absent rows alone gives anything; of NaNs the first class is the label."""
    features, table = signs(3, 4, 16, seed=6).to(device), exact_table(3, device, 20.0)
    whole, here = op_cases.with_absent(table, 32, features, last=False)
    empty = ClassTable(whole.text, torch.zeros_like(whole.count), None, 20.0)
    _, label, soft = ops.pseudo_label(features, empty, 0.5, backend=backend)
    assert ((label >= 0) & (label < 32)).all()
    ops.margin_head(features, soft, label, empty, backend=backend)
    if (device, backend) == ("cpu", "cpp"):
        return  # turns NaN into a whole number, which sanitizers refuse
    features[:, 1] = torch.nan
    q, label, _ = ops.pseudo_label(features, whole, 0.5, backend=backend)
    assert label[1] == here[0]
    assert q[1, here].isnan().all()
    q[:, here] = 0.0
    assert torch.equal(q, torch.zeros_like(q))


@pytest.mark.parametrize("duplicates", [False, True])
@on_backends("mean_logits")
@ON_DTYPES
def test_a_padded_table(device: str, backend: str, duplicates: bool, dtype: torch.dtype) -> None:
    case = Head(3, 4, 13, 33, duplicates=duplicates)
    features, soft = case.features(dtype, device), case.soft().to(device)
    table = table_of(case.classes_of(), device)
    used, close = len(table.text), {"rtol": 1e-4, "atol": 1e-5}
    for rows, classes in ((64, 40), (96, 33), (used, 33)):
        whole = table.padded(rows, classes)
        want = ops.pseudo_label(features, table, 0.5, backend=backend)
        got = ops.pseudo_label(features, whole, 0.5, backend=backend)
        torch.testing.assert_close((got[0][:, :used], *got[1:]), want, **close)
        assert torch.equal(got[0][:, used:], got[0].new_zeros(4, rows - used))
        want = ops.margin_head(features, soft, want[1], table, backend=backend)
        got = ops.margin_head(features, soft, got[1], whole, backend=backend)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])
        logits = ops.mean_logits(features, whole, backend=backend)
        assert logits.shape == (4, classes)
        want = ops.mean_logits(features, table, backend=backend)
        torch.testing.assert_close(logits[:, :33], want, **close)


def test_padded() -> None:
    plain = ClassTable(unit(3, 5), None, None, 20.0, -1.0)
    whole = plain.padded(5, 4)
    assert torch.equal(whole.text, torch.cat([plain.text, torch.zeros(2, 5)]))
    assert whole.text.is_contiguous()
    assert (whole.count.tolist(), whole.count.dtype) == ([1, 1, 1, 0, 0], torch.int64)
    assert (whole.group.tolist(), whole.group.dtype) == ([0, 1, 2, 0], torch.int64)
    assert (whole.scale, whole.bias) == (20.0, -1.0)
    same = plain.padded(3, 3)
    assert (same.count.tolist(), same.group.tolist()) == ([1, 1, 1], [0, 1, 2])
    order = torch.tensor([0, 0, 2, 1])
    twice = ClassTable.of(Classes(plain.text[order], 7.0)).padded(4, 6).padded(5, 7)
    assert (twice.count.tolist(), twice.group.tolist()) == ([2, 1, 1, 0, 0], [0, 0, 1, 2, 0, 0, 0])
    with pytest.raises(ValueError, match=r"^rows: must be at least U = 3, got 2"):
        plain.padded(2, 9)
    with pytest.raises(ValueError, match=r"^classes: must be at least K = 3, got 2"):
        plain.padded(9, 2)


# ---- The ops as torch sees them ------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit
    # The reference lays duplicates out again: how many classes there are, their counts decide.
    classes = Head(1, 1, 13, 6, duplicates=backend is None).classes_of()
    table = table_of(classes, device)

    def heads(features: Tensor) -> list[Tensor]:
        wide = 2 * features
        tau, slope = ops.drift_head(wide, features[0], backend=backend)
        q, label, soft = ops.pseudo_label(wide, table, 0.5, backend=backend)
        value, gradient = ops.margin_head(wide, soft, label, table, backend=backend)
        weights, cosine, agreement = ops.view_weights(wide, 1.0, 2.5, 0.5, backend=backend)
        logits = ops.mean_logits(wide, table, weights, unit=True, backend=backend)
        parts = [tau, slope, q, label, soft, value, gradient, weights, cosine, agreement]
        return [*parts, logits]

    compiled = torch.compile(heads, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 3):
        found = []
        for function in (compiled, heads):
            features = random(2, batch, 13).to(device).requires_grad_()
            results = function(features)
            found.append([*results, *torch.autograd.grad(results[-1].square().sum(), features)])
        torch.testing.assert_close(*found)


def test_meta() -> None:
    features = torch.empty(2, 3, 13, dtype=torch.float16, device="meta")
    table, float32 = small_table("meta"), torch.float32
    soft, label = torch.empty(3, 13, device="meta"), torch.empty(3, device="meta").long()
    found = [
        *ops.drift_head(features, features[0]),
        *ops.pseudo_label(features, table, 0.5),
        *ops.margin_head(features, soft, label, table),
        ops.mean_logits(features, table),
        *ops.view_weights(features, 1.0, 2.5, 0.5),
    ]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in found] == [
        ((3,), float32), ((2, 3, 13), torch.float16),
        ((3, 5), float32), ((3,), torch.int64), ((3, 13), float32),
        ((3,), float32), ((2, 3, 13), torch.float16),
        ((3, 5), float32),
        ((2, 3), float32), ((3,), float32), ((3,), float32),
    ]  # fmt: skip
    assert all(tensor.device.type == "meta" for tensor in found)


def test_no_gradient_with_respect_to_text() -> None:
    table = ClassTable(unit(5, 13).requires_grad_(), None, None, 20.0)
    features = random(2, 3, 13).requires_grad_()
    logits = ops.mean_logits(features, table)
    if logits.grad_fn is None or ops.choose("mean_logits", "cpu", None) == "reference":
        pytest.skip("autograd differentiates the reference")
    with pytest.raises(NotImplementedError, match="mean_logits: no gradient with respect to text"):
        logits.sum().backward()
