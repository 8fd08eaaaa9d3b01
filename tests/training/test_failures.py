"""Tests of failures: kill -9 at any moment, full disks, values that are not finite, lost processes."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssl_vit.commands.pretrain import pretrain
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.sit import SiT
from ssl_vit.runtime.errors import UserError
from ssl_vit.training import failures
from tests.helpers.cli import (
    assert_same_run,
    checkpoint,
    command,
    environment,
    rows,
    run_command,
    start_command,
    wait_until,
)

DINO_STEP = DINO.step

# --- killed ----------------------------------------------------------------------------------------------------


def kill_and_resume(words, run, *, kills, seed):
    """Kill -9 the run again and again, every other time while it writes a checkpoint; then let it end."""
    moment = random.Random(seed)
    half_written = 0
    temporary = run / "checkpoints" / ".last.ckpt.tmp"
    for kill in range(kills):
        process = start_command([*words, "run.resume=auto"])
        saved = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns if kill else 0
        if kill % 2:
            time.sleep(moment.uniform(0, 12))  # during start-up as well
        else:
            wait_until(lambda: (path := run / "checkpoints" / "last.ckpt").exists() and path.stat().st_mtime_ns > saved)  # noqa: B023
            time.sleep(moment.uniform(0, 0.5))
            wait_until(temporary.exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        half_written += temporary.exists()
    done = run_command([*words, "run.resume=auto"])
    assert done.returncode == 0, done.stderr
    return half_written


def check_kills(words, run, *, kills):
    words = [
        *words,
        "trainer.checkpoint_every=0s",
        "backbone.drop_path=0.2",
        "online.every_epochs=1",
        "online.select_best=true",
    ]
    whole = run_command([*words, "run.name=whole"])
    assert whole.returncode == 0, whole.stderr
    assert kill_and_resume(words, run, kills=kills, seed=0) > 0
    assert_same_run(run.with_name("whole"), run)
    steps = checkpoint(run)["global_step"]
    assert [int(row["step"]) for row in rows(run)] == list(range(steps))


def test_pretrain_killed_and_resumed_equals_uninterrupted(pretrain_words, tmp_path):
    check_kills(pretrain_words("trainer.max_steps=200"), tmp_path / "runs" / "dino", kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "sit"])
def test_pretrain_killed_twenty_times_and_resumed_equals_uninterrupted(pretrain_words, tmp_path, method):
    words = pretrain_words(f"method={method}", "trainer.max_steps=2000", "data.cache_gb=0", "data.num_workers=1")
    check_kills(words, tmp_path / "runs" / method, kills=20)


@pytest.mark.slow
def test_pretrain_from_weights_killed_and_resumed_equals_uninterrupted(pretrain_words, tmp_path, tiny_model):
    """Most of the run is the freeze and the ramp."""
    words = [word for word in pretrain_words("trainer.max_steps=300") if not word.startswith("backbone")]
    start = ("start.freeze_backbone=50%", "start.ramp=40%", "start.backbone_lr=1e-3", "anchor=gram")
    check_kills([*words, f"checkpoint={tiny_model}", *start], tmp_path / "runs" / "dino", kills=5)


# --- a full disk -----------------------------------------------------------------------------------------------


def test_run_checkpoint_keeps_the_previous_file_when_a_write_fails(pretrain_config, monkeypatch):
    """The write fails half-way."""
    original = torch.save

    def full_disk(content, file):
        if content["global_step"] > 3:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", full_disk)
    config = pretrain_config("trainer.checkpoint_every=0s", "trainer.max_steps=9")  # after every step
    with pytest.raises(UserError, match=r"step 4 cannot be written .* No space left .* step 3 is intact"):
        pretrain(config)
    assert sorted(path.name for path in (config.run.path / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    monkeypatch.undo()
    resumed = pretrain(pretrain_config("trainer.max_steps=9", "run.resume=true"))
    assert [row["step"] for row in rows(resumed)] == [str(step) for step in range(9)]


def test_pretrain_reports_a_full_disk_in_one_line(pretrain_words):
    """The operating system refuses to let any file grow beyond 100 kB."""
    limit = 100_000
    done = subprocess.run(
        command(pretrain_words("trainer.max_steps=3")),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert "File too large. No checkpoint was written" in done.stderr
    assert "Traceback" not in done.stderr


# --- numbers that are not finite -------------------------------------------------------------------------------


def spoil(monkeypatch, method, steps):
    """The loss is not a number in these steps."""
    original = method.step

    def step(self, *batch):
        result = original(self, *batch)
        return result._replace(loss=result.loss * (float("nan") if self.global_step in steps else 1))

    monkeypatch.setattr(method, "step", step)


@pytest.mark.parametrize(("name", "method"), [("dino", DINO), ("sit", SiT)])
def test_skipped_steps_logs_a_step_that_is_not_finite(pretrain_config, monkeypatch, capsys, name, method):
    words = (f"method={name}", "trainer.max_steps=4", "run.name=spoiled", "trainer.checkpoint_every=0s")
    spoil(monkeypatch, method, {3})
    run = pretrain(pretrain_config(*words))
    before, after = checkpoint(run, "previous.ckpt"), checkpoint(run)
    assert (before["global_step"], after["global_step"]) == (3, 4)
    for key, value in after["state_dict"].items():  # the student, the teacher and the center
        assert torch.equal(value, before["state_dict"][key]), key
    (line,) = map(json.loads, (run / "skipped_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["loss"]) == (3, "nan")
    assert len(line["images"]) == 16
    assert {"index", "name", "key"} == line["images"][0].keys()
    assert line["images"][0]["name"].endswith(".png")
    assert line["parameters"]
    assert "Skipped 1 step with a loss or gradient that is not finite" in capsys.readouterr().out


def test_skipped_steps_counts_a_gradient_that_is_not_finite(pretrain_config, monkeypatch):
    """sqrt(0) x 0 has a finite value and no gradient."""
    original = DINO.step

    def step(self, *batch):
        result = original(self, *batch)
        return result._replace(loss=result.loss + (0 * self.student.backbone.vit.cls_token).sum().sqrt())

    monkeypatch.setattr(DINO, "step", step)
    with pytest.raises(UserError, match="3 steps in a row"):
        pretrain(pretrain_config("trainer.max_steps=9", "trainer.max_skipped_steps=2"))


def test_skipped_steps_counts_in_a_row_across_a_resume(pretrain_config, monkeypatch):
    words = ("trainer.max_skipped_steps=2", "trainer.checkpoint_every=0s")
    spoil(monkeypatch, DINO, {1, 2, 4, 5})
    run = pretrain(pretrain_config(*words, "trainer.max_steps=7", "run.name=enough"))
    assert checkpoint(run)["global_step"] == 7
    monkeypatch.undo()
    spoil(monkeypatch, DINO, set(range(4, 99)))
    with pytest.raises(UserError, match=r"diverged at step 7: 3 steps in a row .* The checkpoint of step 6 is intact"):
        pretrain(pretrain_config(*words, "trainer.max_steps=20"))
    content = checkpoint(run.with_name("dino"))
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    with pytest.raises(UserError, match="diverged at step 7: 3 steps in a row"):
        pretrain(pretrain_config(*words, "trainer.max_steps=20", "run.resume=true"))
    lines = [json.loads(line)["step"] for line in (run.with_name("dino") / "skipped_steps.jsonl").open()]
    assert lines == [4, 5, 6]


def test_run_checkpoint_never_saves_weights_that_are_not_finite(pretrain_config):
    words = ("method.optimizer.warmup=0steps", "method.optimizer.lr=1e41", "trainer.checkpoint_every=0s")
    with pytest.raises(UserError, match=r"diverged at step 1: a weight is not finite\. No checkpoint was written"):
        pretrain(pretrain_config(*words))


def test_skipped_steps_ends_a_run_whose_loss_scale_no_longer_helps(pretrain_config, monkeypatch):
    """In 16-mixed steps are left out while the scale is looked for; endless ones end the run all the same."""
    from lightning.pytorch.plugins import MixedPrecision

    from ssl_vit.training import trainer

    original = trainer.L.Trainer

    def with_scaler(**settings):
        del settings["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        return original(**settings | {"plugins": [*settings["plugins"], MixedPrecision("16-mixed", "cpu", scaler)]})

    def step(self, *batch):
        result = DINO_STEP(self, *batch)
        return result._replace(loss=result.loss + (0 * self.student.backbone.vit.cls_token).sum().sqrt())

    monkeypatch.setattr(trainer.L, "Trainer", with_scaler)
    monkeypatch.setattr(DINO, "step", step)
    with pytest.raises(UserError, match="diverged at step 5: 3 steps in a row"):  # after two at scales above 1
        pretrain(pretrain_config("trainer.max_steps=20", "trainer.max_skipped_steps=2"))


# --- several processes -----------------------------------------------------------------------------------------

FAULTY = """
import sys
from ssl_vit.methods.dino import DINO
from ssl_vit.cli import main
{fault}
sys.exit(main())
"""

NAN_IN_ONE = """
original = DINO.step
def step(self, *batch):
    result = original(self, *batch)
    bad = self.global_rank == 1 and self.global_step == 2
    return result._replace(loss=result.loss * (float("nan") if bad else 1))
