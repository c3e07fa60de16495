"""Living with a patched model: switch it off for a moment, turn its knobs, train it, describe it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .attach import own_state
from .method import Method, describe
from .record import attachment_of, record_of, root_of
from .sites import select

if TYPE_CHECKING:
    from .context import AttentionContext

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this block the model is the base model, bit for bit; the patch stays loaded.

    So a distillation has its teacher without a second copy of the weights. Caches are not shared between the
    two: start with a new one on each side.
    """
    record = record_of(model)
    current = [(config, config._attn_implementation) for config, _ in record.implementations]
    before = {site.name: attachment_of(site.module).enabled for site in record.sites}
    for config, implementation in record.implementations:
        config._attn_implementation_internal = implementation
    for site in record.sites:
        attachment_of(site.module).enabled = False
    try:
        yield model
    finally:
        for config, implementation in current:
            config._attn_implementation_internal = implementation
        for site in record.sites:
            attachment_of(site.module).enabled = before[site.name]


@contextlib.contextmanager
def only(model: nn.Module, layers: Any) -> Iterator[nn.Module]:
    """Inside this block the patch is on some of its layers alone; the others run what they ran before it.

    Args:
        layers: as for `patch`; an empty list for none. Caches are not shared with the model outside of the block.
    """
    record = record_of(model)
    chosen = {site.name for site in select(record.sites, layers)}
    patched = record.patched
    if chosen and not any(site.name in chosen for site in patched):
        raise ValueError(f"only: none of the layers {layers!r} is patched; patched are {patched[0].name}, ...")
    off = [attachment_of(site.module) for site in patched if site.name not in chosen]
    before = [(attachment.methods, attachment.raw) for attachment in off]
    for attachment in off:
        attachment.methods, attachment.raw = [], False
    try:
        yield model
    finally:
        for attachment, (methods, raw) in zip(off, before):
            attachment.methods, attachment.raw = methods, raw


@contextlib.contextmanager
def settings(model: nn.Module, **changes: Any) -> Iterator[nn.Module]:
    """Inside this block some settings of the methods are changed, without patching again.

    Only the fields that a method declares as run-time settings may change; every method that has a field of
    that name takes the new value.
    """
    methods = methods_on(model)
    allowed = sorted({name for method in methods for name in method.config.runtime_fields()})
    for name in changes:
        if name not in allowed:
            raise ValueError(
                f"settings: {name!r} cannot be changed at run time; allowed: {', '.join(allowed) or 'nothing'}"
            )
    changed = []
    for method in methods:
        mine = {name: value for name, value in changes.items() if name in method.config.runtime_fields()}
        if mine:
            changed.append((method, method.config, method.config.replace(**mine)))
    for method, _, new in changed:
        method.config = new
    try:
        yield model
    finally:
        for method, old, _ in changed:
            method.config = old


@contextlib.contextmanager
def watching(model: nn.Module, around: Callable[[AttentionContext], Tensor]) -> Iterator[nn.Module]:
    """Inside this block every patched layer calls `around(ctx)`, which may call its methods by `ctx.attend()`."""
    attachments = [attachment_of(site.module) for site in record_of(model).patched]
    before = [attachment.around for attachment in attachments]
    for attachment in attachments:
        attachment.around = around
    try:
        yield model
    finally:
        for attachment, kept in zip(attachments, before):
            attachment.around = kept


def patch_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The patch's own parameters, by their name in the model."""
    record = record_of(model)
    root = root_of(model)
    prefixes = tuple(f"{site.name}.patchattn." for site in record.patched)
    return {name: parameter for name, parameter in root.named_parameters() if name.startswith(prefixes)}


def patch_state(model: nn.Module) -> dict[str, Tensor]:
    """The patch's own parameters and persistent buffers, by their name in the model."""
    sites = record_of(model).patched
    return {
        name: tensor for site in sites for name, tensor in own_state(site, attachment_of(site.module).methods).items()
    }


def methods_on(model: nn.Module) -> list[Method]:
    """The methods on all patched layers, in the order of the model."""
    return [method for site in record_of(model).patched for method in attachment_of(site.module).methods]


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """What the methods add to the loss of the last forward, by name: each the mean over the layers that have it.

    The terms are weighted already, and given once: asked again before the next forward, there are none.
    """
    found: dict[str, list[Tensor]] = {}
    for method in methods_on(model):
        for name, value in method.auxiliary_losses().items():
            found.setdefault(name, []).append(value)
    return {name: _stacked(values).mean() for name, values in found.items()}


def aux_loss(model: nn.Module) -> Tensor:
    """The sum of `auxiliary_losses`, to be added to the loss while training; 0 if there are none."""
    return _stacked(list(auxiliary_losses(model).values()) or [torch.zeros(())]).sum()


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values])  # layers may be on different devices


def freeze_base(model: Model) -> Model:
    """Let only the patch's own parameters take gradients, as before a distillation."""
    own = {id(parameter) for parameter in patch_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    return model


def plan_of(model: nn.Module) -> list[dict[str, Any]]:
    """The patch as JSON-ready data: a list of `{"layers": names, "methods": [...]}`."""
    return [
        {"layers": names, "methods": [describe(method) for method in methods]}
        for _, names, methods in record_of(model).plan
    ]
