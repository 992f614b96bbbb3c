"""The package as it is shipped: its folders, who imports whom, and how it is built."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scc_fast"

# DESIGN: imports point down only. A module may import what stands on a lower row than its own, and
# its own package; modules of one row know nothing of each other.
ROWS = (
    ("cli",),
    ("bench",),
    ("evaluate", "doctor"),
    ("attacks",),
    ("classifier",),
    ("api",),
    ("_classes",),
    ("defenses",),
    ("engine",),
    ("ops",),
    ("reference", "_extension", "kernels"),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}


def _is_base(part: str) -> bool:
    """These import nothing of ours but each other (and load tiny); everyone may import them."""
    private = part.startswith("_") and part not in RANK
    return private or part in ("config", "result", "models", "images", "tiny")


def _part(path: Path) -> str:
    """The file or folder of scc_fast that a source file belongs to."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(node: ast.AST, module: list[str]) -> Iterator[tuple[int, str]]:
    """(line, part of ours) for every import below a node, in functions too."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            continue
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = module[: len(module) - child.level + 1] if child.level else []
            source = ".".join([*base, *([child.module] if child.module else [])])
            # `from scc_fast import x` names the module in the second half.
            names = [f"{source}.{alias.name}" for alias in child.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "scc_fast" and len(parts) > 1:
                yield child.lineno, parts[1]
        yield from _imports(child, module)


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = _part(path)
    if part in ("__init__", "__main__", "tiny"):  # the public names; the model and its training
        return
    assert part in RANK or _is_base(part), f"{part} has no place in DESIGN's order: add it to ROWS"
    folder = ["kernels"] if part == "kernels" else path.relative_to(PACKAGE).parent.parts
    module = ["scc_fast", *folder]
    for line, other in _imports(ast.parse(path.read_text(encoding="utf-8")), module):
        if other == part or _is_base(other):
            continue
        if other not in RANK:  # a name of scc_fast/__init__.py, whose place is that of api
            other = "api" if (PACKAGE / "__init__.py").exists() else other
        allowed = part in RANK and RANK[part] < RANK.get(other, -1)
        assert allowed, f"{path}:{line}: {part} imports {other}, which is not below it"


def test_packages_are_the_folders_with_an_init() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)
    assert listed is not None
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(re.findall(r'"(.*?)"', listed[1])) == found | {"scc_fast.kernels"}


def test_kernels_init_is_only_a_docstring() -> None:
    """`import kernels` of another library may find this file (STYLE 3.5)."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_the_reference_imports_no_faster_path() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        for _, other in _imports(ast.parse(path.read_text()), ["scc_fast", "reference"]):
            assert other not in ("ops", "kernels", "_extension"), path


def test_sources_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in [*SOURCES, *(ROOT / "csrc").rglob("*.*")]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def test_tests_import_no_tests() -> None:
    """What two files of tests share stands in a module without any."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("test_")], path
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert path.stem.startswith("test_"), path


def _setup(*arguments: str, build: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "SCC_FAST_BUILD": build},
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_build_mode_is_refused() -> None:
    result = _setup("--version", build="gpu")
    assert result.returncode != 0
    assert "SCC_FAST_BUILD='gpu': must be one of auto, cpu, cuda, none" in result.stderr


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, _clean_copy(tmp_path / "tree")],
        env={**os.environ, "SCC_FAST_BUILD": "none"},
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert all(re.match(r"scc_fast(-[\d.]+\.dist-info)?/", name) for name in names)
    assert {"scc_fast/py.typed", "scc_fast/kernels/philox.py", "scc_fast/ops/philox.py"} <= names
    for path in [*(PACKAGE / "tiny").rglob("*"), *(PACKAGE / "evaluate").rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names


def _clean_copy(to: Path) -> Path:
    """The files a commit would hold: building in the checkout would leave a build/ behind."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return to
