"""Make notebooks/*.ipynb from notebooks/*.py, without outputs.

    scripts/notebooks                 write every .ipynb, and in the .py the files that a page of docs/ has
    scripts/notebooks --check         write nothing; exit code 1 and a sentence for each file that would change
    scripts/notebooks --from-ipynb    after editing in Jupyter: take the cells of the .ipynb, drop their outputs

The .py is the source: what was edited in an .ipynb alone is lost without --from-ipynb. A cell that begins with
`%%writefile mine/...` has the text that docs/write_a_pruner.md has for that file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
PAGE = ROOT / "docs" / "write_a_pruner.md"
FORMAT = "py:percent"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
MAGIC = "%%writefile "


def files_of(page: str) -> dict[str, str]:
    """The files that a page shows, by the name that stands above each."""
    shown = re.findall(r"^`(mine/\S+)`\n\n```(?:python|yaml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return {name: text for name, text in shown}


def tidy(notebook: NotebookNode, files: dict[str, str]) -> NotebookNode:
    """The notebook with the files of the page, without outputs; the same cells give the same bytes."""
    cells = []
    for number, cell in enumerate(notebook.cells):
        source = cell.source
        if source.startswith(MAGIC):
            first = source.partition("\n")[0]
            name = first.removeprefix(MAGIC).strip()
            if name not in files:
                raise SystemExit(f"a cell writes {name}, which {PAGE.name} does not show; it shows {', '.join(files)}")
            source = f"{first}\n{files[name].rstrip()}"
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(source, id=f"cell-{number:02}"))
    # Jupyter with jupytext installed then keeps the two in step by itself.
    metadata = {"jupytext": {"formats": f"ipynb,{FORMAT}"}, "kernelspec": KERNEL}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata, nbformat_minor=5)


def texts(source: Path, read: Path, files: dict[str, str]) -> dict[Path, str]:
    """What the .py `source` and the .ipynb beside it should hold, with the cells of `read`, which is one of them."""
    notebook = tidy(jupytext.read(read, fmt="ipynb" if read.suffix == ".ipynb" else FORMAT), files)
    script = nbformat.from_dict(notebook)
    # The header would tell a reader of the .py nothing.
    script.metadata = {"jupytext": {"notebook_metadata_filter": "-all", "cell_metadata_filter": "-all"}}
    return {
        source: jupytext.writes(script, fmt=FORMAT),
        source.with_suffix(".ipynb"): nbformat.writes(notebook) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    way.add_argument("--from-ipynb", action="store_true", help="take the cells of the .ipynb")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the notebooks; notebooks/ without")
    options = parser.parse_args()
    files = files_of(PAGE.read_text(encoding="utf-8"))
    sources = sorted(options.folder.glob("*.py"))
    if not sources:
        raise SystemExit(f"{options.folder} holds no .py; name the folder of the notebooks")
    wanted: dict[Path, str] = {}
    for source in sources:
        read = source.with_suffix(".ipynb") if options.from_ipynb else source
        if not read.is_file():
            raise SystemExit(f"{read} does not exist; leave --from-ipynb out to make it from {source.name}")
        wanted |= texts(source, read, files)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8", newline="\n")
        print(f"{path}: {'is not what scripts/notebooks makes; run it' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
