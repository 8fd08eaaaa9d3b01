"""Tests of `ssl-vit finetune`: results, exact resuming, optimizer and augmentation."""

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data.auto_augment import rand_augment_transform

from ssl_vit.cli import main
from ssl_vit.commands.finetune import finetune, split_dataset
from ssl_vit.commands.load_config import load_config
from ssl_vit.config.evaluate import FinetuneConfig
from ssl_vit.config.pretrain import BackboneConfig
from ssl_vit.data.batch import Batch
from ssl_vit.data.sources.image_folder import scan_image_folder
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.data.transforms.mixup import MixupCutmix, RandAugment, single_view_config
from ssl_vit.methods.base import TrainingPlan
from ssl_vit.methods.finetune import FineTune, prepare_for_finetuning
from ssl_vit.models.backbone import Backbone
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.models.export import export_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.rng import RNGStream, fold_in, sample_keys, seeded_global_rng
from tests.helpers.cli import assert_same_run, rows, start_command, state, wait_until

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 3, "reg_tokens": 0}
NO_MIXING = ("method.mixup=0", "method.cutmix=0", "method.erasing=0", "method.rand_augment.layers=0")


def make_model(**sizes):
    torch.manual_seed(0)
    return Backbone(
        BackboneConfig(**{"name": "vit_tiny_patch16_224", "drop_path": 0.0, "init": "jax", **SMALL, **sizes})
    )


def exported(folder, name="model", **sizes):
    model = make_model(**sizes)
    channels = model.config.in_chans
    path = folder / f"{name}.safetensors"
    export_backbone(model, path, mean=[0.5] * channels, std=[0.25] * channels, source="a test")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("model"))


@pytest.fixture
def words(model, sample, tmp_path):
    """A function: the words of a `finetune` command that takes seconds, then those given to it."""
    return lambda *more: [
        f"checkpoint={model}", f"data.root={sample}", "data.batch_size=16", "data.num_workers=0", "trainer=smoke",
        "trainer.accelerator=cpu", "trainer.max_steps=4", "validate_every_epochs=null", "figure=false",
        f"run.folder={tmp_path / 'runs'}", *more,
    ]  # fmt: skip


@pytest.fixture
def config(words):
    return lambda *more: load_config("finetune", words(*more), FinetuneConfig)


def method_config(*more):
    return load_config("finetune", ["checkpoint=x", "data.root=y", *more], FinetuneConfig).method


def record_of(run):
    (path,) = (run / "eval").glob("*.json")
    return json.loads(path.read_text())


# --- what comes out --------------------------------------------------------------------------------------------


def test_finetune_learns_and_tests_the_exported_weights(config, tmp_path, capsys):
    folder = tmp_path / "images"
    make_synthetic_dataset(folder, num_images=900, seed=1)
    run = finetune(
        config(
            f"data.root={folder}", "data.batch_size=32", "trainer.max_steps=null", "trainer.max_epochs=6",
            "validate_every_epochs=3", *NO_MIXING, "method.optimizer.lr=0.02", "method.crops.scale=[0.5,1]",
            "method.layer_decay=1", "figure=true",
        )
    )  # fmt: skip
    held = [float(row["val/top1"]) for row in rows(run) if row["val/top1"]]
    record = record_of(run)
    (top1, top5) = record["score"]["metrics"]
    assert len(held) == 2
    assert top1["value"] > 3 / 12  # of twelve classes
    assert held[-1] > 3 / 12
    assert top5["value"] > top1["value"]
    assert top1["n"] == record["data"]["n_test"] == 180
    assert record["data"]["n_train"] == 648  # 720 but for a tenth of each class
    assert record["task"] == "finetune"
    assert record["protocol"]["selection"] == "none: the last weights, tested once"
    assert record["selection"] is None
    assert record["by_class"]["metric"] == "top-1"
    assert str(run / "eval" / record["by_class"]["figure"]) in capsys.readouterr().out.splitlines()
    with Image.open(run / "eval" / record["by_class"]["figure"]) as figure:
        assert min(figure.size) > 400

    model, head = load_backbone(str(run)), load_file(run / "head.safetensors")
    dataset = scan_image_folder(folder / "test")
    transform = EvalTransform(48, 0.875, model.mean, model.std)
    images = torch.stack([dataset.read(place, 3) for place in range(len(dataset))])
    with torch.no_grad():
        logits = F.linear(model.backbone(transform.normalize(images)).cls, head["weight"], head["bias"])
    right = float((logits.argmax(dim=1) == dataset.labels).float().mean())
    assert right == pytest.approx(top1["value"], abs=0.012)  # two images that bfloat16 decides otherwise
    assert json.loads((run / "head.json").read_text())["classes"] == dataset.classes


