"""A tokenizer of one's own: a byte-level BPE trained on the text of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .documents import Documents
from .schema import ChatSource, Source, TextSource, TokenizerSpec

TRAINING_TEXT = 100_000_000  # characters that a tokenizer is trained on at most
END, PAD, IMAGE, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<image>", "<|user|>", "<|assistant|>"
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|>' + message['content'] -}}
  {%- else -%}
    {{- message['content'] -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def training_texts(sources: list[Source]) -> Iterator[str]:
    """The text of these sources, for training a tokenizer: the beginning, if there is very much of it."""
    left = TRAINING_TEXT
    for source in sources:
        if not isinstance(source, (TextSource, ChatSource)):
            continue
        for document in Documents(source):
            for part in [document] if isinstance(document, str) else [str(message["content"]) for message in document]:
                if left <= 0:
                    return
                yield part[:left]
                left -= len(part)
    if left == TRAINING_TEXT:
        raise ValueError("data: a tokenizer is trained on text, and no source of the recipe has any")


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Any:
    """A byte-level BPE of this size, trained on these texts: any text goes in and comes out the same.

    `<|endoftext|>` begins a text and ends a document; `<|user|>` and `<|assistant|>` are the chat template's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, IMAGE, USER, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    pieces: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if spec.split_digits:
        pieces.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
