"""Put methods on a model's attention and take them off again, through transformers' own extension points.

`patch` switches the model's attention implementation to "patchattn", a pair of functions registered beside
"sdpa" and "eager": one for attention, one for masks. A pre-hook on each attention module notes what the call
is about (hidden states, cache, rotary) and the registered function asks the methods on that module. A module
without a method runs what ran before.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from . import _compat
from .context import Attachment
from .masks import know_window
from .method import Method, as_methods
from .reading import forward_function, read_forward
from .record import ConfigCopy, Patch, attachment_of, patch_of, record_of, root_of
from .running import (
    IMPLEMENTATION,
    Residual,
    after_attention,
    after_model,
    attention_function,
    before_attention,
    before_model,
    capture_projections,
    register,
)
from .sites import Site, default_sites, find_sites, select

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, what: Any, layers: Any = None) -> Model:
    """Swap the attention of `model` in place, and return it.

    Args:
        model: a transformers or diffusers model, also inside PEFT or accelerate wrappers.
        what: a method such as `patchattn.DuoAttention(sink=64)`, its name, a list of methods (outermost
            first), or a plan `{selector: method or list}` that names layers.
        layers: which layers, when `what` is no plan: `"0-11"`, `"even"`, `[0, 5]`, `"*.self_attn"`, ...
            Default: every causal self-attention layer that the method fits, or in an encoder every layer.

    Either everything is patched or, with an error, nothing is touched.
    """
    return _patch(model, what, layers, None)


def _patch(model: Model, what: Any, layers: Any, check: Callable[[dict[str, Tensor]], None] | None) -> Model:
    root = root_of(model)
    if patch_of(model) is not None:
        raise ValueError(
            "this model is patched already; to replace the patch call patchattn.unpatch(model) first, to compose "
            "methods give them as one list: patchattn.patch(model, [GatedAttention(), DuoAttention()])"
        )
    sites = find_sites(root)
    if not sites:
        raise ValueError(_nothing_to_patch(root))
    for site in sites:
        if site.family == "interface" and str(site.config._attn_implementation).startswith(IMPLEMENTATION):
            raise ValueError(
                f"{site.name} has the config of a patched model; make this one from a config that was never patched, "
                "or unpatch the other first"
            )
    plan = [
        (selector, chosen, [type(method)(method.config.measure(root)) for method in methods])
        for selector, chosen, methods in _resolve(sites, _as_plan(what, layers))
    ]
    ready: list[tuple[Site, list[Method]]] = []
    for _, chosen, methods in plan:
        for order, site in enumerate(chosen):
            own = [type(method)(method.config) for method in methods]
            for method in own:
                method.build(replace(site, order=order))
            ready.append((site, own))
    if check is not None:
        check({name: tensor for site, copies in ready for name, tensor in own_state(site, copies).items()})
    record = Patch()
    record.plan = [(selector, [site.name for site in chosen], methods) for selector, chosen, methods in plan]
    config = getattr(root, "config", None)
    record.base_model = getattr(config, "_name_or_path", None) or None
    record.base_revision = getattr(config, "_commit_hash", None)
    try:
        _apply(model, record, sites, ready)
    except BaseException:
        _remove(root, record)
        raise
    return model


def _nothing_to_patch(root: nn.Module) -> str:
    from .inspection import unreachable

    text = f"{type(root).__name__} has no attention module that patchattn can reach"
    missed = list(unreachable(root, []))
    if not missed:
        return f"{text}: it has no module that is named after attention"
    more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
    return f"{text}: {missed[0].name}{more}, a {missed[0].kind}: {missed[0].reason}"


def unpatch(model: Model, layers: Any = None) -> Model:
    """Take the patch off, in place, and return the model: bit for bit what it was before.

    Args:
        layers: of these alone, as for `patch`; on the others it stays as it is, with all that it learned.
    """
    record, root = record_of(model), root_of(model)
    leaving = {site.name for site in record.patched}
    if layers is not None:
        leaving &= {site.name for site in select(find_sites(root), layers)}
        if not leaving:
            raise ValueError(f"unpatch: none of the layers {layers!r} is patched; patched are "
                             f"{', '.join(site.name for site in record.patched)}")  # fmt: skip
    if len(leaving) == len(record.patched):
        _remove(root, record)
    else:
        _thin(root, record, leaving)
    return model


def _thin(root: nn.Module, record: Patch, leaving: set[str]) -> None:
    """Take the methods off some modules of a patch, which are from then on like modules that it never named."""
    thinned = []
    for selector, names, methods in record.plan:
        places = [place for place, name in enumerate(names) if name not in leaving]
        if len(places) < len(names):
            methods = [type(method)(method.config.part(places)) for method in methods]
            selector = ", ".join(names[place] for place in places)
        if places:
            thinned.append((selector, [names[place] for place in places], methods))
    record.plan = thinned
    for site in [site for site in record.sites if site.name in leaving]:
        old = attachment_of(site.module)
        _clear(root, site)
        if site.family == "diffusers":
            record.sites.remove(site)
        else:
            _hook(site.module, Attachment(site, old.base, old.base_function))


def _as_plan(what: Any, layers: Any) -> list[tuple[Any, list[Method], bool]]:
    """Selector, methods, and whether the user named the layers."""
    if isinstance(what, dict) and "method" not in what:
        if layers is not None:
            raise ValueError("layers was given together with a plan; a plan names its layers by itself")
        if not what:
            raise ValueError("an empty plan; give {selector: method}")
        return [(selector, as_methods(item), True) for selector, item in what.items()]
    return [("default" if layers is None else layers, as_methods(what), layers is not None)]


def _resolve(sites: Sequence[Site], plan: Sequence[tuple[Any, list[Method], bool]]) -> list[Any]:
    """Layers chosen, methods filled in and checked against them; raises before anything is touched."""
    result, taken = [], {}  # type: ignore[var-annotated]
    total = max(len(default_sites(sites)), 1 + max((s.layer_idx for s in sites if s.layer_idx is not None), default=-1))
    for selector, methods, named in plan:
        if len({type(method) for method in methods}) < len(methods):
            raise ValueError(f"the same method twice in one list: {', '.join(type(m).__name__ for m in methods)}")
        for method, follower in itertools.pairwise(methods):
            if method.innermost:
                raise ValueError(f"{method.name} computes attention itself, so {follower.name} after it in a list "
                                 f"would not run; put {method.name} last")  # fmt: skip
        chosen = select(sites, selector) if named else default_sites(sites)
        reasons = {site.name: reason for site in chosen if (reason := unfit(site, methods)) is not None}
        if reasons and (named or len(reasons) == len(chosen)):
            name, reason = next(iter(reasons.items()))
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise ValueError(f"{name}{more} cannot take {methods[0].name}: {reason}")
        chosen = [site for site in chosen if site.name not in reasons]
        if not chosen:
            problems = [f"; {site.name}: {site.problem}" for site in sites if site.problem is not None][:1]
            raise ValueError("there is no attention module left to patch" + "".join(problems)
                             + "; patchattn.inspect(model) says it of each")  # fmt: skip
        for site in chosen:
            if site.name in taken:
                raise ValueError(
                    f"{site.name} is named by two selectors of the plan: {taken[site.name]!r} and {selector!r}"
                )
            taken[site.name] = selector
        filled = [type(method)(method.config.resolve(chosen, total)) for method in methods]
        result.append((selector if isinstance(selector, str) else str(selector), chosen, filled))
    return result


def unfit(site: Site, methods: Sequence[Method]) -> str | None:
    """Why these methods cannot sit on this module, or None."""
    from .families import diffusers

    if site.problem is not None:
        return site.problem
    if site.family == "diffusers" and (reason := diffusers.unfit(site, methods)) is not None:
        return reason
    keeping = {type(method).cache_layer: method.name for method in methods}  # one function: they share what it makes
    keeping.pop(Method.cache_layer, None)
    if len(keeping) > 1:
        first, second = list(keeping.values())[:2]
        return f"{first} and {second} each keep a cache layer of their own, and a layer has one"
    for method in methods:
        if method.rotary == "raw" and (reason := _raw_problem(site)) is not None:
            return f"{method.name} needs q and k before rotary, but {reason}"
        if (reason := type(method).unfit(site, method.config)) is not None:
            return reason
    return None


def _raw_problem(site: Site) -> str | None:
    function = forward_function(site.module)
    if "position_embeddings" not in inspect.signature(function).parameters:
        return "this module is not handed its rotary (no position_embeddings argument)"
    if _rotary_function(site.module) is None:
        return "this module's rotary function was not found"
    return None


def _rotary_function(module: nn.Module) -> Any:
    function = forward_function(module)
    for name in function.__code__.co_names:
        if name.startswith("apply_") and "rotary" in name and callable(function.__globals__.get(name)):
            return function.__globals__[name]
    return None


def _apply(model: nn.Module, record: Patch, sites: Sequence[Site], ready: Sequence[tuple[Site, list[Method]]]) -> None:
    root = root_of(model)
    from .checkpoint import prepare_saving
    from .families import diffusers

    root.__dict__["_patchattn_patch"] = record
    prepare_saving(root)
    methods_of = {site.name: methods for site, methods in ready}
    configs = {id(site.config) for site, _ in ready if site.family == "interface"}
    for site in sites:
        if site.family == "interface" and id(site.config) in configs:
            record.sites.append(site)
            _attach(root, site, methods_of.get(site.name, []))
        elif site.name in methods_of:
            record.sites.append(site)
            diffusers.attach(site, methods_of[site.name])
            _capture(root, site)
    _switch_implementation(model, record)
    if any("model_inputs" in method.needs for _, methods in ready for method in methods):
        root.register_forward_pre_hook(before_model, with_kwargs=True)
        root.register_forward_hook(after_model, always_call=True)


def _attach(root: nn.Module, site: Site, methods: list[Method]) -> None:
    module = site.module
    base = site.config._attn_implementation or "sdpa"
    attachment = Attachment(site, base, _base_function(module, base))
    _hook(module, attachment)
    if not methods:
        return
    attachment.methods = methods
    module.add_module("patchattn", nn.ModuleList(methods).to(site.device).train(module.training))
    wanted = {method.rotary for method in methods}
    attachment.raw = "raw" in wanted or ("either" in wanted and _raw_problem(site) is None)
    attachment.rotary_function = _rotary_function(module)
    attachment.rotary_embedding = _rotary_embedding(root, site.name)
    names = forward_function(module).__code__.co_names
    attachment.splits_rotary = any("rotary_ndims" in name or "rotary_dim" in name for name in names)
    _capture(root, site)


def _hook(module: nn.Module, attachment: Attachment) -> None:
    module.__dict__["_patchattn"] = attachment
    module.register_forward_pre_hook(before_attention, with_kwargs=True)
    if attachment.site.pieces:
        module.register_forward_hook(after_attention, always_call=True)


def _capture(root: nn.Module, site: Site) -> None:
    """Hooks that note what the methods on this module need beside q, k and v."""
    module, attachment = site.module, attachment_of(site.module)
    methods = attachment.methods
    for need in sorted({need for method in methods for need in method.needs} - {"model_inputs"}):
        if need == "residual":
            parent = root.get_submodule(site.name.rpartition(".")[0])
            parent.register_forward_pre_hook(Residual(attachment), with_kwargs=True)
        elif isinstance(getattr(module, need, None), nn.Module):
            attachment.projections.append(need)
        else:
            raise ValueError(f"{site.name} has no projection {need!r}, which {methods[0].name} needs")
    capture_projections(module, attachment)


def _base_function(module: nn.Module, base: str) -> Any:
    scope = forward_function(module).__globals__
    table = scope["ALL_ATTENTION_FUNCTIONS"]
    if base == "eager":
        eager = scope.get(read_forward(forward_function(module)).eager)
        if eager is None:
            raise ValueError(f"{type(module).__name__}: its modelling file has no eager attention; load the model with "
                             'attn_implementation="sdpa"')  # fmt: skip
        return eager
    return table[base]


def _rotary_embedding(root: nn.Module, name: str) -> nn.Module | None:
    while name:
        name = name.rpartition(".")[0]
        parent = root.get_submodule(name) if name else root
        for candidate in ("rotary_emb", "rotary_embedding"):
            if isinstance(getattr(parent, candidate, None), nn.Module):
                return getattr(parent, candidate)
    return None


def _switch_implementation(model: nn.Module, record: Patch) -> None:
    """Point the touched modules, and their owners that make the masks, at patchattn.

    A config object may be shared with other models, so this model gets copies of those that change, and of
    those that contain them.
    """
    register()
    for site in record.sites:
        know_window(site.window)
    touched = {id(site.config) for site in record.sites if site.family == "interface"}
    drawn = {id(site.config) for site in record.sites if site.base_masks}
    copies: dict[int, ConfigCopy] = {}

    def isolated(config: Any) -> Any:
        if id(config) in copies:
            return copies[id(config)].new
        inner = {}
        for key in getattr(config, "sub_configs", None) or ():
            value = getattr(config, key, None)
            if value is not None and (new := isolated(value)) is not value:
                inner[key] = new
        if id(config) not in touched and not inner:
            return config
        made = copies[id(config)] = ConfigCopy(config, inner)
        if id(config) in touched:
            record.implementations.append((made.new, config._attn_implementation))
            base = config._attn_implementation
            made.new._attn_implementation_internal = _with_masks_of(base) if id(config) in drawn else IMPLEMENTATION
        return made.new

    if not touched:
        return
    isolated(root_of(model).config)
    for site in record.sites:
        if site.family == "interface":
            isolated(site.config)
    record.configs = list(copies.values())
    for module in model.modules():
        for key, value in vars(module).items():
            made = copies.get(id(value))
            if made is not None and made.old is value:
                made.places.append((module, key))
    for made in record.configs:
        for module, key in made.places:
            module.__dict__[key] = made.new


def _with_masks_of(base: str) -> str:
    """The name of our attention with the masks of another, for modules that need those."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"{IMPLEMENTATION}_{base}"
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _remove(root: nn.Module, record: Patch) -> None:
    from .checkpoint import undo_saving

    for made in record.configs:
        made.put_back()
    for site in record.sites:
        _clear(root, site)
    _drop_hooks(root)
    _compat.forget_static_cache(root)
    root.__dict__.pop("_patchattn_patch", None)
    undo_saving(root)


