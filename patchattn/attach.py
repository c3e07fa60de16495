"""Put methods on a model's attention and take them off again, through transformers' own extension points.

`patch` switches the model's attention implementation to "patchattn", a pair of functions registered beside
"sdpa" and "eager": one for attention, one for masks. A pre-hook on each attention module notes what the call
is about (hidden states, cache, rotary) and the registered function asks the methods on that module. A module
without a method runs what ran before.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _compat
from .context import Attachment, AttentionContext, ModelInputs
from .masks import mask_function
from .method import Method, as_methods, checked_fields, describe
from .reading import forward_function, read_forward
from .sites import Site, default_sites, find_sites, select

IMPLEMENTATION = "patchattn"
Model = TypeVar("Model", bound=nn.Module)


class ConfigCopy:
    """A config that only one model sees, in place of one that others may share."""

    def __init__(self, old: Any, inner: dict[str, Any]) -> None:
        self.old, self.new = old, copy.copy(old)
        self.new.__dict__.update(inner)
        self.at_first = dict(vars(self.new))
        self.places: list[tuple[nn.Module, str]] = []  # modules, and the attribute that names the config

    def put_back(self) -> None:
        """The shared config again, with what the user has changed on the copy meanwhile."""
        for module, key in self.places:
            if module.__dict__.get(key) is self.new:
                module.__dict__[key] = self.old
        for key, value in vars(self.new).items():
            if key != "_attn_implementation_internal" and (key not in self.at_first or self.at_first[key] is not value):
                self.old.__dict__[key] = value


class Patch:
    """What `patch` did to a model; kept on the model as `_patchattn_patch`."""

    def __init__(self) -> None:
        self.plan: list[tuple[str, list[str], list[Method]]] = []  # selector, layer names, methods as given
        self.configs: list[ConfigCopy] = []
        self.implementations: list[tuple[Any, str]] = []  # configs that say "patchattn", and what stood there
        self.sites: list[Site] = []  # every attention module of the touched configs
        self.base_model: str | None = None
        self.base_revision: str | None = None

    @property
    def patched(self) -> list[Site]:
        return [site for site in self.sites if attachment_of(site.module).methods]


# ---- finding our way ---------------------------------------------------------------------------------------


def root_of(model: nn.Module) -> nn.Module:
    """The transformers or diffusers model inside PEFT, DDP or torch.compile wrappers."""
    seen = set()
    while id(model) not in seen:
        seen.add(id(model))
        if hasattr(model, "get_base_model"):  # PeftModel
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "config"):  # DDP
            model = model.module
    return model


def patch_of(model: nn.Module) -> Patch | None:
    """The record that `patch` left on this model, or None."""
    return root_of(model).__dict__.get("_patchattn_patch")


def attachment_of(module: nn.Module) -> Attachment:
    return module.__dict__["_patchattn"]


def record_of(model: nn.Module) -> Patch:
    patch = patch_of(model)
    if patch is None:
        raise ValueError(f"this {type(root_of(model)).__name__} is not patched; call patchattn.patch first")
    return patch


# ---- patch and unpatch -------------------------------------------------------------------------------------


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
    plan = _resolve(sites, _as_plan(what, layers))
    ready: list[tuple[Site, list[Method]]] = []
    for _, chosen, methods in plan:
        for order, site in enumerate(chosen):
            own = [type(method)(method.config) for method in methods]
            for method in own:
                method.build(replace(site, order=order))
            ready.append((site, own))
    if check is not None:
        check({name: tensor for site, copies in ready for name, tensor in _own_state(site, copies).items()})
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


def unpatch(model: Model) -> Model:
    """Take the patch off, in place, and return the model: bit for bit what it was before."""
    record = record_of(model)
    _remove(root_of(model), record)
    return model


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
        root.register_forward_pre_hook(_before_model, with_kwargs=True)
        root.register_forward_hook(_after_model, always_call=True)


def _attach(root: nn.Module, site: Site, methods: list[Method]) -> None:
    module = site.module
    base = site.config._attn_implementation or "sdpa"
    attachment = Attachment(site, base, _base_function(module, base))
    module.__dict__["_patchattn"] = attachment
    module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    if site.pieces:
        module.register_forward_hook(_after_attention, always_call=True)
    if not methods:
        return
    attachment.methods = methods
    module.add_module("patchattn", nn.ModuleList(methods))
    module.patchattn.to(site.device)
    module.patchattn.train(module.training)
    attachment.raw = any(method.rotary == "raw" for method in methods)
    attachment.rotary_function = _rotary_function(module)
    attachment.rotary_embedding = _rotary_embedding(root, site.name)
    names = forward_function(module).__code__.co_names
    attachment.splits_rotary = any("rotary_ndims" in name or "rotary_dim" in name for name in names)
    _capture(root, site)


def _capture(root: nn.Module, site: Site) -> None:
    """Hooks that note what the methods on this module need beside q, k and v."""
    module, attachment = site.module, attachment_of(site.module)
    methods = attachment.methods
    for need in sorted({need for method in methods for need in method.needs} - {"model_inputs"}):
        if need == "residual":
            parent = root.get_submodule(site.name.rpartition(".")[0])
            parent.register_forward_pre_hook(_Residual(attachment), with_kwargs=True)
        elif isinstance(getattr(module, need, None), nn.Module):
            getattr(module, need).register_forward_hook(_Projection(attachment, need))
        else:
            raise ValueError(f"{site.name} has no projection {need!r}, which {methods[0].name} needs")


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
                return getattr(parent, candidate)  # type: ignore[no-any-return]
    return None


def _switch_implementation(model: nn.Module, record: Patch) -> None:
    """Point the touched modules, and their owners that make the masks, at patchattn.

    A config object may be shared with other models, so this model gets copies of those that change, and of
    those that contain them.
    """
    register()
    touched = {id(site.config) for site in record.sites if site.family == "interface"}
    drawn = {id(site.config) for site in record.sites if site.draws_mask}
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
    """The name of our attention with the masks of another, for modules that compute with the mask themselves."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"{IMPLEMENTATION}_{base}"
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _remove(root: nn.Module, record: Patch) -> None:
    from .checkpoint import undo_saving
    from .families import diffusers

    for made in record.configs:
        made.put_back()
    for site in record.sites:
        module = site.module
        if site.family == "diffusers":
            diffusers.detach(site)
        _drop_hooks(module)
        for child in module.children():
            _drop_hooks(child)
        if "." in site.name:
            _drop_hooks(root.get_submodule(site.name.rpartition(".")[0]))
        module.__dict__.pop("_patchattn", None)
        module._modules.pop("patchattn", None)
    _drop_hooks(root)
    root.__dict__.pop("_patchattn_patch", None)
    undo_saving(root)


