"""A folder of photos as records, and the random crops that training takes from them."""

import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxsem.data.images import list_images, read_image


class PhotoFolder:
    """The images below a folder, in the order of their names, each as `{"image": uint8 [h, w, 3]}`.

    Args:
        folder: Where the images lie.
        cache_bytes: How many bytes of decoded images to keep in memory; 0 decodes each time. Images are kept first
            come, first served, without eviction: with random access, an eviction would cost as much as it brings.

    Raises:
        InputError: If the folder has no photos; later, for a file that is no readable image.
    """

    def __init__(self, folder: str | Path, cache_bytes: int = 0):
        self.folder = Path(folder)
        self.paths = list_images(self.folder)
        self._room = cache_bytes
        self._cache: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = self._cache.get(index)
        if image is None:
            image = read_image(self.paths[index])
            with self._lock:
                if index not in self._cache and image.nbytes <= self._room:
                    self._cache[index] = image
                    self._room -= image.nbytes
        return {"image": image}

    def __getstate__(self) -> dict:
        """Leaves the lock and the cached images behind, so that worker processes start light."""
        held = sum(image.nbytes for image in self._cache.values())
        return {"folder": self.folder, "paths": self.paths, "_room": self._room + held}

    def __setstate__(self, state: dict) -> None:
        """Gives a worker process its own empty cache."""
        self.__dict__.update(state, _cache={}, _lock=threading.Lock())


def random_crop(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    rng: np.random.Generator,
    *,
    flip: bool = True,
    min_scale: float = 1.0,
) -> UInt8[np.ndarray, "size size 3"]:
    """Takes a random square out of an image, possibly scaled down and mirrored.

    An image smaller than the square is extended by reflection, not scaled up: enlarged pixels are smoother than those
    of photos, and a codec would learn from that.

    Args:
        image: uint8 [h, w, 3].
        size: Side of the result in pixels.
        rng: Where all random numbers come from; equal generators give equal crops.
        flip: Whether to mirror left and right, half of the time.
        min_scale: The scale is drawn uniformly from [min_scale, 1]: a window of size/scale pixels is reduced to the
            square (bicubic, anti-aliased). No image is scaled below the square. 1 never scales.

    Returns:
        uint8 [size, size, 3].
    """
    scale = rng.uniform(min_scale, 1.0) if min_scale < 1 else 1.0
    window = max(size, min(round(size / scale), *image.shape[:2]))
    missing = [max(0, window - side) for side in image.shape[:2]]
    if any(missing):
        image = np.pad(image, [(m // 2, m - m // 2) for m in missing] + [(0, 0)], mode="reflect")
    top, left = (int(rng.integers(side - window + 1)) for side in image.shape[:2])
    crop = image[top : top + window, left : left + window]
    if window != size:
        crop = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))
    if flip and rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)
