"""Sources of models: names, tags, files, folders, the hub, objects (for load.py)."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from scc_fast.config import nearest, shown
from scc_fast.models.hub import (
    CLIP_VOCABULARY,
    build_tokenizer,
    fetch,
    named_folder,
    need_transformers,
    short,
    split_processor,
    stand_in_tokenizer,
    transformers_folder,
)
from scc_fast.models.objects import is_transformers, model_in, unwrap
from scc_fast.models.state_dicts import (
    as_path,
    check_finite,
    content,
    kind_of,
    located,
    misfit,
    plain,
    some,
    state_dict,
)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pth.tar", ".ckpt", ".npz")
_HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "pure_fp16": torch.float16,
    "pure_bf16": torch.bfloat16,
}


@dataclass
class Found:
    """A model with tokenizer and preprocessing; ``kind`` is "open_clip" or "transformers"."""

    module: nn.Module
    tokenizer: Callable[..., Any]
    name: str
    source: str
    kind: str = "open_clip"
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # open_clip's preprocess_cfg
    image_processor: Any = None
    extras: dict[str, Any] = field(default_factory=dict)  # flip, templates, defaults


def from_object(model: Any, tokenizer: Any, processor: Any) -> Found:
    """An open_clip or transformers model object, unwrapped."""
    model = model_in(model)
    name = type(model).__name__
    if is_transformers(model):
        path = getattr(model, "name_or_path", "") or "the checkpoint"
        image, text = split_processor(processor, tokenizer, path)
        return Found(model, text, name, f"object ({path})", "transformers", image_processor=image)
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(_text_of(tokenizer), None, None)
    elif tokenizer is None:
        if getattr(model, "vocab_size", None) != CLIP_VOCABULARY:
            raise ValueError(
                "tokenizer: needed, the model's vocabulary is not CLIP's own; pass "
                "open_clip.get_tokenizer(name) or the name of the architecture"
            )
        tokenizer = build_tokenizer(
            {"context_length": getattr(model, "context_length", 77)}, None, None
        )
    visual = unwrap(cast(nn.Module, model.visual))
    config = dict(getattr(visual, "preprocess_cfg", None) or {})
    trunk = getattr(getattr(visual, "trunk", None), "pretrained_cfg", None) or {}
    declared, usual = config.get("mean"), trunk.get("mean")
    siglip = getattr(model, "logit_bias", None) is not None
    if siglip and declared and usual and tuple(declared) != tuple(usual):
        _warn(
            f"model: declares mean {tuple(declared)}, but its image tower is published with "
            f"{tuple(usual)} (open_clip does so where SigLIP weights came from a file); "
            "pass mean= and std= if the model was not trained that way",
            stacklevel=4,
        )
    return Found(model, tokenizer, name, "object", preprocess=config)


def from_name(
    name: str,
    pretrained: str | Path | None,
    tokenizer: Any,
    processor: Any,
    cache_dir: str | Path | None,
    precision: str,
) -> Found:
    """Load "tiny", an open_clip name, "hf-hub:...", "local-dir:..." or a folder."""
    # open_clip treats any other name as fp32
    if not isinstance(precision, str) or precision not in _DTYPES:
        raise ValueError(
            f"precision: one of {', '.join(_DTYPES)} is needed, got {shown(precision)}"
            f"{nearest(precision, _DTYPES)}"
        )
    if pretrained is not None:
        as_path(pretrained, "pretrained")  # a tag passes, too
    prefix, _, rest = name.partition(":")
    local = name == "tiny" or (prefix in ("hf-hub", "local-dir") and rest)
    if local and pretrained is not None:
        raise ValueError(f"pretrained: only for architecture names; {name!r} brings its weights")
    if name == "tiny":
        found = from_folder(
            Path(__file__).parent.parent / "tiny" / "assets", tokenizer, None, precision
        )
        found.name, found.source = "tiny", "bundled with scc_fast"
        return found
    if prefix == "hf-hub" and rest:
        return _from_hub(name, rest, tokenizer, processor, cache_dir, precision)
    if prefix == "local-dir" and rest:
        folder = as_path(rest, "model")
        return from_folder(folder, tokenizer, processor, precision, cache_dir=cache_dir)
    import open_clip

    clean = name.replace("/", "-")
    if clean in open_clip.list_models():
        return _from_architecture(clean, pretrained, tokenizer, cache_dir, precision)
    if (folder := as_path(name, "model")).is_dir():
        return from_folder(folder, tokenizer, processor, precision, cache_dir=cache_dir)
    raise ValueError(f"model: {_no_model(name, open_clip.list_models())}")


def _no_model(name: str, known: list[str]) -> str:
    """Error text for an unknown name, with a suggestion."""
    path = as_path(name, "model")
    if path.is_file() or path.name.endswith(_WEIGHTS):
        there = "is a file" if path.is_file() else "is not an existing file"
        return (
            f"{located(name)} {there}, and the name of an architecture is needed: weights are "
            "passed as pretrained=, those of an image tower alone as image_encoder="
        )
    if name.startswith(("/", "~", ".")):
        return f"no folder {located(name)}"
    bare = re.sub(r"^https?://(www\.)?(huggingface\.co|hf\.co)/", "", name).strip(" /")
    if re.fullmatch(r"[\w.-]+/(?!\d+$)[\w.-]+", bare):
        return f"{shown(name)} is not a folder here; a repository of the hub is 'hf-hub:{bare}'"
    hint = nearest(name, ["tiny", "hf-hub:org/repo", "local-dir:folder", *known], 5)
    return (
        f"{shown(name)} is neither an open_clip model nor a folder{hint or ';'} Others: 'tiny', "
        "'hf-hub:org/repo', a folder, or a transformers model object"
    )


def _from_hub(
    name: str, repo: str, tokenizer: Any, processor: Any, cache_dir: Any, precision: str
) -> Found:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ValueError(f"model: 'hf-hub:owner/name' is needed, got {shown(name)}")
    try:
        config, weights = _snapshot(repo, cache_dir, name)
    except RuntimeError as error:
        # Many repositories, such as Google's SigLIP, have only transformers' files
        if (folder := transformers_folder(repo, cache_dir, error.__cause__)) is None:
            raise
        found = _from_transformers_folder(folder, tokenizer, processor, precision)
        found.name = name
        return found
    # A snapshot is a local folder; its tokenizer may be in another repository
    found = from_folder(
        config.parent, tokenizer, None, precision, weights=weights, cache_dir=cache_dir
    )
    found.name, found.source = name, str(weights)
    return found


def _snapshot(repo: str, cache_dir: Any, what: str) -> tuple[Path, Path]:
    """Config and weights of a hub repository, from one revision."""
    for _ in range(2):  # the cache may hold half of an old revision
        config = fetch(repo, ("open_clip_config.json",), cache_dir, what)
        weights = fetch(repo, _HUB_WEIGHTS, cache_dir, what)
        if config.parent == weights.parent:
            return config, weights
    raise RuntimeError(
        f"{what}: the cache holds {config} and {weights}, two revisions; delete the older one"
    )


def _text_of(tokenizer: str) -> dict[str, Any]:
    """text_cfg of an architecture."""
    import open_clip

    config = open_clip.get_model_config(tokenizer.replace("/", "-"))
    if config is None:
        raise ValueError(
            f"tokenizer: {shown(tokenizer)} is not an open_clip architecture; pass the name of one "
            "or a callable, such as open_clip.tokenizer.HFTokenizer(name)"
            f"{nearest(tokenizer, open_clip.list_models())}"
        )
    return cast(dict[str, Any], config["text_cfg"])


def _from_architecture(
    name: str,
    pretrained: str | Path | None,
    tokenizer: Any,
    cache_dir: str | Path | None,
    precision: str,
) -> Found:
    import open_clip

    config = cast(dict[str, Any], open_clip.get_model_config(name))
    base = name.removesuffix("-quickgelu")
    tags = {tag: open_clip.get_pretrained_cfg(base, tag) for tag in _tags(base)}
    keys = ("mean", "std", "interpolation", "resize_mode")
    published = {tuple(cfg.get(key) for key in keys): cfg for cfg in tags.values()}
    # Without a tag open_clip has no preprocessing: take that of the published weights if unique
    known = next(iter(published.values())) if len(published) == 1 else {}
    text = config["text_cfg"]
    path: Path | None = None
    if pretrained is None:
        source = "random weights"
        _warn(
            f"{name} has random weights, for timing only; "
            f"pass pretrained= one of {', '.join(_tags(name)) or 'a local file'}"
        )
        torch.default_generator.manual_seed(0)
        if text.get("hf_tokenizer_name") and tokenizer is None:
            tokenizer = stand_in_tokenizer(text)  # no download for random weights
    elif tag := open_clip.get_pretrained_cfg(name, str(pretrained)):
        known, repo = tag, tag.get("hf_hub", "")
        _check_quickgelu(name, config, str(pretrained), tag)
        if not repo:
            raise RuntimeError(
                f"pretrained: {pretrained!r} of {name} is not on the hub; get {tag.get('url')} "
                "and pass the file"
            )
        repo, _, file = repo.rpartition("/")
        safe = re.sub(r"\.(bin|pth)$", ".safetensors", file)
        files = tuple(dict.fromkeys((safe, file))) if file else _HUB_WEIGHTS
        path = fetch(repo, files, cache_dir, f"{name}, pretrained={str(pretrained)!r}")
        source = f"{pretrained} ({path})"
    else:
        path = as_path(pretrained, "pretrained")
        source = str(path)
        if not path.is_file():
            kind = "is a folder; write model='local-dir:...'" if path.is_dir() else "is not a file"
            raise ValueError(
                f"pretrained: {located(source)} {kind} and no tag of {name}; "
                f"known tags: {', '.join(_tags(name)) or 'none'}{nearest(source, _tags(name))}"
            )
        hint = re.sub(r"[^a-z0-9]+", "_", "/".join(path.parts[-4:]).lower())
        guess = max((t for t in tags if t.replace("-", "_") in hint), key=len, default=None)
        if guess is not None:
            known = tags[guess]
            _check_quickgelu(name, config, guess, known)
        elif len(published) > 1:
            _warn(
                f"{name} was published with more than one preprocessing, and a file does not say "
                "which: CLIP's is used; pass mean= and std= for another"
            )
    if tokenizer is None or isinstance(tokenizer, str):
        text = _text_of(tokenizer) if isinstance(tokenizer, str) else text
        tokenizer = build_tokenizer(text, None, cache_dir)
    text = _text_tower(config["text_cfg"], None, cache_dir, name)
    usual = {k: known[k] for k in keys if known.get(k)}
    argument = "model" if path is None else "pretrained"
    what = f"{argument}: open_clip cannot load {name}"
    module = _create(name, path, what, precision, usual, cache_dir, text)
    return Found(module, tokenizer, name, source, preprocess=module.visual.preprocess_cfg)


def _text_tower(
    text: Mapping[str, Any], folder: Path | None, cache_dir: Any, what: str
) -> dict[str, Any]:
    """text_cfg of a transformers text tower, with its config.json found locally.

    Otherwise transformers would retry a download for long.
    """
    name = text.get("hf_model_name")
    if not name:
        return {}
    need_transformers()
    if (place := named_folder(name, folder)) is None:
        hint = "give its folder as hf_model_name in open_clip_config.json"
        place = fetch(name, ("config.json",), cache_dir, f"text tower of {what}", hint).parent
    elif not (place / "config.json").is_file():
        raise ValueError(f"model: {str(place)!r}, hf_model_name of {what}, has no config.json")
    return {**text, "hf_model_name": str(place), "hf_model_pretrained": False}


def _tags(name: str) -> list[str]:
    import open_clip

    return cast(list[str], open_clip.list_pretrained_tags_by_model(name))


def _check_quickgelu(
    name: str, config: Mapping[str, Any], tag: str, weights: Mapping[str, Any]
) -> None:
    built, trained = bool(config.get("quick_gelu")), bool(weights.get("quick_gelu"))
    if built != trained:
        other = name.removesuffix("-quickgelu") if built else f"{name}-quickgelu"
        words = ("GELU", "QuickGELU")
        _warn(
            f"QuickGELU mismatch: {name} computes {words[built]}, {tag!r} weights were trained "
            f"with {words[trained]}: results will be worse; load {other!r}",
            stacklevel=6,
        )


def activation(module: nn.Module) -> str:
    """The activations of a model's blocks by name, such as "QuickGELU"."""
    kinds = {type(part).__name__ for part in module.modules()}
    names = sorted(kind.removesuffix("Activation") for kind in kinds if "GELU" in kind)
    return "+".join(dict.fromkeys(names)) or "no GELU"


