"""What all layouts of the `.jsem` file share: its first bytes, an item and its limits, varints and checksums.

The format is specified in `jaxsem.container`.
"""

import binascii
import operator
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from jaxsem.errors import FormatError, InputError

MAGIC = b"\xd5J"
VERSION = 1
DIGEST_BYTES = 3
SECTION_NAMES = {0: "packet", 1: "caption", 2: "weight map", 3: "settings"}

MAX_SIDE = 1 << 20
MAX_PIXELS = 1 << 31
MAX_NAME_BYTES = 1024
MAX_NAMES_BYTES = 1 << 26
MAX_RICE = 32

BARE, SECTIONS, ARCHIVE = 0, 1, 2
BARE_MASK = 1
GET_ANOTHER = "get a fresh copy of it"
_FOREIGN = (
    (rb"\x89PNG", "a PNG image"),
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"GIF8", "a GIF image"),
    (rb"BM", "a BMP image"),
    (rb"II\*\x00|MM\x00\*", "a TIFF image"),
    (rb"....ftyp(avif|avis|heic|heix|mif1)", "an AVIF or HEIC image"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"%PDF", "a PDF document"),
)


@dataclass(frozen=True)
class Item:
    """One image or feature: its size and its coded sections.

    Attributes:
        height: rows of the image, 1 to 2^20; 0 (with `width`) for a feature that has no image size.
        width: columns of the image; height times width is at most 2^31.
        sections: bytes by tag (`SECTION_NAMES`), at least one; kept in rising order of tag. Not to be changed.
        name: relative path of the item in an archive, or None. A single file does not store it: its own path says it.

    Raises:
        InputError: a size, tag or name that the format cannot hold.
    """

    height: int
    width: int
    sections: Mapping[int, bytes]
    name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "height", operator.index(self.height))  # NumPy integers become plain ones
        object.__setattr__(self, "width", operator.index(self.width))
        complaint = size_complaint(self.height, self.width) or name_complaint(self.name or "")
        unknown = sorted(set(self.sections) - set(SECTION_NAMES))
        if unknown or not self.sections:
            complaint = f"an item needs one or more sections with tags among {list(SECTION_NAMES)}, not {unknown}"
        if complaint:
            raise InputError(f"A .jsem file cannot hold this item: {complaint}.")
        object.__setattr__(self, "sections", {tag: bytes(self.sections[tag]) for tag in sorted(self.sections)})
        object.__setattr__(self, "name", self.name or None)


def start(layout: int, digest: bytes) -> bytes:
    """Gives the six bytes that every file begins with; a digest too short for them is an InputError."""
    if len(digest) < DIGEST_BYTES:
        raise InputError(f"The weights digest has {len(digest)} bytes where at least {DIGEST_BYTES} are needed.")
    return MAGIC + bytes([VERSION << 4 | layout]) + bytes(digest[:DIGEST_BYTES])


def section_mask(item: Item) -> int:
    """Gives the number with bit `t` set for each section tag `t` of the item."""
    return sum(1 << tag for tag in item.sections)


def read_layout(data: bytes) -> int:
    """Reads the first three bytes: is this our file, in a version and layout that we read?"""
    if len(data) == 0:
        raise FormatError(f"The file is empty: {GET_ANOTHER}.")
    head = bytes(data[:16])
    if head[:2] != MAGIC[: len(data)]:
        kind = next((kind for pattern, kind in _FOREIGN if re.match(pattern, head, re.DOTALL)), None)
        seen = f"it starts with {head[:4].hex(' ')} where a .jsem file starts with {MAGIC.hex(' ')}"
        if kind:
            raise FormatError(f"This is no .jsem file but looks like {kind} ({seen}): name a .jsem file.")
        raise FormatError(f"This is no .jsem file, or its start is damaged: {seen}.")
    if len(data) < 3:
        raise FormatError(f"The file has only {len(data)} bytes and is cut short: {GET_ANOTHER}.")
    version, layout = head[2] >> 4, head[2] & 15
    if version != VERSION or layout > ARCHIVE:
        raise FormatError(
            f"The file says format version {version}, layout {layout}, where this jaxsem reads version {VERSION}, "
            f"layouts 0 to {ARCHIVE}: update jaxsem or, if it is the newest, {GET_ANOTHER}."
        )
    return layout


def read_kind(height: int, width: int, mask: int) -> tuple[int, ...]:
    """Checks a shape and a mask of sections; gives the tags in the mask."""
    complaint = size_complaint(height, width)
    if complaint:
        raise FormatError(f"The file holds an impossible item, for {complaint}: {GET_ANOTHER}.")
    tags = tuple(tag for tag in range(mask.bit_length()) if mask >> tag & 1)
    unknown = [tag for tag in tags if tag not in SECTION_NAMES]
    if unknown or not tags:
        raise FormatError(
            f"The file has sections with tags {unknown}, where this jaxsem knows {list(SECTION_NAMES)} and needs "
            f"one or more: update jaxsem or, if it is the newest, {GET_ANOTHER}."
        )
    return tags


def size_complaint(height: int, width: int) -> str | None:
    """Says why the format cannot hold an image of this size, or None if it can."""
    if (height, width) == (0, 0):
        return None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and height * width <= MAX_PIXELS):
        return f"its size is {height}x{width}, where sides are 1 to {MAX_SIDE} with a product of at most {MAX_PIXELS}"
    return None


def name_complaint(name: str) -> str | None:
    """Says what makes a name unsafe as a path below an output folder on any system, or None; empty means no name."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return f"the name {name!r} is no valid Unicode"
    if size > MAX_NAME_BYTES:
        return f"the name {name[:40]!r}... has {size} bytes, over the limit of {MAX_NAME_BYTES}"
    if re.search(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:", name) or (name and {"", ".", ".."} & set(name.split("/"))):
        return f"the name {name!r} is not a plain relative path such as 'trip/photo.png'"
    return None


class Cursor:
    """Reads on through bytes; running past the end is a FormatError."""

    def __init__(self, data: bytes | memoryview, position: int):
        self.data, self.position = data, position

    def take(self, length: int) -> bytes:
        """Reads the next `length` bytes."""
        end = self.position + length
        if end > len(self.data):
            raise FormatError(
                f"The file is cut short or damaged: {length} bytes are due at byte {self.position} of "
                f"{len(self.data)}; {GET_ANOTHER}."
            )
        begin, self.position = self.position, end
        return bytes(self.data[begin:end])

    def rest(self) -> bytes:
        """Reads all that is left."""
        return self.take(len(self.data) - self.position)

    def varint(self) -> int:
        """Reads a varint, refusing one that is longer than need be: a value has one spelling."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    break
                return value
        raise FormatError(f"The file is damaged, for no valid number ends at byte {self.position}: {GET_ANOTHER}.")


def varint(value: int) -> bytes:
    """Writes a number >= 0 as LEB128."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def crc16(data: bytes) -> bytes:
    """Computes CRC-16/GENIBUS."""
    return (binascii.crc_hqx(data, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")


def crc32(data: bytes) -> bytes:
    """Computes the CRC-32 of zlib."""
    return zlib.crc32(data).to_bytes(4, "big")
