"""The Python examples of the pages run as they stand, one after another."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/evaluate.md"])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _blocks(page):
        exec(compile(block, page, "exec"), names)
    assert page != "README.md" or len(_blocks(page)) >= 2


def test_numbers_of_the_readme_are_those_of_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    tables = re.findall(r"<!-- table (\S+) -->\n(.*?)\n\n", readme, flags=re.DOTALL)
    assert len(tables) >= 2
    for page, table in tables:
        assert table.startswith("| ")
        assert f"\n{table}\n" in (ROOT / page.split("#")[0]).read_text(), (
            f"README's table differs from {page}"
        )


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_no_page_ships_a_placeholder():
    pages = [*ROOT.glob("*.md"), *(ROOT / "scc_fast").rglob("*.md")]
    assert len(pages) >= 4
    for page in pages:
        assert not re.search(r"@[A-Z]{3,}@", page.read_text()), page
