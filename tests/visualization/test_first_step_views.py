"""Views of the first training step: the same images, crops, colors, rotations and corruptions as in training."""

import shutil

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.schedules import make_plan
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.trainer import build_method
from ssl_vit.visualization.first_step_views import COLORS, crop_boxes, read_run_settings, views_figure
from tests.helpers.crops import crop_image
from tests.helpers.views import load_views


def first_batch(config, dataset, tmp_path):
    """Return the first batch of the training loader."""
    loader = build_train_loader(
        dataset,
        MultiCrop(config.method.views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
        rank=0,
        world=1,
        accumulate=1,
        first_step=0,
        skipped=SkippedImageLog(tmp_path / "loader.txt"),
    )
    return next(iter(loader))


def normalized(views, config):
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.method.views.mean, config.method.views.std))
    return (views - mean) / std


@pytest.mark.parametrize("cache_gb", [0, 2], ids=["from files", "in memory"])
@pytest.mark.parametrize("method", ["dino", "sit"])
def test_load_first_step_equals_the_first_training_step(pretrain_config, sample, tmp_path, method, cache_gb):
    config = pretrain_config(f"method={method}", f"data.cache_gb={cache_gb}", "seed=3")
    dataset = scan_image_folder(sample / "train")
    batch = first_batch(config, dataset, tmp_path)
    model = build_method(config, make_plan(config, len(dataset)))
    examples = load_views(config, dataset, tmp_path)
    assert [one.name for one in examples] == [dataset.name(index) for index in batch.index[:6].tolist()]
    global_views = model.color_augmentation(batch.global_views, batch.key)
    local_views = model.color_augmentation(batch.local_views, batch.key, first_view=2)
    # In memory another routine crops, equal up to a level of 255, which contrast and solarization may amplify.
    near = {"rtol": 0, "atol": 1e-4 if cache_gb == 0 else 0.1}
    for index, one in enumerate(examples):
        own = [*global_views[index], *local_views[index]]
        assert len(one.views) == len(one.boxes) == len(own)
        for view, expected in zip(one.views, own, strict=True):
            torch.testing.assert_close(normalized(view, config), expected, **near)
    if method == "sit":
        clean, corrupted, mask, quarter = model.pretext_views(config.method, global_views, batch.key)
        for index, one in enumerate(examples):
            for view, found in enumerate(one.pretext):
                row = view * len(batch.key) + index
                assert found.quarter == quarter[row]
                assert torch.equal(found.hidden, mask[row, 0])
                torch.testing.assert_close(normalized(found.target, config), clean[row], **near)
                white, black = (normalized(torch.full((3, 1, 1), level), config) for level in (1.0, 0.0))
                shown = corrupted[row].clamp(black, white)  # noise goes beyond what can be shown
                torch.testing.assert_close(normalized(found.corrupted, config), shown, **near)


def test_crop_boxes_are_the_crops_of_the_views(pretrain_config):
    views = pretrain_config("method.views.flip=0").method.views
    image = torch.randint(0, 256, (3, 57, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for key in sample_keys(0, 0, torch.arange(5)):
        crops = [view for part in crop_image(MultiCrop(views), image, key) for view in part]
        boxes = crop_boxes(key, (57, 91), views)
        for (top, left, height, width), view in zip(boxes, crops, strict=True):
            resized = tv.resize(image[:, top : top + height, left : left + width], list(view.shape[1:]), 3)
            assert (resized.int() - view.int()).abs().max() <= 1


def test_load_first_step_replaces_an_unreadable_image_as_in_training(pretrain_config, sample, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(sample / "test", folder)
    config = pretrain_config("data.cache_gb=0")
    first = scan_image_folder(folder)
    lost = load_views(config, first, tmp_path, count=1)[0].name
    (folder / lost).write_bytes(b"nothing")
    (one,) = load_views(config, scan_image_folder(folder), tmp_path, count=1)
    batch = first_batch(config, scan_image_folder(folder), tmp_path)
    assert one.name == first.name(int(batch.index[0])) != lost
    assert (tmp_path / "skipped_images.txt").read_text().startswith(lost)


@pytest.mark.parametrize("text", [None, "", "seed: [", "seed: 1", "42", b"\xff\xfe"])
def test_read_run_settings_reports_a_missing_or_damaged_config(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml.* run"):
        read_run_settings(tmp_path)


def test_read_run_settings_reports_a_run_of_version_0_1(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\ntrainer: {max_steps: 3, accumulate: 1}\n")
    with pytest.raises(UserError, match=r"is a run of ssl-vit 0\.1, whose settings"):
        read_run_settings(tmp_path)


@pytest.mark.parametrize("overrides", [(), ("method=sit",), ("method.views.local_crops.count=0",)])
def test_views_figure_has_the_color_of_every_view(pretrain_config, sample, tmp_path, overrides):
    config = pretrain_config(*overrides)
    examples = load_views(config, scan_image_folder(sample / "train"), tmp_path, count=3)
    image = views_figure(examples)
    assert 500 <= image.width <= 900
    colors = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in image.getcolors(maxcolors=2**24)}
    assert set(COLORS[: len(examples[0].views)]) <= colors
    assert image.height > 3 * 130
