"""The primitives patchattn's methods are built from: torch (and later Triton) only, no model in sight.

Each primitive is a folder: `reference.py` is the specification, readable beside the paper; the folder's
`__init__.py` is the public function. Shapes use one legend everywhere: B batch, H query heads, G key/value
heads, T queries, S keys, D head size.
"""

from .attention import masked_attention
from .sink_window import sink_window

__all__ = ["masked_attention", "sink_window"]
