"""`ssl-vit inspect`: of a run, of a folder with corrupt images, with another model, without images."""

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
from ssl_vit.models.export import export_backbone, file_sha256

IMAGE_FIGURES = ["rollout", "distance", "entropy", "prefix", "diversity", "norms", "spectrum", "layers"]
WEIGHT_FIGURES = ["positions", "filters"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def export_model(folder: Path, **sizes) -> Path:
    """Export a model of other sizes than `tiny_model`."""
    torch.manual_seed(1)
    values = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 16, "reg_tokens": 0, "depth": 3} | sizes
    config = BackboneConfig(in_chans=3, drop_path=0.0, embed_dim=32, num_heads=2, init="jax", **values)
    path = folder / "other.safetensors"
    export_backbone(Backbone(config).eval(), path, mean=[0.5] * 3, std=[0.5] * 3, source="a test")
    return path


def read(out: Path):
    """Read `inspect.json` and the arrays, after checking the files that it lists."""
    content = json.loads((out / "inspect.json").read_text())
    for figure in content["figures"]:
        with Image.open(out / figure["file"]) as image:
            assert image.mode == "RGB"
            assert 700 <= image.width <= 1400
        assert len(figure["title"]) > 8
        assert len(figure["text"]) > 100
    with np.load(out / "arrays.npz") as file:
        arrays = dict(file)
    assert {name: list(values.shape) for name, values in arrays.items()} == content["arrays"]
    return content, arrays


def names(content):
    return [Path(figure["file"]).stem for figure in content["figures"]]


def test_inspect_draws_every_figure_of_real_images(cifar, tiny_model, tmp_path, capsys):
    out, other = tmp_path / "out", export_model(tmp_path, reg_tokens=2)
    argv = [f"checkpoint={tiny_model}", f"images={cifar / 'test'}", f"out={out}", "limit=40", f"compare_to={other}"]
    assert main(["inspect", *argv]) == 0
    assert "11 figures of 40 images" in capsys.readouterr().out
    content, arrays = read(out)
    assert names(content) == [*IMAGE_FIGURES, "comparison", *WEIGHT_FIGURES]
    assert content["schema"] == 1
    assert content["skipped"] == {}
    assert content["images"]["count"] == 40
    for kind in ("distance", "entropy", "prefix", "diversity"):
        for model in ("model", "random init"):
            assert arrays[f"{model}/{kind}"].shape == (2, 3)
            assert content["statistics"][kind][model] == pytest.approx(arrays[f"{model}/{kind}"].mean(1))
    assert content["statistics"]["distance"]["uniform"] == pytest.approx(16.06, abs=0.01)  # 4 x 4 patches of 8 pixels
    assert arrays["model/cka with model"].diagonal() == pytest.approx(np.ones(2))
    comparison = next(name for name in arrays if "cka with other" in name)
    assert arrays[comparison].shape == (2, 3)
    assert (np.abs(arrays[comparison]) < 1).all()
    spectrum = content["statistics"]["spectrum"]
    assert 1 < spectrum["model"]["effective_rank"] < 40
    assert spectrum["features"] == "[CLS] tokens"


def test_inspect_is_reproducible_for_a_seed(sample, tiny_model, tmp_path):
    argv = [f"checkpoint={tiny_model}", f"images={sample / 'test'}", f"out={tmp_path}", "limit=6", "seed=3"]
    results = []
    for _ in range(2):
        assert main(["inspect", *argv, "baselines=false"]) == 0
        results.append(read(tmp_path)[1])
    assert not any("random" in name for name in results[0])
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])


def test_inspect_uses_the_images_of_the_run_by_default(sample, tiny_model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for suffix in (".safetensors", ".json"):
        shutil.copy(tiny_model.with_suffix(suffix), run / f"backbone{suffix}")
    values = {"data": {"source": "folder", "root": str(sample / "train")}, "trainer": {"max_epochs": 1, "max_steps": 1}}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["inspect", f"checkpoint={run}", "limit=5"]) == 0
    content, _ = read(run / "inspect")
    assert names(content) == [*IMAGE_FIGURES, *WEIGHT_FIGURES]
    assert str(sample / "train") in content["images"]["dataset"]["text"]
    values["data"]["root"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["inspect", f"checkpoint={run}"]) == 0
    content, _ = read(run / "inspect")
    assert names(content) == WEIGHT_FIGURES


