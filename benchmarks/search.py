"""How fast and how good is each index? Ratios against exact torch search in the same run.

    python benchmarks/search.py STORE                       # a datastore's own keys
    python benchmarks/search.py --synthetic 200000 128      # clustered random keys
    python benchmarks/search.py STORE --spec auto --spec "IVF1024,PQ64" --k 1024 --json out.json

Queries are keys of the store, left out of their own neighbours by searching k+1 and dropping their
id. Each spec is timed in batches and one query at a time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from knnlm_hf.index import ExactIndex, build_index

SPECS = ["auto", "IVF{n},PQ{m}x4fs,Refine(keys)", "IVF{n},PQ{m}x4fs,Refine(SQ8)",
         "IVF{n},PQ{m}x4fs", "IVF{n},PQ{m}"]  # fmt: skip


class Keys:
    """A tensor in memory as `KeyRows`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.dim = rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, ids: Any) -> Tensor:
        if isinstance(ids, Tensor):
            return self.rows.index_select(0, ids.reshape(-1)).reshape(*ids.shape, self.dim)
        return self.rows[ids]

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """The rows in order, as `KeyRows` promises."""
        for first in range(0, len(self.rows), size):
            yield first, self.rows[first : first + size]


def synthetic(entries: int, dim: int, seed: int = 0) -> Keys:
    """Keys around √N centres of decaying variance per direction, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.arange(1, dim + 1).float().pow(-0.5)
    centres = torch.randn(int(entries**0.5), dim, generator=generator)
    which = torch.randint(len(centres), (entries,), generator=generator)
    noise = torch.randn(entries, dim, generator=generator)
    return Keys(((centres[which] + 0.5 * noise) * scale_D).half())


def without(ids_QK: Tensor, own_Q: Tensor) -> list[set[int]]:
    return [set(row) - {own} for row, own in zip(ids_QK.tolist(), own_Q.tolist(), strict=True)]


def seconds(search: Any, parts: list[Tensor], k: int) -> list[float]:
    """Seconds per query of each part; the first part warms up."""
    search(parts[0], k)
    found = []
    for part in parts:
        start = time.perf_counter()
        search(part, k)
        found.append((time.perf_counter() - start) / len(part))
    return found


def percentiles(per_query: list[float]) -> list[float]:
    """p20, p50, p80 of queries/s."""
    return [round(1 / s, 1) for s in np.percentile(per_query, [80, 50, 20])]


def measure(search: Any, queries_QD: Tensor, batch: int, k: int) -> dict[str, Any]:
    single = seconds(search, list(queries_QD[:64].split(1)), k)
    return {
        "queries_per_second": percentiles(seconds(search, list(queries_QD.split(batch)), k)),
        "single_ms": [round(1000 * s, 3) for s in np.percentile(single, [20, 50, 80])],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.store is None:
        keys: Any = synthetic(*options.synthetic)
        values = torch.arange(len(keys), dtype=torch.int32) % 5000
    else:
        from knnlm_hf.datastore import DatastoreReader

        store = DatastoreReader.open(options.store)
        keys, values = store.keys, store.values
    generator = torch.Generator().manual_seed(1)
    own_Q = torch.randperm(len(keys), generator=generator)[: options.queries]
    queries_QD = keys[own_Q].float()
    k = min(options.k, len(keys) - 1)

    exact = ExactIndex(keys, options.metric)
    few = min(options.exact_queries, len(own_Q))
    truth = without(exact.search(queries_QD[:few], k + 1)[1], own_Q[:few])
    start = time.perf_counter()
    exact.search(queries_QD[:few], k)
    reference = few / (time.perf_counter() - start)
    rows = [{"spec": "exact (torch)", "bytes_per_entry": 0.0, "recall": 1.0, "ratio": 1.0,
             "queries_per_second": [round(reference, 1)] * 3, "single_ms": None}]  # fmt: skip
    lists = 2 ** int(np.log2(len(keys) ** 0.5))
    for spec in options.spec or SPECS:
        spec = spec.format(n=lists, m=keys.dim // 4)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            index = build_index(keys, values, folder, spec, metric=options.metric,
                                digest="benchmark", nprobe=options.nprobe)  # fmt: skip
            built = time.perf_counter() - start
            found = without(index.search(queries_QD[:few], k + 1)[1], own_Q[:few])
            row: dict[str, Any] = measure(index.search, queries_QD, options.batch, k)
            assert index.info is not None
            row |= {
                "spec": spec if spec == index.info.factory else f"{spec}: {index.info.factory}",
                "nprobe": index.info.nprobe,
                "build_seconds": round(built, 1),
                "bytes_per_entry": round(index.info.bytes_per_entry, 1),
                "recall": round(sum(len(a & b) for a, b in zip(found, truth, strict=True))
                                / max(1, sum(map(len, truth))), 4),
                "ratio": round(row["queries_per_second"][1] / reference, 1),
            }  # fmt: skip
            rows.append(row)
    import faiss

    return {
        "entries": len(keys), "dim": keys.dim, "metric": options.metric, "k": k,
        "queries": len(own_Q), "batch": options.batch, "rows": rows,
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "faiss": faiss.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    table = Table(
        title="{entries:,} × {dim} keys, {metric}, k={k}, batches of {batch}".format(**result),
        caption=f"{result['device']}; {result['versions']}",
    )
    for name in ("index", "nprobe", "bytes/entry", "recall@k", "queries/s p20 / p50 / p80",
                 "× exact", "one query, ms p20 / p50 / p80", "build s"):  # fmt: skip
        table.add_column(name, justify="left" if name == "index" else "right")
    for row in result["rows"]:
        single = row["single_ms"]
        table.add_row(
            row["spec"], str(row.get("nprobe") or "–"), f"{row['bytes_per_entry']:.0f}",
            f"{row['recall']:.3f}", " / ".join(f"{q:,.0f}" for q in row["queries_per_second"]),
            f"{row['ratio']:.1f}", " / ".join(f"{ms:.2f}" for ms in single) if single else "–",
            str(row.get("build_seconds", "–")),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", help="folder of a datastore")
    parser.add_argument("--synthetic", nargs=2, type=int, default=(200_000, 128),
                        metavar=("N", "D"), help="without a store: made-up keys")  # fmt: skip
    parser.add_argument("--spec", action="append", help="may be repeated; default: a selection")
    parser.add_argument("--metric", choices=["l2", "ip"], default="l2")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--exact-queries", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, help="of torch and faiss")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = run(options)
    show(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
