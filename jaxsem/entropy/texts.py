"""Texts as bytes: UTF-8 as it is, or deflated where that is shorter.

One byte, 0 for UTF-8 or 1 for deflate (RFC 1951) of it, and the data; nothing at all for an empty text.
"""

import zlib

from jaxsem.errors import FormatError, InputError

_RAW, _DEFLATE = 0, 1
LONGEST = 1 << 16
"""Bytes of a text in UTF-8 at most."""


def pack_text(text: str) -> bytes:
    """A description as bytes; none for an empty one.

    Raises:
      InputError: It is longer than 65,536 bytes in UTF-8.
    """
    raw = text.encode()
    if len(raw) > LONGEST:
        raise InputError(f"the description has {len(raw)} bytes, and {LONGEST} are kept at most: shorten it")
    if not raw:
        return b""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = coder.compress(raw) + coder.flush()
    return bytes([_DEFLATE]) + deflated if len(deflated) < len(raw) else bytes([_RAW]) + raw


def unpack_text(data: bytes) -> str:
    """The inverse of `pack_text`.

    Raises:
      FormatError: Damaged bytes.
    """
    if not data:
        return ""
    try:
        if data[0] == _DEFLATE:
            coder = zlib.decompressobj(-15)
            raw = coder.decompress(data[1:], LONGEST)
            if not coder.eof or coder.unused_data:
                raise ValueError("the stream does not end")
        elif data[0] == _RAW:
            raw = data[1:]
        else:
            raise ValueError(f"there is no kind {data[0]}")
        return raw.decode()
    except (ValueError, zlib.error) as error:
        raise FormatError(f"the description is damaged: {error}") from error
