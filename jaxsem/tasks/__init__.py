"""Tasks for multimodal language models as data and scores, independent of any model and of what it sees.

    examples = scene_examples("test", range(500)) + few_shot_scenes("test", 500)
    record = evaluate(answerer, examples)                                   # the pictures as they are
    sent = transmit(examples, compress=lambda images: jaxsem.compress(codec, images))
    record = evaluate(another, sent, quality=2)                             # from the .jsem bytes of a codec's latents
    points = rate_score_points({"latents": [record, ...], "reconstruction": [...]})

The four tasks of Kao et al., Bridging compressed image latents and multimodal large language models (ICLR 2025), and
POPE: captions, questions with options, yes/no questions, referring expressions and few-shot classification. Examples come
from scenes, or from a JSONL file and a folder of images (`read_examples`), for COCO, SEED-Bench, POPE and RefCOCO.
"""

from jaxsem.tasks.examples import FORMS, Example, Picture, scene_examples, transmit
from jaxsem.tasks.few_shot import episodes, few_shot_examples, few_shot_scenes
from jaxsem.tasks.harness import Answerer, evaluate, rate_score_points
from jaxsem.tasks.jsonl import read_examples
from jaxsem.tasks.prompts import LLAVA, PLAIN, SHIKRA, Prompts, prompt_of

__all__ = [
    "FORMS",
    "LLAVA",
    "PLAIN",
    "SHIKRA",
    "Answerer",
    "Example",
    "Picture",
    "Prompts",
    "episodes",
    "evaluate",
    "few_shot_examples",
    "few_shot_scenes",
    "prompt_of",
    "rate_score_points",
    "read_examples",
    "scene_examples",
    "transmit",
]
