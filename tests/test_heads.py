"""The heads: closed forms against autograd in float64, the pseudo-label and the duplicates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.reference import heads
from scc_fast.reference.heads import Classes

WIDTH = 13
SHAPES = pytest.mark.parametrize(
    ("views", "batch", "classes"),
    [(1, 1, 2), (2, 17, 2), (3, 1, 1000), (4, 17, 1000), (4, 17, 5)],
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_classes(count: int, scale: float = 20.0, bias: float = 0.0) -> Classes:
    return Classes(F.normalize(random(count, WIDTH, seed=1), dim=-1), scale, bias)


def naive_margin(features: Tensor, soft: Tensor, negatives: Tensor, classes: Classes) -> Tensor:
    """s·J of METHOD.md, one image and view at a time: (B,)."""
    total = []
    for b in range(features.shape[1]):
        terms = []
        for feature in features[:, b]:
            term = F.cosine_similarity(feature, soft[b], dim=0)
            rivals = [
                F.cosine_similarity(feature, classes.text[k], dim=0)
                for k in negatives[b].nonzero().flatten()
            ]
            terms.append(term - max(rivals) if rivals else term)  # max() takes the first
        total.append(classes.scale * sum(terms) / len(terms))
    return torch.stack(total)


@SHAPES
def test_drift_head_is_its_derivative(views: int, batch: int, classes: int) -> None:
    features = random(views, batch, WIDTH).requires_grad_()
    anchor = random(batch, WIDTH, seed=3)
    objective = sum(((feature - anchor) ** 2).sum() for feature in features) / views
    (want,) = torch.autograd.grad(objective, features)
    torch.testing.assert_close(heads.drift_head(features.detach(), anchor), want)


def test_relative_drift_by_hand() -> None:
    features = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]])
    anchor = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -4.0]])
    assert heads.relative_drift(features, anchor).tolist() == pytest.approx([4 / 3, 0.0, 1.5])


@SHAPES
def test_margin_head_is_its_derivative(views: int, batch: int, classes: int) -> None:
    many = make_classes(classes, bias=-3.0)
    features = random(views, batch, WIDTH).requires_grad_()
    soft = F.normalize(random(batch, WIDTH, seed=4), dim=-1)
    negatives = many.negatives(torch.arange(batch) % classes)
    objective = naive_margin(features, soft, negatives, many)
    (want,) = torch.autograd.grad(objective.sum(), features)
    value, gradient = heads.margin_head(features.detach(), soft, negatives, many)
    torch.testing.assert_close(value, objective.detach())
    torch.testing.assert_close(gradient, want)
    assert value.shape == (batch,)
    assert gradient.shape == features.shape


@SHAPES
def test_mean_logits(views: int, batch: int, classes: int) -> None:
    many = make_classes(classes, bias=-3.0)
    features = random(views, batch, WIDTH)
    want = torch.stack(
        [
            20 * F.cosine_similarity(feature[:, None], many.text[None], dim=-1) - 3.0
            for feature in features
        ]
    )
    torch.testing.assert_close(heads.mean_logits(features, many), want.mean(dim=0))


def test_the_heads_build_no_graph_of_their_own() -> None:
    few = make_classes(3)
    features = random(2, 4, WIDTH)
    _, label, soft = heads.pseudo_label(features, few, 0.5)
    value, gradient = heads.margin_head(features, soft, few.negatives(label), few)
    for tensor in (value, gradient, soft, heads.drift_head(features, features[0])):
        assert not tensor.requires_grad


@pytest.mark.parametrize(("first", "second"), [(1, 2), (5, 900), (0, 999)])
def test_the_maximum_takes_its_first_maximiser(first: int, second: int) -> None:
    """Two rivals that are equally near a feature, in different directions."""
    text = -torch.eye(WIDTH, dtype=torch.float64)[:1].repeat(1000, 1)
    text[first], text[second] = torch.eye(WIDTH, dtype=torch.float64)[1:3]
    many = Classes(text, 4.0)
    feature = torch.tensor([1.0, 2.0, 2.0] + [0.0] * (WIDTH - 3), dtype=torch.float64)
    soft = torch.eye(WIDTH, dtype=torch.float64)[:1]
    label = torch.tensor([second + 1 if second < 999 else 500])
    _, gradient = heads.margin_head(feature[None, None], soft, many.negatives(label), many)
    leaf = feature.clone().requires_grad_()
    objective = F.cosine_similarity(leaf, soft[0], dim=0) - F.cosine_similarity(
        leaf, text[first], dim=0
    )
    torch.testing.assert_close(gradient[0, 0], 4 * torch.autograd.grad(objective, leaf)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1])
@SHAPES
def test_pseudo_label_is_the_formula(
    views: int, batch: int, classes: int, temperature: float
) -> None:
    many = make_classes(classes, bias=-3.0)
    features = random(views, batch, WIDTH)
    q, label, soft = heads.pseudo_label(features, many, temperature)
    mean = torch.stack(
        [
            torch.softmax(20 * F.cosine_similarity(f[:, None], many.text[None], dim=-1) - 3, dim=-1)
            for f in features
        ]
    ).mean(dim=0)
    power = mean ** (1 / temperature)
    want = power / power.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(q, want)
    torch.testing.assert_close(q.sum(dim=-1), torch.ones(batch, dtype=torch.float64))
    assert torch.equal(label, want.argmax(dim=-1))
    torch.testing.assert_close(soft.norm(dim=-1), torch.ones(batch, dtype=torch.float64))
    along = (want[..., None] * many.text).sum(dim=1)
    torch.testing.assert_close(soft, along / along.norm(dim=-1, keepdim=True))


def test_pseudo_label_by_hand() -> None:
    """Views that say (2, 1)/3, (1, 2)/3, (2, 1)/3: q̄ = (5, 4)/9, and T = 1/2 squares it."""
    few = Classes(torch.eye(2, dtype=torch.float64), math.log(2) / (0.8 - 0.6))
    straight, opposite = [0.8, 0.6], [0.6, 0.8]
    features = torch.tensor([[straight], [opposite], [straight]], dtype=torch.float64)
    q, label, soft = heads.pseudo_label(features, few, 0.5)
    assert q[0].tolist() == pytest.approx([25 / 41, 16 / 41], rel=1e-9)
    assert label.tolist() == [0]
    assert (soft[0, 1] / soft[0, 0]).item() == pytest.approx(16 / 25, rel=1e-9)


def test_a_tie_of_the_pseudo_label_goes_to_the_first_class() -> None:
    text = torch.eye(4)
    features = torch.tensor([[[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    q, label, _ = heads.pseudo_label(features, Classes(text, 30.0), 0.5)
    assert label.tolist() == [1, 0, 0]
    assert q[2].tolist() == [0.25] * 4


def test_sharpening_does_not_underflow() -> None:
    """At the smallest temperature a literal q̄^1000 is zero in float32 for every class."""
    few = make_classes(40, scale=1.0)
    few = Classes(few.text.float(), 1.0)
    q, _, soft = heads.pseudo_label(random(2, 3, WIDTH).float(), few, 1e-3)
    torch.testing.assert_close(q.sum(dim=-1), torch.ones(3))
    assert soft.isfinite().all()


def test_a_wide_scale_leaves_the_pseudo_label_finite() -> None:
    """SigLIP's scale sends all but one probability to zero."""
    few = Classes(make_classes(5).text.float(), 5000.0, -12.0)
    q, label, soft = heads.pseudo_label(random(4, 3, WIDTH).float(), few, 0.5)
    value, gradient = heads.margin_head(
        random(4, 3, WIDTH).float(), soft, few.negatives(label), few
    )
    assert all(tensor.isfinite().all() for tensor in (q, soft, value, gradient))


