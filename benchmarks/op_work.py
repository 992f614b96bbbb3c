"""Work of ops: inputs, our call, the eager reference's, bytes and FLOPs.

Bytes count every tensor the op must read or write, once. The baselines are scc_fast.reference, the
same work on the same inputs, with everything that a defense prepares once prepared here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import SCCConfig, resolve_views
from scc_fast.defenses.augment import BOX_DRAWS, perspectives, random_boxes
from scc_fast.reference import heads, philox, step
from scc_fast.reference import views as reference
from scc_fast.reference.heads import Classes

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SCALE = 100.0
CONFIG = SCCConfig()
WEIGHT = 0.25
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Inputs are rotated, so that a batch of one does not stay in a cache: this much altogether.
ROTATED_BYTES = {"cpu": 2**26, "cuda": 2**28}
MOST_SETS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Case:
    """Case of a row: an op at a size, and its targets ({row key: value})."""

    op: str
    batch: int
    precision: str = "fp32"  # of the views, their gradient, or the features
    patch: int = 0
    classes: int | None = None
    tokens: int = 0  # of an encoder's stream
    width: int = 512
    baseline: str = "eager reference"
    size: int = 224
    count: int = 4  # L
    reach: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name, beginning with the op, as preference.py expects."""
        return f"{self.op} patch {self.patch}" if self.patch else self.op

    @property
    def shape(self) -> str:
        """Readable shape."""
        if self.tokens:
            return f"{self.count * self.batch}×{self.tokens}×{self.width}"
        if self.classes:
            return f"L·B {self.count * self.batch}, K {self.classes}, D {self.width}"
        if self.op.startswith("philox"):
            return f"{self.batch}×{3 * self.size**2}"
        return f"{self.batch}×3×{self.size}×{self.size}, L {self.count}"

    @property
    def id(self) -> str:
        """ID for pytest."""
        parts = [self.op, f"b{self.batch}", self.precision]
        parts += [f"p{self.patch}"] if self.patch else []
        parts += [f"k{self.classes}"] if self.classes else []
        parts += [f"t{self.tokens}"] if self.tokens else []
        parts += [] if self.baseline == "eager reference" else [self.baseline.split()[0]]
        return "-".join(parts)


@dataclass
class Work:
    """A case on a device. The calls take the index of a set of inputs, modulo `sets`."""

    ours: Callable[[str, int], Any]  # backend, set
    baseline: Callable[[int], Any]
    check: Callable[[str], None]  # raises AssertionError where a backend is wrong
    bytes_moved: int
    sets: int
    flops: int = 0


def work(case: Case, kind: str) -> Work:
    """Prepare a case on "cpu" or "cuda"."""
    torch.manual_seed(0)
    if case.classes:
        return _head(case, kind)
    return {
        "make_views": _make_views,
        "make_views_adjoint": _adjoint,
        "pgd_step_": _step,
        "warp_views": _warp,
        "philox_uniform": _philox,
        "philox_normal": _philox,
    }[case.op](case, kind)


