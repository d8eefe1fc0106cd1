"""README and manual: short lines, tables that follow the code, and snippets that run."""

import re
import sys
from pathlib import Path

import pytest

from mtr_lab.cli.program import compose
from mtr_lab.listing import list_models, list_policies

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ROOT / "docs" / "pages"


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", (PAGES / page).read_text(encoding="utf-8"))


def test_lines_of_the_readme_are_short() -> None:
    assert not [f"line {number}: {len(line)}" for number, line in enumerate(README.splitlines(), 1) if len(line) > 100]


@pytest.mark.parametrize(("title", "names"), [("Backbones", list_models), ("Policies", list_policies)])
def test_the_readme_names_every_model_and_policy(title: str, names) -> None:
    section = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(\w+)`", section)) == set(names())


@pytest.mark.slow
def test_the_readme_has_the_figures_of_the_models() -> None:
    assert tables.with_tables(README) == README, "make tables"


def test_every_bundled_model_has_its_card() -> None:
    sums = dict(line.split()[::-1] for line in (ROOT / "mtr_lab/assets/SHA256SUMS").read_text().splitlines())
    page = tables.CARDS.read_text(encoding="utf-8")
    assert page == tables.cards(), "make tables"
    assert {f"{name}.safetensors" for name in tables.BUNDLED} == set(sums)
    assert all(sum in page for sum in sums.values())


SNIPPETS = dict(zip(["export", "trace", "classes", "adapter", "grad-cam"], snippets("faq.md", "python"), strict=True))


@pytest.mark.parametrize(
    "question",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("export", "adapter") else []) for name in SNIPPETS],
)
def test_the_questions_have_snippets_that_run(question: str) -> None:
    names: dict = {}
    exec(SNIPPETS[question], names)
    match question:
        case "export":
            assert names["logits"].shape == (1, 10)
        case "classes":
            assert names["mine"].head.out_features == 3
        case "adapter":
            assert names["mixer"].x_proj.up.weight.grad.abs().sum() > 0
            assert names["mixer"].x_proj.base.weight.grad is None
        case "grad-cam":
            assert names["cam"].shape == (1, 197)
            assert names["cam"].max() > 0


def test_the_page_on_own_yaml_works(tmp_path: Path) -> None:
    page = (PAGES / "own_yaml.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"(?s)`DIR/(\S+\.yaml)`:\n\n```yaml\n(.*?)```", page):
        (file := tmp_path / name).parent.mkdir(exist_ok=True)
        file.write_text(content)
    config = compose("config", ["experiment=mine"], tmp_path)
    assert (config.mtr.policy, config.mtr.merge, list(config.mtr.ratio)) == ("gentle", "prune", [0.2, 0.4])
    assert (config.dataset.name, config.dataset.root, config.dataset.batch_size) == ("pets", "/data/pets", 32)
