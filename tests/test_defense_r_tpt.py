"""R-TPT: its views, its step on the prompt and its weights by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defense_toys import (
    CLASSES,
    SHAPE,
    WIDTH,
    check_costs,
    check_own_result,
    dots,
    looked_at,
    ran,
    softmax,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses import augment
from scc_fast.defenses.augmix import MIX_DRAWS, operate
from scc_fast.defenses.r_tpt import RTPT, RTPTConfig
from scc_fast.engine.batch import Batch
from scc_fast.reference import philox
from toys import defender_of

SMALL = {"view_count": 12, "selection": 0.4, "neighbors": 3, "temperature": 0.05}


def test_views_by_hand() -> None:
    x, seeds = tiny.generate("test", range(2))[0], image_seeds(8, 2)
    config = {"view_count": 7, "neighbors": 3}
    plain, mixed = (
        looked_at(defender_of(method="r_tpt", config={**config, "augmix": on}), x, seeds)
        for on in (False, True)
    )
    assert torch.equal(plain[0], x)
    assert torch.equal(mixed[0], x)
    draws = philox.uniform(seeds, 140, 0, 6 * (23 + MIX_DRAWS)).view(2, 6, -1)
    boxes = augment.random_boxes(draws[..., 1:23], (64, 64), (0.08, 1.0)).long()
    for i, view in np.ndindex(2, 6):
        top, left, tall, wide = boxes[i, view].tolist()
        part = x[i : i + 1, :, top : top + tall, left : left + wide]
        crop = F.interpolate(part, (64, 64), mode="bilinear", align_corners=False)
        crop = crop.flip(-1) if draws[i, view, 0] < 0.5 else crop
        torch.testing.assert_close(plain[1 + view, i], crop[0], atol=1e-5, rtol=0)
        u = draws[i, view, 23:].tolist()
        share = -np.log1p(-np.array(u[:3]))
        want = u[3] * crop
        for chain in range(3):
            c, y = u[4 + 10 * chain : 14 + 10 * chain], crop
            for at in range(1 + int(3 * c[0])):
                kind, level, sign = c[1 + 3 * at : 4 + 3 * at]
                y = operate(
                    y,
                    torch.tensor([int(9 * kind)]),
                    torch.tensor([0.1 + 0.9 * level]),
                    torch.tensor([-1.0 if sign > 0.5 else 1.0]),
                )
            want = want + (1 - u[3]) * share[chain] / share.sum() * y
        torch.testing.assert_close(mixed[1 + view, i], want[0].float(), atol=2e-2, rtol=0)
        assert (mixed[1 + view, i] - want[0]).abs().mean() < 1e-3


class Line:
    """A text tower that is linear in the context: t_k = keep·b_k + o·A_k, 2 tokens of width 3."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.base = torch.randn(CLASSES - 1, WIDTH, generator=generator)
        self.map = 9 * torch.randn(CLASSES - 1, 6, WIDTH, generator=generator)
        self.group = torch.tensor([0, 1, 2, 3, 4, 1])  # class 5 has the words of class 1
        self.start = torch.zeros(1, 2, 3)
        self.passes: list[str] = []
        self.keeps: list[float] = []

    def features(self, offset: Tensor, keep: float = 1.0) -> Tensor:
        self.passes.append("forward")
        return keep * self.base + torch.einsum("bi,kid->bkd", offset.flatten(1), self.map)

    def pull(self, offset: Tensor, slope: Tensor, keep: float = 1.0) -> Tensor:
        self.passes.append("pull")
        self.keeps.append(keep)
        return torch.einsum("bkd,kid->bi", slope, self.map).view_as(offset)


def lined(**config: Any) -> Any:
    defense = toyed(RTPT, **{**SMALL, **config})
    defense.defense.context = Line()
    return defense


def tuned(defense: Any, features: Tensor) -> Tensor:
    """Each image's text embeddings."""
    return defense.defense._tuned(defense.session, features)


