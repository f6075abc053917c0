"""`scenes` as a TFDS data set on disk, for tools that want one; written and read without TensorFlow.

    from jaxsem.data.scenes.builder import Scenes

    builder = Scenes(data_dir=folder, file_format="array_record")       # or config="unseen", or a ScenesBuilderConfig
    builder.download_and_prepare()
    records = tfds.builder_from_directory(builder.data_dir).as_data_source("test")

Example i of a split is scene i of that split.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxsem.data.scenes.layout import sample_scene
from jaxsem.data.scenes.records import scene_record
from jaxsem.data.scenes.world import CLASSES, COLOURS, DEFAULT, SHAPES, SIZES, SceneConfig, check_size


@dataclasses.dataclass(kw_only=True)
class ScenesBuilderConfig(tfds.core.BuilderConfig):
    """What to write.

    Attributes:
        scenes: Which scenes are drawn.
        size: Height and width of the pictures.
        counts: How many scenes of each split.
    """

    scenes: SceneConfig = DEFAULT
    size: tuple[int, int] = (128, 128)
    counts: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 100_000, "valid": 1_000, "test": 1_000}
    )


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Pictures of coloured shapes with captions, masks, boxes, depth order and referring phrases.

    Features of an example, objects from back to front:

    * "image": uint8 [h, w, 3].
    * "mask": uint8 [h, w, 1], a label map of the visible parts: 0 for background, k + 1 for object k.
    * "captions": five texts from short to detailed.
    * "objects": a sequence of "bbox" (of the visible part, in TFDS' relative coordinates), the class labels "shape",
      "colour", "size" and "class" (colour and shape together), "depth" (0 for the nearest) and "phrase" (true of this
      object alone).
    """

    # TFDS looks for metadata beside the code; finding the code by itself, 4.9.10 needs a package it no longer installs.
    code_path = Path(__file__)
    pkg_dir_path = code_path.parent
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS declares it so)
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScenesBuilderConfig(name=name, scenes=SceneConfig(name), description=f"128x128, {name} classes")
        for name in ("all", "seen", "unseen")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        height, width = check_size(self.builder_config.size)
        features = tfds.features
        thing = {
            "bbox": features.BBoxFeature(),
            "shape": features.ClassLabel(names=SHAPES),
            "colour": features.ClassLabel(names=COLOURS),
            "size": features.ClassLabel(names=SIZES),
            "class": features.ClassLabel(names=CLASSES),
            "depth": features.Scalar(dtype=np.int32),
            "phrase": features.Text(),
        }
        return self.dataset_info_from_configs(
            description=__doc__,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(height, width, 3), encoding_format="png"),
                    "mask": features.Image(shape=(height, width, 1), encoding_format="png"),
                    "captions": features.Sequence(features.Text()),
                    "objects": features.Sequence(thing),
                }
            ),
        )

    def _split_generators(self, _) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, count) for split, count in self.builder_config.counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(count):
            record = scene_record(split, index, config.scenes, config.size)
            objects = sample_scene(split, index, config.scenes).objects
            height, width = record["masks"].shape
            yield (
                index,
                {
                    "image": _png(record["image"]),
                    "mask": _png(record["masks"]),
                    "captions": record["captions"].tolist(),
                    "objects": [
                        {
                            "bbox": tfds.features.BBox(top / height, left / width, bottom / height, right / width),
                            "shape": thing.shape,
                            "colour": thing.colour,
                            "size": thing.size,
                            "class": thing.name,
                            "depth": depth,
                            "phrase": phrases[0],
                        }
                        for thing, (left, top, right, bottom), depth, phrases in zip(
                            objects, record["boxes"].tolist(), record["depth"].tolist(), record["phrases"].tolist()
                        )
                    ],
                },
            )


def _png(image: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    stream.seek(0)
    return stream
