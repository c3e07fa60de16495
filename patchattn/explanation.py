"""What a patched model really did: `patchattn.explain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .cache import PatchCacheLayer, layer_bytes
from .inspection import bypassed, described
from .record import Patch, attachment_of, patch_of, root_of
from .tables import Report, add_row, all_but_name, grouped, names_text, note, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .context import Attachment
    from .sites import Site


@dataclass(frozen=True)
class Layer:
    """What happened on one attention module since it was patched.

    Attributes:
        methods: outermost first; none on an unpatched layer of a patched model.
        calls: how often its methods ran (calls inside torch.compile are not counted).
        base: the attention implementation that the model had.
        ran: what computed the last call: an implementation, or "the method's own" where none was asked.
        kernels: by primitive of `patchattn_kernels`, what computed it in the last call: "triton", or "torch" and why.
        cache: the class of its layer in the last cache, or None if there is none (any more).
        tokens: how many tokens that cache has seen.
        bytes, dense_bytes: what it holds, and what one that keeps every token would.
        report: what each method says of its last call.
    """

    name: str
    layer: int | None
    methods: list[dict[str, Any]]
    enabled: bool
    calls: int
    base: str
    ran: str | None
    kernels: dict[str, str]
    cache: str | None
    tokens: int | None
    bytes: int | None
    dense_bytes: int | None
    report: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Explanation(Report):
    """What `explain` found. Printed, layers that did the same share a row."""

    model: str
    layers: list[Layer]
    notes: list[str]

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the last cache over all layers, or None where no cache is alive."""
        return _sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int | None:
        """What a cache that keeps every token would hold on those layers."""
        return _sum(layer.dense_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "cache_bytes": self.cache_bytes, "dense_bytes": self.dense_bytes}

    def parts(self) -> list[RenderableType]:
        columns = ("attention", "methods", "calls", "ran", "cache", "tokens", "bytes each", "if dense", "says")
        rows = table(*columns, title=self.model)
        for names, layer in grouped(self.layers, all_but_name):
            what = " over ".join(method["method"] for method in layer.methods)
            says = "; ".join(f"{key}: {value}" for report in layer.report.values() for key, value in report.items())
            ran = "; ".join(filter(None, [layer.ran, *(f"{name}: {how}" for name, how in layer.kernels.items())]))
            add_row(rows, names, what or None, layer.calls if what else None, ran or None, layer.cache, layer.tokens,
                    layer.bytes, layer.dense_bytes, says)  # fmt: skip
        parts: list[RenderableType] = [rows]
        held, dense = self.cache_bytes, self.dense_bytes
        if held is not None and dense:
            parts.append(f"cache: {held:,} bytes, {held / dense:.1%} of the {dense:,} that keeping every token takes")
        return parts + [note(line) for line in self.notes]


def explain(model: nn.Module) -> Explanation:
    """What a patched model really did since `patch`: calls, attention that ran, cache, and the methods' reports.

    Cache sizes are those of the last cache the model was given, while somebody still holds it.
    """
    root, record = root_of(model), patch_of(model)
    if record is None:
        raise ValueError(f"this {type(root).__name__} is not patched, so there is nothing to explain; "
                         "patchattn.inspect(model) says what could be patched")  # fmt: skip
    layers = [_layer(site, attachment_of(site.module)) for site in record.sites]
    return Explanation(type(root).__name__, layers, list(_notes(record, layers)))


def _layer(site: Site, attachment: Attachment) -> Layer:
    cache = attachment.last_cache() if attachment.last_cache is not None else None
    methods = [described(method) for method in attachment.methods]
    ran = attachment.base_ran
    if ran is None and methods and attachment.calls:
        ran = "the method's own"
    return Layer(
        name=site.name,
        layer=site.layer_idx,
        methods=methods,
        enabled=attachment.enabled,
        calls=attachment.calls,
        base=attachment.base,
        ran=ran,
        kernels=dict(attachment.kernels),
        cache=None if cache is None else type(cache).__name__,
        tokens=None if cache is None else int(cache.get_seq_length()),
        bytes=None if cache is None else layer_bytes(cache),
        dense_bytes=None if cache is None else dense_bytes(site, cache),
        report={entry["method"]: method.report() for entry, method in zip(methods, attachment.methods, strict=True)},
    )


def dense_bytes(site: Site, layer: Any) -> int:
    """Bytes of keys and values if this cache layer kept every token it has seen (has room for, if static)."""
    sliding = getattr(layer, "is_sliding", False)
    if not isinstance(layer, PatchCacheLayer) and not sliding:
        return layer_bytes(layer)
    held = [value for value in _tensors(layer) if value.dim() == 4]
    if not held:
        return 0
    room = int(layer.get_max_cache_shape()) if getattr(layer, "is_compileable", False) and not sliding else 0
    tokens = room if room > 0 else int(layer.get_seq_length())
    key_dim = getattr(site.module, "qk_head_dim", site.head_dim)
    return held[0].shape[0] * tokens * site.kv_heads * (key_dim + site.head_dim) * held[0].element_size()


def _tensors(layer: Any) -> Iterator[Tensor]:
    """The tensors a cache layer holds, its inner layers' included."""
    for value in vars(layer).values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "get_seq_length"):
            yield from _tensors(value)


def _notes(record: Patch, layers: Sequence[Layer]) -> Iterator[str]:
    yield from bypassed(record)
    patched = [layer for layer in layers if layer.methods]
    off = [layer for layer in patched if not layer.enabled]
    if off:
        yield f"{len(off)} of {len(patched)} patched layers are switched off now (patchattn.disabled)"
    silent = [layer for layer in patched if not layer.calls]
    compiled = "calls inside torch.compile are not counted"
    if silent and len(silent) == len(patched):
        yield f"the patch was never called: run the model first ({compiled})"
    elif silent:
        yield f"never called: {names_text(silent)} ({compiled})"
    cached = any(attachment_of(site.module).last_cache is not None for site in record.sites)
    if cached and not any(layer.cache for layer in layers):
        yield "the last cache is gone; keep it to see its size: generate(..., return_dict_in_generate=True)"


def _sum(values: Iterator[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
