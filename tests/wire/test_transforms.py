"""Laws of the transforms: which values are sent, what they decode to, and what is left."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedray.errors import ConfigError, NumericError, WireError
from fedray.keys import Key
from fedray.tree import Layout, Tree
from fedray.wire.bits import encode_positions
from fedray.wire.transforms import PowerSGD, RandomK, Threshold, TopK, stc
from fedray.wire.values import Where
from fedray.wire.writers import ScaledSign

KEY = Key.of(12).fold("transform")
DRAWS = 10_000
laws = settings(max_examples=80, deadline=None, derandomize=True, database=None)

SPARSE = (
    TopK(),
    TopK(fraction=1.0),
    TopK(fraction=0.3, level="global"),
    RandomK(),
    RandomK(fraction=0.7),
    RandomK(fraction=1.0),
    Threshold(),
    Threshold(value=1.0),
)
SHAPES = st.sampled_from([(), (0,), (1,), (9,), (3, 0), (1, 5), (4, 3), (2, 2, 3)])
FRACTIONS = st.floats(0.001, 1.0)


def where_all(*shapes):
    return Where(Layout(tuple(f"t{number}" for number in range(len(shapes))), shapes))


@st.composite
def places(draw):
    """All coordinates of a few small tensors, or a subset of them, perhaps none."""
    where = where_all(*draw(st.lists(SHAPES, max_size=4)))
    if draw(st.booleans()):
        return where
    return where.pick(np.flatnonzero(draw(arrays.arrays(np.bool_, where.layout.size))))


@st.composite
def cases(draw, elements=None):
    """Coordinates and finite values for them, which nobody may write into."""
    where = draw(places())
    numbers = st.floats(-10, 10, width=32) | st.sampled_from([0.0, -0.0, 1e-45, 3e38, -3e38])
    numbers = numbers if elements is None else elements
    return where, frozen(draw(arrays.arrays(np.float32, where.size, elements=numbers)))


def frozen(values):
    values = np.array(values, np.float32)
    values.flags.writeable = False
    return values


def random_values(size, seed=0):
    return frozen(np.random.default_rng(seed).standard_normal(size))


def encode(transform, values, where, *, key=KEY, warm=None, entropy="none"):
    return transform.encode(values, where, key=key, warm=warm, entropy=entropy)


def there_and_back(transform, values, where, **kwargs):
    """Decoded by one who has only the side information; and the transform's warm start."""
    sent, inner, side, warm = encode(transform, values, where, **kwargs)
    found = transform.place(side, where)
    assert sent.shape == (inner.size,) == (found.size,)
    return transform.decode(frozen(sent), side, where, found), warm


def indices_of(inner, where):
    """Which of the values of `where` those of `inner` are."""
    places = range(where.layout.size) if where.positions is None else where.positions.tolist()
    index = {place: at for at, place in enumerate(places)}
    return [index[place] for place in inner.positions.tolist()]


def spans(where, level):
    bounds = where.bounds("tensor") if level == "tensor" else np.array([0, where.size])
    return [(int(a), int(b)) for a, b in pairwise(bounds) if b > a]


# -- some of the values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", SPARSE, ids=lambda one: one.label)
@pytest.mark.parametrize("entropy", ["none", "zstd"])
@laws
@given(case=cases())
def test_what_is_sent_is_exact_and_the_rest_is_left_over(transform, entropy, case):
    where, values = case
    sent, inner, side, warm = encode(transform, values, where, entropy=entropy)
    assert warm is None
    assert inner.layout == where.layout
    assert sent.dtype == np.float32
    found = transform.place(side, where)
    assert found.positions.tolist() == inner.positions.tolist()
    decoded = transform.decode(frozen(sent), side, where, found)
    assert decoded.dtype == np.float32
    at = np.zeros(where.size, np.bool_)
    at[indices_of(inner, where)] = True
    assert decoded[at].tobytes() == values[at].tobytes() == sent.tobytes()
    assert decoded[~at].tobytes() == bytes(4 * int((~at).sum()))  # +0.0
    residual = values - decoded
    assert (decoded + residual == values).all()
    assert (residual[at] == 0).all()
    assert (residual[~at] == values[~at]).all()
    again = encode(transform, values.copy(), where, entropy=entropy)
    assert (again[0].tobytes(), again[2]) == (sent.tobytes(), side)


def share(fraction, size):
    return max(1, round(fraction * size))


