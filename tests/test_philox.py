"""Random numbers: known answers, and one result on every backend."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import op_cases
from scc_fast import ops
from scc_fast.reference import philox as reference

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from scc_fast.kernels.philox import random_words

    @triton.jit
    def _known_answer_kernel(seed_ptr, block_ptr, view, purpose, out_ptr):
        block = tl.load(block_ptr + tl.arange(0, 1))
        w0, w1, w2, w3 = random_words(tl.load(seed_ptr), block, view, purpose)
        lane = tl.arange(0, 1)
        tl.store(out_ptr + lane, w0.to(tl.int64))
        tl.store(out_ptr + 1 + lane, w1.to(tl.int64))
        tl.store(out_ptr + 2 + lane, w2.to(tl.int64))
        tl.store(out_ptr + 3 + lane, w3.to(tl.int64))


OPS = {"philox_uniform": ops.philox_uniform, "philox_normal": ops.philox_normal}
BOTH = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
UNIFORM_BACKENDS = list(op_cases.backends_under_test("philox_uniform"))
ON_BACKENDS = pytest.mark.parametrize(("device", "backend"), UNIFORM_BACKENDS)

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


def float64_normals(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    """(B, numel) normals in float64 from the integers, with numpy's functions."""
    bits = reference.words(seeds.cpu(), purpose, view, -(-numel // 4)).numpy() >> 8
    radius = np.sqrt(-2.0 * np.log((bits[..., 0::2] + 1) * 2.0**-24))
    angle = bits[..., 1::2] * (2.0 * math.pi * 2.0**-24)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(pairs).flatten(1)[:, :numel]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_the_reference(counter: str, key: str, answer: str) -> None:
    tensors = [tuple(map(torch.tensor, _words(text))) for text in (counter, key)]
    assert [word.item() for word in reference.philox4x32_10(*tensors)] == _words(answer)


@pytest.mark.compile
def test_known_answers_of_pixel_math_h(tmp_path: Path) -> None:
    """The header alone, without torch: the words of C++ and CUDA come from it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    calls = "".join(
        f"show(random_words({_signed(*_words(key))}LL,"
        f" {_signed(*_words(counter)[:2])}LL, {_words(counter)[2]}u, {_words(counter)[3]}u));\n"
        for counter, key, _ in KNOWN_ANSWERS
    )
    source = tmp_path / "known.cpp"
    source.write_text(
        '#include "pixel_math.h"\n#include <cstdio>\nusing namespace scc_fast;\n'
        'void show(Words x) { printf("%08x %08x %08x %08x\\n", x.w[0], x.w[1], x.w[2], x.w[3]); }\n'
        f"int main() {{ {calls} }}\n"
    )
    csrc = Path(__file__).parents[1] / "csrc"
    program = tmp_path / "known"
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{csrc}", source, "-o", program],
        check=True,
    )
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert output.split("\n")[:-1] == [answer for _, _, answer in KNOWN_ANSWERS]


TRITON = list(op_cases.backends_under_test("philox_uniform", ("triton",)))


@pytest.mark.parametrize(("device", "backend"), TRITON)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_triton(device, backend, counter: str, key: str, answer: str) -> None:
    low, high, view, purpose = _words(counter)
    seed, block = torch.tensor([_signed(*_words(key)), _signed(low, high)], device=device)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _known_answer_kernel[(1,)](seed, block, view, purpose, out)
    assert out.tolist() == _words(answer)


@ON_BACKENDS
def test_known_answer_of_each_backend(device: str, backend: str) -> None:
    """The first vector through the op; its parity with the reference covers the other words."""
    got = ops.philox_uniform(torch.zeros(1, dtype=torch.int64, device=device), 0, 0, 4,
                             backend=backend)  # fmt: skip
    assert (got * 2**24).long().tolist() == [[word >> 8 for word in _words(KNOWN_ANSWERS[0][2])]]


@ON_BACKENDS
@pytest.mark.parametrize(("batch", "numel"), op_cases.SIZES)
def test_uniforms_are_equal_to_the_bit(device: str, backend: str, batch: int, numel: int) -> None:
    seeds = op_cases.seeds(batch, device)
    for purpose, view in op_cases.STREAMS:
        got = ops.philox_uniform(seeds, purpose, view, numel, backend=backend)
        assert got.shape == (batch, numel)
        assert got.device.type == device
        assert torch.equal(got.cpu(), reference.uniform(seeds.cpu(), purpose, view, numel))


@ON_BACKENDS
@pytest.mark.parametrize(("batch", "numel"), op_cases.SIZES)
def test_normals_are_within_ulps_of_float64(
    device: str, backend: str, batch: int, numel: int
) -> None:
    seeds = op_cases.seeds(batch, device)
    for purpose, view in op_cases.STREAMS:
        got = ops.philox_normal(seeds, purpose, view, numel, backend=backend)
        assert got.shape == (batch, numel)
        want = float64_normals(seeds, purpose, view, numel)
        # At a multiple of a quarter turn float64's own cosine is off by up to 1e-15.
        assert op_cases.ulp_error(got.cpu(), want, floor=2.0**-28) <= op_cases.ULPS[got.dtype]


@BOTH
@ON_BACKENDS
def test_a_result_depends_on_its_seed_alone(op, device: str, backend: str) -> None:
    seeds = op_cases.seeds(17, device)
    whole = op(seeds, 3, 2, 101, backend=backend)
    for i in range(17):
        assert torch.equal(whole[i : i + 1], op(seeds[i : i + 1], 3, 2, 101, backend=backend))
    assert torch.equal(whole.flip(0), op(seeds.flip(0), 3, 2, 101, backend=backend))
    assert torch.equal(whole[:, :50], op(seeds, 3, 2, 50, backend=backend))


@BOTH
@ON_BACKENDS
def test_strided_seeds(op, device: str, backend: str) -> None:
    seeds = op_cases.seeds(17, device)
    strided = torch.stack([seeds, torch.zeros_like(seeds)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    want = op(seeds, 0, 0, 9, backend=backend)
    assert torch.equal(op(strided, 0, 0, 9, backend=backend), want)


@BOTH
def test_streams_do_not_repeat(op) -> None:
    """Between purposes, views, elements and images: 24-bit numbers meet only by chance."""
    rows = torch.cat([op(op_cases.seeds(17), *stream, 64) for stream in op_cases.STREAMS])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert len(torch.unique(rows)) > 0.995 * rows.numel()
    correlation = torch.corrcoef(op(op_cases.seeds(17), 0, 0, 2**14)).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 * 2**-7


def test_statistics() -> None:
    """Moments within five standard errors; every value where it belongs."""
    seeds = reference.image_seeds(2024, 64)
    n = 64 * 2**14
    uniform = ops.philox_uniform(seeds, 0, 0, 2**14).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(uniform.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    normal = ops.philox_normal(seeds, 0, 0, 2**14).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal**power).mean() - moment) < 5 * math.sqrt(variance / n)
    within_one = (normal.abs() < 1).double().mean()
    assert abs(within_one - 0.6826894921) < 5 * math.sqrt(0.2166 / n)


@BOTH
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize(("batch", "numel"), [(17, 10), (0, 5), (1, 0)])
def test_opcheck(op, device: str, batch: int, numel: int) -> None:
    overload = getattr(torch.ops.scc_fast, op.__name__).default
    torch.library.opcheck(overload, (op_cases.seeds(batch, device), 1, 2, numel))


@pytest.mark.compile
@BOTH
@pytest.mark.parametrize("device", op_cases.DEVICES)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(op, device: str, backend: str | None, dynamic: bool) -> None:
    torch.compiler.reset()  # compilations of other cases count towards dynamo's limit

    def noise(seeds: Tensor, numel: int) -> Tensor:
        return 2 * op(seeds, 1, 0, numel, backend=backend) - 1

    compiled = torch.compile(noise, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, numel in ((17, 12), (1, 13)):
        seeds = op_cases.seeds(batch, device)
        assert torch.equal(compiled(seeds, numel), noise(seeds, numel))


@BOTH
def test_meta(op) -> None:
    out = op(torch.empty(3, dtype=torch.int64, device="meta"), 0, 0, 7)
    assert (out.shape, out.dtype, out.device.type) == ((3, 7), torch.float32, "meta")


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 0, 0, 4), TypeError, "seeds must be an int64 tensor, got list"),
        ((torch.zeros(2), 0, 0, 4), TypeError, "seeds must be int64, got torch.float32"),
        ((torch.zeros(2, 1, dtype=torch.int64), 0, 0, 4), ValueError, r"seeds must be \(B,\)"),
        ((op_cases.seeds(1), 0.5, 0, 4), TypeError, "purpose must be an int, got 0.5"),
        ((op_cases.seeds(1), -1, 0, 4), ValueError, "purpose must be >= 0, got -1"),
        ((op_cases.seeds(1), 0, 2**32, 4), ValueError, r"view must be below 2\^32"),
        ((op_cases.seeds(1), 0, True, 4), TypeError, "view must be an int, got True"),
        ((op_cases.seeds(1), 0, 0, -4), ValueError, "numel must be >= 0, got -4"),
    ],
)
def test_errors_name_op_and_argument(op, arguments, error, message: str) -> None:
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(*arguments)


@BOTH
def test_backend_by_name_never_falls_back(op) -> None:
    with pytest.raises(ValueError, match=r"backend must be None or one of .* got 'cuda'"):
        op(op_cases.seeds(1), 0, 0, 4, backend="cuda")
    meta = torch.empty(1, dtype=torch.int64, device="meta")
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"'{backend}' is not available: .* meta"):
            op(meta, 0, 0, 4, backend=backend)


def test_image_seeds() -> None:
    """An int gives each image a stream of its own; None draws afresh; a tensor is used as it is."""
    assert len(torch.unique(reference.image_seeds(0, 1000))) == 1000
    assert torch.equal(reference.image_seeds(5, 8)[:3], reference.image_seeds(5, 3))
    assert not torch.equal(reference.image_seeds(5, 8), reference.image_seeds(6, 8))
    assert not torch.equal(reference.image_seeds(None, 4), reference.image_seeds(None, 4))
    assert torch.equal(reference.image_seeds(op_cases.seeds(17), 17), op_cases.seeds(17))
