"""Whether a built _C runs on every x86-64, and whether its clones are vectorised: by disassembly.

    isa.py _C.abi3.so

Outside the clones for x86-64-v3 and -v4 no instruction may need more than SSE2; in them the loops
of views, step, heads, attention and Philox must have stayed loops over vectors. That the baseline's
code computes right is proven elsewhere: the build under the sanitizers has no clones.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys

# Encoded with VEX or EVEX, or of a later extension that a compiler emits by itself.
TOO_NEW = re.compile(
    r"v(?!err|erw)|k(mov|or|and|x|not|shift|unpck|test|add)|popcnt|lzcnt|andn$|bextr|bls|bzhi|mulx"
    r"|[rs](or|ar|hl|hr)x|pdep|pext|movbe|pshufb|pmulld|pmuldq|p(max|min)(s[bd]|u[wd])"
    r"|p?blend|round|pmov[sz]x|pinsr[bdq]|pextr[bdq]|ptest|h(add|sub)p|ph(add|sub)|palign|insertps"
    r"|extractps|mov(s[lh]d|d)dup|lddqu|dpp|crc32|pabs|psign|packusdw|pcmp(eqq|gtq|[ei]str)"
)
# What the vectorised loops of a job must hold: arithmetic on whole registers. A step gathers,
# stays in the box and accumulates; a view is normalised and clamped.
ARITHMETIC = {
    "StepJob": ("vaddps", "vsubps", "vmulps", "vblend"),
    "ViewsJob": ("vaddps", "vsubps", "vdivps", "vblend"),
    "AdjointJob": ("vaddps", "vdivps"),
    "fill_normal": ("vmulps", "vsqrtps"),
    "fill_uniform": ("vmulps",),
}
ENCODER = ("AddNormJob", "AddNormBackJob", "GeluJob", "GeluBackJob")
# Products multiply and add in one instruction, as nothing else may.
ATTENTION = {
    "product": ("vfmadd",),
    "weigh": ("vfn?madd", "vmaxps"),
    "slope": ("vfn?madd",),
    "widen_Float32": ("vmulps",),
    "narrow_Float32": ("vmulps",),
}
HEADS = ("MeanJob", "UnitJob", "DriftJob", "MarginJob", "LabelJob", "NormaliseJob")
JOBS = (*ARITHMETIC, *ENCODER, *ATTENTION, *HEADS)
FORMATS = ("float32", "float16", "bfloat16")  # of pictures; what a head reads varies


def functions(library: str) -> dict[str, list[str]]:
    """The instructions of every function, its cold part with it."""
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[str]] = collections.defaultdict(list)
    name = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = match[1].removesuffix(".cold")
        elif line.count("\t") == 1:
            found[name].append(line.split("\t")[1].strip())
    return found


def main(library: str) -> None:
    found = functions(library)
    wrong = [
        f"{name}: {instruction}"
        for name, instructions in found.items()
        if not re.search(r"\.arch_x86_64_v[34]$", name)
        for instruction in instructions
        if TOO_NEW.match(instruction) or re.search(r"%[yz]mm", instruction)
    ]
    for job in JOBS:
        formats = FORMATS if job in ("StepJob", "ViewsJob", "AdjointJob") else ("",)
        for clone, register in ((".arch_x86_64_v4", "%zmm"), (".arch_x86_64_v3", "%ymm")):
            for number in formats:
                kind = re.compile(rf"_ZN8scc_fast.*\d{number}\w*{job}.*{re.escape(clone)}$")
                kinds = {name: code for name, code in found.items() if kind.match(name)}
                if not kinds:
                    wrong.append(f"{number} {job}: there is no clone {clone}")
                for name, code in kinds.items():
                    # A head may sum in registers of half the width.
                    wide = "%[yz]mm" if job in HEADS else register
                    words = {**ARITHMETIC, **ATTENTION}.get(job, ("v(add|mul|sub)ps",))
                    for word in words:
                        if not any(re.match(rf"{word}\w* .*{wide}", line) for line in code):
                            wrong.append(f"{name}: no {word} on {wide}")
    clones = sum(name.endswith(".arch_x86_64_v4") for name in found)
    sse = sum(f"{name.removesuffix('.default')}.arch_x86_64_v4" in found for name in found)
    if wrong or not clones or clones != sse:
        raise SystemExit("\n".join([f"{clones} clones, {sse} defaults", *wrong[:20]]))
    print(f"{len(found)} functions: {clones} with vectorised clones, the rest for any x86-64")


if __name__ == "__main__":
    main(sys.argv[1])
