"""What a step of DuoAttention's search for heads costs, against the same step in the published structure.

    python evals/benchmarks/head_search.py
    python evals/benchmarks/head_search.py --model FOLDER --length 2048

The published code runs teacher and student as two halves of one batch, so that the teacher's rows are kept for the
backward pass and recomputed in it. Here the teacher runs by itself, without gradients. Both give the same gradients,
which is checked first.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from timing import machine, paired, ratio

import patchattn
from patchattn import duo
from patchattn.living import freeze_base, patch_parameters
from patchattn_kernels import masked_attention, sink_window

ROUNDS = 7


class BothHalves(duo.HeadGates):
    """The published structure: the first half of the batch is the teacher, the second the student."""

    def forward(self, ctx: Any) -> torch.Tensor:
        half = ctx.q.shape[0] // 2
        with torch.no_grad():
            full = masked_attention(ctx.q[:half], ctx.k[:half], ctx.v[:half], causal=True, scale=ctx.scaling)
        rank = torch.arange(ctx.q.shape[2], device=ctx.q.device).expand(half, -1)
        streaming = sink_window(ctx.q[half:], ctx.k[half:], ctx.v[half:], rank, sink=self.config.sink,
                                recent=self.config.recent, scale=ctx.scaling)  # fmt: skip
        gate = self.gates.clamp(0, 1).repeat_interleave(self.group)[None, :, None, None]
        mixed = ((1 - gate) * streaming.float() + gate * full.float()).to(full.dtype)
        return torch.cat([full, mixed]).transpose(1, 2)


def open_model(name: str | None) -> Any:
    if name is not None:
        from patchattn.loading import load_model

        return load_model(name, dtype="float32")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
                                        num_key_value_heads=4, intermediate_size=1536, vocab_size=8192))  # fmt: skip


def prepared(name: str | None, method: duo.HeadGates, checkpointing: bool) -> tuple[Any, list[torch.nn.Parameter]]:
    model = freeze_base(patchattn.patch(open_model(name), method)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gates = list(patch_parameters(model).values())
    for gate in gates:
        gate.data.fill_(0.5)
    return model, gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repository; default: 12 layers, hidden size 512, at random")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sink", type=int, default=32)
    parser.add_argument("--recent", type=int, default=64)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep every layer's activations")
    given = parser.parse_args()
    sizes = dict(sink=given.sink, recent=given.recent)
    ours, our_gates = prepared(given.model, duo.HeadGates(**sizes), not given.no_checkpointing)
    theirs, their_gates = prepared(given.model, BothHalves(**sizes), not given.no_checkpointing)
    ids = torch.randint(0, ours.config.vocab_size, (1, given.length), generator=torch.Generator().manual_seed(0))

    def split() -> list[torch.Tensor]:
        with duo.teaching(ours):
            teacher = ours.base_model(ids, use_cache=False).last_hidden_state
        student = ours.base_model(ids, use_cache=False).last_hidden_state
        return list(torch.autograd.grad(duo.distill_loss(teacher, student, ids), our_gates))

    def together() -> list[torch.Tensor]:
        hidden = theirs.base_model(ids.repeat(2, 1), use_cache=False).last_hidden_state
        teacher, student = hidden.chunk(2)
        return list(torch.autograd.grad(duo.distill_loss(teacher.detach(), student, ids), their_gates))

    for mine, published in zip(split(), together(), strict=True):
        torch.testing.assert_close(mine, published, rtol=1e-3, atol=1e-6)
    seconds = paired({"ours": split, "published": together}, ROUNDS, warmup=1)
    middle, low, high = ratio(seconds, "ours", "published")
    print(f"{given.length} tokens; " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    for name, values in seconds.items():
        print(f"{name:<10} {statistics.median(values):8.3f} s")
    print(f"ours takes {middle:.2f} of the published structure's time (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
