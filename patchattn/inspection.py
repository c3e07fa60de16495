"""What could be patched on a model, and why not what could not: `patchattn.inspect`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attach import unfit
from .method import Method, as_methods, describe, methods
from .reading import forward_function
from .record import Patch, attachment_of, patch_of, root_of
from .running import IMPLEMENTATION
from .sites import OUTPUT_PROJECTIONS, Site, default_sites, find_sites, speaks_interface
from .tables import Report, add_row, all_but_name, grouped, names_text, note, setting_text, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class Module:
    """One attention module that patchattn reaches.

    Attributes:
        default: whether `patch` takes it when no layers are named.
        gate: the projection that gates its output already, or None.
        patched: the methods on it now, outermost first.
    """

    name: str
    kind: str
    layer: int | None
    family: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    causal: bool
    window: int | None
    default: bool
    gate: str | None
    patched: list[dict[str, Any]]


@dataclass(frozen=True)
class Fit:
    """How one method would sit on the model.

    Attributes:
        settings: those that are not the method's defaults.
        parameters: how many new parameters on each module that it fits, by module name.
        problems: why not, by name of each module that it does not fit.
    """

    method: str
    settings: dict[str, Any]
    trained: bool
    parameters: dict[str, int]
    problems: dict[str, str]


@dataclass(frozen=True)
class Unreachable:
    """A module that looks like attention and cannot be patched."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Inspection(Report):
    """What `inspect` found. Printed, layers that are alike share a row."""

    model: str
    base: str | None
    modules: list[Module]
    fits: list[Fit]
    unreachable: list[Unreachable]
    warnings: list[str]

    def parts(self) -> list[RenderableType]:
        parts: list[RenderableType] = []
        title = f"{self.model} ({self.base})" if self.base else self.model
        if self.modules:
            columns = ("attention", "class", "heads × size", "KV", "causal", "window", "by default", "patched now")
            found = table(*columns, title=title)
            for names, row in grouped(self.modules, all_but_name):
                now = " over ".join(method["method"] for method in row.patched)
                add_row(found, names, row.kind, f"{row.heads} × {row.head_dim}", row.kv_heads, row.causal,
                        row.window, row.default, now or None)  # fmt: skip
            parts += [found, self._fit_table()]
        if self.unreachable:
            missed = table("cannot be patched", "class", "because", title=None if self.modules else title)
            for names, item in grouped(self.unreachable, all_but_name):
                add_row(missed, names, item.kind, item.reason)
            parts.append(missed)
        return parts + [note(f"warning: {warning}") for warning in self.warnings]

    def _fit_table(self) -> Table:
        """What each method would do to the layers that `patch` takes by default, and where it does not fit."""
        rows = table("method", "fits", "new parameters", "trained", "does not fit")
        usual = {row.name for row in self.modules if row.default}
        for fit in self.fits:
            added = sum(count for name, count in fit.parameters.items() if name in usual)
            places: dict[str, list[Module]] = {}
            for row in self.modules:
                if row.name in fit.problems:
                    places.setdefault(fit.problems[row.name], []).append(row)
            reasons = "; ".join(f"{names_text(at)}: {reason}" for reason, at in places.items())
            add_row(rows, setting_text({"method": fit.method, **fit.settings}),
                    f"{len(fit.parameters)} of {len(self.modules)}", added or "none", fit.trained, reasons)  # fmt: skip
        return rows


def inspect(model: nn.Module, what: Any = None) -> Inspection:
    """Which attention modules `model` has, which methods fit them, and why not where not.

    Changes nothing and needs no weights: a model made under `torch.device("meta")` will do.

    Args:
        model: any transformers or diffusers model, patched or not.
        what: the methods to try, given as to `patch`; default: all that are registered.
    """
    root = root_of(model)
    sites = find_sites(root)
    usual = {site.name for site in default_sites(sites)}
    modules = [_module(site, site.name in usual) for site in sites]
    tried = [cls(**v) for cls in methods().values() for v in cls.variants] if what is None else as_methods(what)
    return Inspection(
        model=type(root).__name__,
        base=getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        modules=modules,
        fits=[_fit(sites, method) for method in tried] if sites else [],
        unreachable=list(unreachable(root, sites)),
        warnings=list(_warnings(root, modules)),
    )


def described(method: Method) -> dict[str, Any]:
    """A method as data, also one that is not registered."""
    return {**describe(method), "method": method.name or type(method).__name__}


def _module(site: Site, default: bool) -> Module:
    names = {entry.name for entry in dataclasses.fields(Module)} & set(vars(site))
    attachment = site.module.__dict__.get("_patchattn")
    return Module(
        **{name: getattr(site, name) for name in names},
        kind=type(site.module).__name__,
        layer=site.layer_idx,
        default=default,
        gate=_own_gate(site.module),
        patched=[described(method) for method in attachment.methods] if attachment is not None else [],
    )