DINO.step = step
"""

ERROR_IN_ONE = """
from ssl_vit.runtime.errors import UserError
original = DINO.step
def step(self, *batch):
    if self.global_rank == {rank} and self.global_step == 2:
        raise UserError("the roof is on fire")
    return original(self, *batch)
DINO.step = step
"""


def run_two(tmp_path, words, fault):
    """The command with two processes, in which something happens."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault=fault))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), "pretrain", "trainer.devices=2", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )
    return done, time.monotonic() - start


def test_skipped_steps_skips_in_all_processes_alike(pretrain_words, tmp_path):
    words = pretrain_words("trainer.max_steps=5", "trainer.checkpoint_every=0s")
    done, _ = run_two(tmp_path, words, NAN_IN_ONE)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "dino"
    lines = [json.loads(line) for line in (run / "skipped_steps.jsonl").open()]
    assert sorted((line["step"], line["process"]) for line in lines) == [(2, 0), (2, 1)]
    assert [line["loss"] for line in lines if line["process"] == 1] == ["nan"]
    assert checkpoint(run)["global_step"] == 5
    assert all(value.isfinite().all() for value in checkpoint(run)["state_dict"].values())


@pytest.mark.parametrize("rank", [0, 1])
def test_translate_training_errors_stops_all_processes_with_one_message(pretrain_words, tmp_path, rank):
    words = pretrain_words("trainer.max_steps=100000", "trainer.checkpoint_every=0s")
    done, seconds = run_two(tmp_path, words, ERROR_IN_ONE.format(rank=rank))
    assert done.returncode != 0
    assert done.stderr.count("the roof is on fire") == 1
    assert f"process {rank}: the roof is on fire" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 120
    assert checkpoint(tmp_path / "runs" / "dino")["global_step"] == 2


