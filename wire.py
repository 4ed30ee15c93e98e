"""The wire format of serve.py and its clients: msgpack with openpi's numpy extension.

    pack(message)   numbers, strings, bytes, lists, dicts with string keys, numpy arrays -> bytes
    unpack(data)    bytes -> the same; arrays are read-only

An array is encoded as a map, {b"__ndarray__": true, b"data": its bytes in C order, b"dtype": "<f4",
b"shape": [16, 7]}, and a numpy scalar as {b"__npgeneric__": true, b"data": 0.5, b"dtype": "<f4"}.
Source: openpi_client/msgpack_numpy.py of openpi-client 0.1.2. Only numbers and booleans are
accepted: other libraries pickle numpy's object arrays, and unpickling would run code from a
stranger.
"""

import math
import re

import numpy as np

from cli import UserError
from files import reading

KINDS = "biuf"  # kinds of numpy dtypes: booleans, integers, floats
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
# An empty list is one byte on the wire and 56 in memory, so limiting a message's size does not
# limit what it becomes here.
MAX_ITEMS = 4096  # in one list or map
MAX_CONTAINERS = 256  # lists and maps in a message


def require_extras():
    """UserError if the packages of requirements-serve.txt are not installed."""
    try:
        import msgpack  # noqa: F401
        import websockets.asyncio.server
        import websockets.sync.client  # noqa: F401
    except ImportError as error:
        advice = "type `pip install -r requirements-serve.txt`"
        raise UserError(f"websockets or msgpack is missing ({error}): {advice}") from None


def pack(message):
    """The bytes of a message. UserError if something in it has no encoding."""
    import msgpack  # an extra: few people need a server

    try:
        return msgpack.packb(message, default=from_numpy)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the message cannot be packed: {error}") from None


def from_numpy(value):
    """The map for an array or a numpy scalar. TypeError if it is neither, or not numeric."""
    kind = getattr(value, "dtype", None)
    if not isinstance(value, (np.ndarray, np.generic)) or kind.kind not in KINDS:
        raise TypeError(f"{type(value).__name__} {kind or ''} is neither number nor array")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": kind.str}
    # tobytes returns C order, whatever the strides
    data = value.tobytes()
    return {b"__ndarray__": True, b"data": data, b"dtype": kind.str, b"shape": value.shape}


def unpack(data):
    """The message, a dict, from bytes that may come from anyone. UserError says what is wrong."""
    import msgpack

    containers = 0

    def checked(container):
        nonlocal containers
        containers += 1
        many = f"it has more than {MAX_CONTAINERS} lists and maps; pictures are sent as arrays"
        assert containers <= MAX_CONTAINERS, many
        return to_numpy(container) if isinstance(container, dict) else container

    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS}
    with reading("the message", "it must be one msgpack map, as openpi-client packs it"):
        assert isinstance(data, bytes), "it is a text frame, not a binary one"
        message = msgpack.unpackb(data, object_hook=checked, list_hook=checked, **limits)
        assert isinstance(message, dict), f"it is a {type(message).__name__}"
        return message


def to_numpy(content):
    """The array or scalar that a map encodes, or the map itself. Raises if it is inconsistent."""
    if b"__ndarray__" not in content and b"__npgeneric__" not in content:
        return content
    dtype = content[b"dtype"]
    named = isinstance(dtype, str) and DTYPE.fullmatch(dtype)
    assert named, f"an array of dtype {dtype!r}: only numbers and booleans are accepted"
    value = content[b"data"]
    if b"__npgeneric__" in content:
        assert isinstance(value, (bool, int, float)), "not a scalar"
        return np.dtype(dtype).type(value)
    shape = content[b"shape"]
    # with -1 numpy would infer the size
    assert all(isinstance(size, int) and size >= 0 for size in shape), f"the shape {shape}"
    array = np.frombuffer(value, dtype)
    fits = f"an array of shape {shape} and dtype {dtype} in {len(value)} bytes"
    assert array.size == math.prod(shape), fits
    return array.reshape(shape)
