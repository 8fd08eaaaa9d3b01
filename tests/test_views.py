"""The sheet of views shows what the run saw: the same pictures, crops, colours, turns and corruptions."""

import shutil

import pytest
import torch
import yaml
from torchvision.transforms.v2 import functional as tv

from ssl_vit.commands.run_panels import views_panel
from ssl_vit.config import PretrainConfig
from ssl_vit.data.files import folder_pictures
from ssl_vit.data.loading import training_loader
from ssl_vit.data.pictures import SkippedPictures
from ssl_vit.errors import UserError
from ssl_vit.inspection.settings import RunSettings, run_settings
from ssl_vit.inspection.views import boxes_of, first_seen
from ssl_vit.inspection.views_sheet import COLOURS, views_sheet
from ssl_vit.methods.base import make_plan
from ssl_vit.training.runs import begin_run
from ssl_vit.training.trainer import build_method
from ssl_vit.transforms.crops import MultiCrop
from ssl_vit.transforms.randomness import sample_keys


def settings_of(config: PretrainConfig) -> RunSettings:
    return RunSettings.model_validate(config.model_dump())


def seen_by(config, pictures, tmp_path, count=6):
    return first_seen(settings_of(config), pictures, count=count, skipped=SkippedPictures(tmp_path / "skipped.txt"))


def first_batch(config, pictures, tmp_path):
    """Of the training loader."""
    loader = training_loader(
        pictures,
        MultiCrop(config.method.views),
        config.data,
        seed=config.seed,
        channels=config.backbone.in_chans,
        rank=0,
        world=1,
        accumulate=1,
        first_step=0,
        skipped=SkippedPictures(tmp_path / "loader.txt"),
    )
    return next(iter(loader))


def normalised(views, config):
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (config.method.views.mean, config.method.views.std))
    return (views - mean) / std


@pytest.mark.parametrize("memory_gb", [0, 2], ids=["from files", "in memory"])
@pytest.mark.parametrize("method", ["dino", "sit"])
def test_views_are_those_of_the_first_step(pretrain_config, sample, tmp_path, method, memory_gb):
    config = pretrain_config(f"method={method}", f"data.memory_gb={memory_gb}", "seed=3")
    pictures = folder_pictures(sample / "train")
    batch = first_batch(config, pictures, tmp_path)
    network = build_method(config, make_plan(config, len(pictures)))
    seen = seen_by(config, pictures, tmp_path)
    assert [one.name for one in seen] == [pictures.name(index) for index in batch.index[:6].tolist()]
    global_views = network.photometric(batch.global_views, batch.key)
    local_views = network.photometric(batch.local_views, batch.key, first_view=2)
    # In memory another routine cuts, to a level of 255, which contrast and solarisation may stretch.
    near = {"rtol": 0, "atol": 1e-4 if memory_gb == 0 else 0.1}
    for place, one in enumerate(seen):
        own = [*global_views[place], *local_views[place]]
        assert len(one.views) == len(one.boxes) == len(own)
        for view, expected in zip(one.views, own, strict=True):
            torch.testing.assert_close(normalised(view, config), expected, **near)
    if method == "sit":
        clean, quarter = network.rotated(global_views, batch.key)
        corrupted, mask = network.corrupted(clean, batch.key)
        for place, one in enumerate(seen):
            for view, puzzle in enumerate(one.puzzles):
                row = view * len(batch.key) + place
                assert puzzle.quarter == quarter[row]
                assert torch.equal(puzzle.hidden, mask[row, 0])
                torch.testing.assert_close(normalised(puzzle.target, config), clean[row], **near)
                white, black = (normalised(torch.full((3, 1, 1), level), config) for level in (1.0, 0.0))
                shown = corrupted[row].clamp(black, white)  # noise goes beyond what can be shown
                torch.testing.assert_close(normalised(puzzle.given, config), shown, **near)


def test_frames_lie_where_the_views_are_cut(pretrain_config):
    views = pretrain_config("method.views.flip=0").method.views
    picture = torch.randint(0, 256, (3, 57, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for key in sample_keys(0, 0, torch.arange(5)):
        cut = [view for kind in MultiCrop(views).one(picture, key) for view in kind]
        boxes = boxes_of(key, (57, 91), views)
        for (top, left, height, width), view in zip(boxes, cut, strict=True):
            again = tv.resize(picture[:, top : top + height, left : left + width], list(view.shape[1:]), 3)
            assert (again.int() - view.int()).abs().max() <= 1


def test_a_broken_picture_is_replaced_as_in_training(pretrain_config, sample, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(sample / "test", folder)
    config = pretrain_config("data.memory_gb=0")
    first = folder_pictures(folder)
    lost = seen_by(config, first, tmp_path, count=1)[0].name
    (folder / lost).write_bytes(b"nothing")
    (one,) = seen_by(config, folder_pictures(folder), tmp_path, count=1)
    batch = first_batch(config, folder_pictures(folder), tmp_path)
    assert one.name == first.name(int(batch.index[0])) != lost
    assert (tmp_path / "skipped.txt").read_text().startswith(lost)


@pytest.mark.parametrize("words", [(), ("method=sit",), ("method.views.local_crops.count=0",)])
def test_sheets_fit_a_page_and_frame_every_view(pretrain_config, sample, tmp_path, words):
    config = pretrain_config(*words)
    seen = seen_by(config, folder_pictures(sample / "train"), tmp_path, count=3)
    sheet = views_sheet(seen)
    assert 500 <= sheet.width <= 900
    colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in sheet.getcolors(maxcolors=2**24)}
    assert set(COLOURS[: len(seen[0].views)]) <= colours
    assert sheet.height > 3 * 130


def test_a_run_of_any_version_shows_its_views(pretrain_config, sample, tmp_path):
    config = pretrain_config("method=sit")
    values = config.model_dump(mode="json")
    del values["online"], values["trainer"], values["panels"]
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"online_knn": {"k": 20}}))
    assert run_settings(run) == settings_of(config)
    panel = views_panel(run, count=2)
    assert "first 2 pictures" in panel.text
    assert "did not write down its pictures" in panel.text
    assert "2 global views of 48 px" in panel.text
    pictures = folder_pictures(sample / "train")
    assert panel.image.tobytes() == views_sheet(seen_by(config, pictures, tmp_path, count=2)).tobytes()


@pytest.mark.parametrize("text", [None, "", "seed: [", "seed: 1", "42", b"\xff\xfe"])
def test_a_folder_that_is_no_pretraining_run_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml.* run"):
        run_settings(tmp_path)


def test_pictures_that_came_since_change_nothing_and_changed_ones_are_told(pretrain_config, sample, tmp_path):
    folder, run = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(sample / "train", folder)
    run.mkdir()
    config = pretrain_config("method=dino", f"data.root={folder}", f"run.folder={tmp_path}", "run.name=run")
    begin_run(config, folder_pictures(folder))
    first = views_panel(run, count=2)
    assert "did not write down" not in first.text
    one = next(path for path in folder.rglob("*") if path.is_file())
    shutil.copy(one, one.with_name(f"0{one.suffix}"))
    assert views_panel(run, count=2).image.tobytes() == first.image.tobytes()
    one.unlink()
    with pytest.raises(UserError, match="pictures have changed"):
        views_panel(run, count=2)
    (run / "data.json").write_text("[]")
    with pytest.raises(UserError, match="pictures have changed"):
        views_panel(run, count=2)
