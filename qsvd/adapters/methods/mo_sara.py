"""Mo-SARA: sets of singular values between frozen singular vectors, mixed by a router. Shape suffixes as in adapter.py.

T = tokens, E = sets of values (cores).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight, frozen_shapes, no_components
from qsvd.adapters.methods.frozen import Frozen
from qsvd.errors import BadInput
from qsvd.numerics.codec import PackedBlocks
from qsvd.numerics.svd import product_svd
from qsvd.option_types import Help, at_least
from qsvd.plan.tensors import AdapterTensors, TensorShape

NO_EXPORT_OF_ROUTERS = MappingProxyType(
    {
        "peft": "{method} adds to each token what a router chooses by its input, and PEFT has no such router; use the "
        "run with qsvd generate, qsvd eval or qsvd.load",
        "lora": "{method} adds to each token what a router chooses by its input, and a LoRA adds one product to all; "
        "use the run with qsvd generate, qsvd eval or qsvd.load",
        "merged": "{method} adds to each token what a router chooses by its input, so no weights compute the same; use "
        "the run with qsvd generate, qsvd eval or qsvd.load",
    }
)


@dataclass(frozen=True, kw_only=True)
class MoSaraOptions:
    """The options of Mo-SARA's own."""

    cores: Annotated[int, at_least(2), Help("Sets of singular values that the router mixes.")] = 5


def routed_values(x_TI: Tensor, parts: Mapping[str, Tensor], dropout: float = 0.0, *, scale: float = 1.0) -> Tensor:
    """Return what is added, [T, O] in the dtype of x.

    Args:
        parts: Parameters and buffers of `MoSara` by name.
        dropout: It has none.
    """
    del dropout
    dtype, v_O = x_TI.dtype, parts["v"]
    hidden_TK = x_TI @ parts["right"].to(dtype).T
    logits_TE = (hidden_TK @ parts["w1"].to(dtype)).float()[:, None] * parts["w2"].float()
    values_TK = logits_TE.softmax(dim=1).to(dtype) @ (scale * parts["cores"]).to(dtype)
    up_OK = parts["left"].to(v_O) * (1 + v_O)[:, None]
    return (hidden_TK * values_TK) @ up_OK.to(dtype).T


class MoSara(Frozen):
    """Mo-SARA (arXiv:2408.03290): y = (1 + v) * ((Q + B0 A0) x + (alpha / K) U diag(sum_e g_e(x) lam_e) V x).

    U [O, K] and V [K, I] are the leading singular vectors of the stored components, frozen. The router is g(x) =
    softmax(w2 (w1 . V x)), with w1 [K] and w2 [E]. lam_e [K] and v [O] start at zero, w1 and w2 at random numbers that
    tell the sets apart. Parameters: E K + K + E + O. No code of the authors is known; a port of others routes by U^T x,
    which exists for square weights alone, and draws lam_e at random, which starts elsewhere.
    """

    paper = "2408.03290"
    starts_as = "the components, values 0"
    defaults = Defaults(
        rank=None, scale=1.0, learning_rate=4e-3, reason="that of lora-xs, which trains as few parameters; not measured"
    )
    options = MoSaraOptions
    needs_components = True
    has_gain = True
    is_routed = True
    export_refusals = NO_EXPORT_OF_ROUTERS

    def __init__(self, stored: StoredWeight, rank: int, scale: float, options: AdapterOptions, random: torch.Generator):
        super().__init__(stored.up_OR, stored.down_RI)
        self.scale = scale
        found = product_svd(stored.up_OR, stored.down_RI)
        for name, vectors in {"left": found.left_OK[:, :rank], "right": found.right_KI[:rank]}.items():
            self.register_buffer(name, vectors.to(stored.up_OR.dtype).contiguous(), persistent=False)
        sets = self.own(options).cores
        starts = {
            "cores": torch.zeros(sets, rank),
            "w1": torch.empty(rank).normal_(0, rank**-0.5, generator=random),
            "w2": torch.empty(sets).normal_(0, 1, generator=random),
            "v": torch.zeros(stored.residual.shape[0]),
        }
        for name, values in starts.items():
            self.register_parameter(name, nn.Parameter(values.to(stored.up_OR.device, options.torch_dtype)))

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "MoSara":
        if stored.rank == 0:
            raise no_components("mo-sara")
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        if not 1 <= rank <= stored.rank:
            raise BadInput(f"rank {rank} is outside 1..{stored.rank}, the stored components")
        return cls(stored, rank, scale, options, generator)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.tensors_for(cls.options(), shape, stored_rank, rank, (dtype, stored_dtype))

    @classmethod
    def tensors_for(
        cls, own: Any, shape: tuple[int, int], stored_rank: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> AdapterTensors:
        dtype, stored_dtype = dtypes
        (rows, columns), sets = shape, own.cores
        sizes = {"cores": (sets, rank), "w1": (rank,), "w2": (sets,), "v": (rows,)}
        vectors = {
            "left": TensorShape((rows, rank), stored_dtype),
            "right": TensorShape((rank, columns), stored_dtype),
        }
        return AdapterTensors(
            parameters={name: TensorShape(size, dtype) for name, size in sizes.items()},
            buffers=frozen_shapes(shape, stored_rank, stored_dtype) | vectors,
            made={"gain": TensorShape((rows,), torch.float32)},
            delta=routed_values,
        )

    def gain(self, read: Callable[[], PackedBlocks]) -> Tensor:
        del read  # the values of Q are not needed
        return 1 + self.get_parameter("v").float()

    def delta(self, x_TI: Tensor) -> Tensor:
        return routed_values(x_TI, dict(self.named_parameters()) | dict(self.named_buffers()), scale=self.scale)


METHOD = MoSara
