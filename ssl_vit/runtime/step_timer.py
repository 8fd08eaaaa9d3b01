"""Where the time of a training step goes, measured without making a GPU wait."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

# The parts of a step in their order; corruption is SiT's, the teacher DINO's.
PARTS = (
    "data",  # waiting for the batch, and bringing it to the device
    "photometrics",
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
    """A stopwatch: each lap gives the time since the one before to a part of the step.

    On a GPU a lap is an event among the work under way, and only `totals` waits for the device. What it finds is the
    device's own time, however far ahead the CPU is: waiting for data, say, is the time for which the device had nothing
    to do until a batch came.
    """

    def __init__(self) -> None:
        self._on_gpu = False
        self._events: list[tuple[str, torch.cuda.Event]] = []  # since `totals`, and the last one before
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self, device: torch.device) -> None:
        """Begin anew, on a device that everything is computed on."""
        self._on_gpu = device.type == "cuda"
        self._seconds = {}
        self._events = [("", _event())] if self._on_gpu else []
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Give the time since the last lap to `part`."""
        if self._on_gpu:
            self._events.append((part, _event()))
            return
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def totals(self) -> dict[str, float]:
        """Seconds per part, of the laps since the last call or the start."""
        if self._on_gpu:
            self._events[-1][1].synchronize()
            for (_, before), (part, after) in pairwise(self._events):
                self._seconds[part] = self._seconds.get(part, 0.0) + before.elapsed_time(after) / 1000
            del self._events[:-1]
        seconds, self._seconds = self._seconds, {}
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
