"""How examples are worded for a model, with the source of every wording.

In a prompt `<image>` stands for a picture, in their order. Without it the answerer puts its one picture where its model
wants it.
"""

import dataclasses
import re

from jaxsem.tasks.examples import LETTERS, Example

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Templates, in which `{text}` is the question, `{option}` an option with its `{letter}`, `{options}` all of them.

    Attributes:
        caption: For captions.
        options: For options where the model answers with a letter.
        option: One of them.
        between_options: Between two of them.
        ranked: For options where their likelihoods are compared; each follows this prompt.
        yes_no: For yes/no questions.
        box: For boxes.
        shot: For few-shot, each labelled picture; `{label}` is its label.
        query: For few-shot, the last picture.
        between_shots: Between these.
        square_boxes: Whether boxes are of the square to which the picture is padded (see `jaxsem.data.boxes`).
    """

    caption: str
    options: str
    option: str
    between_options: str
    ranked: str
    yes_no: str
    box: str
    shot: str
    query: str
    between_shots: str
    square_boxes: bool = False


_SHORT = "{text}\nAnswer the question using a single word or phrase."

LLAVA = Prompts(
    # Response formats of LLaVA-1.5 (Liu et al., Improved baselines with visual instruction tuning, CVPR 2024, appendix).
    caption="Provide a one-sentence caption for the provided image.",
    # haotian-liu/LLaVA, docs/Evaluation.md: SEED-Bench and MMBench.
    options="{text}\n{options}\nAnswer with the option's letter from the given choices directly.",
    option="{letter}. {option}",
    between_options="\n",
    # SEED-Bench ranks the contents of the options after the bare question; LLaVA's short answers are asked for like this.
    ranked=_SHORT,
    # docs/Evaluation.md: short answers; so POPE's questions are asked.
    yes_no=_SHORT,
    # Response formats of LLaVA-1.5: RefCOCO and Visual Genome.
    box="Provide the bounding box coordinate of the region this sentence describes: {text}",
    # Ours: papers/2 describes the episodes (A.1), but not the words.
    shot=f"{IMAGE}\nThis is {{label}}.",
    query=f"{IMAGE}\nWhat is this? Answer with one of: {{options}}.",
    between_shots="\n",
    square_boxes=True,
)
"""For LLaVA-1.5 and models trained on its data."""

SHIKRA = dataclasses.replace(
    LLAVA,
    # Chen et al., Shikra (2023), table of task prompts: referring expression comprehension, as papers/2 measures it.
    box=f"In the given {IMAGE}, could you find and tell me the coordinates of {{text}}?",
)
"""For Shikra: as LLAVA, but for boxes."""

PLAIN = Prompts(
    caption="{text}",
    options="{text} {options}",
    option="{letter}, {option}",
    between_options="; ",
    ranked="{text}",
    yes_no="{text}",
    box="Where is {text}?",
    shot=f"{IMAGE} is {{label}}",
    query=f"{IMAGE} is",
    between_shots="; ",
)
"""In the words of `jaxsem.data.questions.question_words`, for mini models; boxes are of the picture itself."""


def prompt_of(prompts: Prompts, example: Example, *, ranked: bool = False) -> str:
    """The words that go to the model.

    Args:
        prompts: The templates.
        example: What is asked; braces in its texts mean nothing.
        ranked: For options: whether likelihoods are compared, so that the prompt does not list them.
    """
    if example.form == "few_shot":
        shots = [_fill(prompts.shot, label=label) for _, label in example.support]
        return prompts.between_shots.join([*shots, _fill(prompts.query, options=", ".join(example.choices))])
    if example.form != "options":
        return _fill(getattr(prompts, example.form), text=example.text)
    options = ""
    if not ranked:
        lines = [
            _fill(prompts.option, letter=letter, option=option) for letter, option in zip(LETTERS, example.options)
        ]
        options = prompts.between_options.join(lines)
    return _fill(prompts.ranked if ranked else prompts.options, text=example.text, options=options)


def _fill(template: str, **values: str) -> str:
    """Fills a template in one pass: what is filled in is not looked at again."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
