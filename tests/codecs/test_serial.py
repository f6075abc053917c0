"""Codecs that code y position by position: the order, the loop, and the files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsem
from jaxsem import codec as driver
from jaxsem.codecs import JointConfig, JointHyperprior, init_params, serial
from jaxsem.entropy import Encoder, traced
from jaxsem.entropy.tables import Tables
from jaxsem.errors import FormatError, InputError
from jaxsem.nn.conv import MaskedConv
from jaxsem.pipeline import compress_items
from jaxsem.presets import bundled_photos, freeze

SIZES = ((64, 64), (60, 77), (1, 1), (33, 50))


@pytest.fixture(scope="module")
def codec():
    """Random weights, with latents large enough to leave their tables now and then."""
    module = JointHyperprior(JointConfig(channels=8, latent=12))
    params = jax.device_get(init_params(module, 0))
    params["g_a"]["layers_6"]["kernel"] = params["g_a"]["layers_6"]["kernel"] * 400
    return freeze("toy", module, params)


@pytest.fixture(scope="module")
def exact(codec):
    return jaxsem.calibrate(codec, bundled_photos()[:2])


@pytest.fixture(scope="module")
def images():
    photo = bundled_photos()[0]
    return [np.ascontiguousarray(photo[:height, :width]) for height, width in SIZES]


# -- order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (6, 1), (5, 9), (9, 4)])
def test_the_order_has_every_position_after_all_that_its_context_sees(rows, columns):
    place = np.full((rows, columns), -1)
    place[serial.order(rows, columns)] = np.arange(rows * columns)
    assert sorted(place.ravel()) == list(range(rows * columns))
    for r in range(rows):
        for c in range(columns):
            above = place[max(r - 2, 0) : r, max(c - 2, 0) : c + 3]
            left = place[r, max(c - 2, 0) : c]
            assert max([-1, *above.ravel(), *left]) < place[r, c]


def test_the_order_goes_front_by_front_from_the_top_down():
    rows, columns = serial.order(3, 5)
    assert rows.tolist() == [0, 0, 0, 0, 1, 0, 1, 1, 1, 2, 1, 2, 2, 2, 2]
    assert columns.tolist() == [0, 1, 2, 3, 0, 4, 1, 2, 3, 0, 4, 1, 2, 3, 4]


def test_a_masked_convolution_sees_only_what_comes_before():
    x = jax.random.normal(jax.random.key(0), (1, 6, 7, 3))
    layer = MaskedConv(4)
    variables = layer.init(jax.random.key(1), x)
    changed = x.at[0, 3, 4:].add(1.0).at[0, 4:].add(1.0)
    before, after = layer.apply(variables, x), layer.apply(variables, changed)
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    np.testing.assert_array_equal(before[0, 3, :5], after[0, 3, :5])
    assert jnp.abs(before[0, 3, 5] - after[0, 3, 5]).max() > 0.01


def test_a_window_gives_what_the_whole_map_has_in_its_middle():
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
    layer = MaskedConv(4)
    variables = layer.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        layer.apply(variables, x, method="at"), layer.apply(variables, x)[:, 2, 2], rtol=1e-5, atol=1e-6
    )


# -- the loop -------------------------------------------------------------------------------------------------------------


def test_fronts_give_what_raster_order_gives(exact):
    """The definition, position after position in NumPy's order, against the compiled loop."""
    rng = np.random.default_rng(0)
    height, width, m = 4, 6, 12
    psi = np.float32(rng.normal(size=(height, width, 2 * m)))
    y = np.float32(rng.laplace(size=(height, width, m)) * 3)
    module, variables = exact.module, exact.exact
    padded = np.zeros((height + 4, width + 4, m), np.float32)
    symbols, tables = np.zeros((2, height, width, m), np.int32)
    position = jax.jit(lambda psi, window: module.apply(variables, psi, window, method="position"))
    for r in range(height):
        for c in range(width):
            window = padded[r : r + 5, c : c + 5].copy().reshape(25, m)
            window[12:] = 0
            table, mean, _ = jax.device_get(position(psi[r, c][None], window.reshape(1, 5, 5, m)))
            symbols[r, c], tables[r, c] = np.rint(y[r, c] - mean[0]), table[0]
            padded[r + 2, c + 2] = symbols[r, c] + mean[0]
    stream = traced.start(1 << 23, np.zeros(0, np.uint8), serial.room(height, width, m))
    extent = np.array([height, width], np.int32)
    coded = serial.run(module, variables, traced.look_ups(exact.tables), psi, y, extent, stream, np.bool_(False))
    np.testing.assert_array_equal(coded.symbols, symbols)
    np.testing.assert_array_equal(coded.tables, tables)
    np.testing.assert_array_equal(coded.y_hat, padded[2:-2, 2:-2])


def test_a_batch_codes_what_its_images_code_alone(exact):
    rng = np.random.default_rng(0)
    psi, y = np.float32(rng.normal(size=(2, 4, 4, 24))), np.float32(rng.normal(size=(2, 4, 4, 12)) * 5)
    extents = np.array([[4, 4], [2, 3]], np.int32)
    stream = traced.start(1 << 23, np.zeros(0, np.uint8), serial.room(4, 4, 12))
    streams = jax.tree.map(lambda part: np.stack([part] * 2), stream)
    arguments = exact.module, exact.exact, traced.look_ups(exact.tables)
    both = serial.run(*arguments, psi, y, extents, streams, np.bool_(False), batched=True)
    for k in range(2):
        alone = serial.run(*arguments, psi[k], y[k], extents[k], stream, np.bool_(False))
        np.testing.assert_array_equal(both.symbols[k], alone.symbols)
        np.testing.assert_array_equal(both.y_hat[k], alone.y_hat)
    assert not both.symbols[1, 2:].any()
    assert not both.symbols[1, :, 3:].any()


