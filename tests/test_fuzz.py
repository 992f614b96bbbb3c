"""Random calls, sensible and senseless: a right answer or a short refusal, and nothing else moved.

SCC_FAST_FUZZ=100000 is the long run; without it a few hundred calls, the same every time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor

import scc_fast
from scc_fast.config import View
from scc_fast.defenses import DEFENSES

COUNT = int(os.environ.get("SCC_FAST_FUZZ", "200"))
LONGEST = 600  # characters of a refusal
METHODS = tuple(DEFENSES)

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def model() -> Any:
    """A CLIP of 32 pixels with random weights, spread out so that labels are not all the same."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    net = open_clip.model.CLIP(24, vision, text).eval()
    return scc_fast.load_model(net, tokenizer=SimpleTokenizer(context_length=16), device="cpu")


# ----------------------------------------------------------------------------------------- configs

_NUMBERS = (0, 1, 2, 3, 0.0, 0.5, 1.0, 4 / 255, 0.2, np.float32(0.25), np.int64(2), True, "1/255")
_COUNTS = (0, 1, 2, 3, np.int64(2), np.int32(1), 2.0)  # what is slow is not what is looked for
_NONSENSE = (
    None,
    -1,
    1e30,
    10**30,
    float("nan"),
    float("-inf"),
    "x" * 5000,
    "",
    "4/0",
    [],
    list(range(3000)),
    {},
    np.zeros(3),
    torch.zeros(2),
    object(),
    b"1",
    1 + 2j,
)
_VIEWS = (
    "geometric",
    "paper",
    (View(),),
    [View(), View(flip=True), View(shift=(2, -1))],
    (View(), View(noise=0.05)),
    [{}, {"flip": True}],
    [View(), View(shift=(300, 0))],
    [View(flip=True)],
    [View(), 3],
    "none",
    np.array([1, 2]),
)


def _value(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """A value for a field: three times of four one of its kind."""
    if field.name == "views":
        kind: tuple[Any, ...] = _VIEWS
    elif isinstance(field.default, bool) or field.name == "flip":
        kind = (True, False, np.True_)
    elif type(field.default) is int:
        kind = _COUNTS
    else:
        kind = _NUMBERS
    usual = st.sampled_from(kind)
    return st.one_of(usual, usual, usual, st.sampled_from(_NONSENSE))


_CHEAP = {"r_tpt": {"view_count": 3}, "hd": {"steps": 2}}  # their own are slow


@st.composite
def configs(draw: Any, method: str) -> Any:
    """None, a dict of some fields, a config object, or what is none of these."""
    fields = dataclasses.fields(DEFENSES[method].Config)
    names = draw(st.sets(st.sampled_from([f.name for f in fields]), max_size=3)) if fields else ()
    values = {f.name: draw(_value(f)) for f in fields if f.name in names}
    values = {**_CHEAP.get(method, {}), **values}
    odd = draw(st.integers(0, 39))
    if odd == 0:
        return draw(st.sampled_from((3, "fast", [], {"no_such_field": 1}, {3: 3}, NotImplemented)))
    return values or None


# ------------------------------------------------------------------------------------------ images

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
_MODES += ("HSV", "I", "I;16", "I;16B", "F")
_SIDES = st.one_of(st.sampled_from((1, 2, 7, 31, 32, 33, 64)), st.integers(1, 300))


def _pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def _picture(mode: str, height: int, width: int, seed: int) -> Image.Image:
    eight = (_pixels(seed, height, width, 3) * 255).astype(np.uint8)
    picture = Image.fromarray(eight)
    if mode == "PA":
        return picture.convert("P").convert("PA")
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), eight.tobytes())
    if mode in ("I;16", "I;16B"):
        grey = (eight[..., 0].astype(np.uint16) * 257).astype(">u2" if mode[-1] == "B" else "<u2")
        return Image.frombytes(mode, (width, height), grey.tobytes())
    if mode == "La":
        return picture.convert("LA").convert("La")
    if mode == "RGBa":
        return picture.convert("RGBA").convert("RGBa")
    return picture.convert(mode)


def _encoded(form: str, height: int, width: int, seed: int) -> bytes:
    picture, file = _picture("RGB", height, width, seed), io.BytesIO()
    if form == "animated":
        picture.save(file, "GIF", save_all=True, append_images=[picture.rotate(90)])
    elif form == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(file, "JPEG", exif=exif)
    elif form == "broken exif":
        picture.save(file, "PNG", exif=b"Exif\x00\x00" + b"\xff" * 20)
    else:
        picture.save(file, form)
    return file.getvalue()


_FORMS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "animated", "rotated", "broken exif")


