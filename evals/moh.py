"""What MoH leaves of a lab checkpoint: as it is, patched and untrained, after its recipe, and after a control.

    patchattn convert moh/lab-vit
    patchattn convert moh/lab-vit patch=dense 'stages.0.ramps={}' output=lab-vit-control
    python evals/moh.py --checkpoint lab-vit --trained lab-vit-moh --control lab-vit-control --output results.json

The control is the same training with dense attention, `patch=null` where nothing is distilled. Counted are digits that
lab-vit classifies; digits that lab-dit draws, recognised by lab-vit, and its error in the noise of held-out images; for
lab-llama bits per byte of held-out text (`patchattn lab data lab-data`) and values of pairs recalled. Prints a table;
the output file also says how often each head was on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from diffusers import DDPMScheduler
from torch import Tensor

from patchattn import lab
from patchattn.attach import apply_plan
from patchattn.lab.evaluate import held_out, score
from patchattn.lab.text import TASK_SEED, bits_per_byte, read_texts, recall
from patchattn.living import methods_on, plan_of, watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.record import patch_of
from patchattn.train.images import collate
from patchattn.train.synthetic import make
from patchattn.train.tasks import Denoising

NOISES = 8  # for each image


def quality(checkpoint: str, model: Any, data: str, characters: int) -> dict[str, float]:
    """What a checkpoint is for, by name."""
    if checkpoint != "lab-llama":
        found = score(checkpoint, model)
        values = {found.what: found.value or 0.0}
        return values if checkpoint == "lab-vit" else {**values, "error of the noise": noise_error(checkpoint, model)}
    tokenizer = load_tokenizer(checkpoint)
    texts = [text[:characters] for text in read_texts(Path(data, "books", "held_out"))]
    pairs = make("mqar", tokenizer, TASK_SEED, pairs=8)
    return {
        "bits per byte": bits_per_byte(model, tokenizer, texts).bits_per_byte,
        "values of 8 pairs recalled": recall(model, pairs, length=512, samples=32).tokens,
    }


@torch.no_grad()
def noise_error(checkpoint: str, model: Any) -> float:
    """Mean squared error of the noise that a diffusion model finds in held-out images, the same noise each time."""
    schedule = DDPMScheduler.from_pretrained(Path(lab.resolve(checkpoint), "scheduler"))
    task, reader = Denoising(schedule), held_out(checkpoint, model, schedule)
    errors = []
    for draw in range(NOISES):
        batch = collate("denoising")([reader.sample(index, draw) for index in range(reader.size)])
        errors.append(task.loss(task.prediction(model(**task.inputs(batch))), batch) / batch["noise"].numel())
    return torch.stack(errors).mean().item()


def measured(checkpoint: str, model: Any, data: str, characters: int) -> dict[str, Any]:
    """The quality of a model and, where it is patched, the share of the tokens that each head was on for."""
    if patch_of(model) is None or methods_on(model)[0].name != "moh":
        return {"quality": quality(checkpoint, model, data, characters)}
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(ctx: Any) -> Tensor:
        out, name = ctx.attend(), ctx.attachment.site.name
        total, count = seen.get(name, (torch.zeros(ctx.q.shape[1]), 0))
        tokens = ctx.q.shape[0] * ctx.q.shape[2]
        load = torch.tensor(ctx.attachment.methods[0].report()["load"])
        seen[name] = total + tokens * load, count + tokens
        return out

    with watching(model, note):
        found = quality(checkpoint, model, data, characters)
    loads = [total / count for total, count in seen.values()]
    return {
        "quality": found,
        "pairs not chosen": 1 - torch.stack(loads).mean().item(),
        "load": [[round(share, 3) for share in load.tolist()] for load in loads],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, choices=["lab-vit", "lab-dit", "lab-llama"])
    parser.add_argument("--trained", required=True, metavar="FOLDER")
    parser.add_argument("--control", metavar="FOLDER")
    parser.add_argument("--data", default="lab-data", help="what `patchattn lab data` wrote")
    parser.add_argument("--characters", type=int, default=6000, help="of each held-out text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    trained, base = (load_model(name, dtype="float32") for name in (given.trained, given.checkpoint))
    models = {"as it is": base, "after the recipe": trained}
    if given.control is not None:
        models["after the same training without MoH"] = load_model(given.control, dtype="float32")
    models["with MoH, untrained"] = apply_plan(load_model(given.checkpoint, dtype="float32"), plan_of(trained))
    found = {name: measured(given.checkpoint, model, given.data, given.characters) for name, model in models.items()}
    names = list(found["as it is"]["quality"])
    print(
        "\n".join(
            [f"| {given.checkpoint} | {' | '.join(names)} | pairs not chosen |", "| --- " * (len(names) + 2) + "|"]
        )
    )
    for name, values in found.items():
        shown = [
            f"{value:.4f}" if what in ("bits per byte", "error of the noise") else f"{value:.1%}"
            for what, value in values["quality"].items()
        ]
        skipped = f"{values['pairs not chosen']:.1%}" if "load" in values else "0%"
        print(f"| {name} | {' | '.join(shown)} | {skipped} |")
    if given.output is not None:
        result = {
            "checkpoint": given.checkpoint,
            "characters": given.characters,
            "patch": plan_of(trained)[0]["methods"],
            "models": found,
        }
        given.output.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
