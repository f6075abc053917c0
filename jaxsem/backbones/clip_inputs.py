"""What CLIP takes: images of its size, normalised, and texts as token ids.

Both run on the host. Images need Pillow only; the tokenizer is that of transformers (`pip install transformers`).
"""

import gzip
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.files import read_bytes

MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
STD = np.float32([0.26862954, 0.26130258, 0.27577711])

START, END = "<|startoftext|>", "<|endoftext|>"
_LARGEST = 1 << 24  # bytes of a list of merges; the published one has 3 million
_MERGES = 49152 - 256 - 2  # of the published vocabulary: CLIP's file holds more than it uses
# Beyond this ratio of the sides, only what the crop keeps is resized: a line of pixels would else grow to gigabytes.
_WIDEST = 32


def preprocess(images: Iterable[Any], size: int = 224) -> Float[np.ndarray, "b size size 3"]:
    """Images as CLIP takes them: shorter side to `size` (bicubic), centre crop, normalised.

    The same as transformers' `CLIPImageProcessorPil`; OpenAI's code differs by a pixel in the crop where the margin is odd.

    Args:
      images: Whatever `jaxsem.data.images.pixels_from` takes, uint8 arrays [h, w, 3] above all, of any sizes.
      size: Side in pixels that the model wants.

    Returns:
      float32, channels last.

    Raises:
      InputError: No image, or something that is none.
    """
    crops = [square_crop(pixels_from(image), size) for image in images]
    if not crops:
        raise InputError("there is no image to preprocess: give at least one")
    return normalize(np.stack(crops).astype(np.float32) * np.float32(1 / 255))


def normalize(images: Any) -> Any:
    """Images [..., 3] with values 0 to 1, NumPy or JAX, less CLIP's mean and divided by its standard deviation."""
    return (images - MEAN) / STD


def square_crop(pixels: np.ndarray, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The centre square of an image, uint8 [h, w] or [h, w, 3], with the shorter side resized to `size`."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    # The longer side is cut, not rounded, as transformers and torchvision do.
    new_height, new_width = size * height // short, size * width // short
    top, left = (new_height - size) // 2, (new_width - size) // 2
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(new_height, new_width) > _WIDEST * size:
        rows, columns = height / new_height, width / new_width
        box = (left * columns, top * rows, (left + size) * columns, (top + size) * rows)
        return np.asarray(image.resize((size, size), resample, box=box))
    resized = np.asarray(image.resize((new_width, new_height), resample))
    return resized[top : top + size, left : left + size]


# -- texts ------------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | os.PathLike) -> Any:
    """CLIP's tokenizer, a `transformers.CLIPTokenizer`.

    It lowers the text and joins white space; other than OpenAI's it mends no broken Unicode and no HTML entities.

    Args:
      source: OpenAI's merges (`bpe_simple_vocab_16e6.txt.gz`, or unpacked), or a folder or Hugging Face id with a tokenizer.

    Raises:
      InputError: transformers is not installed, or nothing usable is there.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise InputError("CLIP's tokenizer needs transformers: pip install transformers") from error
    if Path(source).is_file():
        vocabulary, merges = _vocabulary(source)
        return CLIPTokenizer(vocab=vocabulary, merges=merges)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(os.fspath(source))
    except Exception as error:  # transformers raises many kinds, with paragraphs
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
        raise InputError(
            f"{source} holds no tokenizer of CLIP ({reason}): give its folder or the merges file"
        ) from error
    # Without its files transformers builds an empty tokenizer and says nothing.
    if len(tokenizer) < 256:
        raise InputError(f"{source} holds no tokenizer of CLIP: it needs tokenizer.json, or vocab.json and merges.txt")
    return tokenizer


def tokenize(tokenizer: Any, texts: str | Sequence[str], length: int = 77) -> Int[np.ndarray, "b length"]:
    """Texts as token ids: the start of text, the text, the end of text, and the tokenizer's padding.

    The padding is the end of text again in the published tokenizers of transformers, and 0 in OpenAI's and open_clip's code;
    a text's feature does not depend on it.

    Args:
      tokenizer: Of `load_tokenizer`.
      texts: One text or several.
      length: Of every row; the context of the model at most.

    Returns:
      int32 ids.

    Raises:
      InputError: A text is empty or too long; says which and by how much.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i + 1} of {len(texts)} is a {type(text).__name__}: give strings")
        if not text.strip():
            raise InputError(f"text {i + 1} of {len(texts)} is empty: write at least one word")
    if not texts:
        raise InputError("there is no text to tokenize: give at least one")
    rows = tokenizer(texts)["input_ids"]
    for text, row in zip(texts, rows):
        if len(row) > length:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise InputError(
                f'the text "{shown}" has {len(row)} tokens, start and end included, and {length} fit: shorten it'
            )
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids


def _vocabulary(path: str | os.PathLike) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges from OpenAI's file: the bytes, the bytes that end a word, the merges, start and end of text."""
    data = read_bytes(path)
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_LARGEST)
        text = data.decode()
        merges = [tuple(line.split()) for line in text.splitlines()[1 : _MERGES + 1]]
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is no list of BPE merges ({error}): give bpe_simple_vocab_16e6.txt.gz") from error
    if not merges or any(len(pair) != 2 for pair in merges):
        raise InputError(f"{path} is no list of BPE merges, two tokens a line: give bpe_simple_vocab_16e6.txt.gz")
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return {word: i for i, word in enumerate(words)}, merges


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE, in the order of the vocabulary.

    Printable bytes of Latin-1 stand for themselves and come first; the others are the letters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
