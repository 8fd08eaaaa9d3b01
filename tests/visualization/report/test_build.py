"""`ssl-vit report` collects what a run directory contains, and names what is missing."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ssl_vit.cli import main
from ssl_vit.commands import report
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.visualize import ReportConfig
from ssl_vit.data.annotations.object_masks import MaskFolder
from ssl_vit.data.dataset import SkippedImageLog
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract
from ssl_vit.evaluation.results.eval_result import DataInfo, EvalResult, Metric, ModelInfo, ModelScores
from ssl_vit.evaluation.segmentation.iou import iou, pool_mask_to_patches
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.report.build import collect_report
from ssl_vit.visualization.report.report_data import downscale_images

QUICK = ["inspect=false", "data.num_workers=0", "limit=4", "k=3", "points=20"]
CONFIG = {
    "seed": 7,
    "run": {"name": "tiny"},
    "data": {"source": "folder", "root": "gone"},
    "method": {"name": "dino", "head": {"prototypes": 64}},
    "trainer": {"max_epochs": 3, "max_steps": None, "max_time": None},
}
METRICS = "step,epoch,online/knn@20,online/seconds,train/loss\n0,0,0.25,3.0,\n9,0,,,4.0\n19,1,0.5,3.0,2.0\n"


def make_run(folder, network, **config):
    """Create a minimal run: a config and weights."""
    folder.mkdir(parents=True)
    shutil.copy(network, folder / "backbone.safetensors")
    shutil.copy(network.with_suffix(".json"), folder / "backbone.json")
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **config}), encoding="utf-8")
    return folder


def gathered(run, *words):
    return collect_report(load_config("report", [f"run={run}", *QUICK, *words], ReportConfig), "ssl-vit report")


def strict(path):
    """Read a JSON file; anything that strict JSON does not know fails."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def measured(sample, tiny_model, tmp_path_factory):
    """Return a run with kNN results, cached features, attention with masks, metrics and health warnings."""
    run = make_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model)
    (run / "metrics.csv").write_text(METRICS)
    (run / "health.jsonl").write_text('{"step": 11, "name": "diverging", "finding": "it is", "remedy": "Less."}\n')
    (run / "skipped_steps.jsonl").write_text('{"step": 4, "process": 0}\n{"step": 4, "process": 1}\n{"step": 6}\n')
    knn = [f"checkpoint={run}", f"data.root={sample}", "data.num_workers=0", "k=[3,20]", "figure=false"]
    assert main(["knn", *knn]) == 0
    attention = [f"images={sample / 'test'}", f"masks={sample / 'test_masks'}", f"out={run / 'attention'}", "limit=12"]
    assert main(["attention", f"checkpoint={run}", *attention]) == 0
    return run


@pytest.fixture(scope="module")
def content(measured):
    return gathered(measured)


@pytest.fixture
def copied(measured, tmp_path):
    """Return a copy of the run that may be damaged."""
    return shutil.copytree(measured, tmp_path / "copied")


# --- what is shown is what was measured ---


def test_collect_report_metadata_names_the_model_and_its_source(content, measured, tiny_model):
    loaded = load_backbone(str(tiny_model))
    assert content.title == "tiny"
    assert content.metadata["checkpoint sha256"] == loaded.sha256
    assert content.metadata["checkpoint"] == str(measured / "backbone.safetensors")
    assert content.metadata["parameters"] == f"{sum(p.numel() for p in loaded.backbone.parameters()):,}"
    assert content.metadata["model"].startswith("vit_tiny_patch16_224: width 48, 2 blocks, 3 heads")
    assert content.metadata["seed of the training"] == "7 (one run)"
    assert content.metadata["length planned"] == "3 epochs"
    assert content.metadata["made by"] == "ssl-vit report"
    assert content.caption["model"] == "ViT, 48 wide, 2 blocks, 32 px in patches of 8"
    assert content.config == CONFIG


