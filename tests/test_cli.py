"""Arguments that do not fit a program: what the message says, and that what it says to type works."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest.mock import ANY

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mtr_lab import __main__ as evaluate_program
from mtr_lab import bench as bench_program
from mtr_lab import train as train_program
from mtr_lab.cli import program as cli
from mtr_lab.cli.help_pages import help_page
from mtr_lab.cli.overrides import split_overrides, stray_word, typed, unknown_option
from mtr_lab.cli.program import compose, show_config
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError

NAMES = ["seed", "mtr.ratio", "mtr.seed", "dataset.batch_size", "timing.batch_size", "backbone", "backbone.name"]
"""Of settings and groups."""
DIFFICULT = [
    "/data/a=b",
    "/data/a,b",
    "/data/[new] {x} (1)",
    "/data/my images",
    "/data/it's",
    '/data/"quoted"',
    "/data/#1;&|!~*?<>",
    "/data/é",
    "/data/trailing ",
    "/data/back\\slash",
    "C:\\data",
    "~/data",
    "/data/$HOME`x`",
    "0.4",
    "[0.2,0.3]",
]
"""Values that Hydra, or a shell, reads in another way if they are typed as they are."""


@pytest.mark.parametrize(
    ("program", "override", "expected"),
    [
        ("config", "backbone=vim_xs", ["unknown backbone 'vim_xs'", "vim_s"]),
        ("config", "reduction=mtrr", ["unknown reduction 'mtrr'", "'mtr'"]),
        ("config", "dataset=imagnet", ["unknown dataset 'imagnet'", "'imagenet'"]),
        ("config", "experiment=vim_nan", ["unknown experiment 'vim_nan'", "'vim_nano'"]),
        (
            "config",
            "experiment=vim_nano",
            ["experiment=vim_nano is a preset", "Type mtr-lab train experiment=vim_nano"],
        ),
        ("train", "experiment=anchors", ["experiment=anchors is a preset", "Type mtr-lab eval experiment=anchors"]),
        ("config", "mtr.ratoi=0.3", ["unknown key 'mtr.ratoi'", "'mtr.ratio'", "mtr-lab eval --cfg job"]),
        ("config", "backbon=vim_s", ["unknown key 'backbon'", "'backbone'"]),
        ("config", "ratio=0.4", ["unknown key 'ratio'", "mtr.ratio=0.4"]),
        ("config", "batch_size=4", ["unknown key 'batch_size'", "dataset.batch_size=4", "timing.batch_size=4"]),
        ("config", "+mtr.unknown=1", ["unknown key 'mtr.unknown'"]),
        ("config", "+foo=1", ["unknown key 'foo'"]),
        ("config", "~mtr.score", ["the key mtr.score is missing"]),
        ("config", "mtr.ratio=[0.2", ["cannot parse the override 'mtr.ratio=[0.2'"]),
        ("config", "mtr.ratio=40", ["mtr.ratio must be a share", "got 40", "For 40 % type mtr.ratio=0.4"]),
        ("config", "mtr.ratio=[0.2,12.5]", ["got 12.5", "For 12.5 % type mtr.ratio=0.125"]),
        ("config", "speedup=1.5", ["unknown key 'speedup'", "mtr.speedup=1.5"]),
        ("config", "mtr.speedup=1", ["mtr.speedup=1: expected a number above 1"]),
        ("config", "mtr.speedup=[1.2,fast]", ["mtr.speedup=fast: expected a number above 1"]),
        ("config", "mtr.speedup=[]", ["mtr.speedup=[]: expected a number above 1"]),
        ("config", "mtr.max_drop=1", ["mtr.max_drop=1: expected a fraction of the images in (0, 1), 0.01 for 1 %"]),
        ("train", "mtr.speedup=1.5", ["unknown key 'mtr.speedup'"]),
        ("config", "mtr.ratio=0.2,0.3", ["a sweep type -m mtr.ratio=0.2,0.3", "a list 'mtr.ratio=[0.2,0.3]'"]),
        ("config", "backbone=vim_s,vim_b", ["For a sweep type -m backbone=vim_s,vim_b"]),
        ("config", "dataset.root=/data/a=b", ["dataset.root=/data/a=b: ", """Type 'dataset.root="/data/a=b"'"""]),
        ("config", "dataset.root=/data/a,b", ["""for a text 'dataset.root="/data/a,b"'"""]),
        ("config", "seed=1.5", ["seed=1.5: expected an integer"]),
        ("config", "resume=3", ["resume=3: expected true or false"]),
        ("config", "trainer.cuda_graph=3", ["trainer.cuda_graph=3: expected true or false"]),
        ("config", "backbone.num_classes=0", ["backbone.num_classes=0: expected an integer of at least 1"]),
        ("train", "+training.x=1", ["unknown key 'training.x'"]),
        ("train", "training.epoch=3", ["unknown key 'training.epoch'", "'training.epochs'"]),
        ("train", "training.freeze_backbone=yes please", ["training.freeze_backbone=yes please: expected true or"]),
        ("train", "experiment=vim_nan", ["unknown experiment 'vim_nan'", "'vim_nano'"]),
        ("bench", "bench=h10", ["unknown bench 'h10'", "'h100'"]),
        ("bench", "bench.rounds=3", ["unknown key 'bench.rounds'"]),
        ("bench", "bench.ratio=30", ["For 30 % type bench.ratio=0.3"]),
    ],
)
def test_an_override_that_does_not_fit_is_named(program: str, override: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose(program, [override])
    for text in expected:
        assert text in str(error.value)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "backbone").glob("*.yaml")))
def test_every_backbone_can_be_chosen(name: str) -> None:
    assert compose("config", [f"backbone={name}"]).backbone.name == name


def test_a_setting_of_one_family_is_that_of_its_backbones_alone() -> None:
    assert compose("config", ["backbone=vmamba_t", "backbone.dims=48"]).backbone.dims == 48
    with pytest.raises(UserError, match="unknown key 'backbone.dims'"):
        compose("config", ["backbone=vim_s", "+backbone.dims=48"])


def test_what_is_said_to_be_typed_is_read_as_the_value_that_was_meant() -> None:
    line = " ".join(typed("dataset.root", value) for value in DIFFICULT)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    *arguments, rest = done.stdout.split("\0")
    assert rest == ""
    overrides = OverridesParser.create().parse_overrides(arguments)
    assert {override.key_or_group for override in overrides} == {"dataset.root"}
    read = [override.value() for override in overrides]
    assert read == [{"0.4": 0.4, "[0.2,0.3]": [0.2, 0.3]}.get(value, value) for value in DIFFICULT]


def test_the_line_that_a_message_says_to_type_works() -> None:
    with pytest.raises(UserError) as error:
        compose("config", ["dataset.root=/data/a=b [x], y"])
    (line,) = re.findall(r"Type (.*)$", str(error.value))
    assert compose("config", shlex.split(line)).dataset.root == "/data/a=b [x], y"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--ratio", "0.4", "Type mtr.ratio=0.4"),
        ("--ratio=0.4", None, "Type mtr.ratio=0.4"),
        ("--backbone", "vim_s", "Type backbone=vim_s"),
        ("--batch-size", "4", "Type dataset.batch_size=4 or timing.batch_size=4"),
        ("--seed", None, "Type seed=…"),
        ("--mtr.ratio", "[0.2,0.3]", "Type 'mtr.ratio=[0.2,0.3]'"),
        ("--colour", "red", "unknown option --colour. --help lists the options"),
    ],
)
def test_an_option_that_is_a_setting(option: str, value: str | None, expected: str) -> None:
    assert expected in str(unknown_option(option, value, NAMES))


@pytest.mark.parametrize(
    ("word", "before", "expected"),
    [
        ("dog.jpg", None, "dog.jpg is a file, expected KEY=VALUE. Type mtr-lab visualize dog.jpg"),
        ("a b.png", None, "Type mtr-lab visualize 'a b.png'"),
        ("vim.pth", None, "Type backbone.checkpoint=vim.pth"),
        ("a=b.pth", None, """Type 'backbone.checkpoint="a=b.pth"'"""),
        ("last.ckpt", None, "Type mtr-lab train training.resume=last.ckpt"),
        ("runs", None, "runs is a folder of results. Type mtr-lab report runs -o report.html"),
        ("runs/1/result.json", None, "Type mtr-lab report runs/1/result.json -o report.html"),
        ("my images", None, "expected KEY=VALUE, e.g. 'dataset.root=my images'"),
        ("/nowhere/data", None, "expected KEY=VALUE, e.g. dataset.root=/nowhere/data"),
        ("images", "dataset.root=my", "a path with blanks needs quotes. Type 'dataset.root=my images'"),
        ("nothing", "dataset.root=my", "'nothing' is not an override: expected KEY=VALUE"),
        ("", None, "an empty argument: expected KEY=VALUE"),
        ("x" * 300, "dataset.root=my", "is not an override: expected KEY=VALUE"),
    ],
)
def test_a_file_or_a_word_where_an_override_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, before: str | None, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my images").mkdir()
    (tmp_path / "runs" / "1").mkdir(parents=True)
    (tmp_path / "runs" / "1" / "result.json").touch()
    assert expected in str(stray_word(word, before))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ratio", "0.4", "backbone=vim_s"], "Type mtr.ratio=0.4"),
        (["backbone=vim_s", "--backbone", "vim_b"], "Type backbone=vim_b"),
        (["mtr.ratio=0.3", "dog.jpg"], "Type mtr-lab visualize dog.jpg"),
        (["--config-dir", "/nowhere"], "--config-dir=/nowhere: the folder does not exist"),
    ],
)
def test_a_program_ends_with_the_message_and_code_2(run_command, arguments: list[str], expected: str) -> None:
    run = run_command(evaluate_program.main, *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("mtr_lab: ")
    assert expected in run.err


ENDINGS = """
import os
import signal
import sys
from lightning.pytorch.utilities.exceptions import SIGTERMException

