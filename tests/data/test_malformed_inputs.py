"""Hostile input: any folder trains, whatever lies in it or happens to it, and no file that is read can run code."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.methods import CropsConfig
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.sources.decode import decode
from ssl_vit.data.sources.image_folder import ImageFolder
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from tests.helpers.crops import sample_crop_boxes
from tests.models.test_backbone import tiny
from tests.reference.bad_files import CHECKPOINTS, CONFIGS, RECIPES, SAFETENSORS, SIDECARS, Mark
from tests.reference.bad_images import BROKEN, READABLE, image, pixels, put_hostile

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.", "ignore::PIL.Image.DecompressionBombWarning")

FROM_DISK = ("data.cache_gb=0", "data.num_workers=2")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def public():
    """A folder that other users may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights():
    """As a user who may read nothing but what is everyone's, where the tests run as one who may do anything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def skipped(run):
    return dict(line.split("\t") for line in (run / "skipped_images.txt").read_text(encoding="utf-8").splitlines())


def refused(capfd, words):
    """The message of a command that ends with 2."""
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith(f"ssl-vit {words[0]}: ")
    return err


# --- images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_decode_reads_odd_images(folder, name):
    READABLE[name](folder / name)
    read = decode(folder / name)
    sizes = {"one_pixel.png": (1, 1), "a_line.png": (1, 20_000)}
    turned = name.startswith("turned") and name[6] in "5678"
    assert read.shape[1:] == sizes.get(name, (40, 24) if turned else (24, 40))
    assert decode(folder / name, channels=1).shape == (1, *read.shape[1:])


@pytest.mark.parametrize("name", ["png_called.jpg", "rgb16.png", "rgb16.tif", "animated.png", "pages.tif"])
def test_decode_reads_lossless_odd_images_exactly(folder, name):
    READABLE[name](folder / name)
    assert (decode(folder / name).permute(1, 2, 0).numpy() == pixels()).all()


@pytest.mark.parametrize("name", BROKEN)
def test_decode_gives_the_reason_for_unreadable_images(folder, name):
    make, part = BROKEN[name]
    make(folder / name)
    with pytest.raises(UnreadableImageError) as caught:
        decode(folder / name)
    assert part in caught.value.reason
    assert caught.value.reason.strip()
    assert caught.value.reason.isprintable()


def test_decode_of_a_file_that_vanishes_gives_a_reason(folder, monkeypatch):
    (folder / "a.jpg").write_text("no image")
    stat = Path.stat
    looks = []

    def once(path, **how):
        looks.append(path)
        if len(looks) > 1:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", once)
    with pytest.raises(UnreadableImageError):
        decode(folder / "a.jpg")


def test_read_image_list_takes_paths_that_no_disk_can_have(folder):
    (folder / "list.txt").write_bytes(b"a\0b.jpg\n" + b"n" * 300 + b".jpg\n/dev/zero\n.\n")
    dataset = build_dataset("list", folder / "list.txt")
    reasons = []
    for i in range(len(dataset)):
        with pytest.raises(UnreadableImageError) as caught:
            dataset.read(i, 3)
        reasons.append(caught.value.reason)
    assert reasons[:2] == ["embedded null byte", "File name too long"]
    assert all("device" in reason for reason in reasons[2:])


def test_scan_image_folder_skips_what_it_may_not_read(public):
    (public / "closed").mkdir()
    for name in ("good.png", "closed.png", "closed/inside.png"):
        image().save(public / name)
    for name in ("closed.png", "closed"):
        (public / name).chmod(0)
    with without_rights():
        dataset = build_dataset("folder", public)
        assert [dataset.name(i) for i in range(len(dataset))] == ["closed.png", "good.png"]
        assert dataset.ignored == {"unreadable folder": 1}
        with pytest.raises(UnreadableImageError, match="Permission denied"):
            dataset.read(0, 3)
        assert dataset.read(1, 3).shape == (3, 24, 40)
    (public / "closed").chmod(0o755)


# --- whole folders, through the command -------------------------------------------------------------------------


@pytest.mark.parametrize("way", [(), FROM_DISK], ids=["memory", "disk"])
def test_pretrain_on_a_folder_of_everything_names_what_it_skips(folder, tmp_path, pretrain_words, capfd, way):
    broken = put_hostile(folder)
    words = pretrain_words(f"data.root={folder}", "trainer.max_steps=18", *way)  # three epochs: each skips some
    assert main(["pretrain", *words]) == 0
    found = skipped(tmp_path / "runs" / "dino")
    assert found.keys() == broken
    assert all(reason.strip() and reason.isprintable() for reason in found.values())
    out, err = capfd.readouterr()
    assert f"{len(broken)} images could not be read" in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", [b"a=b, [c] {d: 1}", b"caf\xe9 \xf0\x9f\x98\x80\n2", b"--overwrite", b"n" * 250])
def test_pretrain_takes_folders_of_any_name(tmp_path, pretrain_words, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    for i in range(16):
        (tmp_path / name / "train").mkdir(parents=True, exist_ok=True)
        image(seed=i).save(tmp_path / name / "train" / f"{i}.png")
    (tmp_path / name / "train" / "bad.png").write_bytes(b"")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # strict, as a pipe is
    words = [f"data.root={name}/train", f"run.folder={name}", "trainer.max_steps=1"]
    assert main(["pretrain", *pretrain_words(*words)]) == 0
    run = tmp_path / name / "dino"
    assert skipped(run) == {"bad.png": "an empty file"}
    written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert written["data"]["root"] == f"{name}/train"


def change(root):
    """What another program might do to a folder meanwhile; loading processes may both come to it."""
    shutil.rmtree(root / "1", ignore_errors=True)
    (root / "2" / "2.png").unlink(missing_ok=True)
    (root / "2" / "6.png").write_text("replaced")
    image().save(root / "new.png")
    if not (root / "3" / "3.png").is_fifo():
        (root / "3" / "3.png").unlink(missing_ok=True)
        os.mkfifo(root / "3" / "3.png")


@pytest.mark.parametrize("way", [(), ("data.cache_gb=0",), FROM_DISK], ids=["memory", "disk", "workers"])
@pytest.mark.parametrize("everything", [False, True])
def test_pretrain_survives_a_folder_that_changes(folder, tmp_path, pretrain_words, capfd, monkeypatch, way, everything):
    for i in range(64):
        (folder / str(i % 4)).mkdir(exist_ok=True)
        image(seed=i).save(folder / str(i % 4) / f"{i}.png")
    read, reads, moment = ImageFolder.read, [], 100 if way and everything else 30  # in the second epoch, or before

    def reading(dataset, index, channels, jpeg_scale=None):
        reads.append(index)
        if len(reads) == moment:  # of this process
            shutil.rmtree(folder, ignore_errors=True) if everything else change(folder)
        return read(dataset, index, channels, jpeg_scale)

    monkeypatch.setattr(ImageFolder, "read", reading)
    length = ("trainer.max_steps=24" if everything else "trainer.max_steps=8", "trainer.checkpoint_every=0.01s")
    code = main(["pretrain", *pretrain_words(f"data.root={folder}", *length, *way)])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    if everything:
        assert code == 2
        assert "ssl-vit pretrain: none of the 64 images can be read" in err
        assert "skipped_images.txt" in err
        if way:  # what it had learned is still there
            assert load_backbone(str(tmp_path / "runs" / "dino")).run == tmp_path / "runs" / "dino"
    else:
        assert code == 0
        reasons = skipped(tmp_path / "runs" / "dino")
        assert {"2/2.png", "3/3.png"} <= reasons.keys()
        assert {name for name in reasons if name.startswith("1/")}


@pytest.mark.slow
def test_scan_image_folder_of_two_hundred_thousand_files(folder, pretrain_words, capfd):
    for i in range(200_000):
        first = folder / f"{i - i % 1000}.png"  # of a thousand names for the same file
        if i % 1000:
            (folder / f"{i}.png").hardlink_to(first)
        else:
            image(seed=i).save(first)
    words = pretrain_words(f"data.root={folder}", "data.cache_gb=0", "trainer.max_steps=2")
    assert main(["pretrain", *words]) == 0
    assert "200,000 images" in capfd.readouterr().out


# --- numbers that make no sense ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        *("seed=-1", f"seed={10**30}", "backbone.depth=2000000000", "data.cache_gb=inf", "method.optimizer.lr=nan"),
        *("method.optimizer.lr=inf", "method.views.blur.sigma=[0.1,inf]", "method.views.global_crops.ratio=[0,1]"),
        *("backbone=1", "logger=1e3", "+data=3", "method.views.blur.sigma.x=1", f"method={'x' * 300}", "seed=${"),
    ],
)
def test_pretrain_refuses_nonsensical_values(capfd, word):
    assert "does not exist" not in refused(capfd, ["pretrain", "data.root=nowhere", word])


@pytest.mark.parametrize("ratio", [(0.1, 0.2), (5.0, 9.0)])
def test_multicrop_of_one_pixel_has_views_of_any_ratio(ratio):
    crops = CropsConfig(count=1, size=8, scale=(0.1, 0.2), ratio=ratio)
    boxes = sample_crop_boxes(torch.arange(20), 1, 1, crops=crops, flip=0.5)
    assert boxes.height.tolist() == boxes.width.tolist() == [1] * 20


# --- files that would run code -----------------------------------------------------------------------------------


@pytest.fixture
def mark(tmp_path):
    """What hostile code would create."""
    mark = Mark(tmp_path / "it_ran")
    yield mark
    assert not mark.path.exists()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_backbone_runs_no_code_of_a_checkpoint(mark, tmp_path, capfd, name):
    CHECKPOINTS[name](tmp_path / "x.ckpt", mark)
    text = refused(capfd, ["export", f"checkpoint={tmp_path / 'x.ckpt'}", f"out={tmp_path / 'o.safetensors'}"])
    assert "x.ckpt" in text


@pytest.mark.parametrize("name", SAFETENSORS)
def test_load_backbone_refuses_a_hostile_safetensors_header(mark, tmp_path, capfd, name, exported):
    content, sidecar = exported
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[name](content, mark))
    (tmp_path / "x.json").write_text(sidecar)
    assert "x.safetensors" in refused(
        capfd, ["export", f"checkpoint={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'o.safetensors'}"]
    )


@pytest.mark.parametrize("name", SIDECARS)
def test_load_backbone_refuses_nonsense_in_the_json_file(mark, tmp_path, capfd, name, exported):
    content, sidecar = exported
    (tmp_path / "x.safetensors").write_bytes(content)
    (tmp_path / "x.json").write_text(SIDECARS[name](json.loads(sidecar), mark))
    assert "x.json" in refused(
        capfd, ["export", f"checkpoint={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'o.safetensors'}"]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_load_config_runs_no_code_of_a_recipe(mark, tmp_path, capfd, name):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "evil.yaml").write_bytes(RECIPES[name](mark))
    text = refused(capfd, ["pretrain", "data.root=nowhere", "recipe=evil", f"--config-dir={tmp_path}"])
    assert "does not exist" not in text  # it is the recipe that is refused, not the folder


def test_load_config_reads_environment_variables_as_text(tmp_path, monkeypatch):
    """`${oc.env:...}` gives a string and nothing more; it reaches config.yaml, and no other place."""
    monkeypatch.setenv("IMAGES", "${eval:1} !!python/name:os.system")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# @package _global_\ndata: {root: '${oc.env:IMAGES}'}\n")
    config = load_config("pretrain", ["recipe=mine", f"--config-dir={tmp_path}"], PretrainConfig)
    assert str(config.data.root) == "${eval:1} !!python/name:os.system"


@pytest.mark.parametrize("name", CONFIGS)
def test_load_config_runs_no_code_of_a_run_directory(mark, tmp_path, capfd, name, pretrain_words):
    run = tmp_path / "runs" / "dino"
    assert main(["pretrain", *pretrain_words("trainer.max_steps=1")]) == 0
    (run / "config.yaml").write_text(CONFIGS[name](mark))
    capfd.readouterr()
    assert "config.yaml" in refused(capfd, ["pretrain", *pretrain_words("trainer.max_steps=1", "run.resume=true")])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bytes of a good exported file, and the JSON beside it."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    export_backbone(Backbone(tiny()), folder / "x.safetensors", mean=[0.5] * 3, std=[0.2] * 3, source="a test")
    return (folder / "x.safetensors").read_bytes(), (folder / "x.json").read_text()
