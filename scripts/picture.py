"""Run the quickstart and draw what its terminal shows at the end, as docs/quickstart.svg.

python scripts/picture.py

The rows are those of the run: they go through the same live table, printed once when the run has ended.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

import fedray
from fedray import launch
from fedray.track.progress import Progress

TARGET = Path(__file__).parents[1] / "docs" / "quickstart.svg"
COMMAND = "bash scripts/quickstart"
WIDTH, HEIGHT = 96, 32


class Shown:
    """A Progress of which a picture is taken when the summary comes; it has the same methods."""

    def __init__(self, _: str, rounds: int, title: str) -> None:
        screen = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT)
        self.inner = Progress("live", rounds, title, screen)
        self.paper = Console(file=io.StringIO(), record=True, force_terminal=True, width=WIDTH)
        self.paper.print(f"$ {COMMAND}", style="bold", highlight=False)

    def __enter__(self) -> Self:
        self.inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.inner.__exit__(kind, error, traceback)

    def note(self, text: str) -> None:
        self.inner.note(text)
        self.paper.print(text, markup=False, highlight=False)

    def row(self, row: Mapping[str, Any]) -> None:
        self.inner.row(row)

    def summary(self, lines: Sequence[tuple[str, str]]) -> None:
        self.paper.print(self.inner._table())
        # The folder is somebody's path.
        shown = [(name, value) for name, value in lines if name != "folder"]
        Progress("plain", 0, "", self.paper).summary(shown)
        # Fonts of the reader's own, nothing loaded from elsewhere.
        form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        TARGET.parent.mkdir(exist_ok=True)
        self.paper.save_svg(str(TARGET), title="fedray", code_format=form, unique_id="fedray")


def main() -> None:
    launch.Progress = Shown  # type: ignore[assignment,misc]
    run = fedray.run(["+experiment=quickstart", "tracker.wandb.mode=disabled"])
    print(f"{TARGET} shows {run.folder}")


if __name__ == "__main__":
    main()