@st.composite
def tensors(draw: Any) -> Tensor:
    """Batches: of every shape and layout, most of them right."""
    batch, height, width = draw(st.integers(0, 5)), draw(_SIDES), draw(_SIDES)
    x = torch.from_numpy(_pixels(draw(st.integers(0, 99)), batch, 3, height, width))
    change = draw(
        st.sampled_from(
            ("none",) * 8
            + ("uint8", "dtype", "dtype", "one", "zero", "channels last", "strided", "expanded")
            + ("gradient", "nan", "inf", "255", "negative", "outside", "int64", "bool", "4", "grey")
            + ("flat", "5d", "row", "sparse", "meta", "complex", "a little outside")
        )
    )
    changes: dict[str, Callable[[], Tensor]] = {
        "uint8": lambda: (x * 255).to(torch.uint8),
        "dtype": lambda: x.to(draw(st.sampled_from(_DTYPES))),
        "one": lambda: torch.ones_like(x),
        "zero": lambda: torch.zeros_like(x),
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "strided": lambda: x.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda: x[:, :1].expand(-1, 3, -1, -1),
        "gradient": lambda: x.clone().requires_grad_(),
        "nan": lambda: torch.where(x < 0.5, x, torch.nan),
        "inf": lambda: x / 0,
        "255": lambda: x * 255,
        "negative": lambda: x - 0.5,
        "outside": lambda: x + 0.01,
        "a little outside": lambda: x * (1 + 2e-7),
        "int64": lambda: (x * 255).long(),
        "bool": lambda: x > 0.5,
        "4": lambda: torch.cat([x, x[:, :1]], 1),
        "grey": lambda: x[:, :1],
        "flat": lambda: x.flatten(),
        "5d": lambda: x[None],
        "row": lambda: x[0] if len(x) else x,
        "sparse": lambda: x.to_sparse(),
        "meta": lambda: x.to("meta"),
        "complex": lambda: torch.complex(x, x),
    }
    return changes.get(change, lambda: x)()


@st.composite
def arrays(draw: Any) -> np.ndarray:
    """NumPy's pictures, channels last or grey."""
    height, width = draw(_SIDES), draw(_SIDES)
    shape = draw(
        st.sampled_from(((), (3,), (4,), (1,), (2,), (5, 3), (3, 3)))
    )  # after H and W; two numbers are a batch and its channels
    shape = (height, width, *shape) if len(shape) < 2 else (shape[0], height, width, shape[1])
    pixels = _pixels(draw(st.integers(0, 99)), *shape)
    kind = draw(st.sampled_from(("uint8", "uint8", "float32", "float64", "float16", "int64", "U3")))
    if kind == "uint8":
        return (pixels * 255).astype(np.uint8)
    return (pixels * 255).astype(kind) if kind == "int64" else pixels.astype(kind)


@st.composite
def pictures(draw: Any) -> Any:
    """PIL pictures, encoded bytes, file objects."""
    height, width, seed = draw(_SIDES), draw(_SIDES), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(("pil", "pil", "bytes", "file", "damaged", "none")))
    if kind == "pil":
        return _picture(draw(st.sampled_from(_MODES)), height, width, seed)
    if kind == "none":
        return draw(
            st.sampled_from((None, 3, b"", "no/such/file.png", "https://a.b/c.png", "", "~x/y", {}))
        )
    data = _encoded(draw(st.sampled_from(_FORMS)), height, width, seed)
    if kind == "damaged":
        cut = draw(st.integers(0, len(data) - 1))
        data = data[:cut] if draw(st.booleans()) else data[:cut] + b"\xff" + data[cut + 1 :]
    return io.BytesIO(data) if kind == "file" else data


images = st.one_of(
    tensors(),
    tensors(),
    arrays(),
    pictures(),
    st.lists(pictures(), max_size=4),
    st.lists(st.one_of(pictures(), tensors(), arrays()), max_size=3),
)

# ----------------------------------------------------------------------- classes, seeds, all of it

_WORDS = st.sampled_from(("a dog", "a cat", "a red apple", "", "Ω", "a dog " * 60, "{}", "a cat "))
classes = st.one_of(
    st.lists(_WORDS, min_size=2, max_size=5),
    st.lists(_WORDS, min_size=2, max_size=5, unique=True).map(tuple),
    st.lists(_WORDS, min_size=2, max_size=3).map(lambda words: np.array(words, dtype=object)),
    st.sampled_from(("a dog", [], ["a dog"], None, 3, ["a dog", 3], [["a dog"], "a cat"])),
)
seeds = st.one_of(
    st.sampled_from((0, 1, -1, 2**63, 2**64 - 1, np.int64(3))),
    st.sampled_from((2**64, "0", 1.5, True, [1, 2], (3,), np.arange(2), torch.arange(3))),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "engine": st.sampled_from(("auto", "eager", "runner", "graph", "fast", 3)),
        "backend": st.sampled_from(("auto", "cpp", "reference", None, "cuda")),
        "precision": st.sampled_from(("auto", "fp32", "fp64", "half")),
        "max_batch": st.sampled_from((None, 1, 3, 64, 0, "8", 2.5)),
    },
)


