"""Photos of every kind become the pixels that a person would see, or one clear sentence."""

import io
import os
import random
import re
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from jaxsem.data.images import PHOTO_SUFFIXES, list_images, pixels_from, read_image, write_image
from jaxsem.errors import InputError, OutputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photo(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth picture without symmetry, so that lossy formats stay close and a wrong turn shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- where from, where to


def test_path_bytes_and_stream_give_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path)
    data = path.read_bytes()
    stream = io.BytesIO(b"skip" + data)
    stream.seek(4)
    for source in (path, str(path), data, bytearray(data), memoryview(data), stream):
        pixels = read_image(source)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, photo())


def test_a_pipe_is_read(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "pipe")
    data = saved(Image.fromarray(photo()))
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    np.testing.assert_array_equal(read_image(tmp_path / "pipe"), photo())
    writer.join()


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ""])
def test_lossless_formats_round_trip(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", photo())
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), photo())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".avif"])
def test_lossy_formats_stay_close(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", photo())
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - photo()).mean() < 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (9, 1)])
def test_tiny_images_round_trip(tmp_path, height, width):
    write_image(tmp_path / "a.png", photo(height, width))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo(height, width))


# ---------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("TIFF", 0), ("JPEG", 12), ("WEBP", 12)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, tolerance, orientation):
    upright = photo()
    # What a camera stores so that a viewer which applies the orientation shows `upright` (EXIF 2.32, section 4.6.5).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if tolerance else {}
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    pixels = read_image(data)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() <= tolerance


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(200))])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_does_not_cost_the_photo(exif):
    pixels = read_image(saved(Image.fromarray(photo()), "JPEG", quality=95, exif=exif))
    assert np.abs(pixels.astype(int) - photo()).mean() < 3


def test_an_orientation_that_does_not_exist_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(photo()), exif=exif)), photo())


# ---------------------------------------------------------------------------------------------------------------- modes


def test_grey_becomes_three_equal_channels():
    grey = photo()[:, :, 0]
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(grey))), np.stack([grey] * 3, axis=2))


def test_one_bit_becomes_black_and_white():
    bits = photo()[:, :, 0] > 127
    pixels = read_image(saved(Image.fromarray(bits)))
    np.testing.assert_array_equal(pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))


def test_palette_becomes_its_colours():
    image = Image.fromarray(photo()).quantize(16)
    np.testing.assert_array_equal(read_image(saved(image)), np.array(image.convert("RGB")))


def two_halves(mode: str, opaque, clear) -> Image.Image:
    image = Image.new(mode, (4, 2), opaque)
    image.paste(clear, (2, 0, 4, 2))
    return image


@pytest.mark.parametrize(
    ("image", "options", "left"),
    [
        (two_halves("RGBA", (255, 0, 0, 255), (0, 255, 0, 0)), {}, RED),
        (two_halves("LA", (50, 255), (0, 0)), {}, (50, 50, 50)),
        (two_halves("RGB", RED, GREEN), {"transparency": GREEN}, RED),
        (two_halves("L", 50, 7), {"transparency": 7}, (50, 50, 50)),
        (two_halves("P", 1, 2), {"transparency": 2}, None),
        (two_halves("1", 0, 1), {"transparency": 1}, (0, 0, 0)),
    ],
    ids=["RGBA", "LA", "RGB key", "L key", "palette key", "1 key"],
)
def test_transparent_parts_are_white(image, options, left):
    if image.mode == "P":
        image.putpalette([*BLUE, *RED, *GREEN])
        left = RED
    pixels = read_image(saved(image, **options))
    np.testing.assert_array_equal(pixels[:, :2], np.broadcast_to(left, (2, 2, 3)))
    np.testing.assert_array_equal(pixels[:, 2:], 255)


def test_half_transparent_parts_are_mixed_with_white():
    image = Image.new("RGBA", (3, 3), (200, 100, 0, 51))  # 51/255 = one fifth
    np.testing.assert_array_equal(read_image(saved(image))[0, 0], [244, 224, 204])


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    wide = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
    expected = np.round(wide / 257).astype(np.uint8)
    for data in (
        saved(Image.fromarray(wide)),
        saved(Image.fromarray(wide), "TIFF"),
        saved(Image.fromarray(wide), "PPM"),
    ):
        np.testing.assert_array_equal(read_image(data)[:, :, 1], expected)


