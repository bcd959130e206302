"""`fedray report`: a sweep as one HTML page that needs neither a network nor a server.

The page carries the chart library, its styles and its numbers. A content security policy forbids it everything else:
no request leaves it, and no script runs but the two whose hashes it names.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.report.html_data import MOST_LOGS, Page, best_of, collect, costed, spread
from fedray.report.html_figure import still
from fedray.report.results import read_results

ASSETS = Path(__file__).parent / "page"
LIBRARY = "echarts.min.js"
DEFAULT_NAME = "report.html"


def report_command(arguments: Sequence[str], *, parser: type[argparse.ArgumentParser]) -> None:
    """Write the page of a sweep and print where it is."""
    command = parser(prog="fedray report", description="A sweep as one self-contained HTML page.")
    command.add_argument("folder", type=Path, help="a folder that holds runs at any depth")
    command.add_argument("--out", type=Path, metavar="FILE", help=f"the page; DIR/{DEFAULT_NAME} without")
    command.add_argument("--title", metavar="T", help="its title; the name of the folder without")
    options = command.parse_args(arguments)
    path, page = write_page(options.folder, out=options.out, title=options.title)
    print(f"{path}: {_found(page)}; {path.stat().st_size / 1e6:.1f} MB")


def write_page(folder: Path, *, out: Path | None = None, title: str | None = None) -> tuple[Path, Page]:
    """Write the page of the runs under `folder`; returns its path and what is on it.

    out: the file, DIR/report.html without. Raises ConfigError if there is no run, if the file cannot be written, or
    if the template engine is missing.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("fedray report needs jinja2: pip install 'fedray[report]'")
    folder = Path(folder)
    out = folder / DEFAULT_NAME if out is None else Path(out)
    # Said before hundreds of runs are read.
    if out.is_dir():
        raise ConfigError(f"--out is '{out}', a folder; name a file, as in --out {out / DEFAULT_NAME}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out is '{out}'; the page is HTML, so its name ends in .html")
    if title is not None and not title.strip():
        raise ConfigError("--title is empty; write a title or leave it out")
    results = read_results(folder)
    page = collect(folder, results)
    text = render(page, title=title or folder.resolve().name or "runs")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A folder's name may be no valid text; line ends stay, because the policy names the scripts by their hashes.
        out.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise ConfigError(f"--out '{out}' cannot be written ({error}); name a file that can be") from error
    return out, page


def render(page: Page, *, title: str) -> str:
    """The page as HTML. Every text of a configuration or a log is escaped by the template engine."""
    from markupsafe import Markup

    library, program, styles = (_asset(name) for name in (LIBRARY, "page.js", "page.css"))
    text: str = _template().render(
        page=page,
        title=title,
        found=_found(page),
        best=[best_of(column) for column in page.columns],
        means=[[sum(values) / len(values) if values else None for values in column.values] for column in page.columns],
        figure=still(page.charts),
        most_logs=MOST_LOGS,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        policy=f"default-src 'none'; script-src {_hash(library)} {_hash(program)}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        # These three are files of ours, and the JSON has no character that could end its element.
        library=Markup(library),
        program=Markup(program),
        styles=Markup(styles),
        data=Markup(embedded(page.charts)),
    )
    return text


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spread": spread, "costed": costed, "plural": plural, "breakable": breakable}
    return environment.get_template("page.html.j2")


def embedded(value: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no text in it can close the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def breakable(text: str) -> Any:
    """A name of a metric or a setting that may go on in the next line after a slash, a dot or an underscore."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/._])(?=\w)", r"\1<wbr>", str(escape(text))))


def _found(page: Page) -> str:
    """`24 runs: 22 finished, 1 failed, 1 unreadable`."""
    counts = [f"{number:,} {status}" for status, number in sorted(page.counts.items(), key=lambda item: -item[1])]
    return f"{plural(sum(page.counts.values()), 'run')}: {', '.join(counts)}"


def _asset(name: str) -> str:
    # Browsers normalise line ends before they hash a script.
    return (ASSETS / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"
