"""A recipe is read as it was meant, or refused with everything that is wrong with it, each with its place."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from patchattn.train import library, reference, schema
from patchattn.train.checks import RESERVED
from patchattn.train.recipe import RecipeError, fingerprint, load_recipe, resolved, to_yaml

ROOT = Path(__file__).parents[2]

MINIMAL = """\
version: 1
model: some/model
patch: duo_attention:sink=4
data:
  train: {kind: text, path: some.txt}
stages: {kind: tune, steps: 3}
output: out
"""

FULL = """\
version: 1
about: everything that can be said
model:
  config: {model_type: llama, hidden_size: 64, rope_parameters: {rope_type: default, rope_theta: 1e4}}
  tokenizer: {vocab_size: 300}
  dtype: bfloat16
patch:
  0-1: {method: gated_attention, kind: elementwise}
  2-: [gated_attention, duo_attention]
data:
  train:
    - {kind: text, path: [a.txt, b.txt], weight: 2, separator: "\\n\\n"}
    - {kind: synthetic, generator: mqar, options: {pairs: 8, length: [64, 128]}}
  held_out: [{kind: text, path: c.txt}]
  length: 256
stages:
  - {kind: attention_transfer, tokens: 5e6, learning_rate: 1e-3, trainer: {bf16: true}}
  - {kind: distill, steps: 10, on: 64, top_k: 100, losses: {logits: 1, hidden: 0.5}, rates: {"*.gate.*": 10}}
  - {kind: lora, steps: 10, targets: [q_proj]}
budget: {hours: 1.5}
trainer: {gradient_accumulation_steps: 2, lr_scheduler_type: cosine}
seed: 7
output: out
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return "recipe.yaml"

    return write


@pytest.fixture
def problems(write):
    """What is wrong with a recipe, line by line; it must be refused."""

    def problems(text, *overrides):
        with pytest.raises(RecipeError) as caught:
            load_recipe(write(text), overrides)
        assert str(caught.value).splitlines() == caught.value.problems
        return caught.value.problems

    return problems


# ---- what is meant -----------------------------------------------------------------------------------------


