"""Weights & Biases: a view of a run's rows. The only module of the room that imports wandb, and only when it is used.

One process logs one run: the driver. wandb is imported inside functions because it takes about a second and starts a
helper process, which no client actor should pay for. It is not crash safe either, so the record is the store.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedray.errors import ConfigError, RunError
from fedray.track.store import recorded

WandbMode = Literal["online", "offline", "disabled"]

CLIENT_HISTOGRAM = "client/accuracy_hist"
LAYER_HISTOGRAM = "model/layer_sparsity_hist"
LAYER_PREFIX = "model/layer_sparsity/"


@dataclass(frozen=True)
class WandbConfig:
    """The settings under `tracker.wandb`.

    mode:             "offline" writes into the run directory, "online" needs a key, "disabled" imports nothing.
    project, entity:  where the run belongs; entity None is the user's default.
    group, job_type, tags: labels; group None is no group.
    name:             None takes the id of the run.
    histograms_every: rounds between histograms; 0 is never.
    """

    mode: WandbMode = "offline"
    project: str = "fedray"
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    tags: tuple[str, ...] = ()
    name: str | None = None
    histograms_every: int = 10

    def __post_init__(self) -> None:
        """Raises ConfigError if `mode` is unknown or `histograms_every` negative."""
        if self.mode not in get_args(WandbMode):
            modes = ", ".join(get_args(WandbMode))
            raise ConfigError(f"tracker.wandb.mode={self.mode!r} is unknown: use one of {modes}.")
        if self.histograms_every < 0:
            raise ConfigError(
                f"tracker.wandb.histograms_every={self.histograms_every} is negative, but it counts rounds: use 0 for "
                "never or a positive number."
            )


class WandbTracker:
    """One W&B run, from construction to `finish`; with mode "disabled" every call does nothing."""

    def __init__(self, config: WandbConfig, *, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> None:
        """Start the run.

        run_dir:    W&B writes into its folder `wandb`.
        run_id:     the id of the run in W&B.
        run_config: the resolved configuration, nested.
        Raises ConfigError if mode is "online" and no API key is configured, RunError if wandb fails otherwise.
        """
        self._config = config
        self._run: Any = None
        if config.mode == "disabled":
            return
        # Reports of wandb's own faults to its makers are off unless the user asked for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = wandb.init(
                mode=config.mode,
                project=config.project,
                entity=config.entity,
                group=config.group,
                job_type=config.job_type,
                tags=list(config.tags),
                name=config.name if config.name is not None else run_id,
                id=run_id,
                dir=run_dir,
                config=recorded(run_config),
                # Several runs may live in one process, and a resumed one goes on under its id.
                reinit="create_new",
                resume="allow",
                # init writes into its settings: an object that is used twice makes the second run fail.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    x_disable_meta=True,
                    disable_git=True,
                    disable_code=True,
                ),
            )
        except wandb.errors.UsageError as error:
            if config.mode == "online" and "API key" in str(error):
                raise ConfigError(
                    "tracker.wandb.mode=online needs an API key and none is configured: run `wandb login`, or set "
                    "tracker.wandb.mode=offline."
                ) from error
            raise _init_failed(config, error) from error
        except wandb.errors.Error as error:
            raise _init_failed(config, error) from error
        # wandb counts its own steps, and from 0 again after a resume: `round` is the axis of every metric.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, row: Mapping[str, Any], client_accuracies: Sequence[float] | None = None) -> None:
        """Log a row as the store records it, so NaN and infinity as null.

        client_accuracies: one value per client, for the histogram `client/accuracy_hist`; the sparsities of the
        layers in the row make `model/layer_sparsity_hist`. Both every `histograms_every` rounds.
        """
        if self._run is None:
            return
        values = recorded(row)
        every = self._config.histograms_every
        if every > 0 and row["round"] % every == 0:
            layers = [value for key, value in row.items() if key.startswith(LAYER_PREFIX)]
            for key, sample in ((CLIENT_HISTOGRAM, client_accuracies), (LAYER_HISTOGRAM, layers)):
                # A histogram has no place for a value that is not finite, nor for no values at all.
                finite = [value for value in sample or () if value is not None and math.isfinite(value)]
                if finite:
                    values[key] = _histogram(finite)
        self._run.log(values)

    def finish(self, summary_row: Mapping[str, Any] | None, failed: bool) -> None:
        """Close the run; its summary becomes the numbers and strings of `summary_row`, its state follows `failed`."""
        run, self._run = self._run, None
        if run is None:
            return
        if summary_row is not None:
            run.summary.update({key: value for key, value in recorded(summary_row).items() if value is not None})
        run.finish(exit_code=1 if failed else 0)


def _histogram(values: list[float]) -> Any:
    import wandb

    return wandb.Histogram(values)


def _init_failed(config: WandbConfig, error: Exception) -> RunError:
    return RunError(
        f"W&B could not start with tracker.wandb.mode={config.mode} ({error}): set tracker.wandb.mode=offline or "
        "disabled."
    )
