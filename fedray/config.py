"""From a composed configuration to a run, with every mistake refused in one sentence before anything starts.

The skeleton has a schema of dataclasses; components are `_target_` nodes whose arguments are checked against the
signature and its annotations. This module, `cli` and `__main__` are the only ones that know Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fedray import data as data_room
from fedray.data.augment import Augment
from fedray.data.dataset import Dataset
from fedray.data.views import carve_validation, local_tests
from fedray.errors import ConfigError
from fedray.keys import Key
from fedray.models import Scope, Task, pretrained
from fedray.models.normalisation import NO_BATCH_NORM, group_normed, norm_layers
from fedray.models.task import OBJECTIVES, kinds, layouts, prunable_names, trainable
from fedray.personal import FedBN, StaticNorm
from fedray.round import FieldError, Optim, Policy
from fedray.sim.client import codec_of, cuts_units, has_global_model, kept_names, structure_of
from fedray.sim.goals import Goals
from fedray.sim.population import Population
from fedray.sim.sampling import BySize
from fedray.sim.spec import EvalSpec, RunSpec, TrainerSpec
from fedray.track.wandb import WandbConfig
from fedray.train import LearningRate
from fedray.train.engine import try_inputs
from fedray.train.schedule import Schedule
from fedray.tree import Layout, Mask
from fedray.wire import Chain, Way, Wire
from fedray.wire.values import Entropy

# What Hydra logs of a target that cannot be imported is in the sentence that we raise.
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)

# -- the schema ------------------------------------------------------------------------------------------------------


@dataclass
class EvalConfig:
    every: int = MISSING
    clients: Any = MISSING
    batch_size: int = MISSING


@dataclass
class CheckpointConfig:
    every: int = MISSING


@dataclass
class ScopeConfig:
    first_layer: bool = MISSING
    last_layer: bool = MISSING
    biases: bool = MISSING
    norms: bool = MISSING


@dataclass
class TrainerConfig:
    optimizer: str = MISSING
    lr: float = MISSING
    lr_schedule: str = MISSING
    lr_decay: float = MISSING
    lr_every: int = MISSING
    lr_warmup: int = MISSING
    batch_size: int = MISSING
    epochs: int | None = MISSING
    steps: int | None = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    clip_norm: float | None = MISSING
    engine: str = MISSING


@dataclass
class ServerConfig:
    lr_schedule: str = MISSING
    lr_decay: float = MISSING
    lr_every: int = MISSING
    lr_warmup: int = MISSING


@dataclass
class StopConfig:
    metric: str = MISSING
    targets: list[float] = MISSING
    at_targets: bool = MISSING
    patience: int | None = MISSING
    min_delta: float = MISSING


@dataclass
class RuntimeConfig:
    kind: str = MISSING
    clients_per_actor: Any = MISSING
    slots: Any = MISSING
    device: str = MISSING
    address: str | None = MISSING
    num_cpus: int | None = MISSING
    temp_dir: str | None = MISSING
    dashboard: str = MISSING
    # Runs that were recorded before there was a ceiling had none.
    memory_gb: Any = None


@dataclass
class WandbSchema:
    mode: str = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    job_type: str = MISSING
    tags: list[str] = MISSING
    name: str | None = MISSING
    histograms_every: int = MISSING
    tables: str = MISSING
    artifacts: str = MISSING
    timeout_s: float = MISSING


@dataclass
class TrackerConfig:
    progress: str = MISSING
    wandb: WandbSchema = field(default_factory=WandbSchema)


@dataclass
class Config:
    """The skeleton. Groups of components are free mappings; their arguments are checked when they are made."""

    name: str = MISSING
    seed: int = MISSING
    rounds: int = MISSING
    num_clients: int = MISSING
    cohort: int = MISSING
    validation: float = MISSING
    public: int = MISSING
    batch_norm: str = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    data: dict[str, Any] = field(default_factory=dict)
    partition: dict[str, Any] = field(default_factory=dict)
    skew: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    availability: dict[str, Any] = field(default_factory=dict)
    personal: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    correction: dict[str, Any] = field(default_factory=dict)
    pruner: dict[str, Any] = field(default_factory=dict)
    wire: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    link: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Make the schema known to Hydra, and `${share_of_rounds:0.5}`; conf/ builds on them."""
    ConfigStore.instance().store(name="fedray_schema", node=Config)
    find_plugins()
    OmegaConf.register_new_resolver("share_of_rounds", _share_of_rounds, replace=True)


def find_plugins() -> None:
    """Make the launcher and the sweeper known to Hydra: an installed fedray has it beside it, a checkout inside it."""
    try:
        found = importlib.util.find_spec("hydra_plugins.fedray_launcher") is not None
    except ModuleNotFoundError:  # no plug-in of anybody is installed
        found = False
    if not found:
        sys.path.append(str(Path(__file__).parent / "plugins"))
    for name in ("fedray_launcher", "fedray_sweeper"):
        importlib.import_module(f"hydra_plugins.{name}._config")


def _share_of_rounds(share: float, least: int = 1, *, _root_: DictConfig) -> int:
    """That share of `rounds`, rounded down, at least `least`: defaults that follow the length of a run."""
    # Less a float error: 0.29 of 100 is 29.
    return max(least, int(share * _root_.rounds + 1e-9))


def conf_folder() -> str:
    """`conf/` of an installed wheel, else of the checkout."""
    installed = Path(__file__).parent / "conf"
    checkout = Path(__file__).parent.parent / "conf"
    return str(installed if (installed / "config.yaml").is_file() else checkout)


BATCH_NORMS = ("average", "affine", "local", "static", "group")
KEPT_NORMS: Mapping[str, Literal["statistics", "all"]] = types.MappingProxyType(
    {"affine": "statistics", "local": "all"}
)

