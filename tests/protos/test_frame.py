import math
import struct
import sys
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos.errors import BrokenInvariant, FrameTooLarge, InvalidFrame
from protos.frame import ITEM_BYTES, Frame, decode, encode
from protos.limits import FRAME_BYTES_MAX, FRAME_RANK_MAX

BYTES_MAX = 4096


def header(
    code: int = 1, dims: tuple[int, ...] = (2, 3), size: int = 24, magic: bytes = b"SHTF", version: int = 1
) -> bytes:
    return struct.pack(f"<4sBBBBQ{len(dims)}Q", magic, version, code, len(dims), 0, size, *dims)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=FRAME_RANK_MAX)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return dtype, shape, draw(st.binary(min_size=size, max_size=size))


@given(tensors())
def test_a_frame_gives_back_what_was_encoded(tensor: tuple[str, tuple[int, ...], bytes]):
    dtype, shape, data = tensor
    frame = decode(encode(dtype, shape, data), bytes_max=BYTES_MAX)
    assert (frame.dtype, frame.shape, bytes(frame.data)) == (dtype, shape, data)


@given(st.binary(max_size=200))
@example(b"")
@example(b"SHTF")
@example(header() + bytes(24))
def test_any_bytes_are_a_frame_or_are_refused(data: bytes):
    accepts_or_refuses(data)


@given(tensors(), st.data())
def test_an_altered_frame_is_another_frame_or_is_refused(
    tensor: tuple[str, tuple[int, ...], bytes], choice: st.DataObject
):
    data = bytearray(encode(*tensor))
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(0, len(data) - 1))
        data[at] = choice.draw(st.integers(0, 255))
    accepts_or_refuses(bytes(data[: choice.draw(st.integers(0, len(data)))]))
    accepts_or_refuses(bytes(data))


@given(
    st.integers(0, 255),
    st.lists(st.integers(0, 2**64 - 1), max_size=6),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=64),
)
def test_absurd_headers_are_refused(code: int, dims: list[int], size: int, payload: bytes):
    accepts_or_refuses(header(code, tuple(dims), size) + payload)


def accepts_or_refuses(data: bytes) -> None:
    """The two allowed outcomes: a typed error, or a tensor whose frame is these very bytes."""
    try:
        frame = decode(data, bytes_max=BYTES_MAX)
    except InvalidFrame:
        return
    assert encode(frame.dtype, frame.shape, frame.data) == data


def test_decoding_copies_nothing_and_gives_no_way_to_write():
    buffer = bytearray(encode("float16", (2, 2), bytes(8)))
    frame = decode(buffer, bytes_max=BYTES_MAX)
    buffer[-1] = 7
    assert frame.data[-1] == 7
    with pytest.raises(TypeError, match="read-only"):
        frame.data[0] = 1


def test_an_absurd_header_allocates_nothing():
    data = header(dims=(2**63, 2**63, 2**63, 2**63), size=2**64 - 1)
    tracemalloc.start()
    with pytest.raises(FrameTooLarge):
        decode(data, bytes_max=2**62)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_data_begins_at_a_multiple_of_eight():
    for rank in range(FRAME_RANK_MAX + 1):
        assert (len(encode("float32", (1,) * rank, bytes(4))) - 4) % 8 == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no frame"),
        (header()[:15], "15 bytes are no frame"),
        (header()[:20], "ends inside its header of 32"),
        (header(magic=b"SHTG") + bytes(24), "no frame of version 1"),
        (header(version=2) + bytes(24), "no frame of version 1"),
        (header()[:7] + b"\1" + header()[8:] + bytes(24), "no frame of version 1"),
        (header(code=0) + bytes(24), "unknown dtype 0"),
        (header(code=5) + bytes(24), "unknown dtype 5"),
        (header(size=20) + bytes(20), "the two disagree"),
        (header() + bytes(23), "announces 24 bytes of data and carries 23"),
        (header() + bytes(25), "announces 24 bytes of data and carries 25"),
    ],
)
def test_each_fault_is_named(data: bytes, message: str):
    with pytest.raises(InvalidFrame, match=message):
        decode(data, bytes_max=BYTES_MAX)


def test_the_byte_limit_counts_the_whole_frame():
    data = encode("float32", (2, 3), bytes(24))
    assert decode(data, bytes_max=len(data)) == Frame("float32", (2, 3), memoryview(bytes(24)))
    with pytest.raises(FrameTooLarge, match=f"a frame of {len(data)} bytes; at most {len(data) - 1}"):
        decode(data, bytes_max=len(data) - 1)


def test_the_largest_frame_of_the_protocol_is_accepted_and_one_more_byte_is_not():
    rows = (FRAME_BYTES_MAX - 32) // 4
    data = encode("float32", (rows, 1), bytes(rows * 4))
    assert len(data) == FRAME_BYTES_MAX
    assert decode(data, bytes_max=FRAME_BYTES_MAX).shape == (rows, 1)
    with pytest.raises(FrameTooLarge):
        decode(data + b"\0", bytes_max=FRAME_BYTES_MAX)
    with pytest.raises(BrokenInvariant, match="split it by rows"):
        encode("float32", (rows + 1, 1), bytes((rows + 1) * 4))


def test_a_shape_above_the_limit_is_too_large_though_its_bytes_are_not_there():
    with pytest.raises(FrameTooLarge, match="announces"):
        decode(header(dims=(1025, 1), size=4100), bytes_max=BYTES_MAX)


def test_a_zero_dimension_does_not_hide_an_absurd_one():
    assert decode(header(dims=(0, 9), size=0), bytes_max=BYTES_MAX).shape == (0, 9)
    with pytest.raises(FrameTooLarge):
        decode(header(dims=(0, 2**62), size=0), bytes_max=BYTES_MAX)


def test_the_rank_has_a_limit_that_a_receiver_may_lower():
    data = encode("int64", (1,) * FRAME_RANK_MAX, bytes(8))
    assert decode(data, bytes_max=BYTES_MAX).shape == (1,) * FRAME_RANK_MAX
    with pytest.raises(InvalidFrame, match="rank 4; at most 2"):
        decode(data, bytes_max=BYTES_MAX, rank_max=2)
    with pytest.raises(InvalidFrame, match="rank 5; at most 4"):
        decode(header(dims=(1,) * 5, size=4) + bytes(4), bytes_max=BYTES_MAX)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("float64", (1,), bytes(8)),
        ("float32", (1,) * 5, bytes(4)),
        ("float32", (-1,), b""),
        ("float32", (2,), bytes(7)),
    ],
)
def test_what_is_no_tensor_is_never_sent(dtype: str, shape: tuple[int, ...], data: bytes):
    with pytest.raises(BrokenInvariant):
        encode(dtype, shape, data)


def test_any_contiguous_buffer_can_be_sent():
    words = memoryview(struct.pack("<4f", 1, 2, 3, 4)).cast("f")
    assert encode("float32", (2, 2), words) == encode("float32", (2, 2), bytes(words))
    assert sys.byteorder == "little"
