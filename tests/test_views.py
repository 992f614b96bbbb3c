"""Views, preprocessing, and the projected step: by hand, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scc_fast.config import IDENTITY, View, resolve_views
from scc_fast.reference import philox, step
from scc_fast.reference.views import make_views, preprocess

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
EPSILON, ALPHA = 4 / 255, 1 / 255


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seeds(batch: int) -> Tensor:
    return philox.image_seeds(11, batch)


@pytest.mark.parametrize(("size", "p"), [(1, 1), (24, 1), (32, 1), (64, 2), (224, 7), (384, 12)])
def test_geometric_views(size: int, p: int) -> None:
    assert resolve_views("geometric", size) == (
        View(),
        View(flip=True),
        View(shift=(p, p)),
        View(flip=True, shift=(-p, -p)),
    )
    shifts = ((0, 0), (p, p), (-p, -p), (p, -p))
    assert resolve_views("geometric", size, flip=False) == tuple(View(shift=s) for s in shifts)


def test_paper_views() -> None:
    noisy = View(noise=0.02)
    assert resolve_views("paper", 64, sigma=0.02) == (IDENTITY, View(flip=True), noisy, noisy)
    assert not any(view.flip for view in resolve_views("paper", 64, flip=False))
    given_views = (IDENTITY, View(shift=(1, 0)))
    assert resolve_views(given_views, 64, flip=False) is given_views


def test_shift_and_flip_by_hand() -> None:
    """(down, right): what is uncovered takes the fill; the shift comes before the flip."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).expand(1, 3, 2, 3) / 10
    views = (
        IDENTITY,
        View(flip=True),
        View(shift=(1, 0)),
        View(shift=(0, 1)),
        View(shift=(-1, -1)),
        View(flip=True, shift=(0, 1)),
        View(shift=(2, 0)),
        View(shift=(0, -9)),
    )
    want = [
        [[1, 2, 3], [4, 5, 6]],
        [[3, 2, 1], [6, 5, 4]],
        [[0, 0, 0], [1, 2, 3]],
        [[0, 1, 2], [0, 4, 5]],
        [[5, 6, 0], [0, 0, 0]],
        [[2, 1, 0], [5, 4, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0]],
    ]
    seen = make_views(x, seeds(1), views, MEAN)
    assert seen.shape == (len(views), 1, 3, 2, 3)
    for got, rows in zip(seen, want, strict=True):
        for channel in range(3):
            for i in range(2):
                for j in range(3):
                    value = rows[i][j] / 10 if rows[i][j] else MEAN[channel].item()
                    assert got[0, channel, i, j].item() == pytest.approx(value, abs=1e-7)


