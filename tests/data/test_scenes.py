import dataclasses
import hashlib
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxsem.data import scenes
from jaxsem.data.scenes import SceneConfig, captions, label_map, refer, render, sample_scene
from jaxsem.data.scenes.shapes import signed_distance
from jaxsem.data.sources import Source, open_source
from jaxsem.errors import InputError

# All bytes of these pictures and texts. They may change only together with the version of the builder, as models are
# trained and measured on them.
GOLDEN = {
    ("train", 0, "seen", 128): "647f70a79bbb6ea787f295c872987cb56aa27bd16c4b4574bacb9299ab7251bf",
    ("train", 9_999_999, "all", (96, 160)): "1024cba8389594b6d0788a2d49b48273526d428aa38fc3729215ef9206e71ca1",
    ("valid", 1, "all", 64): "a0a7292f34695863aff35de04078071ae70f1f04ca0775c60f87f0c3747baf1b",
    ("test", 2, "unseen", 128): "df5091f6f11d4be105ef2ea39aa11bf7fe2a96cca20b64ed12306ed1601f297a",
    ("test", 3, "all", 33): "93ee81cb7527519123e54c010808fbdbcd1757f9b2ff1536d328f4208ab262b6",
}


@pytest.fixture(scope="module")
def many():
    """300 scenes of the training split."""
    return [sample_scene("train", index) for index in range(300)]


