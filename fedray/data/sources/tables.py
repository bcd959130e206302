"""Data sets as tables: parquet, JSON lines and CSV files in the layouts of the Hugging Face hub, read with pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedray.data.dataset import Kind
from fedray.data.sources.cache import Decoder, Source, hash_files
from fedray.data.sources.images import Mode, fit, stack
from fedray.data.sources.splits import Decoded, Split, refuse_no_test, settle
from fedray.data.sources.windows import windows
from fedray.errors import ConfigError

TEST_SPLITS = ("test", "validation", "valid", "val", "dev")  # the first that is there is the test set
BYTES = 256  # the vocabulary of text columns
_SUFFIXES = ("parquet", "jsonl", "csv")
BATCH_ROWS = 1024  # rows decoded at a time
_SAMPLES = ("image", "features", "text")
_TARGETS = ("label", "target")

Columns = Mapping[str, str | tuple[str, ...]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become samples; the settings of `hub`."""

    columns: Columns
    size: int | None = None
    mode: Mode | None = None
    length: int | None = None
    test_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file, or one split of the `datasets` package. batches: gives record batches of the columns asked for."""

    name: str
    schema: Any
    num_rows: int
    batches: Callable[[list[str]], Iterator[Any]]


def check_columns(columns: Mapping[str, Any]) -> Columns:
    """Roles to columns, checked: one kind of sample, one kind of target (none for text to be continued)."""
    known = (*_SAMPLES, *_TARGETS, "owner")
    sample = [role for role in _SAMPLES if role in columns]
    target = [role for role in _TARGETS if role in columns]
    if set(columns) - set(known) or len(sample) != 1 or len(target) > 1 or not (target or sample == ["text"]):
        raise ConfigError(
            f"data.columns has the keys {sorted(map(str, columns))}; give image and label, such as "
            "data.columns={image: image, label: label}, or features or text for image, target for label, and owner"
        )
    found: dict[str, str | tuple[str, ...]] = {}
    for role, column in columns.items():
        if role == "features" and isinstance(column, list | tuple) and column:
            found[role] = tuple(str(name) for name in column)
        elif isinstance(column, str) and column:
            found[role] = column
        else:
            raise ConfigError(
                f"data.columns.{role} is {column!r}; give the name of a column"
                f"{', or a list of them' if role == 'features' else ''}"
            )
    return found


# --- files ---


def find(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split that lie in this folder, parts in order; None if there is no split."""
    found = {split: _parts(folder, split) for split in ("train", *TEST_SPLITS)}
    return {split: files for split, files in found.items() if files} or None


def _parts(folder: Path, split: str) -> list[Path]:
    for suffix in _SUFFIXES:
        files = [*folder.glob(f"{split}.{suffix}"), *folder.glob(f"{split}-*.{suffix}")]
        # The hub's converted branch has a folder for each split.
        if files := files or list((folder / split).glob(f"*.{suffix}")):
            return sorted(files)
    return []


def pick_splits(found: Mapping[str, T]) -> dict[str, T]:
    """Of all splits the training one and the first that can be tested on, called train and test."""
    tests = [found[split] for split in TEST_SPLITS if split in found]
    return {"train": found["train"], **({"test": tests[0]} if tests else {})}


def refuse_missing_parts(files: Sequence[Path]) -> None:
    """Files named part-of-total must be exactly parts 0 to total - 1, or a download has not finished."""
    numbered = [re.fullmatch(r"[\w.-]+-(\d+)-of-(\d+)", file.stem) for file in files]
    found = [(int(match[1]), int(match[2])) for match in numbered if match]
    wrong = found and (len(found) < len(files) or found != [(part, len(found)) for part in range(len(found))])
    stems = [file.stem for file in files]
    if all(re.fullmatch(r"\d{4,}", stem) for stem in stems):
        wrong = [int(stem) for stem in stems] != list(range(len(stems)))
    if wrong:
        raise ConfigError(
            f"data.path is {str(files[0].parent)!r}: its files {[file.name for file in files]} are not the parts of "
            "one split, each once, so fetch what is missing and remove what does not belong"
        )