# -- assembly --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A run that has passed every check, and how it is to be run and tracked.

    code_folder: where the user's own modules are; None without any. facts: what goes into the manifest.
    """

    spec: RunSpec
    population: Population
    runtime: RuntimeConfig
    wandb: WandbConfig
    progress: Literal["auto", "live", "plain", "none"]
    config_yaml: str
    code_folder: str | None
    facts: Mapping[str, Any]


class Shared:
    """What several runs that are assembled in one process have in common, made once: data, and who gets which."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, what: str, config: Mapping[str, Any], keys: Sequence[str], make: Callable[[], Any]) -> Any:
        """What `make` gives, which depends on these keys of a configuration alone; nothing is kept where it raises."""
        name = json.dumps([what, {key: config[key] for key in keys}], sort_keys=True, default=str)
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


DATA_KEYS = ("data",)
DEAL_KEYS = (*DATA_KEYS, "partition", "num_clients", "seed", "public")
POPULATION_KEYS = (*DEAL_KEYS, "validation", "skew", "augment")


def assemble(
    cfg: DictConfig | dict[str, Any],
    *,
    code_folder: str | None = None,
    choices: Mapping[str, str] | None = None,
    shared: Shared | None = None,
) -> Assembly:
    """Check everything and load the data. Raises ConfigError.

    cfg: composed, or already `resolved`. choices: what was chosen of each group, for records. shared: with the other
    runs of a sweep.
    """
    config = cfg if isinstance(cfg, dict) else resolved(cfg)
    shared = Shared() if shared is None else shared
    _check_skeleton(config)

    policies = _policies(config)
    scope = Scope(**config["scope"])
    spec = RunSpec(
        run_id="",
        name=config["name"],
        seed=config["seed"],
        rounds=config["rounds"],
        num_clients=config["num_clients"],
        cohort=config["cohort"],
        task=Task(build=_unbuilt, scope=scope),
        policies=policies,
        wire=_wire(config["wire"]),
        trainer=_trainer(config["trainer"]),
        evaluation=EvalSpec(**config["eval"]),
        server_rate=_rate(1.0, config["server"]),
        sampler=_sampler(config),
        availability=_availability(config),
        validation=config["validation"],
        public=config["public"],
        goals=Goals(**{**config["stop"], "targets": tuple(config["stop"]["targets"])}),
        checkpoint_every=config["checkpoint"]["every"],
        hardware=component(config["device"], "device"),
        link=component(config["link"], "link"),
        config=config,
    )
    _under("sampling", lambda: spec.sampler.check(num_clients=spec.num_clients, cohort=spec.cohort))
    for name, policy in policies:
        _under(name, lambda policy=policy: policy.check(spec.facts()))

    dealt = _deal(config, shared)
    dataset = dealt.dataset
    build = _maker(config["model"], dataset.shape, dataset.num_classes, dataset.vocabulary, config["batch_norm"])
    task = Task(build=build, scope=scope, objective=OBJECTIVES[dataset.objective])
    spec = replace(spec, task=task)
    # Which parts cross is known once the model is: what cannot work is refused here.
    module = _try_model(task, dataset, spec)
    if config["batch_norm"] in (*KEPT_NORMS, "static") and not norm_layers(module):
        raise ConfigError(NO_BATCH_NORM.format(config["batch_norm"]))
    facts = replace(
        spec.facts(),
        kinds=kinds(module),
        objective=dataset.objective,
        has_statistics=bool(norm_layers(module)),
        tokens=dataset.vocabulary is not None,
    )
    for name, policy in policies:
        _under(name, lambda policy=policy: policy.check(facts))
    codec_of(module, spec)
    structure = None
    if cuts_units(spec):
        structure = structure_of(module, try_inputs(1, dataset.shape, dataset.vocabulary), scope)
    _check_goals(spec, module)
    population: Population = shared.once(
        "population", config, POPULATION_KEYS, lambda: _population(dealt, config, spec)
    )
    if config["model"].get("init_from") is not None:
        found = _initial_mask(pretrained.mask_of(config["model"]["init_from"]), module)
        beyond = [name for name, kept in (found or {}).items() if not kept.all()]
        beyond = [name for name in beyond if name not in prunable_names(module, scope)]
        if beyond:
            raise ConfigError(
                f"model.init_from.source is {config['model']['init_from']['source']!r}; that run has cut {beyond[0]}, "
                "which scope.* does not count as prunable here: set scope as that run has it"
            )
        spec = replace(spec, initial_mask=found)
    kept, params = kept_names(module, spec), layouts(module)[0]
    owned = params.select(name for name in params.names if name not in kept)
    facts = replace(
        facts,
        layout=owned,
        initial_mask=_cut(spec, owned),
        prunable=tuple(name for name in prunable_names(module, scope) if name not in kept),
        structure=structure,
        unjudged=population.unjudged,
    )
    for name, policy in policies:
        _under(name, lambda policy=policy: policy.check(facts))
    run_id = _run_id(config, dataset.digest)
    warnings = [f"{name}: {text}" for name, policy in policies for text in policy.warns(facts)]
    warnings += [f"pruner: {text}" for text in ([] if structure is None else structure.left_out)]
    if isinstance(spec.sampler, BySize) and config["strategy"].get("weight_by") == "examples":
        warnings.append("sampling: by_size and strategy.weight_by=examples count sizes twice; set it to uniform")
    about = {
        "run_id": run_id,
        "name": spec.name,
        "seed": spec.seed,
        "rounds": spec.rounds,
        "data": {
            "name": dataset.name,
            "digest": dataset.digest,
            "sample_shape": list(dataset.shape),
            "num_classes": dataset.num_classes,
            "objective": dataset.objective,
            "vocabulary": dataset.vocabulary,
        },
        "partition": {name: value for name, value in dealt.facts.items() if name != "histogram"},
        "batch_norm": config["batch_norm"],
        "warnings": warnings,
        "code_folder": code_folder,
        "choices": _choices(choices or {}, config),
        "depends_on_time": any(policy.depends_on_time for _, policy in policies),
        "config": config,
    }
    wandb = config["tracker"]["wandb"]
    return Assembly(
        spec=replace(spec, run_id=run_id, task=task),
        population=population,
        runtime=RuntimeConfig(**config["runtime"]),
        wandb=WandbConfig(**{**wandb, "tags": tuple(wandb["tags"])}),
        progress=config["tracker"]["progress"],
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(config)),
        code_folder=code_folder,
        facts=about,
    )


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Data and who gets which. parts: rows of the training set by client. labels: what the partition skewed by, int64,
    one for each of them, below num_labels. facts: the manifest of the partition. public: rows of the training set that
    the server has and no client; None for none."""

    dataset: Dataset
    parts: list[np.ndarray]
    labels: np.ndarray
    num_labels: int
    facts: dict[str, Any]
    public: np.ndarray | None = None


def deal(cfg: DictConfig) -> Deal:
    """Load the data of a configuration and deal them to its clients; no model is built. Raises ConfigError."""
    config = resolved(cfg)
    _check_skeleton({**config, "cohort": 1, "eval": {**config["eval"], "clients": "all"}})  # nobody trains
    return _deal(config, Shared())


def identity(
    config: dict[str, Any], *, digests: MutableMapping[str, str], shared: Shared, code_folder: str | None = None
) -> str:
    """The id that the run of a resolved configuration will have; no model is built. Raises ConfigError.

    digests: of data that were loaded before, by what they were made from, so that they need not be loaded to know
    that nothing changed; what had to be loaded is entered.
    """
    _check_skeleton(config)
    made_from = _made_from(config["data"], code_folder)
    if made_from not in digests:
        digests[made_from] = _dataset(config, shared).digest
    return _run_id(config, digests[made_from])


def _made_from(node: Mapping[str, Any], code_folder: str | None) -> str:
    """What a data set comes from: its settings, the state of the files that they name, and the code that reads them.

    Files count by size and time of change. Data that come with a library, or from a hub, are taken to be what they
    were under the same settings.
    """
    files: list[Path] = []
    for value in node.values():
        if isinstance(value, str) and value and Path(value).expanduser().exists():
            path = Path(value).expanduser()
            files += [path] if path.is_file() else [below for below in sorted(path.rglob("*")) if below.is_file()]
    files += sorted((Path(__file__).parent / "data").rglob("*.py"))
    if code_folder is not None and not str(node.get("_target_")).startswith("fedray."):
        files += sorted(Path(code_folder).rglob("*.py"))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([node, states], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values. Raises ConfigError for what cannot be resolved or is no setting."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    config: dict[str, Any] = {str(key): value for key, value in plain.items()}
    config.pop("hydra", None)
    _check_keys(config, Config, "")
    return config


def _dataset(config: dict[str, Any], shared: Shared) -> Dataset:
    def load() -> Dataset:
        dataset = _make(config["data"], "data")
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"data._target_ is {config['data']['_target_']!r}; it gave a {type(dataset).__name__} and must give a "
                "fedray.data.Dataset: use Dataset.of(...)"
            )
        dataset.check()
        return dataset

    found: Dataset = shared.once("data", config, DATA_KEYS, load)
    return found


def _deal(config: dict[str, Any], shared: Shared) -> Deal:
    found: Deal = shared.once("deal", config, DEAL_KEYS, lambda: _new_deal(config, shared))
    return found


def _new_deal(config: dict[str, Any], shared: Shared) -> Deal:
    partitioner = _make(config["partition"], "partition")
    dataset = _dataset(config, shared)
    labels, num_labels = dataset.labels("train")
    labels = np.asarray(labels)
    public, private = _set_apart(config["public"], len(labels), Key.of(config["seed"]).fold("public"))
    owners = {}
    if getattr(partitioner, "needs_owners", False):
        if dataset.train_owner is None:
            raise ConfigError(
                f"partition._target_ is {config['partition']['_target_']!r}; it deals samples by their owner, and "
                f"data={dataset.name} does not say who made them: take another partition, or data with owners"
            )
        owners = {"owners": np.asarray(dataset.train_owner)[private]}
    key = Key.of(config["seed"]).fold("partition")
    parts = _under(
        "partition",
        lambda: partitioner(
            labels[private], num_clients=config["num_clients"], num_classes=num_labels, key=key, **owners
        ),
    )
    if public is not None:
        rows = np.arange(len(labels))[private]
        parts = [rows[part] for part in parts]
    facts = data_room.manifest(labels, parts, num_labels)
    return Deal(dataset=dataset, parts=parts, labels=labels, num_labels=num_labels, facts=facts, public=public)


def _set_apart(count: int, total: int, key: Key) -> tuple[np.ndarray | None, Any]:
    """Rows that the server has, sorted, None for none; and what is left to deal, as an index."""
    _refuse(count >= total, "public", count, f"it must leave some of the {total} training examples to the clients")
    if not count:
        return None, slice(None)
    taken = np.zeros(total, np.bool_)
    taken[key.permutation(total).numpy()[:count]] = True
    return np.flatnonzero(taken), ~taken


def recorded(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a recorded run with some values replaced. Raises OmegaConf's errors, ConfigError."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.yaml; name the folder of a run")
    for override in overrides:
        if "=" not in override or override.startswith(("+", "~", "-")):
            raise ConfigError(f"{override!r} is not key=value; resume takes plain values, as in rounds=40")
    merged = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
    )
    assert isinstance(merged, DictConfig)
    return merged


def _unbuilt() -> Any:
    raise AssertionError("the model is not known before the data")


def _rate(lr: float, config: dict[str, Any]) -> LearningRate:
    return LearningRate(
        lr=lr,
        kind=config["lr_schedule"],
        decay=config["lr_decay"],
        every=config["lr_every"],
        warmup=config["lr_warmup"],
    )


def _trainer(config: dict[str, Any]) -> TrainerSpec:
    return TrainerSpec(
        learning_rate=_rate(config["lr"], config),
        batch_size=config["batch_size"],
        epochs=config["epochs"],
        steps=config["steps"],
        optim=Optim(
            name=config["optimizer"],
            momentum=config["momentum"],
            nesterov=config["nesterov"],
            weight_decay=config["weight_decay"],
            betas=(config["betas"][0], config["betas"][1]),
            eps=config["eps"],
            clip_norm=config["clip_norm"],
        ),
        engine=config["engine"],
    )


def _policies(config: dict[str, Any]) -> tuple[tuple[str, Policy[Any, Any]], ...]:
    """Inner to outer: personal ones, pruner, strategy, corrections, each in the order in which they were named."""
    found: list[tuple[str, Policy[Any, Any]]] = []
    norm = config["batch_norm"]
    nodes = [(f"personal.{name}", node) for name, node in config["personal"].items()]
    nodes += [("batch_norm", norm)] if norm in KEPT_NORMS or norm == "static" else []
    nodes += [("pruner", config["pruner"]), ("strategy", config["strategy"])]
    nodes += [(f"correction.{name}", node) for name, node in config["correction"].items()]
    for name, node in nodes:
        if name == "batch_norm":
            found.append((name, StaticNorm() if norm == "static" else FedBN(keep=KEPT_NORMS[norm])))
            continue
        policy = _make(node, name)
        if not isinstance(policy, Policy):
            raise ConfigError(f"{name}._target_ is {node['_target_']!r}; it must be a fedray.round.Policy")
        found.append((name, policy))
        if isinstance(policy, FedBN) and norm in (*KEPT_NORMS, "static"):
            raise ConfigError(
                f"{name} is fedbn and batch_norm is {norm!r}; both say what becomes of batch normalisation: set "
                "batch_norm=average, or personal=none"
            )
    return tuple(found)


def _wire(config: Mapping[str, Any]) -> Wire:
    """The chains of both directions, each stage a component of its own."""
    _only(config, ("down", "up", "entropy"), "wire")
    entropies = typing.get_args(Entropy)
    entropy: Any = config.get("entropy")
    if entropy not in entropies:
        raise ConfigError(f"wire.entropy is {entropy!r}; choose {', '.join(entropies)}")
    if entropy == "ans" and importlib.util.find_spec("constriction") is None:
        raise ConfigError("wire.entropy is 'ans'; it needs constriction: pip install 'fedray[compress]', or use zstd")
    ways = {}
    for name in ("down", "up"):
        group = f"wire.{name}"
        way = config.get(name)
        if not isinstance(way, Mapping):
            raise ConfigError(f"{group} is {way!r}; it holds chain, parts, feedback and decay, as in conf/wire")
        _only(way, ("chain", "parts", "feedback", "decay"), group)
        feedback, decay, parts = way.get("feedback", False), way.get("decay", 1.0), way.get("parts") or {}
        if not isinstance(parts, Mapping):
            raise ConfigError(f"{group}.parts is {parts!r}; it holds chains by the name of a part, as in docs/wire.md")
        _refuse(not isinstance(feedback, bool), f"{group}.feedback", feedback, "write true or false")
        _refuse(not conforms(decay, float), f"{group}.decay", decay, "it is a number above 0 and at most 1")
        ways[name] = Way(
            chain=_stages(way.get("chain"), f"{group}.chain"),
            parts={part: _stages(node, f"{group}.parts.{part}") for part, node in parts.items()},
            feedback=feedback,
            decay=float(decay),
        )
    return Wire(down=ways["down"], up=ways["up"], entropy=entropy)


def _stages(nodes: Any, group: str) -> dict[str, Any]:
    if nodes is not None and not isinstance(nodes, Mapping):
        raise ConfigError(f"{group} is {nodes!r}; it holds stages by name, as in conf/wire")
    stages = {str(name): _make(node, f"{group}.{name}") for name, node in (nodes or {}).items() if node is not None}
    Chain.of(stages, group)
    return stages


def _maker(
    node: dict[str, Any], shape: tuple[int, ...], num_classes: int, vocabulary: int | None, batch_norm: str
) -> Any:
    """A picklable maker of the model; facts of the data go where the model asks for them."""
    facts = {"shape": shape, "num_classes": num_classes, "vocabulary": vocabulary}
    init_from = node.get("init_from")
    target, arguments = _target({name: value for name, value in node.items() if name != "init_from"}, "model")
    arguments = {**{k: v for k, v in facts.items() if k in (_accepted(target) or [])}, **arguments}
    _check_arguments(target, arguments, "model")
    build = partial(target, **arguments)
    if batch_norm == "group":
        build = partial(group_normed, build)
    if init_from is not None:
        if not isinstance(init_from, Mapping):
            raise ConfigError(
                f"model.init_from is {init_from!r}; it holds source, head and freeze, as in model.init_from.source=RUN"
            )
        build = _under(
            "model.init_from",
            lambda: pretrained.prepare(build, init_from, shape=shape, num_classes=num_classes),
        )
    return build


def maker_of_run(facts: Mapping[str, Any]) -> Any:
    """The maker of the model of a recorded run, from its manifest. Its weights come from the run, not from where
    the run took them."""
    data, config = facts["data"], facts["config"]
    node = {name: value for name, value in config["model"].items() if name != "init_from"}
    return _maker(node, tuple(data["sample_shape"]), data["num_classes"], data["vocabulary"], config["batch_norm"])


def _try_model(task: Task, dataset: Dataset, spec: RunSpec) -> nn.Module:
    """Build the model once and run two samples through it, so that a misfit is found here."""
    target = spec.config["model"]["_target_"]
    try:
        module = task.module(spec.key.fold("model")).eval()
        with torch.no_grad():
            outputs = module(try_inputs(2, dataset.shape, dataset.vocabulary))
    except Exception as error:
        if dataset.vocabulary is not None:
            raise ConfigError(f"model._target_ is {target!r}; it cannot take tokens: {_for_tokens(dataset)}") from error
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model._target_ is {target!r}; it cannot take samples of shape {dataset.shape}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(
            f"model._target_ is {target!r}; it gives a {type(outputs).__name__}, and a tensor of logits is needed: "
            "wrap it in a module that returns them"
        )
    leading = (2, *dataset.shape) if dataset.objective == "next_token" else (2,)
    exact = dataset.objective == "regression"
    width = outputs.shape[-1] if outputs.dim() == len(leading) + 1 else 0
    if tuple(outputs.shape[:-1]) != leading or width < dataset.num_classes or (exact and width != dataset.num_classes):
        raise ConfigError(
            f"model._target_ is {target!r}; for two samples it gives shape {tuple(outputs.shape)}, and "
            f"{(*leading, dataset.num_classes)} {'outputs' if exact else 'logits'} are needed for data={dataset.name}"
            + (f": {_for_tokens(dataset)}" if dataset.vocabulary is not None else "")
        )
    return module


def _for_tokens(dataset: Dataset) -> str:
    fitting = "char_lstm or gpt" if dataset.objective == "next_token" else "lstm_classifier or transformer_classifier"
    return f"data={dataset.name} needs model={fitting.replace(' or ', ' or model=')}"


def _initial_mask(found: Mapping[str, torch.Tensor] | None, module: nn.Module) -> dict[str, torch.Tensor] | None:
    """Of the mask of a run that weights come from, what fits this model: a head that was replaced is whole."""
    if found is None:
        return None
    shapes = {name: parameter.shape for name, parameter in trainable(module).items()}
    fitting = {name: kept for name, kept in found.items() if shapes.get(name) == kept.shape}
    for name, kept in list(fitting.items()):
        if bool(trainable(module)[name].detach()[~kept].any()):
            del fitting[name]  # other weights than those of that run
    return fitting


def _cut(spec: RunSpec, layout: Layout) -> Mask | None:
    """What the model that a run starts from has lost of this layout; None for nothing."""
    given = {} if spec.initial_mask is None else spec.initial_mask
    mask = Mask.of(layout, {name: kept for name, kept in given.items() if name in layout.names})
    return None if bool(mask.flat.all()) else mask


def _check_goals(spec: RunSpec, module: nn.Module) -> None:
    """Refuse goals that no row will have."""
    goals = spec.goals
    idle = goals.min_delta > 0 and goals.patience is None
    _refuse(idle, "stop.min_delta", goals.min_delta, "it goes with stop.patience; set that too, or leave it at 0")
    if not goals.stops and not goals.targets and goals.metric == Goals().metric:
        return
    means = dict.fromkeys(spec.task.metrics, 1.0)
    main = spec.task.metrics[0]
    known = [f"client/{main}_{what}" for what in ("mean", "p10", "p90")]
    if has_global_model(module, spec):
        known += [f"test/{name}" for name in {**means, **spec.task.objective.derive(means)}]
    _refuse(goals.metric not in known, "stop.metric", goals.metric, f"this run has {', '.join(known)}")
    never = spec.evaluation.every == 0
    _refuse(never, "eval.every", 0, "stop.targets and stop.patience need evaluations, so set it to 1 or more")


def _population(dealt: Deal, config: dict[str, Any], spec: RunSpec) -> Population:
    dataset, parts = dealt.dataset, dealt.parts
    skew = component(config["skew"], "skew")
    augment = None
    if config["augment"]:
        stages = {name: _make(node, f"augment.{name}") for name, node in config["augment"].items() if node is not None}
        augment = _under("augment", lambda: Augment.of(stages))
    if skew is not None and dataset.vocabulary is not None:
        raise ConfigError(f"skew works on numbers, and data={dataset.name} has tokens; set skew=none")
    for group, change in (("skew", skew), ("augment", augment)):
        if change is not None:
            _under(group, lambda change=change: change.check(dataset.shape))
    if augment is not None:
        _under("augment", lambda: augment(torch.zeros(2, *dataset.shape), Key.of(0).torch()))
    tests = local_tests(
        train_labels=dealt.labels,
        parts=parts,
        test_labels=np.asarray(dataset.labels("test")[0]),
        num_classes=dealt.num_labels,
        key=spec.key.fold("local_tests"),
        train_owner=dataset.train_owner,
        test_owner=dataset.test_owner,
    )
    held: dict[str, np.ndarray] = {}
    if spec.validation:
        parts, apart = carve_validation(
            parts, dealt.labels, dealt.num_labels, spec.validation, spec.key.fold("validation")
        )
        held = {"held_rows": np.concatenate(apart), "held_starts": _starts(apart)}
    return Population(
        train_x=dataset.train_x,
        train_y=dataset.train_y,
        test_x=dataset.test_x,
        test_y=dataset.test_y,
        rows=np.concatenate(parts),
        starts=_starts(parts),
        local_rows=np.concatenate(tests),
        local_starts=_starts(tests),
        label_counts=data_room.histogram(dealt.labels, parts, dealt.num_labels),
        mean=np.array(dataset.mean, np.float32),
        std=np.array(dataset.std, np.float32),
        scale=float(dataset.scale),
        vocabulary=dataset.vocabulary,
        skew=skew,
        augment=augment,
        key=spec.key,
        public_rows=dealt.public,
        **held,
    )


def _sampler(config: dict[str, Any]) -> Any:
    sampler = _make(config["sampling"], "sampling")
    good = callable(sampler) and callable(getattr(sampler, "check", None))
    rule = "it must be a sampler, such as fedray.sim.sampling.Uniform"
    _refuse(not good, "sampling._target_", config["sampling"]["_target_"], rule)
    return sampler


def _availability(config: dict[str, Any]) -> Any:
    made, count = _make(config["availability"], "availability"), config["num_clients"]
    rule = (
        "called with round, num_clients and key it must give one boolean a client, as fedray.sim.sampling.Always does"
    )
    try:
        here = made(round=1, num_clients=count, key=Key.of(config["seed"]))
        good = isinstance(here, np.ndarray) and here.dtype == np.bool_ and here.shape == (count,)
    except TypeError:
        good = False
    _refuse(not good, "availability._target_", config["availability"]["_target_"], rule)
    return made


def _choices(choices: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """What was chosen of each group. Groups of several policies go by the names of these, however they were written."""
    found = {group: choice for group, choice in choices.items() if group in config}
    for group in ("personal", "correction") if choices else ():
        found[group] = "+".join(config[group]) or "none"
    return found


def _starts(parts: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *(len(part) for part in parts)])


def _run_id(config: dict[str, Any], data_digest: str) -> str:
    """A hash of what decides the result: not where it runs, how it is tracked, where the data lie or how long it is."""
    kept = {k: v for k, v in config.items() if k not in ("runtime", "tracker", "rounds", "name", "checkpoint")}
    rates = (_rate(1.0, config["trainer"]), _rate(1.0, config["server"]))
    if any(rate.depends_on_rounds for rate in rates):
        kept["rounds"] = config["rounds"]  # the rate of every round depends on the last
    every = config["eval"]["every"]
    if config["batch_norm"] == "static" and config["rounds"] % every:
        kept["rounds"] = config["rounds"]  # the last round is evaluated on top, and asking for statistics costs bytes
    if config["model"].get("init_from") is not None:
        weights = {k: v for k, v in config["model"]["init_from"].items() if k != "source"}
        kept["model"] = {
            **config["model"],
            "init_from": {**weights, "digest": pretrained.digest(config["model"]["init_from"])},
        }
    kept["data"] = {**{k: v for k, v in config["data"].items() if k != "path"}, "digest": data_digest}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# -- checks of the skeleton ------------------------------------------------------------------------------------------


def _check_keys(config: Mapping[str, Any], schema: type, prefix: str) -> None:
    """Refuse keys that the schema does not have; `+key=value` would let them in."""
    names = [f.name for f in dataclasses.fields(schema)]
    hints = typing.get_type_hints(schema)
    for key, value in config.items():
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting; {_closest(key, names, prefix)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(value, typing.cast(type, hints[key]), f"{prefix}{key}.")


def _check_skeleton(config: dict[str, Any]) -> None:
    evaluation, trainer, runtime = config["eval"], config["trainer"], config["runtime"]
    server, stop, schedules = config["server"], config["stop"], typing.get_args(Schedule)
    at_least: list[tuple[str, Any, int]] = [
        ("rounds", config["rounds"], 1),
        ("num_clients", config["num_clients"], 1),
        ("cohort", config["cohort"], 1),
        ("public", config["public"], 0),
        ("eval.every", evaluation["every"], 0),
        ("checkpoint.every", config["checkpoint"]["every"], 0),
        ("eval.batch_size", evaluation["batch_size"], 1),
        ("trainer.batch_size", trainer["batch_size"], 1),
        ("trainer.lr_every", trainer["lr_every"], 1),
        ("trainer.lr_warmup", trainer["lr_warmup"], 0),
        ("server.lr_every", server["lr_every"], 1),
        ("server.lr_warmup", server["lr_warmup"], 0),
    ]
    if stop["patience"] is not None:
        at_least.append(("stop.patience", stop["patience"], 1))
    for name in ("epochs", "steps"):
        if trainer[name] is not None:
            at_least.append((f"trainer.{name}", trainer[name], 0))
    if runtime["num_cpus"] is not None:
        at_least.append(("runtime.num_cpus", runtime["num_cpus"], 1))
    for name, value, least in at_least:
        _refuse(value < least, name, value, f"it must be at least {least}")
    _refuse(
        config["cohort"] > config["num_clients"],
        "cohort",
        config["cohort"],
        f"it must be at most num_clients, which is {config['num_clients']}; lower cohort or raise num_clients",
    )
    _refuse(
        "/" in config["name"] or config["name"].strip(".") == "",
        "name",
        config["name"],
        "it names a folder below outputs: no slash, not empty, not only dots",
    )
    clients = evaluation["clients"]
    good = clients in ("cohort", "all") or (_is_int(clients) and 1 <= clients <= config["num_clients"])
    _refuse(not good, "eval.clients", clients, f"write cohort, all or a number from 1 to {config['num_clients']}")
    both = (trainer["epochs"] is None) == (trainer["steps"] is None)
    _refuse(
        both,
        "trainer.steps",
        trainer["steps"],
        f"exactly one of trainer.epochs (now {trainer['epochs']}) and trainer.steps is set; set the other to null",
    )
    for name, choices in (
        ("optimizer", ("sgd", "adam", "adamw")),
        ("lr_schedule", schedules),
        ("engine", ("auto", "eager", "traced")),
    ):
        _refuse(trainer[name] not in choices, f"trainer.{name}", trainer[name], f"choose one of {', '.join(choices)}")
    for name, low, high in (
        ("lr", 0.0, math.inf),
        ("lr_decay", 0.0, 1.0),
        ("momentum", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
        ("eps", 0.0, math.inf),
        ("clip_norm", 0.0, math.inf),
    ):
        value = trainer[name]
        if value is None:
            continue
        good = (
            (low <= value < high)
            if name in ("momentum", "weight_decay")
            else (low < value <= high and value < math.inf)
        )
        bound = "below 1" if name == "momentum" else "at most 1" if name == "lr_decay" else "finite"
        start = "at least 0" if name in ("momentum", "weight_decay") else "above 0"
        _refuse(not good, f"trainer.{name}", value, f"it must be {start} and {bound}")
    if trainer["nesterov"] and not (trainer["optimizer"] == "sgd" and trainer["momentum"] > 0):
        raise ConfigError("trainer.nesterov is True; it needs trainer.optimizer=sgd and trainer.momentum above 0")
    if trainer["optimizer"] != "sgd" and trainer["momentum"]:
        raise ConfigError(
            f"trainer.momentum is {trainer['momentum']}; {trainer['optimizer']} has no momentum: set trainer.betas"
        )
    _refuse(
        server["lr_schedule"] not in schedules,
        "server.lr_schedule",
        server["lr_schedule"],
        f"choose one of {', '.join(schedules)}",
    )
    good = 0 < server["lr_decay"] <= 1
    _refuse(not good, "server.lr_decay", server["lr_decay"], "it must be above 0 and at most 1")
    good = 0 <= config["validation"] < 1
    _refuse(not good, "validation", config["validation"], "it is a share of each client's data, from 0 to below 1")
    _refuse(
        config["batch_norm"] not in BATCH_NORMS,
        "batch_norm",
        config["batch_norm"],
        f"choose one of {', '.join(BATCH_NORMS)}",
    )
    if config["batch_norm"] == "static" and evaluation["every"] == 0:
        raise ConfigError(
            "eval.every is 0; batch_norm=static has its statistics from evaluations, so set it to 1 or more, or take "
            "batch_norm=average"
        )
    bad = any(not math.isfinite(target) for target in stop["targets"])
    _refuse(bad, "stop.targets", stop["targets"], "write numbers, as in [0.9,0.95]")
    bad = stop["at_targets"] and not stop["targets"]
    _refuse(bad, "stop.at_targets", True, "it needs stop.targets, as in stop.targets=[0.95]")
    bad = not 0 <= stop["min_delta"] < math.inf
    _refuse(bad, "stop.min_delta", stop["min_delta"], "it must be 0 or more")
    for group, node in (("trainer", trainer), ("server", server)):
        idle = node["lr_decay"] != 1 and node["lr_schedule"] != "step"
        rule = f"it goes with {group}.lr_schedule=step; set that too, or leave it at 1.0"
        _refuse(idle, f"{group}.lr_decay", node["lr_decay"], rule)
    for name, plain in (("betas", [0.9, 0.999]), ("eps", 1e-8)):
        idle = trainer["optimizer"] == "sgd" and trainer[name] != plain
        _refuse(idle, f"trainer.{name}", trainer[name], "sgd has none; set trainer.optimizer=adam, or leave it out")
    betas = trainer["betas"]
    good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    _refuse(not good, "trainer.betas", betas, "write two numbers from 0 to below 1, as in [0.9,0.999]")
    _refuse(runtime["kind"] not in ("ray", "inline"), "runtime.kind", runtime["kind"], "choose ray or inline")
    _refuse(
        runtime["device"] not in ("auto", "cpu", "cuda"),
        "runtime.device",
        runtime["device"],
        "choose auto, cpu or cuda",
    )
    shown = ("auto", "on", "off")
    _refuse(runtime["dashboard"] not in shown, "runtime.dashboard", runtime["dashboard"], "choose auto, on or off")
    memory_gb = runtime["memory_gb"]
    good = memory_gb in ("auto", None) or (conforms(memory_gb, float) and 0 < memory_gb < math.inf)
    _refuse(not good, "runtime.memory_gb", memory_gb, "write auto, null or a number of gigabytes above 0")
    bad = memory_gb not in ("auto", None) and sys.platform != "linux"
    _refuse(bad, "runtime.memory_gb", memory_gb, "only Linux counts the memory of a process; set it to null")
    for name in ("clients_per_actor", "slots"):
        value = runtime[name]
        good = value == "auto" or (_is_int(value) and value >= 1)
        _refuse(not good, f"runtime.{name}", value, "write auto or a number, at least 1")
    progress = config["tracker"]["progress"]
    modes = ("auto", "live", "plain", "none")
    _refuse(progress not in modes, "tracker.progress", progress, f"choose one of {', '.join(modes)}")


def _refuse(bad: bool, key: str, value: object, rule: str) -> None:
    if bad:
        raise ConfigError(f"{key} is {value!r}; {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -- components ------------------------------------------------------------------------------------------------------


def component(node: Mapping[str, Any], group: str) -> Any:
    """The component of a group that may be empty; None then."""
    return _make(node, group) if node else None


def profile(group: str, name: str, config_dir: str | None = None) -> Any:
    """The component of conf/<group>/<name>.yaml, or of the same file in config_dir; None for `none`.

    Raises ConfigError.
    """
    folders = [Path(conf_folder()) / group, *([] if config_dir is None else [Path(config_dir) / group])]
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(files)}"
        raise ConfigError(f"{group} profile {name!r} does not exist; {hint}")
    node = OmegaConf.to_container(OmegaConf.load(files[name]))
    return component(typing.cast(dict[str, Any], node), group)


def search(folder: Path) -> str:
    """The override with which Hydra looks into a folder as well, whatever characters its name has."""
    name = str(folder.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.searchpath=['file://{name}']"


def composed(group: str, path: Path, overrides: Sequence[str]) -> DictConfig:
    """The whole configuration with one file of a user's own folder <folder>/<group>/, as --config-dir composes it.

    Values are not resolved and may be added to. Raises ConfigError where the name is taken by a file of fedray's.
    """
    ours = Path(conf_folder()).resolve() / group / path.name
    added = []
    if path != ours:
        if ours.is_file():
            raise ConfigError(f"{path} has the name of a file of fedray's, and --config-dir takes that one; rename it")
        added = [search(path.parent.parent)]
    try:
        with initialize_config_dir(conf_folder(), version_base="1.3"):
            cfg = compose("config", overrides=[f"{group}={path.stem}", *overrides, *added])
    except HydraException as error:
        raise ConfigError(f"{path} cannot be composed: {' '.join(str(error).split())}") from error
    OmegaConf.set_struct(cfg, False)
    return cfg


def _make(node: Any, group: str) -> Any:
    """Make the component of a group, with its arguments checked first."""
    target, arguments = _target(node, group)
    plain = {k: v for k, v in arguments.items() if not (isinstance(v, Mapping) and "_target_" in v)}
    _check_arguments(target, arguments, group, typed=plain)
    if len(plain) == len(arguments) or "_partial_" in node or node.get("_recursive_") is False:
        return _under(group, lambda: instantiate(node, _convert_="all"))
    # One by one, so that what is wrong inside is named by its whole path.
    made = {k: v if k in plain else _make(v, f"{group}.{k}") for k, v in arguments.items()}
    return _under(group, lambda: target(**made))


def _under(group: str, call: Any) -> Any:
    """Call; errors of ours get the group's name before the field's, others become one sentence."""
    try:
        return call()
    except Exception as raised:
        error: BaseException = raised
        while isinstance(error, HydraException) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, FieldError):
            raise error.under(group) from raised
        # Components that name their group themselves know nothing of the one that they stand in.
        root, _, inside = group.partition(".")
        if isinstance(error, ConfigError) and inside and re.match(rf"{root}\.\w+ is ", str(error)):
            raise ConfigError(f"{group}{str(error).removeprefix(root)}") from raised
        if isinstance(error, ConfigError):
            raise error from raised
        raise ConfigError(f"{group} cannot be made: {type(error).__name__}: {_first_line(error)}") from raised


class NoCode(ConfigError):
    """A `_target_` that cannot be imported. `found` says in other words where code may lie."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"{sentence}. Code beside --config-dir can")
        self.sentence = sentence

    def found(self, where: str) -> ConfigError:
        return ConfigError(f"{self.sentence}. Code {where} can")


