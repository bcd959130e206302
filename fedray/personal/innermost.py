"""The order of policies that decide which model a client runs."""

from __future__ import annotations

from typing import Any

from fedray.errors import ConfigError
from fedray.round import Policy, RunFacts


class BuildsOnViews:
    """Marks a policy whose view is made from the one that it is given, so that it may be further in than any."""


def check_innermost(policy: Policy[Any, Any], run: RunFacts) -> None:
    """Refuse a policy further in that would take the place of this one's model: views go from outer to inner."""
    names = {id(one): name for name, one in run.policies}
    for name, other in run.policies:
        if other is policy:
            return
        if type(other).view is not Policy.view and not isinstance(other, BuildsOnViews):
            mine = names[id(policy)]
            raise ConfigError(
                f"{name} stands before {mine} and would put its tensors into the model that {mine} has made; name "
                f"them the other way round: personal=[{mine.split('.')[-1]},{name.split('.')[-1]}]"
            )
