"""What a stage does to the model before its training and after it.

`prepare` decides which parameters learn and gives what the Trainer trains; `finish` leaves an ordinary patched model
again. Both are repeated when a run is resumed, so they depend on nothing but the stage and the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .. import duo
from ..attach import patch, unpatch
from ..living import freeze_base, patch_parameters
from ..record import attachment_of, patch_of, record_of, root_of
from .objectives import EndToEnd, HeadSearch, Transfer
from .schema import AttentionTransfer, IdentifyHeads, Lora, Stage, Trained
from .tasks import Task

Objective = Transfer | EndToEnd | HeadSearch


@dataclass
class Prepared:
    """A model that is ready to be trained, and what its training minimises."""

    model: nn.Module  # the PeftModel in a LoRA stage, else the model itself
    objective: Objective
    lent: bool = False  # the patch is there for this stage alone


def prepare(model: nn.Module, stage: Stage, task: Task) -> Prepared:
    """Choose the parameters that learn; wrap or patch the model where the stage asks for it."""
    if isinstance(stage, IdentifyHeads):
        patch(model, duo.HeadGates(sink=stage.sink, recent=stage.recent, teacher_branch=stage.teacher_branch))
        _in_full_precision(freeze_base(model))
        return Prepared(model, HeadSearch(model, task, stage))
    lent = isinstance(stage, Trained) and bool(stage.losses.get("sink")) and patch_of(model) is None
    if lent:  # attention weights are only seen where there is a patch
        patch(model, "dense")
    if isinstance(stage, Lora):
        wrapped = _with_adapters(model, stage)
        return Prepared(wrapped, EndToEnd(wrapped, task, stage), lent)
    if isinstance(stage, AttentionTransfer):
        _require_parameters(model, stage)
        _in_full_precision(freeze_base(model))
        return Prepared(model, Transfer(model, task, stage))
    assert isinstance(stage, Trained)
    chosen = getattr(stage, "parameters", "all")
    if chosen == "patch":
        _require_parameters(model, stage)
    _let_learn(model, chosen, stage.kind)
    return Prepared(model, EndToEnd(model, task, stage), lent)


def finish(prepared: Prepared, stage: Stage) -> tuple[nn.Module, Any]:
    """The model without what the stage put around it, and adapters that are kept beside the patch."""
    model = prepared.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if prepared.lent:
        unpatch(root_of(model))
    if isinstance(stage, Lora):
        wrapped: Any = model
        return (wrapped.merge_and_unload(), None) if stage.merge else (wrapped.get_base_model(), wrapped)
    if isinstance(stage, IdentifyHeads):
        assert isinstance(prepared.objective, HeadSearch)
        gates = torch.stack([gate.detach().float().cpu() for gate in prepared.objective.gates])
        unpatch(model)
        sink = stage.sink if stage.deploy_sink is None else stage.deploy_sink
        recent = stage.recent if stage.deploy_recent is None else stage.deploy_recent
        pattern = {"heads": duo.as_rows(gates.clamp(0, 1)), "share": stage.share, "sink": sink, "recent": recent}
        patch(model, {"method": "duo_attention", **pattern})
    return model, None


def changes_base(stage: Stage) -> bool:
    """Whether the stage leaves other weights in the base model, so that the patch alone is not its result."""
    if isinstance(stage, Lora):
        return stage.merge
    return getattr(stage, "parameters", "patch") != "patch"


def rate_of(name: str, rates: dict[str, float]) -> float:
    """The factor on the learning rate of a parameter: that of the last glob it matches."""
    factors = [factor for pattern, factor in rates.items() if fnmatchcase(name, pattern)]
    return factors[-1] if factors else 1.0


def _with_adapters(model: nn.Module, stage: Lora) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("a lora stage needs peft; install it with: pip install 'patchattn[train]'") from error
    config = LoraConfig(r=stage.rank, lora_alpha=stage.alpha, lora_dropout=stage.dropout, target_modules=stage.targets)
    wrapped = get_peft_model(model, config)
    if stage.patch and patch_of(model) is not None:
        for parameter in patch_parameters(model).values():
            parameter.requires_grad_(True)
    _in_full_precision(wrapped)
    return wrapped


def _require_parameters(model: nn.Module, stage: Stage) -> None:
    if patch_of(model) is None or not patch_parameters(model):
        methods = [] if patch_of(model) is None else record_of(model).patched
        names = sorted({method.name for site in methods for method in attachment_of(site.module).methods})
        what = f"{', '.join(names)} has none" if names else "the model is not patched"
        raise ValueError(f"{stage.kind}: there are no parameters of a patch to train: {what}; use stage tune or lora")


def _let_learn(model: nn.Module, chosen: str | Iterable[str], kind: str) -> None:
    if chosen == "patch":
        _in_full_precision(freeze_base(model))
        return
    patterns = ["*"] if chosen == "all" else [chosen] if isinstance(chosen, str) else list(chosen)
    names = [name for name, parameter in root_of(model).named_parameters() if parameter.is_floating_point()]
    for pattern in patterns:
        if pattern != "patch" and not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(names[:3])
            raise ValueError(f"{kind}: parameters {pattern!r} matches none of the model's, such as {examples}")
    own = set(patch_parameters(model)) if patch_of(model) is not None else set()
    for name, parameter in root_of(model).named_parameters():
        learns = any(fnmatchcase(name, pattern) or (pattern == "patch" and name in own) for pattern in patterns)
        parameter.requires_grad_(learns and parameter.is_floating_point())


def _in_full_precision(model: nn.Module) -> None:
    """The few parameters that learn are kept in float32: small steps are lost in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
