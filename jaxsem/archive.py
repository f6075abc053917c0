"""Layout 2 of the `.jsem` file: an archive of many items, each readable alone.

The format is specified in `jaxsem.container`.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxsem.errors import FormatError, InputError
from jaxsem.wire import (
    ARCHIVE,
    DIGEST_BYTES,
    GET_ANOTHER,
    MAGIC,
    MAX_NAME_BYTES,
    MAX_NAMES_BYTES,
    MAX_RICE,
    Cursor,
    Item,
    crc16,
    crc32,
    name_complaint,
    read_kind,
    read_layout,
    section_mask,
    start,
    varint,
)


@dataclass(frozen=True)
class Archive:
    """An archive whose items are read, and checked, one by one: `archive[i]`, `len(archive)`, iteration.

    Attributes:
        digest: the stored 3 bytes of the weights digest.
        names: the items' names, None where an item has none.
        names_bytes: bytes that the names take in the file.
    """

    digest: bytes
    names: tuple[str | None, ...]
    names_bytes: int
    _data: memoryview
    _kinds: tuple[tuple[int, int, tuple[int, ...]], ...]  # per item: height, width, tags
    _lengths: tuple[tuple[int, ...], ...]  # per item: bytes of each section
    _offsets: tuple[int, ...]  # where each item starts in the file, then where the last one ends
    _checksums: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Item:
        """Reads one item, whatever has happened to the others.

        Args:
            index: 0 to `len(archive) - 1`, or negative from the end.

        Returns:
            The item.

        Raises:
            FormatError: this item is damaged or lies beyond the end of a file cut short.
            IndexError: there is no such item.
        """
        index = range(len(self))[index]
        begin, end = self._offsets[index], self._offsets[index + 1]
        called = f"Item {index} of the archive" + (f" ({self.names[index]})" if self.names[index] else "")
        if end > len(self._data):
            raise FormatError(f"{called} ends at byte {end} of a file of {len(self._data)} bytes: {GET_ANOTHER}.")
        contents = self._data[begin:end]
        if crc16(contents) != self._checksums[index]:
            raise FormatError(
                f"{called} is damaged: its checksum is {self._checksums[index].hex()} where its {end - begin} bytes "
                f"give {crc16(contents).hex()}; {GET_ANOTHER}."
            )
        height, width, tags = self._kinds[index]
        cursor = Cursor(contents, 0)
        sections = {tag: cursor.take(length) for tag, length in zip(tags, self._lengths[index], strict=True)}
        return Item(height, width, sections, self.names[index])

    def damaged(self) -> list[int]:
        """Checks every item.

        Returns:
            The indices of the items that cannot be read, in order.
        """
        return [index for index in range(len(self)) if not self._is_sound(index)]

    def refuse_damage(self) -> None:
        """Checks every byte of the archive.

        Raises:
            FormatError: an item is damaged or missing, or something follows the last one.
        """
        size, end, damaged = len(self._data), self._offsets[-1], self.damaged()
        if size > end:
            raise FormatError(f"The archive ends at byte {end}, and {size - end} more bytes follow: {GET_ANOTHER}.")
        if damaged:
            cut = f", and it is cut short ({size} of {end} bytes)" if size < end else ""
            shown = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
            raise FormatError(
                f"{len(damaged)} of the archive's {len(self)} items are damaged ({shown}){cut}: {GET_ANOTHER}, or read "
                "the others with open_archive."
            )

    def _is_sound(self, index: int) -> bool:
        begin, end = self._offsets[index], self._offsets[index + 1]
        return end <= len(self._data) and crc16(self._data[begin:end]) == self._checksums[index]


def pack_archive(items: Sequence[Item], digest: bytes) -> bytes:
    """Packs many items into the bytes of one `.jsem` archive.

    Args:
        items: one or more items; all names that are given differ.
        digest: SHA-256 over preset and weights, or its first bytes; the first 3 are stored.

    Returns:
        The archive; `byte_counts` tells where its bytes go.

    Raises:
        InputError: there is no item, two have one name, or the digest is shorter than 3 bytes.
    """
    if not items:
        raise InputError("An archive needs at least one item, and none was given.")
    kinds = {
        (item.height, item.width, section_mask(item)): None for item in items
    }  # a dict keeps the order of first sight
    places = {kind: place for place, kind in enumerate(kinds)}
    lengths = [len(content) for item in items for content in item.sections.values()]
    shortest = min(lengths)
    rice = _best_rice([length - shortest for length in lengths])
    contents = [b"".join(item.sections.values()) for item in items]
    names = _pack_names(items)

    kind_bits = (len(kinds) - 1).bit_length()
    bits = []
    for item in items:
        bits.append(_fixed(places[item.height, item.width, section_mask(item)], kind_bits))
        for content in item.sections.values():
            value = len(content) - shortest
            bits.append("1" * (value >> rice) + "0" + _fixed(value & ((1 << rice) - 1), rice))
    directory = b"".join(
        [
            varint(len(items)),
            varint(len(kinds)),
            *(varint(number) for kind in kinds for number in kind),
            varint(shortest),
            bytes([rice]),
            *(crc16(content) for content in contents),
            varint(len(names)),
            names,
            _bits_to_bytes("".join(bits)),
        ]
    )
    covered = start(ARCHIVE, digest) + varint(len(directory)) + directory
    return covered + crc32(covered) + b"".join(contents)


def open_archive(data: bytes) -> Archive:
    """Opens an archive for reading its items one by one; only the directory is checked now.

    Args:
        data: the file's bytes; a `memoryview` of a memory-mapped file reads only what is asked for.

    Returns:
        The archive, readable as far as its items are sound.

    Raises:
        FormatError: this is no archive, or its directory is damaged.
    """
    if read_layout(data) != ARCHIVE:
        raise FormatError("The file holds a single item and is no archive: read it with unpack.")
    data = memoryview(data)
    cursor = Cursor(data, len(MAGIC) + 1)
    digest = cursor.take(DIGEST_BYTES)
    directory = Cursor(cursor.take(cursor.varint()), 0)
    covered = data[: cursor.position]
    stored = cursor.take(4)
    if crc32(covered) != stored:
        raise FormatError(
            f"The directory of the archive is damaged: its checksum is {stored.hex()} where its bytes give "
            f"{crc32(covered).hex()}; {GET_ANOTHER}."
        )
    number = directory.varint()
    kinds_number = directory.varint()
    if not 1 <= kinds_number <= number:
        raise FormatError(f"The archive claims {number} items of {kinds_number} kinds: {GET_ANOTHER}.")
    checked = []
    for _ in range(kinds_number):
        height, width, mask = directory.varint(), directory.varint(), directory.varint()
        checked.append((height, width, read_kind(height, width, mask)))
    shortest, rice = directory.varint(), directory.take(1)[0]
    checksums = directory.take(2 * number)
    compressed = directory.take(directory.varint())
    names = _read_names(compressed, number)
    kinds, lengths = _read_lengths(directory.rest(), number, checked, shortest, rice)
    offsets = [cursor.position]
    for item_lengths in lengths:
        offsets.append(offsets[-1] + sum(item_lengths))
    by_item = tuple(checksums[2 * index : 2 * index + 2] for index in range(number))
    return Archive(digest, names, len(compressed), data, kinds, lengths, tuple(offsets), by_item)


def _best_rice(values: list[int]) -> int:
    """Finds the Rice parameter that codes the values in the fewest bits; it is at most the bits of their mean."""
    candidates = range(min((sum(values) // len(values)).bit_length(), MAX_RICE) + 1)
    return min(candidates, key=lambda rice: len(values) * (rice + 1) + sum(value >> rice for value in values))


def _pack_names(items: Sequence[Item]) -> bytes:
    names = [item.name for item in items if item.name]
    if not names:
        return b""
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"Two items of the archive are named {twice!r}: give each another name, or none.")
    joined = "\0".join(item.name or "" for item in items).encode()
    if len(joined) > MAX_NAMES_BYTES:
        raise InputError(f"The names take {len(joined)} bytes, over the limit of {MAX_NAMES_BYTES}: use more archives.")
    return zlib.compress(joined, 9)


def _read_lengths(data: bytes, number: int, kinds: list, shortest: int, rice: int) -> tuple[tuple, tuple]:
    """Reads the bit stream: the kind of each item and the lengths of its sections."""
    bits = _fixed(int.from_bytes(data, "big"), 8 * len(data))
    kind_bits = (len(kinds) - 1).bit_length()
    position = 0
    by_item, lengths = [], []
    wrong = FormatError(f"The archive's directory of {number} items contradicts itself: {GET_ANOTHER}.")
    if rice > MAX_RICE:
        raise wrong
    for _ in range(number):
        place = int(bits[position : position + kind_bits] or "0", 2)
        position += kind_bits
        if place >= len(kinds):
            raise wrong
        by_item.append(kinds[place])
        item_lengths = []
        for _ in kinds[place][2]:
            zero = bits.find("0", position)
            if zero < 0 or zero + 1 + rice > len(bits):
                raise wrong
            low = int(bits[zero + 1 : zero + 1 + rice] or "0", 2)
            item_lengths.append(shortest + ((zero - position) << rice | low))
            position = zero + 1 + rice
        lengths.append(tuple(item_lengths))
    if len(bits) - position >= 8 or "1" in bits[position:]:
        raise wrong
    return tuple(by_item), tuple(lengths)


def _read_names(compressed: bytes, number: int) -> tuple[str | None, ...]:
    if not compressed:
        return (None,) * number
    limit = min(number * (MAX_NAME_BYTES + 1), MAX_NAMES_BYTES + 1)  # defuses a zlib bomb
    stream = zlib.decompressobj()
    try:
        joined = stream.decompress(compressed, limit).decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"The archive's names cannot be read ({error}): {GET_ANOTHER}.") from error
    if not stream.eof or stream.unused_data or joined.count("\0") != number - 1:
        raise FormatError(f"The archive's names are not {number} names of sane length: {GET_ANOTHER}.")
    names = joined.split("\0")
    given = [name for name in names if name]
    complaint = next(filter(None, map(name_complaint, given)), None)
    if complaint or len(set(given)) < len(given):
        raise FormatError(f"The archive's names are unsafe, for {complaint or 'two are the same'}: do not use it.")
    return tuple(name or None for name in names)


def _fixed(value: int, bits: int) -> str:
    return format(value, f"0{bits}b") if bits else ""


def _bits_to_bytes(bits: str) -> bytes:
    size = -(-len(bits) // 8)
    return int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")
