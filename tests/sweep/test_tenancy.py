"""A process that was lent to a run is afterwards as it was before."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    head = (
        "import io, os, random, sys, zipfile\nimport numpy as np, torch\nfrom fedray.sim.tenancy import Tenancy\n"
        "def zipped(text):\n"
        "    buffer = io.BytesIO()\n"
        "    with zipfile.ZipFile(buffer, 'w') as archive:\n"
        "        archive.writestr('guest.py', text)\n"
        "    return buffer.getvalue()\n"
        "tenancy = Tenancy()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def test_two_tenants_have_modules_of_the_same_name_of_their_own() -> None:
    done = python(
        """
        for text in ("MARK = 1", "MARK = 2"):
            tenancy.move_in(zipped(text), None)
            import guest
            print(guest.MARK, end=" ")
            folder = os.path.dirname(guest.__file__)
            tenancy.move_out()
            assert "guest" not in sys.modules and folder not in sys.path and not os.path.exists(folder)
        """
    )
    assert (done.returncode, done.stdout) == (0, "1 2 "), done.stderr


def test_generators_environment_folder_and_defaults_of_torch_are_put_back() -> None:
    done = python(
        """
        def state():
            return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
        found = []
        for _ in range(2):
            tenancy.move_in(b"", None)
            found.append(state())
            os.environ["GUEST"] = "1"; os.environ.pop("HOME", None); os.chdir("/")
            torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(2)
            tenancy.move_out()
            assert "GUEST" not in os.environ and dict(os.environ) == tenancy.environment
            assert os.getcwd() == tenancy.folder
            assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
            assert torch.get_num_threads() == 1
        print(found[0] == found[1])
        """
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the private memory of a process")
@pytest.mark.parametrize("what", ["bytearray(10**9)", "np.ones(10**9, np.uint8)", "torch.ones(10**9).byte()"])
def test_a_tenant_cannot_take_more_memory_than_it_was_given(what: str) -> None:
    done = python(
        f"""
        tenancy.move_in(b"", 500_000_000)
        small = bytearray(10**8)
        try:
            {what}
        except Exception as error:
            from fedray.sim.drive import NO_MEMORY
            print(any(sign in f"{{type(error).__name__}}: {{error}}" for sign in NO_MEMORY))
        tenancy.move_out()
        print(len(bytearray(10**9)))
        """
    )
    assert (done.returncode, done.stdout.split()) == (0, ["True", "1000000000"]), done.stderr


def test_modules_from_where_the_tenant_imports_are_forgotten_and_libraries_below_are_not(tmp_path: Path) -> None:
    library = tmp_path / "site"
    library.mkdir()
    (library / "kept.py").write_text("MARK = 0\n")
    done = python(
        f"""
        from pathlib import Path
        sys.path.append({str(library)!r})
        own = Path({str(tmp_path)!r}) / "mine.py"
        found = []
        for text in ("MARK = 1", "MARK = 22"):
            own.write_text(text)
            tenancy.move_in(b"", None, [{str(tmp_path)!r}, *sys.path], {str(tmp_path)!r})
            import importlib, kept
            guest = importlib.import_module('mine')
            found.append((guest.MARK, os.getcwd() == {str(tmp_path)!r}))
            tenancy.move_out()
            assert "mine" not in sys.modules and "kept" in sys.modules
            assert {str(tmp_path)!r} not in sys.path and {str(library)!r} in sys.path
            assert os.getcwd() != {str(tmp_path)!r}
        print(found)
        """
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[(1, True), (22, True)]"), done.stderr


def test_a_place_whose_team_cannot_start_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError

    from fedray.sim import hosts
    from fedray.sim.plan import Cluster, make_plan

    class Group:
        def wait(self, timeout_seconds: float) -> bool:
            return True

    class Lender:
        def team(self, plan: object, group: object) -> None:
            raise ActorDiedError

    removed = []
    monkeypatch.setattr(hosts, "placement_group", lambda *_, **__: Group())
    monkeypatch.setattr(hosts, "remove_placement_group", removed.append)
    plan = make_plan(
        Cluster(cpus=2.0, gpus=0.0, memory_bytes=8e9), num_clients=2, cohort=1, clients_per_actor="auto", slots=1,
        device="cpu",
    )  # fmt: skip
    lending: Any = Lender()
    with hosts.Hosts(note=print, lender=lending) as several:
        with pytest.raises(ActorDiedError):
            several.place(plan)
        assert len(removed) == 1