def _clear(root: nn.Module, site: Site) -> None:
    """Leave no trace of a patch on this module."""
    from .families import diffusers

    module = site.module
    attachment = module.__dict__.get("_patchattn")
    if site.family == "diffusers":
        diffusers.detach(site)
    for part in module.modules():  # also what adapters have been wrapped around
        _drop_hooks(part)
    if "." in site.name:
        _drop_hooks(root.get_submodule(site.name.rpartition(".")[0]), attachment)
    module.__dict__.pop("_patchattn", None)
    module._modules.pop("patchattn", None)


def _drop_hooks(module: nn.Module, attachment: Attachment | None = None) -> None:
    """Remove our hooks, recognised by function, so that copies of a patched model can be unpatched too.

    Args:
        attachment: not those that note something for another one than this.
    """
    for table in (module._forward_pre_hooks, module._forward_hooks):
        ours = [
            key for key, hook in table.items()
            if getattr(hook, "_patchattn_hook", False)
            and (attachment is None or getattr(hook, "attachment", attachment) is attachment)
        ]  # fmt: skip
        for key in ours:
            del table[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def own_state(site: Site, methods: Sequence[Method]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the methods on one module, by their name in the model."""
    return nn.ModuleList(methods).state_dict(prefix=f"{site.name}.patchattn.", keep_vars=True)


def apply_plan(
    model: Model, plan: Sequence[dict[str, Any]], check: Callable[[dict[str, Tensor]], None] | None = None
) -> Model:
    """Patch a model as `plan_of` described another of the same shape.

    Args:
        check: called with the patch's own tensors by their names in the model, before the model is touched; what
            it writes into them stays, and if it raises the model is as it was.
    """
    names = {site.name for site in find_sites(root_of(model))}
    for entry in plan:
        missing = [name for name in entry["layers"] if name not in names]
        if missing:
            raise ValueError(f"this patch was made for a model with the attention module {missing[0]!r}, which "
                             f"{type(root_of(model)).__name__} does not have")  # fmt: skip
    return _patch(model, {_Names(entry["layers"]): entry["methods"] for entry in plan}, None, check)


class _Names(tuple):  # type: ignore[type-arg]
    """A selector made of exact module names."""
