"""Vision-language models behind one interface: frozen, in eval mode, your object untouched."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from scc_fast import _devices, _weights
from scc_fast._checkpoints import (
    frozen_twin,
    parse_model,
    read_image_encoder,
    with_image_encoder,
)
from scc_fast._objects import check_features
from scc_fast._plain import default_device, default_dtype, plain
from scc_fast._preprocess import Preprocess, Triple, triple
from scc_fast._state_dicts import as_path
from scc_fast._tokens import (
    TextSize,
    Tokenizer,
    check_tokenizer,
    cut_prompts,
    open_clip_ids,
    transformers_inputs,
)
from scc_fast._warn import warn
from scc_fast.config import shown

_LOG = logging.getLogger("scc_fast")
T = TypeVar("T")


class VisionLanguage(Protocol):
    """What the rest of scc_fast asks of a model.

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
    """The one implementation of :class:`VisionLanguage`; the adapters say how to call the towers.

    ``module`` is the frozen twin, for engines that run it in their own way. ``original`` is the
    model before load_model() replaced its image encoder, on the same text tower; else None.
    """

    kind = ""
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

    def read(self) -> None:
        """Take device, dtype, logit scale and bias from the module as it is now."""
        self.device = next(self.module.parameters()).device
        scale, bias = (getattr(self.module, key, None) for key in ("logit_scale", "logit_bias"))
        if not isinstance(scale, Tensor) or scale.numel() != 1:
            raise ValueError(
                f"model: {type(self.module).__name__} has no single logit_scale parameter"
            )
        self.logit_scale = float(scale.detach().float().exp())
        self.logit_bias = float(bias.detach().float()) if isinstance(bias, Tensor) else 0.0
        self.as_read = self.logit_scale, self.logit_bias  # who sets others by hand means them
        # The patch convolution decides: reduced precisions keep some parameters in float32
        dtypes = [p.dtype for p in self._vision().parameters() if p.ndim == 4]
        self.dtype = dtypes[0] if dtypes else next(self._vision().parameters()).dtype

    def _proved(self) -> int:
        """The embeddings' length D, when tokenizer and towers have been seen to fit together."""
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
        """What the text tower takes."""
        raise NotImplementedError

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text tower is called with, on the CPU: "input_ids" and perhaps a mask."""
        raise NotImplementedError

    def _image_features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _text_features(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Un-normalised image embeddings; gradients reach the pixels and nothing else.

        Args:
            pixels: (B, 3, H, W), resized to ``image_size`` and normalised.
        Returns:
            (B, D) float32. Under autocast the encoder runs in the autocast type.
        Raises:
            ValueError: another shape.
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
        """Text embeddings of unit length. Equal prompts get embeddings equal to the bit.

        Args:
            prompts: K strings; at most ``batch_size`` of them are in memory as tokens at a time.
        Returns:
            (K, D) float32 on ``device``, an ordinary tensor without gradient in any caller's mode.
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
            items, cut = list(place), []
            firsts = range(0, len(items), batch_size)
            for first in with_progress(firsts, "prompts"):
                batch = items[first : first + batch_size]
                inputs = self.text_inputs(batch)
                cut += cut_prompts(batch, inputs["input_ids"], self._ids)
                features = self._text_features({k: v.to(self.device) for k, v in inputs.items()})
                features = check_features(features, len(batch), "its text tower").float()
                parts.append(nn.functional.normalize(features, dim=-1))
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
        # Towers of transformers take shorter rows, too
        return TextSize(vocabulary, length, fixed=hasattr(text, "positional_embedding"))

    def text_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": open_clip_ids(self.tokenizer, prompts, self.text_size())}

    def _text_features(self, inputs: dict[str, Tensor]) -> Tensor:
        encode = cast(Any, self.module).encode_text
        return cast(Tensor, encode(inputs["input_ids"], **self._plain))


class TransformersModel(FrozenModel):
    """CLIPModel, SiglipModel and their like, of transformers 4 and 5."""

    kind = "transformers"

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        if self._config.model_type not in ("clip", "siglip"):
            self._check_logits()

    @property
    def _config(self) -> Any:
        return cast(Any, self.module).config

    def _check_logits(self) -> None:
        """ValueError for a kind whose own logits are not those of its features, as CLIP's are."""
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


