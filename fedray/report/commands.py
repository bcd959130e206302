"""`fedray reprice` and `fedray table`: their arguments. What knows Hydra is handed in by `cli`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError, FedrayError
from fedray.report.conventions import CONVENTIONS, load_conventions, named
from fedray.report.reprice import Setting, report, what_if
from fedray.report.results import read_results
from fedray.report.runs import find_runs, manifest_of, sentence
from fedray.report.table import Format, tabled

Profile = Callable[[str, str, str | None], Any]
"""(group, name, config_dir) to the component of <group>/<name>.yaml there or in conf, None for `none`."""
Make = Callable[[Mapping[str, Any], str], Any]
"""(a recorded `_target_` node, its group) to its component. Raises ConfigError."""
UseCode = Callable[[str | None], None]
"""Makes the code of a folder importable; None does nothing."""
MOST = 10**12
"""Of whatever is counted in a what-if."""


def reprice_command(
    arguments: Sequence[str],
    *,
    parser: type[argparse.ArgumentParser],
    profile: Profile,
    make: Make,
    use_code: UseCode,
) -> None:
    """Print what runs cost under other conventions, devices and links; or a what-if without a run."""
    command = parser(
        prog="fedray reprice",
        description="Price finished runs under other conventions, devices and links; or, with --params, messages "
        "that nobody sent.",
        epilog=_conventions(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("runs", type=Path, nargs="*", help="folders of runs, or folders that hold some, as of a sweep")
    command.add_argument("--as", dest="names", metavar="NAMES", help="conventions, with commas between; all without")
    command.add_argument("--device", metavar="NAME", help="a profile of conf/device, or none; that of the run without")
    command.add_argument(
        "--link", metavar="NAME", help="a profile of conf/link, or none, or up=10,down=50,latency=0.05 (Mbit/s, s)"
    )
    command.add_argument(
        "--config-dir", metavar="DIR", help="your own code and profiles; conventions.py in it adds to --as"
    )
    command.add_argument("--params", type=int, metavar="N", help="what if: coordinates of a message, without a run")
    command.add_argument("--sparsity", metavar="S,...", help="what if: fractions removed, 0 to below 1; 0 without")
    command.add_argument("--bits", type=float, metavar="B", help="what if: bits of a value; 32 without")
    command.add_argument("--clients", type=int, metavar="C", help="what if: clients in a round; 1 without")
    command.add_argument("--rounds", type=int, metavar="R", help="what if: rounds; 1 without")
    options = command.parse_args(arguments)
    if options.config_dir is not None:
        if not Path(options.config_dir).is_dir():
            raise ConfigError(f"--config-dir is {options.config_dir!r}; it must be the folder of your own code")
        use_code(options.config_dir)
        load_conventions(Path(options.config_dir))
    if options.params is not None:
        print(_without_a_run(options))
    else:
        print(_of_runs(options, profile, make, use_code))


def table_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Print the table of a sweep: settings that differ, a metric over seeds, sparsity and megabytes."""
    command = parser(
        prog="fedray table",
        description="The table of a sweep over its seeds: mean and standard deviation, the best in bold.",
    )
    command.add_argument("folder", type=Path, help="a folder that holds runs at any depth")
    command.add_argument("--metric", help="a metric of rounds.jsonl, test/accuracy if there is one")
    command.add_argument(
        "--at",
        choices=("final", "best", "target"),
        default="final",
        help="its last value, its best, or what was spent when it first reached the target; final without",
    )
    command.add_argument("--target", type=float, metavar="V", help="the value to reach; that of stop.targets without")
    command.add_argument(
        "--cost", choices=("rounds", "bytes", "seconds"), help="what is spent to a target; rounds without"
    )
    command.add_argument(
        "--rows", metavar="KEY,...", help="settings for the rows, as in pruner or pruner,strategy; needs --cols"
    )
    command.add_argument("--cols", metavar="KEY,...", help="settings for the columns; needs --rows")
    command.add_argument(
        "--only", metavar="KEY=VALUE", action="append", default=[], help="only such runs; KEY=A|B for several values"
    )
    command.add_argument(
        "--baseline",
        metavar="KEY=VALUE,...",
        help="also the differences to these settings, as in pruner=none, paired by seed, with intervals",
    )
    command.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the intervals; 0.95 without")
    command.add_argument(
        "--bold", choices=("column", "row", "none"), default="column", help="where the best is looked for"
    )
    command.add_argument("--format", choices=("md", "csv", "latex"), help="md without, or as --out ends")
    command.add_argument("--out", type=Path, metavar="FILE", help="write it to a file")
    options = command.parse_args(arguments)
    form = table_format(options.format, options.out)
    if options.cost is not None and options.at != "target":
        raise ConfigError(f"--cost {options.cost} goes with --at target, not with --at {options.at}")
    found = tabled(
        read_results(options.folder),
        metric=options.metric,
        rows=options.rows,
        cols=options.cols,
        at=options.at,
        target=options.target,
        cost=options.cost or "rounds",
        baseline=options.baseline,
        confidence=options.confidence,
        bold=options.bold,
        chosen=options.only,
        form=form,
        folder=options.folder,
    )
    if options.out is None:
        print(found.text)
    else:
        try:
            options.out.write_text(f"{found.text}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out '{options.out}' cannot be written ({error}); name a file that can be") from error
        print(f"table: {options.out}")
    if form == "csv":
        # A csv has no place for them, and whoever reads it by a pipe shall not find them there.
        for note in found.notes:
            print(note, file=sys.stderr)


