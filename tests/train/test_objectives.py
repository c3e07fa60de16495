"""What the stages minimise: attention transfer, distillation from the same weights, auxiliary terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.method import Method, MethodConfig
from patchattn.record import attachment_of, patch_of, record_of
from patchattn.train import schema
from patchattn.train.objectives import EndToEnd, Transfer
from patchattn.train.stages import finish, prepare
from patchattn.train.tasks import Task

BLOCK = 4


class Scaled(Method):
    """The base attention times a learned factor; its maps are the base's at a learned temperature."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        pass

    name = "scaled"
    transfer_kinds = ("output", "map", "block_map")

    def build(self, site: Any) -> None:
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, ctx: Any) -> Tensor:
        return ctx.attend() * self.factor

    def attention_map(self, ctx: Any, first: int, last: int) -> Tensor:
        logits = ctx.base_weights(first, last).clamp_min(1e-30).log() * self.factor
        return logits.softmax(dim=-1)

    def block_map(self, ctx: Any) -> tuple[Tensor, int]:
        blocks = -(-ctx.q.shape[2] // BLOCK)
        future = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
        scores = torch.zeros(ctx.q.shape[0], ctx.q.shape[1], blocks, blocks) * self.factor
        return scores.masked_fill(future, -torch.inf), BLOCK

    def auxiliary_losses(self) -> dict[str, Tensor]:
        return {"balance": (self.factor - 1) ** 2}


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=48,
                 intermediate_size=48)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def rows(length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(0, 48, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def transfer(model: nn.Module, loss: str = "auto", layerwise: bool = False) -> Transfer:
    stage = schema.AttentionTransfer(steps=1, loss=loss, layerwise=layerwise)
    objective = prepare(model, stage, Task()).objective
    assert isinstance(objective, Transfer)
    return objective


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_transfer_passes_the_base_models_hidden_states_on():
    model, batch = tiny(), rows()
    wanted = model.model(batch["input_ids"]).last_hidden_state
    patchattn.patch(model, Scaled())
    objective, seen = transfer(model), {}
    model.model.norm.register_forward_hook(lambda module, args, output: seen.update(states=output))
    objective(model, batch, 1.0, None, None)
    assert torch.equal(seen["states"], wanted[:, :])
    assert not seen["states"].requires_grad


def test_a_transfer_trains_each_layer_against_the_base_output_of_that_layer():
    model, batch = tiny(), rows()
    outputs = []
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
             for layer in model.model.layers]  # fmt: skip
    model(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    patchattn.patch(model, Scaled())
    terms = transfer(model)(model, batch, 1.0, None, None)
    wanted = torch.stack([(0.5 * output).square().mean() for output in outputs]).mean()
    torch.testing.assert_close(terms["transfer"], wanted)
    terms["transfer"].backward()
    found = gradients(model)
    assert set(found) == set(patchattn.patch_parameters(model))
    for output, gradient in zip(outputs, found.values()):
        torch.testing.assert_close(gradient, (output.square() * 2 * 0.5).mean() / 3)


def test_layerwise_gradients_equal_those_of_all_layers_together():
    found = []
    for layerwise in (False, True):
        model = patchattn.patch(tiny(), patchattn.GatedAttention(init="random"))
        terms = transfer(model, layerwise=layerwise)(model, rows(), 1.0, None, lambda loss: loss.backward())
        if not layerwise:
            terms["transfer"].backward()
        assert terms["transfer"].requires_grad is not layerwise
        found.append((terms["transfer"].detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1])


def test_a_transfer_leaves_nothing_on_the_layers():
    model = patchattn.patch(tiny(), Scaled())
    transfer(model)(model, rows(), 1.0, None, None)
    assert all(attachment_of(site.module).around is None for site in record_of(model).sites)
    objective = transfer(model)
    with pytest.raises(IndexError):
        objective(model, {"input_ids": torch.tensor([[1000]]), "labels": torch.tensor([[0]])}, 1.0, None, None)
    assert all(attachment_of(site.module).around is None for site in record_of(model).sites)


def eager_weights(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    model.set_attn_implementation("eager")
    return model(batch["input_ids"], attention_mask=batch.get("attention_mask"), output_attentions=True).attentions


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["grouped", "multi-head"])
def test_map_losses_are_the_cross_entropy_with_the_models_own_attention_weights(changes: dict[str, Any]):
    batch = rows()
    weights = eager_weights(tiny(**changes), batch)
    model = patchattn.patch(tiny(**changes), Scaled())
    loss = transfer(model, "map")(model, batch, 1.0, None, None)["transfer"]
    wanted = []
    for w in weights:
        own = (w.clamp_min(1e-30).log() * 1.5).softmax(-1)
        wanted.append(-(w * own.log()).sum(-1).mean())
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-4, atol=1e-5)


def test_map_losses_of_long_inputs_are_computed_block_by_block(monkeypatch: pytest.MonkeyPatch):
    found = []
    for elements in (1 << 22, 30):
        monkeypatch.setattr("patchattn_kernels.attention.MASK_ELEMENTS", elements)
        model = patchattn.patch(tiny(), Scaled())
        loss = transfer(model, "map")(model, rows(), 1.0, None, None)["transfer"]
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1])


