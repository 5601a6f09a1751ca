"""The methods of training, and their table METHODS. Shape suffixes as in adapter.py."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import Adapter, AdapterOptions, Defaults, StoredWeight, frozen_shapes
from qsvd.errors import BadInput
from qsvd.plan.targets import is_target
from qsvd.plan.tensors import AdapterTensors, TensorShape


def no_components(method: str) -> BadInput:
    return BadInput(
        f"{method} trains stored components, and the quantized model has none (rank 0); quantize with --rank above 0, "
        "or use --method lora"
    )


class Pissa(Adapter):
    """PiSSA (arXiv:2404.02948, section 3): W' = Q + B A, with the components B and A trained. Parameters: R (O + I).

    Components of every loop (QPiSSA, LoftQ, LQ-LoRA) are trained alike.
    """

    defaults = Defaults(
        rank=None,
        scale=1.0,
        learning_rate=2e-5,
        reason="the authors' rate; large singular values make the loss sharper than LoRA's, so it is smaller",
    )
    needs_components = True

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.up = nn.Parameter(up_OR)
        self.down = nn.Parameter(down_RI)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Pissa":
        del generator  # nothing is drawn
        if stored.rank == 0:
            raise no_components("pissa")
        if options.rank not in (None, stored.rank):
            raise BadInput(
                f"rank {options.rank} is not the stored rank {stored.rank}, the only one that pissa can train; "
                "leave out --rank, quantize with another --rank, or give --method lora"
            )
        if options.alpha not in (None, stored.rank):
            raise BadInput(
                f"alpha {options.alpha:g} would scale the stored components; with pissa it is the rank "
                f"{stored.rank}: leave it out"
            )
        return cls(*(factor.to(options.torch_dtype, copy=True) for factor in (stored.up_OR, stored.down_RI)))

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del stored_rank, stored_dtype  # the components are trained, in another dtype
        parameters = {"up": TensorShape((shape[0], rank), dtype), "down": TensorShape((rank, shape[1]), dtype)}
        return AdapterTensors(parameters, buffers={}, made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down


class Lora(Adapter):
    """LoRA (arXiv:2106.09685, section 4.1): W' = Q + B0 A0 + (alpha / K) B A, with B and A trained from B = 0.

    Without components it is QLoRA (arXiv:2305.14314). Parameters: K (O + I). K is cut to the smaller side of the
    weight; the scale is not changed. Dropout acts on the input of A, as in PEFT, and not on that of Q and A0.
    """

    defaults = Defaults(
        rank=64,
        scale=16 / 64,
        learning_rate=2e-4,
        reason="QLoRA's rank, alpha / rank and rate for 7B and 13B",
    )
    own_options = ("dropout", "rslora")

    def __init__(self, stored: StoredWeight, up_OK: Tensor, down_KI: Tensor, *, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.up = nn.Parameter(up_OK)
        self.down = nn.Parameter(down_KI)
        self.register_buffer("frozen_up", stored.up_OR, persistent=False)
        self.register_buffer("frozen_down", stored.down_RI, persistent=False)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Lora":
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        out_features, in_features = stored.residual.shape
        if rank < 1:
            raise BadInput(f"rank {rank} is below 1, the least that trains anything")
        rank = min(rank, out_features, in_features)  # a higher rank adds nothing
        bound = 1 / math.sqrt(in_features)  # Kaiming's uniform bound with a = sqrt 5, as LoRA and PEFT draw A
        down_KI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        device = stored.up_OR.device
        up_OK = torch.zeros(out_features, rank, dtype=options.torch_dtype, device=device)
        down_KI = down_KI.to(device, options.torch_dtype)
        return cls(stored, up_OK, down_KI, scale=scale, dropout=options.dropout)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rows, columns = shape
        rank = min(rank, rows, columns)
        parameters = {"up": TensorShape((rows, rank), dtype), "down": TensorShape((rank, columns), dtype)}
        both = stored_rank + rank
        made = {"up": TensorShape((rows, both), dtype)}  # scaled, and joined with the frozen ones
        if stored_rank:
            made["down"] = TensorShape((both, columns), dtype)
        return AdapterTensors(parameters, frozen_shapes(shape, stored_rank, stored_dtype), made)

    def factors(self) -> tuple[Tensor, Tensor]:
        (frozen_up, frozen_down), (up_OK, _) = self.divided()
        if not len(frozen_down):
            return up_OK, self.down
        down_KI = 1 * self.down  # else its gradient is a view that keeps the frozen part's alive
        return torch.cat((frozen_up.to(up_OK), up_OK), dim=1), torch.cat((frozen_down.to(self.down), down_KI))

    def divided(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        frozen = self.get_buffer("frozen_up"), self.get_buffer("frozen_down")
        return frozen, (self.scale * self.up, self.down)


TINY = torch.finfo(torch.float32).tiny  # least square of a norm, so that a row of zeros keeps the gain 1


class EDora(Adapter):
    """EDoRA (arXiv:2501.12067): a core R [K, K] between frozen singular directions, and a magnitude m [O] of the rows.

    R starts at zero, and m at the row norms of Q + B0 A0. Parameters: K^2 + O.
    """

    defaults = Defaults(
        rank=None,
        scale=1.0,
        learning_rate=1e-3,
        reason="the second largest of the authors' grid; few parameters are trained, so a higher rate works",
    )

    needs_components = True
    starts_from_residual = True
    has_gain = True
    export_refusals = MappingProxyType(
        {
            "lora": "edora scales the rows of each weight, which a LoRA on the 16-bit model cannot do; "
            "export a PEFT adapter for the quantized model (--to peft), or merged weights (--to merged)"
        }
    )

    def __init__(self, stored: StoredWeight, rank: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.scale = scale
        up_OR, down_RI = stored.up_OR, stored.down_RI
        directions_OR = _left_directions(up_OR, down_RI)
        frozen = {
            "frozen_up": up_OR,
            "frozen_down": down_RI,
            "directions": directions_OR[:, :rank].to(up_OR.dtype),
            "inner": directions_OR[:, :rank].T @ up_OR.float(),
        } | _norm_constants(stored)
        for name, tensor in frozen.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=dtype, device=up_OR.device))
        self.magnitude = nn.Parameter(self._row_norms(up_OR.float()))  # float32: its steps vanish in bfloat16

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "EDora":
        del generator  # nothing is random: R starts at zero and has a gradient there, unlike LoRA's product
        if stored.rank == 0:
            raise no_components("edora")
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        if not 1 <= rank <= stored.rank:
            raise BadInput(f"rank {rank} is outside 1..{stored.rank}, the stored components")
        return cls(stored, rank, scale, options.torch_dtype)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        rows = shape[0]

        def exact(*sizes: int) -> TensorShape:
            return TensorShape(sizes, torch.float32)

        parameters = {"core": TensorShape((rank, rank), dtype), "magnitude": exact(rows)}
        constants = {
            "directions": TensorShape((rows, rank), stored_dtype),
            "inner": exact(rank, stored_rank),
            "residual_squares": exact(rows),
            "residual_down": exact(rows, stored_rank),
            "down_gram": exact(stored_rank, stored_rank),
        }
        made = {"up": exact(rows, stored_rank), "gain": exact(rows), "norms": exact(rows)}
        if stored_dtype != torch.float32:
            made["exact_directions"] = exact(rows, rank)
        return AdapterTensors(parameters, frozen_shapes(shape, stored_rank, stored_dtype) | constants, made)

    def factors(self) -> tuple[Tensor, Tensor]:
        inner_KR, frozen_OR = self.get_buffer("inner"), self.get_buffer("frozen_up")  # float32, and as stored
        core_KR = self.scale * self.core.to(inner_KR) @ inner_KR
        up_OR = frozen_OR.to(inner_KR) + self.get_buffer("directions").to(inner_KR) @ core_KR
        return up_OR, self.get_buffer("frozen_down")

    def gain(self) -> Tensor:
        with torch.no_grad():
            norms_O = self._row_norms(self.factors()[0])
        return self.magnitude / norms_O

    def _row_norms(self, up_OR: Tensor) -> Tensor:
        """Return ||q_i + b_i A0|| of every row, float32 [O]."""
        cross_O = (self.get_buffer("residual_down") * up_OR).sum(dim=1)
        inner_O = (up_OR @ self.get_buffer("down_gram") * up_OR).sum(dim=1)
        return (self.get_buffer("residual_squares") + 2 * cross_O + inner_O).clamp_(min=TINY).sqrt_()


def _left_directions(up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """Return the left singular vectors of up @ down, largest value first, float32 [O, R].

    A saved core is valid only between the same vectors. So they are computed in float64 on the CPU of every machine,
    by two thin QRs and an R x R SVD, and the largest entry of each is made positive.
    """
    basis_OR, inner_RR = torch.linalg.qr(up_OR.cpu().double())
    outer_RR = torch.linalg.qr(down_RI.cpu().double().T, mode="r").R
    vectors_OR = basis_OR @ torch.linalg.svd(inner_RR @ outer_RR.T).U
    largest_R = vectors_OR.gather(0, vectors_OR.abs().argmax(dim=0, keepdim=True))
    return (vectors_OR * largest_R.sign()).to(up_OR.device, torch.float32)


def _norm_constants(stored: StoredWeight) -> dict[str, Tensor]:
    """Return ||q_i||^2 [O], Q A0^T [O, R] and A0 A0^T [R, R], float32; Q is decoded only here."""
    residual_OI, down_RI = stored.residual.decode(), stored.down_RI.float()
    return {
        "residual_squares": residual_OI.square().sum(dim=1),
        "residual_down": residual_OI @ down_RI.T,
        "down_gram": down_RI @ down_RI.T,
    }


class Frozen(Adapter):
    """W' = Q + B0 A0: for a layer that is not to be trained, or without components where the method needs them.

    Parameters: none.
    """

    defaults = Defaults(rank=None, scale=1.0, learning_rate=0.0, reason="nothing is trained")

    def __init__(self, up_OR: Tensor, down_RI: Tensor):
        super().__init__()
        self.register_buffer("frozen_up", up_OR, persistent=False)
        self.register_buffer("frozen_down", down_RI, persistent=False)

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Frozen":
        del options, generator  # nothing is chosen or drawn
        return cls(stored.up_OR, stored.down_RI)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        del rank, dtype
        return AdapterTensors(parameters={}, buffers=frozen_shapes(shape, stored_rank, stored_dtype), made={})

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("frozen_up"), self.get_buffer("frozen_down")


METHODS: dict[str, type[Adapter]] = {
    "pissa": Pissa,
    "lora": Lora,
    "edora": EDora,
}


def default_method(ranks: Iterable[int]) -> str:
    """Return the method for a model with these stored ranks: pissa, or lora if a weight has no components."""
    return "pissa" if all(ranks) else "lora"


def check_own_options(method: str, options: AdapterOptions) -> None:
    """Raise BadInput if an option belongs to another method, or dropout is not a probability below 1."""
    for owner, kind in METHODS.items():
        for name in kind.own_options:
            if getattr(options, name) and name not in METHODS[method].own_options:
                raise BadInput(
                    f"{name} is an option of the method {owner}, and the method is {method}: choose {owner} (--method "
                    f"{owner}), or leave {name} out"
                )
    if not 0 <= options.dropout < 1:
        raise BadInput(f"dropout {options.dropout:g} is not a number from 0 to below 1")


def kind_of(method: str, module: str, ranks: Mapping[str, int], targets: Sequence[str] = ()) -> type[Adapter]:
    """Return the adapter class of one weight: Frozen if it is not to be trained, or lacks components that are needed.

    Args:
        module: Path of its layer.
        ranks: The stored ranks of all weights, by the paths of their layers. If those of all layers to train are 0,
            the method itself refuses to start.
        targets: Names of the layers to train; empty is all.
    """
    if not is_target(module, targets):
        return Frozen
    kind = METHODS[method]
    lacks = kind.needs_components and ranks[module] == 0
    return Frozen if lacks and any(rank and is_target(name, targets) for name, rank in ranks.items()) else kind
