"""Policies of the user's own: a YAML file or an object in Python, a folder of files for the programs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from small_run import SMALL

import mtr_lab
from mtr_lab import UserError, bench, train, visualize
from mtr_lab.__main__ import main
from mtr_lab.cli.program import compose
from mtr_lab.configuration import CONF
from mtr_lab.evaluation.points import policy_settings
from mtr_lab.policy_files import policy_files, read_policy
from mtr_lab.reduction import Policy, make_policy, policy_config, policy_names

SMALLEST = "# @package mtr\n# Smallest first.\ndefaults: [mtr, _self_]\nscore: norm\nmerge: prune\n"
GEOMETRY = {"img_size": 24, "patch_size": 4, "stride": 4, "depth": 4, "embed_dim": 16, "num_classes": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for ``--config-dir`` with one policy, ``smallest``."""
    (tmp_path / "own files" / "reduction").mkdir(parents=True)
    (tmp_path / "own files" / "reduction" / "smallest.yaml").write_text(SMALLEST)
    return tmp_path / "own files"


@torch.no_grad()
def test_a_file_an_object_and_changes_to_a_name_are_one_policy(folder: Path) -> None:
    torch.manual_seed(0)
    model, images = mtr_lab.create_model("vim_ti", **GEOMETRY).eval(), torch.randn(2, 3, 24, 24)
    schedule = mtr_lab.patch(model, "mtr", ratio=0.2, score="norm", merge="prune").schedule
    expected = model(images)
    file = folder / "reduction" / "smallest.yaml"
    policy = make_policy(policy_config("mtr", policy="smallest", score="norm", merge="prune"))
    for given in (file, str(file), policy):
        reduction = mtr_lab.patch(model, given, ratio=0.2)
        assert reduction.policy == policy
        assert reduction.schedule == schedule
        assert torch.equal(model(images), expected)
    changed = mtr_lab.patch(model, file, ratio=0.2, merge="mean", first_block=0)
    assert changed.policy == replace(policy, merge="mean")
    assert changed.schedule.remove[0] > 0


@torch.no_grad()
def test_a_class_of_policies_decides_itself() -> None:
    @dataclass(frozen=True)
    class Stubborn(Policy):
        """MTR, but never more tokens than it likes."""

        most: int = 1

        def capacity(self, length: int, special: int) -> int:
            return min(self.most, super().capacity(length, special))

    model = mtr_lab.create_model("vim_ti", **GEOMETRY).eval()
    stubborn = Stubborn(**vars(make_policy(policy_config("mtr"))), most=2)
    with pytest.raises(UserError, match="at most 2"):
        mtr_lab.patch(model, stubborn, schedule=[3, 0, 0, 0])
    reduction = mtr_lab.patch(model, stubborn, schedule=[3, 0, 0, 0], most=3)
    assert type(reduction.policy) is Stubborn
    assert mtr_lab.trace(model, torch.randn(1, 3, 24, 24))[-1].hidden.shape[1] == 34


def test_a_file_builds_on_those_beside_it_and_on_the_packages(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("defaults: [tome]\nfeatures: hidden\nfirst_block: 0\n")
    (tmp_path / "second.yml").write_text("defaults: [first, _self_]\nfeatures: residual\n")
    (tmp_path / "third.yaml").write_text("defaults: [_self_, first]\nfeatures: residual\n")
    tome = read_policy(policy_files()["tome"])
    assert read_policy(tmp_path / "second.yml") == {
        **tome,
        "policy": "second",
        "features": "residual",
        "first_block": 0,
    }
    assert read_policy(tmp_path / "third.yaml")["features"] == "hidden"


@pytest.mark.parametrize("name", policy_names())
def test_both_readers_agree(name: str) -> None:
    settings = compose("config", [f"reduction={name}"]).mtr
    assert policy_settings(settings) == policy_config(name)
    assert policy_config(CONF / "reduction" / f"{name}.yaml") == policy_config(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.yaml", None, "cannot read .*absent.yaml: No such file"),
        ("a.yaml", "score: [\n", "a.yaml, line 2 is not plain YAML: [^\\n]*$"),
        ("a.yaml", "- mtr\n", "a.yaml does not hold a policy"),
        ("a.yaml", "score: norm\n", r"a.yaml lacks policy, directions, .*: begin with defaults: \[mtr, _self_\]"),
        ("a.yaml", "defaults: [mtrr]\n", "unknown policy in the defaults of .*a.yaml 'mtrr'.*'mtr'.*beside.*tome"),
        ("a.yaml", "defaults: mtr\n", "defaults in .*a.yaml: expected a list .* got 'mtr'"),
        ("a.yaml", "defaults: [a, _self_]\n", "a.yaml builds on itself: a → a"),
        ("a.yaml", "defaults: [mtr]\nscroe: norm\n", "unknown key in .*a.yaml 'scroe'.*'score'"),
        ("a.yaml", "defaults: [mtr]\nscore: nrom\n", "unknown mtr.score 'nrom'.*'norm'"),
        ("a.yaml", "defaults: [mtr]\npolicy: b\n", "mtr.policy=b only labels the result: .*, now a"),
        ("mtr.yaml", SMALLEST, "mtr.yaml: mtr_lab has a policy called mtr. Give the file another name"),
        ("none.yml", SMALLEST, "none.yml: results call the unreduced model none. Give"),
        ("mine", SMALLEST, "unknown policy .*mine'.* Available: adjacent, .*write; or a file that ends in .yaml"),
    ],
)
def test_a_file_that_is_no_policy_is_explained(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "beside.yaml").write_text(SMALLEST)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        make_policy(policy_config(tmp_path / name))