def check_activation(config: Any, source: str) -> None:
    """Warn if a transformers CLIP computes another activation than its weights were trained with.

    By the repository's name: OpenAI's weights use QuickGELU, LAION's GELU.
    """
    towers = (getattr(config, "vision_config", None), getattr(config, "text_config", None))
    found = {getattr(tower, "hidden_act", None) for tower in towers}
    origin = re.search(r"openai/clip-vit|laion/clip-vit", source.lower().replace("--", "/"))
    if getattr(config, "model_type", "") != "clip" or not (origin or len(found) > 1):
        return
    trained = "gelu" if origin and origin[0].startswith("laion") else "quick_gelu"
    if found != {trained}:
        _warn(
            f"QuickGELU mismatch: {source} computes {' and '.join(sorted(map(str, found)))}, its "
            f"weights were trained with {trained if origin else 'one activation'}: results will be "
            "worse; correct hidden_act in the text_config and vision_config of its config.json",
            stacklevel=4,
        )


def _create(
    name: str,
    weights: Path | None,
    what: str,
    precision: str,
    preprocess: dict[str, Any],
    cache_dir: Any,
    text: dict[str, Any],
) -> Any:
    """Create an open_clip model with weights from a file; ``what`` begins messages."""
    import open_clip

    state: dict[str, Tensor] | None = None
    if weights is not None:
        what = f"{what} with weights {located(weights)}"
        if kind_of(weights, f"{what}: it") != "npz":
            state = state_dict(content(weights, f"{what}: it"), f"{what}: it")
            check_finite(state, what)
    try:
        with _without_weights_warning():
            module = open_clip.create_model(
                name,
                load_weights=False,
                precision=precision,
                force_preprocess_cfg=preprocess,
                pretrained_text=False,
                cache_dir=None if cache_dir is None else str(cache_dir),
                **({"text_cfg": text} if text else {}),
            )
        if weights is not None and state is None:  # big_vision's own format of SigLIP
            from open_clip.convert import load_big_vision_weights

            load_big_vision_weights(module, str(weights))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {short(error)}") from error
    if state is not None:
        _fill(module, state, f"{what}: it")
        if "input_resolution" in state and activation(module) == "GELU":  # of OpenAI's archives
            _warn(
                f"QuickGELU mismatch: {name} computes GELU, OpenAI's weights were trained with "
                f"QuickGELU: results will be worse; load {name + '-quickgelu'!r}",
                stacklevel=6,
            )
    return module


