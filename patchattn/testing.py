"""The contract every method must keep, as a suite anybody can run on a method of their own.

    import patchattn.testing
    print(patchattn.testing.check_method(MyMethod))

Each check builds tiny models with random weights, so the whole suite runs on a laptop in about a minute.
A method that does not fit a family (see `Method.unfit`) must say so and leave the model untouched.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import attach, cache, living, record
from .method import Method, as_methods
from .sites import default_sites, find_sites

if TYPE_CHECKING:
    from .context import AttentionContext

TOLERANCE = 1e-5  # float32, on logits
LENGTH = 24


# ---- families ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A tiny model and how to call it.

    `inputs(rows, length)` gives keyword arguments for one forward; `decoder` says whether it generates text.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    decoder: bool
    needs: str | None = None  # a package that must be installed


def _text_inputs(rows: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(result: Any) -> Tensor:
    return result.logits


TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TEXT))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=7))


IMAGE_TOKEN = 63


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4, projection_dim=16)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN,
                         image_seq_length=4, vision_feature_layer=-1, pad_token_id=0)  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _llava_inputs(rows: int, length: int) -> dict[str, Any]:
    inputs = _text_inputs(rows, length)
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return inputs


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16,
                  patch_size=4, num_labels=5)
    )  # fmt: skip


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, in_channels=3, num_layers=2,
                                 sample_size=8, patch_size=2, num_embeds_ada_norm=10, out_channels=3)  # fmt: skip


def _dit_inputs(rows: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {"hidden_states": torch.randn(rows, 3, 8, 8, generator=generator), "timestep": torch.arange(rows) + 1,
            "class_labels": torch.arange(rows) % 10}  # fmt: skip


def _image_inputs(rows: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _llama, _text_inputs, _logits, decoder=True),
        Family("qwen3", _qwen3, _text_inputs, _logits, decoder=True),
        Family("mistral-window", _mistral, _text_inputs, _logits, decoder=True),
        Family("llava", _llava, _llava_inputs, _logits, decoder=True),
        Family("vit", _vit, _image_inputs, _logits, decoder=False),
        Family("dit", _dit, _dit_inputs, lambda result: result.sample, decoder=False, needs="diffusers"),
    )
}


# ---- one method on one family --------------------------------------------------------------------------------


@dataclass
class Setup:
    """A method and a family under test; models are built alike every time."""

    method: Method
    family: Family

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.family.build().eval()
        for name, parameter in model.named_parameters():  # zero-initialised outputs would hide every difference
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05 if name.endswith("weight") else 0.01)
        return model

    def patched(self) -> nn.Module:
        model = attach.patch(self.base(), self.method)
        torch.manual_seed(1)
        for parameter in living.patch_parameters(model).values():  # an identity would hide what the method does
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def reason(self) -> str | None:
        """Why the method does not fit this family, or None."""
        sites = default_sites(find_sites(self.base()))
        reasons = [attach.unfit(site, [self.method]) for site in sites]
        return reasons[0] if reasons and all(reasons) else None

    def run(self, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
        return self.family.output(model(**inputs, **kwargs))

    @property
    def inputs(self) -> dict[str, Any]:
        return self.family.inputs(2, LENGTH)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(ours: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    error = (ours.float() - wanted.float()).abs().max().item()
    _require(error <= tolerance, f"{what}: they differ by {error:.2e}, more than {tolerance:.0e}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that unpatching must restore: names, hooks, attributes, configs."""
    state: dict[str, Any] = {"parameters": list(model.state_dict()), "modules": [n for n, _ in model.named_modules()]}
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        state[name] = (sorted(vars(module)), hooks, attributes, module.training)
        config = vars(module).get("config")
        if hasattr(config, "to_dict"):
            state[f"config of {name}"] = (config.to_dict(), dict(vars(config)), config._attn_implementation)
        if hasattr(module, "processor"):
            state[f"processor of {name}"] = id(module.processor)
    return state


def check_unpatch_restores_everything(setup: Setup) -> None:
    """patch, run, unpatch: names, hooks, attributes, configs and outputs are those of before, bit for bit."""
    model, inputs = setup.base(), setup.inputs
    with torch.no_grad():
        wanted, before = setup.run(model, inputs), snapshot(model)
        attach.patch(model, setup.method)
        setup.run(model, inputs)
        attach.unpatch(model)
        after = snapshot(model)
        for key in before:
            _require(
                before[key] == after.get(key),
                f"unpatch left {key or 'the model'} changed: {before[key]} -> {after.get(key)}",
            )
        _require(torch.equal(setup.run(model, inputs), wanted), "outputs after unpatch are not bit-identical")