def load_model(
    model: str | Path | nn.Module | VisionLanguage,
    pretrained: str | Path | None = None,
    *,
    tokenizer: Tokenizer | str | None = None,
    processor: Any = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    precision: str = "fp32",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    flip: bool | None = None,
    image_encoder: str | Path | None = None,
) -> VisionLanguage:
    """Load a vision-language model, or wrap one; it is frozen, and a model object stays as it was.

    Args:
        model: "tiny" (bundled); an open_clip name; "hf-hub:org/repo"; a folder, "local-dir:folder",
            in open_clip's or transformers' layout; or an open_clip or transformers model.
            FARE ("hf-hub:chs20/fare2-clip") and BiomedCLIP ("hf-hub:microsoft/BiomedCLIP-…", with
            the extra "transformers" for its text tower) are such names.
        pretrained: open_clip tag or weights file, for open_clip names. None: random weights,
            the same in every call, for timing.
        tokenizer: for objects: open_clip's tokenizer or the name of the architecture; not needed
            where the vocabulary is CLIP's own.
        processor: transformers: AutoProcessor's object, or (image_processor, tokenizer).
        device: default: an object's own, else CUDA where there is one.
        cache_dir: where open_clip keeps downloads; a file found there is used without the network.
        precision: open_clip's name of the weights' type, for what is loaded here.
        mean, std: three numbers each, in place of the declared normalisation.
        flip: False if a mirrored picture may be another class; default: what the model declares.
        image_encoder: file of a fine-tuned image tower (TeCoA, PMG-AFT, FARE; see
            read_image_encoder) that takes the place of the model's own. Text tower, logit scale
            and preprocessing stay; PMG-AFT's own release was tuned with ImageNet's mean and std.
            ``original`` of what is returned is the model without it.
    Raises:
        TypeError, ValueError: an argument that cannot be right.
        RuntimeError: weights that cannot be reached; says where it looked.

    What was resolved goes to the logger "scc_fast" as one line at INFO.

    Example:
        >>> model = load_model("ViT-B-32-quickgelu", pretrained="openai")  # doctest: +SKIP
    """
    device = None if device is None else _devices.find(device)
    options = {"mean": mean, "std": std}
    overrides: dict[str, Any] = {k: triple(v, k) for k, v in options.items() if v is not None}
    if not isinstance(model, (str, Path)) and not missing_members(model):
        return cast(VisionLanguage, model)
    check_tokenizer(tokenizer)
    # Initialisation draws from torch's global generator, whose state is put back
    own = torch.random.fork_rng(devices=[])
    with torch.inference_mode(False), own, default_dtype(), default_device():
        tower = None if image_encoder is None else as_path(image_encoder, "image_encoder")
        state = None if tower is None else read_image_encoder(tower)
        if not isinstance(model, (str, Path)):
            found = _weights.from_object(model, tokenizer, processor)
            if pretrained is not None or precision != "fp32" or tower is not None:
                raise ValueError(
                    "pretrained, precision, image_encoder: only for names, not for a model object; "
                    "its precision is that of its weights, such as model.bfloat16()"
                )
        else:
            found = _weights.from_name(
                str(model), pretrained, tokenizer, processor, cache_dir, precision
            )
            if device is None:
                device = "cuda" if torch.cuda.is_available() else "cpu"
        adapter: type[FrozenModel] = OpenCLIPModel
        if found.kind == "transformers":
            adapter = TransformersModel
            config = cast(Any, found.module).config
            preprocess = Preprocess.from_transformers(found.image_processor, config)
            _weights.check_activation(config, found.source)
        else:
            preprocess = Preprocess.from_open_clip(found.module, found.preprocess)
        extra = {**found.extras, **({} if flip is None else {"flip": flip})}
        preprocess = replace(preprocess, **overrides)
        if tower is not None and found.kind != "open_clip":
            raise ValueError(f"image_encoder: only for open_clip's models, not {found.name!r}")
        name, source = found.name, found.source
        parts = (preprocess, found.tokenizer)
        loaded = adapter(found.module, *parts, name=name, source=source, device=device, **extra)
        if tower is None or state is None:
            _LOG.info(_resolved(loaded))
            return loaded
        module = with_image_encoder(loaded.module, state, tower)
        name, source = f"{name}+{tower.name}", f"{tower} over {source}"
        tuned = adapter(module, *parts, name=name, source=source, **extra)
        tuned.original = loaded
        _LOG.info(_resolved(tuned))
        return tuned


def _resolved(model: FrozenModel) -> str:
    """One line of what a model is made of."""
    numbers = (f"({', '.join(f'{v:.3g}' for v in values)})" for values in (model.mean, model.std))
    mean, std = numbers
    tokenizer = getattr(model.tokenizer, "__name__", type(model.tokenizer).__name__)
    return (
        f"model {model.name} ({type(model.module).__name__}): weights {model.source}; "
        f"{_weights.activation(model.module)}; {model.image_size[0]}x{model.image_size[1]} pixels, "
        f"{model.interpolation}, {model.resize_mode}, mean {mean}, std {std}; "
        f"tokenizer {tokenizer}; {str(model.dtype).removeprefix('torch.')} on {model.device}"
    )


def load_spec(spec: str, device: torch.device | str | None = None) -> VisionLanguage:
    """load_model() of a model's one-line name (see parse_model), as command lines take it.

    Raises:
        TypeError, ValueError: not such a name, or as load_model().
        RuntimeError: weights that cannot be reached.

    Example:
        >>> load_spec("tiny", device="cpu").name
        'tiny'
    """
    name, pretrained, image_encoder = parse_model(spec)
    return load_model(name, pretrained, device=device, image_encoder=image_encoder)


def _as_tensor(output: Any) -> Tensor:
    # transformers 4 returns the projected tensor, 5 an object that holds it
    return cast(Tensor, getattr(output, "pooler_output", output))


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a progress bar for a person who has waited for two seconds."""
    start, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(items, 1):
            yield item
            if bar is None and time.monotonic() - start > 2 and sys.stderr.isatty():
                try:
                    from rich.console import Console
                    from rich.progress import Progress
                except ImportError:
                    continue
                bar = Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(what, total=len(items))
                bar.start()
            if bar is not None and task is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
