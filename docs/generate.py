"""Generate the manual's pages from files elsewhere: README, CONTRIBUTING, CHANGELOG, conf/ and the imports."""

import re
import sys
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))
from architecture import draw

from mtr_lab.policy_files import policy_files, read_policy

ROOT = Path(__file__).parent.parent
PROGRAMS = {"config": "eval", "train": "train", "bench": "bench"}


def start() -> str:
    """The README as the first page, with its pictures, and with links that work in the manual."""
    text = (ROOT / "README.md").read_text()
    for picture in re.findall(r"experiments/\S+\.png", text):
        with mkdocs_gen_files.open(picture, "wb") as out:
            out.write((ROOT / picture).read_bytes())
    text = text.replace("](docs/pages/", "](").replace("](docs/policies.md)", "](policies.md)")
    return text.replace("](CONTRIBUTING.md)", "](contributing.md)").replace("](CHANGELOG.md)", "](changelog.md)")


def configuration() -> str:
    """All configuration files with their comments, one heading per group and per file."""
    conf = ROOT / "conf"
    parts = [
        "# Configuration",
        "Three programs share one tree of settings. The command line overrides any value (`key=value`) and "
        "chooses from any group (`group=name`); `-m` with several values makes a sweep. "
        "`--cfg job` prints the resulting settings.",
    ]
    for name, program in PROGRAMS.items():
        parts += [f"## mtr-lab {program}", fence(conf / f"{name}.yaml")]
    for group in sorted(path for path in conf.iterdir() if path.is_dir()):
        files = sorted(group.rglob("*.yaml"))
        parts.append(f"## {group.name}")
        parts.append("One of: " + ", ".join(f"`{name_of(file, group)}`" for file in files) + ".")
        parts += [f"### {group.name}={name_of(file, group)}\n\n{fence(file)}" for file in files]
    return "\n\n".join(parts)


def policies() -> str:
    """The page on policies: text, each policy's source, and a table of its parts; differences from `mtr` are bold."""
    files = policy_files()
    resolved = {name: read_policy(file) for name, file in files.items()}
    parts = [key for key in resolved["mtr"] if any(config[key] != resolved["mtr"][key] for config in resolved.values())]
    rows = ["| policy | " + " | ".join(parts[1:]) + " |", "|---" * len(parts) + "|"]
    for name, config in resolved.items():
        cells = [config[key] if config[key] == resolved["mtr"][key] else f"**{config[key]}**" for key in parts[1:]]
        rows.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    sources = "\n\n".join(f"**`{name}`**: {head(file)}" for name, file in files.items())
    return f"{(Path(__file__).parent / 'policies.md').read_text()}\n\n{sources}\n\n" + "\n".join(rows) + "\n"


def architecture() -> str:
    """The page on the architecture, with a picture drawn from the imports."""
    return (Path(__file__).parent / "architecture.md").read_text().replace("{picture}", draw())


def head(file: Path) -> str:
    """The comment at the beginning of a file."""
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
