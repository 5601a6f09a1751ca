"""Stand-ins on the meta device that make and free the same tensors as the real layers, and compute nothing.

LinearTwin stands for SplitLinear (adapters/linear.py). LiveBytes counts.

Shape suffixes: T = tokens, O = out features, I = in features, K = rank of the adapter's factors.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from qsvd.numerics.codec import BAND, Codec, band_rows
from qsvd.plan.tensors import AdapterTensors, TensorShape


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is on and are still alive.

    Attributes:
        now, peak: Bytes.
        calls: Operations so far.
        marked_at_peak: The part of the peak that was made inside `marking`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.marked_at_peak = self.calls = 0
        self._marked = 0
        self._is_marking = False
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def restart(self) -> None:
        """Restart the peak from here."""
        self.peak, self.marked_at_peak = self.now, self._marked

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the storages that are made inside."""
        self._is_marking = True
        yield
        self._is_marking = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        named = kwargs or {}
        for tensor in _tensors((*args, *named.values())):
            self._seen.add(tensor.untyped_storage()._cdata)  # made outside, if it is new
        self.calls += 1
        made = func(*args, **named)
        for tensor in _tensors((made,)):
            self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size, is_marked = storage.nbytes(), self._is_marking
        self.now += size
        self._marked += size * is_marked
        if self.now > self.peak:
            self.peak, self.marked_at_peak = self.now, self._marked
        weakref.finalize(storage, self._gone, key, size, is_marked)

    def _gone(self, key: int, size: int, is_marked: bool) -> None:
        self._seen.discard(key)
        self.now -= size
        self._marked -= size * is_marked


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operation, in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


SCALE_PEAK, SCALE_KEPT = 16, 4  # bytes per block of weights while 8-bit scales are decoded, and of decoded scales


@dataclass(frozen=True)
class Decoding:
    """The decoding of the residual of an [O, I] weight on "cpu" or "cuda", counted by `live`."""

    shape: tuple[int, int]
    codec: Codec
    device: str
    live: LiveBytes

    def whole(self, y_TO: Tensor) -> Tensor:
        """Return y Q, [T, I], with all of Q decoded at once in the dtype of y."""
        with self.live.marking():
            scales = self._scales(y_TO, self.shape[0])
            matrix_OI = y_TO.new_empty(self.shape)
        del scales
        return y_TO @ matrix_OI

    def bands(self, x: Tensor, *, at_once: int) -> None:
        """Make and free bands of rows, `at_once` of them together."""
        rows, columns = self.shape
        nested_block = None if self.codec.nested is None else self.codec.nested[1]
        height, stays_nested = band_rows(self.shape, self.codec.block_size, nested_block, BAND[self.device])
        height = min(height, rows)
        with self.live.marking():
            scales = self._scales(x, height if stays_nested else rows)
            bands = [x.new_empty(height, columns) for _ in range(min(at_once, math.ceil(rows / height)))]
        del scales, bands

    def _scales(self, x: Tensor, rows: int) -> Tensor | None:
        """Return float32 scales of some rows, if they are decoded first: on a GPU the kernel decodes them."""
        if self.codec.nested is None or self.device == "cuda":
            return None
        blocks = math.ceil(rows * self.shape[1] / self.codec.block_size)
        work = x.new_empty((SCALE_PEAK - SCALE_KEPT) * blocks, dtype=torch.uint8)
        scales = x.new_empty(SCALE_KEPT * blocks, dtype=torch.uint8)
        del work
        return scales


