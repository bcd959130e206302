"""The named settings of papers compose, and deal what the papers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedray.config import conf_folder, register
from fedray.data.augment import Augment
from fedray.data.partition import histogram
from fedray.keys import Key

CONF = Path(conf_folder())
LABELS = np.repeat(np.arange(10), 6000)


def composed(*overrides):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def dealt(cfg, **known):
    partition = instantiate(OmegaConf.to_container(cfg.partition, resolve=True), _convert_="all")
    return partition(LABELS, num_clients=cfg.num_clients, num_classes=10, key=Key.of(cfg.seed), **known)


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_composes_with_a_folder_of_data(name):
    cfg = composed(f"+experiment={name}", "data.path=/some/folder")
    assert not OmegaConf.missing_keys(cfg)
    assert cfg.cohort <= cfg.num_clients
    assert cfg.name == name


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_says_where_it_is_from(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("name", names("partition"))
def test_every_partition_of_the_group_deals(name):
    cfg = composed(f"partition={name}")
    known = {"owners": np.arange(60_000) % 300} if name == "natural" else {}
    parts = dealt(cfg, **known)
    assert len(parts) == cfg.num_clients
    assert sum(len(part) for part in parts) == 60_000


def test_sizes_can_be_set_on_the_command_line():
    sizes = "partition.sizes={_target_: fedray.data.LogNormal, sigma: 1.0}"
    parts = dealt(composed("partition=dirichlet_prior", sizes))
    assert len({len(part) for part in parts}) > 15


def test_mcmahan_has_100_clients_of_600_with_two_digits_or_so():
    counts = histogram(LABELS, dealt(composed("+experiment=mcmahan_shards")), 10)
    assert counts.shape == (100, 10)
    assert set(counts.sum(axis=1)) == {600}
    assert (counts > 0).sum(axis=1).max() == 2


def test_lotteryfl_has_400_clients_of_2_classes_with_20_images():
    counts = histogram(LABELS, dealt(composed("+experiment=lotteryfl_2x20")), 10)
    assert counts.shape == (400, 10)
    assert (np.sort(counts, axis=1)[:, -3:] == [0, 20, 20]).all()


def test_heterofl_has_100_clients_of_two_classes_that_share_all_the_data():
    counts = histogram(LABELS, dealt(composed("+experiment=heterofl_2class")), 10)
    assert counts.shape == (100, 10)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert counts.sum() == 60_000


def test_dispfl_is_dirichlet_with_0_3_over_100_clients():
    cfg = composed("+experiment=dispfl")
    assert (cfg.partition.alpha, cfg.num_clients, cfg.trainer.lr_decay) == (0.3, 100, 0.998)
    assert len(dealt(cfg)) == 100


@pytest.mark.parametrize("name", names("skew"))
def test_every_skew_of_the_group_can_be_made(name):
    node = OmegaConf.to_container(OmegaConf.load(CONF / "skew" / f"{name}.yaml"))
    assert node == {} if name == "none" else callable(instantiate(node))


@pytest.mark.parametrize("name", names("augment"))
def test_every_augmentation_of_the_group_can_be_made(name):
    node = OmegaConf.to_container(OmegaConf.load(CONF / "augment" / f"{name}.yaml"))
    augment = Augment.of({stage: instantiate(each) for stage, each in node.items()})
    assert len(augment.stages) == len(node) == {"none": 0, "cifar": 2}[name]
