"""What a step of attention transfer costs: time against its parts, and memory against a version with two models.

    python evals/benchmarks/attention_transfer.py
    python evals/benchmarks/attention_transfer.py --model FOLDER --length 512

Time: the step; the base model's forward plus the backward pass of the patch's parameters, which it cannot do
without; and the usual alternative, a step of the same parameters on the language-model loss. Memory: the peak of a
process that runs three steps, with the base as its own teacher, and with a second copy of the model as teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from timing import machine, paired, ratio

import patchattn
from patchattn.environment import peak_memory
from patchattn.record import attachment_of, record_of
from patchattn.train import schema
from patchattn.train.objectives import Transfer, without_head
from patchattn.train.stages import prepare
from patchattn.train.tasks import Task

STEPS = 3
ROUNDS = 9


def open_model(name: str | None) -> Any:
    if name is not None:
        from patchattn.loading import load_model

        return load_model(name, dtype="float32")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
                                        num_key_value_heads=4, intermediate_size=1536, vocab_size=8192))  # fmt: skip


def batch_of(model: Any, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def patched(model: Any) -> Any:
    return patchattn.patch(model, patchattn.GatedAttention(kind="elementwise", init="random"))


def transfer_of(model: Any) -> Transfer:
    objective = prepare(model, schema.AttentionTransfer(steps=1), Task()).objective
    assert isinstance(objective, Transfer)
    return objective


def times(name: str | None, length: int) -> dict[str, list[float]]:
    """Seconds of the parts and of the steps, measured in turn."""
    model = open_model(name)
    base = open_model(name)
    batch = batch_of(model, length)
    inputs = without_head(base, {"input_ids": batch["input_ids"], "use_cache": False})
    patched(model)
    objective = transfer_of(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuning = prepare(model, schema.Tune(steps=1, parameters="patch", losses={"task": 1.0}), Task()).objective
    kept = objective(model, batch, 1.0, None, None)["transfer"]

    @torch.no_grad()
    def forward() -> None:
        base(**inputs)

    def backward() -> None:
        torch.autograd.grad(kept, parameters, retain_graph=True)

    def step() -> None:
        objective(model, batch, 1.0, None, None)["transfer"].backward()

    def tune() -> None:
        tuning(model, batch, 1.0, batch["labels"].numel(), None)["task"].backward()

    return paired({"forward": forward, "backward": backward, "step": step, "tune": tune}, ROUNDS, warmup=1)


def run_with_one_model(name: str | None, length: int) -> None:
    model = patched(open_model(name))
    objective, batch = transfer_of(model), batch_of(model, length)
    for _ in range(STEPS):
        objective(model, batch, 1.0, None, None)["transfer"].backward()


def run_with_two_models(name: str | None, length: int) -> None:
    """The same losses, against the attention outputs of another copy of the model."""
    model = open_model(name)
    teacher = copy.deepcopy(model)
    transfer_of(patched(model))
    batch, targets = batch_of(model, length), []
    for site in record_of(model).patched:
        teacher.get_submodule(site.name).o_proj.register_forward_pre_hook(lambda module, args: targets.append(args[0]))
    for _ in range(STEPS):
        targets.clear()
        with torch.no_grad():
            teacher(input_ids=batch["input_ids"], use_cache=False)
        wanted, losses = iter(targets), []

        def around(ctx: Any, wanted: Any = wanted, losses: list[Any] = losses) -> torch.Tensor:
            target = next(wanted).unflatten(-1, (ctx.q.shape[1], -1))
            losses.append(ctx.transfer_loss(target, "output"))
            return target

        for site in record_of(model).patched:
            attachment_of(site.module).around = around
        model(input_ids=batch["input_ids"], use_cache=False)
        torch.stack(losses).mean().backward()


def peak(mode: str, arguments: list[str]) -> float:
    """MiB that a process of its own has held at most."""
    command = [sys.executable, __file__, "--mode", mode, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repository; default: 12 layers, hidden size 512, at random")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=float, help="fail if the step costs more than this many times its parts")
    parser.add_argument("--mode", choices=("one", "two", "idle"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.mode is not None:
        if given.mode == "idle":
            open_model(given.model)
        else:
            {"one": run_with_one_model, "two": run_with_two_models}[given.mode](given.model, given.length)
        print(json.dumps(peak_memory() / 2**20))
        return
    arguments = [*(["--model", given.model] if given.model else []), "--length", str(given.length)]
    model = open_model(given.model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    del model
    seconds = times(given.model, given.length)
    seconds["parts"] = [a + b for a, b in zip(seconds["forward"], seconds["backward"])]
    found = {name: statistics.median(values) for name, values in seconds.items()}
    factor = {name: ratio(seconds, name, "parts")[0] for name in ("step", "tune")}
    print(
        f"{given.length} tokens x 2, weights {weights:,.0f} MiB; " + ", ".join(f"{k} {v}" for k, v in machine().items())
    )
    print(f"base forward                        {found['forward']:8.3f} s")
    print(f"backward of the patch's parameters  {found['backward']:8.3f} s")
    print(f"step of attention transfer          {found['step']:8.3f} s   {factor['step']:.2f} x both together")
    print(f"step on the language-model loss     {found['tune']:8.3f} s   {factor['tune']:.2f} x both together")
    memory = {mode: peak(mode, arguments) for mode in ("idle", "one", "two")}
    print(f"peak memory, model opened only      {memory['idle']:8,.0f} MiB")
    print(f"peak memory, one copy of the model  {memory['one']:8,.0f} MiB")
    print(f"peak memory, two copies             {memory['two']:8,.0f} MiB")
    if given.limit is not None and factor["step"] > given.limit:
        sys.exit(f"the step costs {factor['step']:.2f} x its parts; the limit is {given.limit}")


if __name__ == "__main__":
    main()
