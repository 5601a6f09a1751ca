"""LoRTA: one tensor of low rank for the attention of all layers. Shape suffixes as in adapter.py.

H = heads, D = features of a head, L = attentions, P = the four projections of an attention.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.adapters.adapter import AdapterOptions, Defaults, StoredWeight
from qsvd.adapters.methods.added import Added, joined
from qsvd.errors import BadInput
from qsvd.plan.tensors import AdapterTensors, Family, Layers, TensorShape
from qsvd.plan.weights import WeightSpec, role_of
from qsvd.records import Role

PROJECTIONS: tuple[Role, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Attention(Family):
    """The projections of all attentions of a model.

    Args:
        features: In features of each.
        head_size: D.
        heads: H, of the projection that has most.
        paths: Of the L attentions.
    """

    features: int
    head_size: int
    heads: int
    paths: tuple[str, ...]


class Lorta(Added):
    """LoRTA (arXiv:2410.04060): W' = Q + B0 A0 + (alpha / K) [B diag(h1 m l); B diag(h2 m l); ...] A, one head each.

    A [K, I], B [D, K] from 0, h [H, K], m [4, K] and l [L, K] are trained, one of each for the query, key, value and
    output projections of all attentions: the rows of dW of head h of projection p of attention i are
    B diag(h_h m_p l_i) A. Parameters: K (I + D + H + 4 + L) for the model.

    Heads divide the output features, as in the text; in the authors' code they divide the inputs. Keys and values with
    fewer heads have the first ones of h. Other layers stay frozen, and so does a projection whose out features are not
    whole heads, or whose in features are not those of most.
    """

    paper = "2410.04060"
    starts_as = "zero, added"
    defaults = Defaults(
        rank=8, scale=16 / 8, learning_rate=4e-4, reason="the authors' alpha and rate of their ranks for Llama 2 7B"
    )
    in_common = ("up", "down", "heads", "matrices", "attentions")

    def __init__(self, stored: StoredWeight, common: Mapping[str, Any], family: Attention, scale: float):
        super().__init__(stored, scale=scale)
        self.family = family.name
        path = attention_of(stored.module)
        self.attention = family.paths.index(path) if path in family.paths else 0
        role = role_of(stored.module)
        self.matrix = PROJECTIONS.index(role) if role in PROJECTIONS else 0
        self.num_heads = stored.residual.shape[0] // family.head_size
        self.up: nn.Parameter = common["up"]
        self.down: nn.Parameter = common["down"]
        self.heads: nn.Parameter = common["heads"]
        self.matrices: nn.Parameter = common["matrices"]
        self.attentions: nn.Parameter = common["attentions"]

    @classmethod
    def families(cls, layers: Layers, options: AdapterOptions) -> Mapping[str, Attention]:
        wanted = [spec for spec in layers.specs if spec.module in layers.targets]
        members = _members(wanted, layers.head_size)
        paths = {attention_of(spec.module) for spec in members}
        roles = {spec.role for spec in members}
        fused = [spec.module for spec in wanted if spec.role == "other" and attention_of(spec.module) in paths]
        if not members or (roles == {"o"} and fused):
            there = f"; {fused[0]} holds several of them" if fused else ""
            raise BadInput(
                f"{options.method or 'lorta'} trains separate query, key, value and output projections of attention, "
                f"and there are none among the layers to train{there}: use --method lora"
            )
        size = layers.head_size or 1
        heads = max(spec.shape[0] for spec in members) // size
        family = Attention("attention", members[0].shape[1], size, heads, tuple(sorted(paths, key=_natural)))
        return {spec.module: family for spec in members}

    @classmethod
    def common(
        cls,
        family: Attention,
        options: AdapterOptions,
        components: Callable[[str], tuple[Tensor, Tensor]] | None,
        like: Tensor,
    ) -> Mapping[str, Tensor]:
        del components
        rank, _ = cls.defaults.rank_and_scale(options, 0)
        seed = hashlib.sha256(f"lorta {options.seed} {family.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:6]))
        found = {}
        for name, tensor in _shapes(family, rank, options.torch_dtype).items():
            bound = math.sqrt((1 if name == "down" else 6) / rank)  # Kaiming's, as in the authors' code; K inputs
            drawn = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
            found[name] = nn.Parameter((0 * drawn if name == "up" else drawn).to(like.device, tensor.dtype))
        return found

    @classmethod
    def start(cls, stored: StoredWeight, options: AdapterOptions, generator: torch.Generator) -> "Lorta":
        del generator  # it is the weight's own
        rank, scale = cls.defaults.rank_and_scale(options, stored.rank)
        if rank < 1:
            raise BadInput(f"rank {rank} is below 1, the least that trains anything")
        family: Any = stored.family or _alone(stored.residual.shape)
        common = stored.common or cls.common(family, options, None, stored.up_OR)
        return cls(stored, common, family, scale)

    @classmethod
    def tensors(
        cls, shape: tuple[int, int], stored_rank: int, rank: int, dtype: torch.dtype, stored_dtype: torch.dtype
    ) -> AdapterTensors:
        return cls.planned(AdapterOptions(), None, shape, stored_rank, rank, dtype, stored_dtype)

    @classmethod
    def planned(cls, options: AdapterOptions, family: Attention | None, *sizes: Any) -> AdapterTensors:
        del options
        shape, stored_rank, rank, dtype, stored_dtype = sizes
        family = family or _alone(shape)
        heads = shape[0] // family.head_size
        found = joined(shape, stored_rank, {}, rank, (dtype, stored_dtype))
        made = {
            **found.made,
            "row": TensorShape((rank,), dtype),
            "scaled": TensorShape((heads, rank), dtype),
        }
        common = _shapes(family, rank, dtype)
        return replace(found, made=made, common=common, family=family.name)

    def added(self) -> tuple[Tensor, Tensor]:
        row_K = self.matrices[self.matrix] * self.attentions[self.attention]
        scaled_HK = self.heads[: self.num_heads] * (self.scale * row_K)
        return (scaled_HK[:, None] * self.up).flatten(0, 1), self.down


def _alone(shape: tuple[int, int]) -> Attention:
    """Return the family of a weight without a model: one head, one attention."""
    return Attention("", shape[1], shape[0], 1, ("",))


def _shapes(family: Attention, rank: int, dtype: torch.dtype) -> dict[str, TensorShape]:
    rows = {"up": family.head_size, "heads": family.heads, "matrices": len(PROJECTIONS)}
    shapes = {name: (number, rank) for name, number in rows.items()} | {"attentions": (len(family.paths), rank)}
    shapes["down"] = (rank, family.features)
    return {name: TensorShape(shapes[name], dtype) for name in Lorta.in_common}


def _members(specs: Iterable[WeightSpec], head_size: int | None) -> list[WeightSpec]:
    """Return the projections that whole heads divide, one of a role in an attention, with in features as most."""
    found = [s for s in specs if s.role in PROJECTIONS and not s.stack and head_size and s.shape[0] % head_size == 0]
    places = Counter((attention_of(spec.module), spec.role) for spec in found)
    found = [spec for spec in found if places[attention_of(spec.module), spec.role] == 1]
    sizes = Counter(spec.shape[1] for spec in found)
    most = max(sizes, key=lambda size: (sizes[size], size), default=0)
    return [spec for spec in found if spec.shape[1] == most]


def attention_of(module: str) -> str:
    """Return the path of the attention of a projection: "layer.0.attention" for "layer.0.attention.output.dense"."""
    parts = module.split(".")
    inside = max((number for number, part in enumerate(parts) if part.isdigit()), default=-1) + 1
    names = (number for number in range(inside, len(parts) - 1) if "att" in parts[number].lower())
    return ".".join(parts[: next(names, len(parts) - 2) + 1])


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


METHOD = Lorta
