"""Defender and defend(): methods, results, inputs, seeds, batches and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import scc_fast
from scc_fast import Defender, SCCConfig, TTCConfig, tiny
from scc_fast.engine import drive
from scc_fast.engine.choose import choose_backends
from scc_fast.reference.views import make_views, preprocess
from toys import (
    FIVE,
    KINDS,
    METHODS,
    assert_same,
    defender_of,
    model_of,
    pictures,
    small_open_clip,
    small_tokenizer,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_on_every_model(kind: str, method: str) -> None:
    defender, x = defender_of(kind, method=method), pictures(kind, 3)
    before = x.clone()
    result = defender(x, 5)
    classes = len(defender.text_features)
    assert torch.equal(x, before)
    assert result.logits.shape == (len(result), classes) == (3, classes)
    assert result.logits.isfinite().all()
    assert {result.logits.dtype, result.delta.dtype, result.drift.dtype} == {torch.float32}
    assert result.delta.shape == result.images.shape == x.shape
    assert not any(t.requires_grad for t in (result.logits, result.delta, result.images))
    epsilon = getattr(defender.config, "epsilon", 0.0)
    assert result.delta.abs().max() <= epsilon + 1e-7
    assert (x + result.delta).min() >= -1e-6
    assert (x + result.delta).max() <= 1 + 1e-6
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert (result.delta.abs().amax(dim=(1, 2, 3)) > 0).all() == (method in ("scc", "ttc", "rn"))
    assert result.flagged.dtype == torch.bool
    measured = method in ("scc", "ttc", "extrapolate")
    assert result.drift.isfinite().all() == measured
    if method != "extrapolate":  # its switch is on another measure
        assert torch.equal(result.flagged, result.drift < 0.2)
    assert (result.method, result.backend, result.engine) == (
        method,
        choose_backends(x.device, None),
        defender.engine,
    )
    assert result.timings["total"] >= result.timings["defense"] > 0
    again = defender(x, result.seeds)
    assert torch.equal(again.logits, result.logits)
    assert torch.equal(again.delta, result.delta)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_decides_who_is_repaired(kind: str) -> None:
    x = pictures(kind, 3)
    noise = defender_of(kind, method="rn")(x, 5)
    kept = defender_of(kind, method="ttc", config={"tau": 0.0})(x, 5)
    assert not kept.flagged.any()
    assert torch.equal(kept.delta, noise.delta)
    torch.testing.assert_close(kept.logits, noise.logits)
    for method in ("ttc", "scc"):
        repaired = defender_of(kind, method=method, config={"tau": 100.0})(x, 5)
        assert repaired.flagged.all()
        assert not torch.equal(repaired.delta, noise.delta)
    middle = float(kept.drift.median())
    split = defender_of(kind, config={"tau": middle})(x, 5)
    assert torch.equal(split.flagged, split.drift < middle)
    assert split.flagged.sum() in (1, 2)
    same = (split.delta == noise.delta).flatten(1).all(dim=1)
    assert torch.equal(same, ~split.flagged)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_scaled_cosines_of_the_defended_pixels_plus_the_bias(kind: str) -> None:
    model, x = model_of(kind), pictures(kind, 2)
    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    for method, options in (("none", {}), ("ttc", {"tau": 100.0}), ("scc", {"tau": 100.0})):
        defender = defender_of(kind, method=method, config=options)
        result = defender(x, 1)
        views = make_views(x + result.delta, result.seeds, defender.views(x.shape[-1]), mean)
        assert len(views) == (4 if method == "scc" else 1)
        expected = torch.zeros_like(result.logits)
        for view in views:
            features = model.encode_image(preprocess(view, model.image_size, mean, std))
            cosine = F.cosine_similarity(features[:, None], defender.text_features[None], dim=-1)
            expected += (model.logit_scale * cosine + model.logit_bias) / len(views)
        torch.testing.assert_close(result.logits, expected, atol=1e-3, rtol=1e-4)
    assert (model.logit_bias != 0) == (kind == "hf_siglip")


def test_lazy_results() -> None:
    result = defender_of("open_clip", method="none")(pictures("open_clip", 3), 0)
    torch.testing.assert_close(result.probs.sum(dim=-1), torch.ones(3))
    assert torch.equal(result.labels, result.logits.argmax(dim=-1))
    values, labels = result.topk(3)
    assert values.shape == labels.shape == (3, 3)
    assert torch.equal(labels[:, 0], result.labels)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert torch.equal(values, result.probs.gather(1, labels))
    assert result.topk(99)[1].sort(dim=-1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


# Inputs


def test_kinds_of_input_agree(tmp_path: Path) -> None:
    defender = defender_of("tiny", method="ttc")
    files = tiny.samples()[:2]
    pil = [Image.open(file) for file in files]
    whole = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))) for p in pil])
    bytes_ = whole.permute(0, 3, 1, 2)
    assert bytes_.shape[-2:] == defender.model.image_size
    expected = defender(bytes_.float() / 255, 9)
    for same in (bytes_, files, [str(f) for f in files], pil, [files[0], pil[1]], list(bytes_)):
        result = defender(same, 9)
        assert torch.equal(result.logits, expected.logits)
        assert torch.equal(result.inputs, expected.inputs)
    assert_same(defender(bytes_[0], 9), expected, [0])
    assert_same(defender(pil[0], 9), expected, [0])
    mean = torch.tensor(defender.model.mean).view(3, 1, 1)
    std = torch.tensor(defender.model.std).view(3, 1, 1)
    normalised = (bytes_.float() / 255 - mean) / std
    assert_same(defender(normalised, 9, is_normalized=True), expected)
    once = scc_fast.defend(files, defender.model, tiny.prompts(), seeds=9, method="ttc")
    assert torch.equal(once.logits, expected.logits)
    named = scc_fast.defend(files, "tiny", tiny.prompts(), seeds=9, method="none")
    torch.testing.assert_close(named.logits, defender_of(method="none")(files).logits)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (200, 90)])
@pytest.mark.parametrize("as_pil", [True, False])
def test_any_size(size: tuple[int, int], as_pil: bool) -> None:
    x = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    result = defender_of("tiny")(scc_fast.images.to_pil(x) if as_pil else x, 0)
    assert result.images.shape[-2:] == ((64, 64) if as_pil else size)
    assert result.logits.isfinite().all()


def test_a_photograph_of_12_megapixels() -> None:
    photo = Image.effect_noise((4000, 3000), 60).convert("RGB")
    assert defender_of("tiny")(photo, 0).images.shape == (1, 3, 64, 64)
    # As a tensor it keeps its size; the whole defense of it takes half a minute here
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    result = defender_of("tiny", method="none")(x, 0)
    assert result.images.shape == (1, 3, 3000, 4000)
    assert result.logits.isfinite().all()


def test_grey_alpha_rotated_and_truncated_files(tmp_path: Path) -> None:
    defender = defender_of("tiny", method="none")
    rgb = Image.open(tiny.samples()[3]).convert("RGB").crop((0, 0, 64, 48))
    expected = defender(rgb)

    grey, alpha = rgb.convert("L"), rgb.copy()
    alpha.putalpha(128)
    torch.testing.assert_close(defender(alpha).logits, expected.logits)
    torch.testing.assert_close(defender(grey).logits, defender(grey.convert("RGB")).logits)

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    turned = tmp_path / "turned.png"
    rgb.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    torch.testing.assert_close(defender(turned).logits, expected.logits)

    cut = tmp_path / "cut.png"
    cut.write_bytes(turned.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"images: .*cut\.png' cannot be read"):
        defender(cut)
    with pytest.raises(ValueError, match=r"images\[1\]: .*nothing\.png' does not exist"):
        defender([turned, tmp_path / "nothing.png"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("empty", [[], torch.zeros(0, 3, 40, 48)])
def test_an_empty_batch(method: str, empty: Any) -> None:
    result = defender_of("open_clip", method=method)(empty)
    size = (32, 32) if isinstance(empty, list) else (40, 48)
    assert len(result) == 0
    assert result.logits.shape == result.probs.shape == (0, 5)
    assert result.images.shape == result.delta.shape == (0, 3, *size)
    assert result.labels.shape == result.drift.shape == result.seeds.shape == (0,)
    assert result.flagged.dtype == torch.bool
    assert result.topk(2)[1].shape == (0, 2)


def test_the_result_owns_its_tensors() -> None:
    x, seeds = pictures("open_clip", 2), torch.tensor([3, 4])
    defender = defender_of("open_clip")
    for given in (x, x[0]):
        result = defender(given, seeds[: 2 if given.ndim == 4 else 1])
        inputs, images = result.inputs.clone(), result.inputs + result.delta
        given.zero_()  # a caller's buffer, used again
        assert torch.equal(result.inputs, inputs)
        torch.testing.assert_close(result.images, images.clamp(0, 1))
    result = defender(x, seeds)
    seeds += 1
    assert result.seeds.tolist() == [3, 4]


# Seeds and batches


def test_what_seeds_mean() -> None:
    x, defender = pictures("open_clip", 4), defender_of("open_clip", method="rn")
    one, two = defender(x), defender(x)
    assert len({*one.seeds.tolist(), *two.seeds.tolist()}) == 8
    assert not torch.equal(one.delta, two.delta)
    seven = defender(x, 7)
    assert torch.equal(seven.seeds, scc_fast.image_seeds(7, 4))
    assert torch.equal(seven.seeds[:2], defender(x[:2], 7).seeds)
    assert not set(seven.seeds.tolist()) & set(defender(x, 8).seeds.tolist())
    assert torch.equal(defender(x, 7).delta, seven.delta)
    given = torch.tensor([5, -(2**63), 2**63 - 1, 5])
    result = defender(x[:1].expand(4, -1, -1, -1), given)
    assert torch.equal(result.seeds, given)
    assert torch.equal(result.delta[0], result.delta[3])
    assert not torch.equal(result.delta[0], result.delta[1])
    assert torch.equal(defender(x, one.seeds).delta, one.delta)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_see_its_batch(kind: str) -> None:
    x = pictures(kind, 4)
    whole = defender_of(kind)(x, 2)
    for i in (0, 3):
        assert_same(defender_of(kind)(x[i : i + 1], whole.seeds[i : i + 1]), whole, [i])
    order = [2, 0, 3, 1]
    assert_same(defender_of(kind)(x[order], whole.seeds[order]), whole, order)


# Four views an image: the encoder sees at most max_batch pictures at once.
@pytest.mark.parametrize("max_batch", [1, 13, 16])
def test_split_batches(max_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, whole = pictures("hf_clip", 4), defender_of("hf_clip")
    sizes: list[int] = []
    split = defender_of("hf_clip", max_batch=max_batch)
    run = drive.run

    def counted(session: Any, defense: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        return run(session, defense, batch)

    with monkeypatch.context() as patch:
        patch.setattr(drive, "run", counted)
        result = split(x, 2)
    assert_same(result, whole(x, 2))
    assert torch.equal(result.seeds, whole(x, 2).seeds)
    assert sizes == {1: [1, 1, 1, 1], 13: [3, 1], 16: [4]}[max_batch]
    assert set(result.timings) == {"input", "defense", "total"}


# Configurations


def test_configs() -> None:
    model = model_of("open_clip")
    assert Defender(model, FIVE).config == SCCConfig()
    config = TTCConfig(epsilon="8/255", steps=1)  # type: ignore[arg-type]
    assert Defender(model, FIVE, method="ttc", config=config).config is config
    assert Defender(model, FIVE, config={"epsilon": "2/255"}).config.epsilon == 2 / 255
    own = scc_fast.load_model(small_open_clip(), tokenizer=small_tokenizer)
    own.defaults = {"scc": {"epsilon": 3 / 255, "tau": 0.5}}
    assert Defender(own, FIVE).config == SCCConfig(epsilon=3 / 255, tau=0.5)
    assert Defender(own, FIVE, config={"tau": 0.1}).config == SCCConfig(epsilon=3 / 255, tau=0.1)
    assert Defender(own, FIVE, config=SCCConfig()).config == SCCConfig()
    own.flip = False
    assert not any(view.flip for view in Defender(own, FIVE).views(32))
    assert any(view.flip for view in Defender(own, FIVE, config={"flip": True}).views(32))
    alone = Defender(own, FIVE, config={"spatial": False})
    assert len(alone.views(32)) == 1


def test_scc_without_its_parts_is_ttc() -> None:
    x = pictures("tiny", 2)
    bare = defender_of("tiny", config={"semantic": False, "spatial": False})
    assert_same(bare(x, 4), defender_of("tiny", method="ttc")(x, 4))