def _usual(usual: st.SearchStrategy[Any], any_: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Seven times of eight the first: else nearly every call would be refused for something."""
    return st.integers(0, 7).flatmap(lambda die: any_ if die == 0 else usual)


@dataclasses.dataclass
class Call:
    method: str
    config: Any
    classes: Any
    options: dict[str, Any]
    images: Any
    seeds: Any
    is_normalized: bool


@st.composite
def calls(draw: Any) -> Call:
    method = draw(st.sampled_from(METHODS))
    return Call(
        method,
        draw(_usual(st.just(_CHEAP.get(method)), configs(method))),
        draw(_usual(st.just(["a dog", "a cat", "a red apple"]), classes)),
        draw(_usual(st.just({}), options)),
        draw(images),
        draw(_usual(st.just(0), seeds)),
        draw(_usual(st.just(False), st.booleans())),
    )


# -------------------------------------------------------------------------------------- invariants


def _held(value: Any) -> Any:
    """What a caller would notice of a change in what was handed over."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not value.is_meta
        kept = value.detach().clone() if dense else None
        return kept, value.requires_grad, value.grad is None
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    if isinstance(value, io.BytesIO):
        return value.getvalue(), value.closed
    if isinstance(value, list | tuple):
        return [_held(item) for item in value]
    return value if isinstance(value, str | bytes | int | float | None) else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one, other) or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _world() -> Any:
    """The global generators, and the model's weights and modes."""
    state: Any = np.random.get_state()  # noqa: NPY002
    module = model().module
    return [
        torch.get_rng_state(),
        np.asarray(random.getstate()[1]),
        state[1],
        [value.detach().clone() for value in module.state_dict().values()],
        [(part.training, len(part._forward_hooks)) for part in module.modules()],
        [(p.requires_grad, p.grad is None) for p in module.parameters()],
        torch.is_grad_enabled(),
        torch.get_default_dtype() == torch.float32,
    ]


def _answer(call: Call, images: Any, seeds: Any) -> Any:
    defender = scc_fast.Defender(
        model(), call.classes, method=call.method, config=call.config, **call.options
    )
    return defender, defender(images, seeds, is_normalized=call.is_normalized)


def _bits(result: Any) -> list[Tensor]:
    return [result.logits, result.delta, result.inputs, result.drift, result.flagged, result.seeds]


def check(call: Call) -> str:
    """ "refused" or "answered"; AssertionError where an invariant does not hold."""
    before, world = _held(call.images), _world()
    refusal: Exception | None = None
    try:
        defender, result = _answer(call, call.images, call.seeds)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        refusal = error
    if refusal is None:
        _check_result(defender, result, call)
    else:
        assert 10 < len(str(refusal)) < LONGEST, str(refusal)
        assert "truth value" not in str(refusal)
    if type(refusal) is RuntimeError:  # an engine, backend or precision asked for by name
        asked = [
            call.options[key] for key in ("engine", "backend", "precision") if key in call.options
        ]
        assert any(repr(value)[1:-1] in str(refusal) for value in asked), str(refusal)
    assert _same(before, _held(call.images)), "the images were changed"
    assert _same(world, _world()), "the model or a global generator was touched"
    return "refused" if refusal else "answered"


def _check_result(defender: Any, result: Any, call: Call) -> None:
    batch, count = len(result), len(defender.classes)
    assert result.logits.shape == (batch, count)
    assert result.logits.dtype == torch.float32
    assert result.logits.isfinite().all()
    assert result.probs.sum(dim=1).sub(1).abs().le(1e-5).all()
    assert torch.equal(result.labels, result.logits.argmax(dim=1))
    pixels, inputs = result.images, result.inputs
    assert pixels.shape == inputs.shape
    assert pixels.shape[:2] == (batch, 3)
    assert pixels.isfinite().all()
    assert pixels.ge(0).all()
    assert pixels.le(1).all()
    epsilon = getattr(defender.config, "epsilon", 0.0)
    if epsilon is not None:  # None: the method's own published form, which has no ball
        assert (pixels - inputs).abs().le(epsilon + 1e-6).all()
    _, again = _answer(call, result.inputs, result.seeds) if not call.is_normalized else (0, result)
    assert all(map(_same, _bits(result), _bits(again))), "the same seeds gave another result"
    if batch > 1 and not call.is_normalized:
        _, alone = _answer(call, result.inputs[-1:], result.seeds[-1:])
        last = result.logits[-1:]
        assert torch.allclose(alone.logits, last, rtol=1e-3, atol=2e-3), (
            f"a row alone is {float((alone.logits - last).abs().max())} off"
        )


@settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    derandomize=COUNT <= 200,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(call=calls())
def test_a_random_call_is_answered_or_refused(call: Call) -> None:
    check(copy.copy(call))


def test_paths_are_read_or_refused(tmp_path: Path) -> None:
    """Every form as a file, whole, cut in half, and empty."""
    for form in _FORMS:
        data, path = _encoded(form, 40, 50, 1), tmp_path / f"{form}.dat"
        wants = []
        for content in (data, data[: len(data) // 2], b""):
            path.write_bytes(content)
            call = Call("none", None, ["a dog", "a cat"], {}, path, 0, False)
            wants.append(check(call))
        assert wants[0] == "answered", form
        assert wants[2] == "refused", form
