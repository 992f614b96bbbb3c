"""Model protocol, and the adapters of open_clip and transformers models."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from scc_fast._plain import plain
from scc_fast._progress import with_progress
from scc_fast._warn import warn
from scc_fast.config import shown
from scc_fast.models.checkpoints import frozen_twin
from scc_fast.models.objects import check_features
from scc_fast.models.preprocess import Preprocess, Triple
from scc_fast.models.tokens import (
    TextSize,
    Tokenizer,
    cut_prompts,
    open_clip_ids,
    transformers_inputs,
)


class VisionLanguage(Protocol):
    """Interface of a model.

    ``image_size`` is (height, width). ``mean`` and ``std`` normalise pixels in [0, 1]. ``defaults``
    maps a method to overrides of its configuration. ``flip=False`` says that a mirrored picture
    may be another class (digits, text). ``resize_edge`` is transformers' shortest edge before its
    centre crop; None: open_clip's resizing.
    """

    name: str
    source: str
    image_size: tuple[int, int]
    mean: Triple
    std: Triple
    interpolation: str
    resize_mode: str
    fill_color: int
    resize_edge: int | None
    embed_dim: int
    logit_scale: float
    logit_bias: float
    device: torch.device
    defaults: dict[str, dict[str, Any]]
    flip: bool
    templates: tuple[str, ...]

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def encode_text(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor: ...

    def info(self) -> dict[str, Any]: ...


def missing_members(model: object) -> list[str]:
    """The members of :class:`VisionLanguage` that an object lacks.

    isinstance() cannot tell: from Python 3.12 on it does not see what __getattr__ provides.
    """
    methods = ("encode_image", "encode_text", "info")
    names = (*VisionLanguage.__annotations__, *methods)
    return [name for name in names if not hasattr(model, name)]


class FrozenModel:
    """Base of the adapters, which implement :class:`VisionLanguage`.

    ``module`` is the frozen twin. ``original`` is the model before load_model() replaced its image
    encoder, on the same text tower; else None.
    """

    kind = ""
    whole = True  # whether ``module`` holds both towers
    original: FrozenModel | None = None

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        *,
        name: str,
        source: str,
        device: torch.device | str | None = None,
        defaults: Mapping[str, dict[str, Any]] | None = None,
        flip: bool = True,
        templates: Sequence[str] = ("{}",),
    ) -> None:
        self.module = frozen_twin(model)
        held = next(self.module.parameters()).device
        if device is not None and torch.device(device) != held:
            self.module = self.module.to(device)
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self.image_size = preprocess.image_size
        self.mean, self.std = preprocess.mean, preprocess.std
        self.interpolation, self.resize_mode = preprocess.interpolation, preprocess.resize_mode
        self.fill_color, self.resize_edge = preprocess.fill_color, preprocess.resize_edge
        self.defaults = copy.deepcopy(dict(defaults or {}))
        self.flip, self.templates = bool(flip), tuple(templates)
        self.read()
        self.embed_dim = self._proved()

    def __getstate__(self) -> dict[str, Any]:
        """State without the engine's runners."""
        return {name: value for name, value in vars(self).items() if name != "runners"}

    def read(self) -> None:
        """Read device, dtype, logit scale and bias from the module."""
        self.device = next(self.module.parameters()).device
        scale, bias = (getattr(self.module, key, None) for key in ("logit_scale", "logit_bias"))
        if not isinstance(scale, Tensor) or scale.numel() != 1:
            raise ValueError(
                f"model: {type(self.module).__name__} has no single logit_scale parameter"
            )
        self.logit_scale = float(scale.detach().float().exp())
        self.logit_bias = float(bias.detach().float()) if isinstance(bias, Tensor) else 0.0
        self.as_read = self.logit_scale, self.logit_bias  # differs once set by hand
        # By the patch convolution: reduced precisions keep some parameters in float32
        dtypes = [p.dtype for p in self._vision().parameters() if p.ndim == 4]
        self.dtype = dtypes[0] if dtypes else next(self._vision().parameters()).dtype

    def _proved(self) -> int:
        """Embedding length D, from a trial run of tokenizer and towers."""
        what = "its text tower"
        try:
            with plain(self.device):
                text = self.encode_text(["a"])
                what = "its image tower"
                image = self.encode_image(torch.zeros(1, 3, *self.image_size, device=self.device))
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"model: {what} ({type(self.module).__name__}) fails: {shown(error)}; where types "
                "of weights are mixed, model.float(), .half() or .bfloat16() makes them one"
            ) from error
        if image.shape != text.shape:
            raise ValueError(
                f"model: embeds pictures in {image.shape[1]} numbers and texts in {text.shape[1]}"
            )
        return text.shape[1]

    def __repr__(self) -> str:
        height, width = self.image_size
        held = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({shown(self.name)}, {height}x{width}, {held}, {self.device})"

    def _vision(self) -> nn.Module:
        raise NotImplementedError

    def text_size(self) -> TextSize:
        """Vocabulary and context length of the text tower."""
        raise NotImplementedError

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the text tower, on the CPU: "input_ids" and perhaps a mask."""
        raise NotImplementedError

    def _image_features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _text_features(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Un-normalised image embeddings, differentiable with respect to the pixels alone.

        Args:
            pixels: (B, 3, H, W), resized to ``image_size`` and normalised.
        Returns:
            (B, D) float32. Under autocast the encoder runs in the autocast type.
        Raises:
            ValueError: wrong shape.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixels: shape {tuple(pixels.shape)}, but {self.name} takes "
                f"(B, 3, {self.image_size[0]}, {self.image_size[1]})"
            )
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, self.embed_dim, dtype=torch.float32)
        features = self._image_features(pixels.to(self.dtype))
        return check_features(features, len(pixels), "its image tower").float()

    def encode_text(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Text embeddings of unit length. Equal prompts get bit-identical embeddings.

        Args:
            prompts: K strings, tokenized ``batch_size`` at a time.
        Returns:
            (K, D) float32 on ``device``, without gradient; never an inference tensor.
        Raises:
            TypeError: ``prompts`` is not a sequence of strings.
            ValueError: ``batch_size`` below 1, or a tokenizer that does not fit the model.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts: a list of strings is needed, got {type(prompts).__name__}")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompts: every one must be a string, got {shown(prompt)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        with plain(self.device):
            parts = [] if place else [torch.zeros(0, self.embed_dim, device=self.device)]
            items, cut = list(place), list[str]()
            firsts = range(0, len(items), batch_size)
            for first in with_progress(firsts, "prompts"):
                batch = items[first : first + batch_size]
                features = check_features(self._embed(batch, cut), len(batch), "its text tower")
                parts.append(nn.functional.normalize(features.float(), dim=-1))
            if cut:
                more = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
                warn(
                    f"prompts: {shown(cut[0])}{more} is longer than the {self.text_size().length} "
                    f"tokens that {self.name} reads; the rest is not seen"
                )
            result = torch.cat(parts)
            if len(place) == len(prompts):
                return result
            return result[torch.tensor([place[p] for p in prompts], device=self.device)]

    def _embed(self, prompts: list[str], cut: list[str]) -> Tensor:
        """Text embeddings, not normalised; adds prompts that are too long to `cut`."""
        inputs = self.text_inputs(prompts)
        cut += cut_prompts(prompts, inputs["input_ids"], self._ids)
        return self._text_features({k: v.to(self.device) for k, v in inputs.items()})

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        return self.text_inputs(prompts)["input_ids"]

    def info(self) -> dict[str, Any]:
        """Everything declared about the model, as plain values (for ``scc-fast doctor``)."""
        fields = (*VisionLanguage.__annotations__, "kind")
        result = {key: copy.deepcopy(getattr(self, key)) for key in fields}
        count = sum(p.numel() for p in self.module.parameters())
        return {**result, "device": str(self.device), "dtype": str(self.dtype), "parameters": count}


class OpenCLIPModel(FrozenModel):
    """Models with ``encode_image`` and ``encode_text`` (open_clip, OpenAI's clip package)."""

    kind = "open_clip"

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        # CoCa normalises unless told otherwise; OpenAI's package has no such argument
        known = inspect.signature(cast(Any, model).encode_image).parameters
        self._plain = {"normalize": False} if "normalize" in known else {}
        super().__init__(model, *args, **options)

    def _vision(self) -> nn.Module:
        return cast(nn.Module, self.module.visual)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.module).encode_image(pixels, **self._plain))

    def text_size(self) -> TextSize:
        module = cast(Any, self.module)
        text = getattr(module, "text", module)
        vocabulary, length = (
            getattr(module, name, getattr(text, name, None))
            for name in ("vocab_size", "context_length")
        )
        # transformers' towers accept shorter rows
        return TextSize(vocabulary, length, fixed=hasattr(text, "positional_embedding"))

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": open_clip_ids(self.tokenizer, prompts, self.text_size())}

    def _text_features(self, inputs: dict[str, Tensor]) -> Tensor:
        encode = cast(Any, self.module).encode_text
        return cast(Tensor, encode(inputs["input_ids"], **self._plain))


