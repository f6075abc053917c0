"""Which codec a command uses: the one that is named, or the shipped one that a file's digest tells."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from jaxsem.codec import Codec
from jaxsem.codecs import build_module
from jaxsem.errors import WeightsError
from jaxsem.pipeline import check_weights
from jaxsem.preset_records import FEATURES, LANGUAGE, NECK, REFERRING
from jaxsem.presets import ASSETS, PRESETS, load
from jaxsem.systems import feature_files, neck_codec
from jaxsem.systems.feature_codec import FeatureCodec
from jaxsem.weights.native import WeightsFile, identity, read_weights


class HasDigest(Protocol):
    """A single file or an archive."""

    digest: bytes


def open_codec(
    preset: str | None,
    weights: str | None,
    default: str,
    quality: float | None = None,
    arithmetic: str | None = None,
    clip: str | None = None,
    diffusion: str | None = None,
) -> Codec | FeatureCodec:
    """The codec that `--preset`, `--weights`, `--clip` and `--diffusion` name; weights alone are a codec of their own."""
    if preset is None and weights is not None:
        return load(weights, quality, arithmetic=arithmetic, clip=clip, diffusion=diffusion)
    return load(preset or default, quality, weights, arithmetic, clip, diffusion)


@lru_cache(maxsize=1)
def shipped_digests() -> dict[str, bytes]:
    """The digest of every preset whose weights are shipped, by name; nothing is put on a device for it."""
    digests = {}
    for preset in PRESETS.values():
        if preset.weights is not None and preset.system != LANGUAGE:
            file = read_weights(Path(ASSETS, preset.weights))
            digests[preset.name] = digest_of(file)
    return digests


def digest_of(file: WeightsFile) -> bytes:
    """The digest of the codec in a weights file; nothing is put on a device for it."""
    if file.system == FEATURES:
        return feature_files.digest_of(file)
    if file.system == REFERRING:
        from jaxsem.systems import rsic_files  # not before it is needed: it knows half of the library

        return rsic_files.digest_of_file(file)
    if file.system == NECK:
        file = neck_codec.split_file("a preset", file)[0]
    config = asdict(build_module(file.system, file.config).config)
    return identity(config, file.params, file.tables.digest(), file.grids)


def preset_of(digest: bytes) -> str | None:
    """The shipped preset with this digest, or beginning of one."""
    return next((name for name, full in shipped_digests().items() if full.startswith(digest)), None)


class Finder:
    """Finds the codec of each file and loads it once.

    Args:
      preset: Use this one and no other.
      weights: Likewise; see `open_codec`.
      clip: Likewise.
      diffusion: Likewise.
    """

    def __init__(self, preset: str | None, weights: str | None, clip: str | None = None, diffusion: str | None = None):
        named = preset is not None or weights is not None
        self._named = open_codec(preset, weights, "", clip=clip, diffusion=diffusion) if named else None
        self._loaded: dict[bytes, Codec | FeatureCodec] = {}

    def codec_for(self, file: HasDigest) -> Codec | FeatureCodec:
        """The codec that a file or archive was made with.

        Raises:
          WeightsError: It is not the named one, or none of the shipped ones.
        """
        if self._named is not None:
            check_weights(self._named, file)
            return self._named
        if file.digest not in self._loaded:
            name = preset_of(file.digest)
            if name is None:
                shipped = ", ".join(shipped_digests()) or "none is shipped"
                raise WeightsError(
                    f"the file was made with weights {file.digest.hex()}, which no shipped preset has ({shipped}): "
                    "name them with --preset or --weights"
                )
            self._loaded[file.digest] = load(name)
        return self._loaded[file.digest]
