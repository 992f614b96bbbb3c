"""The ops between an encoder's products: inputs, our call, torch's own calls, bytes and FLOPs.

Tokens of ViT-B/32, four views of each image; inputs are in the precision, the stream in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from op_work import DTYPES, Case, Work, agree
from scc_fast import ops

OPS = ("add_norm", "add_norm_back", "gelu", "gelu_back", "attention", "attention_back")
TOKENS, HEAD = 50, 64
SETS = 4  # a product has just written them: a cold cache would be the wrong question
_aten = torch.ops.aten

# Ours, the baseline, bytes, FLOPs; and what is right, where the baseline rounds too much to say.
Calls = tuple[Any, ...]


def work(case: Case, kind: str) -> Work:
    """Prepare a case on "cpu" or "cuda"."""
    torch.manual_seed(0)
    make = {"add_norm": _norm, "gelu": _gelu, "attention": _attention}
    back = case.op.endswith("_back")
    ours, baseline, moved, flops, *rest = make[case.op.removesuffix("_back")](case, kind, back)
    right = rest[0] if rest else baseline

    def check(backend: str) -> None:
        agree(ours(backend, 1), right(1), case.precision)

    return Work(ours, baseline, check, moved, SETS, flops)


def _shape(case: Case) -> tuple[int, int, int]:
    return case.count * case.batch, TOKENS, case.width


def _random(case: Case, kind: str, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=kind).to(DTYPES[case.precision]) for _ in range(SETS)]


def _norm(case: Case, kind: str, back: bool) -> Calls:
    shape, dtype = _shape(case), DTYPES[case.precision]
    width = case.width
    x, residual = ([torch.randn(shape, device=kind) for _ in range(SETS)] for _ in range(2))
    y, gradient = _random(case, kind, *shape), _random(case, kind, *shape)
    weight, bias = torch.rand(width, device=kind), torch.rand(width, device=kind)
    one, low = x[0].nbytes, y[0].nbytes
    if not back:

        def ours(backend: str, i: int) -> Any:
            return ops.add_norm(x[i], y[i], weight, bias, 1e-5, dtype=dtype, backend=backend)[:2]

        def baseline(i: int) -> Any:
            total = x[i] + y[i]
            return total, F.layer_norm(total, (width,), weight, bias, 1e-5).to(dtype)

        return ours, baseline, 2 * one + 2 * low, 0
    kept = [ops.add_norm(t, None, weight, bias, 1e-5)[2:] for t in x]

    def ours_back(backend: str, i: int) -> Any:
        arguments = (gradient[i], x[i], *kept[i], weight, residual[i])
        return ops.add_norm_back(*arguments, dtype=dtype, backend=backend)

    def baseline_back(i: int) -> Any:
        mean, scale = (part.unsqueeze(-1) for part in kept[i])
        only_input = [True, False, False]
        whole = _aten.native_layer_norm_backward(
            gradient[i].float(), x[i], (width,), mean, scale, weight, bias, only_input
        )[0]
        whole = whole + residual[i]
        return whole, whole.to(dtype)

    low_too = low if dtype != torch.float32 else 0
    return ours_back, baseline_back, 3 * one + low + low_too, 0


def _gelu(case: Case, kind: str, back: bool) -> Calls:
    x, gradient = _random(case, kind, *_shape(case)), _random(case, kind, *_shape(case))
    bias = torch.randn(case.width, device=kind).to(DTYPES[case.precision])

    def ours(backend: str, i: int) -> Any:
        if back:
            return ops.gelu_back(gradient[i], x[i], bias, kind="quick", backend=backend)
        return ops.gelu(x[i], bias, kind="quick", backend=backend)

    def baseline(i: int) -> Any:
        z = (x[i] + bias).float()
        share = torch.sigmoid(1.702 * z)
        if back:
            return (gradient[i] * (share * (1 + 1.702 * z * (1 - share)))).to(x[i].dtype)
        return (z * share).to(x[i].dtype)

    return ours, baseline, (2 + back) * x[0].nbytes, 0


def _attention(case: Case, kind: str, back: bool) -> Calls:
    rows, tokens, width = _shape(case)
    packed = _random(case, kind, rows, tokens, 3, width // HEAD, HEAD)
    parts = [p.permute(2, 0, 3, 1, 4).unbind(0) for p in packed]
    whole = _random(case, kind, rows, tokens, width // HEAD, HEAD)
    gradient = [one.transpose(1, 2) for one in whole]
    flops = 4 * rows * width * tokens**2
    size = gradient[0].nbytes
    if not back:

        def ours(backend: str, i: int) -> Any:
            return ops.attention(*parts[i], backend=backend)[0]

        def baseline(i: int) -> Any:
            return F.scaled_dot_product_attention(*parts[i])

        return ours, baseline, 4 * size, flops
    sums = [ops.attention(*three)[1] for three in parts]
    graphs = []
    with torch.enable_grad():
        for three in parts:
            leaves = [part.detach().requires_grad_() for part in three]
            graphs.append((F.scaled_dot_product_attention(*leaves), leaves))

    def ours_back(backend: str, i: int) -> Any:
        return ops.attention_back(gradient[i], *parts[i], sums[i], backend=backend)

    def baseline_back(i: int) -> Any:
        return torch.autograd.grad(*graphs[i], gradient[i], retain_graph=True)

    def right_back(i: int) -> Any:
        with torch.enable_grad():
            leaves = [part.detach().float().requires_grad_() for part in parts[i]]
            o = F.scaled_dot_product_attention(*leaves)
            found = torch.autograd.grad(o, leaves, gradient[i].float())
        return tuple(one.to(gradient[i].dtype) for one in found)

    return ours_back, baseline_back, 7 * size, 2 * flops, right_back
