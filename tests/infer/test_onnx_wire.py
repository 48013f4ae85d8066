"""One walker over protobuf for all that is read of an ONNX file: no other reader may see another model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from dicomnode import wire
from dicomnode.errors import BundleError
from dicomnode.infer.expansion import check_expansion
from dicomnode.infer.onnxcheck import check_onnx
from dicomnode.infer.onnxshape import onnx_inputs
from tests.infer.stages.bundle_case import two_channels

READERS = [
    lambda data: check_onnx(data, "m"),
    lambda data: check_expansion(data, "m"),
    onnx_inputs,
]


def long_key(number: int) -> bytes:
    """The key of a length-delimited field with a bit beyond its 32, which protobuf's own readers drop."""
    return wire.varint((number << 3 | 2) + (1 << 32))


@pytest.mark.parametrize("read", READERS)
def test_a_key_of_more_than_32_bits_is_refused(read: object) -> None:
    hidden = long_key(7) + wire.varint(2) + b"\x0a\x00"  # a graph for those who cut the key
    for data in (two_channels() + hidden, hidden):
        with pytest.raises(BundleError, match="no such field number"):
            read(data)  # type: ignore[operator]


def test_the_largest_key_is_one() -> None:
    assert list(wire.fields(memoryview(wire.varint(0xFFFF_FFFA) + b"\x00"))) == [((1 << 29) - 1, memoryview(b""))]


@pytest.mark.parametrize("beyond", [0, 1 << 32, 1 << 64])
def test_an_external_tensor_is_seen_however_its_place_is_written(beyond: int) -> None:
    tensor = (
        numpy_helper.from_array(np.zeros(2, np.float32), "w").SerializeToString() + b"\x70" + wire.varint(1 + beyond)
    )
    with pytest.raises(BundleError, match="external file"):
        check_onnx(wire.put(7, wire.put(5, tensor)), "m")


@given(st.binary(max_size=80))
def test_bytes_that_are_no_message_are_a_value_error(data: bytes) -> None:
    try:
        for number, value in wire.fields(memoryview(data)):
            assert 0 < number < 1 << 29
            assert isinstance(value, memoryview) or 0 <= value < 1 << 64
    except ValueError:
        pass


@given(st.binary(max_size=80))
def test_readers_refuse_in_words(data: bytes) -> None:
    for read in READERS:
        try:
            read(wire.put(7, data))
        except BundleError as refused:
            assert refused.hint


@pytest.mark.parametrize("field", [5, 11])
def test_a_name_that_is_no_text_is_refused(field: int) -> None:
    name = wire.put(8 if field == 5 else 1, b"\xff\xfe")
    with pytest.raises(BundleError, match="no text"):
        onnx_inputs(wire.put(7, wire.put(field, name)))
