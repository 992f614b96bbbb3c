"""Choice of engine, precision and backends for a model, or the reason against one."""

from __future__ import annotations

import threading

import torch

from scc_fast import ops
from scc_fast.engine.encoder import Compiled, Encoder, Modules, Runner
from scc_fast.engine.trust import Trust
from scc_fast.engine.vit import Tower, has_onednn
from scc_fast.engine.vit_from import adapter_of, tower_of
from scc_fast.engine.vit_from.parts import UnknownPartError
from scc_fast.models import VisionLanguage

ENGINES = ("auto", "eager", "compile", "runner", "graph")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The ops that every defense needs.
OPS = (
    "philox_uniform",
    "make_views",
    "make_views_adjoint",
    "pgd_step_",
    "drift_head",
    "pseudo_label",
    "margin_head",
    "mean_logits",
    "view_weights",
)

_LOCK = threading.RLock()


def choose_backends(device: torch.device, backend: str | None) -> str:
    """Backends of the ops, joined by "+".

    Raises:
        ValueError, RuntimeError: the backend is unknown or lacks an op.
    """
    return "+".join(sorted({ops.choose(op, device.type, backend) for op in OPS}))


def choose_encoder(
    model: VisionLanguage, engine: str, precision: str, backend: str | None, served: str
) -> tuple[Encoder, str, str]:
    """Encoder, engine and precision.

    Args:
        model: a snapshot.
        engine: one of ENGINES.
        precision: "auto" or one of PRECISIONS.
        backend: as the caller gave it.
        served: result of choose_backends.

    Raises:
        RuntimeError: a combination named by the caller is not available.
    """
    held, kind = weights_precision(model), model.device.type
    if served == "reference":
        if engine not in ("auto", "eager"):
            raise _reference_only(model, backend, f"engine={engine!r}", 'engine="eager"')
        if precision not in ("auto", held):
            asked, instead = f"precision={precision!r}", f'precision="{held}"'
            raise _reference_only(model, backend, asked, instead)
        engine, precision = "eager", held
    if engine == "graph" and kind != "cuda":
        raise RuntimeError(
            f"engine='graph' cannot serve {model.name}: CUDA graphs need a CUDA device, the "
            f'model is on {model.device}; use engine="auto"'
        )
    if precision not in ("auto", held) and not is_native(PRECISIONS[precision], kind):
        raise RuntimeError(
            f"precision={precision!r} cannot serve {model.name}: this CPU has no arithmetic "
            f'for it; use precision="{held}" or "auto"'
        )
    encoder = encoder_of(model, engine, PRECISIONS[held])
    if precision == "auto":
        # On a GPU bfloat16 halves the weights' bytes and uses tensor cores, with float32's range.
        # The model's own modules keep their precision.
        reduced = (
            kind == "cuda"
            and held == "fp32"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        precision = "bf16" if reduced and isinstance(encoder, Runner) else held
    if precision != held:
        encoder = encoder_of(model, engine, PRECISIONS[precision])
    if isinstance(encoder, Runner):
        graphs = kind == "cuda" and engine in ("auto", "graph")
        return encoder, "graph" if graphs else "runner", precision
    if precision != held != "fp32":  # autocast casts only from float32
        raise RuntimeError(
            f"precision={precision!r} is not available for {model.name}, whose modules are in "
            f'{held}: load it with precision="fp32", or use precision="{held}"'
        )
    return encoder, "compile" if engine == "compile" else "eager", precision


def weights_precision(model: VisionLanguage) -> str:
    """Precision of a model's weights.

    Raises:
        ValueError: it is none of PRECISIONS.
    """
    dtype = getattr(model, "dtype", torch.float32)
    for name, known in PRECISIONS.items():
        if dtype == known:
            return name
    raise ValueError(f"model: its dtype must be one of {list(PRECISIONS.values())}, got {dtype!r}")


def is_native(dtype: torch.dtype, kind: str) -> bool:
    """Whether a device has arithmetic in a dtype; emulation on a CPU is up to 20 times slower."""
    return kind != "cpu" or dtype == torch.float32 or has_onednn(dtype)


def encoder_of(model: VisionLanguage, engine: str, dtype: torch.dtype) -> Encoder:
    """Encoder of an engine in `dtype`.

    Args:
        model: a snapshot. It keeps its runner: all Defenders share packed weights and graphs.
        engine: one of ENGINES.

    Raises:
        RuntimeError: the engine named by the caller cannot serve this model.
    """
    if engine == "compile":
        return Compiled(model, dtype)
    if engine == "eager":
        return Modules(model, dtype)
    found = _runner(model, dtype)
    if isinstance(found, Runner):
        return found
    if engine == "runner":
        raise RuntimeError(cannot_serve(model, engine, found))
    return Modules(model, dtype)


def cannot_serve(model: VisionLanguage, engine: str, reason: str) -> str:
    """Error message for an engine named by the caller."""
    return f'engine={engine!r} cannot serve {model.name}: {reason}; use engine="eager" or "auto"'


def _runner(model: VisionLanguage, dtype: torch.dtype) -> Runner | str:
    """Runner of a snapshot, or the reason why it has none."""
    try:
        adapter_of(model)
    except UnknownPartError as unknown:
        return str(unknown)
    with _LOCK:
        kept = vars(model)
        if "runners" not in kept:
            kept["runners"] = Trust(model), {}
        trust, runners = kept["runners"]
        reason = trust.reason(model)
        if reason:
            return reason
        if dtype not in runners:
            tower = tower_of(model, dtype)
            assert isinstance(tower, Tower)  # does not depend on the dtype
            runners[dtype] = Runner(tower, trust)
        return runners[dtype]


def _reference_only(
    model: VisionLanguage, backend: str | None, asked: str, instead: str
) -> RuntimeError:
    why = "with backend='reference'" if backend else "here, where no op is compiled"
    return RuntimeError(
        f"{asked} cannot serve {model.name} {why}: scc_fast.reference does, on the "
        f'model\'s modules (scc-fast doctor); use {instead} or "auto"'
    )
