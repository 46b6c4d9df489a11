"""What the README and docs/ name exists: pages, files, headings, options."""

import re

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from flora.config import composed
from flora.errors import ConfigError
from flora.files import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = re.compile(r"[a-z][\w.]*=[^\sA-Z]+( [a-z][\w.]*=[^\sA-Z]+)*")  # capitals stand for what a reader puts there


def prose(page):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


def test_the_readme_leads_to_every_page_and_its_tree_exists():
    text = README.read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text
    (tree,) = re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_are_options(page):
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if OPTIONS.fullmatch(span)]
    for span in spans:
        contexts = [[], *choices("task"), *choices("model")]  # an option may be of one task or model
        assert any(accepted([*context, *span.split()]) for context in contexts), span


def choices(group):
    """Each file of a group of configs, as overrides."""
    return [[f"{group}={path.stem}"] for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]


def accepted(overrides):
    """Whether train.py composes these overrides."""
    try:
        composed(overrides)
    except (ConfigError, HydraException, OmegaConfBaseException):
        return False
    return True
