"""Time and memory of a model as it is and with patches on it: `patchattn bench`.

All sides share one copy of the weights. They are checked first, then timed in turn, in ABBA order, so that the
machine's moods hit them alike; ratios are taken round by round.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attach import unpatch
from ..cache import cache_bytes
from ..environment import machine
from ..lab.text import evaluating
from ..living import methods_on, patch_parameters, plan_of
from ..record import patch_of
from ..tables import Report, add_row, note, table
from .patches import read_patch

if TYPE_CHECKING:
    from rich.console import RenderableType

BASE = "base"
CHECKED = 6  # tokens decoded one by one for the check
# How far logits of one pass and of prompt and single tokens may be apart, as a share of the largest.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Timing:
    """Seconds of one side's prompts or tokens, and how they compare with the base model's, round by round."""

    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Speed:
    """One side at one batch and context length.

    Attributes:
        prefill: seconds of the prompt.
        decode: seconds of one token for each row after it.
        cache_bytes: what the cache holds at the end.
        peak_bytes: the most memory that prompt and tokens took beside the weights; None where it cannot be told.
        seconds: of prompts, and of all tokens, of each round.
    """

    side: str
    batch: int
    length: int
    prefill: Timing
    decode: Timing
    cache_bytes: int
    peak_bytes: int | None
    seconds: dict[str, list[float]]

    @property
    def tokens_per_second(self) -> float:
        """Of the prompt, in all rows."""
        return self.batch * self.length / self.prefill.median


@dataclass(frozen=True)
class Check:
    """Whether a side is right: a prompt and single tokens give the logits of one pass, an exact patch the base's.

    `difference` is a share of the largest logit. A method that chooses by comparing scores may differ at some tokens:
    of it the median over tokens counts, of others the largest.
    """

    side: str
    difference: float
    tolerance: float
    from_base: float
    passed: bool


@dataclass(frozen=True)
class SpeedReport(Report):
    """What `bench` found, with all that is needed to run it again."""

    model: str
    dtype: str
    settings: dict[str, Any]
    sides: list[dict[str, Any]]
    checks: list[Check]
    rows: list[Speed]
    machine: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def parts(self) -> list[RenderableType]:
        checks = table("side", "one pass and single tokens differ by", "at most", "differs from base by", "right")
        for check in self.checks:
            shown = f"{check.difference:.1e}", f"{check.tolerance:.0e}", f"{check.from_base:.1e}"
            add_row(checks, check.side, *shown, check.passed)
        prompts = table("batch", "tokens", "side", "prompt ms", "× base", "tokens/s")
        steps = table("batch", "tokens", "side", "one more token ms", "× base", "cache KB", "peak MB")
        for row in self.rows:
            where = row.batch, row.length, row.side
            peak = None if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
            add_row(prompts, *where, _spread(row.prefill), _ratio(row, row.prefill), round(row.tokens_per_second))
            add_row(steps, *where, _spread(row.decode), _ratio(row, row.decode), round(row.cache_bytes / 1e3), peak)
        on = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        timed: list[RenderableType] = [prompts, steps] if self.rows else [note("not timed: not all sides are right")]
        return [checks, *timed, f"{self.model}, {self.dtype}; medians and quartiles; on {on}"]


def _spread(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f} ({timing.low * 1e3:.2f}–{timing.high * 1e3:.2f})"


def _ratio(row: Speed, timing: Timing) -> str | None:
    return None if row.side == BASE else f"{timing.ratio:.2f} ({timing.ratio_low:.2f}–{timing.ratio_high:.2f})"


def bench(
    model: Any,
    patches: Sequence[Any],
    *,
    lengths: Sequence[int] = (512, 2048),
    batches: Sequence[int] = (1,),
    tokens: int = 16,
    rounds: int = 7,
    warmup: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> SpeedReport:
    """Time prompts and single tokens of a decoder as it is and with each of some patches.

    Args:
        model: an open model without a patch. It is left as it was.
        patches: as after `patch=`, or as for `patchattn.patch`.
        lengths: tokens of the prompts.
        batches: rows of the prompts.
        tokens: decoded one by one after each prompt.
        rounds: how often each side is timed.
        warmup: how often it runs before.
        say: called with a line for people before each step.
    """
    for name, least, value in (("rounds", 2, rounds), ("tokens", 1, tokens), ("warmup", 0, warmup)):
        if value < least:
            raise ValueError(f"bench: {name} is {value}; it must be at least {least}")
    for name, values in (("lengths", lengths), ("batches", batches)):
        if not values or min(values) < 1:
            raise ValueError(f"bench: {name} is {list(values)}; it must name one or more numbers of at least 1")
    if patch_of(model) is not None:
        raise ValueError("bench: this model is patched already; give it as it is, and its patch among the patches")
    wanted = [read_patch(given) for given in patches]
    sides: dict[str, Any] = {BASE: model}
    for argument in wanted:
        if argument is None or argument.text in sides:
            raise ValueError(f"bench: patches is {list(patches)!r}; it must name each patch once")
        sides[argument.text] = _sharing(model)
        argument.put_on(sides[argument.text])
    try:
        with evaluating(model), torch.no_grad():
            say("checking")
            checks = [_check(name, side, model, max(8, min(lengths) // 2)) for name, side in sides.items()]
            rows = []
            for batch in batches if all(check.passed for check in checks) else ():
                for length in lengths:
                    say(f"timing batches of {batch} × {length} tokens")
                    rows += _timed(sides, _ids(model, batch, length), tokens, rounds, warmup)
        described = [
            {"side": name, "plan": plan_of(side) if patch_of(side) else [],
             "parameters": sum(value.numel() for value in patch_parameters(side).values()) if patch_of(side) else 0}
            for name, side in sides.items()
        ]  # fmt: skip
    finally:
        for name, side in sides.items():
            if name != BASE and patch_of(side) is not None:
                unpatch(side)
    settings = {
        "lengths": list(lengths),
        "batches": list(batches),
        "tokens": tokens,
        "rounds": rounds,
        "warmup": warmup,
    }
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    dtype = str(model.dtype).removeprefix("torch.")
    return SpeedReport(Path(name).name, dtype, settings, described, checks, rows, machine())


def _sharing(model: nn.Module) -> nn.Module:
    """A model of its own with the weights of another."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _ids(model: Any, batch: int, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _step(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits of the last token `[B, V]`, and the cache."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def _check(name: str, side: Any, base: Any, length: int) -> Check:
    ids = _ids(base, 2, length + CHECKED)
    whole = side(input_ids=ids, use_cache=False).logits[:, length - 1 : -1].float()
    plain = base(input_ids=ids, use_cache=False).logits[:, length - 1 : -1].float()
    logits, cache = _step(side, ids[:, :length], None)
    steps = [logits]
    for place in range(length, length + CHECKED - 1):
        logits, cache = _step(side, ids[:, place : place + 1], cache)
        steps.append(logits)
    scale = plain.abs().max()
    apart = (torch.stack(steps, dim=1).float() - whole).abs().amax(dim=-1) / scale  # [B, CHECKED]
    methods = methods_on(side) if patch_of(side) is not None else []
    chooses = any(method.chooses for method in methods)
    difference = (apart.median() if chooses else apart.max()).item()
    from_base = ((whole - plain).abs().max() / scale).item()
    tolerance = TOLERANCES.get(base.dtype, 1e-4)
    right = difference <= tolerance and bool(whole.isfinite().all())
    if all(method.exact for method in methods):
        right = right and from_base <= tolerance
    return Check(name, difference, tolerance, from_base, right)


