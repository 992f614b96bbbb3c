"""Models from any image encoder and any texts: CNNs, self-supervised encoders with a probe."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from scc_fast import _devices
from scc_fast._plain import plain
from scc_fast.config import nearest, one_of, shown
from scc_fast.models.checkpoints import frozen_twin
from scc_fast.models.model import VisionLanguage
from scc_fast.models.objects import DTYPES, check_features
from scc_fast.models.preprocess import Triple, triple

Texts = Callable[[list[str]], Tensor] | Mapping[str, Any]
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class TwoTowers:
    """Image encoder and texts that share an embedding space, as a :class:`VisionLanguage`.

    Logits are logit_scale · cos(f(x), t_k) + logit_bias. The encoder runs on its own modules
    (engine "eager", or "compile").

    Args:
        image: module or function, (B, 3, H, W) normalised pixels to (B, D), differentiable with
            respect to the pixels. Of a module a frozen copy in eval mode on the same storage is
            taken; the state of a function is the caller's.
        text: function, K prompts to (K, D); or a mapping from each prompt to its D numbers, such as
            ``dict(zip(names, probe.weight))`` of a linear probe. None: Defender takes
            ``text_features=``.
        size: (height, width) of the pixels, or one side.
        mean, std: three numbers each, that normalise pixels in [0, 1].
        logit_scale, logit_bias: of the logits. A probe of unit rows has the scale of its training.
        name: of the model, in tables and file names.
        device: default: the module's own, else the CPU.
        interpolation: of resizing: "bicubic", "bilinear", "nearest" …, as Pillow names them.
        resize_mode: "shortest" (with a centre crop), "longest" (with a border) or "squash".
        flip: False if a mirrored picture may be another class.
        templates: of prompts; those of the papers' data sets take the place of these.
        defaults: overrides of a method's config, by method.

    Raises:
        TypeError, ValueError: an invalid argument, or towers that do not fit; from a trial run.

    Example:
        >>> colour = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
        >>> names = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
        >>> model = TwoTowers(colour, names, size=8)
        >>> model.encode_text(["green", "red"])
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """

    kind = "two_towers"
    fill_color = 0
    resize_edge = None

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
        templates: Sequence[str] = ("{}",),
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
        sides = (size, size) if isinstance(size, int) else size
        if (
            not isinstance(sides, list | tuple)
            or len(sides) != 2
            or any(type(side) is not int or side < 1 for side in sides)
        ):
            raise ValueError(f"size: (height, width) in pixels is needed, got {shown(size)}")
        one_of("resize_mode", resize_mode, ("shortest", "longest", "squash"))
        self.name, self.source = name, f"TwoTowers({_called(image)})"
        self.image_size: tuple[int, int] = (sides[0], sides[1])
        self.mean: Triple = triple(mean, "mean")
        self.std: Triple = triple(std, "std")
        self.interpolation, self.resize_mode = interpolation, resize_mode
        self.logit_scale, self.logit_bias = float(logit_scale), float(logit_bias)
        self.flip, self.templates = bool(flip), tuple(templates)
        self.defaults = copy.deepcopy(dict(defaults or {}))
        self.module = frozen_twin(image) if isinstance(image, nn.Module) else nn.Module()
        self._image = self.module if isinstance(image, nn.Module) else image
        parameters = list(self.module.parameters())
        held = parameters[0].device if parameters else torch.device("cpu")
        self.device = held if device is None else _devices.find(device)
        self.module.to(self.device)
        self.dtype = parameters[0].dtype if parameters else torch.float32
        if self.dtype not in DTYPES:
            raise ValueError(f"image: weights must be of one of {DTYPES}, got {self.dtype}")
        self._text = text if not isinstance(text, Mapping) else self._table(text)
        self.embed_dim = self._proved()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings (B, D) float32 of normalised pixels (B, 3, H, W), not of unit length."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixels: shape {tuple(pixels.shape)}, but {self.name} takes "
                f"(B, 3, {self.image_size[0]}, {self.image_size[1]})"
            )
        if len(pixels) == 0:
            return pixels.new_zeros(0, self.embed_dim, dtype=torch.float32)
        features = self._image(pixels.to(self.dtype))
        return check_features(features, len(pixels), "the image tower").float()

    def encode_text(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Text embeddings of unit length, (K, D) float32 on ``device``, without gradient.

        Raises:
            ValueError: no ``text``, or a prompt that its mapping lacks.
        """
        if self._text is None:
            raise ValueError(
                f"model: {self.name} has no text tower: give text= to TwoTowers, or Defender "
                "text_features="
            )
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        items = list(place)
        with plain(self.device):
            if isinstance(self._text, dict):
                for prompt in items:
                    if prompt not in self._text:
                        raise ValueError(
                            f"classes: {shown(prompt)} is none of the {len(self._text)} texts of "
                            f"{self.name}{nearest(prompt, self._text)}"
                        )
                parts = [torch.stack([self._text[prompt] for prompt in items])] if items else []
            else:
                firsts = range(0, len(items), batch_size)
                batches = [items[first : first + batch_size] for first in firsts]
                parts = [
                    check_features(self._text(batch), len(batch), "the text tower").detach()
                    for batch in batches
                ]
            if not parts:
                return torch.zeros(0, self.embed_dim, device=self.device)
            rows = torch.cat([part.to(self.device, torch.float32) for part in parts])
            index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
            return nn.functional.normalize(rows, dim=-1)[index]

    def info(self) -> dict[str, Any]:
        """Everything declared about the model, as plain values (for ``scc-fast doctor``)."""
        fields = (*VisionLanguage.__annotations__, "kind")
        result = {key: copy.deepcopy(getattr(self, key)) for key in fields}
        count = sum(p.numel() for p in self.module.parameters())
        return {**result, "device": str(self.device), "dtype": str(self.dtype), "parameters": count}

    def __repr__(self) -> str:
        height, width = self.image_size
        held = str(self.dtype).removeprefix("torch.")
        return f"TwoTowers({shown(self.name)}, {height}x{width}, {held}, {self.device})"

    @staticmethod
    def _table(text: Mapping[str, Any]) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        for prompt, row in text.items():
            try:
                found = torch.as_tensor(row).detach().float()
            except (TypeError, ValueError, RuntimeError):
                found = torch.empty(0, 0)
            known = next(iter(rows.values()), found)
            if not isinstance(prompt, str) or found.ndim != 1 or found.shape != known.shape:
                raise ValueError(
                    "text: every prompt needs one row of numbers, all of one length, got "
                    f"{shown(prompt)}: {shown(row)}"
                )
            if not bool(found.isfinite().all()) or not bool(found.any()):
                raise ValueError(f"text: the row of {shown(prompt)} must be finite and not zero")
            rows[prompt] = found
        if not rows:
            raise ValueError("text: the mapping is empty")
        return rows

    def _proved(self) -> int:
        """Embedding length D, from a trial run of both towers."""
        what = "the image tower"
        try:
            with plain(self.device):
                pixels = torch.zeros(1, 3, *self.image_size, device=self.device)
                image = check_features(self._image(pixels.to(self.dtype)), 1, what)
                what = "the text tower"
                if callable(self._text):
                    text = check_features(self._text(["a"]), 1, what)
                elif self._text is not None:
                    text = next(iter(self._text.values()))[None]
                else:
                    return image.shape[1]
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"model: {what} of {self.name} fails: {shown(error)}") from error
        if image.shape != text.shape:
            raise ValueError(
                f"model: embeds pictures in {image.shape[1]} numbers and texts in {text.shape[1]}"
            )
        return image.shape[1]


def is_factory(name: object) -> bool:
    """Whether a model's name is package.module:factory."""
    return isinstance(name, str) and _FACTORY.fullmatch(name) is not None


def from_factory(name: str, device: torch.device | None) -> Any:
    """What package.module:factory returns; the working directory is searched, too.

    Called with ``device=`` if it takes that, else without arguments.

    Raises:
        ValueError: no such module or function, or it fails.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    missing = here not in sys.path
    try:
        if missing:
            sys.path.insert(0, here)
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"model: {name!r}: the module {module} cannot be imported: {error}; it is looked for "
            f"among installed packages and in {here}"
        ) from error
    finally:
        if missing and here in sys.path:
            sys.path.remove(here)
    make = getattr(found, attribute, None)
    if not callable(make):
        known = [key for key, value in vars(found).items() if callable(value)]
        raise ValueError(
            f"model: {name!r}: {module} has no function {attribute}{nearest(attribute, known)}"
        )
    takes = "device" in inspect.signature(make).parameters
    made = cast(Callable[..., Any], make)
    return made(device=device) if takes and device is not None else made()


def _called(image: Any) -> str:
    return getattr(image, "__name__", type(image).__name__)
