"""Paired, interleaved timing: both sides in one process, in turn, so that the machine's moods hit them alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any


def paired(
    sides: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each side, round by round, in ABBA order; `time.process_time` leaves out what other programs take."""
    wait = synchronize()
    for _ in range(warmup):
        for run in sides.values():
            run()
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for index in range(rounds):
        for name in order if index % 2 == 0 else reversed(order):
            started = clock()
            sides[name]()
            wait()
            seconds[name].append(clock() - started)
    return seconds


def on_gpu(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side on a GPU, round by round, in ABBA order: the median of many launches each.

    Replayed from a CUDA graph where a side takes less than 50 microseconds, as launching would be all that is timed.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    def once(run: Callable[[], Any]) -> float:
        found = do_bench(run, warmup=50, rep=200, return_mode="median")
        return (do_bench_cudagraph(run, rep=200, return_mode="median") if found < 0.05 else found) / 1e3

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for index in range(rounds):
        for name in order if index % 2 == 0 else reversed(order):
            seconds[name].append(once(sides[name]))
    return seconds


def synchronize() -> Callable[[], None]:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def ratio(seconds: dict[str, list[float]], ours: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles of ours / base, round by round."""
    ratios = [a / b for a, b in zip(seconds[ours], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    from patchattn import environment

    return {**environment.machine(), **_clocks()}


def _clocks() -> dict[str, str]:
    """Clock, power and temperature of the GPU now; read, never set."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return {"gpu now": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {}
