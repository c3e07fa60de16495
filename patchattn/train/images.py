"""Labelled images as samples: to classify, to denoise, or to answer a question about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .files import fingerprint_file
from .packing import IGNORED
from .schema import ImageSource

UNLABELLED = 0.1  # share of training samples of the null class, which classifier-free guidance needs

Sample = dict[str, Any]
Make = Callable[[Tensor, int, torch.Generator], Sample]


@dataclass(frozen=True)
class Pictures:
    """What a source holds. `read` gives an image as `[channels, height, width]`, from 0 to 1."""

    read: Callable[[int], Tensor]
    labels: Sequence[int]
    names: list[str]
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class ImageReader:
    """The samples that some images of a source give; the same for the same seed, index and draw."""

    pictures: Pictures
    source: ImageSource
    shape: tuple[int, int, int]
    make: Make
    seed: int
    chosen: list[int]
    part: str = "all"

    @property
    def size(self) -> int:
        return len(self.chosen)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {**self.pictures.fingerprint, "part": self.part, "images": self.size, "seed": self.seed}

    def sample(self, index: int, draw: int) -> Sample:
        number = self.chosen[index]
        random = _generator(self.seed, number, draw)
        image = fit(self.pictures.read(number), self.shape)
        if self.part != "held-out":
            image = _move(image, self.source, random)
        return self.make(image, int(self.pictures.labels[number]), random)

    def split(self, share: float) -> tuple[ImageReader, ImageReader]:
        """The training and the held-out part; which image is in which depends on the source and the share alone."""
        held_out: set[int] = set()
        for members in _shuffled_classes(self.pictures.labels, self.chosen):
            held_out.update(members[: round(share * len(members))])
        train = [number for number in self.chosen if number not in held_out]
        if not train or not held_out:
            raise ValueError(
                f"data: held_out is {share}, which leaves {len(train)} images of {self.source.path!r} for training and "
                f"{len(held_out)} for evaluation; both must have some"
            )
        kept = [number for number in self.chosen if number in held_out]
        return replace(self, chosen=train, part="train"), replace(self, chosen=kept, part="held-out")


def open_source(source: ImageSource, *, task: str, processor: Any, model_config: Any, seed: int) -> ImageReader:
    """Read a source for a task.

    Args:
        processor: for image-text, a LLaVA processor; for denoising, the noise schedule.
        model_config: says the size and channels of the images and how many classes there may be.
    """
    pictures = _open(source)
    shape = image_shape(model_config)
    make: Make
    if task == "image-classification":
        _check_classes(pictures, source, _value(model_config, "num_labels"), "num_labels")
        make = _classified
    elif task == "denoising":
        classes = _value(model_config, "num_embeds_ada_norm")
        _check_classes(pictures, source, classes, "num_embeds_ada_norm")
        make = _Denoised(classes, processor.config.num_train_timesteps)
    elif task == "image-text":
        names = source.names or pictures.names
        if len(names) < len(pictures.names):
            raise ValueError(
                f"data: names has {len(names)} answers and {source.path!r} {len(pictures.names)} classes; give one "
                "for each"
            )
        make = _Asked(processor, source.question, names)
    else:
        raise ValueError(f"data: images are no data for {task}; {', '.join(ImageSource.tasks)} are trained on them")
    return ImageReader(pictures, source, shape, make, seed, _limited(pictures.labels, source.limit))


def collate(task: str) -> Callable[[list[Sample]], dict[str, Tensor]]:
    """What makes a batch of samples."""
    return _collate_asked if task == "image-text" else torch.utils.data.default_collate


# ---- what each task makes of an image --------------------------------------------------------------------------


def _classified(image: Tensor, label: int, random: torch.Generator) -> Sample:
    return {"pixel_values": image * 2 - 1, "labels": label}


@dataclass(frozen=True)
class _Denoised:
    classes: int
    timesteps: int

    def __call__(self, image: Tensor, label: int, random: torch.Generator) -> Sample:
        unlabelled = torch.rand((), generator=random) < UNLABELLED
        return {
            "sample": image * 2 - 1,
            "noise": torch.randn(image.shape, generator=random),
            "timestep": int(torch.randint(self.timesteps, (), generator=random)),
            "class_labels": self.classes if unlabelled else label,
        }


class _Asked:
    """The image, the question, and the name of the class as the answer, which alone carries labels."""

    def __init__(self, processor: Any, question: str, names: Sequence[str]) -> None:
        self.processor, self.names = processor, names
        self.prompt = prompt(processor, question)
        self.ids: list[list[int]] = []  # the question's, then each answer's

    def __call__(self, image: Tensor, label: int, random: torch.Generator) -> Sample:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        if not self.ids:  # the question stands before every image, so its tokens are made once
            asked = self.processor(text=[self.prompt], images=[pixels])["input_ids"][0]
            tokenizer = self.processor.tokenizer
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            answers = [tokenizer.encode(answer(name), add_special_tokens=False) + end for name in self.names]
            self.ids = [list(asked), *answers]
        question, reply = self.ids[0], self.ids[1 + label]
        return {
            "input_ids": torch.tensor(question + reply),
            "labels": torch.tensor([IGNORED] * len(question) + reply),
            "attention_mask": torch.ones(len(question) + len(reply), dtype=torch.long),
            "pixel_values": self.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"][0],
        }


def prompt(processor: Any, question: str) -> str:
    """A question about an image, as the model was taught to read it."""
    return f"{processor.image_token}\n{question}"


def answer(name: str) -> str:
    """What is to follow the prompt."""
    return f" {name}"


def _collate_asked(samples: list[Sample]) -> dict[str, Tensor]:
    length = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, list[Tensor]] = {name: [] for name in samples[0]}
    for sample in samples:
        # Padded with the last token: any fixed one might be the image token, which the model counts.
        fill = {"input_ids": int(sample["input_ids"][-1]), "labels": IGNORED, "attention_mask": 0}
        missing = length - len(sample["input_ids"])
        for name, value in sample.items():
            batch[name].append(functional.pad(value, (0, missing), value=fill[name]) if name in fill else value)
    return {name: torch.stack(values) for name, values in batch.items()}


# ---- images ----------------------------------------------------------------------------------------------------


def image_shape(model_config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    config = _value(model_config, "vision_config") or model_config
    size = _value(config, "image_size", "sample_size")
    channels = _value(config, "num_channels", "in_channels")
    if size is None or channels is None:
        raise ValueError(
            "data: the model's configuration does not say what images it takes (image_size and num_channels, or "
            "sample_size and in_channels)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def image_processor(model_config: Any) -> Any:
    """What makes of pictures the input that a model of this configuration was trained on here."""
    from transformers import ViTImageProcessorPil

    channels, height, width = image_shape(model_config)
    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def fit(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The image with as many channels as the model takes, and resized to its size."""
    channels, *size = shape
    if image.shape[0] != channels:
        if 1 not in (channels, image.shape[0]):
            raise ValueError(f"data: an image has {image.shape[0]} channels and the model takes {channels}")
        image = image.expand(channels, -1, -1) if channels > 1 else image.mean(dim=0, keepdim=True)
    if list(image.shape[1:]) != size:
        image = functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return image


