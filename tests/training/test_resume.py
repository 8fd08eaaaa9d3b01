"""Tests of resuming: a stopped run equals an uninterrupted one; changes are reported or refused."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml

from ssl_vit.cli import main
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.data.sources.synthetic import make_synthetic_dataset
from ssl_vit.models.checkpoint import load_backbone
from ssl_vit.runtime.errors import UserError
from ssl_vit.training.callbacks.preemption import PreemptionHandler
from ssl_vit.training.checkpointing import find_latest_checkpoint
from tests.helpers.cli import assert_same_run, checkpoint, rows, run_command, start_command, state, wait_until

FULL = ("online.every_epochs=1", "online.select_best=true", "backbone.drop_path=0.2", "trainer.max_steps=27")


# --- equal to the uninterrupted run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stop"), [("dino", 5), ("dino", 12), ("sit", 5)]
)  # in the middle of the first epoch of 12 steps, and at its end
def test_pretrain_stopped_and_resumed_equals_uninterrupted(pretrain_config, stop_at, method, stop):
    words = (f"method={method}", *FULL)
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    with stop_at(stop):
        parts = pretrain(pretrain_config(*words, "run.name=parts"))
    assert state(parts)[1] == stop
    assert pretrain(pretrain_config(*words, "run.name=parts", "run.resume=true")) == parts
    assert_same_run(whole, parts)


@pytest.mark.parametrize("stops", [(12, 24), (7, 12, 24, 25, 36), (24, 36, 48)])
def test_pretrain_stopped_several_times_equals_uninterrupted(pretrain_config, stop_at, stops):
    """At the ends of the epochs, too: Lightning alone repeats the one after the second."""
    words = ("trainer.max_steps=50",)
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    for stop in stops:
        with stop_at(stop):
            parts = pretrain(pretrain_config(*words, "run.name=parts", "run.resume=auto"))
        assert state(parts)[1] == stop
    pretrain(pretrain_config(*words, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, parts)


def test_resume_falls_back_to_the_previous_checkpoint(pretrain_config, stop_at, capsys):
    words = (*FULL, "trainer.checkpoint_every=0s")
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    with stop_at(7):
        parts = pretrain(pretrain_config(*words, "run.name=parts"))
    last = parts / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor: torch would load it
    last.write_bytes(content)
    capsys.readouterr()
    pretrain(pretrain_config(*words, "run.name=parts", "run.resume=true"))
    assert "last.ckpt is damaged: resuming from the checkpoint before it" in capsys.readouterr().out
    assert_same_run(whole, parts)


def test_resume_refuses_when_all_checkpoints_are_damaged(pretrain_config):
    run = pretrain(pretrain_config("trainer.checkpoint_every=0s"))
    for name in ("last.ckpt", "previous.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged: last.ckpt, previous.ckpt"):
        pretrain(pretrain_config("run.resume=true"))


def test_find_latest_checkpoint_detects_every_damage(tmp_path):
    """A flipped bit anywhere, or a cut anywhere: the file is refused, or what it says is untouched."""
    path = tmp_path / "last.ckpt"
    content = {"global_step": 4, "weights": torch.arange(300.0), "inner": {"list": [torch.ones(5), 3, "text"]}}
    torch.save(content, path)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(good), (300,), generator=generator).tolist():
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert find_latest_checkpoint(tmp_path).step == 4
            read = torch.load(path, weights_only=True)
            assert torch.equal(read["weights"], content["weights"])
            assert torch.equal(read["inner"]["list"][0], torch.ones(5))
        except UserError:
            refused += 1
    assert refused > 150
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="damaged"):
            find_latest_checkpoint(tmp_path)


def test_resume_rewrites_a_row_that_was_cut_off(pretrain_config, stop_at):
    words = ("trainer.max_steps=9",)
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    with stop_at(4):
        parts = pretrain(pretrain_config(*words, "run.name=parts"))
    with (parts / "metrics.csv").open("a") as file:
        file.write("4,0,3.99")
    pretrain(pretrain_config(*words, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, parts)


def test_resume_without_a_checkpoint_starts_from_scratch(pretrain_config, capsys):
    run = pretrain(pretrain_config())
    whole = run.rename(run.with_name("whole"))
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="its checkpoints are missing"):  # but a backbone is there
        pretrain(pretrain_config("run.resume=true"))
    (run / "backbone.safetensors").unlink()
    pretrain(pretrain_config("run.resume=true"))
    assert "No checkpoint was written" in capsys.readouterr().out
    assert_same_run(whole, run)


@pytest.mark.parametrize("word", ["run.resume=true", "run.resume=auto", "run.resume=false"])
def test_open_run_dir_refuses_checkpoints_without_a_config(pretrain_config, word):
    run = pretrain(pretrain_config())
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"contains checkpoints but no config\.yaml"):
        pretrain(pretrain_config(word))
    assert state(run)[1] == 4


def test_resume_reports_a_missing_last_checkpoint(pretrain_config, capsys):
    run = pretrain(pretrain_config("trainer.checkpoint_every=0s"))
    (run / "checkpoints" / "last.ckpt").unlink()
    pretrain(pretrain_config("trainer.checkpoint_every=0s", "run.resume=true"))
    assert "last.ckpt is missing: resuming from previous.ckpt" in capsys.readouterr().out


def test_run_checkpoint_saves_the_first_epoch(pretrain_config):
    run = pretrain(pretrain_config("trainer.max_steps=13", "trainer.checkpoint_every=10m"))
    assert checkpoint(run, "previous.ckpt")["global_step"] == 12


def test_overwrite_replaces_a_run_only_when_the_new_one_starts(pretrain_config, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no image")
    run = pretrain(pretrain_config())
    with pytest.raises(UserError, match="read"):
        pretrain(pretrain_config(f"data.root={broken}", "run.overwrite=true"))
    assert state(run)[1] == 4
    pretrain(pretrain_config("trainer.max_steps=2", "run.overwrite=true"))
    assert state(run)[1] == 2
    assert sorted(path.name for path in run.parent.iterdir()) == [".dino.lock", "dino"]


def test_resume_auto_starts_or_resumes(pretrain_config, stop_at):
    with stop_at(2):
        run = pretrain(pretrain_config("run.resume=auto"))
        assert state(run)[1] == 2
    assert state(pretrain(pretrain_config("run.resume=auto")))[1] == 4


def test_resume_is_exact_with_accumulated_steps(pretrain_config, stop_at):
    words = ("trainer.accumulate_grad_batches=2", "trainer.max_steps=9")
    whole = pretrain(pretrain_config(*words, "run.name=whole"))
    with stop_at(5):
        parts = pretrain(pretrain_config(*words, "run.name=parts"))
    pretrain(pretrain_config(*words, "run.name=parts", "run.resume=true"))
    assert_same_run(whole, parts)


def test_resume_reports_another_number_of_threads(pretrain_config, stop_at, caplog):
    before = torch.get_num_threads()
    with stop_at(2):
        pretrain(pretrain_config())
    try:
        torch.set_num_threads(before + 1)
        pretrain(pretrain_config("run.resume=true"))
    finally:
        torch.set_num_threads(before)
    assert f"OMP_NUM_THREADS={before} continues it to the last bit" in caplog.text


def test_commands_name_a_run_whose_replacement_was_killed(pretrain_config, sample, capsys):
    run = pretrain(pretrain_config())
    old = run.rename(run.with_name(f".{run.name}.replaced"))
    for more in (False, True):
        if more:
            (run / "checkpoints").mkdir(parents=True)  # the new run had not begun
        for words in (["knn", f"checkpoint={run}", f"data.root={sample}"], ["report", f"run={run}"]):
            assert main(words) == 2
            assert f"the old run is kept in {old}" in capsys.readouterr().err
    pretrain(pretrain_config("run.resume=true"))
    assert not old.exists()


# --- signals and time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_preemption_handler_saves_and_stops_on_a_signal_to_the_group(pretrain_words, tmp_path, number):
    """As a terminal and a scheduler send it: loading processes get it too."""
    run = tmp_path / "runs" / "dino"
    words = pretrain_words("trainer.max_steps=100000", "data.cache_gb=0", "data.num_workers=1")
    process = start_command(words)
    wait_until((run / "metrics.csv").exists, process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run.resume=true" in output
    assert "Traceback" not in output
    assert 0 < state(run)[1] < 100000
    load_backbone(str(run / "backbone.safetensors"))


def test_preemption_handler_requeues_a_slurm_job_that_resumes(pretrain_words, tmp_path):
    """SIGUSR1 before the time is up, `scontrol requeue`, and SLURM starts the same command again."""
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
    fake.chmod(0o755)
    slurm = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "photos",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost",
    }
    run = tmp_path / "runs" / "dino"
    words = pretrain_words("trainer.max_steps=60", "trainer.checkpoint_every=1h")
    process = start_command(words, **slurm)
    wait_until((run / "metrics.csv").exists, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"
    stopped = state(run)[1]
    assert 0 < stopped < 60, output
    done = run_command([*words, "run.overwrite=true"], **slurm, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {stopped}" in done.stdout
    assert [int(row["step"]) for row in rows(run)] == list(range(60))


def test_preemption_handler_calls_submitit_after_the_checkpoint(pretrain_config, monkeypatch):
    """It resubmits the job and ends the process; by then the run must be saved."""
    seen = []
    run = pretrain_config().run.path
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append(state(run)[1]))
    original = PreemptionHandler.on_train_batch_end

    def warn(self, trainer, *rest):
        original(self, trainer, *rest)
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(PreemptionHandler, "on_train_batch_end", warn)
    try:
        pretrain(pretrain_config())
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [2]


def test_run_checkpoint_saves_and_stops_at_max_time(pretrain_config, capsys):
    run = pretrain(pretrain_config("trainer.max_steps=100000", "trainer.max_time=2s"))
    step = state(run)[1]
    assert 0 < step < 100000
    message = f"Stopped and saved after step {step:,} of 100,000, as trainer.max_time is over. Resume with"
    assert message in capsys.readouterr().out


def test_run_checkpoint_keeps_every_nth_epoch(pretrain_config):
    run = pretrain(pretrain_config("trainer.max_steps=36", "trainer.keep_every_epochs=2"))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["epoch_0002.ckpt", "last.ckpt", "previous.ckpt"]
    assert checkpoint(run, "epoch_0002.ckpt")["global_step"] == 24
    assert checkpoint(run)["global_step"] == 36


# --- what has changed ------------------------------------------------------------------------------------------


def test_compare_configs_refuses_changed_keys_and_reports_allowed_ones(pretrain_words, capsys):
    words = pretrain_words("trainer.max_steps=1")
    assert main(["pretrain", *words]) == 0
    harmless = ["run.resume=true", "data.num_workers=1", "trainer.log_every_n_steps=7"]
    assert main(["pretrain", *words, *harmless, "method.optimizer.lr=0.1", "seed=5"]) == 2
    message = capsys.readouterr().err
    assert "method.optimizer.lr: 0.0005 -> 0.1" in message
    assert "seed: 0 -> 5" in message
    assert "workers" not in message
    assert "log_every" not in message
    assert main(["pretrain", *words, *harmless]) == 0
    assert "Changed: data.num_workers: 0 -> 1" in capsys.readouterr().out


def test_extend_to_epochs_is_required_for_a_longer_run(pretrain_words, tmp_path, capsys):
    words = pretrain_words("trainer.max_steps=null", "trainer.max_epochs=1")
    run = tmp_path / "runs" / "dino"
    assert main(["pretrain", *words]) == 0
    assert main(["pretrain", *words, "trainer.max_epochs=2", "run.resume=true"]) == 2
    assert "run.extend_to_epochs=N" in capsys.readouterr().err
    longer = [*words, "run.resume=true", "run.extend_to_epochs=2"]
    assert main(["pretrain", *longer]) == 0
    output = capsys.readouterr().out
    assert "was 12 steps long and is now 24" in output
    assert [int(row["step"]) for row in rows(run)] == list(range(24))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    # From here on the schedules are those of a run that was 24 steps long from the start.
    assert main(["pretrain", *words, "trainer.max_epochs=2", "run.name=long"]) == 0
    for name in ("schedule/lr", "schedule/teacher_momentum", "schedule/weight_decay"):
        assert [row[name] for row in rows(run)][12:] == [row[name] for row in rows(run.with_name("long"))][12:]
    assert main(["pretrain", *longer]) == 0
    assert "The run is already complete" in capsys.readouterr().out
    assert main(["pretrain", *words, "run.resume=true"]) == 2
    assert "run.extend_to_epochs=2 resumes it" in capsys.readouterr().err
    assert main(["pretrain", *words, "run.resume=true", "run.extend_to_epochs=1"]) == 2
    assert "run.extend_to_epochs=1 is 12 steps, but the run already has 24" in capsys.readouterr().err


def test_resume_accepts_true_false_and_auto_only(pretrain_words, capsys):
    assert main(["pretrain", *pretrain_words("run.resume=maybe")]) == 2
    message = capsys.readouterr().err
    assert "1 mistake" in message
    assert "run.resume: write true, false or auto (got 'maybe')" in message


def test_extend_to_epochs_requires_resume(pretrain_words, capsys):
    assert main(["pretrain", *pretrain_words("run.extend_to_epochs=5")]) == 2
    assert "add run.resume=true" in capsys.readouterr().err


def test_check_dataset_unchanged_refuses_changes_or_keeps_the_list(pretrain_words, tmp_path, capsys, stop_at):
    folder = tmp_path / "own"
    make_synthetic_dataset(folder, num_images=60, seed=0)
    words = pretrain_words(f"data.root={folder / 'train'}", "trainer.max_steps=9", "data.cache_gb=0")
    assert main(["pretrain", *words, "run.name=whole"]) == 0
    with stop_at(2):
        assert main(["pretrain", *words]) == 0
    moved = folder / "elsewhere"
    (folder / "train").rename(moved)
    words += [f"data.root={moved}", "run.resume=true"]
    names = json.loads((tmp_path / "runs" / "dino" / "data.json").read_text())
    assert names["count"] == 48
    old = next(moved.rglob("*.png"))
    for i in range(16):  # another step per epoch
        shutil.copy(old, old.with_name(f"new one {i}.png"))
    capsys.readouterr()
    assert main(["pretrain", *words]) == 2
    message = capsys.readouterr().err
    assert "from 48 to 64" in message
    assert "removed: none; new: 16" in message
    assert "new one 0.png" in message
    assert main(["pretrain", *words, "run.keep_image_list=true"]) == 0
    assert "keeps its own list" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "dino")


@pytest.mark.parametrize("name", ["data.json", "image_list.safetensors", "metrics.csv"])
@pytest.mark.parametrize("damage", ["gone", "nonsense"])
def test_resume_survives_the_loss_of_metadata(pretrain_config, stop_at, name, damage):
    with stop_at(2):
        run = pretrain(pretrain_config())
    (run / name).unlink()
    if damage == "nonsense":
        (run / name).write_bytes(b"\x00nonsense\n\xff")
    pretrain(pretrain_config("run.resume=true"))
    assert state(run)[1] == 4
    assert [row["step"] for row in rows(run)][-2:] == ["2", "3"]


def test_check_dataset_unchanged_accepts_a_moved_folder(pretrain_words, tmp_path):
    folder = tmp_path / "own"
    make_synthetic_dataset(folder, num_images=60, seed=0)
    words = pretrain_words(f"data.root={folder / 'train'}", "trainer.max_steps=2")
    assert main(["pretrain", *words]) == 0
    (folder / "train").rename(folder / "elsewhere")
    assert main(["pretrain", *words, f"data.root={folder / 'elsewhere'}", "run.resume=true"]) == 0


def test_lock_run_dir_keeps_a_second_command_out(pretrain_words, tmp_path, capsys):
    run = tmp_path / "runs" / "dino"
    words = pretrain_words("trainer.max_steps=100000")
    process = start_command(words)
    try:
        wait_until((run / "metrics.csv").exists, process)
        for word in ("run.resume=true", "run.resume=auto", "run.overwrite=true"):
            assert main(["pretrain", *words, word]) == 2
            assert "another process is training in" in capsys.readouterr().err
        assert (run / "config.yaml").exists()
    finally:
        process.kill()
        process.communicate()
    # The lock has died with its owner.
    assert main(["pretrain", *pretrain_words("trainer.max_steps=1", "run.overwrite=true")]) == 0


def test_resume_without_a_run_is_refused(pretrain_words, capsys):
    assert main(["pretrain", *pretrain_words("run.resume=true")]) == 2
    assert "contains no run" in capsys.readouterr().err


def test_pretrain_refuses_to_resume_a_run_of_version_0_1_and_its_weights_load(pretrain_words, tmp_path, capsys):
    words = pretrain_words("trainer.max_steps=1")
    assert main(["pretrain", *words]) == 0
    run = tmp_path / "runs" / "dino"
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["panels"] = values.pop("image_logging")
    values["trainer"]["accumulate"] = values["trainer"].pop("accumulate_grad_batches")
    values["trainer"]["log_every"] = values["trainer"].pop("log_every_n_steps")
    values["data"]["workers"] = values["data"].pop("num_workers")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    (run / "image_list.safetensors").rename(run / "pictures.safetensors")
    capsys.readouterr()
    for word in ("run.resume=true", "run.resume=auto"):
        assert main(["pretrain", *words, word]) == 2
        message = capsys.readouterr().err
        assert f"{run} is a run of ssl-vit 0.1, which this version cannot resume" in message
        assert "another run.name" in message
    assert state(run)[1] == 1
    assert load_backbone(str(run)).run == run


@pytest.mark.parametrize("text", ["", "seed: [", "!!python/object/apply:os.system ['touch gone']", "42"])
def test_read_config_reports_a_damaged_file(pretrain_words, tmp_path, capsys, text):
    run = pretrain_words("trainer.max_steps=1")
    assert main(["pretrain", *run]) == 0
    (tmp_path / "runs" / "dino" / "config.yaml").write_text(text)
    assert main(["pretrain", *run, "run.resume=true"]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err
