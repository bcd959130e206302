"""The command line: `fedray +experiment=...` composes and runs, `fedray export ...` and its like read runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError, FedrayError, RunError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fedray.launch import Run

NOUNS = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
EXIT_CONFIG = 2
EXIT_RUN = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that failed, 2 for a configuration that is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
        elif arguments and arguments[0].isidentifier():
            raise ConfigError(f"{arguments[0]} is no command; {_choice(arguments[0], list(COMMANDS))}")
        else:
            _hydra(arguments)
    except ConfigError as error:
        return _say(error, EXIT_CONFIG)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output, as `head` does, has seen enough; without this Python complains as it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FedrayError as error:
        from fedray.launch import Interrupted

        return _say(error, EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_RUN)
    return 0


def run(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, folder: str | Path | None = None
) -> Run:
    """Run from Python, as `python -m fedray OVERRIDES` would: `fedray.run(["+experiment=quickstart", "seed=1"])`.

    config_dir: a folder of the user's own yaml and code. folder: the run directory; outputs/<name>/<time> without.
    Raises ConfigError and RunError.
    """
    from fedray.config import assemble
    from fedray.launch import execute

    cfg, choices = _compose(overrides, config_dir)
    assembly = assemble(cfg, code_folder=None if config_dir is None else str(config_dir), choices=choices)
    if folder is None:
        folder = Path("outputs") / assembly.spec.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    return execute(assembly, Path(folder))


def _compose(overrides: Sequence[str], config_dir: str | Path | None) -> tuple[DictConfig, dict[str, str]]:
    """The configuration, and what was chosen of each group. Raises ConfigError."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from fedray.config import conf_folder, register

    register()
    added = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir is not None else []
    _make_importable(config_dir)
    try:
        with initialize_config_dir(conf_folder(), version_base="1.3"):
            cfg = compose("config", overrides=[*overrides, *added], return_hydra_config=True)
    except Exception as error:
        raise _composition_error(error, overrides) from error
    choices = {str(group): str(choice) for group, choice in cfg.hydra.runtime.choices.items()}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _hydra(arguments: list[str]) -> None:
    """Let Hydra compose and call `_job`, once or for every cell of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fedray.config import conf_folder, register
    from fedray.launch import Interrupted

    register()
    # Hydra prints a traceback and exits with 1 unless it is told to let errors through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    program = sys.argv[0]
    sys.argv = [program, *_options_first(arguments)]
    failures: list[FedrayError] = []

    started = False

    def job(cfg: DictConfig) -> None:
        nonlocal started
        started = True
        # Hydra adds a line of its own to an error that it sees; and the other cells of a sweep shall go on.
        try:
            _job(cfg)
        except Interrupted as error:
            raise _Leave(error) from error
        except BrokenPipeError as error:
            raise _Leave(RunError("nobody reads the output any more; finished rounds are on disk")) from error
        except FedrayError as error:
            failures.append(error)

    try:
        hydra.main(version_base="1.3", config_path=conf_folder(), config_name="config")(job)()
    except _Leave as leaving:
        raise leaving.error from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(error, arguments) from error
    except OSError as error:
        if started:
            raise
        raise ConfigError(f"hydra.run.dir cannot be made ({error}); name a folder that can be written to") from error
    except ValueError as error:
        if started:
            raise
        raise ConfigError(f"{error}; a group takes one of its names, as in wire=topk: see --help") from error
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ConfigError(f"Hydra stopped with exit code {stop.code}") from stop
    for failure in failures[:-1]:
        _say(failure, EXIT_RUN)
    if failures:
        raise failures[-1]


class _Leave(BaseException):
    """Carries an interruption past Hydra, which keeps every Exception of a job."""

    def __init__(self, error: FedrayError) -> None:
        super().__init__(str(error))
        self.error = error


def _options_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's options before the overrides: its parser refuses overrides on both sides of an option."""
    options, overrides = [], []
    waiting = iter(arguments)
    for argument in waiting:
        name = argument.split("=", 1)[0]
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        if name not in FLAGS and name not in VALUE_OPTIONS:
            raise ConfigError(
                f"{name} is not an option; there are {', '.join(o for o in (*FLAGS, *VALUE_OPTIONS) if o[1] == '-')}"
            )
        options.append(argument)
        if name in VALUE_OPTIONS and "=" not in argument:
            value = next(waiting, None)
            if value is None:
                raise ConfigError(f"{name} needs a value; see --help")
            options.append(value)
    return [*options, *overrides]


FLAGS = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--resolve",
    "--shell-completion",
    "-sc",
)
VALUE_OPTIONS = (
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn",
    "--config-path", "-cp", "--package", "-p", "--info", "-i",
)  # fmt: skip


