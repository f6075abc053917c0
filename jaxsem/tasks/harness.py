"""The evaluation of a model on examples: one way for images, reconstructions, files and latents."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxsem.data.boxes import from_square, iou, read_box
from jaxsem.errors import InputError
from jaxsem.results import Record, Row, make_record
from jaxsem.tasks.examples import FORMS, Example, Picture, distinct_pictures
from jaxsem.tasks.prompts import LLAVA, Prompts, prompt_of
from jaxsem.tasks.scores import (
    Scores,
    by_category,
    caption_scores,
    mean,
    read_label,
    read_option,
    read_yes_no,
    says_yes_or_no,
    wilson,
    yes_no_scores,
)

_FOUND = 0.5  # the least IoU of a box that counts as found


class Answerer(Protocol):
    """A model that answers prompts about pictures.

    It may also have `score(inputs, prompts, options) -> [b][n]`: the log-probability of each option of each prompt as its
    continuation (SEED-Bench's protocol takes the largest; the mean over an option's tokens keeps long ones from losing).
    Where `score` is absent or None, options are chosen by what `answer` says.
    """

    def answer(self, inputs: list[Any], prompts: list[str]) -> list[str]:
        """Answers prompts.

        Args:
            inputs: For each prompt the `Picture.value`; for few-shot a tuple of them, for the `<image>`s in order.
            prompts: As many texts, all of one form.

        Returns:
            One text for each.
        """


@dataclass(frozen=True)
class Answered:
    """An example and what was said.

    Attributes:
        example: The example.
        said: What the model said, or the option it found likeliest.
        choice: Index in `example.choices` of what that means; None where it means none, and for other forms.
    """

    example: Example
    said: str
    choice: int | None = None

    @property
    def right(self) -> bool:
        """For options and few-shot, whether the choice is the answer."""
        return self.choice is not None and self.example.choices[self.choice] == self.example.answer


def evaluate(
    answerer: Answerer,
    examples: Sequence[Example],
    rate: Callable[[Picture], float] | None = None,
    *,
    prompts: Prompts = LLAVA,
    batch: int = 16,
    name: str | None = None,
    data: str = "examples",
    quality: float = 0,
    on_example: Callable[[], None] = lambda: None,
) -> Record:
    """Asks a model all examples and scores its answers.

    Args:
        answerer: The model.
        examples: What to ask, of any forms.
        rate: Bits of a picture; by default `Picture.sent_bits`, its real bytes.
        prompts: The wording.
        batch: Prompts at a time, all of one form.
        name: What the record calls the model; by default its `name` or the name of its class.
        data: What the record calls the examples.
        quality: At which the pictures were compressed, for records of several rates.
        on_example: Called after each example, to show progress.

    Returns:
        The record of `jaxsem.results`: a row with the bits per pixel of each picture, support included, and one row of
        `results` with their mean and, for the forms that occur, `FORM_count` and

        * caption: `caption_cider_d` and `caption_bleu_4`;
        * options: `options_accuracy`, `options_unread` (the share of answers that name no option);
        * yes_no: `yes_no_accuracy`, `_precision`, `_recall`, `_f1`, `_yes_share`, and `_unclear` (the share without the
          words yes, no and not, which POPE counts as yes);
        * box: `box_accuracy` (IoU of at least 0.5), `box_iou` (its mean; 0 for what is no box), `box_unread`;
        * few_shot: `few_shot_accuracy`, `few_shot_low` and `_high` (its 95 % interval), `few_shot_unread`.

        Categories have scores of their own, as `options_accuracy_colour` and `yes_no_f1_adversarial`. `answers` holds
        what was said: image, form, category, text, answer, said, and right (null for captions).

    Raises:
        InputError: No example, a batch below 1, pictures of one name or without known bytes, or an answerer that gives
            another number of answers or scores than it was asked for.
    """
    examples = list(examples)
    if not examples or batch < 1:
        raise InputError(f"{len(examples)} examples in batches of {batch} cannot be evaluated: give one or more.")
    rows = [_picture_row(picture, quality, rate) for picture in distinct_pictures(examples).values()]
    scores: Scores = {}
    answers: list[Row] = []
    for form in FORMS:
        asked = [example for example in examples if example.form == form]
        if asked:
            answered = list(_ask(answerer, asked, prompts, batch, on_example))
            found, verdicts = _SCORERS[form](answered, prompts)
            scores |= {f"{form}_count": len(answered), **{f"{form}_{key}": value for key, value in found.items()}}
            answers += [_answer_row(*pair) for pair in zip(answered, verdicts, strict=True)]
    record = make_record(name or getattr(answerer, "name", type(answerer).__name__), data, rows)
    record["results"][0] |= scores
    return {**record, "answers": answers}


def rate_score_points(paths: Mapping[str, Sequence[Record]], scores: Sequence[str] | None = None) -> list[Row]:
    """The points of rate-score curves, ready to plot.

    Args:
        paths: For each path ("reconstruction", "transform-neck") the records of its rates.
        scores: Which keys of the results; all by default.

    Returns:
        A dictionary for each point with "path", "quality", "bpp" and the scores; paths in their order, each by rising rate.

    Raises:
        InputError: A record without a score that is asked for.
    """
    points = []
    for path, records in paths.items():
        rows = [row for record in records for row in record["results"]]
        for row in sorted(rows, key=lambda row: row["bpp"]):
            wanted = [key for key in row if key not in ("quality", "bpp")] if scores is None else scores
            for key in wanted:
                if key not in row:
                    close = difflib.get_close_matches(key, list(row), 1)
                    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(row)}"
                    raise InputError(f"a record of {path!r} has no score {key!r}: {hint}")
            points.append({"path": path, "quality": row["quality"], "bpp": row["bpp"], **{k: row[k] for k in wanted}})
    return points


def _picture_row(picture: Picture, quality: float, rate: Callable[[Picture], float] | None) -> Row:
    bits = picture.sent_bits if rate is None else float(rate(picture))
    if not (math.isfinite(bits) and bits >= 0):
        raise InputError(f"the rate of {picture.name} is {bits} bits: give a number of at least 0.")
    height, width = picture.size
    row = {"image": picture.name, "width": width, "height": height, "quality": quality}
    return {**row, "bpp": bits / (height * width)}


def _ask(
    answerer: Answerer, examples: list[Example], prompts: Prompts, batch: int, on_example: Callable[[], None]
) -> Iterator[Answered]:
    """Examples of one form, in their order."""
    chosen = examples[0].form in ("options", "few_shot")
    score = getattr(answerer, "score", None) if chosen else None
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = [_input_of(example) for example in part]
        texts = [prompt_of(prompts, example, ranked=score is not None) for example in part]
        if score is not None:
            choices = _likeliest(score(inputs, texts, [example.choices for example in part]), part)
            found = [Answered(example, example.choices[choice], choice) for example, choice in zip(part, choices)]
        else:
            found = [
                Answered(*pair, _choice(*pair)) for pair in zip(part, _texts(answerer.answer(inputs, texts), part))
            ]
        for answered in found:
            yield answered
            on_example()


def _input_of(example: Example) -> Any:
    if example.form == "few_shot":
        return tuple(picture.value for picture in example.pictures)
    return example.picture.value


def _texts(said: Sequence[str], examples: list[Example]) -> list[str]:
    if isinstance(said, str) or len(said) != len(examples) or not all(isinstance(text, str) for text in said):
        raise InputError(f"the answerer must give {len(examples)} texts for as many prompts, but gave {said!r:.200}.")
    return list(said)


def _likeliest(scores: Any, examples: list[Example]) -> list[int]:
    """The first of the likeliest options of each example."""
    if len(scores) != len(examples):
        raise InputError(f"the answerer gave scores for {len(scores)} of {len(examples)} prompts.")
    found = []
    for row, example in zip(scores, examples, strict=True):
        values = np.asarray(row, np.float64)
        # Where questions have options in different numbers, an array of all scores ends in -inf.
        if values.ndim == 1 and np.isneginf(values[len(example.choices) :]).all():
            values = values[: len(example.choices)]
        if values.shape != (len(example.choices),) or np.isnan(values).any():
            raise InputError(f"the answerer must give {len(example.choices)} log-probabilities, but gave {row!r:.200}.")
        found.append(int(values.argmax()))
    return found


def _choice(example: Example, said: str) -> int | None:
    read = {"options": read_option, "few_shot": read_label}.get(example.form)
    return read and read(said, example.choices)


def _captions(answered: list[Answered], prompts: Prompts) -> tuple[Scores, list[None]]:
    found = caption_scores([one.said for one in answered], [one.example.references for one in answered])
    return found, [None] * len(answered)


def _options(answered: list[Answered], prompts: Prompts) -> tuple[Scores, list[bool]]:
    right = [one.right for one in answered]
    return {**_shares(answered, accuracy=right), "unread": mean([one.choice is None for one in answered])}, right


def _yes_no(answered: list[Answered], prompts: Prompts) -> tuple[Scores, list[bool]]:
    said = [read_yes_no(one.said) == "yes" for one in answered]
    true = [one.example.answer == "yes" for one in answered]
    found = {**yes_no_scores(said, true), "unclear": mean([not says_yes_or_no(one.said) for one in answered])}
    for category, places in by_category([one.example.category for one in answered]).items():
        part = yes_no_scores([said[place] for place in places], [true[place] for place in places])
        found |= {f"{key}_{category}": value for key, value in part.items()}
    return found, [one == other for one, other in zip(said, true, strict=True)]


def _boxes(answered: list[Answered], prompts: Prompts) -> tuple[Scores, list[bool]]:
    boxes = [read_box(one.said) for one in answered]
    shares = []
    for one, box in zip(answered, boxes, strict=True):
        if box is not None and prompts.square_boxes:
            box = from_square(box, one.example.picture.size)
        shares.append(0.0 if box is None else iou(box, one.example.box))
    found = [share >= _FOUND for share in shares]
    return {**_shares(answered, accuracy=found, iou=shares), "unread": mean([box is None for box in boxes])}, found


def _few_shot(answered: list[Answered], prompts: Prompts) -> tuple[Scores, list[bool]]:
    found, right = _options(answered, prompts)
    low, high = wilson(sum(right), len(right))
    return {**found, "low": low, "high": high}, right


def _shares(answered: list[Answered], **measures: Sequence[float]) -> Scores:
    """The means of measures, over all and over each category."""
    found = {key: mean(values) for key, values in measures.items()}
    for category, places in by_category([one.example.category for one in answered]).items():
        found |= {f"{key}_{category}": mean([values[p] for p in places]) for key, values in measures.items()}
    return found


_SCORERS = {"caption": _captions, "options": _options, "yes_no": _yes_no, "box": _boxes, "few_shot": _few_shot}


def _answer_row(answered: Answered, right: bool | None) -> Row:
    example = answered.example
    return {
        "image": example.picture.name,
        "form": example.form,
        "category": example.category,
        "text": example.text,
        "answer": list(example.box) if example.box else example.answer or list(example.references),
        "said": answered.said,
        "right": right,
    }