@pytest.mark.parametrize("level", ["tensor", "global"])
@laws
@given(case=cases(st.sampled_from([0.0, -0.0, 0.5, -0.5, 2.0, -2.0])), fraction=FRACTIONS)
def test_topk_sends_exactly_k_and_the_lower_index_on_a_tie(level, case, fraction):
    where, values = case
    _, inner, _, _ = encode(TopK(fraction=fraction, level=level), values, where)
    expected = []
    for start, stop in spans(where, level):
        ranked = sorted(range(start, stop), key=lambda at: (-abs(values[at]), at))
        expected += sorted(ranked[: share(fraction, stop - start)])
    assert indices_of(inner, where) == expected


@pytest.mark.parametrize("level", ["tensor", "global"])
@laws
@given(where=places(), fraction=FRACTIONS, seed=st.integers(0, 99))
def test_topk_is_that_of_torch(level, where, fraction, seed):
    stream = np.random.default_rng(seed)
    values = (stream.permutation(where.size) + 1) * stream.choice([-1e-3, 1e-3], where.size)
    sent, _, _, _ = encode(TopK(fraction=fraction, level=level), frozen(values), where)
    chosen = torch.from_numpy(values.astype(np.float32))
    expected = []
    for start, stop in spans(where, level):
        top = chosen[start:stop].abs().topk(share(fraction, stop - start)).indices
        expected.append(chosen[start:stop][top.sort().values])
    assert sent.tolist() == (torch.cat(expected).tolist() if expected else [])


def test_topk_counts_by_tensor_and_of_all():
    where = where_all((10, 10), (30,), (3,), (0,))
    values = np.ones(133, np.float32)
    values[100:] = 9
    _, inner, _, _ = encode(TopK(), frozen(values), where)
    assert np.diff(inner.bounds("tensor")).tolist() == [10, 3, 1, 0]
    _, inner, _, _ = encode(TopK(level="global"), frozen(values), where)
    assert inner.positions.tolist() == list(range(100, 113))


def test_positions_that_are_not_the_expected_number_are_refused():
    where = where_all((20,), (20,)).pick(np.arange(0, 40, 2))  # ten of each
    for positions in ([0, 1, 10], [0, 10, 11], [0], [], [0, 1]):
        side = encode_positions(np.array(positions, np.int64), 20, entropy="none")
        with pytest.raises(WireError, match=rf"positions as topk:0\.1 are {len(positions)}; 2 were expected"):
            TopK().place(side, where)
        if len(positions) != 2:
            with pytest.raises(WireError, match=r"positions as topk:0\.1/global are"):
                TopK(level="global").place(side, where)
    good = encode_positions(np.array([3, 19]), 20, entropy="none")
    assert TopK().place(good, where).positions.tolist() == [6, 38]


@pytest.mark.parametrize("transform", [*SPARSE, PowerSGD()], ids=lambda one: one.label)
@laws
@given(where=places(), side=st.binary(max_size=20))
def test_side_information_that_is_garbage_is_refused_or_gives_places_that_exist(transform, where, side):
    try:
        inner = transform.place(side, where)
    except WireError:
        return
    if inner.positions is not None:
        assert inner.size <= where.size
        assert (np.diff(inner.positions) > 0).all()
        indices_of(inner, where)


@laws
@given(case=cases(), fraction=FRACTIONS, seed=st.integers(0, 10**6))
def test_a_random_subset_costs_eight_bytes_from_which_both_ends_draw_it(case, fraction, seed):
    where, values = case
    transform = RandomK(fraction=fraction)
    _, inner, side, _ = encode(transform, values, where, key=Key.of(seed))
    assert len(side) == 8
    assert inner.size == (share(fraction, where.size) if where.size else 0)
    assert transform.place(side, where).positions.tolist() == inner.positions.tolist()
    for wrong in (b"", side[:-1], side + b"\0"):
        with pytest.raises(WireError, match="drawn from 8 bytes"):
            transform.place(wrong, where)


def test_a_random_subset_is_another_for_another_key_and_every_value_is_as_likely():
    where, transform = where_all((5, 4), (10,)), RandomK(fraction=0.2)
    values = random_values(30)
    assert encode(transform, values, where, key=Key.of(1))[2] != encode(transform, values, where, key=Key.of(2))[2]
    counts = np.zeros(30)
    for seed in range(2000):
        counts[encode(transform, values, where, key=Key.of(seed))[1].positions] += 1
    assert np.abs(counts - 400).max() < 4.5 * np.sqrt(2000 * 0.2 * 0.8)


