"""Text as characters, to be continued: any file, and Shakespeare by speaking role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedray.data.dataset import Dataset
from fedray.data.sources import leaf
from fedray.data.sources.cache import Decoder, Source, cached, hash_files
from fedray.data.sources.splits import Decoded, Split, check_count, check_fraction, settle
from fedray.data.sources.windows import encode, windows
from fedray.errors import ConfigError

_SPEECH = re.compile(r"^([^\n:]+):[ ]*(?:\n|$)")


def text(
    *, path: str | None = None, length: int = 80, stride: int | None = None, test_fraction: float = 0.1
) -> Dataset:
    """A plain-text file (UTF-8) as characters: x uint8 or int32 (n, length), y int64 (n, length) one place further.

    length:        characters of a sample.
    stride:        from the start of a sample to that of the next; None for `length`, so that none overlap.
    test_fraction: share of the text, at its end, that is the test set; no sample reaches over the border.

    The vocabulary is the file's characters, sorted. Raises ConfigError for a file that is missing, not UTF-8 or too
    short.
    """
    length, stride, fraction = _checked(length, stride, test_fraction)
    file = _file(path, "the text")
    source = Source(
        kind="text",
        settings={"length": length, "stride": stride, "test_fraction": fraction},
        place=str(file),
        contents=lambda: hash_files({"all": [file]}),
        open=lambda: _decoder({"": _read(file)}, length, stride, fraction, least=None),
    )
    return cached(source, name="text")


def shakespeare(
    *,
    path: str | None = None,
    length: int = 80,
    stride: int | None = None,
    test_fraction: float = 0.1,
    min_chars: int | None = None,
) -> Dataset:
    """Plays by speaking role: samples as those of `text`, train_owner and test_owner the role (McMahan et al. 2017,
    section 3; Caldas et al. 2018, LEAF).

    path:          a text file of speeches ("ROLE:", its lines, an empty line), a folder with input.txt, or a folder of
                   LEAF's JSON files. LEAF has cut its samples, so there length must be theirs (80), stride and
                   min_chars null, and test_fraction is read only if it has no test files.
    length:        characters of a sample.
    stride:        from the start of a sample to that of the next; None for `length`, so that none overlap.
    test_fraction: share of each role's text, at its end, that is for testing; no sample reaches over the border.
    min_chars:     roles with fewer characters are dropped; None for the fewest that give each role a training and a
                   test sample. A role's characters are its speeches, in order, a line break between them, names of
                   roles left out.

    The vocabulary is the characters of the roles that stay, sorted. Raises ConfigError for what cannot be read and
    where no role is long enough.
    """
    length, every, fraction = _checked(length, stride, test_fraction)
    folder = None if path is None else Path(path).expanduser()
    if folder is not None and folder.is_dir() and not (folder / "input.txt").is_file():
        files = leaf.find(folder) or leaf.find(folder / "data")
        if files is None:
            raise ConfigError(
                f"data.path is {str(path)!r}: no input.txt and no train/*.json in it; give a text file of speeches, "
                "the folder of input.txt, or LEAF's data folder"
            )
        for key, value in (("stride", stride), ("min_chars", min_chars)):
            if value is not None:
                raise ConfigError(
                    f"data.{key} is {value}; LEAF's files hold samples that are cut already, so leave it null"
                )
        return cached(leaf.source(files, test_fraction=fraction, length=length), name="shakespeare")
    least = _least(length, fraction)
    if min_chars is not None and check_count("min_chars", min_chars) < least:
        raise ConfigError(
            f"data.min_chars is {min_chars}; a training and a test sample of length {length} at test_fraction "
            f"{fraction} take {least} characters, so raise it to that or lower data.length"
        )
    file = _file(None if folder is None else str(folder / "input.txt" if folder.is_dir() else folder), "the plays")
    source = Source(
        kind="roles",
        settings={"length": length, "stride": every, "test_fraction": fraction, "min_chars": min_chars or least},
        place=str(file),
        contents=lambda: hash_files({"all": [file]}),
        open=lambda: _decoder(roles(_read(file)), length, every, fraction, least=min_chars or least),
    )
    return cached(source, name="shakespeare")


def roles(play: str) -> dict[str, str]:
    """What each role says. A block between empty lines that starts with "ROLE:" is a speech; others go on with it."""
    speeches: dict[str, list[str]] = {}
    speaker = None
    for block in re.split(r"\n{2,}", play.strip("\n")):
        match = _SPEECH.match(block)
        if match:
            speaker, block = match[1], block[match.end() :]
        if speaker is not None and block:
            speeches.setdefault(speaker, []).append(block)
    return {speaker: "\n".join(said) for speaker, said in speeches.items()}


def _checked(length: int, stride: int | None, test_fraction: float) -> tuple[int, int, float]:
    length = check_count("length", length)
    return length, length if stride is None else check_count("stride", stride), check_fraction(test_fraction)


def _file(path: str | None, what: str) -> Path:
    if path is None:
        raise ConfigError(f"data.path is null; {what} must come from a file, so pass data.path=FILE.txt")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"data.path is {path!r}: no such file; give a text file")
    return file


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode().replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(f"data.path has {file}, which cannot be read ({error.strerror}); allow reading it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.path has {file}, which is not UTF-8 (byte {error.start}); save it as UTF-8 text"
        ) from error


def _cut(count: int, fraction: float) -> int:
    return count - round(fraction * count)


def _least(length: int, fraction: float) -> int:
    """The fewest characters that can be cut into a training and a test sample."""
    count = max(2 * (length + 1), int((length + 0.5) / min(fraction, 1 - fraction)) - 2)
    while min(_cut(count, fraction), count - _cut(count, fraction)) < length + 1:
        count += 1
    return count


def _decoder(said: Mapping[str, str], length: int, stride: int, fraction: float, *, least: int | None) -> Decoder:
    """least: None for a text that nobody owns."""
    needed = _least(length, fraction) if least is None else least
    kept = {who: words for who, words in said.items() if len(words) >= needed}
    if not kept:
        longest = max(map(len, said.values()), default=0)
        raise ConfigError(
            f"data.path has {longest} characters {'' if least is None else 'in its longest role'}; a training and a "
            f"test sample of length {length} take {needed}, so lower data.length"
            f"{'' if least is None else ' or data.min_chars'}".replace("  ", " ").replace(" ;", ";")
        )

    def decode(scratch: Path) -> Decoded:
        codes, vocabulary = encode(kept)
        pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
        owners: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        for who, tokens in codes.items():
            cut = _cut(len(tokens), fraction)
            for split, part in (("train", tokens[:cut]), ("test", tokens[cut:])):
                pieces[split].append(windows(part, length, stride))
                owners[split].append(np.full(len(pieces[split][-1][0]), who))
        train, test = (
            Split(
                x=np.concatenate([x for x, _ in pieces[split]]),
                y=np.concatenate([y for _, y in pieces[split]]),
                owner=None if least is None else np.concatenate(owners[split]),
            )
            for split in ("train", "test")
        )
        return settle(
            train, test, scratch=scratch, test_fraction=None, objective="next_token", vocabulary=len(vocabulary)
        )

    return decode
