"""A kNN memory's own distribution of every entry of its store, retrieved once and kept.

Of each entry the T most probable next tokens are kept, most probable first; what the others had is
shared out among them in proportion, and how much that was is reported. The entry itself does not
count as its own neighbour. A killed build continues where it stopped.

Shape suffixes: N entry, Q entries of a batch, K neighbour, T kept token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader, Rows, atomic
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.datastore.folder import locked
from knnlm_hf.errors import DatastoreError, SettingError
from knnlm_hf.interpolation import knn_weights
from knnlm_hf.memory.knn import KNNMemory
from knnlm_hf.memory.soft_target_files import (
    MOST_UINT16,
    TargetManifest,
    append_shard,
    existing,
    load_shard,
    read_manifest,
)
from knnlm_hf.memory.text import reads
from knnlm_hf.progress import track
from knnlm_hf.types import Neighbors, check_count

_DISTRIBUTION = 1 << 25  # (Q, V) elements made at a time


class SoftTargets:
    """N sparse distributions over the vocabulary, mapped from the disk; use `build` or `open`."""

    def __init__(self, path: Path, manifest: TargetManifest) -> None:
        self.path, self.manifest = path, manifest
        parts = [load_shard(path, shard, manifest) for shard in manifest.shards]
        self._tokens = Rows([tokens_nT for tokens_nT, _ in parts])
        self._probs = Rows([probs_nT for _, probs_nT in parts])

    @classmethod
    def build(
        cls,
        store: DatastoreReader,
        teacher: KNNMemory,
        path: str | Path | None = None,
        *,
        tokens: int = 32,
        shard_size: int = 1 << 18,
        batch_size: int = 4096,
        progress: bool = True,
    ) -> Self:
        """Ask the teacher about every entry of its store, or continue where that stopped.

        Args:
            store: the datastore.
            teacher: a kNN memory on it; its k, temperature, index and rescoring count.
            path: folder; default: beside the store, named `<store>.targets`. With a finished one of
                the same store and teacher nothing is done.
            tokens: T, kept for each entry; 4·T or 6·T bytes each.
            shard_size: entries of a file.
            batch_size: entries asked about at a time.
            progress: show progress on stderr.

        Raises:
            DatastoreError: the teacher's store is another one; the folder holds something else, or
                cannot be written.
        """
        if reads(teacher):
            raise SettingError(
                f"a {type(teacher).__name__} is asked with its text, which a head is not given: "
                "distil a KNNMemory"
            )
        check_teacher(store, teacher.store.digest, f"the teacher searches {teacher.store.path}")
        path = Path(f"{store.path}.targets") if path is None else Path(path).expanduser()
        wanted = TargetManifest(
            store.digest, len(store), store.vocab_size, min(check_count("tokens", tokens),
            store.vocab_size), check_count("shard_size", shard_size), _describe(teacher),
        )  # fmt: skip
        check_count("batch_size", batch_size)
        with locked(path), atomic.explaining(path):
            manifest = existing(path, wanted)
            answers: list[tuple[Tensor, Tensor, Tensor]] = []
            blocks = track(
                _blocks(manifest, batch_size), "asking the teacher", len,
                total=len(store) - manifest.rows, unit="entries", show=progress,
            )  # fmt: skip
            for ids_Q in blocks:
                answers += _ask(teacher, ids_Q, manifest.tokens)
                done = int(ids_Q[-1]) + 1
                if done % shard_size == 0 or done == len(store):
                    manifest = append_shard(path, manifest, answers)
                    answers = []
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open finished targets; sizes are checked here, `verify` reads everything.

        Raises:
            DatastoreError: there are none, they are unfinished or damaged.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        if manifest.rows < manifest.entries:
            raise DatastoreError(
                f"{folder}: the soft targets are unfinished ({manifest.rows:,} of "
                f"{manifest.entries:,} entries): run SoftTargets.build again to continue"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.entries

    def __repr__(self) -> str:
        return f"SoftTargets({str(self.path)!r}: {len(self):,} entries, {self.tokens} tokens each)"

    def __getitem__(self, ids_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (Q, T) int64 and probabilities (Q, T) float32 of entries, on the CPU.

        A row sums to 1, or to 0 for an entry without a neighbour. A token of probability 0 only
        fills the row.

        Raises:
            DatastoreError: numbers that are neither tokens nor probabilities.
        """
        tokens_QT = self._tokens[ids_Q].long()
        if tokens_QT.numel() and self._tokens.dtype == torch.int16:
            tokens_QT &= MOST_UINT16 - 1
        probs_QT = self._probs[ids_Q].float()
        is_token_QT = (tokens_QT >= 0) & (tokens_QT < self.manifest.vocab_size)
        if not bool((is_token_QT & (probs_QT >= 0) & probs_QT.isfinite()).all()):
            raise DatastoreError(
                f"{self.path}: is damaged: has tokens above {self.manifest.vocab_size - 1} or "
                "probabilities that are none: build the soft targets again"
            )
        return tokens_QT, probs_QT / probs_QT.sum(1, keepdim=True).clamp(min=1e-7)

    @property
    def tokens(self) -> int:
        """T."""
        return self.manifest.tokens

    @property
    def kept(self) -> float:
        """Mean probability that the kept tokens had, of the entries with a neighbour; 0 … 1."""
        answered = sum(shard.answered for shard in self.manifest.shards)
        return sum(shard.kept for shard in self.manifest.shards) / max(1, answered)

    def about(self) -> dict[str, Any]:
        """Plain data: the teacher, T and what was kept."""
        return self.manifest.teacher | {"tokens": self.tokens, "kept": self.kept}

    def verify(self, progress: bool = False) -> None:
        """Read everything and compare it with the manifest.

        Raises:
            DatastoreError: naming the first file that is damaged.
        """
        for shard in track(self.manifest.shards, "verifying", unit="files", show=progress):
            if file_sha256(self.path / shard.file) != shard.sha256:
                raise DatastoreError(
                    f"{self.path / shard.file}: the file is damaged: its checksum is another one"
                )


