"""Data sets by name, read from the Hugging Face hub or from a folder."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedray.data.dataset import Dataset
from fedray.data.sources import folders, leaf, originals, tables
from fedray.data.sources.cache import Constants, Source, cached
from fedray.data.sources.images import Mode
from fedray.data.sources.splits import check_count, check_fraction
from fedray.errors import ConfigError

_IMAGE: Mapping[str, str] = MappingProxyType({"image": "image", "label": "label"})
_TEXT: Mapping[str, str] = MappingProxyType({"text": "text", "label": "label"})


@dataclass(frozen=True, kw_only=True)
class Named:
    """What is known of a data set.

    repository: on the hub; loads: whether the package `datasets` can load it from there.
    subset:     the configuration that is meant if none is named.
    classes:    how many, by the column of labels; none where the files tell.
    constants:  mean and standard deviation of the training pixels in [0, 1], as the literature rounds them; None
                where there are no customary ones, and they are measured.
    """

    repository: str
    columns: Mapping[str, str] = field(default_factory=lambda: _IMAGE)
    subset: str | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    constants: Constants | None = None
    loads: bool = True


NAMED: Mapping[str, Named] = MappingProxyType(
    {
        "mnist": Named(repository="ylecun/mnist", classes={"label": 10}, constants=((0.1307,), (0.3081,))),
        "fashion_mnist": Named(
            repository="zalando-datasets/fashion_mnist", classes={"label": 10}, constants=((0.2860,), (0.3530,))
        ),
        # The hub has EMNIST as IDX files only, which its own package does not load.
        "emnist": Named(repository="Heliosoph/EMNIST", loads=False),
        "femnist": Named(
            repository="flwrlabs/femnist",
            columns={"image": "image", "label": "character", "owner": "writer_id"},
            classes={"character": 62},
        ),
        "cifar10": Named(
            repository="uoft-cs/cifar10",
            columns={"image": "img", "label": "label"},
            classes={"label": 10},
            constants=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ),
        "cifar100": Named(
            repository="uoft-cs/cifar100",
            columns={"image": "img", "label": "fine_label"},
            classes={"fine_label": 100, "coarse_label": 20},
            constants=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ),
        "cinic10": Named(
            repository="flwrlabs/cinic10",
            classes={"label": 10},
            constants=((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
        ),
        "svhn": Named(
            repository="ufldl-stanford/svhn",
            subset="cropped_digits",
            classes={"label": 10},
            constants=((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        ),
        "tiny_imagenet": Named(
            repository="zh-plus/tiny-imagenet",
            classes={"label": 200},
            constants=((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        ),
        "usps": Named(repository="flwrlabs/usps", classes={"label": 10}),
        "ag_news": Named(repository="fancyzhx/ag_news", columns=_TEXT, classes={"label": 4}),
        "imdb": Named(repository="stanfordnlp/imdb", columns=_TEXT, classes={"label": 2}),
    }
)


def hub(
    *,
    name: str | None,
    path: str | None = None,
    columns: Mapping[str, Any] | None = None,
    subset: str | None = None,
    size: int | None = None,
    mode: Mode | None = None,
    length: int | None = None,
    test_fraction: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """A data set by name: in a folder, or without one through the Hugging Face package `datasets`.

    name:    one of fedray.data.sources.named.NAMED, whose columns, number of classes and normalisation are known; or
             user/repository on the hub; or, with a path, any other.
    path:    a folder, whose format is told by what it holds, in it or in the folders of it:
             - train-*.parquet and test-*.parquet, the hub's layout (also train.parquet, train/0000.parquet, and .jsonl
               or .csv for .parquet);
             - *-images-idx3-ubyte and *-labels-idx1-ubyte: IDX, as MNIST and EMNIST (see `originals.idx`);
             - data_batch_1 to 5 and test_batch, or train, test and meta: CIFAR's pickles, read without running code;
             - train_32x32.mat and test_32x32.mat: SVHN;
             - train/*.json and test/*.json: LEAF (see `leaf.source`);
             - train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png: images (see `folders.source`).
             Without a test split, validation, valid, val or dev is the test set.
    columns: of a table, by role. One of image (bytes of an image file, struct{bytes, path}, or nested lists of pixels),
             features (numbers, lists of numbers, or a list of such columns) and text (as bytes of UTF-8, 0 after the
             end); one of label (whole numbers from 0, names in sorted order of the training samples, booleans) and
             target (numbers to predict; float32), neither for text that is to be continued; and owner, who made the
             sample. null for those of a named set, else {image: image, label: label}. CIFAR-100's pickles read label.
    subset:  of several in one place: the configuration on the hub, the variant of EMNIST, the folder of that name.
    size:    pixels; images are resized to size x size. null: they must all be of one size.
    mode:    "grey" or "rgb": images are converted. null: they must all be alike.
    length:  bytes of a sample of text; longer ones are cut.
    test_fraction: share held out where there is no test set, of each owner or else of each class, fixed for all seeds.
    mean, std: what samples are normalised by, (x - mean) / std with pixels in [0, 1]: a value for each channel, or one
             for all. null: the customary ones of a named set, else those of its training samples. mean=[0] std=[1]
             leaves them as they are.

    Images become uint8 (C, H, W). Everything is decoded once and kept under the hash of the contents in FEDRAY_CACHE
    (default ~/.cache/fedray/data), from where later calls map it read-only.

    Raises ConfigError for a wrong folder, missing or damaged files, wrong columns, undecodable or unequal samples,
    wrong labels, and a missing `fedray[hub]`.
    """
    if not name:
        raise ConfigError("data.name is null; give one, such as data.name=user/anything, as records show it")
    known = NAMED.get(name)
    roles = tables.check_columns(columns if columns is not None else known.columns if known else _IMAGE)
    subset = subset if subset is not None else known.subset if known else None
    reading = tables.Reading(
        columns=roles,
        size=None if size is None else check_count("size", size),
        mode=mode,
        length=None if length is None else check_count("length", length),
        test_fraction=None if test_fraction is None else check_fraction(test_fraction),
    )
    if mode not in (None, "grey", "rgb"):
        raise ConfigError(f"data.mode is {mode!r}; choose grey, rgb or null")
    for key, value, role in (("size", size, "image"), ("mode", mode, "image"), ("length", length, "text")):
        if value is not None and role not in roles:
            raise ConfigError(
                f"data.{key} is {value!r}; it is for {role} columns and data.columns names none, so leave it null"
            )
    source = _online(name, known, subset, reading) if path is None else _local(name, path, subset, reading)
    constants, classes = None, None
    if known is not None:
        constants = known.constants
        if constants is not None and mode is not None and len(constants[0]) != (1 if mode == "grey" else 3):
            constants = None  # those of other channels
        classes = known.classes.get(str(roles.get("label")))
    data = cached(
        source,
        name=name,
        constants=constants,
        num_classes=classes,
        mean=_numbers("mean", mean),
        std=_numbers("std", std),
    )
    if data.vocabulary is not None and (mean is not None or std is not None):
        raise ConfigError(f"data.{'std' if mean is None else 'mean'} is set and samples are tokens; leave it null")
    return data


def _numbers(key: str, values: Any) -> tuple[float, ...] | None:
    """As given; what numbers they may be, the data set says itself."""
    if values is None:
        return None
    listed = not isinstance(values, str) and isinstance(values, Sequence)
    if not listed or not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise ConfigError(f"data.{key} is {values!r}; it must be a list of numbers, such as [0.5], or null")
    return tuple(float(value) for value in values)


# --- a folder ---


def _local(name: str, path: str, subset: str | None, reading: tables.Reading) -> Source:
    """What the folder holds, or the folders in it, or the folders in those: the first level with anything."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"data.path is {str(path)!r}: no such folder; give the folder that holds train-*.parquet and test-*.parquet"
        )
    label = reading.columns.get("label")

    def tables_in(folder: Path) -> Source | None:
        return tables.source(folder, reading)

    def idx_in(folder: Path) -> Source | None:
        return originals.idx(folder, name=name, subset=subset, size=reading.size, mode=reading.mode)

    def cifar_in(folder: Path) -> Source | None:
        return originals.cifar(
            folder, label=label if isinstance(label, str) else None, size=reading.size, mode=reading.mode
        )

    def svhn_in(folder: Path) -> Source | None:
        return originals.svhn(folder, size=reading.size, mode=reading.mode)

    def leaf_in(folder: Path) -> Source | None:
        files = leaf.find(folder)
        if files is None:
            return None
        return leaf.source(
            files,
            test_fraction=reading.test_fraction,
            length=reading.length,
            size=reading.size,
            mode=reading.mode,
        )

    def images_in(folder: Path) -> Source | None:
        return folders.source(folder, size=reading.size, mode=reading.mode, test_fraction=reading.test_fraction)

    files: tuple[Callable[[Path], Source | None], ...] = (tables_in, idx_in, cifar_in, svhn_in, leaf_in)
    # Pictures may lie beside a data set of any other format, so folders of images come last.
    for formats in (files, (images_in,)):
        for level in _levels(root):
            for read in formats:
                found = _choose({home: source for home in level if (source := read(home))}, subset)
                if len(found) > 1:
                    raise ConfigError(
                        f"data.path is {str(path)!r}: the folders {[home.name for home in found]} in it all hold "
                        f"data; give one of them, or write data.subset={next(iter(found)).name}"
                    )
                if found:
                    return next(iter(found.values()))
    raise ConfigError(
        f"data.path is {str(path)!r}: no train-*.parquet in {root}, nor IDX, CIFAR, SVHN or LEAF files, nor folders of "
        "images by class; give the folder that holds train-*.parquet and test-*.parquet, or one in such a format"
    )


def _levels(root: Path) -> Iterator[list[Path]]:
    """The folder, those in it, and those in these."""
    level = [root]
    for _ in range(3):
        yield level
        level = sorted(inner for home in level for inner in home.iterdir() if inner.is_dir() and inner.name[0] != ".")


def _choose(found: Mapping[Path, Source], subset: str | None) -> Mapping[Path, Source]:
    """Of several folders the one that is asked for, or the one called data."""
    for name in (subset, "data"):
        chosen = {home: source for home, source in found.items() if home.name == name}
        if len(found) > 1 and chosen:
            return chosen
    return found


# --- the hub ---


def _online(name: str, known: Named | None, subset: str | None, reading: tables.Reading) -> Source:
    """Through `datasets.load_dataset`, which keeps what it has fetched."""
    repository = known.repository if known else name
    where = f"https://huggingface.co/datasets/{repository}" if known or "/" in name else "the Hugging Face hub"
    by_hand = f"fetch its train-*.parquet and test-*.parquet from {where} and pass data.path=FOLDER"
    if known is not None and not known.loads:
        raise ConfigError(
            f"data.path is null; {name} does not come with fedray, so fetch its files from {where} and pass "
            "data.path=FOLDER"
        )
    if known is None and "/" not in name:
        raise ConfigError(
            f"data.path is null; {name} does not come with fedray, so {by_hand}, or name one of {', '.join(NAMED)} or "
            "user/repository"
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"data.path is null; {name} does not come with fedray, so {by_hand}, or run "
            f"`pip install 'fedray[hub]'` to have it fetched ({error})"
        ) from error
    # What its downloads try again is in our sentence, if it fails in the end.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(repository, subset)
    except Exception as error:  # whatever the package raises without network, repository or subset
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.name is {name!r}; {repository} cannot be loaded from the Hugging Face hub ({reason}), so {by_hand}"
        ) from error
    if "train" not in loaded:
        raise ConfigError(f"data.name is {name!r}; {repository} has the splits {sorted(loaded)} and none called train")
    splits = tables.pick_splits({split: _table(repository, split, rows) for split, rows in loaded.items()})
    if "test" not in splits and reading.test_fraction is None:
        raise ConfigError(
            f"data.name is {name!r}; {repository} has no test split, so hold out a share with data.test_fraction=0.2"
        )
    settings = tables.settings(reading, holds_test="test" in splits)
    return Source(
        kind="hub",
        settings=settings,
        place=repository,
        contents=lambda: {split: [_hash_rows(table)] for split, table in splits.items()},
        open=lambda: tables.opened({split: [table] for split, table in splits.items()}, reading),
    )


def _table(repository: str, split: str, rows: Any) -> tables.Table:
    """One split of the package, whose rows are read as they are stored, images undecoded."""
    plain = rows.with_format("arrow")

    def batches(columns: list[str]) -> Iterator[Any]:
        for piece in plain.select_columns(columns).iter(batch_size=tables.BATCH_ROWS):
            yield from piece.to_batches()

    return tables.Table(
        name=f"{repository} ({split})", schema=rows.features.arrow_schema, num_rows=len(rows), batches=batches
    )


def _hash_rows(table: tables.Table) -> str:
    state = hashlib.blake2b()
    for batch in table.batches(list(table.schema.names)):
        state.update(batch.serialize())
    return state.hexdigest()
