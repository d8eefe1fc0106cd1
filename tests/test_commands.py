"""``mtr-lab``: the commands, their help pages, the commented configuration and the lists."""

import contextlib
import io
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import mtr_lab
from mtr_lab import __main__ as evaluate_program
from mtr_lab import bench, listing, train
from mtr_lab.cli import commands
from mtr_lab.cli.overrides import is_override
from mtr_lab.cli.program import compose, show_config
from mtr_lab.cli.settings import setting_names
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError
from mtr_lab.export import __main__ as export_program
from mtr_lab.listing import model_table

ROOT = Path(__file__).parent.parent
NAMES = [command.name for command in commands.COMMANDS]
HYDRA_PROGRAMS = (evaluate_program.PROGRAM, train.PROGRAM, bench.PROGRAM, export_program.PROGRAM)


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"], ["-h"]])
def test_without_a_command_the_overview_is_printed(run_command, arguments: list[str]) -> None:
    run = run_command(commands.main, *arguments)
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[lines.index("commands:") + 1 :][: len(NAMES)]] == NAMES


@pytest.mark.parametrize(
    ("line", "command", "rest"),
    [
        ("train dataset.root=DIR", "train", ["dataset.root=DIR"]),
        ("backbone=vim_s mtr.ratio=0.3", "eval", ["backbone=vim_s", "mtr.ratio=0.3"]),
        ("-m reduction=mtr,hsa", "eval", ["-m", "reduction=mtr,hsa"]),
        ("--cfg job", "eval", ["--cfg", "job"]),
        ("~mtr.score", "eval", ["~mtr.score"]),
        ("report DIR -o r.html", "report", ["DIR", "-o", "r.html"]),
    ],
)
def test_overrides_without_a_command_are_evaluated(line: str, command: str, rest: list[str]) -> None:
    chosen, arguments = commands.split_command(line.split())
    assert (chosen.name, arguments) == (command, rest)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian", "unknown command 'trian'. Did you mean 'train'?"),
        ("visualise", "'visualize'"),
        ("dog.jpg", "Type mtr-lab visualize dog.jpg"),
    ],
)
def test_a_mistyped_command_gets_one_clear_message_and_code_2(run_command, word: str, expected: str) -> None:
    run = run_command(commands.main, word, "mtr.ratio=0.3")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("mtr_lab: ")
    assert expected in run.err


def test_help_on_a_command_may_be_asked_in_two_ways(run_command) -> None:
    asked = run_command(commands.main, "help", "policies")
    assert asked.code == 0
    assert asked.out == run_command(commands.main, "policies", "--help").out


def test_the_version(run_command) -> None:
    assert run_command(commands.main, "--version").out == f"mtr_lab {mtr_lab.__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_on_a_screen(run_command, name: str) -> None:
    run = run_command(commands.main, name, "--help")
    assert (run.code, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines[0].startswith(f"usage: mtr-lab {name}")
    assert 15 <= len(lines) <= 45
    assert max(map(len, lines)) <= 80
    examples = lines[lines.index("examples:") + 1 :][:3]
    assert all(line.startswith(f"  mtr-lab {name}") for line in examples)
    assert lines[-1].startswith("exit codes: 0 ")


@pytest.mark.parametrize("program", HYDRA_PROGRAMS, ids=lambda program: program.command)
def test_help_names_every_choice_of_the_groups(run_command, program, tmp_path: Path) -> None:
    (tmp_path / "reduction").mkdir()
    (tmp_path / "reduction" / "mine.yaml").touch()
    out = run_command(commands.main, program.command.split()[1], "--help", "-cd", tmp_path).out
    config = compose(program.config_name, [])
    for group in {"backbone", "dataset", "task", "reduction", "trainer", "logger", "bench"} & {*config, "reduction"}:
        if group != "reduction" or "mtr" in config:
            assert {file.stem for file in (CONF / group).glob("*.yaml")} <= set(out.replace("*", "").split())
    assert ("mine" in out.split()) == ("mtr" in config)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [(program, arguments) for program in HYDRA_PROGRAMS for arguments in program.examples],
    ids=lambda value: value if isinstance(value, str) else value.command,
)
def test_the_examples_of_help_are_true(program, arguments: str) -> None:
    sweep, *overrides = ["-m", *arguments.split()] if not arguments.startswith("-m ") else arguments.split()
    single = [override if "[" in override else override.split(",")[0] for override in overrides]
    assert sweep == "-m"
    compose(program.config_name, single)


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        ("config", []),
        ("config", ["task=segmentation", "reduction=tome", "logger=csv", "trainer=ddp"]),
        ("config", ["backbone=vim_s", "dataset.root=/data/a: b", "backbone.revision='1e3'", "mtr.ratio=null"]),
        ("train", ["experiment=vim_nano_bccd"]),
        ("bench", ["bench=h100_1024"]),
    ],
)
def test_the_commented_configuration_is_the_configuration(program: str, overrides: list[str]) -> None:
    text = show_config(program, overrides)
    assert OmegaConf.create(text) == compose(program, overrides)
    assert max(map(len, text.splitlines())) <= 160


