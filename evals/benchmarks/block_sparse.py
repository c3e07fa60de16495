"""Attention to listed blocks beside dense attention: prompts, their gradients, single tokens, and block maxima.

    python evals/benchmarks/block_sparse.py [--length 2048] [--density 0.5 0.1] [--rounds 10]

Every side that is there runs in turn in one process: ours with a list for each query head, ours with lists that the
heads of a group share, torch's SDPA over everything, and on a GPU compiled FlexAttention and flash-attn-4 with the same
blocks. A side whose result is wrong is not timed. Blocks are drawn at random; the diagonal and the first one are kept.

`E` is density * dense / ours, with the density in causal blocks: 1 where a kept block costs what it costs in the
fastest dense attention. `rate` is what a side multiplies (prompts, gradients: TFLOP/s) or reads (tokens: TB/s) of what
it has to. `lists` is what making the lists from a mask takes, beside it. Maxima are set beside dense attention, which
they need as many products as. On a CPU the time is that of its processors, all threads together. Exits 1 if a result is
wrong; gradients are checked where all weights fit at once.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import machine, on_gpu, paired, ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import BlockLists, backend, block_maxima, block_sparse, block_sparse_decode
from patchattn_kernels.check import exact, relative
from patchattn_kernels.dispatch import recording

Sides = dict[str, Callable[[], Any]]
TAIL = 128  # queries whose result is compared
MOST_WEIGHTS = 1 << 32  # of those that are held to check gradients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--what", nargs="+", default=["prompt", "gradient", "token", "maxima"])
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768] if gpu else [2048])
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05] if gpu else [0.5, 0.1])
    parser.add_argument("--block", type=int, nargs="+", default=[64, 128] if gpu else [64])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16] if gpu else [1], help="of single tokens")
    parser.add_argument("--heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if gpu else 2)
    parser.add_argument("--size", type=int, default=128 if gpu else 64, help="of a head")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for length in args.length:
        for block in args.block:
            if "maxima" in args.what:
                rows.append(measure(args, "maxima", *maxima(args, length, block)))
            for density in args.density:
                if "prompt" in args.what:
                    rows.append(measure(args, "prompt", *prompt(args, length, block, density)))
                if "gradient" in args.what:
                    rows.append(measure(args, "gradient", *gradient(args, length, block, density)))
                if "token" in args.what:
                    rows += [measure(args, "token", *token(args, length, block, density, n)) for n in args.batch]
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))
    return int(any(row["wrong"] for row in rows))


def tensors(args: argparse.Namespace, batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    shapes = [(args.heads, queries), (args.kv_heads, keys), (args.kv_heads, keys)]
    return [torch.randn(batch, heads, length, args.size, dtype=dtype, device=args.device) for heads, length in shapes]


def masks(args: argparse.Namespace, batch: int, rows: int, blocks: int, density: float) -> dict[str, torch.Tensor]:
    """Random blocks for every query head, and for every KV head; the last row of blocks is that of the last tokens."""
    place = torch.arange(blocks, device=args.device)
    row = place[blocks - rows :, None]
    kept = (place == row) | (place == 0)
    found = {}
    for name, heads in (("ours", args.heads), ("ours, shared", args.kv_heads)):
        drawn = torch.rand(batch, heads, rows, blocks, device=args.device) < density
        found[name] = (drawn | kept) & (place <= row)
    return found


def share(mask: torch.Tensor) -> float:
    """The density of a causal mask, the diagonal included."""
    rows, blocks = mask.shape[2:]
    causal = rows * (blocks - rows) + rows * (rows + 1) / 2
    return mask.sum().item() / (mask.shape[0] * mask.shape[1] * causal)


def prompt(args: argparse.Namespace, length: int, block: int, density: float) -> tuple[dict[str, Any], Sides, Any]:
    """A whole prompt, causal."""
    q, k, v = tensors(args, 1, length, length)
    drawn = masks(args, 1, -(-length // block), -(-length // block), density)
    lists = {name: BlockLists.from_mask(mask) for name, mask in drawn.items()}
    sides: Sides = {
        name: functools.partial(block_sparse, q, k, v, listed, block=block) for name, listed in lists.items()
    }
    sides |= dense(q, k, v, causal=True)
    sides |= flex(q, k, v, drawn["ours"], block) | flash_attn_4(q, k, v, drawn["ours"], block)
    sides["lists"] = functools.partial(BlockLists.from_mask, drawn["ours"])
    truth = {name: tail(q, k, v, mask, block) for name, mask in drawn.items()}
    truth |= {"flex": truth["ours"], "flash-attn-4": truth["ours"]}
    return settings(args, drawn, length, block, 4), sides, truth


def gradient(args: argparse.Namespace, length: int, block: int, density: float) -> tuple[dict[str, Any], Sides, Any]:
    """dq, dk, dv of a prompt; the forward pass is not timed."""
    q, k, v = (x.requires_grad_() for x in tensors(args, 1, length, length))
    drawn = masks(args, 1, -(-length // block), -(-length // block), density)
    upstream = torch.randn_like(q)

    def backward(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        out = run()
        return lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    forward: Sides = {
        name: functools.partial(block_sparse, q, k, v, BlockLists.from_mask(mask), block=block)
        for name, mask in drawn.items()
    }
    forward |= dense(q, k, v, causal=True) | flex(q, k, v, drawn["ours"], block)
    sides, missing = {}, {}
    for name, run in forward.items():
        try:
            sides[name] = backward(run)
        except Exception as problem:
            missing[name] = f"{type(problem).__name__}: {problem}"[:200]
    truth = {}
    if args.heads * length**2 <= MOST_WEIGHTS:
        for name, mask in drawn.items():
            whole = [x.detach().float().requires_grad_() for x in (q, k, v)]
            out = exact(*whole, elements(mask, length, block, length, args.heads))
            truth[name] = torch.autograd.grad(out, whole, upstream.float())
        truth["flex"] = truth["ours"]
    return settings(args, drawn, length, block, 10) | {"missing": missing}, sides, truth


def token(
    args: argparse.Namespace, length: int, block: int, density: float, batch: int
) -> tuple[dict[str, Any], Sides, Any]:
    """One token over a cache of `length` tokens."""
    q, k, v = tensors(args, batch, 1, length)
    drawn = masks(args, batch, 1, -(-length // block), density)
    places = {name: int(mask.sum(dim=-1).max()) for name, mask in drawn.items()}
    lists = {name: BlockLists.from_mask(mask, most=places[name]) for name, mask in drawn.items()}
    sides: Sides = {
        name: functools.partial(block_sparse_decode, q, k, v, listed, block=block) for name, listed in lists.items()
    }
    sides |= dense(q, k, v, causal=False)
    sides["lists"] = functools.partial(BlockLists.from_mask, drawn["ours, shared"])
    found = settings(args, drawn, length, block, 0)
    found["work"] = {name: 2 * k.nbytes * found["density"][name] for name in ("ours, shared", "dense")}
    return found | {"batch": batch}, sides, {name: tail(q, k, v, mask, block) for name, mask in drawn.items()}


def maxima(args: argparse.Namespace, length: int, block: int) -> tuple[dict[str, Any], Sides, Any]:
    """The largest weights of a prompt's blocks, for each query head; and of each query's blocks, for each group."""
    q, k, v = tensors(args, 1, length, length)
    sides: Sides = {
        "ours": functools.partial(block_maxima, q, k, block=block),
        "ours, shared": functools.partial(block_maxima, q, k, block=(1, block), shared=True),
        **dense(q, k, v, causal=True),
    }
    row = -(-length // block) - 1  # of the last block alone, which may be a part of one
    first = row * block
    seen = torch.arange(length, device=q.device) <= torch.arange(first, length, device=q.device)[:, None]
    scores = q[:, :, first:].float() @ k.float().repeat_interleave(args.heads // args.kv_heads, 1).mT
    weights = (scores * args.size**-0.5).masked_fill(~seen, float("-inf")).softmax(dim=-1)
    weights = torch.nn.functional.pad(weights, (0, -length % block)).unflatten(-1, (-1, block)).amax(dim=-1)
    shared = weights.unflatten(1, (args.kv_heads, -1)).amax(dim=2)
    truth = {"ours": weights.amax(dim=2, keepdim=True), "ours, shared": shared}
    return {"length": length, "block": block}, sides, truth


def settings(
    args: argparse.Namespace, drawn: dict[str, torch.Tensor], length: int, block: int, products: int
) -> dict[str, Any]:
    """Sizes, the density of each side, and its work: `products` numbers for each weight and feature."""
    density = {"ours": share(drawn["ours"]), "ours, shared": share(drawn["ours, shared"]), "dense": 1.0}
    weights = args.heads * length * (length + 1) / 2
    work = {name: products * args.size * weights * part for name, part in density.items()}
    return {"length": length, "block": block, "density": density, "work": work}


def elements(mask: torch.Tensor, length: int, block: int, queries: int, heads: int) -> torch.Tensor:
    """The mask of the last `queries` queries and all keys: `[B, H, queries, S]`."""
    place = torch.arange(length - queries, length, device=mask.device)
    keep = mask[:, :, place // block - (-(-length // block) - mask.shape[2])]
    keep = keep.repeat_interleave(block, dim=3)[..., :length].repeat_interleave(heads // mask.shape[1], dim=1)
    return keep & (torch.arange(length, device=mask.device) <= place[:, None])


def tail(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int) -> torch.Tensor:
    """The last queries in float32, with all their weights."""
    queries = min(q.shape[2], TAIL)
    keep = elements(mask, k.shape[2], block, queries, q.shape[1])
    return exact(q[:, :, -queries:].float(), k.float(), v.float(), keep)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Sides:
    """Attention over everything in torch; on a GPU with each backend that takes it."""

    def run(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    backends = {"flash": SDPBackend.FLASH_ATTENTION} | ({"cudnn": SDPBackend.CUDNN_ATTENTION} if q.is_cuda else {})
    return {f"dense {name}": functools.partial(run, backend) for name, backend in backends.items()}


def parts(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Counts and indices of the blocks on the diagonal, which need a mask, and of those before it, which do not."""
    diagonal = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
    with backend("torch"):  # whose lists are filled up with zeros
        return (*BlockLists.from_mask(mask & diagonal), *BlockLists.from_mask(mask & ~diagonal))


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int) -> Sides:
    """The same blocks in compiled FlexAttention; its block mask is made outside the clock."""
    if not q.is_cuda:
        return {}
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    made = BlockMask.from_kv_blocks(*parts(mask), BLOCK_SIZE=block, mask_mod=causal)
    compiled = torch.compile(flex_attention)
    return {"flex": lambda: compiled(q, k, v, block_mask=made, enable_gqa=True)}


