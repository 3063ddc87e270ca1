"""The machine and the versions that every benchmark records beside its results."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# CPU instruction sets that decide a benchmark's speed, as /proc/cpuinfo names them.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")


def environment(command: str, device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Describes, for JSON, the machine, versions and commit that a result was measured with.

    The date is UTC's. Packages are distributions; one that is not installed has version null.
    """
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": physical_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in packages},
        "git": git_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def cpu() -> dict[str, Any]:
    """The processor's name, and which instructions it has that decide speed and last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"cpu": platform.processor() or platform.machine(), "cpu_flags": []}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {"cpu": model, "cpu_flags": [flag for flag in _TELLING_FLAGS if flag in flags]}


def physical_memory() -> int | None:
    """Bytes of memory that the machine has, or None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def installed_version(package: str) -> str | None:
    """A distribution's version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
