"""Photos in and out of arrays: every image is uint8 `[height, width, 3]`, sRGB, upright, as a person sees it.

What a photo file may be, and what becomes of it:

* EXIF orientation is applied.
* Palette, grey, 1-bit, YCbCr, HSV, Lab and CMYK images become RGB.
* Transparent parts are laid over white.
* 16-bit grey is scaled to 8 bits, never clipped. Pillow keeps the high byte of 16-bit colour.
* Wider integers are taken as 16-bit, floats as 0 to 1 if all lie there, else as 0 to 255; what exceeds that is refused.
* Of an animation, the first frame is taken.
* A sound embedded colour profile is converted to sRGB; one that is broken, of other channels than the image, or sRGB
  already is left aside.
"""

import io
import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

from jaxsem.errors import InputError
from jaxsem.files import check_output, describe, why_unreadable, write_file

__all__ = [
    "MAX_PIXELS",
    "PHOTO_SUFFIXES",
    "check_suffix",
    "encode_image",
    "list_images",
    "pixels_from",
    "read_image",
    "write_image",
]

MAX_PIXELS = 1 << 28
PHOTO_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)

# Lossless where the format can be; else close to it, for a reconstruction should not be judged by a second codec.
_WRITERS = {
    "": ("PNG", {}),
    ".avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ".bmp": ("BMP", {}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".png": ("PNG", {}),
    ".ppm": ("PPM", {}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".webp": ("WEBP", {"lossless": True}),
}

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = UInt8[np.ndarray, "height width 3"]

# Pillow's own bomb check is a process-wide number, and stricter than MAX_PIXELS: it is lifted while a header is read.
_PILLOW_LIMIT = threading.Lock()


def read_image(source: str | os.PathLike | bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Reads a photo as a person would expect to see it (see the module's docstring).

    Args:
        source: a path, the bytes of a photo file, or a binary file object read from where it stands.
        max_pixels: the most pixels that are accepted; larger images are refused before they are decoded.

    Returns:
        The pixels, red, green and blue, 0 to 255.

    Raises:
        InputError: the source is missing, unreadable, empty, no image, damaged, cut short, or has too many pixels.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_stream(io.BytesIO(source), "The image given as bytes", max_pixels)
    if hasattr(source, "read"):
        called = str(getattr(source, "name", "The image stream"))
        data = source.read()
        if not isinstance(data, bytes):
            raise InputError(f"{called} gives {type(data).__name__} where bytes are needed: open it in binary mode.")
        return _read_stream(io.BytesIO(data), called, max_pixels)
    try:
        with open(source, "rb") as stream:
            seekable = stream if stream.seekable() else io.BytesIO(stream.read())
            return _read_stream(seekable, str(source), max_pixels)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character inside the path
        raise InputError(why_unreadable(source, error)) from error


def pixels_from(
    image: str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Takes an image in any of the usual forms and gives its pixels.

    Args:
        image: whatever `read_image` reads, a Pillow image (its current frame), or a uint8 array (NumPy or JAX) of shape
            `[height, width]` or `[height, width, 1]` (grey), `[height, width, 3]` (RGB), or `[height, width, 4]` (RGBA,
            laid over white).
        max_pixels: the most pixels that are accepted.

    Returns:
        The pixels; an RGB array comes back as it is, not copied.

    Raises:
        InputError: as from `read_image`, or an array of another type or shape.
    """
    if isinstance(image, Image.Image):
        _check_size(image, "The Pillow image", max_pixels)
        return _decode(image, "The Pillow image")
    if not hasattr(image, "__array__"):
        if not (isinstance(image, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(image, "read")):
            raise InputError(
                f"{type(image).__name__} is no image: give a path, bytes, a Pillow image or a uint8 array."
            )
        return read_image(image, max_pixels)
    array = np.asarray(image)
    if array.dtype != np.uint8:
        way = "scale to 0 to 255, round and convert it" if array.dtype.kind == "f" else "convert it"
        raise InputError(f"An image array must be uint8, 0 to 255, and this one is {array.dtype}: {way} first.")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] > 4
        way = "move the channels last" if first else "pass one image at a time"
        raise InputError(
            f"An image array must have shape [height, width] or [height, width, 1, 3 or 4], and this one has "
            f"{list(np.shape(image))}: {way}."
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise InputError(_too_large("The image array", array.shape[1], array.shape[0], max_pixels))
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return array if array.shape[2] == 3 else _to_pixels(Image.fromarray(np.ascontiguousarray(array)))


def write_image(path: str | os.PathLike, pixels: np.ndarray, force: bool = False) -> None:
    """Writes pixels as an image file, completely or not at all.

    Args:
        path: the file. Its suffix chooses the format: .png, .webp, .tif, .bmp, .ppm without loss, .jpg and .avif at
            quality 95 without chroma subsampling; no suffix means PNG.
        pixels: a uint8 array in a form that `pixels_from` takes.
        force: replace an existing file.

    Raises:
        InputError: an unknown suffix, unusable pixels, or an image too large for the format.
        OutputError: the file exists and `force` is false, or it cannot be written.
    """
    check_suffix(path)
    check_output(path, force)
    write_file(path, encode_image(pixels, Path(path).suffix, str(path)), force)


def check_suffix(path: str | os.PathLike) -> None:
    """Refuses a path whose suffix `write_image` does not know, so that long work can fail before it starts.

    Args:
        path: the file to be written.

    Raises:
        InputError: an unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        known = ", ".join(sorted(filter(None, _WRITERS)))
        raise InputError(f"{path} has the suffix {suffix}, in which no image can be written: use one of {known}.")


def encode_image(pixels: np.ndarray, suffix: str, called: str = "The image") -> bytes:
    """Gives the bytes of an image file.

    Args:
        pixels: a uint8 array in a form that `pixels_from` takes.
        suffix: chooses the format as in `write_image`.
        called: what an error calls the image.

    Returns:
        The file.

    Raises:
        InputError: unusable pixels, or an image too large for the format.
    """
    pixels = pixels_from(pixels, max_pixels=1 << 31)
    kind, options = _WRITERS[suffix.lower()]
    buffer = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    except Exception as error:  # each of Pillow's writers has its own way to say that a size is beyond it
        height, width = pixels.shape[:2]
        raise InputError(
            f"{called}: Pillow cannot write {width}x{height} pixels as {kind} ({describe(error)}): use .png."
        ) from error
    return buffer.getvalue()


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Lists the photos in a folder and the folders inside it.

    Args:
        folder: the folder. Names that begin with a dot, and links to folders, are passed over.

    Returns:
        The paths of all files with a suffix of `PHOTO_SUFFIXES`, in the order of their names, the same on any system.

    Raises:
        InputError: the folder is missing, is none, cannot be read, or holds no photo.
    """

    def refuse(error: OSError):
        raise InputError(f"The folder {error.filename} cannot be read ({describe(error)}): check its permissions.")

    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {state}: name a folder with photos.")
    found = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        photos = (name for name in names if Path(name).suffix.lower() in PHOTO_SUFFIXES and not name.startswith("."))
        found.extend(Path(here, name) for name in photos)
    if not found:
        raise InputError(f"{folder} holds no photo: files with {', '.join(sorted(PHOTO_SUFFIXES))} are looked for.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _read_stream(stream: BinaryIO, called: str, max_pixels: int) -> Pixels:
    if not stream.read(1):
        raise InputError(f"{called} is empty: get a fresh copy of it.")
    stream.seek(0)
    try:
        with _PILLOW_LIMIT:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(stream)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError as error:
        raise InputError(f"{called} is no image that Pillow can read: give a PNG, JPEG, WebP or similar.") from error
    except Exception as error:  # Pillow's readers meet damage with errors of a dozen types
        raise InputError(_unreadable(called, error)) from error
    with image:
        _check_size(image, called, max_pixels)
        return _decode(image, called)


def _decode(image: Image.Image, called: str) -> Pixels:
    """Decodes an opened image; any way in which Pillow stumbles over its contents is an InputError."""
    try:
        image.load()
        return _to_pixels(_upright(image))
    except InputError as error:
        raise InputError(f"{called} {error}") from error
    except Image.DecompressionBombError as error:  # the few readers that check Pillow's own limit once more
        raise InputError(
            f"{called} has too many pixels for Pillow: scale it or raise Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # as above, and MemoryError
        raise InputError(_unreadable(called, error)) from error


def _check_size(image: Image.Image, called: str, max_pixels: int) -> None:
    if 0 in image.size:
        raise InputError(f"{called} has {image.width}x{image.height} pixels: nothing is there to compress.")
    if image.width * image.height > max_pixels:
        raise InputError(_too_large(called, image.width, image.height, max_pixels))


def _too_large(called: str, width: int, height: int, max_pixels: int) -> str:
    return (
        f"{called} has {width}x{height} pixels, over the limit of {max_pixels}: scale or cut it, or raise max_pixels "
        "if you trust it."
    )


def _unreadable(called: str, error: Exception) -> str:
    return f"{called} is a damaged or incomplete image ({describe(error)}): get a fresh copy of it."


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata should not cost the photo
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_pixels(image: Image.Image) -> Pixels:
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode == "La":
        image = image.convert("LA")  # the one mode that Pillow cannot convert in one step
    grey = image.mode in ("1", "L", "LA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if profile:
        image = _to_srgb(image, profile, grey)
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return np.array(image)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 bits, or floats, to uint8 `[height, width]`."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not 0 <= low <= high <= 255:  # also false for NaN
            raise InputError(f"holds floats from {low:g} to {high:g}: scale them to 0 to 1, or 0 to 255.")
        return np.round(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if not 0 <= low <= high <= 65535:
        raise InputError(f"holds integers from {low} to {high}: scale them to 16 bits, 0 to 65535, or to 8 bits.")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes, grey: bool) -> Image.Image:
    """Converts from an embedded colour profile to sRGB, or gives the image back if the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (source.profile.profile_description or "").lower():
            return image  # a conversion would only add rounding errors
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
            return image
        return ImageCms.profileToProfile(
            image.convert("RGB").convert(mode) if mode != "CMYK" else image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,  # as browsers do
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except Exception:  # broken profiles are common, and viewers ignore them too
        return image
