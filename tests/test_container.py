"""The .jsem file: golden bytes, round trips, sizes, damage of every sort, and writing."""

import binascii
import hashlib
import os
import random
import stat
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.container import (
    SECTION_NAMES,
    Item,
    byte_counts,
    is_archive,
    open_archive,
    pack,
    pack_archive,
    unpack,
    write_file,
)
from jaxsem.errors import FormatError, InputError, OutputError
from jaxsem.files import check_output, make_folder, read_bytes

DIGEST = hashlib.sha256(b"elic-mini").digest()
START = b"\xd5J"


def random_items(count: int, seed: int, names: bool = True) -> list[Item]:
    rng = random.Random(seed)
    shapes = [(512, 768), (768, 512), (0, 0)]
    return [
        Item(
            *rng.choice(shapes),
            {tag: rng.randbytes(rng.randrange(40)) for tag in rng.choice([(0,), (0, 1), (2,)])},
            f"trip/photo {index}.png" if names and index % 3 else None,
        )
        for index in range(count)
    ]


def sealed16(covered: bytes) -> bytes:
    """A single file with the right checksum over whatever is given: what a hostile writer would send."""
    return covered + (binascii.crc_hqx(covered, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")


def sealed32(directory: bytes, contents: bytes = b"") -> bytes:
    covered = START + b"\x12abc" + leb(len(directory)) + directory
    return covered + zlib.crc32(covered).to_bytes(4, "big") + contents


def leb(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + leb(value >> 7)


# ------------------------------------------------------------------------------------------------------- golden bytes
# Written by hand from the specification, checksums by a bit-by-bit CRC-16/GENIBUS. A change is a new format version.


def test_golden_bare_file():
    assert pack(Item(512, 768, {0: b"packet"}), b"\x01\x02\x03\x04").hex(" ") == (
        "d5 4a 10 01 02 03 80 04 80 06 70 61 63 6b 65 74 16 77"
    )


def test_golden_sections_file():
    assert pack(Item(0, 0, {1: b"a cat", 0: b"packet"}), b"\x01\x02\x03").hex(" ") == (
        "d5 4a 11 01 02 03 00 00 03 06 70 61 63 6b 65 74 61 20 63 61 74 79 29"
    )


def test_golden_archive():
    items = [Item(2, 3, {0: b"abcdef"}, "a.png"), Item(2, 3, {0: b"abc"}, "b.png"), Item(3, 2, {0: b"abcd", 1: b"e"})]
    data = pack_archive(items, b"\x01\x02\x03")
    names = zlib.compress(b"a.png\0b.png\0", 9)
    directory = (
        bytes.fromhex("03 02 02 03 01 03 02 03 01 01")
        + bytes.fromhex("cb12 aeb5 d012")
        + bytes([len(names)])
        + names
        # Kind (1 bit), then v = length - 1 with k = 1:  0 110 1 | 0 10 0 | 1 10 1, 0 0
        + bytes([0b01101010, 0b01101000])
    )
    assert data == bytes.fromhex("d54a12 010203") + bytes([len(directory)]) + directory + (
        zlib.crc32(data[: 7 + len(directory)]).to_bytes(4, "big") + b"abcdefabcabcde"
    )


def test_crc16_has_its_published_check_value():
    from jaxsem.wire import crc16

    assert crc16(b"123456789").hex() == "d64e"


# ---------------------------------------------------------------------------------------------------------- round trip

sizes = st.one_of(st.just((0, 0)), st.tuples(st.integers(1, 1 << 20), st.integers(1, 2048)))
sections = st.dictionaries(st.sampled_from(sorted(SECTION_NAMES)), st.binary(max_size=300), min_size=1)


@given(sizes, sections, st.binary(min_size=3, max_size=32))
def test_single_file_round_trip(size, contents, digest):
    item = Item(*size, contents)
    data = pack(item, digest)
    file = unpack(data)
    assert (file.version, file.kind, file.items) == (1, "single", (item,))
    assert digest.startswith(file.digest)
    assert sum(byte_counts(data).values()) == len(data)
    assert not is_archive(data)


@given(st.lists(st.tuples(sizes, sections), min_size=1, max_size=20), st.booleans())
def test_archive_round_trip(raw, named):
    items = tuple(Item(*size, contents, f"ü/{i}.png" if named else None) for i, (size, contents) in enumerate(raw))
    data = pack_archive(items, DIGEST)
    file = unpack(data)
    assert (file.kind, file.items, file.digest) == ("archive", items, DIGEST[:3])
    assert open_archive(memoryview(data))[len(items) - 1] == items[-1]
    assert sum(byte_counts(data).values()) == len(data)


def test_sections_are_kept_in_order_and_counted_by_name():
    item = Item(4, 5, {2: b"map", 0: b"packet", 1: b"caption"})
    assert list(item.sections) == [0, 1, 2]
    counts = byte_counts(pack(item, DIGEST))
    assert counts == {"header": 11, "packet": 6, "caption": 7, "weight map": 3, "checksums": 2}


def test_archive_items_are_read_at_random_and_from_the_end():
    items = random_items(30, seed=1)
    archive = open_archive(pack_archive(items, DIGEST))
    assert [archive[i] for i in (17, 3, 29, -1)] == [items[i] for i in (17, 3, 29, 29)]
    assert archive.names[1] == "trip/photo 1.png"
    with pytest.raises(IndexError):
        archive[30]


# --------------------------------------------------------------------------------------------------------------- sizes


def test_single_file_costs_twelve_bytes():
    assert len(pack(Item(16383, 16383, {0: bytes(50)}), DIGEST)) == 50 + 12


def test_equal_features_cost_an_eighth_of_a_byte_each():
    data = pack_archive([Item(0, 0, {0: bytes(50)}) for _ in range(800)], DIGEST)
    assert byte_counts(data)["header"] == 100 + 17
    assert byte_counts(data)["checksums"] == 4 + 2 * 800


@pytest.mark.parametrize("longest", [100, 5000, 16000])
def test_each_photo_in_one_of_two_orientations_costs_at_most_two_bytes(longest):
    rng = random.Random(longest)
    shapes = [(512, 768), (768, 512)]
    items = [Item(*shapes[i % 2], {0: bytes(rng.randint(longest // 8, longest))}) for i in range(400)]
    once = byte_counts(pack_archive(items[:2], DIGEST))["header"]  # the start of the file, and the two shapes
    assert once <= 30
    assert byte_counts(pack_archive(items, DIGEST))["header"] - once <= 2 * (400 - 2)


def test_one_giant_among_small_packets_costs_the_small_ones_little():
    items = [Item(9, 9, {0: bytes(100)}) for _ in range(499)] + [Item(9, 9, {0: bytes(1_000_000)})]
    assert byte_counts(pack_archive(items, DIGEST))["header"] <= 2 * 500


# -------------------------------------------------------------------------------------------------------------- damage

SMALL_FILES = {
    "bare": pack(Item(512, 768, {0: random.Random(2).randbytes(150)}), DIGEST),
    "sections": pack(Item(300, 200, {0: random.Random(3).randbytes(90), 1: b"a red star", 2: bytes(9)}), DIGEST),
    "archive": pack_archive(random_items(6, seed=4), DIGEST),
    "zeros": pack(Item(1, 1, {0: bytes(64)}), bytes(3)),
}


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_every_flipped_bit_is_found(kind):
    data = SMALL_FILES[kind]
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            unpack(bytes(damaged))


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_every_cut_is_found(kind):
    for length in range(len(SMALL_FILES[kind])):
        with pytest.raises(FormatError):
            unpack(SMALL_FILES[kind][:length])


@pytest.mark.parametrize("kind", SMALL_FILES)
@pytest.mark.parametrize(
    "tail", [b"\0", b"\0\0", bytes(100), b"\n", b"\xff"], ids=["0", "00", "zeros", "newline", "ff"]
)
def test_trailing_bytes_are_found(kind, tail):
    with pytest.raises(FormatError):
        unpack(SMALL_FILES[kind] + tail)


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_random_damage_raises_nothing_but_format_errors(kind):
    rng = random.Random(5)
    found = 0
    for _ in range(1500):
        damaged = bytearray(SMALL_FILES[kind])
        for _ in range(rng.randint(2, 12)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        cut = bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged)
        try:
            byte_counts(cut)
        except FormatError:
            found += 1
    assert found >= 1495  # a 16-bit checksum misses one in 65,536


def test_hostile_directories_with_right_checksums_raise_nothing_but_format_errors():
    data = SMALL_FILES["archive"]
    length = data[6]
    assert length < 128  # the varint is this one byte
    directory, contents = data[7 : 7 + length], data[11 + length :]
    assert unpack(sealed32(directory, contents)).items == tuple(random_items(6, seed=4))
    rng = random.Random(6)
    outcomes = set()
    for _ in range(4000):
        damaged = bytearray(directory)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            outcomes.add(len(unpack(sealed32(bytes(damaged), contents)).items))
        except FormatError as error:
            outcomes.add(str(error)[:20])
    assert len(outcomes) > 5  # many different checks were reached, not the checksum alone


def test_hostile_single_files_with_right_checksums_raise_nothing_but_format_errors():
    rng = random.Random(7)
    outcomes = set()
    for _ in range(4000):
        covered = START + bytes([rng.choice([0x10, 0x11])]) + rng.randbytes(rng.randint(3, 12))
        try:
            outcomes.add(unpack(sealed16(covered)).kind)
        except FormatError as error:
            outcomes.add(str(error)[:30])
    assert len(outcomes) > 3


def test_damage_in_one_item_leaves_the_others_readable():
    items = random_items(12, seed=8)
    data = bytearray(pack_archive(items, DIGEST))
    data[-1 - len(b"".join(items[-1].sections.values()))] ^= 255  # the last byte of the item before the last
    archive = open_archive(bytes(data))
    assert archive.damaged() == [10]
    assert [archive[i] for i in range(12) if i != 10] == items[:10] + items[11:]
    with pytest.raises(FormatError, match=r"Item 10 of the archive .* is damaged"):
        archive[10]
    with pytest.raises(FormatError, match=r"1 of the archive's 12 items are damaged \(10\)"):
        unpack(bytes(data))


def test_items_before_a_cut_stay_readable():
    items = [Item(8, 8, {0: bytes([i]) * 20}) for i in range(5)]
    archive = open_archive(pack_archive(items, DIGEST)[:-30])
    assert [archive[i] for i in range(3)] == items[:3]
    assert archive.damaged() == [3, 4]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\xd5", "only 1 bytes"),
        (START + b"\x10ab", "only 5 bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "looks like a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "looks like a JPEG image"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(50), "looks like a WebP image"),
        (b"hello, world", "no .jsem file.*68 65 6c 6c"),
        (START + b"\x20abc" + bytes(20), "format version 2.*update jaxsem"),
        (START + b"\x13abc" + bytes(20), "layout 3.*update jaxsem"),
        (sealed16(START + b"\x11abc\x02\x02\x10section"), r"tags \[4\].*update jaxsem"),
        (sealed16(START + b"\x11abc\x02\x02\x00"), "one or more"),
        (sealed16(START + b"\x11abc\x02\x02\x03\x09packet"), "9 bytes are due"),
        (sealed16(START + b"\x10abc\x00\x05packet"), "its size is 0x5"),
        (sealed16(START + b"\x10abc" + leb((1 << 20) + 1) + b"\x01"), "its size is 1048577x1"),
        (sealed16(START + b"\x10abc" + leb(1 << 20) + leb(4096)), "product of at most"),
        (sealed16(START + b"\x10abc\x81\x00\x01packet"), "no valid number"),
        (sealed32(b"\0\0\0\0\0"), "claims 0 items"),
        (sealed32(b"\x01\x01\x02\x02\x01\x00\x21\0\0\0\0"), "contradicts itself"),
        (sealed32(b"\x01\x01\x02\x02\x01\x00\x00\xff\xff\0\x01"), "contradicts itself"),  # a one among the filling
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_each_fault_says_what_it_is(data, words):
    with pytest.raises(FormatError, match=words) as caught:
        unpack(data)
    assert str(caught.value).endswith(".")


def names_archive(joined: bytes, number: int) -> bytes:
    names = zlib.compress(joined)
    head = leb(number) + b"\x01\x02\x02\x01\x00\x00" + b"\0\0" * number
    return sealed32(head + leb(len(names)) + names + bytes(-(-number // 8)))


@pytest.mark.parametrize("name", ["../up.png", "/etc/passwd", "a//b", "a/./b", "C:x", "a\\b", "a\nb", ".", "a/"])
def test_unsafe_names_are_refused_on_both_sides(name):
    with pytest.raises(InputError, match="plain relative path"):
        Item(2, 2, {0: b""}, name)
    with pytest.raises(FormatError, match="unsafe"):
        unpack(names_archive(name.encode() + b"\0", 2))


@pytest.mark.parametrize(
    ("joined", "words"),
    [
        (bytes(10_000_000), "sane length"),
        (b"a\0a", "two are the same"),
        (b"\xff\0", "cannot be read"),
        (b"a", "2 names"),
    ],
)
def test_hostile_names_are_refused(joined, words):
    with pytest.raises(FormatError, match=words):
        unpack(names_archive(joined, 2))


def test_open_archive_refuses_a_single_file():
    with pytest.raises(FormatError, match="no archive"):
        open_archive(SMALL_FILES["bare"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Item(0, 5, {0: b""}), "size is 0x5"),
        (lambda: Item(1 << 21, 1, {0: b""}), "size is 2097152x1"),
        (lambda: Item(1, 1, {}), "one or more sections"),
        (lambda: Item(1, 1, {9: b""}), r"not \[9\]"),
        (lambda: Item(1, 1, {0: b""}, "x" * 1025), "1025 bytes"),
        (lambda: Item(1, 1, {0: b""}, "\udcff.png"), "valid Unicode"),
        (lambda: pack(Item(1, 1, {0: b""}), b"ab"), "2 bytes where at least 3"),
        (lambda: pack_archive([], DIGEST), "at least one item"),
        (lambda: pack_archive([Item(1, 1, {0: b""}, "a")] * 2, DIGEST), "named 'a'"),
    ],
)
def test_what_cannot_be_packed_is_an_input_error(make, words):
    with pytest.raises(InputError, match=words):
        make()


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_format_errors(data):
    with pytest.raises(FormatError):
        unpack(START + b"\x12" + data)


# -------------------------------------------------------------------------------------------------------------- writing


def test_write_file_writes_and_obeys_the_umask(tmp_path):
    write_file(tmp_path / "a.jsem", b"bytes")
    assert read_bytes(tmp_path / "a.jsem") == b"bytes"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.jsem").stat().st_mode) == 0o666 & ~umask


def test_write_file_replaces_only_when_forced(tmp_path):
    path = tmp_path / "a.jsem"
    write_file(path, b"old")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsem"]
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.jsem"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # the kernel now refuses to write beyond 64 kB
    try:
        with pytest.raises(OutputError, match="could not be written") as caught:
            write_file(path, bytes(1 << 20), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsem"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_devices_are_written_to_and_not_replaced():
    write_file("/dev/null", b"x")
    with pytest.raises(OutputError, match="No space left"):
        write_file("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.jsem", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_bad_output_paths_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "a", "make it first"),
        (tmp_path / "file" / "a", "cannot be written"),
        ("a\0b", "null (byte|character)"),
        (tmp_path / ("x" * 300), "too long"),
    ]:
        with pytest.raises(OutputError, match=words):
            write_file(path, b"x")
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, force=True)
    with pytest.raises(OutputError, match="cannot be made"):
        make_folder(tmp_path / "file" / "a")
    assert make_folder(tmp_path / "b" / "c").is_dir()


def test_bad_input_paths_are_refused(tmp_path):
    for path, words in [
        (tmp_path, "is a folder"),
        (tmp_path / "a", "does not exist"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=words):
            read_bytes(path)
