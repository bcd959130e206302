"""The command line: `fedray +experiment=...` composes and runs, `fedray export ...` and its like read runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
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
    from fedray.sweep.plan import Command
    from fedray.sweep.run import Options, Request
    from fedray.sweep.saved import Expansion, Saved

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

    from fedray.config import conf_folder, register, search

    _refuse_saved_sweep(overrides)
    register()
    added = [search(Path(config_dir))] if config_dir is not None else []
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
    arguments = _with_saved_sweep(arguments)
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
    except FedrayError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(error, arguments) from error
    except OSError as error:
        if started:
            raise
        key = "hydra.sweep.dir" if {"-m", "--multirun"} & set(arguments) else "hydra.run.dir"
        raise ConfigError(f"{key} cannot be made ({error}); name a folder that can be written to") from error
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


class Composer:
    """In place of Hydra's loader of configurations: each cell of a sweep is composed once, and one that cannot be is
    kept as its error."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._made: dict[tuple[str, ...], Request] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> None:
        """Compose a cell; `request` has the result."""
        self.request(master_config, sweep_overrides)

    def request(self, master_config: DictConfig, overrides: Sequence[str]) -> Request:
        """The cell of these overrides, composed and resolved."""
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import open_dict

        from fedray.config import resolved
        from fedray.sweep.run import Request

        key = tuple(overrides)
        if key in self._made:
            return self._made[key]
        try:
            cfg = self._loader.load_sweep_config(master_config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.id = cfg.hydra.job.num = len(self._made)
            HydraConfig.instance().set_config(cfg)
            choices = {str(group): str(choice) for group, choice in cfg.hydra.runtime.choices.items()}
            with open_dict(cfg):
                del cfg["hydra"]
            made = Request(overrides=key, config=resolved(cfg), choices=choices)
        except ConfigError as error:
            made = Request(overrides=key, config=None, error=error)
        except Exception as error:
            made = Request(overrides=key, config=None, error=_composition_error(error, overrides))
        finally:
            HydraConfig.instance().set_config(master_config)
        self._made[key] = made
        return made


def launch_cells(
    composer: Composer, master_config: DictConfig, cells: Sequence[Sequence[str]], options: Options
) -> list[Any]:
    """What the launcher does with the cells of a sweep; Hydra's return values. Raises as `run_sweep` does."""
    from hydra.core.utils import JobReturn, JobStatus

    from fedray.sweep.run import run_sweep

    sources = master_config.hydra.runtime.config_sources
    code_folder = next((source.path for source in sources if source.provider == "command-line"), None)
    _make_importable(code_folder)
    requests = [composer.request(master_config, overrides) for overrides in cells]
    folder = Path(str(master_config.hydra.sweep.dir)).resolve()
    run_sweep(requests, folder=folder, options=options, code_folder=code_folder)
    return [JobReturn(overrides=list(one), status=JobStatus.COMPLETED, _return_value=None) for one in cells]


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


# -- saved sweeps ----------------------------------------------------------------------------------------------------

SAVED_SWEEP = re.compile(r"\+{0,2}sweep=(.*)")


def _with_saved_sweep(arguments: list[str]) -> list[str]:
    """`+sweep=NAME` as what Hydra understands: the sweeper that reads its file, and the other overrides for it.

    The sweeper gets them as one list, because the cells decide what an override means: pruner.sparsity=0.9 is none of
    the configuration before a cell has chosen its pruner.
    """
    from urllib.parse import quote

    from fedray.sweep.saved import override

    options = _options_first(arguments)
    overrides = [text for text in options if text.startswith("~") or (not text.startswith("-") and "=" in text)]
    names = [found[1] for found in map(SAVED_SWEEP.fullmatch, overrides) if found]
    if not names:
        return arguments
    if not {"-m", "--multirun"} & set(options):
        _refuse_saved_sweep(overrides)
    if {"--cfg", "-c"} & {text.split("=", 1)[0] for text in options}:
        raise ConfigError(f"--cfg prints one configuration and +sweep={names[0]} is many: fedray plan lists them")
    file = _saved_file(names, _config_dir(options))
    given = [text for text in overrides if not SAVED_SWEEP.fullmatch(text)]
    ours = [text for text in given if not text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    # Quoted, because ${...} in them is about a cell, and OmegaConf would put in what the configuration before it has.
    handed = {"file": quote(str(file)), "given": [*map(quote, ours)], "command": [*map(quote, arguments)]}
    added = ["hydra/sweeper=fedray", *(override(f"hydra.sweeper.{key}", value) for key, value in handed.items())]
    kept = [text for text in options if text not in overrides]
    return [*kept, *added, *_names(file, ours), *(text for text in given if text not in ours)]


def _names(file: Path, given: Sequence[str]) -> list[str]:
    """The overrides of `name` that decide on the folder of a saved sweep. The file's is the first: Hydra leaves out one
    with several values."""
    from fedray.sweep.saved import bare, override

    return [override("name", file.stem), *(text for text in _merged(file, given) if bare(text).startswith("name="))]


def _refuse_saved_sweep(overrides: Sequence[str]) -> None:
    for found in filter(None, map(SAVED_SWEEP.fullmatch, overrides)):
        raise ConfigError(
            f"+sweep={found[1]} is many runs; python -m fedray -m +sweep={found[1]} runs them, and fedray plan "
            f"+sweep={found[1]} lists them"
        )


def _config_dir(options: Sequence[str]) -> str | None:
    """The value of --config-dir."""
    for option, after in zip(options, [*options[1:], ""], strict=True):
        name, _, value = option.partition("=")
        if name in ("--config-dir", "-cd"):
            return value or after
    return None


def _saved_file(names: Sequence[str], config_dir: str | None) -> Path:
    """The file of a saved sweep: fedray's, or one in the folder sweep/ of --config-dir. Raises ConfigError."""
    from fedray.config import conf_folder

    folders = [Path(conf_folder()) / "sweep", *([] if config_dir is None else [Path(config_dir).resolve() / "sweep"])]
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if len(names) > 1:
        raise ConfigError(f"sweep is given {len(names)} times; one command runs one saved sweep")
    if names[0] not in files:
        raise ConfigError(f"sweep={names[0]} does not exist; {_choice(names[0], list(files)).split(';')[0]}")
    return files[names[0]]


def _saved(file: Path) -> Saved:
    """Read a saved sweep. Unless it sets a name it has its file's, so that its runs are in outputs/NAME/sweep."""
    from omegaconf import OmegaConf

    from fedray.sweep.saved import override, read_saved

    try:
        node: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # of the reader of YAML, of OmegaConf, of the disk
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())})") from error
    saved = read_saved(file.stem, node)
    if "name" in saved.keys():
        return saved
    return dataclasses.replace(saved, base=(*saved.base, override("name", file.stem)))


