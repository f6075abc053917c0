"""SAM's automatic masks: discs at known places come out, each once; parity with transformers; suppression by its definition."""

import copy
import dataclasses
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
import sam_reference as reference

from jaxsem.backbones.sam_config import EncoderConfig, SamConfig
from jaxsem.backbones.sam_inputs import postprocess_masks, preprocess, scale_prompts
from jaxsem.errors import InputError
from jaxsem.systems import mask_generator
from jaxsem.systems.mask_generator import MaskGenerator, MaskGeneratorConfig, point_grid, suppress
from jaxsem.systems.regions import region_pictures

SIZE = 128
LOOK = MaskGeneratorConfig(points_per_side=8)

# -- a SAM whose masks are known --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class DiscSam:
    """Stands where `Sam` stands: a point in a disc gets three masks of it, a point outside gets three bad ones.

    The parameters have a row for each disc, in pixels of the padded input: x, y, radius, and the IoU predicted of its first
    mask. The second mask is a pixel wider and expected to be worse, the third expected to be best and without a clear edge.
    """

    config: SamConfig = dataclasses.field(
        default_factory=lambda: SamConfig(
            EncoderConfig(width=8, layers=2, heads=1, hidden=8, global_every=2, patch=8, image_size=SIZE)
        )
    )

    def apply(self, variables, given, points=None, method=None):
        if method == "encode_image":
            assert given.shape == (1, SIZE, SIZE, 3)
            return given[:, :1, :1]
        low = self.config.mask_size
        line = (jnp.arange(low) + 0.5) * SIZE / low
        x, y, radius, iou = variables["params"]["discs"].T
        away = jnp.hypot(points[0, :, 0, :1] - x, points[0, :, 0, 1:] - y)  # [p, discs]
        hit = jnp.argmin(
            jnp.where(away < radius, radius, 1e4 + away), axis=1
        )  # the smallest around the point, or the nearest
        inside = jnp.take_along_axis(away < radius, hit[:, None], 1)
        edge = radius[hit, None, None] - jnp.hypot(line - x[hit, None, None], line[:, None] - y[hit, None, None])
        masks = jnp.stack([8 * edge, 8 * (edge + 1), 0.05 * edge], axis=1)
        ious = jnp.where(inside, iou[hit, None] + jnp.array([0.0, -0.03, 0.02]), -0.5)
        return masks[None], ious[None]


# In pixels of an image of 150 x 100: x, y, radius, predicted IoU.
DISCS = np.array([[30.0, 30.0, 14.0, 0.92], [110.0, 60.0, 30.0, 0.97], [45.0, 80.0, 10.0, 0.9]])
IMAGE = np.zeros((100, 150, 3), np.uint8)


def discs_of(discs=DISCS, shape=IMAGE.shape[:2], config=LOOK):
    places = scale_prompts(discs[:, :2], shape, SIZE)
    rows = np.concatenate([places, discs[:, 2:3] * SIZE / max(shape), discs[:, 3:]], axis=1).astype(np.float32)
    return MaskGenerator(DiscSam(), {"discs": rows}, config)


def drawn(disc, shape=IMAGE.shape[:2]):
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.hypot(x - disc[0], y - disc[1]) < disc[2]


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_each_disc_comes_out_once_best_first(turned):
    discs, image = (DISCS[:, [1, 0, 2, 3]], IMAGE.swapaxes(0, 1)) if turned else (DISCS, IMAGE)
    found = discs_of(discs, image.shape[:2]).generate(image)
    assert found.masks.shape == (len(found), *image.shape[:2]) == (3, *image.shape[:2])
    assert found.masks.dtype == bool
    np.testing.assert_allclose(found.predicted_iou, [0.97, 0.92, 0.9], atol=1e-6)
    for mask, disc, point in zip(found.masks, discs[[1, 0, 2]], found.points):
        assert overlap(mask, drawn(disc, image.shape[:2])) > 0.96
        assert np.hypot(*(point - disc[:2])) < disc[2]
    assert (found.stability >= 0.95).all()


def test_masks_are_the_logits_at_the_size_of_the_image_above_zero():
    generator = discs_of()
    found = generator.generate(IMAGE)
    points = scale_prompts(found.points, IMAGE.shape[:2], SIZE)
    logits, iou = generator.module.apply({"params": generator.params}, None, points[None, :, None], "predict_masks")
    logits = np.asarray(postprocess_masks(logits[0, :, 0], IMAGE.shape[:2], SIZE))
    np.testing.assert_array_equal(found.masks, logits > 0)
    np.testing.assert_allclose(found.predicted_iou, iou[0, :, 0])
    np.testing.assert_allclose(found.stability, (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)), rtol=1e-6)


