"""Run a model once, whatever it is, so that there is something to explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RANDOM_TOKENS = 64


@dataclass(frozen=True)
class Trial:
    """What went in and what came out; `result` holds the cache, which `explain` wants alive."""

    given: str
    answer: str
    result: Any


def run(model: Any, tokenizer: Any = None, prompt: str | None = None, new_tokens: int = 32) -> Trial:
    """Generate from a prompt, or run one forward where the model does not generate.

    Without a prompt (or a tokenizer) the input is random, from a fixed seed.
    """
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if getattr(model, "can_generate", lambda: False)():
            return _generate(model, tokenizer, prompt, new_tokens, generator)
        if prompt is not None:
            raise ValueError(f"{type(model).__name__} generates no text, so it takes no prompt")
        if (size := getattr(config, "image_size", None)) is not None:
            height, width = (size, size) if isinstance(size, int) else size
            shape = (1, getattr(config, "num_channels", 3), height, width)
            pixels = torch.randn(shape, generator=generator).to(_like(model))
            return Trial(f"random pixels {list(shape)}", _shapes(out := model(pixel_values=pixels)), out)
        if (vocabulary := getattr(config, "vocab_size", None)) is not None:
            ids = torch.randint(vocabulary, (1, RANDOM_TOKENS), generator=generator).to(model.device)
            return Trial(f"{RANDOM_TOKENS} random tokens", _shapes(out := model(input_ids=ids)), out)
    raise ValueError(f"no input could be made up for {type(model).__name__}: it has no vocabulary and no image size; "
                     "run it yourself and call patchattn.explain(model)")  # fmt: skip


def _generate(model: Any, tokenizer: Any, prompt: str | None, new_tokens: int, generator: torch.Generator) -> Trial:
    if prompt is not None and tokenizer is None:
        raise ValueError("there is no tokenizer beside this model, so it takes no prompt; leave the prompt out")
    if prompt is not None:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids, mask, given = inputs["input_ids"], inputs["attention_mask"], repr(prompt)
    else:
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (1, RANDOM_TOKENS), generator=generator).to(model.device)
        mask, given = torch.ones_like(ids), f"{RANDOM_TOKENS} random tokens"
    result = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                            return_dict_in_generate=True)  # fmt: skip
    new = result.sequences[0] if model.config.is_encoder_decoder else result.sequences[0, ids.shape[1] :]
    if prompt is None:
        return Trial(given, f"{len(new)} tokens", result)
    return Trial(given, repr(tokenizer.decode(new, skip_special_tokens=True)), result)


def _like(model: nn.Module) -> torch.Tensor:
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def _shapes(result: Any) -> str:
    outputs = {key: list(value.shape) for key, value in result.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"{key} {shape}" for key, shape in outputs.items())