def _drop_hooks(module: nn.Module) -> None:
    """Remove our hooks, recognised by function, so that copies of a patched model can be unpatched too."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        ours = [key for key, hook in table.items() if getattr(hook, "_patchattn_hook", False)]
        for key in ours:
            del table[key]  # type: ignore[attr-defined]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


# ---- while the model runs ----------------------------------------------------------------------------------


def register() -> None:
    """Add "patchattn" to transformers' tables of attention and mask functions: always both."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention side of the "patchattn" implementation: what every touched module calls."""
    attachment = module.__dict__.get("_patchattn")
    if attachment is None:
        raise RuntimeError(
            f"{type(module).__name__} shares its config with a patched module but was added or copied after patch; "
            "call patchattn.unpatch and patch again"
        )
    ctx = attachment.context
    if not attachment.site.pieces:
        attachment.context = None
    if ctx is None:
        ctx = AttentionContext(module, attachment)
    ctx.take(query, key, value, attention_mask, kwargs)
    if attachment.methods and not torch.compiler.is_compiling():
        attachment.calls += 1
    out = ctx.attend()
    if attachment.captured:
        attachment.captured.clear()
    return out.contiguous(), ctx.weights  # many modules view the result


def _after_attention(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__["_patchattn"].context = None


def _before_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    attachment: Attachment = module.__dict__["_patchattn"]
    if not attachment.enabled:
        return None
    ctx = AttentionContext(module, attachment)
    attachment.context = ctx
    ctx._hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else (args[0] if args else None)
    cache = None
    for name in _compat.CACHE_ARGUMENTS:
        if name in kwargs:
            cache = kwargs[name]
            break
    if cache is not None:
        _note_cache(ctx, attachment, cache)
    if attachment.raw:
        return _neutral_rotary(ctx, args, kwargs)
    return None


def _note_cache(ctx: AttentionContext, attachment: Attachment, cache: Any) -> None:
    """Length and kind of this layer's cache before the call; puts the method's own cache layer in place."""
    cache = getattr(cache, "self_attention_cache", cache)
    index, layers = attachment.site.cache_index, cache.layers
    if index is not None and len(layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    if index is None or len(layers) <= index or not hasattr(layers[index], "get_seq_length"):
        ctx.past_length = None  # the keys are kept elsewhere; the mask will tell how many there are
        return
    layer = layers[index]
    own = getattr(layer, "expect", None)
    if own is None and attachment.methods:
        replacement = _own_layer(attachment, layer)
        if replacement is not None:
            layers[index] = layer = replacement
            own = layer.expect
    queries = ctx._hidden_states.shape[1] if ctx._hidden_states is not None else 1
    past = layer.get_seq_length()
    if isinstance(past, Tensor):
        ctx.past_length, ctx.static = past.clone(), True  # `update` counts on in place
        ctx.key_offset = _compat.key_offset(layer, queries)
    else:
        ctx.past_length = past
        if getattr(layer, "is_sliding", False):
            ctx.key_offset = _compat.key_offset(layer, queries)
        ctx.static = getattr(layer, "max_cache_len", None) is not None
    if own is not None:
        if not attachment.methods:
            raise RuntimeError(f"{attachment.site.name}: this cache was made under another patch; start with a new one")
        ctx.cache = layer
        own()
    if not torch.compiler.is_compiling():
        attachment.last_cache = weakref.ref(layer)


def _own_layer(attachment: Attachment, layer: Any) -> Any:
    static = getattr(layer, "max_cache_len", None)
    made = None
    for method in attachment.methods:
        made = method.cache_layer(static) if made is None else made
    if made is None:
        return None
    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "StaticLayer"):
        raise ValueError(
            f"{attachment.site.name}: {attachment.methods[-1].name} keeps its own cache and cannot replace a {kind}; "
            "use the default or a static cache"
        )
    if int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"{attachment.site.name}: this cache already holds {int(layer.get_seq_length())} tokens of the unpatched "
            "model; start with a new cache"
        )
    return made


