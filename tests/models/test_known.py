"""Arguments that a network's Python reads become part of it, as few as possible."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tqdit.errors import UsageError
from tqdit.models.known import fix_arguments, values_read


class Reads(nn.Module):
    """`read` uses the mask; `other` is an argument whose values it does not need."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x, mask, other):
        return self.read(x, mask) + other.sum()


READERS = {
    "slice": lambda x, mask: x[:, : mask.sum(1)[0]],
    "bool index": lambda x, mask: x[:, mask[0] > 0],
    "item": lambda x, mask: x * mask.sum().item(),
    "if": lambda x, mask: x * 2 if torch.all(mask == 0) else x * 3,
    "split": lambda x, mask: x.split([int(mask[0].sum()), 5 - int(mask[0].sum())], 1)[0],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_read_is_fixed_and_nothing_else(read):
    network, row = Reads(read), torch.tensor([1, 1, 1, 0, 0])
    call = {"x": torch.randn(2, 5), "mask": row.expand(2, 5), "other": torch.ones(2, 3)}
    found = values_read(network, call, {"mask": row, "other": torch.ones(3)}, "x")
    assert list(found) == ["mask"]
    expected = network(**call)
    fix_arguments(network, found, "x")
    torch.testing.assert_close(network(x=call["x"], other=call["other"]), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # as observation and tracing call it
        assert network(x=fake.from_tensor(call["x"]), other=torch.ones(2, 3)).shape == expected.shape


def test_values_that_differ_from_row_to_row_are_refused():
    network = Reads(READERS["slice"])
    call = {"x": torch.randn(2, 5), "mask": torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]), "other": torch.ones(2, 3)}
    with pytest.raises(UsageError, match="the code of Reads reads values"):
        values_read(network, call, {"other": torch.ones(3)}, "x")
