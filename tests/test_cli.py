"""Overrides that do not fit a program's configuration."""

import pytest

from mtr_lab.cli import compose
from mtr_lab.errors import UserError


@pytest.mark.parametrize(
    ("program", "override", "expected"),
    [
        ("config", "backbone=vim_xs", ["unknown backbone 'vim_xs'", "vim_s"]),
        ("config", "reduction=mtrr", ["unknown reduction 'mtrr'", "'mtr'"]),
        ("config", "dataset=imagnet", ["unknown dataset 'imagnet'", "'imagenet'"]),
        ("config", "experiment=vim_nan", ["unknown experiment 'vim_nan'", "'vim_nano'"]),
        ("config", "mtr.ratoi=0.3", ["unknown key 'mtr.ratoi'", "'mtr.ratio'"]),
        ("config", "backbon=vim_s", ["unknown key 'backbon'", "'backbone'"]),
        ("config", "+mtr.unknown=1", ["unknown key 'mtr.unknown'"]),
        ("config", "+foo=1", ["unknown key 'foo'"]),
        ("config", "~mtr.score", ["the key mtr.score is missing"]),
        ("config", "mtr.ratio=[0.2", ["cannot parse the override 'mtr.ratio=[0.2'"]),
        ("train", "+training.x=1", ["unknown key 'training.x'"]),
        ("train", "training.epoch=3", ["unknown key 'training.epoch'", "'training.epochs'"]),
        ("train", "experiment=vim_nan", ["unknown experiment 'vim_nan'", "'vim_nano'"]),
        ("bench", "bench=h10", ["unknown bench 'h10'", "'h100'"]),
        ("bench", "bench.rounds=3", ["unknown key 'bench.rounds'"]),
    ],
)
def test_an_override_that_does_not_fit_is_named(program: str, override: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose(program, [override])
    for text in expected:
        assert text in str(error.value)
