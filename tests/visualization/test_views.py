"""The sheet of views shows what the run saw: the same images, crops, colors, turns and corruptions."""

import shutil

import pytest
import torch
import yaml
from torchvision.transforms.v2 import functional as tv

from ssl_vit.commands.run_figures import training_views_figure
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.loading.loader import build_train_loader
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.multicrop import MultiCrop
from ssl_vit.methods.schedules import make_plan
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import sample_keys
from ssl_vit.training.run_dir import write_run_metadata
from ssl_vit.training.trainer import build_method
from ssl_vit.visualization.first_step_views import RunSettings, boxes_of, load_first_step, run_settings
from ssl_vit.visualization.views_figure import COLORS, views_sheet


def settings_of(config: PretrainConfig) -> RunSettings:
    return RunSettings.model_validate(config.model_dump())


def seen_by(config, dataset, tmp_path, count=6):
    return load_first_step(
        settings_of(config), dataset, count=count, skipped=SkippedImageLog(tmp_path / "skipped_images.txt")
    )


def first_batch(config, dataset, tmp_path):
    """Of the training loader."""
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
def test_views_are_those_of_the_first_step(pretrain_config, sample, tmp_path, method, cache_gb):
    config = pretrain_config(f"method={method}", f"data.cache_gb={cache_gb}", "seed=3")
    dataset = scan_image_folder(sample / "train")
    batch = first_batch(config, dataset, tmp_path)
    model = build_method(config, make_plan(config, len(dataset)))
    seen = seen_by(config, dataset, tmp_path)
    assert [one.name for one in seen] == [dataset.name(index) for index in batch.index[:6].tolist()]
    global_views = model.color_augmentation(batch.global_views, batch.key)
    local_views = model.color_augmentation(batch.local_views, batch.key, first_view=2)
    # In memory another routine cuts, to a level of 255, which contrast and solarisation may stretch.
    near = {"rtol": 0, "atol": 1e-4 if cache_gb == 0 else 0.1}
    for place, one in enumerate(seen):
        own = [*global_views[place], *local_views[place]]
        assert len(one.views) == len(one.boxes) == len(own)
        for view, expected in zip(one.views, own, strict=True):
            torch.testing.assert_close(normalized(view, config), expected, **near)
    if method == "sit":
        clean, quarter = model.rotated(global_views, batch.key)
        corrupted, mask = model.corrupted(clean, batch.key)
        for place, one in enumerate(seen):
            for view, puzzle in enumerate(one.puzzles):
                row = view * len(batch.key) + place
                assert puzzle.quarter == quarter[row]
                assert torch.equal(puzzle.hidden, mask[row, 0])
                torch.testing.assert_close(normalized(puzzle.target, config), clean[row], **near)
                white, black = (normalized(torch.full((3, 1, 1), level), config) for level in (1.0, 0.0))
                shown = corrupted[row].clamp(black, white)  # noise goes beyond what can be shown
                torch.testing.assert_close(normalized(puzzle.given, config), shown, **near)


def test_frames_lie_where_the_views_are_cut(pretrain_config):
    views = pretrain_config("method.views.flip=0").method.views
    picture = torch.randint(0, 256, (3, 57, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for key in sample_keys(0, 0, torch.arange(5)):
        cut = [view for kind in MultiCrop(views).crop_image(picture, key) for view in kind]
        boxes = boxes_of(key, (57, 91), views)
        for (top, left, height, width), view in zip(boxes, cut, strict=True):
            again = tv.resize(picture[:, top : top + height, left : left + width], list(view.shape[1:]), 3)
            assert (again.int() - view.int()).abs().max() <= 1


def test_a_broken_image_is_replaced_as_in_training(pretrain_config, sample, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(sample / "test", folder)
    config = pretrain_config("data.cache_gb=0")
    first = scan_image_folder(folder)
    lost = seen_by(config, first, tmp_path, count=1)[0].name
    (folder / lost).write_bytes(b"nothing")
    (one,) = seen_by(config, scan_image_folder(folder), tmp_path, count=1)
    batch = first_batch(config, scan_image_folder(folder), tmp_path)
    assert one.name == first.name(int(batch.index[0])) != lost
    assert (tmp_path / "skipped_images.txt").read_text().startswith(lost)


@pytest.mark.parametrize("words", [(), ("method=sit",), ("method.views.local_crops.count=0",)])
def test_sheets_fit_a_page_and_frame_every_view(pretrain_config, sample, tmp_path, words):
    config = pretrain_config(*words)
    seen = seen_by(config, scan_image_folder(sample / "train"), tmp_path, count=3)
    sheet = views_sheet(seen)
    assert 500 <= sheet.width <= 900
    colors = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in sheet.getcolors(maxcolors=2**24)}
    assert set(COLORS[: len(seen[0].views)]) <= colors
    assert sheet.height > 3 * 130


def test_a_run_of_any_version_shows_its_views(pretrain_config, sample, tmp_path):
    config = pretrain_config("method=sit")
    values = config.model_dump(mode="json")
    del values["online"], values["trainer"], values["panels"]
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"online_knn": {"k": 20}}))
    assert run_settings(run) == settings_of(config)
    panel = training_views_figure(run, count=2)
    assert "first 2 images" in panel.text
    assert "did not write down its images" in panel.text
    assert "2 global views of 48 px" in panel.text
    dataset = scan_image_folder(sample / "train")
    assert panel.image.tobytes() == views_sheet(seen_by(config, dataset, tmp_path, count=2)).tobytes()


@pytest.mark.parametrize("text", [None, "", "seed: [", "seed: 1", "42", b"\xff\xfe"])
def test_a_folder_that_is_no_pretraining_run_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml.* run"):
        run_settings(tmp_path)


def test_images_that_came_since_change_nothing_and_changed_ones_are_told(pretrain_config, sample, tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(sample / "train", folder)
    run.mkdir()
    config = pretrain_config("method=dino", f"data.root={folder}", f"run.folder={tmp_path}", "run.name=run")
    write_run_metadata(config, scan_image_folder(folder))
    first = training_views_figure(run, count=2)
    assert "did not write down" not in first.text
    one = next(path for path in folder.rglob("*") if path.is_file())
    shutil.copy(one, one.with_name(f"0{one.suffix}"))
    assert training_views_figure(run, count=2).image.tobytes() == first.image.tobytes()
    one.unlink()
    with pytest.raises(UserError, match="images have changed"):
        training_views_figure(run, count=2)
    (run / "data.json").write_text("[]")
    with pytest.raises(UserError, match="images have changed"):
        training_views_figure(run, count=2)