def _timed(sides: dict[str, Any], ids: Tensor, tokens: int, rounds: int, warmup: int) -> list[Speed]:
    wait: Callable[[], Any] = torch.cuda.synchronize if ids.is_cuda else lambda: None
    following = ids[:, :1].expand(-1, tokens)
    held: dict[str, int] = {}

    def run(name: str) -> tuple[float, float]:
        side = sides[name]
        wait()
        started = time.perf_counter()
        _, cache = _step(side, ids, None)
        wait()
        prompted = time.perf_counter()
        for place in range(tokens):
            _, cache = _step(side, following[:, place : place + 1], cache)
        wait()
        ended = time.perf_counter()
        held[name] = cache_bytes(cache)
        return prompted - started, ended - prompted

    for _ in range(warmup):
        for name in sides:
            run(name)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in sides if index % 2 == 0 else reversed(sides):
            found[name].append(run(name))
    peaks = {name: _peak(lambda name=name: run(name), ids.device) for name in sides}  # type: ignore[misc]
    base = list(zip(*found[BASE], strict=True))
    rows = []
    for name, pairs in found.items():
        prompts, steps = zip(*pairs, strict=True)
        rows.append(Speed(
            side=name, batch=ids.shape[0], length=ids.shape[1], prefill=_timing(prompts, base[0]),
            decode=_timing(steps, base[1], tokens), cache_bytes=held[name], peak_bytes=peaks[name],
            seconds={"prompt": list(prompts), "tokens": list(steps)},
        ))  # fmt: skip
    return rows


def _timing(seconds: Sequence[float], base: Sequence[float], parts: int = 1) -> Timing:
    low, middle, high = statistics.quantiles([value / parts for value in seconds], n=4)
    ratios = statistics.quantiles([ours / theirs for ours, theirs in zip(seconds, base, strict=True)], n=4)
    return Timing(middle, low, high, ratios[1], ratios[0], ratios[2])


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a run takes beside what is taken already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _forget_peak():
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _forget_peak() -> bool:
    """Let Linux count this process's peak from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(entry: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(next(line for line in text.splitlines() if line.startswith(f"{entry}:")).split()[1]) * 2**10