def test_block_map_losses_are_the_divergence_from_the_block_maxima():
    batch = rows(10)  # the last block is half full
    weights = eager_weights(tiny(), batch)
    model = patchattn.patch(tiny(), Scaled())
    loss = transfer(model, "block_map")(model, batch, 1.0, None, None)["transfer"]
    wanted = []
    for w in weights:
        for n in range(3):
            rows_ = w[:, :, n * BLOCK : (n + 1) * BLOCK]
            target = torch.stack([rows_[..., m * BLOCK : (m + 1) * BLOCK].amax((2, 3)) for m in range(n + 1)], dim=-1)
            target = target / target.sum(-1, keepdim=True)
            wanted.append((target * (target * (n + 1)).log()).sum(-1).mean())  # from the uniform distribution
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["output", "map"])
def test_padding_takes_no_part_in_a_transfer(loss: str):
    model = patchattn.patch(tiny(), Scaled())
    batch = {name: tensor[:1] for name, tensor in rows().items()}
    alone = transfer(model, loss)(model, batch, 1.0, None, None)["transfer"]
    padded = {name: nn.functional.pad(tensor, (5, 0)) for name, tensor in batch.items()}
    padded["attention_mask"] = nn.functional.pad(torch.ones_like(batch["input_ids"]), (5, 0))
    torch.testing.assert_close(transfer(model, loss)(model, padded, 1.0, None, None)["transfer"], alone)


def test_a_loss_the_method_does_not_have_is_refused_with_those_it_has():
    model = patchattn.patch(tiny(), patchattn.GatedAttention())
    with pytest.raises(ValueError, match="loss is 'map'; gated_attention can be transferred with output"):
        transfer(model, "map")


# ---- distillation ------------------------------------------------------------------------------------------


def end_to_end(model: nn.Module, stage: schema.Trained) -> tuple[nn.Module, EndToEnd]:
    prepared = prepare(model, stage, Task())
    assert isinstance(prepared.objective, EndToEnd)
    return prepared.model, prepared.objective


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True,
                                reduction="none").sum(-1)  # fmt: skip