def test_metric_rows_are_the_numbers_of_the_results_with_their_baselines(content, measured):
    result = strict(next((measured / "eval").glob("knn-*.json")))
    shown = {line.metric: line for line in content.metrics if line.task == "knn"}
    wanted = {metric["name"]: metric for metric in result["score"]["metrics"] if metric["name"].startswith("top-1")}
    assert shown.keys() == wanted.keys() == {"top-1, k=3", "top-1, k=20"}
    for name, metric in wanted.items():
        line = shown[name]
        assert (line.value, line.low, line.high, line.n) == tuple(metric[key] for key in ("value", "low", "high", "n"))
        assert line.interval == "Wilson"
        assert line.baselines == {
            score["name"]: next(m["value"] for m in score["metrics"] if m["name"] == name)
            for score in result["baselines"]
        }
        assert line.baselines.keys() == {"random init", "raw pixels"}
        assert line.result == f"eval/knn-{result['data']['name']}.json"
    assert [line.level for line in shown.values()] == ["main" if name == "top-1, k=20" else "further" for name in shown]
    assert all(warning in shown["top-1, k=20"].remark for warning in result["warnings"])  # not at a folded one
    assert shown["top-1, k=3"].remark == ""


def test_metric_rows_of_attention_have_the_center_prior_and_their_level(content, measured):
    result = strict(measured / "attention" / "summary.json")
    shown = {line.metric: line for line in content.metrics if line.task == "attention"}
    baselines = {score["name"]: score["metrics"] for score in result["baselines"]}
    line = shown["mass/oracle head"]
    assert not any(name.endswith((" acc", "CorLoc")) for name in shown)
    assert line.baselines["center prior"] == baselines["center prior"][0]["value"]
    assert line.baselines["random init"] == next(
        metric["value"] for metric in baselines["random init"] if metric["name"] == "mass/oracle head"
    )
    assert "patch ceiling" not in line.baselines  # nothing to be above of
    assert f"more than {baselines['patch ceiling'][0]['value']:.2f}" in line.remark
    assert "ground-truth mask" in line.remark
    assert line.title == "masks with 60 % of the attention: each image's best head"
    ranks = {name: other.level for name, other in shown.items() if "/" in name}
    assert {name for name, rank in ranks.items() if rank == "main"} == {"mass/mean", "mass/fixed head"}
    assert {name for name, rank in ranks.items() if rank == "ground truth"} == {
        "mass/oracle head", "area/mean", "area/fixed head", "area/oracle head"
    }  # fmt: skip


def test_collect_report_curves_and_health_warnings(content):
    online, loss = content.curves
    assert (online.title, online.baseline) == ("Online accuracy, kNN, k = 20", 0.25)
    assert online.lines == {"knn@20": [(0, 0.25), (19, 0.5)]}
    assert loss.lines == {"loss": [(9, 4.0), (19, 2.0)]}
    assert [(verdict.name, verdict.step) for verdict in content.health_warnings] == [
        ("diverging", 11),
        ("skipped-steps", 4),
    ]
    assert content.health_warnings[0].remedy == "Less."
    assert "2 steps were skipped, steps 4 to 6" in content.health_warnings[1].text


def test_make_gallery_uses_the_images_and_masks_of_the_attention_result(content, measured, sample):
    names = [scan_image_folder(sample / "test").name(place) for place in (6, 18, 30, 42)]  # evenly spread
    assert [seen.name for seen in content.gallery] == [each.name for each in content.masks] == names
    truths = MaskFolder(sample / "test_masks")
    with np.load(measured / "attention" / "ious.npz") as arrays:
        ious = dict(zip(arrays["images"].tolist(), arrays["model/mass/mean"].tolist(), strict=True))
    assert names[0] in ious
    for seen, each in zip(content.gallery, content.masks, strict=True):
        truth = truths.read(seen.name, (48, 48))
        assert torch.equal(seen.ground_truth, truth)
        assert torch.equal(each.ground_truth, truth)
        torch.testing.assert_close(seen.maps.sum((-2, -1)), torch.ones(3))
        assert len(seen.ious) == 4
        assert each.ious["attention"] == pytest.approx(seen.ious[-1])
        assert list(each.ious) == ["attention", "lost", "tokencut", "pca", "found"]
        counted = pool_mask_to_patches(truth, seen.maps.shape[1:])
        for name, mask in zip(each.ious, each.masks, strict=True):
            assert each.ious[name] == pytest.approx(iou(mask, counted).item())
        assert seen.name not in ious or seen.ious[-1] == pytest.approx(ious[seen.name], abs=1e-6)


