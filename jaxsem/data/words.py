"""A tokenizer of whole words, for the mini models: their language is that of scenes, some eighty words."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from jaxsem.data.scenes import WORDS
from jaxsem.errors import InputError

_TIGHT = ",;?]"  # marks that stand close to the word before them; "[" to that behind it


class WordTokenizer:
    """Words as ids and back: what `jaxsem.backbones.clip_inputs.tokenize` and the captioner ask of a tokenizer.

    The ids are those of "<pad>", "<start>", the words, the marks and "<end>", in this order; the end has the largest, as CLIP's
    text tower wants it.

    Args:
      words: The language, in lower case; numbers may be among them.
      marks: Characters that are words of their own wherever they stand.
    """

    def __init__(self, words: Sequence[str] = WORDS, marks: str = ",;"):
        self.words, self.marks = tuple(words), marks
        self.pieces = ("<pad>", "<start>", *words, *marks, "<end>")
        inside = re.escape(marks)
        self._pattern = re.compile(rf"[a-z]+|[{inside}]|[^\sa-z{inside}]+")
        self._close = re.compile(rf" ([{re.escape(_TIGHT)}])|(\[) ")
        self.pad_token_id, self.start, self.end = 0, 1, len(self.pieces) - 1
        self._ids = {piece: number for number, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, texts: Iterable[str]) -> dict[str, list[list[int]]]:
        """The ids of texts with start and end, of various lengths.

        Raises:
          InputError: A word that the language has not.
        """
        return {"input_ids": [[self.start, *map(self._id, self._split(text)), self.end] for text in texts]}

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, up to the first end; padding and start are left out."""
        words = []
        for number in ids:
            if number == self.end:
                break
            if number not in (self.pad_token_id, self.start):
                words.append(self.pieces[number])
        return self._close.sub(r"\1\2", " ".join(words))

    def _id(self, word: str) -> int:
        if word in self._ids:
            return self._ids[word]
        near = get_close_matches(word, [piece for piece in self.pieces[2:-1] if piece.isalnum()], 1)
        meant = f"did you mean {near[0]!r}?" if near else "it speaks of coloured shapes, as in 'a small red star'"
        raise InputError(f"the mini models do not know the word {word!r}; {meant}")

    def _split(self, text: str) -> list[str]:
        return self._pattern.findall(text.lower().rstrip(". "))