# ---- methods -----------------------------------------------------------------------------------------------


def _fit(sites: Sequence[Site], method: Method) -> Fit:
    problems = {site.name: reason for site in sites if (reason := unfit(site, [method])) is not None}
    fitting = [site for site in sites if site.name not in problems]
    usual = {site.name for site in default_sites(fitting)}
    total = max(len(default_sites(sites)), 1 + max((s.layer_idx for s in sites if s.layer_idx is not None), default=-1))
    parameters: dict[str, int] = {}
    # What `patch` takes by itself, then what could be named: settings such as a pattern are for one of the two.
    for group in ([s for s in fitting if s.name in usual], [s for s in fitting if s.name not in usual]):
        try:
            config = method.config.resolve(group, total) if group else method.config
            parameters.update({site.name: _added(type(method)(config), site, i) for i, site in enumerate(group)})
        except (ValueError, OSError) as error:
            problems.update({site.name: str(error) for site in group if site.name not in parameters})
    return Fit(described(method)["method"], _changed(method), type(method).trained, parameters, problems)


def _changed(method: Method) -> dict[str, Any]:
    """The settings of a method that are not its defaults."""
    usual = {entry.name: entry.default for entry in dataclasses.fields(method.config)}
    return {name: value for name, value in method.config.to_dict().items() if value != usual[name]}


class _Weightless(Site):
    """A site whose new parameters are made on the meta device, where they take no memory."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def _added(method: Method, site: Site, order: int) -> int:
    values = {entry.name: getattr(site, entry.name) for entry in dataclasses.fields(site)}
    with torch.device("meta"):
        method.build(_Weightless(**{**values, "order": order}))
    return sum(parameter.numel() for parameter in method.parameters())


# ---- modules -----------------------------------------------------------------------------------------------


def _own_gate(module: nn.Module) -> str | None:
    """The projection from which a module gates its own output, known by its name or its shape."""
    linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for name in linear:
        if re.search(r"(^|_)gate(_|$)", name) or name == "g_proj":
            return name
    out = next((linear[name] for name in OUTPUT_PROJECTIONS if name in linear), None)
    query = linear.get("q_proj")
    if out is not None and query is not None and query.out_features == 2 * out.in_features:
        return "q_proj"  # queries and gates in one projection
    return None


def unreachable(root: nn.Module, sites: Sequence[Site]) -> Iterator[Unreachable]:
    """Sites with a problem, and the innermost modules named after attention that are no site, in none, around none."""
    names = [site.name for site in sites]
    for site in sites:
        if site.problem is not None:
            yield Unreachable(site.name, type(site.module).__name__, site.problem)
    for name, module in root.named_modules():
        related = any(f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.") for other in names)
        if "Attention" not in type(module).__name__ or related:
            continue
        if not any("Attention" in type(child).__name__ for child in module.modules() if child is not module):
            yield Unreachable(name, type(module).__name__, _why_unreachable(module))


def _why_unreachable(module: nn.Module) -> str:
    if speaks_interface(module):
        return "it asks AttentionInterface but has no config that says which attention to run"
    parts = {name.rpartition(".")[2] for name, _ in [*module.named_modules(), *module.named_parameters()]}
    if parts & {"A_log", "conv1d", "q_conv1d", "short_conv"}:
        return "it is recurrent: it keeps a state and has no keys to attend to"
    if "relative_attention_bias" in parts:
        return "it adds a relative position bias in a forward of its own and does not ask AttentionInterface"
    if {"alibi", "position_bias"} & set(signature(forward_function(module)).parameters):
        return "it adds a position bias to its scores in a forward of its own and does not ask AttentionInterface"
    if type(module).__module__.startswith("transformers_modules."):
        return "remote code with an attention of its own; use the model's class in transformers if there is one"
    return "its forward computes attention by itself and does not ask AttentionInterface"


def _warnings(root: nn.Module, modules: Sequence[Module]) -> Iterator[str]:
    gated = [row for row in modules if row.gate is not None]
    if gated:
        yield (f"already gated: {names_text(gated)} ({gated[0].kind}) gate their own output, with {gated[0].gate}; "
               "a method that gates would add a second gate")  # fmt: skip
    if not modules:
        yield f"nothing in {type(root).__name__} can be patched"
    record = patch_of(root)
    if record is not None:
        yield from bypassed(record)


def bypassed(record: Patch) -> Iterator[str]:
    """Says where somebody switched the model to another attention implementation after it was patched."""
    for config, _ in record.implementations:
        current = config._attn_implementation
        enabled = any(
            attachment_of(s.module).enabled for s in record.sites if getattr(s.module, "config", None) is config
        )
        if not current.startswith(IMPLEMENTATION) and enabled:
            yield (f"{type(config).__name__}: the attention implementation was set to {current!r} after patch, so the "
                   f"patch is not asked; call model.set_attn_implementation({IMPLEMENTATION!r})")  # fmt: skip
