"""Hidden states times a head's rows: of a few states, at the speed at which memory is read.

While text is generated a head sees one state at a time, and all of its rows for it. A CPU's
matrix–vector product then takes twice as long as reading the rows needs: measured with MKL, 1.05 ms
for 8,192 × 256 floats out of cache, 0.50 ms as a product of matrices with the rows on the left.
From about a dozen states on the usual order is as fast or faster.

Shape suffixes: Q state, R row, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8


def times_rows(hidden_QD: Tensor, rows_RD: Tensor) -> Tensor:
    """hidden · rowsᵀ, (Q, R), in the dtype of both."""
    few = 0 < len(hidden_QD) <= _FEW
    if not few or rows_RD.device.type != "cpu" or rows_RD.dtype != torch.float32:
        return hidden_QD @ rows_RD.T
    # One state is taken twice: a single column would be a matrix–vector product again.
    columns_DQ = hidden_QD.repeat(2, 1).T if len(hidden_QD) == 1 else hidden_QD.T
    return (rows_RD @ columns_DQ)[:, : len(hidden_QD)].T
