"""The notebooks: each runs from top to bottom, is made from the .py beside it, and shows what the documents show."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.cli import main

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PAGE = (ROOT / "docs" / "write_a_pruner.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`\n\n```(?:python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
NAMES = ["01_quickstart", "02_add_a_pruner", "03_compare_runs"]
CELL_SECONDS = 240
Make = Callable[..., tuple[int, str]]


def read(name: str) -> Any:
    """A notebook as JSON: no package of Jupyter is needed to look at one."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell: Any) -> str:
    return "".join(cell["source"])


def cells_of(script: str) -> list[tuple[str, str]]:
    """Kind and source of the cells of a py:percent text, read by its few rules alone."""
    found = []
    for block in re.split(r"^# %%(?= |$)", "\n" + script, flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("\n")
        kind, body = "markdown" if "[markdown]" in head else "code", body.rstrip("\n")
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))
        # A line that only notebooks understand is a comment in Python.
        found.append((kind, body.removeprefix("# ") if body.startswith("# %%") else body))
    return found


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    """scripts/notebooks on a folder; returns its exit code and what it printed."""
    pytest.importorskip("jupytext", reason="needs pip install 'fedray[notebooks]'")
    found = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "notebooks.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)

    def call(folder: Path, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["notebooks", "--folder", str(folder), *options])
        capsys.readouterr()
        return script.main(), capsys.readouterr().out

    return call


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(FOLDER / f"{name}.py", folder)
        shutil.copy(FOLDER / f"{name}.ipynb", folder)
    return folder


