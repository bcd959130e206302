"""`fedray check`: its arguments and its table. The parser is handed in by `cli`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fedray.errors import ConfigError, RunError
from fedray.testing.conform import CHECKS, check, law_of
from fedray.testing.load import load


def check_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Check pruners and print a line for each check. Raises RunError where one fails."""
    command = parser(
        prog="fedray check",
        description="Check that a pruner keeps the laws of a federated round, in short runs on tiny data.",
        epilog=_laws(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("targets", nargs="*", metavar="NAME_OR_FILE", help="pruners of fedray, or yaml files")
    command.add_argument("--only", metavar="CHECK,...", help="these checks alone, with commas between")
    command.add_argument("--as-written", action="store_true", help="leave the schedule as the yaml has it")
    # Settings stand among the names, as they do for a run.
    options = command.parse_intermixed_args(arguments)
    overrides = [word for word in options.targets if "=" in word and not Path(word).is_file()]
    targets = [word for word in options.targets if word not in overrides]
    if not targets:
        raise ConfigError("fedray check: name a pruner, as in fedray check magnitude, or a yaml file; see --help")
    only = None if options.only is None else options.only.split(",")
    short = not options.as_written
    policies = [(target, load(target, overrides, short=short, others=targets)) for target in targets]
    failures = []
    for at, (target, policy) in enumerate(policies):
        print(f"{'' if at == 0 else chr(10)}{target}: {policy!r}")
        for result in check(policy, only=only, short=False):
            print(_line(result.verdict, result.check, result.sentence), flush=True)
            if result.verdict == "failed":
                failures.append(f"{target}: {result.check}")
    if failures:
        raise RunError(f"{len(failures)} {'check' if len(failures) == 1 else 'checks'} failed: {', '.join(failures)}")


def _line(verdict: str, name: str, sentence: str) -> str:
    """One row of the table, wrapped under itself."""
    start = f"  {verdict:7}  {name:{_WIDTH}}  "
    # Where nobody looks at a terminal, a line stays one line.
    if not sys.stdout.isatty():
        return start + sentence
    room = max(40, shutil.get_terminal_size().columns - len(start))
    lines = textwrap.wrap(sentence, room, break_long_words=False) or [""]
    return start + ("\n" + " " * len(start)).join(lines)


def _laws() -> str:
    lines = ["checks:"]
    for name in CHECKS:
        lines += textwrap.wrap(f"{name}: {law_of(name)}", 100, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(
        [*lines, "", "key=value sets a setting of the pruner; a schedule is moved into a short run around it."]
    )


_WIDTH = max(map(len, CHECKS))
