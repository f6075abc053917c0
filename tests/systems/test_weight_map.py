"""RSIC's weight map: regions to levels in exact integers, and levels to bytes and back."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.entropy.adaptive import encode_adaptive
from jaxsem.entropy.level_map import decode_levels, encode_levels
from jaxsem.errors import FormatError, InputError
from jaxsem.systems.weight_map import (
    Box,
    Click,
    Heat,
    Mask,
    WeightMapConfig,
    build_map,
    constant_map,
    find_region,
    pack_map,
    unpack_map,
    upsample,
)

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 40)


def noise(rows, columns, levels, seed=0):
    return np.random.RandomState(seed).randint(0, levels, (rows, columns))


def blobs(rows, columns, levels, seed=0):
    """A map such as regions make: discs of falling level on 0."""
    random, (y, x) = np.random.default_rng(seed), np.mgrid[:rows, :columns]
    found = np.zeros((rows, columns), int)
    for _ in range(random.integers(1, 4)):
        distance = np.hypot(y - random.integers(rows), x - random.integers(columns))
        found = np.maximum(found, np.clip(levels - distance / random.uniform(0.3, 3), 0, levels - 1).astype(int))
    return found


# -- levels of regions ------------------------------------------------------------------------------------------------


def exact(shares, weight, config):
    """The levels of shares [height, width] of Fractions, by the definition."""
    height, width = shares.shape
    rows, columns = config.grid(height, width)
    found = np.zeros((rows, columns), int)
    for r in range(rows):
        for c in range(columns):
            cell = shares[r * config.stride :, c * config.stride :][: config.stride, : config.stride]
            share = sum(cell.ravel().tolist()) / Fraction(cell.size)
            found[r, c] = math.floor(weight * share * (config.levels - 1) + Fraction(1, 2))
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 16), st.integers(2, 8), st.integers(1, 64), SEEDS)
def test_levels_are_rounded_means_times_the_weight(height, width, stride, levels, weight, seed):
    config, weight = WeightMapConfig(stride, levels), Fraction(weight, 64)
    random = np.random.default_rng(seed)
    shares = random.integers(0, 65, (height, width))
    shares.flat[random.integers(shares.size)] = 64
    want = exact(np.vectorize(lambda k: Fraction(int(k), 64), otypes=[object])(shares), weight, config)
    for region, expected in (
        (Heat(shares / 64, weight=float(weight)), want),
        (Mask(shares > 40, weight=float(weight)), exact((shares > 40).astype(int).astype(object), weight, config)),
    ):
        if not expected.any():
            with pytest.raises(InputError, match="which rounds to nothing"):
                build_map(height, width, [region], config)
            continue
        found = build_map(height, width, [region], config)
        assert found.dtype == np.uint8
        assert found.tolist() == expected.tolist()


def test_halves_are_rounded_up():
    config = WeightMapConfig(2, 3)  # half of a level is a fourth: one pixel of four
    mask = np.zeros((2, 6), bool)
    mask[0, 0] = mask[0, 2:4] = mask[1, 2] = mask[0, 4] = True
    assert build_map(2, 6, [Mask(mask)], config).tolist() == [[1, 2, 1]]
    assert build_map(2, 6, [Mask(np.ones((2, 6), bool), weight=0.75)], config).tolist() == [[2, 2, 2]]
    assert build_map(2, 6, [Mask(np.ones((2, 6), bool), weight=0.7499)], config).tolist() == [[1, 1, 1]]


def test_cells_at_the_border_count_their_own_pixels():
    config = WeightMapConfig(64, 8)
    assert build_map(70, 65, [Box(64, 64, 1, 6)], config).tolist() == [[0, 0], [0, 7]]


def test_a_box_is_the_mask_of_its_pixels():
    mask = np.zeros((300, 500), bool)
    mask[30:207, 111:444] = True
    found = build_map(300, 500, [Box(x=111, y=30, width=333, height=177)])
    assert found.tolist() == build_map(300, 500, [Mask(mask)]).tolist()
    assert 0 < found[0].max() < 7  # part of a cell


def test_a_click_is_a_gaussian_around_its_cell():
    found = build_map(300, 500, [Click(499, 130, radius=1.5)])
    rows, columns = np.mgrid[:5, :8]
    want = np.floor(np.exp(-((rows - 2) ** 2 + (columns - 7) ** 2) / 4.5) * 7 + 0.5)
    assert found.tolist() == want.astype(int).tolist()
    assert (found[2, 7], found[2, 6]) == (7, 6)
    assert build_map(300, 500, [Click(0, 0, radius=1e-200)]).nonzero() == (0, 0)


def test_a_click_does_not_depend_on_the_context_of_decimal():
    import decimal

    want = build_map(900, 900, [Click(450, 450, radius=3)]).tolist()
    with decimal.localcontext(decimal.Context(prec=1, rounding=decimal.ROUND_UP)):
        assert build_map(900, 900, [Click(450, 450, radius=3)]).tolist() == want


def test_where_regions_overlap_the_larger_counts():
    regions = [Box(0, 0, 256, 128, weight=0.5), Box(128, 0, 128, 128), Box(0, 64, 64, 64, weight=0)]
    assert build_map(128, 384, regions, WeightMapConfig(64, 3)).tolist() == [[1, 1, 2, 2, 0, 0]] * 2
    assert build_map(128, 384, regions, WeightMapConfig(64, 5), background=1).tolist() == [[2, 2, 4, 4, 1, 1]] * 2


def test_heats_of_all_kinds_of_floats_agree():
    heat = np.random.default_rng(0).integers(0, 17, (100, 130)) / 16
    heat[50, 50] = 1
    found = [build_map(100, 130, [Heat(heat.astype(kind))]).tolist() for kind in ("float16", "float32", "float64")]
    assert found[0] == found[1] == found[2]


def test_levels_stand_for_even_values():
    assert WeightMapConfig().values.tolist() == (np.arange(8) / np.float32(7)).astype(np.float32).tolist()
    assert WeightMapConfig(levels=2).values.tolist() == [0, 1]
    assert WeightMapConfig(levels=1).values.tolist() == [1]


def test_one_level_asks_for_everything_everywhere():
    config = WeightMapConfig(levels=1)
    found = build_map(100, 100, [Box(0, 0, 1, 1)], config)
    assert (config.values[found] == 1).all()
    assert pack_map(found, config) == b""
    assert unpack_map(b"", 100, 100, config).tolist() == found.tolist()


def test_global_mode_is_one_level():
    found = constant_map(65, 129, 3)
    assert (found.dtype, found.tolist()) == (np.uint8, [[3, 3, 3]] * 2)
    assert len(pack_map(found)) == 2
    assert unpack_map(pack_map(found), 65, 129).tolist() == found.tolist()


# -- what finds nothing -----------------------------------------------------------------------------------------------


def similarity(inside=0.3, outside=0.2, grain=0.004):
    found = np.full((20, 30), outside, np.float32)
    found[4:12, 10:18] = inside
    return found + grain * np.random.default_rng(0).uniform(-1, 1, found.shape).astype(np.float32)


def test_a_region_that_stands_out_is_found():
    found = find_region(similarity())
    want = np.zeros((20, 30), bool)
    want[4:12, 10:18] = True
    assert found.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("similar", "asked", "message"),
    [
        (similarity(inside=0.2), {}, "peaks at 0.204, 0.004 above the rest, where 0 and 0.02 are asked for"),
        (similarity(), {"least_contrast": 0.2}, "0.1.. above the rest, where 0 and 0.2 are"),
        (similarity(), {"least_peak": 0.45}, "peaks at 0.304"),
        (similarity(-0.1, -0.3), {}, "peaks at -0.096"),
        (np.full((4, 4), 0.3), {"least_contrast": 0.0}, "0.000 above the rest"),
    ],
)
def test_a_phrase_that_finds_nothing_is_told_with_the_way_out(similar, asked, message):
    with pytest.raises(InputError, match=rf"'lighthouse' finds nothing.*{message}.*global mode"):
        find_region(similar, "lighthouse", **asked)


@pytest.mark.parametrize("similar", [np.zeros((0, 4)), np.zeros(4), np.full((4, 4), np.nan)])
def test_what_is_no_similarity_map_is_refused(similar):
    with pytest.raises(InputError, match="a similarity map is finite numbers"):
        find_region(similar)
    with pytest.raises(InputError, match="the threshold"):
        find_region(similarity(), threshold=1.0)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Box(90, 0, 20, 10), "x=90, y=0, width=20, height=10 is empty or not within the image of 100x80"),
        (Box(-1, 0, 20, 10), "not within the image"),
        (Box(0, 0, 0, 10), "is empty or not"),
        (Box(0, 71, 10, 10), "not within the image"),
        (Box(0.5, 0, 10, 10), "a box takes whole numbers, not 0.5: round it"),
        (Click(100, 0), "x=100, y=0 is not within the image of 100x80"),
        (Click(0, -1), "not within the image"),
        (Click(0, 0, radius=0), "radius is a number of cells above 0, not 0"),
        (Click(0, 0, radius=math.inf), "radius is a number"),
        (Click(0, 0, radius="1"), "radius is a number, not '1'"),
        (Mask(np.ones((100, 80), bool)), r"is bool \[80, 100\], not bool \[100, 80\]"),
        (Mask(np.ones((80, 100))), r"is bool \[80, 100\], not float64"),
        (Mask(np.zeros((80, 100), bool)), "the mask is empty"),
        (Heat(np.ones((80, 99))), r"is real \[80, 100\]"),
        (Heat(np.ones((80, 100), int)), "not int64"),
        (Heat(np.full((80, 100), 1.01)), "values from 0 to 1, not 1.01 to 1.01"),
        (Heat(np.full((80, 100), np.nan)), "values from 0 to 1, not nan"),
        (Heat(np.zeros((80, 100))), "finds nothing; choose global mode"),
        (Box(0, 0, 10, 10), "region 1, a Box of weight 1, comes to 2.4% of a cell of 64 pixels"),
        (Box(0, 0, 64, 64, weight=0.07), "rounds to nothing at 8 levels"),
        ("star", "region 1 is a str: give a Heat"),
    ],
)
def test_regions_that_do_not_fit_are_refused(region, message):
    with pytest.raises(InputError, match=message):
        build_map(80, 100, [region])


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan, "half"])
def test_weights_lie_between_0_and_1(weight):
    with pytest.raises(InputError, match="weight"):
        Box(0, 0, 64, 64, weight=weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "levels=0; it takes an integer from 1 to 8"),
        ({"levels": 9}, "levels=9"),
        ({"stride": 0}, "stride=0; it takes an integer from 1 to 1024"),
        ({"stride": 64.0}, "stride=64.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        WeightMapConfig(**settings)


def test_maps_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="there is no region"):
        build_map(80, 100, [])
    with pytest.raises(InputError, match="image of 0x100 pixels"):
        build_map(0, 100, [Box(0, 0, 1, 1)])
    with pytest.raises(InputError, match=r"an image takes whole numbers, not 80\.5"):
        constant_map(80.5, 100, 0)
    with pytest.raises(InputError, match="no level 8 in a weight map of 8: choose 0 to 7"):
        constant_map(80, 100, 8)
    with pytest.raises(InputError, match="no level -1"):
        build_map(80, 100, [Box(0, 0, 64, 64)], background=-1)
    with pytest.raises(InputError, match="exceeds the limit of 1048576: take a stride above 1"):
        constant_map(2048, 2048, 0, WeightMapConfig(stride=1))


# -- the latent grid --------------------------------------------------------------------------------------------------


def test_positions_take_the_cell_they_lie_in():
    weights = jnp.arange(6.0).reshape(2, 3)
    even = jax.jit(upsample, static_argnums=(1, 2))(weights, 4, 6)
    assert even.tolist() == np.arange(6.0).reshape(2, 3).repeat(2, 0).repeat(2, 1).tolist()
    # An image of 96x136 has a latent of 12x17 and a map of 2x3 cells of 8 positions, the last ones cut.
    cut = upsample(weights, 12, 17, side=8)
    assert cut.tolist() == np.arange(6.0).reshape(2, 3).repeat(8, 0).repeat(8, 1)[:12, :17].tolist()
    assert upsample(weights, 1, 2, side=0.5).tolist() == [[4, 5]]
    assert upsample(jnp.stack([weights, 2 * weights]), 5, 5).shape == (2, 5, 5)


@pytest.mark.parametrize(("height", "side"), [(0, None), (4, 0), (4, math.nan)])
def test_grids_that_cannot_be_are_refused(height, side):
    with pytest.raises(InputError, match="sizes are above 0"):
        upsample(jnp.zeros((2, 2)), height, 4, side)


# -- bytes ------------------------------------------------------------------------------------------------------------

# Changing these is a new version of the format.
GOLDEN = {
    "constant": (np.full((8, 12), 5), 8, "2c73"),
    "box": (build_map(512, 768, [Box(64, 0, 320, 200)]), 8, "b799bd533c"),
    "click": (build_map(512, 768, [Click(700, 400, radius=1.5, weight=0.6)]), 8, "064859ee97f4df9e"),
    "raw of 8": (noise(3, 5, 8), 8, "01b32798bb6f15f2"),
    "raw of 3": (noise(3, 5, 3), 3, "0c73203606"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    levels, count, data = GOLDEN[name]
    assert encode_levels(levels, count).hex() == data
    assert decode_levels(bytes.fromhex(data), *levels.shape, count).tolist() == levels.tolist()


def by_the_specification(levels, count):
    """Streams of all modes, from the module's docstring alone, over the adaptive format."""
    rows, columns = levels.shape
    even = [65536 // count + (s < 65536 % count) for s in range(count)]
    context = []
    for i in range(rows):
        for j in range(columns):
            neighbours = [[levels[i, j - 1]] if j else [], [levels[i - 1, j]] if i else []]
            a, b = (neighbours[k] or neighbours[1 - k] or [0] for k in (0, 1))
            pair, seen = sorted((int(a[0]), int(b[0]))), [0] * count
            for other, cell in enumerate(context):
                if cell[0] == pair:
                    seen[levels.flat[other]] += 1
            near = range(pair[0] - 1, pair[1] + 2)
            weights = [1 + 16 * pair.count(s) + 4 * (s in near and s not in pair) + 16 * seen[s] for s in range(count)]
            row = [1 + w * (65536 - count) // sum(weights) for w in weights]
            row[max(range(count), key=lambda s: (weights[s], -s))] += 65536 - sum(row)
            context.append((pair, row))
    cells = levels.ravel().tolist()
    modes = [(cells[:1], [even]), (cells, [even] * len(cells)), (cells, [row for _, row in context])]
    streams = []
    for mode, (symbols, tables) in enumerate(modes):
        tables = [[8192, 4096, 53248], *tables]
        padded = np.array([[row + [0] * (8 - len(row))] for row in tables])
        streams.append(encode_adaptive(np.array([[mode, *symbols]]), padded)[0])
    return streams


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("make", [blobs, noise])
def test_the_specification_is_enough_to_encode(make, count):
    levels = make(7, 9, count, 3)
    _, raw, context = by_the_specification(levels, count)
    assert (len(raw) <= len(context)) == (make is noise)  # as long at 2 levels
    assert encode_levels(levels, count)[:-1] == (raw if make is noise else context)
    flat = np.full((7, 9), count - 1)
    assert encode_levels(flat, count)[:-1] == by_the_specification(flat, count)[0]


def test_the_check_is_the_published_crc():
    """CRC-8/I-432-1 of "123456789" is A1; here its first three bytes are rows, columns and levels."""
    from jaxsem.entropy import level_map

    assert level_map._check(b"456789", ord("1"), ord("2"), ord("3")) == b"\xa1"


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.integers(1, 8), st.sampled_from([noise, blobs]), SEEDS)
def test_round_trip_within_three_bits_a_cell_and_two_bytes(rows, columns, count, make, seed):
    levels, config = make(rows, columns, count, seed), WeightMapConfig(16, count)
    data = pack_map(levels, config)
    found = unpack_map(data, 16 * rows, 16 * columns - 15, config)
    assert found.dtype == np.uint8
    assert found.tolist() == levels.tolist()
    assert len(data) <= math.ceil(math.log2(count) * levels.size / 8) + 2


def test_maps_of_regions_cost_a_fraction_of_the_paper():
    """36 bytes raw; the sum over many shows that the model does learn."""
    made = [blobs(8, 12, 8, seed) for seed in range(40)]
    assert sum(len(encode_levels(levels, 8)) for levels in made) < 0.5 * 40 * 36
    assert len(encode_levels(build_map(512, 768, [Box(64, 0, 320, 200)]), 8)) < 0.2 * 36


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_every_flipped_bit_is_noticed(name):
    levels, count, data = GOLDEN[name]
    for bit in range(4 * len(data)):
        damaged = bytearray.fromhex(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="check fails"):
            decode_levels(bytes(damaged), *levels.shape, count)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_cut_or_appended_is_noticed(name):
    levels, count, data = GOLDEN[name]
    data = bytes.fromhex(data)
    cut = [data[:end] for end in range(len(data))]
    for damaged in [*cut, data[1:], data + b"\0", b"\0" + data, data + data]:
        with pytest.raises(FormatError, match="are no map of"):
            decode_levels(damaged, *levels.shape, count)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), SEEDS)
