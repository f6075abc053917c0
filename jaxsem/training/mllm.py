"""Training of a small LLaVA on scenes: conversations about pictures, the loss on what it is to say, and an evaluation.

    start  image x 64  question answer end  question answer end ...

The image tower is frozen and its tokens are computed once, before the training: a step costs the projector and the language model
only. As in LLaVA's own second stage, all rounds of a conversation are learned in one pass, and only answers count.

Source: Liu et al., Visual Instruction Tuning (NeurIPS 2023), section 4.2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsem.backbones.llava import Llava
from jaxsem.data.questions import Question, questions_of
from jaxsem.data.scenes import Scene, SceneConfig, sample_scene
from jaxsem.systems.mllm_prompts import Words
from jaxsem.tasks.prompts import PLAIN

# Of a scene's questions of each kind, how many are asked in one conversation at most; yes and no are not asked in pairs.
_MOST = {"caption": 1, "options": 4, "yes_no": 3, "box": 2}
_UNTIL = 8  # tokens that are left at least for another round to be begun


def wording(question: Question) -> str:
    """How a question is put, in the wording `jaxsem.tasks.PLAIN` with options that are ranked."""
    template = PLAIN.box if question.kind == "box" else PLAIN.ranked
    return template.replace("{text}", question.text)


def rounds(scene: Scene, classes: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Questions about a scene and their answers, in random order and without end of kinds that there are many of."""
    asked = questions_of(scene, int(rng.integers(1 << 32)), classes=classes)
    chosen: list[Question] = []
    for kind, most in _MOST.items():
        mine = [question for question in asked if question.kind == kind]
        chosen += [mine[k] for k in rng.permutation(len(mine))[:most]]
    for k in rng.permutation(len(chosen)):
        yield wording(chosen[k]), chosen[k].answer


def conversation(
    tokenizer: Words, image_tokens: int, pairs: Iterator[tuple[str, str]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [length] of a conversation, and bool [length], True at the ids that are to be said; 0 and False behind its end.

    A round that does not fit is left out with all that would follow.
    """
    ids = [tokenizer.start, *[tokenizer.image_token] * image_tokens]
    said = [False] * len(ids)
    for question, answer in pairs:
        asked, spoken = tokenizer.encode(question), [*tokenizer.encode(answer), *tokenizer.stop]
        if len(ids) + len(asked) + len(spoken) > length:
            break
        ids += asked + spoken
        said += [False] * len(asked) + [True] * len(spoken)
        if length - len(ids) < _UNTIL:
            break
    missing = length - len(ids)
    return np.array(ids + [0] * missing, np.int32), np.array(said + [False] * missing)


def conversations(
    tokenizer: Words,
    image_tokens: int,
    split: str,
    scenes: range,
    config: SceneConfig,
    length: int,
    each: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Conversations about scenes.

    Args:
      tokenizer: Of the model.
      image_tokens: Visual tokens of a picture.
      split: Of the scenes.
      scenes: Their numbers.
      config: Which scenes are drawn; only their classes are named as absent.
      length: Tokens of a conversation, those of the picture included.
      each: Conversations about each scene.
      seed: Of what is asked.

    Returns:
      `scene` int32 [n], its place in the range; `ids` int32 [n, length] and `said` bool [n, length] of `conversation`.
    """
    rows: dict[str, list] = {"scene": [], "ids": [], "said": []}
    for place, index in enumerate(scenes):
        scene = sample_scene(split, index, config)
        for turn in range(each):
            rng = np.random.default_rng([seed, index, turn])
            pairs = rounds(scene, config.class_names, rng)
            ids, said = conversation(tokenizer, image_tokens, pairs, length)
            for name, value in (("scene", np.int32(place)), ("ids", ids), ("said", said)):
                rows[name].append(value)
    return {name: np.stack(values) for name, values in rows.items()}


def talk_loss(module: Llava) -> Callable:
    """The loss for `jaxsem.training`: the cross-entropy of what is to be said.

    Args:
      module: The model.

    Returns:
      loss_fn(params, batch, rng) -> (loss, metrics), for batches of `conversations`, and parameters `projector` and `language`,
      merged with the frozen `tokens` [scenes, n, width] of the tower. Of the metrics, `right` is the share of tokens that are the
      likeliest.
    """

    def logits_of(model: Llava, ids: jax.Array, tokens: jax.Array) -> jax.Array:
        return model(ids, model.project(tokens))

    def loss_fn(params: Any, batch: dict[str, jax.Array], rng: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        del rng
        ids, said = batch["ids"], batch["said"]
        tokens = params["tokens"][batch["scene"]].astype(jnp.float32)
        parts = {name: params[name] for name in ("projector", "language")}
        # Behind the end of a conversation there are zeros, which nothing before them sees.
        logits = module.apply({"params": parts}, ids[:, :-1], tokens, method=logits_of)
        wanted, counts = ids[:, 1:], said[:, 1:].astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
        total = counts.sum()
        right = (logits.argmax(axis=-1) == wanted) * counts
        return -(picked * counts).sum() / total, {"right": right.sum() / total}

    return loss_fn


def talk_evaluation(module: Llava, rows: dict[str, np.ndarray], tokens: np.ndarray, batch: int = 64) -> Callable:
    """An evaluation for `jaxsem.training`: `loss` and `right` of `talk_loss` on other scenes, whose tokens are given."""
    loss_fn = talk_loss(module)
    measure = jax.jit(lambda params, part: loss_fn(params, part, None))
    whole = len(rows["scene"]) // batch * batch

    def eval_fn(params: Any) -> dict[str, float]:
        params = {**params, "tokens": tokens}
        found = []
        for start in range(0, whole, batch):
            loss, metrics = measure(params, {name: value[start : start + batch] for name, value in rows.items()})
            found.append((float(loss), float(metrics["right"])))
        loss, right = np.mean(found, axis=0)
        return {"loss": float(loss), "right": float(right)}

    return eval_fn