def test_big_endian_sixteen_bit_grey_is_scaled():
    wide = np.linspace(0, 65535, 300).astype(">u2").reshape(15, 20)
    image = Image.frombytes("I;16B", (20, 15), wide.tobytes())
    np.testing.assert_array_equal(pixels_from(image)[:, :, 2], np.round(wide / 257).astype(np.uint8))


def test_wide_integers_are_taken_as_sixteen_bits():
    wide = np.array([[0, 257, 65535]], np.int32)
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(wide), "TIFF"))[0, :, 0], [0, 1, 255])
    with pytest.raises(InputError, match="integers from 0 to 65536"):
        read_image(saved(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF"))


def test_floats_are_taken_as_unit_or_byte_range():
    for values, expected in [([0, 0.5, 1], [0, 128, 255]), ([0, 128.4, 255], [0, 128, 255])]:
        data = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
        np.testing.assert_array_equal(read_image(data)[0, :, 0], expected)


@pytest.mark.parametrize("values", [[-1, 0], [0, 300], [0, np.nan], [0, np.inf]])
def test_floats_of_unknown_range_are_refused(values):
    data = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(InputError, match="holds floats from"):
        read_image(data)


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        assert np.abs(read_image(saved(image, kind))[8, 8].astype(int) - RED).max() <= 3, kind


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "La", "PA", "RGBX", "RGBa"])
def test_every_other_mode_of_pillow_is_taken(mode):
    colour = {"YCbCr": (76, 85, 255), "HSV": (0, 255, 255), "LAB": (138, 209, 198), "La": (255, 255)}
    if mode == "PA":
        image = Image.new("RGB", (4, 4), RED).quantize(2).convert("PA")
    else:
        image = Image.new(mode, (4, 4), colour.get(mode, (255, 0, 0, 255)))
    expected = WHITE if mode == "La" else RED
    assert np.abs(pixels_from(image)[2, 2].astype(int) - expected).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(read_image(data), np.broadcast_to(RED, (8, 8, 3)))


# ------------------------------------------------------------------------------------------------------ colour profiles


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue primaries are exchanged, so that applying it shows at once."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = data.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    return bytes(data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))


def test_an_embedded_profile_is_converted_to_srgb():
    pixels = read_image(saved(Image.new("RGB", (4, 4), RED), icc_profile=swapped_profile()))
    assert np.abs(pixels[0, 0].astype(int) - BLUE).max() <= 2


def test_a_profile_leaves_alpha_alone():
    image = two_halves("RGBA", (255, 0, 0, 255), (255, 0, 0, 0))
    pixels = read_image(saved(image, icc_profile=swapped_profile()))
    assert np.abs(pixels[0].astype(int) - [BLUE, BLUE, WHITE, WHITE]).max() <= 2


def test_an_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(photo()), icc_profile=profile)), photo())


@pytest.mark.parametrize("profile", [b"x", bytes(200), swapped_profile()[:300]], ids=["short", "zeros", "cut"])
def test_a_broken_profile_is_ignored(profile):
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(photo()), icc_profile=profile)), photo())


def test_a_profile_of_other_channels_is_ignored():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    plain = read_image(saved(image, "TIFF"))
    np.testing.assert_array_equal(read_image(saved(image, "TIFF", icc_profile=swapped_profile())), plain)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_is_no_photo_is_refused_with_its_name(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(saved(Image.fromarray(photo()))[:-200])
    (tmp_path / "cut.jpg").write_bytes(saved(Image.fromarray(photo(200, 300)), "JPEG")[:2000])
    for path, words in [
        ("empty.png", "is empty"),
        ("text.png", "no image"),
        ("cut.png", "damaged or incomplete"),
        ("cut.jpg", "damaged or incomplete"),
        ("missing.png", "does not exist"),
        (".", "is a folder"),
        ("text.png/a.png", "cannot be read"),
        ("nul\0.png", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            read_image(tmp_path / path)
        assert str(caught.value).startswith(str(tmp_path / path))
        assert "\n" not in str(caught.value)


def test_bytes_and_streams_are_named_in_errors(tmp_path):
    with pytest.raises(InputError, match="given as bytes is empty"):
        read_image(b"")
    (tmp_path / "a.txt").write_text("hello")
    with (tmp_path / "a.txt").open() as text, pytest.raises(InputError, match=r"a\.txt gives str .* binary mode"):
        read_image(text)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    data = saved(Image.new("1", (3000, 3000)))
    with pytest.raises(InputError, match=r"3000x3000 pixels, over the limit of 8000000"):
        read_image(data, max_pixels=8_000_000)
    assert read_image(data, max_pixels=9_000_000).shape == (3000, 3000, 3)


def test_a_decompression_bomb_is_refused():
    # A sound PNG header of 2^30 pixels, above Pillow's own limits, with next to no data.
    data = bytearray(saved(Image.new("1", (8, 8))))
    data[16:24] = (32768).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InputError, match="32768x32768 pixels, over the limit"):
        read_image(bytes(data))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "ICO"])