def _job(cfg: DictConfig) -> None:
    """One run of Hydra's: a single one, or a cell of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    from fedray.config import assemble
    from fedray.launch import execute

    info = HydraConfig.get()
    folder = Path(info.runtime.output_dir)
    sources = [source.path for source in info.runtime.config_sources if source.provider == "command-line"]
    code_folder = sources[0] if sources else None
    _make_importable(code_folder)
    try:
        choices = {str(group): str(choice) for group, choice in info.runtime.choices.items()}
        execute(assemble(cfg, code_folder=code_folder, choices=choices), folder)
    except ConfigError:
        # Nothing started: leave no folder behind that looks like a run.
        with contextlib.suppress(OSError):
            for child in sorted(folder.rglob("*"), reverse=True):
                if "hydra" in child.relative_to(folder).parts:
                    child.rmdir() if child.is_dir() else child.unlink()
            folder.rmdir()
            for above in folder.parents:  # ours by default; nobody else's folders
                if not above.is_relative_to(Path.cwd() / "outputs"):
                    break
                above.rmdir()  # only if nothing else is in it
        raise


def _make_importable(folder: str | Path | None) -> None:
    if folder is not None and str(Path(folder).resolve()) not in sys.path:
        sys.path.insert(0, str(Path(folder).resolve()))


def _composition_error(error: BaseException, overrides: Sequence[str]) -> ConfigError:
    """Hydra's and OmegaConf's errors as one sentence that names the key, the value, the rule and the remedy."""
    from hydra.errors import OverrideParseException

    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    for part in chain:
        if isinstance(part, OverrideParseException):
            return ConfigError(
                f"{part.override!r} cannot be read; write key=value, as in rounds=20, and put a value with special "
                "characters in quotes, as in 'name=\"a b\"'"
            )
    text = "\n".join(str(e) for e in chain)
    missing = re.search(r"Could not find '([^']+)'\n\s*Available options in '([^']*)':\n((?:\s+\S+\n?)*)", text)
    if missing:
        option, group, listed = missing.groups()
        choices = ", ".join(listed.split())
        return ConfigError(f"{group}={option.removeprefix(group + '/')} does not exist; choose one of {choices}")
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' not in '[^']+'", text)
    typed = re.search(
        r"Error merging override ([^\n]+)\n(?:.*\n)*?.*?Value '([^']*)' of type '\w+' could not be converted to (\w+)",
        text,
    )
    if typed:
        override, value, kind = typed.groups()
        return ConfigError(f"{override.split('=')[0].lstrip('+')} is {value!r}; it must be {NOUNS.get(kind, kind)}")
    untyped = re.search(r"Value '([^']*)' of type '\w+' could not be converted to (\w+)\n\s*full_key: (\S+)", text)
    if untyped:
        value, kind, key = untyped.groups()
        return ConfigError(f"{key} is {value!r}; it must be {NOUNS.get(kind, kind)}")
    if unknown:
        return ConfigError(_unknown_key(unknown.group(1), text, overrides))
    ambiguous = re.search(r"Ambiguous value for argument '([^']*)'", text)
    if ambiguous:
        return ConfigError(f"{ambiguous.group(1)} has several values; to run each of them put -m in front")
    merged = re.search(r"Error merging override (\S+)", text)
    if merged:
        key, _, value = merged.group(1).lstrip("+").partition("=")
        return ConfigError(f"{key} is {value}; that cannot stand there: python -m fedray --cfg job shows what can")
    lines = [line.strip() for line in str(chain[0]).splitlines() if line.strip()]
    return ConfigError(" ".join(lines)[:500] or type(error).__name__)


def _choice(word: str, words: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(words)}; settings are written key=value"


def _unknown_key(key: str, text: str, overrides: Sequence[str]) -> str:
    """`pruner.sparsty is not a setting; did you mean pruner.sparsity?`; the names come from the rest of the command."""
    import difflib

    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from fedray.config import conf_folder

    if "No match in the defaults list" in text:
        return f"{key} is not a group; python -m fedray --help lists the groups"
    kept = [
        o for o in overrides if "=" in o and not o.lstrip("+~").startswith(key) and not o.startswith(("-", "hydra"))
    ]
    kept = [o for o in kept if "," not in o.split("=", 1)[1] or "[" in o]
    names: list[str] = []
    with contextlib.suppress(Exception), initialize_config_dir(conf_folder(), version_base="1.3"):
        cfg = compose("config", overrides=kept)
        parent = OmegaConf.select(cfg, key.rsplit(".", 1)[0]) if "." in key else cfg
        names = [str(name) for name in parent if not str(name).startswith("_")]
    prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], names, n=1)
    if near:
        return f"{key} is not a setting; did you mean {prefix}{near[0]}?"
    listed = f"there are {', '.join(prefix + name for name in names)}" if names else "see python -m fedray --cfg job"
    group = key.split(".")[0]
    if "." in key:
        listed += f"; another {group}=NAME may have it, and +{key} adds what is new"
    return f"{key} is not a setting; {listed}"


def _say(error: object, code: int) -> int:
    if os.environ.get("FEDRAY_TRACEBACK"):
        traceback.print_exc()
    print(f"fedray: {error}", file=sys.stderr, flush=True)
    return code


# -- commands that read runs -----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _export(arguments: list[str]) -> None:
    parser = _Parser(prog="fedray export", description="Write a run's final model as a file that plain PyTorch loads.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--format", choices=("state_dict", "safetensors"), default="safetensors")
    parser.add_argument("--output", type=Path, help="the file; RUN/final/export.{pt,safetensors} without")
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="leave out units of which every weight is gone, where the next layer allows",
    )
    options = parser.parse_args(arguments)
    from fedray.config import maker_of_run
    from fedray.sim.export import export
    from fedray.track.store import read_manifest

    facts = read_manifest(options.run)
    path, note = export(
        options.run,
        module=maker_of_run(facts),
        sample_shape=tuple(facts["data"]["sample_shape"]),
        format=options.format,
        output=options.output,
        shrink=options.shrink,
    )
    print(f"{path}: {note}")


def resume(folder: str | Path, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Run:
    """Go on with a run that was cut off, or lengthen a finished one: `fedray.resume(FOLDER, ["rounds=40"])`.

    It goes on from its last checkpoint (from the start if there is none) and gives the bits of an uninterrupted run.
    config_dir: where the user's own code is, if it moved. Raises ConfigError and RunError.
    """
    from omegaconf.errors import OmegaConfBaseException

    from fedray.config import Config, assemble, recorded
    from fedray.launch import resume as go_on
    from fedray.track.store import read_manifest

    folder = Path(folder)
    manifest = read_manifest(folder)
    fixed = {field.name for field in dataclasses.fields(Config)} - {"rounds", "checkpoint", "runtime", "tracker"}
    for override in overrides:
        key = override.split("=", 1)[0]
        if key.split(".")[0] in fixed:
            raise ConfigError(
                f"{key} is another run's setting; only rounds, checkpoint, runtime and tracker may change"
            )
    code_folder = manifest.get("code_folder") if config_dir is None else str(config_dir)
    _make_importable(code_folder)
    try:
        cfg = recorded(folder, overrides)
    except OmegaConfBaseException as error:
        raise _composition_error(error, overrides) from error
    return go_on(folder, assemble(cfg, code_folder=code_folder, choices=manifest.get("choices")))


def _resume(arguments: list[str]) -> None:
    parser = _Parser(prog="fedray resume", description="Go on with a run from its last checkpoint, or lengthen it.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("overrides", nargs="*", help="rounds=40, runtime.slots=2 ...: what does not change the run")
    parser.add_argument("--config-dir", help="where your own code is, if it moved")
    options = parser.parse_args(arguments)
    resume(options.run, options.overrides, config_dir=options.config_dir)


def _reprice(arguments: list[str]) -> None:
    from fedray.report.commands import reprice_command

    # Both import torch and Hydra, which prices alone do not need.
    def profile(group: str, name: str, config_dir: str | None) -> Any:
        from fedray.config import profile

        return profile(group, name, config_dir)

    def make(node: Any, group: str) -> Any:
        from fedray.config import component

        return component(node, group)

    reprice_command(arguments, parser=_Parser, profile=profile, make=make, use_code=_make_importable)


def _table(arguments: list[str]) -> None:
    from fedray.report.commands import table_command

    table_command(arguments, parser=_Parser)


def _partition(arguments: list[str]) -> None:
    from fedray.report.partition import Dealt, partition_command

    def deal(overrides: Sequence[str], config_dir: str | None) -> Dealt:
        from fedray.config import deal

        cfg, choices = _compose(overrides, config_dir)
        dealt = deal(cfg)
        title = f"{cfg.name}: {dealt.dataset.name}, partition {choices['partition']}, seed {cfg.seed}"
        return Dealt(manifest=dealt.facts, num_available=len(dealt.labels), title=title)

    partition_command(arguments, parser=_Parser, deal=deal)


def _check(arguments: list[str]) -> None:
    from fedray.testing.command import check_command

    check_command(arguments, parser=_Parser)


COMMANDS = {
    "check": _check,
    "export": _export,
    "partition": _partition,
    "reprice": _reprice,
    "resume": _resume,
    "table": _table,
}