def execute(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, tiny: bool = True, more: Sequence[str] = ()
) -> Any:
    """The executed notebook, run in `folder` by a kernel of this interpreter; fails at the first cell that raises.

    more: further cells of code after the last.
    """
    nbclient = pytest.importorskip("nbclient", reason="needs pip install 'fedray[notebooks]'")
    nbformat = pytest.importorskip("nbformat", reason="needs pip install 'fedray[notebooks]'")
    pytest.importorskip("ipykernel", reason="needs pip install 'fedray[notebooks]'")
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        own = folder / ".jupyter" / variable
        own.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(variable, str(own))
    monkeypatch.setenv("MPLCONFIGDIR", str(folder / ".matplotlib"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if tiny:
        monkeypatch.setenv("FEDRAY_NOTEBOOKS_TINY", "1")
    else:
        monkeypatch.delenv("FEDRAY_NOTEBOOKS_TINY", raising=False)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in more]
    nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def printed(notebook: Any) -> str:
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


def pictures(notebook: Any) -> int:
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    return sum("image/png" in data for data in shown)


# -- as they are kept ------------------------------------------------------------------------------------------------


def test_there_are_three_notebooks_and_a_source_of_each() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.py")) == [f"{name}.py" for name in NAMES]
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == [f"{name}.ipynb" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_and_its_source_have_the_same_cells(name: str) -> None:
    script = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    kept = [(cell["cell_type"], source(cell)) for cell in read(name)["cells"]]
    assert len(kept) > 5
    assert cells_of(script) == kept


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs_and_without_what_differs_between_machines(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert {tuple(cell["metadata"]) for cell in notebook["cells"]} == {()}
    assert sorted(notebook["metadata"]) == ["jupytext", "kernelspec"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_the_script_makes_exactly_what_is_kept(copy: Path, make: Make) -> None:
    assert make(copy, "--check") == (0, "")
    for path in copy.glob("*.ipynb"):
        path.unlink()
    assert make(copy)[0] == 0
    for name in NAMES:
        assert (copy / f"{name}.ipynb").read_bytes() == (FOLDER / f"{name}.ipynb").read_bytes()
        assert (copy / f"{name}.py").read_bytes() == (FOLDER / f"{name}.py").read_bytes()


def test_the_check_names_what_was_edited_and_writes_nothing(copy: Path, make: Make) -> None:
    script = copy / "01_quickstart.py"
    script.write_text(script.read_text(encoding="utf-8").replace("seed=0", "seed=1"), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert make(copy, "--check") == (
        1,
        f"{copy / '01_quickstart.ipynb'}: is not what scripts/notebooks makes; run it\n",
    )
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_what_was_edited_and_run_in_jupyter_comes_back_to_the_source(copy: Path, make: Make) -> None:
    path = copy / "03_compare_runs.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(cell for cell in notebook["cells"] if "Two pruners" in source(cell))
    cell["source"] = ["An edit."]
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code |= {"execution_count": 7, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["out"]}]}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert make(copy, "--from-ipynb")[0] == 0
    assert "# %% [markdown]\n# An edit.\n" in (copy / "03_compare_runs.py").read_text(encoding="utf-8")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [one.get("outputs", []) for one in kept["cells"]] == [[]] * len(kept["cells"])
    assert make(copy, "--check") == (0, "")


def test_the_script_refuses_a_cell_that_writes_what_no_page_shows(copy: Path, make: Make) -> None:
    script = copy / "02_add_a_pruner.py"
    script.write_text(script.read_text(encoding="utf-8").replace("mine/swap.py\n", "mine/swop.py\n"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"mine/swop\.py, which write_a_pruner\.md does not show; it shows mine/swap"):
        make(copy)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_a_notebook_links_to_exists(name: str) -> None:
    text = "\n".join(source(cell) for cell in read(name)["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert (FOLDER / target).is_file(), target


def test_the_settings_that_only_tests_use_are_all_that_differs_from_what_a_reader_runs() -> None:
    for name in NAMES:
        text = "\n".join(source(cell) for cell in read(name)["cells"])
        assert text.count("FEDRAY_NOTEBOOKS_TINY") == 1, name
        lines = [line for line in text.splitlines() if line.startswith("TINY = ")]
        assert len(lines) == 1, name
        (settings,) = re.findall(r"TINY = (\[.+\]) if .* else \[\]$", lines[0])
        assert all(re.fullmatch(r"[a-z_.]+=\S+", one) for one in ast.literal_eval(settings)), name


# -- as they run -----------------------------------------------------------------------------------------------------


def look_at_quickstart(notebook: Any, folder: Path) -> fedray.Run:
    (run_folder,) = (folder / "outputs" / "quickstart").iterdir()
    run = fedray.Run(run_folder)
    assert run.manifest["status"] == "finished"
    text = printed(notebook)
    for metric in ("test/accuracy", "model/sparsity", "wire/total_bytes", "digest"):
        assert re.search(rf"^{metric} +{re.escape(str(run.final[metric]))}$", text, re.MULTILINE), metric
    assert run.final["model/sparsity"] == 0.9
    # What reprice has measured is what the rows have.
    assert f"{run.final['wire/total_bytes']:,} |" in text
    assert "90% zeros" in text
    assert pictures(notebook) == 1
    return run


def look_at_pruner(notebook: Any, folder: Path) -> fedray.Run:
    for name in ("mine/swap.py", "mine/pruner/swap.yaml"):
        assert (folder / name).read_text(encoding="utf-8") == FILES[name]
    text = printed(notebook)
    assert len(re.findall(r"^  passed ", text, re.MULTILINE)) == 15
    assert not re.search(r"^  failed ", text, re.MULTILINE)
    assert "pruner.ratio is 2.0; it is the fraction of kept weights swapped, 0 to 1" in text
    (run_folder,) = (folder / "outputs" / "run").iterdir()
    run = fedray.Run(run_folder)
    assert {row["model/sparsity"] for row in run.rows} == {0.8}
    moved = [row["round"] for row in run.rows if row.get("prune/churn", 0) > 0]
    assert moved == list(range(3, run.final["round"] + 1, 3))
    return run


def look_at_grid(notebook: Any, folder: Path, *, seeds: int) -> None:
    (grid,) = (folder / "outputs" / "grid").iterdir()
    text = printed(notebook)
    assert f"{5 * seeds} runs: {5 * seeds} finished." in text
    # The cells of the table, from the rows of the runs.
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert main(["table", str(grid), "--format", "csv", "--rows", "pruner", "--cols", "pruner.sparsity"]) == 0
    assert len(list(csv.reader(io.StringIO(shown.getvalue())))) > 3
    by_method: dict[tuple[str, float], list[float]] = {}
    for path in sorted(grid.glob("[0-9]*")):
        run = fedray.Run(path)
        pruner = run.manifest["choices"]["pruner"]
        sparsity = run.manifest["config"]["pruner"].get("sparsity", 0.0)
        by_method.setdefault((pruner, sparsity), []).append(run.final["test/accuracy"])
    assert sorted(by_method) == [("gradual", 0.8), ("gradual", 0.95), ("none", 0.0), ("random", 0.8), ("random", 0.95)]
    for accuracies in by_method.values():
        assert len(accuracies) == seeds
        assert f"{sum(accuracies) / seeds:.4f} ± " in text
    for kind in ("accuracy-mb", "accuracy-rounds", "pareto"):
        for end in ("png", "pdf", "json"):
            assert (grid / "figures" / f"{kind}.{end}").stat().st_size > 500
    assert pictures(notebook) == 2
    page = (grid / "report.html").read_text(encoding="utf-8")
    assert "<title>Pruning digits" in page
    frames = [out.get("data", {}).get("text/html", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    (place,) = re.findall(r'<iframe[^>]*src="([^"]+)"', "".join(frames), re.DOTALL)
    assert (folder / place).samefile(grid / "report.html")


def test_the_quickstart_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_quickstart(execute("01_quickstart", tmp_path, monkeypatch), tmp_path)


def test_the_notebook_that_adds_a_pruner_runs_and_counts_an_edit_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runs,) = [text for cell in read("02_add_a_pruner")["cells"] if "fedray.run([*overrides" in (text := source(cell))]
    (writes,) = [
        text for cell in read("02_add_a_pruner")["cells"] if "%%writefile mine/swap.py" in (text := source(cell))
    ]
    edited = writes.replace('fold("swap")', 'fold("another")')
    assert edited != writes
    more = ["first = run", edited, runs, "print(first.folder, run.folder)", writes]
    notebook = execute("02_add_a_pruner", tmp_path, monkeypatch, more=more)
    first, second = (fedray.Run(Path(place)) for place in notebook.cells[-2].outputs[0]["text"].split())
    assert [row["model/sparsity"] for row in second.rows] == [row["model/sparsity"] for row in first.rows]
    assert second.rows[1]["digest"] == first.rows[1]["digest"]  # the first swap ends the third round
    assert second.final["digest"] != first.final["digest"]
    shutil.rmtree(second.folder)
    look_at_pruner(notebook, tmp_path)


def test_the_notebook_that_compares_runs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_grid(execute("03_compare_runs", tmp_path, monkeypatch), tmp_path, seeds=2)


@pytest.mark.full
def test_the_notebooks_run_with_the_settings_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = look_at_quickstart(execute("01_quickstart", tmp_path, monkeypatch, tiny=False), tmp_path)
    assert run.final["round"] == 60
    assert run.final["test/accuracy"] > 0.9  # chance is 0.1
    assert look_at_pruner(execute("02_add_a_pruner", tmp_path, monkeypatch, tiny=False), tmp_path).final["round"] == 30
    look_at_grid(execute("03_compare_runs", tmp_path, monkeypatch, tiny=False), tmp_path, seeds=3)


def test_the_extra_has_what_the_notebooks_import() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    # ipykernel brings IPython.
    has = {re.split(r"[\[<>=]", one)[0] for one in wanted} | {"IPython", "fedray"}
    for name in NAMES:
        for cell in read(name)["cells"]:
            if cell["cell_type"] != "code" or source(cell).startswith("%%"):
                continue
            for node in ast.walk(ast.parse(source(cell))):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for module in found:
                    first = module.split(".")[0]
                    assert first in has or first in sys.stdlib_module_names, (name, module)
