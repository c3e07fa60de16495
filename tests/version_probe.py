"""Run by test_versions.py under other releases of transformers: calls, not imports, are what breaks."""

from __future__ import annotations

import torch
import transformers
from transformers import DynamicCache

import patchattn
from patchattn.testing import FAMILIES, LENGTH, Setup, check_refusal, example, padded

CASES = {
    "dense": "dense",
    "duo": patchattn.DuoAttention(heads=0.5, sink=2, recent=5),
    "gate over duo": [patchattn.GatedAttention(init="random"), patchattn.DuoAttention(heads=0.0, sink=1, recent=4)],
    "mixed layers": {"0": patchattn.DuoAttention(heads=0.0, sink=2, recent=5), "1-": "dense"},
}


def close(ours: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    error = (ours - wanted).abs().max().item()
    assert error < 1e-5, f"{what}: {error:.1e}"


def tokens(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)[:, -8:]


def probe(family: str, what: object) -> None:
    setup = Setup(example("dense"), FAMILIES[family])
    model, inputs = setup.base(), setup.inputs
    wanted = setup.run(model, inputs)
    patchattn.patch(model, what)
    full = setup.run(model, inputs)  # forward
    if what == "dense":
        close(full, wanted, "dense and base")
    batch = padded(inputs, 6, "left")  # padded batch
    mask = batch["attention_mask"].bool()
    out = setup.run(model, batch)
    for row in range(2):
        ours = out[row][mask[row]]
        close(ours, full[row][: len(ours)], f"row {row} padded")
    cache, parts = DynamicCache(config=model.config), []  # decode
    for first, last in ((0, 9), (9, 16), *((i, i + 1) for i in range(16, LENGTH))):
        part = {"input_ids": inputs["input_ids"][:, first:last], "attention_mask": inputs["attention_mask"][:, :last]}
        parts.append(setup.run(model, part, past_key_values=cache))
    close(torch.cat(parts, dim=1), full, "decoded and at once")
    pads = int((~mask[1]).sum())  # generate()
    alone = {key: value[1:, pads:] for key, value in batch.items()}
    assert torch.equal(tokens(model, batch)[1:], tokens(model, alone)), "a padded row generates other tokens"
    assert torch.equal(tokens(model, inputs, num_beams=2), tokens(model, inputs, num_beams=2, use_cache=False)), "beams"
    patchattn.unpatch(model)
    assert torch.equal(setup.run(model, inputs), wanted), "unpatch"


if __name__ == "__main__":
    with torch.no_grad():
        for what in CASES.values():
            for family in ("llama", "qwen3"):
                probe(family, what)
        probe("mistral-window", "dense")
        vit = Setup(example("gated_attention"), FAMILIES["vit"])
        close(
            vit.run(patchattn.patch(vit.base(), "gated_attention"), vit.inputs), vit.run(vit.base(), vit.inputs), "vit"
        )
        refused = Setup(example("duo_attention"), FAMILIES["mistral-window"])
        check_refusal(refused, refused.reason() or "")
    print(f"ok with transformers {transformers.__version__}")
