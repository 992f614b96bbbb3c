"""warp_views: the reference against torch's own resampling, every backend against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import op_cases
from op_cases import FILL, MEAN, STD, WARPS, Warp
from scc_fast import ops
from scc_fast.reference import warp as reference

BACKENDS = list(op_cases.backends_under_test("warp_views"))
ON_BACKENDS = pytest.mark.parametrize(("device", "backend"), BACKENDS)
ON_WARPS = pytest.mark.parametrize(
    ("device", "backend", "warp"), op_cases.crossed("warp_views", WARPS)
)
ON_DTYPES = pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)


def run(warp: Warp, device: str, backend: str | None, **more: Any) -> Tensor:
    x, matrix, box = warp.inputs(device)
    options = {**warp.options(), "mean": MEAN, "std": STD, **more}
    return ops.warp_views(x, matrix, box=box, backend=backend, **options)


# ---- The reference -------------------------------------------------------------------------------


def sampled(x: Tensor, matrix: Tensor, size: tuple[int, int], mode: str, padding: str) -> Tensor:
    """By grid_sample in float64."""
    down, right = (torch.arange(side).double() + 0.5 for side in size)
    place = torch.stack(torch.broadcast_tensors(right, down[:, None], torch.ones(())), dim=-1)
    moved = place @ matrix.double().mT[:, None]
    side = torch.tensor([x.shape[-1], x.shape[-2]])
    grid = 2 * moved[..., :2] / moved[..., 2:] / side - 1
    return F.grid_sample(x.double(), grid, mode=mode, padding_mode=padding, align_corners=False)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_bilinear_is_grid_sample(padding: str) -> None:
    x, matrix, _ = Warp(3, 9, 12, (7, 10)).inputs()
    fill = (0.0, 0.0, 0.0) if padding == "zeros" else None
    for view in (0, 1, 2, 3, 5):
        got = reference.warp_views(x, matrix[view : view + 1], (7, 10), fill=fill)[0]
        want = sampled(x, matrix[view], (7, 10), "bilinear", padding)
        torch.testing.assert_close(got, want.float(), atol=3e-6, rtol=0)


def by_pillow(plane: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """One colour as a picture of floats, so that nothing is rounded to 8 bits."""
    how = Image.Transform.PERSPECTIVE, (matrix / matrix[2, 2]).flatten()[:8].tolist()
    picture = Image.fromarray(plane.numpy(), mode="F")
    return torch.from_numpy(
        np.array(picture.transform(size[::-1], *how, resample=Image.Resampling.BICUBIC))
    )


def test_bicubic_is_pillow_s() -> None:
    """Inside: at the border Pillow cuts where bilinear and cubic weights fade out."""
    x, matrix, _ = Warp(1, 30, 40, (28, 36)).inputs()
    for view in (0, 1, 2, 3, 5):
        got = reference.warp_views(x, matrix[view : view + 1], (28, 36), mode="bicubic")[0, 0]
        far = reference.warp_views(
            torch.ones_like(x), matrix[view : view + 1], (28, 36), mode="bicubic", fill=(0, 0, 0)
        )[0, 0]
        inside = (far - 1).abs() < 1e-4
        assert inside.float().mean() > 0.2
        want = torch.stack([by_pillow(plane, matrix[view, 0], (28, 36)) for plane in x[0]])
        off = (got - want.clamp(0, 1)).abs()[inside]
        assert off.max() < 1e-4


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_places_without_a_picture(mode: str) -> None:
    x, matrix, _ = Warp(3, 9, 12, (7, 10)).inputs()
    far = reference.warp_views(x, matrix[[4, 7]], (7, 10), mode=mode, fill=FILL)
    assert torch.equal(far, torch.tensor(FILL).view(3, 1, 1).expand(2, 3, 3, 7, 10))
    assert reference.warp_views(x, matrix[6:7], (7, 10), mode=mode).isfinite().all()


def test_a_box_is_all_that_a_view_sees() -> None:
    x = op_cases.pixels(2, 3, 9, 12)
    top, left, tall, wide = 2, 3, 5, 6
    matrix = torch.tensor([[wide / 9, 0, left], [0, tall / 8, top], [0, 0, 1.0]]).repeat(1, 2, 1, 1)
    box = torch.tensor([top, left, tall, wide]).repeat(1, 2, 1)
    part = x[:, :, top : top + tall, left : left + wide]
    got = reference.warp_views(x, matrix, (8, 9), box=box)[0]
    want = F.interpolate(part, (8, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    got = reference.warp_views(x, matrix, (8, 9), mode="bicubic", box=box)[0]
    fit = torch.diag(torch.tensor([wide / 9, tall / 8, 1.0]))
    for plane, want in zip(part.flatten(0, 1).contiguous(), got.flatten(0, 1), strict=True):
        there = by_pillow(plane, fit, (8, 9)).clamp(0, 1)
        torch.testing.assert_close(there, want, atol=1e-5, rtol=0)
    colour = torch.tensor(FILL).view(3, 1, 1)
    wide_open = reference.warp_views(
        x, torch.eye(3).repeat(1, 2, 1, 1), (9, 12), box=box, fill=FILL
    )
    torch.testing.assert_close(wide_open[0, ..., 2:7, 3:9], part, atol=1e-6, rtol=0)
    assert torch.equal(wide_open[0, ..., :2, :], colour.expand(2, 3, 2, 12))


def test_antialiasing_averages_what_a_pixel_covers() -> None:
    x, size = op_cases.pixels(1, 3, 24, 36), (8, 9)
    matrix = torch.diag(torch.tensor([4.0, 3.0, 1.0])).repeat(1, 1, 1, 1)
    assert reference.shrinking(matrix, (24, 36), size).tolist() == [[4]]
    fine = torch.diag(torch.tensor([1.0, 0.75, 1.0])).repeat(1, 1, 1, 1)
    got = ops.warp_views(x, matrix, size=size, antialias=True, backend="reference")
    want = reference.warp_views(x, fine, (32, 36))[0]
    torch.testing.assert_close(got, F.avg_pool2d(want, 4), atol=1e-6, rtol=0)
    # Every pixel counts once where the points are the pixels.
    square = torch.diag(torch.tensor([3.0, 3.0, 1.0])).repeat(1, 1, 1, 1)
    got = ops.warp_views(x, square, size=(8, 12), antialias=True, backend="reference")
    torch.testing.assert_close(got, F.avg_pool2d(x, 3), atol=1e-6, rtol=0)


def test_shrinking_is_of_what_is_seen() -> None:
    """Of each map of its own; 1 where it enlarges, 8 at most, whatever lies at the horizon."""
    matrix = op_cases.maps(2, (60, 80), (60, 80))
    assert reference.shrinking(matrix, (60, 80), (60, 80))[:6, 0].tolist() == [1, 1, 2, 1, 1, 2]
    found = reference.shrinking(matrix, (60, 80), (60, 80))
    assert ((found >= 1) & (found <= 8)).all()
    assert torch.equal(found[:, 1:], reference.shrinking(matrix[:, 1:], (60, 80), (60, 80)))
    coarse = torch.diag(torch.tensor([20.0, 1.0, 1.0])).repeat(1, 1, 1, 1)
    assert reference.shrinking(coarse, (60, 800), (60, 40)).tolist() == [[8]]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_reference_is_differentiable(mode: str) -> None:
    """Affine but for the clamp, which passes a gradient on: ⟨W x − W ½, w⟩ = ⟨x − ½, Wᵀ w⟩."""
    x, matrix, box = Warp(2, 6, 7, (5, 4), box=True).inputs()
    samples = 1 + torch.arange(16).view(8, 2) % 3
    leaf = (0.4 + 0.2 * x.double()).requires_grad_()  # where no overshoot reaches the clamp
    for rules in ({}, {"fill": (0.5, 0.5, 0.5)}, {"box": box, "samples": samples}):
        seen = reference.warp_views(leaf, matrix.double(), (5, 4), mode=mode, **rules)
        w = op_cases.random(*seen.shape).double()
        (gradient,) = torch.autograd.grad((seen * w).sum(), leaf)
        torch.testing.assert_close((gradient * (leaf - 0.5)).sum(), ((seen - 0.5) * w).sum())
    edge = torch.tensor([[0.0, 1.0]]).repeat(3, 4).view(1, 3, 2, 4).requires_grad_()
    fine = torch.diag(torch.tensor([0.25, 1.0, 1.0])).repeat(1, 1, 1, 1)
    seen = reference.warp_views(edge, fine, (2, 16), mode="bicubic")
    assert seen.min() == 0
    assert seen.max() == 1
    (gradient,) = torch.autograd.grad(seen.sum(), edge)
    torch.testing.assert_close(gradient.sum(), torch.tensor(96.0))


@pytest.mark.parametrize("rules", [{}, {"fill": FILL}, {"box": True}])
def test_what_attackers_differentiate_is_the_same(rules: dict[str, Any]) -> None:
    x, matrix, box = Warp(2, 9, 12, (7, 10), box=True).inputs()
    matrix, box = matrix[[0, 1, 2, 3, 5]], box[:5]
    rules = {"box": box} if "box" in rules else rules
    leaf = x.requires_grad_()
    seen = [f(leaf, matrix, (7, 10), **rules) for f in (reference.bilinear, reference.warp_views)]
    torch.testing.assert_close(*seen, atol=5e-6, rtol=0)
    w = op_cases.random(*seen[0].shape)
    slopes = [torch.autograd.grad((s * w).sum(), leaf)[0] for s in seen]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=0)


# ---- Every backend -------------------------------------------------------------------------------


@ON_WARPS
@ON_DTYPES
def test_equals_the_reference(device, backend, warp: Warp, dtype) -> None:
    """To the bit: the float32 result of the same operations, rounded to nearest even."""
    got = run(warp, device, backend, dtype=dtype)
    assert got.device.type == device
    assert got.is_contiguous()
    single = run(warp, "cpu", "reference")
    assert torch.equal(got.cpu(), op_cases.rounded(single, dtype, device, backend))


@ON_BACKENDS
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_identity_leaves_pixels_as_they_are(device: str, backend: str, mode: str) -> None:
    x = op_cases.pixels(3, 3, 5, 6).to(device)
    matrix = torch.eye(3, device=device).repeat(2, 3, 1, 1)
    for rules in ({}, {"fill": (0.0, 0.0, 0.0)}, {"antialias": True}):
        got = ops.warp_views(x, matrix, mode=mode, backend=backend, **rules)
        assert torch.equal(got, torch.cat([x, x]))


@ON_BACKENDS
@pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "inference"])
def test_layouts_do_not_matter(device: str, backend: str, layout: str) -> None:
    warp = Warp(3, 6, 7, (5, 8), "bicubic", patch=2, box=True)
    x, matrix, box = (tensor[:3] for tensor in warp.inputs(device))
    want = ops.warp_views(x, matrix, box=box, **warp.options(), backend=backend)
    given = op_cases.layouts(x)[layout]
    maps, boxes = (torch.stack([t, t], dim=-1)[..., 0] for t in (matrix, box))
    assert not maps.is_contiguous()
    assert torch.equal(
        ops.warp_views(given, maps, box=boxes, **warp.options(), backend=backend), want
    )


@ON_BACKENDS
def test_a_view_depends_on_its_own_image_and_map(device: str, backend: str) -> None:
    warp = Warp(17, 6, 7, (5, 4), box=True, fill=FILL, antialias=True)
    x, matrix, box = warp.inputs(device)

    def result(rows) -> Tensor:
        seen = ops.warp_views(x[rows], matrix[:, rows], box=box[:, rows], **warp.options(),
                              backend=backend)  # fmt: skip
        return seen.unflatten(0, (len(matrix), -1))

    together = result(slice(None))
    for i in (0, 8, 16):
        assert torch.equal(together[:, i : i + 1], result(slice(i, i + 1)))


@ON_BACKENDS
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_are_rows_of_unfold(device: str, backend: str, patch: int) -> None:
    warp = Warp(2, 6, 7, (7, 8), fill=FILL)
    rows = run(warp, device, backend, patch=patch)
    pictures = run(warp, device, backend)
    assert torch.equal(rows, F.unfold(pictures, patch, stride=patch).mT)


@ON_BACKENDS
def test_a_box_past_the_picture_is_held_to_it(device: str, backend: str) -> None:
    """Values are not looked at, for a GPU would have to wait for them: no other memory is read."""
    x, matrix, _ = Warp(2, 5, 7, (5, 7)).inputs(device)
    for numbers in ([-3, -4, 50, 60], [90, 90, 1, 1], [2, 2, -7, 0], [2**40, -(2**40), 9, 9]):
        box = torch.tensor(numbers, device=device).repeat(8, 2, 1)
        got = ops.warp_views(x, matrix, box=box, backend=backend)
        assert ((got >= -1e-6) & (got <= 1 + 1e-6)).all()
        want = ops.warp_views(x.cpu(), matrix.cpu(), box=box.cpu(), backend="reference")
        assert torch.equal(got.cpu(), want)


@ON_BACKENDS
def test_arguments_are_constants(device: str, backend: str) -> None:
    x, matrix, _ = Warp(2, 5, 6, (5, 6)).inputs(device)
    assert not ops.warp_views(x.requires_grad_(), matrix, backend=backend).requires_grad


@pytest.mark.compile
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()
    antialias = backend is None  # which points the reference takes depends on the map
    mode = "bicubic" if backend is None else "bilinear"  # dynamo takes half a minute for its taps

    def seen(x: Tensor, matrix: Tensor, box: Tensor) -> Tensor:
        views = ops.warp_views(x, matrix[:1], size=(4, 6), mode=mode, box=box[:1], fill=FILL,
                               antialias=antialias, patch=2, backend=backend)  # fmt: skip
        return views.tanh()

    compiled = torch.compile(seen, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, height in ((3, 5), (2, 7)):
        given = Warp(batch, height, 6, (4, 6), box=True).inputs(device)
        assert torch.equal(compiled(*given), seen(*given))


@pytest.mark.parametrize("patch", [0, 2])
def test_meta(patch: int) -> None:
    x, matrix = torch.empty(2, 3, 5, 7, device="meta"), torch.empty(4, 2, 3, 3, device="meta")
    seen = ops.warp_views(x, matrix, size=(6, 5), dtype=torch.bfloat16, patch=patch)
    shape = (8, 6, 12) if patch else (8, 3, 6, 5)
    assert (seen.shape, seen.dtype, seen.device.type) == (shape, torch.bfloat16, "meta")
