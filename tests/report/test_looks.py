"""Every policy has one look in all charts."""

from mtr_lab.policy_files import policy_files
from mtr_lab.report.looks import MATPLOTLIB_MARKERS, look


def test_no_two_policies_look_alike() -> None:
    looks = {name: look(name) for name in policy_files()}
    assert len({(own.colour, own.marker) for own in looks.values()}) == len(looks)
    assert {own.marker for own in looks.values()} <= set(MATPLOTLIB_MARKERS)


def test_a_users_policy_keeps_its_look_and_takes_none_of_ours() -> None:
    ours = {(look(name).colour, look(name).marker) for name in policy_files()}
    for name in ("mine", "another", "vim_ti"):
        assert look(name) == look(name)
        assert (look(name).colour, look(name).marker) not in ours
