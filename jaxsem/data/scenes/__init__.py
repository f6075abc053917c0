"""`scenes`: a small world of coloured shapes, drawn from numbers, in which all mini models are trained and shown.

    scene = sample_scene("train", 7)               # what is where: a frozen record
    image = render(scene, 128)                     # uint8 [128, 128, 3], at any other size the same picture
    captions(scene), refer(scene)                  # what is true of it, and of each object alone
    records = batch("train", range(64), SceneConfig("seen"), size=128)

A scene holds one to four objects, of 8 shapes, 8 colours and 3 sizes, that may hide parts of each other, before a
background of 6 patterns and 6 colours. It is a pure function of (split, index, config): nothing is stored, any scene is
reached directly, and train, valid and test share none (see `layout`). 16 of the 64 classes of objects are held out for
zero-shot tests: train on `SceneConfig("seen")`.

`jaxsem.data.scenes.builder` holds the TFDS builder; it is imported only by those who want it.
"""

from jaxsem.data.scenes.captions import CAPTIONS, WORDS, captions
from jaxsem.data.scenes.layout import sample_scene
from jaxsem.data.scenes.phrases import PHRASES, Description, Phrase, refer
from jaxsem.data.scenes.records import FIELDS, ScenesSource, batch, open_scenes, scene_record
from jaxsem.data.scenes.render import Occlusion, boxes_of, label_map, occlusion, render
from jaxsem.data.scenes.world import (
    BACKGROUND_COLOURS,
    CLASS_SETS,
    CLASSES,
    COLOURS,
    MAX_OBJECTS,
    PATTERNS,
    SEEN_CLASSES,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_CLASSES,
    Background,
    Scene,
    SceneConfig,
    SceneObject,
)

__all__ = [
    "BACKGROUND_COLOURS",
    "CAPTIONS",
    "CLASSES",
    "CLASS_SETS",
    "COLOURS",
    "FIELDS",
    "MAX_OBJECTS",
    "PATTERNS",
    "PHRASES",
    "SEEN_CLASSES",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "UNSEEN_CLASSES",
    "WORDS",
    "Background",
    "Description",
    "Occlusion",
    "Phrase",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "ScenesSource",
    "batch",
    "boxes_of",
    "captions",
    "label_map",
    "occlusion",
    "open_scenes",
    "refer",
    "render",
    "sample_scene",
    "scene_record",
]
