"""Datasets of a user's own: any kind of image that they return is read, labels travel along, changes are noticed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.sources.torch_dataset import TorchDataset
from ssl_vit.runtime.errors import UserError

RGB = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)


class Items(list):
    """A map-style dataset of the given items."""


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        RGB.numpy(),
        RGB.permute(1, 2, 0).numpy(),
        Image.fromarray(RGB.permute(1, 2, 0).numpy()),
        Image.fromarray(RGB.permute(1, 2, 0).numpy()).convert("RGBA"),
    ],
    ids=["tensor", "array CHW", "array HWC", "PIL", "PIL RGBA"],
)
def test_read_gives_the_same_image_from_every_kind(image):
    dataset = TorchDataset(Items([image]))
    assert torch.equal(dataset.read(0, 3), RGB)
    assert dataset.read(0, 1, jpeg_scale=lambda height, width: 2).shape == (1, 4, 5)
    assert dataset.labels.tolist() == [-1]


def test_read_takes_a_tensor_for_channels_first_whatever_its_width():
    narrow = torch.arange(3 * 2 * 3, dtype=torch.uint8).view(3, 2, 3)
    assert torch.equal(TorchDataset(Items([narrow])).read(0, 3), narrow)


@pytest.mark.parametrize("image", [RGB[0], RGB[:1], RGB[0].numpy(), RGB[0, :, :, None].numpy()])
def test_read_repeats_gray_images(image):
    assert torch.equal(TorchDataset(Items([image])).read(0, 3), RGB[:1].expand(3, -1, -1))


def test_labels_are_those_of_the_items_or_of_targets():
    items = Items([(RGB, 2), (RGB, 0)])
    assert TorchDataset(items).labels.tolist() == [2, 0]
    assert TorchDataset(items).classes == ["0", "1", "2"]
    items.targets, items.classes = [1, 0], ["cat", "dog"]
    dataset = TorchDataset(items)
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "empty"),
        ([RGB.float()], "uint8"),
        ([torch.zeros(2, 4, 5, dtype=torch.uint8)], "1 or 3 channels"),
        ([(RGB, "cat")], "labels must be integers"),
        (iter([RGB]), "map-style"),
    ],
)
def test_torch_dataset_refuses_what_is_no_dataset_of_images(items, message):
    with pytest.raises(UserError, match=message):
        TorchDataset(Items(items) if isinstance(items, list) else items)


def test_read_names_an_item_that_cannot_be_read():
    class Broken(Items):
        def __getitem__(self, index):
            if index:
                raise OSError("truncated")
            return RGB

    with pytest.raises(UnreadableImageError, match="item 1: truncated"):
        TorchDataset(Broken([RGB, RGB])).read(1, 3)


def test_fingerprint_changes_with_any_pixel_and_label():
    items = [(torch.full((3, 4, 4), n, dtype=torch.uint8), n % 2) for n in range(40)]
    first = TorchDataset(Items(items)).fingerprint(sizes=True)
    assert TorchDataset(Items(items)).fingerprint(sizes=True) == first
    changed = [(image.clone(), label) for image, label in items]
    changed[7][0][0, 0, 0] += 1
    assert TorchDataset(Items(changed)).fingerprint(sizes=True) != first
    assert TorchDataset(Items([*items[:-1], (items[-1][0], 0)])).fingerprint(sizes=True) != first
    assert TorchDataset(Items(items[:-1])).fingerprint(sizes=False) != TorchDataset(Items(items)).fingerprint(
        sizes=False
    )


def test_content_is_the_image_as_png():
    content = TorchDataset(Items([RGB])).content(0)
    assert content.startswith(b"\x89PNG")
    assert np.asarray(Image.open(io.BytesIO(content))).shape == (4, 5, 3)
