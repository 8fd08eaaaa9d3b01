"""What can go wrong in the middle of training, each as one message, whatever the number of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistBackendError

from ssl_vit.runtime.distributed import rank, world_size
from ssl_vit.runtime.errors import AllRanksError, UserError
from ssl_vit.runtime.launch import is_rank_zero
from ssl_vit.training.callbacks.run_checkpoint import RunCheckpoint
from ssl_vit.training.callbacks.skipped_steps import SkippedSteps


@contextmanager
def translate_training_errors(keeper: RunCheckpoint) -> Iterator[None]:
    """Turn what training may raise into a UserError that says where the run stands.

    Of several processes the one that failed says why. The others notice that it is gone; the first says where the run
    stands.
    """
    try:
        yield
    except AllRanksError:
        raise
    except UserError as error:
        raise _of_this_process(str(error)) from None
    except OSError as error:
        place = error.filename or keeper.folder.parent
        raise _of_this_process(f"{place}: {error.strerror or error}. {keeper.way_on}") from None
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        if world_size() > 1 and _peer_is_gone(error):
            if is_rank_zero():
                reason = str(error).partition("\n")[0].partition(". This is typically")[0]
                print(f"another process has ended, and with it the run ({reason}). {keeper.way_on}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # torch's own farewell would wait for the process that is gone, or abort
        if not _loading_process_died(error):
            raise
        raise _of_this_process(
            "a loading process was killed, most often because memory ran out: lower data.num_workers or data.batch_size. "
            f"{keeper.way_on}"
        ) from error


def raise_if_diverged(keeper: RunCheckpoint, steps: SkippedSteps, step: int) -> None:
    """Say so if the run stopped because its numbers are no longer finite.

    Raises:
        AllRanksError: It did.
    """
    if not (keeper.diverged or steps.exhausted):
        return
    reason = (
        f"{steps.in_a_row} steps in a row had a loss or gradient that is not finite and were left out; "
        f"{steps.journal.path} names their images"
        if steps.exhausted
        else "a weight is no longer finite"
    )
    raise AllRanksError(
        f"diverged at step {step:,}: {reason}. {keeper.way_on} Or start anew with a lower method.optimizer.lr, a "
        "longer method.optimizer.warmup, or trainer.precision=32-true."
    )


def _of_this_process(message: str) -> UserError:
    return UserError(f"process {rank()}: {message}" if world_size() > 1 else message)


def _peer_is_gone(error: Exception) -> bool:
    """Whether a collective operation failed because another process has ended: gloo and NCCL say it their own way."""
    return isinstance(error, RuntimeError) and (isinstance(error, DistBackendError) or "gloo" in str(error))


def _loading_process_died(error: BaseException | None) -> bool:
    """Whether torch's handler of SIGCHLD is at the bottom of it.

    It raises wherever the process happens to be, also inside code that answers with an error of its own.
    """
    while error and "DataLoader worker" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None
