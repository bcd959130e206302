"""What a pruner's file of settings must be: complete, explained, and accepted in a run of ten rounds."""

import itertools
from copy import deepcopy
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedray.config import conf_folder, register
from fedray.round import Optim, RunFacts
from fedray.strategies import FedAvg

CONF = Path(__file__).parents[2] / "conf" / "pruner"


@lru_cache
def unresolved(name):
    register()
    with initialize_config_dir(conf_folder(), version_base="1.3"):
        return compose("config", overrides=[f"pruner={name}"])


def composed(name, *, rounds=10, **settings):
    """The resolved settings of a pruner in a run of so many rounds, some of them replaced."""
    cfg = deepcopy(unresolved(name))
    cfg.rounds = rounds
    cfg.pruner.update(settings)
    return OmegaConf.to_container(cfg, resolve=True)["pruner"]


def made(name, rounds=10):
    values = composed(name, rounds=rounds)
    module, policy = values.pop("_target_").rsplit(".", 1)
    return getattr(import_module(module), policy)(**values)


def check_file(name, *, changed=()):
    """changed: settings whose default in the file is not that of the class, such as a share of the rounds."""
    path = CONF / f"{name}.yaml"
    policy, lines = made(name), path.read_text(encoding="utf-8").splitlines()
    settings = [line.split(":")[0] for line in lines if not line.startswith(("#", "_target_"))]
    assert sorted(settings) == sorted(field.name for field in fields(policy))  # shared fields come first in a class
    for field in fields(policy):
        if field.name not in {"sparsity", *changed}:
            assert getattr(policy, field.name) == field.default, field.name
    for above, line in itertools.pairwise(lines):
        assert line.startswith(("#", "_target_")) or above.startswith("# "), line
    assert max(map(len, lines)) <= 120
    for rounds in (10, 25, 100, 333):
        facts(made(name, rounds), FedAvg(), rounds=rounds)
    return policy


def facts(policy, *others, rounds=10, **known):
    """What `check` may look at in a run with this pruner, after it was let in."""
    named = tuple((type(one).__name__.lower(), one) for one in (policy, *others))
    common = {"rounds": rounds, "num_clients": 3, "cohort": 3, "optim": Optim(), "epochs": 1.0, "steps": None}
    found = RunFacts(policies=named, **common | known)
    policy.check(found)
    return found
