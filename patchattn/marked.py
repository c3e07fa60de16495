"""transformers' own cache layers with a mark beside each token: what a method found out about it when it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache import Expecting


class _Marked(Expecting):
    """Keys and values are kept as they were; the marks follow them through everything that happens to a cache.

    Attributes:
        marks: `[B, n]` int8, of the first n tokens; later ones count as 0. None before the first mark.
        counts: `[B]`, what the method counted in the marks; None: to be counted again.
        noteworthy: whether the method found, in these tokens, what it looks for.
    """

    marks: Tensor | None = None
    counts: Tensor | None = None
    noteworthy = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._require_expected()
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def mark(self, new: Tensor, past: Any) -> None:
        """Mark the tokens `[past, past + T)` of each row: `[B, T]`."""
        if self.marks is None:
            self.marks = new.new_zeros(new.shape[0], 0)
        self.marks, self.counts = torch.cat([self.marked(past), new], dim=1), None

    def marked(self, length: int) -> Tensor:
        """The marks of the first `length` tokens: `[B, length]`."""
        assert self.marks is not None
        return functional.pad(self.marks, (0, length - self.marks.shape[1]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.marks = None if self.marks is None else change(self.marks)
        self.counts = None if self.counts is None else change(self.counts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.marks is not None:
            self.marks, self.counts = self.marks[:, : self.get_seq_length()], None  # type: ignore[attr-defined]

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.marks, self.counts, self.noteworthy = None, None, False


class MarkedDynamicLayer(_Marked, DynamicLayer):
    """A growing layer with marks."""


class MarkedStaticLayer(_Marked, StaticLayer):
    """A preallocated layer with marks, which are preallocated too, so that a compiled step keeps their address."""

    def lazy_initialization(self, key_states: Tensor, *args: Any) -> None:
        super().lazy_initialization(key_states, *args)
        self.marks = key_states.new_zeros(key_states.shape[0], self.max_cache_len, dtype=torch.int8)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.marks)

    def mark(self, new: Tensor, past: Any) -> None:
        assert self.marks is not None
        self.marks.index_copy_(1, torch.arange(new.shape[1], device=new.device) + past, new)
        self.counts = None

    def marked(self, length: int) -> Tensor:
        assert self.marks is not None
        return self.marks

    def reset(self) -> None:
        marks = self.marks
        super().reset()
        if marks is not None:
            self.marks = marks.zero_()