def source(folder: Path, reading: Reading) -> Source | None:
    """The train and test files of a folder as a source."""
    found = find(folder)
    if found is None:
        return None
    if "train" not in found:
        raise ConfigError(
            f"data.path is {str(folder)!r}: no train-*.parquet in {folder}; give the folder that holds train-*.parquet "
            "and test-*.parquet"
        )
    files = pick_splits(found)
    if "test" not in files:
        refuse_no_test(folder, "test-*.parquet", reading.test_fraction)
    for paths in files.values():
        refuse_missing_parts(paths)
    return Source(
        kind="tables",
        settings=settings(reading, holds_test="test" in files),
        place=str(files["train"][0].parent),
        contents=lambda: hash_files(files),
        open=partial(_open_files, files, reading),
    )


def settings(reading: Reading, *, holds_test: bool) -> dict[str, Any]:
    return {
        "columns": dict(reading.columns),
        "size": reading.size,
        "mode": reading.mode,
        "length": reading.length,
        "test_fraction": None if holds_test else reading.test_fraction,
    }


def _open_files(files: Mapping[str, list[Path]], reading: Reading) -> Decoder:
    try:
        import pyarrow  # noqa: F401  here, so that it is missed before anything is written
    except ImportError as error:
        raise _missing(error) from error
    return opened({split: [_open(path) for path in paths] for split, paths in files.items()}, reading)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"data.path is a folder of parquet files, and {error.name} to read them cannot be imported; run "
        '`pip install "fedray[hub]"`'
    )


def _unreadable(path: Path | str, error: Exception, kind: str = "parquet") -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"data.path has {path}, which cannot be read as {kind} ({reason}); fetch the file anew"


