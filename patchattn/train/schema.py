"""What a recipe says, as plain dataclasses. `recipe.py` reads YAML into these and checks every value.

Each field's text in `explain` is what `patchattn recipes check` and the docs show; `allowed` lists the values of a
choice. A field without a default must be given.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

VERSION = 1
TASKS = ("causal-lm", "image-text", "image-classification", "denoising")
LOSS_TERMS = ("task", "logits", "hidden", "auxiliary", "sink")


def setting(
    explain: str,
    default: Any = dataclasses.MISSING,
    *,
    allowed: tuple[Any, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A recipe field: what it means, and what it may be."""
    metadata = {"explain": explain, "allowed": allowed, "least": least, "above": above, "most": most}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A byte-level BPE trained on the recipe's own text."""

    vocab_size: int = setting("how many tokens, special ones included", 1024, least=261)
    split_digits: bool = setting("every digit is a token of its own", True)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The pretrained model, or the configuration of a new one."""

    name: str | None = setting("hub repository, folder, or lab checkpoint", None)
    config: dict[str, Any] | None = setting("a new model's configuration, with model_type (or _class_name)", None)
    task: str = setting("what the model is trained for", "causal-lm", allowed=TASKS)
    tokenizer: TokenizerSpec | str | None = setting("tokenizer to train, or the name of one to use", None)
    vision: str | None = setting("vision model to join with `name` into a LLaVA model (image-text)", None)
    revision: str | None = setting("branch, tag or commit of the repository", None)
    dtype: str = setting("of the weights", "float32", allowed=("auto", "float32", "bfloat16", "float16"))
    trust_remote_code: bool = setting("allow code from the model's repository", False)
    scheduler: dict[str, Any] | None = setting("noise schedule of a diffusion model (diffusers' DDPMScheduler)", None)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of data."""

    kind: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm",)
    weight: float = setting("share of the samples, relative to the other sources", 1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """Plain text: a hub data set, or txt, jsonl, json, parquet, csv files or folders of them."""

    kind: ClassVar[str] = "text"
    path: str | list[str] = setting("hub data set, file, folder, or glob")
    name: str | None = setting("configuration of the hub data set", None)
    split: str = setting("of the data set", "train")
    column: str = setting("that holds the text", "text")
    streaming: bool = setting("read as it comes, for sets too large for the disk", False)
    separator: str | None = setting("in .txt files, what stands between documents; null: a file is one document", None)
    limit: int | None = setting("documents to take at most", None, least=1)


@dataclass(frozen=True, kw_only=True)
class ChatSource(Source):
    """Conversations, through the tokenizer's chat template; only the assistant's tokens carry labels."""

    kind: ClassVar[str] = "chat"
    path: str | list[str] = setting("hub data set, file, folder, or glob")
    name: str | None = setting("configuration of the hub data set", None)
    split: str = setting("of the data set", "train")
    column: str = setting("that holds the list of {role, content}", "messages")
    streaming: bool = setting("read as it comes", False)
    all_tokens: bool = setting("labels on every token, not on the assistant's alone", False)
    limit: int | None = setting("conversations to take at most", None, least=1)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(Source):
    """A generated task: endless, the same for the same seed, with any tokenizer."""

    kind: ClassVar[str] = "synthetic"
    generator: str = setting(
        "which task", allowed=("passkey", "needle", "mqar", "copy", "echo", "lookup", "multi_passkey")
    )
    options: dict[str, Any] = setting("settings of the generator, such as pairs, depth, length", {})


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Labelled images: `digits` (scikit-learn's), a hub data set, an image folder, or .npz with images and labels."""

    kind: ClassVar[str] = "images"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "denoising", "image-text")
    path: str = setting("digits, hub data set, folder of class folders, or .npz file")
    name: str | None = setting("configuration of the hub data set", None)
    split: str = setting("of the data set", "train")
    image_column: str = setting("of a hub data set", "image")
    label_column: str = setting("of a hub data set", "label")
    shift: int = setting("pixels by which training images are moved at random", 0, least=0)
    flip: bool = setting("mirror training images at random", False)
    question: str = setting("asked about each image (image-text)", "Which digit is this?")
    names: list[str] | None = setting("the answers, class by class; default: the data set's names or 0, 1, ...", None)
    limit: int | None = setting("images to take at most", None, least=1)


SOURCES: tuple[type[Source], ...] = (TextSource, ChatSource, SyntheticSource, ImageSource)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What the model sees."""

    train: list[Source] = setting("one source or several, mixed by weight")
    held_out: list[Source] | float = setting("share of the training sources kept for evaluation, or sources", 0.02)
    length: int = setting("tokens in a sample", 1024, least=8)
    packing: bool = setting("fill each sample with several documents, each seeing itself alone", True)
    held_out_samples: int = setting("samples an evaluation reads at most", 256, least=1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run on the model as the stages before left it. Give `steps` or `tokens`."""

    kind: ClassVar[str] = ""
    steps: int | None = setting("optimizer steps", None, least=1)
    tokens: int | None = setting("train on this many tokens instead of a number of steps", None, least=1)
    batch_size: int = setting("samples per device and step", 8, least=1)
    learning_rate: float = setting("at its highest", 1e-3, above=0)
    length: int | None = setting("tokens in a sample, in this stage", None, least=8)
    rates: dict[str, float] = setting("factors on the learning rate, by glob over parameter names", {})
    ramps: dict[str, float] = setting("run-time settings of the methods that begin at this value and move, step by "
                                      "step, to that of the patch", {})  # fmt: skip
    ramp_share: float = setting("share of the steps in which they do", 0.33, above=0, most=1)
    data: DataSpec | None = setting("other data for this stage", None)
    trainer: dict[str, Any] = setting("any other field of transformers' TrainingArguments", {})


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Stage):
    """Each patched layer learns to give what the base attention gives; all layers at once, independently."""

    kind: ClassVar[str] = "attention_transfer"
    loss: str = setting("on outputs, attention maps or block maps; auto: what the method asks for", "auto",
                        allowed=("auto", "output", "map", "block_map"))  # fmt: skip
    layerwise: bool = setting("one layer's graph in memory at a time; the same gradients, for models that barely fit",
                              False)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trained(Stage):
    """What the stages that run the patched model to its end have in common."""

    losses: dict[str, float] = setting(
        "weights of the terms: task (language model, classes, noise), logits and hidden (distilled from the base "
        "model), auxiliary (what the methods add), sink (mean attention on the first token of each sequence; less than "
        "0 draws attention there)", {}
    )  # fmt: skip
    on: str | int = setting("tokens that are distilled: all, labelled, or a number: the last ones", "all")
    top_k: int | None = setting("distil the teacher's k likeliest tokens only", None, least=1)
    temperature: float = setting("of the distilled logits", 1.0, above=0)

    DEFAULT_LOSSES: ClassVar[dict[str, float]] = {"task": 1.0, "auxiliary": 1.0}