# -- files ----------------------------------------------------------------------------------------------------------------


def test_a_decoder_gets_the_encoders_latents(codec, images):
    image = images[1]
    padded = jaxsem.shapes.pad(image)[None]
    y = driver.run_analysis(codec.module, codec.params, padded, np.zeros(1, np.float32))
    z = driver.run_hyper_analysis(codec.module, codec.params, y, np.zeros(1, np.float32))
    coded = driver.code_latents(codec, {"y": y, "z": z}, [image.shape[:2]], 0.0)
    [packet] = driver.encode(codec, coded, 1)
    y_hat = driver.decode(codec, [packet], [image.shape[:2]], z.shape[1:3])
    rows, columns = 4, 5  # of 16 pixels, with what the image has of the last
    # A table of scale 0.11 holds -1 to 1: these values are in tables and far outside of them.
    symbols = np.asarray(coded.slices[1][0])[0]
    assert np.abs(symbols).max() > 20
    assert np.abs(np.asarray(y_hat - y)[0, :rows, :columns]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_images_of_any_size_come_back_in_every_batch(exact, images, arithmetic):
    codec = exact.in_arithmetic(arithmetic)
    files = jaxsem.compress(codec, images, batch=1)
    again = jaxsem.decompress(codec, files, batch=1)
    assert [image.shape for image in again] == [image.shape for image in images]
    assert jaxsem.compress(codec, images, batch=2) == files
    for one, other in zip(again, jaxsem.decompress(codec, files, batch=3)):
        np.testing.assert_allclose(np.int32(one), np.int32(other), atol=1)  # batches may add in another order


def test_real_bytes_are_close_to_the_estimate(images):
    module = JointHyperprior(JointConfig(channels=8, latent=12))
    params = jax.device_get(init_params(module, 0))
    params["g_a"]["layers_6"]["kernel"] = params["g_a"]["layers_6"]["kernel"] * 8
    [result] = compress_items(freeze("toy", module, params), [images[0]])
    real = 8 * len(result.item.sections[0])
    assert abs(real - result.estimated_bits) < 0.02 * real + 48


def test_one_program_serves_both_directions_and_all_sizes_of_a_bucket(codec, images):
    jaxsem.decompress(codec, jaxsem.compress(codec, [images[0]]))
    before = serial.run._cache_size()
    sizes = (50, 33), (64, 17), (1, 64)
    jaxsem.decompress(codec, jaxsem.compress(codec, [images[0][:h, :w] for h, w in sizes]))
    assert serial.run._cache_size() == before


def test_a_damaged_packet_is_refused(codec, images):
    [result] = compress_items(codec, [images[1]])
    packet, size, grid = result.item.sections[0], images[1].shape[:2], jaxsem.shapes.latent_grid(*images[1].shape[:2])
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(packet)
        place = int(rng.integers(1, len(packet)))
        damaged[place] ^= int(rng.integers(1, 256))
        with pytest.raises(FormatError):
            driver.decode(codec, [bytes(damaged)], [size], grid)
    for length in (1, 5, len(packet) // 2, len(packet) - 1):
        with pytest.raises(FormatError):
            driver.decode(codec, [packet[:length]], [size], grid)


def test_slices_from_elsewhere_are_refused(codec):
    with pytest.raises(InputError, match="position by position"):
        driver.decode_slices(codec, lambda k, table: table, [0.0], [(64, 64)], (1, 1), False)


# -- reading inside a program ---------------------------------------------------------------------------------------------


def _written(tables, symbols, indices):
    encoder = Encoder(tables)
    encoder.push(symbols, indices, inline=True)
    return encoder.finish()


@pytest.mark.parametrize("spread", [1, 50, 100_000])
def test_a_program_reads_what_was_written_inline(codec, spread):
    rng = np.random.default_rng(spread)
    symbols = np.rint(rng.laplace(size=300) * spread).astype(np.int64).clip(-(1 << 20), 1 << 20)
    indices = rng.integers(0, 64, 300)
    data = np.frombuffer(_written(codec.tables, symbols, indices), np.uint8)
    state = int.from_bytes(data[:4].tobytes())
    read = jax.jit(traced.read)
    stream, values = read(traced.start(state, data[4:], 2000), traced.look_ups(codec.tables), indices, np.int32(300))
    np.testing.assert_array_equal(values, symbols)
    assert (int(stream.state), int(stream.cursor), bool(stream.sound)) == (1 << 23, len(data) - 4, True)


def test_noise_is_read_without_end_and_without_fault():
    # Half of all symbols are escapes.
    tables = Tables.from_rows([np.array([1 << 15, 1 << 15])])
    rng = np.random.default_rng(0)
    read = jax.jit(traced.read)
    sound = []
    for _ in range(30):
        stream = traced.start(1 << 24, rng.integers(0, 256, 40).astype(np.uint8), 40)
        stream, values = read(stream, traced.look_ups(tables), np.zeros(20, np.int32), np.int32(20))
        assert values.shape == (20,)
        sound.append(bool(stream.sound))
    # A random digit is now and then a zero in front, and a random length more than any encoder writes.
    assert not all(sound)
