"""The `.jsem` file, format version 1: the packets of one image, or of an archive of many, with sizes and checksums.

This page is the whole specification; nothing else is needed to write a reader. Bytes are shown in hexadecimal. Integers
of several bytes have the highest byte first, except a **varint**: LEB128, seven bits a byte, lowest first, the top bit
set on all bytes but the last, in as few bytes as possible, at most five.

Every file begins::

    D5 4A      magic; no text file begins so, in ASCII or UTF-8
    1 byte     high four bits: format version, 1; low four bits: layout, 0, 1 or 2
    3 bytes    weights digest: the first bytes of a SHA-256 over the preset and its weights, chosen by the writer

**Shape.** An item has a height and a width, 1 to 2^20 each with a product of at most 2^31, or 0 and 0 if it has no
image size (a feature).

**Sections.** An item holds one or more byte strings, each under its own tag: 0 packet (the coded image or feature),
1 caption, 2 weight map, 3 settings (choices of the encoder that the decoder must know). The tags that an item has are
told by a **mask**, a varint with bit `t` set for tag `t`; the sections follow in rising order of tag. New tags may join
version 1; a reader refuses those that it does not know.

Layout 0, one item with section 0 and no other::

    varint height | varint width | section 0 | CRC-16

Layout 1, one item with any sections::

    varint height | varint width | varint mask | varint length of each section but the last | the sections | CRC-16

CRC-16 (2 bytes) covers every byte before it. It is CRC-16/GENIBUS: polynomial 0x1021, initial value FFFF, not
reflected, result inverted; `123456789` gives D64E. (The inversion matters: without it, zeros after the end would go
unnoticed.) It finds any odd number of flipped bits and any burst of up to 16; other damage, or a cut, slips through
once in 65,536 times and then meets the checks of the packet itself. Layout 0 costs 12 bytes with sides below 16,384.

Layout 2, an archive of `n` >= 1 items::

    varint length of the directory | the directory | CRC-32 | the sections of item 0 | the sections of item 1 | ...

CRC-32 (4 bytes, as in zlib) covers every byte before it. The file ends with the last section. The directory is::

    varint n
    varint m, the number of kinds of item, 1 <= m <= n; for each kind:  varint height | varint width | varint mask
    varint L, the length of the shortest section | 1 byte k, the Rice parameter, 0 to 32
    for each item:  CRC-16 of its sections
    varint length of the names in bytes, 0 for none | the names: zlib over UTF-8, n names joined by NUL bytes
    bit stream, highest bit of a byte first, filled up to a whole byte with zero bits; for each item:
        its kind, counted from 0, in ceil(log2 m) bits, highest first
        for each of its sections, with v = length - L:  (v >> k) one bits, a zero bit, the k low bits of v in order

So a shape that all items share costs nothing, and sections of equal length one bit each. Beyond its sections and its
checksum an item costs at most 2 bytes, and the archive some 25 once, where kinds are few and sections stray from the
shortest by less than some 10 kB on average (a Rice code spends about 1.5 bits more than the logarithm of that); longer
packets, and items that each have another shape, cost a byte or two more.

A name is empty (none) or a relative path that no other item has: parts joined by `/`, none of them empty, `.` or `..`,
no control character, backslash or drive letter, at most 1,024 bytes in UTF-8, and 2^26 for all names with the NULs. The
directory has a checksum of its own, so damage in one item, or a cut, leaves the others readable (`open_archive`).
"""

from dataclasses import dataclass

from jaxsem.archive import Archive, open_archive, pack_archive
from jaxsem.errors import FormatError
from jaxsem.files import write_file
from jaxsem.wire import (
    ARCHIVE,
    BARE,
    BARE_MASK,
    DIGEST_BYTES,
    GET_ANOTHER,
    MAGIC,
    SECTION_NAMES,
    SECTIONS,
    VERSION,
    Cursor,
    Item,
    crc16,
    read_kind,
    read_layout,
    section_mask,
    start,
    varint,
)

__all__ = [
    "SECTION_NAMES",
    "VERSION",
    "Archive",
    "File",
    "Item",
    "byte_counts",
    "is_archive",
    "open_archive",
    "pack",
    "pack_archive",
    "unpack",
    "write_file",
]


