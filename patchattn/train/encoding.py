"""Documents to tokens, and which of them carry a loss."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .schema import ChatSource, TextSource

BATCH = 1_000_000  # characters that are tokenized at once
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks the assistant's part of a chat template


class Encoded(NamedTuple):
    """A document's tokens, and which of them carry a loss (None: all)."""

    ids: list[int] | NDArray[Any]
    labelled: list[bool] | NDArray[Any] | None


class Encoder:
    """Documents to tokens: each ends with the tokenizer's EOS if it has one, and starts with BOS where it adds one."""

    labels = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32

    def __call__(self, texts: list[Any]) -> list[Encoded]:
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return [Encoded(ids if eos is None or ids[-1:] == [eos] else [*ids, eos], None) for ids in encoded]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the tokenizer, as far as it matters here."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content = json.loads(tokenizer.backend_tokenizer.to_str())
            content.update(truncation=None, padding=None)  # these follow the last call
        else:
            content = tokenizer.get_vocab()
        said = [content, tokenizer.eos_token_id]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return {"tokenizer": digest, "vocabulary": len(tokenizer)}


class ChatEncoder(Encoder):
    """Conversations to tokens by the tokenizer's chat template; the assistant's tokens carry the loss."""

    def __init__(self, tokenizer: Any, all_tokens: bool) -> None:
        super().__init__(tokenizer)
        self.labels = not all_tokens
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(
                f"data: kind: chat needs a chat template, and the tokenizer {name!r} has none; use the tokenizer of an "
                "instruct model, or kind: text"
            ) from None

    def __call__(self, chats: list[Any]) -> list[Encoded]:
        if not self.labels:
            return [Encoded(self._render(chat), None) for chat in chats]
        if not GENERATION.search(self.template):
            return [self._by_prefixes(chat) for chat in chats]
        marked = [
            self.tokenizer.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
            for chat in chats
        ]
        return [Encoded(one["input_ids"], [bool(flag) for flag in one["assistant_masks"]]) for one in marked]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | {"template": hashlib.sha256(self.template.encode()).hexdigest()}

    def _render(self, chat: Any, **options: Any) -> list[int]:
        options.update(return_dict=True, tokenizer_kwargs={"verbose": False})
        return self.tokenizer.apply_chat_template(chat, **options)["input_ids"]

    def _by_prefixes(self, chat: list[dict[str, Any]]) -> Encoded:
        """What an assistant's message adds to the conversation before it, generation prompt included, is its own."""
        ids = self._render(chat)
        labelled = np.zeros(len(ids), dtype=bool)
        for index, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._render(chat[:index], add_generation_prompt=True) if index else []
            after = self._render(chat[: index + 1])
            if not before or after[: len(before)] != before or ids[: len(after)] != after:
                raise ValueError(
                    f"data: this tokenizer's chat template does not render message {index} "
                    f"({str(message['content'])[:40]!r}) as a continuation of those before it, so the assistant's "
                    "tokens cannot be told; mark them in the template with {% generation %}, or train on all tokens "
                    "(all_tokens: true)"
                )
            labelled[len(before) : len(after)] = True
        return Encoded(ids, labelled)


def encoder_for(source: TextSource | ChatSource, tokenizer: Any) -> Encoder:
    return ChatEncoder(tokenizer, source.all_tokens) if isinstance(source, ChatSource) else Encoder(tokenizer)


def batches(documents: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    """Documents in lists of about so many characters."""
    batch: list[Any] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
