"""Which method each layer of a model gets, and the tensors that weights have in common."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsvd.adapters.adapter import Adapter, AdapterOptions
from qsvd.adapters.methods.frozen import Frozen
from qsvd.adapters.methods.table import METHODS, expert_options, kind_of, options_for
from qsvd.errors import listing
from qsvd.memory.split_model import SplitModelPlan
from qsvd.plan.targets import is_target
from qsvd.plan.tensors import AdapterTensors, Family, Layers
from qsvd.plan.weights import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Assigned:
    """The method and the family of each layer, by its path; a layer without a family is not in `families`.

    Args:
        trainable: The layers that can be trained.
    """

    kinds: Mapping[str, type[Adapter]]
    families: Mapping[str, Family]
    trainable: Collection[str]


def assign(
    options: AdapterOptions, specs: Sequence[WeightSpec], ranks: Mapping[str, int], head_size: int | None
) -> Assigned:
    """Return what each layer of a model gets.

    Args:
        options: With a method, and names of layers from `target_names`.
        specs: All quantized weights.
        ranks: The stored ranks of those that can be trained, by the paths of their layers.
        head_size: See `head_size_of`.

    Raises:
        BadInput: the method has families, and no layer to train belongs to one; or options do not fit the shapes.
    """
    method, targets = str(options.method), options.target_modules
    kinds = {spec.module: kind_of(method, spec.module, ranks, targets) for spec in specs}
    trained = {spec.module: spec.shape for spec in specs if kinds[spec.module] is METHODS[method]}
    METHODS[method].check_shapes(trained, options)
    if not METHODS[method].in_common:
        return Assigned(kinds, {}, ranks)
    able = [spec for spec in specs if spec.module in ranks]
    wanted = {spec.module for spec in able if is_target(spec.module, targets)}
    families = METHODS[method].families(Layers(able, ranks, wanted, head_size), options)
    return Assigned({m: kind if m in families else Frozen for m, kind in kinds.items()}, families, ranks)


def head_size_of(config: "PreTrainedConfig") -> int | None:
    """Return the features of a head of attention of the language model; None if its config has no heads."""
    text: Any = config.get_text_config()
    for name in ("head_dim", "d_kv"):
        if isinstance(found := getattr(text, name, None), int) and found > 0:
            return found
    heads, features = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(features, int) or heads < 1:
        return None
    return features // heads or None


def num_trained(
    options: AdapterOptions, specs: Sequence[WeightSpec], stored: Mapping[str, int], assigned: Assigned
) -> int:
    """Return how many parameters are trained, those that weights have in common once.

    Args:
        stored: The stored ranks of all weights, by the paths of their layers.
    """
    common: dict[str, int] = {}
    count = 0
    for spec in specs:
        made = planned_tensors(options, spec, stored[spec.module], assigned, (torch.float32, torch.float32))
        count += sum(tensor.numel for tensor in made.parameters.values())
        common[made.family] = sum(tensor.numel for tensor in made.common.values())
    return count + sum(common.values())


def planned_tensors(
    options: AdapterOptions,
    spec: WeightSpec,
    stored_rank: int,
    assigned: Assigned,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> AdapterTensors:
    """Return the tensors of the adapter of one weight; dtypes are of what is trained and of the components."""
    kind = assigned.kinds[spec.module]
    own = options_for(options, kind, spec.module, assigned.trainable)
    sizes = (spec.shape, stored_rank, kind.defaults.rank_of(own, stored_rank), *dtypes)
    if kind is Frozen:
        return kind.tensors(*sizes)
    made = kind.planned(own, assigned.families.get(spec.module), *sizes)
    kept = kind.kept(kind.own(options), spec.shape)
    return replace(made, dropout=options.dropout, state={**made.state, **kept})


class InCommon:
    """The tensors that the weights of each family have in common, made when they are first asked for.

    Args:
        options: Of the adapters.
        families: By the paths of the layers.
        components: Reads B0 and A0 of a layer by its path; None if the tensors of a run follow.
        like: A tensor on the device, in the dtype of the components.
    """

    def __init__(
        self,
        options: AdapterOptions,
        families: Mapping[str, Family],
        components: Callable[[str], tuple[Tensor, Tensor]] | None,
        like: Tensor,
    ):
        self.options, self.families, self.components, self.like = options, families, components, like
        self.made: dict[str, Mapping[str, Tensor]] = {}

    def of(self, module: str) -> Mapping[str, Tensor]:
        """Return those of the family of a layer; none if it has no family."""
        family = self.families.get(module)
        if family is None:
            return {}
        if family.name not in self.made:
            kind = METHODS[str(self.options.method)]
            own = expert_options(self.options, kind, module)
            self.made[family.name] = kind.common(family, own, self.components, self.like)
        return self.made[family.name]


def said_of_frozen(model: SplitModelPlan) -> Iterator[str]:
    """Yield which layers stay frozen of a method with families, which does not train all kinds of layers."""
    wanted = [spec for spec in model.names.weights if not spec.is_tower and not spec.stack]
    left = [spec.module for spec in wanted if not model.adapters[spec.name].trained]
    if left and METHODS[model.method].in_common:
        kinds = [*dict.fromkeys(module.rpartition(".")[2] for module in left)]
        yield (
            f"Layers: {model.method} trains {len(wanted) - len(left)} of {len(wanted)}; {listing(kinds)} stay frozen"
        )