def test_boxes_are_tight_and_end_with_the_last_column_and_row():
    found = discs_of().generate(IMAGE)
    assert np.issubdtype(found.boxes.dtype, np.integer)
    for mask, (left, top, right, bottom) in zip(found.masks, found.boxes):
        y, x = np.nonzero(mask)
        assert (left, top, right, bottom) == (x.min(), y.min(), x.max(), y.max())
    assert [picture.shape[:2] for picture in region_pictures(IMAGE, found.masks)] == [
        (bottom - top + 1, right - left + 1) for left, top, right, bottom in found.boxes
    ]


def test_masks_alone_are_those_of_generate():
    np.testing.assert_array_equal(discs_of().masks(IMAGE), discs_of().generate(IMAGE).masks)


def test_what_is_not_stable_enough_is_left_out():
    """The third mask of each disc, which is expected to be the best."""
    loose = dataclasses.replace(LOOK, stability_threshold=0.0)
    found = discs_of(config=loose).generate(IMAGE)
    np.testing.assert_allclose(found.predicted_iou, [0.99, 0.94, 0.92], atol=1e-6)
    assert (found.stability < 0.95).all()
    assert (discs_of().generate(IMAGE).stability >= 0.95).all()


def test_a_larger_offset_is_a_stricter_stability():
    strict = dataclasses.replace(LOOK, stability_offset=8.0, stability_threshold=0.0)
    plain, wide = (discs_of(config=config).generate(IMAGE) for config in (LOOK, strict))
    first = wide.stability[np.argmin(abs(wide.predicted_iou[:, None] - plain.predicted_iou), axis=0)]
    assert (first < plain.stability).all()


def test_the_iou_threshold_is_exclusive_and_zero_keeps_all():
    high = dataclasses.replace(LOOK, iou_threshold=0.91)
    assert len(discs_of(config=high).generate(IMAGE)) == 2
    exact = dataclasses.replace(LOOK, iou_threshold=0.92)  # the very number that is predicted
    assert len(discs_of(config=exact).generate(IMAGE)) == 1
    negative = DISCS * [1, 1, 1, -1]
    every = dataclasses.replace(LOOK, iou_threshold=0.0)
    assert len(discs_of(negative, config=every).generate(IMAGE)) == 3


def test_without_suppression_every_point_in_a_disc_gives_its_masks():
    everything = dataclasses.replace(LOOK, nms_threshold=1.0)
    found = discs_of(config=everything).generate(IMAGE)
    points = point_grid(8) * [150, 100]
    inside = [(np.hypot(*(points - disc[:2]).T) < disc[2]).sum() for disc in DISCS]
    # Two stable masks each; 0.9 - 0.03 is not above 0.88.
    assert len(found) == 2 * inside[0] + 2 * inside[1] + inside[2]
    assert all(a >= b for a, b in pairwise(found.predicted_iou))


def test_a_disc_within_a_larger_one_is_not_its_duplicate():
    nested = np.array([[75.0, 50.0, 45.0, 0.9], [75.0, 50.0, 15.0, 0.95]])
    found = discs_of(nested).generate(IMAGE)
    assert [overlap(mask, drawn(disc)) > 0.96 for mask, disc in zip(found.masks, nested[::-1])] == [True, True]


@pytest.mark.parametrize("batch", [5, 64, 100])
def test_batches_change_nothing(batch):
    """The last of 13 is not full; 100 is more than there are points."""
    whole = discs_of(config=dataclasses.replace(LOOK, nms_threshold=1.0)).generate(IMAGE)
    config = dataclasses.replace(LOOK, points_per_batch=batch, nms_threshold=1.0)
    found = discs_of(config=config).generate(IMAGE)
    for name in ("masks", "boxes", "predicted_iou", "stability", "points"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("shape", "count"), [((2, 2), 1), ((300, 3), 1), ((2, 129), 1), ((1, 1), 192), ((1, 300), 192)]
)
def test_images_of_any_size(shape, count):
    """Boxes of one row have no area by the reference's count, so all masks stay: three of each of 64 points."""
    generator = discs_of(np.array([[shape[1] / 2, shape[0] / 2, 1000.0, 0.92]]), shape)
    found = generator.generate(np.zeros((*shape, 3), np.uint8))
    assert found.masks.shape == (count, *shape)
    assert found.masks.all()
    np.testing.assert_array_equal(found.boxes, [[0, 0, shape[1] - 1, shape[0] - 1]] * count)


