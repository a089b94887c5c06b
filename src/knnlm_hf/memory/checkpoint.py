"""The checkpoint of a training: tensors under a step's name, then the state that names them.

    state.json            how far it is, what of, and checksums
    <step>.safetensors    weights now, the best weights, the optimizer's state

Killed at any moment, what state.json names is whole. A training that is over keeps its checkpoint,
so that nothing is lost where its result cannot be saved: see `remove_checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.errors import KNNLMError, first_line

_STATE = "state.json"


class Checkpoint:
    """Where a training writes how far it is.

    Args:
        folder: made by the first `save`.
        identity: plain data; a run of another identity is not continued.
        parameters: the weights, by name.
        optimizer: of these parameters.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, Any],
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.folder, self.identity = Path(folder), identity
        self.parameters, self.optimizer = parameters, optimizer

    def save(self, step: int, progress: dict[str, Any], best: dict[str, Tensor]) -> None:
        """Write it; the one before is removed once this one is whole.

        Args:
            step: what the file of tensors is named by; another one at each call.
            progress: plain data.
            best: the best weights so far, by name.

        Raises:
            DatastoreError: the disk is full, or cannot be written.
        """
        path = self.folder / f"{step}.safetensors"
        with atomic.explaining(self.folder, "the checkpoint"):
            self.folder.mkdir(parents=True, exist_ok=True)
            sha256 = atomic.write_tensors(path, self._tensors(best))
            state = {
                "identity": self.identity, "progress": progress, "tensors": path.name,
                "sha256": sha256,
            }  # fmt: skip
            state["check"] = _checksum(state)
            atomic.write_bytes(self.folder / _STATE, json.dumps(state, indent=1).encode())
        for old in _tensor_files(self.folder):
            if old != path:
                atomic.discard(old)

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Take over weights and optimizer state; return progress and best weights, if there is one.

        Raises:
            KNNLMError: it is damaged, or of another training.
        """
        if not (self.folder / _STATE).is_file():
            return None
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
            path = self.folder / Path(state["tensors"]).name
            if state.pop("check") != _checksum(state) or file_sha256(path) != state["sha256"]:
                raise ValueError("a checksum is another one")
            tensors = load_file(path)
            progress, found = dict(state["progress"]), dict(state["identity"])
        except Exception as error:
            raise KNNLMError(
                f"{self.folder}: the checkpoint is damaged ({first_line(error)}): "
                "remove it to start anew"
            ) from error
        difference = _difference(found, self.identity)
        if difference is not None:
            raise KNNLMError(
                f"{self.folder}: the checkpoint there is of another training: its {difference}: "
                "train with the same settings, or remove it to start anew"
            )
        return progress, self._take(tensors)

    def _tensors(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {f"best.{name}": value for name, value in best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return {name: value.detach().contiguous() for name, value in tensors.items()}

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        best, states = {}, {}
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            if f"best.{name}" in tensors:
                best[name] = tensors[f"best.{name}"].to(parameter.device)
            prefix = f"optimizer.{name}."
            states[parameter] = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        # Torch knows where a step count has to be: with a fused AdamW on the parameter's device,
        # else on the CPU. It numbers parameters in the order of their groups.
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbered = {i: states[p] for i, p in enumerate(order) if states[p]}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        return best


def remove_checkpoint(folder: str | Path) -> None:
    """Remove a checkpoint, and its folder where nothing else is in it, if the system lets us."""
    folder = Path(folder)
    for path in [folder / _STATE, *_tensor_files(folder)]:
        atomic.discard(path)
    with suppress(OSError):  # something else is in it, or it is not there
        folder.rmdir()


def _tensor_files(folder: Path) -> list[Path]:
    """Those of checkpoints, and of nobody else."""
    return [path for path in folder.glob("*.safetensors") if path.stem.isdecimal()]


def _difference(found: Any, expected: Any) -> str | None:
    """Where two trainings differ, in a few words."""
    if found == expected:
        return None
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in {**expected, **found}:
            inner = _difference(found.get(name), expected.get(name))
            if inner is not None:
                return f"{name} {inner}"
    return f"is {shortened(found)}, expected {shortened(expected)}"


def _checksum(state: dict[str, Any]) -> str:
    """Sha-256 of the state, without its checksum: the same once it is read back."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