def test_a_short_recipe_means_what_it_leaves_out(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.model == schema.ModelSpec(name="some/model")
    assert recipe.data == schema.DataSpec(train=[schema.TextSource(path="some.txt")])
    assert recipe.stages == [schema.Tune(steps=3)]
    assert (recipe.seed, recipe.budget) == (0, schema.Budget())


def test_a_long_recipe_is_read_into_the_types_of_the_schema(write):
    recipe = load_recipe(write(FULL))
    transfer, distill, lora = recipe.stages
    assert (type(transfer), type(distill), type(lora)) == (schema.AttentionTransfer, schema.Distill, schema.Lora)
    assert transfer.tokens == 5_000_000 and isinstance(transfer.tokens, int)
    assert transfer.learning_rate == 1e-3
    assert distill.on == 64 and distill.losses == {"logits": 1.0, "hidden": 0.5}
    assert distill.rates == {"*.gate.*": 10.0}
    assert recipe.model.config["rope_parameters"]["rope_theta"] == 1e4
    assert recipe.model.tokenizer == schema.TokenizerSpec(vocab_size=300)
    assert list(recipe.patch) == ["0-1", "2-"]
    text, made = recipe.data.train
    assert text.weight == 2.0 and isinstance(text.weight, float) and text.separator == "\n\n"
    assert made.options == {"pairs": 8, "length": [64, 128]}
    assert recipe.data.held_out == [schema.TextSource(path="c.txt")]


WORDS = {
    "yes": "yes", "off": "off", "2024-01-31": "2024-01-31", "012": "012", "1:30": "1:30", ".inf": ".inf",
    "'1'": "1", "true": True, "~": None, "1_000": 1000, "-3": -3, "1e-4": 1e-4, ".5": 0.5, "+1.5E3": 1500.0, "2.": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_plain_words_are_read_as_yaml_1_2_reads_them_and_survive_writing(write, word):
    recipe = load_recipe(write(MINIMAL), [f"trainer.lr_scheduler_kwargs={{given: {word}}}"])
    found = recipe.trainer["lr_scheduler_kwargs"]["given"]
    assert found == WORDS[word] and type(found) is type(WORDS[word])
    assert load_recipe(write(to_yaml(recipe))) == recipe
    assert yaml.safe_load(to_yaml(recipe)) == resolved(recipe)


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_the_resolved_recipe_says_everything_and_reads_back_the_same(write, text):
    recipe = load_recipe(write(text))
    values = resolved(recipe)
    assert set(values) == {field.name for field in dataclasses.fields(schema.Recipe)}
    assert set(values["stages"][0]) >= {"kind", "steps", "batch_size", "learning_rate", "trainer"}
    assert load_recipe(write(to_yaml(recipe))) == recipe
    assert json.loads(json.dumps(values)) == values


def test_aliases_repeat_what_was_said(write):
    text = MINIMAL.replace("{kind: text, path: some.txt}", "&mine {kind: text, path: some.txt}\n  held_out: *mine")
    recipe = load_recipe(write(text))
    assert recipe.data.held_out == recipe.data.train == [schema.TextSource(path="some.txt")]


# ---- what is wrong -----------------------------------------------------------------------------------------

FIVE_MISTAKES = """\
version: 1
model:
  name: some/model
  dtype: float8
patch: dense:sink=4
data:
  train:
    - kind: text
      path: some.txt
      weigth: 2
stages:
  - kind: attention_transfer
    steps: 0
  - kind: tune
    batch_size: 4
output: out
"""


def test_five_mistakes_give_five_errors_with_their_lines(problems):
    assert problems(FIVE_MISTAKES) == [
        "recipe.yaml:4: model.dtype: 'float8' is not allowed; did you mean float32? "
        "allowed: auto, float32, bfloat16, float16",
        "recipe.yaml:5: patch: 'dense:sink=4' is not allowed; Dense: unknown field 'sink'; allowed: none: it has no "
        "settings",
        "recipe.yaml:10: data.train.0.weigth: unknown key; did you mean weight? "
        "allowed: kind, weight, path, name, split, column, streaming, separator, limit",
        "recipe.yaml:13: stages.0.steps: 0 is not allowed; it must be a whole number of at least 1",
        "recipe.yaml:14: stages.1: it has neither steps nor tokens; give one of them",
    ]


NO_PATCH = MINIMAL.replace("patch: duo_attention:sink=4\n", "")
NOISE = MINIMAL.replace("some/model", "{name: m, task: denoising}").replace(
    "text, path: some.txt", "images, path: digits"
)

WRITTEN = {
    "no version": (MINIMAL.replace("version: 1\n", ""), "1: version: missing (of this schema); allowed: 1"),
    "a newer version": (MINIMAL.replace("1", "2", 1) + "new: 3\n", "1: version: 2 is of a newer patchattn"),
    "an older version": (MINIMAL.replace("1", "0", 1), "1: version: 0 is not allowed; allowed: 1"),
    "no output": (MINIMAL.replace("output: out\n", ""), "1: output: missing (folder of the result"),
    "a key twice": (MINIMAL + "seed: 1\nseed: 2\n", "9: seed: given twice, first at recipe.yaml:8; keep one"),
    "no YAML": (MINIMAL + "a: b: c\n", "8: this is not YAML: mapping values are not allowed here"),
    "no mapping": ("- 1\n", "1: a recipe is a mapping"),
    "nothing": ("# soon\n", "1: a recipe is a mapping"),
    "a control character": ("a: \x01\n", "1: this is not YAML: unacceptable character"),
    "a foreign tag": (MINIMAL + "about: !!python/name:os.system\n", "8: about: the tag tag:yaml.org,2002:python/name"),
    "a wrong tag": (MINIMAL + "about: !!int five\n", "8: about: 'five' is no int"),
    "an alias in itself": (MINIMAL.replace("{kind: tune", "&a {data: *a, kind: tune"), "6: stages.data: this alias"),
    "a key that is a list": (MINIMAL + "? [a, b]\n: 1\n", "8: a key must be a plain word"),
    "no kind": (MINIMAL.replace("kind: tune, ", ""), "6: stages.0.kind: missing; allowed: attention_transfer, distill"),
    "no model": (MINIMAL.replace("some/model", "{}"), "2: model: it has neither name nor config"),
    "too much": (MINIMAL.replace("tune", "lora, dropout: 2"), "6: stages.0.dropout: 2 is not allowed; it must be a "
                 "number of at least 0 and at most 1"),
}  # fmt: skip

# A recipe, one value or several that are wrong in it, and how the one error begins.
OVERRIDDEN = [
    (MINIMAL, "seed=five", "seed: 'five' is not allowed; it must be a whole number of at least 0"),
    (MINIMAL, "seed=true", "seed: true is not allowed; it must be a whole number"),
    (MINIMAL, "data.packing=yes", "data.packing: 'yes' is not allowed; it must be true or false"),
    (MINIMAL, "output=7", "output: 7 is not allowed; it must be text; for text, put it in quotes"),
    (MINIMAL, "stages.0.steps=1.5", "stages.0.steps: 1.5 is not allowed; it must be a whole number of at least 1 or"),
    (MINIMAL, "stages.0.learning_rate=1e999", "stages.0.learning_rate: inf is not allowed"),
    (MINIMAL, "stages.0.learning_rate=0", "stages.0.learning_rate: 0 is not allowed; it must be a number above 0"),
    (MINIMAL, "budget=null", "budget: null is not allowed; it must be a mapping"),
    (MINIMAL, "trainer=[1]", "trainer: [1] is not allowed; it must be a mapping"),
    (MINIMAL, "stages=3", "stages: 3 is not allowed; it must be a list of mappings"),
    (MINIMAL, "stages.0=tune", "stages.0: 'tune' is not allowed; it must be a mapping"),
    (MINIMAL, "stages.0.kind=tuned", "stages.0.kind: 'tuned' is not allowed; did you mean tune? allowed: attention_tr"),
    (MINIMAL, "stages.0.kind=[tune]", "stages.0.kind: ['tune'] is not allowed; allowed: attention_transfer"),
    (MINIMAL, "data.train.0.path=[a, 3]", "data.train.0.path.1: 3 is not allowed; it must be text"),
    # model
    (MINIMAL, "model={name: m, config: {model_type: llama}, tokenizer: t}", "model: it has both name and config"),
    (MINIMAL, "model={config: {}, tokenizer: t}", "model.config: model_type is missing"),
    (MINIMAL, "model={config: {model_type: llama}}", "model.tokenizer: missing; a new model has none"),
    (MINIMAL, "model={config: {model_type: llama}, tokenizer: t, revision: a}", "model.revision: a new model has no"),
    (MINIMAL, "model.tokenizer={}", "model.tokenizer: a pretrained model knows the tokens of its own"),
    (MINIMAL, "model.vision=v", "model.vision: it makes an image-text model, and the task is causal-lm"),
    (MINIMAL, "model.scheduler={}", "model.scheduler: only denoising has a noise schedule"),
    (NOISE, "model.tokenizer=t", "model.tokenizer: denoising reads no text"),
    (NOISE, "model={task: image-text, config: {model_type: llava}}", "model.config: an image-text model is opened b"),
    (NOISE, "model={vision: v, task: image-text}", "model: it has neither name nor config"),
    # patch
    (MINIMAL, "patch=nonsense", "patch: 'nonsense' is not allowed; unknown method 'nonsense'; known methods: "),
    (MINIMAL, "patch={even: dense, odd: nonsense}", "patch.odd: 'nonsense' is not allowed; unknown method"),
    (MINIMAL, "patch=[]", "patch: [] is not allowed; an empty list of methods"),
    (MINIMAL, "patch={}", "patch: an empty plan"),
    (MINIMAL, "patch=3", "patch: 3 is not allowed; 3 is no method"),
    # data
    (MINIMAL, "data.train=[]", "data.train: an empty list"),
    (MINIMAL, "data.held_out=[]", "data.held_out: an empty list; give 0 to hold nothing out"),
    (MINIMAL, "data.held_out=1", "data.held_out: 1.0 is not allowed; a share is at least 0 and below 1"),
    (MINIMAL, "data.train={kind: images, path: digits}", "data.train.0.kind: 'images' is no data for causal-lm; "
     "allowed: text, chat, synthetic"),
    (MINIMAL, "data.held_out={kind: images, path: digits}", "data.held_out.0.kind: 'images' is no data for causal-lm"),
    (MINIMAL, "stages.0.data={train: {kind: images, path: digits}}", "stages.0.data.train.0.kind: 'images' is no data"),
    (MINIMAL, "data.train={kind: synthetic, generator: mqra}", "data.train.0.generator: 'mqra' is not allowed; did you "
     "mean mqar? allowed: passkey"),
    (MINIMAL, "data.train={kind: synthetic, generator: mqar, options: {pair: 8}}", "data.train.0.options.pair: unknown "
     "option of mqar; did you mean pairs? allowed: "),
    # stages
    (MINIMAL, "stages=[]", "stages: an empty list"),
    (MINIMAL, "stages={kind: tune, steps: 1, tokens: 9}", "stages.0: it has both steps and tokens"),
    (NOISE, "stages={kind: tune, tokens: 9}", "stages.0.tokens: denoising has no tokens; give steps"),
    (NO_PATCH, "stages={kind: attention_transfer, steps: 1}", "stages.0: attention_transfer needs a patched model"),
    (NO_PATCH, "stages={kind: distill, steps: 1}", "stages.0: distill needs a patched model; give the recipe a patch"),
    (NO_PATCH, "stages={kind: tune, steps: 1, parameters: patch}", "stages.0: tune needs a patch, whose parameters"),
    (NO_PATCH, "stages={kind: lora, steps: 1, losses: {logits: 1}}", "stages.0.losses: logits are learned from the"),
    (MINIMAL, "stages={kind: distill, steps: 1, parameters: all}", "stages.0.parameters: the base model teaches"),
    (MINIMAL, "stages={kind: identify_heads, steps: 1}", "stages.0: identify_heads puts its own patch on"),
    (NO_PATCH, "stages=[{kind: identify_heads, steps: 1}, {kind: identify_heads, steps: 1}]",
     "stages.1: identify_heads puts its own patch on"),
    (NOISE, "patch= + stages.0.kind=identify_heads", "stages.0.kind: identify_heads searches the heads of a causal-lm"),
    (MINIMAL, "stages.0.losses={logit: 1}", "stages.0.losses.logit: unknown term; did you mean logits? allowed: tas"),
    (MINIMAL, "stages.0.losses={task: 1, logits: -1}", "stages.0.losses.logits: -1.0 is not allowed; a weight is at"),
    (MINIMAL, "stages.0.losses={task: 0}", "stages.0.losses: every weight is 0"),
    (MINIMAL, "stages.0.top_k=5", "stages.0.top_k: no logits are distilled"),
    (NOISE, "stages={kind: distill, steps: 1, top_k: 5}", "stages.0.top_k: a denoising model gives no logits"),
    (MINIMAL, "stages.0.on=last", "stages.0.on: 'last' is not allowed; allowed: all, labelled, or a whole number"),
    (MINIMAL, "stages.0.on=0", "stages.0.on: 0 is not allowed; allowed: all, labelled, or a whole number of at leas"),
    (MINIMAL, "stages.0.parameters=[]", "stages.0.parameters: it names nothing"),
    (MINIMAL, "stages={kind: lora, steps: 1, targets: []}", "stages.0.targets: it names nothing"),
    (MINIMAL, "stages.0.rates={a: -1}", "stages.0.rates.a: -1.0 is not allowed; a factor is at least 0"),
    # trainer
    (MINIMAL, "stages.0.trainer={max_steps: 5}", "stages.0.trainer.max_steps: the engine sets this itself; use the "
     "stage's steps or tokens"),
    (MINIMAL, "trainer.weight_decays=1", "trainer.weight_decays: unknown key; did you mean weight_decay"),
    (MINIMAL, "trainer.bf16=maybe", "trainer.bf16: 'maybe' is not allowed; it must be true or false"),
    (MINIMAL, "trainer.lr_scheduler_type=cosin", "trainer.lr_scheduler_type: 'cosin' is not allowed; it must be one of "
     "linear, cosine"),
    # the override itself
    (MINIMAL, "steps", "'steps' is no override; write key=value, such as stages.0.steps=500"),
    (MINIMAL, "about=a:\tb:\tc", "about: this is not YAML"),
    (MINIMAL, "stages.0.stepz=1", "stages.0.stepz: unknown key; did you mean steps?"),
    (MINIMAL, "bugdet.hours=1", "bugdet: unknown key; did you mean budget? allowed: version, model, "),
    (MINIMAL, "version.x=1", "version.x: version is 1 and has no 'x' inside"),
    (FULL, "stages.3.steps=1", "stages.3.steps: stages has no item '3'; its items are 0 to 2"),
    (FULL, "stages.steps=1", "stages.steps: stages has no item 'steps'; its items are 0 to 2"),
    (MINIMAL, "trainer.report_to=[] + trainer.report_to.0=x",
     "trainer.report_to.0: trainer.report_to has no item '0'; it is empty"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_one_mistake_gives_one_error_with_its_line(problems, case):
    text, message = WRITTEN[case]
    (found,) = problems(text)
    assert found.startswith(f"recipe.yaml:{message}")


@pytest.mark.parametrize(("text", "overrides", "message"), OVERRIDDEN, ids=[case[1] for case in OVERRIDDEN])
def test_a_mistake_on_the_command_line_gives_one_error_that_says_so(problems, text, overrides, message):
    (found,) = problems(text, *overrides.split(" + "))
    assert found.startswith(f"command line: {message}")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"version: \xff")
    with pytest.raises(RecipeError, match="no text in UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_name_that_is_neither_file_nor_recipe_says_which_recipes_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "folder", lambda: tmp_path)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "lab-llama.yaml").write_text(MINIMAL)
    with pytest.raises(FileNotFoundError, match="did you mean lab/lab-llama"):
        load_recipe("lab/lab-lama")
    assert load_recipe("lab/lab-llama") == load_recipe(tmp_path / "lab" / "lab-llama.yaml")


def test_every_reserved_field_is_one_of_transformers():
    from transformers import TrainingArguments

    assert set(RESERVED) <= {field.name for field in dataclasses.fields(TrainingArguments)}


# ---- overrides ---------------------------------------------------------------------------------------------

OVERRIDES = {
    "a number": ("stages.0.steps=500", lambda recipe: recipe.stages[0].steps == 500),
    "in the only stage": ("stages.steps=500", lambda recipe: recipe.stages[0].steps == 500),
    "a whole stage": ("stages.0={kind: tune, steps: 5}", lambda recipe: recipe.stages == [schema.Tune(steps=5)]),
    "another model": ("model=other/model", lambda recipe: recipe.model == schema.ModelSpec(name="other/model")),
    "in the model": ("model.dtype=bfloat16", lambda recipe: recipe.model.dtype == "bfloat16"),
    "a path": ("data.train.0.path=[x.txt, y.txt]", lambda recipe: recipe.data.train[0].path == ["x.txt", "y.txt"]),
    "what was not there": ("budget.hours=2", lambda recipe: recipe.budget.hours == 2.0),
    "deep": ("stages.0.trainer.warmup_steps=3", lambda recipe: recipe.stages[0].trainer == {"warmup_steps": 3}),
    "in a plan": ("patch={0: dense, 1: dense}", lambda recipe: list(recipe.patch) == ["0", "1"]),
    "a plan": ("patch={even: dense}", lambda recipe: recipe.patch == {"even": "dense"}),
    "nothing": ("patch=", lambda recipe: recipe.patch is None),
    "with an equals sign": ("patch=duo_attention:sink=9", lambda recipe: recipe.patch == "duo_attention:sink=9"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override_puts_a_value_in_its_place(write, case):
    text, holds = OVERRIDES[case]
    assert holds(load_recipe(write(MINIMAL), [text]))


def test_another_model_keeps_the_task_and_drops_what_belonged_to_the_one_before(write):
    text = NOISE.replace("name: m", "config: {_class_name: DiTTransformer2DModel}, scheduler: {}, dtype: float16")
    recipe = load_recipe(write(text), ["model=other"])
    assert recipe.model == schema.ModelSpec(name="other", task="denoising", dtype="float16")


def test_later_overrides_win(write):
    assert load_recipe(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


# ---- fingerprint -------------------------------------------------------------------------------------------

SAME = ["output=elsewhere", "budget.hours=3", "about=me", "trainer.report_to=tensorboard", "trainer.logging_steps=3",
        "stages.0.trainer={run_name: x}", "stages.0.trainer.save_total_limit=1"]  # fmt: skip
OTHER = ["seed=1", "stages.0.steps=4", "model=other", "patch=dense", "data.length=64", "trainer.weight_decay=0.1",
         "stages.0.trainer={warmup_steps: 2}", "data.train.0.split=test"]  # fmt: skip


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_change_the_result_leaves_the_fingerprint(write, change):
    path = write(MINIMAL)
    assert fingerprint(load_recipe(path, [change])) == fingerprint(load_recipe(path))


@pytest.mark.parametrize("change", OTHER)
def test_what_changes_the_result_changes_the_fingerprint(write, change):
    path = write(MINIMAL)
    assert fingerprint(load_recipe(path, [change])) != fingerprint(load_recipe(path))


# ---- what ships --------------------------------------------------------------------------------------------

SHIPPED = library.names()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_can_be_run_says_what_it_is_and_how_to_run_it(name):
    recipe = load_recipe(name)
    assert recipe.about
    assert library.find(name).read_text(encoding="utf-8").startswith("#")
    assert f"patchattn convert {name}" in library.find(name).read_text(encoding="utf-8")


def test_names_leave_out_what_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "folder", lambda: tmp_path)
    for name in ("a/one.yaml", "two.yaml", "accelerate/ddp.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert library.names() == ["a/one", "two"]
    assert library.find("accelerate/ddp") == tmp_path / "accelerate" / "ddp.yaml"


@pytest.mark.parametrize("where", ["package", "beside"])
def test_recipes_are_found_in_the_package_or_beside_it(tmp_path, monkeypatch, where):
    (tmp_path / "patchattn" / "train").mkdir(parents=True)
    place = tmp_path / "patchattn" / "recipes" if where == "package" else tmp_path / "recipes"
    monkeypatch.setattr(library, "__file__", str(tmp_path / "patchattn" / "train" / "library.py"))
    with pytest.raises(FileNotFoundError, match="this installation has no recipes"):
        library.folder()
    place.mkdir()
    assert library.folder() == place


def test_reading_a_recipe_without_patch_and_trainer_imports_no_torch(write):
    code = f"""
import sys
from patchattn.train.recipe import load_recipe
load_recipe({write(NO_PATCH)!r})
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules), "they were imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


# ---- what is documented ------------------------------------------------------------------------------------


def test_the_documented_keys_are_those_of_the_schema():
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert document == reference.updated(document), "run: python -m patchattn.train.reference docs/recipes.md"
    assert document.count(reference.START) == document.count(reference.END) == 1


def test_every_class_of_the_schema_is_documented():
    classes = {value for value in vars(schema).values() if dataclasses.is_dataclass(value)}
    assert classes == set(reference.ORDER)


def test_the_documented_recipe_is_one(write):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL | re.MULTILINE)
    assert [stage.kind for stage in load_recipe(write(text)).stages] == ["attention_transfer", "lora"]


# ---- many devices ------------------------------------------------------------------------------------------

CONFIGS = {
    "accelerate/ddp": ("MULTI_GPU", False),
    "accelerate/ddp-cpu": ("MULTI_GPU", True),
    "accelerate/fsdp2": ("FSDP", False),
    "accelerate/fsdp2-cpu": ("FSDP", True),
    "accelerate/zero3": ("DEEPSPEED", False),
    "accelerate/zero3-cpu": ("DEEPSPEED", True),
}


def test_every_shipped_configuration_is_tested():
    assert set(library.configs()) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_launch_takes_the_shipped_configurations(name):
    from accelerate.commands import launch

    file = library.find(name)
    command = re.search(r"accelerate launch (--config_file .*)", file.read_text(encoding="utf-8"))
    assert command, "it says how it is used"
    given = command.group(1).replace(f"recipes/{name}.yaml", str(file)).split()
    arguments, config, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    assert arguments.module and arguments.training_script == "patchattn"
    assert arguments.training_script_args == ["convert", "RECIPE"]
    assert (config.distributed_type.value, config.use_cpu) == CONFIGS[name]
    known = vars(launch.launch_command_parser().parse_args(["script"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)