def _move(image: Tensor, source: ImageSource, random: torch.Generator) -> Tensor:
    """Shifted by a few pixels, with what comes in repeating the border, and mirrored; as the source says."""
    if source.shift:
        down, right = torch.randint(2 * source.shift + 1, (2,), generator=random).tolist()
        height, width = image.shape[1:]
        around = functional.pad(image[None], (source.shift,) * 4, mode="replicate")[0]
        image = around[:, down : down + height, right : right + width]
    if source.flip and torch.rand((), generator=random) < 0.5:
        image = image.flip(-1)
    return image


def _generator(*key: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _shuffled_classes(labels: Sequence[int], chosen: Sequence[int]) -> list[list[int]]:
    """The images of each class, in an order that is always the same."""
    classes: dict[int, list[int]] = {}
    for number in chosen:
        classes.setdefault(int(labels[number]), []).append(number)
    orders = {label: torch.randperm(len(members), generator=_generator(label)) for label, members in classes.items()}
    return [[classes[label][place] for place in orders[label]] for label in sorted(classes)]


def _limited(labels: Sequence[int], limit: int | None) -> list[int]:
    """All images, or the first few of each class: as many of one as of another."""
    everything = list(range(len(labels)))
    if limit is None or limit >= len(labels):
        return everything
    classes = _shuffled_classes(labels, everything)
    in_turn = (members[turn] for turn in range(len(labels)) for members in classes if turn < len(members))
    return sorted(number for number, _ in zip(in_turn, range(limit)))


def _value(config: Any, *names: str) -> Any:
    """The first of these fields that a transformers or diffusers configuration has, or None."""
    values = config if isinstance(config, Mapping) else vars(config)
    found = (values[name] if name in values else getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def _check_classes(pictures: Pictures, source: ImageSource, classes: int | None, field: str) -> None:
    if classes is None or len(pictures.names) > classes:
        raise ValueError(
            f"data: {source.path!r} has {len(pictures.names)} classes and the model's {field} is {classes}; it must be "
            "at least as many"
        )


# ---- where images come from ------------------------------------------------------------------------------------


def _open(source: ImageSource) -> Pictures:
    path = Path(source.path).expanduser()
    if source.path == "digits":
        return _digits()
    if path.suffix == ".npz":
        return _arrays(path)
    if path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        folders = {folder: _image_files(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
        if any(folders.values()):
            return _class_folders(path, {folder: files for folder, files in folders.items() if files})
    return _data_set(source, path)


def _digits() -> Pictures:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError("digits come with scikit-learn; install it with: pip install 'patchattn[train]'") from error

    found = sklearn.datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    mark = hashlib.sha256(found.images.tobytes() + found.target.tobytes()).hexdigest()
    said = {"kind": "images", "path": "digits", "sha256": mark, "scikit-learn": sklearn.__version__}
    return Pictures(images.__getitem__, found.target.tolist(), [str(name) for name in found.target_names], said)


def _arrays(path: Path) -> Pictures:
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {str(path)!r} (from {Path.cwd()})")
    with np.load(path, allow_pickle=False) as arrays:
        for name in ("images", "labels"):
            if name not in arrays:
                raise ValueError(f"data: {path} has no array {name!r}; there: {', '.join(arrays) or 'nothing'}")
        images, labels = arrays["images"], arrays["labels"]
        names = [str(name) for name in arrays["names"]] if "names" in arrays else None
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise ValueError(
            f"data: images of {path} are {list(images.shape)}; they must be [images, height, width] or [images, "
            "height, width, channels], with 1 or 3 channels"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"data: labels of {path} are {labels.dtype} {list(labels.shape)}; they must be {len(images)} whole numbers "
            "from 0 on, one for each image"
        )
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"data: images of {path} are {images.dtype} from {images.min()} to {images.max()}; they must be uint8, or "
            "numbers from 0 to 1"
        )

    def read(number: int) -> Tensor:
        return _tensor(images[number])

    names = names or [str(label) for label in range(int(labels.max()) + 1)]
    return Pictures(read, labels.tolist(), names, {"kind": "images", **fingerprint_file(path)})


def _class_folders(path: Path, folders: dict[Path, list[Path]]) -> Pictures:
    files = [file for members in folders.values() for file in members]
    labels = [label for label, members in enumerate(folders.values()) for _ in members]
    listed = "\n".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
    mark = {"sha256": hashlib.sha256(listed.encode()).hexdigest(), "hashed": "names and sizes of the files"}

    def read(number: int) -> Tensor:
        from PIL import Image

        try:
            with Image.open(files[number]) as image:
                return _picture(image)
        except OSError as error:
            raise ValueError(f"data: {files[number]} is no image that can be read: {error}") from error

    return Pictures(read, labels, [folder.name for folder in folders], {"kind": "images", "path": str(path), **mark})


def _image_files(folder: Path) -> list[Path]:
    from PIL import Image

    known = Image.registered_extensions()
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in known)


def _data_set(source: ImageSource, path: Path) -> Pictures:
    data = _load_data_set(source, path)
    for column in (source.image_column, source.label_column):
        if column not in data.column_names:
            raise ValueError(
                f"data: {source.path} has no column {column!r}; there: {', '.join(map(repr, data.column_names))} (set "
                "image_column and label_column)"
            )
    values = data[source.label_column][:]
    feature = data.features[source.label_column]
    if hasattr(feature, "names"):
        names, labels = list(feature.names), list(values)
    else:
        found = sorted(set(values))
        names, labels = [str(value) for value in found], [found.index(value) for value in values]

    def read(number: int) -> Tensor:
        image = data[number][source.image_column]
        return _picture(image) if hasattr(image, "convert") else _tensor(np.asarray(image, dtype=np.uint8))

    said = {"kind": "images", "path": source.path, "name": source.name, "split": source.split}
    return Pictures(read, labels, names, {**said, "fingerprint": data._fingerprint, "rows": len(data)})


def _load_data_set(source: ImageSource, path: Path) -> Any:
    import datasets

    try:
        if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
            return datasets.load_dataset(source.path, source.name, split=source.split)
        saved = datasets.load_from_disk(str(path))
        return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data: {source.path!r} cannot be opened: {reason}; give digits, an .npz file, a folder with one folder of "
            "images per class, or a data set of the hub"
        ) from error


def _picture(image: Any) -> Tensor:
    """A PIL image, in grey if it has one channel of grey, else in colour."""
    return _tensor(np.array(image.convert("L" if image.mode in ("1", "L") else "RGB")))


def _tensor(pixels: Any) -> Tensor:
    """`[height, width]` or `[height, width, channels]`, of bytes or from 0 to 1, as `[channels, height, width]`."""
    values = torch.from_numpy(np.ascontiguousarray(pixels))
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)
