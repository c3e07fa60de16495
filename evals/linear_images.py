"""What linear attention leaves of the image checkpoints: digits that lab-vit classifies, digits that lab-dit draws.

    patchattn convert hedgehog/lab-vit
    patchattn convert hedgehog/lab-dit
    python evals/linear_images.py lab-vit=lab-vit-hedgehog lab-dit=lab-dit-hedgehog --output results.json

Each checkpoint as it is, patched but untrained, and converted. What lab-dit draws is recognised by lab-vit; beside it
stands its error in the noise of held-out images. Prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from moh import quality

from patchattn.attach import apply_plan
from patchattn.living import plan_of
from patchattn.loading import load_model
from patchattn.record import patch_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="CHECKPOINT=FOLDER", help="conversions of lab-vit or lab-dit")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for checkpoint, _, folder in (text.partition("=") for text in given.models):
        if checkpoint not in ("lab-vit", "lab-dit"):
            parser.error(f"{checkpoint!r} is no image checkpoint; name lab-vit or lab-dit, as in lab-vit=FOLDER")
        trained = load_model(folder, dtype="float32")
        assert patch_of(trained) is not None, f"{folder} is not patched"
        models = {
            "as it is": load_model(checkpoint, dtype="float32"),
            "patched, untrained": apply_plan(load_model(checkpoint, dtype="float32"), plan_of(trained)),
            "after the recipe": trained,
        }
        values = {name: quality(checkpoint, model, "", 0) for name, model in models.items()}
        found[checkpoint] = {"patch": plan_of(trained)[0]["methods"], "models": values}
        columns = list(values["as it is"])
        print("\n".join([f"| {checkpoint} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]))
        for name, row in values.items():
            shown = [f"{value:.4f}" if "error" in what else f"{value:.1%}" for what, value in row.items()]
            print(f"| {name} | {' | '.join(shown)} |", flush=True)
    if given.output is not None:
        given.output.write_text(
            json.dumps({"checkpoints": found, "machine": machine()}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
