"""The presets of transfer do what they are for."""

import importlib.util
import json

import pytest

import fedray

QUIET = ["runtime=inline", "tracker.progress=none", "tracker.wandb.mode=disabled"]


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ccexam") is None, reason="ccexam is not installed")
def test_a_pruned_model_from_another_digit_set_beats_one_from_scratch_at_equal_bytes(tmp_path):
    rows = {}
    for name in ("transfer_digits", "transfer_digits_scratch"):
        fedray.run([f"+experiment={name}", *QUIET], folder=tmp_path / name)
        lines = (tmp_path / name / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
        assert rows[name][-1]["model/sparsity"] == pytest.approx(0.9, abs=1e-4)
    scratch = rows["transfer_digits_scratch"][-1]
    # The masks differ, and so do their bytes by a thousandth: the last round that is within the other's bytes counts.
    within = [row for row in rows["transfer_digits"] if row["wire/total_bytes"] <= scratch["wire/total_bytes"]]
    assert within[-1]["test/accuracy"] > scratch["test/accuracy"] + 0.05
