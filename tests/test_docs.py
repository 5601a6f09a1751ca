"""The pages: their length, what they link to and name, and that the changelog knows this version."""

import re
from pathlib import Path
from typing import get_args

import pytest

import qsvd
from qsvd.option_types import Method

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")]


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 90


def test_the_changelog_has_this_version() -> None:
    assert f"## {qsvd.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_that_a_page_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_file_that_a_page_names_is_there() -> None:
    """Pages name files from the root, or, as docs/architecture.md, from the package."""
    for page in PAGES:
        named = re.findall(r"`((?:\w+/)+[\w.]*)[` ]", page.read_text(encoding="utf-8"))
        known = {path.name for path in [*ROOT.iterdir(), *(ROOT / "qsvd").iterdir()] if path.is_dir()}
        named = [name for name in named if name.partition("/")[0] in known and "NAME" not in name]
        assert [name for name in named if not any((top / name).exists() for top in (ROOT, ROOT / "qsvd"))] == [], page


def test_the_architecture_lists_every_file_of_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.findall(r"```\n(.*?)```", page, flags=re.DOTALL)[0]
    listed, folder = [], ""
    for line in tree.splitlines()[1:]:
        if name := re.match(r"  (\w+/)", line):
            folder = name[1]
        elif names := re.match(r"(  (?:  )?)((?:[\w/]+\.py  )*[\w/]+\.py)", line):
            inside = folder if len(names[1]) == 4 else ""
            listed += [inside + name for name in names[2].split()]
    package = ROOT / "qsvd"
    files = [str(path.relative_to(package)) for path in package.rglob("*.py")]
    assert sorted(listed) == sorted(name for name in files if not name.endswith("/__init__.py"))


def test_every_method_is_in_the_table_of_systems_as_one_that_works() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if "|" in line]
    commands = [command for _, here, command, *_ in rows if "works" in here]
    named = {name for command in commands for name in re.findall("--method ([a-z0-9-]+)`", command)}
    assert named == {*get_args(Method)} - {"auto"}
