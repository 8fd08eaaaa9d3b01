"""`ssl-vit pretrain --multirun`: one run per combination of values, on this machine or through a scheduler.

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
from ssl_vit.runtime.text import pluralize


def main(argv: list[str]) -> None:
    """Validate the configuration of every job, then run all; the same command resumes an interrupted sweep.

    Raises:
        UserError: The configuration of a job is invalid, two jobs share a run directory, or a run failed.
    """
    argv = [arg for arg in argv if arg != "--multirun"]
    hydra_options = [arg for arg in argv if arg.startswith(("hydra/", "hydra."))]
    jobs = expand_sweep([arg for arg in argv if arg not in hydra_options])
    configs = [load_config("pretrain", job, PretrainConfig) for job in jobs]
    run_dirs = [config.run.path for config in configs]
    if len(set(run_dirs)) < len(run_dirs):
        raise UserError(
            "--multirun: two runs have the same run directory; put what varies into the name: 'run.name=photos-${seed}'"
        )
    print(f"{pluralize(len(jobs), 'run')}: {', '.join(map(str, run_dirs))}", flush=True)
    if any(option.startswith("hydra/launcher=") for option in hydra_options):
        _launch(configs, hydra_options)
    else:
        _run_here(jobs)


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job: of `a=1,2 b=3` these are `a=1 b=3` and `a=2 b=3`. Existing runs are resumed."""
    resume = [] if any(override.startswith("run.resume=") for override in overrides) else ["run.resume=auto"]
    return [[*job, *resume] for job in itertools.product(*map(_expand_override, overrides))]


def _expand_override(override: str) -> list[str]:
    """Return one override per value of `a=1,2`, `a=range(1,3)` or `a=choice(1,2)`, in Hydra's grammar."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:  # a path with special characters: one literal value
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    return [f"{override.partition('=')[0]}={value}" for value in parsed.sweep_string_iterator()]


def _run_here(jobs: list[list[str]]) -> None:
    """Run the jobs one after the other, each in its own process."""
    failed = 0
    for job in jobs:
        process = subprocess.Popen([sys.executable, "-m", "ssl_vit", "pretrain", *job])
        try:
            failed += process.wait() != 0
        except KeyboardInterrupt:  # the run receives it, too
            process.wait()
            raise UserError("stopped; the same command resumes the sweep") from None
    if failed:
        raise UserError(f"{failed} of {len(jobs)} runs failed")


def _launch(configs: list[PretrainConfig], hydra_options: list[str]) -> None:
    """Run the jobs with a launcher of Hydra, which receives the index of the job only."""
    launcher = next(option.partition("=")[2] for option in hydra_options if option.startswith("hydra/launcher="))
    plugin = f"hydra_{launcher.partition('_')[0]}_launcher"
    if launcher != "basic" and not importlib.util.find_spec(f"hydra_plugins.{plugin}"):
        raise UserError(
            f"hydra/launcher={launcher}: {plugin} is not installed; submitit_slurm and submitit_local are in the "
            "extra `sweep`: pip install 'ssl-vit[sweep]'"
        )
    if launcher == "submitit_slurm" and not shutil.which("srun"):
        raise UserError("hydra/launcher=submitit_slurm: SLURM is not available (no srun on the PATH)")
    if launcher != "submitit_slurm" and any(config.trainer.devices > 1 for config in configs):
        raise UserError(f"hydra/launcher={launcher} starts single-process jobs: set trainer.devices=1")

    @hydra.main(version_base="1.3", config_path=None)
    def run(choice: DictConfig) -> None:
        try:
            pretrain(configs[choice.job])
        except UserError as error:
            sys.exit(f"ssl-vit pretrain: {error}")

    indices = ",".join(map(str, range(len(configs))))
    output = [f"hydra.sweep.dir={configs[0].run.folder / '.sweep'}", "hydra.output_subdir=null"]
    sys.argv = ["ssl-vit", "--multirun", f"+job={indices}", *output, *hydra_options]
    run()
