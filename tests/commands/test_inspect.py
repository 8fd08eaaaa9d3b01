"""`ssl-vit inspect` as people use it: a run, a folder with broken files, other models beside, no images at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ssl_vit.cli import main
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import export_backbone

OF_IMAGES = ["rollout", "distance", "entropy", "prefix", "diversity", "norms", "spectrum", "layers"]
OF_WEIGHTS = ["positions", "filters"]


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def make_file(folder: Path, **sizes) -> Path:
    """Of a model of other sizes than `tiny_model`."""
    torch.manual_seed(1)
    given = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 16, "reg_tokens": 0, "depth": 3} | sizes
    config = BackboneConfig(in_chans=3, drop_path=0.0, embed_dim=32, num_heads=2, init="jax", **given)
    path = folder / "other.safetensors"
    export_backbone(Backbone(config).eval(), path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    return path


def read(out: Path):
    """`inspect.json` and the arrays, when all that it names is there and can be drawn."""
    content = json.loads((out / "inspect.json").read_text())
    for panel in content["panels"]:
        with Image.open(out / panel["file"]) as image:
            assert image.mode == "RGB"
            assert 700 <= image.width <= 1400
        assert len(panel["title"]) > 8
        assert len(panel["text"]) > 100
    with np.load(out / "arrays.npz") as file:
        arrays = dict(file)
    assert {name: list(values.shape) for name, values in arrays.items()} == content["arrays"]
    return content, arrays


def names(content):
    return [Path(panel["file"]).stem for panel in content["panels"]]


def test_real_images_give_every_panel(cifar, tiny_model, tmp_path, capsys):
    out, other = tmp_path / "out", make_file(tmp_path, reg_tokens=2)
    words = [f"checkpoint={tiny_model}", f"images={cifar / 'test'}", f"out={out}", "limit=40", f"compare_to={other}"]
    assert main(["inspect", *words]) == 0
    assert "11 panels of 40 images" in capsys.readouterr().out
    content, arrays = read(out)
    assert names(content) == [*OF_IMAGES, "versus", *OF_WEIGHTS]
    assert content["schema"] == 1
    assert content["left_out"] == {}
    assert content["data"]["n"] == 40
    for kind in ("distance", "entropy", "prefix", "diversity"):
        for model in ("model", "random init"):
            assert arrays[f"{model}/{kind}"].shape == (2, 3)
            assert content["measured"][kind][model] == pytest.approx(arrays[f"{model}/{kind}"].mean(1))
    assert content["measured"]["distance"]["uniform"] == pytest.approx(16.06, abs=0.01)  # 4 x 4 patches of 8 pixels
    assert arrays["model/cka with model"].diagonal() == pytest.approx(np.ones(2))
    versus = next(name for name in arrays if "cka with other" in name)
    assert arrays[versus].shape == (2, 3)
    assert (np.abs(arrays[versus]) < 1).all()
    ranks = content["measured"]["spectrum"]
    assert 1 < ranks["model"]["effective_rank"] < 40
    assert ranks["features"] == "[CLS] tokens"


def test_the_same_seed_gives_the_same_numbers(sample, tiny_model, tmp_path):
    results = []
    for _ in range(2):
        words = [
            f"checkpoint={tiny_model}",
            f"images={sample / 'test'}",
            f"out={tmp_path}",
            "limit=6",
            "seed=3",
        ]
        assert main(["inspect", *words, "baselines=false"]) == 0
        results.append(read(tmp_path)[1])
    assert not any("random" in name for name in results[0])
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])


def test_a_run_is_looked_at_with_its_own_images(sample, tiny_model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for suffix in (".safetensors", ".json"):
        shutil.copy(tiny_model.with_suffix(suffix), run / f"backbone{suffix}")
    values = {"data": {"source": "folder", "root": str(sample / "train")}, "trainer": {"max_epochs": 1, "max_steps": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["inspect", f"checkpoint={run}", "limit=5"]) == 0
    content, _ = read(run / "inspect")
    assert names(content) == [*OF_IMAGES, *OF_WEIGHTS]
    assert str(sample / "train") in content["data"]["images"]["text"]
    values["data"]["root"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["inspect", f"checkpoint={run}"]) == 0
    content, _ = read(run / "inspect")
    assert names(content) == OF_WEIGHTS


def test_without_images_the_weights_are_shown(tiny_model, tmp_path, capsys):
    assert main(["inspect", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", f"compare_to={tiny_model}"]) == 0
    content, arrays = read(tmp_path / "out")
    assert names(content) == OF_WEIGHTS
    assert content["left_out"].keys() == {*OF_IMAGES, "versus"}
    assert content["data"] == {"n": 0, "skipped": 0, "images": None}
    assert arrays["model/positions"].shape == (4, 4, 4, 4)
    assert "images=FOLDER" in capsys.readouterr().out


def test_a_model_without_class_token_says_what_is_left_out(sample, tmp_path):
    file = make_file(tmp_path, name="vit_medium_patch16_gap_256", patch_size=8)
    assert (
        main(["inspect", f"checkpoint={file}", f"images={sample / 'test'}", f"out={tmp_path / 'out'}", "limit=5"]) == 0
    )
    content, _ = read(tmp_path / "out")
    assert content["left_out"].keys() == {"rollout", "prefix"}
    assert "class token" in content["left_out"]["rollout"]
    assert content["measured"]["spectrum"]["features"] == "mean patch tokens"


def test_registers_and_another_size(sample, tmp_path):
    file = make_file(tmp_path, reg_tokens=4, patch_size=8)
    words = [f"checkpoint={file}", f"images={sample / 'test'}", f"out={tmp_path / 'out'}", "limit=5", "image_size=48"]
    assert main(["inspect", *words]) == 0
    content, arrays = read(tmp_path / "out")
    assert content["left_out"] == {}
    assert "the class token and 4 registers" in next(p["text"] for p in content["panels"] if p["file"] == "prefix.png")
    assert arrays["model/prefix by token"].shape == (3, 2, 5)
    assert content["measured"]["distance"]["uniform"] == pytest.approx(0.52 * 48, rel=0.02)


def test_broken_images_are_skipped_and_listed(tiny_model, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for place, shape in enumerate([(40, 30, 3), (9, 60, 3), (33, 50), (50, 33, 4)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(images / f"{place}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    words = ["inspect", f"checkpoint={tiny_model}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert main(words) == 0
    content, _ = read(tmp_path / "out")
    assert (content["data"]["n"], content["data"]["skipped"]) == (4, 1)
    assert (tmp_path / "out" / "skipped_images.txt").read_text().startswith("broken.jpg\t")
    assert "1 images could not be used" in capsys.readouterr().out
    assert main([*words, f"images={images / '2.png'}", "baselines=false"]) == 0
    content, _ = read(tmp_path / "out")
    assert content["data"]["n"] == 1
    assert content["left_out"] == {"layers": "1 images: CKA needs 4 or more"}
    (images / "only").mkdir()
    shutil.move(images / "broken.jpg", images / "only")
    assert main([*words, f"images={images / 'only'}"]) == 2
    assert "no image could be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images={folder}/nowhere"], "does not exist"),
        (["images={folder}", "out={folder}/inspect"], "choose a folder outside of it"),
        (["images={folder}", "image_size=20"], "image_size=20"),
        (["images={folder}", "compare_to={folder}/nothing"], "there is no such file or folder"),
        (["limit=0"], "limit"),
        (["checkpoint=random:vit_nothing"], "vit_nothing"),
    ],
)
def test_mistakes_get_a_clear_word(sample, tiny_model, tmp_path, capsys, words, message):
    words = [word.format(folder=sample / "test") for word in words]
    assert main(["inspect", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_that_has_diverged_is_refused(sample, tmp_path, capsys):
    file = make_file(tmp_path)
    weights = load_file(file)
    for name, told in (("norm.bias", "weights are not finite"), ("blocks.0.norm1.weight", "features are not finite")):
        value = torch.nan if name == "norm.bias" else 3e38
        broken = {**weights, name: torch.full_like(weights[name], value)}
        save_file(broken, file)
        out = tmp_path / name
        assert main(["inspect", f"checkpoint={file}", f"images={sample / 'test'}", f"out={out}", "limit=5"]) == 2
        assert told in capsys.readouterr().err
        assert not (out / "inspect.json").exists()
    assert main(["inspect", f"checkpoint={tmp_path / 'other.safetensors'}", f"out={tmp_path / 'weights'}"]) == 0


def test_an_inspection_that_stops_half_way_leaves_no_index_of_other_panels(tiny_model, tmp_path, monkeypatch):
    words = ["inspect", f"checkpoint={tiny_model}", f"out={tmp_path}"]
    assert main(words) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", stop)
    assert main(words) == 130
    assert not (tmp_path / "inspect.json").exists()


def test_the_random_twin_does_not_share_the_first_weights_of_random_models(sample, tmp_path):
    """Both would start from seed 0, and every curve would lie on its baseline."""
    words = ["checkpoint=random:vit_tiny_patch16_224", f"images={sample / 'test'}", "limit=8", f"out={tmp_path / 'x'}"]
    assert main(["inspect", *words]) == 0
    with np.load(tmp_path / "x" / "arrays.npz") as arrays:
        assert not np.allclose(arrays["model/filters"], arrays["random init/filters"], atol=1e-3)
