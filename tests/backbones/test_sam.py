"""SAM against transformers' torch model of the same small random weights, and what needs no reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_reference as reference
from flax.traverse_util import flatten_dict

from jaxsem.backbones.sam import CONFIGS, ImageEncoder, Sam, best_masks, param_shapes
from jaxsem.backbones.sam_config import SAM_H, DecoderConfig, EncoderConfig, SamConfig
from jaxsem.backbones.sam_decoder import MaskDecoder
from jaxsem.errors import InputError
from jaxsem.weights.sam import load_sam

CONFIG = SamConfig(
    EncoderConfig(width=24, layers=6, heads=3, hidden=56, global_every=3, window=3, patch=8, image_size=64),
    DecoderConfig(hidden=40, heads=2, iou_layers=4, iou_hidden=20, epsilon=1e-6),
    channels=32,
    mask_channels=16,
)
MODULE = Sam(CONFIG)
KINDS = [("points", "labels"), ("boxes",), ("masks",), ("points", "labels", "boxes", "masks")]


@pytest.fixture(scope="module")
def theirs():
    """Parameters of the reference."""
    return load_sam(reference.state_of(reference.model()), CONFIG)[1]


@pytest.fixture(scope="module")
def params():
    """Seeded parameters of `CONFIG` that need no torch."""
    random = np.random.RandomState(3)

    def draw(path, leaf):
        name, normal = path[-1].key, random.standard_normal(leaf.shape)
        if name == "kernel":
            normal /= np.sqrt(leaf.shape[-2])
        return np.asarray(1 + 0.1 * normal if name == "scale" else normal, np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(MODULE))


@jax.jit
def encode(params, pixels):
    return MODULE.apply({"params": params}, pixels, method="encode_image")


@functools.partial(jax.jit, static_argnames="multimask")
def predict(params, embeddings, multimask=True, **prompts):
    return MODULE.apply({"params": params}, embeddings, **prompts, multimask=multimask, method="predict_masks")


def some(kinds, **sizes):
    given = reference.prompts(**sizes)
    return {kind: given[kind] for kind in kinds}


# -- parity -----------------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_transformers(theirs):
    torch, _ = reference.import_reference()
    with torch.no_grad():
        want = reference.model().get_image_embeddings(reference.first(reference.pixels())).numpy()
    assert want.std() > 0.5  # lively
    np.testing.assert_allclose(encode(theirs, reference.pixels()), np.moveaxis(want, 1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kinds", [*KINDS, ("points", "labels", "boxes"), ("points",)], ids=" ".join)
def test_prompts_are_encoded_as_in_transformers(theirs, kinds):
    given = some(kinds)
    want = dict(given)
    if kinds == ("points",):  # transformers adds the labels before it encodes
        want["labels"] = np.ones((2, 3, 2), np.int32)
    sparse, dense = (
        None if x is None else x.detach() for x in reference.model().get_prompt_embeddings(**reference.tensors(want))
    )
    tokens, added = MODULE.apply({"params": theirs}, **given, method=lambda sam, **given: sam.prompts(2, **given))
    if sparse is None:
        assert tokens.shape == (2, 1, 0, 32)
    else:
        np.testing.assert_allclose(tokens, sparse.numpy(), rtol=0, atol=1e-5)
    shape = (2, 1, reference.GRID, reference.GRID, 32)
    want = np.broadcast_to(np.moveaxis(dense.numpy(), 1, -1)[:, None], shape)
    np.testing.assert_allclose(np.broadcast_to(added, shape), want, rtol=0, atol=1e-5)


def test_positions_of_the_image_are_those_of_transformers(theirs):
    want = reference.model().get_image_wide_positional_embeddings().detach().numpy()[0]
    found = MODULE.apply({"params": theirs}, method=lambda sam: sam.prompts.image_positions())
    np.testing.assert_allclose(found, np.moveaxis(want, 0, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dense", "multimask"), [(1, True), (2, False)], ids=["of all images", "of each, plain"])
def test_the_same_tokens_are_decoded_as_in_transformers(theirs, dense, multimask):
    torch, _ = reference.import_reference()
    random, images = np.random.RandomState(6), reference.embeddings()
    positions, tokens, added = (
        random.standard_normal(shape).astype(np.float32) for shape in ((8, 8, 32), (2, 3, 5, 32), (dense, 8, 8, 32))
    )
    with torch.no_grad():
        masks, iou = reference.model().mask_decoder(
            image_embeddings=reference.first(images),
            image_positional_embeddings=reference.first(positions[None]).repeat(2, 1, 1, 1),
            sparse_prompt_embeddings=torch.from_numpy(tokens),
            dense_prompt_embeddings=reference.first(added),
            multimask_output=multimask,
        )
    decoder = MaskDecoder(CONFIG)
    found = jax.jit(decoder.apply, static_argnums=5)(
        {"params": theirs["decoder"]}, images, positions, tokens, added[:, None], multimask
    )
    assert found[0].shape == (2, 3, 3 if multimask else 1, 32, 32)
    assert masks.std() > 0.3  # lively
    np.testing.assert_allclose(found[0], masks.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], iou.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
def test_masks_from_pixels_are_those_of_transformers(theirs, kinds):
    torch, _ = reference.import_reference()
    given = some(kinds)
    with torch.no_grad():
        want = reference.model()(reference.first(reference.pixels()), **reference.tensors(given))
    masks, iou = predict(theirs, encode(theirs, reference.pixels()), **given)
    assert want.pred_masks.std() > 0.3
    np.testing.assert_allclose(masks, want.pred_masks.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(iou, want.iou_scores.numpy(), rtol=0, atol=1e-4)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("vit_b", 93_735_728), ("vit_l", 312_343_088), ("vit_h", 641_090_864)])
def test_published_models_have_their_number_of_parameters(name, count):
    """As transformers 5.23.0 counts them on the meta device, the frequencies once."""
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Sam(CONFIGS[name])))) == count


def test_the_largest_model_gives_embeddings_and_masks_of_the_published_sizes():
    sam = Sam(SAM_H, jnp.bfloat16)
    shapes = {"params": param_shapes(sam)}
    pixels, points = jax.ShapeDtypeStruct((2, 1024, 1024, 3), jnp.float32), jnp.zeros((2, 64, 1, 2))
    embeddings = jax.eval_shape(lambda p, x: sam.apply(p, x, method="encode_image"), shapes, pixels)
    masks, iou = jax.eval_shape(lambda p, x: sam.apply(p, x, points, method="predict_masks"), shapes, embeddings)
    assert (embeddings.shape, embeddings.dtype) == ((2, 64, 64, 256), jnp.bfloat16)
    assert (masks.shape, masks.dtype) == ((2, 64, 3, 256, 256), jnp.float32)
    assert (iou.shape, iou.dtype) == ((2, 64, 3), jnp.float32)


def test_layers_lie_on_leading_axes_by_groups():
    groups = param_shapes(MODULE)["encoder"]["groups"]
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(groups["window_layers"])} == {(2, 2)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(groups["global_layer"])} == {2}
    assert groups["window_layers"]["attention"]["rows"].shape == (2, 2, 5, 8)
    assert groups["global_layer"]["attention"]["rows"].shape == (2, 15, 8)


def test_a_deeper_encoder_is_not_a_larger_program():
    """Groups are a scan, and the window layers of a group are one."""

    def length(encoder):
        config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, **encoder))
        pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        run = jax.jit(lambda p, x: Sam(config).apply(p, x, method="encode_image"))
        return run.lower({"params": param_shapes(Sam(config))}, pixels).as_text().count("dot_general")

    assert length({}) == length({"layers": 16, "global_every": 8})


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
def test_all_parameters_are_made_whichever_prompt_comes_first(kinds):
    given = some(kinds, batch=1)
    found = jax.eval_shape(MODULE.init, jax.random.key(0), reference.pixels(1), **given)["params"]
    assert found == param_shapes(MODULE)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_do_not_see_each_other(params):
    given = reference.prompts()
    given["masks"] = np.random.RandomState(8).standard_normal((2, 3, 32, 32)).astype(np.float32)
    masks, iou = predict(params, reference.embeddings(), **given)
    for i in range(3):
        alone = predict(
            params, reference.embeddings(), **{name: prompt[:, i : i + 1] for name, prompt in given.items()}
        )
        np.testing.assert_allclose(alone[0][:, 0], masks[:, i], atol=1e-5)
        np.testing.assert_allclose(alone[1][:, 0], iou[:, i], atol=1e-5)


def test_one_mask_for_all_prompts_is_that_mask_for_each(params):
    given = reference.prompts()
    once, _ = predict(params, reference.embeddings(), **given)
    each, _ = predict(params, reference.embeddings(), **{**given, "masks": given["masks"].repeat(3, axis=1)})
    np.testing.assert_allclose(once, each, atol=1e-5)
    other, _ = predict(params, reference.embeddings(), **{**given, "masks": -given["masks"]})
    assert np.abs(once - other).max() > 0.01


def test_a_box_is_two_points_with_the_labels_of_corners(params):
    boxes = reference.prompts()["boxes"]

    def tokens(sam, **given):
        return sam.prompts(2, **given)[0]

    labels = np.broadcast_to([2, 3], (2, 3, 2))
    box = MODULE.apply({"params": params}, boxes=boxes, method=tokens)
    points = MODULE.apply({"params": params}, points=boxes.reshape(2, 3, 2, 2), labels=labels, method=tokens)
    np.testing.assert_array_equal(points[:, :, :2], box)
    np.testing.assert_array_equal(points[0, 0, 2], params["prompts"]["not_a_point"])


@pytest.mark.parametrize("bad", [-2, 4])
def test_a_label_that_means_nothing_is_not_taken_for_another(params, bad):
    given = some(("points", "labels"))
    given["labels"][1, 2, 0] = bad
    masks, _ = predict(params, reference.embeddings(), **given)
    assert np.isnan(masks[1, 2]).all()
    assert np.isfinite(masks[0]).all()
    assert np.isfinite(masks[1, :2]).all()


def test_other_labels_give_other_masks_without_compiling(params):
    given = some(("points", "labels"))
    first, _ = predict(params, reference.embeddings(), **given)
    programs = predict._cache_size()
    second, _ = predict(params, reference.embeddings(), points=given["points"], labels=np.zeros((2, 3, 2), np.int32))
    assert predict._cache_size() == programs
    assert np.abs(first - second).max() > 0.01


def test_the_best_mask_is_that_of_the_highest_iou():
    logits = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(1, 2, 3, 2, 2)
    masks, iou = best_masks(logits, np.float32([[[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]]]))
    np.testing.assert_array_equal(masks, [[logits[0, 0, 1], logits[0, 1, 0]]])
    np.testing.assert_allclose(iou, [[0.9, 0.7]])


# -- training and types -----------------------------------------------------------------------------------------------


# These programs run once.
gradient = functools.partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})


def test_every_parameter_of_prompts_and_masks_has_a_gradient(params):
    given = reference.prompts()
    given["labels"] = np.resize([0, 1, -1], given["labels"].shape)

    def loss(params, _):
        sam = MODULE.bind({"params": params})
        masks, iou = sam.predict_masks(reference.embeddings(), **given)
        _, no_mask = sam.prompts(2, boxes=given["boxes"])
        return sum((found**2).mean() for found in (masks, iou, no_mask))

    found = gradient(jax.grad(loss))({key: params[key] for key in ("prompts", "decoder")}, None)
    check_gradients(found, never=("prompts/frequencies",))


def test_every_parameter_of_the_encoder_has_a_gradient_and_remat_changes_none(params):
    def loss(params, remat):
        encoder = ImageEncoder(CONFIG.encoder, CONFIG.channels, remat=remat)
        return (encoder.apply({"params": params}, reference.pixels(1)) ** 3).mean()

    plain, again = (gradient(jax.grad(loss))(params["encoder"], remat) for remat in (False, True))
    check_gradients(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), plain, again)


def check_gradients(tree, never=()):
    for name, leaf in flatten_dict(tree, sep="/").items():
        if name in never:
            np.testing.assert_array_equal(leaf, 0)
        elif not name.endswith("key/bias"):  # softmax does not see what all keys share
            assert np.isfinite(leaf).all()
            assert np.abs(leaf).max() > 1e-7, name


def test_bfloat16_computes_about_the_same_masks(params):
    given = some(("boxes",))
    exact, _ = predict(params, encode(params, reference.pixels()), **given)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    half["prompts"]["frequencies"] = params["prompts"]["frequencies"]
    rough, iou = jax.jit(Sam(CONFIG, jnp.bfloat16, jnp.bfloat16).apply)({"params": half}, reference.pixels(), **given)
    assert rough.dtype == iou.dtype == jnp.float32
    assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > 0.99
    assert not np.array_equal(exact, rough)


def test_param_dtype_reaches_all_but_the_frequencies():
    shapes = flatten_dict(param_shapes(Sam(CONFIG, param_dtype=jnp.bfloat16)), sep="/")
    assert [name for name, leaf in shapes.items() if leaf.dtype != jnp.bfloat16] == ["prompts/frequencies"]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "a width of 24 cannot be split into 5 attention heads"),
        ({"layers": 0}, "the image encoder has layers=0; it takes an integer of at least 1"),
        ({"global_every": 4}, "6 layers with a global one every 4 are no whole groups"),
        ({"global_every": 1}, "6 layers with a global one every 1 are no whole groups"),
        ({"image_size": 60}, "patches of 8 do not fill an image of 60"),
        ({"patch": 2}, "patches of 2: masks need a multiple of 4"),
        ({"epsilon": 0.0}, "epsilon=0.0; it takes a small positive number"),
    ],
)
def test_encoders_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG.encoder, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 36}, "36 channels: choose a multiple of 8"),
        ({"mask_channels": 6}, "6 channels between the layers that embed a mask"),
        ({"decoder": DecoderConfig(reduction=3)}, "32 channels cannot be made 3 times narrower"),
        ({"decoder": DecoderConfig(heads=32)}, "a width of 16 cannot be split into 32 attention heads"),
    ],
)
def test_sams_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_an_iou_head_of_one_layer_is_refused():
    with pytest.raises(InputError, match="the IoU head has one layer: it takes at least 2"):
        DecoderConfig(iou_layers=1)


def test_images_that_do_not_fit_are_refused(params):
    encoder = ImageEncoder(CONFIG.encoder, CONFIG.channels).bind({"params": params["encoder"]})
    with pytest.raises(InputError, match=r"\[batch, 64, 64, 3\], floats, not float32 of shape \[1, 64, 48, 3\]"):
        encoder(np.zeros((1, 64, 48, 3), np.float32))
    with pytest.raises(InputError, match="not uint8 of shape"):
        encoder(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(InputError, match=r"embeddings are \[batch, 8, 8, 32\], not \[2, 32, 8, 8\]"):
        MODULE.apply({"params": params}, np.zeros((2, 32, 8, 8)), method="predict_masks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"points": None, "labels": None, "boxes": None, "masks": None},
            "there is no prompt: give points, boxes or masks",
        ),
        ({"points": None}, "there are labels without points"),
        (
            {"points": np.zeros((2, 3, 2))},
            r"points for a batch of 2 are of shape \[2, prompts, n, 2\], not \[2, 3, 2\]",
        ),
        ({"points": np.zeros((1, 3, 2, 2))}, r"\[2, prompts, n, 2\], not \[1, 3, 2, 2\]"),
        ({"labels": np.zeros((2, 3), int)}, r"labels are integers of shape \[2, 3, 2\], not int64 of shape \[2, 3\]"),
        ({"labels": np.zeros((2, 3, 2))}, r"labels are integers of shape \[2, 3, 2\], not float64"),
        ({"boxes": np.zeros((2, 3, 2, 2))}, r"boxes for a batch of 2 are of shape \[2, prompts, 4\], not"),
        ({"masks": np.zeros((2, 1, 64, 64))}, r"\[2, prompts, 32, 32\], not \[2, 1, 64, 64\]"),
        ({"boxes": np.zeros((2, 1, 4))}, "the prompts differ in number: 3 of points, 1 of boxes; give as many of each"),
        ({"masks": np.zeros((2, 2, 32, 32))}, "3 of points, 3 of boxes, 2 of masks"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(params, change, message):
    given = {**reference.prompts(), **change}
    with pytest.raises(InputError, match=message):
        MODULE.apply({"params": params}, reference.embeddings(), **given, method="predict_masks")
