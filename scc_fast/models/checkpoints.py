"""Model specs, frozen twins, and separately saved image encoders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from scc_fast.models.objects import unwrap
from scc_fast.models.state_dicts import content, located, misfit, plain, state_dict

_TOWER = "vision_encoder_state_dict"
_PROMPTS = ("state_dict", "add_prompter")  # visual prompts beside _TOWER, mostly empty
_READS = (
    "an image tower is needed under OpenAI's names: a dict that has it as "
    f"{_TOWER!r} (TeCoA, PMG-AFT, TTC) or the tower's own state dict (FARE)"
)


class ModelSpec(NamedTuple):
    """Parsed model spec: arguments of load_model()."""

    model: str
    pretrained: str | None = None
    image_encoder: str | None = None


def parse_model(spec: str) -> ModelSpec:
    """Parse NAME[@PRETRAINED][+IMAGE_ENCODER] without any lookup.

    NAME is "tiny", an open_clip name, "hf-hub:org/repo", "local-dir:folder" or a folder. The
    first "+" begins the encoder's file, the first "@" before it a tag or file. A "local-dir:" path
    may contain "@"; a path with "+" needs load_model().

    Raises:
        TypeError: not a string.
        ValueError: an empty part, or "@" after a name that implies its weights.

    Example:
        >>> parse_model("ViT-B-32-quickgelu@openai+tecoa.pth.tar")
        ModelSpec(model='ViT-B-32-quickgelu', pretrained='openai', image_encoder='tecoa.pth.tar')
    """
    form = "NAME[@PRETRAINED][+IMAGE_ENCODER] is needed"
    if not isinstance(spec, str):
        raise TypeError(f"model: {form}, got {type(spec).__name__}")
    name, plus, encoder = spec.strip().partition("+")
    at, pretrained = "", ""
    if not name.startswith("local-dir:"):
        name, at, pretrained = name.partition("@")
    bare = name.partition(":")[2] if name.startswith(("hf-hub:", "local-dir:")) else name
    if not bare or (at and not pretrained) or (plus and not encoder):
        raise ValueError(f"model: {form}, and no part may be empty; got {spec!r}")
    if at and (name == "tiny" or name.startswith("hf-hub:")):
        raise ValueError(f"model: {name!r} brings its weights and takes no '@'; got {spec!r}")
    return ModelSpec(name, pretrained or None, encoder or None)


def without_folders(spec: str) -> str:
    """Model spec for display: paths are cut to their last part."""
    model, pretrained, encoder = parse_model(spec)
    if model.startswith(("local-dir:", "/", "~", ".")):
        model = Path(model.removeprefix("local-dir:")).name
    pretrained = f"@{Path(pretrained).name}" if pretrained else ""
    return model + pretrained + (f"+{Path(encoder).name}" if encoder else "")


def frozen_twin(model: nn.Module) -> nn.Module:
    """Copy of ``model`` in eval mode, without gradients, on the same storage.

    ``model`` keeps its mode, its requires_grad flags and its gradients. Inference tensors are
    cloned, because autograd cannot save them for the backward pass to the pixels. Hooks are kept.
    """
    model = unwrap(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: has parameters on the meta device; load its weights first")

    def share(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

    with torch.inference_mode(False), torch.no_grad():
        # deepcopy takes what the memo holds instead of copying it
        memo: dict[int, Any] = {
            id(p): nn.Parameter(share(p), requires_grad=False) for p in model.parameters()
        }
        for module in model.modules():
            for value in (*module._buffers.values(), *vars(module).values()):
                if isinstance(value, Tensor):
                    memo.setdefault(id(value), share(value))
        try:
            twin = copy.deepcopy(model, memo)
        except Exception as error:
            raise ValueError(f"model: {type(model).__name__} cannot be copied: {error}") from error
    twin.eval()
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if (inner := unwrap(child)) is not child:
                setattr(module, name, inner)
        config: Any = getattr(module, "config", None)
        if getattr(config, "return_dict", True) is False:  # tuples are for tracing
            config.return_dict = True
        for flag in ("grad_checkpointing", "gradient_checkpointing"):
            if getattr(module, flag, False):  # recomputing saves memory only for weight gradients
                setattr(module, flag, False)
    return twin


def with_image_encoder(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> nn.Module:
    """Frozen twin of an open_clip ``model`` with another image tower.

    All other parts share the storage of ``model``, which is unchanged.

    Args:
        state: the tower's tensors by their names in ``model.visual``, wrapper prefixes allowed (see
            plain()); cast to the dtypes of the weights they replace.
        source: their file, for messages.
    Raises:
        ValueError: names or shapes differ from ``model.visual``, or are a whole model's.
    """
    twin = frozen_twin(model)
    tower = cast(nn.Module, twin.visual)
    own = tower.state_dict()
    state = plain(state, own)
    what = f"image_encoder: {located(source)}"
    if any(".visual." in f".{key}" for key in state):
        raise ValueError(f"{what} is a whole model: pass it as pretrained=; {_READS}")
    if wrong := misfit(state, own):
        raise ValueError(
            f"{what} does not fit the image tower of the model: it {wrong}; "
            "load it over the architecture that it was tuned from"
        )
    with torch.inference_mode(False), torch.no_grad():
        new = {key: state[key].to(value.device, value.dtype) for key, value in own.items()}
        tower.load_state_dict(new, assign=True)
    return twin


def read_image_encoder(path: Path) -> dict[str, Tensor]:
    """Tensors of a separately saved image tower, by OpenAI's names, on the CPU.

    Layouts of adversarially fine-tuned releases:

    - TeCoA (arXiv 2212.07016), PMG-AFT (2401.04350) and the CLIP-FT, TeCoA and PMG-AFT of TTC
      (2503.03613), ``.pth.tar``: a dict whose "vision_encoder_state_dict" is the tower's;
      other keys are ignored.
    - FARE and TeCoA of RobustVLM (2402.12336), ``.pt``: the tower's state dict itself.

    Both may be torch.save or safetensors files. No code in them is run. Names are the file's:
    with_image_encoder() drops wrapper prefixes.

    Raises:
        ValueError: no file, unknown layout, objects other than plain data, a visual prompt beside
            the tower, or non-finite weights.
    """
    what = f"image_encoder: {located(path)}"
    if not path.is_file():
        raise ValueError(f"{what} is {'a folder' if path.is_dir() else 'not a file'}; {_READS}")
    found = content(path, what)
    if isinstance(found, Mapping) and _TOWER in found:
        for key in _PROMPTS:
            if _holds_weights(found.get(key)):
                raise ValueError(
                    f"{what} has weights under {key!r} too, a visual prompt that its image tower "
                    "was tuned with and that no model here can take"
                )
    return state_dict(found, what, (_TOWER,), f"; {_READS}")


def _holds_weights(value: Any) -> bool:
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(entry, Tensor) and entry.numel() > 0 for entry in values)
