"""Readings of answers, and scores against values computed by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsem.metrics.captions import score_captions
from jaxsem.tasks.scores import (
    caption_scores,
    read_label,
    read_option,
    read_yes_no,
    says_yes_or_no,
    wilson,
    yes_no_scores,
)

OPTIONS = ("a red star", "a blue ring", "Paris", "12")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("A", 0),
        ("b", 1),
        (" (C) ", 2),
        ("D.", 3),
        ("B. a blue ring", 1),
        ("[b] because", 1),
        ("c) Paris", 2),
        ("The answer is B.", 1),
        ("Answer: D", 3),
        ("I think option (C), as it is the capital", 2),
        ("a red star", 0),
        ("A red star.", 0),
        ("paris", 2),
        ("12", 3),
        ("E", None),
        ("a", 0),
        ("a green star", None),
        ("The answer is a red one", None),
        ("A star and B", None),
        ("", None),
        ("?!", None),
        ("AB", None),
    ],
)
def test_options_are_read_from_letters_and_words(text, place):
    assert read_option(text, OPTIONS) == place


@given(st.text(max_size=40))
def test_any_text_is_read_as_an_option_or_none(text):
    assert read_option(text, OPTIONS) in (None, 0, 1, 2, 3)
    assert read_label(text, OPTIONS) in (None, 0, 1, 2, 3)
    assert read_yes_no(text) in ("yes", "no")


@pytest.mark.parametrize(
    ("text", "place"),
    [("dog", 0), ("This is a Hot-Dog!", 1), ("dogs", None), ("a dog or a cat", None), ("", None), ("cat, cat", 2)],
)
def test_labels_are_read_in_whole_words(text, place):
    assert read_label(text, ("dog", "hot dog", "cat")) == place


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("no,", "no"),
        ("There is not one", "no"),
        ("Yes. There is no cat", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_yes_and_no_are_read_as_in_pope(text, said):
    assert read_yes_no(text) == said


def test_an_answer_without_yes_and_no_is_unclear():
    assert [says_yes_or_no(text) for text in ("Yes!", "it is not", "maybe", "nope")] == [True, True, False, False]


def test_yes_no_scores_by_hand():
    said = [True, True, True, False, False, False, False, True]
    true = [True, True, False, True, False, False, True, False]
    # 2 true and 2 false positives, 2 true and 2 false negatives, with one more of each kind below
    assert yes_no_scores(said, true) == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "yes_share": 0.5,
    }
    found = yes_no_scores([True, True, True, False], [True, True, False, True])
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert (found["accuracy"], found["yes_share"]) == (0.5, 0.75)


def test_who_never_says_yes_has_no_precision():
    found = yes_no_scores([False, False], [True, False])
    assert found == {"accuracy": 0.5, "precision": None, "recall": 0.0, "f1": 0.0, "yes_share": 0.0}
    assert yes_no_scores([False], [False])["f1"] is None


def test_captions_have_the_existing_metrics():
    said = ["a red star", "two blue rings on a plate"]
    references = [["a star", "a red star"], ["two rings", "two blue rings on the table"]]
    full = score_captions(said, references)
    assert caption_scores(said, references) == {"cider_d": full["cider_d"], "bleu_4": full["bleu_4"]}


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (1, 3), (1000, 5000)])
def test_the_interval_holds_the_shares_at_which_the_score_test_would_not_refuse(right, count):
    for bound in wilson(right, count):
        if 0 < bound < 1:
            z = (right / count - bound) / math.sqrt(bound * (1 - bound) / count)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)
    assert wilson(right, count)[0] <= right / count <= wilson(right, count)[1]
