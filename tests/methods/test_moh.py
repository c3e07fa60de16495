"""MoH: the two routers, which heads are on, what is learned, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, ViTConfig, ViTModel

import patchattn
from patchattn.living import auxiliary_losses, watching
from patchattn.methods.moh import MoH, load_balance
from patchattn.testing import TEXT

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 2}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **HEADS, **changes})).eval()


def tokens(rows=2, length=12):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def first(model) -> MoH:
    return model.model.layers[0].self_attn.patchattn[0]


def seen(model, **inputs):
    """What the first layer's call looked like: its gates, the heads' outputs, and |q|."""
    noted = {}

    def note(ctx):
        if ctx.attachment.methods[0] is first(model):
            noted.update(gates=first(model).gates(ctx), heads=ctx.base(), norms=ctx.q.norm(dim=-1).transpose(1, 2))
        return ctx.attend()

    with watching(model, note):
        noted["out"] = model(**inputs)
    return noted


def randomised(model, std=0.5):
    torch.manual_seed(2)
    for parameter in patchattn.patch_parameters(model).values():
        torch.nn.init.normal_(parameter, std=std)
    return model


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (4, 2)),
        ({"active": 0.5, "shared": 0.25}, (2, 2)),
        ({"active": 0.6, "shared": 3}, (3, 2)),
        ({"shared": 0, "top_k": 3}, (0, 3)),
        ({"shared": 8, "top_k": 0}, (8, 0)),
        ({"shared": 1.0, "active": 1.0}, (8, 0)),
        ({"shared": 2, "top_k": 6}, (2, 6)),
        ({"route": "kv_group", "active": 0.9, "shared": 0.4}, (4, 4)),
    ],
    ids=["defaults", "shares", "a share and a number", "none shared", "none routed", "all shared", "all on", "groups"],
)
def test_shares_and_numbers_become_heads(settings, counts):
    method = first(patchattn.patch(llama(), MoH(**settings)))
    assert (method.shared, method.top_k) == counts


def test_lists_give_each_patched_layer_its_own_numbers():
    model = patchattn.patch(llama(num_hidden_layers=4), MoH(shared=[8, 2], top_k=[0, 3], router="linear"), layers="2-")
    methods = [layer.self_attn.patchattn[0] for layer in model.model.layers[2:]]
    assert [(method.shared, method.top_k) for method in methods] == [(8, 0), (2, 3)]
    assert [name.rpartition(".")[2] for name in patchattn.patch_parameters(model)] == [
        "shared_weight", "routed_weight", "shared_weight", "kind_weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared": 6, "top_k": 3}, "shared is 6 and top_k is 3 .*has 8 heads, so together they must be at most 8"),
        ({"shared": -1}, "shared is -1; it must be a share of the heads from 0 to 1, a number of heads, or a list"),
        ({"top_k": [2, -1]}, r"top_k is \[2, -1\]; it must be a number of heads, or a list"),
        ({"shared": 1.5}, "shared is 1.5; it must be a share of the heads from 0 to 1"),
        ({"shared": [4]}, "shared has 1 entries; it must have 2, one for each layer patched"),
        ({"top_k": [1, 1, 1]}, "top_k has 3 entries; it must have 2"),
        ({"active": 0.5}, "active is 0.5, which is 4 of the 8 heads of .*; with 4 shared ones that leaves no routed"),
        ({"active": 0.5, "top_k": 2}, "active is 0.5; it must be left out where top_k is given"),
        ({"active": 0.0}, "active is 0.0; it must be more than 0 and at most 1"),
        ({"route": "kv_group", "shared": 2, "top_k": 4}, "with route='kv_group' both must be multiples of 4"),
        ({"router": "norm"}, "router is 'norm'; it must be one of 'query_norm', 'linear'"),
        ({"ste": "half"}, "ste is 'half'; it must be one of 'full', 'selected', 'none'"),
        ({"extra": 2}, "extra is 2; it must be from 0 to 1"),
    ],
    ids=[
        "too many",
        "negative",
        "negative in a list",
        "share above 1",
        "short list",
        "long list",
        "nothing routed",
        "both",
        "no heads",
        "half a group",
        "router",
        "ste",
        "extra",
    ],
)
def test_impossible_settings_are_refused_before_anything_is_touched(settings, message):
    model = llama()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        patchattn.patch(model, MoH(**settings))
    assert list(model.state_dict()) == before


def test_a_module_whose_query_norms_cannot_be_seen_is_refused_for_that_router_alone():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj, self.q_norm = torch.nn.Linear(8, 24), torch.nn.LayerNorm(4)

    from patchattn.catalog import FAMILIES

    site = dataclasses.replace(FAMILIES["decoder"], module=Fused())
    reason = MoH.unfit(site, MoH().config)
    assert reason is not None and "use router='linear'" in reason
    assert MoH.unfit(site, MoH(router="linear").config) is None


# ---- the routers -----------------------------------------------------------------------------------------------


def test_an_untrained_learned_router_with_all_heads_on_is_the_model_itself():
    model = llama()
    with torch.no_grad():
        wanted = model(tokens()).logits
        patchattn.patch(model, MoH(shared=2, top_k=6, router="linear"))
        torch.testing.assert_close(model(tokens()).logits, wanted, atol=1e-6, rtol=0)


def test_an_untrained_learned_router_chooses_as_the_parameter_free_one_does():
    with torch.no_grad():
        by_norms = seen(patchattn.patch(llama(), MoH(shared=2, top_k=3)), input_ids=tokens())["gates"]
        learned = seen(patchattn.patch(llama(), MoH(shared=2, top_k=3, router="linear")), input_ids=tokens())["gates"]
    torch.testing.assert_close(learned, by_norms)  # and their weights are 1


def test_the_parameter_free_router_takes_the_longest_queries():
    with torch.no_grad():
        call = seen(patchattn.patch(llama(), MoH(shared=2, top_k=3)), input_ids=tokens())
    wanted = torch.zeros(2, 12, 8).scatter(-1, call["norms"][..., 2:].topk(3).indices + 2, 1.0)
    wanted[..., :2] = 1
    assert torch.equal(call["gates"], wanted)


def test_query_norms_are_taken_before_a_norm_of_the_queries_and_after_adapters():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**TEXT, **HEADS})).eval()
    patchattn.patch(model, MoH(shared=2, top_k=3))

    def norms():
        noted = []

        def note(ctx):
            noted.append((ctx.attachment.methods[0].norms(ctx), ctx.hidden_states, ctx.module.q_proj))
            return ctx.attend()

        with torch.no_grad(), watching(model, note):
            model(tokens())
        return noted

    for wrapped in (False, True):
        if wrapped:
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        for ours, hidden, projection in norms():
            wanted = projection(hidden).unflatten(-1, (8, 4)).norm(dim=-1)[..., 2:]
            torch.testing.assert_close(ours, wanted)
    patchattn.unpatch(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_weights_are_those_of_the_papers_code():
    model = randomised(patchattn.patch(llama(), MoH(shared=3, top_k=2, router="linear")))
    with torch.no_grad():
        noted = []
        with watching(model, lambda ctx: (noted.append(ctx.hidden_states), ctx.attend())[1]):
            model(tokens())
        gates, x, method = seen(model, input_ids=tokens())["gates"], noted[0], first(model)
        p = (x @ method.routed_weight.T).softmax(dim=-1)
        best = p.topk(2)
        routed = torch.zeros_like(p).scatter(-1, best.indices, 2 * best.values / best.values.sum(-1, keepdim=True))
        kinds = 2 * (x @ method.kind_weight.T).softmax(dim=-1)
        shared = 3 * (x @ method.shared_weight.T).softmax(dim=-1)
    torch.testing.assert_close(gates, torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * routed], dim=-1))


def test_ties_go_to_the_first_heads():
    model = llama()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    with torch.no_grad():
        gates = seen(patchattn.patch(model, MoH(shared=2, top_k=3)), input_ids=tokens())["gates"]
    assert torch.equal(gates, torch.tensor([1.0] * 5 + [0.0] * 3).expand(2, 12, 8))


def test_equal_norms_and_a_single_routed_head_have_finite_gradients():
    model = llama()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    for settings in ({"shared": 2, "top_k": 3}, {"shared": 7, "top_k": 1}, {"shared": 7, "top_k": 0}):
        patchattn.patch(model.train(), MoH(**settings))
        (model(tokens(), labels=tokens()).loss + patchattn.aux_loss(model)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        patchattn.unpatch(model)


@pytest.mark.parametrize("router", ["query_norm", "linear"])
def test_groups_are_on_or_off_as_a_whole(router):
    settings = {"shared": 0, "top_k": 4, "route": "kv_group", "router": router}
    model = randomised(patchattn.patch(llama(), MoH(**settings)))
    with torch.no_grad():
        on = (seen(model, input_ids=tokens())["gates"] != 0).unflatten(-1, (2, 4))
    assert torch.equal(on.all(dim=-1), on.any(dim=-1))
    assert (on.any(dim=-1).sum(dim=-1) == 1).all() and on.any(dim=-1).float().mean(dim=(0, 1)).min() > 0


def test_extra_heads_are_on_while_the_setting_says_so():
    model = patchattn.patch(llama(), MoH(shared=2, top_k=2))
    counts = []
    with torch.no_grad():
        for extra in (1.0, 0.5, 0.0):
            with patchattn.settings(model, extra=extra):
                counts.append((seen(model, input_ids=tokens())["gates"] != 0).sum(dim=-1).unique().tolist())
    assert counts == [[8], [6], [4]]


def test_what_an_unchosen_head_holds_never_reaches_the_output():
    model = patchattn.patch(llama(), ["moh", Poison()])
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


class Poison(patchattn.Method):
    """NaN in every head that MoH does not choose."""

    name = "poison"

    def forward(self, ctx):
        off = ctx.attachment.methods[0].gates(ctx) == 0
        return ctx.attend().masked_fill(off[..., None], float("nan"))


# ---- chosen pairs alone ----------------------------------------------------------------------------------------

PAIRS = {
    "query_norm": {"shared": 2, "top_k": 2, "ste": "selected"},
    "linear": {"shared": 1, "top_k": 3, "router": "linear"},
    "groups": {"shared": 0, "top_k": 4, "router": "linear", "route": "kv_group"},
}


def both_ways(settings, run, **changes):
    """What `run(model)` gives where every pair is computed, and where the chosen ones are; with the reports."""
    results = []
    for least_keys in (10_000, 0):
        model = patchattn.patch(llama(**changes), MoH(**settings, least_keys=least_keys))
        results.append((run(randomised(model)), first(model).report()["pairs computed"]))
    return results


@pytest.mark.parametrize("settings", PAIRS.values(), ids=PAIRS)
def test_computing_chosen_pairs_alone_changes_nothing(settings):
    mask = torch.ones(2, 12, dtype=torch.long)
    for padding in (None, slice(0, 5), slice(9, 12), slice(4, 6)):
        given = mask.clone()
        if padding is not None:
            given[1, padding] = 0

        def run(model, given=given):
            with torch.no_grad():
                return model(tokens(), attention_mask=given).logits[given.bool()]

        (dense, said), (chosen, also) = both_ways(settings, run)
        torch.testing.assert_close(chosen, dense, atol=1e-5, rtol=0)
        assert said == "100%, fewer than 80000 keys"
        between = padding == slice(4, 6)
        assert also == ("100%, padding between the tokens of a row" if between else "50.0%")


@pytest.mark.parametrize("settings", PAIRS.values(), ids=PAIRS)
def test_chosen_pairs_alone_give_the_same_gradients(settings):
    def run(model):
        model(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    (dense, _), (chosen, computed) = both_ways(settings, run)
    assert computed == "50.0%"
    for name, gradient in dense.items():
        torch.testing.assert_close(chosen[name], gradient, atol=1e-5, rtol=1e-4)


def test_chosen_pairs_alone_generate_the_same_tokens():
    def run(model):
        ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
        mask[0, :4] = 0
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    for settings in PAIRS.values():
        (dense, _), (chosen, computed) = both_ways(settings, run)
        assert torch.equal(chosen, dense) and computed == "50.0%"


def test_queries_that_were_not_chosen_are_not_looked_at():
    def run(model):
        def spoil(ctx):
            off = ctx.attachment.methods[0].gates(ctx).transpose(1, 2) == 0
            assert off.any()
            ctx.q = ctx.q.masked_fill(off[..., None], float("nan"))
            return ctx.attend()

        with torch.no_grad(), watching(model, spoil):
            return model(tokens()).logits

    (_, _), (chosen, _) = both_ways(PAIRS["linear"], run)
    assert chosen.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({}, {"shared": 2, "top_k": 6}, "100%, all heads are on"),
        ({}, {"extra": 1.0}, "100%, all heads are on"),
        ({"attn_implementation": "eager"}, {}, "100%, eager attention was asked for"),
        ({}, {"ste": "full"}, "100%, for the gradient of the router"),
    ],
    ids=["all on", "all extra", "eager", "full gradient"],
)
def test_the_report_says_why_every_pair_was_computed(changes, settings, reason):
    model = patchattn.patch(llama(**changes), MoH(**{"ste": "none", "least_keys": 0, **settings}))
    model(tokens())
    assert first(model).report()["pairs computed"] == reason


def test_the_report_names_a_method_below():
    model = patchattn.patch(llama(), [MoH(least_keys=0, ste="none"), "dense"])
    model(tokens())
    assert first(model).report()["pairs computed"] == "100%, another method is below"


# ---- what is learned -------------------------------------------------------------------------------------------


def test_the_load_balance_counts_no_padding_and_is_top_k_at_balance():
    p, chosen = torch.full((1, 4, 4), 0.25), torch.eye(4).bool()[None] | torch.eye(4).roll(1, 0).bool()[None]
    assert load_balance(p, chosen).item() == pytest.approx(2)
    padded = torch.cat([chosen, torch.tensor([[[True, True, False, False]] * 4])], dim=1)
    real = torch.tensor([[True] * 4 + [False] * 4])
    assert load_balance(torch.full((1, 8, 4), 0.25), padded, real).item() == pytest.approx(2)


def test_padding_does_not_change_the_loss_that_a_model_adds():
    model = randomised(patchattn.patch(llama(num_hidden_layers=1), MoH(shared=1, top_k=2, router="linear"))).train()
    ids = tokens(rows=1)
    model(ids)
    alone = patchattn.aux_loss(model)
    for side in ((3, 0), (0, 3)):
        mask = torch.nn.functional.pad(torch.ones_like(ids), side)
        model(torch.nn.functional.pad(ids, side), attention_mask=mask)
        torch.testing.assert_close(patchattn.aux_loss(model), alone)


def test_the_loss_is_noted_once_also_when_layers_are_run_again():
    for settings in ({"router": "linear", "shared": 1, "top_k": 2}, {}):
        model, values = randomised(patchattn.patch(llama(), MoH(**settings))), []
        for checkpointing in (False, True):
            run = copy.deepcopy(model).train()
            if checkpointing:
                run.gradient_checkpointing_enable()
            loss = run(tokens(), labels=tokens()).loss
            (loss + 10 * patchattn.aux_loss(run)).backward()
            assert auxiliary_losses(run) == {}
            values.append({name: p.grad for name, p in run.named_parameters() if p.grad is not None})
        assert values[0].keys() == values[1].keys()
        for name, gradient in values[0].items():
            torch.testing.assert_close(values[1][name], gradient)


def test_there_is_no_loss_outside_training_and_none_to_add_without_routed_heads():
    model = patchattn.patch(llama(), MoH())
    model(tokens())
    assert auxiliary_losses(model) == {} and patchattn.aux_loss(model) == 0
    model.train()
    with patchattn.settings(model, balance=0.0):
        model(tokens())
    assert auxiliary_losses(model) == {}


def test_a_model_can_be_copied_while_a_loss_waits_to_be_added():
    model = patchattn.patch(llama(), MoH()).train()
    model(tokens())
    assert auxiliary_losses(copy.deepcopy(model)) == {} and patchattn.aux_loss(model) > 0


@pytest.mark.parametrize("ste", ["full", "selected", "none"])
def test_straight_through_is_0_or_1_forwards_and_the_soft_gate_backwards(ste):
    model = patchattn.patch(llama(num_hidden_layers=1), MoH(shared=2, top_k=3, ste=ste))
    call = seen(model, input_ids=tokens())
    gates = call["gates"]
    assert set(gates.detach().unique().tolist()) == {0.0, 1.0}
    assert gates.requires_grad == (ste != "none")
    if ste == "none":
        return
    norms = call["norms"][..., 2:]
    p = MoH.probabilities(norms)
    given = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    kept = given if ste == "full" else given * (gates[..., 2:] != 0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    ours = torch.autograd.grad((gates[..., 2:] * given).sum(), weight, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((p * kept).sum(), weight)[0])


def test_every_router_learns_in_a_few_steps():
    ids = tokens()
    for router in ("query_norm", "linear"):
        model = patchattn.patch(llama(), MoH(shared=1, top_k=3, router=router)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(ids, labels=ids).loss + patchattn.aux_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5


# ---- elsewhere -------------------------------------------------------------------------------------------------


def test_it_weights_whatever_is_below_it():
    methods = [MoH(shared=2, top_k=3), patchattn.DuoAttention(heads=0.5, sink=1, recent=4)]
    model = patchattn.patch(llama(), methods)
    attention, outputs = model.model.layers[0].self_attn, []
    attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad():
        gates = seen(model, input_ids=tokens())["gates"]
        patchattn.unpatch(model)
        patchattn.patch(model, methods[1])
        model(tokens())
    inner = outputs[1].unflatten(-1, (8, 4))
    torch.testing.assert_close(outputs[0].unflatten(-1, (8, 4)), inner * gates[..., None])


def test_router_parameters_stay_float32_under_autocast_and_in_half_precision():
    model = patchattn.patch(llama().bfloat16(), MoH(shared=1, top_k=2, router="linear", init="random"))
    assert {p.dtype for p in patchattn.patch_parameters(model).values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert seen(model, input_ids=tokens())["gates"].dtype == torch.float32


def test_the_report_says_how_many_heads_were_on_and_how_often_each():
    model = patchattn.patch(llama(), MoH(shared=2, top_k=3))
    assert first(model).report() == {}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    gates = seen(model, input_ids=tokens(), attention_mask=mask)["gates"]
    report = first(model).report()
    assert report["heads on"] == "62.5%"
    assert report["load"] == [round(value, 3) for value in (gates != 0).float()[mask.bool()].mean(dim=0).tolist()]


def test_class_tokens_route_like_any_other():
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                       patch_size=4)  # fmt: skip
    model = patchattn.patch(ViTModel(config).eval(), MoH(shared=1, top_k=2, router="linear", init="random"))
    model(torch.randn(2, 3, 16, 16))
    reports = [layer.report["moh"]["heads on"] for layer in patchattn.explain(model).layers]
    assert reports == ["75.0%", "75.0%"]