def test_numbers_and_near_sizes_compile_nothing():
    generator = discs_of()
    generator.generate(IMAGE)
    programs = [step._cache_size() for step in (mask_generator._predict, mask_generator._measure)]
    other = MaskGeneratorConfig(9, 64, 0.5, 0.9, 0.5, 0.6, 3)
    dataclasses.replace(generator, config=other).generate(np.zeros((128, 140, 3), np.uint8))
    assert [step._cache_size() for step in (mask_generator._predict, mask_generator._measure)] == programs


def test_a_large_image_is_measured_in_smaller_groups(monkeypatch):
    whole = discs_of().generate(IMAGE)
    monkeypatch.setattr(mask_generator, "_PIXELS", 1)
    np.testing.assert_array_equal(discs_of().masks(IMAGE), whole.masks)


# -- small areas ------------------------------------------------------------------------------------------------------


def cleaned(rows, least):
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    changed = mask_generator._clean(mask, least)
    return ["".join(".#"[int(pixel)] for pixel in row) for row in mask], changed


@pytest.mark.parametrize(
    ("least", "want"),
    [
        (1, ["####..##", "#.##....", "####...#", "#..#....", "####...."]),
        (2, ["####..##", "####....", "####....", "#..#....", "####...."]),
        (3, ["####....", "####....", "####....", "####....", "####...."]),
    ],
)
def test_holes_are_filled_and_islands_removed_below_an_area(least, want):
    given = ["####..##", "#.##....", "####...#", "#..#....", "####...."]
    assert cleaned(given, least) == (want, want != given)


def test_pixels_that_touch_at_a_corner_belong_together():
    assert cleaned(["#...", ".#..", "...."], 2) == (["#...", ".#..", "...."], False)


def test_the_largest_area_stays_if_all_are_small():
    assert cleaned(["#.....", "...##.", "......"], 4) == (["......", "...##.", "......"], True)
    assert cleaned(["#....", "....#", "....."], 4) == (["#....", ".....", "....."], True)  # one of two alike


class SpeckledSam(DiscSam):
    """The first mask of every point has a speck in the corner of the image."""

    def apply(self, variables, given, points=None, method=None):
        found = super().apply(variables, given, points, method)
        return found if method == "encode_image" else (found[0].at[:, :, 0, 0, 0].set(8.0), found[1])


def test_specks_are_removed_and_what_they_made_differ_is_suppressed():
    """With its speck, the first mask of a disc has a box of its own; without it, the second, which never had one, is preferred."""
    plain = dataclasses.replace(LOOK, stability_threshold=0.9)
    speckled = dataclasses.replace(discs_of(config=plain), module=SpeckledSam())
    found = speckled.generate(IMAGE)
    assert found.masks[:, 0, 0].sum() == 3
    np.testing.assert_allclose(found.predicted_iou, [0.97, 0.94, 0.92, 0.9, 0.89], atol=1e-6)
    cleaned = dataclasses.replace(speckled, config=dataclasses.replace(plain, min_area=50)).generate(IMAGE)
    np.testing.assert_allclose(cleaned.predicted_iou, [0.94, 0.9, 0.89], atol=1e-6)
    wanted = discs_of(config=dataclasses.replace(plain, nms_threshold=1.0)).generate(IMAGE)
    for mask, box, iou in zip(cleaned.masks, cleaned.boxes, cleaned.predicted_iou):
        same = np.argmin(abs(wanted.predicted_iou - iou))
        np.testing.assert_array_equal(mask, wanted.masks[same])
        np.testing.assert_array_equal(box, wanted.boxes[same])


# -- suppression ------------------------------------------------------------------------------------------------------


