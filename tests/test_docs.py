"""Documentation that can go stale unnoticed: links, names in docstrings, versions."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LIBRARY_WORDS = {"hf"}  # names that other libraries give to what is not an object of ours


def anchors(page: Path) -> set[str]:
    """What a link may name after #, as GitHub and GitLab make it from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every identifier of a module, whatever it stands for."""
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg", "asname", "module"):
            found = getattr(node, field, None)
            if isinstance(found, str):
                yield from found.split(".")


def test_names_in_docstrings_exist() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    known = LIBRARY_WORDS | {name for tree in trees.values() for name in names_in(tree)}
    known |= {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    dangling = [
        f"{path.relative_to(ROOT)}: `{name}`"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for name in re.findall(r"(?<!`)`([\w.]+)(?:\(\))?`(?!`)", ast.get_docstring(node) or "")
        if not known.issuperset(name.split("."))
    ]
    assert dangling == []


def test_release_notes_citation_and_package_speak_of_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (version, "Unreleased")
    assert version in headings


def test_folders_that_tools_are_told_to_look_at_exist() -> None:
    for folder in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["src"]:
        assert (ROOT / folder).is_dir(), folder