def test_consistency_check_refuses_different_images(pretrain_words, tmp_path):
    fault = """
from ssl_vit.data.sources import image_folder
import os
if os.environ.get("LOCAL_RANK") == "1":
    original = image_folder.cached_walk
    image_folder.cached_walk = lambda root: (original(root)[0].slice(0, 100), original(root)[1])
"""
    done, _ = run_two(tmp_path, pretrain_words("trainer.max_steps=5"), fault)
    assert done.returncode == 2
    assert done.stderr.count("the processes see different images") == 1
    assert "Traceback" not in done.stderr


def children_of(process):
    """The processes of ssl-vit that it has started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listed.exists():
        pytest.skip("needs /proc to find the processes")
    children = [int(child) for child in listed.read_text().split()]
    return [child for child in children if b"ssl_vit" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_translate_training_errors_reports_a_killed_process(pretrain_words, tmp_path):
    run = tmp_path / "runs" / "dino"
    words = pretrain_words("trainer.max_steps=100000", "trainer.devices=2", "trainer.checkpoint_every=0s")
    process = start_command(words)
    wait_until((run / "checkpoints" / "previous.ckpt").exists, process)
    (second,) = children_of(process)
    os.kill(second, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert output.count("another process has ended, which ends the run") == 1
    assert "is intact: resume from it with run.resume=true" in output
    assert "Traceback" not in output


def test_translate_training_errors_reports_a_killed_data_worker(pretrain_words, tmp_path):
    """As the system does when memory runs out."""
    run = tmp_path / "runs" / "dino"
    words = pretrain_words(
        "trainer.max_steps=100000", "data.cache_gb=0", "data.num_workers=1", "trainer.checkpoint_every=0s"
    )
    process = start_command(words)
    wait_until((run / "checkpoints" / "previous.ckpt").exists, process)
    (worker,) = children_of(process)
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "a data loading process was killed" in output
    assert "is intact" in output
    assert "Traceback" not in output


def test_translate_training_errors_finds_a_killed_data_worker_behind_other_errors(pretrain_config, monkeypatch):
    """torch raises from a signal handler, wherever the process is; what is interrupted may raise its own instead."""

    def interrupted(self, batch, batch_idx):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise TypeError("unsupported callable") from error

    monkeypatch.setattr(DINO, "training_step", interrupted)
    with pytest.raises(UserError, match="a data loading process was killed"):
        pretrain(pretrain_config())


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_pretrain_resumes_with_another_number_of_processes(pretrain_words, tmp_path, first, second):
    words = pretrain_words(
        "trainer.precision=32-true",
        "backbone.drop_path=0.2",
        "trainer.max_steps=14",
        "online.every_epochs=1",
        "online.select_best=true",
    )
    run = tmp_path / "runs" / "dino"
    whole = run_command([*words, "run.name=whole"])
    assert whole.returncode == 0, whole.stderr
    stop = """