def _neutral_rotary(ctx: AttentionContext, args: Any, kwargs: dict[str, Any]) -> Any:
    """Hand the module cos = 1 and sin = 0, so that it leaves q and k as they are, bit for bit."""
    given = kwargs.get("position_embeddings")
    if given is None and len(args) > 1:
        given = args[1]
    if not (isinstance(given, tuple) and len(given) == 2):
        raise RuntimeError(f"{ctx.attachment.site.name}: expected rotary as (cos, sin), got {type(given).__name__}")
    ctx.position_embeddings = given
    cos, sin = given
    neutral = (torch.ones_like(cos), torch.zeros_like(sin))
    if "position_embeddings" in kwargs:
        return args, {**kwargs, "position_embeddings": neutral}
    return (args[0], neutral, *args[2:]), kwargs


class _Residual:
    """Pre-hook on a decoder layer: notes the residual stream for the attention module inside it."""

    _patchattn_hook = True

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.attachment.captured["residual"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class _Projection:
    """Hook on a projection: notes its raw output."""

    _patchattn_hook = True

    def __init__(self, attachment: Attachment, name: str) -> None:
        self.attachment, self.name = attachment, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.attachment.captured[self.name] = output


def _before_model(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    values = dict(kwargs)
    if args:
        values.update(zip(list(inspect.signature(forward_function(model)).parameters)[1:], args, strict=False))
    inputs = ModelInputs(getattr(model, "config", None), values)
    for site in model.__dict__["_patchattn_patch"].sites:
        attachment_of(site.module).model_inputs = inputs


def _after_model(model: nn.Module, args: Any, output: Any) -> None:
    for site in model.__dict__["_patchattn_patch"].sites:
        attachment = attachment_of(site.module)
        attachment.model_inputs = None
        attachment.captured.clear()


for _hook in (_before_attention, _after_attention, _before_model, _after_model):
    _hook._patchattn_hook = True  # type: ignore[union-attr]


# ---- living with a patched model ---------------------------------------------------------------------------


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
def settings(model: nn.Module, **changes: Any) -> Iterator[nn.Module]:
    """Inside this block some settings of the methods are changed, without patching again.

    Only the fields that a method declares as run-time settings may change; every method that has a field of
    that name takes the new value.
    """
    record = record_of(model)
    methods = [method for site in record.patched for method in attachment_of(site.module).methods]
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
        name: tensor for site in sites for name, tensor in _own_state(site, attachment_of(site.module).methods).items()
    }


def _own_state(site: Site, methods: Sequence[Method]) -> dict[str, Tensor]:
    return nn.ModuleList(methods).state_dict(prefix=f"{site.name}.patchattn.", keep_vars=True)


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


__all__ = [
    "apply_plan", "checked_fields", "disabled", "freeze_base", "patch", "patch_of", "patch_parameters", "plan_of",
    "register", "root_of", "settings", "unpatch",
]  # fmt: skip
