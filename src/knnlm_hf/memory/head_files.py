"""A trained head ↔ a folder or a repository of the Hub; nothing in the files is trusted.

config.json         kind, settings, the model it belongs to, how it was trained
model.safetensors   its parameters and buffers, in their own dtypes
README.md           the model card
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf import identity
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.errors import KNNLMError, PersistenceError, first_line
from knnlm_hf.folders import filled_at_once, finish
from knnlm_hf.memory.head_card import head_card
from knnlm_hf.memory.kinds import class_of
from knnlm_hf.memory.recipe import Recipe, Trained
from knnlm_hf.persistence import hub_origin, local_folder, push_folder
from knnlm_hf.types import check_count
from knnlm_hf.untrusted import inside, is_count, read_json

CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "knnlm_hf head"
VERSION = 1
_ALWAYS_SOUND = 1 << 20  # a setting above it is no more than the numbers there are


class HeadFiles:
    """What `Head` inherits: saving, loading, the Hub."""

    _home: Path | None = None
    """The folder it was loaded from."""

    @property
    def summary(self) -> str:
        """It in a few words, for cards."""
        head: Any = self
        count = sum(parameter.numel() for parameter in head.parameters())
        return f"a {type(self).__name__} of {count:,} parameters"

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save as a folder that `from_pretrained` loads back bit-equal, in the head's own dtypes.

        Killed at any moment, the folder is as before or as after; on an error as before.

        Raises:
            PersistenceError: the folder cannot be written.
        """
        with filled_at_once(Path(save_directory).expanduser().absolute()) as folder:
            _write(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the head and its card to a model repository of the Hub, in one commit.

        `options` are those of `persistence.push_folder`: private, token, commit_message, …
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, "model", **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **expected: Any,
    ) -> Self:
        """Load the head in a folder or a model repository of the Hub; `Head` itself loads any kind.

        Args:
            source: folder or Hub id.
            device: where to put it; default: the CPU.
            revision, token, cache_dir, local_files_only: of the Hub.
            expected: settings that the head must have, such as `n=3`.

        Raises:
            PersistenceError: no head there; one of another kind or other settings; files that are
                missing, cut short, of a newer format, or that do not fit each other.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        # The config first: a repository that is no head is not worth a download.
        config = read_config(local_folder(source, "model", allow_patterns=[CONFIG], **hub))
        for name, value in expected.items():
            found = config["settings"].get(name)
            if found != value:
                raise PersistenceError(
                    f"{source}: the head there has {name} {found!r}, expected {value!r}"
                )
        folder = local_folder(source, "model", allow_patterns=[CONFIG, TENSORS, CARD], **hub)
        head: Self = _read(cls, folder, config)
        return head if device is None else head.to(device)  # type: ignore[attr-defined]

    def reference(self) -> tuple[str | None, str | None]:
        """Hub id and commit it was loaded from, while it equals what lies there; else two Nones."""
        head: Any = self
        repo, commit = hub_origin(self._home) if self._home is not None else (None, None)
        if repo is None or self._home is None:
            return None, None
        try:
            theirs = type(head).from_pretrained(self._home)
        except KNNLMError:
            return None, None
        ours, other = head.state_dict(), theirs.state_dict()
        is_same = theirs.settings() == head.settings() and all(
            value.dtype == ours[name].dtype and torch.equal(value, ours[name].cpu())
            for name, value in other.items()
        )
        return (repo, commit) if is_same else (None, None)


def is_head(folder: Path) -> bool:
    """Whether a trained head was saved in `folder`, whole or damaged."""
    finish(folder)
    try:
        config = read_json(folder, CONFIG, PersistenceError)
    except PersistenceError:
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of the head in `folder`, its fields of the types they must have.

    Raises:
        PersistenceError: there is none, or it is damaged, of a newer format or of something else.
    """
    config, path = read_json(folder, CONFIG, PersistenceError), folder / CONFIG
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PersistenceError(f"{path}: is not the config of a trained head ({FORMAT!r})")
    version = config.get("version")
    if not is_count(version) or version > VERSION:
        raise PersistenceError(
            f"{path}: format version {version!r}, but this knnlm_hf reads up to {VERSION}: "
            "upgrade knnlm_hf"
        )
    if not isinstance(config.get("settings"), dict):
        raise PersistenceError(f"{path}: settings are missing, expected an object")
    origin = config.get("origin")
    if origin is not None and not identity.is_description(origin):
        raise PersistenceError(f"{path}: origin is no description of a model, nor null")
    return config