def by_hand(defense: Any, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (B, K) and the tuned texts (B, K, D) of the card, float64, one image at a time."""
    config, line = defense.config, defense.defense.context
    scale, bias, group = defense.table.scale, defense.table.bias, line.group.numpy()
    base, linear = np.float64(line.base.numpy()), np.float64(line.map.numpy())
    answers, texts = [], []
    for f in np.float64(features).transpose(1, 0, 2):
        z = f / np.linalg.norm(f, axis=1, keepdims=True)
        offset, keep, moments = np.zeros(6), 1.0, np.zeros((2, 6))
        chosen = None
        for at in range(1, config.steps + 2):
            text = keep * base + np.einsum("i,kid->kd", offset, linear)
            norm = np.linalg.norm(text, axis=1, keepdims=True)
            unit = text / norm
            logits = (scale * z @ unit.T + bias)[:, group]
            if at == config.steps + 1:
                break
            p = softmax(logits)
            h = -(p * np.log(p)).sum(axis=1)
            chosen = np.argsort(h)[: int(0.4 * 12)] if chosen is None else chosen
            slope = np.zeros_like(text)
            for v in chosen:
                pull = -p[v] * (np.log(p[v]) + h[v]) * scale / len(chosen)
                for k, by in zip(group, pull, strict=True):
                    slope[k] += by * (z[v] - (z[v] @ unit[k]) * unit[k]) / norm[k]
            g = np.einsum("kd,kid->i", slope, linear)
            moments = np.array([[0.9], [0.999]]) * moments + [0.1 * g, 0.001 * g**2]
            first, second = moments[0] / (1 - 0.9**at), moments[1] / (1 - 0.999**at)
            less = 1 - config.learning_rate * 0.01
            offset = less * offset - config.learning_rate * first / (np.sqrt(second) + 1e-8)
            keep *= less
        similar = z @ z.T
        np.fill_diagonal(similar, -np.inf)
        score = np.sort(similar, axis=1)[:, -config.neighbors :].mean(axis=1)
        weight = softmax(score[None] / config.temperature)[0]
        answers.append(weight @ logits)
        texts.append(text[group])
    return np.stack(answers), np.stack(texts)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_one_step_and_the_weighted_sum_by_hand(steps: int) -> None:
    defense, x, seeds = lined(steps=steps), dots(4), image_seeds(6, 4)
    context = defense.defense.context
    features = defense.session.features(looked_at(defense, x, seeds)).numpy()
    want, text = by_hand(defense, features)
    outcome = ran(defense, x, seeds)
    np.testing.assert_allclose(outcome.logits.numpy(), want, atol=2e-3)
    assert torch.equal(outcome.logits[:, 1], outcome.logits[:, 5])
    assert context.passes == ["pull", "forward"] * steps
    moved = np.abs(text - np.float64(context.base[context.group].numpy()))
    assert (moved.max(axis=(1, 2)) > 0.01).all() == (steps > 0)
    assert not outcome.delta.any()
    assert outcome.drift.isnan().all()
    assert not outcome.flagged.any()


@pytest.mark.parametrize("steps", [1, 3])
def test_the_decay_is_the_whole_contexts(steps: int) -> None:
    """At a rate where 1 − 0.01·rate shows, in the words and in what the slope is taken with."""
    defense, x, seeds = lined(steps=steps, learning_rate=1.0), dots(4), image_seeds(6, 4)
    context = defense.defense.context
    context.map = context.map / 9  # else the offset hides the words
    features = defense.session.features(looked_at(defense, x, seeds))
    want = by_hand(defense, features.numpy())[1]
    got = tuned(defense, features)[:, context.group]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-3)
    assert context.keeps == pytest.approx([0.99**at for at in range(steps)])


def test_the_self_similarity_as_published() -> None:
    features = torch.randn(12, 1, 5, generator=torch.Generator().manual_seed(1))
    unit = F.normalize(features[:, 0], dim=-1)
    similar = (unit @ unit.T).double()
    low = similar.diagonal() < 1  # rounding: these count as their own neighbors
    assert 0 < low.sum() < 12
    found = {}
    for published in (False, True):
        row = similar.clone()
        row[(row >= 1) if published else torch.eye(12, dtype=torch.bool)] = -torch.inf
        score = row.topk(3, dim=-1).values.mean(dim=-1)
        want = torch.softmax(score / 0.05, dim=0)
        found[published] = lined(published=published).defense._reliability(features)[:, 0]
        torch.testing.assert_close(found[published], want.float(), atol=1e-5, rtol=1e-3)
    ratio = found[True] / found[False]
    assert ratio[low].min() > ratio[~low].max()
    one = torch.eye(5)[:1].expand(12, 1, 5)  # a picture of one color
    for published in (False, True):
        even = lined(published=published).defense._reliability(one)
        torch.testing.assert_close(even, torch.full((12, 1), 1 / 12))


def test_what_an_attacker_differentiates() -> None:
    defense, x, seeds = lined(), dots(2), image_seeds(6, 2)
    out = np.random.default_rng(1).normal(size=(2, CLASSES))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        answer = defense.live(leaf, seeds).logits
        (got,) = torch.autograd.grad((answer * torch.from_numpy(out)).sum(), leaf)
    assert defense.session.encode.forward == 2 * 12  # once, with gradients
    assert got.isfinite().all()
    assert got.abs().amax(dim=(1, 2, 3)).min() > 1e-3
    features = defense.session.features(looked_at(defense, x, seeds))
    with torch.enable_grad():
        leaf = features.clone().requires_grad_()
        session = replace(defense.session, encoded=lambda pixels: leaf.flatten(0, 1))
        answer = defense.defense.first_pass(session, Batch(x, seeds)).logits
        (slope,) = torch.autograd.grad((answer * torch.from_numpy(out)).sum(), leaf)
    frozen = lined(steps=0)  # with the tuned text held
    for i in range(2):
        frozen.defense.context.base = tuned(defense, features)[i]
        for at in ((0, 2), (5, 0), (11, 6)):
            step = np.zeros((12, 1, WIDTH))
            step[at[0], 0, at[1]] = 1e-5
            one = np.float64(features[:, i : i + 1].numpy())
            up, down = (by_hand(frozen, one + s)[0] @ out[i] for s in (step, -step))
            want = float((up - down)[0] / 2e-5)
            assert slope[at[0], i, at[1]].item() == pytest.approx(want, rel=2e-2, abs=2e-3)


def test_cost_and_config() -> None:
    check_costs(lined())
    check_costs(lined(view_count=64, neighbors=20))
    defense = toyed(RTPT)
    width = defense.defense.width(defense.session, SHAPE[1:])
    assert (defense.traits.forward, defense.traits.backward, width) == (64, 0, 64)
    config = RTPTConfig()
    assert (config.selected, config.learning_rate, config.neighbors) == (6, 5e-3, 20)
    assert (config.temperature, config.context, config.augmix) == (0.01, 4, True)
    for wrong, told in [
        ({"view_count": 1}, r"view_count must be a whole number in \[2, 1024\], got 1"),
        ({"view_count": 20}, r"neighbors must be a whole number in \[1, 19\], got 20"),
        ({"selection": 1.1}, "selection must be a number"),
        ({"context": 0}, "context must be a whole number"),
        ({"augmix": 1}, "augmix must be True or False"),
        ({"learning_rate": -1}, "learning_rate must be a number"),
    ]:
        with pytest.raises(ValueError, match=told):
            RTPTConfig(**wrong)  # type: ignore[arg-type]


def test_on_the_bundled_model() -> None:
    check_own_result(RTPT, view_count=12, neighbors=4, selection=0.25)
    x, labels = tiny.generate("test", range(4))
    defense = defender_of(method="r_tpt")
    assert (defense(x, 0).labels == labels).all()
    seen = defense.session.features(looked_at(defense, x[:2], image_seeds(0, 2)))
    method, words = defense.defense, defense.defense.context.base.expand(2, -1, -1)
    before = method._entropy(defense.session, seen, words)
    after = method._entropy(defense.session, seen, tuned(defense, seen))
    kept = before.argsort(dim=0)[:6]
    assert (after.gather(0, kept).mean(dim=0) < before.gather(0, kept).mean(dim=0)).all()
