"""Few-shot classification without a language model: the label of the nearest shown picture, by the features of a visual encoder.

V2L-Tokenizer, with which papers/2 measures this task, lets a language model compare visual features; a small language model that
was never shown several pictures at once cannot, and this is what is left of the task for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsem.errors import InputError


class NearestExample:
    """An answerer for few-shot examples with one picture of each label.

    Args:
        name: What records call it.
        features: Gives a feature [n, width] of each of n inputs; only their directions count.
    """

    def __init__(self, name: str, features: Callable[[list[Any]], np.ndarray]):
        self.name = name
        self._features = features

    def answer(self, inputs: Sequence[Any], prompts: Sequence[str]) -> list[str]:
        """Refuses: it compares pictures and writes nothing.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{self.name} compares pictures and answers no question: give it few-shot examples alone")

    def score(
        self, inputs: Sequence[tuple[Any, ...]], prompts: Sequence[str], options: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """The cosine similarity of each shown picture to the last one, [b, labels].

        Raises:
            InputError: Not one shown picture for each label.
        """
        for pictures, labels in zip(inputs, options, strict=True):
            if len(pictures) != len(labels) + 1:
                raise InputError(
                    f"{len(pictures) - 1} pictures were shown for {len(labels)} labels: {self.name} takes one for each"
                )
        flat = [picture for pictures in inputs for picture in pictures]
        features = np.asarray(self._features(flat), np.float32)
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        rows, start = [], 0
        for pictures in inputs:
            mine = features[start : start + len(pictures)]
            rows.append(mine[:-1] @ mine[-1])
            start += len(pictures)
        return np.stack(rows)