@dataclass(frozen=True)
class File:
    """What a `.jsem` file holds.

    Attributes:
        version: format version of the file.
        kind: `single` or `archive`.
        digest: the stored 3 bytes of the weights digest; the right weights have `digest.startswith(file.digest)`.
        items: the items, one for a single file.
    """

    version: int
    kind: str
    digest: bytes
    items: tuple[Item, ...]


def pack(item: Item, digest: bytes) -> bytes:
    """Packs one item into the bytes of a `.jsem` file.

    Args:
        item: the item; its name is not stored.
        digest: SHA-256 over preset and weights, or its first bytes; the first 3 are stored.

    Returns:
        The file: 12 bytes more than the packet if there is no other section and both sides are below 16,384.

    Raises:
        InputError: the digest is shorter than 3 bytes.
    """
    *first, last = item.sections.values()
    body = varint(item.height) + varint(item.width)
    layout = BARE if section_mask(item) == BARE_MASK else SECTIONS
    if layout == SECTIONS:
        body += varint(section_mask(item)) + b"".join(varint(len(content)) for content in first)
    covered = start(layout, digest) + body + b"".join(first) + last
    return covered + crc16(covered)


def is_archive(data: bytes) -> bool:
    """Tells an archive from a single file by its first bytes.

    Args:
        data: the file, or its first bytes.

    Returns:
        True for an archive.

    Raises:
        FormatError: this is no `.jsem` file that this version reads.
    """
    return read_layout(data) == ARCHIVE


def unpack(data: bytes) -> File:
    """Reads a whole `.jsem` file, single or archive, and checks every byte of it.

    Args:
        data: the file's bytes.

    Returns:
        Its contents.

    Raises:
        FormatError: the file is empty, cut short, damaged, of another kind, or newer than this version of jaxsem; of an
            archive with damaged items, `open_archive` still reads the rest.
    """
    if is_archive(data):
        archive = open_archive(data)
        archive.refuse_damage()
        return File(VERSION, "archive", archive.digest, tuple(archive))
    covered, stored = bytes(data[:-2]), bytes(data[-2:])
    if len(data) < len(MAGIC) + 1 + DIGEST_BYTES + 4:
        raise FormatError(f"The file has only {len(data)} bytes and is cut short: {GET_ANOTHER}.")
    if crc16(covered) != stored:
        raise FormatError(
            f"The file is damaged, cut short, or has something appended: its checksum is {stored.hex()} where its "
            f"{len(covered)} bytes give {crc16(covered).hex()}; {GET_ANOTHER}."
        )
    cursor = Cursor(covered, len(MAGIC) + 1)
    digest = cursor.take(DIGEST_BYTES)
    height, width = cursor.varint(), cursor.varint()
    mask = cursor.varint() if read_layout(data) == SECTIONS else BARE_MASK
    tags = read_kind(height, width, mask)
    lengths = [cursor.varint() for _ in tags[:-1]]
    contents = [cursor.take(length) for length in lengths] + [cursor.rest()]
    return File(VERSION, "single", digest, (Item(height, width, dict(zip(tags, contents, strict=True))),))


def byte_counts(data: bytes) -> dict[str, int]:
    """Tells where the bytes of a `.jsem` file go.

    Args:
        data: a sound file, single or archive.

    Returns:
        Bytes by part: `header` (all that is not elsewhere), each section's name that occurs, `checksums`, and `names`
        if there are any; their sum is `len(data)`.

    Raises:
        FormatError: as from `unpack`.
    """
    file = unpack(data)
    sections: dict[str, int] = {}
    for item in file.items:
        for tag, content in item.sections.items():
            sections[SECTION_NAMES[tag]] = sections.get(SECTION_NAMES[tag], 0) + len(content)
    checksums, names = 2, {}
    if file.kind == "archive":
        checksums = 4 + 2 * len(file.items)
        names_bytes = open_archive(data).names_bytes
        names = {"names": names_bytes} if names_bytes else {}
    header = len(data) - sum(sections.values()) - checksums - sum(names.values())
    return {"header": header, **sections, "checksums": checksums, **names}