def check_teacher(store: DatastoreReader, digest: str, what: str) -> None:
    """Raise `DatastoreError` unless `digest` is the store's own: `what` says whose it is."""
    if digest != store.digest:
        raise DatastoreError(
            f"{what}, which is not the datastore to train on ({store.path}): entries would be "
            "taken for others; use the same one for both"
        )


def _describe(teacher: KNNMemory) -> dict[str, Any]:
    info = teacher.index.info
    return {
        "k": teacher.k,
        "temperature": teacher.temperature,
        "metric": teacher.metric,
        "rescore": teacher.rescore,
        "index": info.factory if info is not None else teacher.index_name,
        "nprobe": getattr(teacher.index, "nprobe", None),
        "index_sha256": info.sha256 if info is not None else "",
    }


def _blocks(manifest: TargetManifest, batch_size: int) -> Iterator[Tensor]:
    """Numbers of the entries that are left, in order; a block lies within one shard."""
    for first in range(manifest.rows, manifest.entries, manifest.shard_size):
        end = min(first + manifest.shard_size, manifest.entries)
        yield from torch.split(torch.arange(first, end), batch_size)


def _ask(teacher: KNNMemory, ids_Q: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `most_probable` says of entries, a part at a time; none finds itself."""
    near = teacher.search(teacher.store.keys[ids_Q].float(), exclude=ids_Q)
    rows = max(1, _DISTRIBUTION // teacher.vocab_size)
    for part in zip(*(torch.split(one, rows) for one in near), strict=True):
        yield most_probable(Neighbors(*part), teacher.temperature, teacher.vocab_size, tokens)


def most_probable(
    near: Neighbors, temperature: float, vocab_size: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable tokens of each query's kNN distribution.

    Returns:
        Tokens (Q, T) int64, most probable first; probabilities (Q, T) float32 that sum to 1 (0 in
        a query without a neighbour); the probability (Q,) that these tokens had in all.
    """
    weights_QK = knn_weights(near.similarity, temperature).exp()
    probs_QV = torch.zeros(len(weights_QK), vocab_size)
    probs_QV.scatter_add_(1, near.tokens.clamp(min=0), weights_QK)
    probs_QT, tokens_QT = probs_QV.topk(tokens, dim=1)
    kept_Q = probs_QT.sum(1)
    tokens_QT = torch.where(probs_QT > 0, tokens_QT, tokens_QT[:, :1])
    return tokens_QT, probs_QT / kept_Q[:, None].clamp(min=1e-30), kept_Q
