"""Failures during training, each translated into one message, whatever the number of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import DistBackendError

from ssl_vit.runtime.distributed import rank, world_size
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps


@contextmanager
def translate_training_errors(checkpoints: RunCheckpoint) -> Iterator[None]:
    """Turn exceptions of training into a UserError that also reports the latest checkpoint.

    Of several processes, the failed one reports the reason, and the first one the checkpoint.
    """
    try:
        yield
    except AllRanksError:
        raise
    except UserError as error:
        raise _with_rank(str(error)) from None
    except OSError as error:
        path = error.filename or checkpoints.folder.parent
        raise _with_rank(f"{path}: {error.strerror or error}. {checkpoints.resume_hint}") from None
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise _with_rank(
                f"the GPU has too little memory ({str(error).partition('. ')[0]}). It comes down with a larger "
                "trainer.accumulate_grad_batches, trainer.activation_checkpointing=true, a smaller "
                f"data.batch_size or smaller views. {checkpoints.resume_hint}"
            ) from None
        if not checkpoints.started and "loading state_dict" in str(error):
            raise AllRanksError(
                f"the checkpoint in {checkpoints.folder} is not of this run: its weights have other names or shapes. "
                "Put the run's own checkpoint back to resume it"
            ) from None
        if world_size() > 1 and _peer_is_gone(error):
            if is_rank_zero():
                reason = str(error).partition("\n")[0].partition(". This is typically")[0]
                print(f"another process has ended, which ends the run ({reason}). {checkpoints.resume_hint}",
                      file=sys.stderr)  # fmt: skip
            sys.stderr.flush()
            os._exit(1)  # torch's own shutdown would wait for the lost process, or abort
        if not _data_worker_died(error):
            raise
        raise _with_rank(
            "a data loading process was killed, most often because memory ran out. Lower data.num_workers or "
            f"data.batch_size. {checkpoints.resume_hint}"
        ) from error


def raise_if_diverged(checkpoints: RunCheckpoint, steps: SkippedSteps | None, step: int) -> None:
    """Report that the run stopped because of values that are not finite.

    Raises:
        AllRanksError: It did.
    """
    advice = (
        ""
        if steps is None
        # a published protocol has no such keys
        else (
            " Or start again with a lower method.optimizer.lr, a longer method.optimizer.warmup, or "
            "trainer.precision=32-true."
        )
    )
    if steps is not None and steps.exhausted:
        reason = (
            f"{steps.in_a_row} steps in a row had a loss or gradient that is not finite and were skipped; "
            f"{steps.journal.path} lists their images"
        )
    elif checkpoints.diverged:
        reason = "a weight is not finite"
    else:
        return
    raise AllRanksError(f"diverged at step {step:,}: {reason}. {checkpoints.resume_hint}{advice}")


def _with_rank(message: str) -> UserError:
    return UserError(f"process {rank()}: {message}" if world_size() > 1 else message)


def _peer_is_gone(error: Exception) -> bool:
    """Return whether a collective operation failed because another process has ended, under gloo or NCCL."""
    return isinstance(error, RuntimeError) and (isinstance(error, DistBackendError) or "gloo" in str(error))


def _data_worker_died(error: BaseException | None) -> bool:
    """Return whether torch's SIGCHLD handler is the root cause, or the closed connection to a worker.

    The handler raises wherever the process happens to be, also inside code that answers with an error of its own. A
    worker that dies while a batch is handed over ends in an EOFError first.
    """
    while error and "DataLoader worker" not in str(error) and not isinstance(error, EOFError):
        error = error.__cause__ or error.__context__
    return error is not None
