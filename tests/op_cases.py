"""The one source of inputs, tolerances and backends for the tests of the ops.

SCC_FAST_TEST_BACKENDS=cpp,triton promises those backends: a case whose backend is missing then
fails instead of being skipped, so that a green suite cannot hide a build that did not happen.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import View
from scc_fast.ops.views import views_shape
from scc_fast.reference import philox
from scc_fast.reference import views as reference
from scc_fast.reference.heads import Classes

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# Tolerances, in units in the last place of the dtype, against a float64 evaluation.
ULPS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}

# Ops without a CUDA source: there Triton serves, or torch's own attention, and no promise of C++
# holds; nor one of Triton for what has no kernel there.
ATTENTION = ("attention", "attention_back")
ENCODER = ("add_norm", "add_norm_back", "gelu", "gelu_back")
WITHOUT_CUDA = (*ENCODER, *ATTENTION)

PROMISED = frozenset(filter(None, os.environ.get("SCC_FAST_TEST_BACKENDS", "").split(",")))
if not PROMISED.issubset(ops.BACKENDS):
    raise ValueError(f"SCC_FAST_TEST_BACKENDS: {sorted(PROMISED)} must be among {ops.BACKENDS}")


def backends_under_test(op: str, backends: tuple[str, ...] = ops.BACKENDS) -> Iterator:
    """Parameters (device, backend) for every kernel there is of an op.

    One that is not built is skipped, with the reason; a promised one is not: the op itself then
    fails, and says why.
    """
    for device in ("cpu", "cuda"):
        for backend in backends:
            if not _is_written(op, device, backend):
                continue
            why_not = ops.backends_of(op, device)[backend]
            marks = [pytest.mark.gpu] if device == "cuda" else []
            marks += [pytest.mark.interpreted] if (device, backend) == ("cpu", "triton") else []
            if why_not is not None and backend not in PROMISED:
                marks.append(pytest.mark.skip(reason=f"{backend} on {device}: {why_not}"))
            yield pytest.param(device, backend, marks=marks, id=f"{device}-{backend}")


def _is_written(op: str, device: str, backend: str) -> bool:
    """Triton's kernels run on the GPU where there is one, else in its interpreter on the CPU."""
    if backend == "triton":
        return op not in ATTENTION and not (device == "cpu" and torch.cuda.is_available())
    return not (backend == "cpp" and device == "cuda" and op in WITHOUT_CUDA)


