"""A linear layer whose weight is a frozen residual and an adapter: y = gain * (x Q^T + (x A^T) B^T) + bias.

Shape suffixes: T = tokens, all leading dimensions of the input in one, O = out features, I = in features, K = rank of
the adapter's factors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout

from qsvd.adapters.adapter import Adapter
from qsvd.adapters.pages.cache import PagedResidual
from qsvd.errors import BadInput
from qsvd.numerics.codec import BAND, PackedBlocks, from_bytes


def times_transposed(x_TI: Tensor, packed: PackedBlocks) -> Tensor:
    """Return x Q^T [T, O] in the dtype of x. Q is decoded in bands of rows, one at a time."""
    y_TO = x_TI.new_empty(len(x_TI), packed.shape[0])
    for rows, band in packed.in_rows(BAND[x_TI.device.type]):
        torch.mm(x_TI, band.decode(dtype=x_TI.dtype).T, out=y_TO[:, rows])
    return y_TO


def times(y_TO: Tensor, packed: PackedBlocks) -> Tensor:
    """Return y Q [T, I] in the dtype of y. Q is decoded in bands of rows, one at a time.

    In 16 bits all of Q is decoded at once, since the sums of bands would be rounded one by one.
    """
    if y_TO.dtype.itemsize < 4:
        return y_TO @ packed.decode(dtype=y_TO.dtype)
    x_TI = y_TO.new_empty(len(y_TO), packed.shape[1])
    for rows, band in packed.in_rows(BAND[y_TO.device.type]):
        band_RI = band.decode(dtype=y_TO.dtype)
        torch.addmm(x_TI, y_TO[:, rows], band_RI, beta=1 if rows.start else 0, out=x_TI)  # beta 0 does not read x
    return x_TI


NO_WEIGHT = (
    "a router adds to this layer what depends on its input, so that it has no weight: call the layer instead, or train "
    "with a method that is not routed"
)
ROWS = 1024  # of the unit matrix that `dense_delta` passes through a layer at a time


def dense_delta(adapter: Adapter, in_features: int, device: torch.device) -> Tensor | None:
    """Return the matrix of a linear `delta`, float32 [O, I].

    Raises:
        BadInput: it is not linear.
    """
    if type(adapter).delta is Adapter.delta:
        return None
    if adapter.is_routed:
        raise BadInput(NO_WEIGHT)
    parts = []
    for start in range(0, in_features, ROWS):
        unit_TI = torch.zeros(min(ROWS, in_features - start), in_features, device=device)
        unit_TI.diagonal(start).fill_(1)
        parts.append(adapter.delta(unit_TI))
    return None if parts[0] is None else torch.cat(parts).T


class NoWeight(Tensor):
    """What stands for the weight of a layer that has none: its shape, dtype and device, without numbers."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer a question about its form; raise BadInput for its numbers."""
        del types
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, float, list)):
            raise BadInput(NO_WEIGHT)
        return result


def _no_weight(shape: tuple[int, int], like: Tensor) -> NoWeight:
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(shape).as_subclass(NoWeight)


class SplitLinear(nn.Module):
    """nn.Linear with the weight W' = gain * (Q + up @ down); Q is decoded when it is needed and not kept.

    Args:
        residual: Q [O, I]. Its tensors become buffers of bytes, which a change of the module's dtype does not cast;
            a PagedResidual is copied to the device when it is needed.
        adapter: The trained part, on the device.
        bias: Frozen, [O] in the compute dtype, or None.
        name: Name of the weight's tensor in the files of the quantized model.
        dtype: Of the model, in which `weight` is read.
    """

    like: Tensor

    def __init__(
        self,
        residual: PackedBlocks | PagedResidual,
        adapter: Adapter,
        bias: Tensor | None,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # cast and moved with the model
        self.name = name
        self.out_features, self.in_features = residual.shape
        self.adapter = adapter
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.codec = residual.codec
        self.paged = residual if isinstance(residual, PagedResidual) else None
        self._nested_block = residual.nested_block
        if isinstance(residual, PackedBlocks):
            for part, tensor in residual.tensors().items():
                self.register_buffer(part, tensor.reshape(-1).view(torch.uint8), persistent=False)

    @property
    def residual(self) -> PackedBlocks:
        """Q, in views of the buffers, or of a page that is valid until another page is asked for."""
        if self.paged is not None:
            return self.paged.read(backward_follows=self.training)
        shape = (self.out_features, self.in_features)
        parts = {part: self.get_buffer(part) for part in self.codec.parts(shape)}
        return from_bytes(parts, shape, self.codec, self._nested_block)

    def _read(self) -> PackedBlocks:
        return self.residual

    @property
    def weight(self) -> Tensor:
        """W' [O, I] in the dtype of the model, without a gradient, for code that reads it past `forward`.

        With a routed adapter there is none: what is returned has its shape, dtype and device, and refuses to compute.
        """
        if self.adapter.is_routed:
            return _no_weight((self.out_features, self.in_features), self.like)
        with torch.no_grad():
            up_OK, down_KI = self.adapter.factors()
            dense_OI = self.residual.decode().addmm_(up_OK.float(), down_KI.float())
            gain_O = self.adapter.gain(self._read)
            if gain_O is not None:
                dense_OI *= gain_O.float()[:, None]
            delta_OI = dense_delta(self.adapter, self.in_features, self.like.device)
            if delta_OI is not None:
                dense_OI += delta_OI
            return dense_OI.to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O] in the dtype of x, or of autocast if that is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        inputs_TI = x.reshape(-1, self.in_features)
        if self.training and self.adapter.looks and not _is_recomputing():
            self.adapter.look(inputs_TI.detach())
        with torch.autocast(device, enabled=False):  # it would round the adapter's own steps, such as edora's norms
            if self.training and self.adapter.dropout:
                outputs_TO = self._with_dropout(inputs_TI)
            else:
                outputs_TO = self._product(inputs_TI, *self.adapter.factors(), self.adapter.gain(self._read))
            delta_TO = self.adapter.delta(inputs_TI)
            if delta_TO is not None:
                outputs_TO.add_(delta_TO)
        return outputs_TO.view(*x.shape[:-1], self.out_features)

    def _with_dropout(self, x_TI: Tensor) -> Tensor:
        """Return the output with dropout before the trained factors; Q and the frozen factors see all of x.

        The mask is torch's, drawn from its global generator, so that a checkpointed block draws the same one again.
        """
        (frozen_up, frozen_down), (up_OK, down_KI) = self.adapter.divided()
        y_TO = self._product(x_TI, frozen_up, frozen_down, None)
        hidden_TK = dropout(x_TI, self.adapter.dropout) @ down_KI.to(x_TI.dtype).T
        return y_TO.addmm_(hidden_TK, up_OK.to(x_TI.dtype).T)

    def _product(self, x_TI: Tensor, up_OK: Tensor, down_KI: Tensor, gain_O: Tensor | None) -> Tensor:
        y_TO = _Product.apply(x_TI, up_OK, down_KI, gain_O, self.bias, self)
        assert isinstance(y_TO, Tensor), "apply returns what forward does"
        return y_TO

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _is_recomputing() -> bool:
    """Return whether a checkpointed block computes its outputs again: that happens inside a backward pass."""
    return torch._C._current_graph_task_id() != -1  # torch.utils.checkpoint asks the same