def test_an_unbiased_random_subset_is_right_on_average():
    values = frozen([1.0, -0.5, 0.25, 3.0, 0.0, -1e-3, 7.0])
    where = where_all((3,), (2, 2))
    transform = RandomK(fraction=0.3, unbiased=True)  # 2 of 7
    total, squares = np.zeros(7), np.zeros(7)
    for seed in range(DRAWS):
        sent, inner, side, _ = encode(transform, values, where, key=KEY.fold(seed))
        decoded = transform.decode(sent, side, where, inner).astype(np.float64)
        total += decoded
        squares += decoded**2
    assert set(np.flatnonzero(decoded)) <= set(inner.positions.tolist())
    sigma = np.abs(values) * np.sqrt((7 / 2 - 1) / DRAWS)
    assert (np.abs(total / DRAWS - values) <= 4 * sigma + 1e-6).all()
    np.testing.assert_allclose(squares / DRAWS, 7 / 2 * values.astype(np.float64) ** 2, rtol=0.1)


def test_scaling_beyond_float32_is_refused():
    where = where_all((1,), (4,)).pick(np.array([1, 2, 3]))
    with pytest.raises(NumericError, match=r"tensor 't1' does not fit float32 scaled by 3/1; use unbiased=false or"):
        encode(RandomK(fraction=0.3, unbiased=True), frozen([2e38, -2e38, 2e38]), where)


@laws
@given(case=cases(), value=st.floats(0.01, 5.0))
def test_a_threshold_sends_what_exceeds_it(case, value):
    where, values = case
    _, inner, _, _ = encode(Threshold(value=value), values, where)
    limit = float(np.float32(value))
    assert indices_of(inner, where) == [at for at, x in enumerate(values.tolist()) if abs(x) > limit]


@pytest.mark.parametrize("transform", [TopK(fraction=0.1), TopK(fraction=0.05, level="global"), RandomK(), Threshold()])
def test_with_error_feedback_nothing_is_ever_lost(transform):
    """Sent so far and what is left are the sum of all changes; in whole numbers, so that sums are exact."""
    where = where_all((20, 10), (15,))
    stream = np.random.default_rng(2)
    total, sent, residual = np.zeros(215), np.zeros(215), np.zeros(215, np.float32)
    for number in range(30):
        change = stream.integers(-99, 100, 215).astype(np.float32)
        total += change
        wanted = frozen(change + residual)
        decoded, _ = there_and_back(transform, wanted, where, key=KEY.fold(number))
        sent += decoded
        residual = wanted - decoded
        assert (sent + residual == total).all()