def test_finetune_is_determined_by_its_seed(config):
    first, again, other = (finetune(config(f"run.name={n}", f"seed={s}")) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_run(first, again)
    assert not torch.equal(state(first)[0]["student.head.0.weight"], state(other)[0]["student.head.0.weight"])


def test_finetune_does_not_depend_on_data_workers_and_cache(config):
    inside = finetune(config("run.name=inside"))
    outside = finetune(config("run.name=outside", "data.num_workers=2", "cache_gb=0"))
    (first, _), (second, _) = state(inside), state(outside)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_split_dataset_splits_by_class(config, sample):
    dataset = scan_image_folder(sample / "train")  # 16 of each of 12 classes
    parts = split_dataset(config(), dataset, None)
    places = torch.cat([parts.train.indices, parts.val.indices, parts.test.indices])
    assert places.sort().values.tolist() == list(range(192))
    assert [len(torch.unique(part.labels)) for part in (parts.train, parts.val, parts.test)] == [12] * 3
    assert torch.bincount(parts.test.labels).tolist() == [3] * 12
    assert torch.bincount(parts.val.labels).tolist() == [1] * 12
    again = split_dataset(config("seed=1"), dataset, None)
    assert again.test.indices.tolist() != parts.test.indices.tolist()


def test_prepare_for_finetuning_resamples_the_position_embeddings_once(config, model):
    loaded = load_backbone(str(model))
    larger = prepare_for_finetuning(loaded, image_size=96, drop_path=0.0).eval()
    assert larger.vit.pos_embed.shape == (1, 1 + 12 * 12, 32)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():  # what timm makes of the old embeddings in each pass
        torch.testing.assert_close(larger(images).cls, loaded.backbone(images).cls)
    run = finetune(config("data.image_size=96", "run.name=large", "trainer.max_steps=2"))
    assert load_backbone(str(run)).backbone.config.img_size == 96
    assert record_of(run)["protocol"]["transform"]["image_size"] == 96


def test_finetune_with_gray_images_and_registers(config, tmp_path):
    path = exported(tmp_path, in_chans=1, reg_tokens=1)
    run = finetune(config(f"checkpoint={path}"))
    assert load_backbone(str(run)).backbone(torch.rand(1, 1, 48, 48)).registers.shape == (1, 1, 32)


def test_finetune_starts_from_scratch_or_a_fine_tuned_run(config, model):
    scratch = finetune(config(f"checkpoint=random:{model}", "run.name=scratch"))
    assert "random weights" in record_of(scratch)["model"]["source"]
    again = finetune(config(f"checkpoint={scratch}", "run.name=again"))
    assert state(again)[1] == 4


# --- a run like any other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 10])  # in the middle of the first epoch of 10 steps, and at its end
def test_finetune_stopped_and_resumed_equals_uninterrupted(config, stop_at, stop, capsys):
    words = ("trainer.max_steps=13", "method.drop_path=0.2", "validate_every_epochs=1")
    whole = finetune(config(*words, "run.name=whole"))
    with stop_at(stop):
        parts = finetune(config(*words, "run.name=parts"))
    assert state(parts)[1] == stop
    assert not (parts / "eval").exists()  # nobody has looked at the test images yet
    assert "Resume with run.resume=true" in capsys.readouterr().out
    finetune(config(*words, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, parts)
    first, second = (record_of(run)["score"]["metrics"] for run in (whole, parts))
    assert first == second
    assert f"the cost is that of the last session, after step {stop}" in record_of(parts)["warnings"]
    assert not any("cost" in text for text in record_of(whole)["warnings"])


def test_finetune_of_a_complete_run_gives_the_same_result(config, capsys):
    run = finetune(config())
    before = record_of(run)
    capsys.readouterr()
    finetune(config("run.resume=true"))
    assert "The run is already complete" in capsys.readouterr().out
    after = record_of(run)
    assert before["score"] == after["score"]
    assert before["protocol_hash"] == after["protocol_hash"]


def test_finetune_reports_the_schedules_of_an_extended_run(config, capsys):
    words = ("trainer.max_steps=null", "trainer.max_epochs=1")
    finetune(config(*words))
    run = finetune(config(*words, "run.resume=true", "run.extend_to_epochs=2"))
    assert state(run)[1] == 20
    assert "The run was 10 steps long and is now 20" in capsys.readouterr().out


def test_finetune_refuses_changed_keys_on_resume(config):
    finetune(config())
    with pytest.raises(UserError, match=r"method.mixup: 0.8 -> 0.5"):
        finetune(config("run.resume=true", "method.mixup=0.5"))
    with pytest.raises(UserError, match=r"trainer.devices: 1 -> 2"):  # images are mixed within a process
        finetune(config("run.resume=true", "trainer.devices=2"))
    finetune(config("run.resume=true", "data.num_workers=1", "figure=true"))


class Begun(NamedTuple):
    run: Path
    folder: Path
    go_on: Callable[..., Path]


@pytest.fixture
def begun(config, sample, tmp_path, stop_at):
    """Images and a model of its own, and a run of theirs that was stopped after two of four steps."""
    folder = tmp_path / "images"
    shutil.copytree(sample, folder)
    model = exported(tmp_path)
    with stop_at(2):
        run = finetune(config(f"checkpoint={model}", f"data.root={folder}"))
    return Begun(run, folder, lambda *more: finetune(config(f"checkpoint={model}", "run.resume=true", *more)))


def test_finetune_refuses_other_splits_on_resume(begun):
    with pytest.raises(UserError, match=r"168 train, 24 val, 48 test .*; now 144 train, 12 val, 36"):
        begun.go_on(f"data.root={begun.folder / 'train'}")
    assert state(begun.run)[1] == 2
    assert not (begun.run / "eval").exists()


def test_finetune_refuses_another_test_set_on_resume(begun):
    changed = begun.folder.with_name("changed")
    shutil.copytree(begun.folder / "test", changed)
    image = sorted(changed.rglob("*.png"))[0]
    image.write_bytes(image.read_bytes() + b" ")  # the names are the same
    train = f"data.train={begun.folder / 'train'}"
    with pytest.raises(UserError, match="val or test images are not those of the run"):
        begun.go_on("data.root=null", train, f"data.test={changed}")
    assert state(begun.run)[1] == 2
    begun.go_on("data.root=null", train, f"data.test={begun.folder / 'test'}")  # the same by another name
    assert state(begun.run)[1] == 4
    assert record_of(begun.run)["data"]["n_test"] == 48


def test_finetune_refuses_another_model_on_resume(begun, tmp_path):
    root = f"data.root={begun.folder}"
    first = (tmp_path / "model.safetensors").read_bytes()
    sidecar = (tmp_path / "model.json").read_bytes()
    export_backbone(make_model(init="timm"), tmp_path / "model.safetensors", mean=[0.5] * 3, std=[0.25] * 3,
                    source="a test")  # fmt: skip
    with pytest.raises(UserError, match=r"another model than the one that the run started from(.|\n)*run.overwrite"):
        begun.go_on(root)
    assert state(begun.run)[1] == 2
    (tmp_path / "model.safetensors").write_bytes(first)
    (tmp_path / "model.json").write_bytes(sidecar)
    begun.go_on(root)
    assert record_of(begun.run)["model"]["sha256"] == hashlib.sha256(first).hexdigest()


def test_finetune_resumes_without_its_source_file(begun, capsys):
    (begun.run / "source.json").write_text("{")
    begun.go_on(f"data.root={begun.folder}")
    assert "model and splits could not be compared" in capsys.readouterr().out
    assert state(begun.run)[1] == 4


def test_finetune_with_keep_image_list_is_tested_on_its_own_images(config, sample, tmp_path, stop_at):
    folder = tmp_path / "images"
    shutil.copytree(sample / "train", folder)
    words = (f"data.root={folder}", "trainer.max_steps=12")
    with stop_at(11):
        run = finetune(config(*words))
    (folder / "a new class").mkdir()
    sorted(folder.rglob("*.png"))[-1].rename(folder / "a new class" / "image.png")  # as many as before
    run = finetune(config(*words, "run.resume=true", "run.keep_image_list=true"))
    assert record_of(run)["data"]["n_classes"] == 12
    assert len(json.loads((run / "head.json").read_text())["classes"]) == 12


@pytest.mark.slow
def test_finetune_killed_and_resumed_equals_uninterrupted(words, config, tmp_path):
    more = ("trainer.max_steps=60", "trainer.checkpoint_every=0s")
    whole = finetune(config(*more, "run.name=whole"))
    process = start_command(words(*more, "run.name=parts"), name="finetune")
    last = tmp_path / "runs" / "parts" / "checkpoints" / "last.ckpt"
    wait_until(last.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finetune(config(*more, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, last.parents[1])


def test_finetune_skips_counts_and_lists_unreadable_images(words, sample, tmp_path, capsys):
    folder = tmp_path / "images"
    make_synthetic_dataset(folder, num_images=60, seed=0)
    for part in ("train", "test"):
        sorted((folder / part).rglob("*.png"))[0].with_name("broken one.png").write_bytes(b"this is no image")
    assert main(["finetune", *words(f"data.root={folder}", "trainer.max_steps=10", "validate_every_epochs=1")]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "runs" / "finetune"
    for name in ("skipped_images.txt", "skipped_test_images.txt"):
        assert "broken one.png" in (run / name).read_text()
    assert record_of(run)["data"]["skipped"] == 2
    assert record_of(run)["data"]["n_test"] == 12
    assert out.count("could not be read") == 3  # by the run, and both sets by the record


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("checkpoint=nowhere", "checkpoint=nowhere"),
        ("data.root=nowhere", "nowhere"),
        ("data.image_size=50", "data.image_size=50 is not a multiple"),
        ("data.batch_size=15", "mixup and cutmix mix images in pairs: make it a multiple of 2"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp"),
        ("method.optimizer.warmup=100steps", "warm-up of 100 steps does not fit into a run of 4 steps"),
        ("method.layer_decay=0", "method.layer_decay"),
        ("val_fraction=0", "val_fraction"),
        ("baselines=true", "baselines"),
    ],
)
def test_finetune_reports_mistakes_before_anything_is_written(words, tmp_path, capsys, word, says):
    assert main(["finetune", *words(word)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- the recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg_tokens", [0, 1])
def test_finetune_scales_the_learning_rate_by_layer(reg_tokens, tmp_path):
    """lr of layer l of L: lr · decay^(L - l); embeddings are layer 0, block i is i + 1, final norm and head are L."""
    loaded = load_backbone(str(exported(tmp_path, depth=3, reg_tokens=reg_tokens)))
    config = method_config("method.layer_decay=0.7")
    views = single_view_config(config, 48, loaded.mean, loaded.std)
    method = FineTune(
        config, views, prepare_for_finetuning(loaded, image_size=48, drop_path=0.0), 5, TrainingPlan(10, 10, 16, 1, 0)
    )
    optimizer = method.configure_optimizers()
    found = {id(p): (group["lr_scale"], group["decays"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.student.named_parameters():
        if ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
        else:
            layer = 4 if name.startswith(("head", "backbone.vit.norm")) else 0
        scale, decays = found.pop(id(parameter))
        assert scale == pytest.approx(0.7 ** (4 - layer)), name
        assert decays == (name.endswith("weight") and parameter.ndim > 1), name
    assert not found


def test_finetune_learning_rates_follow_the_schedule(config):
    run = finetune(config("trainer.max_steps=8", "method.optimizer.warmup=3steps", "method.layer_decay=0.5"))
    peak = 0.0005 * 16 / 256
    lr = [peak * step / 2 for step in range(3)]
    lr += [1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * step / 5)) / 2 for step in range(5)]
    assert [float(row["schedule/lr"]) for row in rows(run)] == pytest.approx(lr)
    groups = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert sorted({group["lr"] / lr[-1] for group in groups}) == pytest.approx([0.125, 0.25, 0.5, 1])


def batch_of(count, *, size=32, channels=3, epoch=0):
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (count, 1, channels, size, size), generator=generator, dtype=torch.uint8)
    index = torch.arange(count)
    return Batch(views, views[:, :0], index % 5, index, sample_keys(0, epoch, index))


def test_rand_augment_equals_timm_and_depends_on_the_key_alone():
    config = method_config().rand_augment
    augment = RandAugment(config, size=32, mean=[0.4, 0.5, 0.6])
    before = batch_of(12).global_views.clone()
    together = augment(batch_of(12)).global_views
    batch = batch_of(12)
    alone = augment(Batch(*(part[7:8] for part in batch))).global_views
    assert torch.equal(alone, together[7:8])
    other_epoch = augment(batch_of(12, epoch=1)).global_views
    changed = [not torch.equal(a, b) for a, b in zip(together, other_epoch, strict=True)]
    assert sum(changed) > 8
    assert sum(not torch.equal(a, b) for a, b in zip(together, before, strict=True)) > 8

    plain = rand_augment_transform("rand-m9-n2-mstd0.5-inc1", {"translate_const": 14, "img_mean": (102, 128, 153),
                                   "interpolation": Image.Resampling.BICUBIC, "magnitude_max": 9.99})  # fmt: skip
    with seeded_global_rng() as seed:
        seed(int(fold_in(batch.key, RNGStream.RAND_AUGMENT)[3]))
        wanted = np.array(plain(Image.fromarray(before[3, 0].permute(1, 2, 0).numpy())))
    assert np.array_equal(together[3, 0].permute(1, 2, 0).numpy(), wanted)


def test_rand_augment_accepts_every_magnitude_and_gray_images():
    for magnitude in (0, 10):
        config = method_config(f"method.rand_augment.magnitude={magnitude}", "method.rand_augment.layers=6")
        for channels in (1, 3):
            augment = RandAugment(config.rand_augment, size=32, mean=[0.5] * channels)
            assert augment(batch_of(40, channels=channels)).global_views.float().std() > 10


def test_augmentation_leaves_the_global_generators_unchanged():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    images = torch.rand(4, 3, 8, 8)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    RandAugment(method_config().rand_augment, size=32, mean=[0.5] * 3)(batch_of(4))
    MixupCutmix(method_config(), 5)(images, torch.arange(4), torch.arange(4))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def mixed(mixing, *, key=0):
    """Six images of one color each, i for the i-th, mixed; labels are i modulo 5."""
    images = torch.arange(6.0)[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return mixing(images, torch.arange(6) % 5, torch.arange(6) + 1000 * key)


@pytest.mark.parametrize("words", [("method.cutmix=0",), ("method.mixup=0",), ()], ids=["mixup", "cutmix", "both"])
def test_mixup_cutmix_targets_are_the_shares_of_the_images(words):
    mixing = MixupCutmix(method_config("method.erasing=0", "method.smoothing=0", *words), 5)
    kinds = set()
    for key in range(20):
        images, targets = mixed(mixing, key=key)
        for i in range(6):
            j = 5 - i
            share = (float(images[i].mean()) - j) / (i - j)  # of image i in what has become of it
            wanted = share * F.one_hot(torch.tensor(i % 5), 5) + (1 - share) * F.one_hot(torch.tensor(j % 5), 5)
            torch.testing.assert_close(targets[i], wanted.float(), atol=1e-5, rtol=0)
        values = images[0].unique()
        kinds |= {"cutmix"} if len(values) > 1 else {"mixup"} if float(values) not in (0, 5) else set()
    assert kinds == ({"mixup", "cutmix"} if not words else {"mixup"} if "cutmix=0" in words[0] else {"cutmix"})


def test_label_smoothing_equals_torch():
    images, targets = mixed(MixupCutmix(method_config("method.erasing=0", "method.mixup=0", "method.cutmix=0"), 5))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    ours, wanted = F.cross_entropy(logits, targets), F.cross_entropy(logits, torch.arange(6) % 5, label_smoothing=0.1)
    torch.testing.assert_close(ours, wanted)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(6.0))


def test_random_erasing_fills_a_rectangle_in_a_quarter_of_the_images():
    count = 2000
    mixing = MixupCutmix(method_config("method.mixup=0", "method.cutmix=0"), 5)
    key = sample_keys(0, 0, torch.arange(count))
    erased = mixing(torch.zeros(count, 1, 16, 16), torch.zeros(count, dtype=torch.int64), key)[0][:, 0] != 0
    hit = erased.flatten(1).any(dim=1)
    assert float(hit.float().mean()) == pytest.approx(0.25, abs=0.03)
    area = erased[hit].flatten(1).float().mean(dim=1)
    assert 0.01 < float(area.min()) < float(area.max()) < 0.36
    first = erased[hit][0]
    tall, wide = (int(first.any(dim=side).sum()) for side in (1, 0))
    assert tall * wide == int(first.sum())
    alone = mixing(torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64), key[hit][:1])[0][:, 0] != 0
    assert torch.equal(alone[0], first)


@pytest.mark.parametrize("inside", ["", "backbone.safetensors"])
def test_finetune_never_deletes_the_run_that_it_starts_from(config, inside):
    run = finetune(config())
    source = run / inside if inside else run
    with pytest.raises(UserError, match=r"run.overwrite=true would delete .* which checkpoint="):
        finetune(config(f"checkpoint={source}", "run.overwrite=true"))
    assert (run / "config.yaml").exists()
