"""The primitives patchattn's methods are built from: torch and Triton only, no model in sight.

Each primitive is a folder: `reference.py` is the specification, readable beside the paper, `kernels.py` the same in
Triton, and the folder's `__init__.py` the public function that chooses between them (see `dispatch`). Shapes use one
legend everywhere: B batch, H query heads, G key/value heads, T queries, S keys, D head size.
"""

from .attention import masked_attention
from .block_sparse import BlockLists, block_maxima, block_sparse, block_sparse_decode
from .dispatch import backend
from .grouped import grouped
from .linear import FeatureMap, causal_conv, linear, linear_weights
from .routed import routed
from .sink_window import sink_window, sink_window_decode

__all__ = [
    "BlockLists",
    "FeatureMap",
    "backend",
    "block_maxima",
    "block_sparse",
    "block_sparse_decode",
    "causal_conv",
    "grouped",
    "linear",
    "linear_weights",
    "masked_attention",
    "routed",
    "sink_window",
    "sink_window_decode",
]