def _no_code(group: str, path: str, error: BaseException) -> ConfigError:
    """Why a `_target_` is none: there is no such module, or nothing of that name in it."""
    within, _, name = path.rpartition(".")
    module = sys.modules.get(within)
    if module is None or hasattr(module, name):
        return NoCode(f"{group}._target_ is {path!r}; it cannot be imported ({_first_line(error)})")
    near = difflib.get_close_matches(name, [one for one in vars(module) if not one.startswith("_")], n=1)
    hint = f"did you mean {near[0]}?" if near else "name a class or a function of it"
    return ConfigError(f"{group}._target_ is {path!r}; {within} has no {name}: {hint}")


def _target(node: Any, group: str) -> tuple[Any, dict[str, Any]]:
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{group} names no _target_; choose one of the group, or write {group}._target_=module.Name")
    path = node["_target_"]
    try:
        target = get_object(path)
    except Exception as error:
        raise _no_code(group, path, error.__cause__ or error) from error
    if not callable(target):
        raise ConfigError(f"{group}._target_ is {path!r}; it must be a class or a function")
    return target, {
        str(k): v for k, v in node.items() if k not in ("_target_", "_convert_", "_recursive_", "_partial_")
    }


def _parameters(target: Any) -> list[inspect.Parameter] | None:
    """The parameters of a class or function; None where it does not tell, as some that are built in."""
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError:
        return None