def check_disabled_is_the_base_model(setup: Setup) -> None:
    """Inside `disabled` the outputs are the base model's, bit for bit, and after it the patch is back."""
    model, inputs = setup.patched(), setup.inputs
    with torch.no_grad():
        wanted, ours = setup.run(setup.base(), inputs), setup.run(model, inputs)
        with living.disabled(model):
            _require(
                torch.equal(setup.run(model, inputs), wanted), "outputs inside disabled() are not the base model's"
            )
        _require(torch.equal(setup.run(model, inputs), ours), "outputs after disabled() are not the patched model's")


def check_exact_methods_equal_the_base(setup: Setup) -> None:
    """A method that declares `exact` computes what the unpatched model computes."""
    if setup.method.exact:
        with torch.no_grad():
            _close(setup.run(setup.patched(), setup.inputs), setup.run(setup.base(), setup.inputs), "patched and base")


def check_one_model_leaves_others_alone(setup: Setup) -> None:
    """Patching one model changes no other model of the same class in the process."""
    other, inputs = setup.base(), setup.inputs
    with torch.no_grad():
        wanted = setup.run(other, inputs)
        setup.run(setup.patched(), inputs)
        _require(torch.equal(setup.run(other, inputs), wanted), "an unpatched model of the same class changed")


def check_rows_do_not_mix(setup: Setup) -> None:
    """A row's result does not depend on its batch mates."""
    model, inputs = setup.patched(), setup.inputs
    with torch.no_grad():
        together = setup.run(model, inputs)
        for row in range(2):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            _close(setup.run(model, alone), together[row : row + 1], f"row {row} alone and in the batch")