def _digest(split, index, config, size):
    record = scenes.scene_record(split, index, config, size)
    digest = hashlib.sha256()
    for field in scenes.FIELDS:
        value = record[field]
        digest.update(value.tobytes() if value.dtype.kind != "U" else "\n".join(value.ravel().tolist()).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("key", list(GOLDEN))
def test_scenes_never_change(key):
    split, index, classes, size = key
    assert _digest(split, index, SceneConfig(classes), size) == GOLDEN[key]


def test_a_batch_does_not_depend_on_who_draws_it():
    indices = [5, 3, 40_000, *range(100, 120)]
    with ThreadPoolExecutor(2) as pool:
        pooled = scenes.batch("train", indices, size=32, pool=pool)
    alone = [scenes.scene_record("train", index, size=32) for index in indices]
    assert list(pooled) == list(scenes.FIELDS)
    for field, values in pooled.items():
        assert values.shape[0] == len(indices)
        for value, record in zip(values, alone):
            np.testing.assert_array_equal(value, record[field])


def test_splits_share_no_scene():
    owners = {split: set() for split in scenes.SPLITS}
    pictures = Counter()
    for split in scenes.SPLITS:
        for index in range(150):
            scene = sample_scene(split, index)
            pictures[render(scene, 32).tobytes()] += 1
            for thing in scene.objects:
                assert (thing.x * 1024).is_integer()
                owners[split].add(int(thing.x * 1024) % 8)
    assert owners == {"train": {2, 3, 4, 5, 6, 7}, "valid": {1}, "test": {0}}
    assert set(pictures.values()) == {1}


def test_another_seed_is_another_world():
    assert sample_scene("test", 0, SceneConfig(seed=1)) != sample_scene("test", 0)


def test_unseen_classes_hold_out_two_of_every_colour_and_shape():
    pairs = [name.split() for name in scenes.UNSEEN_CLASSES]
    assert len(scenes.CLASSES) == len(set(scenes.CLASSES)) == 64
    assert set(scenes.SEEN_CLASSES) | set(scenes.UNSEEN_CLASSES) == set(scenes.CLASSES)
    assert len(scenes.SEEN_CLASSES) == 48
    assert Counter(colour for colour, _ in pairs) == dict.fromkeys(scenes.COLOURS, 2)
    assert Counter(shape for _, shape in pairs) == dict.fromkeys(scenes.SHAPES, 2)


@pytest.mark.parametrize("classes", ["seen", "unseen", ("green cross", "pink ring")])
def test_only_the_wanted_classes_numbers_and_sizes_occur(classes):
    config = SceneConfig(classes, objects=(2, 3), sizes=("small", "large"))
    drawn = [sample_scene("valid", index, config) for index in range(200)]
    assert {thing.name for scene in drawn for thing in scene.objects} == set(config.class_names)
    assert {len(scene.objects) for scene in drawn} == {2, 3}
    assert {thing.size for scene in drawn for thing in scene.objects} == {"small", "large"}


def test_everything_occurs(many):
    things = [thing for scene in many for thing in scene.objects]
    assert {len(scene.objects) for scene in many} == {1, 2, 3, 4}
    assert {thing.name for thing in things} == set(scenes.CLASSES)
    assert {thing.size for thing in things} == set(scenes.SIZES)
    assert {scene.background.pattern for scene in many} == set(scenes.PATTERNS)
    assert {scene.background.colour for scene in many} == set(scenes.BACKGROUND_COLOURS)


def test_colours_stand_out_from_the_background(many):
    for scene in many:
        for tone in scene.background.tones:
            for thing in scene.objects:
                assert np.linalg.norm(np.subtract(thing.rgb, tone)) > 60, (thing, scene.background)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_fill_the_unit_circle_and_have_slope_one_at_the_edge(shape):
    axis = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    distance = signed_distance(shape, x, y)
    inside = distance < 0
    assert np.hypot(x, y)[inside].max() <= 1.0
    assert 0.25 < inside.mean() * 2.4**2 / np.pi < 0.8
    down, across = np.gradient(distance, axis, axis)
    slope = np.hypot(down, across)[np.abs(distance) < 0.02]
    assert np.mean(np.abs(slope - 1) < 0.02) > 0.85


def _full_masks(scene, size=128):
    """Each object's shape as if nothing were before it."""
    alone = [dataclasses.replace(scene, objects=(thing,)) for thing in scene.objects]
    return [label_map(one, size) == 1 for one in alone]


def test_masks_boxes_and_visibility_agree(many):
    for index, scene in enumerate(many[:150]):
        record = scenes.scene_record("train", index)
        full = _full_masks(scene)
        expected = np.zeros((128, 128), np.uint8)
        for number, mask in enumerate(full, 1):
            expected[mask] = number
        np.testing.assert_array_equal(record["masks"], expected)
        np.testing.assert_array_equal(label_map(scene), expected)
        count = len(scene.objects)
        assert record["depth"].tolist() == [*range(count - 1, -1, -1), *[-1] * (4 - count)]
        names = [scenes.CLASSES[number] for number in record["classes"][:count]]
        assert names == [thing.name for thing in scene.objects]
        assert set(record["classes"][count:]) <= {-1}
        visible = scenes.occlusion(scene).visible
        for k, mask in enumerate(full):
            seen = record["masks"] == k + 1
            assert seen.sum() >= 0.38 * mask.sum()
            assert abs(seen.sum() / mask.sum() - visible[k]) < 0.08
            left, top, right, bottom = record["boxes"][k]
            assert seen[top:bottom, left:right].sum() == seen.sum()
            assert seen[top].any()
            assert seen[bottom - 1].any()
            assert seen[:, left].any()
            assert seen[:, right - 1].any()
        np.testing.assert_array_equal(record["boxes"][count:], 0)


def test_pixels_of_a_mask_have_the_colour_of_their_object(many):
    for scene in many[:100]:
        image, labels = render(scene).astype(float), label_map(scene)
        for number, thing in enumerate(scene.objects, 1):
            mean = image[labels == number].mean(axis=0)
            # Shading and rim darken evenly, so the direction in RGB stays.
            cosine = mean @ thing.rgb / np.linalg.norm(mean) / np.linalg.norm(thing.rgb)
            assert cosine > 0.97, (thing, mean)


def test_edges_are_smooth():
    scene = sample_scene("train", 0, SceneConfig(("red circle",), objects=(1, 1)))
    plain = dataclasses.replace(scene.background, pattern="plain", tones=((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)))
    thing = dataclasses.replace(scene.objects[0], rgb=(200.0, 0.0, 0.0), outline=0.0)
    red = render(dataclasses.replace(scene, background=plain, objects=(thing,)))[..., 0]
    edge = (red > 10) & (red < 100)
    assert 0.3 < edge.sum() / (2 * np.pi * 0.88 * thing.radius * 128) < 1.5


@pytest.mark.parametrize("size", [16, 100, (64, 96), (200, 128)])
def test_any_size_shows_the_same_scene(size):
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(8):
        scene = sample_scene("test", index)
        image, large = render(scene, size), render(scene, (4 * height, 4 * width)).astype(float)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        assert label_map(scene, size).shape == (height, width)
        reduced = large.reshape(height, 4, width, 4, 3).mean(axis=(1, 3))
        assert np.abs(image - reduced).mean() < 4.5


def test_a_wider_picture_shows_more_background_around_the_same_square():
    scene = sample_scene("test", 3)
    wide = render(scene, (128, 192)).astype(int)
    assert np.abs(wide[:, 32:160] - render(scene, 128)).mean() < 0.5


@pytest.mark.parametrize("aspect", [0.5, 1.6])
def test_objects_use_all_of_a_wide_or_high_picture(aspect):
    config = SceneConfig(aspect=aspect)
    height, width = (64, round(64 * aspect)) if aspect > 1 else (round(64 / aspect), 64)
    share = [sample_scene("train", index, config) for index in range(60)]
    assert all(scene.aspect == aspect for scene in share)
    labels = np.stack([label_map(scene, (height, width)) for scene in share])
    covered = (labels > 0).any(axis=0)
    assert covered[:, : width // 4].any()
    assert covered[:, -width // 4 :].any()
    assert covered[: height // 4].any()
    assert covered[-height // 4 :].any()


# An evaluator of texts that knows nothing of how they are made: words to conditions, conditions to objects.

_PHRASE = re.compile(
    r"the (?:(?P<superlative>\w+most|largest|smallest) )?(?P<kind>[a-z ]+?)"
    r"(?: (?P<relation>to the left of|to the right of|above|below|in front of|behind) the (?P<anchor>[a-z ]+))?"
)
_MORE = {
    "leftmost": lambda thing: -thing.x,
    "rightmost": lambda thing: thing.x,
    "topmost": lambda thing: -thing.y,
    "bottommost": lambda thing: thing.y,
    "largest": lambda thing: thing.radius,
    "smallest": lambda thing: -thing.radius,
}


def _of_kind(scene, words):
    words = set(words.split()) - {"object"}
    return [k for k, thing in enumerate(scene.objects) if words <= {thing.size, thing.colour, thing.shape}]


def _holds(scene, masks, relation, first, second, clearly):
    a, b = scene.objects[first], scene.objects[second]
    if relation == "behind":
        return _holds(scene, masks, "in front of", second, first, clearly)
    if relation == "in front of":
        return first > second and (masks[first] & masks[second]).sum() > (0.03 * masks[second].sum() if clearly else 0)
    gap = {
        "to the left of": b.x - a.x,
        "to the right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[relation]
    return gap > (0.09 if clearly else 0.03)


def _true_of(scene, masks, text):
    """Objects of which a phrase is clearly true, and of which it might be called true."""
    match = _PHRASE.fullmatch(text)
    assert match, text
    fits = _of_kind(scene, match["kind"])
    if match["superlative"]:
        value = _MORE[match["superlative"]]
        assert len(fits) > 1, f"nothing to compare: {text}"
        best = max(value(scene.objects[k]) for k in fits)
        near = [k for k in fits if value(scene.objects[k]) > best - 0.015]
        return (near if len(near) == 1 else []), near
    if match["relation"]:
        anchors = _of_kind(scene, match["anchor"])
        assert len(anchors) == 1, text
        others = [k for k in fits if k != anchors[0]]
        sure, possible = (
            [k for k in others if _holds(scene, masks, match["relation"], k, anchors[0], clearly)]
            for clearly in (True, False)
        )
        return sure, possible
    return fits, fits


def test_every_phrase_is_true_of_its_object_alone(many):
    kinds = Counter()
    for scene in many:
        masks = _full_masks(scene, 96)
        for index, phrases in enumerate(refer(scene)):
            assert len(phrases) == scenes.PHRASES
            for phrase in phrases:
                assert _true_of(scene, masks, phrase.text) == ([index], [index]), (phrase.text, index, scene.objects)
                kinds["superlative" if phrase.superlative else phrase.relation or "plain"] += 1
    assert min(kinds[name] for name in ("plain", "superlative", "left", "right", "above", "below")) > 20
    assert min(kinds["front"], kinds["behind"]) > 5


def test_the_first_phrase_uses_the_fewest_attributes_that_suffice(many):
    words = Counter()
    for scene in many:
        for thing, phrases in zip(scene.objects, refer(scene)):
            kinds = (thing.shape, f"{thing.colour} {thing.shape}", f"{thing.size} {thing.shape}")
            enough = [kind for kind in (*kinds, f"{thing.size} {thing.name}") if len(_of_kind(scene, kind)) == 1]
            assert phrases[0].text == f"the {enough[0]}" if enough else phrases[0].superlative or phrases[0].relation
            words[len(enough[0].split()) if enough else "compared"] += 1
    assert set(words) == {1, 2, 3, "compared"}


def _listed(words):
    """Counts of what a listing names: "two red stars and a blue ring"."""
    counts = Counter()
    for part in re.split(r", | and ", words):
        number, *rest = part.split()
        name = " ".join(rest)
        if number == "two":
            name = re.sub("(?<=cross)es$|s$", "", name)
        counts[name] += {"a": 1, "an": 1, "two": 2}[number]
    return counts


def test_captions_say_what_is_there_and_nothing_else(many):
    relations = Counter()
    for scene in many:
        masks = _full_masks(scene, 96)
        texts = [re.sub("^(a picture of|an image of|there is|there are) ", "", text) for text in captions(scene)]
        names = Counter(thing.name for thing in scene.objects)
        ((main, count),) = _listed(texts[0]).items()
        assert names[main] == count
        assert _listed(texts[1]) == names
        sized = Counter(f"{thing.size} {thing.name}" for thing in scene.objects)
        where = f"{scene.background.colour} {scene.background.pattern} background"
        for text in (texts[3], texts[4].split("; ")[0]):
            listing, on, background = text.rpartition(" on ")
            assert on
            assert background in (f"a {where}", f"an {where}")
            assert _listed(listing) == sized
        match = re.fullmatch(
            r"an? (.+?) (to the left of|to the right of|above|below|in front of|behind) (?:an?|another) (.+)", texts[2]
        )
        if match:
            pairs = [(a, b) for a in _of_kind(scene, match[1]) for b in _of_kind(scene, match[3]) if a != b]
            assert any(_holds(scene, masks, match[2], a, b, clearly=True) for a, b in pairs), texts[2]
            relations[match[2]] += 1
        statement = re.fullmatch("the (.+) is (.+ of|above|below|behind) the (.+)", texts[4].split("; ")[1])
        if statement:
            (first,), (second,) = _of_kind(scene, statement[1]), _of_kind(scene, statement[3])
            assert _holds(scene, masks, statement[2], first, second, clearly=True), texts[4]
    assert len(relations) == 6
    assert relations.total() > 150


def test_a_place_in_a_caption_is_where_the_object_is(many):
    single = [scene for scene in many if len(scene.objects) == 1]
    assert len(single) > 30
    for scene in single:
        (thing,), place = scene.objects, captions(scene)[4].split("; it is ")[1]
        assert ("left" in place, "right" in place) == (thing.x < 1 / 3, thing.x >= 2 / 3), place
        assert ("top" in place, "bottom" in place) == (thing.y < 1 / 3, thing.y >= 2 / 3), place


def test_all_words_are_listed(many):
    texts = [text for scene in many for text in captions(scene)]
    texts += [phrase.text for scene in many for phrases in refer(scene) for phrase in phrases]
    used = {word for text in texts for word in re.findall(r"[^ ,;]+", text)}
    assert used == set(scenes.WORDS)


def test_source_draws_what_its_string_asks_for():
    source = open_source("scenes/48x64/unseen/objects=1-2:test[10:20]")
    assert isinstance(source, Source)
    assert len(source) == 10
    record = source[3]
    assert {field: (value.shape, value.dtype.kind) for field, value in record.items()} == {
        "image": ((48, 64, 3), "u"),
        "masks": ((48, 64), "u"),
        "boxes": ((2, 4), "i"),
        "classes": ((2,), "i"),
        "depth": ((2,), "i"),
        "captions": ((5,), "U"),
        "phrases": ((2, 3), "U"),
    }
    config = SceneConfig("unseen", (1, 2), aspect=64 / 48)
    expected = scenes.scene_record("test", 13, config, (48, 64))
    copy = pickle.loads(pickle.dumps(source))[3]  # as worker processes get it
    for field in scenes.FIELDS:
        np.testing.assert_array_equal(record[field], expected[field])
        np.testing.assert_array_equal(copy[field], expected[field])
    assert len(open_source("scenes:valid")) == 10_000
    assert len(list(open_source("scenes/16:train[:3]"))) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:tset", r"no split 'tset': use train, valid, test"),
        ("scenes:", "names no scenes"),
        ("scenes:test[5]", "names no scenes"),
        ("scenes:test[:20000]", r"test\[0:20000\] is no range of its 10000 scenes"),
        ("scenes:test[7:7]", "is no range"),
        ("scenes/15:test", "15x15 pixels cannot be drawn: each side must be 16 to 4096"),
        ("scenes/new:test", "no option 'new': give a size"),
        ("scenes/16x128:test", "aspect=8.0 is not between"),
        ("scenes/objects=5:test", r"objects=\(5, 5\) is no range of 1 to 4"),
        ("scens:test", r"no data source 'scens' \(did you mean 'scenes'\?\)"),
    ],
)
def test_source_mistakes_are_one_sentence(spec, message):
    with pytest.raises(InputError, match=message) as raised:
        open_source(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_scene("dev", 0), "no split 'dev'"),
        (lambda: sample_scene("test", 10_000), "no scene 10000: its scenes are 0 to 9999"),
        (lambda: sample_scene("test", -1), "no scene -1"),
        (lambda: SceneConfig("sene"), "no class set 'sene': use all, seen, unseen"),
        (lambda: SceneConfig(("red dog",)), "no class 'red dog'"),
        (lambda: SceneConfig(()), "no class is given"),
        (lambda: SceneConfig(sizes=("huge",)), "no size 'huge': known are small, medium, large"),
        (lambda: SceneConfig(("red star",), objects=(1, 3)), "make no scene of 3 objects"),
        (lambda: SceneConfig(objects=(0, 2)), "is no range"),
        (lambda: SceneConfig(seed=-1), "seed=-1"),
        (lambda: render(sample_scene("test", 0), 8), "8x8 pixels cannot be drawn"),
        (lambda: scenes.batch("test", []), "a batch of no scenes"),
        (lambda: scenes.scene_record("test", 0, fields=("picture",)), "have no 'picture'"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_tfds_builder_writes_what_is_drawn(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    from jaxsem.data.scenes.builder import Scenes, ScenesBuilderConfig

    settings = {"scenes": SceneConfig("unseen", aspect=1.25), "size": (64, 80), "counts": {"train": 3, "test": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = Scenes(
            config=ScenesBuilderConfig(name="few", **settings), data_dir=tmp_path, file_format="array_record"
        )
        builder.download_and_prepare()
        written = tfds.builder_from_directory(builder.data_dir)
    assert {split: info.num_examples for split, info in written.info.splits.items()} == settings["counts"]
    drawn = {scenes.scene_record("test", k, settings["scenes"], (64, 80))["image"].tobytes(): k for k in range(4)}
    for example in written.as_data_source("test"):
        index = drawn.pop(example["image"].tobytes())  # TFDS shuffles what it writes
        record = scenes.scene_record("test", index, settings["scenes"], (64, 80))
        objects = sample_scene("test", index, settings["scenes"]).objects
        np.testing.assert_array_equal(example["mask"][..., 0], record["masks"])
        assert [text.decode() for text in example["captions"]] == record["captions"].tolist()
        things = example["objects"]
        count = len(objects)
        assert [scenes.CLASSES[number] for number in things["class"]] == [thing.name for thing in objects]
        assert [scenes.SHAPES[number] for number in things["shape"]] == [thing.shape for thing in objects]
        assert [scenes.COLOURS[number] for number in things["colour"]] == [thing.colour for thing in objects]
        assert [scenes.SIZES[number] for number in things["size"]] == [thing.size for thing in objects]
        assert [int(depth) for depth in things["depth"]] == list(range(count))[::-1]
        assert [text.decode() for text in things["phrase"]] == record["phrases"][:count, 0].tolist()
        pixels = np.array(things["bbox"]) * (64, 80, 64, 80)
        np.testing.assert_allclose(pixels[:, [1, 0, 3, 2]], record["boxes"][:count], atol=1e-4)
    assert not drawn
    assert len(open_source("tfds:scenes/few/train", data_dir=tmp_path)) == 3


def test_scenes_need_neither_tfds_nor_tensorflow():
    program = (
        "import sys, jaxsem.data.scenes as scenes; scenes.scene_record('test', 0); "
        "print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.split() == ["False", "False"]