def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, block: int) -> Sides:
    """The same blocks in flash-attn-4, which has blocks of 128 there."""
    found = q.is_cuda and importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    if not found or block != 128:
        return {}

    listed = parts(mask)

    def run() -> torch.Tensor:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        made = BlockSparseTensorsTorch(*listed, block_size=(block, block))
        rows = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(*rows, causal=True, block_sparse_tensors=made)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return {"flash-attn-4": run}


def measure(args: argparse.Namespace, what: str, sizes: dict[str, Any], sides: Sides, truth: Any) -> dict[str, Any]:
    """Check every side, then time those that are right."""
    ran: dict[str, str] = {}
    errors: dict[str, float] = {}
    wrong, missing = [], sizes.pop("missing", {})
    for name in list(sides):
        try:
            with recording(ran):
                out = sides[name]()
        except Exception as problem:  # a peer that cannot run here is left out, and said so
            if name.startswith("ours"):
                raise
            missing[name] = f"{type(problem).__name__}: {problem}"[:200]
            del sides[name]
            continue
        if name in truth:
            mine, wanted = (x if isinstance(x, tuple) else (x,) for x in (out, truth[name]))
            errors[name] = max(relative(a[:, :, -b.shape[2] :], b) for a, b in zip(mine, wanted, strict=True))
            if not errors[name] < (1e-2 if args.device.startswith("cuda") else 1e-5):
                wrong.append(name)
                del sides[name]
    row: dict[str, Any] = {"what": what, **sizes, "ran": ran, "errors": errors, "checked": sorted(truth),
                           "wrong": wrong, "missing": missing}  # fmt: skip
    if args.device.startswith("cuda"):
        seconds = on_gpu(sides, args.rounds)
    else:
        seconds = paired(sides, args.rounds, clock=time.process_time)
    row["ms"] = {name: {"median": statistics.median(values) * 1e3, "range": [min(values) * 1e3, max(values) * 1e3]}
                 for name, values in seconds.items()}  # fmt: skip
    fastest = min((name for name in seconds if name.startswith("dense")), key=lambda name: row["ms"][name]["median"])
    row["fastest dense"] = fastest
    work = sizes.get("work", {})
    row["rate"] = {name: work[kind] / row["ms"][name]["median"] / 1e9 for name in seconds
                   if (kind := "dense" if name.startswith("dense") else name) in work}  # fmt: skip
    for name in (name for name in seconds if name != fastest):
        middle, low, high = ratio(seconds, name, fastest)
        row[f"{name} / dense"] = {"median": middle, "quartiles": [low, high]}
        if what in ("prompt", "gradient", "token") and not name.startswith(("dense", "lists")):
            row.setdefault("E", {})[name] = sizes["density"].get(name, sizes["density"]["ours"]) / middle
    return row


if __name__ == "__main__":
    sys.exit(main())