def test_duplicates_are_left_out_of_the_negatives_together() -> None:
    text = make_classes(6).text
    text[4] = text[1]
    text[5] = text[1]
    negatives = Classes(text, 1.0).negatives(torch.tensor([1, 5, 0]))
    assert negatives.tolist() == [
        [True, False, True, True, False, False],
        [True, False, True, True, False, False],
        [False, True, True, True, True, True],
    ]


def test_nearly_equal_classes_are_negatives() -> None:
    text = make_classes(3).text
    text[2] = text[1]
    text[2, 0] += 1e-12
    assert Classes(text, 1.0).negatives(torch.tensor([1])).tolist() == [[True, False, True]]


def test_no_negative_left_gives_no_gradient_from_the_maximum() -> None:
    """All prompts are one: J is cos(f, t_soft) alone, and finite."""
    one = Classes(make_classes(1).text.repeat(3, 1), 7.0)
    features = random(2, 5, WIDTH).requires_grad_()
    soft = F.normalize(random(5, WIDTH, seed=4), dim=-1)
    negatives = one.negatives(torch.tensor([0, 1, 2, 1, 0]))
    assert not negatives.any()
    value, gradient = heads.margin_head(features.detach(), soft, negatives, one)
    objective = 7 * F.cosine_similarity(features, soft[None], dim=-1).mean(dim=0)
    torch.testing.assert_close(value, objective.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(objective.sum(), features)[0])


def test_one_image_has_negatives_and_another_none() -> None:
    """An image without negatives leaves its neighbours alone."""
    classes = make_classes(4)
    features, soft = random(2, 2, WIDTH), F.normalize(random(2, WIDTH, seed=4), dim=-1)
    negatives = torch.tensor([[False] * 4, [False, True, True, True]])
    both = heads.margin_head(features, soft, negatives, classes)
    for i in range(2):
        rows = slice(i, i + 1)
        alone = heads.margin_head(features[:, rows], soft[rows], negatives[rows], classes)
        torch.testing.assert_close(both[0][rows], alone[0])
        torch.testing.assert_close(both[1][:, rows], alone[1])


@pytest.mark.parametrize("form", [{}, {"slope": 5.0}, {"geodesic": True}])
def test_views_that_did_not_move_have_a_finite_slope(form: dict[str, Any]) -> None:
    features = torch.randn(1, 3, 7).expand(4, 3, 7).clone().requires_grad_()
    weights, cosine, agreement = heads.view_weights(features, 1.0, 2.5, 0.5, **form)
    classes = Classes(F.normalize(torch.randn(5, 7), dim=-1), 20.0)
    logits = heads.mean_logits(features, classes, weights, unit=True)
    (slope,) = torch.autograd.grad(logits.sum() + cosine.sum() + agreement.sum(), features)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
