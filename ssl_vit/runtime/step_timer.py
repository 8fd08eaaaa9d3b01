"""Timer of the phases of a training step; it does not make a GPU wait."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

# The phases of a step in their order; only SiT has a corruption and only DINO a teacher.
PHASES = (
    "data",  # waiting for the batch, and bringing it to the device
    "augmentation",
    "corruption",
    "teacher",
    "student",
    "loss",
    "backward",
    "clip",
    "optimizer",
    "ema",
    "other",  # callbacks, logging, checkpoints, evaluation, Lightning
)


class StepTimer:
    """Timer of the phases of a training step: each mark ends a phase.

    On a GPU a mark is an event in the stream, and only `totals` waits for the device. Times are then the device's own,
    however far ahead the CPU is: "data" is how long the device was idle until a batch arrived.
    """

    def __init__(self) -> None:
        self._on_gpu = False
        self._events: list[tuple[str, torch.cuda.Event]] = []  # since `totals`, and the last one before
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self, device: torch.device) -> None:
        """Restart the timer, for computation on the device."""
        self._on_gpu = device.type == "cuda"
        self._seconds = {}
        self._events = [("", _event())] if self._on_gpu else []
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Add the time since the last mark to `phase`."""
        if self._on_gpu:
            self._events.append((phase, _event()))
            return
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def totals(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call or the start, and reset them."""
        if self._on_gpu:
            self._events[-1][1].synchronize()
            for (_, before), (phase, after) in pairwise(self._events):
                self._seconds[phase] = self._seconds.get(phase, 0.0) + before.elapsed_time(after) / 1000
            del self._events[:-1]
        seconds, self._seconds = self._seconds, {}
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
