import contextlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsem.entropy.texts import LONGEST, pack_text, unpack_text
from jaxsem.errors import FormatError, InputError


@given(st.text(max_size=300))
def test_any_text_comes_back(text):
    data = pack_text(text)
    assert unpack_text(data) == text
    assert len(data) <= len(text.encode()) + 1


def test_an_empty_text_takes_nothing_and_a_long_one_little():
    assert pack_text("") == b""
    assert pack_text("a red star") == b"\x00a red star"
    assert len(pack_text("a red star and " * 20)) < 40


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_are_a_text_or_refused(data):
    with contextlib.suppress(FormatError):
        assert isinstance(unpack_text(data), str)


def test_a_bomb_is_not_unpacked():
    with pytest.raises(InputError, match="shorten it"):
        pack_text("a" * (LONGEST + 1))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    with pytest.raises(FormatError, match="does not end"):
        unpack_text(b"\x01" + coder.compress(b"a" * 10 * LONGEST) + coder.flush())