def ulp_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest |got - want| in units in the last place of got's dtype, want being float64.

    Below `floor` an error counts in the units of `floor`: where want itself is not exact.
    """
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    scale = want.double().abs().clamp(min=max(floor, info.tiny)).cpu().numpy()
    unit = torch.from_numpy(np.exp2(np.floor(np.log2(scale)))) * info.eps
    return ((got.double() - want.double()).abs().cpu() / unit).max().item()


# Images seeded alone and in an odd batch, with every kind of 64-bit seed.
_EDGES = [0, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)]
SEEDS = {0: [], 1: [-1], 17: [*_EDGES, 1, 2, -2, 42, 7, -987654321, 1234567890123456789, -(2**62)]}

# (batch, numel): around Philox's four words, then past a kernel's block, one image and many.
SIZES = [(batch, numel) for batch in SEEDS for numel in (0, 1, 3, 4, 5)]
SIZES += [(1, 2**16 + 1), (17, 2**12 + 1), (17, 2**12)]

# (purpose, view), with both ends of their range.
STREAMS = ((0, 0), (1, 0), (0, 1), (2**32 - 1, 2**31), (5, 2**32 - 1))


def seeds(batch: int, device: str = "cpu") -> Tensor:
    """(batch,) int64 seeds, batch one of SEEDS."""
    return torch.tensor(SEEDS[batch], dtype=torch.int64, device=device)


# ---- Views and step ------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILL = (0.1, 0.5, 0.9)
EPSILON, ALPHA = 4 / 255, 1 / 255
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Every kind of view: flips, shifts of both signs, some past the picture, one past 32 bits.
PLAIN = (
    View(),
    View(flip=True),
    View(shift=(2, -3)),
    View(flip=True, shift=(-1, 1)),
    View(shift=(0, 300)),
    View(flip=True, shift=(-300, 2)),
    View(shift=(-4, 0)),
    View(flip=True, shift=(2**32, -(2**33))),
)
NOISY = (
    View(noise=0.1),
    View(flip=True, noise=0.1),
    View(flip=True, shift=(-1, 3), noise=0.02),
    View(),
    View(shift=(1, 300), noise=0.1),
)

# In ulps of numbers of size 1 to 2, with every |std| >= 0.26. x + delta and the difference from
# the mean each round by 2^-24 or half of it: 1.5 · 2^-24 / 0.26 < 3 · 2^-23, and half an ulp.
# Noise: 4 ulps of a normal, |0.1 · normal| < 0.58, and its product and sum round once each:
# (4.5 · 0.58 + 1.25) · 2^-23 / 0.26 < 15 · 2^-23, and half an ulp.
VIEW_ULPS, NOISY_VIEW_ULPS = 4, 16


FEW_VIEWS = (View(), View(flip=True, shift=(1, -2), noise=0.1))  # where cases cost seconds


class Picture(NamedTuple):
    """Inputs of make_views: what is not here follows from it."""

    batch: int
    height: int
    width: int
    count: int  # of views
    patch: int = 0
    delta: bool = True
    large: bool = False  # too slow for Triton's interpreter

    def views(self, noisy: bool = False) -> tuple[View, ...]:
        every, first = NOISY if noisy else PLAIN, self.height + self.batch
        return tuple(every[(first + index) % len(every)] for index in range(self.count))

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor]:
        """x, delta and seeds."""
        shape = (self.batch, 3, self.height, self.width)
        x, delta = pixels(*shape).to(device), deltas(*shape).to(device)
        seed = 1000 + torch.arange(self.batch, device=device)
        return x, delta if self.delta else None, seed

    def gradient(self, dtype: torch.dtype, device: str = "cpu", seed: int = 9) -> Tensor:
        shape = views_shape(self.inputs()[0], self.count, self.patch)
        return random(*shape, seed=seed).to(dtype).to(device)


# Odd sides, sides no multiple of 4 or 8, one pixel, no pixel, no image; L from 1 to 8.
PICTURES = (
    Picture(1, 1, 1, 2),
    Picture(17, 5, 3, 8),
    Picture(1, 33, 64, 1),
    Picture(3, 7, 33, 3, delta=False),
    Picture(2, 64, 5, 5),
    Picture(0, 5, 7, 4),
    Picture(2, 0, 5, 2),
    Picture(1, 1, 5, 7, patch=1),
    Picture(17, 3, 5, 4, patch=2),
    Picture(2, 33, 20, 6, patch=7, delta=False),
    Picture(1, 64, 64, 2, patch=16),
    Picture(1, 5, 5, 1, patch=5),
    Picture(0, 5, 7, 3, patch=2),
    Picture(17, 64, 64, 4, large=True),
    Picture(1, 224, 224, 4, large=True),
    Picture(1, 224, 223, 4, patch=14, large=True),
)
NOISY_PICTURES = (
    Picture(1, 1, 1, 5),
    Picture(17, 3, 5, 5),
    Picture(2, 33, 22, 3, delta=False),
    Picture(2, 7, 9, 5, patch=3),
    Picture(0, 5, 7, 2),
    Picture(1, 224, 224, 5, large=True),
)


# ---- Warps ---------------------------------------------------------------------------------------


class Warp(NamedTuple):
    """Inputs of warp_views: what is not here follows from it."""

    batch: int
    height: int
    width: int
    size: tuple[int, int]
    mode: str = "bilinear"
    patch: int = 0
    box: bool = False
    fill: tuple[float, ...] | None = None
    antialias: bool = False
    large: bool = False

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """x, matrix and box: of every kind of map, each image with its own."""
        x = pixels(self.batch, 3, self.height, self.width)
        matrix = maps(self.batch, (self.height, self.width), self.size)
        box = torch.tensor([1, 0, self.height - 2, self.width // 2 + 1]).repeat(len(matrix), 1)
        box = box[:, None].repeat(1, self.batch, 1) + torch.arange(self.batch)[:, None] % 2
        x, matrix, box = (tensor.to(device) for tensor in (x, matrix, box))
        return x, matrix, box if self.box else None

    def options(self) -> dict[str, Any]:
        return {
            "size": self.size, "mode": self.mode, "patch": self.patch, "fill": self.fill,
            "antialias": self.antialias,
        }  # fmt: skip


def maps(batch: int, picture: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(8, B, 3, 3), of many images every third of them.

    All of the picture, mirrored, turned, enlarged, far away, two perspectives, one with its horizon
    in sight, and one that is no map.
    """
    (height, width), (tall, wide) = picture, size
    fit = torch.diag(torch.tensor([width / wide, height / tall, 1.0]))
    mirror = torch.tensor([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    turn = torch.tensor([[0.9, -0.4, 0.3 * width], [0.5, 0.8, -0.1 * height], [0.0, 0.0, 1.0]])
    enlarge = torch.tensor([[0.3, 0.0, 0.2 * width], [0.0, 0.2, 0.5 * height], [0.0, 0.0, 1.0]])
    away = torch.tensor([[1e9, 0.0, -1e12], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    tilt = torch.tensor([[1.1, 0.2, -1.0], [0.1, 1.3, -2.0], [0.3 / width, 0.2 / height, 1.0]])
    horizon = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-2.0 / width, 0.0, 1.0]])
    every = torch.stack(
        [
            fit,
            mirror @ fit,
            turn @ fit,
            enlarge @ fit,
            away @ fit,
            tilt @ fit,
            horizon @ fit,
            0 * fit,
        ]
    )
    every = every[::3] if batch > 3 else every
    own = torch.eye(3).repeat(batch, 1, 1)
    own[:, 0, 2] = torch.arange(batch) * 0.37 % 1.5
    return (own @ every[:, None]).contiguous()


WARPS = (
    Warp(1, 1, 1, (1, 1)),
    Warp(1, 1, 1, (3, 2), "bicubic", fill=FILL),
    Warp(17, 5, 3, (4, 7), box=True),
    Warp(1, 7, 9, (7, 9), "bicubic", fill=(0.0, 0.0, 0.0)),
    Warp(1, 9, 7, (5, 6), "bicubic", box=True, fill=FILL, antialias=True),
    Warp(1, 12, 20, (5, 6), fill=FILL, patch=2, antialias=True),
    Warp(2, 6, 5, (11, 13), "bicubic", patch=3, box=True),
    Warp(0, 5, 7, (5, 7)),
    Warp(0, 5, 7, (4, 4), "bicubic", patch=2, box=True),
    Warp(17, 64, 33, (32, 32), fill=MEAN, patch=16, large=True),
    Warp(2, 224, 224, (224, 224), "bicubic", fill=(0.0, 0.0, 0.0), patch=32, large=True),
    Warp(1, 224, 223, (224, 224), box=True, large=True),
)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Random pixels in [0, 1], some of them 0 and some 1 exactly."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    flat = x.view(-1)
    flat[::7], flat[3::11] = 0.0, 1.0
    return x


def deltas(*shape: int, seed: int = 1) -> Tensor:
    """Random perturbations in the ball."""
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1) * EPSILON


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def crossed(op: str, cases: Sequence[Any], backends: tuple[str, ...] = ops.BACKENDS) -> list:
    """backends_under_test times cases; large ones are not made for Triton's interpreter."""
    return [
        pytest.param(*backend.values, case, marks=backend.marks, id=f"{backend.id}-{_name(case)}")
        for backend in backends_under_test(op, backends)
        for case in cases
        if not (case.large and backend.values == ("cpu", "triton"))
    ]