@laws
@given(where=places(), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_stc_is_one_magnitude_for_each_tensor_and_exactly_k_values(where, fraction, seed):
    values = random_values(where.size, seed)
    select, signs = stc(fraction)
    assert (select, signs) == (TopK(fraction=fraction), ScaledSign())
    sent, inner, side, _ = encode(select, values, where)
    written = signs.encode(sent, inner, key=KEY)
    decoded = select.decode(signs.decode(memoryview(written), inner), side, where, select.place(side, where))
    for start, stop in spans(where, "tensor"):
        k = share(fraction, stop - start)
        top = torch.from_numpy(values.copy())[start:stop].abs().topk(k)
        part = decoded[start:stop]
        assert np.count_nonzero(part) == k
        assert len(set(np.abs(part[part != 0]).tolist())) == 1
        assert np.abs(part).max() == pytest.approx(top.values.mean().item(), rel=1e-6)
        assert (np.sign(part[top.indices]) == np.sign(values[start:stop][top.indices])).all()
    assert len(written) == 4 * len(spans(where, "tensor")) + -(-inner.size // 8)


# -- low rank --------------------------------------------------------------------------------------------------------


@laws
@given(rows=st.integers(1, 12), shape=st.sampled_from([(1,), (2,), (5,), (3, 2, 2)]), seed=st.integers(0, 99))
def test_full_rank_is_exact(rows, shape, seed):
    where = where_all((rows, *shape), (4,))
    values = random_values(where.size, seed)
    transform = PowerSGD(rank=12, min_ratio=1e-3)
    decoded, warm = there_and_back(transform, values, where)
    np.testing.assert_allclose(decoded, values, atol=1e-5)
    # Also from where a message of lower rank ended, and from zeros.
    for last in (np.outer(np.ones(rows), values[: where.size // rows]), np.zeros(rows)):
        flat = np.zeros(where.size, np.float32)
        flat[: last.size] = last.reshape(-1)
        _, warm = there_and_back(transform, frozen(flat), where, warm=warm)
        decoded, _ = there_and_back(transform, values, where, warm=warm)
        np.testing.assert_allclose(decoded, values, atol=1e-5)


def test_factors_are_an_orthonormal_basis_and_the_projection_onto_it():
    where = where_all((16, 3, 3), (16,), (40, 30))
    values = random_values(where.size)
    sent, inner, side, warm = encode(PowerSGD(rank=3, min_ratio=1.0), values, where)
    assert side == b""
    assert inner.layout == Layout(("t0.p", "t0.q", "t1", "t2.p", "t2.q"), ((16, 3), (9, 3), (16,), (40, 3), (30, 3)))
    assert inner.positions is None
    factors, whole = Tree(inner.layout, torch.tensor(sent)), Tree(where.layout, torch.tensor(values))
    decoded = Tree(where.layout, torch.tensor(PowerSGD(rank=3, min_ratio=1.0).decode(sent, side, where, inner)))
    for name, rows in (("t0", 16), ("t2", 40)):
        p = factors[f"{name}.p"].double()
        np.testing.assert_allclose(p.T @ p, torch.eye(3), atol=1e-5)
        matrix = whole[name].reshape(rows, -1).double()
        np.testing.assert_allclose(decoded[name].reshape(rows, -1), p @ (p.T @ matrix), atol=1e-5)
    assert torch.equal(decoded["t1"], whole["t1"])
    assert warm.layout == Layout(("t0", "t2"), ((9, 3), (30, 3)))
    assert torch.equal(warm["t2"], factors["t2.q"])


def test_a_warm_start_comes_to_the_best_approximation_of_its_rank():
    stream = np.random.default_rng(3)
    left, _ = np.linalg.qr(stream.standard_normal((40, 30)))
    right, _ = np.linalg.qr(stream.standard_normal((30, 30)))
    matrix = (left * 0.7 ** np.arange(30)) @ right
    best = np.sqrt((0.7 ** (2 * np.arange(3, 30))).sum())
    where, transform, values = where_all((40, 30)), PowerSGD(rank=3), frozen(matrix.reshape(-1))
    warm, errors = None, []
    for number in range(12):
        decoded, warm = there_and_back(transform, values, where, key=KEY.fold(number), warm=warm)
        errors.append(np.linalg.norm(decoded - values))
    assert errors[0] > 1.1 * best
    assert errors[1] < errors[0]
    assert errors[-1] == pytest.approx(best, rel=1e-3)
    cold, _ = there_and_back(transform, values, where, key=KEY.fold(11))
    assert errors[-1] < 0.95 * np.linalg.norm(cold - values)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-25, 1.0, 1e30, 1e36])
def test_any_finite_matrix_has_finite_factors(size):
    where, transform = where_all((20, 10)), PowerSGD(rank=2, min_ratio=0.1)
    stream = np.random.default_rng(4)
    sparse = np.where(stream.random((20, 10)) < 0.02, 1.0, 0.0)
    one = np.zeros((20, 10))
    one[7, 3] = 1
    for matrix in (one, sparse, np.ones((20, 10)), stream.standard_normal((20, 10)), np.zeros((20, 10))):
        values = frozen((matrix * size).reshape(-1))
        sent, inner, side, warm = encode(transform, values, where)
        assert np.isfinite(sent).all()
        p = Tree(inner.layout, torch.from_numpy(sent))["t0.p"].double()
        np.testing.assert_allclose(p.T @ p, torch.eye(2), atol=1e-5)
        decoded = transform.decode(sent, side, where, inner)
        assert np.isfinite(decoded).all()
        if not matrix.any():
            assert (decoded == 0).all()
        if np.linalg.matrix_rank(matrix) == 1:
            np.testing.assert_allclose(decoded, values, rtol=1e-5, atol=size * 1e-5 + 3e-45)
        assert torch.isfinite(warm.flat).all()


def test_a_matrix_of_zeros_does_not_hold_later_ones_at_zero():
    where, transform = where_all((20, 10)), PowerSGD(rank=1)
    matrix = np.zeros((20, 10))
    matrix[9, 8] = 5.0  # nothing of it is in the first row or the first column
    _, warm = there_and_back(transform, frozen(np.zeros(200)), where)
    decoded, _ = there_and_back(transform, frozen(matrix.reshape(-1)), where, warm=warm)
    np.testing.assert_allclose(decoded, matrix.reshape(-1), atol=1e-5)


def test_factors_beyond_float32_are_refused():
    where = where_all((3,), (20, 30))
    for number in (1e38, 3e38):
        values = frozen(np.full(603, number))
        with pytest.raises(
            NumericError, match=r"tensor 't1\.[pq]' does not fit float32 as factors; leave out powersgd"
        ):
            encode(PowerSGD(), values, where)


def test_small_matrices_and_vectors_travel_as_they_are():
    where = where_all((10, 10), (100,), (12, 12), (3, 0), ())
    values = random_values(where.size)
    # 10 x 10 at rank 2 is 100 for 40, which is 2.5 times less; 12 x 12 is 3 times less.
    for ratio, factored in ((2.5, {"t0", "t2"}), (2.6, {"t2"}), (3.1, set())):
        sent, inner, side, warm = encode(PowerSGD(min_ratio=ratio), values, where)
        assert set(warm.layout.names) == factored
        plain = [name for name in where.layout.names if name not in factored]
        assert [name for name in inner.layout.names if name in where.layout.names] == plain
        decoded = PowerSGD(min_ratio=ratio).decode(sent, side, where, inner)
        for name in plain:
            span = where.layout.spans[name]
            assert decoded[span].tobytes() == values[span].tobytes()


def test_the_same_bits_wherever_the_values_lie_in_memory():
    where = where_all((3,), (33, 17))
    values = random_values(where.size)
    transform, results = PowerSGD(), set()
    for offset in range(0, 64, 4):
        memory = np.zeros(4 * where.size + 64, np.uint8)
        moved = memory[offset : offset + 4 * where.size].view(np.float32)
        moved[:] = values
        sent, inner, side, warm = encode(transform, moved, where)
        memory = np.zeros(sent.nbytes + 64, np.uint8)
        far = memory[offset : offset + sent.nbytes].view(np.float32)
        far[:] = sent
        decoded = transform.decode(far, side, where, inner)
        results.add((sent.tobytes(), warm.flat.numpy().tobytes(), decoded.tobytes()))
    assert len(results) == 1


def test_the_first_start_is_drawn_from_the_key_and_a_warm_one_of_another_layout_counts_as_none():
    where, transform = where_all((20, 30)), PowerSGD()
    values = random_values(600)
    first, _, _, warm = encode(transform, values, where, key=Key.of(1))
    assert first.tobytes() != encode(transform, values, where, key=Key.of(2))[0].tobytes()
    stale = Tree.zeros(Layout(("t0",), ((29, 2),)))
    assert first.tobytes() == encode(transform, values, where, key=Key.of(1), warm=stale)[0].tobytes()
    before = warm.flat.clone()
    second = encode(transform, values, where, key=Key.of(1), warm=warm)[0].tobytes()
    assert second == encode(transform, values, where, key=Key.of(2), warm=warm)[0].tobytes() != first.tobytes()
    assert torch.equal(warm.flat, before)


def test_what_is_cut_by_a_mask_and_what_has_side_information_is_refused():
    where = where_all((20, 30))
    cut = where.pick(np.arange(500))
    with pytest.raises(WireError, match=r"powersgd:2 needs whole tensors, and a mask cuts this part; use topk"):
        encode(PowerSGD(), random_values(500), cut)
    with pytest.raises(WireError, match="needs whole tensors"):
        PowerSGD().place(b"", cut)
    with pytest.raises(WireError, match="no side information; 1 bytes were sent"):
        PowerSGD().place(b"x", where)


# -- what a chain needs to know --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "label", "structured", "unbiased"),
    [
        (TopK(fraction=0.1), "topk:0.1", False, False),
        (TopK(fraction=0.001, level="global"), "topk:0.001/global", False, False),
        (RandomK(fraction=0.1), "randomk:0.1", False, False),
        (RandomK(fraction=0.1, unbiased=True), "randomk:0.1/unbiased", False, True),
        (Threshold(value=0.005), "threshold:0.005", False, False),
        (PowerSGD(rank=2), "powersgd:2", True, False),
    ],
    ids=lambda one: getattr(one, "label", None),
)
def test_labels_and_kinds(transform, label, structured, unbiased):
    assert transform.label == label
    assert (transform.structured, transform.unbiased_scale) == (structured, unbiased)
    assert (transform.lossy, transform.changes_only) == (True, True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TopK(fraction=0.0), "fraction"),
        (lambda: TopK(fraction=1.1), "fraction"),
        (lambda: TopK(fraction=float("nan")), "fraction"),
        (lambda: TopK(level="channel"), "level"),
        (lambda: stc(0.0), "fraction"),
        (lambda: RandomK(fraction=-0.1), "fraction"),
        (lambda: Threshold(value=0.0), "value"),
        (lambda: Threshold(value=float("inf")), "value"),
        (lambda: PowerSGD(rank=0), "rank"),
        (lambda: PowerSGD(min_ratio=0.0), "min_ratio"),
        (lambda: PowerSGD(min_ratio=float("nan")), "min_ratio"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(make, name):
    with pytest.raises(ConfigError, match=rf"^{name} is .+; "):
        make()
