"""The harness with answerers that are perfect, random or constant."""

import json

import numpy as np
import pytest

from jaxsem import results
from jaxsem.data.boxes import format_box, to_square
from jaxsem.errors import InputError
from jaxsem.tasks import (
    LLAVA,
    PLAIN,
    Example,
    Picture,
    evaluate,
    few_shot_scenes,
    prompt_of,
    rate_score_points,
    scene_examples,
    transmit,
)


class Perfect:
    """Knows the answer to every prompt about every picture."""

    def __init__(self, examples, prompts=LLAVA):
        self.right = {
            (_key(_value(example)), prompt_of(prompts, example, ranked=ranked)): self.say(example, prompts)
            for example in examples
            for ranked in (False, True)
        }

    def say(self, example, prompts):
        if example.form == "caption":
            return example.references[0]
        if example.form == "options":
            return "ABCD"[example.options.index(example.answer)] + "."
        if example.form == "box":
            return format_box(to_square(example.box, example.picture.size) if prompts.square_boxes else example.box)
        return example.answer

    def answer(self, inputs, prompts):
        return [self.right[_key(value), prompt] for value, prompt in zip(inputs, prompts, strict=True)]


class Ranking(Perfect):
    """The same, by likelihoods."""

    def score(self, inputs, prompts, options):
        return [
            [0.0 if self.means(text, option, place) else -np.inf for place, option in enumerate(row)]
            for text, row in zip(self.answer(inputs, prompts), options, strict=True)
        ]

    @staticmethod
    def means(text, option, place):
        return text in (option, f"{'ABCDE'[place]}.")


class Random:
    """Says anything that has the form of an answer."""

    name = "random"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def answer(self, inputs, prompts):
        return [self.one(prompt) for prompt in prompts]

    def one(self, prompt):
        if "bounding box" in prompt:
            left, top = self.rng.uniform(0, 0.5, 2)
            return f"[{left:.2f}, {top:.2f}, {left + 0.4:.2f}, {top + 0.4:.2f}]"
        if "letter" in prompt:
            return self.rng.choice(list("ABCD"))
        if "one of:" in prompt:
            return self.rng.choice(prompt.partition("one of: ")[2].rstrip(".").split(", "))
        return self.rng.choice(["Yes", "No"])

    def score(self, inputs, prompts, options):
        return [self.rng.normal(size=len(row)) for row in options]


class Constant:
    def __init__(self, text):
        self.text = text

    def answer(self, inputs, prompts):
        return [self.text] * len(prompts)


def _value(example):
    values = tuple(picture.value for picture in example.pictures)
    return values if example.form == "few_shot" else values[0]


def _key(value):
    return tuple(map(_key, value)) if isinstance(value, tuple) else value.tobytes()


@pytest.fixture(scope="module")
def examples():
    return [*scene_examples("test", range(80), size=16), *few_shot_scenes("test", 300, size=16, pool=400)]


def scores_of(answerer, examples, **options):
    return evaluate(answerer, examples, **options)["results"][0]


# -- answerers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Perfect, Ranking])
@pytest.mark.parametrize("prompts", [LLAVA, PLAIN])
def test_the_perfect_answerer_is_right_in_everything(examples, kind, prompts):
    found = scores_of(kind(examples, prompts), examples, prompts=prompts)
    perfect = ("options_accuracy", "yes_no_accuracy", "yes_no_f1", "box_accuracy", "few_shot_accuracy")
    assert {key: value for key, value in found.items() if key.startswith(perfect)} == {
        key: 1.0 for key in found if key.startswith(perfect)
    }
    assert {found[f"{form}_unread"] for form in ("options", "box", "few_shot")} == {0.0}
    assert found["yes_no_yes_share"] == 0.5
    assert found["box_iou"] > 0.9  # as text has whole percents
    assert found["caption_bleu_4"] > 0.99
    assert found["caption_cider_d"] > 3  # one of five references is said
    assert (found["few_shot_low"], found["few_shot_high"]) == (pytest.approx(0.987, abs=1e-3), 1.0)


@pytest.mark.parametrize("scored", [True, False])
def test_the_random_answerer_is_right_by_chance(examples, scored):
    answerer = Random()
    if not scored:
        answerer.score = None
    found = scores_of(answerer, examples)
    for form, chance in (("options", 0.25), ("few_shot", 0.2), ("yes_no", 0.5)):
        bound = 4 * np.sqrt(chance * (1 - chance) / found[f"{form}_count"])  # four standard deviations
        assert found[f"{form}_accuracy"] == pytest.approx(chance, abs=bound), form
    assert found["few_shot_low"] < 0.2 < found["few_shot_high"]
    assert found["box_accuracy"] < 0.2
    assert 0 < found["box_iou"] < 0.3
    assert found["yes_no_unclear"] == 0


