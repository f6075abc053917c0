import json

import numpy as np
import pytest
from PIL import Image

from jaxsem.errors import InputError
from jaxsem.tasks import evaluate, read_examples

GOOD = [
    {"form": "caption", "image": "a.png", "references": ["A dog runs.", "a brown dog"]},
    {"form": "options", "image": "a.png", "text": "What runs?", "options": ["a dog", "a cat"], "answer": "a dog"},
    {"form": "yes_no", "image": "sub/b.jpg", "text": "Is there a cat?", "answer": "no", "category": "random"},
    {"form": "box", "image": "a.png", "text": "the dog", "box": [10, 5.5, 20.5, 20]},
    {"form": "few_shot", "image": "a.png", "answer": "dog", "support": [["sub/b.jpg", "dog"], ["a.png", "cat"]]},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # upright after a quarter turn
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "sub" / "b.jpg", exif=turned)
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    return tmp_path


def read(folder, lines):
    path = folder / "examples.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return read_examples(path, folder)


def changed(number, **fields):
    """One of GOOD with other fields; None takes one away."""
    line = {**GOOD[number], **fields}
    return {name: value for name, value in line.items() if value is not None}


def test_every_form_is_read(folder):
    caption, options, yes_no, box, few_shot = read(folder, GOOD)
    assert (caption.text, caption.references) == ("Describe the image.", ("A dog runs.", "a brown dog"))
    assert (options.options, options.answer) == (("a dog", "a cat"), "a dog")
    assert (yes_no.text, yes_no.answer, yes_no.category) == ("Is there a cat?", "no", "random")
    assert box.box == pytest.approx((0.25, 0.275, 0.5125, 1.0))
    assert [(picture.name, label) for picture, label in few_shot.support] == [("sub/b.jpg", "dog"), ("a.png", "cat")]


def test_pictures_are_paths_with_the_size_that_people_see(folder):
    examples = read(folder, GOOD)
    assert examples[0].picture.value == folder / "a.png"
    assert examples[0].picture.size == (20, 40)
    assert examples[2].picture.size == (50, 30)
    assert examples[0].picture is examples[1].picture


def test_they_can_be_evaluated(folder):
    class Yes:
        def answer(self, inputs, prompts):
            return ["yes" for _ in prompts]

    record = evaluate(Yes(), read(folder, GOOD))
    sizes = {row["image"]: row["bpp"] * row["width"] * row["height"] / 8 for row in record["images"]}
    assert sizes == pytest.approx({name: (folder / name).stat().st_size for name in ("a.png", "sub/b.jpg")})


def test_blank_lines_and_line_ends_of_windows_do_not_matter(folder):
    path = folder / "examples.jsonl"
    path.write_bytes(b"\r\n\r\n".join(json.dumps(line).encode() for line in GOOD) + b"\r\n \n")
    assert len(read_examples(path, folder)) == len(GOOD)


def test_a_box_that_passes_the_edge_by_a_pixel_is_cut(folder):
    [example] = read(folder, [changed(3, box=[-0.5, 0, 40.9, 20])])
    assert example.box == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[1, 2]", "instead of an object"),
        (b"null", "instead of an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"form": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'"\\ud800"', "instead of an object"),
        ({}, "'form' must be one of caption, options"),
        (changed(0, form="riddle"), "'riddle'"),
        (changed(0, form=["caption"]), "'form' must be"),
        (changed(0, references=None), "needs 'references'"),
        (changed(0, references=[]), "references"),
        (changed(0, references="A dog."), "list of texts"),
        (changed(0, references=["..."]), "each with words"),
        (changed(0, image=None), "needs 'image'"),
        (changed(0, image=7), "'image' must be a text"),
        (changed(0, image=""), "no path below"),
        (changed(0, image="../a.png"), "no path below"),
        (changed(0, image="/etc/passwd"), "no path below"),
        (changed(0, image="a\0.png"), "no path below"),
        (changed(0, image="\ud800"), "no path below"),
        (changed(0, image="x" * 5000), "cannot be read"),
        (changed(0, image="c.png"), "does not exist"),
        (changed(0, image="sub"), "cannot be read"),
        (changed(0, image="bad.png"), "no image"),
        (changed(0, image="cut.png"), "cut.png"),
        (changed(0, category=3), "'category' must be a text"),
        (changed(0, refernces=[]), "did you mean 'references'"),
        (changed(0, answer="x"), "has no 'answer'"),
        (changed(1, options=["a dog", "a dog"]), "different"),
        (changed(1, options={"a": 1}), "list of texts"),
        (changed(1, answer="B"), "none of the options"),
        (changed(1, text=" "), "needs a text"),
        (changed(2, answer=True), "'answer' must be a text"),
        (changed(2, answer="maybe"), "'yes' or 'no'"),
        (changed(3, box=[1, 2, 3]), "four numbers"),
        (changed(3, box=[1, 2, 3, "4"]), "four numbers"),
        (changed(3, box=[1, 2, True, 4]), "four numbers"),
        (changed(3, box=[0, 0, float("nan"), 4]), "four numbers"),
        (changed(3, box=[0, 0, 10**400, 4]), "four numbers"),
        (changed(3, box=[20, 5, 10, 20]), "within 40x20"),
        (changed(3, box=[0, 0, 80, 20]), "within 40x20"),
        (changed(3, box=[40.2, 0, 40.8, 20]), "within 40x20"),
        (changed(4, support=[["a.png"]]), "pairs of image and label"),
        (changed(4, support=[["a.png", 3]]), "list of texts"),
        (changed(4, support=[["a.png", "dog"]]), "two labels"),
        (changed(4, support=[["a.png", "dog"], ["c.png", "cat"]]), "does not exist"),
        (changed(4, answer="bird"), "none of the labels"),
    ],
)
def test_a_hostile_line_gives_one_sentence_with_its_number(folder, line, seen):
    with pytest.raises(InputError, match="line 3: ") as caught:
        read(folder, [GOOD[0], b"", line])
    message = str(caught.value)
    assert seen in message
    assert "\n" not in message
    assert len(message) < 6000 if "x" * 5000 in message else len(message) < 400


def test_a_file_without_examples_is_refused(folder):
    with pytest.raises(InputError, match="no examples"):
        read(folder, [b"", b" "])
    with pytest.raises(InputError, match="does not exist"):
        read_examples(folder / "none.jsonl", folder)
