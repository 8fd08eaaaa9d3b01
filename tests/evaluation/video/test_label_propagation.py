"""`ssl-vit propagate`: label propagation, J and F against slow textbook forms; whole folders."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.config.types import ValueRange
from ssl_vit.data.annotations.davis import default_palette, read_mask, write_mask
from ssl_vit.data.dataset import UnreadableImageError
from ssl_vit.evaluation.video.davis_metrics import (
    boundaries,
    boundary_accuracy,
    dilate,
    region_similarity,
    sequence_stats,
)
from ssl_vit.evaluation.video.label_propagation import (
    LabelPropagator,
    PropagationConfig,
    Source,
    input_size,
    propagate,
    to_classes,
)
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from tests.models.test_backbone import tiny
from tests.reference import propagation as slow

CONFIG = PropagationConfig(side=480, context=7, radius=2, top_k=5, temperature=0.1)


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def source(rows: int, columns: int, seed: int, classes: int = 3) -> Source:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(rows, columns, 8, generator=generator), dim=-1)
    return Source(features, torch.rand(rows, columns, classes, generator=generator).softmax(-1))


# --- labels ---


@pytest.mark.parametrize("grid", [(5, 7), (7, 4), (1, 6)])
@pytest.mark.parametrize("radius", [1, 2, None])
@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_propagate_equals_the_textbook(grid, radius, top_k):
    sources = [source(*grid, seed) for seed in range(3)]
    features = source(*grid, 9).features
    fast = propagate(features, sources, CONFIG._replace(radius=radius, top_k=top_k))
    pairs = [(each.features.double().numpy(), each.labels.double().numpy()) for each in sources]
    expected = slow.propagate(features.double().numpy(), pairs, radius=radius, top_k=top_k, temperature=0.1)
    assert fast.sum(-1).numpy() == pytest.approx(np.ones(grid), abs=1e-5)
    assert fast.numpy() == pytest.approx(expected, abs=1e-5)


def test_propagate_includes_ties():
    features = torch.ones(3, 3, 1)
    labels = torch.nn.functional.one_hot(torch.arange(9).view(3, 3) % 2, 2).float()
    propagated = propagate(features, [Source(features, labels)], CONFIG._replace(radius=1, top_k=1))
    assert propagated[1, 1].tolist() == pytest.approx([5 / 9, 4 / 9])


def test_propagate_is_limited_to_the_radius():
    features = torch.zeros(1, 9, 9)
    features[0, range(9), range(9)] = 1  # each patch is similar to itself alone
    moved = features.roll(4, dims=1)
    labels = torch.nn.functional.one_hot(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0]]), 2).float()
    within, beyond = (
        propagate(moved, [Source(features, labels)], CONFIG._replace(radius=radius, top_k=1)) for radius in (4, 3)
    )
    assert within[0, 4].tolist() == [0, 1]
    assert beyond[0, 4].tolist() == [1, 0]


def test_to_classes_scales_before_taking_the_largest():
    labels = torch.zeros(2, 2, 2)
    labels[..., 0] = torch.tensor([[0.9, 0.9], [0.9, 0.6]])
    labels[..., 1] = 1 - labels[..., 0]  # at most 0.4: never the largest without scaling
    classes = to_classes(labels, (32, 32), (33, 65))
    assert classes.shape == (33, 65)
    assert classes[-1, -1] == 1
    assert classes[0, 0] == 0
    assert (to_classes(torch.full((2, 2, 2), 0.5), (32, 32), (32, 32)) == 0).all()


@pytest.mark.parametrize(
    ("size", "side", "patch", "seen"),
    [
        ((480, 854), 480, 16, (480, 832)),
        ((480, 910), 480, 8, (480, 896)),
        ((854, 480), 480, 16, (832, 480)),
        ((480, 480), 480, 16, (480, 480)),
        ((1080, 1920), 480, 14, (476, 840)),
        ((50, 60), 32, 8, (32, 32)),
    ],
)
def test_input_size_is_that_of_the_official_protocol(size, side, patch, seen):
    assert input_size(*size, side, patch) == seen


# --- J and F ---


def blob(seed: int, height: int = 40, width: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 5, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0, 0] > 0.55


@pytest.mark.parametrize("seed", range(6))
def test_label_propagation_j_and_f_equal_their_slow_forms(seed):
    mask, target = blob(seed), blob(seed).roll(seed, dims=1) if seed % 2 else blob(seed + 50)
    assert boundaries(mask).numpy().tolist() == slow.boundary(mask.numpy()).tolist()
    assert region_similarity(mask, target).item() == pytest.approx(slow.region(mask.numpy(), target.numpy()))
    assert boundary_accuracy(mask, target).item() == pytest.approx(slow.boundary_f(mask.numpy(), target.numpy()))


def test_label_propagation_j_and_f_of_known_cases():
    square, empty = torch.zeros(100, 100, dtype=torch.bool), torch.zeros(100, 100, dtype=torch.bool)
    square[20:40, 20:40] = True
    far = square.roll((50, 50), dims=(0, 1))
    shifted = square.roll(1, dims=1)
    masks, targets = (
        torch.stack([square, square, square, square, empty]),
        torch.stack([square, far, shifted, empty, empty]),
    )
    assert region_similarity(masks, targets).tolist() == pytest.approx([1, 0, 380 / 420, 0, 1])
    assert boundary_accuracy(masks, targets).tolist() == pytest.approx(
        [1, 0, 1, 0, 1]
    )  # one pixel is within ceil(1.13) = 2
    assert boundary_accuracy(square, square.roll(3, dims=1)) < 1


@pytest.mark.parametrize("radius", [1, 2, 5, 8])
def test_dilate_is_by_a_disk(radius):
    point = torch.zeros(2, 15, 21, dtype=torch.bool)
    point[0, 7, 10] = point[1, 0, 20] = True
    y, x = torch.meshgrid(torch.arange(15), torch.arange(21), indexing="ij")
    expected = torch.stack([(y - 7) ** 2 + (x - 10) ** 2 <= radius**2, y**2 + (x - 20) ** 2 <= radius**2])
    assert (dilate(point, radius) == expected).all()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 23, 40, 66, 300])
def test_sequence_stats(frames):
    values = torch.rand(frames, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))
    found = sequence_stats(values)
    assert found.mean == pytest.approx(values.mean().item())
    assert found.recall == pytest.approx((values > 0.5).double().mean().item())
    assert found.decay == pytest.approx(slow.decay(values.numpy()))


# --- masks ---


def test_write_mask_keeps_ids_and_colors(tmp_path):
    numbers = torch.tensor([[0, 1, 2], [7, 254, 0]])
    palette = default_palette()[::-1]
    write_mask(tmp_path / "a" / "mask.png", numbers, palette)
    again = read_mask(tmp_path / "a" / "mask.png")
    assert again.ids.tolist() == numbers.tolist()
    assert again.palette == palette
    assert Image.open(tmp_path / "a" / "mask.png").mode == "P"


def test_read_mask_reads_255_as_void_beside_other_ids(tmp_path):
    Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8)).save(tmp_path / "binary.png")
    Image.fromarray(np.array([[0, 255], [3, 255]], dtype=np.uint8)).save(tmp_path / "void.png")
    assert read_mask(tmp_path / "binary.png").ids.tolist() == [[0, 1], [0, 1]]
    assert read_mask(tmp_path / "binary.png", binary=False).ids.tolist() == [[0, 255], [0, 255]]
    assert read_mask(tmp_path / "void.png").ids.tolist() == [[0, 255], [3, 255]]


def test_read_mask_refuses_colors_and_large_ids(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImageError, match="mode RGB"):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableImageError, match="number 300"):
        read_mask(tmp_path / "deep.png")


# --- the command ---


def moving_squares(root: Path, name: str, frames: int = 9, *, first_id: int = 1) -> None:
    """Write a red and a green square that move over gray noise, in the layout of DAVIS."""
    folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ground = rng.integers(90, 130, (96, 160, 1)).repeat(3, axis=2)
    for number in range(frames):
        pixels, mask = ground.copy(), np.zeros((96, 160), dtype=np.uint8)
        for index, color in enumerate([(230, 30, 30), (30, 220, 40)]):
            top, left = 12 + 40 * index, 10 + 8 * number + 10 * index
            pixels[top : top + 32, left : left + 32] = color
            mask[top : top + 32, left : left + 32] = first_id + 2 * index
        Image.fromarray(pixels.astype(np.uint8)).save(folders[0] / f"{number:05d}.jpg", quality=95)
        image = Image.fromarray(mask).convert("P")
        image.putpalette(default_palette())
        image.save(folders[1] / f"{number:05d}.png")


@pytest.fixture
def davis(tmp_path) -> Path:
    root = tmp_path / "DAVIS"
    moving_squares(root, "squares")
    moving_squares(root, "more", 7, first_id=2)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("squares\nmore\n")
    return root


def run(tiny_model, tmp_path, *overrides: str) -> int:
    small = ("side=96", "radius=3", "temperature=0.03")
    return main(["propagate", f"checkpoint={tiny_model}", f"out={tmp_path / 'out'}", *small, *overrides])


def test_propagate_beats_keeping_the_first_mask(davis, tiny_model, tmp_path, capsys):
    assert run(tiny_model, tmp_path, f"davis={davis}") == 0
    output, out = capsys.readouterr().out, tmp_path / "out"
    result = json.loads((out / "summary.json").read_text())
    model, still = result["score"], result["baselines"][1]
    assert [metric["name"] for metric in model["metrics"]][:2] == ["J&F", "J-mean"]
    values = {score["name"]: {m["name"]: m for m in score["metrics"]} for score in (model, *result["baselines"])}
    assert values["model"]["J-mean"]["value"] > values["first mask kept still"]["J-mean"]["value"] + 0.2
    assert values["model"]["J&F"]["n"] == 4
    assert 0 <= values["model"]["J&F"]["low"] < values["model"]["J&F"]["value"] < values["model"]["J&F"]["high"]
    assert values["random init"]["J-mean"]["value"] < 1
    assert result["data"]["objects"] == 4
    assert result["data"]["scored_frames"] == 7 + 5  # without the first and the last of 9 and of 7
    assert result["protocol"]["radius"] == 3
    assert still["name"] == "first mask kept still"
    for text in ("squares", "more", "all objects", "random init", "± 95 % over objects", "J-decay"):
        assert text in output
    rows = list(csv.DictReader((out / "objects.csv").open()))
    objects = {("squares", "1"), ("squares", "3"), ("more", "2"), ("more", "4")}
    assert {(row["video"], row["object"]) for row in rows} == objects
    mean = np.mean([float(row["J-mean"]) for row in rows if row["tracker"] == "model"])
    assert values["model"]["J-mean"]["value"] == pytest.approx(mean, abs=1e-5)
    assert Image.open(out / "overview.jpg").width > 1000


def test_propagate_writes_masks_and_scores_them(davis, tiny_model, tmp_path):
    assert run(tiny_model, tmp_path, f"davis={davis}", "baselines=false") == 0
    given = davis / "Annotations" / "480p" / "more"
    written = tmp_path / "out" / "masks" / "more"
    assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in given.iterdir())
    first = read_mask(written / "00000.png")
    assert first.ids.equal(read_mask(given / "00000.png").ids)
    assert first.palette == default_palette()
    by_hand = []
    for number in range(1, 6):
        masks = [read_mask(folder / f"{number:05d}.png").ids for folder in (written, given)]
        assert set(np.unique(masks[0])) <= {0, 2, 4}
        by_hand.append([slow.region(*(mask.numpy() == object_ for mask in masks)) for object_ in (2, 4)])
    rows = {
        row["object"]: row
        for row in csv.DictReader((tmp_path / "out" / "objects.csv").open())
        if row["video"] == "more"
    }
    for index, object_ in enumerate(("2", "4")):
        assert float(rows[object_]["J-mean"]) == pytest.approx(np.mean(by_hand, axis=0)[index], abs=1e-5)


def test_propagate_ignores_void_pixels(davis, tiny_model, tmp_path):
    def j_mean() -> float:
        assert run(tiny_model, tmp_path, f"davis={davis}", "limit=1", "baselines=false") == 0
        rows = list(csv.DictReader((tmp_path / "out" / "objects.csv").open()))
        return float(rows[0]["J-mean"])

    before = j_mean()
    for number in range(1, 9):  # void wherever the prediction of object 1 is wrong: J becomes 1
        path = davis / "Annotations" / "480p" / "squares" / f"{number:05d}.png"
        target = read_mask(path)
        wrong = (read_mask(tmp_path / "out" / "masks" / "squares" / path.name).ids == 1) != (target.ids == 1)
        write_mask(path, target.ids.where(~wrong, 255), target.palette)
    assert before < 1
    assert j_mean() == 1


def test_propagate_custom_frames_with_the_first_mask_alone(davis, tiny_model, tmp_path, capsys):
    frames = davis / "JPEGImages" / "480p" / "squares"
    (frames / "00004.jpg").write_bytes(b"\xff\xd8 broken")
    first = read_mask(davis / "Annotations" / "480p" / "squares" / "00000.png").ids
    Image.fromarray(((first > 0) * 255).to(torch.uint8).numpy()).save(tmp_path / "first.png")
    assert run(tiny_model, tmp_path, f"frames={frames}", f"masks={tmp_path / 'first.png'}") == 0
    output = capsys.readouterr().out
    assert "8 frames of 1 videos" in output
    assert "1 frames, masks or videos could not be used" in output
    assert "all objects" not in output
    assert "squares/00004.jpg" in (tmp_path / "out" / "skipped_images.txt").read_text()
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 8
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert result["score"]["metrics"] == []
    assert result["baselines"] == []


def test_propagate_scores_the_frames_that_have_a_mask(davis, tiny_model, tmp_path):
    masks = davis / "Annotations" / "480p" / "squares"
    (masks / "00003.png").unlink()
    Image.new("L", (10, 10), 1).save(masks / "00005.png")
    frames = davis / "JPEGImages" / "480p" / "squares"
    assert run(tiny_model, tmp_path, f"frames={frames}", f"masks={masks}") == 0
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert result["data"]["scored_frames"] == 9 - 2 - 2
    assert "10 x 10 pixels, its frame 160 x 96" in (tmp_path / "out" / "skipped_images.txt").read_text()
    assert result["warnings"]


def test_propagate_a_video_file(tiny_model, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(4):
            pixels = np.full((48, 64, 3), 100, dtype=np.uint8)
            pixels[10:30, 4 * number : 4 * number + 20] = (250, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[10:30, :20] = 1
    Image.fromarray(mask).save(tmp_path / "first.png")
    assert run(tiny_model, tmp_path, f"frames={tmp_path / 'clip.mp4'}", f"masks={tmp_path / 'first.png'}") == 0
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == [f"{n:06d}.png" for n in range(4)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["davis={root}", "split=test"], "there is no ImageSets/2017/test.txt"),
        (["davis={root}", "frames={root}"], "name the videos: davis=FOLDER, or frames=FOLDER masks=MASK"),
        (["frames={root}"], "frames and masks must be given together"),
        (["frames={root}/nowhere", "masks={root}"], "there is no such file or folder"),
        (["frames={root}/JPEGImages/480p/more", "masks={root}/empty.png"], "contains no object"),
        (["frames={root}/JPEGImages/480p/more", "masks={root}/small.png"], "small.png has 5 x 5 pixels"),
        (["frames={root}/JPEGImages/480p/more", "masks={root}/rgb.png"], "a mask of mode RGB"),
        (["frames={root}/JPEGImages/480p/more", "masks={root}/others"], "no mask with the name of the first frame"),
        (["davis={root}", "side=3"], "smaller than a patch of 8 pixels"),
    ],
)
def test_propagate_explains_mistakes(davis, tiny_model, tmp_path, capsys, overrides, message):
    Image.new("L", (160, 96)).save(davis / "empty.png")
    Image.new("L", (5, 5), 1).save(davis / "small.png")
    Image.new("RGB", (160, 96)).save(davis / "rgb.png")
    (davis / "others").mkdir()
    Image.new("L", (160, 96), 1).save(davis / "others" / "77.png")
    assert run(tiny_model, tmp_path, *(word.format(root=davis) for word in overrides)) == 2
    assert message in capsys.readouterr().err


def test_propagate_names_a_missing_video(davis, tiny_model, tmp_path, capsys):
    (davis / "ImageSets" / "2017" / "val.txt").write_text("squares\nlost\n")
    assert run(tiny_model, tmp_path, f"davis={davis}") == 2
    assert "JPEGImages/480p/lost is missing" in capsys.readouterr().err


def test_propagate_skips_an_unusable_video(davis, tiny_model, tmp_path, capsys):
    (davis / "Annotations" / "480p" / "squares" / "00000.png").write_bytes(b"no mask")
    assert run(tiny_model, tmp_path, f"davis={davis}", "baselines=false") == 0
    result = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (result["data"]["videos"], result["data"]["objects"]) == (1, 2)
    assert "1 frames, masks or videos could not be used" in result["warnings"][0]
    assert "squares\tthe whole video: " in (tmp_path / "out" / "skipped_images.txt").read_text()
    assert "more" in capsys.readouterr().out


def test_label_propagator_does_not_enlarge_frames_by_default(tiny_model):
    first, classes = torch.zeros(3, 64, 96, dtype=torch.uint8), torch.zeros(64, 96, dtype=torch.long)
    model = load_backbone(str(tiny_model))
    assert LabelPropagator(model, CONFIG._replace(side=None), first, classes).input_size == (64, 64)
    assert LabelPropagator(model, CONFIG._replace(side=128), first, classes).input_size == (128, 192)


@pytest.fixture
def clip_folder(tmp_path):
    """A function that writes four frames and their masks, and returns their folders."""
    frames, masks = tmp_path / "frames", tmp_path / "masks"
    for folder in (frames, masks):
        folder.mkdir()

    def write(masks_of):
        for number in range(4):
            moved = np.zeros((48, 64), np.uint8)
            moved[10:30, 8 + 4 * number : 30 + 4 * number] = 1
            Image.fromarray(np.dstack([moved * 180 + 40] * 3)).save(frames / f"{number}.png")
            Image.fromarray(masks_of(number, moved)).save(masks / f"{number}.png")
        return [f"frames={frames}", f"masks={masks}", f"out={tmp_path / 'out'}", "side=48", "baselines=false"]

    return write


@pytest.mark.parametrize(
    "masks_of", [lambda number, mask: mask * (255 if number else 1), lambda number, mask: mask * (number + 1)]
)
def test_propagate_refuses_masks_whose_numbers_change(clip_folder, tiny_model, capsys, masks_of):
    assert main(["propagate", f"checkpoint={tiny_model}", *clip_folder(masks_of)]) == 2
    assert "no later mask has one of them" in capsys.readouterr().err


def test_propagate_remarks_on_a_background_that_is_an_object(clip_folder, tiny_model, tmp_path, capsys):
    assert main(["propagate", f"checkpoint={tiny_model}", *clip_folder(lambda _, mask: mask + 1)]) == 0
    assert "object 1 covers most of the border of the first mask" in capsys.readouterr().out
    assert any(
        "covers most" in text for text in json.loads((tmp_path / "out" / "summary.json").read_text())["warnings"]
    )


def test_read_mask_is_turned_by_its_exif_orientation(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(ids).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "a.png").ids.numpy(), np.rot90(ids, -1))


def test_propagate_reads_frames_as_the_images_of_the_training(clip_folder, tmp_path, capsys):
    """Stretched one by one, frames of 12 bits would change in brightness with their content."""
    words = clip_folder(lambda _, mask: mask)
    for number in range(4):
        path = tmp_path / "frames" / f"{number}.png"
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(values * (3 if number else 1)).save(path)
    config = tiny(num_heads=4)
    model = tmp_path / "m.safetensors"
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "source": "a test", "value_range": ValueRange.parse([0, 4095])}
    export_backbone(Backbone(config).eval(), model, **given)
    assert main(["propagate", f"checkpoint={model}", *words]) == 0
    assert "data.range=[0, 4095]" in capsys.readouterr().out
