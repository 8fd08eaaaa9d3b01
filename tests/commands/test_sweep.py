"""ssl-vit pretrain --multirun: one run per combination, on this machine or through a launcher."""

import pytest

from ssl_vit.cli import main
from ssl_vit.commands.sweep import expand_sweep
from tests.helpers.cli import rows, run_command, state


def test_expand_sweep_gives_one_job_per_combination():
    jobs = expand_sweep(["seed=0,1", "data.root=/a b/[c]", "method.optimizer.lr=choice(0.1,0.2)", "backbone=vit_cpu"])
    assert len(jobs) == 4
    assert jobs[0] == [
        "seed=0",
        "data.root=/a b/[c]",
        "method.optimizer.lr=0.1",
        "backbone=vit_cpu",
        "run.resume=auto",
    ]
    assert jobs[3][0] == "seed=1"
    assert jobs[3][2] == "method.optimizer.lr=0.2"
    assert expand_sweep(["seed=range(1,4)", "run.resume=true"]) == [
        [f"seed={seed}", "run.resume=true"] for seed in (1, 2, 3)
    ]
    assert expand_sweep(["method.teacher.momentum=[0.9,1.0]"])[0][0] == "method.teacher.momentum=[0.9,1.0]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0,1"], "two runs have the same run directory"),
        (["seed=0,1", "run.name=s${seed}", "method.optimizer.lrr=3"], "unknown key"),
        (["seed=0,1", "run.name=s${seed}", "trainer.devices=2", "hydra/launcher=basic"], "set trainer.devices=1"),
        (["seed=0,1", "run.name=s${seed}", "hydra/launcher=nonsense"], "hydra_nonsense_launcher is not installed"),
    ],
)
def test_multirun_reports_mistakes_before_the_first_run(pretrain_words, tmp_path, capsys, overrides, message):
    assert main(["pretrain", "--multirun", *pretrain_words(*overrides)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_multirun_is_in_the_help_of_pretrain(capsys):
    assert main(["pretrain", "--help"]) == 0
    assert "--multirun" in capsys.readouterr().out


def test_multirun_is_required_by_a_launcher(pretrain_words, capsys):
    assert main(["pretrain", *pretrain_words("hydra/launcher=submitit_slurm")]) == 2
    assert "add --multirun" in capsys.readouterr().err


def test_multirun_continues_after_a_failed_run(pretrain_words, tmp_path):
    """A value that only the model rejects."""
    words = pretrain_words("trainer.max_steps=2", "backbone.name=resnet50,vit_tiny_patch16_224")
    words.append("run.name=on-${backbone.name}")
    done = run_command(["--multirun", *words])
    assert done.returncode == 2
    assert "1 of 2 runs failed" in done.stderr
    assert state(tmp_path / "runs" / "on-vit_tiny_patch16_224")[1] == 2
    assert not (tmp_path / "runs" / "on-resnet50").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_multirun_starts_jobs_with_a_hydra_launcher(pretrain_words, tmp_path, launcher):
    words = pretrain_words("trainer.max_steps=2", "seed=0,1", "run.name=s${seed}", f"hydra/launcher={launcher}")
    done = run_command(["--multirun", *words])
    assert done.returncode == 0, done.stderr
    first, second = (rows(tmp_path / "runs" / name) for name in ("s0", "s1"))
    assert len(first) == len(second) == 2
    assert first[1]["train/loss"] != second[1]["train/loss"]
