"""A multimodal language model ready for use: images and questions in, answers out, in batches of one compiled size.

    model = load_mllm("llava-hf/llava-1.5-7b-hf", weights="int8", dtype=jnp.bfloat16)
    model.answer([photo], ["What is this?"])                                        # ["A red kite."]
    model.score([photo], ["What is this?"], [["a kite", "a plane"]]).argmax(axis=1)   # SEED-Bench's protocol

An image may be one in any form, or the tokens of the image tower [n, width], the class token left out, where a codec's latent
has entered the tower through a neck: `tokens_after(model.module, model.params, neck_tokens, bypassed)`.

Prompts are padded on the left, to one of a few lengths an octave: longer questions or more of them compile nothing anew. A model of
`jaxsem.tasks.Answerer`'s form: `jaxsem.tasks.evaluate(model, examples)`.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.llava import Llava, language_model
from jaxsem.backbones.llava_inputs import NEWLINE, check_fit, square, tile_order, tiles
from jaxsem.data.images import pixels_from
from jaxsem.errors import InputError
from jaxsem.generation import greedy, sample
from jaxsem.systems.clip_model import READERS, filled
from jaxsem.systems.mllm_prompts import TEMPLATES, Template, Tokenizer, load_tokenizer
from jaxsem.systems.mllm_steps import encode_squares, log_probabilities, merge, project, tokens_after
from jaxsem.tasks.prompts import IMAGE
from jaxsem.weights.huggingface import read_config

__all__ = ["Mllm", "load_mllm", "tokens_after"]

# -- what is asked ----------------------------------------------------------------------------------------------------


class _Visual(NamedTuple):
    """What a model sees of one image.

    Attributes:
      squares: uint8 [t, side, side, 3] that go through the tower, or tokens float32 [n, width] that have been.
      order: int32 [m], for each visual token its place among those of the squares, or NEWLINE.
    """

    squares: np.ndarray
    order: np.ndarray


class _Row(NamedTuple):
    """One question: its images, and its ids with an image token for each visual token."""

    visuals: tuple[_Visual, ...]
    ids: list[int]


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mllm:
    """A LLaVA with all that it takes to ask it.

    Attributes:
      name: What errors call it.
      module: The Flax module.
      params: Its parameters; on the device, or they travel at every call.
      tokenizer: Texts to ids and back.
      template: The words around a question.
      fit: How LLaVA-1.5's images become square (`jaxsem.backbones.llava_inputs.square`); 1.6 takes them as they are.
      batch: Most questions at a time.

    Raises:
      InputError: No such fit, or a batch below 1.
    """

    name: str
    module: Llava
    params: Any
    tokenizer: Tokenizer
    template: Template
    fit: str = "pad"
    batch: int = 8

    def __post_init__(self) -> None:
        check_fit(self.fit)
        if self.batch < 1:
            raise InputError(f"{self.name} cannot answer {self.batch} questions at a time: give a batch of at least 1")

    def answer(
        self,
        inputs: Sequence[Any],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        rng: jax.Array | None = None,
    ) -> list[str]:
        """Answers questions about images.

        All images of a call are prepared before the first answer: give thousands in parts.

        Args:
          inputs: For each question an image, as `jaxsem.data.images.pixels_from` takes it, or visual tokens; or a tuple or
            list of them, for the `<image>`s of the question in their order.
          questions: Texts; without an `<image>`, the one image comes first.
          max_new_tokens: Most tokens of an answer.
          temperature: 0 takes the likeliest token at every place; above, tokens are drawn.
          top_p: The probability of the nucleus that tokens are drawn from.
          rng: The key to draw with; an answer depends on it, on its place among the questions, and on no other question.

        Raises:
          InputError: Not as many inputs as questions, something that is no image, other than one image for each `<image>`, no
            key to draw with, or a question that with its images and its answer is longer than the context.
        """
        if temperature and rng is None:
            raise InputError(f"temperature={temperature} draws tokens: give a key, such as rng=jax.random.key(0)")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} leaves no text: ask for at least 1")
        rows = self._rows(inputs, questions)
        self._check_lengths(rows, questions, max_new_tokens - 1, f"max_new_tokens={max_new_tokens}")
        model, limits = language_model(self.module), {"max_new_tokens": max_new_tokens, "stop": self.tokenizer.stop}
        texts: list[str] = []
        for part, size in self._batches(rows):
            prompt, mask = self._prompt(part, size, max_new_tokens - 1)
            given = model, self.params["language"], prompt
            if temperature:
                places = filled(len(texts) + np.arange(len(part)), size)
                keys = jax.vmap(partial(jax.random.fold_in, rng))(places)
                options = {"temperature": temperature, "top_p": top_p, "prompt_mask": mask, **limits}
                found = sample(*given, keys, **options)
            else:
                found = greedy(*given, prompt_mask=mask, **limits)
            tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
            for row, length in zip(tokens[: len(part)], lengths):
                ids = row[:length].tolist()
                texts.append(self.tokenizer.decode(ids[:-1] if ids[-1] in self.tokenizer.stop else ids))
        return texts

    def score(
        self,
        inputs: Sequence[Any],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        *,
        mean: bool = True,
    ) -> np.ndarray:
        """The log-probability of each option as the answer to its question.

        Args:
          inputs: As for `answer`.
          questions: As for `answer`.
          options: For each question its options.
          mean: Whether to take the mean over an option's tokens, as SEED-Bench does, so that long ones do not lose, and not
            their sum.

        Returns:
          float32 [questions, options], natural logarithms; where a question has fewer options than another, -inf at the end.

        Raises:
          InputError: As `answer`; also options for more or fewer questions, none for one, or an empty one.
        """
        rows = self._rows(inputs, questions)
        words = self._options(questions, options)
        count, longest = max(map(len, words)), max(len(ids) for ids_of_row in words for ids in ids_of_row)
        self._check_lengths(rows, questions, longest - 1, f"an option of {longest} tokens")
        length = min(_bucket(longest, 4), self.module.config.text.context - max(len(row.ids) for row in rows) + 1)
        model, parts, done = language_model(self.module), [], 0
        for part, size in self._batches(rows):
            prompt, mask = self._prompt(part, size, length - 1)
            ids, lengths = _padded(words[done : done + len(part)], count, length)
            sums = log_probabilities(
                model, self.params["language"], prompt, mask, filled(ids, size), filled(lengths, size)
            )
            sums = np.where(lengths == 0, -np.inf, np.asarray(sums)[: len(part)])
            parts.append(sums / np.maximum(lengths, 1) if mean else sums)
            done += len(part)
        return np.concatenate(parts).astype(np.float32)

    # -- host ----------------------------------------------------------------------------------------------------------

    def _rows(self, inputs: Sequence[Any], questions: Sequence[str]) -> list[_Row]:
        if isinstance(questions, str):
            raise InputError(f"{questions!r:.80} is one question: give a list of them")
        groups = [tuple(each) if isinstance(each, tuple | list) else (each,) for each in inputs]
        if len(groups) != len(questions) or not groups:
            raise InputError(f"{self.name} has {len(groups)} inputs for {len(questions)} questions: give one for each")
        prompts = [self.template(question) for question in questions]
        for i, (group, prompt) in enumerate(zip(groups, prompts), 1):
            if prompt.count(IMAGE) != len(group):
                raise InputError(
                    f"question {i} has {prompt.count(IMAGE)} places for images ({IMAGE}) and {len(group)} images: give one for each"
                )
        with ThreadPoolExecutor(READERS) as pool:
            seen = iter(list(pool.map(self._visual, [image for group in groups for image in group])))
        rows = []
        for group, prompt in zip(groups, prompts):
            visuals = tuple(next(seen) for _ in group)
            rows.append(_Row(visuals, self._ids(prompt, [len(visual.order) for visual in visuals])))
        return rows

    def _visual(self, image: Any) -> _Visual:
        config = self.module.config
        if hasattr(image, "dtype") and jnp.issubdtype(image.dtype, jnp.floating):
            tokens = np.asarray(image, np.float32)
            if tokens.ndim != 2 or tokens.shape[1] != config.vision.width or not len(tokens):
                raise InputError(
                    f"floats are visual tokens, for {self.name} [n, {config.vision.width}], not {list(tokens.shape)}: give those "
                    f"of tokens_after, or an image as uint8"
                )
            order = np.arange(len(tokens), dtype=np.int32)
            # Of an image without tiles, LLaVA-1.6 ends the one line with a newline.
            return _Visual(tokens, np.append(order, np.int32(NEWLINE)) if config.grid_pinpoints else order)
        pixels = pixels_from(image)
        if config.grid_pinpoints:
            return _Visual(tiles(pixels, config), tile_order(pixels.shape[:2], config))
        return _Visual(square(pixels, config.side, self.fit)[None], np.arange(config.square_tokens, dtype=np.int32))

    def _ids(self, prompt: str, counts: Sequence[int] | None = None) -> list[int]:
        """The ids of a prompt, in which each image token is repeated; without counts they stay single."""
        ids, image = self.tokenizer.encode(prompt), self.module.config.image_token
        if counts is not None:
            if ids.count(image) != len(counts):
                raise InputError(
                    f"the tokenizer of {self.name} finds {ids.count(image)} images in {prompt!r:.80}, and {len(counts)} are there"
                )
            left = iter(counts)
            ids = [each for number in ids for each in ([image] * next(left) if number == image else [number])]
        return ids if self.tokenizer.start is None else [self.tokenizer.start, *ids]

    def _options(self, questions: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids with which each option goes on from its prompt."""
        if len(options) != len(questions) or any(isinstance(each, str) or not len(each) for each in options):
            raise InputError(
                f"there are options for {len(options)} of {len(questions)} questions, or a question without: give each a list"
            )
        found = []
        for question, texts in zip(questions, options):
            prompt = self.template(question)
            before = self._ids(prompt)
            found.append([self._continuation(prompt, before, text) for text in texts])
        return found

    def _continuation(self, prompt: str, before: list[int], option: str) -> list[int]:
        # Tokenised together: alone, a tokenizer may begin a text in another way than it goes on.
        whole = self._ids(f"{prompt} {option.strip()}")
        if not option.strip() or whole[: len(before)] != before or len(whole) == len(before):
            raise InputError(f"the option {option!r} cannot be told from the prompt before it: write a word")
        return whole[len(before) :]

    def _check_lengths(self, rows: list[_Row], questions: Sequence[str], more: int, why: str) -> None:
        """Refuses a prompt that leaves the context no room for `more` tokens."""
        room = self.module.config.text.context - more
        for i, (row, question) in enumerate(zip(rows, questions), 1):
            if len(row.ids) > room:
                images = sum(len(visual.order) for visual in row.visuals)
                raise InputError(
                    f"question {i}, {question!r:.50}, has {len(row.ids)} tokens, {images} of them for images, and with {why} the "
                    f"context of {self.module.config.text.context} holds {max(room, 0)}: shorten it"
                )

    def _batches(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], int]]:
        """Rows of a batch and the size to which it is filled."""
        size = min(self.batch, 1 << (len(rows) - 1).bit_length())  # few sizes to compile
        for start in range(0, len(rows), size):
            yield rows[start : start + size], size

    # -- device --------------------------------------------------------------------------------------------------------

    def _prompt(self, rows: list[_Row], size: int, more: int) -> tuple[jax.Array, np.ndarray]:
        """The embeddings [size, n, width] of prompts and their mask, with room for `more` tokens in the context."""
        length = min(_bucket(max(len(row.ids) for row in rows), 16), self.module.config.text.context - more)
        ids = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            ids[i, length - len(row.ids) :] = row.ids
            mask[i, length - len(row.ids) :] = True
        table, order = self._table(rows, size)
        return merge(self.module, self.params, table, filled(order, size), filled(ids, size)), filled(mask, size)

    def _table(self, rows: list[_Row], size: int) -> tuple[jax.Array, np.ndarray]:
        """The embeddings [k, width] of all that a batch sees, and for each row the places [m] of its own."""
        visuals = [visual for row in rows for visual in row.visuals]
        images = [visual.squares for visual in visuals if visual.squares.dtype == np.uint8]
        tokens = [visual.squares for visual in visuals if visual.squares.dtype != np.uint8]
        tables, tokens_of = [], self.module.config.square_tokens
        if images:
            squares = np.concatenate(images)
            parts = [filled(squares[i : i + size], size) for i in range(0, len(squares), size)]
            tables += [encode_squares(self.module, self.params, part) for part in parts]
        starts = {np.uint8: 0, np.float32: len(tables) * size * tokens_of}
        if tokens:
            found = np.concatenate(tokens)
            tables.append(project(self.module, self.params, filled(found, _bucket(len(found), 16))))
        orders = []
        for row in rows:
            order = [np.zeros(0, np.int32)]
            for visual in row.visuals:
                kind = visual.squares.dtype.type
                order.append(np.where(visual.order == NEWLINE, NEWLINE, visual.order + starts[kind]))
                starts[kind] += len(visual.squares) * (tokens_of if kind is np.uint8 else 1)
            orders.append(np.concatenate(order))
        length = _bucket(max(1, *map(len, orders)), 16)
        # What lies beyond a row's own is taken by no image token.
        padded = np.stack([np.pad(order, (0, length - len(order))) for order in orders]).astype(np.int32)
        # A prompt without an image takes nothing of the table.
        return jnp.concatenate(tables or [jnp.zeros((1, self.module.config.text.width))]), padded