def _merged(file: Path, given: Sequence[str]) -> list[str]:
    from fedray.sweep.saved import merged

    return merged(_saved(file).base, given)


def expand_arguments(given: Sequence[str], file: str | Path | None, loader: Any) -> Expansion:
    """The cells of a command. given: its overrides, several values and all. file: of a saved sweep; None without.

    loader: Hydra's, which knows the choices of a group for glob(*). Raises ConfigError.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Transformer
    from hydra.errors import HydraException

    from fedray.sweep.saved import MOST_CELLS, Given, expand, plain_product

    texts = list(given) if file is None else _merged(Path(file), given)
    found: dict[str, Given] = {}
    try:
        for one in OverridesParser.create(config_loader=loader).parse_overrides(texts):
            if one.is_interval_sweep():
                raise ConfigError(
                    f"{one.input_line} is a range without steps; write values, or range(start,stop,step), or draw from "
                    "it in a saved sweep"
                )
            many = one.is_sweep_override()
            every: Any = one.sweep_iterator(Transformer.identity) if many else [one.value()]
            values = list(itertools.islice(every, MOST_CELLS + 1))
            if len(values) > MOST_CELLS:
                raise ConfigError(
                    f"{one.input_line} has more than {MOST_CELLS:,} values; a sweep has at most so many cells"
                )
            shown = [Transformer.str(value) for value in values] if many else [one.get_value_element_as_str()]
            plain = tuple(getattr(value, "text", value) for value in values)
            key = one.get_key_element()
            found[key] = Given(key=key, values=plain, texts=tuple(shown))
    except HydraException as error:
        raise _composition_error(error, texts) from error
    return expand(plain_product() if file is None else _saved(Path(file)), list(found.values()))


def _composed_sweep(overrides: Sequence[str], config_dir: str | None) -> Command:
    """The cells of a command as the launcher would get them; nothing is started. Raises ConfigError."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from fedray.config import conf_folder, register
    from fedray.sweep.plan import Command

    register()
    _make_importable(config_dir)
    names = [found[1] for found in map(SAVED_SWEEP.fullmatch, overrides) if found]
    file = _saved_file(names, config_dir) if names else None
    given = [text for text in overrides if not SAVED_SWEEP.fullmatch(text)]
    hydras = [text for text in given if text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    ours = [text for text in given if text not in hydras]
    if config_dir is not None:
        hydras.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    # What the run gives Hydra as well; of this it leaves out what has several values, and takes the sweep's folder.
    texts = [*hydras, *(ours if file is None else _names(file, ours))]
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            master = loader.load_configuration("config", texts, run_mode=RunMode.MULTIRUN)
            folder = Path(str(master.hydra.sweep.dir)).resolve()
            force = bool(OmegaConf.select(master, "hydra.launcher.force", default=False))
        except Exception as error:
            raise _composition_error(error, texts) from error
        expansion = expand_arguments(ours, file, loader)
        composer = Composer(loader)
        requests = [composer.request(master, cell) for cell in expansion.cells]
    code_folder = None if config_dir is None else str(Path(config_dir).resolve())
    return Command(requests=requests, folder=folder, dropped=expansion.dropped, code_folder=code_folder, force=force)


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
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from fedray.config import conf_folder

    if "No match in the defaults list" in text:
        return f"{key} is not a group; python -m fedray --help lists the groups"
    kept = [
        o for o in overrides if "=" in o and not o.lstrip("+~").startswith(key) and not o.startswith(("-", "hydra"))
    ]
    kept = [o for o in kept if "," not in o.split("=", 1)[1] or "[" in o]
    names: list[str] = []
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # a sweep is in the middle of its cells
            stack.enter_context(initialize_config_dir(conf_folder(), version_base="1.3"))
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


def _report(arguments: list[str]) -> None:
    from fedray.report.html import report_command

    report_command(arguments, parser=_Parser)


def _runs(arguments: list[str]) -> None:
    from fedray.report.listing import runs_command

    runs_command(arguments, parser=_Parser)


def _plot(arguments: list[str]) -> None:
    from fedray.report.plot import plot_command

    plot_command(arguments, parser=_Parser)


def _partition(arguments: list[str]) -> None:
    from fedray.report.partition import Dealt, partition_command

    def deal(overrides: Sequence[str], config_dir: str | None) -> Dealt:
        from fedray.config import deal

        cfg, choices = _compose(overrides, config_dir)
        dealt = deal(cfg)
        title = f"{cfg.name}: {dealt.dataset.name}, partition {choices['partition']}, seed {cfg.seed}"
        return Dealt(manifest=dealt.facts, num_available=len(dealt.labels), title=title)

    partition_command(arguments, parser=_Parser, deal=deal)


def _wandb(arguments: list[str]) -> None:
    from fedray.report.wandb import wandb_command

    wandb_command(arguments, parser=_Parser)


def _plan(arguments: list[str]) -> None:
    from fedray.sweep.plan import plan_command

    plan_command(arguments, parser=_Parser, composed=_composed_sweep)


def _up(arguments: list[str]) -> None:
    from fedray.sim.warm import up_command

    up_command(arguments, parser=_Parser)


def _down(arguments: list[str]) -> None:
    from fedray.sim.warm import down_command

    down_command(arguments, parser=_Parser)


def _check(arguments: list[str]) -> None:
    from fedray.testing.command import check_command

    check_command(arguments, parser=_Parser)


COMMANDS = {
    "check": _check,
    "down": _down,
    "export": _export,
    "partition": _partition,
    "plan": _plan,
    "plot": _plot,
    "report": _report,
    "reprice": _reprice,
    "resume": _resume,
    "runs": _runs,
    "table": _table,
    "up": _up,
    "wandb": _wandb,
}
