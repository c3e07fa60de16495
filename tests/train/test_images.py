"""Images as samples: where they come from, how they are split, and what each task makes of them."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from patchattn.train.images import collate, fit, open_source, prompt
from patchattn.train.llava import join_llava
from patchattn.train.schema import ImageSource

transformers = pytest.importorskip("transformers")


def vit_config(**values):
    return transformers.ViTConfig(
        **{"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 2,
           "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 10, **values}
    )  # fmt: skip


DIT = {"sample_size": 8, "in_channels": 1, "num_embeds_ada_norm": 10}


def classified(path, seed=0, config=None, **settings):
    return open_source(
        ImageSource(path=str(path), **settings), task="image-classification", processor=None,
        model_config=config or vit_config(), seed=seed,
    )  # fmt: skip


def denoised(seed=0, steps=1000, **config):
    schedule = types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=steps))
    return open_source(
        ImageSource(path="digits"), task="denoising", processor=schedule, model_config={**DIT, **config}, seed=seed
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(*map(torch.as_tensor, (one[k], other[k]))) for k in one)


# ---- sources -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels():
    """Twelve grey images of three classes; the first pixel of each says which it is."""
    images = np.full((12, 8, 8), 128, dtype=np.uint8)
    images[:, 0, 0] = np.arange(12)
    return images, np.arange(12) % 3


def test_digits_are_all_there_between_minus_one_and_one():
    reader = classified("digits")
    assert reader.size == 1797
    sample = reader.sample(0, 0)
    assert sample["pixel_values"].shape == (1, 8, 8)
    assert (sample["pixel_values"].min(), sample["pixel_values"].max()) == (-1, 15 / 16 * 2 - 1)
    assert [reader.sample(index, 0)["labels"] for index in range(10)] == list(range(10))


def write_npz(folder, images, labels):
    np.savez(folder / "some.npz", images=images, labels=labels)
    return folder / "some.npz"


def write_class_folders(folder, images, labels):
    for number, (image, label) in enumerate(zip(images, labels)):
        (folder / f"class-{label}").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"class-{label}" / f"{number:02}.png")
    return folder


def write_data_set(folder, images, labels):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class-0", "class-1", "class-2"])}
    )
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [write_npz, write_class_folders, write_data_set])
def test_every_kind_of_source_gives_the_same_images_and_labels(write, tmp_path, pixels):
    reader = classified(write(tmp_path, *pixels))
    assert reader.size == 12
    read = {}
    for index in range(12):
        sample = reader.sample(index, 0)
        read[round((float(sample["pixel_values"][0, 0, 0]) + 1) / 2 * 255)] = int(sample["labels"])
    assert read == {number: number % 3 for number in range(12)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda images, labels: {"images": images}, "no array 'labels'; there: images"),
        (lambda images, labels: {"images": images[:, :, 0], "labels": labels}, r"are \[12, 8\]; they must be"),
        (lambda images, labels: {"images": images, "labels": labels[:5]}, "must be 12 whole numbers"),
        (lambda images, labels: {"images": images, "labels": labels / 2}, "float64"),
        (lambda images, labels: {"images": images.astype(float), "labels": labels}, "numbers from 0 to 1"),
    ],
)
def test_arrays_that_make_no_sense_are_refused_with_what_is_needed(change, message, tmp_path, pixels):
    np.savez(tmp_path / "bad.npz", **change(*pixels))
    with pytest.raises(ValueError, match=message):
        classified(tmp_path / "bad.npz")


def test_a_file_that_is_no_image_is_named(tmp_path, pixels):
    write_class_folders(tmp_path, *pixels)
    (tmp_path / "class-0" / "00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"00\.png is no image"):
        classified(tmp_path).sample(0, 0)


def test_a_source_that_is_nowhere_says_what_can_be_given(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"'no/such-images' cannot be opened.*an \.npz file"):
        classified("no/such-images")


def test_more_classes_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match=r"'digits' has 10 classes and the model's num_labels is 5"):
        classified("digits", config=vit_config(num_labels=5))
    with pytest.raises(ValueError, match="num_embeds_ada_norm is 9"):
        denoised(num_embeds_ada_norm=9)


# ---- splits, size, augmentation ----------------------------------------------------------------------------------


def test_the_split_is_by_whole_images_and_holds_out_the_same_share_of_every_class():
    reader = classified("digits")
    train, held_out = reader.split(0.2)
    assert sorted(train.chosen + held_out.chosen) == list(range(1797))
    labels = reader.pictures.labels
    for label in range(10):
        count = sum(labels[number] == label for number in held_out.chosen)
        assert count == round(0.2 * labels.count(label))


def test_the_split_does_not_depend_on_the_seed():
    assert classified("digits", seed=0).split(0.2)[1].chosen == classified("digits", seed=1).split(0.2)[1].chosen


def test_a_share_that_leaves_a_part_empty_is_refused(tmp_path, pixels):
    with pytest.raises(ValueError, match=r"held_out is 0\.01, which leaves 12 images .* and 0 for evaluation"):
        classified(write_npz(tmp_path, *pixels)).split(0.01)


def test_a_limit_takes_as_many_of_each_class():
    reader = classified("digits", limit=50)
    assert reader.size == 50
    assert all(sum(reader.pictures.labels[number] == label for number in reader.chosen) == 5 for label in range(10))


@pytest.mark.parametrize("channels, size, shape", [(1, 3, (3, 5, 7)), (3, 1, (1, 5, 7)), (3, 3, (3, 5, 7))])
def test_images_take_the_channels_and_the_size_of_the_model(channels, size, shape):
    image = torch.full((channels, 10, 14), 0.25)
    assert torch.allclose(fit(image, shape), torch.full(shape, 0.25), atol=1e-6)


def test_an_image_that_fits_stays_bit_identical():
    image = torch.rand(3, 5, 7)
    assert torch.equal(fit(image, (3, 5, 7)), image)


def test_training_images_move_with_the_draw_and_held_out_images_never():
    train, held_out = classified("digits", shift=1, flip=True).split(0.2)
    moved = [train.sample(3, draw)["pixel_values"] for draw in range(20)]
    still = [held_out.sample(3, draw)["pixel_values"] for draw in range(20)]
    assert len({image.numpy().tobytes() for image in moved}) > 10
    assert len({image.numpy().tobytes() for image in still}) == 1


def test_a_shift_repeats_the_border_and_keeps_the_size():
    reader = classified("digits", shift=2)
    original = classified("digits").sample(5, 0)["pixel_values"][0]
    rows = {tuple(row.tolist()) for row in original}
    moved = [reader.sample(5, draw)["pixel_values"][0] for draw in range(30)]
    vertical = [image for image in moved if {tuple(row.tolist()) for row in image} <= rows]
    assert all(image.shape == (8, 8) for image in moved)
    assert vertical  # some draws move up and down only, and then every row is a row of the original


# ---- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda seed: classified("digits", seed, shift=3), denoised])
def test_a_sample_is_the_same_for_the_same_seed_and_draw(make):
    assert same(make(seed=0).sample(7, 3), make(seed=0).sample(7, 3))
    assert not same(make(seed=0).sample(7, 3), make(seed=0).sample(7, 4))
    assert not same(make(seed=0).sample(7, 3), make(seed=1).sample(7, 3))


def test_noise_is_normal_and_time_steps_cover_the_schedule():
    reader = denoised()
    samples = [reader.sample(index % 1797, index) for index in range(2000)]
    noise = torch.stack([sample["noise"] for sample in samples])
    steps = torch.tensor([sample["timestep"] for sample in samples])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert 0 <= steps.min() < 20 and 980 <= steps.max() < 1000


def test_the_noise_schedule_says_how_many_time_steps_there_are():
    reader = denoised(steps=10)
    assert {reader.sample(0, draw)["timestep"] for draw in range(200)} == set(range(10))


def test_a_tenth_of_the_training_samples_has_no_class():
    reader = denoised()
    unlabelled = sum(reader.sample(index % 1797, index)["class_labels"] == 10 for index in range(2000))
    assert 150 < unlabelled < 250


def test_batches_stack_what_the_task_needs():
    batch = collate("denoising")([denoised().sample(index, 0) for index in range(3)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "sample": (3, 1, 8, 8), "noise": (3, 1, 8, 8), "timestep": (3,), "class_labels": (3,),
    }  # fmt: skip
    assert batch["timestep"].dtype == torch.int64


# ---- LLaVA -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: 2 + place for place, letter in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llava(tokenizer):
    torch.manual_seed(0)
    language = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, tie_word_embeddings=True)
    )  # fmt: skip
    vision = transformers.ViTForImageClassification(vit_config())
    return language, vision, *join_llava(language, tokenizer, vision)


def asked(processor, model, names=None):
    source = ImageSource(path="digits", names=names)
    return open_source(source, task="image-text", processor=processor, model_config=model.config, seed=0)


def test_joining_keeps_both_models_and_ties_the_embeddings(llava):
    language, vision, model, _ = llava
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, language(input_ids=ids).logits)
    pixels = torch.randn(1, 1, 8, 8)
    joined, alone = model.model.vision_tower(pixels), vision.vit(pixels)
    assert torch.equal(joined.last_hidden_state, alone.last_hidden_state)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_only_the_answer_carries_labels_and_the_image_its_tokens(llava):
    _, _, model, processor = llava
    sample = asked(processor, model).sample(3, 0)
    image = sample["input_ids"] == model.config.image_token_id
    assert int(image.sum()) == 4  # patches, without the class token
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == " 3</s>"
    assert processor.tokenizer.decode(sample["input_ids"][~image]) == "\nWhich digit is this? 3</s>"


def test_the_pixels_are_those_that_the_classifier_saw(llava):
    _, _, model, processor = llava
    pixels = asked(processor, model).sample(3, 0)["pixel_values"]
    assert torch.allclose(pixels, classified("digits").sample(3, 0)["pixel_values"], atol=2 / 255)


def test_shorter_answers_are_padded_without_changing_the_loss(llava):
    _, _, model, processor = llava
    reader = asked(processor, model, names=[str(number) * (1 + number % 3) for number in range(10)])
    samples = [reader.sample(index, 0) for index in range(3)]
    batch = collate("image-text")(samples)
    together = model(**batch).logits
    for row, sample in enumerate(samples):
        alone = model(**collate("image-text")([sample])).logits
        assert torch.allclose(together[row, : alone.shape[1]], alone[0], atol=1e-5)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sample["input_ids"]) for sample in samples]
    assert int((batch["labels"] >= 0).sum()) == sum(int((sample["labels"] >= 0).sum()) for sample in samples)


def test_a_joined_model_opens_again_with_its_processor(llava, tmp_path):
    _, _, model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    opened = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    inputs = opened(text=prompt(opened, "Which digit is this?"), images=image, return_tensors="pt")
    assert torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-6)


def test_a_joined_model_does_not_tell_where_its_parts_lay(tokenizer, tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer) + 1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    language = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    model, _ = join_llava(language, tokenizer, transformers.ViTForImageClassification(vit_config()))
    assert str(tmp_path) not in model.config.to_json_string()


def test_too_few_answers_are_refused(llava):
    _, _, model, processor = llava
    with pytest.raises(ValueError, match="names has 2 answers and 'digits' 10 classes"):
        asked(processor, model, names=["zero", "one"])
