"""A Defender stands on the weights that it was made with; the runner on the modules' own code."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import open_clip.transformer
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scc_fast
from scc_fast import DefendedCLIP, Defender
from scc_fast.engine.snapshot import digest, not_finite

pytestmark = pytest.mark.quick

CLASSES = ["a dog", "a cat", "a red apple"]
ENGINES = ["eager", "runner"]


def tiny() -> Any:
    return scc_fast.load_model("tiny", device="cpu")


def net() -> nn.Module:
    """A model that is the caller's own."""
    return copy.deepcopy(tiny().module)


def wrapped(module: nn.Module) -> Any:
    return scc_fast.load_model(module, tokenizer=tiny().tokenizer)


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def undefended(model: Any, **options: Any) -> Defender:
    return Defender(model, CLASSES, method="none", **options)


def logits(defender: Defender) -> Tensor:
    return defender(pictures(), 0).logits


def trained(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), 0.01, fused=True)
    for parameter in module.parameters():
        parameter.requires_grad_().grad = torch.randn_like(parameter)
    optimizer.step()


def by_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.1)


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)


def swapped(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = 1.1 * parameter.data


def loaded(module: nn.Module) -> None:
    module.load_state_dict({key: 1.1 * value for key, value in module.state_dict().items()})


WRITES = [trained, by_data, in_place, swapped, loaded]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_later(write: Callable[[nn.Module], None], engine: str) -> None:
    model = tiny()
    old = undefended(model, engine=engine)
    before = logits(old)
    write(model.module)
    assert torch.equal(logits(old), before)
    live = pictures().requires_grad_()
    with torch.enable_grad():
        torch.testing.assert_close(old.run(live, torch.arange(2)).logits.detach(), before)
    new = undefended(model, engine=engine)
    fresh = undefended(wrapped(copy.deepcopy(model.module)), engine=engine)
    torch.testing.assert_close(logits(new), logits(fresh))
    assert (logits(new) - before).abs().max() > 0.1
    old.refresh()
    assert torch.equal(logits(old), logits(new))
    torch.testing.assert_close(old.text_features, fresh.text_features)
    assert old.session.table.scale == fresh.session.table.scale


def test_equal_weights_are_held_once() -> None:
    model = tiny()
    first, second = undefended(model), Defender(model, CLASSES)
    assert first.snapshot is second.snapshot
    assert first.session.encoder is second.session.encoder
    assert undefended(tiny()).snapshot is not first.snapshot
    by_data(model.module)
    other = undefended(model)
    assert other.snapshot is not first.snapshot
    model.module.visual.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    assert undefended(model).snapshot is not other.snapshot
    assert first.snapshot.module.transformer is None  # the text side is not copied
    gone = weakref.ref(first.snapshot)
    del first, second
    gc.collect()
    assert gone() is None


def test_a_digest_is_of_the_bytes() -> None:
    base = torch.randn(3, 101)
    same = digest([base])
    assert digest([base.clone().T.contiguous().T]) == same
    for where in ([0, 2], [1, 3], [0, 302], [301, 302]):
        flipped, moved = base.clone().flatten(), base.clone().flatten()
        flipped[where] *= -1
        moved[where] = moved[where[::-1]]
        assert digest([flipped]) != same
        assert digest([moved]) != same
    assert digest([base, base[:1]]) != digest([base[:1], base])
    assert digest([torch.zeros(3), torch.tensor(True)]) != digest([torch.zeros(3)])
    assert digest([base.bfloat16()[:, 1:]]) == digest([base.bfloat16()[:, 1:].clone()])


def test_copies_and_pickles() -> None:
    model = tiny()
    defender = Defender(model, CLASSES)
    before = logits(defender)
    copies = [copy.copy(defender), copy.deepcopy(defender), pickle.loads(pickle.dumps(defender))]
    by_data(model.module)
    for one in copies:
        assert one.engine == defender.engine
        assert torch.equal(logits(one), before)


def test_a_model_without_modules_is_asked_as_it_is() -> None:
    class Own:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def encode_image(self, pixels: Tensor) -> Tensor:
            return self.inner.encode_image(pixels)

    model = Own(tiny())
    defender = undefended(model)
    before = logits(defender)
    by_data(model.inner.module)
    assert defender.snapshot is model
    assert (logits(defender) - before).abs().max() > 0.1


# ----------------------------------------------------------------------------------- the runner


def scaled(function: Any) -> Any:
    return lambda *args, **options: 1.1 * function(*args, **options)


CHANGES = {
    "class": (open_clip.transformer.LayerNorm, "forward"),
    "method": (open_clip.transformer.ResidualAttentionBlock, "attention"),
    "function": (F, "layer_norm"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_code_that_was_replaced(monkeypatch: pytest.MonkeyPatch, change: str, when: str) -> None:
    place, name = CHANGES[change]
    model = tiny()
    text = undefended(model).text_features
    made = Defender(model, text_features=text, method="none") if when == "after" else None
    insists = Defender(model, text_features=text, method="none", engine="runner")
    plain = logits(insists)
    monkeypatch.setattr(place, name, scaled(getattr(place, name)))
    defender = made or Defender(model, text_features=text, method="none")
    modules = Defender(model, text_features=text, method="none", engine="eager")
    result = defender(pictures(), 0)
    assert result.engine == "eager"
    torch.testing.assert_close(result.logits, logits(modules))
    assert (result.logits - plain).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match=r"engine='runner' cannot serve tiny: .*differ"):
        logits(insists)
    assert (undefended(model).text_features - text).abs().max() > 1e-4  # embedded anew
    monkeypatch.undo()
    result = defender(pictures(), 0)
    assert result.engine == ("runner" if when == "after" else "eager")  # which was chosen when made
    torch.testing.assert_close(result.logits, plain)
    assert torch.equal(logits(insists), plain)


def test_hooks_of_all_modules_and_of_one() -> None:
    defender = undefended(tiny())
    before = logits(defender)
    part = defender.snapshot.module.visual.ln_post
    for register in (nn.modules.module.register_module_forward_hook, part.register_forward_hook):
        handle = register(lambda module, _, out: 0.5 * out if module is part else None)
        result = defender(pictures(), 0)
        assert result.engine == "eager"
        handle.remove()
        assert torch.equal(logits(defender), before)
    encode = scc_fast.api.make_defense("rn", defender.model, CLASSES).encode
    features = encode(pictures())
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 0.5 * out if module is part else None
    )
    try:
        assert (encode(pictures()) - features).abs().max() > 1e-3
    finally:
        handle.remove()


def test_a_snapshot_that_was_written_to() -> None:
    defender = undefended(tiny())
    with torch.no_grad():
        defender.snapshot.module.visual.class_embedding.add_(1.0)
    result = defender(pictures(), 0)
    assert result.engine == "eager"
    with torch.no_grad():
        want = defender.snapshot.encode_image(torch.zeros(1, 3, 64, 64))
    assert want.isfinite().all()


def test_a_snapshot_that_was_sent_to_another_process() -> None:
    """Its storages move to shared memory, as torch.multiprocessing does with what it sends."""
    defender = undefended(tiny())
    before = logits(defender)
    defender.snapshot.module.share_memory()
    result = defender(pictures(), 0)
    assert result.engine == "runner"
    assert torch.equal(result.logits, before)
    part = defender.snapshot.module.visual.ln_post.weight
    part.data = 2 * part.data  # another storage, of the same version
    assert defender(pictures(), 0).engine == "eager"


# ---------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["visual.conv1.weight", "visual.proj", "token_embedding.weight"])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    module = net()
    assert not_finite(module) == ""
    with torch.no_grad():
        module.get_parameter(name)[:] = value
    with pytest.raises(ValueError, match=rf"^model: .*{name} .*holds NaN or infinity"):
        Defender(wrapped(module), CLASSES)


def test_an_encoder_that_overflows() -> None:
    module = net()
    with torch.no_grad():
        for name, parameter in module.visual.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(1e4)
    module.half()
    for method in ("scc", "none"):
        defender = Defender(wrapped(module), CLASSES, method=method)
        calls = [
            lambda x, call=defender: call(x, 0),
            DefendedCLIP(defender, seed=0),
            lambda x, call=defender: DefendedCLIP(call, seed=0)(x.clone().requires_grad_()),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"image 0 are not finite: .*overflows in fp16"):
                call(pictures())


def test_a_logit_scale_that_is_none() -> None:
    cases = {float("nan"): "logit_scale of .* holds NaN", 100.0: r"logit scale .* \(0, 1e\+06\]"}
    for value, why in cases.items():
        module = net()
        with torch.no_grad():
            module.logit_scale.fill_(value)
        with pytest.raises(ValueError, match=why):
            undefended(wrapped(module))
    model = tiny()
    model.logit_scale = 10.0  # set by hand
    assert undefended(model).session.table.scale == 10.0
