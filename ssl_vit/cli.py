"""`ssl-vit <command> [key=value ...]`: the table of commands, and the exit code of every error.

A command is `main` in `ssl_vit/commands/<name>.py`, its keys in `conf/<name>.yaml`, a config class, and a row here.
Nothing heavy is imported before a command is chosen.
"""

from __future__ import annotations

import difflib
import importlib
import io
import math
import os
import sys
import warnings
from typing import TYPE_CHECKING, NamedTuple

from ssl_vit import __version__
from ssl_vit.runtime.atomic_io import DISK_FULL_ERRNOS, READ_ONLY_ERRNOS
from ssl_vit.runtime.errors import AllRanksError, RankFinished, UserError
from ssl_vit.runtime.launch import is_rank_zero

if TYPE_CHECKING:
    from ssl_vit.config.types import StrictConfig


class Command(NamedTuple):
    """A row of the command table."""

    config: str  # module:class, so that pydantic is imported only for the command that runs
    summary: str
    example: str

    def config_class(self) -> type[StrictConfig]:
        """Import the class that validates the command's configuration."""
        module, _, name = self.config.partition(":")
        found: type[StrictConfig] = getattr(importlib.import_module(f"ssl_vit.{module}"), name)
        return found


COMMANDS = {
    "demo": Command(
        "config.pretrain:DemoConfig",
        "pretrain, evaluate and report in a few minutes, on generated images",
        "ssl-vit demo",
    ),
    "pretrain": Command(
        "config.pretrain:PretrainConfig",
        "pretrain a ViT on a folder of unlabeled images",
        "ssl-vit pretrain data.root=photos method=dino backbone=vit_small run.name=photos",
    ),
    "knn": Command(
        "config.evaluate:KNNConfig",
        "kNN accuracy of the frozen features",
        "ssl-vit knn checkpoint=runs/photos data.root=labeled",
    ),
    "linear": Command(
        "config.evaluate:LinearConfig",
        "linear probe accuracy of the frozen features",
        "ssl-vit linear checkpoint=runs/photos data.root=labeled",
    ),
    "compare": Command(
        "config.evaluate:CompareConfig",
        "results of several models in one table, with paired tests",
        "ssl-vit compare runs/dino runs/sit",
    ),
    "neighbors": Command(
        "config.evaluate:NeighborsConfig",
        "the nearest neighbors of images, as an image grid",
        "ssl-vit neighbors checkpoint=runs/photos data.root=photos images=photo.jpg",
    ),
    "features": Command(
        "config.evaluate:FeaturesConfig",
        "extract features once, for all evaluations and for other tools",
        "ssl-vit features checkpoint=runs/photos data.root=photos to=npz out=features.npz",
    ),
    "fewshot": Command(
        "config.evaluate:FewshotConfig",
        "accuracy with few labels: 1 to 25 images per class, 1 to 10 %",
        "ssl-vit fewshot checkpoint=runs/photos data.root=labeled",
    ),
    "transfer": Command(
        "config.evaluate:TransferConfig",
        "linear probes of several models on several labeled datasets, as a table",
        "ssl-vit transfer 'checkpoints=[runs/a,runs/b]' 'data.roots=[labeled/a,labeled/b]'",
    ),
    "finetune": Command(
        "config.evaluate:FinetuneConfig",
        "train the whole model with labels, and test it once",
        "ssl-vit finetune checkpoint=runs/photos data.root=labeled run.name=photos-ft",
    ),
    "attention": Command(
        "config.visualize:AttentionConfig",
        "attention maps of the [CLS] token, masks and overlays",
        "ssl-vit attention checkpoint=runs/photos images=photos out=maps",
    ),
    "video": Command(
        "config.visualize:VideoConfig",
        "attention of the [CLS] token over the frames of a video, as a video",
        "ssl-vit video checkpoint=runs/photos video=clip.mp4 out=overlay.mp4",
    ),
    "propagate": Command(
        "config.visualize:PropagateConfig",
        "propagate the masks of a video's first frame to the others; scores on DAVIS",
        "ssl-vit propagate checkpoint=runs/photos davis=DAVIS split=val",
    ),
    "inspect": Command(
        "config.visualize:InspectConfig",
        "analyze a model's attention, weights and features: figures and arrays",
        "ssl-vit inspect checkpoint=runs/photos images=photos out=inspect",
    ),
    "report": Command(
        "config.visualize:ReportConfig",
        "a run as one HTML page: scores, curves, attention, neighbors, a feature map",
        "ssl-vit report run=runs/photos",
    ),
    "export": Command(
        "config.pretrain:ExportConfig",
        "export the backbone as weights that timm loads",
        "ssl-vit export checkpoint=runs/photos out=backbone.safetensors",
    ),
    "scan": Command(
        "config.pretrain:ScanConfig",
        "summarize an image folder, unreadable files included",
        "ssl-vit scan data.root=photos",
    ),
    "bench": Command(
        "config.pretrain:BenchConfig",
        "training speed on this machine, by part of the step; compares two configurations",
        "ssl-vit bench data.root=photos 'compare_to=[trainer.precision=32-true]'",
    ),
    "shard": Command(
        "config.pretrain:ShardConfig",
        "write an image folder as tar shards (WebDataset layout)",
        "ssl-vit shard data.root=photos out=shards",
    ),
}


