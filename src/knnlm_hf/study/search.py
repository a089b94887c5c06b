"""Queries → neighbours, once per index: the three mask × score modes of the paper.

    auto    the library's own choice: approximate mask, scores as the index has them
    codes   a product quantiser: index mask, index scores (and, from one search, true scores)
    exact   true mask, true scores

Shape suffixes: N token, Q query, K neighbour.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf.index import ExactIndex, SearchIndex, rescore
from knnlm_hf.progress import track
from knnlm_hf.types import KeyRows

Search = Literal["auto", "codes", "exact"]
Found = tuple[Tensor, Tensor]
"""Similarity (Q, K) float32, nearest first; whether each neighbour carries the target, bool."""

NPROBE = 32
"""Inverted lists that `codes` visits, as the paper did."""
_QUERIES = 512
_SMALLEST_BYTE_CODES = 10_000
"""Entries from which 256 centroids per quantiser can be trained; 16 below."""


def codes_spec(entries: int, dim: int) -> str:
    """The FAISS factory string of a product quantiser of 4 dimensions a code, as the paper's."""
    lists = 2 ** max(0, math.floor(math.log2(max(1.0, math.sqrt(entries)))) - 1)
    parts = -(-dim // 4)
    pad = "" if dim % 4 == 0 else f"Pad{parts * 4},"
    bits = "" if entries >= _SMALLEST_BYTE_CODES else "x4"
    return f"{pad}IVF{lists},PQ{parts}{bits}"


def neighbours(
    index: SearchIndex,
    keys: KeyRows,
    values_N: Tensor,
    queries_QD: Tensor,
    targets_Q: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    show: bool = True,
) -> dict[str, Found]:
    """Search all queries and note which neighbours carry their target.

    `device` is where exact search and rescoring compute.

    Returns:
        "index": mask and scores of the index. "real", where those scores are not the true ones:
        the same neighbours with their true similarities, in the order of these.
    """
    is_exact = isinstance(index, ExactIndex) or index.scores_are_exact
    # Exact search streams all keys for each call: large calls, but not all memory.
    step = len(queries_QD) if isinstance(index, ExactIndex) else _QUERIES
    step = max(1, min(step, (1 << 27) // max(1, k)))
    found: dict[str, list[Found]] = {}
    pieces = range(0, len(queries_QD), step)
    for start in track(
        pieces, "searching", lambda start: min(step, len(queries_QD) - start),
        total=len(queries_QD), unit="queries", show=show,
    ):  # fmt: skip
        some_QD, targets = queries_QD[start : start + step], targets_Q[start : start + step]
        some_QD = some_QD.to(device)
        similarity_QK, ids_QK = (part.cpu() for part in index.search(some_QD, k))
        is_target_QK = values_N[ids_QK.clamp(min=0)] == targets[:, None]
        is_target_QK &= ids_QK >= 0
        found.setdefault("index", []).append((similarity_QK, is_target_QK))
        if not is_exact:
            true_QK = rescore(some_QD, ids_QK, keys, index.metric).cpu()
            true_QK, order_QK = true_QK.sort(dim=1, descending=True, stable=True)
            found.setdefault("real", []).append((true_QK, is_target_QK.gather(1, order_QK)))
    return {
        name: (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        for name, parts in found.items()
    }


def save_found(found: dict[str, Found], folder: Path) -> None:
    """Write what `neighbours` gave, one safetensors file per kind of score."""
    folder.mkdir()
    for name, (similarity, is_target) in found.items():
        save_file(
            {"similarity": similarity, "is_target": is_target}, folder / f"{name}.safetensors"
        )


def load_found(folder: Path, score: str = "index") -> Found:
    """Read one kind of score; the index's own where they are the true ones already."""
    path = folder / f"{score}.safetensors"
    columns = load_file(path if path.is_file() else folder / "index.safetensors")
    return columns["similarity"], columns["is_target"]