def _fill(module: Any, state: dict[str, Tensor], what: str) -> None:
    """Load weights into an open_clip model, as open_clip's load_checkpoint() does."""
    from open_clip import factory

    own = module.state_dict()
    try:
        state = factory.convert_state_dict(module, plain(state, own))
        if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
            state = factory.convert_to_custom_text_state_dict(state)
        for key in ("logit_scale", "logit_bias"):  # a number, or one in a vector
            if key in state and key in own and state[key].numel() == 1:
                state[key] = state[key].reshape(own[key].shape)
        if "logit_bias" in own:
            state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
        if not any(key not in state for key in own):
            factory.resize_pos_embed(state, module)
            factory.resize_text_pos_embed(state, module)
        if not (wrong := misfit(state, own)):
            module.load_state_dict(state)
    except Exception as error:
        raise ValueError(f"{what} cannot be put into the model: {short(error)}") from error
    if wrong:
        raise ValueError(f"{what} {wrong}")


@contextmanager
def _without_weights_warning() -> Iterator[None]:
    """Mute open_clip's warning of random weights."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    logging.getLogger().addFilter(other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(other)


def from_folder(
    folder: Path,
    tokenizer: Any,
    processor: Any,
    precision: str,
    weights: Path | None = None,
    cache_dir: Any = None,
) -> Found:
    """Load a folder in open_clip's or transformers' layout; ``weights`` marks a hub snapshot."""
    if not folder.is_dir():
        raise ValueError(f"model: no folder {str(folder)!r}")
    file = folder / "open_clip_config.json"
    if not file.is_file():
        if (folder / "config.json").is_file():
            return _from_transformers_folder(folder, tokenizer, processor, precision)
        raise ValueError(
            f"model: {str(folder)!r} holds neither open_clip_config.json (open_clip) nor "
            "config.json (transformers)"
        )
    config = _json(file)
    extras: dict[str, Any] = {}
    if not isinstance(config.get("model_cfg", {}).get("text_cfg"), dict):
        raise ValueError(f"model: {str(file)!r} has no 'model_cfg' with a 'text_cfg'")
    snapshot, weights = weights is not None, weights or _weights_in(folder)
    if (folder / "defaults.json").is_file():
        known = _json(folder / "defaults.json")
        extras = {k: known[k] for k in ("defaults", "flip", "templates") if k in known}
    declared = config["model_cfg"]["text_cfg"]
    if tokenizer is None or isinstance(tokenizer, str):
        text = _text_of(tokenizer) if isinstance(tokenizer, str) else declared
        place = None if snapshot else folder
        if named := text.get("hf_tokenizer_name"):
            place = named_folder(named, folder) or place
        tokenizer = build_tokenizer(text, place, cache_dir)
    tower = _text_tower(declared, folder, cache_dir, str(folder))
    what = "model: open_clip cannot load the folder"
    module = _create(f"local-dir:{folder}", weights, what, precision, {}, None, tower)
    return Found(
        module,
        tokenizer,
        folder.name,
        str(folder),
        "open_clip",
        module.visual.preprocess_cfg,
        extras=extras,
    )


def _weights_in(folder: Path) -> Path:
    """Weights file of a folder, in open_clip's order of preference."""
    ends = (".safetensors", ".bin", ".pth")
    usual = [f"open_clip_model{ends[0]}", *(f"open_clip_pytorch_model{end}" for end in ends)]
    usual += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]
    names = sorted(
        (file.name for file in folder.iterdir() if file.suffix in ends),
        key=lambda name: (not name.endswith(ends[0]), name),
    )
    if not names:
        raise ValueError(f"model: {located(folder)} holds no weights (*.safetensors, *.bin, *.pth)")
    return folder / next((name for name in usual if name in names), names[0])


