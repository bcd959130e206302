"""The launcher is found from a checkout, an editable install and a wheel, and burdens no other program of Hydra's."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW = "import sys; from fedray.cli import main; sys.exit(main(['--info', 'plugins']))"
WHERE = """
import fedray.config
fedray.config.register()
import hydra_plugins.fedray_launcher, hydra_plugins.fedray_sweeper
print(hydra_plugins.fedray_launcher.__file__, fedray.config.conf_folder(), sep="\\n")
"""


def python(code: str, path: str, cwd: Path, head: str = "") -> str:
    """Standard output of a program that finds fedray below `path` alone."""
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=cwd, env={"PYTHONPATH": path, "PATH": ""}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkout_has_the_launcher(tmp_path: Path) -> None:
    assert "FedrayLauncher" in python(SHOW, str(ROOT), tmp_path)
    where, conf = python(WHERE, str(ROOT), tmp_path).split()
    assert Path(where) == ROOT / "fedray" / "plugins" / "hydra_plugins" / "fedray_launcher" / "__init__.py"
    assert Path(conf) == ROOT / "conf"


def build(kind: str, folder: Path) -> Path:
    if find_spec("hatchling") is None:
        pytest.skip("building needs hatchling: pip install 'fedray[dev]'")
    code = f"import sys; from hatchling.build import {kind}; print({kind}(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, timeout=120, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True, timeout=60)
    return site


@pytest.mark.full
def test_a_wheel_has_the_launcher_where_hydra_looks_for_it(tmp_path: Path) -> None:
    site = build("build_wheel", tmp_path)
    assert "FedrayLauncher" in python(SHOW, str(site), tmp_path)
    where, conf = python(WHERE, str(site), tmp_path).split()
    assert Path(where) == site / "hydra_plugins" / "fedray_launcher" / "__init__.py"
    assert Path(conf) == site / "fedray" / "conf"
    assert not (site / "fedray" / "plugins").exists()
    assert not (site / "hydra_plugins" / "__init__.py").exists()  # others have plug-ins in this namespace too


@pytest.mark.full
def test_an_editable_install_sees_the_launcher_of_the_checkout_and_copies_nothing(tmp_path: Path) -> None:
    site = build("build_editable", tmp_path)
    assert [path for path in site.rglob("*") if path.suffix in (".py", ".yaml")] == []
    head = f"import site; site.addsitedir({str(site)!r})\n"
    assert "FedrayLauncher" in python(SHOW, "", tmp_path, head)
    where, conf = python(WHERE, "", tmp_path, head).split()
    assert Path(where) == ROOT / "fedray" / "plugins" / "hydra_plugins" / "fedray_launcher" / "__init__.py"
    assert Path(conf) == ROOT / "conf"


def test_another_program_of_hydra_finds_the_launcher_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys
        from hydra.core.plugins import Plugins
        from hydra.plugins.launcher import Launcher
        names = [found.__name__ for found in Plugins.instance().discover(Launcher)]
        print(names.count("FedrayLauncher"), sorted({"torch", "ray", "numpy", "fedray"} & set(sys.modules)))
    """
    path = str(ROOT / "fedray" / "plugins")
    assert python(textwrap.dedent(code), path, tmp_path).strip() == "1 []"


def test_a_plug_in_of_somebody_else_does_not_hide_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "hydra_plugins" / "theirs").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "theirs" / "__init__.py").touch()
    assert "FedrayLauncher" in python(SHOW, f"{tmp_path}:{ROOT}", tmp_path)