def test_who_always_says_yes_is_half_right(examples):
    found = scores_of(Constant("Yes."), examples)
    assert found["yes_no_accuracy"] == found["yes_no_precision"] == 0.5
    assert found["yes_no_recall"] == found["yes_no_yes_share"] == 1
    assert found["yes_no_f1_adversarial"] == pytest.approx(2 / 3)
    assert found["options_accuracy"] == found["few_shot_accuracy"] == found["box_iou"] == 0
    assert found["caption_bleu_4"] < 1e-6  # what the guards of pycocoevalcap leave
    assert found["options_unread"] == found["few_shot_unread"] == found["box_unread"] == 1


def test_who_always_takes_one_letter_is_right_by_chance(examples):
    found = scores_of(Constant("C"), examples)
    bound = 4 * np.sqrt(3 / 16 / found["options_count"])
    assert found["options_accuracy"] == pytest.approx(0.25, abs=bound)
    assert found["options_unread"] == 0
    assert found["yes_no_unclear"] == 1


def test_who_finds_all_options_alike_takes_the_first():
    class Level(Constant):
        def score(self, inputs, prompts, options):
            return np.zeros((len(options), 2))

    both = [Example("options", _picture(answer), "Which?", answer, ("x", "y")) for answer in "xy"]
    record = evaluate(Level(""), both)
    assert [row["right"] for row in record["answers"]] == [True, False]
    assert [row["said"] for row in record["answers"]] == ["x", "x"]


# -- scores by hand ----------------------------------------------------------------------------------------------------


def _picture(name, size=(10, 10)):
    return Picture(name, name.encode(), size)