def _open(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet as pq

    kind = {".jsonl": "JSON lines", ".csv": "CSV"}.get(path.suffix, "parquet")
    try:
        if kind == "parquet":
            file = pq.ParquetFile(path)
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        else:
            table = (pyarrow.json.read_json if kind == "JSON lines" else pyarrow.csv.read_csv)(path)
            schema, num_rows = table.schema, table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(_unreadable(path, error, kind)) from error

    def batches(columns: list[str]) -> Iterator[Any]:
        try:
            if kind == "parquet":
                yield from file.iter_batches(BATCH_ROWS, columns=columns)
            else:
                yield from table.select(columns).to_batches(BATCH_ROWS)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(_unreadable(path, error, kind)) from error

    return Table(name=str(path), schema=schema, num_rows=num_rows, batches=batches)


# --- rows ---


def opened(tables: Mapping[str, list[Table]], reading: Reading) -> Decoder:
    """Check the columns of all tables and give what decodes them."""
    declared = None
    for split, parts in tables.items():
        for table in parts:
            _check_types(table, reading)
            classes = _declared_classes(table, reading.columns.get("label"))
            declared = declared or (classes if split == "train" else None)
        if not sum(table.num_rows for table in parts):
            raise ConfigError(f"data.path has no samples in {parts[0].name}; fetch the file anew")
    if "text" in reading.columns and reading.length is None:
        raise ConfigError("data.length is null; text needs the number of bytes of a sample, such as data.length=256")

    def decode(scratch: Path) -> Decoded:
        splits = {split: read(parts, reading, scratch / f"raw_{split}.npy") for split, parts in tables.items()}
        objective: Kind = "classification" if "label" in reading.columns else "regression"
        if not set(_TARGETS) & set(reading.columns):
            objective = "next_token"
        return settle(
            splits["train"],
            splits.get("test"),
            scratch=scratch,
            test_fraction=reading.test_fraction,
            num_classes=declared,
            objective=objective,
            vocabulary=BYTES if "text" in reading.columns else None,
        )

    return decode


def _check_types(table: Table, reading: Reading) -> None:
    import pyarrow as pa

    shown = Path(table.name).name
    for role, names in reading.columns.items():
        for column in (names,) if isinstance(names, str) else names:
            if column not in table.schema.names:
                raise ConfigError(
                    f"data.columns.{role} is {column!r}; {shown} has the columns {table.schema.names}, so name one of "
                    "them"
                )
            kind = _plain_type(table.schema.field(column).type)
            wanted = _wanted(pa, role, kind)
            if wanted is not None:
                raise ConfigError(
                    f"data.columns.{role} is {column!r}; that column of {shown} has type {kind}, so name the one with "
                    f"{wanted}"
                )
            if role == "image" and not _is_list(pa, kind):
                try:
                    import PIL.Image  # noqa: F401
                except ImportError as error:
                    raise _missing(error) from error


def _plain_type(kind: Any) -> Any:
    """Without what wraps it: extension types of arrays, dictionaries of strings, the struct of image bytes."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind


def _wanted(pa: Any, role: str, kind: Any) -> str | None:
    """What a column of this role must hold, if this type is not that."""
    types = pa.types
    inner = kind
    while _is_list(pa, inner):
        inner = inner.value_type
    number = types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)
    text = types.is_string(kind) or types.is_large_string(kind)
    if role == "image":
        fits = types.is_binary(kind) or types.is_large_binary(kind) or (_is_list(pa, kind) and number)
        return None if fits else "the bytes of image files, or nested lists of pixels"
    if role == "features":
        return None if number else "numbers or lists of them"
    if role == "text":
        return None if text else "text"
    if role == "label":
        whole = types.is_integer(kind) or types.is_boolean(kind)
        return None if whole or text else "integer labels, names or booleans, or write data.columns.target for numbers"
    if role == "target":
        return None if number else "numbers"
    return None if types.is_integer(kind) or text else "names or integers"


def _is_list(pa: Any, kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _declared_classes(table: Table, label: object) -> int | None:
    """How many class names the hub's metadata list for the label column; None if they list none."""
    text = (table.schema.metadata or {}).get(b"huggingface")
    if text is None or not isinstance(label, str):
        return None
    try:
        names = json.loads(text)["info"]["features"][label].get("names")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(_unreadable(table.name, error)) from error
    return len(names) if names else None


def read(tables: Sequence[Table], reading: Reading, file: Path) -> Split:
    """All rows of a split; large samples are mapped from `file`."""
    columns = reading.columns
    target = next((role for role in _TARGETS if role in columns), None)
    y: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    names = [name for role in columns.values() for name in ((role,) if isinstance(role, str) else role)]

    def batches() -> Iterator[tuple[Any, str, int]]:
        """Each batch with the name of its table and the row of that at which it starts."""
        for table in tables:
            row = 0
            for batch in table.batches(list(dict.fromkeys(names))):
                if target is not None:
                    y.append(_targets(batch, target, str(columns[target]), table.name, row))
                if "owner" in columns:
                    owners.append(_owners(batch, str(columns["owner"]), table.name, row))
                yield batch, table.name, row
                row += batch.num_rows

    count = sum(table.num_rows for table in tables)
    if "text" in columns and target is None:
        assert reading.length is not None
        texts = [text for batch, name, row in batches() for text in _texts(batch, str(columns["text"]), name, row)]
        return _continued(texts, np.concatenate(owners) if owners else None, reading.length)
    if "image" in columns and not _is_list_column(tables[0], str(columns["image"])):
        images = (
            (data, f"{name}, row {row + at}")
            for batch, name, row in batches()
            for at, data in enumerate(_encoded(batch, str(columns["image"]), name, row))
        )
        x = stack(images, count=count, file=file, size=reading.size, mode=reading.mode)
    else:
        x = _collect(((_samples(batch, reading, name, row), name, row) for batch, name, row in batches()), count, file)
    return Split(x=x, y=np.concatenate(y), owner=np.concatenate(owners) if owners else None)


def _collect(pieces: Iterator[tuple[np.ndarray, str, int]], count: int, file: Path) -> np.ndarray:
    x: np.ndarray | None = None
    at = 0
    for piece, name, row in pieces:
        if x is None:
            x = np.lib.format.open_memmap(file, mode="w+", dtype=piece.dtype, shape=(count, *piece.shape[1:]))
        if piece.shape[1:] != x.shape[1:] or piece.dtype != x.dtype:
            raise ConfigError(
                f"data.path has samples of shape {piece.shape[1:]} and type {piece.dtype} in {name}, from row {row} "
                f"on; all must be as the first, {x.shape[1:]} and {x.dtype}, so convert them"
            )
        x[at : at + len(piece)] = piece
        at += len(piece)
    assert x is not None
    return x


def _is_list_column(table: Table, column: str) -> bool:
    import pyarrow as pa

    return _is_list(pa, _plain_type(table.schema.field(column).type))


def _column(batch: Any, column: str) -> Any:
    """An array of the column without what wraps its values."""
    import pyarrow as pa

    values = batch.column(column)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_struct(values.type):
        values = values.flatten()[values.type.get_field_index("bytes")]
    return values


def _refuse_null(values: Any, what: str, name: str, row: int, remedy: str) -> None:
    if values.null_count:
        first = int(np.argmin(np.asarray(values.is_valid())))
        raise ConfigError(f"data.path has no {what} in {name}, row {row + first}; {remedy}")


def _encoded(batch: Any, column: str, name: str, row: int) -> list[bytes]:
    values = _column(batch, column)
    remedy = "images must lie in the parquet file, so export it with them embedded"
    _refuse_null(values, "image bytes", name, row, remedy)
    found: list[bytes] = values.to_pylist()
    return found


def _texts(batch: Any, column: str, name: str, row: int) -> list[bytes]:
    values = _column(batch, column)
    _refuse_null(values, "text", name, row, "drop rows without")
    return [text.encode() for text in values.to_pylist()]


def _targets(batch: Any, role: str, column: str, name: str, row: int) -> np.ndarray:
    """int64 or text (n,) for labels, float32 (n, outputs) for targets."""
    import pyarrow as pa

    values = _column(batch, column)
    _refuse_null(values, role, name, row, "drop unlabelled rows")
    if role == "target":
        numbers = _numbers(values, name, row).astype(np.float32)
        return numbers.reshape(len(numbers), -1)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.array(values.to_pylist(), dtype=np.str_)
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)


