"""Kernels that the tests of the static check compile: one that may ship, and one for each reason not to."""

import triton
import triton.language as tl

from patchattn_kernels.static import Compile


@triton.jit
def centre_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """Every value is needed after all have been summed, so all are held at once."""
    index = tl.arange(0, N)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x - tl.sum(x.to(tl.float32), 0) / N)


@triton.jit
def product_kernel(a_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    """A product with its own transpose."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + row * N + column)
    b = tl.load(a_ptr + tl.arange(0, N)[None, :] * N + tl.arange(0, N)[:, None])
    tl.store(out_ptr + row * N + column, tl.dot(a, b))


CENTRE, PRODUCT = {"x_ptr": "*T:16", "out_ptr": "*T:16"}, {"a_ptr": "*T:16", "out_ptr": "*fp32:16"}
HALF = ("bf16",)
STATIC = [
    Compile("fits", centre_kernel, CENTRE, {"N": 256}, 1, 1, "none", HALF),
    Compile("spills", centre_kernel, CENTRE, {"N": 16384}, 1, 1, "none", HALF),
    Compile("own", product_kernel, PRODUCT, {"M": 64, "N": 64}, 4, 1, "own", HALF),
    Compile("few rows", product_kernel, PRODUCT, {"M": 16, "N": 64}, 4, 1, "mma", HALF),
    Compile("few rows said to be many", product_kernel, PRODUCT, {"M": 16, "N": 64}, 4, 1, "own", HALF),
]
