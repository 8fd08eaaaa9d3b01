"""Masks are found by their names, never among the images, and never as their own image."""

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.annotations.mask_pairs import MaskPairs
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.runtime.errors import UserError

MASK = np.zeros((32, 40), np.uint8)
MASK[8:20, 6:25] = 255


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*MASK.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def mask(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(MASK).save(path)


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("x.jpg", "x.png"),
        ("x.jpg", "x.jpg.png"),
        ("x.jpg", "x_mask.png"),
        ("x.jpg", "x-GT.png"),
        ("x.jpg", "mask_x.png"),
        ("x.jpg", "x.jpg_segmentation.png"),
        ("X1.JPG", "x1.PNG"),
        ("deep/x.jpg", "deep/x.png"),
        ("2024.05.01.jpg", "2024.05.01.png"),
    ],
)
def test_mask_pairs_find_the_mask_of_an_image(tmp_path, image, file):
    photo(tmp_path / "images" / image)
    mask(tmp_path / "masks" / file)
    mask(tmp_path / "masks" / "other.png")
    assert MaskPairs(tmp_path / "masks").find(image) == tmp_path / "masks" / file


def test_mask_pairs_name_the_nearest_file(tmp_path):
    mask(tmp_path / "x_1_v2.png")
    with pytest.raises(FileNotFoundError, match=r"the nearest is x_1_v2\.png"):
        MaskPairs(tmp_path).find("x_1.jpg")
    mask(tmp_path / "y.png")
    mask(tmp_path / "y.bmp")
    with pytest.raises(FileNotFoundError, match=r"several masks: y\.bmp, y\.png"):
        MaskPairs(tmp_path).find("y.jpg")


@pytest.mark.parametrize(
    "names", [("x{}.jpg", "x{}.png"), ("x{}.jpg", "x{}.bmp"), ("x{}.png", "x{}.gif"), ("x{}.bmp", "x{}.jpg")]
)
def test_mask_pairs_separate_images_and_masks_of_one_folder(tmp_path, names):
    for index in range(3):
        photo(tmp_path / names[0].format(index), index)
        mask(tmp_path / names[1].format(index))
    photo(tmp_path / "alone.jpg")
    pairs = MaskPairs(tmp_path, scan_image_folder(tmp_path))
    images = [pairs.images.name(index) for index in range(len(pairs.images))]
    assert sorted(images) == sorted(["alone.jpg", *(names[0].format(index) for index in range(3))])
    for index in range(3):
        assert pairs.find(names[0].format(index)) == tmp_path / names[1].format(index)
    with pytest.raises(FileNotFoundError):
        pairs.find("alone.jpg")


def test_mask_pairs_separate_marked_masks_and_a_folder_below(tmp_path):
    photo(tmp_path / "one" / "x.png")
    mask(tmp_path / "one" / "x_mask.png")
    pairs = MaskPairs(tmp_path / "one", scan_image_folder(tmp_path / "one"))
    assert [*pairs.images.names] == [b"x.png"]
    assert pairs.find("x.png").name == "x_mask.png"
    photo(tmp_path / "two" / "x.jpg")
    mask(tmp_path / "two" / "masks" / "x.png")
    pairs = MaskPairs(tmp_path / "two" / "masks", scan_image_folder(tmp_path / "two"))
    assert [*pairs.images.names] == [b"x.jpg"]
    assert pairs.find("x.jpg") == tmp_path / "two" / "masks" / "x.png"


def test_mask_pairs_refuse_what_is_not_clear(tmp_path):
    photo(tmp_path / "a" / "x.jpg")
    photo(tmp_path / "a" / "x.png", 1)
    with pytest.raises(UserError, match=r"not clear which is the mask of x\.jpg, x\.png"):
        MaskPairs(tmp_path / "a", scan_image_folder(tmp_path / "a"))
    photo(tmp_path / "b" / "x.jpg")
    photo(tmp_path / "b" / "y.jpg", 1)
    with pytest.raises(UserError, match="no two files belong together"):
        MaskPairs(tmp_path / "b", scan_image_folder(tmp_path / "b"))
