"""What a stage minimises: named terms, each already weighted, whose sum is the loss of a batch.

An objective is called with the model, as the Trainer wrapped it, and a batch. `share` is the part that a batch's mean
has in the whole optimizer step; `count` the number of targets in that step.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import duo
from ..context import first_token_mass
from ..living import auxiliary_losses, disabled, watching
from ..record import attachment_of, patch_of, record_of, root_of
from .tasks import IGNORED

if TYPE_CHECKING:
    from ..context import AttentionContext
    from .schema import AttentionTransfer, IdentifyHeads, Trained
    from .tasks import Batch, Task

Terms = dict[str, Tensor]
Backward = Callable[[Tensor], None]


class Transfer:
    """Every patched layer learns what the base attention gives on the same input; the base's output goes on.

    So the layers train independently of each other and the base takes no part in the backward pass. With
    `layerwise`, a layer's gradients are computed as soon as its loss is, and its graph is freed.
    """

    replicated = True  # the patch is whole on every process and its gradients are averaged by the Trainer

    def __init__(self, model: nn.Module, task: Task, stage: AttentionTransfer) -> None:
        self.root, self.task, self.layerwise = root_of(model), task, stage.layerwise
        self.kinds = {
            site.name: _transfer_kind(attachment_of(site.module).methods[0], stage.loss)
            for site in record_of(self.root).patched
        }
        self.losses: list[Tensor] | None = None  # of the forward that is going on
        self.noted: dict[str, list[Tensor]] = {}  # what methods say of themselves in an evaluation, layer by layer
        self.backward: Backward | None = None
        self.share = 1.0

    def __call__(self, model: nn.Module, batch: Batch, share: float, count: Any, backward: Backward | None) -> Terms:
        inputs = without_head(self.root, self.task.inputs(batch))
        self.losses, self.share = [], share / len(self.kinds)
        self.backward = backward if self.layerwise else None
        try:
            with watching(self.root, self._transfer):
                self.root(**inputs)
            return {"transfer": torch.stack(self.losses).sum()}
        finally:
            self.losses = self.backward = None

    def size(self, batch: Batch) -> int:
        """What a batch's mean is taken over."""
        return self.task.size(batch)

    def _transfer(self, ctx: AttentionContext) -> Tensor:
        target = ctx.base()
        loss = ctx.transfer_loss(target, self.kinds[ctx.attachment.site.name]) * self.share
        if self.backward is not None:
            self.backward(loss)
            loss = loss.detach()
        assert self.losses is not None
        self.losses.append(loss)
        if not torch.is_grad_enabled():
            for name, value in ctx.attachment.methods[0].diagnostics(ctx).items():
                self.noted.setdefault(name, []).append(value)
        return target


