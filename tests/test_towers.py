"""Which models the runner takes, and that whatever else a model may hold is left to its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from scc_fast.api import Defender
from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from import tower_of
from tower_models import (
    FAMILIES,
    load,
    open_clip_model,
    refused,
)

# Per family: the image tower, its last block, and by their names there an MLP's first layer, the
# activation, a norm, an attention, and the attention's output layer.
PLACES = {
    "open_clip": ("visual", "transformer.resblocks.1", "mlp.c_fc mlp.gelu ln_2 attn attn.out_proj"),
    "timm": ("visual", "trunk.blocks.1", "mlp.fc1 mlp.act norm2 attn attn.proj"),
    "clip": (
        "vision_model",
        "encoder.layers.1",
        "mlp.fc1 mlp.activation_fn layer_norm2 self_attn self_attn.out_proj",
    ),
}
PLACES["siglip"] = PLACES["clip"]
EACH = pytest.mark.parametrize("family", FAMILIES)


class Place:
    """One part of the last block of a small model, as scc_fast holds it."""

    def __init__(self, family: str, number: int) -> None:
        tower, block, names = PLACES[family]
        self.model = load(FAMILIES[family]())
        self.tower: Any = self.model.module.get_submodule(tower)
        self.block: Any = self.tower.get_submodule(block)
        *above, self.name = names.split()[number].split(".")
        self.above: Any = self.block.get_submodule(".".join(above))

    @property
    def part(self) -> Any:
        return getattr(self.above, self.name)

    @part.setter
    def part(self, new: nn.Module) -> None:
        new.eval()
        setattr(self.above, self.name, new)

    def refused(self, *why: str) -> None:
        refused(self.model, *why)


def linear(family: str) -> Place:
    return Place(family, 0)


def activation(family: str) -> Place:
    return Place(family, 1)


def norm(family: str) -> Place:
    return Place(family, 2)


def attention(family: str) -> Place:
    return Place(family, 3)


def output(family: str) -> Place:
    return Place(family, 4)


@EACH
def test_all_families_are_taken_as_they_are(family: str) -> None:
    for place in (linear, activation, norm, attention, output):
        assert isinstance(tower_of(place(family).model), Tower)


class Adapted(nn.Linear):
    """A linear layer with an adapter inside, as some libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.mean()


class Beside(nn.Module):
    """A linear layer with an adapter beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)
        self.weight, self.bias = base.weight, base.bias
        self.up = nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@EACH
@pytest.mark.parametrize("place", [linear, output])
def test_adapters(family: str, place: Callable[[str], Place]) -> None:
    at = place(family)
    plain = at.part
    at.part = Beside(plain)
    at.refused("Beside, which the runner does not know", at.name)
    at.part = Adapted(plain.in_features, plain.out_features)
    at.refused("Adapted, which the runner does not know")
    at.part = plain
    assert isinstance(tower_of(at.model), Tower)
    nn.utils.parametrizations.weight_norm(plain)
    at.refused("Parametrized")


def test_an_adapter_on_the_projection() -> None:
    at = linear("clip")
    at.model.module.visual_projection = Adapted(64, 48).eval()
    at.refused("visual_projection is a ", "Adapted")
    at = linear("timm")
    at.tower.head.proj = Adapted(64, 48).eval()
    at.refused("visual.head.proj is a ", "Adapted")


@EACH
def test_hooks(family: str) -> None:
    at = linear(family)
    for register in (
        at.part.register_forward_hook,
        at.part.register_forward_pre_hook,
        at.part.register_full_backward_hook,
        at.tower.register_forward_hook,
    ):
        handle = register(lambda *_: None)
        at.refused("has a hook")
        handle.remove()
    assert isinstance(tower_of(at.model), Tower)


@EACH
def test_changed_methods(family: str) -> None:
    for place in (linear, activation, norm, attention, output):
        at = place(family)
        at.part.forward = at.part.forward
        at.refused(f"{at.name}.forward was replaced")
    at = linear(family)
    at.tower.forward = lambda x: x
    at.refused(".forward was replaced")
    at = linear(family)
    name = "get_image_features" if family in ("clip", "siglip") else "encode_image"
    setattr(at.model.module, name, lambda *_, **__: torch.zeros(1, 48))
    at.refused(f"model.{name} was replaced")
    at = linear(family)
    at.model._image_features = lambda pixels: pixels.mean((2, 3))
    at.refused("_image_features was replaced")
    at = linear(family)
    at.model.encode_image = lambda pixels: pixels.mean((2, 3))
    at.refused("has an encode_image of its own")


class Handed:
    """A user's model that hands on what it does not say itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Doubled(Handed):
    def encode_image(self, pixels: Tensor) -> Tensor:
        return 2 * self.inner.encode_image(pixels)