@dataclass(frozen=True, kw_only=True)
class Distill(Trained):
    """The patched model learns the base model's logits or hidden states; the base is the same weights."""

    kind: ClassVar[str] = "distill"
    parameters: str | list[str] = setting("patch, all, or globs over parameter names", "patch")
    DEFAULT_LOSSES: ClassVar[dict[str, float]] = {"logits": 1.0, "auxiliary": 1.0}


@dataclass(frozen=True, kw_only=True)
class Tune(Trained):
    """Training goes on: of the patch, of chosen parameters, or of the whole model."""

    kind: ClassVar[str] = "tune"
    parameters: str | list[str] = setting("patch, all, or globs over parameter names", "all")


@dataclass(frozen=True, kw_only=True)
class Lora(Trained):
    """LoRA on the projections, through PEFT, while the patch's own parameters learn on."""

    kind: ClassVar[str] = "lora"
    rank: int = setting("of the adapters", 8, least=1)
    alpha: float = setting("LoRA's scale", 16.0, above=0)
    dropout: float = setting("on the adapters' input", 0.0, least=0, most=1)
    targets: list[str] = setting("modules that get an adapter", ["q_proj", "k_proj", "v_proj", "o_proj"])
    patch: bool = setting("train the patch's own parameters too", True)
    merge: bool = setting("merge the adapters at the end; otherwise they are saved beside the patch", True)


@dataclass(frozen=True, kw_only=True)
class IdentifyHeads(Stage):
    """DuoAttention's search for the heads that need the whole context; the patch becomes the pattern it finds."""

    kind: ClassVar[str] = "identify_heads"
    sink: int = setting("first tokens a streaming head sees", 128, least=0)
    recent: int = setting("last tokens a streaming head sees", 256, least=1)
    penalty: float = setting("weight of the L1 term", 0.05, least=0)
    teacher_branch: bool = setting("the student's full part comes from the teacher's stream, as published", True)
    share: float = setting("of the heads that stay full in the pattern", 0.5, least=0, most=1)
    deploy_sink: int | None = setting("sink of the DuoAttention that is put on; default: the same", None, least=0)
    deploy_recent: int | None = setting("recent of the DuoAttention that is put on; default: the same", None, least=1)


STAGES: tuple[type[Stage], ...] = (AttentionTransfer, Distill, Tune, Lora, IdentifyHeads)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop early."""

    hours: float | None = setting("wall-clock; when spent, a checkpoint is saved and the same command goes on", None,
                                  above=0)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole conversion: what `patchattn convert` runs."""

    version: int = setting("of this schema", allowed=(VERSION,))
    model: ModelSpec = setting("what is converted")
    data: DataSpec = setting("what it is trained on")
    stages: list[Stage] = setting("how, one after the other")
    output: str = setting("folder of the result; the same folder goes on where a run stopped")
    save_dtype: str | None = setting("of the saved weights; null: as they were trained", None,
                                     allowed=("float32", "bfloat16", "float16"))  # fmt: skip
    about: str = setting("one line for `patchattn recipes list`", "")
    patch: Any = setting("methods, or {layers: methods}; as for patchattn.patch", None)
    budget: Budget = setting("when to stop early", Budget())
    trainer: dict[str, Any] = setting("fields of transformers' TrainingArguments, for every stage", {})
    seed: int = setting("of the data, the initial weights and the training", 0, least=0)