def test_random_damage_raises_nothing_but_input_errors(kind):
    options = (
        {"exif": Image.Exif(), "icc_profile": swapped_profile()} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    )
    data = saved(Image.fromarray(photo(16, 24)), kind, **options)
    rng = random.Random(kind)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(min(len(damaged), rng.choice([40, 10_000])))] = rng.randrange(256)
        try:
            pixels = read_image(
                bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged), 1 << 20
            )
        except InputError:
            pass
        else:
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3


# --------------------------------------------------------------------------------------------------- arrays and Pillow


def test_arrays_of_every_shape_are_taken():
    rgb = photo()
    assert pixels_from(rgb) is rgb
    grey = rgb[:, :, 0]
    np.testing.assert_array_equal(pixels_from(grey), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(pixels_from(grey[:, :, None]), np.stack([grey] * 3, axis=2))
    clear = np.dstack([rgb, np.zeros_like(grey)])
    np.testing.assert_array_equal(pixels_from(clear), np.full_like(rgb, 255))
    np.testing.assert_array_equal(pixels_from(Image.fromarray(rgb)), rgb)
    np.testing.assert_array_equal(pixels_from(saved(Image.fromarray(rgb))), rgb)


def test_jax_arrays_are_taken():
    import jax.numpy as jnp

    np.testing.assert_array_equal(pixels_from(jnp.asarray(photo())), photo())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "this one is float32: scale to 0 to 255, round"),
        (np.zeros((4, 4, 3), np.uint16), "this one is uint16"),
        (np.zeros((3, 40, 40), np.uint8), r"\[3, 40, 40\]: move the channels last"),
        (np.zeros((2, 4, 4, 3), np.uint8), "one image at a time"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (3, "int is no image"),
        (None, "NoneType is no image"),
    ],
)
def test_unusable_values_are_refused(value, words):
    with pytest.raises(InputError, match=words):
        pixels_from(value)


def test_arrays_obey_the_pixel_limit():
    with pytest.raises(InputError, match="60x40 pixels, over the limit of 100"):
        pixels_from(photo(), max_pixels=100)
    with pytest.raises(InputError, match="60x40 pixels, over the limit of 100"):
        pixels_from(Image.fromarray(photo()), max_pixels=100)


# -------------------------------------------------------------------------------------------------- writing and listing


def test_write_image_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(InputError, match=r"suffix \.xyz.*use one of"):
        write_image(tmp_path / "a.xyz", photo())
    with pytest.raises(InputError, match=r"20000x1 pixels as WEBP .*use \.png"):
        write_image(tmp_path / "a.webp", photo(1, 20000))
    with pytest.raises(InputError, match="float64"):
        write_image(tmp_path / "a.png", photo() / 255)
    assert list(tmp_path.iterdir()) == []


def test_write_image_replaces_only_when_forced(tmp_path):
    write_image(tmp_path / "a.png", photo(seed=1))
    with pytest.raises(OutputError, match="exists already"):
        write_image(tmp_path / "a.png", photo(seed=2))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo(seed=1))
    write_image(tmp_path / "a.png", photo(seed=2), force=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo(seed=2))


def test_list_images_finds_photos_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/deep/d.tif", ".hidden/e.png", "._f.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.png", "b.JPG", "sub/c.webp", "sub/deep/d.tif"]


def test_list_images_says_what_is_wrong(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for path, words in [(tmp_path, "holds no photo"), (tmp_path / "a.txt", "is a file"), (tmp_path / "b", "not exist")]:
        with pytest.raises(InputError, match=re.escape(str(path)) + f".*{words}"):
            list_images(path)


def test_every_listed_suffix_is_one_that_pillow_reads():
    known = Image.registered_extensions()
    assert {suffix for suffix in PHOTO_SUFFIXES if known.get(suffix) not in Image.OPEN} == set()
