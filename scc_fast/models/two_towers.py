"""Models from any image encoder and any texts: CNNs, self-supervised encoders with a probe."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from scc_fast import _devices
from scc_fast._plain import plain
from scc_fast.config import nearest, one_of, python_number, shown, within
from scc_fast.models.checkpoints import frozen_twin
from scc_fast.models.model import FrozenModel
from scc_fast.models.objects import DTYPES, check_features, check_weights
from scc_fast.models.preprocess import triple

Texts = Callable[[list[str]], Tensor] | Mapping[str, Any]
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_LOCK = threading.RLock()


class TwoTowers(FrozenModel):
    """Image encoder and texts that share an embedding space.

    Logits are logit_scale · cos(f(x), t_k) + logit_bias: lengths of features and texts, and a
    probe's bias, have no effect. The encoder runs on its own modules (engine "eager" or "compile").

    Args:
        image: module or function, (B, 3, H, W) normalised pixels to (B, D), differentiable with
            respect to the pixels. Of a module a frozen copy in eval mode is taken, which a
            Defender copies anew; the state of a function is the caller's.
        text: function, K prompts to (K, D); or a mapping from each prompt to its D numbers, such
            as ``dict(zip(names, probe.weight, strict=True))`` of a cosine probe. Commands ask for
            the data set's whole prompts. None: Defender takes ``text_features=``.
        size: (height, width) of the pixels, or one side.
        mean, std: three numbers each, that normalise pixels in [0, 1].
        logit_scale: the factor itself, not its logarithm.
        logit_bias: of all logits.
        name: of the model, in tables and file names.
        device: default: the module's own, else the CPU.
        interpolation: of resizing: "bicubic" or "bilinear".
        resize_mode: "shortest" (with a centre crop), "longest" (with a border) or "squash".
        flip: False if a mirrored picture may be another class.
        defaults: overrides of a method's config, by method.

    Raises:
        TypeError, ValueError: an invalid argument, or an encoder that fails on a black picture.

    Example:
        >>> colour = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
        >>> names = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
        >>> model = TwoTowers(colour, names, size=8)
        >>> model.encode_text(["green", "red"])
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """

    kind = "two_towers"
    whole = False

    def __init__(
        self,
        image: nn.Module | Callable[[Tensor], Tensor],
        text: Texts | None = None,
        *,
        size: int | tuple[int, int],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        name: str = "two-towers",
        device: torch.device | str | None = None,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        flip: bool = True,
        defaults: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        if isinstance(image, type) or not callable(image):
            raise TypeError(f"image: a module or a function is needed, got {shown(image)}")
        if isinstance(text, Tensor) or not (
            text is None or callable(text) or isinstance(text, Mapping)
        ):
            raise TypeError(
                "text: a function of prompts, or a mapping from each prompt to its features, such "
                f"as dict(zip(prompts, features)), is needed, got {shown(text)}"
            )
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: a string is needed, got {shown(name)}")
        self.name, self.source = name, f"TwoTowers({_called(image)})"
        self.image_size = _sides(size)
        self.mean, self.std = triple(mean, "mean"), triple(std, "std")
        self.interpolation = one_of("interpolation", interpolation, ("bicubic", "bilinear"))
        self.resize_mode = one_of("resize_mode", resize_mode, ("shortest", "longest", "squash"))
        self.fill_color, self.resize_edge = 0, None
        self.logit_scale = within("logit_scale", logit_scale, 1e-6, 1e6)
        self.logit_bias = within("logit_bias", logit_bias, -1e6, 1e6)
        self.as_read = self.logit_scale, self.logit_bias
        self.flip, self.templates = bool(flip), ("{}",)
        self.tokenizer: Any = None
        self.defaults = copy.deepcopy(dict(defaults or {}))
        self._function: Callable[[Tensor], Tensor] | None = None
        if isinstance(image, nn.Module):
            if any(True for _ in image.parameters()):
                check_weights(image)
            self.module = frozen_twin(image)
        else:
            self.module, self._function = nn.Module(), image
        self.read()
        if device is not None:
            self.device = _devices.find(device)
            self.module.to(self.device)
        self._text = _table(text, self.device) if isinstance(text, Mapping) else text
        self.embed_dim = self._proved()

    def read(self) -> None:
        """Read device and dtype from the module."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        self.device = first.device if first.numel() else getattr(self, "device", first.device)
        self.dtype = first.dtype if first.numel() else torch.float32
        if self.dtype not in DTYPES:
            raise ValueError(f"image: weights must be of one of {DTYPES}, got {self.dtype}")

    def _vision(self) -> nn.Module:
        return self.module

    def _image_features(self, pixels: Tensor) -> Tensor:
        found: Tensor = (self._function or self.module)(pixels)
        return found

    def _embed(self, prompts: list[str], cut: list[str]) -> Tensor:
        if self._text is None:
            raise ValueError(
                f"model: {self.name} has no text tower: give text= to TwoTowers, or Defender "
                "text_features="
            )
        if isinstance(self._text, dict):
            for prompt in prompts:
                if prompt not in self._text:
                    raise ValueError(
                        f"classes: {shown(prompt)} is not among the {len(self._text)} texts of "
                        f"{self.name}{nearest(prompt, self._text)}"
                    )
            return torch.stack([self._text[prompt] for prompt in prompts])
        given = check_features(self._text(prompts), len(prompts), "its text function")
        if given.shape[1] != self.embed_dim:
            raise ValueError(
                f"model: embeds pictures in {self.embed_dim} numbers and texts in {given.shape[1]}"
            )
        return torch.stack(
            [_row(prompt, row, self.device) for prompt, row in zip(prompts, given, strict=True)]
        )

    def _proved(self) -> int:
        """Embedding length D, from a black picture."""
        pixels = torch.zeros(1, 3, *self.image_size, device=self.device, dtype=self.dtype)
        try:
            with plain(self.device):
                found = self._image_features(pixels)
        except Exception as error:
            raise ValueError(
                f"image: {_called(self._function or self.module)} fails on a picture of size="
                f"{self.image_size}: {shown(error)}"
            ) from error
        width = check_features(found, 1, "its image tower").shape[1]
        if not found.is_floating_point() or found.device != self.device:
            raise ValueError(
                f"image: features must be real numbers on {self.device}, got {found.dtype} on "
                f"{found.device}"
            )
        known = next(iter(self._text.values())) if isinstance(self._text, dict) else found[0]
        if len(known) != width:
            raise ValueError(f"model: embeds pictures in {width} numbers and texts in {len(known)}")
        return width