def check_only_the_patch_takes_gradients(setup: Setup) -> None:
    """After `freeze_base` the declared parameters get gradients, all of them and nothing else."""
    model = living.freeze_base(setup.patched())
    declared = living.patch_parameters(model)
    if not declared:
        return
    _learn(setup, model)
    for name, parameter in record.root_of(model).named_parameters():
        if name in declared:
            _require(parameter.grad is not None, f"{name} belongs to the patch and got no gradient")
            _require(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")  # type: ignore[union-attr]
            _require(bool(parameter.grad.any()), f"the gradient of {name} is all zero")  # type: ignore[union-attr]
        else:
            _require(parameter.grad is None, f"{name} belongs to the base and got a gradient")


def _learn(setup: Setup, model: nn.Module) -> None:
    """Gradients of what the method is trained by: its output, or where that does not teach it, a transfer."""
    kinds = setup.method.transfer_kinds
    if "output" in kinds:
        out = setup.run(model, setup.inputs)
        (out.float() * torch.randn_like(out.float())).sum().backward()
        return
    found: list[Tensor] = []

    def around(ctx: AttentionContext) -> Tensor:
        target = ctx.base()
        found.append(ctx.transfer_loss(target, kinds[0]))
        return target

    with living.watching(model, around):
        setup.run(model, setup.inputs)
    torch.stack(found).sum().backward()


def check_bf16_is_close(setup: Setup) -> None:
    """In bfloat16 the method adds no error beyond what the base model itself makes; for most tokens, if it chooses."""
    inputs = setup.inputs
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        errors = []
        for build in (setup.base, setup.patched):
            wanted = setup.run(build(), inputs)
            ours = setup.run(build().bfloat16(), low)
            _require(ours.dtype == torch.bfloat16, f"the output of a bfloat16 model is {ours.dtype}")
            if setup.method.chooses:
                error = (ours.float() - wanted).flatten(0, -2).norm(dim=-1).median()
                errors.append((error / wanted.flatten(0, -2).norm(dim=-1).median()).item())
            else:
                errors.append(((ours.float() - wanted).norm() / wanted.norm()).item())
        _require(
            errors[1] <= 3 * errors[0] + 1e-3, f"relative error {errors[1]:.2e}; the base model makes {errors[0]:.2e}"
        )


def check_compile_equals_eager(setup: Setup) -> None:
    """`torch.compile(fullgraph=True)` of a whole forward: no graph break, the same result."""
    model, inputs = setup.patched(), setup.inputs
    torch._dynamo.reset()
    options = {"use_cache": False} if setup.family.decoder else {}
    with torch.no_grad():
        wanted = setup.run(model, inputs, **options)  # first, since transformers sets itself up in the first call
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        _close(setup.run(compiled, inputs, **options), wanted, "compiled and eager")


def check_save_and_load_keep_the_outputs(setup: Setup) -> None:
    """Saved, and loaded onto another copy of the base model, the patch computes the same."""
    from . import hub

    model, inputs = setup.patched(), setup.inputs
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        hub.save(model, folder + "/patch")
        again = hub.load(setup.base(), folder + "/patch")
        _require(torch.equal(setup.run(again, inputs), setup.run(model, inputs)), "outputs after load are not the same")


def check_training_mode_and_checkpointing(setup: Setup) -> None:
    """In train mode, gradient checkpointing changes no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model: Any = setup.patched().train()
        if checkpointing and hasattr(model, "gradient_checkpointing_enable"):  # transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif checkpointing:  # diffusers
            model.enable_gradient_checkpointing()
        options = {"use_cache": False} if setup.family.decoder else {}
        setup.run(model, setup.inputs, **options).float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    _require(gradients[0].keys() == gradients[1].keys(), "checkpointing changed which parameters get gradients")
    for name, gradient in gradients[0].items():
        _close(gradients[1][name], gradient, f"the gradient of {name}", 1e-4 * max(1.0, gradient.abs().max().item()))


# ---- decoders only -------------------------------------------------------------------------------------------


def _prompt(inputs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Tokens `[first, last)` of the inputs as one call on a cache; images come with the first."""
    part = {"input_ids": inputs["input_ids"][:, first:last], "attention_mask": inputs["attention_mask"][:, :last]}
    others = {key: value for key, value in inputs.items() if key not in part}
    return {**part, **(others if first == 0 else {})}


def padded(inputs: dict[str, Any], extra: int, side: str) -> dict[str, Any]:
    """The inputs with rows of different lengths (each three tokens shorter than the last), padded to one width."""
    rows, length = inputs["input_ids"].shape
    width = length + extra
    result = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    result["input_ids"] = torch.zeros(rows, width, dtype=torch.long)
    result["attention_mask"] = torch.zeros(rows, width, dtype=torch.long)
    for row in range(rows):
        kept = inputs["input_ids"][row, : length - 3 * row]
        place = slice(width - len(kept), width) if side == "left" else slice(0, len(kept))
        result["input_ids"][row, place] = kept
        result["attention_mask"][row, place] = 1
    return result


def check_incremental_equals_full(setup: Setup) -> None:
    """Prompt in chunks, then token by token, gives what one forward gives: also past every window."""
    from transformers import DynamicCache

    model, inputs = setup.patched(), setup.inputs
    with torch.no_grad():
        full = setup.run(model, inputs, use_cache=False)
        for chunks in ([LENGTH], [9, 1, 1, 1, 7, 1, 1, 1, 2], [6, 13, 5], [5] + [1] * (LENGTH - 5)):
            kept, done, parts = DynamicCache(config=model.config), 0, []
            for length in chunks:
                parts.append(setup.run(model, _prompt(inputs, done, done + length), past_key_values=kept))
                done += length
            _close(torch.cat(parts, dim=1), full, f"in chunks {chunks} and at once")


def check_padding_does_not_matter(setup: Setup) -> None:
    """Left or right, little or much: padding leaves the results of the real tokens as they are."""
    model = setup.patched()
    inputs = setup.inputs
    with torch.no_grad():
        alone = setup.run(model, inputs)
        for side in ("left", "right"):
            for extra in (0, 1, 40):
                batch = padded(inputs, extra, side)
                out, mask = setup.run(model, batch), batch["attention_mask"].bool()
                for row in range(2):
                    ours = out[row][mask[row]]
                    _close(ours, alone[row][: len(ours)], f"row {row}, {int((~mask[row]).sum())} pads on the {side}")


def check_padded_decoding_equals_unpadded(setup: Setup) -> None:
    """A left-padded batch fed in chunks and token by token equals each row by itself."""
    from transformers import DynamicCache

    model, inputs = setup.patched(), setup.inputs
    if "pixel_values" in inputs:
        return  # the image would have to stand at the same place in every chunk
    batch = padded(inputs, 4, "left")
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        kept, done, parts = DynamicCache(config=model.config), 0, []
        for length in [8, 3] + [1] * (width - 11):
            parts.append(setup.run(model, _prompt(batch, done, done + length), past_key_values=kept))
            done += length
        out = torch.cat(parts, dim=1)
        for row in range(2):
            pads = int((batch["attention_mask"][row] == 0).sum())
            ids = batch["input_ids"][row : row + 1, pads:]
            wanted = setup.run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            _close(out[row : row + 1, pads:], wanted, f"row {row} with {pads} pads, decoded")


def _generate(setup: Setup, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    # Image tokens are suppressed: a model that writes them finds no image to go with them.
    options = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "suppress_tokens": [IMAGE_TOKEN],
        **options,
    }
    return model.generate(**inputs, **options)[:, -12:]  # type: ignore[operator]


def check_generate(setup: Setup) -> None:
    """Greedy and beam search with the cache give the tokens they give without; padded rows those of unpadded."""
    model, inputs = setup.patched(), setup.inputs
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        ours, wanted = (_generate(setup, model, inputs, **options, use_cache=use) for use in (True, False))
        _require(torch.equal(ours, wanted), f"generate({options}) with the cache and without it give other tokens")
    short = {key: value[:, 4:] if value.dim() == 2 else value for key, value in inputs.items()}
    if "pixel_values" not in inputs:
        batch = {key: value.clone() for key, value in inputs.items()}
        batch["input_ids"][1, :4], batch["attention_mask"][1, :4] = 0, 0
        together = _generate(setup, model, batch)
        alone = _generate(setup, model, {key: value[1:] for key, value in short.items()})
        _require(torch.equal(together[1:], alone), "a left-padded row generates other tokens than alone")
    torch.manual_seed(0)
    sampled = _generate(setup, model, inputs, do_sample=True, num_return_sequences=2)
    _require(sampled.shape == (4, 12), f"sampling gave tokens of shape {tuple(sampled.shape)}")


def check_compiled_decode_equals_eager(setup: Setup) -> None:
    """A decode step compiles in one graph, on growing and on static caches, and gives what eager gives."""
    from transformers import DynamicCache, StaticCache

    model, inputs = setup.patched(), setup.inputs
    start = LENGTH - 3
    for static in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            caches: list[Any] = [
                StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
                for _ in range(2)
            ]
            for kept in caches:
                setup.run(model, _prompt(inputs, 0, start), past_key_values=kept)
            for at in range(start, LENGTH):
                step = _prompt(inputs, at, at + 1)
                ours, wanted = (
                    setup.run(f, step, past_key_values=kept) for f, kept in zip((compiled, model), caches, strict=True)
                )
                _close(ours, wanted, f"compiled and eager decode on a {'static' if static else 'growing'} cache")


def check_static_cache(setup: Setup) -> None:
    """A static cache gives the tokens of the default cache, or is refused with a clear error."""
    model, inputs = setup.patched(), setup.inputs
    wanted = _generate(setup, model, inputs)
    try:
        ours = _generate(setup, model, inputs, cache_implementation="static", disable_compile=True)
    except ValueError as error:
        _require("static" in str(error).lower(), f"a static cache is refused without saying so: {error}")
        return
    _require(torch.equal(ours, wanted), "a static cache gives other tokens than the default cache")


def check_cache_bytes(setup: Setup) -> None:
    """`cache_bytes` says what the cache really holds."""
    from transformers import DynamicCache

    model, inputs = setup.patched(), setup.inputs
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        setup.run(model, inputs, past_key_values=kept)
    storages = [tensor.untyped_storage() for tensor in _tensors(kept, set()) if tensor.dim()]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    said, found = cache.cache_bytes(kept), sum(held.values())
    _require(said == found, f"cache_bytes says {said}, the cache holds {found}")
    _require(
        int(kept.get_seq_length()) == LENGTH, f"the cache says it saw {kept.get_seq_length()} tokens, not {LENGTH}"
    )


def _tensors(owner: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        yield owner
    elif isinstance(owner, dict):
        for value in owner.values():
            yield from _tensors(value, seen)
    elif isinstance(owner, (list, tuple)):
        for value in owner:
            yield from _tensors(value, seen)
    elif hasattr(owner, "__dict__") and type(owner).__module__.startswith(
        ("patchattn", "transformers.cache_utils", "torch")
    ):
        yield from _tensors(vars(owner), seen)


def check_caches_follow_the_batch(setup: Setup) -> None:
    """Reordering, repeating and selecting rows of a cache does to later results what it does to the rows."""
    from transformers import DynamicCache

    model, inputs = setup.patched(), setup.inputs
    start = LENGTH - 3
    with torch.no_grad():
        kept = DynamicCache(config=model.config)
        setup.run(model, _prompt(inputs, 0, start), past_key_values=kept)
        changes: dict[str, tuple[Callable[[Any], None], list[int]]] = {
            "reorder_cache": (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            "batch_repeat_interleave": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
            "batch_select_indices": (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        }
        for name, (change, rows) in changes.items():
            changed, plain = copy.deepcopy(kept), copy.deepcopy(kept)
            change(changed)
            step = _prompt({k: v for k, v in inputs.items() if k != "pixel_values"}, start, LENGTH)
            wanted = setup.run(model, step, past_key_values=plain)[rows]
            moved = {key: value[rows] for key, value in step.items()}
            _close(setup.run(model, moved, past_key_values=changed), wanted, f"after {name}")


EVERYWHERE = (
    check_unpatch_restores_everything,
    check_disabled_is_the_base_model,
    check_exact_methods_equal_the_base,
    check_one_model_leaves_others_alone,
    check_rows_do_not_mix,
    check_only_the_patch_takes_gradients,
    check_bf16_is_close,
    check_compile_equals_eager,
    check_save_and_load_keep_the_outputs,
    check_training_mode_and_checkpointing,
)
DECODERS = (
    check_incremental_equals_full,
    check_padding_does_not_matter,
    check_padded_decoding_equals_unpadded,
    check_generate,
    check_compiled_decode_equals_eager,
    check_static_cache,
    check_cache_bytes,
    check_caches_follow_the_batch,
)


def checks(family: Family) -> tuple[Callable[[Setup], None], ...]:
    """The checks that apply to a family."""
    return EVERYWHERE + DECODERS if family.decoder else EVERYWHERE


def check_refusal(setup: Setup, reason: str) -> None:
    """A method that does not fit says why, and the model stays as it was."""
    model = setup.base()
    before = snapshot(model)
    try:
        attach.patch(model, setup.method)
    except ValueError as error:
        _require(reason in str(error), f"the error does not give the reason: {error}")
    else:
        raise AssertionError(f"the method says it does not fit ({reason}), but patch took it")
    _require(snapshot(model) == before, "a refused patch left the model changed")


@dataclass
class Report:
    """What `check_method` found: one row a check, with the family and "passed" or what went wrong."""

    method: str
    rows: list[tuple[str, str, str, float]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(result == "passed" or result.startswith("refused") for _, _, result, _ in self.rows)

    def __str__(self) -> str:
        lines = [f"{self.method}: {'all passed' if self.passed else 'FAILED'}, {len(self.rows)} checks"]
        lines += [
            f"  {family:<15} {check:<42} {result}  ({seconds:.1f} s)" for family, check, result, seconds in self.rows
        ]
        return "\n".join(lines)


def check_method(method: Any, families: list[str] | None = None, raise_on_failure: bool = True) -> Report:
    """Run the contract on a method: a class, an instance with settings, or a name.

    Args:
        method: a class is tried with the settings in its `example`.
        families: names out of `FAMILIES`; default all that are installed.
        raise_on_failure: raise an AssertionError that lists every failed check, instead of only reporting.
    """
    one = example(method)
    names = list(FAMILIES) if families is None else families
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"check_method: unknown family {name!r}; allowed: {', '.join(FAMILIES)}")
    report = Report(type(one).__name__)
    for name in names:
        setup = Setup(one, FAMILIES[name])
        if not installed(setup.family):
            continue
        reason = setup.reason()
        if reason is not None:
            refusal = functools.partial(check_refusal, reason=reason)
            _run(report, name, "refuses", refusal, setup, f"refused: {reason}")
            continue
        for check in checks(setup.family):
            _run(report, name, check.__name__.removeprefix("check_"), check, setup, "passed")
    if raise_on_failure and not report.passed:
        raise AssertionError(str(report))
    return report


def _run(report: Report, family: str, name: str, check: Callable[[Setup], None], setup: Setup, good: str) -> None:
    started = time.perf_counter()
    try:
        check(setup)
        result = good
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
    report.rows.append((family, name, result, time.perf_counter() - started))


def example(method: Any) -> Method:
    """A method with settings that make sense on toy models."""
    if isinstance(method, str):
        from .method import method_class

        method = method_class(method)
    if isinstance(method, type) and issubclass(method, Method):
        return method(**method.example)
    return as_methods(method)[0]


def installed(family: Family) -> bool:
    """Whether what the family needs can be imported."""
    from importlib.util import find_spec

    return family.needs is None or find_spec(family.needs) is not None
