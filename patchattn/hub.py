"""Save, load and push a patch alone: a config, its tensors, and a model card; never pickle.

    patchattn_config.json   what the patch is, and which model it was made for
    patchattn.safetensors   its parameters, by their names in the base model; left out when there are none
    README.md               the model card

A whole patched model is saved by its own `save_pretrained`: see `checkpoint.py`. `load` reads both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import __version__, card
from .attach import apply_plan, patch_state, plan_of, record_of, root_of
from .sites import find_sites

FORMAT = 1
CONFIG, TENSORS, CARD = "patchattn_config.json", "patchattn.safetensors", "README.md"
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model|patchattn)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(pytorch_model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)
Model = TypeVar("Model", bound=nn.Module)


# ---- the public three --------------------------------------------------------------------------------------


def save(model: nn.Module, directory: str | os.PathLike[str], results: Mapping[str, Any] | None = None) -> Path:
    """Write the patch of `model`, without the model, into a folder, and return the folder.

    Args:
        results: what was measured, for the model card: `{"perplexity": 7.1}` or `{"task": {"metric": 0.5}}`.

    What was in the folder before stays as it was until everything new is written.
    """
    files = patch_files(model, results, os.fspath(directory))
    if is_whole(Path(directory)):
        raise ValueError(f"{os.fspath(directory)} holds a whole patched model; give the patch a folder of its own")
    with replacing(directory, stale=lambda name: name == TENSORS) as folder:
        write(folder, files)
        keep_foreign_card(folder, Path(directory, CARD))
    return Path(directory)


def load(
    model: Model, source: str | os.PathLike[str], revision: str | None = None, *, strict_base: bool = True
) -> Model:
    """Put a saved patch on the model it was made for, in place, and return the model.

    Args:
        source: a folder or a repository of the hub, with a patch or with a whole patched model.
        revision: branch, tag or commit of the repository.
        strict_base: whether a patch made for a base model of another name is refused.

    Version, base model, shapes and tensors are checked, and named if they differ, before the model is touched.
    """
    folder = _local(source, revision)
    description = read_description(folder, os.fspath(source))
    if strict_base:
        _check_base(description, root_of(model))
    file = folder / TENSORS
    with open_tensors(file if file.is_file() else None) as tensors:
        return put_on(model, description, TensorCheck(tensors, os.fspath(source), description, root_of(model)))


def push(
    model: nn.Module,
    repo: str,
    private: bool | None = None,
    commit_message: str | None = None,
    results: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the patch of `model` to a repository of the hub, in one commit, and return its address.

    Args:
        repo: `"owner/name"`, or `"name"` for your own; made if it does not exist.
        private: whether a new repository is private.
        revision: the branch to commit to, made if it does not exist.
        results: what was measured, for the model card.
    """
    methods = "+".join(dict.fromkeys(method["method"] for entry in plan_of(model) for method in entry["methods"]))
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, results)
        return push_folder(
            folder, repo, private, commit_message or f"Upload {methods} patch", revision=revision, token=token
        )


def push_folder(
    folder: str | os.PathLike[str],
    repo: str,
    private: bool | None = None,
    commit_message: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder that `save` or a patched model's `save_pretrained` wrote, in one commit; returns the address."""
    read_description(Path(folder))
    stale = is_weights if is_whole(Path(folder)) else is_patch_file
    written = sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())
    written = [name for name in written if not any(part.startswith(".") for part in name.split("/"))]
    api, repo = repository(repo, private, revision, token)
    commit(api, repo, folder, written, commit_message or "Upload patch", stale, revision=revision)
    return f"{api.endpoint}/{repo}"


# ---- what is written ---------------------------------------------------------------------------------------


