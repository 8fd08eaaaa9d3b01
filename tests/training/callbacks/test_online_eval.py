"""Tests of the online evaluation: its data, its values, and the best checkpoint."""

import contextlib
import io
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from ssl_vit.cli import main
from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.data.dataset import SkippedImageLog, class_balanced_order
from ssl_vit.data.dataset_factory import build_dataset
from ssl_vit.data.transforms.eval_transform import EvalTransform
from ssl_vit.evaluation.classification.ridge_regression import best_ridge, ridge_path
from ssl_vit.evaluation.features.extractor import BackboneExtractor, extract, on_best_device
from ssl_vit.methods.schedules import make_plan
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks import online_eval as online
from ssl_vit.training.callbacks import run_checkpoint
from ssl_vit.training.callbacks.online_eval import OnlineEval
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.checkpointing import read_global_step
from ssl_vit.training.online_accuracy import L2, EvalPoint, select_online_data
from ssl_vit.training.trainer import build_method
from tests.conftest import SHRUNK, SHRUNK_DINO
from tests.helpers.cli import assert_same_run, checkpoint, rows, state
from tests.reference import probes

COLUMNS = ["online/knn@20", "online/knn@1", "online/linear"]
SMALL_EPOCHS = ("data.batch_size=64", "online.every_epochs=1")  # of 3 steps


def measured(run, column="online/knn@20"):
    """The values by the steps done."""
    return {int(row["step"]) + (row["step"] != "0"): float(row[column]) for row in rows(run) if row.get(column)}