def logits_of_both(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    teacher = tiny()(batch["input_ids"]).logits
    return patchattn.patch(tiny(), Scaled())(batch["input_ids"]).logits, teacher


def test_the_teacher_is_the_base_model():
    batch = rows()
    student, teacher = logits_of_both(batch)
    model, objective = end_to_end(patchattn.patch(tiny(), Scaled()), schema.Distill(steps=1, losses={"logits": 1.0}))
    torch.testing.assert_close(objective(model, batch, 1.0, 1, None)["logits"], divergence(student, teacher).mean())


def test_distillation_can_be_limited_to_the_last_or_the_labelled_tokens():
    batch = rows()
    batch["labels"][:, :7] = -100
    student, teacher = logits_of_both(batch)
    each = divergence(student, teacher)
    # The prediction of a labelled token is made one place before it.
    for on, wanted in ((3, each[:, -3:].mean()), ("labelled", each[:, 6:-1].mean())):
        stage = schema.Distill(steps=1, losses={"logits": 1.0}, on=on)
        model, objective = end_to_end(patchattn.patch(tiny(), Scaled()), stage)
        torch.testing.assert_close(objective(model, batch, 1.0, 1, None)["logits"], wanted)


def test_distillation_of_the_likeliest_tokens_renormalises_both_sides():
    batch = rows()
    student, teacher = logits_of_both(batch)
    top, places = teacher.topk(5, dim=-1)
    wanted = divergence(student.gather(-1, places), top).mean()
    stage = schema.Distill(steps=1, losses={"logits": 1.0}, top_k=5)
    model, objective = end_to_end(patchattn.patch(tiny(), Scaled()), stage)
    torch.testing.assert_close(objective(model, batch, 1.0, 1, None)["logits"], wanted)


def test_hidden_states_can_be_distilled():
    batch = rows()
    teacher = tiny().model(batch["input_ids"]).last_hidden_state
    student = patchattn.patch(tiny(), Scaled()).model(batch["input_ids"]).last_hidden_state
    stage = schema.Distill(steps=1, losses={"hidden": 2.0})
    model, objective = end_to_end(patchattn.patch(tiny(), Scaled()), stage)
    wanted = 2 * (student - teacher).square().mean()
    torch.testing.assert_close(objective(model, batch, 1.0, 1, None)["hidden"], wanted)


def test_the_teacher_has_no_adapters():
    batch = rows()
    teacher = tiny()(batch["input_ids"]).logits
    model, objective = end_to_end(tiny(), schema.Lora(steps=1, losses={"logits": 1.0}))
    assert objective(model, batch, 1.0, 1, None)["logits"] == 0  # LoRA begins as nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    student = model(batch["input_ids"]).logits
    torch.testing.assert_close(objective(model, batch, 1.0, 1, None)["logits"], divergence(student, teacher).mean())


def test_auxiliary_losses_of_the_methods_are_averaged_over_the_layers_and_weighted():
    stage = schema.Tune(steps=1, parameters="patch", losses={"task": 1.0, "auxiliary": 0.1})
    model, objective = end_to_end(patchattn.patch(tiny(), Scaled()), stage)
    batch = rows()
    terms = objective(model, batch, 1.0, 20, None)
    torch.testing.assert_close(terms["balance"], torch.tensor(0.1 * 0.25))
    wanted = nn.functional.cross_entropy(model(batch["input_ids"]).logits[:, :-1].flatten(0, 1),
                                         batch["labels"][:, 1:].flatten())  # fmt: skip
    torch.testing.assert_close(terms["task"], wanted)


@pytest.mark.parametrize("stage", [schema.Tune, schema.Lora])
def test_attention_on_the_first_token_can_be_drawn_or_driven_away_without_a_patch(stage: type[schema.Trained]):
    model, batch = tiny(), rows()
    names = [name for name, _ in model.named_parameters()]
    weights = tiny(attn_implementation="eager")(batch["input_ids"], output_attentions=True).attentions
    prepared = prepare(model, stage(steps=1, losses={"task": 1.0, "sink": -0.5}), Task())
    terms = prepared.objective(prepared.model, batch, 1.0, 20, None)
    wanted = -0.5 * torch.stack([layer[..., 0].mean() for layer in weights]).mean()
    torch.testing.assert_close(terms["sink"], wanted)
    assert terms["sink"].requires_grad
    with torch.no_grad():
        assert set(prepared.objective(prepared.model, batch, 1.0, 20, None)) == {"task"}  # the held-out loss
    left, _ = finish(prepared, stage(steps=1))
    assert left is model and patch_of(model) is None
    assert [name for name, _ in model.named_parameters()] == names


# ---- what learns -------------------------------------------------------------------------------------------

PARTS = {
    "the patch": (schema.Tune(steps=1, parameters="patch"), lambda name: ".patchattn." in name),
    "everything": (schema.Tune(steps=1, parameters="all"), lambda name: True),
    "globs": (schema.Tune(steps=1, parameters=["*.mlp.*", "patch"]), lambda name: "mlp" in name or "patchattn" in name),
    "adapters": (schema.Lora(steps=1, targets=["q_proj"]), lambda name: "lora" in name or "patchattn" in name),
    "adapters alone": (schema.Lora(steps=1, targets=["q_proj"], patch=False), lambda name: "lora" in name),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_stage_lets_exactly_its_parameters_learn(name: str):
    stage, chosen = PARTS[name]
    model = prepare(patchattn.patch(tiny(), Scaled()), stage, Task()).model
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert learns == {name: chosen(name) for name in learns}
    assert any(learns.values())


def test_merged_adapters_leave_a_plain_patched_model_with_the_same_function():
    stage, batch = schema.Lora(steps=1), rows()
    model = patchattn.patch(tiny(), Scaled())
    names = [name for name, _ in model.named_parameters()]
    prepared = prepare(model, stage, Task())
    for parameter in prepared.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    wanted = prepared.model(batch["input_ids"]).logits
    merged, adapters = finish(prepared, stage)
    assert adapters is None and [name for name, _ in merged.named_parameters()] == names
    torch.testing.assert_close(merged(batch["input_ids"]).logits, wanted)


def test_globs_that_match_nothing_are_refused():
    stage = schema.Tune(steps=1, parameters=["*.mpl.*"])
    with pytest.raises(ValueError, match=r"'\*.mpl.\*' matches none of the model's, such as model.embed_tokens.weight"):
        prepare(tiny(), stage, Task())


@pytest.mark.parametrize("stage", [schema.AttentionTransfer(steps=1), schema.Distill(steps=1)])
def test_a_patch_without_parameters_cannot_be_trained(stage: schema.Stage):
    with pytest.raises(ValueError, match="duo_attention has none; use stage tune or lora"):
        prepare(patchattn.patch(tiny(), patchattn.DuoAttention(sink=1, recent=4)), stage, Task())
    with pytest.raises(ValueError, match="the model is not patched"):
        prepare(tiny(), stage, Task())


def test_a_head_search_ends_with_duo_attention_on_the_model():
    stage = schema.IdentifyHeads(steps=1, sink=1, recent=4, share=0.5)
    prepared = prepare(tiny(), stage, Task())
    batch = rows(16)
    terms = prepared.objective(prepared.model, batch, 1.0, None, None)
    assert set(terms) == {"distill", "size"}
    torch.testing.assert_close(terms["size"], torch.tensor(0.05))  # every gate begins at 1
    with torch.no_grad():
        for layer, gate in enumerate(prepared.objective.gates):
            gate.copy_(torch.tensor([0.9, 0.1]) if layer else torch.tensor([0.2, 0.8]))
    model, _ = finish(prepared, stage)
    (entry,) = [method for plan in patchattn.living.plan_of(model) for method in plan["methods"]]
    assert entry["method"] == "duo_attention"
    assert entry["heads"] == [[0, 1], [1, 0], [1, 0]]