def defined(boxes, scores, threshold):
    """Suppression as torchvision's loops have it, pair by pair."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    gone, kept = set(), []
    for place, i in enumerate(order):
        if i in gone:
            continue
        kept.append(i)
        for j in order[place + 1 :]:
            width, height = (min(boxes[i][2 + k], boxes[j][2 + k]) - max(boxes[i][k], boxes[j][k]) for k in (0, 1))
            common = max(0, width) * max(0, height)
            union = sum((boxes[k][2] - boxes[k][0]) * (boxes[k][3] - boxes[k][1]) for k in (i, j)) - common
            if union and common / union > threshold:
                gone.add(j)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_is_that_of_the_definition(threshold):
    random = np.random.RandomState(7)
    corners = random.randint(0, 12, (150, 2))
    boxes = np.concatenate([corners, corners + random.randint(0, 9, (150, 2))], axis=1)  # some are empty
    scores = random.randint(0, 30, 150) / np.float32(30)  # some are equal
    kept = suppress(boxes, scores, threshold)
    assert kept.tolist() == defined(boxes.tolist(), scores.tolist(), threshold)
    assert len(kept) < 150 or threshold == 1


def test_suppression_is_strict_greedy_and_first_come():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 7], [4, 0, 14, 10], [8, 0, 18, 10], [0, 0, 10, 10]])
    scores = np.float32([0.9, 0.8, 0.7, 0.6, 0.9])
    assert suppress(boxes, scores, 0.7).tolist() == [
        0,
        1,
        2,
        3,
    ]  # 70 of 100 is not above 0.7; of two alike the first stays
    assert suppress(boxes, scores, 0.4).tolist() == [0, 3]  # 3 overlaps 2 too much, but 2 is gone already


def test_nothing_is_suppressed_of_nothing():
    assert suppress(np.zeros((0, 4), int), np.zeros(0), 0.7).tolist() == []


# -- parity -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class GivenSam(DiscSam):
    """Gives the logits and IoUs in its parameters, of the point whose place is also there."""

    def apply(self, variables, given, points=None, method=None):
        if method == "encode_image":
            return given[:, :1, :1]
        params = variables["params"]
        which = jnp.argmin(jnp.abs(points[0, :, 0][:, None] - params["points"]).sum(-1), axis=1)
        return params["logits"][which][None], params["iou"][which][None]


def processor():
    _, transformers = reference.import_reference()
    sides = {"height": SIZE, "width": SIZE}
    return transformers.SamImageProcessorPil(size={"longest_edge": SIZE}, pad_size=sides)


def filtered(masks, iou, shape, config):
    """Masks, predicted IoUs and boxes that transformers' `filter_masks` and the definition of suppression leave, best first."""
    from transformers.models.sam.image_processing_pil_sam import _rle_to_mask

    crop = np.float32([0, 0, shape[1], shape[0]])
    thresholds = config.iou_threshold, config.stability_threshold, 0, config.stability_offset
    runs, scores, boxes = processor().filter_masks(masks, iou, shape, crop, *thresholds)
    kept = defined(boxes.tolist(), scores.tolist(), config.nms_threshold)
    return np.stack([_rle_to_mask(runs[i]) for i in kept]), scores.numpy()[kept], boxes.numpy()[kept]


def test_points_are_those_of_transformers():
    reference.import_reference()
    image = np.zeros((93, 151, 3), np.uint8)
    _, points, _, labels = processor().generate_crop_boxes(image, SIZE, points_per_crop=7)
    np.testing.assert_allclose(
        scale_prompts(point_grid(7) * [151, 93], (93, 151), SIZE), points.numpy()[0, :, 0], rtol=0, atol=1e-4
    )
    assert (labels == 1).all()


@pytest.mark.parametrize("shape", [(90, 140), (140, 61)])
def test_the_same_logits_give_the_same_masks_as_transformers(shape):
    """Blobs of all sizes and softness, many of them near others."""
    torch, _ = reference.import_reference()
    random = np.random.RandomState(3)
    low, count = DiscSam().config.mask_size, 49
    y, x = np.mgrid[:low, :low]
    centres, radii = random.uniform(5, low - 25, (2, count, 3, 1, 1)), random.uniform(2, 12, (count, 3, 1, 1))
    away = np.hypot(x - centres[0], y - centres[1]) * (1 + 0.3 * np.sin(3 * np.arctan2(y - centres[1], x - centres[0])))
    logits = (random.uniform(0.3, 20, (count, 3, 1, 1)) * (radii - away)).astype(np.float32)
    iou = random.uniform(0.5, 1, (count, 3)).astype(np.float32)
    config = MaskGeneratorConfig(7, 10, 0.7, 0.8, nms_threshold=0.5)
    points = scale_prompts(point_grid(7) * shape[::-1], shape, SIZE)
    given = {"points": points, "logits": logits, "iou": iou}
    found = MaskGenerator(GivenSam(), given, config).generate(np.zeros((*shape, 3), np.uint8))
    resized = preprocess([np.zeros((*shape, 3), np.uint8)], SIZE).resized
    (full,) = processor().post_process_masks([torch.from_numpy(logits)], [shape], resized, binarize=False)
    masks, scores, boxes = filtered(full, torch.from_numpy(iou), shape, config)
    assert 10 < len(masks) < 0.9 * (iou > 0.7).sum()
    np.testing.assert_array_equal(found.predicted_iou, scores)
    np.testing.assert_array_equal(found.boxes, boxes)
    np.testing.assert_array_equal(found.masks, masks)