@pytest.fixture
def flat(sample, tmp_path):
    """Unlabeled images."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, path in enumerate(sorted((sample / "train").rglob("*.png"))[:96]):
        shutil.copy(path, folder / f"{number}.png")
    return folder


# --- the subset ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_class_balanced_order_has_balanced_prefixes(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 9, (200,), generator=generator).clamp(max=5) * 3  # not from 0 on, one class larger
    order = class_balanced_order(labels, seed=seed)
    assert sorted(order.indices.tolist()) == (labels >= 0).nonzero().squeeze(1).tolist()
    sizes = Counter(labels[labels >= 0].tolist())
    assert order.class_size.tolist() == [sizes[label] for label in labels[order.indices].tolist()]
    for length in range(1, len(order.indices) + 1):
        counts = Counter(labels[order.indices[:length]].tolist())
        assert all(counts[label] >= min(size, max(counts.values()) - 1) for label, size in sizes.items())
        assert order.rank[length - 1] == max(counts.values()) - 1
    assert torch.equal(order.indices, class_balanced_order(labels, seed=seed).indices)
    assert not torch.equal(order.indices, class_balanced_order(labels, seed=seed + 1).indices)


def test_class_balanced_order_samples_classes_at_random():
    labels = torch.arange(100)
    assert class_balanced_order(labels, seed=0).indices[:5].max() > 20


def labeled(sizes):
    """Images of classes of these sizes."""
    labels = torch.cat([torch.full((size,), label) for label, size in sizes.items()])
    return SimpleNamespace(labels=labels, classes=[], value_range=None, with_range=lambda _: None)


def chosen(sizes, **settings):
    config = SimpleNamespace(**{"root": None, "train_images": 5000, "val_images": 1000} | settings)
    return select_online_data(config, labeled(sizes), seed=0)


def test_select_online_data_keeps_train_and_val_disjoint():
    found = chosen({0: 100, 1: 40, 2: 7, 3: 4, 4: 2, 5: 1, -1: 50})
    assert Counter(found.val.labels.tolist()) == {0: 20, 1: 8, 2: 1, 3: 1, 4: 1}
    assert Counter(found.train.labels.tolist()) == {0: 80, 1: 32, 2: 6, 3: 3, 4: 1, 5: 1}
    assert not set(found.train.indices.tolist()) & set(found.val.indices.tolist())


def test_select_online_data_balances_limited_parts():
    found = chosen({0: 1000, 1: 500, 2: 20}, train_images=61, val_images=12)
    assert Counter(found.val.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    counts = Counter(found.train.labels.tolist())
    assert counts[2] == 16
    assert sorted([counts[0], counts[1]]) == [22, 23]


@pytest.mark.parametrize("sizes", [{-1: 30}, {0: 30}, {0: 1, 1: 1, 2: 1}, {-1: 30, 4: 9}])
def test_select_online_data_needs_two_classes_and_spare_images(sizes):
    assert chosen(sizes) is None


# --- the values ------------------------------------------------------------------------------------------------


def slow_values(loaded, config, dataset):
    """The accuracies of the chosen images, kNN by its textbook form."""
    views = config.method.views
    transform = EvalTransform(views.global_crops.size, 0.875, views.mean, views.std)
    parts = select_online_data(config.online, dataset, seed=config.seed)
    skipped = SkippedImageLog(config.run.path / "none.txt")
    how = {"batch_size": 64, "num_workers": 0, "skipped": skipped}
    bank, queries = (extract(BackboneExtractor(loaded, transform, blocks=1), part, **how) for part in parts)
    known, asked = (part.cls[:, -1].double().numpy() for part in (bank, queries))
    values = {}
    for k in config.online.k:
        answers = probes.knn_classes(asked, known, bank.labels.tolist(), k, 0.07)
        right = [answer[0] == label for answer, label in zip(answers, queries.labels.tolist(), strict=True)]
        values[f"online/knn@{k}"] = sum(right) / len(right)
    fits = ridge_path(torch.from_numpy(known), bank.labels, classes=len(dataset.classes), l2=L2)
    scores = best_ridge(fits, bank.labels).probe.logits(torch.from_numpy(asked))
    return values | {"online/linear": (scores.argmax(1) == queries.labels).double().mean().item()}


@pytest.mark.parametrize("method", ["dino", "sit"])
def test_online_eval_equals_the_textbook_at_the_start_and_the_end(pretrain_config, method):
    config = pretrain_config(f"method={method}", "trainer.max_steps=7", *SMALL_EPOCHS)
    run = pretrain(config)
    dataset = build_dataset("folder", config.data.root)
    untrained = build_method(config, make_plan(config, len(dataset))).eval_backbone.eval()
    loaded = on_best_device(load_backbone(str(run)))
    for step, model in ((0, loaded._replace(backbone=untrained)), (7, loaded)):
        found = {name: measured(run, name)[step] for name in COLUMNS}
        assert found == pytest.approx(slow_values(model, config, dataset), abs=1e-6)
    assert list(measured(run, "online/seconds")) == [0, 3, 6, 7]
    assert all(seconds > 0 for seconds in measured(run, "online/seconds").values())


def test_online_eval_limits_k_to_the_train_images(pretrain_config, capsys):
    run = pretrain(pretrain_config("online.every_epochs=1", "online.train_images=15", "online.k=[200,15]"))
    assert "kNN (k=200 (all 15), 15) and a linear classifier, 15 train" in capsys.readouterr().out
    assert measured(run, "online/knn@200") == measured(run, "online/knn@15")


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_online_eval_logs_nan_for_unusable_features(pretrain_config, monkeypatch, caplog, value):
    original = online.extract_in_training

    def spoiled(*args, **kwargs):
        features = original(*args, **kwargs)
        features.cls.fill_(value)
        return features

    monkeypatch.setattr(online, "extract_in_training", spoiled)
    run = pretrain(pretrain_config("trainer.max_steps=4", *SMALL_EPOCHS))
    assert state(run)[1] == 4
    for name in COLUMNS:
        assert [row[name] for row in rows(run) if row[name]] == ["nan"] * 3
    assert "no online accuracy at step 3: the run: the features" in caplog.text
    assert not (run / "checkpoints" / "best_knn.ckpt").exists()


def test_online_eval_survives_deleted_images(pretrain_config, sample, tmp_path, monkeypatch):
    folder = tmp_path / "labeled"
    shutil.copytree(sample / "test", folder)
    original = OnlineEval._update

    def lose(self, found):
        original(self, found)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(OnlineEval, "_update", lose)
    run = pretrain(pretrain_config(f"online.root={folder}", "trainer.max_steps=3", *SMALL_EPOCHS))
    first, second = measured(run).values()
    assert math.isfinite(first)
    assert math.isnan(second)


# --- whose labels ----------------------------------------------------------------------------------------------


def test_online_eval_reports_missing_labels(pretrain_config, flat, capsys):
    run = pretrain(pretrain_config(f"data.root={flat}", "online.every_epochs=1", "trainer.max_steps=2"))
    output = capsys.readouterr().out
    assert output.count("No online evaluation") == 1
    assert "online.root=FOLDER" in output
    assert "Online accuracy" not in output
    assert not [name for name in rows(run)[0] if name.startswith("online/")]
    assert not (run / "checkpoints" / "best_knn.ckpt").exists()


def test_pretrain_mentions_no_evaluation_that_is_turned_off(pretrain_config, capsys):
    pretrain(pretrain_config("trainer.max_steps=1"))
    assert "nline" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("root", "bank", "queries"), [("test", 36, 12), (".", 192, 48)], ids=["class folders", "train and test"]
)
def test_online_eval_reads_labeled_images_from_its_own_root(pretrain_config, flat, sample, capsys, root, bank, queries):
    words = (f"data.root={flat}", f"online.root={sample / root}", "online.every_epochs=1", "trainer.max_steps=2")
    config = pretrain_config(*words)
    run = pretrain(config)
    assert f"{bank} train / {queries} val images (95 % CI" in capsys.readouterr().out
    assert set(measured(run)) == {0, 2}
    found = select_online_data(config.online, build_dataset("folder", flat), seed=0)
    assert {part.dataset.root.name for part in found} == ({"test"} if root == "test" else {"train", "test"})


def test_online_eval_refuses_an_unlabeled_root_before_anything_is_written(pretrain_config, flat, tmp_path):
    run = pretrain(pretrain_config("trainer.max_steps=1"))
    with pytest.raises(UserError, match="two or more class folders"):
        pretrain(pretrain_config(f"online.root={flat}", "online.every_epochs=1", "run.overwrite=true"))
    assert state(run)[1] == 1
    for name in ("train", "val", "test"):
        shutil.copytree(flat, tmp_path / "three" / name / "one")
    with pytest.raises(UserError, match=r"test images are not clear: .*; name them with online\.root=.*train"):
        pretrain(pretrain_config(f"online.root={tmp_path / 'three'}", "online.every_epochs=1", "run.name=other"))


def test_online_eval_plan_reports_the_confidence_interval(pretrain_config, capsys):
    """1.96 · √(p (1 - p) / n) at p = 1/2, for many images."""
    pretrain(pretrain_config("online.every_epochs=5", "trainer.max_steps=1"))
    queries, points = re.search(
        r"/ (\d+) val images \(95 % CI about ±([\d.]+) points", capsys.readouterr().out
    ).groups()
    assert float(points) == pytest.approx(100 * 1.96 * math.sqrt(0.25 / int(queries)), rel=0.06)


def test_online_eval_of_the_runs_own_folders_says_them_and_selects_nothing(pretrain_config, sample, tmp_path, capsys):
    for camera, name in (("camera1", "train"), ("camera2", "test")):
        shutil.copytree(sample / name, tmp_path / "cameras" / camera)
    words = (f"data.root={tmp_path / 'cameras'}", "online.every_epochs=1", "trainer.max_steps=2")
    run = pretrain(pretrain_config(*words))
    output = capsys.readouterr().out
    assert "Its classes are the folders of data.root (camera1, camera2), for these numbers only" in output
    assert "Best checkpoint" not in output
    assert not (run / "checkpoints" / "best_knn.ckpt").exists()
    for more in ("online.select_best=true", f"online.root={sample}"):
        pretrain(pretrain_config(*words, more, "run.overwrite=true"))
        assert "they also select best_knn.ckpt" in capsys.readouterr().out
        assert state(run, "best_knn.ckpt")[1] == 2


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "test_set", "val"), ("train_a", "train_b")])
def test_online_eval_takes_no_splits_for_classes(pretrain_config, sample, tmp_path, capsys, names):
    for name in names:
        (tmp_path / "splits" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((sample / "test").rglob("*.png"))[:20]):
            shutil.copy(path, tmp_path / "splits" / name / f"{number}.png")
        shutil.copytree(sample / "test", tmp_path / "nested" / name)
    words = ("online.every_epochs=1", "trainer.max_steps=2")
    run = pretrain(pretrain_config(f"data.root={tmp_path / 'splits'}", *words))
    assert ("look like splits, not classes" in capsys.readouterr().out) == (names == ("train_a", "train_b"))
    assert "online/knn@20" not in rows(run)[0]
    run = pretrain(pretrain_config(f"data.root={tmp_path / 'nested'}", *words, "run.name=nested"))
    assert "No online evaluation" in capsys.readouterr().out
    assert "online/knn@20" not in rows(run)[0]


# --- the best checkpoint ---------------------------------------------------------------------------------------

SCRIPT = {0: 0.9, 3: 0.2, 6: 0.5, 9: math.nan, 12: 0.5, 15: 0.6, 16: 0.1}  # by the steps done, of 3 in an epoch
BEST = 15


@pytest.fixture(scope="module", autouse=True)
def script():
    """The first values of runs of 48 images are those of SCRIPT."""
    original = OnlineEval._update

    def judge(self, found):
        scripted = {self.main.metrics[0]: SCRIPT[found.step]} if len(self.run.dataset) == 48 else {}
        original(self, EvalPoint(found.step, found.values | scripted))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineEval, "_update", judge)
        yield


@pytest.fixture
def scripted(sample, pretrain_config):
    """A function: the configuration of a scripted run, with the words given to it."""
    words = (f"data.root={sample / 'test'}", "online.every_epochs=1", "online.select_best=true", "trainer.max_steps=16")
    return lambda *more: pretrain_config(*words, "trainer.checkpoint_every=1h", *more)


@pytest.fixture(scope="module")
def whole(sample, tmp_path_factory):
    """The folder of a scripted run that was not interrupted, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*SHRUNK, *SHRUNK_DINO, f"data.root={sample / 'test'}", f"run.folder={folder}", "run.name=whole"]
    words += ["online.every_epochs=1", "online.select_best=true"]
    words += ["trainer.max_steps=16", "trainer.keep_every_epochs=1"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run = pretrain(load_config("pretrain", words, PretrainConfig))
    return run, said.getvalue()


def marks(run, name="last.ckpt"):
    """What a checkpoint knows of the evaluations so far."""
    return checkpoint(run, name)["callbacks"]["OnlineEval"]


def test_online_eval_keeps_the_best_checkpoint_after_step_0(whole, sample, tmp_path):
    run, _ = whole
    best, step = state(run, "best_knn.ckpt")
    assert step == BEST  # a tie is no improvement, nor is what is not a number
    epoch, _ = state(run, "epoch_0005.ckpt")
    assert best.keys() == epoch.keys()
    assert all(torch.equal(value, epoch[name]) for name, value in best.items())
    last = marks(run)
    assert [last[name]["step"] for name in ("initial", "best", "last")] == [0, BEST, 16]
    assert last["best"]["values"]["online/knn@20"] == SCRIPT[BEST]
    assert marks(run, "best_knn.ckpt")["best"] == last["best"]
    words = [f"checkpoint={run / 'checkpoints' / 'best_knn.ckpt'}", f"data.root={sample / 'test'}", "baselines=false"]
    assert main(["knn", *words, f"out={tmp_path / 'best.json'}"]) == 0


def test_online_eval_summary_shows_first_last_and_best(whole):
    run, said = whole
    table = re.findall(r"^  (random weights|last|best kNN) +(\d+) +([\d.]+)", said, flags=re.M)
    assert table == [("random weights", "0", "90.0"), ("last", "16", "10.0"), ("best kNN", "15", "60.0")]
    assert f"ssl-vit knn checkpoint={run / 'checkpoints' / 'best_knn.ckpt'} data.root=LABELED" in said


@pytest.mark.parametrize("stops", [(4, 15), (6, 7)])
def test_online_eval_keeps_the_same_best_when_resumed(scripted, stop_at, whole, stops):
    for stop in stops:
        with stop_at(stop):
            run = pretrain(scripted("run.resume=auto"))
    pretrain(scripted("run.resume=true"))
    assert_same_run(whole[0], run)
    assert str(marks(run)) == str(marks(whole[0]))  # NaN among them


class Killed(BaseException):
    """As by kill -9: nothing of the program answers it."""


def kill_at(step, place, patch):
    """Around the keeping of the best of this step."""
    save, keep = RunCheckpoint._save, run_checkpoint.link_checkpoint

    def killed_before(self, trainer, *rest):
        if trainer.global_step == step:
            raise Killed
        save(self, trainer, *rest)

    def killed_after(path, name):
        if torch.load(path, weights_only=True)["global_step"] == step:
            raise Killed
        keep(path, name)

    if place == "before the checkpoint":
        patch.setattr(RunCheckpoint, "_save", killed_before)
    else:
        patch.setattr(run_checkpoint, "link_checkpoint", killed_after)


@pytest.mark.parametrize("place", ["before the checkpoint", "between checkpoint and best"])
@pytest.mark.parametrize("step", [6, 15])
def test_online_eval_killed_around_the_best_equals_uninterrupted(scripted, whole, monkeypatch, step, place):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(step, place, patch)
        pretrain(scripted())
    before = scripted().run.path / "checkpoints" / "best_knn.ckpt"
    assert read_global_step(before) == {6: 3, 15: 6}[step]
    run = pretrain(scripted("run.resume=true"))
    assert_same_run(whole[0], run)
    assert str(marks(run)) == str(marks(whole[0]))
    assert not list((run / "checkpoints").glob(".*"))


def test_online_eval_restores_the_best_of_the_last_step(scripted, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(3, "between checkpoint and best", patch)
        pretrain(scripted("trainer.max_steps=3"))
    run = pretrain(scripted("trainer.max_steps=3", "run.resume=true"))
    assert state(run, "best_knn.ckpt")[1] == 3


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_online_eval_restarts_the_search_for_a_lost_best(scripted, stop_at, caplog, damage):
    with stop_at(7):
        run = pretrain(scripted())
    best = run / "checkpoints" / "best_knn.ckpt"
    if damage == "gone":
        best.unlink()
    else:
        best.write_bytes(b"half a checkpoint")
    with stop_at(12):
        pretrain(scripted("run.resume=true"))
    assert "or not that of step 6: the search for the best checkpoint restarts" in caplog.text
    assert state(run, "best_knn.ckpt")[1] == 12


def test_resume_never_uses_the_best_checkpoint(scripted, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "runs" / "dino")
    for path in (tmp_path / "runs" / "dino" / "checkpoints").iterdir():
        if path.name != "best_knn.ckpt":
            path.unlink()
    with pytest.raises(UserError, match="its checkpoints are missing"):
        pretrain(scripted("run.resume=true"))


def test_online_eval_does_not_compare_other_images(scripted, stop_at, caplog):
    with stop_at(7):
        run = pretrain(scripted())
    with stop_at(12):
        pretrain(scripted("online.val_images=4", "run.resume=true"))
    assert "the search for the best checkpoint restarts" in caplog.text
    assert marks(run)["best"]["step"] == state(run, "best_knn.ckpt")[1] == 12
    with stop_at(13):  # what is switched off is not forgotten
        pretrain(scripted("online.every_epochs=null", "run.resume=true"))
    assert marks(run)["best"]["step"] == 12
