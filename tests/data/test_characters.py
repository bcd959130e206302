"""Laws of text: each target is the next character, test text comes after training text, and roles own what they say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data import hub, shakespeare, text
from fedray.data.sources.characters import roles
from fedray.data.sources.windows import encode, windows
from fedray.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(count=st.integers(0, 60), length=st.integers(1, 9), stride=st.integers(1, 9))
def test_windows_are_all_that_fit_and_targets_follow_inputs(count, length, stride):
    x, y = windows(np.arange(count, dtype=np.uint8), length, stride)
    starts = [start for start in range(0, count, stride) if start + length < count]
    assert x.tolist() == [list(range(start, start + length)) for start in starts]
    assert np.array_equal(y, x.astype(np.int64) + 1)
    assert (x.shape, x.dtype, y.dtype) == ((len(starts), length), np.uint8, np.int64)


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=50))
def test_numbers_of_characters_can_be_read_back(written):
    written = written.encode("utf-8", "ignore").decode() or "a"
    codes, vocabulary = encode({"": written})
    assert "".join(vocabulary[code] for code in codes[""]) == written
    assert vocabulary == "".join(sorted(set(written)))


def test_more_than_256_characters_take_int32():
    codes, vocabulary = encode({"": "".join(map(chr, range(100, 400)))})
    assert codes[""].dtype == np.int32
    assert len(vocabulary) == 300


def test_a_text_file_becomes_training_and_test_samples_that_do_not_overlap(tmp_path):
    written = "".join(chr(97 + (i * 7) % 26) for i in range(900)) + "Z" * 100
    (tmp_path / "a.txt").write_text(written)
    data = text(path=str(tmp_path / "a.txt"), length=10, stride=5)
    assert (data.objective, data.vocabulary, data.num_classes) == ("next_token", 27, 27)
    assert (data.shape, data.train_x.dtype) == ((10,), np.uint8)
    letters = "".join(sorted(set(written)))
    assert "".join(letters[code] for code in data.train_x[0]) == written[:10]
    assert "".join(letters[code] for code in data.train_y[1]) == written[6:16]
    assert set(data.test_x.ravel()) == {letters.index("Z")}  # the last tenth
    assert letters.index("Z") not in data.train_x
    assert letters.index("Z") not in data.train_y
    assert data.train_owner is None
    other = text(path=str(tmp_path / "a.txt"), length=10)
    assert (len(other.train_x), len(data.train_x)) == (89, 178)
    assert other.digest != data.digest


PLAY = "ANN:\nMy words.\nMore.\n\nBOB:\nHis words.\n\nANN:\nAgain.\n\nand a stanza\n\nEVE:\n\nBOB: \nEnd."


def test_speeches_belong_to_their_roles_and_stanzas_go_on():
    assert roles(PLAY) == {"ANN": "My words.\nMore.\nAgain.\nand a stanza", "BOB": "His words.\nEnd."}


def play(path, sizes):
    """Speeches in turn, each role saying its own letter."""
    blocks = [f"{who}:\n{who.lower() * count}" for who, count in sizes.items()]
    path.write_text("\n\n".join(blocks))
    return str(path)


def test_roles_own_their_samples_and_short_ones_are_dropped(tmp_path):
    path = play(tmp_path / "input.txt", {"A": 100, "B": 300, "C": 99, "D": 500})
    data = shakespeare(path=path, length=9)
    # A training and a test sample of 10 characters at a tenth each take 95 characters: round(9.5) is 10.
    assert sorted(set(data.train_owner)) == sorted(set(data.test_owner)) == [0, 1, 2, 3]
    data = shakespeare(path=str(tmp_path), length=9, min_chars=100)
    assert sorted(set(data.train_owner)) == sorted(set(data.test_owner)) == [0, 1, 2]
    assert data.vocabulary == 3  # those who stay are A, B and D
    for split in ("train", "test"):
        x, y, owner = (getattr(data, f"{split}_{which}") for which in ("x", "y", "owner"))
        assert (x == owner[:, None]).all()
        assert (y == owner[:, None]).all()
    assert np.bincount(data.train_owner).tolist() == [9, 29, 49]  # (9/10 of the characters - 10) // 9 + 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": None}, "data.path is null; the plays must come from a file"),
        ({"path": "/nowhere"}, "data.path is '/nowhere': no such file; give a text file"),
        ({"length": 0}, "data.length is 0; it must be a whole number of at least 1"),
        ({"stride": 0}, "data.stride is 0; it must be a whole number of at least 1"),
        ({"test_fraction": 0.0}, "data.test_fraction is 0.0; it must lie between 0 and 1"),
        ({"min_chars": 20}, "data.min_chars is 20; a training and a test sample of length 9 at test_fraction 0.1 take"),
        ({"length": 900}, "data.path has 300 characters in its longest role; a training and a test sample of length"),
    ],
)
def test_wrong_settings_of_shakespeare_are_refused(tmp_path, settings, sentence):
    path = play(tmp_path / "input.txt", {"A": 100, "B": 300})
    with pytest.raises(ConfigError, match=re.escape(sentence)) as info:
        shakespeare(**{"path": path, "length": 9, **settings})
    assert "\n" not in str(info.value)


def test_wrong_text_files_are_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "short").write_text("short")
    with pytest.raises(ConfigError, match=r"latin, which is not UTF-8 \(byte 3\); save it as UTF-8 text"):
        text(path=str(tmp_path / "latin"))
    with pytest.raises(ConfigError, match=r"data\.path has 5 characters; a training and a test sample of length 80"):
        text(path=str(tmp_path / "short"))


def leaf(folder, users):
    """LEAF's Shakespeare: eight characters each, with the one that follows."""
    for split, part in users.items():
        (folder / split).mkdir(parents=True)
        content = {
            "users": list(part),
            "num_samples": [len(said) - 8 for said in part.values()],
            "user_data": {
                who: {"x": [said[i : i + 8] for i in range(len(said) - 8)], "y": list(said[8:]), "raw": said}
                for who, said in part.items()
            },
        }
        (folder / split / f"all_data_niid_0_keep_0_{split}_9.json").write_text(json.dumps(content))
    return str(folder)


def test_leafs_shakespeare_is_read_by_role_with_all_characters_as_targets(tmp_path):
    said = {"HAMLET": "to be or not to be", "OPHELIA": "my lord, he hath"}
    path = leaf(tmp_path / "leaf", {"train": said, "test": {"OPHELIA": "importuned me"}})
    data = shakespeare(path=path, length=8)
    letters = "".join(sorted(set("".join(said.values()) + "importuned me")))
    assert (data.objective, data.vocabulary) == ("next_token", len(letters))
    assert "".join(letters[code] for code in data.train_x[0]) == "to be or"
    assert "".join(letters[code] for code in data.train_y[0]) == "o be or "
    assert data.train_owner.tolist() == [0] * 10 + [1] * 8
    assert data.test_owner.tolist() == [1] * 5
    assert data == hub(name="shakespeare", path=path)
    with pytest.raises(ConfigError, match=r"data\.length is 80; the samples in .* have 8 characters, so write that"):
        shakespeare(path=path)
    with pytest.raises(ConfigError, match=r"data\.stride is 3; LEAF's files hold samples that are cut already"):
        shakespeare(path=path, length=8, stride=3)
