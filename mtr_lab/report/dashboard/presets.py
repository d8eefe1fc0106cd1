"""Which settings of a run differ from its policy's file."""

from functools import cache
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.policy_files import find_policy, read_policy
from mtr_lab.results.schema import Result
from mtr_lab.results.settings import flatten


def changed_settings(result: Result) -> dict[str, Any]:
    """The settings of a run's policy that differ from the policy's file; none for a file that is not here."""
    settings = result["config"].get("mtr")
    if not isinstance(settings, dict):
        return {}
    preset = _preset(str(settings.get("policy")))
    return {key: settings[key] for key in preset if key in settings and settings[key] != preset[key]}


def usual_settings(result: Result) -> dict[str, str]:
    """The settings in the file of a run's policy, by dotted key as in ``flatten``; none for a file that is not here."""
    settings = result["config"].get("mtr")
    return dict(flatten({"mtr": _preset(str(settings.get("policy")))})) if isinstance(settings, dict) else {}


@cache
def _preset(policy: str) -> dict[str, Any]:
    try:
        return read_policy(find_policy(policy))
    except UserError:
        return {}
