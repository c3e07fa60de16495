"""What is read from the source of an attention module's forward."""

import pytest

from patchattn.reading import Reading, read_forward

ALL_ATTENTION_FUNCTIONS = {}


def usual(self, hidden_states, attention_mask=None, past_key_values=None):
    q = k = v = hidden_states
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)  # noqa: F821
    return attend(self, q, k, v, attention_mask, scaling=self.scaling)


def renames_its_mask(self, hidden_states, mask, encoder_mask):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    chosen = mask
    return attend(self, hidden_states, hidden_states, hidden_states, attention_mask=chosen)


def looks_into_its_mask(self, hidden_states, attention_mask):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    self.indexer(hidden_states, attention_mask[:, 0])
    return attend(self, hidden_states, hidden_states, hidden_states, attention_mask)


def makes_a_mask(self, hidden_states, attention_mask):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    dynamic = self.prepare(attention_mask)
    return attend(self, hidden_states, hidden_states, hidden_states, attention_mask=dynamic)


def takes_a_merged_mask(self, hidden_states, merged_attention_mask):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(self, hidden_states, hidden_states, hidden_states, merged_attention_mask)


def attends_twice(self, hidden_states, attention_mask):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first = attend(self, hidden_states, hidden_states, hidden_states, attention_mask)
    return first, attend(self, hidden_states, hidden_states, hidden_states, attention_mask)


def keeps_its_keys_elsewhere(self, hidden_states, attention_mask, past_key_values, offset):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    k, v = past_key_values.update(hidden_states, hidden_states, self.layer_idx + offset)
    return attend(self, hidden_states, k, v, attention_mask)


def has_its_own_eager(self, hidden_states, attention_mask):
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", text_attention)  # noqa: F821
    return attend(self, hidden_states, hidden_states, hidden_states, attention_mask, indices=None)


@pytest.mark.parametrize(
    ("function", "reading"),
    [
        (usual, Reading(keywords=frozenset({"scaling"}))),
        (renames_its_mask, Reading(keywords=frozenset({"attention_mask"}))),
        (looks_into_its_mask, Reading(draws_mask=True)),
        (makes_a_mask, Reading(keywords=frozenset({"attention_mask"}), draws_mask=True)),
        (takes_a_merged_mask, Reading(draws_mask=True)),
        (attends_twice, Reading(calls=2)),
        (keeps_its_keys_elsewhere, Reading(own_index=False)),
        (has_its_own_eager, Reading(keywords=frozenset({"indices"}), eager="text_attention")),
        (eval("lambda self: None"), Reading()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forward_is_read_rightly(function, reading):
    assert read_forward(function) == reading
