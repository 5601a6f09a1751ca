"""LoRA-RITE: an optimizer whose steps of B A do not depend on how the product is divided into B and A.

Shape suffixes: N = rows of a factor as a tall matrix, out features for B and in features for A^T; K = rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLIP = 1.0  # highest norm of all unmagnified gradients together, as in the authors' code
SKIP = 1.0  # an unmagnified gradient with a higher root mean square is left out, as in the authors' code
ADAMW_EPS = 1e-8  # torch's, for parameters outside the pairs


@dataclass(frozen=True, eq=False)
class _Factor:
    """One factor of a pair, and the other one."""

    parameter: nn.Parameter
    other: nn.Parameter
    is_down: bool

    def tall(self, tensor: Tensor) -> Tensor:
        """Return the values or the gradient of this factor as [N, K], float32 or higher."""
        return _exact(tensor.T if self.is_down else tensor)


@dataclass(frozen=True)
class _Turn:
    """How a factor U R has turned: R^+ and U^T U_old, both [K, K]."""

    inverse_KK: Tensor
    rotation_KK: Tensor


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE (arXiv:2410.20625, algorithm 1, without escaped mass), and AdamW for parameters outside the pairs.

    The step of A, with B = U R (QR); that of B is the same with A^T = U R and gB^T:

        G = R^+T gA    P = U^T U_old    V <- b2 P V P^T + (1 - b2) G G^T / N    M <- b1 P M + (1 - b1) V^(-1/2) G
        A <- A - rate (R^+ M + decay A)

    b is beta (1 - beta^(t-1)) / (1 - beta^t), so the moments need no other correction. The state of a factor: its M and
    its U, [N, K], and V [K, K]; of another parameter: two moments. All are float32, or float64 for such parameters.

    Args:
        params: Parameters or groups, as for every optimizer of torch. The factors of a pair may be in two groups.
        pairs: B [O, K] and A [K, I] of each pair. A pair without gradients is left as it is.
        eps: Is added to the roots of the eigenvalues of V.

    Attributes:
        write: Writes new values into a parameter; `Rounding` rounds them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.write: Callable[[Tensor, Tensor], object] = Tensor.copy_
        self.factors = [factor for up, down in pairs for factor in (_Factor(up, down, False), _Factor(down, up, True))]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        factors = [f for f in self.factors if f.parameter.grad is not None and f.other.grad is not None]
        turns = {factor.parameter: self._turn(factor) for factor in factors}
        squares = [_unmagnified(factor, turns[factor.other]).square().sum() for factor in factors]
        share = CLIP / torch.stack(squares).sum().sqrt().clamp(min=CLIP) if squares else torch.ones(())
        for factor in factors:
            gradient_NK = _unmagnified(factor, turns[factor.other]) * share
            self._move(factor, gradient_NK, turns[factor.other], groups[factor.parameter])
        paired = {factor.parameter for factor in self.factors}
        for parameter, group in groups.items():
            if parameter not in paired and parameter.grad is not None:
                self._move_alone(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; unlike torch's optimizers it keeps the dtype of the state."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _turn(self, factor: _Factor) -> _Turn:
        """Return how a factor has turned since the last step, and keep its new basis."""
        values_NK = factor.tall(factor.parameter)
        state = self.state[factor.parameter]
        if not state:
            zeros, (rows, rank) = values_NK.new_zeros, values_NK.shape
            state |= {"step": 0, "moment": zeros(rows, rank), "basis": zeros(rows, rank), "second": zeros(rank, rank)}
        basis_NK, triangle_KK = torch.linalg.qr(values_NK)
        rotation_KK = basis_NK.T @ state["basis"]
        state["basis"].copy_(basis_NK)
        return _Turn(torch.linalg.pinv(triangle_KK), rotation_KK)

    def _move(self, factor: _Factor, gradient_NK: Tensor, turn: _Turn, group: dict[str, Any]) -> None:
        """Make the step of one factor, given the turn of the other one."""
        state = self.state[factor.parameter]
        state["step"] += 1
        first, second = (_decay(beta, state["step"]) for beta in group["betas"])
        moment_NK, second_KK = state["moment"], state["second"]
        turned_KK = turn.rotation_KK @ second_KK @ turn.rotation_KK.T
        second_KK.copy_(torch.lerp(gradient_NK.T @ gradient_NK / len(gradient_NK), turned_KK, second))
        scaled_NK = gradient_NK @ _inverse_root(second_KK, group["eps"])
        moment_NK.copy_(torch.lerp(scaled_NK, moment_NK @ turn.rotation_KK.T, first))
        values_NK = factor.tall(factor.parameter)
        change_NK = moment_NK @ turn.inverse_KK.T + group["weight_decay"] * values_NK
        moved_NK = values_NK - group["lr"] * change_NK
        self.write(factor.parameter, moved_NK.T if factor.is_down else moved_NK)

    def _move_alone(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Make AdamW's step (arXiv:1711.05101) of a parameter outside the pairs."""
        values, gradient, state = _exact(parameter), _exact(parameter.grad), self.state[parameter]
        if not state:
            state |= {"step": 0, "moment": torch.zeros_like(values), "second": torch.zeros_like(values)}
        state["step"] += 1
        first, second = (_decay(beta, state["step"]) for beta in group["betas"])
        state["moment"].lerp_(gradient, 1 - first)
        state["second"].lerp_(gradient.square(), 1 - second)
        change = state["moment"] / (state["second"].sqrt() + ADAMW_EPS) + group["weight_decay"] * values
        self.write(parameter, values - group["lr"] * change)


def _exact(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "asked before"
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unmagnified(factor: _Factor, turn: _Turn) -> Tensor:
    """Return the gradient of the product in the basis of the other factor, [N, K]; zeros if it is to be left out."""
    gradient_NK = factor.tall(factor.parameter.grad) @ turn.inverse_KK  # pyright: ignore[reportArgumentType]
    return torch.where(gradient_NK.square().mean().sqrt() > SKIP, 0.0, gradient_NK)


def _inverse_root(second_KK: Tensor, eps: float) -> Tensor:
    values_K, vectors_KK = torch.linalg.eigh(second_KK)
    return vectors_KK / (values_K.clamp(min=0).sqrt() + eps) @ vectors_KK.T


def _decay(beta: float, step: int) -> float:
    """Return the share of a moment that stays at this step, counted from 1; the first step keeps nothing."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
