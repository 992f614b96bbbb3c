"""Where a model comes from: names, tags, files, folders, the hub, objects (for models.py)."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from scc_fast._checkpoints import unwrap
from scc_fast._hub import (
    CLIP_VOCABULARY,
    build_tokenizer,
    fetch,
    named_folder,
    need_transformers,
    short,
    split_processor,
    stand_in_tokenizer,
)

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
    """A model with what belongs to it; ``kind`` is "open_clip" or "transformers"."""

    module: nn.Module
    tokenizer: Callable[..., Any]
    name: str
    source: str
    kind: str = "open_clip"
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # open_clip's preprocess_cfg
    image_processor: Any = None
    extras: dict[str, Any] = field(default_factory=dict)  # flip, templates, defaults


def from_object(model: nn.Module, tokenizer: Any, processor: Any) -> Found:
    """Wrap an open_clip or transformers model object."""
    model = unwrap(model)
    name = type(model).__name__
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind == "siglip2":
            raise TypeError(
                "model: Siglip2Model takes patches, not pixels (NaFlex); load a fixed-resolution "
                'SigLIP 2 checkpoint (model_type "siglip") or the open_clip one'
            )
        path = getattr(model, "name_or_path", "") or "the checkpoint"
        image, text = split_processor(processor, tokenizer, path)
        return Found(model, text, name, f"object ({path})", "transformers", image_processor=image)
    if not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise TypeError(
            f"model: {name} is neither an open_clip model (encode_image, encode_text) nor a "
            "transformers one (get_image_features, get_text_features)"
        )
    if isinstance(tokenizer, str):
        config = _config_of(tokenizer)
        tokenizer = build_tokenizer(config["text_cfg"], None, None)
    elif tokenizer is None:
        if getattr(model, "vocab_size", None) != CLIP_VOCABULARY:
            raise ValueError(
                "tokenizer: needed, the model's vocabulary is not CLIP's own; pass "
                "open_clip.get_tokenizer(name) or the name of the architecture"
            )
        tokenizer = build_tokenizer(
            {"context_length": getattr(model, "context_length", 77)}, None, None
        )
    config = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    trunk = getattr(getattr(model.visual, "trunk", None), "pretrained_cfg", None) or {}
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
    if precision not in _DTYPES:  # open_clip takes anything else for fp32
        raise ValueError(f"precision: one of {', '.join(_DTYPES)} is needed, got {precision!r}")
    prefix, _, rest = name.partition(":")
    local = name == "tiny" or (prefix in ("hf-hub", "local-dir") and rest)
    if local and pretrained is not None:
        raise ValueError(f"pretrained: only for architecture names; {name!r} brings its weights")
    if name == "tiny":
        found = from_folder(Path(__file__).parent / "tiny" / "assets", tokenizer, None, precision)
        found.name, found.source = "tiny", "bundled with scc_fast"
        return found
    if prefix == "hf-hub" and rest:
        config, weights = _snapshot(rest, cache_dir, name)
        # A snapshot folder is a local folder, but its tokenizer may live in another repository
        found = from_folder(
            config.parent, tokenizer, None, precision, weights=weights, cache_dir=cache_dir
        )
        found.name, found.source = name, str(weights)
        return found
    if prefix == "local-dir" and rest:
        folder = Path(rest).expanduser()
        return from_folder(folder, tokenizer, processor, precision, cache_dir=cache_dir)
    import open_clip

    clean = name.replace("/", "-")
    if clean in open_clip.list_models():
        return _from_architecture(clean, pretrained, tokenizer, cache_dir, precision)
    if (folder := Path(name).expanduser()).is_dir():
        return from_folder(folder, tokenizer, processor, precision, cache_dir=cache_dir)
    _config_of(clean)
    raise AssertionError("unreachable")


def _snapshot(repo: str, cache_dir: Any, what: str) -> tuple[Path, Path]:
    """Config and weights of a hub repository, of one and the same revision."""
    for _ in range(2):  # half of an old revision in the cache: its other half came in a new one
        config = fetch(repo, ("open_clip_config.json",), cache_dir, what)
        weights = fetch(repo, _HUB_WEIGHTS, cache_dir, what)
        if config.parent == weights.parent:
            return config, weights
    raise RuntimeError(
        f"{what}: the cache holds {config} and {weights}, two revisions; delete the older one"
    )


def _config_of(name: str) -> dict[str, Any]:
    import open_clip

    names = open_clip.list_models()
    if name not in names:
        lower = {n.lower(): n for n in names}
        close = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 5, 0.5)]
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"model: {name!r} is neither an open_clip model nor a folder; {hint}"
            "Others: 'tiny', 'hf-hub:org/repo', a folder, or a transformers model object"
        )
    return cast(dict[str, Any], open_clip.get_model_config(name))


def _from_architecture(
    name: str,
    pretrained: str | Path | None,
    tokenizer: Any,
    cache_dir: str | Path | None,
    precision: str,
) -> Found:
    import open_clip

    config = _config_of(name)
    base = name.removesuffix("-quickgelu")
    tags = {tag: open_clip.get_pretrained_cfg(base, tag) for tag in _tags(base)}
    keys = ("mean", "std", "interpolation", "resize_mode")
    published = {tuple(cfg.get(key) for key in keys): cfg for cfg in tags.values()}
    # open_clip forgets the preprocessing without a tag; the published weights know it if they agree
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
            tokenizer = stand_in_tokenizer(text)  # nothing is fetched for weights that mean nothing
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
        path = Path(pretrained).expanduser()
        source = str(path)
        if not path.is_file():
            kind = "is a folder; write model='local-dir:...'" if path.is_dir() else "is no file"
            raise ValueError(
                f"pretrained: {source!r} {kind} and no tag of {name}; "
                f"known tags: {', '.join(_tags(name)) or 'none'}"
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
        text = _config_of(tokenizer)["text_cfg"] if isinstance(tokenizer, str) else text
        tokenizer = build_tokenizer(text, None, cache_dir)
    text = _text_tower(config["text_cfg"], None, cache_dir, name)
    usual = {k: known[k] for k in keys if known.get(k)}
    module = _create(name, path, precision, usual, cache_dir, text)
    return Found(module, tokenizer, name, source, preprocess=module.visual.preprocess_cfg)


def _text_tower(
    text: Mapping[str, Any], folder: Path | None, cache_dir: Any, what: str
) -> dict[str, Any]:
    """text_cfg on which open_clip builds a tower of transformers without the network.

    open_clip asks transformers for the tower's config.json: it is found here, before long retries.
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


