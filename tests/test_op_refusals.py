"""What the functions of scc_fast.ops refuse: the error names the op, the argument and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from op_cases import random, unit
from scc_fast import ops
from scc_fast.config import View
from scc_fast.ops import ClassTable

X, META = torch.rand(2, 3, 5, 7), torch.empty(2, 3, 5, 7, device="meta")
SHAPE = r"\(2, 3, 5, 7\)"
VIEWS_BOTH = (
    ({"x": [0.5]}, TypeError, "x must be a tensor, got list"),
    ({"x": X.half()}, TypeError, "x must be float32, got torch.float16"),
    ({"x": X[0]}, ValueError, r"x must be \(B, 3, H, W\), got shape \(3, 5, 7\)"),
    ({"x": X.repeat(1, 2, 1, 1)}, ValueError, r"x must be \(B, 3, H, W\), got shape"),
    ({"x": None}, (TypeError, ValueError), "x must be"),
    ({"delta": 0.1}, TypeError, "delta must be a tensor, got float"),
    ({"delta": X.double()}, TypeError, "delta must be float32, got torch.float64"),
    ({"delta": X[:1]}, ValueError, f"delta must have the shape of x, {SHAPE}, got shape"),
    ({"delta": META}, ValueError, "delta must be on cpu, got meta"),
    ({"seeds": 5}, TypeError, "seeds must be an int64 tensor, got int"),
    ({"seeds": torch.arange(2.0)}, TypeError, "seeds must be an int64 tensor, got torch.float32"),
    ({"seeds": torch.zeros(2, 1).long()}, ValueError, r"seeds must be \(2,\), got shape"),
    ({"seeds": torch.arange(2, device="meta")}, ValueError, "seeds must be on cpu, got meta"),
    ({"views": ()}, ValueError, "views must hold at least one view, got none"),
    ({"views": [View(shift=(0.1, 0))]}, ValueError, "views must be shifted by whole pixels, got"),
    ({"views": [None]}, TypeError, "views must be a list or tuple of View"),
    ({"patch": -1}, ValueError, r"patch must be in \[0, 5\], got -1"),
    ({"patch": 6}, ValueError, r"patch must be in \[0, 5\], got 6"),
    ({"patch": 2.0}, TypeError, "patch must be an int, got 2.0"),
    ({"std": (1.0, 1.0)}, ValueError, r"std must be three numbers, got \(1.0, 1.0\)"),
    ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must be above 0"),
    ({"std": (1.0, torch.nan, 1.0)}, ValueError, "std must be three numbers"),
    ({"std": (1.0, "a", 1.0)}, (TypeError, ValueError), "std must be three numbers"),
)  # fmt: skip
VIEWS_ALONE = (
    ({"mean": (0.5,)}, ValueError, r"mean must be three numbers, got \(0.5,\)"),
    ({"mean": 0.5}, (TypeError, ValueError), "mean must be three numbers"),
    ({"fill": (0.5, 0.5, torch.inf)}, ValueError, "fill must be three numbers"),
    ({"dtype": torch.float64}, TypeError, "dtype must be one of .*, got torch.float64"),
    ({"dtype": "half"}, TypeError, "dtype must be one of .*, got half"),
)  # fmt: skip
ADJOINT_ALONE = (
    ({"gradient": None}, TypeError, "gradient must be a tensor of .*, got NoneType"),
    ({"gradient": X.double()}, TypeError, "gradient must be a tensor of .*, got torch.float64"),
    ({"gradient": X[:1]}, ValueError, f"gradient must be {SHAPE}, got shape"),
    ({"gradient": META}, ValueError, "gradient must be on cpu, got meta"),
    ({"patch": 2}, ValueError, r"gradient must be \(2, 6, 12\), got shape"),
)  # fmt: skip

STRIDED = torch.zeros(2, 3, 7, 5).mT
STEP = (
    ({"delta": [0.0]}, TypeError, "delta must be a tensor, got list"),
    ({"delta": X.double()}, TypeError, "delta must be float32, got torch.float64"),
    ({"delta": X[0]}, ValueError, r"delta must be \(B, 3, H, W\), got shape \(3, 5, 7\)"),
    ({"delta": X[:, :1]}, ValueError, r"delta must be \(B, 3, H, W\)"),
    ({"delta": META}, ValueError, "x must be on meta, got cpu"),
    ({"delta": STRIDED}, ValueError, "delta is written in place and must be contiguous"),
    ({"weighted": STRIDED}, ValueError, "weighted is written in place and must be contiguous"),
    ({"weighted": X.half()}, TypeError, "weighted must be float32, got torch.float16"),
    ({"weighted": X[:1]}, ValueError, f"weighted must have the shape of delta, {SHAPE}"),
    ({"weighted": META}, ValueError, "weighted must be on cpu, got meta"),
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": X.bfloat16()}, TypeError, "x must be float32, got torch.bfloat16"),
    ({"x": X[..., :6]}, ValueError, f"x must have the shape of delta, {SHAPE}"),
    ({"x": META}, ValueError, "x must be on cpu, got meta"),
    ({"gradient": None}, TypeError, "gradient must be a tensor of .*, got NoneType"),
    ({"gradient": X.double()}, TypeError, "gradient must be a tensor of .*, got torch.float64"),
    ({"gradient": X[:1]}, ValueError, f"gradient must be {SHAPE}, got shape"),
    ({"gradient": META}, ValueError, "gradient must be on cpu, got meta"),
    ({"seeds": [1, 2]}, TypeError, "seeds must be an int64 tensor, got list"),
    ({"seeds": torch.zeros(2)}, TypeError, "seeds must be an int64 tensor, got torch.float32"),
    ({"seeds": torch.arange(3)}, ValueError, r"seeds must be \(2,\), got shape \(3,\)"),
    ({"seeds": torch.arange(2, device="meta")}, ValueError, "seeds must be on cpu, got meta"),
    ({"views": []}, ValueError, "views must hold at least one view, got none"),
    ({"views": View()}, TypeError, "views must be a list or tuple of View"),
    ({"views": "paper"}, TypeError, "views must be a list or tuple of View"),
    ({"patch": 6}, ValueError, r"patch must be in \[0, 5\], got 6"),
    ({"patch": True}, TypeError, "patch must be an int, got True"),
    ({"alpha": -0.1}, ValueError, "alpha must be a finite number >= 0, got -0.1"),
    ({"alpha": "1/255"}, ValueError, "alpha must be a finite number >= 0, got '1/255'"),
    ({"epsilon": torch.inf}, ValueError, "epsilon must be a finite number >= 0, got inf"),
    ({"weight": torch.nan}, ValueError, "weight must be a finite number >= 0, got nan"),
)  # fmt: skip


def small_table(device: str = "cpu", width: int = 13) -> ClassTable:
    return ClassTable(unit(5, width).to(device), None, None, 20.0, -1.0)


ROWS, TABLE = random(2, 3, 13), small_table()
HEADS_VALID = {
    "drift_head": {"features": ROWS, "anchor": ROWS[0]},
    "pseudo_label": {"features": ROWS, "table": TABLE, "temperature": 0.5},
    "margin_head": {"features": ROWS, "soft": ROWS[0], "label": torch.arange(3), "table": TABLE},
    "mean_logits": {"features": ROWS, "table": TABLE},
    "view_weights": {"features": ROWS, "low": 1.0, "high": 2.5, "threshold": 0.85},
}
EVERY = (
    ({"features": [1.0]}, TypeError, "features must be a tensor of .*, got list"),
    ({"features": ROWS.double()}, TypeError, "features must be a tensor of .*, got torch.float64"),
    ({"features": ROWS[0]}, ValueError, r"features must be \(L, B, D\) .* got shape \(3, 13\)"),
    ({"features": ROWS[:0]}, ValueError, r"features must be \(L, B, D\) with L and D >= 1"),
    ({"features": ROWS[..., :0]}, ValueError, r"features must be \(L, B, D\) with L and D >= 1"),
)


def _table(text: Tensor) -> ClassTable:
    return ClassTable(text, None, None, 20.0)


CLASSES = (
    ({"table": TABLE.text}, TypeError, "table must be a ClassTable, got Tensor"),
    ({"table": small_table(width=12)}, ValueError, r"table.text must be \(5, 13\), got shape"),
    ({"table": _table(TABLE.text.half())}, TypeError, "table.text must be a torch.float32 tensor"),
    ({"table": _table(TABLE.text[0])}, ValueError, "table.text must be .*, got shape"),
    ({"table": small_table("meta")}, ValueError, "table.text must be on cpu, got meta"),
)
OWN = {
    "drift_head": (
        ({"anchor": None}, TypeError, "anchor must be a torch.float32 tensor, got NoneType"),
        ({"anchor": ROWS[0].half()}, TypeError, "anchor must be a torch.float32 tensor, got torch"),
        ({"anchor": ROWS}, ValueError, r"anchor must be \(3, 13\), got shape \(2, 3, 13\)"),
        ({"anchor": ROWS[0].to("meta")}, ValueError, "anchor must be on cpu, got meta"),
    ),
    "pseudo_label": (
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"temperature": torch.inf}, ValueError, "temperature must be above 0, got inf"),
        ({"temperature": torch.nan}, ValueError, "temperature must be above 0, got nan"),
        ({"temperature": "1"}, (TypeError, ValueError), "temperature must be above 0, got '1'"),
    ),
    "margin_head": (
        ({"soft": ROWS[0].half()}, TypeError, "soft must be a torch.float32 tensor, got torch"),
        ({"soft": ROWS[0, :2]}, ValueError, r"soft must be \(3, 13\), got shape \(2, 13\)"),
        ({"soft": ROWS[0].to("meta")}, ValueError, "soft must be on cpu, got meta"),
        ({"label": [0, 1, 2]}, TypeError, "label must be a torch.int64 tensor, got list"),
        ({"label": torch.arange(3).int()}, TypeError, "label must be a torch.int64 tensor, got"),
        ({"label": torch.arange(4)}, ValueError, r"label must be \(3,\), got shape \(4,\)"),
        ({"label": torch.arange(3, device="meta")}, ValueError, "label must be on cpu, got meta"),
    ),
    "mean_logits": (
        ({"weights": [1.0]}, TypeError, "weights must be a torch.float32 tensor, got list"),
        ({"weights": ROWS[0]}, ValueError, r"weights must be \(2, 3\), got shape \(3, 13\)"),
        ({"weights": ROWS[..., 0].to("meta")}, ValueError, "weights must be on cpu, got meta"),
    ),
    "view_weights": (
        ({"features": ROWS[:1]}, ValueError, "features must be of at least 2 views, got 1"),
        ({"low": "1"}, ValueError, "low must be a number, got '1'"),
        ({"high": torch.nan}, ValueError, "high must be a number, got nan"),
        ({"threshold": None}, ValueError, "threshold must be a number, got None"),
        ({"slope": 0.0}, ValueError, "slope must be at least 1e-6, got 0.0"),
        ({"slope": True}, ValueError, "slope must be a number, got True"),
        ({"slope": torch.nan}, ValueError, "slope must be a number, got nan"),
    ),
}  # fmt: skip

# ---- Encoder: x is a stream of rows of 13 --------------------------------------------------------

GRADIENT, SCALE, WEIGHT = random(2, 3, 13, seed=3), torch.rand(2, 3), random(13)
NORM = {"x": ROWS, "y": GRADIENT, "weight": WEIGHT, "bias": WEIGHT, "epsilon": 1e-5}
NORM_BACK = {"gradient": GRADIENT, "total": ROWS, "mean": SCALE, "scale": SCALE, "weight": WEIGHT,
             "residual": ROWS}  # fmt: skip
ENCODER_VALID = {
    "add_norm": NORM,
    "add_norm_back": NORM_BACK,
    "gelu": {"x": ROWS, "bias": WEIGHT, "kind": "erf"},
    "gelu_back": {"gradient": GRADIENT, "x": ROWS, "bias": WEIGHT, "kind": "erf"},
}
SINGLE = {"x", "weight", "total", "mean", "scale", "residual"}


def _encoder_errors(op: str, valid: dict[str, Any]) -> list[Any]:
    """Of every tensor: no tensor, another dtype, another shape, another device."""
    first = "total" if op == "add_norm_back" else "x"
    single = SINGLE | {"bias"} if op == "add_norm" else SINGLE - {"x"}
    rows: list[Any] = []
    for name, value in valid.items():
        if not isinstance(value, Tensor):
            continue
        rule = "torch.float32" if name in single else "one of .*"
        rule = "torch.float32" if op == "gelu_back" and name == "gradient" else rule
        rows.append(({name: value.tolist()}, TypeError, f"{name} must be a tensor, got list"))
        bad = value.double()
        rows.append(({name: bad}, TypeError, f"{name} must be {rule}, got torch.float64"))
        if name != first:
            shape = re.escape(str(tuple(value.shape)))
            longer = torch.cat([value, value[:1]])
            rows.append(({name: longer}, ValueError, f"{name} must be {shape}, got shape"))
            away = value.to("meta")
            rows.append(({name: away}, ValueError, f"{name} must be on cpu, got meta"))
    return [(op, *row) for row in rows]


NO_DTYPE = ({"dtype": torch.float64}, TypeError, "dtype must be one of .*, got torch.float64")
NO_KIND = ({"kind": "swish"}, ValueError, "kind must be one of .*, got 'swish'")
ENCODER = [
    ("add_norm", {"x": ROWS[..., :0]}, ValueError, r"x must be \(..., W\) with W >= 1, got shape"),
    ("add_norm", {"x": ROWS[0, 0, 0]}, ValueError, r"x must be \(..., W\) with W >= 1, got"),
    ("add_norm", {"epsilon": -1.0}, ValueError, "epsilon must be a finite number >= 0, got -1.0"),
    ("add_norm", {"epsilon": torch.nan}, ValueError, "epsilon must be a finite number >= 0, got"),
    ("add_norm", {"epsilon": "0"}, (TypeError, ValueError), "epsilon must be a finite number"),
    ("add_norm", *NO_DTYPE),
    ("add_norm_back", *NO_DTYPE),
    ("gelu", *NO_KIND),
    ("gelu_back", *NO_KIND),
    ("gelu", {"x": ROWS[0, 0, 0]}, ValueError, r"x must have a dimension for the bias, got shape"),
    ("gelu_back", {"gradient": GRADIENT.half()}, TypeError, "gradient must be torch.float32, got"),
]
ENCODER += [row for op, valid in ENCODER_VALID.items() for row in _encoder_errors(op, valid)]

# ---- Attention: q of four tokens, k and v of six -------------------------------------------------

Q, K = random(2, 3, 4, 5), random(2, 3, 6, 5)
ATTENTION_VALID = {
    "attention": {"q": Q, "k": K, "v": K},
    "attention_back": {"gradient": Q, "q": Q, "k": K, "v": K, "lse": Q[..., 0]},
}
ATTENTION = [
    (op, *row)
    for op in ATTENTION_VALID
    for row in (
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": Q.double()}, TypeError, "q must be one of .*, got torch.float64"),
        ({"q": Q[0]}, ValueError, r"q must be \(B, H, Tq, d\) with d >= 1, got shape \(3, 4, 5\)"),
        ({"q": Q[..., :0]}, ValueError, r"q must be \(B, H, Tq, d\) with d >= 1, got shape"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"k": K.half()}, TypeError, "k must be torch.float32, got torch.float16"),
        ({"k": K[0]}, ValueError, r"k must be \(B, H, Tk, d\), got shape \(3, 6, 5\)"),
        ({"k": K[:1]}, ValueError, r"k must be \(2, 3, 6, 5\), got shape \(1, 3, 6, 5\)"),
        ({"k": K.to("meta")}, ValueError, "k must be on cpu, got meta"),
        ({"v": 0.5}, TypeError, "v must be a tensor, got float"),
        ({"v": K.bfloat16()}, TypeError, "v must be torch.float32, got torch.bfloat16"),
        ({"v": K[:, :, :5]}, ValueError, r"v must be \(2, 3, 6, 5\), got shape \(2, 3, 5, 5\)"),
        ({"v": K.to("meta")}, ValueError, "v must be on cpu, got meta"),
    )
]
ATTENTION += [
    ("attention_back", *row)
    for row in (
        ({"gradient": None}, TypeError, "gradient must be a tensor, got NoneType"),
        ({"gradient": Q.half()}, TypeError, "gradient must be torch.float32, got torch.float16"),
        ({"gradient": K}, ValueError, r"gradient must be \(2, 3, 4, 5\), got shape"),
        ({"gradient": Q.to("meta")}, ValueError, "gradient must be on cpu, got meta"),
        ({"lse": None}, TypeError, "lse must be a tensor, got NoneType"),
        ({"lse": Q[..., 0].half()}, TypeError, "lse must be torch.float32, got torch.float16"),
        ({"lse": Q}, ValueError, r"lse must be \(2, 3, 4\), got shape"),
        ({"lse": Q[..., 0].to("meta")}, ValueError, "lse must be on cpu, got meta"),
    )
]

# ---- Warps ---------------------------------------------------------------------------------------

MAPS, BOX = torch.eye(3).repeat(4, 2, 1, 1), torch.tensor([0, 0, 5, 7]).repeat(4, 2, 1)
WARP = (
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": X.half()}, TypeError, "x must be float32, got torch.float16"),
    ({"x": X[:, :, :0]}, ValueError, r"x must have pixels, got shape \(2, 3, 0, 7\)"),
    ({"matrix": None}, TypeError, "matrix must be a torch.float32 tensor, got NoneType"),
    ({"matrix": MAPS.double()}, TypeError, "matrix must be a torch.float32 tensor, got torch"),
    ({"matrix": MAPS[0]}, ValueError, r"matrix must be \(V, 2, 3, 3\), got shape \(2, 3, 3\)"),
    ({"matrix": MAPS[:, :1]}, ValueError, r"matrix must be \(V, 2, 3, 3\), got shape"),
    ({"matrix": MAPS[:0]}, ValueError, r"matrix must be \(V, 2, 3, 3\), got shape"),
    ({"matrix": MAPS.to("meta")}, ValueError, "matrix must be on cpu, got meta"),
    ({"box": BOX.int()}, TypeError, "box must be a torch.int64 tensor, got torch.int32"),
    ({"box": BOX[..., :3]}, ValueError, r"box must be \(V, 2, 4\), got shape \(4, 2, 3\)"),
    ({"box": BOX[:3]}, ValueError, "box must be of 4 views, got 3"),
    ({"box": BOX.to("meta")}, ValueError, "box must be on cpu, got meta"),
    ({"size": 5}, ValueError, "size must be two whole numbers above 0, got 5"),
    ({"size": (5, 0)}, ValueError, r"size must be two whole numbers above 0, got \(5, 0\)"),
    ({"size": (5.0, 4)}, ValueError, "size must be two whole numbers above 0"),
    ({"mode": "cubic"}, ValueError, "mode must be one of .*, got 'cubic'"),
    ({"fill": (0.5,)}, ValueError, r"fill must be three numbers, got \(0.5,\)"),
    ({"mean": 0.5}, (TypeError, ValueError), "mean must be three numbers"),
    ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must be above 0"),
    ({"dtype": torch.float64}, TypeError, "dtype must be one of .*, got torch.float64"),
    ({"patch": 6}, ValueError, r"patch must be in \[0, 5\], got 6"),
    ({"patch": True}, TypeError, "patch must be an int, got True"),
)  # fmt: skip

SEEDS, VIEWS = torch.arange(2), [View()]
VALID = {
    **HEADS_VALID,
    **ENCODER_VALID,
    **ATTENTION_VALID,
    "make_views": {"x": X, "delta": X, "seeds": SEEDS, "views": VIEWS},
    "make_views_adjoint": {"gradient": X, "x": X, "delta": X, "seeds": SEEDS, "views": VIEWS},
    "pgd_step_": {"delta": X.clone(), "gradient": X, "x": X, "seeds": SEEDS, "views": VIEWS,
                  "alpha": 0.1, "epsilon": 0.2},
    "warp_views": {"x": X, "matrix": MAPS},
}  # fmt: skip
ERRORS = [
    (op, *row)
    for op, own in OWN.items()
    for row in (*EVERY, *own, *(() if op in ("drift_head", "view_weights") else CLASSES))
]
ERRORS += [("make_views", *row) for row in VIEWS_BOTH + VIEWS_ALONE]
ERRORS += [("make_views_adjoint", *row) for row in VIEWS_BOTH + ADJOINT_ALONE]
ERRORS += [("pgd_step_", *row) for row in STEP]
ERRORS += [("warp_views", *row) for row in WARP]
ERRORS += ENCODER + ATTENTION


@pytest.mark.parametrize(("op", "change", "error", "message"), ERRORS)
def test_errors_name_op_and_argument(op: str, change: dict[str, Any], error, message: str) -> None:
    getattr(ops, op)(**VALID[op])
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(ops, op)(**{**VALID[op], **change})


@pytest.mark.parametrize("op", VALID)
def test_backend_by_name_never_falls_back(op: str) -> None:
    with pytest.raises(ValueError, match=f"{op}: backend must be None or one of .* got 'cuda'"):
        getattr(ops, op)(**VALID[op], backend="cuda")