def _from_transformers_folder(
    folder: Path, tokenizer: Any, processor: Any, precision: str
) -> Found:
    need_transformers()
    import transformers

    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        kind, what = "safetensors" if file.suffix == ".safetensors" else "torch", located(file)
        if (held := kind_of(file, f"model: {what}")) != kind:
            raise ValueError(f"model: {what} is of {held}, not of {kind} as its name says")
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        if processor is None and tokenizer is None:
            processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"model: transformers cannot load {str(folder)!r}: {short(error)}; a processor that "
            "is not in the folder can be passed as processor="
        ) from error
    missing = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        others = sorted(report["unexpected_keys"])
        open_clip = any(key.startswith("visual.") for key in others)
        raise ValueError(
            f"model: weights in {located(folder)} lack {len(missing)} tensors, such as {missing[0]}"
            + (f"; they have {some(others)} besides" if others else "")
            + ("; these are open_clip's names: pass the file as pretrained=" if open_clip else "")
        )
    check_finite(model.state_dict(), f"model: weights in {located(folder)}")
    found = from_object(model.to(_DTYPES[precision]), tokenizer, processor)
    found.name, found.source = folder.name, str(folder)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {str(file)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"model: {str(file)!r} is not a JSON object")
    return value


def _warn(message: str, stacklevel: int = 5) -> None:
    # Level of load_model's caller
    warnings.warn(message, UserWarning, stacklevel=stacklevel)
