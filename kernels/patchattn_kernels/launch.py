"""What the launchers of all primitives ask of the device, and how they divide work by it. Knows torch alone."""

from __future__ import annotations

import functools

import torch

MOST_SPLITS = 64  # pieces that the keys of one query are cut into


def precision(bits: int) -> str:
    """How `tl.dot` multiplies: float32 in three products of tf32, 16 bits as they are."""
    return "tf32x3" if bits == 32 else "ieee"


def splits(keys: int, programs: int, tile: int, device: torch.device) -> int:
    """Pieces to cut `keys` into: two programs for every processor, and at least two tiles in each."""
    wanted = -(-2 * processors(device) // max(1, programs))
    return max(1, min(wanted, -(-keys // (2 * tile)), MOST_SPLITS))


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability; where there is no GPU, that of the tables' first choice."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few where there is no GPU, so that keys are cut there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
