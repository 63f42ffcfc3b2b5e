"""What is particular to one machine, and so no part of a recipe."""

import ctypes
import os
import platform
from dataclasses import dataclass, field
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes. `Machine.here()` fills in what is fastest and safe."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32
    threads: int = 1
    compiled: bool = False

    @classmethod
    def here(
        cls,
        *,
        threads: int = 1,
        device: str = "auto",
        precision: torch.dtype | None = None,
        compiled: bool = False,
    ) -> "Machine":
        """The GPU where there is one; if not said, bf16 autocast only where the hardware multiplies it natively."""
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        return cls(chosen, precision or _native_precision(chosen.type), threads, compiled)

    @property
    def precision_name(self) -> str:
        """As a job states it: float32 or bfloat16."""
        return str(self.precision).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def describe(self) -> dict[str, str | int]:
        """What a stored result should say of the machine; no name or path of it."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else _processor(),
            "precision": self.precision_name,
            "threads": self.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.system(),
        }


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def core_each(processes: int) -> list[int | None]:
    """A core for each of so many processes where they fill the machine; else None for each.

    Where they do not, two commands that give cores away would share one and leave another idle.
    """
    found: list[int | None] = [*cores()]
    return found if len(found) == processes else [None] * processes


def settle(core: int | None = None) -> None:
    """Make this process, which does nothing but train, as fast as its place allows: on its core, with its memory kept.

    Memory that glibc gives back to the system with each step comes anew, page by page, with the next: 6 % of the time
    of a small model on a CPU.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Before glibc 2.35 the first may be 32 MiB at most; where it is refused, the second alone would do harm.
        if libc.mallopt(_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _native_precision(device: str) -> torch.dtype:
    """On a CPU without AMX or AVX512-BF16, bf16 is emulated and far slower than float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
