"""Check every primitive on this machine: `python -m patchattn_kernels.check`.

Each primitive's `cases.py` exports `CASES`, a tuple of `Case`. A case is computed by its plain formula in float64, and
by the primitive with every backend that this machine has: torch, and Triton on a GPU or, on a CPU, in Triton's
interpreter (slow; bfloat16 and float16 too, as far as it knows them). The primitive may err no more than twice what the
formula errs in the same dtype, in its results and in its gradients; new memory is filled with NaN first.

`--static` compiles every kernel for GPUs that need not be there instead; see `patchattn_kernels.static`. Exits 1 on a
failure.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchattn_kernels import static
from patchattn_kernels.dispatch import INSTALLED, backend, interpreted, recording

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHIPS = tuple(static.SHARED_LIMIT)
FLOOR = 2e-6  # relative error that is always allowed


@dataclass(frozen=True)
class Case:
    """One call of a primitive, small enough for an interpreter.

    Attributes:
        label: sizes and what is special, as the report shows them.
        inputs: makes the keyword arguments of `run` and `formula` on the generator's device; floating tensors in
            float32, which the check casts.
        run: the primitive; gives a tensor or a tuple of them.
        formula: the same in the plainest torch there is, which must hold in float64.
        gradients: names of the inputs whose gradients are compared.
        backends: which implementations the primitive has for this case.
    """

    label: str
    inputs: Callable[[torch.Generator], dict[str, Any]]
    run: Callable[..., Any]
    formula: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("torch", "triton")


def cases(primitives: Iterable[str] = ()) -> Iterator[tuple[str, Case]]:
    """The cases of every primitive, or of those named."""
    import patchattn_kernels

    found = {module.name for module in pkgutil.iter_modules(patchattn_kernels.__path__) if module.ispkg}
    wanted = set(primitives) or found
    if wanted - found:
        raise ValueError(f"no primitive is called {', '.join(sorted(wanted - found))}; there are {sorted(found)}")
    for name in sorted(wanted):
        if importlib.util.find_spec(f"patchattn_kernels.{name}.cases") is not None:
            for case in importlib.import_module(f"patchattn_kernels.{name}.cases").CASES:
                yield name, case


def available(device: str) -> tuple[str, ...]:
    """The backends that this machine has."""
    triton = INSTALLED and (device.startswith("cuda") or interpreted())
    return ("torch", "triton") if triton else ("torch",)


def check(
    chosen: Iterable[tuple[str, Case]],
    device: str,
    dtypes: Iterable[torch.dtype] = DTYPES,
    seeds: int = 1,
    backends: Iterable[str] = ("torch", "triton"),
) -> Iterator[dict[str, Any]]:
    """One row a case, dtype, seed, backend and compared tensor: its error, what is allowed, and whether it is right."""
    backends = [name for name in backends if name in available(device)]
    for primitive, case in chosen:
        for dtype in dtypes:
            for seed in range(seeds):
                inputs = case.inputs(torch.Generator(device).manual_seed(seed))
                truth = _results(case.formula, inputs, case.gradients, dtype, torch.float64)
                plain = _results(case.formula, inputs, case.gradients, dtype, dtype)
                for name in backends:
                    if name not in case.backends:
                        continue
                    ran: dict[str, str] = {}
                    started = time.perf_counter()
                    with backend(name), recording(ran), nan_filled():
                        ours = _results(case.run, inputs, case.gradients, dtype, dtype)
                    seconds = time.perf_counter() - started
                    if not any(how.startswith(name) for how in ran.values()):
                        raise RuntimeError(f"{primitive}, {case.label}: {name} was asked for, and {ran} ran")
                    for what, tensor in ours.items():
                        error = relative(tensor, truth[what])
                        allowed = 2 * relative(plain[what], truth[what]) + FLOOR
                        # Not <=, which a NaN passes by failing.
                        right = bool(tensor.isfinite().all()) and not error > allowed
                        yield {"primitive": primitive, "case": case.label, "backend": name, "seed": seed,
                               "dtype": str(dtype).removeprefix("torch."), "what": what, "error": error,
                               "allowed": allowed, "seconds": seconds, "ok": right}  # fmt: skip


def _results(
    function: Callable[..., Any], inputs: Mapping[str, Any], gradients: tuple[str, ...], first: torch.dtype,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Results and gradients of inputs rounded to `first`, computed in `dtype`."""
    given = {name: _cast(value, first, dtype) for name, value in inputs.items()}
    for name in gradients:
        given[name].requires_grad_()
    out = function(**given)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"result {index}" if len(outs) > 1 else "result": tensor.detach() for index, tensor in enumerate(outs)}
    if gradients:
        generator = torch.Generator(outs[0].device).manual_seed(100)
        upstream = [torch.randn(x.shape, generator=generator, device=x.device).to(first).to(x.dtype) for x in outs]
        grads = torch.autograd.grad(outs, [given[name] for name in gradients], upstream)
        found |= {f"d{name}": grad for name, grad in zip(gradients, grads, strict=True)}
    return found


def _cast(value: Any, first: torch.dtype, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(first).to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [_cast(item, first, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def relative(ours: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)).item()


@contextmanager
def nan_filled() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Softmax attention spelled out, `keep` True where a query reads a key; one that reads nothing gives zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("primitives", nargs="*", help="check these alone")
    parser.add_argument("--static", action="store_true", help="compile instead; needs no GPU")
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=CHIPS, help="what to compile for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    args = parser.parse_args()
    if args.static == interpreted() and (args.static or args.device == "cpu"):
        # Triton asks for TRITON_INTERPRET when it is imported, which torch may have done by now.
        variables = os.environ | {"TRITON_INTERPRET": "0" if args.static else "1"}
        return subprocess.run(
            [sys.executable, "-m", "patchattn_kernels.check", *sys.argv[1:]], env=variables
        ).returncode
    if args.static:
        rows = static.check(args.primitives, args.chips)
        where = f"for {', '.join(f'sm_{chip}' for chip in args.chips)}"
    else:
        rows = []
        for row in check(list(cases(args.primitives)), args.device, seeds=args.seeds):
            rows.append(row)
            if not row["ok"]:
                print(f"FAILED {row['primitive']} {row['backend']} {row['dtype']} {row['what']} of {row['case']}: "
                      f"{row['error']:.1e} > {row['allowed']:.1e}", flush=True)  # fmt: skip
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"on {args.device}"
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed {where}, {_versions()}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"where": where, "versions": _versions(), "rows": rows}, file, indent=1)
    return int(bool(failed) or not rows)


def _versions() -> str:
    triton = importlib.import_module("triton").__version__ if INSTALLED else "not installed"
    return f"torch {torch.__version__}, triton {triton}"


if __name__ == "__main__":
    sys.exit(main())
