"""Launch arithmetic covers every element exactly once, and is made of what builders can express."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax
from tqdit.plugins.time_group_select import launch as select

SIZES = st.integers(1, 5)


class Symbol:
    """An integer expression that knows +, * and // alone, like TensorRT's."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Symbol(self.value + int(other))

    def __mul__(self, other):
        return Symbol(self.value * int(other))

    def __floordiv__(self, other):
        return Symbol(self.value // int(other))

    def __int__(self):
        return self.value


@given(SIZES, SIZES, st.integers(1, 300), st.integers(1, 9000))
def test_softmax_covers_every_row_once(images, heads, queries, columns):
    kernel = softmax.kernel("fp16", columns, 8, 1 / 127)
    constants = dict(kernel.constants)
    launch = softmax.launch(kernel, images, heads, queries, images)
    rows = images * heads * queries
    visits = np.zeros(rows, int)
    for program in range(launch.programs):
        row = program * constants["BLOCK_ROWS"] + np.arange(constants["BLOCK_ROWS"])
        np.add.at(visits, row[row < launch.scalars[0]], 1)
    assert (visits == 1).all()
    assert launch.programs <= rows  # no program without a row
    tiles = range(0, columns, constants["BLOCK_COLUMNS"])
    assert len(tiles) == -(-columns // 4096)
    # the image of a row, as the kernel computes it
    image = np.arange(rows) // launch.scalars[1] % launch.scalars[2]
    np.testing.assert_array_equal(image, np.repeat(np.arange(images), heads * queries))


@given(SIZES, SIZES, st.integers(1, 700), st.integers(1, 700), st.sampled_from([8, 64, 72, 88, 128]))
def test_attention_covers_every_query_and_key_once(images, heads, queries, keys, head):
    for floats in ("fp16", "fp32"):
        for blocks in attention.candidates(floats, head, keys):
            kernel = attention.kernel(floats, queries, keys, head, 8, 1 / 127, blocks)
            launch = attention.launch(kernel, images, heads, images, 0.1)
            per_head = -(-queries // blocks.queries)
            visits = np.zeros((images * heads, queries), int)
            for program in range(launch.programs):
                query = program % per_head * blocks.queries + np.arange(blocks.queries)
                visits[program // per_head, query[query < queries]] += 1
            assert (visits == 1).all()
            if keys > blocks.keys:  # tiles of the loop
                seen = np.concatenate([first + np.arange(blocks.keys) for first in range(0, keys, blocks.keys)])
                np.testing.assert_array_equal(seen[seen < keys], np.arange(keys))
            image = np.arange(images * heads) // launch.scalars[0] % launch.scalars[1]
            np.testing.assert_array_equal(image, np.repeat(np.arange(images), heads))


@given(SIZES, SIZES, st.integers(1, 700), st.integers(1, 700), st.sampled_from([8, 64, 72, 88, 128]))
def test_integer_attention_covers_every_query_once(images, heads, queries, keys, head):
    for blocks in integer_attention.candidates(head, keys):
        kernel = integer_attention.kernel("i8", queries, keys, head, 8, 1 / 127, blocks)
        launch = integer_attention.launch(kernel, images, heads, 1, images, 1, 1, images)
        per_head = -(-queries // blocks.queries)
        visits = np.zeros((images * heads, queries), int)
        for program in range(launch.programs):
            query = program % per_head * blocks.queries + np.arange(blocks.queries)
            visits[program // per_head, query[query < queries]] += 1
        assert (visits == 1).all()
        assert blocks.keys >= integer_attention.LEAST_SUM
        assert launch.scalars == (heads, 1, images, 1, 1, images)


@given(st.integers(1, 400), st.integers(1, 400))
def test_select_covers_every_element_once(rows, size):
    launch = select.launch(rows, size)
    assert (launch.programs - 1) * select.BLOCK < rows * size <= launch.programs * select.BLOCK
    assert launch.scalars == (rows * size, size)


def test_symbolic_sizes_give_the_same_launch():
    """As a dynamic batch does in TensorRT."""
    one = softmax.kernel("fp16", 256, 8, 1 / 127)
    two = attention.kernel("fp16", 200, 200, 72, 8, 1 / 127)
    three = integer_attention.kernel("i8", 200, 200, 72, 8, 1 / 127)
    for launch, symbolic in (
        (softmax.launch(one, 3, 16, 256, 3), softmax.launch(one, Symbol(3), Symbol(16), Symbol(256), Symbol(3))),
        (attention.launch(two, 3, 16, 3, 0.1), attention.launch(two, Symbol(3), Symbol(16), Symbol(3), 0.1)),
        (
            integer_attention.launch(three, 3, 16, 3, 1, 3, 1, 1),
            integer_attention.launch(three, Symbol(3), Symbol(16), Symbol(3), 1, Symbol(3), 1, 1),
        ),
        (select.launch(70, 3), select.launch(Symbol(70), Symbol(3))),
    ):
        assert int(symbolic.programs) == launch.programs
        assert tuple(map(int, symbolic.scalars)) == launch.scalars


@pytest.mark.parametrize(
    ("head", "split"), [(8, (16, 0)), (16, (16, 0)), (64, (64, 0)), (72, (64, 16)), (88, (64, 32)), (128, (128, 0))]
)
def test_a_head_is_split_into_powers_of_two(head, split):
    assert attention.split_head(head) == split


@given(st.integers(1, 128))
def test_a_split_covers_its_head(head):
    main, rest = attention.split_head(head)
    assert main + rest >= head
    assert all(each == 0 or (each >= 16 and each & (each - 1) == 0) for each in (main, rest))
    summed = integer_attention.summed_split(main, rest)
    assert sum(summed) >= head
    assert all(each == 0 or (each >= 32 and each & (each - 1) == 0) for each in summed)