def _name(case: Any) -> str:
    parts = [part for value in case for part in (value if type(value) is tuple else (value,))]
    return "x".join(str(part) for part in parts if type(part) in (int, float, str))


def undecided(picture: Picture) -> Tensor:
    """(B, 3, H, W): pixels that rounding may put on either side of a clamp of some noisy view."""
    x, delta, seeds = picture.inputs()
    found = torch.zeros_like(x, dtype=torch.bool)
    whole = x if delta is None else x + delta
    views = picture.views(noisy=True)
    for index, view in enumerate(views):
        if view.noise and len(x):
            noise = philox.normal(seeds, philox.VIEW_NOISE, index, x[0].numel()).view_as(x)
            bare = reference.make_views(whole, seeds, [View(view.flip, view.shift)], x.new_zeros(3))
            noisy = bare[0] + view.noise * noise
            near = torch.minimum(noisy.abs(), (noisy - 1).abs()) < 8 * 2.0**-23
            moved = View(view.flip, view.shift)
            found |= reference.make_views_adjoint(near[None].float(), x, seeds, [moved]) > 0
    return found


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal with the sign of zero; got may be on another device."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    return got.dtype == want.dtype and torch.equal(
        got.cpu().contiguous().view(integer), want.cpu().contiguous().view(integer)
    )


