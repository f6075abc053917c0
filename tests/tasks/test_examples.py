import dataclasses
from collections import Counter

import numpy as np
import pytest

from jaxsem.data.questions import MARKS, question_words, questions_of
from jaxsem.data.scenes import CLASSES, UNSEEN_CLASSES, SceneConfig, render, sample_scene
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError
from jaxsem.tasks import (
    FORMS,
    LLAVA,
    PLAIN,
    SHIKRA,
    Example,
    Picture,
    episodes,
    few_shot_examples,
    few_shot_scenes,
    prompt_of,
    scene_examples,
    transmit,
)

PICTURE = Picture("a", b"12345", (2, 4))


@pytest.fixture(scope="module")
def examples():
    return [*scene_examples("test", range(12), size=32), *few_shot_scenes("test", 12, size=32, pool=400)]


# -- examples ----------------------------------------------------------------------------------------------------------


def test_all_forms_are_reached(examples):
    assert {example.form for example in examples} == set(FORMS)


def test_scene_examples_are_the_questions_about_the_picture():
    config = SceneConfig("unseen", aspect=2.0)
    found = scene_examples("test", [5], config, (32, 64), seed=3)
    scene = sample_scene("test", 5, config)
    questions = questions_of(scene, 3, classes=UNSEEN_CLASSES, size=(32, 64))
    assert [(e.form, e.text, e.options, e.box) for e in found] == [
        (q.kind, q.text, q.options, q.box) for q in questions
    ]
    np.testing.assert_array_equal(found[0].picture.value, render(scene, (32, 64)))
    assert found[0].picture.size == (32, 64)


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"form": "riddle"}, "riddle"),
        ({"form": "caption"}, "references"),
        ({"form": "caption", "references": ("a star", "...")}, "each with words"),
        ({"form": "options", "text": "?", "options": ("a",), "answer": "a"}, "2 to 26"),
        ({"form": "options", "text": "?", "options": ("a", "a"), "answer": "a"}, "different"),
        ({"form": "options", "text": "?", "options": ("a", " "), "answer": "a"}, "different"),
        ({"form": "options", "text": "?", "options": ("a", "b"), "answer": "A"}, "none of the options"),
        ({"form": "options", "text": " ", "options": ("a", "b"), "answer": "a"}, "needs a text"),
        ({"form": "yes_no", "text": "?", "answer": "Yes"}, "'yes' or 'no'"),
        ({"form": "box", "text": "it"}, "four numbers"),
        ({"form": "box", "text": "it", "box": (0, 0, 2, 1)}, "from 0 to 1"),
        ({"form": "few_shot", "answer": "a", "support": ((PICTURE, "a"),)}, "two labels"),
        ({"form": "few_shot", "answer": "c", "support": ((PICTURE, "a"), (PICTURE, "b"))}, "none of the labels"),
    ],
)
def test_what_is_no_example_is_refused(fields, seen):
    with pytest.raises(InputError, match=seen):
        Example(picture=PICTURE, **fields)


# -- few-shot ----------------------------------------------------------------------------------------------------------


def test_an_episode_asks_for_a_new_item_of_one_of_its_labels():
    labels = [f"label {number % 9}" for number in range(60)]
    for episode in episodes(labels, 300, ways=5, shots=2, seed=1):
        shown = Counter(labels[item] for item in episode.support)
        assert set(shown.values()) == {2}
        assert len(shown) == 5
        assert len(set(episode.support)) == 10
        assert episode.query not in episode.support
        assert labels[episode.query] in shown


def test_the_right_label_stands_anywhere_in_the_support():
    labels = [str(number % 7) for number in range(70)]
    drawn = episodes(labels, 2000)
    places = Counter([labels[item] for item in episode.support].index(labels[episode.query]) for episode in drawn)
    assert all(abs(places[place] - 400) < 4 * 18 for place in range(5)), places  # sqrt(2000 * 0.2 * 0.8) is 18
    assert len({labels[episode.query] for episode in drawn}) == 7


def test_labels_with_too_few_items_are_left_out():
    labels = ["rare", *(str(number % 5) for number in range(20))]
    assert all("rare" not in {labels[item] for item in episode.support} for episode in episodes(labels, 50))
    with pytest.raises(InputError, match="5 of 6 labels"):
        episodes(labels, 1, ways=6)


