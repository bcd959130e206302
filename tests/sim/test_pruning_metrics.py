"""What a row says about masks, worked out again from the masks that clients sent and that the server kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedray.corrections import Scaffold
from fedray.pruners import FedDST, Magnitude
from fedray.strategies import FedAvg
from fedray.testing.compare import kept
from fedray.testing.federation import Ran
from fedray.testing.subject import Subject

DST = FedDST(sparsity=0.6, every=2, until=6)
RETURNING = Magnitude(sparsity=0.8, schedule="iterative", start=1, finish=5, every=2, sticky=False)


def prunable(ran: Ran, mask):
    worker = ran.driver.worker
    spans = worker.origin.layout.spans
    return torch.cat([kept(mask, worker.origin)[spans[name]] for name in worker.prunable])


def sent(ran: Ran, round: int):
    return [prunable(ran, upload.wanted.mask) for upload in ran.heard if upload.round == round]


@pytest.fixture(scope="module", params=[(FedAvg(),), (FedAvg(), Scaffold())], ids=["fedavg", "with_scaffold"])
def moving(request) -> Ran:
    """Clients move their masks in every second round, on data that differ."""
    return Subject(DST).run(DST, *request.param)


def test_overlap_is_the_share_of_what_two_clients_kept_of_what_either_did(moving):
    found = {row["round"]: row["prune/overlap"] for row in moving.rows}
    for round, overlap in found.items():
        pairs = list(itertools.combinations(sent(moving, round), 2))
        both, either = (sum(int(how(a, b).sum()) for a, b in pairs) for how in (torch.logical_and, torch.logical_or))
        assert overlap == pytest.approx(both / either, rel=1e-12)
    assert min(found.values()) < 0.9


def test_the_sparsity_of_clients_is_that_of_what_they_sent(moving):
    for row in moving.rows:
        masks = sent(moving, row["round"])
        expected = sum(1 - float(mask.float().mean()) for mask in masks) / len(masks)
        assert row["client/sparsity_mean"] == pytest.approx(expected, rel=1e-6)


def test_a_client_that_trains_and_sends_everything_has_no_sparsity():
    ran = Subject(RETURNING).run(RETURNING, FedAvg())
    rows = {row["round"]: row for row in ran.rows}
    for round in (3, 5):
        assert all(bool(mask.all()) for mask in sent(ran, round))
        assert "client/sparsity_mean" not in rows[round]
        assert rows[round]["model/sparsity"] > 0.3
    assert rows[4]["client/sparsity_mean"] > 0.3


def test_churn_regrowth_and_dead_filters_are_those_of_the_servers_masks(moving):
    worker = moving.driver.worker
    for row, before, after in zip(moving.rows, moving.servers, moving.servers[1:], strict=False):
        old, new = prunable(moving, before.mask), prunable(moving, after.mask)
        assert row["prune/churn"] == pytest.approx(float((old != new).float().mean()), rel=1e-6)
        assert row["prune/regrown"] == pytest.approx(int((new & ~old).sum()) / int(new.sum()), rel=1e-12)
        dead = sum(int((~after.mask[name].flatten(1).any(1)).sum()) for name in worker.prunable)
        assert row["prune/dead_filters"] == dead
