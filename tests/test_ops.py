"""All ops: as torch sees them, called without Python's checks, and none left without its cases."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import op_cases
from scc_fast import ops
from scc_fast.ops.views import views_shape


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments with every tensor on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def arguments(op: str, batch: int = 2, patch: int = 0) -> dict[str, Any]:
    """Valid arguments of an op by name, in the order of its schema; an unknown op is refused."""
    x, delta, seed = (
        op_cases.pixels(batch, 3, 5, 7),
        op_cases.deltas(batch, 3, 5, 7),
        7 + torch.arange(batch),
    )
    views, rows = op_cases.FEW_VIEWS, op_cases.random(2, batch, 13)
    plan = [number for view in views for number in (int(view.flip), *view.shift)]
    noise = [view.noise for view in views]
    plain = {"x": x, "delta": delta, "seeds": seed, "plan": plan, "noise": noise}
    gradient, text = op_cases.random(*views_shape(x, len(views), patch)), op_cases.unit(5, 13)
    count = torch.tensor([1, 3, 1, 1, 2])
    if op.startswith("philox_"):
        return {"seeds": seed, "purpose": 1, "view": 2, "numel": 10}
    if op == "make_views":
        colours = {
            "fill": list(op_cases.FILL),
            "mean": list(op_cases.MEAN),
            "std": list(op_cases.STD),
        }
        return {**plain, **colours, "dtype": torch.float32, "patch": patch}
    if op == "make_views_adjoint":
        return {"gradient": gradient, **plain, "std": list(op_cases.STD), "patch": patch}
    if op == "pgd_step_":
        step = {"alpha": op_cases.ALPHA, "epsilon": op_cases.EPSILON, "weight": 0.5, "patch": patch}
        first = {
            "delta": delta,
            "weighted": op_cases.deltas(batch, 3, 5, 7, seed=5),
            "gradient": gradient,
        }
        return {**first, "x": x, "seeds": seed, "plan": plan, "noise": noise, **step}
    if op == "warp_views":
        warp = op_cases.Warp(batch, 5, 7, (5, 6), box=True)
        x, matrix, box = warp.inputs()
        colours = {"fill": list(op_cases.FILL), "mean": [0.5] * 3, "std": list(op_cases.STD)}
        samples = 1 + torch.arange(8 * batch).view(8, batch) % 3
        first = {"x": x, "matrix": matrix, "box": box, "samples": samples, "size": [5, 6]}
        return {**first, "cubic": True, **colours, "dtype": torch.float32, "patch": patch}
    if op == "drift_head":
        return {"features": rows, "anchor": op_cases.random(batch, 13, seed=3)}
    if op == "pseudo_label":
        last = {"scale": 20.0, "bias": -1.0, "temperature": 0.5}
        return {"features": rows, "text": text, "count": count, **last}
    if op == "margin_head":
        label = torch.arange(batch) % 5
        soft = op_cases.unit(batch, 13, seed=4)
        first = {"features": rows, "soft": soft, "label": label, "text": text}
        return {**first, "count": count, "scale": 20.0}
    if op == "mean_logits":
        weights = op_cases.random(2, batch, seed=5)
        last = {"scale": 20.0, "bias": -1.0, "unit": True}
        return {"features": rows, "text": text, "weights": weights, **last}
    if op == "view_weights":
        rule = {"low": 1.0, "high": 2.5, "threshold": 0.1, "slope": float("inf")}
        return {"features": rows, **rule, "geodesic": False}
    if op in op_cases.ENCODER:
        return encoder_arguments(op, batch)
    if op in op_cases.ATTENTION:
        q, k, v = (op_cases.random(batch, 3, tokens, 5, seed=tokens) for tokens in (4, 6, 6))
        back = {"gradient": q + 1, "q": q, "k": k, "v": v, "lse": 2 + q[..., 0]}
        return back if op == "attention_back" else {"q": q, "k": k, "v": v}
    raise LookupError(f"op_cases.arguments knows no {op}: add its case here")


def encoder_arguments(op: str, batch: int) -> dict[str, Any]:
    x, y = op_cases.random(batch, 3, 13), op_cases.random(batch, 3, 13, seed=3)
    weight, bias = op_cases.random(13, seed=4), op_cases.random(13, seed=5)
    mean, scale = op_cases.random(batch, 3, seed=6), 1 + torch.rand(batch, 3)
    kept = {"total": x, "mean": mean, "scale": scale, "weight": weight, "residual": x + 1}
    first: dict[str, dict[str, Any]] = {
        "add_norm": {"x": x, "y": y, "weight": weight, "bias": bias, "epsilon": 1e-5},
        "add_norm_back": {"gradient": y, **kept},
        "gelu": {"x": x, "bias": bias},
        "gelu_back": {"gradient": y, "x": x, "bias": bias},
    }
    last = {"kind": "erf"} if op.startswith("gelu") else {"dtype": torch.bfloat16}
    return {**first[op], **last}


def samples(op: str) -> list[dict[str, Any]]:
    """Several valid arguments of an op: an odd batch, one image, none; options on and off."""
    several = [arguments(op, batch) for batch in (3, 1, 0)]
    first = several[0]
    if "patch" in first:
        several += [arguments(op, batch, patch=1) for batch in (2, 0)]
    if op == "view_weights":
        several += [{**first, "slope": 5.0}, {**first, "geodesic": True}]
    for name in ("delta", "weighted", "count", "weights"):
        if name in first and not (op == "pgd_step_" and name == "delta"):
            several.append({**arguments(op), name: None})
    if "count" in first:  # with rows that are no class, and with none that is one
        several += [{**first, "count": first["count"] * (torch.arange(5) % n)} for n in (2, 1)]
    for name in ("gradient", "features"):
        if name in first and "anchor" not in first:
            several.append({**first, name: first[name].bfloat16()})
    if op == "make_views":
        several.append({**first, "dtype": torch.float16})
    if op == "warp_views":
        plain = {"box": None, "samples": None, "fill": []}
        several += [{**first, **plain}, {**first, "cubic": False, "dtype": torch.float16}]
    if op in op_cases.ATTENTION:
        half = {name: first[name].half() for name in first if name != "lse"}
        strided = {name: first[name].mT.contiguous().mT for name in half}
        several = [*several[:3], {**first, **half}, {**first, **strided}]
        several += [{**first, "k": first["k"][:, :, :0], "v": first["v"][:, :, :0]}]
    if op in op_cases.ENCODER:
        several = several[:3]
        optional = {"add_norm": "y", "add_norm_back": "residual"}.get(op, "bias")
        several.append({**first, optional: None})
        if "dtype" in first:
            several += [{**first, "dtype": dtype} for dtype in op_cases.DTYPES[:2]]
        else:
            half = {name: first[name].half() for name in first if isinstance(first[name], Tensor)}
            several += [{**first, **half}, *({**first, "kind": k} for k in ("quick", "tanh"))]
    return several


def mistakes(op: str) -> dict[str, dict[str, Any]]:
    """Per mistake, one argument of an op changed so that a kernel without checks would go astray.

    They are what Python refuses before; a caller of torch.ops.scc_fast meets the op alone.
    """
    good = arguments(op)
    wrong: dict[str, dict[str, Any]] = {}
    for name, value in good.items():
        if isinstance(value, Tensor):
            other = torch.int32 if value.dtype == torch.int64 else torch.float64
            wrong[f"{name} of another dtype"] = {name: value.to(other)}
            if name != "gradient":  # the numbers of which only have to be there, in their order
                wrong[f"{name} with a dimension more"] = {name: value[..., None]}
            wrong[f"{name} one row longer"] = {name: torch.cat([value, value[:1]])}
            wrong[f"{name} one column shorter"] = {name: value[..., :-1].contiguous()}
    # A different length of these is a different op, as valid.
    for name in ("philox_uniform", "philox_normal"):
        if op == name:
            kept = {key: wrong[key] for key in wrong if "row" not in key and "column" not in key}
            out = {"view 2^32": {"view": 2**32}, "purpose -1": {"purpose": -1}}
            return {**kept, **out, "numel -1": {"numel": -1}}
    if "plan" in good:
        wrong["plan one number short"] = {"plan": good["plan"][:-1]}
        wrong["noise one view short"] = {"noise": good["noise"][:-1]}
        wrong["no views"] = {"plan": [], "noise": []}
        wrong["patch below zero"] = {"patch": -1}
        wrong["patch past the picture"] = {"patch": 6}
    for name in ("fill", "mean", "std"):
        if name in good:
            wrong[f"{name} of two numbers"] = {name: [0.5, 0.5]}
    if op == "warp_views":
        wrong["size of one number"] = {"size": [5]}
        wrong["size of no pixels"] = {"size": [0, 6]}
        wrong["x without pixels"] = {"x": good["x"][:, :, :0]}
        wrong["patch below zero"] = {"patch": -1}
        wrong["patch past the view"] = {"patch": 6}
        for name in ("matrix", "x"):  # a picture may be any size, and views any number
            wrong.pop(f"{name} one column shorter" if name == "x" else f"{name} one row longer")
        wrong["box and samples of other views"] = {"matrix": good["matrix"][:7]}
        wrong["no views"] = {name: good[name][:0] for name in ("matrix", "box", "samples")}
    if "dtype" in good:
        wrong["dtype float64"] = {"dtype": torch.float64}
        wrong["dtype int32"] = {"dtype": torch.int32}
    if op == "pgd_step_":
        for name in ("delta", "weighted"):
            strided = good[name].to(memory_format=torch.channels_last)
            wrong[f"{name} not contiguous"] = {name: strided}
    if "features" in good:
        wrong["no views"] = {"features": good["features"][:0]}
        wrong["no features"] = {"features": good["features"][..., :0]}
    if "noise" in good:
        wrong["noise below zero"] = {"noise": [-1.0, *good["noise"][1:]]}
        wrong["noise NaN"] = {"noise": [float("nan"), *good["noise"][1:]]}
    if op == "pgd_step_":
        wrong["epsilon below zero"] = {"epsilon": -1.0}
        wrong["alpha NaN"] = {"alpha": float("nan")}
    if op == "margin_head":
        wrong["label past the table"] = {"label": good["label"] + 5}
        wrong["label below zero"] = {"label": good["label"] - 1}
    if op == "pseudo_label":
        wrong["scale below zero"] = {"scale": -10.0}
    if "count" in good:
        # One row more belongs to another table; the other tensors decide the shapes.
        wrong["count one row shorter"] = {"count": good["count"][:-1]}
    if op == "view_weights":
        wrong["one view"] = {"features": good["features"][:1]}
        wrong.pop("features one column shorter")
    for key in ("features one row longer", "text one row longer"):
        held = ("count" in good and key.startswith("text")) or "weights" in good
        if op != "drift_head" and not (held and (key.startswith("text") == ("count" in good))):
            wrong.pop(key, None)
    if op == "drift_head":
        wrong.pop("features one row longer")
    if "kind" in good:
        wrong["kind of no gelu"] = {"kind": "swish"}
        wrong["gradient of another format"] = {"gradient": good["x"].half()}
    if op == "gelu":  # any shape that ends in the bias is right
        wrong.pop("x one row longer")
        wrong.pop("gradient of another format")
    if op in op_cases.ATTENTION:
        wrong["v one key longer"] = {"v": torch.cat([good["v"], good["v"][:, :, :1]], dim=2)}
        wrong["k of another format"] = {"k": good["k"].half()}
        wrong["no width"] = {name: good[name][..., :0] for name in good if name != "lse"}
    if op == "attention_back":
        wrong["gradient one query shorter"] = {"gradient": good["gradient"][:, :, 1:]}
    if op == "add_norm":
        wrong["epsilon below zero"] = {"epsilon": -1.0}
        wrong["epsilon NaN"] = {"epsilon": float("nan")}
        wrong["no width"] = {"x": good["x"][..., :0]}
    return wrong


SAMPLES = [(op, index) for op in ops.names() for index in range(len(samples(op)))]
MISTAKES = [
    pytest.param(*backend.values, op, mistake, marks=backend.marks)
    for op in ops.names()
    for backend in op_cases.backends_under_test(op, ("cpp",))
    for mistake in mistakes(op)
]


@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize(("op", "index"), SAMPLES)
def test_opcheck(op: str, index: int, device: str) -> None:
    sample = to_device(samples(op)[index], device)
    overload = getattr(torch.ops.scc_fast, op).default
    torch.library.opcheck(overload, tuple(sample.values()))
    leaves = {"make_views": ("x", "delta"), "mean_logits": ("features", "weights")}.get(op, ())
    if leaves and index < 3 and all(sample[name] is not None for name in leaves):
        wanted = {name: sample[name].clone().requires_grad_() for name in leaves}
        torch.library.opcheck(overload, tuple({**sample, **wanted}.values()))


@pytest.mark.parametrize(("device", "backend", "op", "mistake"), MISTAKES)
def test_the_op_itself_refuses_mistakes(device: str, backend: str, op: str, mistake: str) -> None:
    """torch.ops.scc_fast.<op> names itself in the error, and does not crash."""
    changed = to_device({**arguments(op), **mistakes(op)[mistake]}, device)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=rf"\b{op}\b"):
        getattr(torch.ops.scc_fast, op)(**changed)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ops.names())
def test_the_op_itself_refuses_another_device(op: str) -> None:
    good = to_device(arguments(op), "cuda")
    tensors = [name for name, value in good.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else ():
        with pytest.raises((RuntimeError, ValueError, TypeError), match=rf"\b{op}\b"):
            getattr(torch.ops.scc_fast, op)(**{**good, name: good[name].cpu()})


@pytest.mark.parametrize("op", ops.names())
def test_no_op_goes_without_cases(op: str) -> None:
    """A new op has its arguments above, and a test file that runs it on every backend."""
    assert len(samples(op)) >= 3
    assert mistakes(op)
    # Not this file.
    files = [
        path.read_text("utf8")
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name != "test_ops.py"
    ]
    covering = [text for text in files if re.search(rf"\b{op}\b", text)]
    for needed in (r"\bbackends_under_test\(", r"\bfullgraph=True\b", r"_name_op_and_argument"):
        assert any(re.search(needed, text) for text in covering), (op, needed)


# ---- Memory --------------------------------------------------------------------------------------

LARGE = """
import ctypes, json, sys, torch
from scc_fast import ops
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
text = torch.randn(20_011, 768).div_(768**0.5)
features, soft, label = torch.randn(8, 64, 768), text[:64].clone(), torch.arange(64)
def run(features, table):
    n = features.shape[1]
    yield "pseudo_label", lambda: ops.pseudo_label(features, table, 0.5, backend="cpp")
    yield "margin_head", lambda: ops.margin_head(features, soft[:n], label[:n], table,
                                                 backend="cpp")
    yield "mean_logits", lambda: ops.mean_logits(features, table, backend="cpp")
