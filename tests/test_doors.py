"""The doors between the rooms: who may import what. Imports go down the table, never up, never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedray"
POLICY_ROOMS = ("personal", "pruners", "strategies", "corrections", "guards")

# What each room may import of fedray while it runs, besides itself and `errors`. Top to bottom as the imports go:
# a room names only rooms above it.
KERNELS = {"tree", "keys", "sums", "costs", "prune"}
DOORS: dict[str, set[str]] = {
    "errors": set(),
    "tree": set(),
    "keys": set(),
    "metrics": set(),
    "sums": {"tree"},
    "prune": {"tree", "keys"},
    "privacy": {"tree", "keys"},
    # A context shows the units that can be cut whole.
    "round": {"tree", "keys", "sums", "prune"},
    # Links draw a client's rate; devices and links refuse a bad field as policies do.
    "costs": {"tree", "keys", "round"},
    # The codec takes a round's messages; a random mask travels as its seed and is drawn again by prune's kernel.
    "wire": {"tree", "keys", "round", "prune"},
    **{room: KERNELS | {"privacy", "round"} for room in POLICY_ROOMS},
    # A task computes the losses that a job asks for.
    "models": {"tree", "keys", "round", "prune"},
    "train": {"round", "tree", "keys", "models", "prune"},
    "data": {"keys"},
    "sim": KERNELS | {"privacy", "round", "wire", "models", "train", "data", "metrics"},
    "track": set(),
    # Re-pricing in time runs the driver's own model of it.
    "report": {"track", "costs", "keys", "metrics"},
}
DOORS["config"] = set(DOORS) | {"sim"}
# Checks of a pruner run it in a tiny federation, from a yaml that `config` turns into a policy.
DOORS["testing"] = set(DOORS)
DOORS["launch"] = set(DOORS)
# What happens to the cells of a sweep; reports read what it leaves behind.
DOORS["sweep"] = set(DOORS) - {"report"}
# Hydra's side of a sweep.
DOORS["plugins"] = {"cli", "sweep"}
DOORS["cli"] = set(DOORS)
DOORS["__main__"] = {"cli"}
DOORS["__init__"] = {"cli", "launch"}  # only when a name of theirs is asked for

# Packages that only some modules may import, even where the import waits inside a function.
GUARDED: dict[str, tuple[str, ...]] = {
    "ray": ("sim",),
    "wandb": ("track.wandb", "report.wandb"),
    "wandb_workspaces": ("report.wandb",),
    "hydra": ("config", "cli", "__main__", "plugins"),
    "omegaconf": ("config", "cli", "__main__", "plugins", "testing.load"),
}


@dataclass(frozen=True)
class Import:
    module: str  # of fedray, without the first name: "wire.codec"
    target: str  # "fedray.round", "ray.util"
    names: tuple[str, ...]
    typing_only: bool
    line: int

    def __str__(self) -> str:
        return f"fedray.{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(module: str, tree: ast.AST) -> list[Import]:
    """Every import of a module, those inside functions included."""
    guarded = {id(inner) for node in ast.walk(tree) if is_typing_guard(node) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        typing_only = id(node) in guarded
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name, (), typing_only, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"fedray.{module}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            names = tuple(alias.name for alias in node.names)
            if node.module == "fedray":  # `from fedray import data` is an import of fedray.data
                found += [Import(module, f"fedray.{name}", (), typing_only, node.lineno) for name in names]
            else:
                found.append(Import(module, node.module, names, typing_only, node.lineno))
    return found


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = [found for module, tree in MODULES.items() for found in imports_of(module, tree)]


def room_of(module: str) -> str:
    return module.split(".")[0]


def is_policy_module(module: str) -> bool:
    """Whether it defines a policy; the other modules of a policy room are its kernels."""
    bases = (base for node in ast.walk(MODULES[module]) if isinstance(node, ast.ClassDef) for base in node.bases)
    return any(ast.unparse(base).split("[")[0] == "Policy" for base in bases)


def crosses_a_door(found: Import) -> bool:
    """Whether an import is one that the table does not allow."""
    if found.typing_only or found.target.split(".")[0] != "fedray":
        return False
    here, there = room_of(found.module), [*found.target.split("."), "__init__"][1]
    return there not in {here, "errors"} | DOORS[here]


def breaks_a_guard(found: Import) -> bool:
    package = found.target.split(".")[0]
    allowed = GUARDED.get(package)
    if allowed is None or found.typing_only:
        return False
    if found.target == "ray.cloudpickle" and found.module == "launch":
        return False  # it seals what goes to the actors; nothing of a cluster is touched
    return not any(found.module == door or found.module.startswith(door + ".") for door in allowed)


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in MODULES} <= set(DOORS)


def test_the_table_has_no_way_up() -> None:
    # If every room names only rooms that are finished before it, imports cannot go round in a circle.
    left = {room: doors - {room} for room, doors in DOORS.items() if room not in ("__init__", "__main__")}
    done: set[str] = set()
    while left:
        ready = [room for room, doors in left.items() if doors <= done]
        if not ready:
            # These sit side by side at the bottom and may call each other.
            assert set(left) <= {"config", "launch", "sweep", "plugins", "cli"}
            break
        done |= set(ready)
        left = {room: doors for room, doors in left.items() if room not in ready}


def test_rooms_import_only_what_the_table_allows() -> None:
    assert [str(found) for found in IMPORTS if crosses_a_door(found)] == []


def test_ray_wandb_and_hydra_stay_in_their_rooms() -> None:
    assert [str(found) for found in IMPORTS if breaks_a_guard(found)] == []


def test_policies_never_import_each_other() -> None:
    policies = {module for module in MODULES if room_of(module) in POLICY_ROOMS and is_policy_module(module)}
    assert policies >= {"pruners.magnitude", "pruners.feddst", "strategies.fedavg", "corrections.fedprox"}
    reached = [
        str(found)
        for found in IMPORTS
        if found.module in policies
        for target in (found.target, *(f"{found.target}.{name}" for name in found.names))
        if target.removeprefix("fedray.") in policies | set(POLICY_ROOMS)
    ]
    assert reached == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pruners.new", "from fedray.sim import driver"),
        ("pruners.new", "from fedray.train import Engine"),
        ("strategies.new", "from fedray.wire import Codec"),
        ("corrections.new", "import fedray.strategies.fedavg"),
        ("tree", "from fedray.keys import Key"),
        ("round", "def late():\n    from fedray.wire import Codec"),
        ("report.table", "from fedray.sim.final import read_final"),
        ("data.new", "from fedray import models"),
    ],
)
def test_a_forbidden_import_would_be_seen(module: str, line: str) -> None:
    assert any(crosses_a_door(found) for found in imports_of(module, ast.parse(line)))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("train.engine", "import ray"),
        ("launch", "from ray.util import placement_group"),
        ("track.store", "def late():\n    import wandb"),
        ("sim.driver", "from omegaconf import OmegaConf"),
        ("launch", "from hydra import compose"),
    ],
)
def test_a_guarded_package_would_be_seen(module: str, line: str) -> None:
    assert any(breaks_a_guard(found) for found in imports_of(module, ast.parse(line)))


def test_the_core_works_without_ray_wandb_and_hydra() -> None:
    code = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ray", "wandb", "hydra", "omegaconf"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocked())
        import torch
        import fedray, fedray.costs, fedray.keys, fedray.round, fedray.sums, fedray.tree
        import fedray.corrections, fedray.pruners, fedray.strategies, fedray.wire
        from fedray.prune import allocate, regrow, schedule, score, select

        layout = fedray.tree.Layout(("w",), ((4, 5),))
        mask = select.random_mask(layout, ("w",), {"w": 7}, fedray.keys.Key.of(0).fold("mask"))
        tree = fedray.tree.restrict(fedray.tree.Tree(layout, torch.ones(20)), mask)
        print(int(tree.flat.sum()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    # Actors and the command line import it first; what is slow to load waits until it is needed.
    code = "import sys, fedray; print(sorted({'torch', 'ray', 'wandb', 'hydra', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_plug_in_of_pytest_loads_nothing_heavy() -> None:
    # pytest imports it in every project of an environment that has fedray.
    code = """
        import sys
        import fedray.testing.plugin
        heavy = {"torch", "numpy", "ray", "hydra", "omegaconf", "fedray.round", "fedray.testing.conform"}
        print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