def test_wrappers() -> None:
    inner = load(open_clip_model())
    assert isinstance(tower_of(Handed(inner)), Tower)
    assert "Doubled has an encode_image of its own" in str(tower_of(Doubled(inner)))
    inner.__class__ = type("Changed", (type(inner),), {})
    assert "Changed is not an adapter of scc_fast's" in str(tower_of(inner))
    assert "object has an encode_image of its own" in str(tower_of(object()))


@EACH
def test_subclasses(family: str) -> None:
    """Of the model, of the tower and of a block."""
    for path in ("", PLACES[family][0], ".".join(PLACES[family][:2])):
        model = load(FAMILIES[family]())
        part = model.module.get_submodule(path)
        part.__class__ = type("Changed", (type(part),), {"__module__": "elsewhere"})
        assert "elsewhere.Changed" in str(tower_of(model))


@EACH
def test_other_activations(family: str) -> None:
    at = activation(family)
    at.part = nn.ReLU()
    at.refused("torch.nn.modules.activation.ReLU, which the runner does not know")
    at.part = nn.Identity()
    at.refused("Identity is not ")


def test_an_activation_is_known_by_its_values() -> None:
    at = activation("siglip")
    at.part = transformers.activations.GELUActivation()
    assert isinstance(tower_of(at.model), Tower)
    at.part.act = F.relu
    at.refused("GELUActivation computes none of the three GELUs")


@EACH
def test_other_norms(family: str) -> None:
    at = norm(family)
    for new in (nn.RMSNorm(64), nn.Identity(), nn.LayerNorm(64, elementwise_affine=False)):
        at.part = new
        at.refused(type(new).__name__)
    at.part = nn.LayerNorm((17, 64))
    at.refused("is over several dimensions")
    at.part = nn.LayerNorm(64, bias=False)
    at.refused("no weight or no bias")


@EACH
def test_states_of_the_module(family: str) -> None:
    at = linear(family)
    at.model.module.train()
    at.refused("is in training mode")
    at = linear(family)
    at.part.weight = nn.Parameter(at.part.weight.to("meta"))
    at.refused("weight is on the meta device")
    at = linear(family)
    at.part.weight = nn.Parameter(at.part.weight.to(torch.int8), requires_grad=False)
    at.refused("torch.int8")
    at = linear(family)
    at.model.image_size = (40, 40)
    at.refused("image_size 40x40 is not 16 patches of side 8")
    at.model.image_size = (32, 36)
    at.refused("image_size 32x36")


class Quantised(Tensor):
    """A tensor that says itself what a product with it is."""


@EACH
def test_weights_of_another_kind(family: str) -> None:
    at = linear(family)
    other = at.part.weight.detach().as_subclass(Quantised)
    at.part.weight = nn.Parameter(other)
    at.refused("Quantised")


# ------------------------------------------------------------------------------- from the outside


@EACH
def test_a_defender_says_why_and_takes_the_modules(family: str) -> None:
    at = linear(family)
    assert Defender(at.model, ["a", "b"], engine="runner").engine == "runner"
    at.part.register_forward_hook(lambda *_: None)
    assert Defender(at.model, ["a", "b"]).engine == "eager"
    why = rf"engine='runner' cannot serve .*{at.name} \(torch.nn.modules.linear.Linear\) has a hook"
    with pytest.raises(RuntimeError, match=why):
        Defender(at.model, ["a", "b"], engine="runner")


@EACH
def test_nothing_is_kept_but_the_weights(family: str) -> None:
    """A runner sees the model's own storage, and building one changes nothing."""
    at = linear(family)
    before = copy.deepcopy(at.model.module.state_dict())
    tower = tower_of(at.model)
    assert isinstance(tower, Tower)
    assert tower.blocks[1].mlp.up.weight.data_ptr() == at.part.weight.data_ptr()
    after = at.model.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