def load_mllm(
    source: str | os.PathLike,
    weights: str = "float",
    dtype: Any = jnp.float32,
    *,
    template: str | Template | None = None,
    tokenizer: str | os.PathLike | None = None,
    fit: str = "pad",
    batch: int = 8,
) -> Mllm:
    """Loads LLaVA 1.5 or 1.6 from a Hugging Face folder.

    For a model that one device cannot hold: load it with `jaxsem.weights.llava.load_llava`, place its parameters with
    `jaxsem.backbones.llava.partition_rules`, and make an `Mllm` of them.

    Args:
      source: A folder with config.json, weights and tokenizer, or its id on the Hub, such as "llava-hf/llava-1.5-7b-hf".
      weights: "float", or "int8" for the kernels of the language model.
      dtype: Of the computation; parameters that are floats take the same type.
      template: The words around a question, or a name in `jaxsem.systems.mllm_prompts.TEMPLATES`; None takes "mistral" for a
        language model of that type and else "vicuna".
      tokenizer: Folder or id of the tokenizer; the source by default.
      fit: As for `Mllm`.
      batch: As for `Mllm`.

    Raises:
      InputError: Nothing is there, a name is unknown, or transformers, which has the tokenizer, is not installed.
      WeightsError: The files are damaged or do not fit.
    """
    from jaxsem.weights.llava import load_llava, parse_config

    check_fit(fit)
    name, fields = os.fspath(source), read_config(source)
    config = parse_config(fields, name)
    if template is None:
        template = "mistral" if (fields.get("text_config") or {}).get("model_type") == "mistral" else "vicuna"
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise InputError(f"there is no template {template!r}; there are {', '.join(TEMPLATES)}")
        template = TEMPLATES[template]
    # The tokenizer first: it is small, and what is wrong with it is known before gigabytes are read.
    words = load_tokenizer(tokenizer or source, config.image_token)
    module, params = load_llava(source, config, dtype, dtype, weights)
    return Mllm(name, module, jax.device_put(params), words, template, fit, batch)


# -- lengths ----------------------------------------------------------------------------------------------------------


def _bucket(n: int, least: int) -> int:
    """The next of four lengths an octave."""
    step = max(least, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def _padded(rows: list[list[list[int]]], count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as int32 [rows, count, length] and their lengths [rows, count]."""
    ids, lengths = np.zeros((len(rows), count, length), np.int32), np.zeros((len(rows), count), np.int32)
    for i, row in enumerate(rows):
        for j, option in enumerate(row):
            ids[i, j, : len(option)], lengths[i, j] = option, len(option)
    return ids, lengths
