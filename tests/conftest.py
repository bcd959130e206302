"""What every test shares: a quiet environment that writes only to temporary folders, and where data are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
    "HF_HUB_OFFLINE": "1",
    "FEDRAY_CACHE": str(Path(_SCRATCH.name) / "cache"),
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
