"""Weights & Biases: a view of a run's rows. The only module of the room that imports wandb, and only when it is used.

One process logs one run: the driver. wandb is imported inside functions because it takes about a second and starts a
helper process, which no client actor should pay for. It is not crash safe either, so the record is the store, and
nothing that goes wrong with W&B once a run has begun ends the run: it is said, and `fedray wandb sync` makes it good.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedray.errors import ConfigError, RunError
from fedray.track.store import read_clients, read_rows, recorded
from fedray.track.wandb_content import (
    LAYER_PREFIX,
    Table,
    artifact_files,
    client_scores,
    client_table,
    labels_of,
    layer_table,
)

WandbMode = Literal["online", "offline", "disabled"]
WandbTables = Literal["all", "layers", "clients", "none"]
WandbArtifacts = Literal["none", "masks", "final"]

CLIENT_HISTOGRAM = "client/accuracy_hist"
LAYER_HISTOGRAM = "model/layer_sparsity_hist"
MAIN_METRICS = ("test/accuracy", "test/mse")
"""What the clients' histogram is about: the first of these that client lines have."""
NO_GROUP = "none"
FOLDER = "wandb"
REPLACED = "replaced"
SENT_FILE = "sent.json"
EXIT_CODES = {"finished": 0, "interrupted": 130}
UNSHARED = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SERVICE")
"""Variables that stay where they are: secrets, and the address of a process's own helper."""


def wandb_environment() -> dict[str, str]:
    """The variables of this process that wandb reads, without keys: what a driver in an older process must be told."""
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_") and name not in UNSHARED}


