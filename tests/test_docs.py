"""The documentation refers to what exists: links, anchors, paths, and the flow's figure."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tqdit import __version__

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def text_of(page):
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_refers_to_what_exists(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    for path in re.findall(r"`((?:src|tests|docs|scripts|benchmarks|examples)/[\w/.*-]+)`", text_of(page)):
        assert list(ROOT.glob(path)), path


def test_every_page_can_be_reached_from_the_readme():
    seen, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop().resolve()
        if page not in seen:
            seen.add(page)
            links = re.findall(r"\]\(([^)#\s]+\.md)", text_of(page))
            open_pages += [page.parent / link for link in links if not link.startswith("https://")]
    assert seen == {page.resolve() for page in PAGES}


def test_the_flow_s_figure_names_every_command_and_file():
    figure = ElementTree.parse(ROOT / "docs" / "images" / "flow.svg").getroot()
    texts = {element.text for element in figure.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {"tqdit-calibrate", "tqdit-export", "tqdit-build", "tqdit-sample"}
    assert texts >= {"checkpoint", "scales.safetensors", "model.onnx", "model.engine/", "images"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_installs_tqdit_from_a_clone_or_a_wheel(page):
    """The name is on no package index."""
    for command in re.findall(r"pip install[^`#\n]*", page.read_text("utf-8")):
        assert not re.search(r"[ ']tqdit\b(?!-\d)", command), command
        assert all(version == __version__ for version in re.findall(r"tqdit-(\d.*?)-py3-none-any\.whl", command)), (
            command
        )