def without_head(root: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, for a forward whose logits nobody reads."""
    takes = inspect.signature(type(root).forward).parameters
    return {**inputs, "logits_to_keep": 1} if "logits_to_keep" in takes else inputs


def _transfer_kind(method: Any, wanted: str) -> str:
    kinds = method.transfer_kinds
    if wanted != "auto" and wanted not in kinds:
        raise ValueError(
            f"attention_transfer: loss is {wanted!r}; {method.name} can be transferred with {', '.join(kinds)}"
        )
    return kinds[0] if wanted == "auto" else wanted


class EndToEnd:
    """The patched model as a whole: its task, what the base model says, and what the methods add."""

    replicated = False

    def __init__(self, model: nn.Module, task: Task, stage: Trained) -> None:
        self.model: Any = model
        self.task, self.stage = task, stage
        self.weights = {**(stage.losses or stage.DEFAULT_LOSSES)}
        self.distils = any(self.weights.get(term, 0) for term in ("logits", "hidden"))
        self.hidden = bool(self.weights.get("hidden", 0))

    def __call__(self, model: nn.Module, batch: Batch, share: float, count: Any, backward: Backward | None) -> Terms:
        inputs = self.task.inputs(batch)
        if self.hidden:
            inputs["output_hidden_states"] = True
        teacher = self._teach(inputs) if self.distils else None
        sinks: list[Tensor] = []
        with self._watching_sinks(sinks):
            outputs = model(**inputs)
        prediction = self.task.prediction(outputs)
        terms = {}
        if self.weights.get("task"):
            terms["task"] = self.task.loss(prediction, batch) / count
        if teacher is not None:
            chosen = self.task.targets(batch, self.stage.on)
            if self.weights.get("logits"):
                terms["logits"] = self._divergence(prediction, self.task.prediction(teacher), chosen) * share
            if self.hidden:
                terms["hidden"] = _error(outputs.hidden_states[-1], teacher.hidden_states[-1], chosen) * share
        if sinks:
            terms["sink"] = torch.stack(sinks).mean() * share
        if self.weights.get("auxiliary") and patch_of(self.model) is not None:
            for name, value in auxiliary_losses(self.model).items():
                terms[name] = value * share * self.weights["auxiliary"]
        return {name: term * self.weights.get(name, 1.0) for name, term in terms.items()}

    def size(self, batch: Batch) -> int:
        """What a batch's mean is taken over: targets, or tokens where there is no task."""
        return max(1, self.task.count(batch) or 1) if self.weights.get("task") else self.task.size(batch)

    def _watching_sinks(self, noted: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Note the mean attention on the first token of each layer; it is no part of the held-out loss."""
        if not (self.weights.get("sink") and torch.is_grad_enabled()):
            return contextlib.nullcontext()

        def note(ctx: AttentionContext) -> Tensor:
            noted.append(first_token_mass(ctx).mean())
            return ctx.attend()

        return watching(root_of(self.model), note)

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Any:
        """The same weights without the patch and without adapters."""
        root, training = root_of(self.model), self.model.training
        self.model.eval()
        try:
            with contextlib.ExitStack() as stack:
                if _patched(root):
                    stack.enter_context(disabled(root))
                if hasattr(self.model, "disable_adapter"):
                    stack.enter_context(self.model.disable_adapter())
                return root(**inputs)
        finally:
            self.model.train(training)

    def _divergence(self, own: Tensor, teacher: Tensor, chosen: Tensor | None) -> Tensor:
        """KL of the student from the teacher; for predictions that are no logits, the mean squared error."""
        if self.task.names == ("denoising",):
            return _error(own, teacher, None)
        own, teacher = own.float() / self.stage.temperature, teacher.float() / self.stage.temperature
        if self.stage.top_k is not None:
            teacher, places = teacher.topk(min(self.stage.top_k, teacher.shape[-1]), dim=-1)
            own = own.gather(-1, places)
        if chosen is not None:
            own, teacher = own[chosen], teacher[chosen]
        divergence = functional.kl_div(
            own.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
        ).sum(dim=-1)
        return divergence.mean() * self.stage.temperature**2


def _error(own: Tensor, teacher: Tensor, chosen: Tensor | None) -> Tensor:
    error = (own.float() - teacher.float()).square()
    return error.mean() if chosen is None else error[chosen].mean()


def _patched(root: nn.Module) -> list[Any]:
    patch = patch_of(root)
    return [] if patch is None else patch.patched


class HeadSearch:
    """DuoAttention's identification: gates that mix full and streaming attention, distilled under an L1 term."""

    replicated = False
    rate_factor = staticmethod(duo.rate_factor)  # the published schedule

    def __init__(self, model: nn.Module, task: Task, stage: IdentifyHeads) -> None:
        self.root, self.penalty = root_of(model), stage.penalty
        sites = record_of(self.root).patched
        methods: list[Any] = [attachment_of(site.module).methods[0] for site in sites]
        self.gates: list[nn.Parameter] = [method.gates for method in methods]

    def __call__(self, model: nn.Module, batch: Batch, share: float, count: Any, backward: Backward | None) -> Terms:
        # Padding stands at the end, where no labelled token sees it.
        inputs = {"input_ids": batch["input_ids"], "use_cache": False, "output_hidden_states": True}
        inputs = without_head(self.root, inputs)
        with duo.teaching(self.root):
            teacher = self.root(**inputs).hidden_states[-1]
        student = model(**inputs).hidden_states[-1]
        distilled = duo.distill_loss(teacher, student, batch["labels"])
        size = torch.cat([gate.abs() for gate in self.gates]).mean()
        return {"distill": distilled * share, "size": self.penalty * size * share}

    def size(self, batch: Batch) -> int:
        """What a batch's mean is taken over."""
        return int((batch["labels"] != IGNORED).sum())

    @torch.no_grad()
    def before_step(self) -> None:
        for gate in self.gates:
            gate.clamp_(0, 1)
