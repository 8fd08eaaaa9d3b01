"""`ssl-vit attention` on a folder of odd sizes and modes, corrupt files, and masks that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.evaluation.segmentation.segmentation_evaluator import MEASURES
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.export import export_backbone
from tests.reference.saliency import slow_f

CHECKPOINT = "checkpoint=random:vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write six usable images of four sizes, one smaller than a patch, two corrupt ones; masks, some unusable."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    (images / "deep").mkdir(parents=True)
    (masks / "deep").mkdir(parents=True)
    Image.fromarray(noise(33, 50)).save(images / "odd.png")
    Image.fromarray(noise(50, 33, 4)).save(images / "deep" / "rgba.png")
    Image.fromarray(noise(40, 40, 1)).save(images / "gray.jpg")
    Image.fromarray(noise(40, 40)).save(images / "gray.png")  # shares its stem with gray.jpg
    Image.fromarray(noise(41, 39)).save(images / "unmasked.bmp")
    Image.fromarray(noise(32, 48)).save(images / "other size.webp")
    Image.fromarray(noise(9, 60)).save(images / "thin.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (images / "empty.png").touch()
    for name, (height, width) in {"odd": (33, 50), "deep/rgba": (50, 33), "gray": (40, 40)}.items():
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[10:25, 8:30] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    Image.new("L", (10, 10), 255).save(masks / "other size.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(folder: Path, *overrides: str) -> int:
    return main(["attention", CHECKPOINT, f"images={folder / 'images'}", f"out={folder / 'out'}", *overrides])


def test_attention_writes_files_of_each_image_at_its_own_size(folder, capsys):
    assert run(folder) == 0
    out = folder / "out"
    sizes = {
        "odd": (50, 33),
        "deep/rgba": (33, 50),
        "gray.jpg": (40, 40),
        "gray.png": (40, 40),
        "unmasked": (39, 41),
        "other size": (48, 32),
    }
    for name, size in sizes.items():
        assert Image.open(out / "overlays" / f"{name}.jpg").size == size
        for head in ("mean", "head0", "head1", "head2"):
            mask = Image.open(out / "masks" / head / f"{name}.png")
            assert mask.size == size
            assert 0 < np.asarray(mask).mean() < 1
        with np.load(out / "maps" / f"{name}.npz") as arrays:
            assert arrays["maps"].sum((1, 2)) == pytest.approx(np.ones(4), abs=1e-5)
            assert tuple(arrays["size"]) == size[::-1]
        assert (out / "heads" / f"{name}.jpg").exists()
    assert Image.open(out / "overview.jpg").height > 300
    assert len(list((out / "maps").rglob("*.npz"))) == len(sizes)
    skipped = dict(line.split("\t") for line in (out / "skipped_images.txt").read_text().splitlines())
    assert skipped.keys() == {"broken.jpg", "empty.png", "thin.png"}
    assert "60 x 9 pixels: a side is smaller than one patch of 16" in skipped["thin.png"]
    printed = capsys.readouterr().out
    assert "6 images" in printed
    assert "3 images could not be used" in printed


def test_attention_with_masks_prints_scores_and_baselines(folder, capsys):
    assert run(folder, f"masks={folder / 'masks'}") == 0
    unscored = dict(line.split("\t") for line in (folder / "out" / "unscored_images.txt").read_text().splitlines())
    assert unscored == {
        "other size.webp": "the mask has 10 x 10 pixels, its image 48 x 32",
        "unmasked.bmp": "no mask with this image's name",
    }
    printed = capsys.readouterr().out
    assert "IoU of 4 images" in printed
    for row in ("best fixed head", "best head", "mean of the heads", "center prior", "whole image", "ceiling"):
        assert row in printed
    assert "random init" in printed
    assert (folder / "out" / "overlays" / "unmasked.jpg").exists()


def test_attention_result_has_counts_and_scores_of_every_image(folder):
    assert run(folder, f"masks={folder / 'masks'}") == 0
    result = json.loads((folder / "out" / "summary.json").read_text())
    assert result["task"] == "attention"
    assert result["protocol"]["attention_mass"] == 0.6
    assert {key: result["data"][key] for key in ("num_images", "skipped", "unscored")} == {
        "num_images": 6,
        "skipped": 3,
        "unscored": 2,
    }
    names = [result["score"]["name"], *(baseline["name"] for baseline in result["baselines"])]
    assert names == ["model", "random init", "center prior", "all foreground", "patch ceiling"]
    with np.load(folder / "out" / "ious.npz") as ious:
        assert sorted(ious["images"]) == ["deep/rgba.png", "gray.jpg", "gray.png", "odd.png"]
        for score in (result["score"], *result["baselines"]):
            for metric in score["metrics"]:
                values = ious[f"{score['name']}/{metric['name']}"]
                assert metric["n"] == len(values) == 4
                assert metric["value"] == pytest.approx(values.mean())
                assert metric["low"] <= metric["value"] <= metric["high"]
        assert (ious["model/mass/oracle head"] >= ious["model/mass/fixed head"]).all()


def test_attention_result_can_be_compared(folder, capsys):
    assert run(folder, f"masks={folder / 'masks'}") == 0
    capsys.readouterr()
    assert main(["compare", str(folder / "out"), "format=markdown"]) == 0
    table = capsys.readouterr().out
    assert "attention on images<br>mass/oracle head" in table
    assert "| center prior" in table


def test_attention_replaces_the_lists_of_an_earlier_run(folder):
    assert run(folder) == run(folder, "limit=5") == 0
    assert (folder / "out" / "skipped_images.txt").read_text().count("broken.jpg") == 1


def test_attention_of_one_image_with_max_side(folder):
    image = folder / "images" / "odd.png"
    overrides = ["attention", CHECKPOINT, f"images={image}", f"out={folder / 'one'}", "max_side=32"]
    assert main(overrides) == 0
    assert Image.open(folder / "one" / "overlays" / "odd.jpg").size == (50, 33)
    with np.load(folder / "one" / "maps" / "odd.npz") as arrays:
        assert arrays["maps"].shape == (4, 1, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["images={folder}/nowhere"], "does not exist"),
        (["masks={folder}/nowhere"], "there is no such folder"),
        (["images={folder}/images/thin.png"], "no image could be used"),
        (["images={folder}/images/other size.webp", "masks={folder}/masks"], "no image has a usable mask"),
        (["out={folder}/images/maps"], "would be written over images="),
        (["attention_mass=1.5"], "attention_mass: input should be less than 1"),
        (["checkpoint=random:vit_nothing"], "vit_nothing"),
        (["checkpoint=random:vit_small_patch16_dinov3", "methods=[lost]"], "rotary position embeddings"),
        (["methods=[lost,cutler]"], "methods.1"),
        (["methods=[]"], "methods: "),
        (["masks={folder}/empty"], "no image in this folder"),
    ],
)
def test_attention_explains_mistakes(folder, capsys, overrides, message):
    assert run(folder, *(override.format(folder=folder) for override in overrides)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_attention_rejects_masks_of_other_images_before_it_starts(folder, capsys):
    image = f"images={folder / 'images' / 'unmasked.bmp'}"
    assert run(folder, image, f"masks={folder / 'masks'}", "checkpoint=nowhere") == 2
    assert "no image has a mask; unmasked.bmp: no mask with this image's name" in capsys.readouterr().err
    assert not (folder / "out").exists()


METHODS = ["lost", "tokencut", "pca", "found"]


def test_attention_writes_masks_and_scores_of_every_method(folder, tiny_model, capsys):
    overrides = ["methods=[attention,lost,tokencut,pca,found]", "refine=guided", f"masks={folder / 'masks'}"]
    assert run(folder, f"checkpoint={tiny_model}", *overrides) == 0
    out = folder / "out"
    refined = [f"{name}+guided" for name in ("mean", *METHODS)]
    for name in ("mean", "head0", "head2", *METHODS, *refined):
        mask = np.asarray(Image.open(out / "masks" / name / "deep" / "rgba.png"))
        assert mask.shape == (50, 33)
        assert set(np.unique(mask)) <= {0, 255} | {False, True}
    with np.load(out / "maps" / "odd.npz") as arrays:
        for name in METHODS:
            assert arrays[f"{name}/mask"].shape == arrays[f"{name}/score_map"].shape == arrays["maps"].shape[1:]
        assert arrays["lost+guided/mask"].shape == (33, 50)
    result = json.loads((out / "summary.json").read_text())
    assert result["protocol"]["refine"] == "guided"
    for score in (result["score"], result["baselines"][0]):  # the model and its random-init model
        values = {metric["name"]: metric for metric in score["metrics"]}
        for rule in ("mass/mean", "mass/fixed head", "mass/oracle head", *METHODS, *refined):
            for name in (rule, *(f"{rule} {measure}" for measure in MEASURES)):
                assert 0 <= values[name]["low"] <= values[name]["value"] <= values[name]["high"] <= 1
                assert values[name]["n"] == 4
        assert values["lost CorLoc"]["interval"] == "Wilson"
        curve = score["details"]["IoU by mass"]
        assert curve["mean"][11] == pytest.approx(values["mass/mean"]["value"])  # of .60
        assert curve["oracle head"][11] == pytest.approx(values["mass/oracle head"]["value"])
        assert curve["fixed head"][11] == pytest.approx(values["mass/fixed head"]["value"])
    for score in result["baselines"][1:]:
        assert {metric["name"] for metric in score["metrics"]} == {"IoU", *MEASURES}
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  tokencut+guided ") for line in lines)
    assert max(len(line) for line in lines if str(out) not in line) <= 100
    assert Image.open(out / "curve.png").width > 400
    assert Image.open(out / "overview.jpg").width > 1200


def test_attention_scores_equal_those_of_the_written_masks(folder, tiny_model):
    run(folder, f"checkpoint={tiny_model}", f"masks={folder / 'masks'}", "methods=[attention,lost]")
    with np.load(folder / "out" / "ious.npz") as scores:
        for row, name in enumerate(scores["images"]):
            stem = name if name.startswith("gray") else name.rpartition(".")[0]
            target = np.asarray(Image.open(folder / "masks" / f"{name.rpartition('.')[0]}.png")) > 0
            for rule, kind in (("mass/mean", "mean"), ("lost", "lost")):
                mask = np.asarray(Image.open(folder / "out" / "masks" / kind / f"{stem}.png")) > 0
                assert scores[f"model/{rule}"][row] == pytest.approx((mask & target).sum() / (mask | target).sum())
                assert scores[f"model/{rule} acc"][row] == pytest.approx((mask == target).mean())
                assert scores[f"model/{rule} F@0.3"][row] == pytest.approx(slow_f(mask, target, 0.3))


def test_attention_without_class_token_names_other_methods(folder, tmp_path, capsys):
    sizes = {"img_size": 32, "patch_size": 16, "in_chans": 3, "reg_tokens": 0, "embed_dim": 48, "depth": 2}
    config = BackboneConfig(name="vit_medium_patch16_gap_256", drop_path=0.0, num_heads=3, init="jax", **sizes)
    export_backbone(
        Backbone(config).eval(), tmp_path / "gap.safetensors", mean=[0.5] * 3, std=[0.5] * 3, source="a test"
    )
    gap = f"checkpoint={tmp_path / 'gap.safetensors'}"
    for methods, needing in (("attention", "attention"), ("lost,found", "found"), ("attention,found", "attention and")):
        assert run(folder, gap, f"methods=[{methods}]") == 2
        error = capsys.readouterr().err
        assert "no class token" in error
        assert needing in error
        assert "Use methods=[lost,tokencut,pca]" in error
    overrides = [gap, "methods=[lost,pca]", f"masks={folder / 'masks'}", "baselines=false", "max_side=32"]
    assert run(folder, *overrides) == 0
    out = folder / "out"
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["lost", "pca"]
    assert (out / "overlays" / "odd.jpg").exists()
    assert (out / "overview.jpg").exists()
    assert not (out / "curve.png").exists()
    printed = capsys.readouterr().out
    assert "attention:" not in printed
    assert "random init" not in printed


def test_attention_reports_void_pixels(folder, tiny_model, capsys):
    mask = np.zeros((33, 50), dtype=np.uint8)
    mask[5:20, 5:30], mask[6:19, 6:29] = 255, 1
    Image.fromarray(mask).save(folder / "masks" / "odd.png")
    assert run(folder, f"checkpoint={tiny_model}", f"masks={folder / 'masks'}") == 0
    note = "1 mask: 255 is void and excluded"
    assert note in capsys.readouterr().out
    assert note in " ".join(json.loads((folder / "out" / "summary.json").read_text())["warnings"])
    with np.load(folder / "out" / "ious.npz") as scores:
        whole = scores["all foreground/IoU"][list(scores["images"]).index("odd.png")]
    assert whole == pytest.approx((mask == 1).sum() / (mask != 255).sum())


def test_attention_of_one_scored_image_has_no_interval(folder, capsys):
    one = [f"images={folder / 'images' / 'odd.png'}", f"masks={folder / 'masks'}", f"out={folder / 'out'}"]
    assert main(["attention", CHECKPOINT, *one]) == 0
    first = capsys.readouterr().out
    assert "IoU of 1 images" in first
    assert "one image: no intervals" in first
    assert "± -" in first
    assert "earlier result" not in first
    assert main(["attention", CHECKPOINT, *one]) == 0
    assert "contains an earlier result" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "expected"), [(1e30, "not finite"), (0.0, "all zero")])
@pytest.mark.parametrize("command", ["attention", "video", "propagate"])
def test_commands_refuse_a_model_whose_features_are_of_no_use(command, factor, expected, sample, tmp_path, capsys):
    """Its weights are finite, so that loading finds nothing."""
    config = BackboneConfig(
        name="vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        in_chans=3,
        reg_tokens=0,
        drop_path=0.0,
        embed_dim=48,
        depth=2,
        num_heads=3,
        init="jax",
    )
    backbone = Backbone(config).eval()
    for name, parameter in backbone.named_parameters():
        if factor == 0 or "norm.weight" in name:
            parameter.data *= factor * 1e9
    export_backbone(backbone, tmp_path / "m.safetensors", mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    images = next((sample / "test").iterdir())
    own = {
        "attention": [f"images={images}"],
        "video": [f"video={images}"],
        "propagate": [f"frames={images}", f"masks={next((sample / 'test_masks').rglob('*.png'))}"],
    }
    words = [f"checkpoint={tmp_path / 'm.safetensors'}", *own[command], f"out={tmp_path / 'out'}"]
    assert main([command, *words]) == 2
    assert expected in capsys.readouterr().err
