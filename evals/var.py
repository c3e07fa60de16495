"""What VAR moves in a vision-language model: its sinks, the rows it changes, and a picture of the attention.

    python evals/var.py [--model lab-llava] [--out build/var]

Asks the model about a held-out image, without and with VAR, and checks what must hold: text alone gives the bits of the
unpatched model, and no tensor of queries by keys is held for a long prompt. Writes `picture.png` and `result.json`;
exits 1 if something does not hold.

`lab-llava` is too small to have learned sinks: no dimension of its first token stands out. So two dimensions in which
a few tokens of the image do are taken, with a small `tau`, and the numbers show the mechanism and not a gain.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor

import patchattn
from patchattn import lab, var
from patchattn.loading import load_model
from patchattn.train.images import prompt
from patchattn_kernels.attention import MASK_ELEMENTS


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-llava")
    parser.add_argument("--dims", type=int, nargs="+", help="dimensions in which sinks show; default: see above")
    parser.add_argument("--tau", type=float, default=2.0)
    parser.add_argument("--min-visual", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=1800, help="tokens of the long prompt")
    parser.add_argument(
        "--digit", type=int, default=1700, help="which of scikit-learn's digits the model is asked about"
    )
    parser.add_argument("--out", type=Path, default=Path("build/var"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = load_model(lab.resolve(args.model), dtype="float32")
    processor = AutoProcessor.from_pretrained(lab.resolve(args.model))
    inputs = asked(processor, args.digit)
    text = {"input_ids": inputs["input_ids"][:, -9:]}
    heads = model.config.get_text_config().num_attention_heads
    filler = inputs["input_ids"][:, -1:].expand(-1, args.length - inputs["input_ids"].shape[1])
    long = {**inputs, "input_ids": torch.cat([inputs["input_ids"], filler], dim=1)}
    long["attention_mask"] = torch.ones_like(long["input_ids"])
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dims = var.find_sink_dims(model)
        before, plain = model(**inputs).logits, model(**text).logits
        args.dims = args.dims or some_dims(model, inputs, args.tau)
        patchattn.patch(model, patchattn.VAR(sink_dims=args.dims, tau=args.tau, min_visual=args.min_visual))
        after = model(**inputs).logits
        report = var.report(model)
        same = torch.equal(model(**text).logits, plain)
        with Largest() as seen:
            model(**long, use_cache=False, logits_to_keep=1)
        weights = var.image_weights(model, **inputs)
        file = var.picture(model, args.out / "picture.png", **inputs)
    sums = [float((layer.after - layer.before).sum(dim=-1).abs().max()) for layer in weights]
    square = heads * args.length**2
    result = {
        "model": args.model,
        "settings": {"sink_dims": args.dims, "tau": args.tau, "min_visual": args.min_visual},
        "dimensions found": list(dims),
        "said": [str(warning.message) for warning in said if "find_sink_dims" in str(warning.message)],
        "layers": report.to_dict()["layers"],
        "answer before and after": [processor.decode(x[0, -1].argmax()) for x in (before, after)],
        "text alone is bit-identical": same,
        "largest tensor": {"elements": seen.most, "queries x keys x heads": square, "tokens": args.length},
        "weight brought to the image": sums,
    }
    print(report)
    print(json.dumps(result, indent=2))
    print(f"picture: {file}")
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    moved = any(layer.moved > 0 for layer in report.layers)
    return int(not (same and moved and seen.most <= max(MASK_ELEMENTS, square // 4)))


def some_dims(model, inputs: dict[str, torch.Tensor], tau: float) -> list[int]:
    """Two dimensions in which some tokens of the image, a tenth at most, exceed `tau` entering the third layer."""
    hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0]
    image = hidden[inputs["input_ids"][0] == model.config.image_token_id]
    count = (image.abs() > tau * image.square().mean(dim=-1, keepdim=True).sqrt()).sum(dim=0)
    return ((count > 0) & (count <= len(image) // 10)).nonzero()[:2, 0].tolist()


def asked(processor, index: int) -> dict[str, torch.Tensor]:
    """The question of `lab-llava`'s training about one digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[index] * 255 / 16).astype("uint8")
    image = Image.fromarray(pixels).convert("RGB")
    return dict(processor(text=prompt(processor, "Which digit is this?"), images=image, return_tensors="pt"))


if __name__ == "__main__":
    sys.exit(main())