def test_behind_a_right_check_a_stream_must_end_with_its_map(count, seed):
    """Whoever repairs the check after damage finds another map or an error, and never a level out of range."""
    from jaxsem.entropy import level_map

    levels, random = blobs(6, 7, count, seed), np.random.default_rng(seed)
    stream = bytearray(encode_levels(levels, count)[:-1])
    stream[random.integers(len(stream))] ^= 1 << random.integers(8)
    stream += bytes(random.integers(0, 256, random.integers(3)).tolist())
    data = bytes(stream) + level_map._check(bytes(stream), 6, 7, count)
    try:
        found = decode_levels(data, 6, 7, count)
    except FormatError as error:
        assert "are no map of 6x7 cells" in str(error)  # noqa: PT017
        return
    assert found.max() < count
    assert data[:-1] in by_the_specification(found, count)


def test_another_size_is_noticed_and_the_image_named():
    data = pack_map(blobs(8, 12, 8))
    with pytest.raises(FormatError, match=r"image of 768x512 pixels cannot be read: These .* are no map of 12x8 cells"):
        unpack_map(data, 768, 512)
    with pytest.raises(FormatError, match="7 levels"):
        unpack_map(data, 512, 768, WeightMapConfig(levels=7))
    with pytest.raises(FormatError, match="1 levels"):
        unpack_map(data, 512, 768, WeightMapConfig(levels=1))
    with pytest.raises(FormatError, match="These 0 bytes"):
        unpack_map(b"", 512, 768)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_garbage_is_refused_or_is_a_map(data, rows, columns, count):
    try:
        levels = decode_levels(data, rows, columns, count)
    except FormatError:
        return
    assert levels.max() < count
    assert data == b"" or data[:-1] in by_the_specification(levels, count)


@pytest.mark.parametrize(
    ("levels", "count", "message"),
    [
        (np.zeros((2, 2)), 8, "not float64"),
        (np.zeros(4, int), 8, r"not int64 \[4\]"),
        (np.zeros((0, 4), int), 8, r"\[0, 4\]"),
        (np.full((2, 2), 8), 8, "from 8 to 8 are not within 0 to 7"),
        (np.full((2, 2), -1), 8, "from -1 to -1"),
        (np.ones((2, 2), int), 1, "not within 0 to 0"),
        (np.zeros((2, 2), int), 9, "1 to 8 levels, not 9"),
        (np.zeros((2, 2), int), 0, "1 to 8 levels, not 0"),
    ],
)
def test_what_is_no_map_is_not_encoded(levels, count, message):
    with pytest.raises(InputError, match=message):
        encode_levels(levels, count)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1 << 11, 1 << 10)])
def test_sizes_that_no_map_has_are_refused(rows, columns):
    with pytest.raises(InputError, match="has 1 to 1048576 cells"):
        decode_levels(b"\x01", rows, columns, 8)
