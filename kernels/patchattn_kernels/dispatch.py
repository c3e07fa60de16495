"""Which implementation of a primitive runs: the torch reference, or the Triton kernel.

A primitive's public function asks `use_triton("name", q, k, v)` once, after it has checked its arguments. By
default ("auto") Triton runs on CUDA tensors where it is installed, and torch everywhere else. `backend` and the
environment variable PATCHATTN_BACKEND choose; "triton" is never replaced by torch in silence. A primitive that
flash-linear-attention has too asks `use_fla` before: on CUDA tensors it is the default where it is installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

VARIABLE = "PATCHATTN_BACKEND"
BACKENDS = ("auto", "torch", "triton", "fla")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
FLA_INSTALLED = importlib.util.find_spec("fla") is not None

_backend = os.environ.get(VARIABLE, "auto")
_ran: dict[str, str] | None = None  # where `recording` wants to know what runs


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every primitive inside the block: "auto", "torch", "triton" or "fla".

    "fla", flash-linear-attention, is for the primitives that have it; the others run as by default. The choice holds
    for the whole process, as a compiled graph is guarded by it. "triton" and "fla" raise where they cannot run. On CPU
    tensors "triton" needs TRITON_INTERPRET=1, set before triton is first imported: slow, for tests.
    """
    global _backend
    _check(name, "backend")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def use_triton(primitive: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether the Triton kernel of `primitive` is to run on these tensors; raises if it must and cannot.

    Args:
        unsupported: what this call asks of the primitive that its kernel does not have, if anything ("dropout").
    """
    _check(_backend, VARIABLE)
    why_torch = _reason([tensor for tensor in tensors if tensor is not None], unsupported)
    if _backend == "triton" and why_torch is not None:
        raise RuntimeError(f"{primitive}: the backend is 'triton', but {why_torch}; "
                           "choose patchattn_kernels.backend('auto') or 'torch'")  # fmt: skip
    if _ran is not None and not torch.compiler.is_compiling():
        _ran[primitive] = "triton" if why_torch is None else f"torch ({why_torch})"
    return why_torch is None


def use_fla(primitive: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether flash-linear-attention is to compute `primitive`; raises if it must and cannot. Else ask `use_triton`.

    Args:
        unsupported: what this call asks of the primitive that flash-linear-attention does not have, if anything.
    """
    _check(_backend, VARIABLE)
    if _backend in ("torch", "triton"):
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    why_not = None
    if given[0].device.type != "cuda":
        why_not = f"its tensors are on {given[0].device.type}"
    elif not FLA_INSTALLED:
        why_not = "flash-linear-attention is not installed"
    elif unsupported is not None:
        why_not = f"flash-linear-attention has no {unsupported}"
    if _backend == "fla" and why_not is not None:
        raise RuntimeError(f"{primitive}: the backend is 'fla', but {why_not}; "
                           "choose patchattn_kernels.backend('auto') or 'torch'")  # fmt: skip
    if why_not is None and _ran is not None and not torch.compiler.is_compiling():
        _ran[primitive] = "fla"
    return why_not is None


@contextmanager
def recording(ran: dict[str, str]) -> Iterator[None]:
    """Note in `ran`, by primitive, what the block last ran: "triton", or "torch" with the reason why."""
    global _ran
    before, _ran = _ran, ran
    try:
        yield
    finally:
        _ran = before


def _reason(tensors: list[Tensor], unsupported: str | None) -> str | None:
    """Why torch is to run, or None where it is Triton's turn."""
    if _backend == "torch":
        return "asked for"
    device = tensors[0].device
    if _backend in ("auto", "fla") and device.type != "cuda":
        return f"on {device.type}"  # the interpreter has to be asked for
    if unsupported is not None:
        return f"its kernel has no {unsupported}"
    if not INSTALLED:
        return "triton is not installed"
    for tensor in tensors:
        if tensor.device != device:
            return f"its tensors are on {device} and {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"its kernel has no {str(tensor.dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"its tensors are on {device}, where the kernel runs only under TRITON_INTERPRET=1"
    if device.type == "cuda" and _capability(device.index or 0) < (8, 0):
        return "its kernel needs a GPU of compute capability 8.0"
    return None


# What a compiled graph may take for granted is not traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the compiler."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}; it must be one of {', '.join(BACKENDS)}")