PARALLEL = ("pretrain", "finetune", "knn", "linear", "fewshot", "features")  # commands for torchrun and Slurm
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in the messages of torch


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no name of a file, of any bytes, can stop a command
    name, *overrides = (sys.argv[1:] if argv is None else argv) or ["help"]
    try:
        _run(name, overrides)
    except RankFinished:
        return 0
    except UserError as error:
        if is_rank_zero() or not isinstance(error, AllRanksError):
            print(f"ssl-vit {name}: {format_message(str(error))}", file=sys.stderr)
        return 2
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"ssl-vit {name}: {error.filename}: {error.strerror}. Choose another path.", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not _names_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory is left"
        advice = "Use smaller images (data.image_size, max_side, method.views), smaller batches, or a larger machine"
        print(f"ssl-vit {name}: the machine has too little memory: {format_message(reason)}. {advice}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, `head` for instance, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS | READ_ONLY_ERRNOS:
            raise
        path, full = error.filename or "a file", error.errno in DISK_FULL_ERRNOS
        advice = "Free some space and try again" if full else "Choose a path on another disk"
        print(f"ssl-vit {name}: {path}: {error.strerror}. {advice}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None  # threads that are interrupted would print their tracebacks
        print(f"\nssl-vit {name}: stopped", file=sys.stderr)
        return 130
    return 0


def format_message(text: str) -> str:
    """Return the lines of a message without control characters, which names of files may hold."""
    from ssl_vit.runtime.text import printable

    return "\n".join(map(printable, text.split("\n")))


def _run(name: str, overrides: list[str]) -> None:
    """Print what is asked for, or load the configuration and call the command's `main`."""
    if name in ("--help", "-h", "help"):
        print(overview(), flush=True)
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(COMMANDS)}."
        raise UserError(f"there is no such command. {hint}")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(overrides):
        from ssl_vit.commands.help import help_text

        print(help_text(name, command.summary, command.example, overrides), flush=True)
        return
    if "--cfg" in overrides:
        from ssl_vit.commands.load_config import compose_config, to_yaml

        overrides = [override for override in overrides if override != "--cfg"]
        print(to_yaml(compose_config(name, overrides, command.config_class())), flush=True)
        return
    # Pillow warns of files that are read all the same, or are skipped and counted.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if name == "pretrain" and "--multirun" in overrides:
        importlib.import_module("ssl_vit.commands.sweep").main(overrides)
        return
    from ssl_vit.commands.load_config import load_config

    # Before the command is imported: a mistake is then reported seconds earlier, without torch.
    config = load_config(name, overrides, command.config_class())
    _check_processes(name)
    module = importlib.import_module(f"ssl_vit.commands.{name}")
    module.main(overrides if name == "bench" else config)  # bench composes a second configuration


def _check_processes(name: str) -> None:
    """Check that a launcher has not started several processes of a command that does not share its work.

    Raises:
        AllRanksError: It has: each of them would do all of the work and write the same files.
    """
    from ssl_vit.runtime.launch import launched_processes

    if name not in (*PARALLEL, "transfer") and math.prod(launched_processes() or (1,)) > 1:
        raise AllRanksError(f"this command runs in one process; a launcher is for {', '.join(PARALLEL)}")


def _names_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def overview() -> str:
    """Return the list of commands with an example each."""
    lines = [f"ssl-vit {__version__}: self-supervised vision transformers from your own images", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10} {command.summary}", f"  {'':<10} $ {command.example}", ""]
    lines.append("ssl-vit <command> --help explains every key of a command.")
    return "\n".join(lines)
