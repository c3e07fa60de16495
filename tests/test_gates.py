"""Measuring gates and sinks, and the penalties that push on them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.context import first_token_mass
from patchattn.gates import gate_stats
from patchattn.living import watching


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=48,
                 intermediate_size=48)  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager")).eval()


IDS = torch.randint(1, 48, (2, 13), generator=torch.Generator().manual_seed(0))


def test_the_sink_of_an_identity_gate_is_the_models_own_attention_on_the_first_token():
    weights = tiny()(IDS, output_attentions=True).attentions
    wanted = torch.stack([layer[:, :, 1:, 0].mean(dim=(0, 2)) for layer in weights])
    stats = gate_stats(patchattn.patch(tiny(), patchattn.GatedAttention()), input_ids=IDS)
    torch.testing.assert_close(stats.sink, wanted)
    torch.testing.assert_close(stats.gated_sink, wanted)
    assert torch.equal(stats.gate, torch.ones(2, 4)) and not stats.closed.any()


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_closed_gates_take_the_sink_out_of_the_output(kind: str):
    model = patchattn.patch(tiny(), patchattn.GatedAttention(kind=kind))
    with torch.no_grad():
        for name, parameter in patchattn.patch_parameters(model).items():
            if name.endswith("bias"):
                parameter[: len(parameter) // 4] = -6.0  # the first head
    stats = gate_stats(model, input_ids=IDS)
    assert torch.equal(stats.closed, torch.tensor([[1.0, 0, 0, 0]] * 2))
    assert (stats.gated_sink[:, 0] < 0.01 * stats.sink[:, 0]).all()
    torch.testing.assert_close(stats.gated_sink[:, 1:], stats.sink[:, 1:])


def mass(**inputs):
    """Attention on the first token, layer by layer."""
    seen = []
    model = patchattn.patch(tiny(), patchattn.Dense())
    with watching(model, lambda ctx: (seen.append(first_token_mass(ctx)), ctx.attend())[1]):
        model(**inputs)
    return seen


def test_padding_moves_the_first_token():
    padded = torch.nn.functional.pad(IDS, (4, 0))
    for with_padding, without in zip(
        mass(input_ids=padded, attention_mask=(padded > 0).long()), mass(input_ids=IDS), strict=True
    ):
        torch.testing.assert_close(with_padding[:, :, 4:], without)


def test_each_of_packed_sequences_has_its_own_first_token():
    row, length = IDS[:1], IDS.shape[1]
    packed = mass(
        input_ids=torch.cat([row, row], 1), position_ids=torch.arange(length).repeat(2)[None], use_cache=False
    )
    for twice, once in zip(packed, mass(input_ids=row), strict=True):
        torch.testing.assert_close(twice, torch.cat([once, once], -1))


def test_the_gate_penalty_is_noted_while_training_only_and_reaches_the_gate():
    model = patchattn.patch(tiny(), patchattn.GatedAttention(gate_penalty=2.0))
    method = model.model.layers[1].self_attn.patchattn[0]
    model(IDS)
    assert method.auxiliary_losses() == {}
    model.train()
    model(IDS)
    terms = method.auxiliary_losses()
    assert set(terms) == {"gate"} and terms["gate"].item() == 2.0
    terms["gate"].backward()
    assert method.bias.grad.abs().sum() > 0
    assert method.auxiliary_losses() == {}  # each forward's are taken once


def test_measuring_an_ungated_model_is_refused():
    with pytest.raises(ValueError, match="is not patched"):
        gate_stats(tiny(), input_ids=IDS)
    with pytest.raises(ValueError, match="no layer of this model has GatedAttention"):
        gate_stats(patchattn.patch(tiny(), patchattn.Dense()), input_ids=IDS)