def truncates(device: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether a result is cut rather than rounded: only Triton's interpreter does, to bfloat16."""
    return (device, backend, dtype) == ("cpu", "triton", torch.bfloat16)


def rounded(single: Tensor, dtype: torch.dtype, device: str, backend: str) -> Tensor:
    """float32 as a backend stores it in dtype: to nearest even, wherever it is compiled."""
    if truncates(device, backend, dtype):
        single = (single.view(torch.int32) & -(2**16)).view(torch.float32)
    return single.to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x (N, …) with other strides, and as an inference tensor."""
    wide = torch.stack([x, torch.full_like(x, 0.25)], dim=-1)
    found = {"strided": wide[..., 0], "transposed": x.mT.contiguous().mT}
    if x.dim() == 4:
        found["channels_last"] = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found["inference"] = x.clone()
    return found


# ---- Encoder -------------------------------------------------------------------------------------

KINDS = ("quick", "erf", "tanh")
# Of a residual stream: empty, one number, odd widths, one past what Triton holds at once.
STREAM_SHAPES = (
    (0, 5, 13), (1, 1, 1), (5, 3), (17, 5, 65), (2, 50, 768), (3, 1, 769), (4, 127), (2, 8195),
)  # fmt: skip


# ---- Heads ---------------------------------------------------------------------------------------

UNIT = 2.0**-24  # the unit roundoff of float32, in which every head computes


class Head(NamedTuple):
    """Inputs of the heads."""

    views: int
    batch: int
    width: int
    classes: int
    scale: float = 20.0
    bias: float = 0.0
    duplicates: bool = False
    large: bool = False

    def features(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        norms = 0.5 + torch.rand(self.batch, 1, generator=torch.Generator().manual_seed(3))
        return (norms * random(self.views, self.batch, self.width)).to(dtype).to(device)

    def classes_of(self) -> Classes:
        """In float32; duplicates stand apart, and not in the order of their values."""
        return _classes_of(self)

    def soft(self) -> Tensor:
        return unit(self.batch, self.width, seed=4)


HEADS = (
    Head(1, 1, 13, 2, scale=100.0),
    Head(2, 17, 13, 3, duplicates=True),
    Head(3, 1, 512, 1000, bias=-12.0),
    Head(4, 17, 13, 130, scale=100.0, duplicates=True),
    Head(5, 2, 768, 5, scale=1.0),
    Head(6, 1, 1, 2, scale=1.0),
    Head(7, 3, 65, 257, bias=-12.0, duplicates=True),
    Head(8, 17, 33, 40),
    Head(4, 0, 13, 5),
    Head(4, 17, 512, 1000, scale=100.0, large=True),
    Head(2, 1, 768, 20_011, scale=100.0, large=True),
    Head(4, 128, 16, 20_011, scale=100.0, large=True),  # worked through in several chunks
)
TEMPERATURES = (0.1, 0.5, 1.0, 2.0)


@functools.cache
def _classes_of(case: Head) -> Classes:
    text = unit(case.classes, case.width)
    if case.width == 1:
        text = torch.tensor([[1.0], [-1.0]])
    if case.duplicates:
        text[-1] = text[0]
        text[case.classes // 2 + 1 :: 3] = text[1].clone()
    return Classes(text, case.scale, case.bias)


def unit(*shape: int, seed: int = 1) -> Tensor:
    """Random rows of unit length."""
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def with_absent(
    table: ops.ClassTable, rows: int, features: Tensor, last: bool
) -> tuple[ops.ClassTable, Tensor]:
    """The classes in a table of `rows` rows, and which rows are theirs: the first, or spread.

    An absent row's text is what would beat every class if it were looked at: along a feature or
    against it, far longer than a class's, one at the end of float32. They serve every feature.
    """
    device, used = table.text.device, len(table.text)
    step = 1 if last else rows // used
    here = torch.arange(step - 1, used * step, step, device=device)
    along = features.float().flatten(0, 1)
    size = torch.tensor([1e4, -1e4, 3.0], device=device)
    text = along[torch.arange(rows, device=device) // 3 % len(along)]
    text = text * size[torch.arange(rows, device=device) % 3, None]
    text[-1 if last else 0] = torch.finfo(torch.float32).max
    text[here] = table.text
    count = torch.zeros(rows, dtype=torch.int64, device=device)
    count[here] = 1 if table.count is None else table.count
    return ops.ClassTable(text, count, None, table.scale, table.bias), here


def sum_error(terms: int) -> float:
    """Of a float32 sum whose terms' sizes add to 1, in any order.

    Roundings are independent, so it grows with √n (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019): 4 √n units, where n is the certain bound.
    """
    return 4 * math.sqrt(terms) * UNIT


def logit_error(case: Head) -> float:
    """Of s·cos + b, absolute: of the cosine, then of product and sum."""
    return case.scale * sum_error(case.width) + 2 * (case.scale + abs(case.bias)) * UNIT


def label_error(case: Head, temperature: float) -> float:
    """Of q, relative: exp makes an absolute error relative, 1/T multiplies it, and a norm repeats
    it; the logarithm of q̄ reaches -2 s - log K."""
    logarithm = (2 * case.scale + math.log(case.classes)) * UNIT
    rounds = 2 * logit_error(case) + 4 * logarithm + case.views * UNIT
    return 2 * (rounds + sum_error(case.classes)) / temperature + 2 * sum_error(case.classes)


def gradient_error(case: Head, dtype: torch.dtype) -> float:
    """Of ∂/∂f in the L2 norm, relative: four sums of `width` terms, and half an ulp of the dtype.

    Four, as what is left of a direction after its part along f is at least half of it here. A
    whole ulp where Triton's interpreter cuts.
    """
    return 4 * sum_error(case.width) + torch.finfo(dtype).eps / 2
