"""The MLP channels of a 16-bit model, found by the shapes of its tensors, and which of them to keep.

A channel is one hidden unit of an MLP: a row of gate and up, with its biases, and a column of down. The model is built
on the meta device twice, with its own width and with half of it in config.json: what differs belongs to the MLPs.

Shape suffixes: C = channels of an MLP, T = tokens, I = in features.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from qsvd.errors import BadInput, listing
from qsvd.export.pruned import CutLayer
from qsvd.plan.experts import stacks_of
from qsvd.plan.weights import build, role_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_MULTIPLE = 64  # the block size of NF4, and a width that GPUs multiply fast
TRIAL = (8, 4)  # channels of the small MLPs that are compared
KNOWN = "Llama, Mistral, Qwen, Gemma, Phi-3, GPT-NeoX, OPT, BERT, T5"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cut:
    """A tensor of the model of which one axis has an entry, or two, for every channel.

    Args:
        repeats: 2 if the axis has all gates and then all ups.
    """

    name: str
    axis: Literal[0, 1]
    repeats: Literal[1, 2]

    @property
    def module(self) -> str:
        """The path of the linear layer."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        return self.name.endswith(".weight")


@dataclass(frozen=True)
class Mlps:
    """All MLPs of a model: they have equally many channels.

    Args:
        option: Their width in config.json, "intermediate_size".
        channels: Its value.
        blocks: The tensors of each MLP, by the path of the block that it is in.
    """

    option: str
    channels: int
    blocks: Mapping[str, tuple[Cut, ...]]

    def layers(self) -> dict[str, CutLayer]:
        """Return what is cut of each linear layer, by its path."""
        cuts = ((block, cut) for block, found in self.blocks.items() for cut in found if cut.is_weight)
        return {cut.module: CutLayer(block, cut.axis, cut.repeats) for block, cut in cuts}


def find_mlps(model: "PreTrainedModel", config: "PreTrainedConfig") -> Mlps:
    """Return the MLPs of a model.

    Args:
        model: Of the config, on the meta device.

    Raises:
        BadInput: the model has experts, or parts that read images or sound; or no number of config.json, or more than
            one, is the width of MLPs of plain linear layers and of nothing else.
    """
    if config.get_text_config() is not config:
        raise _refused(model, "it has parts that read images or sound")
    if any(True for path, module in model.named_modules() for _ in stacks_of(path, module)):
        raise _refused(model, "it has experts, of which each token uses a few")
    widths = {linear.in_features for linear in model.modules() if isinstance(linear, nn.Linear)}
    numbers = {name: value for name, value in config.to_dict().items() if type(value) is int and value in widths}
    found = [mlps for name, value in numbers.items() if (mlps := _mlps_of(model, config, name, value)) is not None]
    if len(found) != 1:
        names = listing([mlps.option for mlps in found])
        why = f"{names} are widths of different MLPs" if found else "none of its numbers is such a width"
        raise _refused(model, why)
    return found[0]


def _refused(model: nn.Module, why: str) -> BadInput:
    return BadInput(
        f"qsvd prune cuts MLPs of plain linear layers whose width is one number of config.json ({KNOWN}), and "
        f"{type(model).__name__} is none of these: {why}"
    )


