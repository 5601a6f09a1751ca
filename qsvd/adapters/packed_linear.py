"""A frozen linear layer with a packed weight, for transformers: y = x Q^T + bias.

It is a subclass of nn.Linear, because PEFT puts adapters on these.

Shape suffixes: T = tokens, all leading dimensions of the input in one, O = out features, I = in features.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qsvd.adapters.linear import times, times_transposed
from qsvd.errors import BadInput
from qsvd.files.layout import PARTS
from qsvd.numerics.codec import BYTE_LEVELS, NestedScales, PackedBlocks
from qsvd.numerics.normal_float import Nesting, NormalFloat

NOT_NUMBERS = (
    "the weight of a packed layer is codes, which cannot be added or cast: an adapter cannot be merged into it, nor "
    "built on its size; call dequantize() on the transformers model first, or merge with `qsvd export`"
)


class Codes(Tensor):
    """The weight of a packed layer as other libraries see it: a view of its codes that refuses float operations.

    Its dtype is int8, the only one to which T5 does not cast the layer's input.
    """

    _is_param = True  # lets torch's get_parameter find it
    _is_hf_initialized = True  # keeps transformers from filling it with random numbers

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function on the codes; raise BadInput for `.data`, by which PEFT merges, and for float results."""
        del types
        if getattr(func, "__self__", None) is Tensor.data:
            raise BadInput(NOT_NUMBERS)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            raise BadInput(NOT_NUMBERS)
        return result


class Packed(nn.Module):
    """What layers with a packed weight share: the tensors of the weight, which are not cast with the module.

    They are empty and to be filled from a checkpoint: weight (the codes), absmax, and with nested scales absmax_codes
    and offset.
    """

    codec: NormalFloat
    packed_shape: tuple[int, int]

    def make_empty(self, shape: tuple[int, int], codec: NormalFloat, device: torch.device | str) -> None:
        """Make the tensors of a weight of this shape [O, I]."""
        self.codec, self.packed_shape = codec, shape
        sizes = codec.parts(shape)
        codes = torch.empty(sizes.pop("codes"), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        for part in sizes.keys() - {"levels"}:
            dtype = torch.uint8 if part == "absmax_codes" else codec.scale_dtype
            size = () if part == "offset" else (sizes[part] // dtype.itemsize,)
            self.register_buffer(part, torch.empty(size, dtype=dtype, device=device))

    def fill(self, packed: PackedBlocks, dtype: torch.dtype) -> None:
        """Take the tensors of a packed matrix of the same shape and codec, in a model of this dtype."""
        parts, codes = packed.tensors(), self._parameters["weight"]
        assert codes is not None, "set when it was made"
        self._parameters["weight"] = nn.Parameter(parts.pop("codes").view(codes.shape), requires_grad=False)
        for part in parts.keys() - {"levels"}:
            self._buffers[part] = parts[part].view(self.get_buffer(part).shape)
        if "like" in self._buffers:
            self._buffers["like"] = torch.empty(0, dtype=dtype)

    @property
    def packed(self) -> PackedBlocks:
        """Q [O, I]."""
        codes = self._parameters["weight"]
        assert codes is not None, "set when it was made"
        codes = codes.detach().view(torch.uint8).reshape(-1)  # accelerate may have stored them as it sees them, int8
        return PackedBlocks(codes, self._scales(), self.packed_shape, self.codec)

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        return found.detach().view(torch.int8).as_subclass(Codes) if name == "weight" else found

    def _scales(self) -> Tensor | NestedScales:
        nesting = self.codec.nesting
        if nesting is None:
            return self.absmax
        levels = _levels(nesting, self.absmax.device)
        num_blocks = None
        if levels.numel() != BYTE_LEVELS:
            num_blocks = ceil(prod(self.packed_shape) / self.codec.block_size)
        return NestedScales(self.absmax_codes, self.absmax, self.offset, levels, nesting.block_size, num_blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Apply .to, .half or .cuda; scales pass as bytes, so that they are moved and not cast."""
        scales = {name: self._buffers[name] for name in PARTS if self._buffers.get(name) is not None}
        for name, buffer in scales.items():
            assert buffer is not None, "those that are there"
            self._buffers[name] = buffer.reshape(-1).view(torch.uint8)
        super()._apply(fn, recurse)
        for name, buffer in scales.items():
            assert buffer is not None, "those that are there"
            self._buffers[name] = self.get_buffer(name).view(buffer.dtype).view(buffer.shape)
        return self


class PackedLinear(Packed, nn.Linear):
    """nn.Linear with the weight Q, decoded for the product and again for the gradient of the input.

    Args:
        in_features, out_features: I and O.
        codec: The codec of the weight.
        bias_dtype: None for a layer without a bias.
        device: Where the tensors are made.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codec: NormalFloat,
        *,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ):
        super().__init__(in_features, out_features, bias=bias_dtype is not None, device="meta", dtype=bias_dtype)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty_like(self.bias, device=device))
        self.make_empty((out_features, in_features), codec, device)

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Linear's
        """Map [..., I] to [..., O] in the dtype of the input, or of autocast if that is on."""
        return product(input, self.packed, self.bias)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return a frozen nn.Linear with the same numbers, each rounded once from float32."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.packed.decode(dtype=dtype), requires_grad=False)
        if has_bias:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear.train(self.training)


@cache
def _levels(nesting: Nesting, device: torch.device) -> Tensor:
    return nesting.levels().to(device)


def product(x: Tensor, packed: PackedBlocks, bias: Tensor | None) -> Tensor:
    """Return x Q^T + bias [..., O] in the dtype of x [..., I], or of autocast if that is on."""
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    outputs_TO = _Product.apply(x.reshape(-1, packed.shape[1]), bias, packed)
    assert isinstance(outputs_TO, Tensor), "apply returns what forward does"
    return outputs_TO.view(*x.shape[:-1], packed.shape[0])


class _Product(Function):
    """x Q^T + bias. Of Q only the codes are kept for the gradient of x, for which it is decoded again."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, bias_O: Tensor | None, packed: PackedBlocks) -> Tensor:
        ctx.packed, ctx.bias_dtype = packed, None if bias_O is None else bias_O.dtype
        y_TO = times_transposed(x_TI, packed)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        dy_TO = gradients[0]
        dx_TI = times(dy_TO, ctx.packed) if needs_x else None
        d_bias_O = dy_TO.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        return dx_TI, d_bias_O, None
