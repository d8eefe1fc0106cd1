"""What the pages say of models: ``make tables`` writes the README's table and the model cards from the records."""

import json
import re
from pathlib import Path

from mtr_lab.listing import model_table

ROOT = Path(__file__).parent.parent
README, CARDS = ROOT / "README.md", ROOT / "docs" / "pages" / "model_cards.md"
COLUMNS = {
    "model": "`backbone=`",
    "params": "params",
    "image": "image",
    "GFLOPs": "GFLOPs",
    "top-1": "top-1, published",
    "weights": "weights",
    "licence": "licence",
    "verified": "verified",
}
"""Those of ``mtr-lab models`` that the README shows, and their titles there."""


LICENCES = {"apache-2.0": "Apache-2.0", "mit": "MIT"}
"""The hub's names of licences, and the usual ones."""


def models() -> str:
    """A Markdown table of all models."""
    titles, *rows = model_table()
    places = [titles.index(column) for column in COLUMNS]
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        name, *cells = (row[place] for place in places)
        cells[4] = where(cells[4])
        cells = [re.sub(r"(?<=\d)(?=[M%])", " ", LICENCES.get(cell, cell)) for cell in cells]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def where(weights: str) -> str:
    """The kind of place that the weights of a model come from."""
    if weights in ("bundled", "–"):
        return weights
    return "release" if weights.startswith("github.com/") else "hub"


BUNDLED = {
    "vim_nano": {
        "Model": "Vim classifier of ten classes, 112² images",
        "Use it": '`create_model("vim_nano", pretrained=True)`; `mtr-lab eval`',
        "Data": "Imagenette's training images, a subset of ImageNet at 128² pixels",
        "Limits": "It knows ten classes. It is meant for trying and testing token reduction, not for recognition",
        "Licence": "Apache-2.0; the training images are ImageNet's, for non-commercial research",
    },
    "vim_nano_bccd": {
        "Model": "Faster R-CNN on the frozen `vim_nano`: red cells, white cells, platelets",
        "Use it": "`mtr-lab eval task=detection`",
        "Data": "BCCD's 205 training images (MIT)",
        "Limits": "The data set is small. The model must not be used for medical purposes",
        "Licence": "Apache-2.0, as the package; none is stated for the file alone",
    },
    "vim_nano_camvid": {
        "Model": "UPerNet on `vim_nano`: street scenes in 11 classes",
        "Use it": "`mtr-lab eval task=segmentation`",
        "Data": "CamVid's 367 training images (free for research)",
        "Limits": "Validation and training images show the same drive. The model must not be used on a road",
        "Licence": "Apache-2.0, as the package; none is stated for the file alone. The images are free for research",
    },
    "videomamba_nano": {
        "Model": "VideoMamba classifier of ten motions, videos of 16 frames of 48²",
        "Use it": '`create_model("videomamba_nano", pretrained=True)`; `mtr-lab eval task=video`',
        "Data": "Generated clips, `dataset=motion`",
        "Limits": "Knows ten motions of generated shapes. For trying and testing token reduction, not for real videos",
        "Licence": "Apache-2.0, as the package",
    },
}
"""What no record says of the files in ``mtr_lab/assets``."""


def cards() -> str:
    """The page of model cards: recipe, accuracy and SHA-256 come from the records in ``experiments``."""
    parts = [
        "# Model cards",
        "These weights are bundled with mtr_lab. This page is generated (`make tables`): recipe and SHA-256 come "
        "from the\ntraining's record, the accuracy from its page in `experiments/`.",
    ]
    for name, facts in BUNDLED.items():
        record = json.loads((ROOT / "experiments" / name / "training.json").read_text())
        config, recipe = record["config"], f"experiments/{name}/recipe.md"
        training, inputs = config["training"], "clips" if config["task"]["name"] == "video" else "images"
        facts = {
            **facts,
            "Parameters": f"{grouped(record['parameters'])}, stored in half precision",
            "Recipe, last run": f"{grouped(record['steps'])} steps of {config['dataset']['batch_size']} {inputs} "
            f"({record['epochs']} epochs), AdamW, learning rate {training['lr']:g}, "
            f"weight decay {training['weight_decay']:g}, averaged "
            f"weights ({training['ema_decay']:g}); [all runs](../../{recipe})",
            "File, SHA-256": f"`mtr_lab/assets/{name}.safetensors`, `{record['sha256']}`",
        }
        rows = "\n".join(f"| {title} | {text} |" for title, text in facts.items())
        parts += [f"## {name}", f"| | |\n|---|---|\n{rows}", "Accuracy:", first_table((ROOT / recipe).read_text())]
    return "\n\n".join(parts) + "\n"


def grouped(number: int) -> str:
    """Digits in groups of three, as in the pages."""
    return f"{number:,}".replace(",", " ")


def first_table(page: str) -> str:
    """The first table of a Markdown page."""
    table = re.search(r"(?m)(^\|.*\n)+", page)
    assert table, "a recipe starts with a table of accuracies"
    return table[0].rstrip()


def with_tables(text: str) -> str:
    """The README with its generated tables."""
    start, end = "<!-- models, generated: make tables -->", "<!-- end of models -->"
    return re.sub(f"(?s){start}.*?{end}", f"{start}\n\n{models()}\n\n{end}", text)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    CARDS.write_text(cards(), encoding="utf-8")
    print(f"wrote the table of {README} and {CARDS}")