def agree(got: Any, want: Any, precision: str = "fp32") -> None:
    """Equal to a few roundings of the precision; integers to the bit."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            agree(ours, theirs, precision)
        return
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    relative = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}[precision]
    if not got.is_floating_point():
        relative = 0.0
    scale = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=relative, atol=0.1 * relative * scale)


def _sets(bytes_moved: int, kind: str) -> int:
    return max(2, min(MOST_SETS[kind], math.ceil(ROTATED_BYTES[kind] / bytes_moved)))


# ----------------------------------------------------------------------------------------- views


@dataclass
class _Pixels:
    """Inputs of the view ops; x, delta and gradient in `sets` versions."""

    case: Case
    kind: str
    bytes_moved: int
    with_gradient: bool = False

    def __post_init__(self) -> None:
        case, kind = self.case, self.kind
        self.sets = _sets(self.bytes_moved, kind)
        shape = (case.batch, 3, case.size, case.size)
        self.x = [torch.rand(shape, device=kind) for _ in range(self.sets)]
        epsilon = CONFIG.epsilon
        self.delta = [
            step.project((2 * torch.rand(shape, device=kind) - 1) * epsilon, x, epsilon)
            for x in self.x
        ]
        self.seeds = torch.arange(case.batch, device=kind)
        self.views = resolve_views("geometric", case.size)[: case.count]
        self.mean, self.std = (torch.tensor(v, device=kind) for v in (MEAN, STD))
        self.gradient = []
        if self.with_gradient:
            seen = ops.views.views_shape(self.x[0], case.count, case.patch)
            dtype = DTYPES[case.precision]
            self.gradient = [
                torch.randn(seen, device=kind).to(dtype) * 1e-3 for _ in range(self.sets)
            ]

    def seen(self, pixels: Tensor) -> Tensor:
        """Eager pipeline up to the encoder."""
        seen = reference.make_views(pixels, self.seeds, self.views, self.mean).flatten(0, 1)
        seen = reference.preprocess(seen, (self.case.size,) * 2, self.mean, self.std)
        if self.case.patch:
            seen = reference.to_patches(seen, self.case.patch)
        return seen.to(DTYPES[self.case.precision])

    def pulled_back(self, i: int) -> Tensor:
        """Σ_l of the views' gradients, not divided by std. No view has noise: x + δ is not read."""
        gradient, x = self.gradient[i].float(), self.x[i]
        if self.case.patch:
            gradient = reference.from_patches(gradient, self.case.patch, (self.case.size,) * 2)
        gradient = gradient.unflatten(0, (self.case.count, self.case.batch))
        return reference.make_views_adjoint(gradient, x, self.seeds, self.views)


