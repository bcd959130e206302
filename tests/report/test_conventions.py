"""Conventions give the sizes that were worked out by hand, and cross where the formulas say."""

import math

import pytest

from fedray.errors import ConfigError
from fedray.report.conventions import CONVENTIONS, convention, named

FORMULAS = ("dense", "values", "coo32", "coo", "csr", "bitmap", "golomb", "entropy", "lotteryfl", "fedrts")


def row(size, params, *, bits=32, direction="up", weights=None, chain="float32", **more):
    return {
        "direction": direction, "part": "params", "chain": chain, "size": size, "kept": params, "params": params,
        "weights": params if weights is None else weights, "bits": bits, "value_bytes": 0, "mask_bytes": 0,
        "header_bytes": 0, **more,
    }  # fmt: skip


def price(name, *arguments, **more):
    return CONVENTIONS[name](row(*arguments, **more))


# MB (1e6 bytes) of one direction, float32, at densities .5 .2 .1 .05 .01: worked out independently of this code (the
# reference has 2.642 where 2.6414... is meant: it rounded twice).
WORKED = {
    (62_006, "values"): (0.124, 0.0496, 0.0248, 0.0124, 0.0025),
    (62_006, "bitmap"): (0.1318, 0.0574, 0.0326, 0.0202, 0.0102),
    (62_006, "golomb"): (0.1318, 0.0553, 0.0285, 0.0146, 0.0031),
    (6_603_710, "values"): (13.207, 5.283, 2.641, 1.321, 0.264),
    (6_603_710, "bitmap"): (14.033, 6.108, 3.467, 2.146, 1.090),
    (6_603_710, "coo"): (22.700, 9.080, 4.540, 2.270, 0.454),
    (6_603_710, "coo32"): (26.415, 10.566, 5.283, 2.641, 0.528),
    (6_603_710, "golomb"): (14.033, 5.893, 3.034, 1.560, 0.331),
    (11_173_962, "values"): (22.348, 8.939, 4.470, 2.235, 0.447),
    (11_173_962, "bitmap"): (23.745, 10.336, 5.866, 3.632, 1.844),
    (11_173_962, "golomb"): (23.745, 9.971, 5.134, 2.639, 0.560),
}


@pytest.mark.parametrize(("size", "name"), WORKED)
def test_sizes_are_those_worked_out_by_hand(size, name):
    digits = 4 if size < 1e6 else 3
    for density, expected in zip((0.5, 0.2, 0.1, 0.05, 0.01), WORKED[size, name], strict=True):
        megabytes = price(name, size, round(density * size)) / 1e6
        assert megabytes == pytest.approx(expected, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(("size", "megabytes"), [(62_006, 0.248), (6_603_710, 26.415), (11_173_962, 44.696)])
def test_dense_is_four_bytes_a_coordinate_whatever_travels(size, megabytes):
    assert price("dense", size, size // 7, bits=8) == 4 * size == pytest.approx(megabytes * 1e6, abs=600)


@pytest.mark.parametrize(("bits", "density"), [(32, 0.96875), (16, 0.9375), (8, 0.875)])
def test_a_bitmap_beats_dense_below_one_minus_one_over_the_bits(bits, density):
    size = 1_000_000
    whole = size * bits / 8
    assert price("bitmap", size, int(size * (density - 0.001)), bits=bits) < whole
    assert price("bitmap", size, int(size * (density + 0.001)), bits=bits) > whole


@pytest.mark.parametrize(("size", "density"), [(62_006, 1 / 16), (6_603_710, 1 / 23), (11_173_962, 1 / 24)])
def test_coordinates_beat_a_bitmap_below_one_over_the_width_of_an_index(size, density):
    for name, at in (("coo", density), ("coo32", 1 / 32)):
        below, above = (int(size * at * factor) for factor in (0.99, 1.01))
        assert price(name, size, below) < price("bitmap", size, below)
        assert price(name, size, above) > price("bitmap", size, above)


def test_golomb_beats_a_bitmap_below_a_density_of_0_382_and_equals_it_above():
    size = 800_000
    for density in (0.381, 0.2, 0.05, 0.001):
        assert price("golomb", size, int(size * density)) < price("bitmap", size, int(size * density))
    for density in (0.383, 0.5, 0.9):
        assert price("golomb", size, int(size * density)) == pytest.approx(price("bitmap", size, int(size * density)))


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.01, 0.001])
def test_golomb_is_close_to_the_entropy_and_never_below(density):
    size, params = 1_000_000, int(density * 1_000_000)
    positions = {name: price(name, size, params) - price("values", size, params) for name in ("golomb", "entropy")}
    assert 1.0 <= positions["golomb"] / positions["entropy"] < 1.03