def _accepted(target: Any) -> list[str] | None:
    """Names of the arguments that a target takes; None if it takes any."""
    parameters = _parameters(target)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _check_arguments(
    target: Any, arguments: dict[str, Any], group: str, typed: Mapping[str, Any] | None = None
) -> None:
    name = getattr(target, "__qualname__", str(target))
    accepted = _accepted(target)
    for argument in arguments:
        if accepted is not None and argument not in accepted:
            raise ConfigError(
                f"{group}.{argument} is not a setting of {name}; {_closest(argument, accepted, group + '.')}"
            )
    for parameter in _parameters(target) or []:
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in arguments:
            raise ConfigError(
                f"{group}.{parameter.name} is not set; {name} needs it: write {group}.{parameter.name}=..."
            )
    hints = _hints(target)
    for argument, value in (arguments if typed is None else typed).items():
        if argument in hints and not conforms(value, hints[argument]):
            raise ConfigError(f"{group}.{argument} is {value!r}; it must be {_readable(hints[argument])}")


def _hints(target: Any) -> dict[str, Any]:
    """Resolved annotations of a class's or function's arguments; none where they cannot be resolved."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def conforms(value: Any, annotation: Any) -> bool:
    """Whether a value from a configuration can be an argument annotated so; unknown annotations admit anything."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool or annotation is str:
        return isinstance(value, annotation)
    if annotation is int:
        return _is_int(value)
    if annotation is float:
        return (_is_int(value) or isinstance(value, float)) and not math.isnan(value)
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        element = [a for a in arguments if a is not Ellipsis]
        return not element or all(any(conforms(v, a) for a in element) for v in value)
    if origin in (dict, Mapping) or annotation is dict:
        return isinstance(value, Mapping)
    return True


def _readable(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_readable(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (list, tuple, Sequence):
        names_of = {int: "integers", float: "numbers", str: "texts"}
        kinds_of = " or ".join(names_of[a] for a in arguments if a in names_of)
        return f"a list of {kinds_of}" if kinds_of else "a list, as in [1,2]"
    return str(annotation)


def _only(node: Mapping[str, Any], names: Sequence[str], group: str) -> None:
    for key in node:
        if key not in names:
            raise ConfigError(f"{group}.{key} is not a setting; {_closest(key, names, group + '.')}")


def _closest(key: str, names: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    there = f"there are {', '.join(names)}" if names else "there are none here"
    return f"{there}; where an experiment sets it, add ~{prefix}{key}" if prefix else there


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
