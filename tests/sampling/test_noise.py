"""Noise is a pure function of (seed, image, step)."""

import hashlib

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.sampling import noise

SHAPE = (4, 8, 8)
GOLDEN = "a2d292a1cbcf1780cff47baa821eb9579cecd5de18fa92304c7bb8c146fedea6"


def test_the_bit_generator_is_philox4x64_10():
    """The known answer of Random123 for a zero key and counter; NumPy counts up before it draws."""
    words = np.random.Philox(counter=2**256 - 1, key=0).random_raw(4)
    assert [f"{word:016x}" for word in words.tolist()] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip


def test_normal_numbers_are_box_muller_of_the_stream():
    bits = np.random.Philox(counter=[0, 0, 6, 0], key=[3, 4]).random_raw(2)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    expected = np.float32([radius * np.cos(angle), radius * np.sin(angle)])
    np.testing.assert_array_equal(noise.normal(seed=3, image=4, step=5, shape=(2,)), expected)


def test_golden_bytes_do_not_change_between_releases():
    values = np.concatenate([noise.normal(seed, image, step, SHAPE).ravel()
                             for seed, image, step in [(0, 0, -1), (7, 3, 249), (2**63, 10**9, 0)]])  # fmt: skip
    rounded = np.round(values.astype(np.float64), 4) + 0.0  # libm may differ in the last bit between machines
    assert hashlib.sha256(rounded.tobytes()).hexdigest() == GOLDEN


def test_it_is_standard_normal():
    values = noise.normal(1, 2, 3, (200_000,)).astype(np.float64)
    assert abs(values.mean()) < 5 / np.sqrt(200_000)
    assert abs(values.std() - 1) < 5 / np.sqrt(400_000)
    assert abs((values**4).mean() - 3) < 0.12


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, noise.INITIAL)])
def test_seed_image_and_step_each_give_independent_noise(other):
    here, there = noise.normal(0, 0, 0, (10_000,)), noise.normal(*other, (10_000,))
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.05


def test_rows_equal_lone_calls_in_any_order():
    rows = np.empty((3, *SHAPE), np.float32)
    noise.Normals(SHAPE).fill_rows(rows, [(5, image, 11) for image in (3, 0, 7)])
    for row, image in zip(rows, [3, 0, 7], strict=True):
        np.testing.assert_array_equal(row, noise.normal(5, image, 11, SHAPE))


def test_odd_sizes_are_filled():
    assert np.isfinite(noise.normal(0, 0, 0, (3, 1, 1))).all()


def test_a_negative_seed_is_refused():
    with pytest.raises(UsageError, match="seed is -1"):
        noise.normal(-1, 0, 0, SHAPE)


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 5, 7), (1,), (2, 3)])
def test_numbers_written_in_place_are_those_of_the_formula_bit_for_bit(shape):
    """One object fills many arrays; its scratch space carries nothing from one to the next."""
    normals, out = noise.Normals(shape), np.empty(shape, np.float32)
    for seed, image, step in [(0, 0, -1), (7, 3, 249), (2**64 - 1, 10**9, 0)]:
        normals.fill(out, seed, image, step)
        pairs = (out.size + 1) // 2
        bits = np.random.Philox(counter=(step + 1) << 128, key=seed + (image << 64)).random_raw(2 * pairs)
        uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: out.size].reshape(shape)
        np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_the_highest_seeds_differ_from_their_neighbours():
    """2^64 - 1 and 2^63 + 1 are no float64 numbers, so they must not pass through one."""
    for seed in (2**64 - 1, 2**63 + 1):
        assert not np.array_equal(noise.normal(seed, 1, 0, SHAPE), noise.normal(seed - 1, 1, 0, SHAPE))


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 5, 7), (1,), (2, 3)])
def test_rows_that_are_made_together_are_those_of_lone_calls_bit_for_bit(shape):
    """More rows than a block has, each with a key of its own."""
    rows = 2 * noise.BLOCK // ((np.prod(shape) + 1) // 2) + 3 if np.prod(shape) > 100 else 50
    keys = [(2**64 - 1 - row % 3, row**5, row % 7 - 1) for row in range(int(rows))]
    out = np.empty((len(keys), *shape), np.float32)
    noise.Normals(shape).fill_rows(out, keys)
    for row, key in zip(out, keys, strict=True):
        np.testing.assert_array_equal(row, noise.normal(*key, shape))
