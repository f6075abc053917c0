"""Captions of scenes checked against what is in them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.data.scenes import WORDS, captions, refer, sample_scene
from jaxsem.errors import InputError
from jaxsem.metrics.attributes import read_caption, score_attributes

MEASURES = {
    "pair_precision",
    "pair_recall",
    "pair_f1",
    "no_false_object",
    "size_accuracy",
    "count_accuracy",
    "relation_accuracy",
}
SAID_BY = {  # by which of the five captions of a scene
    "size_accuracy": {3, 4},
    "count_accuracy": {0, 1, 3, 4},
    "relation_accuracy": {2, 4},
}


@pytest.fixture(scope="module")
def many():
    return [sample_scene("valid", index) for index in range(300)]


@pytest.fixture(scope="module")
def scene():
    """Two small red stars left and right, and a large blue ring behind the right one."""
    thing = sample_scene("train", 0).objects[0]
    made = dataclasses.replace
    left = made(thing, shape="star", colour="red", size="small", x=0.2, y=0.5, radius=0.1)
    ring = made(thing, shape="ring", colour="blue", size="large", x=0.7, y=0.6, radius=0.2)
    right = made(left, x=0.8)
    return made(sample_scene("train", 0), objects=(left, ring, right), aspect=1.0)


def score(scene, caption, **options):
    return score_attributes([caption], [scene], **options)


# -- true captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(5))
def test_true_captions_are_right_in_all_they_say(many, kind):
    found = score_attributes([captions(scene)[kind] for scene in many], many)
    said = {name for name in MEASURES if kind in SAID_BY.get(name, range(5))}
    assert set(found) == said
    if kind in (0, 2):  # these speak of one or two objects only
        assert 0.3 < found.pop("pair_recall") < 0.9
        assert 0.5 < found.pop("pair_f1") < 0.95
    assert found == dict.fromkeys(found, 1.0)


def test_the_five_captions_together_are_right_and_complete(many):
    assert score_attributes([". ".join(captions(scene)) for scene in many], many) == dict.fromkeys(MEASURES, 1.0)


def test_captions_of_another_scene_are_wrong(many):
    texts = [". ".join(captions(scene)) for scene in many]
    found = score_attributes(texts[1:] + texts[:1], many)
    assert set(found) == MEASURES
    assert max(found.values()) < 0.1, found


def test_referring_phrases_are_true(many):
    said = [(phrase.text, scene) for scene in many[:100] for phrases in refer(scene) for phrase in phrases]
    found = score_attributes([text for text, _ in said], [scene for _, scene in said])
    for name in ("pair_precision", "no_false_object", "size_accuracy", "relation_accuracy"):
        assert found[name] == 1.0, name
    superlatives = [(text, scene) for text, scene in said if "most " in text or "est " in text]
    assert len(superlatives) > 20
    for text, scene in superlatives:
        assert len(read_caption(text).mentions[0].fits(scene)) == 1, text


def test_two_attributes_exchanged_are_noticed(many):
    for scene in many:
        text = captions(scene)[3]
        first, second = scene.objects[0], scene.objects[-1]
        swapped = text.replace(first.colour, "?").replace(second.colour, first.colour).replace("?", second.colour)
        shapes = {thing.shape for thing in scene.objects}
        if first.colour != second.colour and len(shapes) == len(scene.objects):
            found = score(scene, swapped)
            assert found["pair_precision"] < 1, swapped
            assert found["no_false_object"] == 0


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_pairs_by_hand(scene):
    # Named: red star (there), green cross (not), "star" alone is no pair. In the scene: red star, blue ring.
    found = score(scene, "a red star and a green cross; the star is bright")
    assert found == {"pair_precision": 1 / 2, "pair_recall": 1 / 2, "pair_f1": 1 / 2, "no_false_object": 0.0}
    # Named: 1 of 1; in the scene: 1 of 2; together 2 of 3.
    found = score(scene, "a red star")
    assert found == {"pair_precision": 1, "pair_recall": 1 / 2, "pair_f1": 2 / 3, "no_false_object": 1}


def test_pairs_of_several_captions_are_counted_together(scene):
    found = score_attributes(["a red star", "a blue ring, a pink heart", "nothing"], [scene] * 3)
    # 2 of 3 named; 2 of 6 in the scenes; one of the two captions that name something is without fault.
    assert found == {"pair_precision": 2 / 3, "pair_recall": 2 / 6, "pair_f1": 4 / 9, "no_false_object": 1 / 2}


@pytest.mark.parametrize(
    ("caption", "accuracy"),
    [
        ("two red stars", 1),
        ("2 small stars", 1),
        ("three objects", 1),
        ("three red stars", 0),
        ("one red star", 0),
        ("two large red stars", 0),
        ("one blue ring and two blue rings", 1 / 2),
    ],
)
def test_counts(scene, caption, accuracy):
    assert score(scene, caption)["count_accuracy"] == accuracy


def test_an_article_is_no_count(scene):
    assert "count_accuracy" not in score(scene, "a red star to the left of another red star")


@pytest.mark.parametrize(("caption", "accuracy"), [("a large ring", 1), ("a small ring", 0), ("a small object", 1)])
def test_sizes(scene, caption, accuracy):
    assert score(scene, caption)["size_accuracy"] == accuracy


@pytest.mark.parametrize(
    ("caption", "accuracy"),
    [
        ("a red star to the left of a blue ring", 1),
        ("the blue ring is to the right of a star", 1),
        ("The ring is behind the rightmost red star.", 1),
        ("the ring is behind the leftmost red star", 0),
        ("a red star in front of the ring", 1),
        ("a red star to the left of another red star", 1),
        ("a blue ring to the left of another blue ring", 0),
        ("a blue ring above a red star", 0),
        ("a red star to the left of a green cross", 0),
        ("a large ring to the right of a small, red star; a ring in front of a star", 1 / 2),
    ],
)
def test_relations(scene, caption, accuracy):
    assert score(scene, caption)["relation_accuracy"] == accuracy


def test_a_relation_may_hold_loosely(scene):
    # The ring is 0.1 lower than the stars, but much farther to the side.
    text = "a blue ring below a red star"
    assert score(scene, text)["relation_accuracy"] == 0
    assert score(scene, text, strict=False)["relation_accuracy"] == 1


@pytest.mark.parametrize("caption", ["a red star. to the left of a ring", "a red star and a ring", "above a ring"])
def test_what_is_no_claim_is_not_judged(scene, caption):
    assert "relation_accuracy" not in score(scene, caption)


def test_plurals_capitals_and_commas_do_not_matter():
    plain = read_caption("two crosses and a large red circle above a ring")
    assert read_caption("Two Crosses, and a LARGE, red circle, above a ring!") == plain
    assert [mention.description.shape for mention in plain.mentions] == ["cross", "circle", "ring"]
    assert len(plain.claims) == 1


def test_words_that_only_contain_a_shape_name_nothing():
    assert read_caption("a stared ringing crossing on a red background with 3 hearty") == read_caption("")


# -- properties --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([*WORDS, ";", "9", "0"]), max_size=15).map(" ".join), min_size=1, max_size=4))
def test_any_words_give_shares_and_their_order_does_not_matter(texts):
    scenes = [sample_scene("test", index) for index in range(len(texts))]
    found = score_attributes(texts, scenes)
    assert {"pair_recall", "pair_f1"} <= set(found) <= MEASURES
    assert all(0 <= value <= 1 for value in found.values())
    assert score_attributes(texts[::-1], scenes[::-1]) == pytest.approx(found)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_read(text):
    reading = read_caption(text)
    assert len(reading.claims) <= max(0, len(reading.mentions) - 1)


def test_long_numbers_are_not_counts():
    assert read_caption("9" * 5000 + " stars").mentions[0].count is None


@pytest.mark.parametrize(
    ("texts", "scenes", "message"),
    [
        ([], 0, "0 captions cannot be compared with 0 scenes"),
        (["a star"], 2, "1 captions cannot be compared with 2 scenes: give one for each"),
        ("a star", 1, "captions are a list of texts, one for each scene, but this is the one text 'a star'"),
    ],
)
def test_what_cannot_be_compared_is_refused(texts, scenes, message):
    with pytest.raises(InputError, match=message):
        score_attributes(texts, [sample_scene("test", index) for index in range(scenes)])