for _, call in run(features[:1, :1], ops.ClassTable(text[:9].clone(), None, None, 20.0)): call()
extra = {}
for name, call in run(features, ops.ClassTable(text, None, None, 20.0)):
    ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what is used
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = status("VmRSS")
    call()
    extra[name] = status("VmHWM") - before
print(json.dumps(extra))
"""
LIMIT = 64  # MiB, beside 61 of the table; all logits at once would be 39, with their copies more


@pytest.mark.parametrize(
    ("device", "backend"),
    [p for p in op_cases.backends_under_test("margin_head", ("cpp",)) if p.values[0] == "cpu"],
)
def test_memory_on_the_cpu(device: str, backend: str) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs to measure a peak with")
    here = str(Path(__file__).parents[1])
    answer = subprocess.run(
        [sys.executable, "-c", LARGE], check=True, capture_output=True, cwd=here
    )
    extra = json.loads(answer.stdout)
    assert max(extra.values()) < LIMIT, extra


@pytest.mark.parametrize(
    ("device", "backend"),
    [p for p in op_cases.backends_under_test("margin_head", ("cpp", "triton"))
     if p.values[0] == "cuda"],
)  # fmt: skip
def test_memory_on_the_gpu(device: str, backend: str) -> None:
    table = ops.ClassTable(op_cases.unit(20_011, 768).to(device), None, None, 20.0)
    features = op_cases.random(8, 64, 768).to(device)
    soft, label = op_cases.unit(64, 768).to(device), torch.arange(64, device=device)
    for call in (
        lambda: ops.pseudo_label(features, table, 0.5, backend=backend),
        lambda: ops.margin_head(features, soft, label, table, backend=backend),
        lambda: ops.mean_logits(features, table, backend=backend),
    ):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < LIMIT * 2**20