def test_a_loaded_sam_finds_the_masks_of_transformers(tmp_path, noise_photo):
    torch, _ = reference.import_reference()
    net, image = copy.deepcopy(reference.model()), noise_photo(70, 50)
    net.mask_decoder.iou_prediction_head.proj_out.bias.data += 2  # random weights expect little of their masks
    net.save_pretrained(tmp_path)
    config = MaskGeneratorConfig(4, 6, 0.6, 0.842, 0.01, nms_threshold=1.0)  # thresholds in gaps of what is predicted
    generator = MaskGenerator.load(tmp_path, config)
    found = generator.generate(image)
    inputs = preprocess([image], reference.SIZE)
    points = scale_prompts(point_grid(4) * [50, 70], (70, 50), reference.SIZE)
    with torch.no_grad():
        out = net(reference.first(inputs.pixels), input_points=torch.from_numpy(points)[None, :, None])
    sides = {"height": reference.SIZE, "width": reference.SIZE}
    args = [out.pred_masks[0]], inputs.original, inputs.resized
    (full,) = processor().post_process_masks(*args, binarize=False, pad_size=sides)
    masks, scores, boxes = filtered(full, out.iou_scores[0], (70, 50), config)
    assert 10 < len(masks) < (out.iou_scores > 0.6).sum()
    np.testing.assert_allclose(found.predicted_iou, scores, rtol=0, atol=1e-4)
    assert found.masks.shape == masks.shape
    assert (found.masks != masks).mean() < 1e-3
    np.testing.assert_allclose(found.boxes, boxes, rtol=0, atol=1)


@pytest.mark.parametrize("name", ["sam_vit_b_01ec64.pth", "sam_vit_h_4b8939.pth"])
def test_the_files_that_meta_published_say_their_sizes_by_their_names(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"")
    asked = []
    monkeypatch.setattr(mask_generator, "load_sam", lambda *given: asked.append(given) or (DiscSam(), {}))
    MaskGenerator.load(tmp_path / name)
    MaskGenerator.load(tmp_path / name, sam="vit_l")
    assert [given[1] for given in asked] == [name[4:9], "vit_l"]


def test_a_file_of_another_name_needs_sizes(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"")
    with pytest.raises(InputError, match="a file of weights does not say its sizes"):
        MaskGenerator.load(tmp_path / "mine.pth")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"iou_threshold": 0.995},
            r"nothing in this image of 150x100: of 192 masks 0 have a predicted IoU above 0.995 \(best 0.990\): lower the "
            "iou_threshold of MaskGeneratorConfig, or give boxes or masks instead",
        ),
        (
            {"iou_threshold": 0.98},
            r"of 192 masks 11 have a predicted IoU above 0.98 \(best 0.990\), and none of these is stable to 0.95 \(best "
            r"0\.\d+\): lower the stability_threshold",
        ),
    ],
)
def test_nothing_found_is_said_with_the_thresholds_and_the_way_out(change, message):
    with pytest.raises(InputError, match=message):
        discs_of(config=dataclasses.replace(LOOK, **change)).generate(IMAGE)


def test_masks_without_a_pixel_are_not_given():
    empty = np.array([[75.0, 50.0, -1000.0, 0.9]])
    every = dataclasses.replace(LOOK, iou_threshold=0.0, stability_threshold=0.0)
    with pytest.raises(InputError, match="finds nothing"):
        discs_of(empty, config=every).generate(IMAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points_per_side": 0}, "points_per_side is a whole number of at least 1, not 0"),
        ({"points_per_batch": 2.5}, "points_per_batch is a whole number of at least 1, not 2.5"),
        ({"min_area": -1}, "min_area is a whole number of at least 0, not -1"),
        ({"iou_threshold": 1.1}, "iou_threshold is a number from 0 to 1, not 1.1"),
        ({"stability_threshold": float("nan")}, "stability_threshold is a number from 0 to 1, not nan"),
        ({"nms_threshold": -0.1}, "nms_threshold is a number from 0 to 1, not -0.1"),
        ({"stability_offset": -1.0}, "stability_offset is a finite number of at least 0, not -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        MaskGeneratorConfig(**change)


def test_the_defaults_are_those_of_meta():
    assert MaskGeneratorConfig() == MaskGeneratorConfig(32, 64, 0.88, 0.95, 1.0, 0.7, 0)


def test_what_is_no_image_is_refused():
    with pytest.raises(InputError, match="must be uint8"):
        discs_of().generate(np.zeros((8, 8, 3), np.float32))
