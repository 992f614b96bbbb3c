"""AugMix's operations against Pillow's, and their mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from scc_fast import tiny
from scc_fast.defenses.augmix import MIX_DRAWS, OPERATIONS, augmix, operate


@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_pillow_s(sign: int) -> None:
    """To one gray level away from the border, where Pillow rounds to 8 bits."""
    x = (tiny.generate("test", range(4))[0] * 255).round() / 255
    level, box, side = 0.95, Image.Transform.AFFINE, Image.Resampling.BILINEAR
    angle, shear, shift = sign * 2, sign * 0.03 * level, sign * 2  # ⌊3·0.95⌋, ⌊64/30·0.95⌋ = 2
    maps = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }
    for kind, name in enumerate(OPERATIONS):
        rows = torch.full((4,), kind)
        got = operate(x, rows, torch.full((4,), level), torch.full((4,), float(sign)))
        for i in range(4):
            picture = Image.fromarray((x[i] * 255).round().byte().permute(1, 2, 0).numpy())
            want = {
                "autocontrast": lambda p: ImageOps.autocontrast(p),
                "equalize": lambda p: ImageOps.equalize(p),
                "posterize": lambda p: ImageOps.posterize(p, 4),
                "solarize": lambda p: ImageOps.solarize(p, 256 - 24),
                "rotate": lambda p: p.rotate(angle, resample=side),
            }.get(name, lambda p, n=name: p.transform(p.size, box, maps[n], resample=side))(picture)
            off = (got[i] * 255 - torch.from_numpy(np.array(want)).permute(2, 0, 1)).abs()
            assert off[:, 3:-3, 3:-3].max() < 1.001, name
        assert (got - x).abs().max() > 0.02, name
    mixed = operate(x, torch.tensor([3, -1, 0, 8]), torch.full((4,), level), torch.ones(4))
    assert torch.equal(mixed[1], x[1])
    for row, kind in ((0, 3), (2, 0), (3, 8)):
        one = operate(x[row : row + 1], torch.tensor([kind]), torch.tensor([level]), torch.ones(1))
        torch.testing.assert_close(mixed[row], one[0])


def test_a_mixture_stays_in_the_box_and_each_picture_has_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x, draws = (torch.rand(200, *n, generator=generator) for n in ((3, 16, 16), (MIX_DRAWS,)))
    whole = augmix(x, draws)
    assert 0 <= whole.min() <= whole.max() <= 1.00001
    for i in (0, 63, 64, 199):
        torch.testing.assert_close(augmix(x[i : i + 1], draws[i : i + 1])[0], whole[i])
    stay = draws.clone()
    stay[:, 3] = 1  # m = 1: nothing is mixed in
    torch.testing.assert_close(augmix(x, stay), x)


def test_gradients_pass_every_operation() -> None:
    x = (tiny.generate("test", range(9))[0] * 0.98 + 0.01).requires_grad_()
    moved = operate(x, torch.arange(9), torch.full((9,), 0.9), torch.ones(9))
    (slope,) = torch.autograd.grad(moved.sum(), x)
    assert slope.isfinite().all()
    assert (slope.abs().mean(dim=(1, 2, 3)) > 0.3).all()
