"""What a network takes, and what is refused."""

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.ports import Port, Signature, check_call, check_request, check_requests

STATE, TIME = Port("x", "state", "float32", (None, 3, 4, 4)), Port("t", "time", "int64", (None,))
LABEL = Port("label", "request", "int64", (None,), null=5, values=6)
TEXT = Port("text", "request", "float32", (None, 2, 3))


def toy(*requests):
    return Signature((STATE, TIME, *requests), (None, 6, 4, 4), "Toy")


def texts(rows):
    return np.arange(6 * rows, dtype=np.float32).reshape(rows, 2, 3)


def test_a_signature_knows_its_ports_by_kind():
    both = toy(LABEL, TEXT)
    assert (both.state, both.time, both.requests) == (STATE, TIME, (LABEL, TEXT))
    assert both.names == ("x", "t", "label", "text")
    assert (both.channels, both.output_shape, TEXT.row_shape) == (3, (6, 4, 4), (2, 3))
    assert {name: array.shape for name, array in both.zeros(2).items()} == {
        "x": (2, 3, 4, 4), "t": (2,), "label": (2,), "text": (2, 2, 3),
    }  # fmt: skip


def test_a_label_is_the_only_request_and_one_of_a_known_number():
    assert toy(LABEL).label == LABEL
    assert LABEL.choices == 5
    assert Port("label", "request", "int64", (None,), values=6).choices == 6
    for requests in ((), (TEXT,), (LABEL, TEXT)):
        assert toy(*requests).label is None


@pytest.mark.parametrize(
    "ports", [(STATE,), (TIME,), (STATE, TIME, STATE), (STATE, TIME, Port("x", "request", "int64", (None,)))]
)
def test_a_signature_has_one_state_and_one_time(ports):
    with pytest.raises(ValueError, match="expected one state, one time"):
        Signature(ports, (None, 6, 4, 4), "Toy")


@pytest.mark.parametrize("output", [(None, 2, 4, 4), (None, 3, 4), (None, 3, 4, 5)])
def test_a_chain_needs_a_prediction_of_the_states_shape_or_more_channels(output):
    with pytest.raises(UsageError, match="same shape, or more channels"):
        Signature((STATE, TIME), output, "Toy").check_predicts_state()


@pytest.mark.parametrize("shape", [(), (4,), (None, None), (None, 0), (None, 2**30)])
def test_a_port_has_rows_then_fixed_sizes(shape):
    with pytest.raises(ValueError, match="port 'x'"):
        Port("x", "state", "float32", shape)


def test_requests_of_a_class_are_numbers_and_the_null_class_is_one():
    count, arrays = check_requests(toy(LABEL), [0, 4, 5])
    assert count == 3
    assert arrays["label"].tolist() == [0, 4, 5]
    assert arrays["label"].dtype == np.int64
    assert check_requests(toy(LABEL), {"label": np.array([1], np.int32)})[1]["label"].dtype == np.int64


def test_requests_of_an_unconditional_network_are_a_number_of_images():
    assert check_requests(toy(), 3) == (3, {})


def test_requests_in_general_are_arrays_by_port():
    count, arrays = check_requests(toy(LABEL, TEXT), {"text": texts(2).astype(np.float64), "label": [1, 2]})
    assert count == 2
    assert arrays["text"].dtype == np.float32
    np.testing.assert_array_equal(arrays["text"], texts(2))
    np.testing.assert_array_equal(check_requests(toy(TEXT), texts(2))[1]["text"], texts(2))


@pytest.mark.parametrize(
    ("requests", "values", "message"),
    [
        ((LABEL,), [6], r"'label' 6 is out of range; this model knows 0\.\.4 \(and 5: none\)"),
        ((LABEL,), [-1], "'label' -1"),
        ((LABEL,), [], "non-empty array of integer numbers"),
        ((LABEL,), [0.5], r"float64\[1\]"),
        ((LABEL,), 3, "non-empty array"),
        ((LABEL,), [[1], [1, 2]], "non-empty array"),
        ((LABEL,), {"klass": [1]}, "'klass'; Toy takes 'label'"),
        ((), 0, "unconditional: expected the number of images, at least 1, found 0"),
        ((), [1], "unconditional"),
        ((), True, "unconditional"),
        ((LABEL, TEXT), [1], "Toy takes 'label', 'text'. Pass a dict"),
        ((LABEL, TEXT), {"label": [1]}, "takes 'label', 'text'"),
        ((LABEL, TEXT), {"label": [1], "text": texts(2)}, r"different lengths \[1, 2\]"),
        ((TEXT,), texts(2)[:, :1], r"'text' is float32\[2, 1, 3\], expected .* \(N, 2, 3\)"),
        ((TEXT,), np.full((2, 2, 3), np.inf), "NaN or infinite"),
    ],
)
def test_requests_that_the_network_does_not_take_are_refused(requests, values, message):
    with pytest.raises(UsageError, match=message):
        check_requests(toy(*requests), values)


def test_a_request_is_that_of_one_image():
    assert check_request(toy(), None) == {}
    assert check_request(toy(LABEL), 3) == {"label": 3}
    row = check_request(toy(LABEL, TEXT), {"label": 3, "text": texts(1)[0]})
    assert row["label"] == 3
    np.testing.assert_array_equal(row["text"], texts(1)[0])
    np.testing.assert_array_equal(check_request(toy(TEXT), texts(1)[0])["text"], texts(1)[0])


@pytest.mark.parametrize(
    ("requests", "value", "message"),
    [
        ((), 3, "unconditional: expected None for a request, found 3"),
        ((LABEL,), None, "'label' is object"),
        ((LABEL,), [1, 2], r"int64\[1, 2\]"),
        ((LABEL,), 9, "out of range"),
        ((LABEL, TEXT), 1, "Pass a dict"),
    ],
)
def test_a_request_that_the_network_does_not_take_is_refused(requests, value, message):
    with pytest.raises(UsageError, match=message):
        check_request(toy(*requests), value)


def call(**changes):
    return {"x": np.zeros((2, 3, 4, 4)), "t": [1, 2], "label": [0, 5], **changes}


def test_a_call_has_an_array_of_each_ports_type():
    arrays = check_call(toy(LABEL), call())
    assert {name: array.dtype for name, array in arrays.items()} == {"x": "float32", "t": "int64", "label": "int64"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (call(x=np.zeros((2, 3, 4, 5))), r"'x' is float64\[2, 3, 4, 5\], expected .* \(N, 3, 4, 4\)"),
        (call(t=[1]), "'x' has 2, 't' has 1"),
        (call(t=[1.0, 2.0]), "'t' is float64"),
        (call(label=[0, 6]), "'label' 6 is out of range"),
        (call(other=[1, 2]), "'other'; Toy takes 'x', 't', 'label'"),
        ({"x": np.zeros((2, 3, 4, 4))}, "takes 'x', 't', 'label'"),
    ],
)
def test_a_call_that_the_network_does_not_take_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        check_call(toy(LABEL), values)
