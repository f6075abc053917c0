"""Questions about scenes with answers that are provably right, for language models that see.

    for question in questions_of(scene):
        print(question.kind, question.text, question.options, question.answer)

    caption    "Describe the image."                           the scene's captions are references
    options    "What colour is the leftmost star?"             four options, one true (`jaxsem.data.question_options`)
    yes_no     "Is there a red star in the image?"             as many yes as no
    box        "the small red star to the left of the ring"    true of one object only; the answer is its box

They follow the benchmarks that multimodal language models are measured on: COCO captions, SEED-Bench (Li et al., 2023),
POPE (Li et al., Evaluating object hallucination in large vision-language models, EMNLP 2023) and RefCOCO.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from jaxsem.data.boxes import Box, format_box
from jaxsem.data.question_options import CATEGORIES, OPTION_WORDS, Asker, options_questions, words_of
from jaxsem.data.scenes import CLASSES, COLOURS, SHAPES, WORDS, Phrase, Scene, captions, label_map, refer
from jaxsem.data.scenes.captions import article
from jaxsem.data.scenes.draws import Draws
from jaxsem.data.scenes.phrases import View
from jaxsem.errors import InputError

__all__ = ["CATEGORIES", "KINDS", "MARKS", "NEGATIVES", "Question", "question_words", "questions_of"]

KINDS = ("caption", "options", "yes_no", "box")
NEGATIVES = ("random", "popular", "adversarial")
"""The categories of yes/no questions, after POPE: how what is not there was chosen."""
MARKS = ",;?[]"
"""What stands between the words of questions and answers."""

DESCRIBE = "Describe the image."
_STREAM = 2**63 + 2**32  # of `Draws`; the streams of scenes, phrases and captions lie below
_SEEDS = 2**32
_PIXELS = 128  # to the shorter side, where no size is given
_COMPLETE = 3  # the caption that names everything in one clause


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one picture.

    Attributes:
        kind: One of KINDS.
        text: The question; for a box the phrase alone, as in RefCOCO.
        answer: A caption that names everything; the true option; "yes" or "no"; or the box as text (`format_box`).
        options: For options the four, of which the answer is one.
        references: For a caption the texts it is compared with.
        box: For a box its exact place: left, top, right, bottom as shares of the picture.
        category: For options one of CATEGORIES, for yes_no one of NEGATIVES, for a box "attributes", "superlative" or
            "relation"; else empty.
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    box: Box | None = None
    category: str = ""


def questions_of(
    scene: Scene,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    *,
    classes: Sequence[str] = CLASSES,
    size: int | tuple[int, int] | None = None,
) -> tuple[Question, ...]:
    """Asks about a scene: a pure function of its arguments.

    Args:
        scene: What to ask about.
        seed: Another seed asks other questions, below 2^32.
        kinds: Which of KINDS; what one kind asks does not depend on the others.
        classes: What may be named though it is not there, as `SceneConfig.class_names`: a model that is trained on seen
            classes must not learn that the unseen ones are always wrong.
        size: Side or (height, width) of the picture whose boxes are asked for; by default 128 pixels on the shorter side
            and the scene's aspect.

    Returns:
        The questions in the order of KINDS: one caption; options, one of each category that the scene allows; yes_no in
        pairs of one yes and one no, a pair of each of NEGATIVES that the scene and the classes allow; and one box for
        each object that has a pixel.

    Raises:
        InputError: An unknown kind or class, no kind or class, a seed or size out of range.

    Example:
        >>> from jaxsem.data.scenes import sample_scene
        >>> [question.text for question in questions_of(sample_scene("test", 1), kinds=("yes_no",))][:2]
        ['Is there a cyan heart in the image?', 'Is there a blue circle in the image?']
    """
    _check(seed, kinds, classes)
    view = None if set(kinds) == {"yes_no"} else View.of(scene)  # measures who hides whom, which takes a while
    questions: list[Question] = []
    if "caption" in kinds:
        references = captions(scene, view)
        questions.append(Question("caption", DESCRIBE, references[_COMPLETE], references=references))
    if "options" in kinds:
        asker = Asker(view, _draws(scene, seed, "options"), tuple(classes))
        for text, answer, options, category in options_questions(asker):
            questions.append(Question("options", text, answer, options, category=category))
    if "yes_no" in kinds:
        questions += _yes_no(scene, _draws(scene, seed, "yes_no"), tuple(classes))
    if "box" in kinds:
        questions += _boxes(view, _draws(scene, seed, "box"), _size_of(scene) if size is None else size)
    return tuple(questions)


@functools.cache
def question_words() -> tuple[str, ...]:
    """Every word of questions, options and answers, for `WordTokenizer(question_words(), MARKS)`.

    Among them are the numbers 0 to 100 of boxes, the letters a to d, which name options, and "where", which asks for boxes
    (`jaxsem.tasks.PLAIN`).
    """
    sentences = (DESCRIBE.rstrip("."), "is there in the image", "where is", "a b c d", *OPTION_WORDS)
    words = {word.lower().rstrip("?") for sentence in sentences for word in sentence.split()}
    return (*sorted({*WORDS, *words, "yes", "no"}), *map(str, range(101)))


def _check(seed: int, kinds: Sequence[str], classes: Sequence[str]) -> None:
    if not 0 <= seed < _SEEDS:
        raise InputError(f"seed={seed} is not between 0 and {_SEEDS - 1}.")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds={kinds!r} is no list of {', '.join(KINDS)}.")
    if isinstance(classes, str) or not classes or not _KNOWN.issuperset(classes):
        raise InputError(f"classes={classes!r} is no list of class names like {CLASSES[0]!r}.")


_KNOWN = frozenset(CLASSES)


def _draws(scene: Scene, seed: int, kind: str) -> Draws:
    return Draws(_STREAM + _SEEDS * KINDS.index(kind) + seed, scene.seed)


def _size_of(scene: Scene) -> tuple[int, int]:
    height, width = scene.extent
    return round(_PIXELS * height), round(_PIXELS * width)


def _yes_no(scene: Scene, draws: Draws, classes: tuple[str, ...]) -> Iterator[Question]:
    """Pairs of a thing that is there and one that is not, named in the same way: the wording gives nothing away.

    * random: a class, and any class that is absent.
    * popular: what many pictures have, a colour or a shape alone, and one that is absent. Classes of scenes are about
      equally frequent, unlike those of photos, of which POPE takes the most frequent.
    * adversarial: a class, and an absent one whose colour and shape are both there, in different objects.
    """
    things = scene.objects
    names = sorted({thing.name for thing in things})
    colours, shapes = {thing.colour for thing in things}, {thing.shape for thing in things}
    absent = [name for name in classes if name not in names]
    crossed = [name for name in absent if name.split()[0] in colours and name.split()[1] in shapes]
    there, allowed = colours | shapes, words_of(classes)
    kinds = [words for words in (COLOURS, SHAPES) if any(word in allowed and word not in there for word in words)]
    first = draws.integer(0, len(names) - 1)  # the two pairs of classes ask about different things where there are two
    if absent:
        yield from _pair("random", names[first], draws.pick(absent))
    if kinds:
        words = draws.pick(kinds)
        shown = draws.pick([word for word in words if word in there])
        missing = draws.pick([word for word in words if word in allowed and word not in there])
        wording = "{} object" if words is COLOURS else "{}"
        yield from _pair("popular", wording.format(shown), wording.format(missing))
    if crossed:
        yield from _pair("adversarial", names[(first + 1) % len(names)], draws.pick(crossed))


def _pair(category: str, there: str, missing: str) -> Iterator[Question]:
    for thing, answer in ((there, "yes"), (missing, "no")):
        yield Question("yes_no", f"Is there {article(thing)} in the image?", answer, category=category)


def _boxes(view: View, draws: Draws, size: int | tuple[int, int]) -> Iterator[Question]:
    from scipy import ndimage  # takes a third of a second to import

    labels = label_map(view.scene, size)
    height, width = labels.shape
    windows = ndimage.find_objects(labels, len(view.scene.objects))
    for phrases, window in zip(refer(view.scene, view), windows, strict=True):
        phrase = draws.pick(phrases)
        if window is not None:  # else it is thinner than the pixels
            rows, columns = window
            box = columns.start / width, rows.start / height, columns.stop / width, rows.stop / height
            yield Question("box", phrase.text, format_box(box), box=box, category=_kind_of(phrase))


def _kind_of(phrase: Phrase) -> str:
    if phrase.relation:
        return "relation"
    return "superlative" if phrase.superlative else "attributes"
