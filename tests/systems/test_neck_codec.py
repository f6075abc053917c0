"""A codec with a neck, and the language model that reads its files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from toy_neck import NECK, language, with_toy_neck

import jaxsem
from jaxsem import tasks
from jaxsem.backbones.llava import Llava
from jaxsem.container import unpack
from jaxsem.errors import InputError, WeightsError
from jaxsem.pipeline import decode_latents
from jaxsem.systems import neck_codec
from jaxsem.systems.mllm_files import save_mllm
from jaxsem.systems.neck_codec import Reader, save_neck_codec, with_neck

QUESTIONS = ["Is there a red star in the image?", "Describe the image."]


@pytest.fixture(scope="module")
def codec(tiny_codec):
    return with_toy_neck(tiny_codec)


@pytest.fixture(scope="module")
def model():
    return language()


@pytest.fixture(scope="module")
def files(codec, noise_photo):
    return jaxsem.compress(codec, [noise_photo(64, 64, seed) for seed in range(3)])


# -- reading --------------------------------------------------------------------------------------------------------------


def test_latents_are_those_that_the_image_is_decoded_from(codec, noise_photo):
    photo = noise_photo(64, 48)
    for quality in (0, 1):
        [file] = jaxsem.compress(codec.at_quality(quality), [photo])
        [latent] = decode_latents(codec, unpack(file).items)
        assert latent.shape == (4, 3, 16)
        [image] = jaxsem.decompress(codec, [jaxsem.compress(codec.at_quality(quality), [noise_photo(64, 64)])[0]])
        [whole] = decode_latents(
            codec, unpack(jaxsem.compress(codec.at_quality(quality), [noise_photo(64, 64)])[0]).items
        )
        x = codec.module.apply({"params": codec.params}, whole[None], method=lambda m, y: m.g_s(y))[0]
        np.testing.assert_allclose(np.clip(x, 0, 1) * 255, image, atol=0.51)


def test_answers_are_those_of_the_tokens_behind_the_neck(codec, model, files):
    reader = Reader(codec, model)
    latents = np.stack(decode_latents(codec, [unpack(file).items[0] for file in files]))
    before = codec.neck.apply({"params": codec.neck_params}, latents)
    tokens = model.module.apply({"params": model.params}, before, 2, method="tokens_after")
    asked = [QUESTIONS[0]] * 3
    expected = model.answer([np.asarray(row) for row in tokens], asked, max_new_tokens=4)
    assert reader.answer(files, asked, max_new_tokens=4) == expected
    options = [["yes", "no"]] * 3
    np.testing.assert_allclose(
        reader.score(files, asked, options), model.score([np.asarray(row) for row in tokens], asked, options), atol=1e-4
    )


def test_a_file_that_is_asked_several_questions_is_decoded_once(codec, model, files, monkeypatch):
    seen = []
    monkeypatch.setattr(
        neck_codec, "decode_latents", lambda codec, items: (seen.append(len(items)), decode_latents(codec, items))[1]
    )
    assert (
        len(Reader(codec, model).answer([files[0], files[1], files[0]], [*QUESTIONS, QUESTIONS[1]], max_new_tokens=2))
        == 3
    )
    assert seen == [2]


def test_the_harness_asks_files(codec, model):
    examples = tasks.scene_examples("test", range(2), size=64, kinds=("yes_no", "options"))
    sent = tasks.transmit(examples, lambda images: jaxsem.compress(codec, images))
    record = tasks.evaluate(Reader(codec, model), sent, prompts=tasks.PLAIN)
    [row] = record["results"]
    assert 0 <= row["yes_no_accuracy"] <= 1
    assert 0 <= row["options_accuracy"] <= 1
    bits = {example.picture.name: example.picture.bits for example in sent}
    assert row["bpp"] == pytest.approx(np.mean(list(bits.values())) / 64**2)


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(codec, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("neck")
    save_neck_codec(codec, folder / "neck.safetensors", "elic", {"note": "toy"})
    save_mllm(model, folder / "words.safetensors", {})
    return folder


def test_saving_and_loading_changes_nothing(saved, codec, model, tiny_codec, files):
    again = jaxsem.load(str(saved / "neck.safetensors"), quality=codec.quality)
    assert again.digest == tiny_codec.digest  # the neck is no part of it: it only reads
    assert (again.neck.config, again.scenario) == (NECK, "d2")
    reread = jaxsem.load_mllm(saved / "words.safetensors")
    assert reread.module.config == model.module.config
    asked = [QUESTIONS[1]] * 3
    for one, other in ((again.neck_params, codec.neck_params), (reread.params, model.params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), one, other)
    assert len(Reader(again, reread).answer(files, asked, max_new_tokens=2)) == 3


def test_codecs_and_language_models_are_told_apart(saved):
    with pytest.raises(WeightsError, match=r"jaxsem\.load_mllm"):
        jaxsem.load(str(saved / "words.safetensors"))
    with pytest.raises(WeightsError, match="no language model"):
        jaxsem.load_mllm(saved / "neck.safetensors")
    with pytest.raises(InputError, match="takes no weights"):
        jaxsem.load_mllm(saved / "words.safetensors", weights="int8")


@pytest.mark.parametrize("change", [{"scenario": "d4"}, {"neck": {}}, {"codec": None}])
def test_a_damaged_record_is_refused(saved, change):
    from jaxsem.weights.native import read_weights

    file = read_weights(saved / "neck.safetensors")
    with pytest.raises(WeightsError):
        neck_codec.split_file("toy", dataclasses.replace(file, config={**file.config, **change}))


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_a_codec_without_a_neck_is_refused(tiny_codec, model):
    with pytest.raises(InputError, match="no transform-neck: decompress"):
        Reader(tiny_codec, model)


def test_a_neck_for_another_codec_is_refused(tiny_codec):
    with pytest.raises(InputError, match="20 channels, and this latent has 16"):
        with_neck(tiny_codec, dataclasses.replace(NECK, latent=20), {}, "d1")


def test_another_visual_encoder_is_refused(codec):
    with pytest.raises(InputError, match=r"layers 3 \(the model has 4\)"):
        Reader(codec, language(layers=4))


def test_a_neck_that_enters_behind_the_tokens_that_are_taken_is_refused(codec, model):
    early = dataclasses.replace(model, module=Llava(dataclasses.replace(model.module.config, feature_layer=1)))
    with pytest.raises(InputError, match="takes its tokens after 1"):
        Reader(codec, early)


def test_files_of_other_weights_and_far_sizes_are_refused(codec, model, noise_photo):
    reader = Reader(codec, model)
    [large] = jaxsem.compress(codec, [noise_photo(64, 192)])
    with pytest.raises(InputError, match="64x192 pixels"):
        reader.answer([large], QUESTIONS[:1])
    other = dataclasses.replace(codec, digest=b"x" * 32)
    [foreign] = jaxsem.compress(other, [noise_photo(64, 64)])
    with pytest.raises(WeightsError, match="was made with weights"):
        reader.answer([foreign], QUESTIONS[:1])


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(files, tmp_path):
    path = tmp_path / "scene.jsem"
    path.write_bytes(files[0])
    return path


@pytest.fixture
def ask(command, saved):
    def run(*arguments):
        return command("ask", *arguments, "--model", saved / "words.safetensors")

    return run


def test_ask_reads_a_file_through_the_neck(ask, file, saved, codec, model, files):
    status, out, err = ask(file, *QUESTIONS, "--weights", saved / "neck.safetensors", "--json", "--max-tokens", 3)
    assert status == 0, err
    record = json.loads(out)
    assert record["path"] == "neck"
    assert [row["question"] for row in record["answers"]] == QUESTIONS


def test_ask_decodes_the_image_if_told(ask, file, saved):
    status, out, _ = ask(
        file, QUESTIONS[0], "--weights", saved / "neck.safetensors", "--json", "--reconstruct", "--max-tokens", 2
    )
    assert (status, json.loads(out)["path"]) == (0, "reconstruction")


def test_ask_chooses_among_options(ask, file, saved):
    status, out, _ = ask(file, QUESTIONS[0], "--weights", saved / "neck.safetensors", "--options", "yes", "no")
    assert status == 0
    assert out.decode().strip() in ("yes", "no")


def test_ask_takes_a_picture(ask, tmp_path, noise_photo):
    from jaxsem.data.images import write_image

    write_image(tmp_path / "photo.png", noise_photo(80, 60))
    status, out, _ = ask(tmp_path / "photo.png", QUESTIONS[0], "--json", "--max-tokens", 2)
    assert (status, json.loads(out)["path"]) == (0, "image")


@pytest.mark.parametrize(
    ("question", "words"),
    [(" ", "a question is empty"), ("is there a unicorn", "'unicorn'"), ("is there " * 120, "shorten it")],
)
def test_ask_refuses_what_it_cannot_ask(ask, file, saved, question, words):
    status, out, err = ask(file, question, "--weights", saved / "neck.safetensors")
    assert (status, out) == (2, b"")
    assert words in err
    assert err.count("\n") == 1


def test_ask_refuses_a_file_without_a_codec(ask, file):
    status, _, err = ask(file, QUESTIONS[0])
    assert status == 2
    assert "--preset or --weights" in err


def test_complexity_prints_the_published_table(command):
    status, out, _ = command("complexity", "--json")
    record = json.loads(out)
    rows = {row["name"].split(" (")[0]: row for row in record["parts"] if row["published"]}
    assert status == 0
    assert [row["parameters"] for row in rows.values()] == [13_191_168, 7_337_475, 31_037_763, 26_060_800]
    assert rows["transform-neck"]["kmac"] == pytest.approx(52.69, rel=0.005)
    assert record["ratio"] == pytest.approx(20.8, abs=0.05)
    status, out, _ = command("complexity")
    assert "13,191,168" in out.decode()