def test_neighbor_rows_are_the_nearest_training_images_of_cached_features(content, sample, tiny_model):
    loaded = load_backbone(str(tiny_model))
    transform = EvalTransform(32, 0.875, loaded.mean, loaded.std)
    bank, asked = (scan_image_folder(sample / part) for part in ("train", "test"))
    extractor, skipped = BackboneExtractor(loaded, transform, blocks=1), SkippedImageLog(sample / "no")
    found = [extract(extractor, part, batch_size=64, num_workers=0, skipped=skipped) for part in (bank, asked)]
    known, asking = (torch.nn.functional.normalize(part.cls[:, -1], dim=1) for part in found)
    similarity = asking @ known.T
    assert 8 < len(content.neighbors) <= 12
    place = {asked.name(index): index for index in range(len(asked))}
    for query, *nears in content.neighbors:
        row = place[query.name]
        assert query.similarity is None
        assert query.label == asked.classes[asked.labels[row]] == query.name.partition("/")[0]
        best = similarity[row].topk(3)
        assert [near.similarity for near in nears] == pytest.approx(best.values.tolist(), abs=2e-3)  # float16 stored
        assert [near.label for near in nears] == [near.name.partition("/")[0] for near in nears]
    wrong = [[near.label == query.label for near in nears] for query, *nears in content.neighbors[8:]]
    assert not any(all(row) for row in wrong)  # failures


