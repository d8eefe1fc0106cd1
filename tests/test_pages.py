"""README and manual: short lines, tables that follow the code, and snippets that run."""

import re
import sys
from pathlib import Path

import pytest
import torch

import mtr_lab
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


def test_the_questions_have_snippets_that_run() -> None:
    torch.manual_seed(0)
    geometry = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 8, "embed_dim": 16, "num_classes": 3}
    model, adapted = (mtr_lab.create_model("vim_ti", **geometry).eval() for _ in range(2))
    images = torch.randn(1, 3, 32, 32)
    names = {"mtr_lab": mtr_lab, "torch": torch, "model": model, "adapted": adapted, "images": images}
    names |= {"image": images.clone(), "label": 1}
    code = snippets("faq.md", "python")
    assert len(code) == 5
    for snippet in code:
        exec(snippet, names)
    assert names["mine"].head.out_features == 3
    assert names["mixer"].x_proj.up.weight.grad.abs().sum() > 0
    assert names["mixer"].x_proj.base.weight.grad is None
    assert names["cam"].shape == (1, 17)
    assert names["cam"].max() > 0


def test_the_page_on_own_yaml_works(tmp_path: Path) -> None:
    page = (PAGES / "own_yaml.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"(?s)`DIR/(\S+\.yaml)`:\n\n```yaml\n(.*?)```", page):
        (file := tmp_path / name).parent.mkdir(exist_ok=True)
        file.write_text(content)
    config = compose("config", ["experiment=mine"], tmp_path)
    assert (config.mtr.policy, config.mtr.merge, list(config.mtr.ratio)) == ("gentle", "prune", [0.2, 0.4])
    assert (config.dataset.name, config.dataset.root, config.dataset.batch_size) == ("pets", "/data/pets", 32)