def test_a_file_beside_hides_no_policy(tmp_path: Path) -> None:
    (tmp_path / "random.yaml").write_text("unrelated: true\n")
    (tmp_path / "a.yaml").write_text(SMALLEST)
    assert policy_config(tmp_path / "a.yaml")["score"] == "norm"
    (tmp_path / "a.yaml").write_text("defaults: [random]\n")
    with pytest.raises(UserError, match=r"random.yaml: mtr_lab has a policy called random"):
        policy_config(tmp_path / "a.yaml")


def test_an_evaluation_by_a_policy_of_the_users(run_command, folder: Path) -> None:
    chosen = ["reduction=smallest", "mtr.ratio=0.2", f"hydra.run.dir={folder}"]
    run = run_command(main, "--config-dir", folder, *chosen, *SMALL)
    assert run.code == 0, run.err
    assert "unreduced and by smallest at mtr.ratio=0.2" in run.out
    result = json.loads((folder / "result.json").read_text())
    assert [point["policy"] for point in result["points"]] == ["none", "smallest"]
    assert (result["config"]["mtr"]["policy"], result["config"]["mtr"]["merge"]) == ("smallest", "prune")


def test_a_benchmark_of_a_policy_of_the_users(run_command, folder: Path) -> None:
    small = ["bench.resolution=32", "bench.batch=1", "bench.seconds=0", f"hydra.run.dir={folder}"]
    run = run_command(bench.main, "-cd", folder, "bench.policy=[none,smallest]", *small)
    assert run.code == 0, run.err
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [(row["policy"], row["error"]) for row in rows] == [("none", None), ("smallest", None)]
    assert rows[1]["reduction"] >= 0.3


def test_pictures_of_a_policy_of_the_users(
    run_command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [*SMALL[:3], "mtr.ratio=0.3", "reduction=smallest"]
    image = Path(mtr_lab.__file__).parent / "assets/imagenette_sample/n02102040/n02102040_3141.JPEG"
    run = run_command(visualize.main, image, "-cd", "own files", "--policies", "mtr", "smallest", *tiny)
    assert run.code == 0, run.err
    assert (tmp_path / "pictures" / f"{image.stem}_smallest.png").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (
            main,
            ["reduction=smalest"],
            "Did you mean 'smallest' or 'headless'? Available: adjacent, directions, evit, famba,",
        ),
        (bench.main, ["bench.policy=smalest"], "unknown bench.policy 'smalest'. Did you mean 'smallest'"),
        (visualize.main, ["--policies", "smalest"], "unknown reduction 'smalest'. Did you mean 'smallest'"),
        (main, ["reduction=smallest", "mtr.policy=mtr"], "mtr.policy=mtr only labels the result"),
        (main, ["reduction=headless"], "reduction.score: a file in reduction/ has to begin with the line '# @package"),
        (main, ["reduction=mistyped"], "unknown key 'mtr.scroe'. Did you mean 'mtr.score'"),
    ],
)
def test_a_mistake_in_a_policy_of_the_users(run_command, folder: Path, program, arguments, message) -> None:
    (folder / "reduction" / "headless.yaml").write_text("defaults: [mtr]\nscore: norm\n")
    (folder / "reduction" / "mistyped.yaml").write_text(SMALLEST.replace("score", "scroe"))
    run = run_command(program, "--config-dir", folder, *arguments)
    assert run.code == 2
    assert message in run.err


@pytest.mark.parametrize("program", [main, train.main, bench.main, visualize.main])
@pytest.mark.parametrize("name", ["reduction/hsa.yaml", "backbone/vim_s.yaml", "config.yaml"])
def test_no_file_of_the_users_is_hidden_by_one_of_the_packages(run_command, folder: Path, program, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(SMALLEST)
    run = run_command(program, f"--config-dir={folder}")
    assert run.code == 2
    assert f"{folder / name}: mtr_lab has a file of that name" in run.err


def test_a_folder_that_does_not_exist(run_command) -> None:
    run = run_command(main, "--config-dir", "nowhere", "-c", "job")
    assert run.code == 2
    assert "--config-dir=nowhere: the folder does not exist." in run.err
