"""Every answer is derived again from the objects, by rules written here and not taken from what makes the questions."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from jaxsem.data.boxes import iou, read_box
from jaxsem.data.questions import CATEGORIES, KINDS, MARKS, NEGATIVES, question_words, questions_of
from jaxsem.data.scenes import (
    BACKGROUND_COLOURS,
    CLASSES,
    COLOURS,
    PATTERNS,
    SEEN_CLASSES,
    SHAPES,
    SIZES,
    UNSEEN_CLASSES,
    SceneConfig,
    captions,
    label_map,
    sample_scene,
)
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError

CONFIGS = {
    "all": SceneConfig(),
    "seen": SceneConfig("seen"),
    "unseen": SceneConfig("unseen"),
    "one": SceneConfig(objects=(1, 1)),
    "four": SceneConfig(objects=(4, 4)),
    "wide": SceneConfig(aspect=2.0),
    "high": SceneConfig(aspect=0.5, sizes=("small",)),
    "two classes": SceneConfig(("green cross", "pink ring"), objects=(2, 3)),
}
NUMBERS = ["zero", "one", "two", "three", "four"]
RELATIONS = {
    "to the left of": lambda a, b: (b.x - a.x, abs(b.y - a.y)),
    "to the right of": lambda a, b: (a.x - b.x, abs(b.y - a.y)),
    "above": lambda a, b: (b.y - a.y, abs(b.x - a.x)),
    "below": lambda a, b: (a.y - b.y, abs(b.x - a.x)),
}
WORDS_OF_RELATIONS = (*RELATIONS, "in front of", "behind")
SINGULAR = {"objects": "object", "crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}
EXTREMES = {
    "leftmost": lambda thing: thing.x,
    "rightmost": lambda thing: -thing.x,
    "topmost": lambda thing: thing.y,
    "bottommost": lambda thing: -thing.y,
    "largest": lambda thing: -SIZES.index(thing.size),
    "smallest": lambda thing: SIZES.index(thing.size),
}


def asked(config, count=60, kinds=KINDS, seed=0):
    """Scenes and their questions."""
    for index in range(count):
        scene = sample_scene("valid", index, config)
        for question in questions_of(scene, seed, kinds, classes=config.class_names):
            yield scene, question


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def pairs(config):
    return list(asked(config))


# -- what words say of a scene -----------------------------------------------------------------------------------------


def meant(scene, phrase):
    """The objects that "the leftmost small red star" may mean."""
    words = phrase.removeprefix("the ").split()
    found = [
        thing
        for thing in scene.objects
        if all(word in (thing.size, thing.colour, thing.shape, "object") for word in words if word not in EXTREMES)
    ]
    for word in words:
        if word in EXTREMES:
            least = min(map(EXTREMES[word], found))
            found = [thing for thing in found if EXTREMES[word](thing) == least]
    return found


def related(scene, words, first, second, strict):
    if words in RELATIONS:
        along, across = RELATIONS[words](first, second)
        return along >= 0.1 and along >= across if strict else along > 0.02
    if words == "behind":
        first, second = second, first
    order = [id(thing) for thing in scene.objects]
    if order.index(id(first)) < order.index(id(second)):
        return False
    if not strict:
        return np.hypot(first.x - second.x, first.y - second.y) < first.radius + second.radius
    masks = [label_map(dataclasses.replace(scene, objects=(thing,)), 256) > 0 for thing in (first, second)]
    return (masks[0] & masks[1]).sum() > 0.03 * masks[1].sum()


def place_words(scene, thing):
    height, width = scene.extent
    row, column = int(3 * thing.y / height), int(3 * thing.x / width)
    return [
        ["at the top left", "at the top", "at the top right"],
        ["on the left", "in the centre", "on the right"],
        ["at the bottom left", "at the bottom", "at the bottom right"],
    ][row][column]


def true_options(scene, text, options, strict):
    """Which options are true: `strict` asks which are clearly so, else which someone might accept."""
    if match := re.fullmatch(r"What (colour|shape) is (the .+)\?", text):
        if match[2] == "the background":
            return [option for option in options if option == scene.background.colour]
        return [o for o in options if o in {getattr(thing, match[1]) for thing in meant(scene, match[2])}]
    if text == "What pattern is the background?":
        return [option for option in options if option == scene.background.pattern]
    if match := re.fullmatch(r"How many (.+) are there in the image\?", text):
        words = [SINGULAR.get(word, word) for word in match[1].split()]
        return [NUMBERS[len(meant(scene, " ".join(words)))]]
    if match := re.fullmatch(r"In which part of the image is (the .+)\?", text):
        return [o for o in options if o in {place_words(scene, thing) for thing in meant(scene, match[1])}]
    if match := re.fullmatch(r"What is (the \w+ object) in the image\?", text):
        right = meant(scene, match[1])
    else:
        relation, anchor = re.fullmatch(rf"What is ({'|'.join(WORDS_OF_RELATIONS)}) (the .+)\?", text).groups()
        [second] = meant(scene, anchor)
        right = [one for one in scene.objects if one is not second and related(scene, relation, one, second, strict)]
    names = {thing.name for thing in right}
    return [option for option in options if re.sub("^an? ", "", option) in names]


# -- the answers are right ---------------------------------------------------------------------------------------------


def test_the_answer_is_clearly_true_and_no_other_option_might_be(pairs):
    for scene, question in pairs:
        if question.kind == "options":
            said = (scene, question.text, question.options)
            assert question.answer in true_options(*said, strict=True), said
            assert true_options(*said, strict=False) == [question.answer], said
            assert len(set(question.options)) == 4


def test_places_are_clear_and_no_two_options_are_neighbours(pairs):
    for scene, question in pairs:
        if question.category == "place":
            [thing] = meant(scene, re.fullmatch(r".* is (the .+)\?", question.text)[1])
            height, width = scene.extent
            lines = [(thing.x, width / 3), (thing.x, width / 1.5), (thing.y, height / 3), (thing.y, height / 1.5)]
            assert min(abs(centre - line) for centre, line in lines) >= 0.03
            corners = [len(re.findall("left|right|top|bottom", option)) in (0, 2) for option in question.options]
            assert len(set(corners)) == 1


def test_yes_is_what_is_there_and_no_is_what_is_not(pairs):
    for scene, question in pairs:
        if question.kind == "yes_no":
            name = re.fullmatch(r"Is there an? (.+) in the image\?", question.text)[1]
            assert question.answer == ("yes" if meant(scene, name) else "no"), question


def test_what_is_not_there_was_chosen_as_its_category_says(pairs, config):
    for scene, question in pairs:
        if question.kind == "yes_no" and question.answer == "no":
            name = re.fullmatch(r"Is there an? (.+) in the image\?", question.text)[1]
            if question.category == "popular":
                assert name in SHAPES or name.removesuffix(" object") in COLOURS
            else:
                assert name in config.class_names
            if question.category == "adversarial":
                colour, shape = name.split()
                assert meant(scene, colour)
                assert meant(scene, shape)


def test_half_of_the_yes_no_questions_of_a_category_are_yes(pairs):
    counts = Counter((question.category, question.answer) for _, question in pairs if question.kind == "yes_no")
    for category in NEGATIVES:
        assert counts[category, "yes"] == counts[category, "no"]


def test_a_box_is_around_the_only_object_that_its_phrase_is_true_of(pairs):
    for scene, question in pairs:
        if question.kind == "box":
            height, width = (round(128 * side) for side in scene.extent)
            labels = label_map(scene, (height, width))
            number = _labelled(labels, question.box)
            first, _, rest = question.text.partition(" " + _relation_in(question.text) + " ")
            might = meant(scene, first)
            if rest:
                [anchor] = meant(scene, rest)
                relation = _relation_in(question.text)
                might = [t for t in might if t is not anchor and related(scene, relation, t, anchor, strict=False)]
            assert [thing is scene.objects[number] for thing in might] == [True], question
            rows, columns = np.nonzero(labels == number + 1)
            box = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
            assert question.box == pytest.approx(box)
            assert iou(read_box(question.answer), question.box) > 0.75


def _relation_in(text):
    return next((words for words in WORDS_OF_RELATIONS if f" {words} " in text), "\0")


def _labelled(labels, box):
    """The object whose visible part touches all four sides of a box."""
    height, width = labels.shape
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    inside = labels[top:bottom, left:right]
    sides = [set(inside[0]), set(inside[-1]), set(inside[:, 0]), set(inside[:, -1])]
    [number] = [n for n in set.intersection(*sides) - {0} if (labels == n).sum() == (inside == n).sum()]
    return number - 1


def test_captions_have_the_references_of_the_scene(pairs):
    for scene, question in pairs:
        if question.kind == "caption":
            assert question.references == captions(scene)
            assert question.answer == question.references[3]


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_every_kind_and_category_is_reached():
    found = {(question.kind, question.category) for _, question in asked(SceneConfig(), 100)}
    assert found == {
        ("caption", ""),
        *(("options", category) for category in CATEGORIES),
        *(("yes_no", category) for category in NEGATIVES),
        *(("box", category) for category in ("attributes", "superlative", "relation")),
    }


def test_words_of_all_attributes_are_answers():
    answers = {question.answer for _, question in asked(SceneConfig(), 600, ("options",))}
    assert answers.issuperset({*COLOURS, *SHAPES, *PATTERNS, *BACKGROUND_COLOURS, *NUMBERS})


def test_the_true_option_stands_anywhere():
    places = [question.options.index(question.answer) for _, question in asked(SceneConfig(), 400, ("options",))]
    counts = np.bincount(places, minlength=4)
    assert (abs(counts - len(places) / 4) < 4 * np.sqrt(len(places) * 3 / 16)).all(), counts  # four standard deviations


@pytest.mark.parametrize("classes", ["all", "unseen"])
def test_the_options_alone_do_not_give_the_answer_away(classes):
    """Who takes the option that has most words in common with the others is right by chance only."""
    hits = []
    for _, question in asked(SceneConfig(classes), 400, ("options",)):
        if question.category in ("size", "extreme", "relation", "overlap"):
            words = [set(option.split()) - {"a", "an"} for option in question.options]
            common = [sum(len(one & other) for other in words) for one in words]
            best = [option for option, value in zip(question.options, common) if value == max(common)]
            hits.append((question.answer in best) / len(best))
    assert len(hits) > 500
    assert np.mean(hits) == pytest.approx(0.25, abs=0.04)


def test_questions_are_a_function_of_scene_and_seed():
    scenes = [sample_scene("test", index) for index in range(20)]
    assert [questions_of(scene) for scene in scenes] == [questions_of(scene) for scene in scenes]
    assert [questions_of(scene, 1) for scene in scenes] != [questions_of(scene, 2) for scene in scenes]


def test_what_a_kind_asks_does_not_depend_on_the_others():
    for index in range(20):
        scene = sample_scene("test", index)
        assert questions_of(scene) == tuple(q for kind in KINDS for q in questions_of(scene, kinds=(kind,)))


@pytest.mark.parametrize(("classes", "known"), [("seen", SEEN_CLASSES), ("unseen", UNSEEN_CLASSES)])
def test_only_the_given_classes_are_named_as_absent(classes, known):
    for _, question in asked(SceneConfig(classes), 150, ("options", "yes_no")):
        for text in (question.text, *question.options):
            for name in CLASSES:
                assert name in known or not re.search(rf"\ban? {name}\b", text), question


def test_boxes_follow_the_size_of_the_picture():
    scene = sample_scene("test", 3)
    [small], [wide] = ([q for q in questions_of(scene, kinds=("box",), size=size)][:1] for size in (128, (128, 256)))
    assert wide.text == small.text
    assert wide.box == pytest.approx((0.25 + small.box[0] / 2, small.box[1], 0.25 + small.box[2] / 2, small.box[3]))


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"kinds": ("box", "boxes")}, "boxes"),
        ({"kinds": "box"}, "box"),
        ({"kinds": ()}, "kinds"),
        ({"seed": -1}, "-1"),
        ({"classes": ("red dog",)}, "red dog"),
        ({"classes": ()}, "classes"),
        ({"size": 3}, "3x3"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, seen):
    with pytest.raises(InputError, match=seen):
        questions_of(sample_scene("test", 0), **arguments)


# -- the words ---------------------------------------------------------------------------------------------------------


def test_a_word_tokenizer_holds_all_texts_of_2000_scenes():
    tokenizer = WordTokenizer(question_words(), MARKS)
    texts, answers = set(), set()
    for index in range(2000):
        for question in questions_of(sample_scene("train", index)):
            texts.update((question.text, *question.options, *question.references))
            answers.add(question.answer)
    tokenizer(texts)
    for answer, ids in zip(answers, tokenizer(answers)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == answer


def test_no_word_is_there_twice():
    pieces = WordTokenizer(question_words(), MARKS).pieces
    assert len(pieces) == len(set(pieces)) < 250
