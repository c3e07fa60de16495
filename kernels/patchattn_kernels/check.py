"""Check every primitive on this machine: `python -m patchattn_kernels.check`.

Each case is computed in float64 by the plainest formula there is, and by the primitive in float32 and, where
the device has it, bfloat16; the primitive may err no more than twice what torch's own attention errs in that
dtype. Lengths are odd, heads are grouped, rows are padded, and several seeds are tried. Exits 1 on a failure.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from patchattn_kernels import masked_attention, sink_window
from patchattn_kernels.sink_window import visible


@dataclass(frozen=True)
class Case:
    """One call of `sink_window`: sizes, sinks and window, padding of each row, and how many tokens came before."""

    batch: int
    heads: int
    groups: int
    length: int
    size: int
    sink: int
    recent: int
    padding: tuple[int, ...] = ()
    past: int = 0


CASES = (
    Case(1, 4, 4, 77, 16, 4, 16),
    Case(2, 6, 2, 130, 64, 3, 32, padding=(0, 41)),
    Case(2, 8, 2, 61, 32, 0, 7, padding=(5, 0)),
    Case(1, 4, 1, 45, 64, 9, 1),
    Case(3, 4, 2, 33, 48, 2, 64, padding=(0, 30, 7)),
    Case(2, 4, 2, 1, 32, 4, 12, past=40),
    Case(1, 4, 2, 19, 32, 4, 12, past=23),
    Case(1, 2, 1, 1040, 32, 5, 60),
)


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Softmax attention in float64, spelled out; a query that reads nothing gives zeros."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v


def inputs(case: Case, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q of this call, k and v of past and call together, ranks `[B, past + T]`."""
    generator = torch.Generator(device).manual_seed(seed)
    total = case.past + case.length
    q = torch.randn(case.batch, case.heads, case.length, case.size, generator=generator, device=device)
    k, v = (torch.randn(case.batch, case.groups, total, case.size, generator=generator, device=device) for _ in "kv")
    pads = torch.tensor(case.padding or (0,) * case.batch, device=device)
    rank = torch.arange(total, device=device)[None] - pads[:, None]
    return q, k, v, rank.clamp(min=-1)


def run(case: Case, q: Tensor, k: Tensor, v: Tensor, rank: Tensor) -> Tensor:
    """The primitive, with the first `past` tokens handed over as the tokens kept."""
    cut = case.past
    past = (k[:, :, :cut], v[:, :, :cut], rank[:, :cut]) if cut else None
    return sink_window(q, k[:, :, cut:], v[:, :, cut:], rank[:, cut:], sink=case.sink, recent=case.recent, past=past)


def _rows(keep: Tensor, first: int, last: int) -> Tensor:
    return keep[:, :, first:last]


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def checks(device: str, dtypes: tuple[torch.dtype, ...], seeds: int) -> Iterator[dict[str, object]]:
    """One row a case, dtype, seed and direction: our error, torch's own, and whether ours is acceptable."""
    for case, dtype, seed in itertools.product(CASES, dtypes, range(seeds)):
        q, k, v, rank = (x.to(dtype) if x.is_floating_point() else x for x in inputs(case, seed, device))
        keep = visible(rank[:, case.past :], rank, case.sink, case.recent)
        real = (rank[:, case.past :] >= 0)[:, None, :, None]
        mine, peers, wide = (tuple(x.detach().to(t).clone().requires_grad_() for x in (q, k, v))
                             for t in (dtype, dtype, torch.float64))  # fmt: skip
        wanted = exact(wide[0], wide[1], wide[2], keep) * real
        peer = functional.scaled_dot_product_attention(peers[0], peers[1], peers[2], keep, enable_gqa=True)
        outs = [run(case, mine[0], mine[1], mine[2], rank) * real, peer * real]
        upstream = torch.randn(wanted.shape, device=device, generator=torch.Generator(device).manual_seed(seed + 100))
        for out in outs:
            out.backward(upstream.to(out.dtype))
        wanted.backward(upstream.double())
        pairs: dict[str, tuple[Any, Any, Any]] = {"forward": (outs[0], outs[1], wanted)}
        pairs |= {f"d{name}": (mine[i].grad, peers[i].grad, wide[i].grad) for i, name in enumerate("qkv")}
        for name, (ours, theirs, truth) in pairs.items():
            error, allowed = relative(ours, truth), 2 * relative(theirs, truth) + 1e-6
            finite = bool(ours.isfinite().all())
            yield {"primitive": "sink_window", "case": str(case), "dtype": str(dtype), "seed": seed, "what": name,
                   "error": error, "allowed": allowed, "ok": finite and error <= allowed}  # fmt: skip
        # Blocks of queries must change nothing, and a row that reads nothing must give zeros.
        whole = masked_attention(q, k, v, keep)
        parts = masked_attention(q, k, v, functools.partial(_rows, keep))
        error = relative(parts, whole.double())
        yield {"primitive": "masked_attention", "case": str(case), "dtype": str(dtype), "seed": seed, "what": "blocks",
               "error": error, "allowed": 1e-6, "ok": error <= 1e-6}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    args = parser.parse_args()
    rows = list(checks(args.device, (torch.float32, torch.bfloat16), args.seeds))
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        measured = f"{row['error']:.1e} > {row['allowed']:.1e}"
        print(f"FAILED {row['primitive']} {row['what']} {row['dtype']} {row['case']}: {measured}")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(f"{len(rows) - len(wrong)} passed, {len(wrong)} failed on {name}, torch {torch.__version__}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": name, "torch": torch.__version__, "rows": rows}, file, indent=1)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
