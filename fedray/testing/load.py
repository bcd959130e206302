"""From a name or a yaml file to a policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.round import Policy
from fedray.testing.short import shorten
from fedray.testing.wrap import setting_names


def load(target: str, overrides: Sequence[str] = (), *, short: bool = True) -> Policy[Any, Any]:
    """The policy of conf/pruner/<target>.yaml, or of a yaml file with a `_target_`.

    Code is found where Python finds it, beside the file and in the folder above it, as with --config-dir.
    overrides: key=value, set after the schedule was moved into a short run. Raises ConfigError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from fedray.config import component, conf_folder, register

    register()
    folder = Path(conf_folder()) / "pruner"
    path = folder / f"{target}.yaml"
    if target.endswith((".yaml", ".yml")):
        path = Path(target)
        if not path.is_file():
            raise ConfigError(f"{target} does not exist; name a yaml file with a _target_, or a pruner of fedray")
        for code in (path.resolve().parent.parent, path.resolve().parent):
            if str(code) not in sys.path:
                sys.path.insert(0, str(code))
    elif not path.is_file():
        names = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise ConfigError(f"pruner {target!r} does not exist; name a yaml file, or one of {names}")
    try:
        # Some settings are shares of a run's rounds.
        whole = OmegaConf.create({"rounds": 100, "pruner": OmegaConf.load(path)})
        node = OmegaConf.to_container(whole.pruner, resolve=True)
        given = [one.removeprefix("pruner.") for one in overrides]
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError(f"{target} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(node, dict) or not isinstance(chosen, dict):
        raise ConfigError(f"{target} holds no settings; it is a mapping with a _target_, as those in conf/pruner")
    settings: dict[str, Any] = {str(key): value for key, value in node.items()}
    values: dict[str, Any] = {str(key): value for key, value in chosen.items()}
    if not short:
        return _policy(component(settings | values, "pruner"), target)
    policy = shorten(_policy(component(settings, "pruner"), target))
    # Once more as settings, so that what is chosen is checked as any setting is.
    return _policy(component(_moved(policy, settings) | values, "pruner"), target) if values else policy


def _moved(policy: Policy[Any, Any], settings: dict[str, Any]) -> dict[str, Any]:
    plain = {name: getattr(policy, name) for name in setting_names(policy)}
    return settings | {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str)}


def _policy(made: Any, target: str) -> Policy[Any, Any]:
    if not isinstance(made, Policy):
        raise ConfigError(f"{target} makes a {type(made).__name__}; it must be a fedray.round.Policy")
    return made