def picture_bytes(case: Case) -> tuple[int, int]:
    """(bytes of one float32 tensor like x, bytes of all views in the case's precision)."""
    numel = case.batch * 3 * case.size**2
    covered = case.batch * 3 * (case.size // case.patch * case.patch) ** 2 if case.patch else numel
    return 4 * numel, case.count * covered * DTYPES[case.precision].itemsize


def _make_views(case: Case, kind: str) -> Work:
    one, views = picture_bytes(case)
    moved = 2 * one + views  # read x, δ; write the views
    data = _Pixels(case, kind, moved)

    def ours(backend: str, i: int) -> Tensor:
        return ops.make_views(
            data.x[i], data.delta[i], data.seeds, data.views, mean=MEAN, std=STD,
            dtype=DTYPES[case.precision], patch=case.patch, backend=backend,
        )  # fmt: skip

    def baseline(i: int) -> Tensor:
        return data.seen(data.x[i] + data.delta[i])

    def check(backend: str) -> None:
        agree(ours(backend, 1), baseline(1), case.precision)

    return Work(ours, baseline, check, moved, data.sets)


def _adjoint(case: Case, kind: str) -> Work:
    one, views = picture_bytes(case)
    moved = views + one  # read the gradient; write ∂/∂x
    data = _Pixels(case, kind, moved, with_gradient=True)

    def ours(backend: str, i: int) -> Tensor:
        return ops.make_views_adjoint(
            data.gradient[i], data.x[i], data.delta[i], data.seeds, data.views, std=STD,
            patch=case.patch, backend=backend,
        )  # fmt: skip

    def baseline(i: int) -> Tensor:
        return data.pulled_back(i) / data.std.view(3, 1, 1)

    def check(backend: str) -> None:
        agree(ours(backend, 1), baseline(1))

    return Work(ours, baseline, check, moved, data.sets)


def _step(case: Case, kind: str) -> Work:
    one, views = picture_bytes(case)
    moved = views + 5 * one  # read the gradient, x, δ, Σ; write δ, Σ
    data = _Pixels(case, kind, moved, with_gradient=True)
    weighted = [torch.zeros_like(x) for x in data.x]
    alpha, epsilon = CONFIG.alpha, CONFIG.epsilon

    def in_place(backend: str, delta: Tensor, total: Tensor, i: int) -> None:
        ops.pgd_step_(
            delta, data.gradient[i], data.x[i], data.seeds, data.views, alpha=alpha,
            epsilon=epsilon, weighted=total, weight=WEIGHT, patch=case.patch, backend=backend,
        )  # fmt: skip

    def ours(backend: str, i: int) -> None:
        in_place(backend, data.delta[i], weighted[i], i)

    def stepped(i: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        delta = step.pgd_step(data.delta[i], gradient, data.x[i], alpha, epsilon)
        return delta, weighted[i] + WEIGHT * delta

    def baseline(i: int) -> tuple[Tensor, Tensor]:
        return stepped(i, data.pulled_back(i))

    def check(backend: str) -> None:
        delta, total = data.delta[1].clone(), weighted[1].clone()
        in_place(backend, delta, total, 1)
        gradient = data.pulled_back(1)
        want_delta, want_total = stepped(1, gradient)
        # The order of a sum decides the sign of what is zero but for rounding.
        clear = gradient.abs() > 1e-6 * gradient.abs().max()
        assert clear.float().mean() > 0.99
        agree(delta[clear], want_delta[clear])
        agree(total[clear], want_total[clear])

    if case.baseline == "eager reference":
        return Work(ours, baseline, check, moved, data.sets)

    with torch.enable_grad():  # what the reference defense does: autograd back through its forward
        leaf = data.delta[1].clone().requires_grad_()
        seen = data.seen(data.x[1] + leaf)

    def autograd(i: int) -> tuple[Tensor, Tensor]:
        whole = torch.autograd.grad(seen, leaf, data.gradient[i], retain_graph=True)[0]
        return stepped(i, whole)

    return Work(ours, autograd, check, moved, data.sets)


# ----------------------------------------------------------------------------------------- warps

CROPS, PERSPECTIVES = "resized_crop of torchvision", "perspective of torchvision"


def _warp(case: Case, kind: str) -> Work:
    """Views of their own for each image; torchvision makes them one by one."""
    from torchvision.transforms.v2 import functional as by_torchvision

    one, views = picture_bytes(case)
    moved, side = one + views, case.size
    sets = _sets(moved, kind)
    x = [torch.rand(case.batch, 3, side, side, device=kind) for _ in range(sets)]
    draws = torch.rand(case.batch, case.count, BOX_DRAWS)
    boxes = random_boxes(draws, (side, side), (0.5, 1.0)).transpose(0, 1)
    top, left, tall, wide = boxes.unbind(dim=-1)
    none, whole = torch.zeros_like(top), torch.ones_like(top)
    rows = (wide / side, none, left, none, tall / side, top, none, none, whole)
    crop = torch.stack(rows, dim=-1).unflatten(-1, (3, 3)).to(kind)
    turn = perspectives(draws[..., :8], (side, side), 0.5).transpose(0, 1).contiguous().to(kind)
    whole_boxes = boxes.long()
    corners = turn.double().cpu().inverse() @ turn.new_tensor(
        [[0, side - 1, side - 1, 0], [0, 0, side - 1, side - 1], [1, 1, 1, 1]]
    ).double().cpu()  # fmt: skip
    ends = (corners[..., :2, :] / corners[..., 2:, :]).mT.round().long().tolist()
    start = [[0, 0], [side - 1, 0], [side - 1, side - 1], [0, side - 1]]
    on_device = whole_boxes.to(kind)

    def ours(backend: str, i: int) -> Tensor:
        if case.baseline == CROPS:
            return ops.warp_views(x[i], crop, box=on_device, backend=backend)
        return ops.warp_views(x[i], turn, fill=(0.0, 0.0, 0.0), backend=backend)

    def baseline(i: int) -> Tensor:
        made = []
        for view in range(case.count):
            for image, picture in enumerate(x[i]):
                if case.baseline == CROPS:
                    box = whole_boxes[view, image].tolist()
                    made.append(
                        by_torchvision.resized_crop(picture, *box, [side, side], antialias=False)
                    )
                else:
                    made.append(by_torchvision.perspective(picture, start, ends[view][image]))
        return torch.stack(made)

    def check(backend: str) -> None:
        torch.testing.assert_close(ours(backend, 1), baseline(1), rtol=0, atol=5e-4)

    return Work(ours, baseline, check, moved, sets)


# ---------------------------------------------------------------------------------------- philox


def _philox(case: Case, kind: str) -> Work:
    numel = 3 * case.size**2
    seeds = torch.arange(case.batch, device=kind)
    ours_op = getattr(ops, case.op)
    uniform = case.op == "philox_uniform"
    draw = torch.rand if uniform else torch.randn

    def ours(backend: str, i: int) -> Tensor:
        return ours_op(seeds, philox.DELTA, i, numel, backend=backend)

    def baseline(i: int) -> Tensor:
        return draw(case.batch, numel, device=kind)

    def check(backend: str) -> None:
        """Against the reference, of the last image: torch.rand draws other numbers."""
        want = (philox.uniform if uniform else philox.normal)(seeds[-1:], philox.DELTA, 1, numel)
        got = ours(backend, 1)[-1:]
        if uniform:
            assert torch.equal(got, want)
        agree(got, want)

    return Work(ours, baseline, check, 4 * case.batch * numel, 2)


# ----------------------------------------------------------------------------------------- heads


def head_cost(case: Case) -> tuple[int, int]:
    """(bytes, FLOPs) a head must move and compute; float32 but for the features."""
    assert case.classes
    batch, width, classes = case.batch, case.width, case.classes
    features = case.count * batch * width * DTYPES[case.precision].itemsize
    row, text, product = 4 * batch * width, 4 * classes * width, 2 * batch * classes * width
    return {
        # f, f₀ → τ, ∂/∂f
        "drift_head": (2 * features + features // case.count + 4 * batch, 0),
        # f, t → q, ŷ, t_soft; a product per view, and q's
        "pseudo_label": (
            features + text + 4 * batch * classes + 8 * batch + row,
            (case.count + 1) * product,
        ),
        # f, t_soft, ŷ, t → J, ∂J/∂f
        "margin_head": (2 * features + row + 12 * batch + text, case.count * product),
        # f, t → logits; the mean over views can be taken before the product
        "mean_logits": (features + text + 4 * batch * classes, product),
    }[case.op]


def _head(case: Case, kind: str) -> Work:
    assert case.classes
    moved, flops = head_cost(case)
    text = torch.nn.functional.normalize(torch.randn(case.classes, case.width), dim=-1)
    classes = Classes(text.to(kind), SCALE)
    table = ops.ClassTable.of(classes)
    sets = 4  # the encoder has just written them: a cold cache would be the wrong question
    shape = (case.count, case.batch, case.width)
    # Views of one image look alike.
    one = torch.randn(sets, 1, *shape[1:], device=kind)
    features = list((one + 0.3 * torch.randn(sets, *shape, device=kind)).to(DTYPES[case.precision]))
    anchor = [f[0] + 0.01 * torch.randn_like(f[0]) for f in features]
    temperature = CONFIG.temperature
    labels, negatives = [], []
    if case.op == "margin_head":  # found once per defense, for all of its steps
        labels = [heads.pseudo_label(f.float(), classes, temperature)[1:] for f in features]
        negatives = [classes.negatives(label) for label, _ in labels]

    def ours(backend: str, i: int) -> Any:
        if case.op == "drift_head":
            return ops.drift_head(features[i], anchor[i], backend=backend)
        if case.op == "pseudo_label":
            return ops.pseudo_label(features[i], table, temperature, backend=backend)
        if case.op == "margin_head":
            label, soft = labels[i]
            return ops.margin_head(features[i], soft, label, table, backend=backend)
        return ops.mean_logits(features[i], table, backend=backend)

    def baseline(i: int) -> Any:
        f, dtype = features[i].float(), features[i].dtype
        if case.op == "drift_head":
            fixed = anchor[i].float()
            return heads.relative_drift(f[0], fixed), heads.drift_head(f, fixed).to(dtype)
        if case.op == "pseudo_label":
            return heads.pseudo_label(f, classes, temperature)
        if case.op == "margin_head":
            value, gradient = heads.margin_head(f, labels[i][1], negatives[i], classes)
            return value, gradient.to(dtype)
        return heads.mean_logits(f, classes)

    def check(backend: str) -> None:
        agree(ours(backend, 1), baseline(1), case.precision)

    return Work(ours, baseline, check, moved, sets, flops)
