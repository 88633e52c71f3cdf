"""Every link, path and command in the README and in docs/ is good."""

import re
import shlex
from pathlib import Path

import pytest

import visualize
from utils.options import get_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"main": get_parser(), "visualize": visualize.get_parser()}
COMMAND = re.compile(r"\b(?:python|torchrun)\b[^\n`]*?\b(main|visualize)\.py\b([^\n`#&]*)")


def anchors(page: Path) -> set[str]:
    """Returns the names by which links find the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list:
    """Returns (script, arguments) of each command line; a line that ends with a backslash continues."""
    found = []
    for page in PAGES:
        for script, arguments in COMMAND.findall(re.sub(r"\\\n\s*", " ", page.read_text())):
            found.append(pytest.param(script, arguments, id=f"{page.stem}: {script}.py{arguments.rstrip()}"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_docs_exist(page):
    for path in re.findall(r"(?<![\w/.-])docs/[\w./-]*\w", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_commands_parse(script, arguments):
    PARSERS[script].parse_args(shlex.split(arguments))


def test_commands_are_found():
    assert len(commands()) > 100