class TransformersModel(FrozenModel):
    """CLIPModel, SiglipModel and similar models of transformers 4 and 5."""

    kind = "transformers"

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        if self._config.model_type not in ("clip", "siglip"):
            self._check_logits()

    @property
    def _config(self) -> Any:
        return cast(Any, self.module).config

    def _check_logits(self) -> None:
        """Raise ValueError if the model's logits are not those of its features."""
        kind, prompts = type(self.module).__name__, ["a", "a b"]
        size = 3, *self.image_size
        pixels = torch.linspace(-1, 1, math.prod(size), device=self.device).reshape(1, *size)
        inputs = {k: v.to(self.device) for k, v in self.text_inputs(prompts).items()}
        try:
            with plain(self.device):
                output = self.module(pixel_values=pixels.to(self.dtype), **inputs)
                own = output.logits_per_image.float()
                image = nn.functional.normalize(self.encode_image(pixels), dim=-1)
                ours = self.logit_scale * image @ self.encode_text(prompts).T + self.logit_bias
        except Exception as error:
            raise ValueError(
                f"model: {kind} does not score pictures and texts as CLIP does: {shown(error)}"
            ) from error
        near = (1e-3 if self.dtype == torch.float32 else 0.05) * self.logit_scale
        if own.shape != ours.shape or not bool((own - ours).abs().max() <= near):
            raise ValueError(
                f"model: {kind}'s own logits are not those of its features; CLIPModel, "
                "SiglipModel and those made like them are taken"
            )

    def _vision(self) -> nn.Module:
        return cast(nn.Module, self.module.vision_model)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _as_tensor(cast(Any, self.module).get_image_features(pixel_values=pixels))

    def text_size(self) -> TextSize:
        text = self._config.text_config
        length = text.max_position_embeddings
        # RoBERTa's positions begin after the padding's
        for name, part in cast(Any, self.module).text_model.named_modules():
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
                length -= 0 if part.padding_idx is None else part.padding_idx + 1
        # SigLIP reads the last position
        return TextSize(text.vocab_size, length, fixed=self._config.model_type == "siglip")

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        inputs = transformers_inputs(self.tokenizer, prompts, self.text_size())
        if self._config.model_type == "siglip":  # trained on padded text without a mask
            inputs.pop("attention_mask", None)
        return inputs

    def _text_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return _as_tensor(cast(Any, self.module).get_text_features(**inputs))


def _as_tensor(output: Any) -> Tensor:
    # transformers 4 returns the projected tensor, 5 an object that holds it
    return cast(Tensor, getattr(output, "pooler_output", output))
