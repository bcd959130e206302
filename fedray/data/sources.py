"""Where data come from. A source is a function with keyword-only arguments that returns a checked `Dataset`."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedray.data.dataset import Dataset, digest_arrays, seal
from fedray.data.partition import apportion, by_label
from fedray.errors import ConfigError

_log = logging.getLogger(__name__)

_CACHE_FORMAT = 1  # raise it when what is written to the cache changes
_BATCH_ROWS = 1024  # rows decoded at a time
_SPLITS = ("train", "test")
_ARRAYS = ("train_x", "train_y", "test_x", "test_y")

_NORMALISATION: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = MappingProxyType(
    {
        "mnist": ((0.1307,), (0.3081,)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    }
)
"""Mean and standard deviation of the training pixels in [0, 1], as the literature rounds them."""

_WHERE: Mapping[str, str] = MappingProxyType({"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"})


def digits(*, path: str | None = None, test_fraction: float = 0.2) -> Dataset:
    """scikit-learn's digits: 1,797 images, uint8 in [0, 16], shape (1, 8, 8), 10 classes.

    test_fraction: share held out as the global test set, equal in all classes; which samples is fixed for all seeds.
    path: must be None. Raises ConfigError for a path, a bad fraction or a missing scikit-learn.
    """
    if path is not None:
        state = "no such folder; " if not Path(path).expanduser().is_dir() else ""
        raise ConfigError(
            f"data.path is {str(path)!r}: {state}digits is built in and reads no path, so leave data.path out or "
            "choose data=mnist or data=cifar10"
        )
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, int | float) or not 0 < test_fraction < 1:
        raise ConfigError(f"data.test_fraction is {test_fraction!r}; it must lie between 0 and 1, such as 0.2")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data is 'digits', which comes with scikit-learn, and that cannot be imported; run "
            "`pip install scikit-learn`"
        ) from error
    from fedray.keys import Key

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    members = by_label(y, 10)
    counts = apportion(np.bincount(y, minlength=10)[None], np.array([round(test_fraction * len(y))]))[0]
    key = Key.of(0).fold("data", "digits", "test")
    held_out = np.zeros(len(y), bool)
    for label, count in enumerate(counts):
        held_out[key.fold(label).numpy().permutation(members[label])[:count]] = True
    if min(np.unique(y[held_out]).size, np.unique(y[~held_out]).size) < 10:
        raise ConfigError(
            f"data.test_fraction is {test_fraction!r}; it leaves a class without training or test samples, so move it "
            "towards 0.2"
        )
    mean, std = _channel_statistics(x[~held_out], scale=1 / 16)
    return Dataset.of(
        name="digits",
        train_x=x[~held_out],
        train_y=y[~held_out],
        test_x=x[held_out],
        test_y=y[held_out],
        num_classes=10,
        mean=mean,
        std=std,
        scale=1 / 16,
    )


def hub(
    *,
    name: str,
    path: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({"image": "image", "label": "label"}),
) -> Dataset:
    """Images in the layout of the Hugging Face hub: train-*.parquet and test-*.parquet in a folder.

    name:    of the data set; "mnist" and "cifar10" have fixed normalisation constants, others are measured.
    path:    the folder; the files may lie in its `data` folder, or in another one if no other has any.
    columns: names of the columns "image" (bytes of a PNG or JPEG file, or struct{bytes, path}) and "label" (integer).

    Images are decoded once, to uint8 of shape (C, H, W), and kept under the hash of the files in FEDRAY_CACHE
    (default ~/.cache/fedray/data), from where later calls map them read-only.

    Raises ConfigError for a wrong folder, missing files, wrong columns, undecodable or unequal images, wrong labels,
    and a missing `fedray[hub]`.
    """
    if set(columns) != {"image", "label"}:
        raise ConfigError(
            f"data.columns has the keys {sorted(map(str, columns))}; give image and label, such as "
            "data.columns={image: image, label: label}"
        )
    columns = {role: str(columns[role]) for role in ("image", "label")}
    files = _find(name, path)
    folder = _cache_root() / _hash_files(files, columns)
    if not folder.exists():
        _decode(files, columns, folder)
    return _load(name, folder)


def _find(name: str, path: str | None) -> dict[str, list[Path]]:
    """The parquet files of each split, parts in order."""
    if path is None:
        where = f"https://huggingface.co/datasets/{_WHERE[name]}" if name in _WHERE else "the Hugging Face hub"
        raise ConfigError(
            f"data.path is null; {name} does not come with fedray, so fetch its train-*.parquet and test-*.parquet "
            f"from {where} and pass data.path=FOLDER"
        )
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"data.path is {str(path)!r}: no such folder; give the folder that holds train-*.parquet and test-*.parquet"
        )
    homes = [root] if _parts(root, "train") or _parts(root, "test") else []
    homes = homes or [home for home in [root / "data"] if _parts(home, "train") or _parts(home, "test")]
    homes = homes or [
        home for home in sorted(root.iterdir()) if home.is_dir() and (_parts(home, "train") or _parts(home, "test"))
    ]
    if len(homes) > 1:
        raise ConfigError(
            f"data.path is {str(path)!r}: the folders {[home.name for home in homes]} in it all hold parquet files; "
            "give one of them"
        )
    files = {}
    for split in _SPLITS:
        files[split] = _parts(homes[0], split) if homes else []
        if not files[split]:
            raise ConfigError(
                f"data.path is {str(path)!r}: no {split}-*.parquet in {homes[0] if homes else root}; give the folder "
                "that holds train-*.parquet and test-*.parquet"
            )
        _refuse_missing_parts(files[split])
    return files


def _parts(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def _refuse_missing_parts(files: list[Path]) -> None:
    """Files named part-of-total must be exactly parts 0 to total - 1, or a download has not finished."""
    numbered = [re.fullmatch(r"\w+-(\d+)-of-(\d+)", file.stem) for file in files]
    found = [(int(match[1]), int(match[2])) for match in numbered if match]
    if found and (len(found) < len(files) or found != [(part, len(found)) for part in range(len(found))]):
        raise ConfigError(
            f"data.path is {str(files[0].parent)!r}: its files {[file.name for file in files]} are not the parts of "
            "one split, each once, so fetch what is missing and remove what does not belong"
        )


def _cache_root() -> Path:
    return Path(os.environ.get("FEDRAY_CACHE") or "~/.cache/fedray/data").expanduser()


def _hash_files(files: dict[str, list[Path]], columns: dict[str, str]) -> str:
    """Hex blake2b of the files' contents and of how they are read; names and places do not matter."""
    contents: dict[str, list[str]] = {}
    for split, paths in files.items():
        contents[split] = []
        for path in paths:
            with path.open("rb") as file:
                contents[split].append(hashlib.file_digest(file, hashlib.blake2b).hexdigest())
    text = json.dumps({"format": _CACHE_FORMAT, "columns": columns, "contents": contents}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _decode(files: dict[str, list[Path]], columns: dict[str, str], folder: Path) -> None:
    """Write the decoded arrays as `folder`, which appears whole or not at all."""
    parquet = {split: [_open(path, columns) for path in paths] for split, paths in files.items()}
    _log.info("decoding %s into %s, once", files["train"][0].parent, folder)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        arrays: dict[str, np.ndarray] = {}
        for split in _SPLITS:
            arrays[f"{split}_x"], arrays[f"{split}_y"] = _decode_split(split, parquet[split], scratch)
        num_classes = parquet["train"][0].num_classes
        if num_classes is None:
            num_classes = 1 + max(int(arrays[f"{split}_y"].max()) for split in _SPLITS)
        mean, std = _channel_statistics(arrays["train_x"], scale=1 / 255)
        content = digest_arrays(*(arrays[which] for which in _ARRAYS))
        with (scratch / "meta.json").open("w") as file:
            json.dump({"content": content, "num_classes": num_classes, "mean": mean, "std": std}, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # if it does, another process has decoded the same files meanwhile
                raise
    except OSError as error:  # reading raises ConfigError, so this is about writing
        raise ConfigError(
            f"FEDRAY_CACHE is {str(folder.parent)!r}, where decoded data go; it cannot be written ({error.strerror}), "
            "so set it to a folder that can"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already if it was renamed


@dataclass(frozen=True, kw_only=True)
class _Parquet:
    """An opened file whose columns are known to be there. num_classes: None if its metadata do not say."""

    path: Path
    file: Any
    columns: dict[str, str]
    num_classes: int | None

    def rows(self) -> Iterator[tuple[int, bytes | None, int | None]]:
        """Row number, encoded image and label."""
        import pyarrow as pa

        row = 0
        try:
            for batch in self.file.iter_batches(_BATCH_ROWS, columns=list(self.columns.values())):
                images = batch.column(self.columns["image"])
                if pa.types.is_struct(images.type):
                    images = images.flatten()[images.type.get_field_index("bytes")]
                labels = batch.column(self.columns["label"])
                for image, label in zip(images.to_pylist(), labels.to_pylist(), strict=True):
                    yield row, image, label
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(_unreadable(self.path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"data.path has {path}, which cannot be read as parquet ({reason}); fetch the file anew"


def _open(path: Path, columns: dict[str, str]) -> _Parquet:
    try:
        import PIL.Image  # noqa: F401  here, so that it is missed before anything is written
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f"data.path is a folder of parquet files, and {error.name} to read them cannot be imported; run "
            '`pip install "fedray[hub]"`'
        ) from error
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(_unreadable(path, error)) from error
    for role, column in columns.items():
        if column not in schema.names:
            raise ConfigError(
                f"data.columns.{role} is {column!r}; {path.name} has the columns {schema.names}, so name one of them"
            )
    image, label = (schema.field(columns[role]).type for role in ("image", "label"))
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise ConfigError(
            f"data.columns.image is {columns['image']!r}; that column of {path.name} has type {image}, so name the one "
            "with the bytes of image files"
        )
    if not pa.types.is_integer(label):
        raise ConfigError(
            f"data.columns.label is {columns['label']!r}; that column of {path.name} has type {label}, so name the one "
            "with integer labels"
        )
    return _Parquet(
        path=path, file=file, columns=columns, num_classes=_declared_classes(path, schema, columns["label"])
    )


def _declared_classes(path: Path, schema: Any, label: str) -> int | None:
    """How many class names the hub's metadata list for the label column; None if they list none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][label].get("names")
    except (ValueError, KeyError) as error:
        raise ConfigError(_unreadable(path, error)) from error
    return len(names) if names else None


def _decode_split(split: str, files: list[_Parquet], scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Samples, uint8, shape (n, C, H, W), and labels, int64, shape (n,), both written to `scratch`."""
    num_rows = sum(file.file.metadata.num_rows for file in files)
    if num_rows == 0:
        raise ConfigError(f"data.path has no samples in {files[0].path}; fetch the file anew")
    x: np.ndarray | None = None
    y = np.empty(num_rows, np.int64)
    at = 0
    for file in files:
        for row, data, label in file.rows():
            image = _decode_image(data, file, row)
            if x is None:
                x = np.lib.format.open_memmap(
                    scratch / f"{split}_x.npy", mode="w+", dtype=np.uint8, shape=(num_rows, *image.shape)
                )
            if image.shape != x.shape[1:]:
                raise ConfigError(
                    f"data.path has an image of shape {image.shape} in {file.path}, row {row}; all must have the shape "
                    f"{x.shape[1:]} of the first, so resize them"
                )
            if label is None:
                raise ConfigError(f"data.path has no label in {file.path}, row {row}; drop unlabelled rows")
            x[at], y[at] = image, label
            at += 1
    assert isinstance(x, np.memmap)
    x.flush()
    np.save(scratch / f"{split}_y.npy", y)
    return x, y


def _decode_image(data: bytes | None, file: _Parquet, row: int) -> np.ndarray:
    from PIL import Image

    if data is None:
        raise ConfigError(
            f"data.path has no image bytes in {file.path}, row {row}; images must lie in the parquet file, so export "
            "it with them embedded"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # whatever a decoder raises on bad bytes
        raise ConfigError(
            f"data.path has an image that cannot be decoded in {file.path}, row {row} ({error}); fetch the file anew "
            "or drop the row"
        ) from error
    if mode not in ("L", "RGB"):
        raise ConfigError(
            f"data.path has an image of mode {mode} in {file.path}, row {row}; only 8-bit grey (L) and RGB are read, "
            "so convert it"
        )
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _channel_statistics(x: np.ndarray, *, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images after scaling, from exact integer sums."""
    counts = np.stack([np.bincount(x[:, channel].reshape(-1), minlength=256) for channel in range(x.shape[1])])
    means, stds = [], []
    for count in counts.tolist():
        total = sum(count)
        first = sum(value * n for value, n in enumerate(count))
        second = sum(value * value * n for value, n in enumerate(count))
        means.append(scale * first / total)
        stds.append(scale * (total * second - first * first) ** 0.5 / total)
    return tuple(means), tuple(stds)


def _load(name: str, folder: Path) -> Dataset:
    """The data set that lies decoded in `folder`, samples mapped from the file and read-only."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {which: np.asarray(np.load(folder / f"{which}.npy", mmap_mode="r")) for which in _ARRAYS}
        content, num_classes = meta["content"], meta["num_classes"]
        measured = (tuple(meta["mean"]), tuple(meta["std"]))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"FEDRAY_CACHE has the damaged folder {folder} ({error}); delete that folder") from error
    mean, std = _NORMALISATION.get(name, measured)
    if len(mean) != len(measured[0]):
        raise ConfigError(
            f"data.name is {name!r}, whose images have {len(mean)} channels, and those in data.path have "
            f"{len(measured[0])}; give the folder of {name} or another data.name"
        )
    dataset = Dataset(
        name=name,
        **arrays,
        num_classes=num_classes,
        mean=mean,
        std=std,
        scale=1 / 255,
        digest=seal(content, num_classes=num_classes, mean=mean, std=std, scale=1 / 255),
    )
    dataset.check()
    return dataset