def describe(model: nn.Module, results: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All there is to know of a patch but its tensors, as JSON-ready data."""
    import transformers

    root, plan, record = root_of(model), plan_of(model), record_of(model)
    description = {
        "format_version": FORMAT,
        "patchattn_version": __version__,
        "transformers_version": transformers.__version__,
        "base_model": record.base_model,
        "base_revision": record.base_revision,
        "architecture": type(root).__name__,
        "shape": _shape(root, [name for entry in plan for name in entry["layers"]]),
        "plan": plan,
    }
    if results:
        description["results"] = dict(results)
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the patch or its results cannot be written as JSON: {error}") from None


def state(model: nn.Module) -> dict[str, Tensor]:
    """The patch's own tensors on the CPU, also those that accelerate keeps elsewhere."""
    tensors = patch_state(model)
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        from accelerate.utils import align_module_device

        root = root_of(model)
        for name in tensors:
            module_name, _, leaf = name.rpartition(".")
            module = root.get_submodule(module_name)
            with align_module_device(module):
                tensors[name] = getattr(module, leaf).detach().clone()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def patch_files(model: nn.Module, results: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """File names and contents of a patch alone: text, or tensors."""
    description, tensors = describe(model, results), state(model)
    text = card.render(description, where, auto_class(root_of(model)), whole=False)
    files: dict[str, Any] = {CONFIG: json.dumps(description, indent=2) + "\n", CARD: text}
    return {**files, TENSORS: tensors} if tensors else files


def write(folder: Path, files: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            save_file(content, folder / name, metadata={"format": "pt"})


def keep_foreign_card(folder: Path, existing: Path) -> None:
    """Leave a README.md that somebody else wrote as it is."""
    if existing.is_file() and not card.is_ours(existing.read_text(encoding="utf-8", errors="replace")):
        (folder / CARD).unlink(missing_ok=True)


def is_patch_file(name: str) -> bool:
    """Whether a patch alone consists of such files."""
    return name in (CONFIG, TENSORS)


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a whole checkpoint consists of such files, so that it replaces an earlier one's."""
    if variant and f".{variant}." not in name:
        return False
    plain = name.replace(f".{variant}", "") if variant else name
    return plain == CONFIG or _WEIGHTS.fullmatch(plain) is not None


def _shape(root: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """What a model must agree in for a patch to fit; a list where the patched modules differ."""
    sites = find_sites(root)
    patched = [site for site in sites if site.name in set(layers)]
    fields = ("heads", "kv_heads", "head_dim", "hidden_size")
    return {
        "model_type": getattr(getattr(root, "config", None), "model_type", None),
        "attention_modules": len(sites),
        **{field: _one_or_all([getattr(site, field) for site in patched]) for field in fields},
    }


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def auto_class(root: nn.Module) -> str | None:
    """The class that opens this kind of model by name: one of transformers' auto classes, or diffusers' own."""
    if any(kind.__module__.startswith("diffusers.") for kind in type(root).__mro__):
        return type(root).__name__
    return next(iter(auto_classes(root)), None)


def auto_classes(root: nn.Module) -> list[str]:
    """The auto classes of transformers that open this kind of model, the most specific first."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    names, config = [], getattr(root, "config", None)
    for name, known in vars(modeling_auto).items():
        if isinstance(known, type) and issubclass(known, _BaseAutoModelClass) and name.startswith("AutoModel"):
            mapping: Any = getattr(known, "_model_mapping", None)
            if type(config) in (mapping or ()):
                classes = mapping[type(config)]
                if type(root) in (classes if isinstance(classes, tuple) else (classes,)):
                    names.append(name)
    return sorted(names, key=lambda name: name in ("AutoModel", "AutoModelForPreTraining"))


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str], stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A temporary folder whose files take the place of those in `directory`, unless an error stops the writing.

    Args:
        stale: which other files of `directory` belong to what is replaced, and go.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{os.fspath(directory)} is a file; give a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = not target.exists() or target.parent.stat().st_dev == target.stat().st_dev
    parent = target.parent if beside and os.access(target.parent, os.W_OK) else target
    folder = parent / f".{target.name}-{uuid.uuid4().hex}.tmp"
    folder.mkdir()
    try:
        yield folder
        if not target.exists():
            folder.rename(target)
            return
        written = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        names = {file.relative_to(folder) for file in written}
        for file in target.iterdir():
            if file.is_file() and Path(file.name) not in names and stale(file.name):
                file.unlink()
        for file in sorted(written, key=lambda file: file.suffix == ".json"):  # the configs last
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- what is read ------------------------------------------------------------------------------------------


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a whole patched model, and not a patch alone."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "patchattn" in values or "patchattn" in (values.get("quantization_config") or {})
    except (OSError, ValueError, AttributeError):
        return False


def read_description(folder: Path, source: str | None = None) -> dict[str, Any]:
    """What the folder, which came from `source`, says of its patch; an error says why it cannot be read."""
    for name, key in ((CONFIG, None), ("config.json", "patchattn")):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            inside = values if key is None or key in values else values.get("quantization_config") or {}
            description = inside if key is None else inside.get(key)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is no JSON object: {error}") from None
        if description is not None:
            check_format(description, str(file))
            return description
    raise FileNotFoundError(
        f"{source or folder} holds no patch: it has neither {CONFIG} nor a config.json with a field 'patchattn'"
    )


def check_format(description: Any, where: str) -> None:
    """Refuse what another version wrote, or what is no description at all."""
    wanted = ("format_version", "patchattn_version", "architecture", "shape", "plan")
    missing = [key for key in wanted if not isinstance(description, dict) or key not in description]
    if missing:
        raise ValueError(f"{where} is not what patchattn writes: it has no field {missing[0]!r}")
    if description["format_version"] != FORMAT:
        newer = isinstance(description["format_version"], int) and description["format_version"] > FORMAT
        raise ValueError(
            f"{where} has format_version {description['format_version']!r}, written by patchattn "
            f"{description['patchattn_version']}; this is patchattn {__version__}, which reads {FORMAT}"
            + ("; run pip install --upgrade patchattn" if newer else "")
        )


def put_on(
    model: Model, description: Mapping[str, Any], check: Callable[[dict[str, Tensor]], None] | None = None
) -> Model:
    """Patch a model as described; all or nothing. For `check` see `apply_plan`."""
    rename = fit(description, root_of(model))
    plan = [{**entry, "layers": [rename(name) for name in entry["layers"]]} for entry in description["plan"]]
    return apply_plan(model, plan, check)


def open_tensors(file: Path | None) -> contextlib.AbstractContextManager[Any]:
    """A safetensors file open for reading, or None where there is no file."""
    from safetensors import safe_open

    return contextlib.nullcontext() if file is None else safe_open(file, framework="pt")


def saved_dtype(saved: torch.dtype, built: torch.dtype, model: nn.Module) -> torch.dtype:
    """The dtype of a tensor that comes back.

    A patch that was cast together with its model comes back as it was; on a model of another dtype, the method's
    own choice stands.
    """
    return saved if saved == getattr(model, "dtype", None) and built.is_floating_point else built


class TensorCheck:
    """Compares the tensors of a file with those that a patch needs, then fills the latter.

    Tensors on the meta device only get their dtype: the model's loader fills them.
    """

    def __init__(self, tensors: Any, source: str, description: Mapping[str, Any], model: nn.Module) -> None:
        self.tensors, self.source, self.model, self.rename = tensors, source, model, fit(description, model)

    def __call__(self, needed: dict[str, Tensor]) -> None:
        found = {self.rename(name): name for name in (self.tensors.keys() if self.tensors is not None else ())}
        where = f"the patch in {self.source}" + (f", which has no {TENSORS}," if self.tensors is None else "")
        for what, names in (("lacks", needed.keys() - found.keys()), ("has", found.keys() - needed.keys())):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                kind = "the tensor" if what == "lacks" else "an unexpected tensor"
                raise ValueError(f"{where} {what} {kind} {min(names)}{more}")
        for name, tensor in needed.items():
            shape = tuple(self.tensors.get_slice(found[name]).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(f"{where} has {name} in shape {list(shape)}; this model needs {list(tensor.shape)}")
        for name, tensor in needed.items():
            value = self.tensors.get_tensor(found[name])
            tensor.data = tensor.data.to(saved_dtype(value.dtype, tensor.dtype, self.model))
            if tensor.device.type != "meta":
                tensor.data.copy_(value)


def fit(description: Mapping[str, Any], root: nn.Module) -> Callable[[str], str]:
    """How the patch's names become names in this model; an error names what does not fit.

    A causal LM and its bare decoder differ in a prefix only, and a patch of one fits the other.
    """
    wanted: dict[str, Any] = description["shape"]
    layers = [name for entry in description["plan"] for name in entry["layers"]]
    sites = {site.name: site for site in find_sites(root)}
    prefix = f"{getattr(root, 'base_model_prefix', '')}."
    renamings: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: prefix + name,
        lambda name: name.removeprefix(prefix),
    ]
    rename = next((rename for rename in renamings if all(rename(name) in sites for name in layers)), None)
    given = _shape(root, [rename(name) for name in layers] if rename is not None else [])
    fields = given if rename is not None else ("model_type", "attention_modules")
    made_for, this = f"this patch was made for {description['architecture']}", f"this {type(root).__name__}"
    for field in fields:
        if given[field] != wanted.get(field):
            raise ValueError(f"{made_for} with {field} {wanted.get(field)!r}; {this} has {given[field]!r}")
    if rename is None:
        name = next(name for name in layers if name not in sites)
        raise ValueError(f"{made_for} with the attention module {name!r}, which {this} does not have")
    return rename


def _check_base(description: Mapping[str, Any], root: nn.Module) -> None:
    """Names of repositories must agree; of a folder nobody knows what is in it."""
    config = getattr(root, "config", None)
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    made_for, made_at = description.get("base_model"), description.get("base_revision")
    if not (card.is_repo_id(name) and card.is_repo_id(made_for)):
        return
    if name != made_for:
        raise ValueError(
            f"this patch was made for {made_for}; this model is {name}. To use it all the same, for a model with the "
            "same origin, pass strict_base=False"
        )
    if revision and made_at and revision != made_at:
        warnings.warn(f"this patch was made for {made_for} at revision {made_at}; this is {revision}", stacklevel=3)


# ---- the hub -----------------------------------------------------------------------------------------------


def _local(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder itself, or the files of a repository that hold its patch, downloaded."""
    name = os.fspath(source)
    if os.path.isdir(name):
        return Path(name)
    if not card.REPO_ID.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"there is no folder {name!r}, and a repository of the hub is named 'owner/name'")
    from huggingface_hub import snapshot_download

    with _explained(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, "config.json", TENSORS]))


def repository(repo: str, private: bool | None, revision: str | None, token: str | None) -> tuple[Any, str]:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo, None):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(name, branch=revision, exist_ok=True)
    return api, name


