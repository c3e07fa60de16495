"""A language model and a vision model joined into a LLaVA model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .images import image_processor, image_shape

IMAGE_TOKEN = "<image>"
LAYER = -2  # of the vision model's hidden states, as published: the last one serves its own head


def join_llava(language_model: Any, tokenizer: Any, vision_model: Any) -> tuple[nn.Module, Any]:
    """A `LlavaForConditionalGeneration` of the two, with a new projector between them, and its processor.

    Visual Instruction Tuning, Liu et al., 2023, arXiv 2304.08485. The language model reads every patch of the image;
    a class token is left out.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    vision = vision_model.base_model
    extra = _extra_tokens(vision)
    strategy = "default" if extra else "full"
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=LAYER,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    for part in (config.vision_config, config.text_config):
        part.name_or_path = ""  # else the result would tell in which folders its parts lay
    model = LlavaForConditionalGeneration(config).to(language_model.dtype)
    # Not strict: a classifier has no pooler; LLaVA makes one and does not use it.
    model.model.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config = language_model.generation_config
    return model, _processor(tokenizer, vision.config, extra, strategy)


def _extra_tokens(vision: Any) -> int:
    """How many tokens, such as the class token, the vision model has beside those of the patches."""
    channels, height, width = image_shape(vision.config)
    with torch.no_grad():
        empty = torch.zeros(1, channels, height, width, dtype=vision.dtype, device=vision.device)
        tokens = vision(pixel_values=empty).last_hidden_state.shape[1]
    return tokens - (height // vision.config.patch_size) * (width // vision.config.patch_size)


def _processor(tokenizer: Any, config: Any, extra: int, strategy: str) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=image_processor(config),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        image_token=IMAGE_TOKEN,
    )