def _owners(batch: Any, column: str, name: str, row: int) -> np.ndarray:
    values = _column(batch, column)
    _refuse_null(values, "owner", name, row, "drop rows that nobody owns")
    found = np.array(values.to_pylist())
    return found if found.dtype.kind in "iuU" else found.astype(np.str_)


def _samples(batch: Any, reading: Reading, name: str, row: int) -> np.ndarray:
    columns = reading.columns
    if "text" in columns:
        assert reading.length is not None
        x = np.zeros((batch.num_rows, reading.length), np.uint8)
        for at, text in enumerate(_texts(batch, str(columns["text"]), name, row)):
            piece = np.frombuffer(text[: reading.length], np.uint8)
            x[at, : len(piece)] = piece
        return x
    if "features" in columns:
        given = columns["features"]
        parts = [
            _numbers(_column(batch, column), name, row).reshape(batch.num_rows, -1)
            for column in ((given,) if isinstance(given, str) else given)
        ]
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which `Dataset.check` refuses
            return np.concatenate(parts, axis=1).astype(np.float32)
    pixels = _numbers(_column(batch, str(columns["image"])), name, row)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4:
        raise ConfigError(
            f"data.columns.image is {columns['image']!r}; its arrays have the shape {pixels.shape[1:]}, and an image "
            "has (H, W), (C, H, W) or (H, W, C), so name it in data.columns.features"
        )
    if pixels.dtype.kind == "f":
        if reading.size is not None or reading.mode is not None:
            raise ConfigError("data.size and data.mode change images of 8 bits, and these are floats; leave them null")
        return pixels.astype(np.float32)
    if pixels.size and (pixels.min() < 0 or pixels.max() > 255):
        raise ConfigError(
            f"data.path has a pixel of {int(pixels.max() if pixels.max() > 255 else pixels.min())} in {name}, from row "
            f"{row} on; whole numbers must lie from 0 to 255, so convert them to floats"
        )
    return fit(pixels.astype(np.uint8), reading.size, reading.mode)


def _numbers(values: Any, name: str, row: int) -> np.ndarray:
    """Numbers in nested lists of equal lengths as one array (rows, ...)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = [len(values)]
    while True:
        _refuse_null(values, "number", name, row, "fill in or drop such rows")
        if not _is_list(pa, values.type):
            break
        if pa.types.is_fixed_size_list(values.type):
            lengths = [values.type.list_size]
        else:
            lengths = pc.unique(pc.list_value_length(values)).to_pylist() or [0]
        if len(lengths) > 1:
            raise ConfigError(
                f"data.path has lists of {lengths[0]} and of {lengths[1]} values in {name}, from row {row} on; all "
                "must have one length, so pad or cut them"
            )
        shape.append(int(lengths[0]))
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)


def _continued(texts: list[bytes], owners: np.ndarray | None, length: int) -> Split:
    """Texts to be continued: those of each owner one after another, a line break between them, cut in windows."""
    everyone = np.zeros(len(texts), np.int64) if owners is None else owners
    x, y, who = [], [], []
    for owner in np.unique(everyone):
        joined = b"\n".join(texts[i] for i in np.flatnonzero(everyone == owner))
        inputs, targets = windows(np.frombuffer(joined, np.uint8), length, length)
        x.append(inputs)
        y.append(targets)
        who.append(np.full(len(inputs), owner))
    samples = np.concatenate(x)
    if not len(samples):
        raise ConfigError(f"data.length is {length}; no text has one byte more than that, so lower it")
    return Split(x=samples, y=np.concatenate(y), owner=None if owners is None else np.concatenate(who))
