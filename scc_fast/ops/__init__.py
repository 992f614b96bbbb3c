"""Ops: schema, fake, reference and choice of backend, once per op.

An op is torch.ops.scc_fast.<name>. Its reference is the CompositeExplicitAutograd kernel, which
runs everywhere; CPU and CUDA kernels of scc_fast._C take precedence. Its Triton twin, a function of
the same name and signature in scc_fast.kernels, is torch.ops.scc_fast.<name>_triton.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from scc_fast import _extension
from scc_fast.config import shown

BACKENDS = ("reference", "cpp", "triton")

# Order of backends for backend=None, from benchmarks/results (benchmarks/preference.py); the order
# on CUDA is a guess until measured.
_PREFERENCE = {"cuda": ("triton", "cpp", "reference"), "cpu": ("cpp", "reference")}

_LIBRARY = torch.library.Library("scc_fast", "DEF")
_HAS_TRITON: dict[str, bool] = {}  # per op, filled by define

Autograd = tuple[Callable[..., None], Callable[..., Any]]


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[[], ModuleType] | None = None,
    autograd: Autograd | None = None,
) -> Callable[..., Any]:
    """Define one op and return `run(device, backend, *arguments)`, which chooses its backend.

    Args:
        schema: "name(Tensor x, …) -> Tensor", without a namespace.
        reference: the op in plain PyTorch, on any device.
        fake: shapes and dtypes of the result, from fake tensors.
        triton: imports the module of scc_fast.kernels with its twin.
        autograd: (setup_context, backward) for torch.library.register_autograd; without them
            arguments count as constants.
    """
    name = schema.split("(")[0]
    overload = _register(schema, reference, fake, autograd)
    _HAS_TRITON[name] = triton is not None
    if triton is not None:
        # An op of its own, opaque to torch.compile.
        opaque = name.rstrip("_") + "_triton" + "_" * name.endswith("_")
        kernel = _register(
            opaque + schema[len(name) :],
            lambda *arguments: getattr(triton(), name)(*arguments),
            fake,
            autograd,
        )

    def run(device: torch.device, backend: str | None, *arguments: Any) -> Any:
        chosen = choose(name, device.type, backend)
        if autograd and chosen != "reference" and torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{name}: forward-mode differentiation needs backend='reference'"
            )
        if chosen == "triton":
            return kernel(*arguments)
        if chosen == "reference":  # bypasses the dispatcher, which would choose C++
            with torch.set_grad_enabled(autograd is not None and torch.is_grad_enabled()):
                return reference(*arguments)
        return overload(*arguments)

    return run


def _register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Autograd | None,
) -> Callable[..., Any]:
    """Register torch.ops.scc_fast.<name> with `kernel` as its fallback."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"scc_fast::{name}", fake, lib=_LIBRARY)
    if autograd is None:  # constants: otherwise torch warns and returns zero gradients
        _LIBRARY.impl(name, torch.no_grad()(kernel), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        setup_context, backward = autograd
        torch.library.register_autograd(
            f"scc_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.scc_fast, name).default


def names() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_HAS_TRITON)


def backends_of(op: str, device: torch.device | str) -> dict[str, str | None]:
    """Per backend of an op on a device: None if available, else the reason."""
    kind = torch.device(device).type
    return {"reference": None, "cpp": _why_not_cpp(op, kind), "triton": _why_not_triton(op, kind)}


# Constant for Dynamo: independent of tensor values.
@torch.compiler.assume_constant_result
def choose(op: str, kind: str, backend: str | None) -> str:
    """Backend of an op on a kind of device ("cpu", "cuda", …).

    Raises:
        ValueError: unknown backend.
        RuntimeError: the requested backend is not available.
    """
    return _choose(op, kind, backend)


@functools.cache
def _choose(op: str, kind: str, backend: str | None) -> str:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {BACKENDS}, got {shown(backend)}")
    why_not = backends_of(op, kind)
    if backend is None:
        ranking = _PREFERENCE.get(kind, ("reference",))
        return next(name for name in ranking if why_not[name] is None)
    if why_not[backend] is not None:
        raise RuntimeError(f"{op}: backend {shown(backend)} is not available: {why_not[backend]}")
    return backend


def _why_not_cpp(op: str, kind: str) -> str | None:
    if kind not in ("cpu", "cuda"):
        return f"there are no C++ kernels for {kind} tensors"
    if not _extension.available():
        return _extension.WHY
    # By the dispatcher, which knows each op and device.
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"scc_fast::{op}", kind.upper()):
        return None
    return f"scc_fast._C (built for {_extension.BUILT}) holds no {op} for {kind} tensors"


def _why_not_triton(op: str, kind: str) -> str | None:
    if not _HAS_TRITON[op]:
        return f"{op} has no Triton kernel"
    if kind not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {kind} tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if kind == "cpu" and not _triton_is_interpreted():
        return "on CPU tensors Triton needs TRITON_INTERPRET=1, set before triton is imported"
    return None


def _triton_is_interpreted() -> bool:
    """Whether @triton.jit interprets, as fixed at triton's import."""
    import triton

    return not isinstance(triton.language.softmax, triton.JITFunction)


from scc_fast.ops.attention import (  # noqa: E402  (these need define)
    attention,
    attention_back,
)
from scc_fast.ops.encoder import (  # noqa: E402
    add_norm,
    add_norm_back,
    gelu,
    gelu_back,
)
from scc_fast.ops.heads import (  # noqa: E402
    ClassTable,
    drift_head,
    margin_head,
    mean_logits,
    pseudo_label,
    view_weights,
)
from scc_fast.ops.philox import philox_normal, philox_uniform  # noqa: E402
from scc_fast.ops.step import pgd_step_  # noqa: E402
from scc_fast.ops.views import make_views, make_views_adjoint  # noqa: E402
from scc_fast.ops.warp import warp_views  # noqa: E402

__all__ = [
    "BACKENDS",
    "ClassTable",
    "add_norm",
    "add_norm_back",
    "attention",
    "attention_back",
    "backends_of",
    "choose",
    "define",
    "drift_head",
    "gelu",
    "gelu_back",
    "make_views",
    "make_views_adjoint",
    "margin_head",
    "mean_logits",
    "names",
    "pgd_step_",
    "philox_normal",
    "philox_uniform",
    "pseudo_label",
    "view_weights",
    "warp_views",
]
