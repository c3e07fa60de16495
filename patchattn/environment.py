"""Versions, devices and settings, for bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "peft", "lm_eval", "triton", "kernels", "safetensors",
            "huggingface_hub", "tokenizers", "numpy", "rich", "typer")  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PATCHATTN_BACKEND",
             "PATCHATTN_GOLDEN", "PATCHATTN_REAL_MODEL", "TRITON_INTERPRET")  # fmt: skip


def environment() -> dict[str, Any]:
    """What is installed and on which machine, JSON-ready."""
    import torch

    from .method import methods

    return {
        "patchattn": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "missing": [name for name in PACKAGES if _version(name) is None],
        "devices": _devices(torch),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "methods": list(methods()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def default_device() -> str:
    """The accelerator, if there is one."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def machine() -> dict[str, str]:
    """What numbers are measured on, and with which versions."""
    import torch

    commit = _commit()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed",
        "transformers": _version("transformers") or "not installed",
        "patchattn": f"{__version__} ({commit or 'no commit'})",
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this file lies in; None where it is installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> int:
    """The most memory that this process, or its accelerator, has held so far, in bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # `getrusage` would also count the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