def _mlps_of(model: "PreTrainedModel", config: "PreTrainedConfig", option: str, channels: int) -> Mlps | None:
    """Return the MLPs whose width an option is; None if it is something else."""
    halved = _shapes(config, option, channels // 2)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if halved is None or halved.keys() != own.keys():
        return None
    blocks: dict[str, list[Cut]] = {}
    for name in (name for name in own if own[name] != halved[name]):
        cut = _cut(name, own[name], halved[name], channels)
        block = None if cut is None else _block(model, cut.module)
        if cut is None or block is None or type(model.get_submodule(cut.module)) is not nn.Linear:
            return None
        blocks.setdefault(block, []).append(cut)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    if not blocks or not all(_is_mlp(cuts, tied) for cuts in blocks.values()):
        return None
    block, cuts = next(iter(blocks.items()))
    if channels < min(model.get_parameter(cut.name).shape[0] for cut in cuts if cut.axis == 1):
        return None  # a bottleneck between two products, such as Gemma 3n's laurel_rank
    is_exact = _is_exact(config, option, block, cuts)
    if is_exact is None:
        is_exact = all(cut.repeats == 1 for cut in cuts)
    return Mlps(option, channels, {path: tuple(cuts) for path, cuts in blocks.items()}) if is_exact else None


def _changed(config: "PreTrainedConfig", option: str, value: int) -> "PreTrainedModel | None":
    """Return the model with another number in its config, on the meta device; None if there is none."""
    changed = copy.deepcopy(config)
    try:
        setattr(changed, option, value)
        return build(changed)
    except (BadInput, ValueError, TypeError, AttributeError):
        return None


def _shapes(config: "PreTrainedConfig", option: str, value: int) -> Shapes | None:
    model = _changed(config, option, value)
    return None if model is None else {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _cut(name: str, own: tuple[int, ...], halved: tuple[int, ...], channels: int) -> Cut | None:
    """Return which axis of a tensor follows the width; None if it does so otherwise than by one row or column each."""
    axes = [axis for axis, (one, other) in enumerate(zip(own, halved, strict=True)) if one != other]
    repeats = own[axes[0]] // channels if len(own) == len(halved) and len(axes) == 1 else 0
    is_whole = repeats in (1, 2) and (own[axes[0]], halved[axes[0]]) == (repeats * channels, repeats * (channels // 2))
    is_known = (name.endswith(".weight") and len(own) == 2) or (name.endswith(".bias") and len(own) == 1)
    return Cut(name, cast(Any, axes[0]), cast(Any, repeats)) if is_whole and is_known else None


def _block(model: nn.Module, path: str) -> str | None:
    """Return the path of the innermost element of an nn.ModuleList around a module; None outside of blocks."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: depth - 1])), nn.ModuleList):
            return ".".join(parts[:depth])
    return None


def _is_mlp(cuts: Sequence[Cut], tied: set[str]) -> bool:
    """Tell whether the cut tensors of a block are those of an MLP: up, maybe with a gate, and down."""
    weights = [cut for cut in cuts if cut.is_weight]
    ups, downs = ([cut for cut in weights if cut.axis == axis] for axis in (0, 1))
    biases = {(cut.module, cut.repeats) for cut in cuts if not cut.is_weight}
    return (
        len(downs) == 1
        and downs[0].repeats == 1
        and sum(cut.repeats for cut in ups) in (1, 2)
        and biases <= {(cut.module, cut.repeats) for cut in ups}
        and not any(cut.name in tied or "expert" in cut.module for cut in cuts)
        and not any(role_of(cut.module) in ("q", "k", "v", "o") for cut in weights)
    )


@torch.no_grad()
def _is_exact(config: "PreTrainedConfig", option: str, block: str, cuts: Sequence[Cut]) -> bool | None:
    """Tell whether a small MLP without some channels computes what one does whose columns of down are zero there.

    None if the layers are in no module of their own that takes hidden states alone, as in BERT and OPT.
    """
    owner = _common([cut.module for cut in cuts])
    models = [_changed(config, option, size) for size in TRIAL]
    if owner == block or None in models:
        return None
    whole, cut_down = (model.get_submodule(owner) for model in models if model is not None)
    needed = [p for p in inspect.signature(whole.forward).parameters.values() if p.default is p.empty]
    if len(needed) != 1:
        return None
    generator, kept = torch.Generator().manual_seed(0), torch.arange(1, TRIAL[0], 2)
    for module in (whole, cut_down):
        module.to_empty(device="cpu").float().eval()
    for tensor in (tensor for tensor in whole.state_dict().values() if tensor.is_floating_point()):
        tensor.normal_(generator=generator)
    values = {f"{owner}.{name}": tensor for name, tensor in whole.state_dict().items()}
    for cut in cuts:
        values[cut.name] = chosen(values[cut.name], cut, kept, TRIAL[0])
    cut_down.load_state_dict({name.removeprefix(f"{owner}."): tensor for name, tensor in values.items()})
    down = next(cut for cut in cuts if cut.is_weight and cut.axis == 1)
    layer: Any = whole.get_submodule(down.module.removeprefix(f"{owner}."))
    removed = torch.ones(TRIAL[0], dtype=torch.bool).scatter_(0, kept, value=False)
    layer.weight[:, removed] = 0
    up: Any = whole.get_submodule(next(cut for cut in cuts if cut.axis == 0).module.removeprefix(f"{owner}."))
    x_TI = torch.randn(1, 3, up.in_features, generator=generator)
    try:
        found, wanted = cut_down(x_TI), whole(x_TI)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # it takes more than hidden states
        return None
    return isinstance(found, Tensor) and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def _common(paths: Sequence[str]) -> str:
    """Return the innermost module that all of these are in."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    shared = []
    for same in parts:
        if len({*same}) > 1:
            break
        shared.append(same[0])
    return ".".join(shared)


def chosen(tensor: Tensor, cut: Cut, kept: Tensor, channels: int) -> Tensor:
    """Return a tensor with some of its channels only.

    Args:
        kept: int64 numbers of channels, ascending.
        channels: That the tensor has.
    """
    return tensor.index_select(cut.axis, _places(kept, cut.repeats, channels))


def _places(kept: Tensor, repeats: int, channels: int) -> Tensor:
    return torch.cat([kept + part * channels for part in range(repeats)])


def kept_channels(channels: int, keep: float) -> tuple[int, int]:
    """Return how many channels to keep, and of what number that is a multiple: a power of two up to 64.

    Raises:
        BadInput: rounded to that multiple, all are kept.
    """
    multiple = MOST_MULTIPLE
    while multiple > 1 and keep * channels < 4 * multiple:
        multiple //= 2
    kept = max(multiple, round(keep * channels / multiple) * multiple)
    if kept >= channels:
        most = (channels - 1) // multiple * multiple / channels
        raise BadInput(
            f"--keep {keep:g} of {channels} channels, rounded to a multiple of {multiple}, keeps all: give "
            f"{most:.3f} or less, or train the model itself"
        )
    return kept, multiple


def important(weights: Iterable[tuple[Cut, Tensor]], channels: int, count: int) -> list[int]:
    """Return the channels of one MLP with the largest products of norms, ascending.

    The importance of a channel is |gate| * |up| * |down|, the Euclidean norms of its rows and of its column: the
    magnitude of its vectors, multiplied over the layers that they are in (LLM-Pruner, arXiv:2305.11627, section 3.2:
    vector-wise importance without data, aggregated by production).

    Args:
        weights: Each is in memory while it is looked at.
        count: Number of channels to return; of equal ones the first.
    """
    importance_C = torch.ones(channels, dtype=torch.float64)
    for cut, weight in weights:
        norms = torch.linalg.vector_norm(weight, dim=1 - cut.axis, dtype=torch.float32).double()
        importance_C *= norms.view(cut.repeats, channels).prod(dim=0)
    order_C = importance_C.argsort(descending=True, stable=True)
    return sorted(order_C[:count].tolist())
