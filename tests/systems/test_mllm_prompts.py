"""The words around a question, and their tokens."""

import pytest

from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError
from jaxsem.systems.mllm_prompts import (
    TEMPLATES,
    Pretrained,
    Words,
    load_tokenizer,
    mistral,
    plain,
    vicuna,
    vicuna_bare,
)

WORDS = WordTokenizer(["what", "is", "red", "blue"])


def test_templates_are_those_of_the_published_models():
    assert vicuna_bare("What is it?") == "USER: <image>\nWhat is it? ASSISTANT:"
    assert mistral("What is it?") == "[INST] <image>\nWhat is it? [/INST]"
    assert vicuna("Why?").startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert vicuna("Why?").endswith(" the user's questions. USER: <image>\nWhy? ASSISTANT:")
    assert plain("what is it") == "<image> what is it"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_images_stay_where_the_question_has_them(template):
    assert "<image> is red\n<image> is" in template("<image> is red\n<image> is")
    assert template("<image> is").count("<image>") == 1


def test_words_have_the_image_among_them():
    words = Words(WORDS, 50)
    assert words.encode("what is <image> red<image>") == [2, 3, 50, 4, 50]
    assert words.decode([1, 2, 50, 3, 0]) == "what is"
    assert (words.start, words.stop) == (1, (8,))
    with pytest.raises(InputError, match="image_token=8 is a word's: give one from 9"):
        Words(WORDS, 8)


def made(**special):
    """A tokenizer of transformers with a few words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "<image>"]
    model = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<image>"], **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


def test_nothing_is_added_to_a_text(tmp_path):
    made().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 6)
    assert tokenizer.encode("a <image> b") == [4, 6, 5]
    assert tokenizer.decode([1, 4, 6, 5, 2]) == "a b"
    assert (tokenizer.start, tokenizer.stop) == (1, (2,))


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="<image> is 6, and the model's is 32000"):
        Pretrained(made(), 32000)
    with pytest.raises(InputError, match="no end of text"):
        Pretrained(made(eos_token=None), 6)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path, 6)