def test_comments_are_those_of_the_chosen_files() -> None:
    lines = show_config("config", ["reduction=tome", "task=segmentation"]).splitlines()
    assert "  ratio: [0.2, 0.3, 0.4]  # share of the FLOPs to remove: a number or a list" in lines
    assert any(line.startswith("# ToMe (arXiv 2210.09461)") for line in lines[: lines.index("mtr:")])
    assert any(line.startswith("  img_size: [360, 480]  # height, width") for line in lines)
    assert any(line.startswith("  on_error: fail  # ") for line in lines)  # of the file that camvid_sample builds on
    assert any(line.startswith("  seed: 0  # ") for line in lines)  # of mtr.yaml, on which tome builds
    assert not any("@package" in line for line in lines)


def test_a_package_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="unknown package 'mtrr'. Did you mean 'mtr'"):
        show_config("config", [], package="mtrr")


def test_models_are_listed_with_their_figures(run_command) -> None:
    run = run_command(commands.main, "models", "vim_[tn]*[aois]")
    assert (run.code, run.err) == (0, "")
    rows = {line.split()[0]: line for line in run.out.split("\n\n")[0].splitlines()[1:]}
    assert list(rows) == ["vim_ti", "vim_ti_plus", "vim_nano"]
    figures = ["vim_ti", "7.1M", "224²", "3.12", "1.45", "–", "76.1%"]
    assert rows["vim_ti"].split() == [*figures, "outputs", "apache-2.0", "hustvl/Vim-tiny-midclstok"]
    assert rows["vim_nano"].split()[-4:] == ["–", "weights", "apache-2.0", "bundled"]


@pytest.fixture(scope="module")
def every_model() -> list[tuple[str, ...]]:
    """The table of all models: each is built on the meta device, which takes seconds."""
    return model_table()


@pytest.mark.parametrize(("width", "left_out"), [(80, "stated, verified, weights"), (120, "")])
def test_a_terminal_gets_the_models_columns_that_fit(
    width: int, left_out: str, run_command, every_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "model_table", lambda pattern: every_model)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    table, _, notes = run_command(commands.main, "models").out.partition("\n\n")
    assert max(map(len, f"{table}\n{notes}".splitlines())) <= width
    assert len(table.splitlines()) == 1 + len(mtr_lab.list_models())
    titles = table.split("\n")[0].split()
    assert {"model", "GFLOPs", "top-1", "licence"} <= set(titles)
    assert ("verified" in titles) == ("left out" not in notes) == (not left_out)
    assert left_out in notes


def test_every_model_states_its_licence_and_what_was_verified(every_model) -> None:
    titles, *rows = every_model
    assert [row[0] for row in rows] == mtr_lab.list_models()
    for row in rows:
        texts = dict(zip(titles, row, strict=True))
        assert texts["licence"]
        trained_here = texts["weights"] in ("bundled", "–")
        untrained = texts["licence"] == "–"
        assert texts["verified"] == ("–" if untrained else "weights" if trained_here else "outputs")
        if texts["stated"] != "–" and not texts["model"].startswith("videomamba"):  # whose authors leave the scan out
            assert float(texts["stated"]) == pytest.approx(float(texts["GFLOPs*"]), rel=0.045)