def test_the_fill_is_zero_after_preprocessing_and_has_no_gradient() -> None:
    x = picture(2, 3, 8, 8).requires_grad_()
    p = 3
    seen = make_views(x, seeds(2), (View(shift=(p, -p)),), MEAN)[0]
    ready = preprocess(seen, (8, 8), MEAN, STD)
    border = torch.zeros(8, 8, dtype=torch.bool)
    border[:p, :] = True
    border[:, 8 - p :] = True
    assert (ready[..., border] == 0).all()
    assert (ready[..., ~border] != 0).any()
    (gradient,) = torch.autograd.grad(ready[..., border].sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(seen.sum(), x)
    lost = torch.zeros(8, 8, dtype=torch.bool)  # what the shift pushed out of sight
    lost[8 - p :, :] = True
    lost[:, :p] = True
    assert torch.equal(gradient, (~lost).float().expand_as(x))


@pytest.mark.parametrize("flip", [True, False])
def test_gradient_of_the_geometric_views(flip: bool) -> None:
    x = picture(2, 3, 3, 4).double().requires_grad_()
    views = resolve_views("geometric", 3, flip=flip)
    assert torch.autograd.gradcheck(
        lambda pixels: make_views(pixels, seeds(2), views, MEAN.double()), x
    )


def test_noise_belongs_to_the_seed_and_the_view() -> None:
    """The same in every step whatever the pixels, and never twice."""
    views = (IDENTITY, View(noise=0.01), View(noise=0.01))
    x = 0.4 + 0.2 * picture(5, 3, 4, 4)
    seen = make_views(x, seeds(5), views, MEAN)
    moved = make_views(x + 0.1, seeds(5), views, MEAN)
    noise = seen - seen[0]
    torch.testing.assert_close(moved - moved[0], noise, rtol=0, atol=2e-7)
    assert noise[1].std().item() == pytest.approx(0.01, rel=0.2)
    assert not torch.isclose(noise[1], noise[2], rtol=0, atol=1e-6).all(dim=(1, 2, 3)).any()
    assert torch.equal(make_views(x[3:4], seeds(5)[3:4], views, MEAN), seen[:, 3:4])
    start = step.initial_delta(x, seeds(5), 0.01)
    assert not torch.isclose(noise[1], start, atol=1e-6).all(dim=(1, 2, 3)).any()


def test_noise_is_clamped_and_comes_last() -> None:
    x = picture(2, 3, 4, 4).round()
    view = View(flip=True, shift=(1, 0), noise=0.3)
    seen = make_views(x, seeds(2), (view,), MEAN)[0]
    assert seen.amin() == 0
    assert seen.amax() == 1
    plain = make_views(x, seeds(2), (View(flip=True, shift=(1, 0)),), MEAN)[0]
    noise = philox.normal(seeds(2), philox.VIEW_NOISE, 0, 48).view_as(x)
    torch.testing.assert_close(seen, (plain + 0.3 * noise).clamp(0, 1))


def test_preprocess_normalises_alone_where_sizes_match() -> None:
    x = picture(2, 3, 6, 8)
    want = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert torch.equal(preprocess(x, (6, 8), MEAN, STD), want)
    assert torch.equal(preprocess(x, (6, 8), torch.zeros(3), torch.ones(3)), x)


def test_preprocess_resizes_bicubic_and_antialiased() -> None:
    x = picture(1, 3, 12, 9)
    resized = preprocess(x, (6, 8), torch.zeros(3), torch.ones(3))
    want = F.interpolate(x, (6, 8), mode="bicubic", antialias=True)
    assert torch.equal(resized, want)
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    assert preprocess(stripes, (8, 8), torch.zeros(3), torch.ones(3)).std() < 0.05


def test_step_by_hand() -> None:
    """Ball, then box; sign(0) = 0."""
    x = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.005, 0.999])
    delta = torch.tensor([0.0, 0.01, EPSILON, -EPSILON, 0.0, 0.0])
    gradient = torch.tensor([3.0, 0.0, 1e-30, 1.0, -2.0, 5.0])
    want = torch.tensor([ALPHA, 0.01, EPSILON, ALPHA - EPSILON, -ALPHA, 0.001])
    got = step.pgd_step(delta, gradient, x, ALPHA, EPSILON)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    down = step.pgd_step(got, gradient.new_tensor([0.0] * 4 + [-1, 0]), x, ALPHA, EPSILON)
    assert down[4] == -x[4]
    torch.testing.assert_close(down[:4], got[:4], rtol=0, atol=2**-24)


def test_the_box_has_the_last_word() -> None:
    """On a pixel outside [0, 1] ball and box cannot both hold."""
    x = torch.tensor([1.1, -0.1])
    got = step.project(torch.tensor([EPSILON, 0.0]), x, EPSILON)
    torch.testing.assert_close(got, torch.tensor([-0.1, 0.1]))


PIXELS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(PIXELS, st.floats(-1.5, 1.5, width=32), st.floats(0, 0.99))
def test_projection_stays_in_ball_and_box(
    values: list[float], value: float, epsilon: float
) -> None:
    """The box holds exactly; the ball to the rounding of x + δ, half an ulp below 1."""
    x = torch.tensor(values)
    once = step.project(torch.full_like(x, value), x, epsilon)
    assert ((x + once >= 0) & (x + once <= 1)).all()
    assert once.abs().max().item() <= epsilon + 2**-24
    torch.testing.assert_close(step.project(once, x, epsilon), once, rtol=0, atol=2**-24)


def test_initial_delta_is_uniform_in_the_ball() -> None:
    x = torch.full((4, 3, 32, 32), 0.5)
    delta = step.initial_delta(x, seeds(4), EPSILON)
    assert delta.dtype == torch.float32
    assert delta.abs().max() <= EPSILON + 2**-24
    assert delta.abs().max() > 0.99 * EPSILON
    assert delta.mean().item() == pytest.approx(0, abs=0.03 * EPSILON)
    assert delta.std().item() == pytest.approx(EPSILON / 3**0.5, rel=0.02)
    edge = step.initial_delta(torch.zeros(1, 3, 8, 8), seeds(1), EPSILON)
    assert edge.min() == 0
    assert (edge == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
