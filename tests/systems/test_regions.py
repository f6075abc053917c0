import numpy as np
import pytest

from jaxsem.data.scenes import SceneConfig, batch
from jaxsem.errors import InputError
from jaxsem.systems import regions


def overlap(first, second):
    return (first & second).sum() / (first | second).sum()


def test_objects_of_scenes_are_among_the_proposals():
    records = batch("valid", range(12), SceneConfig("all"), 128, ("image", "masks"))
    found = []
    for image, labels in zip(records["image"], records["masks"], strict=True):
        masks = regions.propose(image)
        for number in range(1, labels.max() + 1):
            if (labels == number).sum() >= 100:
                found.append(max(overlap(mask, labels == number) for mask in masks))
    assert np.mean(np.array(found) > 0.5) > 0.8


def test_a_picture_of_one_colour_has_no_region():
    with pytest.raises(InputError, match="no region stands out"):
        regions.propose(np.full((32, 32, 3), 200, np.uint8))


def test_proposals_come_largest_first_and_at_most_so_many():
    image = batch("valid", [3], SceneConfig("all", objects=(4, 4)), 128, ("image",))["image"][0]
    masks = regions.propose(image)
    sizes = masks.sum(axis=(1, 2))
    assert (np.diff(sizes) <= 0).all()
    assert len(regions.propose(image, most=1)) == 1


def test_a_region_is_cut_to_its_box_on_black():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) + 1
    mask = np.zeros((1, 4, 6), bool)
    mask[0, 1, 2] = mask[0, 2, 4] = True
    [picture] = regions.region_pictures(image, mask)
    assert picture.shape == (2, 3, 3)
    assert np.array_equal(picture[0, 0], image[1, 2])
    assert np.array_equal(picture[1, 2], image[2, 4])
    assert not picture[0, 1:].any()


def test_a_region_in_place_keeps_the_size_of_the_picture():
    image = np.full((4, 6, 3), 9, np.uint8)
    mask = np.zeros((1, 4, 6), bool)
    mask[0, 3, 5] = True
    [picture] = regions.region_pictures(image, mask, in_place=True)
    assert picture.shape == image.shape
    assert picture.sum() == 27


def test_boxes_become_masks():
    [mask] = regions.from_boxes([(1, 0, 3, 2)], (2, 4))
    assert mask.tolist() == [[False, True, True, False]] * 2


@pytest.mark.parametrize("box", [(0, 0, 5, 1), (2, 0, 2, 1), (-1, 0, 1, 1), (0, 1, 1, 1)])
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(InputError, match="within 4x2 pixels"):
        regions.from_boxes([box], (2, 4))


def test_a_box_is_read_from_text():
    assert regions.parse_box("1, 2,3,4") == (1, 2, 3, 4)
    with pytest.raises(InputError, match="four whole numbers"):
        regions.parse_box("1,2,3")


def test_masks_are_read_from_masks_or_a_label_map(tmp_path):
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "masks.npy", np.stack([labels == 1, labels == 2]))
    first, second = (regions.read_masks(tmp_path / f"{name}.npy", (2, 2)) for name in ("labels", "masks"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("stored", [np.zeros((1, 2, 3), bool), np.zeros((2, 2)), np.zeros((2, 2), object)])
def test_masks_of_another_kind_are_refused(tmp_path, stored):
    np.save(tmp_path / "masks.npy", stored)
    with pytest.raises(InputError, match=r"masks"):
        regions.read_masks(tmp_path / "masks.npy", (2, 2))


@pytest.mark.parametrize(
    ("masks", "seen"),
    [
        (np.zeros((0, 4, 6), bool), "at least one"),
        (np.ones((1, 4, 5), bool), "not \\(1, 4, 5\\)"),
        (np.zeros((1, 4, 6), bool), "has no pixel"),
    ],
)
def test_regions_that_do_not_fit_are_refused(masks, seen):
    with pytest.raises(InputError, match=seen):
        regions.region_pictures(np.zeros((4, 6, 3), np.uint8), masks)
