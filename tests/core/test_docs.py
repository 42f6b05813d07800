"""Documents tell the truth: the table is generated, links resolve, snippets compile."""

import re
from pathlib import Path

import pytest

from mmattn.registry import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_table_of_methods_is_the_generated_one():
    assert markdown() in (ROOT / "docs" / "methods.md").read_text(), (
        "run: mmattn methods --markdown"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_snippets_compile(page):
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(snippet, str(page), "exec")


def test_readme_names_both_commands_first():
    first_screen = (ROOT / "README.md").read_text()[:2500]
    assert "make demo" in first_screen and "make test" in first_screen
