"""The bundled pictures: a picture is a function of its split and index, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from scc_fast.tiny import data


@pytest.fixture(scope="module")
def many() -> tuple[torch.Tensor, torch.Tensor]:
    return data.generate("test", range(1500))


def test_class_names_are_unique_and_have_an_artwork_each() -> None:
    names = data.class_names()
    assert len(set(names)) == len(names) > 100
    assert all(name.strip() == name != "" for name in names)
    artworks = data.artworks()
    assert artworks.shape == (len(names), 4, 72, 72)
    assert len(artworks.flatten(1).unique(dim=0)) == len(names)
    assert (artworks[:, 3].flatten(1).amax(dim=1) > 0.9).all()  # none is empty
    assert (artworks[:, :3] <= artworks[:, 3:] + 1e-6).all()  # premultiplied


def test_pictures_are_on_the_8_bit_grid(many) -> None:
    x, labels = many
    assert x.shape == (1500, 3, 64, 64)
    assert x.dtype == torch.float32
    assert 0 <= x.min() <= x.max() <= 1
    assert torch.equal((x * 255).round() / 255, x)
    assert (x.flatten(1).std(dim=1) > 0.005).all()
    assert labels.dtype == torch.int64
    assert labels.shape == (1500,)


def test_labels_are_roughly_uniform(many) -> None:
    """Chi-square of the counts within five standard deviations of its mean."""
    count = len(data.class_names())
    counts = many[1].bincount(minlength=count)
    assert len(counts) == count
    expected = 1500 / count
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (count - 1)) < 5 * (2 * (count - 1)) ** 0.5


def test_a_picture_is_independent_of_its_batch(many) -> None:
    x, labels = many
    chosen = torch.tensor([700, 0, 1499, 3, 700])
    again, again_labels = data.generate("test", chosen)
    assert torch.equal(again, x[chosen])
    assert torch.equal(again_labels, labels[chosen])
    for i in (0, 17):
        alone, label = data.generate("test", range(i, i + 1))
        assert torch.equal(alone[0], x[i])
        assert label.item() == labels[i]


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = data.generate("train", range(8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(data.generate("train", range(8))[0], first)


def test_splits_share_no_key_and_no_picture() -> None:
    ends = torch.tensor([0, 1, 99, 10**6, 2**40 - 1])
    keys = torch.cat([data.seeds(split, ends) for split in data.SPLITS])
    assert len(keys.unique()) == len(keys)
    x = torch.cat([data.generate(split, range(20))[0] for split in data.SPLITS])
    assert len(x.flatten(1).unique(dim=0)) == len(x) == 20 * len(data.SPLITS)


def test_pictures_of_a_class_differ(many) -> None:
    x, labels = many
    same = x[labels == labels[0]]
    assert len(same) > 1
    assert (same[1:] - same[0]).abs().mean() > 0.02


@pytest.mark.parametrize("split", ["valid", "Test", ""])
def test_an_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=f"got '{split}'") as error:
        data.generate(split, range(1))
    assert all(name in str(error.value) for name in data.SPLITS)


def test_no_pictures_and_no_index_outside_the_split():
    images, labels = data.generate("test", range(0))
    assert images.shape == (0, 3, 64, 64)
    assert labels.shape == (0,)
    for index in (-1, 1 << 40):
        with pytest.raises(ValueError, match="indices"):
            data.generate("test", torch.tensor([index]))