def test_embedding_map_has_the_principal_components_of_evenly_spaced_images(content, sample):
    features = content.embedding_map
    assert features.points.shape == (20, 2)
    assert features.classes == scan_image_folder(sample / "test").classes
    assert [features.classes[label] for label in features.labels.tolist()] == [
        name.partition("/")[0] for name in features.names
    ]
    torch.testing.assert_close(features.points.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    assert abs((features.points[:, 0] * features.points[:, 1]).sum()) < 1e-5  # orthogonal
    assert (features.points**3).sum(0).min() >= 0
    assert max(max(image.size) for image in features.images) == 40
    assert "of the variance" in features.text


def test_collect_report_missing_names_the_command(content, measured):
    assert content.missing.keys() == {"Figures"}
    assert f"`ssl-vit inspect checkpoint={measured}`" in content.missing["Figures"]


def test_collect_report_protocol_covers_every_section(content):
    assert content.protocol.keys() >= {"Numbers", "Training", "Attention", "Masks", "Neighbors", "Feature map"}
    assert "stored features of 192 images" in content.protocol["Neighbors"]
    truths = torch.stack([each.ground_truth for each in content.masks])
    assert f"the whole image {truths.double().mean():.2f}, the center prior" in content.protocol["Masks"]
    assert "failures" in content.neighbors_text


# --- the files ---


def test_report_page_and_json_agree_and_are_reproducible(measured, tmp_path, capsys):
    words = [f"run={measured}", *QUICK]
    assert main(["report", *words, f"out={tmp_path / 'page.html'}"]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'page.html'}: " in printed
    assert "ssl-vit inspect" in printed
    assert "<title>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    plain = strict(tmp_path / "page.json")
    again = gathered(measured)
    assert [line["value"] for line in plain["metrics"]] == [line.value for line in again.metrics]
    assert [line["ious"] for line in plain["gallery"]] == [seen.ious for seen in again.gallery]
    assert [line["ious"] for line in plain["masks"]] == [each.ious for each in again.masks]
    assert [[near["name"] for near in row] for row in plain["neighbors"]] == [
        [near.name for near in row] for row in again.neighbors
    ]
    assert [
        [point["x"], point["y"]] for point in plain["embedding_map"]["points"]
    ] == again.embedding_map.points.tolist()
    assert plain["protocol"] == again.protocol
    assert plain["missing"] == again.missing
    assert plain["metadata"].pop("made by").startswith(f"ssl-vit report run={measured}")
    times = {"report made", "made by"}
    assert plain["metadata"].keys() - times == again.metadata.keys() - times
    assert all(plain["metadata"][name] == again.metadata[name] for name in again.metadata.keys() - times)


def test_report_is_written_into_the_run_and_the_old_one_survives_a_failure(copied, monkeypatch):
    assert main(["report", f"run={copied}", *QUICK]) == 0
    before = {name: (copied / name).read_bytes() for name in ("report.html", "report.json")}

    def stop(content):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render", stop)
    assert main(["report", f"run={copied}", *QUICK, "attention_mass=0.3"]) == 130
    assert {name: (copied / name).read_bytes() for name in before} == before
    assert not list(copied.glob(".report*"))


def test_report_halves_the_images_of_a_page_that_is_too_large(copied, monkeypatch, capsys):
    monkeypatch.setattr(report, "render", lambda content: "x" * content.gallery[0].image.width)
    monkeypatch.setattr(report, "MAX_BYTES", 30)
    assert main(["report", f"run={copied}", *QUICK]) == 0
    assert len((copied / "report.html").read_text()) == 24  # of 48 pixels
    assert "its images are halved" in capsys.readouterr().out


def test_downscale_images_halves_all_images(content):
    half = downscale_images(content)
    assert half.gallery[0].image.size == half.masks[0].image.size == (24, 24)
    assert half.neighbors[0][0].image.size == (24, 24)
    assert half.embedding_map.images[0].size == (20, 20)


# --- what is not there, or damaged ---


def test_collect_report_of_only_config_and_weights(tiny_model, tmp_path):
    content = gathered(make_run(tmp_path / "bare", tiny_model))
    assert content.metadata["model"].startswith("vit_tiny")
    assert content.missing.keys() == {
        "Numbers", "Training", "Attention", "Neighbors", "Feature map", "Figures"
    }  # fmt: skip
    assert f"`ssl-vit knn checkpoint={tmp_path / 'bare'} data.root=LABELED`" in content.missing["Numbers"]
    assert f"out={tmp_path / 'bare'}/attention`" in content.missing["Numbers"]
    assert "gone does not exist" in content.missing["Attention"]
    assert "images=FOLDER" in content.missing["Neighbors"]
    assert not (content.metrics or content.curves or content.gallery or content.neighbors or content.embedding_map)


def test_collect_report_uses_the_runs_own_images_without_labels(tiny_model, sample, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted((sample / "test").glob("*/*.png"))[:10]:
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    (flat / "broken.jpg").write_bytes(b"no image")
    content = gathered(make_run(tmp_path / "own", tiny_model, data={"source": "folder", "root": str(flat)}))
    assert len(content.gallery) == 4 - content.protocol["Attention"].count("could not be used")
    assert content.masks == []
    assert "masks=FOLDER" in content.missing["Masks"]
    assert all(near.label is None for row in content.neighbors for near in row)
    assert all(query.name not in {near.name for near in nears} for query, *nears in content.neighbors)
    assert len(content.neighbors) == 8
    assert set(content.embedding_map.labels.tolist()) == {-1}
    assert "broken.jpg" in content.protocol["Neighbors"]


def test_report_writes_hostile_names_as_text(tiny_model, sample, tmp_path):
    folder = tmp_path / "odd"
    names = ["script><b>.png", "two\nlines.png", os.fsdecode(b"caf\xe9.png"), "'\"&.png"]
    for place, file in enumerate(sorted((sample / "test").glob("*/*.png"))[:4]):
        (folder / f"{place % 2}<").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{place % 2}<" / names[place])
    run = make_run(tmp_path / "run", tiny_model, run={"name": "</script>\n"})
    with (run / "health.jsonl").open("w") as journal:
        journal.write(json.dumps({"step": 1, "name": "</script>", "finding": "\ud800", "remedy": "\0"}))
    assert main(["report", f"run={run}", *QUICK, f"data.root={folder}", f"images={folder}"]) == 0
    plain = strict(run / "report.json")
    shown = {seen["name"] for seen in plain["gallery"]}
    assert {"0</script><b>.png", "1</two\\nlines.png", "0</caf\\xe9.png"} <= shown
    assert plain["health_warnings"][0]["text"] == "\ud800"
    assert "\n" not in plain["title"]
    assert (run / "report.html").read_text(encoding="utf-8")


def test_collect_report_names_damaged_parts_and_keeps_the_others(copied):
    (copied / "eval" / "other.json").write_text('{"schema": 2, "task"')
    (copied / "metrics.csv").write_bytes(b"\x00\xff garbage")
    (copied / "health.jsonl").write_text('{"step": 1, "na\n[]\n')
    (copied / "config.yaml").write_text("a: [1\n")
    content = gathered(copied)
    assert "other.json: not a JSON file" in content.missing["Numbers"]
    assert "damaged" in content.missing["Configuration"]
    assert "metrics.csv" in content.missing["Training"]
    assert "2 lines" in content.protocol["Health"]
    assert len(content.metrics) > 2
    assert content.neighbors


def test_read_run_finds_attention_results_in_any_folder_of_the_run(copied):
    (copied / "more").mkdir()
    (copied / "attention").rename(copied / "more" / "maps")
    content = gathered(copied)
    assert "more/maps/summary.json" in {row.result for row in content.metrics}
    assert len(content.masks) == 4


def test_collect_report_without_weights_still_has_the_metrics(copied):
    (copied / "backbone.safetensors").unlink()
    content = gathered(copied)
    assert "no checkpoints/last.ckpt and no backbone.safetensors" in content.metadata["checkpoint"]
    assert "backbone.safetensors" in content.missing["Attention"]
    assert "backbone.safetensors" in content.missing["Neighbors"]
    assert len(content.metrics) > 2


def test_metric_rows_of_another_checkpoint_are_marked(copied, content):
    path = next((copied / "eval").glob("knn-*.json"))
    result = strict(path)
    result["model"] |= {"sha256": "0" * 64, "state_sha256": "1" * 64, "step": 4000}
    path.write_text(json.dumps(result))
    marked = {line.task: line.remark for line in gathered(copied).metrics}
    assert "of another checkpoint than this page shows, after 4,000 steps" in marked["knn"]
    assert not any("another checkpoint" in line.remark for line in content.metrics)
    assert "another checkpoint" not in marked["attention"]


def test_metric_rows_of_the_same_weights_in_another_file_are_not_marked(copied):
    path = next((copied / "eval").glob("knn-*.json"))
    result = strict(path)
    result["model"]["sha256"] = "0" * 64
    path.write_text(json.dumps(result))
    assert not any("another checkpoint" in line.remark for line in gathered(copied).metrics)


def test_make_gallery_with_masks_of_other_images(measured, sample, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("L", (9, 9), 255).save(tmp_path / "masks" / "other.png")
    content = gathered(measured, f"images={sample / 'test'}", f"masks={tmp_path / 'masks'}")
    assert len(content.gallery) == 4
    assert "usable mask" in content.missing["Masks"]


def test_read_inspection_figures(copied):
    (copied / "inspect").mkdir()
    for name in ("distance.png", "reconstruction.png"):
        Image.new("RGB", (2600, 20)).save(copied / "inspect" / name)
    figures = [
        {"file": name, "title": name, "text": "look"} for name in ("distance.png", "reconstruction.png", "no.png")
    ]
    (copied / "inspect" / "inspect.json").write_text(json.dumps({"schema": 1, "figures": figures}))
    content = gathered(copied)
    assert [(figure.title, figure.text, figure.image.size) for figure in content.figures] == [
        ("distance.png", "look", (1300, 10)),
        ("reconstruction.png", "look", (1300, 10)),
    ]
    assert "another checkpoint" not in content.missing["Figures"]
    assert "no.png" in content.missing["Figures"]


def test_report_inspects_a_model_that_was_not_inspected(copied):
    assert main(["report", f"run={copied}", *QUICK, "inspect=true", "limit=1", "points=3"]) == 0
    plain = strict(copied / "report.json")
    figures = strict(copied / "inspect" / "inspect.json")["figures"]
    assert [figure["title"] for figure in plain["figures"]] == [figure["title"] for figure in figures]
    assert figures
    assert "without images" in plain["missing"]["Figures"]  # the run's own are gone


def test_report_without_inspection_or_images_of_it_names_the_reason(copied, capsys, sample):
    (copied / "inspect").mkdir()
    (copied / "inspect" / "inspect.json").write_text(
        json.dumps({"figures": [], "images": {"count": 0, "dataset": None}})
    )
    told = gathered(copied).missing["Figures"]
    assert "without images: inspect again with images=FOLDER. `ssl-vit inspect checkpoint=" in told
    (copied / "inspect" / "inspect.json").unlink()
    config = load_config("report", [f"run={copied}", f"images={sample / 'test'}"], ReportConfig)
    report._inspect(config)
    about = strict(copied / "inspect" / "inspect.json")
    assert str(sample / "test") in about["images"]["dataset"]["text"]
    shutil.rmtree(copied / "inspect")
    (copied / "inspect").write_text("a file where the folder should be")
    report._inspect(config)
    assert "No drawings of what is inside the model: " in capsys.readouterr().out


def test_report_checks_before_the_work_that_the_page_can_be_written(copied, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "collect_report", None)  # it would fail
    (tmp_path / "data.json").write_text("{}")
    assert main(["report", f"run={copied}", *QUICK, f"out={tmp_path / 'data.html'}"]) == 2
    assert "data.json exists and is not of ssl-vit" in capsys.readouterr().err
    assert (tmp_path / "data.json").read_text() == "{}"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert main(["report", f"run={copied}", *QUICK, f"out={tmp_path / 'new' / 'page.html'}"]) == 2
    assert f"{tmp_path} cannot be written to: choose another out=FILE.html" in capsys.readouterr().err


def test_report_config_has_every_type_of_yaml(tiny_model, tmp_path):
    run = make_run(tmp_path / "run", tiny_model)
    with (run / "config.yaml").open("a") as file:
        file.write("day: 2024-01-31\n1: .nan\nnames: !!set {a: null}\n")
    assert main(["report", f"run={run}", *QUICK]) == 0
    config = strict(run / "report.json")["config"]
    assert (config["day"], config["1"], config["names"]) == ("2024-01-31", None, "{'a'}")


def test_report_names_a_diverged_run_in_every_section(tiny_model, sample, tmp_path):
    run = make_run(tmp_path / "run", tiny_model)
    weights = load_file(run / "backbone.safetensors")
    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in weights.items()}, run / "backbone.safetensors"
    )
    (run / "metrics.csv").write_text("step,epoch,train/loss\n9,0,4.0\n19,0,nan\n")
    words = [*QUICK, "inspect=true", f"images={sample / 'test'}", f"data.root={sample / 'train'}"]
    assert main(["report", f"run={run}", *words]) == 0
    plain = strict(run / "report.json")
    assert plain["curves"][0]["lines"] == {"loss": [[9.0, 4.0]]}
    assert "1 of train/loss" in plain["protocol"]["Training"]
    for section in ("Attention", "Neighbors", "Feature map"):
        assert "diverged" in plain["missing"][section]
    assert "has not been inspected" in plain["missing"]["Figures"]


def test_collect_report_of_a_finetuning_names_its_start_and_uses_its_own_images(tiny_model, sample, tmp_path):
    data = {"source": "folder", "root": None, "train": str(sample / "train"), "test": str(sample / "test")}
    run = make_run(tmp_path / "run", tiny_model, checkpoint="runs/start", method={"flip": 0.5}, data=data)
    (run / "metrics.csv").write_text("step,epoch,val/top1,val/loss\n1,1,0.25,2.0\n")
    EvalResult(
        task="finetune",
        protocol={},
        model=ModelInfo(name="start", source="runs/start (teacher)", state_sha256="1" * 64, step=9),
        data=DataInfo(name="sample"),
        score=ModelScores(name="model", metrics=[Metric(name="top-1", value=0.5, n=9, low=0.4, high=0.6)]),
        baselines=[],
        config={"checkpoint": "runs/start"},
    ).write(run / "eval" / "finetune-sample.json")
    content = gathered(run)
    assert content.metadata["method"] == "fine-tuning of runs/start"
    assert [row.remark for row in content.metrics] == ["fine-tuned from runs/start (teacher)"]
    assert [(curve.title, curve.lines) for curve in content.curves] == [
        ("Accuracy on val images", {"top-1": [(1, 0.25)]}),
        ("Loss on val images", {"loss": [(1, 2.0)]}),
    ]
    assert len(content.gallery) == 4
    assert content.neighbors


def test_read_inspection_of_another_checkpoint_is_marked(copied):
    (copied / "inspect").mkdir()
    about = {"figures": [], "model": {"state_sha256": "0" * 64}, "images": {"count": 9}, "protocol": {"rollout": "so"}}
    (copied / "inspect" / "inspect.json").write_text(json.dumps(about))
    content = gathered(copied)
    assert "another checkpoint" in content.missing["Figures"]
    assert content.protocol["Figures"] == "Of 9 images. `rollout`: so."
    (copied / "inspect" / "inspect.json").write_text("[]")
    assert "is damaged: inspect again. `ssl-vit inspect" in gathered(copied).missing["Figures"]


def test_read_logged_figures_returns_the_first_and_the_last_of_each_kind(copied):
    (copied / "images").mkdir()
    for kind in ("attention", "reconstruction"):
        for step in (0, 50, 1200):
            Image.new("RGB", (step + 10, 10)).save(copied / "images" / f"{kind}-{step:07d}.jpg")
    Image.new("RGB", (7, 7)).save(copied / "images" / "some_other_kind-0000003.jpg")
    (copied / "images" / "attention-0000000.jpg").write_bytes(b"broken")
    content = gathered(copied)
    assert [(figure.title, figure.image.width) for figure in content.figures] == [
        ("Attention after 1,200 steps", 1210),
        ("Reconstruction after 0 steps", 10),
        ("Reconstruction after 1,200 steps", 1210),
        ("Some other kind after 3 steps", 7),
    ]
    assert "attention-0000000.jpg" in content.missing["Figures"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run=nowhere"], "run=nowhere does not exist"),
        (["run={folder}"], "is no run: it holds none of config.yaml"),
        (["run={folder}/file"], "is a file; name the run folder"),
        (["run=x", "maks=y"], "maks: unknown key; the nearest valid one is masks"),
        (["run=x", "masks=y"], "masks requires images"),
        (["run=x", "out=page.pdf"], "must be an .html file"),
        (["run=x", "points=2"], "points"),
    ],
)
def test_report_rejects_mistakes_before_any_work(words, told, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["report", *(word.format(folder=tmp_path) for word in words)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_embedding_map_by_tsne_is_reproducible(measured):
    pytest.importorskip("sklearn")
    one, other = (gathered(measured, "projection=tsne").embedding_map for _ in range(2))
    assert one.points.shape == (20, 2)
    assert torch.equal(one.points, other.points)
    assert "distances mean little" in one.text


def test_collect_report_has_no_silent_fallback_for_named_images(measured, tmp_path):
    content = gathered(measured, f"images={tmp_path / 'gone'}", f"data.root={tmp_path / 'gone'}")
    assert "does not exist" in content.missing["Attention"]
    assert "does not exist" in content.missing["Neighbors"]
    with pytest.raises(UserError, match="exclude each other"):
        gathered(measured, "data.root=a", "data.train=b")
