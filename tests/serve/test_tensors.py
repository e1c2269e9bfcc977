"""Tensors within a pickle: rebuilt as they were, and nothing that is not all there."""

from __future__ import annotations

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from xr0_engine.serve.unpickle import restricted_loads

MAX_PIXELS = 1 << 20
PLAIN = torch.arange(12.0).reshape(3, 4)
DAMAGED = pickle.dumps({"a": PLAIN}, 4)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(PLAIN, id="float32"),
        pytest.param(PLAIN.double(), id="float64"),
        pytest.param(PLAIN.half(), id="float16"),
        pytest.param(PLAIN.bfloat16() / 3, id="bfloat16"),
        pytest.param(PLAIN.long(), id="int64"),
        pytest.param(PLAIN.int(), id="int32"),
        pytest.param(PLAIN.byte(), id="uint8"),
        pytest.param(PLAIN > 3, id="bool"),
        pytest.param(PLAIN.T, id="columns first"),
        pytest.param(PLAIN[1:, 1:3], id="part of a storage"),
        pytest.param(torch.tensor(3), id="one number"),
        pytest.param(torch.zeros(0, 3), id="empty"),
    ],
)
def test_tensors_survive(tensor, protocol):
    read = restricted_loads(pickle.dumps({"a": tensor, "again": tensor}, protocol), MAX_PIXELS)
    expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    for array in read.values():
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


def test_one_storage_is_not_copied_for_many_tensors():
    """A few bytes for each tensor would be a copy of the whole storage."""

    class Saved:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (saved,)

    class Part:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Saved(), 0, (1 << 18,), (1,), False, {})

    saved = torch.zeros(1 << 18)._typed_storage().__reduce__()[1][0]
    data = pickle.dumps([Part() for _ in range(64)])
    tracemalloc.start()
    with pytest.raises(ValueError, match="the same bytes in more than one place"):
        restricted_loads(data, MAX_PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


class Rebuilt:
    """A tensor of that offset, shape and strides within a storage of 12 float32."""

    def __init__(self, *where: object, more: tuple = ()) -> None:
        self.where, self.more = where, more

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (PLAIN._typed_storage(), *self.where, False, {}, *self.more)


def replaced(old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert DAMAGED.count(old) == 1
    return DAMAGED.replace(old, new)


COUNT = struct.pack("<q", 12)
WRONG = {
    "offset beyond": pickle.dumps({"a": Rebuilt(3, (10,), (1,))}),
    "stride beyond": pickle.dumps({"a": Rebuilt(0, (4,), (4,))}),
    "offset before": pickle.dumps({"a": Rebuilt(-1, (4,), (1,))}),
    "stride backwards": pickle.dumps({"a": Rebuilt(4, (4,), (-1,))}),
    "terabytes of one number": pickle.dumps({"a": Rebuilt(0, (1 << 39,), (0,))}),
    "strides missing": pickle.dumps({"a": Rebuilt(0, (3, 4), (4,))}),
    "shape of truths": pickle.dumps({"a": Rebuilt(0, (True,), (1,))}),
    "shape of text": pickle.dumps({"a": Rebuilt(0, "ab", (1, 1))}),
    "nine dimensions": pickle.dumps({"a": Rebuilt(0, (1,) * 9, (1,) * 9)}),
    "numbers that are negated": pickle.dumps({"a": Rebuilt(0, (3,), (1,), more=({"neg": True},))}),
    "parameter": pickle.dumps({"a": torch.nn.Parameter(PLAIN)}),
    "complex": pickle.dumps({"a": PLAIN.to(torch.complex64)}),
    "sparse": pickle.dumps({"a": PLAIN.to_sparse()}),
    "on a GPU": replaced(b"X\x03\0\0\0cpu", b"X\x03\0\0\0gpu"),
    "another magic number": replaced(b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47"),
    "code in the storage": replaced(b"ctorch\nFloatStorage\n", b"cbuiltins\nexec    \n\n"),
    "other elements": replaced(b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorages\n"),
    "another count than in its head": replaced(b"K\x0cNtq", b"K\x0bNtq"),
    "more bytes than numbers": replaced(COUNT, struct.pack("<q", 11)),
    "fewer bytes than numbers": replaced(COUNT, struct.pack("<q", 1 << 40)),
    "bytes cut off": DAMAGED[:-60],
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_is_no_plain_tensor_is_refused(data):
    tracemalloc.start()
    with pytest.raises(ValueError, match="pickle: expected"):
        restricted_loads(data, MAX_PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