def interrupted(config):
    raise KeyboardInterrupt

def interrupted_in_lightning(config):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)

def terminated(config):
    os.kill(os.getpid(), signal.SIGTERM)

def terminated_in_lightning(config):
    raise SIGTERMException

def failed(config):
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("interrupted", 130),
        ("interrupted_in_lightning", 130),
        ("terminated", 143),
        ("terminated_in_lightning", 143),
        ("failed", 1),
    ],
)
def test_a_signal_ends_a_program_with_128_and_its_number(
    run_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, code: int
) -> None:
    (tmp_path / "endings.py").write_text(ENDINGS)
    monkeypatch.syspath_prepend(tmp_path)
    program = bench_program.PROGRAM._replace(function=f"endings:{ending}")
    run = run_program(lambda: cli.run_program(program))
    line = {130: "mtr_lab: ended by SIGINT.\n", 143: "mtr_lab: ended by SIGTERM.\n"}.get(code, "")
    assert (run.code, run.err) == (code, line)


def test_options_may_follow_overrides(run_command) -> None:
    run = run_command(train_program.main, "seed=7", "--cfg", "job", "training.epochs=3", "-p", "training")
    assert run.code == 0, run.err
    assert run.out.startswith("# @package training\nepochs: 3\n")


def test_overrides_are_told_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.png").touch()
    arguments = ["a=b.png", "-o", "out", "mtr.ratio=0.3", "~mtr.score", "hydra/launcher=slurm", "+x=1", "c.png"]
    long = f"mtr.schedule=[{','.join(['10'] * 100)}]"
    assert split_overrides([long]) == ([], [long])
    files, overrides = split_overrides(arguments)
    assert files == ["a=b.png", "-o", "out", "c.png"]
    assert overrides == ["mtr.ratio=0.3", "~mtr.score", "hydra/launcher=slurm", "+x=1"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (ANY, None, None)),
        (["mtr.speedup=1.5"], (None, 1.5, None)),
        (["mtr.max_drop=[0.01,0.02]"], (None, None, [0.01, 0.02])),
        (["mtr.ratio=null", "mtr.speedup=2"], (None, 2, None)),
    ],
)
def test_the_default_ratio_gives_way_to_another_budget(overrides: list[str], expected: tuple) -> None:
    mtr = compose("config", overrides).mtr
    assert (mtr.ratio, mtr.speedup, mtr.max_drop) == expected


@pytest.mark.parametrize("overrides", [["mtr.ratio=0.3", "mtr.speedup=1.5"], ["mtr.speedup=1.5", "mtr.max_drop=0.1"]])
def test_one_budget_alone(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=" and ".join(overrides) + ": give one of mtr.ratio, mtr.speedup, mtr.max_drop"):
        compose("config", overrides)


def test_the_help_and_the_settings_name_the_budgets() -> None:
    page = help_page(evaluate_program.PROGRAM)
    assert "mtr-lab eval mtr.speedup=1.5" in page
    assert "mtr-lab eval mtr.max_drop=0.02" in page
    settings = show_config("config", [])
    assert "  speedup: null  # instead of ratio: speed-up" in settings
    assert "  max_drop: null  # instead: " in settings
