"""Features out of `.jsem` files, for the commands that use them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsem.commands import console, paths
from jaxsem.commands.console import Failures
from jaxsem.commands.weights import Finder
from jaxsem.container import unpack
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.files import read_bytes
from jaxsem.systems.feature_codec import FeatureCodec, features_of


@dataclass(frozen=True, eq=False)
class Named:
    """The features of one file.

    Attributes:
      names: What to call each: the file, or its items where it is an archive.
      codec: The codec of features that made them.
      features: float32 [n, width], unit.
    """

    names: list[str]
    codec: FeatureCodec
    features: np.ndarray


def read_all(files: Sequence[str], finder: Finder, failures: Failures) -> Iterator[Named]:
    """The features of `.jsem` files, archives, folders of them, or standard input; a bad file does not stop the others."""
    for source in paths.find_sources(files, paths.list_jsem):
        try:
            file = unpack(console.read_bytes() if source.path is None else read_bytes(source.path))
            codec = finder.codec_for(file)
            if not isinstance(codec, FeatureCodec):
                raise FormatError(
                    f"it holds an image made with {codec.name}, no feature: compress with --preset pqvae-mini"
                )
            features = features_of(codec, file.items)
        except (FormatError, InputError, WeightsError) as error:
            failures.add(source, error)
            continue
        single = file.kind == "single"
        names = [str(source) if single else f"{source} ({item.name or k + 1})" for k, item in enumerate(file.items)]
        yield Named(names, codec, features)


def read_labels(text: str | None, path: str | None) -> list[str]:
    """Labels given as "red star,blue ring" or as a file with one on each line.

    Raises:
      InputError: Neither or both are given, the file cannot be read or is no text, or there is no label.
    """
    if (text is None) == (path is None):
        raise InputError("name the classes, with --labels 'red star,blue ring' or with --labels-file FILE")
    if path is None:
        labels, seen = text.split(","), repr(text)
    else:
        try:
            labels, seen = read_bytes(Path(path)).decode().splitlines(), path
        except UnicodeDecodeError:
            raise InputError(f"{path} is no text in UTF-8: write one label on each line") from None
    labels = [label.strip() for label in labels if label.strip()]
    if not labels:
        raise InputError(f"there is no label in {seen}: name at least one")
    return labels
