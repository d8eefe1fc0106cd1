"""Generate the manual's pages: the repository's pages with links that work there, conf/, policies, the imports."""

import os
import re
import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))
from architecture import draw

from mtr_lab.policy_files import policy_files, read_policy

ROOT = Path(__file__).parent.parent
PAGES = Path(__file__).parent / "pages"
PROGRAMS = {"config": "eval", "train": "train", "bench": "bench"}
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages at the root of the repository, and their names in the manual."""

PICTURES = {".png", ".svg", ".webp"}


def place(path: str) -> str:
    """The place in the manual of a file of the repository."""
    return MOVED.get(path, path.removeprefix("docs/pages/"))


def linked(source: Path, text: str) -> str:
    """A page of the repository with links and pictures for its place in the manual, where the pictures are copied."""
    page = place(source.relative_to(ROOT).as_posix())

    def moved(match: re.Match[str]) -> str:
        before, target, anchor = match.groups()
        file = Path(os.path.normpath(source.parent / target)).relative_to(ROOT).as_posix()
        if Path(file).suffix in PICTURES and not file.startswith("docs/pages/"):
            with mkdocs_gen_files.open(file, "wb") as out:
                out.write((ROOT / file).read_bytes())
        return before + Path(os.path.relpath(place(file), Path(page).parent)).as_posix() + anchor

    text = re.sub(r"(`[^`]*`)|(?<=\d) (?=\d{3}\b)", lambda match: match[1] or "\u202f", text)  # no break in 2 000
    return re.sub(
        r"(?m)(\]\(|^\[[^\]]+\]: )(?!\w+:)([\w./-]+\.(?:md|png|svg|webp))((?:#[\w.-]+)?)(?=\)|$)", moved, text
    )


def configuration() -> str:
    """The page on the configuration, followed by all its files with their comments: one heading per group and file."""
    conf = ROOT / "conf"
    parts = [source("configuration.md")]
    for name, program in PROGRAMS.items():
        parts += [f"## mtr-lab {program}", fence(conf / f"{name}.yaml")]
    for group in sorted(path for path in conf.iterdir() if path.is_dir()):
        files = sorted(group.rglob("*.yaml"))
        parts.append(f"## {group.name}")
        parts.append("One of: " + ", ".join(f"`{name_of(file, group)}`" for file in files) + ".")
        parts += [f"### {group.name}={name_of(file, group)}\n\n{fence(file)}" for file in files]
    return "\n\n".join(parts)


def policies() -> str:
    """The page on policies, each policy's source, and a table of its parts: differences from `mtr` are bold."""
    files = policy_files()
    resolved = {name: read_policy(file) for name, file in files.items()}
    parts = [key for key in resolved["mtr"] if any(config[key] != resolved["mtr"][key] for config in resolved.values())]
    rows = ["| policy | " + " | ".join(parts[1:]) + " |", "|---" * len(parts) + "|"]
    for name, config in resolved.items():
        cells = [config[key] if config[key] == resolved["mtr"][key] else f"**{config[key]}**" for key in parts[1:]]
        rows.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    sources = "\n\n".join(f"**`{name}`**: {head(file)}" for name, file in files.items())
    return f"{source('policies.md')}\n\n{sources}\n\n" + "\n".join(rows) + "\n"


def architecture() -> str:
    """The page on the architecture, with a picture drawn from the imports."""
    return re.sub(r'(?<=<div class="rooms">).*(?=</div>)', lambda _: draw(), source("architecture.md"))


def source(page: str) -> str:
    return (PAGES / page).read_text(encoding="utf-8")


def head(file: Path) -> str:
    """The comment at the beginning of a file."""
    lines = [line[1:].strip() for line in file.read_text().splitlines() if re.match(r"# (?!@package)", line)]
    return " ".join(lines)


def name_of(file: Path, group: Path) -> str:
    return file.relative_to(group).with_suffix("").as_posix()


def fence(file: Path) -> str:
    return f"```yaml\n{file.read_text().rstrip()}\n```"


EXTENDED = {"configuration.md": configuration, "policies.md": policies, "architecture.md": architecture}
"""Pages to which this script adds what it reads from the code."""

files = [ROOT / name for name in (*MOVED, "mtr_lab/assets/README.md")]
for file in [*files, *PAGES.glob("*.md"), *(ROOT / "experiments").rglob("*.md")]:
    text = EXTENDED[file.name]() if file.parent == PAGES and file.name in EXTENDED else file.read_text(encoding="utf-8")
    with mkdocs_gen_files.open(place(file.relative_to(ROOT).as_posix()), "w") as out:
        out.write(linked(file, text))
