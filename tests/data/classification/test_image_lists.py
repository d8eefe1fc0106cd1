"""Lists of images to evaluate alone or to leave out, and the list on which the lab's policies are chosen."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from mtr_lab.data import ImageDataModule
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]
EXPERIMENTS = Path(__file__).parents[3] / "experiments"
CHOICE = EXPERIMENTS / "vim_nano_choice" / "validation.txt"


def ids(data: ImageDataModule) -> list[str]:
    return [id for batch in data.test_dataloader() for id in batch["id"]]


def test_one_list_divides_the_evaluation_images(folders: Folders, module: Module, tmp_path: Path) -> None:
    folders("train", a=1, b=4)
    root, listed = folders("val", a=3, b=2), tmp_path / "list.txt"
    listed.write_text("b/1.jpg\na/2.jpg\n\n")
    chosen, others = module(root=str(root), include=str(listed)), module(root=str(root), exclude=str(listed))
    assert (ids(chosen), chosen.num_images) == (["a/2.jpg", "b/1.jpg"], 2)
    assert (ids(others), others.num_images) == (["a/0.jpg", "a/1.jpg", "b/0.jpg"], 3)
    assert [label for batch in chosen.test_dataloader() for label in batch["label"].tolist()] == [0, 1]
    assert len({module(root=str(root)).fingerprint(), chosen.fingerprint(), others.fingerprint()}) == 3
    assert len(chosen.calibration_images(8)) == 5  # training images are not selected


def test_mistakes_in_a_list(folders: Folders, module: Module, tmp_path: Path) -> None:
    root, listed = folders("val", a=1), tmp_path / "list.txt"
    with pytest.raises(UserError, match=r"dataset\.include=.*list\.txt is not a file"):
        module(root=str(root), include=str(listed))
    listed.write_text("a/0.jpg\nb/7.jpg\n")
    with pytest.raises(UserError, match=r"dataset\.exclude=.*'b/7\.jpg', one of 1 images that are not in"):
        module(root=str(root), exclude=str(listed))
    listed.write_text("a/0.jpg\n")
    with pytest.raises(UserError, match="leave no image"):
        module(root=str(root), exclude=str(listed))
    with pytest.raises(UserError, match="dataset.source=torch/cifar10 has other images"):
        module(source="torch/cifar10", include=str(listed))


def test_the_committed_choice_is_what_its_program_draws(module: Module) -> None:
    program = runpy.run_path(str(EXPERIMENTS / "choice_images.py"))
    listed = CHOICE.read_text().splitlines()
    assert len(listed) == len(set(listed)) == program["COUNT"]
    assert program["draw"](reversed(listed)) == listed
    # The bundled images are 500 of the 3 000: in the list are exactly those of low hashes.
    bundled = ids(module(root="pkg://mtr_lab/assets/imagenette_sample"))
    last = max(map(program["hash_of"], listed))
    assert {id for id in bundled if program["hash_of"](id) <= last} == set(bundled) & set(listed)
    assert 100 < len(set(bundled) & set(listed)) < 250
