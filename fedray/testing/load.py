"""From a name or a yaml file to a policy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fedray.errors import ConfigError
from fedray.round import Policy
from fedray.testing.short import shorten


def load(
    target: str, overrides: Sequence[str] = (), *, short: bool = True, others: Iterable[str] = ()
) -> Policy[Any, Any]:
    """The policy of conf/pruner/<target>.yaml, or of a yaml file with a `_target_`.

    Code is found where Python finds it, beside the file and in the folder above it. A file in a folder called
    `pruner` is composed as --config-dir does it, in a run of 100 rounds: with its defaults, and with values of the run.
    overrides: key=value; a schedule is moved into a short run around them.
    others: further targets that are checked in this process. Raises ConfigError.
    """
    path = _path(target)
    own = _folders(path)
    theirs = [folder for other in others for folder in _folders(_path(other)) if folder not in own]
    for folder in own:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    settings, chosen = _settings(target, path, [one.removeprefix("pruner.") for one in overrides])
    beside = [one.stem for folder in own for one in folder.glob("*.py")]
    beside += [one.parent.name for folder in own for one in folder.glob("*/__init__.py")]
    _refuse_code_of(theirs, [str(settings.get("_target_", "")), *beside], target)
    policy = _made(settings, target)
    _refuse_code_of(theirs, [type(policy).__module__], target)
    return shorten(policy, keeping=chosen) if short else policy


def _path(target: str) -> Path:
    from fedray.config import conf_folder

    if target.endswith((".yaml", ".yml")):
        if not Path(target).is_file():
            raise ConfigError(f"{target} does not exist; name a yaml file with a _target_, or a pruner of fedray")
        return Path(target).resolve()
    folder = Path(conf_folder()).resolve() / "pruner"
    if not (folder / f"{target}.yaml").is_file():
        names = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise ConfigError(f"pruner {target!r} does not exist; name a yaml file, or one of {names}")
    return folder / f"{target}.yaml"


def _folders(path: Path) -> list[Path]:
    """Where the code of a yaml may lie."""
    from fedray.config import conf_folder

    inside = Path(conf_folder()).resolve() in path.parents
    return [] if inside else [path.parent.parent, path.parent]


def _settings(target: str, path: Path, overrides: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the class is made with, and the names of those settings that were chosen."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from yaml import YAMLError

    from fedray.config import composed, register

    register()
    try:
        given = OmegaConf.from_dotlist(overrides)
        if path.parent.name == "pruner" and path.suffix == ".yaml":
            whole: Any = composed("pruner", path, ["rounds=100"])
        else:
            whole = OmegaConf.create({"rounds": 100, "pruner": OmegaConf.load(path)})
            if OmegaConf.is_dict(whole.pruner) and "defaults" in whole.pruner:
                raise ConfigError(
                    f"{target} has a list of defaults, which are known only where it lies in a folder called pruner; "
                    "move it there, as for --config-dir"
                )
        if not OmegaConf.is_dict(whole.pruner):
            raise ConfigError(f"{target} holds no settings; it is a mapping with a _target_, as those in conf/pruner")
        whole.pruner = OmegaConf.merge(whole.pruner, given)
        node = OmegaConf.to_container(whole.pruner, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = str(error.full_key).removeprefix("pruner.")
        raise ConfigError(f"pruner.{name} is not set; write a value for ??? into {target}, or {name}=...") from error
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        text = f"{target} cannot be read: {' '.join(str(error).split())}"
        if "nterpolation" in text and path.parent.name != "pruner":
            text += "; values of a run are known only where it lies in a folder called pruner, as for --config-dir"
        raise ConfigError(text) from error
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}, tuple(str(name) for name in given)


def _made(settings: dict[str, Any], target: str) -> Policy[Any, Any]:
    from fedray.config import NoCode, component

    try:
        made = component(settings, "pruner")
    except NoCode as error:
        raise error.found("beside the yaml, or in the folder above it,") from error
    if not isinstance(made, Policy):
        raise ConfigError(f"{target} makes a {type(made).__name__}; it must be a fedray.round.Policy")
    return made


def _refuse_code_of(theirs: Sequence[Path], names: Iterable[str], target: str) -> None:
    """Python knows one module of a name: what another target brought must not be taken for this one's."""
    for first in dict.fromkeys(name.split(".")[0] for name in names):
        module = sys.modules.get(first)
        # pytest's own name for a file of each folder; no method is in it.
        if module is not None and first != "conftest" and _home(module) in theirs:
            raise ConfigError(
                f"{target} would be checked with module {first!r} of {_home(module)}, which another target brought; "
                "check them one at a time, or rename one of the modules"
            )


def _home(module: ModuleType) -> Path | None:
    """The folder in which a module or package lies; None for what is built in."""
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    return None if places[0] is None else Path(places[0]).resolve().parent
