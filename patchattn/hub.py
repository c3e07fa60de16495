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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from . import card, seer_published
from .description import CONFIG, auto_class, check_base, describe, is_whole, read_description
from .folder import CARD, contents, is_patch_file, is_weights, keep_foreign_card, replacing
from .living import plan_of
from .record import root_of
from .tensors import TENSORS, TensorCheck, open_tensors, put_on, state, write_tensors

__all__ = ["load", "push", "push_folder", "read_description", "save"]
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, directory: str | os.PathLike[str], results: Mapping[str, Any] | None = None) -> Path:
    """Write the patch of `model`, without the model, into a folder, and return the folder.

    Args:
        results: what was measured, for the model card: `{"perplexity": 7.1}` or `{"task": {"metric": 0.5}}`.

    What was in the folder before stays as it was until everything new is written.
    """
    if is_whole(Path(directory)):
        raise ValueError(f"{os.fspath(directory)} holds a whole patched model; give the patch a folder of its own")
    with replacing(directory, stale=lambda name: name == TENSORS) as folder:
        write_patch(model, folder, results, os.fspath(directory))
        keep_foreign_card(folder, Path(directory, CARD))
    return Path(directory)


def load(
    model: Model, source: str | os.PathLike[str], revision: str | None = None, *, strict_base: bool = True
) -> Model:
    """Put a saved patch on the model it was made for, in place, and return the model.

    Args:
        source: a folder or a repository of the hub, with a patch, with a whole patched model, or with gates as
            SeerAttention's authors publish them.
        revision: branch, tag or commit of the repository.
        strict_base: whether a patch made for a base model of another name is refused.

    Version, base model, shapes and tensors are checked, and named if they differ, before the model is touched.
    """
    folder = _local(source, revision)
    if seer_published.is_published(folder):
        description, gates = seer_published.read_published(folder)
        if strict_base:
            check_base(description, root_of(model))
        return put_on(model, description, TensorCheck(gates, os.fspath(source), description, root_of(model)))
    description = read_description(folder, os.fspath(source))
    if strict_base:
        check_base(description, root_of(model))
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
    api, repo = repository(repo, private, revision, token)
    commit(api, repo, folder, contents(folder), commit_message or "Upload patch", stale, revision=revision)
    return f"{api.endpoint}/{repo}"


def write_patch(model: nn.Module, folder: Path, results: Mapping[str, Any] | None, where: str) -> None:
    """Write the files of a patch alone, whose model card says that they are at `where`."""
    description, tensors = describe(model, results), state(model)
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if tensors:
        write_tensors(tensors, folder / TENSORS)
    text = card.render(description, where, auto_class(root_of(model)), whole=False)
    (folder / CARD).write_text(text, encoding="utf-8")


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
        wanted = [CONFIG, "config.json", TENSORS, seer_published.WEIGHTS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


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
