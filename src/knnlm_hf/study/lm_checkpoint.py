"""The checkpoint of a training: tensors under the step's name, then the state that names them.

    state.json            how far it is, and what of
    <step>.safetensors    weights now, the best weights, the optimizer's state

Killed at any moment, what state.json names is whole.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from knnlm_hf.datastore.atomic import discard, write_bytes, write_tensors
from knnlm_hf.errors import KNNLMError, first_line

_STATE = "state.json"


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    tokens: int = 0
    stale: int = 0
    """Measurements since the best one."""
    best_loss: float = math.inf
    valid_loss: float = math.nan
    train_loss: float = math.nan


def save_progress(
    folder: Path,
    progress: Progress,
    identity: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; the one before is removed once this one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"now.{name}": p.detach().contiguous() for name, p in parameters.items()}
    tensors |= {f"best.{name}": p.contiguous() for name, p in best.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
    path = folder / f"{progress.step}.safetensors"
    write_tensors(path, tensors)
    state = {"identity": identity, "progress": asdict(progress), "tensors": path.name}
    write_bytes(folder / _STATE, json.dumps(state, indent=1).encode())
    for old in folder.glob("*.safetensors"):
        if old != path:
            discard(old)


def load_progress(
    folder: Path,
    identity: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Tensor]]:
    """Continue from a checkpoint, if there is one: how far it was, and the best weights.

    Raises:
        KNNLMError: it is damaged, or of another training.
    """
    if not (folder / _STATE).is_file():
        return Progress(), {}
    device = str(next(iter(parameters.values())).device)
    try:
        state = json.loads((folder / _STATE).read_text())
        progress = Progress(**state["progress"])
        tensors = load_file(folder / Path(state["tensors"]).name, device=device)
        found = state["identity"]
    except Exception as error:
        raise KNNLMError(
            f"{folder}: the checkpoint is damaged ({first_line(error)}): remove it to start anew"
        ) from error
    for name, expected in identity.items():
        if found.get(name) != expected:
            raise KNNLMError(
                f"{folder}: this checkpoint is of another training (its {name} differs): train "
                "with the same settings, or remove it to start anew"
            )
    best = {}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"now.{name}"])
            if f"best.{name}" in tensors:
                best[name] = tensors[f"best.{name}"]
            prefix = f"optimizer.{name}."
            optimizer.state[p] = {
                # subtle: AdamW counts its steps on the CPU.
                key[len(prefix) :]: value.cpu() if key.endswith(".step") else value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
    return progress, best


def remove_progress(folder: Path) -> None:
    """Remove a checkpoint, and its folder where nothing else is in it."""
    for path in [folder / _STATE, *folder.glob("*.safetensors")]:
        discard(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