@dataclass(frozen=True)
class WandbConfig:
    """The settings under `tracker.wandb`.

    mode:             "offline" writes into the run directory, "online" needs a key, "disabled" imports nothing.
    project, entity:  where the run belongs; entity None is the user's default.
    group:            None is the experiment's name and a hash of the configuration without its seed; "none" is none.
    job_type, tags:   labels; tags come on top of pruner, strategy, data set, correction and personal method.
    name:             None tells method, sparsity, alpha and seed.
    histograms_every: rounds between histograms; 0 is never.
    tables:           which tables are made at the end.
    artifacts:        what of the final model is kept at W&B: "none", "masks", or "final" (model and mask).
    timeout_s:        seconds that the start and the end of a run wait for W&B.
    """

    mode: WandbMode = "offline"
    project: str = "fedray"
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    tags: tuple[str, ...] = ()
    name: str | None = None
    histograms_every: int = 10
    tables: WandbTables = "all"
    artifacts: WandbArtifacts = "none"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Raises ConfigError if a choice is unknown, a number out of range or a label longer than W&B takes."""
        for name, choices in (("mode", WandbMode), ("tables", WandbTables), ("artifacts", WandbArtifacts)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"tracker.wandb.{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
        if self.histograms_every < 0:
            raise ConfigError(
                f"tracker.wandb.histograms_every is {self.histograms_every}; it counts rounds, so it must be 0 for "
                "never or more"
            )
        if not (0 < self.timeout_s < math.inf):
            raise ConfigError(f"tracker.wandb.timeout_s is {self.timeout_s}; it must be a number of seconds above 0")
        if not self.project or re.search(r"[/\\#?%:]", self.project) or len(self.project) > 128:
            raise ConfigError(
                f"tracker.wandb.project is {self.project!r}; it must have 1 to 128 characters, none of / \\ # ? % :"
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise ConfigError(f"tracker.wandb.tags has {tag!r}; W&B takes tags of 1 to 64 characters")


@dataclass
class _Link:
    """An open run of W&B.

    sent: the last round that W&B has; digest: what it says of that round, None if nobody knows. steps: rows that it had
    before, rows: that it got since.
    """

    run: Any
    steps: int = 0
    sent: int = 0
    digest: str | None = None
    rows: int = 0


class WandbTracker:
    """One W&B run, from construction to `finish`; with mode "disabled" every call does nothing.

    failure: why W&B was given up, a clause; None while all is well.
    outage: whether it was W&B that failed, and not this run that does not fit what W&B has.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: Path,
        run_id: str,
        manifest: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the run, or go on with it where W&B knows its id.

        run_dir:     W&B writes into its folder `wandb`.
        run_id:      the id of the run in W&B.
        manifest:    of the run, for its labels; its `config` is shown, nested, and its `choices`.
        environment: `wandb_environment` of the process that the user started; None is this one's.
        Raises ConfigError where W&B refuses the key or the project. Where it cannot be reached, `failure` says so.
        """
        self._config, self._folder, self._id = config, Path(run_dir), run_id
        self._link: _Link | None = None
        self.failure: str | None = None
        self.outage = False
        if config.mode == "disabled":
            return
        _adopt(wandb_environment() if environment is None else environment)
        if config.mode == "offline":
            _set_aside(self._folder / FOLDER, run_id)
        try:
            try:
                self._link = self._start(manifest)
            except Exception as error:
                # A start that failed leaves its id taken in the helper process, until that ends.
                if "is in use" not in str(error) or _open_runs:
                    raise
                _forget_helper()
                self._link = self._start(manifest)
        except ConfigError:
            raise
        except Exception as error:
            self._give_up("could not start", error)
        else:
            _open_runs.add(id(self))

    @property
    def open(self) -> bool:
        """Whether W&B still takes rows."""
        return self._link is not None

    def _start(self, manifest: Mapping[str, Any]) -> _Link:
        import wandb

        config, labels = self._config, labels_of(manifest)
        group = labels.group if config.group is None else config.group
        shown = dict(manifest["config"])
        if manifest.get("choices"):
            shown["choices"] = manifest["choices"]
        sweep = bool(os.environ.get("WANDB_SWEEP_ID"))  # its agent has decided which run of which project this is
        if sweep:
            # What it sweeps takes the place of ours, so that `pruner: feddst` hides the settings of the pruner.
            shown["settings"] = manifest["config"]
        try:
            run = wandb.init(
                mode=config.mode,
                project=None if sweep else config.project,
                entity=None if sweep else config.entity,
                id=None if sweep else self._id,
                group=None if group == NO_GROUP else group,
                job_type=config.job_type,
                tags=list(dict.fromkeys([*labels.tags, *config.tags])),
                name=labels.name if config.name is None else config.name,
                dir=self._folder,
                config=recorded(shown),
                # A sweep's agent has set some of the configuration already, and a resumed run has all of it.
                allow_val_change=True,
                # Several runs may live in one process, and a resumed one goes on under its id.
                reinit="create_new",
                resume=None if sweep else "allow",
                # init writes into its settings: an object that is used twice makes the second run fail.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    x_disable_meta=True,
                    disable_git=True,
                    disable_code=True,
                    init_timeout=config.timeout_s,
                    finish_timeout=config.timeout_s,
                    finish_timeout_raises=True,
                ),
            )
        except wandb.errors.Error as error:
            refusal = _refusal(config, error)
            if refusal is not None:
                raise refusal from error
            raise
        # wandb counts its own steps, and from 0 again after an offline run is resumed: `round` is the axis.
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        if not run.resumed:
            return _Link(run=run)
        # The summary travels faster than the history, so it may be ahead of what has arrived; and the history of an
        # older version may hold a round twice.
        known = dict(run.summary)
        steps, said = _rows_at(run), int(known.get("round") or 0)
        sent = min(steps, said)
        return _Link(run=run, steps=steps, sent=sent, digest=known.get("digest") if sent == said else None)

    def catch_up(self, before_row: Callable[[], None] | None = None) -> int:
        """Send the rows of the store that W&B does not have; returns how many. before_row: called before each.

        Raises RunError where the store cannot be read.
        """
        link = self._link
        if link is None:
            return 0
        rows, lines = read_rows(self._folder), read_clients(self._folder)
        metric = next((name for name in MAIN_METRICS if any(name in line for line in lines)), MAIN_METRICS[0])
        scores = client_scores(lines, metric)
        before = link.rows
        for row in rows:
            if not self.open:
                break
            if before_row is not None and row["round"] > link.sent:
                before_row()
            self.log(row, scores.get(row["round"]))
        return link.rows - before

    def log(self, row: Mapping[str, Any], client_accuracies: Sequence[float] | None = None) -> None:
        """Log a row as the store records it, so NaN and infinity as null; one that W&B has already is left out.

        client_accuracies: one value per client, for the histogram `client/accuracy_hist`; the sparsities of the
        layers in the row make `model/layer_sparsity_hist`. Both every `histograms_every` rounds.
        """
        link = self._link
        if link is None:
            return
        if row["round"] <= link.sent:
            if row["round"] == link.sent and link.digest not in (None, row.get("digest")):
                self._give_up(
                    "was given up",
                    f"its project {self._config.project} has other results for run {self._id}, of another version of "
                    "the code: delete that run there, or set tracker.wandb.project",
                )
            return
        values = recorded(row)
        every = self._config.histograms_every
        try:
            if every > 0 and row["round"] % every == 0:
                layers = [value for key, value in row.items() if key.startswith(LAYER_PREFIX)]
                for key, sample in ((CLIENT_HISTOGRAM, client_accuracies), (LAYER_HISTOGRAM, layers)):
                    # A histogram has no place for a value that is not finite, nor for no values at all.
                    finite = [value for value in sample or () if value is not None and math.isfinite(value)]
                    if finite:
                        values[key] = _histogram(finite)
            link.run.log(values)
        except Exception as error:
            self._give_up(f"stopped before round {row['round']}", error)
            return
        link.sent, link.digest = row["round"], row.get("digest")
        link.rows += 1

    def finish(self, summary_row: Mapping[str, Any] | None, status: str, error: str | None = None) -> None:
        """Close the run.

        summary_row: its numbers and strings become the summary; None leaves that of the last row logged.
        status, error: of the manifest; a run that has not finished is marked failed.
        """
        link, self._link = self._link, None
        if link is None:
            return
        _open_runs.discard(id(self))
        try:
            with _staged(self._folder / FOLDER):
                self._finish(link, dict(summary_row or {}), status, error)
        except Exception as problem:
            self._link = link
            self._give_up("could not be finished", problem)
            return
        if self._config.mode == "online":
            lack = _unconfirmed(link, self._config.timeout_s)
            if lack is not None:
                self._give_up("did not take all", lack)
                return
        self._mark(link, status)

    def _finish(self, link: _Link, row: Mapping[str, Any], status: str, error: str | None) -> None:
        import wandb

        run, tables = link.run, self._config.tables
        values = {key: value for key, value in recorded(row).items() if value is not None}
        values["run/status"] = status
        if error is not None:
            values["run/error"] = error
        # Tables go into the summary: logged, each would be a row of the history that the store does not have.
        if tables in ("all", "layers"):
            values |= _table("table/layers", layer_table(self._folder, row))
        if tables in ("all", "clients"):
            values |= _table("table/clients", client_table(self._folder))
        run.summary.update(values)
        kinds = artifact_files(self._folder, self._config.artifacts) if status == "finished" else {}
        for kind, files in kinds.items():
            facts = {key: row[key] for key in ("round", "test/accuracy", "model/sparsity", "digest") if key in row}
            artifact = wandb.Artifact(f"{run.id}-{kind}", type=kind, metadata=recorded(facts))
            for path in files:
                artifact.add_file(str(path), policy="immutable")  # no copy: these files stay as they are
            run.log_artifact(artifact)
        run.finish(exit_code=EXIT_CODES.get(status, 1))

    def _mark(self, link: _Link, status: str) -> None:
        """Note in the run directory what W&B has now, so that a later sync need not ask."""
        if os.environ.get("WANDB_SWEEP_ID"):
            return
        path = self._folder / FOLDER / SENT_FILE
        known = sent_of(self._folder)
        known[destination(self._config)] = {"round": link.sent, "digest": link.digest, "status": status}
        temporary = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # without it the next sync asks W&B
            temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)

    def _give_up(self, what: str, why: object) -> None:
        link, self._link = self._link, None
        _open_runs.discard(id(self))
        reason = " ".join(str(why).split()) or type(why).__name__
        self.outage = not isinstance(why, str)
        self.failure = f"W&B {what} ({reason[:300].rstrip('.')})"
        if link is not None and isinstance(why, str):
            with contextlib.suppress(Exception):
                link.run.finish()
        # A helper process that died is of no use to the next run of this process either.
        if isinstance(why, ConnectionError) or type(why).__name__.startswith("Mailbox"):
            _forget_helper()


_open_runs: set[int] = set()
"""Trackers of this process that have a run at W&B: its helper process is theirs together."""


def _forget_helper() -> None:
    """Let the next start have a fresh helper process."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown(exit_code=1)