def test_few_shot_scenes_show_one_object_of_the_label():
    config = SceneConfig("unseen", objects=(1, 1))
    for example in few_shot_scenes("valid", 8, config, 32, pool=300):
        assert example.answer in UNSEEN_CLASSES
        for picture, label in (*example.support, (example.picture, example.answer)):
            scene = sample_scene("valid", int(picture.name.rpartition("/")[2]), config)
            assert scene.objects[0].name == label in CLASSES
            np.testing.assert_array_equal(picture.value, render(scene, 32))


def test_scenes_of_several_objects_have_no_label():
    with pytest.raises(InputError, match="objects"):
        few_shot_scenes("valid", 8, SceneConfig())


def test_labels_must_be_as_many_as_pictures():
    with pytest.raises(InputError, match="1 labels for 2 pictures"):
        few_shot_examples([PICTURE, PICTURE], ["a"], 1)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_llava():
    asked = Example("options", PICTURE, "What is {it}?", "b {text}", ("a", "b {text}"))
    assert prompt_of(LLAVA, asked) == (
        "What is {it}?\nA. a\nB. b {text}\nAnswer with the option's letter from the given choices directly."
    )
    assert prompt_of(LLAVA, asked, ranked=True) == ("What is {it}?\nAnswer the question using a single word or phrase.")
    box = Example("box", PICTURE, "the star", box=(0, 0, 1, 1))
    assert (
        prompt_of(LLAVA, box) == "Provide the bounding box coordinate of the region this sentence describes: the star"
    )
    assert prompt_of(SHIKRA, box).endswith("find and tell me the coordinates of the star?")


def test_few_shot_prompts_mark_every_picture(examples):
    for example in examples:
        if example.form == "few_shot":
            for prompts in (LLAVA, PLAIN):
                prompt = prompt_of(prompts, example)
                assert prompt.count("<image>") == len(example.pictures) == 6
                places = [prompt.index(label) for _, label in example.support]
                assert places == sorted(places)


@pytest.mark.parametrize("ranked", [True, False])
def test_plain_prompts_are_in_the_words_of_questions(examples, ranked):
    tokenizer = WordTokenizer(question_words(), MARKS)
    tokenizer(prompt_of(PLAIN, example, ranked=ranked).replace("<image>", "") for example in examples)


# -- sending -----------------------------------------------------------------------------------------------------------


def test_each_picture_is_sent_once(examples):
    calls = []

    def compress(images):
        calls.append(len(images))
        return [image.tobytes()[:7] for image in images]

    sent = transmit(examples, compress)
    names = {picture.name for example in examples for picture in example.pictures}
    assert calls == [len(names)]
    for before, after in zip(examples, sent, strict=True):
        assert dataclasses.replace(after, picture=before.picture, support=before.support).__dict__ == before.__dict__
        for one, other in zip(before.pictures, after.pictures, strict=True):
            assert (other.name, other.size, other.sent_bits) == (one.name, one.size, 56)
            assert other.value == one.value.tobytes()[:7]


def test_a_reconstruction_has_the_bits_of_its_file(examples):
    sent = transmit(examples, lambda images: [b"123"] * len(images), lambda files: [f"seen {len(f)}" for f in files])
    assert {(picture.value, picture.sent_bits) for example in sent for picture in example.pictures} == {("seen 3", 24)}


def test_a_codec_must_give_a_file_for_each_picture(examples):
    with pytest.raises(InputError, match="`compress` made 1 things"):
        transmit(examples, lambda images: [b""])


def test_two_pictures_of_one_name_are_refused():
    other = Picture("a", b"54321", (2, 4))
    both = [Example("yes_no", picture, "?", "yes") for picture in (PICTURE, other)]
    with pytest.raises(InputError, match="'a'"):
        transmit(both, list)


def test_examples_of_one_scene_may_be_made_apart():
    apart = [*scene_examples("test", [1], size=32, kinds=("box",)), *scene_examples("test", [1], size=32)]
    assert len(transmit(apart, lambda images: [b"x"] * len(images))) == len(apart)


def test_bits_are_those_of_what_is_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1234567")
    values = (b"1234", path, str(path), np.zeros((2, 4, 3), np.uint8))
    assert [Picture("a", value, (2, 4)).sent_bits for value in values] == [32, 56, 56, 192]
    assert Picture("a", path, (2, 4), bits=3).sent_bits == 3
    for value in (object(), tmp_path / "b"):
        with pytest.raises(InputError):
            _ = Picture("a", value, (2, 4)).sent_bits