def test_boxes_by_hand():
    exact, half, third = (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 1.0, 0.5), (0.25, 0.0, 0.75, 0.5)
    boxes = {"exact": exact, "half": half, "third": third, "none": exact}
    asked = [Example("box", _picture(name), name, box=box, category=name) for name, box in boxes.items()]

    class Same(Constant):
        def answer(self, inputs, prompts):
            return ["?" if value == b"none" else "[0, 0, 50, 50]" for value in inputs]

    found = scores_of(Same(""), asked, prompts=PLAIN)
    assert found["box_iou"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert found["box_accuracy"] == 0.5  # an IoU of exactly one half is enough
    assert [found[f"box_accuracy_{name}"] for name in boxes] == [1, 1, 0, 0]
    assert found["box_unread"] == 0.25


def test_boxes_of_padded_squares_are_taken_back_to_the_picture():
    wide = Example("box", _picture("a", (50, 100)), "it", box=(0.1, 0.2, 0.5, 1.0))
    padded = "[0.1, 0.35, 0.5, 0.75]"
    assert scores_of(Constant(padded), [wide])["box_iou"] == pytest.approx(1)
    assert scores_of(Constant(padded), [wide], prompts=PLAIN)["box_iou"] == pytest.approx(0.55 / 0.8 * 0 + 0.4 / 0.8)


def test_categories_have_scores_of_their_own():
    asked = [
        Example("yes_no", _picture(f"{category}{k}"), "Is it?", answer, category=category)
        for category, answers in {"random": ("yes", "no", "no"), "popular": ("no",)}.items()
        for k, answer in enumerate(answers)
    ]
    found = scores_of(Constant("yes"), asked)
    assert found["yes_no_accuracy"] == 0.25
    assert found["yes_no_accuracy_random"] == pytest.approx(1 / 3)
    assert found["yes_no_accuracy_popular"] == 0
    assert found["yes_no_recall_popular"] is None


# -- the record --------------------------------------------------------------------------------------------------------


def test_the_record_is_one_of_results(examples):
    record = evaluate(Random(), examples, data="scenes", quality=3)
    results.validate(json.loads(results.to_json(record)))
    assert (record["preset"], record["data"]) == ("random", "scenes")
    assert [row["quality"] for row in record["results"]] == [3]
    assert len(record["answers"]) == len(examples)
    assert {picture.name for example in examples for picture in example.pictures} == {
        row["image"] for row in record["images"]
    }


def test_the_rate_is_that_of_the_real_bytes_of_each_picture_once():
    one, other = Picture("one", b"12", (4, 4)), Picture("other", b"1234567890", (2, 4))
    asked = [Example("yes_no", picture, "?", "yes") for picture in (one, one, one)]
    asked.append(Example("few_shot", one, answer="a", support=((one, "a"), (other, "b"))))
    record = evaluate(Constant("yes"), asked)
    assert {row["image"]: row["bpp"] for row in record["images"]} == {"one": 1.0, "other": 10.0}
    assert record["results"][0]["bpp"] == 5.5
    given = evaluate(Constant("yes"), asked, rate=lambda picture: 8.0)
    assert given["results"][0]["bpp"] == pytest.approx((0.5 + 1) / 2)


def test_batches_hold_one_form_and_keep_the_order(examples):
    seen = []

    class Watching(Constant):
        def answer(self, inputs, prompts):
            assert len(inputs) == len(prompts) <= 7
            assert len({type(value) for value in inputs}) == 1
            seen.extend(prompts)
            return [str(len(seen))] * len(prompts)

    ticks = []
    evaluate(Watching(""), examples, batch=7, on_example=lambda: ticks.append(1))
    order = sorted(
        examples, key=lambda example: ["caption", "options", "yes_no", "box", "few_shot"].index(example.form)
    )
    assert seen == [prompt_of(LLAVA, example) for example in order]
    assert len(ticks) == len(examples)


@pytest.mark.parametrize(
    ("said", "seen"),
    [(lambda n: ["yes"] * (n - 1), "2 texts"), (lambda n: "yes", "2 texts"), (lambda n: [None] * n, "2 texts")],
)
def test_answerers_must_give_a_text_for_each_prompt(said, seen):
    class Wrong(Constant):
        def answer(self, inputs, prompts):
            return said(len(prompts))

    asked = [Example("yes_no", _picture(name), "?", "yes") for name in "ab"]
    with pytest.raises(InputError, match=seen):
        evaluate(Wrong(""), asked)


@pytest.mark.parametrize("scores", [[[0.0, 1.0, 2.0]], [[0.0]], [[float("nan"), 0.0]], [], [[0.0, 1.0]] * 2])
def test_answerers_must_give_a_score_for_each_option(scores):
    class Wrong(Constant):
        def score(self, inputs, prompts, options):
            return scores

    with pytest.raises(InputError, match="answerer"):
        evaluate(Wrong(""), [Example("options", _picture("a"), "?", "x", ("x", "y"))])


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"examples": []}, "0 examples"), ({"batch": 0}, "batches of 0"), ({"rate": lambda picture: -1}, "-1")],
)
def test_what_cannot_be_evaluated_is_refused(options, seen):
    asked = [Example("yes_no", _picture("a"), "?", "yes")]
    with pytest.raises(InputError, match=seen):
        evaluate(Constant("yes"), **{"examples": asked, **options})


# -- rates -------------------------------------------------------------------------------------------------------------


def test_points_of_several_paths_are_ready_to_plot():
    asked = scene_examples("test", range(3), size=16, kinds=("yes_no",))

    def record(size, quality):
        sent = transmit(asked, lambda images: [bytes(size)] * len(images))
        return evaluate(Constant("yes"), sent, quality=quality)

    points = rate_score_points(
        {"latents": [record(64, 2), record(32, 1)], "pixels": [record(96, 1)]}, ["yes_no_accuracy"]
    )
    assert points == [
        {"path": "latents", "quality": 1, "bpp": 1.0, "yes_no_accuracy": 0.5},
        {"path": "latents", "quality": 2, "bpp": 2.0, "yes_no_accuracy": 0.5},
        {"path": "pixels", "quality": 1, "bpp": 3.0, "yes_no_accuracy": 0.5},
    ]
    [point] = rate_score_points({"pixels": [record(96, 1)]})
    assert {"path", "quality", "bpp", "yes_no_f1", "yes_no_count"} <= set(point)
    with pytest.raises(InputError, match="did you mean 'yes_no_accuracy'"):
        rate_score_points({"pixels": [record(96, 1)]}, ["yes_no_accurate"])


def test_scores_of_options_in_different_numbers_end_in_minus_infinity():
    class Ranks:
        def answer(self, inputs, prompts):
            raise AssertionError("options are ranked")

        def score(self, inputs, prompts, options):
            return np.array([[0.0, 1.0, -np.inf], [0.0, 1.0, 2.0]])

    asked = [
        Example("options", _picture("a"), "?", "y", ("x", "y")),
        Example("options", _picture("b"), "?", "z", ("x", "y", "z")),
    ]
    assert evaluate(Ranks(), asked)["results"][0]["options_accuracy"] == 1.0