from ssl_vit.training.callbacks.preemption import PreemptionHandler
import signal
def ask(self, trainer, *rest):
    if trainer.global_step == 5:
        self.received = signal.SIGTERM
PreemptionHandler.on_train_batch_end = ask
"""
    done, _ = run_two(tmp_path, [*words, f"trainer.devices={first}"], stop)
    assert done.returncode == 0, done.stderr
    assert checkpoint(run)["global_step"] == 5
    done = run_command([*words, f"trainer.devices={second}", "run.resume=true"])
    assert done.returncode == 0, done.stderr
    assert f"Changed: trainer.devices: {first} -> {second}" in done.stdout
    one, other = checkpoint(run.with_name("whole")), checkpoint(run)
    assert one["global_step"] == other["global_step"] == 14
    for name, value in one["state_dict"].items():
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding
            torch.testing.assert_close(value, other["state_dict"][name], rtol=0, atol=1e-5)
    assert [row["step"] for row in rows(run)] == [str(step) for step in range(14)]
    assert [row["step"] for row in rows(run) if row["online/knn@20"]] == ["0", "11", "13"]
    assert checkpoint(run, "best_knn.ckpt")["global_step"] in (12, 14)


def test_skipped_steps_counts_one_step_later_on_a_gpu(tmp_path):
    """The last step that is known is not the one at hand; what is saved can be resumed."""
    from types import SimpleNamespace

    from ssl_vit.methods.gradient_clipping import SkippedStep
    from ssl_vit.runtime.atomic_io import JSONLWriter
    from ssl_vit.training.callbacks.skipped_steps import SkippedSteps

    steps = SkippedSteps(JSONLWriter(tmp_path / "skipped.jsonl", 0), SimpleNamespace(name=str), max_in_a_row=2)
    trainer = SimpleNamespace(global_step=0, current_epoch=0, accumulate_grad_batches=1, should_stop=False)

    class Loss:
        is_cuda = True

        def detach(self):
            return self

        def __mul__(self, factor):
            return self

        def __float__(self):
            return float("nan")

    batch = SimpleNamespace(index=torch.arange(2), key=torch.arange(2))
    bad = SimpleNamespace(check=SimpleNamespace(skipped=lambda: SkippedStep([], expected=False)))
    steps.on_train_start(trainer, bad)
    for step in range(1, 4):
        trainer.global_step = step
        steps.on_train_batch_end(trainer, bad, {"loss": Loss()}, batch, 0)
        assert steps.total == step - 1
    assert not trainer.should_stop
    assert steps.state_dict() == {"total": 3, "in_a_row": 2}
    assert steps.exhausted
    trainer.global_step = 4
    steps.on_train_batch_end(trainer, bad, {"loss": Loss()}, batch, 0)
    assert trainer.should_stop

    resumed = SkippedSteps(JSONLWriter(tmp_path / "more.jsonl", 0), SimpleNamespace(name=str), max_in_a_row=2)
    resumed.load_state_dict(steps.state_dict() | {"in_a_row": 2})
    good = SimpleNamespace(check=SimpleNamespace(skipped=lambda: None))
    resumed.on_train_start(SimpleNamespace(global_step=4), good)
    trainer = SimpleNamespace(global_step=5, current_epoch=0, accumulate_grad_batches=1, should_stop=False)
    resumed.on_train_batch_end(trainer, good, {"loss": Loss()}, batch, 0)
    resumed.on_train_end()
    assert not trainer.should_stop
    assert not resumed.exhausted


def test_data_worker_died_knows_a_connection_that_was_closed():
    assert failures._data_worker_died(EOFError())
    assert failures._data_worker_died(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
    assert not failures._data_worker_died(RuntimeError("shapes do not match"))