def test_the_entropy_is_the_logarithm_of_the_number_of_masks():
    # log2 of (N choose n) tends to N H2(d); lgamma knows nothing of H2.
    size, params = 4_000_000, 300_000
    masks = (math.lgamma(size + 1) - math.lgamma(params + 1) - math.lgamma(size - params + 1)) / math.log(2)
    assert price("entropy", size, params, bits=8) - params == pytest.approx(masks / 8, rel=1e-5)


def test_compressed_rows_of_a_small_matrix_by_hand():
    # 12 coordinates: a matrix of 3 x 4, indices of 2 bits, four pointers up to 5, so of 3 bits.
    assert price("csr", 12, 5, bits=8) == (5 * (8 + 2) + 4 * 3) / 8


@pytest.mark.parametrize(
    ("density", "same_as"), [(0.95, None), (0.9, None), (0.89, "bitmap"), (0.3, "bitmap"), (0.29, "coo"), (0.1, "coo"),
                             (0.09, "csr")],
)  # fmt: skip
def test_the_ladder_of_fedrts_changes_coding_by_density(density, same_as):
    size = 10_000
    params = round(size * density)
    expected = size * 2.0 if same_as is None else price(same_as, size, params, bits=16)
    assert price("fedrts", size, params, bits=16) == expected


@pytest.mark.parametrize(("sparsity", "megabytes"), [(0.5, 138.34), (0.7, 86.26), (0.8, 60.22)])
def test_the_bitmap_gives_the_tables_of_fedrts_both_ways(sparsity, megabytes):
    size = 32_551_250
    both = sum(price("bitmap", size, round((1 - sparsity) * size), direction=way) for way in ("down", "up"))
    assert round(both / 1e6, 2) == megabytes


def test_lotteryfl_counts_uploaded_weights_in_mebibytes():
    up = price("lotteryfl", 21_840, 21_840, weights=21_750, bits=16)
    assert up * 5 * 400 == 174_000_000
    assert round(up * 5 * 400 / 2**20, 2) == 165.94
    assert price("lotteryfl", 21_840, 21_840, weights=21_750, direction="down") == 0
    assert CONVENTIONS["lotteryfl"].unit == "MiB"


@pytest.mark.parametrize("name", FORMULAS)
def test_a_frame_is_free_under_every_formula_and_not_under_measured(name):
    frame = row(0, 0, bits=0) | {"part": "message", "mask_bytes": 9, "header_bytes": 24}
    assert CONVENTIONS[name](frame) == 0
    assert CONVENTIONS["measured"](frame) == 33


@pytest.mark.parametrize("name", ["coo32", "coo", "csr", "bitmap", "golomb", "entropy"])
def test_positions_are_charged_only_where_some_coordinates_stay_behind(name):
    assert price(name, 1000, 1000, bits=8) == 1000
    assert price(name, 1000, 999, bits=8) > 999
    assert price(name, 1000, 300, bits=8, chain="powersgd:2") == 300


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("params", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_smallest_parts_have_a_finite_price(name, size, params):
    assert 0 <= price(name, size, params) < 100


@pytest.mark.parametrize("name", FORMULAS)
def test_a_client_that_catches_up_pays_for_each_payload_and_for_one_dense_model(name):
    one = price(name, 1003, 250, bits=8, weights=200)
    three = price(name, 3009, 750, bits=8, weights=600, payloads=3)
    assert three == pytest.approx(one if name == "dense" else 3 * one)


def test_measured_is_the_sum_of_what_was_recorded():
    assert CONVENTIONS["measured"](row(9, 5) | {"value_bytes": 100, "mask_bytes": 20, "header_bytes": 3}) == 123


def test_a_convention_can_be_added_and_asked_for_by_name():
    try:

        @convention(ways=("up",))
        def two_bytes(row):
            "Mine."
            return row["params"] * 2.0 * row["size"] / row["size"]

        (mine,) = named("two_bytes")
        assert mine(row(100, 50)) == 100
        assert mine(row(100, 50, direction="down")) == 0
        assert mine(row(0, 0)) == 0  # frames have no size, and conventions need not know
    finally:
        CONVENTIONS.pop("two_bytes", None)


def test_every_convention_says_who_uses_it_or_what_it_is():
    assert set(CONVENTIONS) == {"measured", *FORMULAS}
    assert all(len(c.price.__doc__ or "") > 40 for c in CONVENTIONS.values())


def test_an_unknown_convention_is_refused_with_the_closest():
    with pytest.raises(ConfigError, match="bitmpa is not a convention; did you mean bitmap"):
        named("dense,bitmpa")
    with pytest.raises(ConfigError, match="there are measured, dense"):
        named("zzz")
    assert [c.name for c in named("bitmap, dense,bitmap")] == ["bitmap", "dense"]
