"""From a source to batches on the device: shuffled, cropped and counted, always the same from the same seed.

    batches = training_batches(open_source("photos/train"), batch_size=16, size=256, seed=0)
    with DevicePrefetch(batches, batch_sharding(mesh)) as feed:
        for batch, position in feed: ...

Batch *i* is a function of (source, seed, i) alone. It does not depend on threads, worker processes or the number of
hosts, which divide each batch among them; a position in the data is therefore just a count of batches.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxsem.data.photos import random_crop
from jaxsem.data.sources import Source
from jaxsem.errors import InputError


def training_batches(
    source: Source,
    batch_size: int,
    size: int,
    *,
    seed: int = 0,
    flip: bool = True,
    min_scale: float = 1.0,
    threads: int = 4,
    workers: int = 0,
) -> "Batches":
    """Makes the endless stream of random crops that training reads, each epoch in a new order.

    Args:
        source: Where the images come from.
        batch_size: Images in a batch over all processes; each process gets its share.
        size: Side of the square crops in pixels.
        seed: Decides order, crops and flips.
        flip: Whether to mirror half of the images.
        min_scale: The smallest scale of the random reduction before the crop; 1 for none.
        threads: Batches that are read at the same time.
        workers: Processes that read; 0 reads in this one, which is enough unless decoding holds up the device.

    Returns:
        Batches {"image": uint8 [b, size, size, 3]} with b = batch_size / processes.

    Raises:
        InputError: For values that make no batch.
    """
    import grain

    count = jax.process_count()
    if batch_size < 1 or batch_size % count:
        raise InputError(f"batch_size={batch_size} cannot be divided among {count} processes")
    if size < 1 or not 0 < min_scale <= 1 or threads < 1 or workers < 0:
        raise InputError(
            f"size={size} and threads={threads} must be at least 1, workers={workers} at least 0, "
            f"min_scale={min_scale} above 0 and at most 1"
        )
    # The crop comes before the records are divided among processes, so that its random numbers belong to the record.
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    records = records.random_map(_CropRecord(size, flip, min_scale))
    records = records[jax.process_index() :: count]
    return Batches(records.batch(batch_size // count, drop_remainder=True), threads, workers)


@dataclasses.dataclass(frozen=True)
class _CropRecord:
    """`random_crop` with its options, as a class so that worker processes can receive it."""

    size: int
    flip: bool
    min_scale: float

    def __call__(self, record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        # What else a source knows of its images, such as captions, is not for the device.
        return {"image": random_crop(record["image"], self.size, rng, flip=self.flip, min_scale=self.min_scale)}


class Batches:
    """An iterator over a `grain.MapDataset` of batches that can say where it is and go on from there.

    Args:
        dataset: Batches by index.
        threads: Batches that are read at the same time.
        workers: Processes that read, or 0.
    """

    def __init__(self, dataset: Any, threads: int = 4, workers: int = 0):
        self._dataset = dataset
        self._threads = threads
        self._workers = workers
        self._position = 0
        self._iterator: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position as JSON: how many batches were given."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`, whatever threads and workers were then."""
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Stops reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> Iterator:
        import grain

        ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        dataset = self._dataset[self._position :].to_iter_dataset(ahead)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(dataset)


class ArrayBatches:
    """Endless random rows of arrays that lie in memory or in a file; batch i is a function of (seed, i) alone.

    Args:
        arrays: By name, with one row for each example.
        batch_size: Rows of a batch, drawn anew each time without repetition within it.
        seed: Decides which.

    Raises:
        InputError: Arrays of unequal lengths, or shorter than a batch.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], batch_size: int, seed: int = 0):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or min(lengths.values()) < batch_size:
            raise InputError(f"batches of {batch_size} need arrays of one length of at least that, not {lengths}")
        self.arrays, self.batch_size, self.seed = dict(arrays), batch_size, seed
        self._length, self._position = min(lengths.values()), 0

    def __iter__(self) -> "ArrayBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, self._position])
        rows = np.sort(rng.choice(self._length, self.batch_size, replace=False, shuffle=False))
        self._position += 1
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}

    def get_state(self) -> dict[str, int]:
        """The position: how many batches were given."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position of `get_state`."""
        self._position = state["batches"]


class DevicePrefetch:
    """Puts the next batches on the device from a thread, while the device works on the present one.

    Gives (batch, position) pairs; the position is that of the iterator after this batch, not after those read ahead,
    so that it can be saved with the state that the batch leads to. Use it as a context manager, which ends the thread.

    Args:
        batches: An iterator over trees of NumPy arrays [b, ...], with `get_state()`; each process has its share.
        sharding: Where to put them: `batch_sharding(mesh)`, or None for the default device.
        depth: How many batches wait on the device.
    """

    def __init__(self, batches: Any, sharding: NamedSharding | None = None, depth: int = 2):
        self._batches = batches
        self._sharding = sharding
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="device-prefetch", daemon=True)

    def __enter__(self) -> "DevicePrefetch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            self._drain()  # the thread may be waiting for room
            self._thread.join(0.05)
        if hasattr(self._batches, "close"):
            self._batches.close()

    def __iter__(self) -> "DevicePrefetch":
        return self

    def __next__(self) -> tuple[Any, Any]:
        """The next batch and position.

        Raises:
            StopIteration: When the iterator ended. Whatever else it raised is raised here too.
        """
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        return item

    def _fill(self) -> None:
        try:
            while not self._closed.is_set():
                batch = next(self._batches)
                self._queue.put((self._put(batch), self._batches.get_state()))
        except BaseException as error:
            self._queue.put(error)

    def _put(self, batch: Any) -> Any:
        if self._sharding is None:
            return jax.device_put(batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), batch)

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return
