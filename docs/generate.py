"""Make the pages that are written elsewhere: at the top of the repository (README and others), and in conf/."""

import re
import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))
from architecture import draw

from mtr_lab.policy_files import policy_files, read_policy

ROOT = Path(__file__).parent.parent
PROGRAMS = {"config": "mtr_lab", "train": "mtr_lab.train", "bench": "mtr_lab.bench"}


def start() -> str:
    """The README, its pictures, and its links to other pages."""
    text = (ROOT / "README.md").read_text()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        with mkdocs_gen_files.open(picture, "wb") as out:
            out.write((ROOT / picture).read_bytes())
    text = text.replace("](docs/pages/", "](")
    return text.replace("](CONTRIBUTING.md)", "](contributing.md)").replace("](CHANGELOG.md)", "](changelog.md)")


def configuration() -> str:
    """Every configuration file as it is, comments included, one heading a group and a file."""
    conf = ROOT / "conf"
    parts = [
        "# Configuration",
        "Three programs share one tree of settings. Every value can be overridden on the command line "
        "(`key=value`), every group chosen (`group=name`), and `-m` with several values makes a sweep. "
        "`--cfg job` prints what a command line amounts to.",
    ]
    for name, program in PROGRAMS.items():
        parts += [f"## python -m {program}", fence(conf / f"{name}.yaml")]
    for group in sorted(path for path in conf.iterdir() if path.is_dir()):
        files = sorted(group.rglob("*.yaml"))
        parts.append(f"## {group.name}")
        parts.append("One of: " + ", ".join(f"`{name_of(file, group)}`" for file in files) + ".")
        parts += [f"### {group.name}={name_of(file, group)}\n\n{fence(file)}" for file in files]
    return "\n\n".join(parts)


def policies() -> str:
    """A table of the policies' parts: what each file of conf/reduction adds to those it builds on."""
    files = policy_files()
    resolved = {name: read_policy(file) for name, file in files.items()}
    parts = [key for key in resolved["mtr"] if any(config[key] != resolved["mtr"][key] for config in resolved.values())]
    rows = ["| policy | " + " | ".join(parts[1:]) + " |", "|---" * len(parts) + "|"]
    for name, config in resolved.items():
        own = [config[key] if config[key] == resolved["mtr"][key] else f"**{config[key]}**" for key in parts[1:]]
        rows.append(f"| `{name}` | " + " | ".join(map(str, own)) + " |")
    sources = "\n\n".join(f"**`{name}`**: {head(file)}" for name, file in files.items())
    return f"{(Path(__file__).parent / 'policies.md').read_text()}\n\n{sources}\n\n" + "\n".join(rows) + "\n"


def architecture() -> str:
    """The rooms of the package, and the picture of their imports."""
    return (Path(__file__).parent / "architecture.md").read_text().replace("{picture}", draw())


def head(file: Path) -> str:
    """The comment a file begins with."""
    lines = [line[1:].strip() for line in file.read_text().splitlines() if re.match(r"# (?!@package)", line)]
    return " ".join(lines)


def name_of(file: Path, group: Path) -> str:
    return file.relative_to(group).with_suffix("").as_posix()


def fence(file: Path) -> str:
    return f"```yaml\n{file.read_text().rstrip()}\n```"


PAGES = {
    "index.md": start(),
    "configuration.md": configuration(),
    "policies.md": policies(),
    "architecture.md": architecture(),
    "contributing.md": (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/pages/", "]("),
    "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
}
for page, text in PAGES.items():
    with mkdocs_gen_files.open(page, "w") as out:
        out.write(text)