class LinearTwin(nn.Module):
    """SplitLinear without numbers.

    Args:
        decoding: The decoding of its residual.
        adapter: The tensors of its adapter.
        bias: Its bias, or None.
        dtype: Of the model.
    """

    def __init__(
        self, decoding: Decoding, adapter: AdapterTensors, bias: Tensor | None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.dtype = dtype
        self.decoding = decoding
        self.adapter = adapter
        self.bias = bias
        self.trained = nn.ParameterDict({name: _empty(tensor) for name, tensor in adapter.trained.items()})
        tensors = {**adapter.buffers, **adapter.shared}
        self.buffers_by_name = {name: _empty(tensor, is_trained=False) for name, tensor in tensors.items()}
        parts = {"up": "frozen_up", "down": "frozen_down", "shared": "shared_down", "basis": "basis"}
        self.frozen = {part: self.buffers_by_name[name] for part, name in parts.items() if name in tensors}

    @property
    def weight(self) -> Tensor:
        """[O, I], as SplitLinear gives it to code that reads it past `forward`."""
        return torch.empty(self.decoding.shape, dtype=self.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        delta = self.adapter.delta
        if self.adapter.dropout and delta is None:
            outputs_TO = self._with_dropout(x_TI)
        else:
            outputs_TO = self._product(x_TI, *self._factors())
        if delta is not None:
            tensors = self.buffers_by_name | dict(self.trained.items())
            outputs_TO.add_(delta(x_TI, tensors, self.adapter.dropout))
        return outputs_TO.view(*x.shape[:-1], outputs_TO.shape[-1])

    def _with_dropout(self, x_TI: Tensor) -> Tensor:
        trained = dict(self.trained.items())
        up_OK, down_KI = 1.0 * trained["up"], trained["down"]
        y_TO = self._product(x_TI, self.frozen["up"], self.frozen["down"], None)
        if self.decoding.device == "cuda":  # one kernel, which keeps a mask of bytes; a CPU keeps it in the dtype of x
            dropped_TI, _ = torch.native_dropout(x_TI, self.adapter.dropout, True)
        else:
            dropped_TI = nn.functional.dropout(x_TI, self.adapter.dropout)
        return y_TO.addmm_(dropped_TI @ down_KI.to(x_TI.dtype).T, up_OK.to(x_TI.dtype).T)

    def _product(self, x_TI: Tensor, up_OK: Any, down_KI: Any, gain_O: Any) -> Tensor:
        y_TO = _Product.apply(x_TI, up_OK, down_KI, gain_O, self.bias, self.decoding)
        assert isinstance(y_TO, Tensor), "apply returns what forward does"
        return y_TO

    def _factors(self) -> tuple[Any, Any, Any]:
        """Return up, down and gain, each made from parameters, trained or frozen."""
        parameters = list(self.trained.values())
        if not self.adapter.made:
            found = dict(self.trained.items()) if self.adapter.delta is None else {}
            found = self.frozen | found
            return found["up"], found["down"], None
        made: Mapping[str, Any] = dict(
            zip(self.adapter.made, _Made.apply(self.adapter.made, *parameters), strict=True)  # pyright: ignore[reportArgumentType]
        )
        if self.adapter.delta is not None:
            return self.frozen["up"], self.frozen["down"], made["gain"]
        own = dict(self.trained.items()).get("down", self.frozen.get("shared", self.frozen.get("down")))
        down_KI = made.get("down", own)
        columns = self.decoding.shape[1]
        if down_KI.shape[1] > columns:  # of a parameter that has the larger side of the weight
            down_KI = down_KI[:, :columns]
        if "down" not in self.adapter.trained:  # joined of frozen tensors
            down_KI = down_KI.detach()
        up_OK = made.get("up", dict(self.trained.items()).get("up", self.frozen.get("basis")))
        return up_OK.detach() if "basis" in self.frozen else up_OK, down_KI, made.get("gain")


def _empty(tensor: TensorShape, *, is_trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=is_trained)


class _Made(Function):
    """Tensors that a forward pass makes of the parameters and keeps until the backward pass."""

    @staticmethod
    def forward(ctx: Any, made: Mapping[str, TensorShape], *parameters: Tensor) -> tuple[Tensor, ...]:
        tensors = [parameters[0].new_empty(tensor.shape, dtype=tensor.dtype) for tensor in made.values()]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.parameters = [(parameter.shape, parameter.dtype) for parameter in parameters]
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = next(gradient for gradient in gradients if gradient is not None)
        return None, *(made.new_empty(shape, dtype=dtype) for shape, dtype in ctx.parameters)


class _Product(Function):
    """The steps of SplitLinear's product, in its order. Of what is added in place the casts remain: they take bytes."""

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd takes them one by one
        ctx: Any, x_TI: Tensor, up_OK: Tensor, down_KI: Tensor, gain_O: Tensor | None, bias_O: Any, decoding: Decoding
    ) -> Tensor:
        del bias_O  # added in place
        hidden_TK = x_TI @ down_KI.to(x_TI.dtype).T
        y_TO = x_TI.new_empty(len(x_TI), decoding.shape[0])
        decoding.bands(x_TI, at_once=1)
        up_OK.to(x_TI.dtype)
        ctx.decoding, ctx.has_gain = decoding, gain_O is not None
        ctx.shape = x_TI.shape
        kept_TI = x_TI if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept_TI, hidden_TK, up_OK, down_KI, gain_O, y_TO if ctx.has_gain else None)
        return torch.empty_like(y_TO) if ctx.has_gain else y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, hidden_TK, up_OK, down_KI, gain_O, product_TO = ctx.saved_tensors
        _, needs_up, needs_down = ctx.needs_input_grad[:3]
        dy_TO = gradients[0]
        d_gain_O = None
        if gain_O is not None:
            work_TO = torch.empty_like(dy_TO)
            d_gain_O = torch.mul(dy_TO, product_TO, out=work_TO).sum(dim=0).to(gain_O.dtype)
            dy_TO = work_TO
        dh_TK = dy_TO @ up_OK.to(dy_TO.dtype)
        d_up_OK = (dy_TO.T @ hidden_TK).to(up_OK.dtype) if needs_up else None
        d_down_KI = (dh_TK.T @ x_TI).to(down_KI.dtype) if needs_down else None
        if dy_TO.dtype.itemsize < 4:
            dx_TI = ctx.decoding.whole(dy_TO)
        else:
            dx_TI = dy_TO.new_empty(ctx.shape)
            ctx.decoding.bands(dy_TO, at_once=2)
        down_KI.to(dy_TO.dtype)
        return dx_TI, d_up_OK, d_down_KI, d_gain_O, None, None
