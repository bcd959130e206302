"""What every test shares: a quiet environment that writes only to temporary folders, and where data are."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Before anything imports ray: Ray would write a token into the home directory and warn about it. The variables are
# inherited by the processes that tests start.
_SCRATCH = tempfile.TemporaryDirectory(prefix="fedray-tests-", ignore_cleanup_errors=True)
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_AUTH_TOKEN_PATH": str(Path(_SCRATCH.name) / "ray_token"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_CACHE_DIR": str(Path(_SCRATCH.name) / "wandb-cache"),
    "WANDB_CONFIG_DIR": str(Path(_SCRATCH.name) / "wandb-config"),
    "HF_HUB_OFFLINE": "1",
    "FEDRAY_CACHE": str(Path(_SCRATCH.name) / "cache"),
    "FEDRAY_CLUSTER": str(Path(_SCRATCH.name) / "cluster.json"),
}
# Processes that tests start import this checkout, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
# A cluster or an account of whoever runs the tests is none of theirs.
for _name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "WANDB_BASE_URL", "FEDRAY_TRACEBACK"):
    os.environ.pop(_name, None)


def _data_folder() -> Path | None:
    named = os.environ.get("FEDRAY_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.config.pluginmanager.hasplugin("xdist") and item.get_closest_marker("ray") is not None:
            # Where tests go through several processes, those of a file that share a cluster stay together.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if _data_folder() is None:
        absent = pytest.mark.skip(reason="needs real data: FEDRAY_DATA=FOLDER with mnist/, cifar10/ and shakespeare/")
        for item in items:
            if item.get_closest_marker("data") is not None:
                item.add_marker(absent)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with mnist/ and cifar10/ in hub layout; for tests marked `data`."""
    folder = _data_folder()
    assert folder is not None, "a test that asks for data_folder needs the mark `data`"
    return folder


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A server on the loopback, see `loopback.py`; this process and those it starts take it for W&B."""
    found = importlib.util.spec_from_file_location("loopback", Path(__file__).with_name("loopback.py"))
    assert found is not None
    assert found.loader is not None
    module = sys.modules["loopback"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    import wandb

    with module.loopback() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        wandb.teardown()  # it reads the environment once
        yield server
        server.down = server.refuses_key = server.refuses_rows = server.refuses_project = False
        wandb.teardown()
