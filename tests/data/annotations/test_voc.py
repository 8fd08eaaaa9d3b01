"""PASCAL VOC by its folders: masks of objects with void, boxes, lists; and folder masks of labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.annotations.object_masks import MaskFolder, MissingMaskError
from ssl_vit.data.annotations.voc import VOCDataset, read_boxes
from ssl_vit.models.attention_maps import attention_mass_mask, upsample_mask
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization.segmentation_writer import SegmentationWriter

SIZE = (40, 56)  # height and width
NAMES = ["2007_000001", "2007_000002", "2007_000003"]


def instances(seed: int) -> np.ndarray:
    """Two objects and void around one of them."""
    values = np.zeros(SIZE, dtype=np.uint8)
    values[8:24, 4 + seed : 20 + seed] = 255
    values[9:23, 5 + seed : 19 + seed] = 1
    values[20:36, 30:48] = 2
    return values


def write_palette(values: np.ndarray, path: Path) -> None:
    image = Image.fromarray(values, "P")
    image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path)


def annotation(*boxes: tuple[int, int, int, int]) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    objects = [
        "<object><name>cat</name><difficult>1</difficult><part><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
        "<ymax>2</ymax></bndbox></part><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    ]
    return f"<annotation>{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images with all that belongs to them, and one that has boxes alone."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationObject", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for seed, name in enumerate([*NAMES, "2008_000004"]):
        noise = generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        boxes = annotation((6 + seed, 10, 19 + seed, 23), (31, 21, 48, 36))
        (root / "Annotations" / f"{name}.xml").write_text(boxes)
        if name in NAMES:
            write_palette(instances(seed), root / "SegmentationObject" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(NAMES) + "\n")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join([*NAMES, "2008_000004"]))
    return root


def test_annotation_has_the_instances_void_pixels_and_boxes_of_the_files(voc):
    given = VOCDataset(voc, "val").annotation(f"{NAMES[1]}.jpg", SIZE)
    values = torch.from_numpy(instances(1))
    assert torch.equal(given.instances, torch.stack([values == 1, values == 2]))
    assert torch.equal(given.foreground, (values == 1) | (values == 2))
    assert torch.equal(given.valid, values != 255)
    assert given.boxes.tolist() == [[6, 9, 20, 23], [30, 20, 48, 36]]
    assert given.has_masks
    (voc / "Annotations" / f"{NAMES[1]}.xml").unlink()
    assert VOCDataset(voc, "val").annotation(f"{NAMES[1]}.jpg", SIZE).boxes.tolist() == given.boxes.tolist()


def run(voc: Path, tiny_model: Path, out: Path, *words: str) -> dict:
    assert main(["attention", f"checkpoint={tiny_model}", f"voc={voc}", f"out={out}", *words]) == 0
    return json.loads((out / "summary.json").read_text())


def test_attention_voc_scores_the_best_head_of_each_object(voc, tiny_model, tmp_path, capsys):
    record = run(voc, tiny_model, tmp_path / "out", "split=val", "methods=[attention,lost]")
    gallery = SegmentationWriter(tmp_path / "out", [f"{name}.jpg" for name in NAMES])
    oracle, by_mean = [], []
    for place in range(3):
        maps = gallery.load(place).maps
        masks = upsample_mask(attention_mass_mask(torch.cat([maps, maps.mean(0, keepdim=True)]), 0.6), SIZE).numpy()
        values = instances(place)
        ious = []
        for label in (1, 2):
            counted, truth = values != 255, values == label
            ious.append([(m & truth & counted).sum() / ((m | truth) & counted).sum() for m in masks])
        oracle.append(np.mean([max(of_object[:-1]) for of_object in ious]))
        by_mean.append(np.mean([of_object[-1] for of_object in ious]))
    metrics = {metric["name"]: metric for metric in record["score"]["metrics"]}
    assert metrics["object/oracle head"]["value"] == pytest.approx(np.mean(oracle), abs=1e-6)
    assert metrics["object/mean"]["value"] == pytest.approx(np.mean(by_mean), abs=1e-6)
    assert metrics["object/fixed head"]["value"] <= metrics["object/oracle head"]["value"]
    assert metrics["lost CorLoc"]["interval"] == "Wilson"
    assert "each object by itself" in capsys.readouterr().out


def test_attention_voc_scores_baselines_per_object(voc, tiny_model, tmp_path, capsys):
    record = run(voc, tiny_model, tmp_path / "out", "baselines=false")
    baselines = {score["name"]: score for score in record["baselines"]}
    found = {
        name: next(metric["value"] for metric in score["metrics"] if metric["name"] == "object IoU")
        for name, score in baselines.items()
    }
    squares = [upsample_mask(torch.from_numpy(instances(place)), (64, 64)).numpy() for place in range(3)]
    prior, ceiling, whole = [], [], []
    for place in range(3):
        values = instances(place)
        counted, own = values != 255, squares[place]
        average = np.mean([(one == 1) | (one == 2) for other, one in enumerate(squares) if other != place], axis=0)
        guess = average >= np.float32(baselines["center prior"]["details"]["threshold"])
        for label in (1, 2):
            truth = values == label
            inside, pixels = ((part.reshape(5, 8, 7, 8)).sum((1, 3)) for part in (truth, counted))
            mostly = np.kron(inside > pixels / 2, np.ones((8, 8), dtype=bool))
            ceiling.append((mostly & truth).sum() / ((mostly | truth) & counted).sum())
            whole.append(truth.sum() / counted.sum())
            prior.append((guess & (own == label)).sum() / ((guess | (own == label)) & (own != 255)).sum())
    assert found["all foreground"] == pytest.approx(np.mean(whole), abs=1e-6)
    assert found["patch ceiling"] == pytest.approx(np.mean(ceiling), abs=1e-6)
    assert found["center prior"] == pytest.approx(np.mean(prior), abs=1e-6)
    table = capsys.readouterr().out
    assert table.count("  center prior ") == 2


def test_attention_voc_main_split_gives_corloc_only(voc, tiny_model, tmp_path, capsys):
    record = run(voc, tiny_model, tmp_path / "out", "split=Main/trainval", "methods=[attention,lost]")
    names = [metric["name"] for metric in record["score"]["metrics"]]
    assert "lost CorLoc" in names
    assert all(name.endswith("CorLoc") for name in names)
    assert record["score"]["metrics"][0]["n"] == 4
    assert "CorLoc of 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["voc={root}/JPEGImages"], "name the folder of one year"),
        (["voc={root}", "split=test"], "ImageSets/Segmentation has val"),
        (["voc={root}", "masks=elsewhere"], "voc has its own masks"),
        (["voc={root}", "images=elsewhere"], "images=FOLDER, or voc="),
        ([], "images=FOLDER, or voc="),
    ],
)
def test_attention_voc_mistakes_end_with_a_message(voc, tiny_model, tmp_path, capsys, words, message):
    words = [word.format(root=voc) for word in words]
    assert main(["attention", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_annotation_of_unusable_files_gives_the_reason(voc):
    masks, data = voc / "SegmentationObject", VOCDataset(voc, "val")
    write_palette(instances(0)[:, :-1].copy(), masks / f"{NAMES[0]}.png")
    write_palette(np.full(SIZE, 255, dtype=np.uint8), masks / f"{NAMES[1]}.png")
    (masks / f"{NAMES[2]}.png").unlink()
    for name, reason in zip(NAMES, ("55 x 40 pixels", "background or void", "no SegmentationObject"), strict=True):
        with pytest.raises(MissingMaskError, match=reason):
            data.annotation(f"{name}.jpg", SIZE)
    Image.new("RGB", SIZE[::-1]).save(masks / f"{NAMES[2]}.png")
    with pytest.raises(MissingMaskError, match="one index per object"):
        data.annotation(f"{NAMES[2]}.jpg", SIZE)
    for text, reason in (("<annotation>", "cannot be read"), ("<annotation/>", "names no object")):
        (voc / "broken.xml").write_text(text)
        with pytest.raises(MissingMaskError, match=reason):
            read_boxes(voc / "broken.xml")
    (voc / "ImageSets" / "Segmentation" / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="no name in"):
        VOCDataset(voc, "none")


# --- folder masks of labels ---


@pytest.mark.parametrize(
    ("mode", "values", "void"),
    [
        ("L", [0, 255], False),  # binary
        ("P", [0, 255], False),
        ("L", [0, 1, 2, 255], True),  # labels
        ("P", [0, 1, 200, 255], True),
        ("L", [0, 40, 128, 220, 255], False),  # soft edges
        ("L", [0, 128], False),
    ],
)
def test_mask_folder_takes_255_for_void_in_label_masks_only(tmp_path, mode, values, void):
    mask = np.resize(np.array(values, dtype=np.uint8), (6, 10))
    if mode == "P":
        write_palette(mask, tmp_path / "a.png")
    else:
        Image.fromarray(mask).save(tmp_path / "a.png")
    folder = MaskFolder(tmp_path)
    given = folder.annotation("a.jpg", (6, 10))
    assert torch.equal(given.valid, torch.from_numpy((mask != 255) | (not void)))
    least = 127 if len(values) == 5 else 0
    assert torch.equal(given.foreground, torch.from_numpy((mask > least) & ((mask != 255) | (not void))))
    assert any("255 is void" in note for note in folder.notes()) == void
