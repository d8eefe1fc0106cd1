"""Every relative link of README, manual and experiments leads somewhere: in the repository and in the built manual."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "mtr_lab/assets/README.md"]
PAGES = [ROOT / name for name in NAMES] + [*ROOT.glob("docs/pages/*.md"), *ROOT.glob("experiments/**/*.md")]
GENERATED = ("api.md", "configuration.md")
"""Pages of the manual whose headings exist only there."""


def links(text: str) -> set[str]:
    """Relative targets of the links and pictures of a Markdown page."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$|^    .*?$|`[^`\n]+`", "", text)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?m:^\[[^\]]+\]: (\S+))", text)
    return {target for target in map("".join, targets) if not urlsplit(target).scheme}


def headings(text: str) -> set[str]:
    """Anchors that GitHub and the manual give to the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.*)", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    wrong = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        known = file.name in GENERATED or not anchor
        if not file.exists() or not (known or anchor in headings(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    assert not wrong


class Page(HTMLParser):
    """The anchors of a page, and the addresses to which it leads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[key] or "" for key in ("id", "name") if key in values}
        self.targets |= {values[key] or "" for key in ("href", "src") if key in values}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_links_lead_somewhere_in_the_built_manual(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {file: Page(file) for file in tmp_path.rglob("*.html") if file.name != "404.html"}
    wrong = []
    for file, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or target.startswith("//"):
                continue
            goal = Path(os.path.normpath(file.parent / unquote(url.path))) if url.path else file
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.exists() or (
                url.fragment and goal in pages and unquote(url.fragment) not in pages[goal].anchors
            ):
                wrong.append(f"{file.relative_to(tmp_path)}: {target}")
    assert len(pages) > 30
    assert not wrong, "\n".join(sorted(wrong))
