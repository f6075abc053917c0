import numpy as np
import pytest

from jaxsem import codec as driver
from jaxsem import pipeline, presets, shapes
from jaxsem.container import Item
from jaxsem.errors import FormatError, InputError, WeightsError


def test_a_file_decodes_to_what_the_encoder_saw(tiny_codec, noise_photo):
    photo = noise_photo(70, 100)
    quality = tiny_codec.quality
    latents = tiny_codec.analyze(tiny_codec.params, {"image": shapes.pad(photo)[None]})
    coded = driver.code_latents(tiny_codec, latents, [photo.shape[:2]], quality)
    packets = driver.encode(tiny_codec, coded, 1)
    y_hat = driver.decode(tiny_codec, packets, [photo.shape[:2]], shapes.latent_grid(70, 100))
    symbols = np.asarray(coded.slices[-1][0])
    assert np.abs(symbols).max() > 3, "the random codec must not be trivial"
    # Inside the image the decoded latent is within half a step of the analysed one, in every channel.
    inside = np.s_[:, : -(-70 // 16), : -(-100 // 16)]
    assert np.abs(np.asarray(y_hat)[inside] - np.asarray(latents["y"])[inside]).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("size", [(1, 1), (1, 130), (64, 64), (65, 40)])
def test_any_size_comes_back_with_its_size(tiny_codec, noise_photo, size):
    [file] = pipeline.compress(tiny_codec, [noise_photo(*size)])
    [again] = pipeline.decompress(tiny_codec, [file])
    assert again.shape == (*size, 3)
    assert again.dtype == np.uint8


def test_the_batch_size_changes_no_byte_and_no_pixel(tiny_codec, noise_photo):
    photos = [noise_photo(60, 60, 1), noise_photo(100, 60, 2), noise_photo(50, 64, 3), noise_photo(64, 64, 4)]
    alone = pipeline.compress(tiny_codec, photos, batch=1)
    together = pipeline.compress(tiny_codec, photos, batch=3)
    # Analysis in a batch may round differently, so a symbol may differ; decoding one's own file never may.
    for one, many in zip(alone, together, strict=True):
        assert abs(len(one) - len(many)) <= 2
    first, second = (
        pipeline.decompress(tiny_codec, together, batch=1),
        pipeline.decompress(tiny_codec, together, batch=3),
    )
    for a, b in zip(first, second, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_padding_costs_no_bits(tiny_codec, noise_photo):
    photo = noise_photo(64, 64, 5)
    [whole] = pipeline.compress_items(tiny_codec, [photo])
    # One column more makes the bucket twice as wide, and the coded latent one column (of 4) wider.
    [wider] = pipeline.compress_items(tiny_codec, [np.pad(photo, ((0, 0), (0, 1), (0, 0)), mode="edge")])
    assert wider.estimated_bits < 1.6 * whole.estimated_bits


def test_real_bytes_are_at_most_the_estimate_and_a_few(tiny_codec, noise_photo):
    # The estimate is of Gaussians, and so are the tables of a codec that was not calibrated.
    codec = presets.freeze("tiny", tiny_codec.module, tiny_codec.params)
    for seed in range(3):
        [result] = pipeline.compress_items(codec, [noise_photo(128, 128, seed)])
        size = len(result.item.sections[pipeline.PACKET])
        # Below it they may be: a table spends at most 16 bits on a symbol for which the estimate's floor says 30.
        assert result.estimated_bits / 8 * 0.5 <= size <= result.estimated_bits / 8 * 1.01 + 12


def test_quality_changes_the_rate_and_travels_in_the_file(tiny_codec, noise_photo):
    photo = noise_photo(64, 64, 6)
    [low] = pipeline.compress_items(tiny_codec.at_quality(0), [photo])
    [between] = pipeline.compress_items(tiny_codec.at_quality(0.5), [photo])
    packet = between.item.sections[pipeline.PACKET]
    assert driver.read_head(tiny_codec, packet) == (0.5, True)
    # Any quality of the codec decodes any file.
    [again] = pipeline.decompress_items(tiny_codec.at_quality(1), [between.item])
    [same] = pipeline.decompress_items(tiny_codec.at_quality(0), [between.item])
    assert (again == same).all()
    assert low.item.sections[pipeline.PACKET] != packet


def test_windows_give_the_whole_image(tiny_codec, noise_photo, monkeypatch):
    photo = noise_photo(448, 512, 7)
    whole = pipeline.compress_items(tiny_codec, [photo])
    monkeypatch.setattr(shapes, "WINDOW", 448)
    # The tiny codec has the layout, hence the receptive field, of every ELIC.
    latents = pipeline._analyse_tiles(tiny_codec, photo[None])
    direct = tiny_codec.analyze(tiny_codec.params, {"image": photo[None]})
    np.testing.assert_allclose(latents["y"], direct["y"], atol=2e-4)
    tiled = pipeline.decompress_items(tiny_codec, [whole[0].item])
    monkeypatch.undo()
    plain = pipeline.decompress_items(tiny_codec, [whole[0].item])
    assert np.abs(tiled[0].astype(int) - plain[0].astype(int)).max() <= 1


def test_a_stream_gives_every_image_once(tiny_codec, noise_photo):
    photos = [noise_photo(40 + 30 * (k % 3), 40, k) for k in range(7)]
    found = dict(pipeline.compress_stream(tiny_codec, iter(photos), batch=2))
    assert sorted(found) == list(range(7))
    assert all(found[k].item.height == photos[k].shape[0] for k in found)


def test_other_weights_are_refused(tiny_codec, noise_photo):
    import dataclasses

    [file] = pipeline.compress(tiny_codec, [noise_photo(32, 32)])
    other = dataclasses.replace(tiny_codec, digest=bytes(32))
    with pytest.raises(WeightsError, match="made with weights"):
        pipeline.decompress(other, [file])


def test_damaged_packets_never_give_a_picture_of_wrong_symbols(tiny_codec, noise_photo):
    [result] = pipeline.compress_items(tiny_codec, [noise_photo(48, 48)])
    packet = result.item.sections[pipeline.PACKET]
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(packet)
        damaged[rng.integers(1, len(packet))] ^= 1 << int(rng.integers(8))
        with pytest.raises(FormatError):
            pipeline.decompress_items(tiny_codec, [Item(48, 48, {pipeline.PACKET: bytes(damaged)})])


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), "photo.png"]
)
def test_what_is_no_image_is_refused(tiny_codec, bad):
    with pytest.raises(InputError, match="image"):
        pipeline.compress(tiny_codec, [bad])


def test_qualities_outside_the_weights_are_refused(tiny_codec):
    with pytest.raises(InputError, match="qualities 0 to 1, not 2"):
        tiny_codec.at_quality(2)
    with pytest.raises(FormatError, match="quality 3"):
        driver.read_head(tiny_codec, bytes([48]))
