"""The device: its choice, what it computes well, its peak speed and its memory use."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ssl_vit.runtime.errors import UserError
from ssl_vit.runtime.launch import trim_malloc

if sys.platform != "win32":
    import resource


def best_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """Return the GPU if there is one, else the CPU.

    Raises:
        UserError: `accelerator` is gpu and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch finds no GPU on this machine; use trainer.accelerator=cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def set_local_device() -> None:
    """Make the GPU of this process the current one, where torchrun started several processes on this machine."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 if the device computes it natively, else None for float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    native = torch.cpu.get_capabilities()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") or native.get("sve_bf16") else None


def prefer_fused_attention(device: torch.device) -> bool:
    """Return whether fused attention is faster: on GPUs.

    On CPUs with bf16 autocast, matrix products train small ViTs about twice as fast, and extract their features about
    1.2 times as fast (tools/bench_feature_extraction.py).
    """
    return device.type == "cuda"


def prefer_compile(device: torch.device) -> bool:
    """Return whether torch.compile is faster and available: on GPUs, with a C compiler and Python's headers."""
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return device.type == "cuda" and compiler and headers.is_file()


_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@cache
def matmul_peak(device_type: str, precision: str) -> float:
    """Return `measure_matmul`, measured once per process with its threads."""
    return measure_matmul(device_type, precision, seconds=0.3)


def measure_matmul(device_type: str, precision: str, *, seconds: float) -> float:
    """Measure the peak FLOP/s of a product of two square matrices, on cpu or cuda, in Lightning's `precision`.

    The matrices have 2048 rows on a CPU and 8192 on a GPU, or fewer if one product would take longer than `seconds`.
    """
    dtype, size = _DTYPES[precision], 8192 if device_type == "cuda" else 2048
    while True:
        a, b = torch.rand(2, size, size, device=device_type).to(dtype).unbind()
        probe = a[: size // 16], b[:, : size // 16]
        torch.mm(*probe)  # the first call includes setup
        if size <= 256 or _time_matmul(*probe) * 16**2 < seconds:
            break
        size //= 2
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _time_matmul(a, b))
    return 2 * size**3 / best


def _time_matmul(a: Tensor, b: Tensor) -> float:
    synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    synchronize(a.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory in GB (10^9 bytes): host_gb of this process, device_gb of its GPU if it has one.

    Data loading processes are not counted. On Windows host_gb is missing.
    """
    status = Path("/proc/self/status")
    memory = {}
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.M)):
        memory["host_gb"] = int(found[1]) * 1024 / 1e9
    elif sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        memory["host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        memory["device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return memory


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory`; for the host, on Linux only."""
    trim_malloc()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Return the values on the device, copied from pinned memory so that the copy does not wait for queued work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