def commit(
    api: Any,
    repo: str,
    folder: str | os.PathLike[str],
    names: Sequence[str],
    message: str,
    stale: Callable[[str], bool],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> Any:
    """Upload files of a folder, and take the `stale` ones they replace away, in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    prefix = f"{subfolder}/" if subfolder else ""
    with _explained(repo, revision):
        there = {name.removeprefix(prefix) for name in api.list_repo_files(repo, revision=revision)
                 if name.startswith(prefix)}  # fmt: skip
        operations: list[Any] = []
        for name in names:
            content: Any = os.path.join(folder, name)
            if name == CARD:
                if name in there and not card.is_ours(_remote_text(api, repo, prefix + name, revision)):
                    continue
                content = card.point_to(Path(content).read_text(encoding="utf-8"), repo).encode()
            operations.append(CommitOperationAdd(path_in_repo=prefix + name, path_or_fileobj=content))
        old = sorted(name for name in there - set(names) if stale(name))
        operations += [CommitOperationDelete(path_in_repo=prefix + name) for name in old]
        return api.create_commit(repo, operations, commit_message=message, revision=revision, **options)


def _remote_text(api: Any, repo: str, name: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo, name, revision=revision)).read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into an error that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository: {error}") from None
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder and no repository {repo!r} at {constants.ENDPOINT}, or it is private and you are not "
            "logged in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{repo!r} is no folder here, is not in the cache, and {constants.ENDPOINT} cannot be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) not in (401, 403):
            raise
        raise PermissionError(f"{constants.ENDPOINT} does not let you write or read {repo!r}: {error}") from error
    except HTTPError as error:
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {error}") from error