def _write(head: Any, folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    parameters = sum(tensor.numel() for tensor in head.parameters())
    dtype = str(head.dtype).removeprefix("torch.")
    settings, trained = head.settings(), head.trained
    save_file(tensors, folder / TENSORS)
    card = head_card(type(head).__name__, settings, head.origin, trained, parameters, dtype)
    (folder / CARD).write_text(card, encoding="utf-8")
    config = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "parameters": parameters,
        "dtype": dtype,
        "sha256": file_sha256(folder / TENSORS),
        "trained": None if trained is None else asdict(trained),
        "origin": head.origin,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read(cls: type[Any], folder: Path, config: dict[str, Any]) -> Any:
    settings = dict(config["settings"])
    tensors = _tensors(folder)
    try:
        kind = class_of(settings.pop("kind", None), HeadFiles)
        if not issubclass(kind, cls):
            raise PersistenceError(f"holds a {kind.__name__}, expected a {cls.__name__}")
        most = sum(tensor.numel() for tensor in tensors.values())
        if not most:
            raise PersistenceError(f"{TENSORS} has no numbers")
        for name, value in settings.items():
            if isinstance(value, int) and value > max(most, _ALWAYS_SOUND):
                raise PersistenceError(f"{name} is {value}, its tensors have {most} numbers in all")
        head = kind._blank(settings, tensors)
        _check_tensors(head.state_dict(), tensors)
        if config.get("sha256") not in (None, file_sha256(folder / TENSORS)):
            raise PersistenceError(
                f"{TENSORS} is damaged, or of another save than {CONFIG}: its checksum is another "
                "one; copy or download it again"
            )
        head.load_state_dict(tensors, strict=True, assign=True)
        head.trained, head.origin = _trained(config.get("trained")), config.get("origin")
    except Exception as error:  # whatever these numbers make torch or a constructor say
        raise PersistenceError(
            f"{folder}: the head cannot be loaded: {first_line(error)}"
        ) from error
    head._home = folder
    return head.eval()


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = inside(folder, TENSORS, PersistenceError)
    try:
        # Copied: the file is a map that others may cut, and aligned as matrix products like it.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except Exception as error:  # safetensors has a class of its own, beside OSError and others
        raise PersistenceError(
            f"{path}: is damaged or cut short ({first_line(error)}): copy or download it again"
        ) from error


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Names, shapes, and numbers where numbers are expected; a float may have any float dtype."""
    for name in expected.keys() ^ found.keys():
        there, lacks = (CONFIG, TENSORS) if name in expected else (TENSORS, CONFIG)
        raise PersistenceError(f"{there} has tensor {name!r}, {lacks} has not: they differ")
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise PersistenceError(
                f"tensor {name!r} is {tuple(tensor.shape)}, its settings say {tuple(wanted.shape)}"
            )
        both_float = tensor.is_floating_point() and wanted.is_floating_point()
        if not both_float and tensor.dtype != wanted.dtype:
            raise PersistenceError(f"tensor {name!r} is {tensor.dtype}, expected {wanted.dtype}")


def _trained(data: Any) -> Trained | None:
    if data is None:
        return None
    trained = Trained(**{**data, "recipe": Recipe(**data["recipe"])})
    trained.recipe.check()
    check_count("entries", trained.entries)
    is_sound = (
        is_count(trained.epochs, least=0)
        and isinstance(trained.held_out_loss, float)
        and isinstance(trained.store, str)
        and (trained.teacher is None or isinstance(trained.teacher, dict))
    )
    if not is_sound:
        raise PersistenceError("what it says of its training is not of the right types")
    return trained
