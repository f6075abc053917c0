import pytest

from jaxsem.backbones.clip_inputs import tokenize
from jaxsem.data.scenes import captions, refer, sample_scene
from jaxsem.data.words import WordTokenizer
from jaxsem.errors import InputError

TOKENIZER = WordTokenizer()


def test_every_text_of_a_scene_comes_back():
    for index in range(200):
        scene = sample_scene("train", index)
        texts = [*captions(scene), *(phrase.text for phrases in refer(scene) for phrase in phrases)]
        for text, ids in zip(texts, TOKENIZER(texts)["input_ids"], strict=True):
            assert TOKENIZER.decode(ids) == text


def test_start_and_end_enclose_a_text():
    [ids] = TOKENIZER(["a red star"])["input_ids"]
    assert ids[0] == TOKENIZER.start
    assert ids[-1] == TOKENIZER.end == len(TOKENIZER) - 1
    assert len(ids) == 5


def test_case_and_a_full_stop_do_not_matter():
    assert TOKENIZER(["A Red star."]) == TOKENIZER(["a red star"])


def test_decoding_stops_at_the_end_and_leaves_out_padding():
    [[_, *ids]] = TOKENIZER(["a red star"])["input_ids"]
    assert TOKENIZER.decode([0, *ids, *ids]) == "a red star"


@pytest.mark.parametrize(
    ("text", "seen"), [("a red sta", "did you mean 'star'"), ("a dog 7", "'dog'"), ("zzz", "'zzz'")]
)
def test_an_unknown_word_is_refused(text, seen):
    with pytest.raises(InputError, match=seen):
        tokenize(TOKENIZER, text, 8)


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match="has 5 tokens"):
        tokenize(TOKENIZER, "a red star", 4)