def _create(
    name: str,
    weights: Path | None,
    precision: str,
    preprocess: dict[str, Any],
    cache_dir: Any,
    text: dict[str, Any],
) -> Any:
    import open_clip

    try:
        return open_clip.create_model(
            name,
            pretrained=None if weights is None else str(weights),
            precision=precision,
            force_preprocess_cfg=preprocess,
            pretrained_text=False,
            cache_dir=None if cache_dir is None else str(cache_dir),
            **({"text_cfg": text} if text else {}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = f"{name} with weights {weights}" if weights else name
        raise ValueError(f"model: open_clip cannot load {what}: {short(error)}") from error


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
    if weights is None and not any(
        f.suffix in (".safetensors", ".bin", ".pth") for f in folder.iterdir()
    ):
        raise ValueError(f"model: {str(folder)!r} holds no weights (*.safetensors, *.bin, *.pth)")
    if (folder / "defaults.json").is_file():
        known = _json(folder / "defaults.json")
        extras = {k: known[k] for k in ("defaults", "flip", "templates") if k in known}
    declared = config["model_cfg"]["text_cfg"]
    if tokenizer is None or isinstance(tokenizer, str):
        text = _config_of(tokenizer)["text_cfg"] if isinstance(tokenizer, str) else declared
        place = folder if weights is None else None
        if named := text.get("hf_tokenizer_name"):
            place = named_folder(named, folder) or place
        tokenizer = build_tokenizer(text, place, cache_dir)
    tower = _text_tower(declared, folder, cache_dir, str(folder))
    module = _create(f"local-dir:{folder}", None, precision, {}, None, tower)
    return Found(
        module,
        tokenizer,
        folder.name,
        str(folder),
        "open_clip",
        module.visual.preprocess_cfg,
        extras=extras,
    )


def _from_transformers_folder(
    folder: Path, tokenizer: Any, processor: Any, precision: str
) -> Found:
    need_transformers()
    import transformers

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
        raise ValueError(
            f"model: weights in {str(folder)!r} lack {len(missing)} tensors, such as {missing[0]}"
        )
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
    # The level of the line that called load_model
    warnings.warn(message, UserWarning, stacklevel=stacklevel)