def _unconfirmed(link: _Link, timeout_s: float) -> Exception | None:
    """Ask W&B how many rows it has: uploads that it refused raise nothing. None if it has all.

    It may take a moment to show what it took, so it is asked again for `timeout_s` seconds.
    """
    run, until, wanted = link.run, time.monotonic() + timeout_s, link.steps + link.rows
    while True:
        try:
            found = _rows_at(run)
        except Exception as error:
            return error
        if found >= wanted:
            return None
        if time.monotonic() >= until:
            return RunError(f"it has {found} of {wanted} rows")
        time.sleep(min(1.0, timeout_s / 4))


def _rows_at(run: Any) -> int:
    """How many rows of a run W&B has, asked of it; an offline run begins with none."""
    import wandb

    if run.settings.mode == "offline":
        return 0
    return int(wandb.Api().run(f"{run.entity}/{run.project}/{run.id}").history_line_count)


def destination(config: WandbConfig) -> str:
    """What a mark is about: the offline folder, or a project of a server."""
    if config.mode == "offline":
        return "offline"
    import wandb

    return "/".join([str(wandb.setup().settings.base_url), config.entity or "", config.project])


def sent_of(run_dir: Path) -> dict[str, Any]:
    """What `finish` noted of each destination: the last round and its digest, the status. Empty without a note, or with
    one that cannot be read."""
    try:
        known = json.loads((run_dir / FOLDER / SENT_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _adopt(environment: Mapping[str, str]) -> None:
    """Let this process have those variables of wandb, and only those: it may be older than the command, or have run
    another's."""
    # Reports of wandb's own faults to its makers are off unless the user asked for them.
    wanted, ours = {"WANDB_ERROR_REPORTING": "false", **environment}, wandb_environment()
    if ours == wanted:
        return
    for name in ours.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
    changed = {name for name in ours.keys() | wanted.keys() if ours.get(name) != wanted.get(name)}
    if "wandb" in sys.modules and changed != {"WANDB_ERROR_REPORTING"}:
        import wandb

        wandb.teardown()  # it reads them once in a process


def _set_aside(folder: Path, run_id: str) -> None:
    """Move offline runs of an earlier start out of the way: what is written now holds their rows too."""
    for old in sorted(folder.glob(f"offline-run-*-{run_id}")):
        (folder / REPLACED).mkdir(exist_ok=True)
        target = folder / REPLACED / old.name
        number = 1
        while target.exists():
            number += 1
            target = folder / REPLACED / f"{old.name}.{number}"
        old.rename(target)


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[None]:
    """Files of tables and artifacts wait in the run directory, not in the home directory, unless the user said so."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder / "data")
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _histogram(values: list[float]) -> Any:
    import wandb

    return wandb.Histogram(values)


def _table(key: str, table: Table) -> dict[str, Any]:
    import wandb

    return {key: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])} if table.rows else {}


def _refusal(config: WandbConfig, error: Exception) -> ConfigError | None:
    """The error of a start that will fail again however often it is tried; None for an outage."""
    text = " ".join(str(error).split())
    remedy = "or set tracker.wandb.mode=offline"
    if "API key" in text:
        return ConfigError(
            "tracker.wandb.mode is 'online'; it needs an API key and none is configured: run `wandb login` on the "
            f"machine of the driver, {remedy}"
        )
    if re.search(r"\b401\b", text):
        return ConfigError(
            f"tracker.wandb.mode is 'online'; W&B refuses the API key: run `wandb login --relogin`, {remedy}"
        )
    if re.search(r"\b(400|403|404)\b|permission denied|not found", text, re.IGNORECASE):
        return ConfigError(
            f"tracker.wandb.project is {config.project!r} and entity {config.entity!r}; W&B refuses them "
            f"({text[:200]}): name a project that you may write to, {remedy}"
        )
    return None
