"""Hidden states times a head's rows: of a few states, at the speed at which memory is read.

While text is generated a head sees one state at a time, and all of its rows for it, and so does the
model's own output layer. The usual order is slow there with MKL on a CPU that Intel did not make.
For 2 to 8 states a product with the rows on the left takes from half to a quarter of the time; from
about a dozen on the usual order is as fast or faster. One state would be a matrix–vector product,
which uses one core and is slow where the rows come from memory; as a batch of products with blocks
of rows it takes half of the time, and uses all cores. Measured for 50,257 × 768 floats on one
thread and on two:

    AMD EPYC (newer)    8.8 and 8.8 ms;  in blocks   4.4 and 2.2 ms
    AMD EPYC (older)   11.6 ms;          in blocks   5.4 and 4.6 ms
    Intel Xeon          7.9 and 3.7 ms;  in blocks  20.5 and 9.8 ms, so it keeps the usual order

Shape suffixes: Q state, R row, D dimension, B block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEW = 8
_BLOCKS = 16


def _is_amd_with_mkl() -> bool:
    about: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_mkl = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    return has_mkl and "AMD" in about.get("cpu_name", "")


_USUAL_IS_SLOW = _is_amd_with_mkl()  # once: torch.compile looks into no function of torch.cpu


def usual_is_slow() -> bool:
    """Whether MKL multiplies, on a CPU of AMD's; False where an older torch does not name it."""
    return _USUAL_IS_SLOW


def times_rows(hidden_QD: Tensor, rows_RD: Tensor) -> Tensor:
    """hidden · rowsᵀ, (Q, R), in the dtype of both."""
    states, rows = hidden_QD.shape[0], rows_RD.shape[0]
    if not is_quick(states, rows_RD):
        return hidden_QD @ rows_RD.T
    if states > 1:
        return (rows_RD @ hidden_QD.T).T
    size, rest = divmod(rows, _BLOCKS)
    blocks_BRD = rows_RD[: rows - rest].view(_BLOCKS, size, -1)
    product_QR = torch.bmm(blocks_BRD, hidden_QD.T.expand(_BLOCKS, -1, -1)).view(1, -1)
    if rest == 0:
        return product_QR
    return torch.cat([product_QR, hidden_QD @ rows_RD[rows - rest :].T], dim=1)


def is_quick(states: int, rows_RD: Tensor) -> bool:
    """Whether so many states are multiplied another way than the usual one."""
    is_number = isinstance(states, int)  # torch.jit.trace counts in tensors
    few = is_number and 1 <= states <= _FEW and rows_RD.shape[0] >= _BLOCKS
    on_cpu = rows_RD.device.type == "cpu" and rows_RD.dtype == torch.float32
    return few and on_cpu and usual_is_slow()
