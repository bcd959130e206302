"""What is shipped: names, version, and the configuration folder from a checkout and from a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedray
from fedray.config import conf_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_public_name_exists_and_is_documented() -> None:
    for name in fedray.__all__:
        value = getattr(fedray, name)
        assert name.startswith("__") or value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"fedray.*no attribute 'nothing'"):
        fedray.nothing  # noqa: B018 - reading it is the test


def test_the_version_is_the_one_of_the_change_log() -> None:
    heading = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert heading.group(1) == fedray.__version__


def test_an_installed_fedray_has_the_version_and_the_command_of_this_checkout() -> None:
    try:
        installed = distribution("fedray")
    except PackageNotFoundError:
        pytest.skip("fedray is not installed; it is imported from the checkout")
    assert installed.version == fedray.__version__
    (script,) = [point for point in installed.entry_points if point.group == "console_scripts"]
    assert (script.name, script.value) == ("fedray", PROJECT["scripts"]["fedray"])


def test_the_console_script_is_a_function_that_returns_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    module, name = PROJECT["scripts"]["fedray"].split(":")
    assert getattr(import_module(module), name)(["export", "/nowhere/at/all"]) in (1, 2)
    assert capsys.readouterr().err.startswith("fedray: ")


def test_the_configuration_folder_of_a_checkout_is_its_own() -> None:
    assert Path(conf_folder()) == ROOT / "conf"


def test_an_installed_configuration_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedray" / "conf").mkdir(parents=True)
    (tmp_path / "fedray" / "conf" / "config.yaml").touch()
    monkeypatch.setattr("fedray.config.__file__", str(tmp_path / "fedray" / "config.py"))
    assert Path(conf_folder()) == tmp_path / "fedray" / "conf"


def test_every_pinned_version_belongs_to_a_dependency() -> None:
    named = {normal(text) for text in PROJECT["dependencies"]}
    named |= {normal(text) for extra in PROJECT["optional-dependencies"].values() for text in extra}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert {normal(pin) for pin in pins} <= named
    assert "torch==2.13.0" in pins


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "scripts/_environment.sh", "scripts/quickstart"])
def test_no_file_names_a_registry(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text)


@pytest.mark.full
def test_a_wheel_carries_the_configuration_and_runs(tmp_path: Path) -> None:
    if find_spec("hatchling") is None:
        pytest.skip("building a wheel needs hatchling: pip install 'fedray[dev]'")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=120, cwd=tmp_path)
    (wheel,) = tmp_path.glob("fedray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {f"fedray/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert shipped
    assert shipped <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "conf"))]
    run = [sys.executable, "-m", "fedray", "--cfg", "job", "+experiment=quickstart"]
    site = str(tmp_path / "site")
    show = [sys.executable, "-c", "import fedray.config as c; print(c.conf_folder())"]
    environment = {"PYTHONPATH": site, "PATH": ""}
    found = subprocess.run(show, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == str(tmp_path / "site" / "fedray" / "conf"), found.stderr
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout
