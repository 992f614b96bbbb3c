"""Hub files, tokenizers and processors; errors say what is needed without a network."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scc_fast.config import shown

_NEEDS_TRANSFORMERS = 'transformers is not installed; run: pip install "scc_fast[transformers]"'
CLIP_VOCABULARY = 49408  # the merges that open_clip ships; the number names the vocabulary
_PROBE_SECONDS = 10.0
_LOCAL_HINT = (
    "pass a local file, load_model(name, pretrained='/path/to/file.safetensors'), or a folder, "
    "load_model('local-dir:/path/to/folder')"
)


def build_tokenizer(
    text: Mapping[str, Any], folder: Path | None, cache_dir: Any
) -> Callable[..., Any]:
    """open_clip tokenizer of a text_cfg; ``folder`` holds the model's own files."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if folder is not None and (folder / "merges.txt.gz").is_file():
        return SimpleTokenizer(bpe_path=str(folder / "merges.txt.gz"), **options)
    repo = text.get("hf_tokenizer_name")
    if not repo:
        return SimpleTokenizer(**options)
    need_transformers()
    if folder is None:
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
        fetch(repo, files, cache_dir, f"tokenizer {repo}")
    options["tokenizer_mode"] = text.get("tokenizer_mode")
    if cache_dir is not None:
        options["cache_dir"] = str(cache_dir)
    try:
        try:  # local files first: a failed download is retried for most of a minute
            return HFTokenizer(str(folder or repo), local_files_only=True, **options)
        except Exception:
            if folder is not None:
                raise
            return HFTokenizer(repo, **options)
    except Exception as error:
        raise RuntimeError(
            f"tokenizer: {str(folder or repo)!r} cannot be loaded ({short(error)}); pass "
            "tokenizer=, or keep its files beside the weights and use local-dir:"
        ) from error


def stand_in_tokenizer(text: Mapping[str, Any]) -> Callable[..., Any]:
    """Tokenizer of arbitrary fixed ids, for random weights."""
    size, length = int(text.get("vocab_size", CLIP_VOCABULARY)), int(text.get("context_length", 77))

    def tokenize(prompts: Sequence[str]) -> Tensor:
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            words = [1 + zlib.crc32(w.encode()) % (size - 2) for w in prompt.lower().split()]
            words = [*words[: length - 1], size - 1]  # the highest id ends the text, as in CLIP
            row[: len(words)] = torch.tensor(words)
        return ids

    return tokenize


def fetch(
    repo: str, files: Sequence[str], cache_dir: Any, what: str, hint: str = _LOCAL_HINT
) -> Path:
    """The first of ``files`` in the cache, else from the hub; fails within about ten seconds."""
    import huggingface_hub as hub
    from huggingface_hub.utils import EntryNotFoundError

    cache = str(cache_dir or hub.constants.HF_HUB_CACHE)
    for file in files:
        cached = hub.try_to_load_from_cache(repo, file, cache_dir=cache)
        if isinstance(cached, str):
            return Path(cached)
    cause: Exception | None = None
    try:
        for file in files:
            try:  # asked once: the hub's own download retries five times for each name
                hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=_PROBE_SECONDS)
            except EntryNotFoundError as error:
                cause = error
                continue
            return Path(hub.hf_hub_download(repo, file, cache_dir=cache))
    except Exception as error:
        cause = error
    raise RuntimeError(
        f"{what}: not found. Looked for {' or '.join(files)} of https://huggingface.co/{repo} in "
        f"the cache folder {cache} and on the network ({short(cause)}). Without a network, {hint}"
    ) from cause


def transformers_folder(repo: str, cache_dir: Any, cause: BaseException | None) -> Path | None:
    """Folder of a repository in transformers' layout, from cache or hub; None if it has none.

    ``cause`` is the error of the search for open_clip's files.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import EntryNotFoundError

    cache = str(cache_dir or hub.constants.HF_HUB_CACHE)
    config = hub.try_to_load_from_cache(repo, "config.json", cache_dir=cache)
    folder = Path(config).parent if isinstance(config, str) else None
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        if isinstance(cause, EntryNotFoundError):  # the hub is reachable, but has other files
            files = ["*.json", "*.txt", "*.model", weights]
            folder = Path(hub.snapshot_download(repo, cache_dir=cache, allow_patterns=files))
        if folder is not None and (folder / "config.json").is_file() and any(folder.glob(weights)):
            return folder
    return None


def named_folder(name: str, folder: Path | None) -> Path | None:
    """Folder that a config names as a repository: absolute, or beside the config."""
    place = Path(name).expanduser()
    if folder is not None and (folder / place).is_dir():
        return folder / place
    if place.is_absolute():
        raise ValueError(f"model: no folder {name!r}, named in open_clip_config.json")
    return None


def split_processor(processor: Any, tokenizer: Any, path: str) -> tuple[Any, Callable[..., Any]]:
    """(image processor or None, tokenizer) of a transformers processor, a pair, or loose parts."""
    if isinstance(tokenizer, str):
        raise TypeError(
            "tokenizer: a name is for open_clip's models; a transformers model takes the tokenizer "
            f"itself, AutoTokenizer.from_pretrained({shown(tokenizer)})"
        )
    if isinstance(processor, (tuple, list)) and len(processor) == 2:
        image, text = processor
    else:
        image = getattr(processor, "image_processor", None)
        text = getattr(processor, "tokenizer", None)
    text = tokenizer if tokenizer is not None else text
    if processor is None and text is None:
        raise ValueError(f"processor: needed; pass AutoProcessor.from_pretrained({path!r})")
    if not callable(text) or (image is not None and not hasattr(image, "image_mean")):
        raise TypeError(
            "processor: a transformers processor or (image_processor, tokenizer) is needed, got "
            f"{type(processor).__name__} {shown(processor)}"
        )
    return image, text


def need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(_NEEDS_TRANSFORMERS) from error


def short(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    if "weights_only" in text:  # torch's advice to switch it off would let a file run code
        text = "it is damaged, or holds other objects than tensors, numbers, strings and containers"
    name = type(error).__name__
    return f"{name}: {text[:300]}{'...' if len(text) > 300 else ''}" if text else name