def test_policies_are_listed_with_their_parts_and_papers(run_command, tmp_path: Path) -> None:
    (tmp_path / "reduction").mkdir()
    (tmp_path / "reduction" / "mine.yaml").write_text("# @package mtr\n# Mine: a test.\ndefaults: [mtr, _self_]\n")
    run = run_command(commands.main, "policies", "-cd", tmp_path)
    assert (run.code, run.err) == (0, "")
    assert max(map(len, run.out.splitlines())) <= 80
    rows = {line.split()[0]: line for line in run.out.split("\n\n")[0].splitlines()[1:]}
    assert list(rows) == [*mtr_lab.list_policies(), "mine"]
    assert rows["tome"].split() == ["tome", "none", "alternate", "cosine", "size", "sets", "2210.09461"]
    assert rows["mine"].endswith("Mine")
    assert rows["fovea"].endswith("mtr_lab")  # although its comment cites a paper


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models", "vim_xs"], "unknown model 'vim_xs'. Did you mean 'vim_s'"),
        (["policies", "mtrr"], "unknown policy 'mtrr'. Did you mean 'mtr'"),
    ],
)
def test_a_pattern_that_nothing_fits(run_command, arguments: list[str], expected: str) -> None:
    run = run_command(commands.main, *arguments)
    assert (run.code, run.out) == (2, "")
    assert expected in run.err


def test_lists_take_a_pattern() -> None:
    assert mtr_lab.list_models("vim_?") == ["vim_s", "vim_b"]
    assert mtr_lab.list_policies("*mee*") == ["rmeeto"]
    assert mtr_lab.list_models("resnet*") == []


def test_the_installed_command_and_every_program_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["mtr-lab"]) is commands.main
    assert all(callable(pkgutil.resolve_name(command.program)) for command in commands.COMMANDS)


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("experiments/**/*.md")]
PLACEHOLDERS = {"NAME", "mine"}


def test_the_command_lines_of_the_manual_name_what_exists() -> None:
    """Every ``mtr-lab …`` of the pages: its command, and the groups, choices and keys of its overrides."""
    keys = {key for program in HYDRA_PROGRAMS for key in setting_names(program.config_name)}
    for task in ("detection", "segmentation"):
        keys |= {f"task.{key}" for key in compose("config", [f"task={task}"]).task}
    wrong, lines = [], 0
    for page in PAGES:
        for command, arguments in re.findall(r"\bmtr-lab ([a-z][\w-]*)([^`#\n|)]*)", page.read_text()):
            lines += 1
            if command not in NAMES:
                wrong.append(f"{page.name}: mtr-lab {command}")
            for override in filter(is_override, arguments.split()):
                key, _, value = override.lstrip("+~").partition("=")
                files = {file.stem for file in (CONF / key).glob("*.yaml")}
                known = set(value.split(",")) <= files | PLACEHOLDERS if files else key in keys
                if not known and not key.startswith(("hydra", "logger.", "dataset.", "trainer.", "wandb")):
                    wrong.append(f"{page.name}: {override}")
    assert not wrong
    assert lines > 50


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mtr-lab vis", {"visualize"}),
        ("mtr-lab trai", {"train", "trainer=", "trainer."}),
        ("mtr-lab backbone=vim_n", {"backbone=vim_nano", "backbone=vim_nano_half"}),
        ("mtr-lab train training.ep", {"training.epochs="}),
        ("mtr-lab bench bench=h100_l", {"bench=h100_latency"}),
    ],
)
def test_completion_of_commands_and_of_their_settings(
    run_command, monkeypatch: pytest.MonkeyPatch, line: str, expected: set[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert set(run_command(commands.main, "-sc", "query=bash").out.split()) == expected


@pytest.mark.parametrize(
    "arguments", [["models", "vim_nano"], ["eval", "backbone=é", "--cfg", "job"]], ids=["page", "mistake"]
)
def test_a_terminal_without_the_characters(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["mtr-lab", *arguments])
    with contextlib.suppress(SystemExit):
        commands.main()
    for stream in (out, err):
        stream.flush()
    lines = (out.buffer.getvalue() + err.buffer.getvalue()).decode("ascii")
    assert ("?" if arguments[0] == "models" else "backbone=\\xe9") in lines
