"""What can go wrong in the middle of training, each as one message, whatever the number of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistBackendError

from ssl_vit.distributed import rank, world_size
from ssl_vit.errors import SharedError, UserError
from ssl_vit.processes import first_process
from ssl_vit.training.keeper import Keeper
from ssl_vit.training.skipping import SkippedSteps


@contextmanager
def named_faults(keeper: Keeper) -> Iterator[None]:
    """Turn what training may raise into a UserError that says where the run stands.

    Of several processes the one that failed says why. The others notice that it is gone; the first says where the run
    stands.
    """
    try:
        yield
    except SharedError:
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
            if first_process():
                reason = str(error).partition("\n")[0].partition(". This is typically")[0]
                print(f"another process has ended, and with it the run ({reason}). {keeper.way_on}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # torch's own farewell would wait for the process that is gone, or abort
        if not _loading_process_died(error):
            raise
        raise _of_this_process(
            "a loading process was killed, most often because memory ran out: lower data.workers or data.batch_size. "
            f"{keeper.way_on}"
        ) from error


def refuse_divergence(keeper: Keeper, steps: SkippedSteps, step: int) -> None:
    """Say so if the run stopped because its numbers are no longer finite.

    Raises:
        SharedError: It did.
    """
    if not (keeper.diverged or steps.exhausted):
        return
    reason = (
        f"{steps.in_a_row} steps in a row had a loss or gradient that is not finite and were left out; "
        f"{steps.journal.path} names their pictures"
        if steps.exhausted
        else "a weight is no longer finite"
    )
    raise SharedError(
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
