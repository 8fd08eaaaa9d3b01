"""`ssl-vit pretrain --multirun`: one run per combination of the values given, here or through a scheduler.

ssl-vit pretrain --multirun data.root=photos seed=0,1,2 'run.name=photos-${seed}'
ssl-vit pretrain --multirun ... hydra/launcher=submitit_slurm hydra.launcher.timeout_min=600

Hydra's launchers start the jobs of the second form; hydra-submitit-launcher is the optional extra `sweep`.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import sys

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from ssl_vit.commands.load_config import load_config
from ssl_vit.commands.pretrain import pretrain
from ssl_vit.config.pretrain import PretrainConfig
from ssl_vit.runtime.errors import UserError


def main(words: list[str]) -> None:
    """Check the configuration of every job, then run them all; the same command again goes on where it stopped.

    Raises:
        UserError: Of a job's configuration, two jobs share a run folder, or a run failed.
    """
    words = [word for word in words if word != "--multirun"]
    hydras = [word for word in words if word.startswith(("hydra/", "hydra."))]
    jobs = expand_sweep([word for word in words if word not in hydras])
    configs = [load_config("pretrain", job, PretrainConfig) for job in jobs]
    folders = [config.run.path for config in configs]
    if len(set(folders)) < len(folders):
        raise UserError(
            "--multirun: two runs would share a folder; name them by what they vary, as in 'run.name=photos-${seed}'"
        )
    print(f"{len(jobs)} runs: {', '.join(map(str, folders))}", flush=True)
    if any(word.startswith("hydra/launcher=") for word in hydras):
        _launch(configs, hydras)
    else:
        _run_here(jobs)


def expand_sweep(words: list[str]) -> list[list[str]]:
    """The words of each job: `a=1,2 b=3` are `a=1 b=3` and `a=2 b=3`. Jobs that stand already go on."""
    resume = [] if any(word.startswith("run.resume=") for word in words) else ["run.resume=auto"]
    return [[*job, *resume] for job in itertools.product(*map(_choices, words))]


def _choices(word: str) -> list[str]:
    """`a=1,2`, `a=range(1,3)` or `a=choice(1,2)` as one word per value, by Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:  # a path with odd letters: one literal value
        return [word]
    if not override.is_sweep_override():
        return [word]
    return [f"{word.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]


def _run_here(jobs: list[list[str]]) -> None:
    """One after the other, each in a process of its own."""
    failed = 0
    for job in jobs:
        process = subprocess.Popen([sys.executable, "-m", "ssl_vit", "pretrain", *job])
        try:
            failed += process.wait() != 0
        except KeyboardInterrupt:  # the run has received it too
            process.wait()
            raise UserError("stopped; the same command goes on") from None
    if failed:
        raise UserError(f"{failed} of {len(jobs)} runs failed")


def _launch(configs: list[PretrainConfig], hydras: list[str]) -> None:
    """Through the chosen launcher of Hydra, which is told nothing but the number of the job."""
    launcher = next(word.partition("=")[2] for word in hydras if word.startswith("hydra/launcher="))
    plugin = f"hydra_{launcher.partition('_')[0]}_launcher"
    if launcher != "basic" and not importlib.util.find_spec(f"hydra_plugins.{plugin}"):
        raise UserError(
            f"hydra/launcher={launcher}: there is no {plugin} here; submitit_slurm and submitit_local come with "
            "the extra `sweep`: pip install 'ssl-vit[sweep]'"
        )
    if launcher == "submitit_slurm" and not shutil.which("srun"):
        raise UserError("hydra/launcher=submitit_slurm: there is no SLURM here (no srun on the PATH)")
    if launcher != "submitit_slurm" and any(config.trainer.devices > 1 for config in configs):
        raise UserError(f"hydra/launcher={launcher} starts jobs of one process: set trainer.devices=1")

    @hydra.main(version_base="1.3", config_path=None)
    def run(choice: DictConfig) -> None:
        try:
            pretrain(configs[choice.job])
        except UserError as error:
            sys.exit(f"ssl-vit pretrain: {error}")

    numbers = ",".join(map(str, range(len(configs))))
    place = [f"hydra.sweep.dir={configs[0].run.folder / '.sweep'}", "hydra.output_subdir=null"]
    sys.argv = ["ssl-vit", "--multirun", f"+job={numbers}", *place, *hydras]
    run()
