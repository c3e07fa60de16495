"""Compile every kernel ahead of time for GPUs that need not be there: `python -m patchattn_kernels.check --static`.

Each primitive's `kernels.py` exports `STATIC`, a list of `Compile`: what its launchers launch. Every entry is compiled
for each chip and dtype with the compiler and assembler that Triton's wheel carries, and fails if it

- spills: a kernel that keeps values in local memory has outgrown the registers;
- asks for more shared memory than a program may have on that chip;
- does its products with other instructions than it says (see `Compile.products`).

Run with Triton 3.9.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Shared memory that one program may use, in bytes; for 8.0 that of 8.6 and 8.9, which run what is compiled for it.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# What each chip calls its own matrix product in PTX; mma.sync runs on all of them, at a fraction of the speed.
OWN_PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Compile:
    """One configuration of one kernel.

    Attributes:
        label: how the report calls it, for example "decode 16x64".
        kernel: the function under `@triton.jit`.
        arguments: its arguments in Triton's words, by name: "*bf16", "i32", "fp32"; "T" stands for each of `dtypes`,
            as in "*T". A ":16" at the end says that the value is a multiple of 16, which Triton finds out by itself
            for the pointers and strides of a launch, and which decides how it loads.
        constants: its constexprs by name (and what a launch would turn into one: an integer that is 1, a None).
        products: "own": with the chip's own matrix instructions; "mma": with mma.sync, for tiles of fewer than 64
            rows, which newer chips' own instructions do not take; "both": some products with either; "none": without
            any. A dict says it by dtype.
        dtypes: what "T" stands for.
        chips: compute capabilities, 90 for 9.0.
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    products: str | Mapping[str, str] = "own"
    dtypes: tuple[str, ...] = DTYPES
    chips: tuple[int, ...] = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Compiled:
    """What came out for one chip and dtype; `problems` is empty if it may ship."""

    label: str
    chip: int
    dtype: str
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes of shared memory a program
    products: str  # the matrix instructions found
    problems: tuple[str, ...]


def compile_one(entry: Compile, chip: int, dtype: str) -> Compiled:
    """Compile one entry for one chip and dtype and judge the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    signature, aligned = arguments(entry, dtype)
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=dict(entry.constants), attrs=attributes)
    target = GPUTarget("cuda", chip, 32)
    options = make_backend(target).parse_options({"num_warps": entry.num_warps, "num_stages": entry.num_stages})
    compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spilled = resources(compiled.asm["cubin"])
    found = products(compiled.asm["ptx"])
    wanted = entry.products if isinstance(entry.products, str) else entry.products[dtype]
    return Compiled(
        entry.label, chip, dtype, registers, spilled, compiled.metadata.shared, " ".join(found) or "none",
        tuple(problems(chip, wanted, spilled, compiled.metadata.shared, found)),
    )  # fmt: skip


def arguments(entry: Compile, dtype: str) -> tuple[dict[str, str], list[str]]:
    """The type of every argument of the kernel in order, "constexpr" for constants; and which are multiples of 16."""
    names = list(entry.kernel.arg_names)
    types = {name: text.replace("T", dtype).partition(":") for name, text in entry.arguments.items()}
    missing = [name for name in names if name not in types and name not in entry.constants]
    unknown = [name for name in (*types, *entry.constants) if name not in names]
    twice = [name for name in types if name in entry.constants]
    if missing or unknown or twice:
        raise ValueError(f"{entry.label}: its arguments and constants must be those of the kernel, each once; missing: "
                         f"{missing}, unknown: {unknown}, twice: {twice}")  # fmt: skip
    signature = {name: "constexpr" if name in entry.constants else types[name][0] for name in names}
    return signature, [name for name, (_, _, hint) in types.items() if hint == "16"]


def problems(chip: int, wanted: str, spilled: int, shared: int, found: list[str]) -> Iterator[str]:
    """What forbids to ship a kernel with these properties."""
    if spilled:
        yield f"spills {spilled} bytes a thread"
    if shared > SHARED_LIMIT[chip]:
        yield f"needs {shared} bytes of shared memory, of which there are {SHARED_LIMIT[chip]}"
    expected = {
        "own": [OWN_PRODUCT[chip]],
        "mma": ["mma.sync"],
        "both": sorted({"mma.sync", OWN_PRODUCT[chip]}),
        "none": [],
    }[wanted]
    if found != expected:
        used, said = (" and ".join(names) or "no matrix instruction" for names in (found, expected))
        yield f"multiplies with {used}, not {said}"


def products(ptx: str) -> list[str]:
    """Which matrix instructions stand in PTX."""
    return [name for name in sorted(set(OWN_PRODUCT.values())) if re.search(rf"\b{re.escape(name)}\b", ptx)]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread, of an assembled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def entries(primitives: Iterable[str] = ()) -> Iterator[tuple[str, Compile]]:
    """The `STATIC` of every primitive that has kernels, or of those named."""
    import patchattn_kernels

    wanted = set(primitives)
    for module in pkgutil.iter_modules(patchattn_kernels.__path__):
        if not module.ispkg or (wanted and module.name not in wanted):
            continue
        package = f"patchattn_kernels.{module.name}"
        if importlib.util.find_spec(f"{package}.kernels") is not None:
            for entry in importlib.import_module(f"{package}.kernels").STATIC:
                yield module.name, entry


def check(primitives: Iterable[str] = (), chips: Iterable[int] = tuple(SHARED_LIMIT)) -> list[dict[str, Any]]:
    """Compile everything, print a line each, and give the rows."""
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("the static check compiles, so TRITON_INTERPRET must not be set; "
                           "run python -m patchattn_kernels.check --static")  # fmt: skip
    rows = []
    for primitive, entry in entries(primitives):
        for chip in sorted(set(chips) & set(entry.chips)):
            for dtype in entry.dtypes:
                done = compile_one(entry, chip, dtype)
                rows.append({"primitive": primitive, **vars(done), "ok": not done.problems})
                print(f"{'FAILED' if done.problems else 'ok':6} sm_{chip:<3} {dtype:4} {primitive} {entry.label}: "
                      f"{done.registers} registers, {done.spilled} spilled, {done.shared} shared, {done.products}"
                      + "".join(f"; {problem}" for problem in done.problems), flush=True)  # fmt: skip
    return rows