def _sides(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, list | tuple) else (size, size)
    sides = tuple(map(python_number, pair))
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"size: (height, width) in pixels is needed, got {shown(size)}")
    return sides[0], sides[1]


def _table(text: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Unit rows of a mapping."""
    rows: dict[str, Tensor] = {}
    for prompt, row in text.items():
        found = _row(prompt, row, device)
        if not isinstance(prompt, str) or found.shape != next(iter(rows.values()), found).shape:
            raise ValueError(f"text: {_ROW}, got {shown(prompt)}: {shown(row)}")
        rows[prompt] = found
    if not rows:
        raise ValueError("text: the mapping is empty")
    return rows


_ROW = "every prompt needs one row of numbers, all of one length"


def _row(prompt: Any, row: Any, device: torch.device) -> Tensor:
    """A row in unit length, float32; through float64, for squares may leave float32's range."""
    try:
        found = torch.as_tensor(row).detach().to("cpu", torch.float64)
        is_row = found.ndim == 1 and len(found) > 0 and not torch.as_tensor(row).is_complex()
    except (TypeError, ValueError, RuntimeError):
        is_row = False
    if not is_row:
        raise ValueError(f"text: {_ROW}, got {shown(prompt)}: {shown(row)}")
    largest = found.abs().amax()
    if not bool(largest > 0) or not bool(largest.isfinite()):
        raise ValueError(f"text: the row of {shown(prompt)} must be finite and not zero")
    return nn.functional.normalize(found / largest, dim=-1).to(device, torch.float32)


def is_factory(name: object) -> bool:
    """Whether a model's name is package.module:factory."""
    return isinstance(name, str) and _FACTORY.fullmatch(name) is not None


def from_factory(name: str, device: torch.device) -> Any:
    """What package.module:factory returns; the working directory is searched, too.

    Called with ``device=`` if it takes that, else without arguments.

    Raises:
        ValueError: no such module or function, or it fails.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    with _LOCK:
        sys.path.insert(0, here)
        try:
            found = importlib.import_module(module)
            make = getattr(found, attribute, None)
            if callable(make):
                takes = "device" in inspect.signature(make).parameters
                return make(device=device) if takes else make()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"model: {name!r}: {error}; modules are looked for among the installed ones and in "
                f"{here}"
            ) from error
        except Exception as error:
            raise ValueError(
                f"model: {name!r} fails: {type(error).__name__}: {shown(str(error))}"
            ) from error
        finally:
            sys.path.remove(here)
    known = [key for key, value in vars(found).items() if callable(value)]
    raise ValueError(
        f"model: {name!r}: {module} has no function {attribute}{nearest(attribute, known)}"
    )


def _called(image: Any) -> str:
    return getattr(image, "__name__", type(image).__name__)
