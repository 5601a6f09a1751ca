"""The codes of a tile, chosen column by column, where the error of each column moves the later ones.

Column e wants start_e + reach_e (pull_e - sum over the columns j before it of M_je (value_j - before_j)). In error
feedback it starts from 0; in coordinate descent from what its codes decode to. Here rows do not meet; where they do:
row_feedback.py.

On a GPU with Triton the columns of a tile are one kernel (kernels.py), since the launches of small steps would take
nearly all of the time.

Shape suffixes: E = columns of the tile, C = rows of scales, P = matrices, each with its own M, G = rows of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsvd.decompose.scales import inverse
from qsvd.numerics.codec import Codec


@dataclass(frozen=True)
class Columns:
    """The columns of a tile whose codes are to be chosen, float32.

    Args:
        before_EPG: What a change is counted from.
        pulls_EPG: See above.
        moves_EEP: M; only what is above the diagonal is read.
        scales_CPG: Every `run` columns share a row.
        reach_E: None is 1 everywhere, and columns start from 0; else they start from `before_EPG`.
    """

    codec: Codec
    before_EPG: Tensor
    pulls_EPG: Tensor
    moves_EEP: Tensor
    scales_CPG: Tensor
    run: int
    reach_E: Tensor | None = None

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return the codes, uint8, and what they decode to, float32 [E, P, G], by torch's operations."""
        codes_EPG = torch.empty(self.before_EPG.shape, dtype=torch.uint8, device=self.before_EPG.device)
        values_EPG, pulls_EPG = torch.empty_like(self.before_EPG), self.pulls_EPG.clone()
        inverses_CPG = inverse(self.scales_CPG)
        for at, before_PG in enumerate(self.before_EPG):
            wanted_PG = pulls_EPG[at] if self.reach_E is None else before_PG + pulls_EPG[at] * self.reach_E[at]
            codes_N = self.codec.nearest((wanted_PG * inverses_CPG[at // self.run]).view(-1))
            codes_EPG[at] = codes_N.view(wanted_PG.shape)
            values_N, scales_PG = self.codec.values(codes_N), self.scales_CPG[at // self.run]
            torch.mul(values_N.view(wanted_PG.shape), scales_PG, out=values_EPG[at])
            change_PG = values_EPG[at] - before_PG
            pulls_EPG[at + 1 :].addcmul_(self.moves_EEP[at, at + 1 :, :, None], change_PG, value=-1)
        return codes_EPG, values_EPG
