"""Caption measures against values computed by hand, by pycocoevalcap, and by direct implementations of the formulas."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsem.errors import InputError
from jaxsem.metrics.captions import (
    DocumentFrequency,
    bleu,
    cider,
    cider_d,
    meteor,
    rouge_l,
    score_captions,
    stem,
    tokenize,
)

# Computed by pycocoevalcap 1.2 with Stanford CoreNLP 3.4.1 and Meteor 1.5 (-l en -norm -m "exact stem").
ITEMS = [
    (
        "A brown dog runs across the wet grass.",
        ["A dog is running over wet grass.", "The brown dog runs through a field."],
    ),
    (
        "Two people sit at a wooden table with drinks",
        ["Two people sitting at a table.", "A man and a woman drink coffee at a wooden table.", "people sit outside"],
    ),
    ("A man's hat is on the chair, isn't it?", ["The hat of a man lies on a chair."]),
    ("the the the the bus", ["A red bus drives down the street.", "The bus is on the road, and the driver waves."]),
    ("Three birds fly over the lake at 5:30 p.m.", ["Three birds fly over the lake at 5:30 p.m."]),
    (
        "A child in a t-shirt (blue) eats an ice-cream cone.",
        ["A small child wearing a blue t-shirt is eating ice cream.", "A boy eats ice-cream."],
    ),
    ("A plane", ["A large white plane is parked at the gate of an airport.", "A plane at an airport."]),
    (
        "Flowers in a vase next to a window with long white curtains and a cat that sleeps on the sill.",
        ["A vase of flowers by the window.", "A cat sleeping next to flowers."],
    ),
]
CANDIDATES, REFERENCES = [caption for caption, _ in ITEMS], [texts for _, texts in ITEMS]
PUBLISHED = {
    "bleu_1": 0.6578947368334487,
    "bleu_2": 0.461354849554756,
    "bleu_3": 0.3285788787295938,
    "bleu_4": 0.2616286348075143,
    "meteor": 0.33953223653326675,
    "rouge_l": 0.53725681048746,
    "cider_d": 2.307048716701803,
}
PUBLISHED_METEOR = [0.319303130, 0.412807652, 0.287375794, 0.159099998, 1.0, 0.312039651, 0.231597412, 0.319453142]
PUBLISHED_CIDER_D = [2.179946315, 1.854157318, 1.468614935, 0.961927405, 10.0, 0.599886119, 1.280390439, 0.111467203]

SMALL_WORDS = st.sampled_from(["red", "blue", "ring", "rings", "star", "stars", "two", "a"])
CAPTION = st.lists(SMALL_WORDS, min_size=1, max_size=8).map(" ".join)
ITEM = st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3))
CORPUS = st.lists(ITEM, min_size=1, max_size=5)
few = settings(max_examples=40, deadline=None)


def split(items):
    return [caption for caption, _ in items], [texts for _, texts in items]


# -- agreement with the published implementation -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_corpus_scores_what_pycocoevalcap_gives(name):
    assert score_captions(CANDIDATES, REFERENCES)[name] == pytest.approx(PUBLISHED[name], abs=1e-12)


def test_single_captions_score_what_pycocoevalcap_gives():
    np.testing.assert_allclose(cider_d(CANDIDATES, REFERENCES), PUBLISHED_CIDER_D, atol=1e-9)
    alone = [meteor([caption], [texts]) for caption, texts in ITEMS]
    np.testing.assert_allclose(alone, PUBLISHED_METEOR, atol=1e-9)


def test_all_measures_are_those_of_the_single_functions():
    found = score_captions(CANDIDATES, REFERENCES)
    expected = {f"bleu_{order}": value for order, value in enumerate(bleu(CANDIDATES, REFERENCES), 1)}
    expected["meteor"] = meteor(CANDIDATES, REFERENCES)
    for name, measure in (("rouge_l", rouge_l), ("cider", cider), ("cider_d", cider_d)):
        expected[name] = measure(CANDIDATES, REFERENCES).mean()
    assert found == expected


# Left: a text; right: what Stanford's PTBTokenizer 3.4.1 and the removal of punctuation leave of it.
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog can't run; they're sleeping", "a man 's dog ca n't run they 're sleeping"),
        ('The "quick" fox -- it jumped 3.5 fences, 1,000 logs!', "the quick fox it jumped 3.5 fences 1,000 logs"),
        ("I don't; won't, isn't cannot gonna 'twas", "i do n't wo n't is n't can not gon na 't was"),
        ("U.S. troops and Mr. Smith's e-mail at 5:30pm", "u.s. troops and mr. smith 's e-mail at 5:30 pm"),
        ("a black-and-white dog/cat & t-shirt $5.00 50% #1", "a black-and-white dog/cat & t-shirt $ 5.00 50 % # 1"),
        ("He said, 'hello there' and left...", "he said hello there and left"),
        ("a bus (number [7]) at&t x_y * + =", "a bus -lrb- number -lsb- 7 -rsb- -rrb- at&t x_y * + ="),
        ("the dogs' bowls; John’s “smart quotes” – dash — em…", "the dogs bowls john 's smart quotes dash em"),
        ("10-year-old 20th 1990s '90s 3-D 747-400 3.5-inch", "10-year-old 20th 1990s '90s 3-d 747-400 3.5-inch"),
        ("café naïve o'clock rock 'n' roll ma'am", "café naïve o'clock rock 'n' roll ma'am"),
        ("what?! no!! wow? ok. --- - ...", "what ?! no !! wow ok"),
        ("shouldn't've dogs’ it’s let's", "should n't 've dogs it 's let 's"),
        ("No. 7 but no. Multiple   spaces\ttabs\n", "no. 7 but no multiple spaces tabs"),
        ("http://example.com/a?b=c and foo@bar.com @home", "http://example.com/a?b=c and foo@bar.com @home"),
    ],
)  # fmt: skip
def test_words_are_those_of_the_treebank_tokenizer(text, words):
    assert tokenize(text) == words.split()


# From the sample vocabulary that Snowball publishes with its English stemmer.
@pytest.mark.parametrize(
    ("expected", "forms"),
    [
        ("consign", "consign consigned consigning consignment"),
        ("consist", "consist consisted consistency consistent consistently consisting consists"),
        ("consol", "consolation consolations console consoled consoles consoling consolingly consols"),
        ("consolid", "consolidate consolidated consolidating"),
        ("consolatori", "consolatory"),
        ("conspicu", "conspicuous conspicuously"),
        ("conspir", "conspirator conspirators conspire conspired conspiring"),
        ("constanc", "constance constancy"),
        ("knackeri", "knackeries"),
        ("knavish", "knavish"),
        ("knead", "kneaded kneading"),
        ("kneel", "kneel kneeled kneeling kneels"),
        ("knive", "knives"),
        ("knight", "knight knightly knights"),
        ("knit", "knit knits knitted knitting"),
        ("knocker", "knocker knockers"),
        ("knot", "knot knots"),
        ("sky", "sky skies"),
        ("die", "dying"),
        ("earli", "early"),
        ("inning", "inning innings"),
        ("generous", "generous generously"),
        ("hope", "hoping hoped hope"),
        ("hop", "hopping hopped hop"),
        ("tie", "ties tied"),
        ("gas", "gas"),
        ("gap", "gaps"),
        ("kiwi", "kiwis"),
        ("relat", "relational relate"),
        ("adjust", "adjustable adjustment"),
        ("say", "say says"),
        ("youth", "youthful youth"),
    ],
)
def test_stems_are_those_of_porters_second_algorithm(expected, forms):
    assert {stem(form) for form in forms.split()} == {expected}


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    # "a red star and a ring": all 6 words, 4 of 5 pairs, 3 of 4 triples, 2 of 3 quadruples are in the reference of 7
    # words.
    found = bleu(["a red star and a ring"], [["a red star and a blue ring"]])
    precisions, brevity = [1, 4 / 5, 3 / 4, 2 / 3], math.exp(1 - 7 / 6)
    expected = [brevity * math.prod(precisions[:order]) ** (1 / order) for order in (1, 2, 3, 4)]
    assert found == pytest.approx(expected, abs=1e-8)


def test_bleu_counts_a_word_as_often_as_one_reference_has_it():
    # The example of the paper: 2 of 7, as no reference has "the" more than twice.
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    assert bleu(["the the the the the the the"], references)[0] == pytest.approx(2 / 7, abs=1e-8)


@pytest.mark.parametrize(("lengths", "brevity"), [((4, 6), 1.0), ((6, 9), math.exp(1 - 6 / 5)), ((2, 9), 1.0)])
def test_bleu_takes_the_reference_closest_in_length_and_the_shorter_of_two(lengths, brevity):
    texts = ["abcdefghi"[:length] for length in lengths]
    matched = min(5, max(lengths))
    found = bleu(["a b c d e"], [[" ".join(text) for text in texts]])[0]
    assert found == pytest.approx(brevity * matched / 5, abs=1e-8)


def test_bleu_adds_up_a_corpus_before_it_divides():
    # 1 of 1 and 0 of 3 words make 1/4, not the mean of 1 and 0.
    assert bleu(["ring", "a red star"], [["ring"], ["two blue hearts"]])[0] == pytest.approx(1 / 4, abs=1e-8)


def test_rouge_l_by_hand():
    # The longest common subsequence is all 6 words: P = 1, R = 6/7.
    expected = (1 + 1.44) * (6 / 7) / (6 / 7 + 1.44)
    assert rouge_l(["a red star and a ring"], [["a red star and a blue ring"]]).tolist() == [pytest.approx(expected)]
    # "star ring" is in order in the first reference only; the second has the better recall with "ring" alone: P = 1, R
    # = 1.
    assert rouge_l(["star ring"], [["star and a ring", "ring"]]).tolist() == [pytest.approx(1.0)]


def test_cider_by_hand():
    # Every n-gram is in one of two items, so all weights are ln 2 and cancel.
    references = [["red star"], ["blue ring"]]
    # Equal: cosine 1 for words and for pairs, none for the longer: 10 (1 + 1 + 0 + 0) / 4.
    # "red ring" and "blue ring" share one of two words and no pair: 10 (1/2) / 4.
    assert cider(["red star", "red ring"], references).tolist() == [pytest.approx(5), pytest.approx(1.25)]
    # "red red" is (2, 0), "red star" (1, 1): 2 / (2 sqrt 2); clipped to one "red": 1 / (2 sqrt 2).
    assert cider(["red red", "."], references).tolist() == [pytest.approx(10 / 4 / math.sqrt(2)), 0]
    assert cider_d(["red red", "."], references).tolist() == [pytest.approx(10 / 4 / math.sqrt(8)), 0]


def test_cider_d_halves_what_differs_in_length_as_a_gaussian_does():
    references = [["red star"], ["blue ring"]]
    longer = "red star p q r s t u"  # 6 words more
    plain, damped = (measure([longer, "."], references)[0] for measure in (cider, cider_d))
    # Nothing is clipped here, so only the factor remains.
    assert damped == pytest.approx(plain * math.exp(-(6**2) / (2 * 6**2)))


def test_cider_with_given_document_frequencies():
    # "a" is in all 4 items and weighs nothing; "star" is in 1 of them, an unknown word counts as if it were.
    frequency = DocumentFrequency({("a",): 4, ("star",): 1, ("red",): 2}, 4)
    # Words (a, red, star) weigh (0, ln 2, ln 4), "ring" ln 4: cosine of (1, 2, 0) and (1, 0, 2) is 1/5; pairs share "a
    # red" of two equal ones: 1/2. The rest shares nothing.
    found = cider(["a red star"], [["a red ring"]], frequency=frequency)
    assert found.tolist() == [pytest.approx(10 * (1 / 5 + 1 / 2) / 4)]
    references = [["a star"], ["a ring", "rings"]]
    counted = DocumentFrequency.of(references)
    assert (counted.items, counted.counts[("a",)], counted.counts[("a", "ring")]) == (2, 2, 1)
    np.testing.assert_array_equal(
        cider(["a star", "a"], references, frequency=counted), cider(["a star", "a"], references)
    )


def test_a_single_item_has_no_rare_words():
    assert cider_d(["a red star is here"], [["a red star is here"]]).tolist() == [0]


def test_meteor_by_hand():
    # All 6 words match in 2 chunks; "a" and "and" are function words and weigh 1/4, the others 3/4: P = 3/3, R =
    # 3/3.75.
    expected = 0.8 / (0.85 + 0.15 * 0.8) * (1 - 0.6 * (2 / 6) ** 0.2)
    assert meteor(["a red star and a ring"], [["a red star and a blue ring"]]) == pytest.approx(expected)


def test_meteor_counts_stems_for_less():
    # Two matches by stem, in one chunk that leaves no word over: P = R = 0.6, no penalty.
    assert meteor(["running dogs"], [["run dog"]]) == pytest.approx(0.6)
    # With an exact match between, P = R = (0.6 + 1 + 0.6) / 4 and 3 matches in one chunk.
    expected = 2.2 / 4 * (1 - 0.6 * (1 / 3) ** 0.2)
    assert meteor(["running red dogs here"], [["run red dog everywhere"]]) == pytest.approx(expected)


def test_meteor_takes_the_reference_that_scores_best():
    assert meteor(["red star"], [["a blue ring", "red star", "red"]]) == 1
    assert meteor(["red star"], [["green cross", "heart"]]) == 0


def test_meteor_adds_up_a_corpus_before_it_divides():
    # Half of the four content words match, in no chunk that counts: P = R = 1/2, the mean of 1 and 0 only by chance ...
    assert meteor(["red star", "blue ring"], [["red star"], ["green cross"]]) == pytest.approx(0.5)
    # ... and with a longer second caption P = 2/5 and R = 2/4.
    expected = 0.4 * 0.5 / (0.85 * 0.4 + 0.15 * 0.5)
    assert meteor(["red star", "large blue ring"], [["red star"], ["green cross"]]) == pytest.approx(expected)


# -- direct implementations of the formulas ----------------------------------------------------------------------------


def runs(words, order):
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def direct_bleu(captions, references):
    found = [1.0] * 4
    lengths = [len(caption.split()) for caption in captions]
    closest = [
        sorted((abs(len(text.split()) - length), len(text.split())) for text in texts)[0][1]
        for length, texts in zip(lengths, references)
    ]
    for order in (1, 2, 3, 4):
        good = total = 0
        for caption, texts in zip(captions, references):
            mine = runs(caption.split(), order)
            total += len(mine)
            for gram in set(mine):
                good += min(mine.count(gram), max(runs(text.split(), order).count(gram) for text in texts))
        for above in range(order - 1, 4):
            found[above] *= (good + 1e-15) / (total + 1e-9)
    brevity = min(1.0, math.exp(1 - sum(closest) / sum(lengths)))
    return [brevity * product ** (1 / order) for order, product in enumerate(found, 1)]


def direct_cider(captions, references, deltas):
    """With dense vectors; `deltas` for CIDEr-D."""
    scores = np.zeros(len(captions))
    for order in (1, 2, 3, 4):
        grams = {gram for text in [*captions, *itertools.chain(*references)] for gram in runs(text.split(), order)}
        grams = sorted(grams)
        having = [sum(any(gram in runs(t.split(), order) for t in texts) for texts in references) for gram in grams]
        weight = np.log(len(references)) - np.log(np.maximum(having, 1))
        for item, (caption, texts) in enumerate(zip(captions, references)):
            for text in texts:
                a, b = (np.array([runs(t.split(), order).count(g) for g in grams]) * weight for t in (caption, text))
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                value = (np.minimum(a, b) if deltas else a) @ b / norm if norm > 0 else 0
                if deltas:
                    value *= np.exp(-((len(caption.split()) - len(text.split())) ** 2) / 72)
                scores[item] += 10 * value / 4 / len(texts)
    return scores


def direct_rouge(caption, texts):
    words = caption.split()
    subsequences = {
        tuple(words[i] for i in picked)
        for count in range(len(words) + 1)
        for picked in itertools.combinations(range(len(words)), count)
    }
    precisions, recalls = [], []
    for text in texts:
        other = text.split()
        theirs = {c for count in range(len(other) + 1) for c in itertools.combinations(other, count)}
        longest = max(map(len, subsequences & theirs))
        precisions.append(longest / len(words))
        recalls.append(longest / len(other))
    p, r = max(precisions), max(recalls)
    return (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p * r else 0.0


def direct_meteor(caption, text):
    """Over all alignments there are: those that cover most, then those of fewest chunks."""
    a, b = caption.split(), text.split()
    options = [[None, *(i for i, word in enumerate(a) if stem(word) == stem(other))] for other in b]
    best = None
    for choice in itertools.product(*options):
        taken = [(i, j) for j, i in enumerate(choice) if i is not None]
        if len({i for i, _ in taken}) < len(taken):
            continue
        cover = sum(1.0 if a[i] == b[j] else 0.5 for i, j in taken)
        chunks = sum((i - 1, j - 1) not in taken for i, j in taken)
        if best is None or (cover, -chunks) > best[:2]:
            best = cover, -chunks, taken
    _, chunks, taken = best
    if not taken:
        return 0.0
    weigh = lambda word: 0.25 if word in ("a", "two") else 0.75  # noqa: E731
    credit = [1.0 if a[i] == b[j] else 0.6 for i, j in taken]
    p = sum(c * weigh(a[i]) for c, (i, _) in zip(credit, taken)) / sum(map(weigh, a))
    r = sum(c * weigh(b[j]) for c, (_, j) in zip(credit, taken)) / sum(map(weigh, b))
    mean = p * r / (0.85 * p + 0.15 * r)
    return mean if len(taken) == len(a) == len(b) and chunks == -1 else mean * (1 - 0.6 * (-chunks / len(taken)) ** 0.2)


@few
@given(CORPUS)
def test_bleu_and_cider_are_their_formulas(items):
    captions, references = split(items)
    np.testing.assert_allclose(bleu(captions, references), direct_bleu(captions, references), rtol=1e-6, atol=1e-12)
    for measure, deltas in ((cider, False), (cider_d, True)):
        np.testing.assert_allclose(
            measure(captions, references), direct_cider(captions, references, deltas), rtol=1e-9, atol=1e-9
        )


@few
@given(ITEM)
def test_rouge_l_is_its_formula(item):
    caption, texts = item
    assert rouge_l([caption], [texts])[0] == pytest.approx(direct_rouge(caption, texts))


SHORT = st.lists(SMALL_WORDS, min_size=1, max_size=5).map(" ".join)


@few
@given(SHORT, SHORT)
def test_meteor_is_its_formula_over_all_alignments(caption, text):
    # Equally good alignments may differ in which words match by stem, and so, rarely, in the score.
    found, expected = meteor([caption], [[text]]), direct_meteor(caption, text)
    assert found == pytest.approx(expected, abs=1e-9 if stems_are_unique(caption, text) else 0.1)


def stems_are_unique(*texts):
    return all(len({stem(word) for word in text.split()}) == len(set(text.split())) for text in texts)


# -- properties --------------------------------------------------------------------------------------------------------


@few
@given(CORPUS)
def test_scores_stay_in_their_ranges(items):
    for name, value in score_captions(*split(items)).items():
        assert 0 <= value <= (10 if name.startswith("cider") else 1) + 1e-9, name


@few
@given(CORPUS, st.randoms(use_true_random=False))
def test_the_order_of_items_and_of_references_does_not_matter(items, random):
    expected = score_captions(*split(items))
    mixed = random.sample(items, len(items))
    assert score_captions(*split(mixed)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    mixed = [(caption, random.sample(texts, len(texts))) for caption, texts in mixed]
    found = score_captions(*split(mixed))
    del found["meteor"], expected["meteor"]  # takes the first of equally good references, as Meteor does
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@few
@given(st.lists(st.lists(SMALL_WORDS, min_size=4, max_size=8).map(" ".join), min_size=2, max_size=5, unique=True))
def test_a_caption_equal_to_its_reference_has_the_maximum(texts):
    # Each ends in words of its own, or its n-grams could be in all items and weigh nothing.
    texts = [f"{text} w{i} x{i} y{i} z{i}" for i, text in enumerate(texts)]
    for name, value in score_captions(texts, [[text] for text in texts]).items():
        assert value == pytest.approx(10 if name.startswith("cider") else 1, abs=1e-6), name


def test_captions_score_less_the_more_of_their_words_are_wrong():
    text = "two small red stars and a large blue ring on a grey background"
    words = text.split()
    other = "a green cross above an orange heart"
    scores = []
    for wrong in (0, 1, 3, 6, 9):
        caption = " ".join([*words[: len(words) - wrong], *(f"wrong{i}" for i in range(wrong))])
        scores.append(score_captions([caption, other], [[text], [other]]))
    for name in scores[0]:
        values = [score[name] for score in scores]
        assert all(more > less for more, less in itertools.pairwise(values)), (name, values)


def test_one_reference_more_never_lowers_meteor_and_rouge_l():
    for caption, texts in ITEMS:
        for measure in (meteor, lambda *item: rouge_l(*item)[0]):
            scores = [measure([caption], [texts[:count]]) for count in range(1, len(texts) + 1)]
            assert scores == sorted(scores)


def test_a_caption_without_words_scores_nothing():
    found = score_captions(["...", ""], [["a red star is here"], ["two blue rings are there"]])
    assert max(found.values()) < 1e-4
    assert (found["meteor"], found["rouge_l"], found["cider"], found["cider_d"]) == (0, 0, 0, 0)


@few
@given(st.text(max_size=40))
def test_any_text_has_words_in_lower_case_without_spaces(text):
    for word in tokenize(text):
        assert word == word.lower()
        assert word.split() == [word]
        assert word not in {".", ",", "?", "!", ":", ";", "-", "--", "...", "'", "''", "`", "``"}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [score_captions, bleu, cider, cider_d, meteor, rouge_l])
@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([], [], "there are no candidates"),
        (["a star"], [], "there are 1 captions, but references for 0"),
        (["a star"], [["a star"], ["a ring"]], "there are 1 captions, but references for 2"),
        (["a star", "a ring"], [["a star"], []], "there are no references of item 1"),
        (["a star"], [["a star", "?"]], "a reference of item 0 has no words"),
        ("a star", [["a star"]], "candidates must be a list of texts, but are the one text 'a star'"),
        (["a star"], ["a star"], "references of item 0 must be a list of texts, but are the one text"),
        (["a star"], "a", "references are one list of texts for each caption"),
        ([7], [["a star"]], "candidates must be texts, but one is 7"),
    ],
)
def test_what_cannot_be_scored_is_refused(measure, captions, references, message):
    with pytest.raises(InputError, match=message) as raised:
        measure(captions, references)
    assert "\n" not in str(raised.value)


def test_impossible_document_frequencies_are_refused():
    with pytest.raises(InputError, match="cannot occur in 3 of 2 items"):
        DocumentFrequency({("a",): 3}, 2)
    with pytest.raises(InputError, match="need a list of references for each item"):
        DocumentFrequency.of([])