def test_inspect_draws_the_weights_without_images(tiny_model, tmp_path, capsys):
    assert main(["inspect", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", f"compare_to={tiny_model}"]) == 0
    content, arrays = read(tmp_path / "out")
    assert names(content) == WEIGHT_FIGURES
    assert content["skipped"].keys() == {*IMAGE_FIGURES, "comparison"}
    assert content["images"] == {"count": 0, "skipped": 0, "dataset": None, "notes": []}
    assert arrays["model/positions"].shape == (4, 4, 4, 4)
    assert "images=FOLDER" in capsys.readouterr().out


def test_inspect_reports_figures_that_need_a_class_token(sample, tmp_path):
    file = export_model(tmp_path, name="vit_medium_patch16_gap_256", patch_size=8)
    argv = [f"checkpoint={file}", f"images={sample / 'test'}", f"out={tmp_path / 'out'}", "limit=5"]
    assert main(["inspect", *argv]) == 0
    content, _ = read(tmp_path / "out")
    assert content["skipped"].keys() == {"rollout", "prefix"}
    assert "class token" in content["skipped"]["rollout"]
    assert content["statistics"]["spectrum"]["features"] == "mean patch tokens"


def test_inspect_of_a_model_with_registers_at_another_size(sample, tmp_path):
    file = export_model(tmp_path, reg_tokens=4, patch_size=8)
    argv = [f"checkpoint={file}", f"images={sample / 'test'}", f"out={tmp_path / 'out'}", "limit=5", "image_size=48"]
    assert main(["inspect", *argv]) == 0
    content, arrays = read(tmp_path / "out")
    assert content["skipped"] == {}
    text = next(figure["text"] for figure in content["figures"] if figure["file"] == "prefix.png")
    assert "the class token and 4 registers" in text
    assert arrays["model/prefix by token"].shape == (3, 2, 5)
    assert content["statistics"]["distance"]["uniform"] == pytest.approx(0.52 * 48, rel=0.02)


def test_inspect_skips_and_lists_corrupt_images(tiny_model, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index, shape in enumerate([(40, 30, 3), (9, 60, 3), (33, 50), (50, 33, 4)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(images / f"{index}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    argv = ["inspect", f"checkpoint={tiny_model}", f"images={images}", f"out={tmp_path / 'out'}"]
    assert main(argv) == 0
    content, _ = read(tmp_path / "out")
    assert (content["images"]["count"], content["images"]["skipped"]) == (4, 1)
    assert (tmp_path / "out" / "skipped_images.txt").read_text().startswith("broken.jpg\t")
    assert "1 image could not be read" in capsys.readouterr().out
    assert main([*argv, f"images={images / '2.png'}", "baselines=false"]) == 0
    content, _ = read(tmp_path / "out")
    assert content["images"]["count"] == 1
    assert content["skipped"] == {"layers": "1 images: CKA needs at least 4"}
    (images / "only").mkdir()
    shutil.move(images / "broken.jpg", images / "only")
    assert main([*argv, f"images={images / 'only'}"]) == 2
    assert "no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["images={folder}/nowhere"], "does not exist"),
        (["images={folder}", "out={folder}/inspect"], "would be written over images="),
        (["images={folder}", "image_size=20"], "image_size=20"),
        (["images={folder}", "compare_to={folder}/nothing"], "there is no such file or folder"),
        (["limit=0"], "limit"),
        (["checkpoint=random:vit_nothing"], "vit_nothing"),
    ],
)
def test_inspect_reports_mistakes_without_a_traceback(sample, tiny_model, tmp_path, capsys, argv, message):
    argv = [override.format(folder=sample / "test") for override in argv]
    assert main(["inspect", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_inspect_rejects_a_model_that_has_diverged(sample, tmp_path, capsys):
    file = export_model(tmp_path)
    weights = load_file(file)
    for name, message in (
        ("norm.bias", "weights are not finite"),
        ("blocks.0.norm1.weight", "features are not finite"),
    ):
        value = torch.nan if name == "norm.bias" else 3e38
        save_file({**weights, name: torch.full_like(weights[name], value)}, file)
        sidecar = json.loads(file.with_suffix(".json").read_text()) | {"sha256": file_sha256(file)}
        file.with_suffix(".json").write_text(json.dumps(sidecar))
        out = tmp_path / name
        assert main(["inspect", f"checkpoint={file}", f"images={sample / 'test'}", f"out={out}", "limit=5"]) == 2
        assert message in capsys.readouterr().err
        assert not (out / "inspect.json").exists()
    assert main(["inspect", f"checkpoint={file}", f"out={tmp_path / 'weights'}"]) == 0


def test_inspect_leaves_no_stale_json_when_interrupted(tiny_model, tmp_path, monkeypatch):
    argv = ["inspect", f"checkpoint={tiny_model}", f"out={tmp_path}"]
    assert main(argv) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", stop)
    assert main(argv) == 130
    assert not (tmp_path / "inspect.json").exists()


def test_inspect_baseline_differs_from_a_random_checkpoint(sample, tmp_path):
    """Both would otherwise be initialized from seed 0."""
    argv = ["checkpoint=random:vit_tiny_patch16_224", f"images={sample / 'test'}", "limit=8", f"out={tmp_path / 'x'}"]
    assert main(["inspect", *argv]) == 0
    with np.load(tmp_path / "x" / "arrays.npz") as arrays:
        assert not np.allclose(arrays["model/filters"], arrays["random init/filters"], atol=1e-3)