def table_format(form: str | None, out: Path | None) -> Format:
    """The format that was asked for, by --format or by the end of a file's name. Raises ConfigError."""
    ends: dict[str, Format] = {".md": "md", ".csv": "csv", ".tex": "latex"}
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out is {str(out)!r}; the folder {out.parent} does not exist, so make it first")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out is {str(out)!r}; it is a folder, so name a file in it")
    if form is not None:
        return form  # type: ignore[return-value]
    if out is None:
        return "md"
    if out.suffix.lower() not in ends:
        raise ConfigError(f"--out is {str(out)!r}; its name must end in {', '.join(ends)}, or give --format")
    return ends[out.suffix.lower()]


def _conventions() -> str:
    lines = [f"  {name:<10}{(c.price.__doc__ or '').splitlines()[0]}" for name, c in CONVENTIONS.items()]
    return "\n".join(["conventions (N coordinates, n values of b bits that travelled):", *lines])


def _of_runs(options: argparse.Namespace, profile: Profile, make: Make, use_code: UseCode) -> str:
    for name in ("sparsity", "bits", "clients", "rounds"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for a what-if; give --params too, or leave it out to price runs")
    if not options.runs:
        raise ConfigError("fedray reprice needs the folder of a run or of a sweep, or --params for a what-if")
    folders = list(dict.fromkeys(run for folder in options.runs for run in find_runs(folder)))
    notes = [] if options.config_dir is not None else _own_conventions(folders, use_code)
    try:
        conventions = named(options.names)
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *notes])) from error
    chosen: dict[str, Any] = {}
    if options.device is not None:
        chosen["device"] = profile("device", options.device, options.config_dir)
    if options.link is not None:
        typed = "=" in options.link
        chosen["link"] = _link(options.link) if typed else profile("link", options.link, options.config_dir)

    def setting_of(manifest: Mapping[str, Any]) -> Setting:
        use_code(options.config_dir or manifest.get("code_folder"))
        config, own, failure = manifest["config"], {}, None
        for group in ("device", "link"):
            # A run without either has an empty node, an older one has no node at all.
            if group not in chosen and config.get(group):
                try:
                    own[group] = make(config[group], group)
                except FedrayError as error:
                    failure = failure or str(error)
        both = {"device": None, "link": None, **own, **chosen}
        names = {group: name for group, name in manifest.get("choices", {}).items() if group in own and name != "none"}
        names |= {group: getattr(options, group) for group in chosen}
        return Setting(**both, given=bool(chosen), names=names, failure=failure)

    text = report(folders, options.runs, conventions, setting_of)
    return "\n".join([text, *([""] if notes else []), *(f"- {sentence(note)}" for note in notes)])


def _own_conventions(folders: Sequence[Path], use_code: UseCode) -> list[str]:
    """Add the conventions beside the code of the runs; notes on those that cannot be read."""
    notes = []
    code: dict[str, None] = {}
    for folder in folders:
        try:
            if (found := manifest_of(folder).get("code_folder")) is not None:
                code[found] = None
        except (FedrayError, OSError):
            continue  # the report says so
    for found in code:
        use_code(found)
        try:
            load_conventions(Path(found))
        except ConfigError as error:
            notes.append(str(error))
    return notes


def _link(text: str) -> Any:
    """The link of `up=10,down=50,latency=0.05`; with `spread=0.5` clients differ."""
    from fedray.costs import FixedLink, LogNormalLink

    fields = {"up": "up_mbps", "down": "down_mbps", "latency": "latency_s", "spread": "spread"}
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in fields or fields[name] in found:
            raise ConfigError(f"--link has {item!r}; write up=10,down=50,latency=0.05 or the name of a profile")
        try:
            found[fields[name]] = float(value)
        except ValueError:
            raise ConfigError(f"--link has {item!r}; {value!r} must be a number") from None
    if not {"up_mbps", "down_mbps"} <= set(found):
        raise ConfigError(f"--link is {text!r}; it needs up and down, as in up=10,down=50,latency=0.05")
    try:
        return LogNormalLink(**found) if "spread" in found else FixedLink(**found)
    except ConfigError as error:
        # In the words of the command: `up`, not the field's own name.
        told = next((str(error).replace(own, typed, 1) for typed, own in fields.items() if own in str(error)), error)
        raise ConfigError(f"--link is {text!r}: {told}; write up=10,down=50,latency=0.05 (Mbps, s)") from error


def _without_a_run(options: argparse.Namespace) -> str:
    if options.runs or options.device is not None or options.link is not None:
        raise ConfigError("--params is for a what-if without a run; leave out the folders, --device and --link")
    conventions = named(options.names)
    if options.names is None:
        conventions = [convention for convention in conventions if not convention.recorded]
    for convention in conventions:
        if convention.recorded:
            raise ConfigError(f"--as {convention.name} reads recorded bytes; give the folder of a run, not --params")
    bits = 32.0 if options.bits is None else options.bits
    clients, rounds = (1 if number is None else number for number in (options.clients, options.rounds))
    for name, value in (("params", options.params), ("clients", clients), ("rounds", rounds)):
        if not 1 <= value <= MOST:
            raise ConfigError(f"--{name} is {value}; it must be from 1 to {MOST:,}, as in --{name} 100")
    if not 1 <= bits <= 64:
        raise ConfigError(f"--bits is {bits:g}; it must be from 1 to 64, as in --bits 32 for float32")
    return what_if(
        params=options.params,
        sparsities=_sparsities(options.sparsity),
        bits=bits,
        clients=clients,
        rounds=rounds,
        conventions=conventions,
    )


def _sparsities(text: str | None) -> list[float]:
    if text is None:
        return [0.0]
    try:
        found = [float(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sparsity is {text!r}; write numbers with commas between, as in 0.5,0.8") from None
    if not all(0 <= sparsity < 1 for sparsity in found):
        raise ConfigError(f"--sparsity is {text!r}; each is the fraction removed, from 0 to below 1")
    return found
