"""What the machine at hand is good at, how fast it is at best, and how much memory has been in use."""

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
from ssl_vit.runtime.launch import give_memory_back

if sys.platform != "win32":
    import resource


def best_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises:
        UserError: A GPU was asked for and there is none.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def set_local_device() -> None:
    """Let "cuda" mean the GPU of this process, where torchrun started several on this machine."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes it natively, else None: stay in float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    native = torch.cpu.get_capabilities()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") or native.get("sve_bf16") else None


def prefer_fused_attention(device: torch.device) -> bool:
    """On GPUs; under bf16 autocast on CPUs the plain matrix form trains small ViTs about twice as fast.

    It takes their features about 1.2 times as fast, too (tools/bench_feature_extraction.py).
    """
    return device.type == "cuda"


def prefer_compile(device: torch.device) -> bool:
    """On GPUs, where there is what torch.compile needs: a C compiler and Python's headers. On CPUs it gains nothing."""
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return device.type == "cuda" and compiler and headers.is_file()


_SMALLEST_PRODUCT = 256
_COMPUTES_IN = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@cache
def matmul_peak(device_type: str, precision: str) -> float:
    """FLOP/s of a square matrix product, 2048 wide on a CPU and 8192 on a GPU: the best of a fraction of a second.

    It is measured once per process, with the threads that the process has.

    Args:
        device_type: cpu or cuda.
        precision: As Lightning calls it: 32-true, bf16-mixed or 16-mixed.
    """
    return measure_matmul(device_type, precision, seconds=0.3)


def measure_matmul(device_type: str, precision: str, *, seconds: float) -> float:
    """FLOP/s as `matmul_peak`, measured now and for so long; of smaller products where those would take longer."""
    dtype, side = _COMPUTES_IN[precision], 8192 if device_type == "cuda" else 2048
    while True:
        a, b = torch.rand(2, side, side, device=device_type).to(dtype).unbind()
        probe = a[: side // 16], b[:, : side // 16]
        torch.mm(*probe)  # what is set up at the first call
        if side <= _SMALLEST_PRODUCT or _seconds_of(*probe) * 16**2 < seconds:
            break
        side //= 2
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _seconds_of(a, b))
    return 2 * side**3 / best


def _seconds_of(a: torch.Tensor, b: torch.Tensor) -> float:
    synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    synchronize(a.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Until a GPU has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that has been in use, in GB (10^9 bytes): host_gb of this process, device_gb of its GPU if any.

    Loading processes are not counted. On Windows host_gb is missing.
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
    """Let `peak_memory` count from now on; on the host only Linux can."""
    give_memory_back()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is in float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; from ordinary memory a GPU would copy only behind all it was told to do before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
