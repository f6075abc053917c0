"""How a question is put to a multimodal language model: the words around it, and their tokens.

In a prompt `<image>` stands for a picture. A question that names none gets one in front, where LLaVA was trained to find it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError
from jaxsem.tasks.prompts import IMAGE

# -- templates --------------------------------------------------------------------------------------------------------

Template = Callable[[str], str]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna(question: str) -> str:
    r"""For LLaVA-1.5, and for 1.6 upon Vicuna: a line that sets the scene, then `USER: <image>\n... ASSISTANT:`.

    Source: haotian-liu/LLaVA, llava/conversation.py, `conv_vicuna_v1`, with which the authors train and evaluate.
    """
    return f"{_SYSTEM} {vicuna_bare(question)}"


def vicuna_bare(question: str) -> str:
    r"""As `vicuna`, without the line that sets the scene: `USER: <image>\n... ASSISTANT:`.

    Source: the model card of llava-hf/llava-1.5-7b-hf, and transformers' documentation.
    """
    return f"USER: {_with_image(question)} ASSISTANT:"


def mistral(question: str) -> str:
    r"""For LLaVA-1.6 upon Mistral: `[INST] <image>\n... [/INST]`.

    Source: the model card of llava-hf/llava-v1.6-mistral-7b-hf.
    """
    return f"[INST] {_with_image(question)} [/INST]"


def plain(question: str) -> str:
    """For small models, which know no words of conversation: the image, then the question as it is."""
    return _with_image(question, " ")


TEMPLATES: dict[str, Template] = {
    "vicuna": vicuna,
    "vicuna_bare": vicuna_bare,
    "mistral": mistral,
    "plain": plain,
}


def _with_image(question: str, between: str = "\n") -> str:
    return question if IMAGE in question else f"{IMAGE}{between}{question}"


# -- tokens -----------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What a multimodal model asks of a tokenizer.

    Attributes:
      start: The id that every prompt begins with; None for none.
      stop: The ids that end an answer.
    """

    start: int | None
    stop: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text and nothing else; `<image>` is the model's image token, once."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A tokenizer of transformers that has `<image>` among its tokens.

    Attributes:
      tokenizer: Of transformers.
      image_token: What the model takes for `<image>`.

    Raises:
      InputError: The tokenizer takes another id for it, or has none for the end of a text.
    """

    tokenizer: Any
    image_token: int

    def __post_init__(self) -> None:
        found = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if found != self.image_token:
            raise InputError(
                f"the tokenizer's {IMAGE} is {found}, and the model's is {self.image_token}: give the model's own tokenizer"
            )
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end of text, at which answers stop: give the model's own tokenizer")

    @property
    def start(self) -> int | None:
        """See `Tokenizer`."""
        return self.tokenizer.bos_token_id

    @property
    def stop(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        return (self.tokenizer.eos_token_id,)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        # Whether a tokenizer adds its start by itself differs between versions of transformers.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


@dataclass(frozen=True, eq=False)
class Words:
    """The tokenizer of small models, to which `<image>` is added.

    Attributes:
      tokenizer: Of whole words.
      image_token: What the model takes for `<image>`; outside of the words' ids.

    Raises:
      InputError: The image token is that of a word.
    """

    tokenizer: WordTokenizer
    image_token: int

    def __post_init__(self) -> None:
        if self.image_token < len(self.tokenizer):
            raise InputError(
                f"image_token={self.image_token} is a word's: give one from {len(self.tokenizer)}, the number of words, on"
            )

    @property
    def start(self) -> int:
        """See `Tokenizer`."""
        return self.tokenizer.start

    @property
    def stop(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        return (self.tokenizer.end,)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`.

        Raises:
          InputError: A word that the language has not.
        """
        first, *others = (row[1:-1] for row in self.tokenizer(text.split(IMAGE))["input_ids"])
        return sum(([self.image_token, *row] for row in others), first)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self.tokenizer.decode(number for number in ids if number != self.image_token)


def load_tokenizer(source: str | os.PathLike, image_token: int) -> Pretrained:
    """The tokenizer of a folder or Hugging Face id.

    Args:
      source: Holds a tokenizer.json.
      image_token: What the model takes for `<image>`.

    Raises:
      InputError: transformers is not installed, nothing usable is there, or it is another model's.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError("the tokenizer needs transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(source))
    except Exception as error:  # transformers raises many kinds, with paragraphs
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
        raise InputError(f"{source} holds no tokenizer ({reason}): give a folder with its tokenizer.json") from error
    return Pretrained(tokenizer, image_token)
