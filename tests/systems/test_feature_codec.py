import dataclasses
import json

import jax
import numpy as np
import pytest
from toy_clip import SIZE, WIDTH
from toy_features import RATES, toy_codec

import jaxsem
from jaxsem.container import Item, pack, unpack
from jaxsem.entropy.indices import FixedLength
from jaxsem.errors import FormatError, InputError, WeightsError
from jaxsem.systems import feature_files
from jaxsem.systems.feature_codec import features_of
from jaxsem.weights.native import read_weights


@pytest.fixture(scope="module")
def codec():
    return toy_codec()


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(5)
    return [random.integers(0, 256, (SIZE + k, SIZE + 3, 3), np.uint8) for k in range(5)]


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(6)
    return random.standard_normal((7, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("quality", [0, 1])
def test_what_is_decoded_is_what_the_indices_mean(codec, features, quality):
    at = codec.at_quality(quality)
    np.testing.assert_array_equal(at.decode(at.encode(features)), at.features(at.indices(features)))


def test_decoded_features_are_unit(codec, features):
    np.testing.assert_allclose(np.linalg.norm(codec.decode(codec.encode(features)), axis=1), 1.0, rtol=1e-5)


def test_packets_of_mixed_qualities_decode_together(codec, features):
    packets = [codec.at_quality(k % 2).encode(features[k : k + 1])[0] for k in range(len(features))]
    decoded = codec.decode(packets)
    for k, packet in enumerate(packets):
        np.testing.assert_allclose(decoded[k : k + 1], codec.decode([packet]), atol=1e-6)


def test_a_packet_does_not_depend_on_its_batch(codec, features):
    whole = codec.encode(features)
    assert whole == [codec.encode(features[k : k + 1])[0] for k in range(len(features))]


def test_fixed_length_takes_the_bytes_that_it_says(codec, features):
    # 10 indices of 3: 15.85 bits.
    assert {len(packet) for packet in codec.encode(features)} == {1 + 2}
    assert round(codec.level.bits, 2) == 15.85


def test_a_file_costs_eleven_bytes_beside_its_stream(codec, images):
    [file] = jaxsem.compress(codec, images[:1])
    assert len(file) == 10 + 1 + 2
    assert unpack(file).items[0].height == 0


def test_images_go_through_files_to_features(codec, images):
    files = jaxsem.compress(codec, images, batch=2)
    expected = codec.decode(codec.encode(codec.clip.encode_images(images)))
    np.testing.assert_allclose(jaxsem.read_features(codec, files), expected, atol=1e-6)


def test_the_estimate_is_that_of_the_coder(codec, images):
    [result] = jaxsem.compress_items(codec.at_quality(1), images[:1])
    assert (result.height, result.width) == images[0].shape[:2]
    packet = result.item.sections[0]
    assert result.estimated_bits / 8 - 1 < len(packet) - 1 < result.estimated_bits / 8 + 2


def test_a_feature_is_no_image(codec, images):
    files = jaxsem.compress(codec, images[:1])
    with pytest.raises(FormatError, match="holds a CLIP feature, no image"):
        jaxsem.decompress(codec, files)


def test_an_image_is_no_feature(codec):
    with pytest.raises(FormatError, match="an image of 4x5 where a feature is wanted"):
        features_of(codec, [Item(4, 5, {0: b"abc"})])


def test_a_file_of_other_weights_is_refused(codec, images):
    [file] = jaxsem.compress(codec, images[:1])
    other = dataclasses.replace(codec, digest=bytes(32))
    with pytest.raises(WeightsError, match="was made with weights"):
        jaxsem.read_features(other, [file])


@pytest.mark.parametrize("packet", [b"", b"\x00abc", b"\xa0ab", b"\x81ab"])
def test_a_packet_of_no_quality_is_refused(codec, packet):
    with pytest.raises(FormatError, match="qualities 0 to 1"):
        codec.decode([packet])


def test_damaged_packets_never_give_features_silently_of_another_length(codec, features):
    [packet] = codec.encode(features[:1])
    with pytest.raises(FormatError):
        codec.decode([packet + b"\0"])
    with pytest.raises(FormatError):
        codec.decode([packet[:-1]])


@pytest.mark.parametrize("quality", [-1, 2, 0.5])
def test_only_whole_qualities_are_there(codec, quality):
    with pytest.raises(InputError, match="whole qualities 0 to 1"):
        codec.at_quality(quality)


def test_only_exact_arithmetic_is_there(codec):
    assert codec.in_arithmetic("exact") is codec
    with pytest.raises(InputError, match="exact arithmetic only"):
        codec.in_arithmetic("float")


def test_features_that_cannot_be_coded_are_refused(codec, features):
    with pytest.raises(InputError, match=rf"\[images, {WIDTH}\]"):
        codec.encode(features[:, :-1])
    with pytest.raises(InputError, match="the first is number 2"):
        codec.encode(np.where(np.arange(7)[:, None] == 2, np.nan, features))


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "model.safetensors"
    feature_files.save_feature_codec(codec, path, {"date": "today"})
    return path


def test_a_saved_codec_comes_back_the_same(codec, features, saved):
    again = jaxsem.load(str(saved))
    assert again.digest == codec.digest
    assert again.at_quality(1).encode(features) == codec.at_quality(1).encode(features)
    np.testing.assert_array_equal(again.clip.encode_texts(["a red star"]), codec.clip.encode_texts(["a red star"]))
    assert jaxsem.caption(again, features) == jaxsem.caption(codec, features)


def test_a_codec_without_captioner_comes_back(features, tmp_path):
    path = tmp_path / "model.safetensors"
    feature_files.save_feature_codec(toy_codec(captions=False), path, {})
    with pytest.raises(InputError, match="has no captioner"):
        jaxsem.caption(jaxsem.load(str(path)), features)


def test_the_digest_is_found_without_a_device(codec, saved):
    assert feature_files.digest_of(read_weights(saved)) == codec.digest


def test_the_digest_is_of_pqvae_and_coder_alone(codec):
    other = dataclasses.replace(codec.levels[0], coder=FixedLength((4,) * RATES[0].codewords))
    assert feature_files.assemble("x", codec.clip, codec.levels).digest == codec.digest
    alone = feature_files.assemble("x", codec.clip, codec.levels[:1])
    assert feature_files.assemble("x", codec.clip, [other]).digest != alone.digest


def test_a_published_clip_is_not_put_into_a_file(codec, tmp_path):
    other = dataclasses.replace(codec, clip=dataclasses.replace(codec.clip, tokenizer=object()))
    with pytest.raises(InputError, match="whose folder is its own file"):
        feature_files.save_feature_codec(other, tmp_path / "x.safetensors", {})


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["rates"].pop(),
        lambda config: config["coders"].__setitem__(0, "zip"),
        lambda config: config["rates"][0].__setitem__("codebook", 4),
        lambda config: config["clip"].__setitem__("projection", "wide"),
        lambda config: config["clip"].__setitem__("surplus", 1) or config["clip"]["vision"].__setitem__("depth", 3),
        lambda config: config.__setitem__("captioner", None),
        lambda config: config.__delitem__("templates"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(saved, tmp_path, change):
    from safetensors.numpy import load, save_file

    file = read_weights(saved)
    config = json.loads(json.dumps(file.config))
    change(config)
    record = json.dumps({"system": file.system, "config": config, "card": {}})
    save_file(load(saved.read_bytes()), tmp_path / "x.safetensors", metadata={"jaxsem": record})
    with pytest.raises(WeightsError):
        jaxsem.load(str(tmp_path / "x.safetensors"))


def test_no_level_is_no_codec(codec):
    with pytest.raises(InputError, match="at least one"):
        feature_files.assemble("x", codec.clip, [])


def test_a_published_pqvae_needs_a_clip():
    with pytest.raises(InputError, match="clip="):
        jaxsem.load("pqvae", weights="dim_16 size_4.pt")


def test_published_parts_are_put_together(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from toy_clip import save_clip

    from jaxsem.systems.pqvae import Pqvae, PqvaeConfig
    from jaxsem.training.pqvae import first_params
    from jaxsem.weights.pqvae import to_torch

    config = PqvaeConfig(WIDTH, channels=4, hidden=(8, 8), residual=4, residual_layers=3, codeword=10)
    params = first_params(Pqvae(config), np.random.default_rng(0).standard_normal((8, WIDTH)))
    state = {name: torch.from_numpy(np.array(value)) for name, value in to_torch(jax.device_get(params)).items()}
    torch.save(state, tmp_path / "dim_10 size_4.pt")
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in zip("abcdefgh", "bcdefghi")) + "\n")
    folder = save_clip(tmp_path / "clip")
    codec = feature_files.load_published(folder, tmp_path / "dim_10 size_4.pt", config, tokenizer=merges)
    image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    [file] = jaxsem.compress(codec, [image])
    assert len(file) == 11 + 10 * 2 // 8 + 1  # 20 bits
    assert jaxsem.read_features(codec, [file]).shape == (1, WIDTH)
    assert pack(unpack(file).items[0], codec.digest) == file