def _scaled(y_TO: Tensor, gain_O: Tensor) -> Tensor:
    """Return y * gain in the dtype of y, rounded once: rounding the gain itself would err alike for every token."""
    return torch.mul(y_TO, gain_O, out=torch.empty_like(y_TO))


class _Product(Function):
    """gain * (x Q^T + (x A^T) B^T) + bias, with Q decoded again for the gradient.

    The forward pass saves x if A is trained, x A^T, references to B and A, and with a gain the product before it. It
    never saves Q, whose buffer may hold another page by then. Products are computed in the dtype of x; gradients of the
    factors have the dtypes of the factors; those of frozen columns and rows are 0.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd takes them one by one
        ctx: Any,
        x_TI: Tensor,
        up_OK: Tensor,
        down_KI: Tensor,
        gain_O: Tensor | None,
        bias_O: Tensor | None,
        linear: SplitLinear,
    ) -> Tensor:
        hidden_TK = x_TI @ down_KI.to(x_TI.dtype).T
        y_TO = times_transposed(x_TI, linear.residual)
        y_TO.addmm_(hidden_TK, up_OK.to(x_TI.dtype).T)
        ctx.linear = linear
        kept_TI = x_TI if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept_TI, hidden_TK, up_OK, down_KI, gain_O, None if gain_O is None else y_TO)
        if gain_O is not None:
            y_TO = _scaled(y_TO, gain_O)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, hidden_TK, up_OK, down_KI, gain_O, product_TO = ctx.saved_tensors
        needs_x, needs_up, needs_down, needs_gain = ctx.needs_input_grad[:4]
        dy_TO = gradients[0]
        d_gain_O = None
        if gain_O is not None:
            work_TO = torch.empty_like(dy_TO)
            if needs_gain:
                d_gain_O = torch.mul(dy_TO, product_TO, out=work_TO).sum(dim=0).to(gain_O.dtype)
            dy_TO = torch.mul(dy_TO, gain_O, out=work_TO)
        dh_TK = dy_TO @ up_OK.to(dy_TO.dtype) if needs_x or needs_down else None
        frozen = ctx.linear.adapter.frozen_rank
        d_up_OK = d_down_KI = None
        if needs_up:
            made_OK = dy_TO.new_empty(up_OK.shape)
            made_OK[:, :frozen] = 0
            torch.mm(dy_TO.T, hidden_TK[:, frozen:], out=made_OK[:, frozen:])
            d_up_OK = made_OK.to(up_OK.dtype)
        if needs_down and dh_TK is not None:
            made_KI = dy_TO.new_empty(down_KI.shape)
            made_KI[:frozen] = 0
            torch.mm(dh_TK[:, frozen:].T, x_TI, out=made_KI[frozen:])
            d_down_KI = made_KI.to(down_KI.dtype)
        dx_TI = None
        if needs_x and dh_TK is not None:
            dx_TI = times(dy_TO, ctx.linear.residual)
            dx_TI.addmm_(dh_TK, down_KI.to(dy_TO.dtype))
        return dx_TI, d_up_OK, d_down_KI, d_gain_O, None, None
