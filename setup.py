"""Compiles csrc/ into scc_fast._C. Everything else is in pyproject.toml.

SCC_FAST_BUILD chooses what is compiled: none, cpu, cuda (with cpu), or auto, the default, which
takes the best of the three that this machine can build. Only an explicit choice fails.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")


def say(message: str) -> None:
    """Stand out among a compiler's lines; pip shows them with -v."""
    print(f"\n*** scc_fast: {message} ***\n", file=sys.stderr, flush=True)


def cuda_home() -> Path | None:
    """The toolkit with headers: torch takes nvcc's parent, wrong where nvcc is a wrapper script."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    nvcc_root = Path(nvcc).resolve().parents[1] if nvcc else None
    for home in [Path(given)] if given else [nvcc_root, Path("/usr/local/cuda")]:
        if home and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def extension(mode: str) -> Any:
    """scc_fast._C for "cpu" or "cuda", against the stable ABI of torch 2.11 and Python 3.10."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    csrc = ROOT / "csrc"
    patterns = ["*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if mode == "cuda" else [])]
    sources = [source for pattern in patterns for source in sorted(csrc.glob(pattern))]
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("SCC_FAST_BUILT", f'"{mode}"')]
    # Without the prefix map, error messages would carry the builder's paths.
    # No contraction to fused multiply-add: all backends round alike (csrc/pixel_math.h).
    prefix = [] if os.name == "nt" else [f"-ffile-prefix-map={ROOT}/="]
    # No errno and no traps: nobody reads them, and loops with sqrtf and selects then vectorise.
    hidden = ["-fvisibility=hidden"]
    maths = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags = ["/O2"] if os.name == "nt" else ["-O3", "-g0", *hidden, *maths, *prefix]
    nvcc = ["-O3", "-fmad=false", *(word for flag in prefix for word in ("-Xcompiler", flag))]
    return (CUDAExtension if mode == "cuda" else CppExtension)(
        "scc_fast._C",
        [str(source.relative_to(ROOT)) for source in sources],
        include_dirs=[str(csrc)],
        define_macros=macros + ([("USE_CUDA", None)] if mode == "cuda" else []),
        extra_compile_args={"cxx": flags, "nvcc": nvcc} if mode == "cuda" else {"cxx": flags},
        depends=[str(header.relative_to(ROOT)) for header in sorted(csrc.rglob("*.*h"))],
        py_limited_api=True,
    )


def compiled(mode: str) -> dict[str, Any]:
    """The arguments of setup() that build the extension, {} where there is nothing to build."""
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = str(home)  # read by cpp_extension when it is imported
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        if mode != "auto":
            raise
        say(f"no torch to build with ({error}): installing pure Python")
        return {}
    can_cuda = bool(home and torch.version.cuda)
    if mode == "cuda" and not can_cuda:
        raise SystemExit(
            "SCC_FAST_BUILD=cuda needs CUDA_HOME (a folder holding include/cuda_runtime.h; "
            f"found {home}) and a torch built for CUDA (torch.version.cuda is {torch.version.cuda})"
        )
    if not torch.cuda.device_count():  # cpp_extension asks the GPU, and dies without one
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.9;9.0+PTX")
    modes = [mode] if mode != "auto" else ["cuda", "cpu"] if can_cuda else ["cpu"]

    class Build(BuildExtension):  # type: ignore[misc]
        """BuildExtension that, in auto mode, ends in a smaller build instead of an error."""

        def build_extensions(self) -> None:
            for attempt in modes:
                try:
                    # In place: setuptools has already put its own attributes on the object.
                    vars(self.extensions[0]).update(vars(extension(attempt)))
                    super().build_extensions()
                    say(f"built for {attempt}")
                    return
                except Exception as error:
                    if mode != "auto":
                        raise
                    say(f"building for {attempt} FAILED: {type(error).__name__}: {error}")
            self.extensions.clear()
            say("no compiled extension: installing pure Python, which is slower")

    return {
        "ext_modules": [extension("cpu")],  # what it becomes is settled while building
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


mode = os.environ.get("SCC_FAST_BUILD", "auto")
if mode not in MODES:
    raise SystemExit(f"SCC_FAST_BUILD={mode!r}: must be one of {', '.join(MODES)}")
setup(**({} if mode == "none" else compiled(mode)))
