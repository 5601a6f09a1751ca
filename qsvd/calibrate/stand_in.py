"""Stand-ins for the blocks of a model: the rest of the model runs, and each block can be called by itself later.

A block is an element of a list of modules; it takes the hidden states of the block before it. Its other arguments
(masks, rotary embeddings; in some models they differ between blocks) are recorded as the model gives them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from qsvd.errors import BadInput, listing

HIDDEN = "hidden_states"  # name of the argument, if it is given by name
VALUES = (bool, int, float, str, torch.dtype, torch.device)  # other objects could pass data from block to block
NOT_ALONE = "the blocks cannot be run one at a time; calibrate a model whose blocks are a plain chain"


class AllCalled(Exception):
    """Every block has been called, and the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Call:
    """The arguments of one block except the hidden states.

    Args:
        path: Path of the block in the model.
        positional, named: The arguments, tensors in CPU memory.
        is_named: Whether the hidden states are given by name; else they are the first argument.
    """

    path: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    is_named: bool

    def run(self, block: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor) -> Any:
        """Return what the block returns with these weights; differentiable in them and in the hidden states.

        Raises:
            BadInput: the block passes other tensors to later blocks.
        """
        positional, named = tree_map(  # copies the containers, too
            lambda leaf: leaf.to(hidden.device) if isinstance(leaf, Tensor) else leaf,
            (self.positional, dict(self.named)),
        )
        before = len(tree_leaves((positional, named)))
        arguments = (positional, {HIDDEN: hidden} | named) if self.is_named else ((hidden, *positional), named)
        returned = functional_call(block, dict(weights), *arguments)
        if len(tree_leaves((positional, named))) != before:
            raise BadInput(f"{self.path} passes tensors other than the hidden states to later blocks, so {NOT_ALONE}")
        return returned


@dataclass
class Tape:
    """The record of one forward pass through the stand-ins, and what they return.

    Args:
        num_blocks: Number of blocks, each to be called once.
        last: What the last block returns; None stops the pass there.
        returns: Length of the tuple that a block returns, or 0 if it returns only the hidden states.
        keep: Whether to keep the arguments.
        has_graph: Whether the hidden states before the first block stay differentiable.
        hidden: Hidden states before the first block.
        calls: In order.
        passed: What each stand-in returned: leaf tensors that only the next block may use.
    """

    num_blocks: int
    last: Tensor | None
    returns: int
    keep: bool
    has_graph: bool = False
    hidden: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    passed: list[Tensor] = field(default_factory=list)
    _moved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def answer(self, path: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Record the call of a block, and return hidden states for the model to continue with.

        Raises:
            AllCalled: this was the last block, and `last` is None.
            BadInput: the block is called a second time, or depends on earlier blocks other than the one before it.
        """
        is_named = HIDDEN in named
        hidden: Any = named.pop(HIDDEN) if is_named else next(iter(positional), None)
        others = (positional if is_named else positional[1:], named)
        self._check_alone(path, hidden, others)
        if self.hidden is None:
            self.hidden = hidden if self.has_graph else hidden.detach()
        kept = tree_map(self._host, others) if self.keep else ((), {})
        self.calls.append(Call(path, kept[0], kept[1], is_named))
        is_last = len(self.calls) == self.num_blocks
        if is_last and self.last is None:
            raise AllCalled
        passed = self.last if is_last and self.last is not None else torch.zeros_like(hidden)
        self.passed.append(passed if passed.requires_grad else passed.requires_grad_())
        return self.passed[-1] if not self.returns else (self.passed[-1], *[None] * (self.returns - 1))

    def _check_alone(self, path: str, hidden: Any, others: Any) -> None:
        """Refuse a call that depends on anything except the output of the block before it."""
        if not isinstance(hidden, Tensor):
            raise BadInput(f"{path} is not called with hidden states first, so {NOT_ALONE}")
        leaves = [leaf for leaf in tree_leaves(others) if leaf is not None]
        kinds = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *VALUES))}
        if any(call.path == path for call in self.calls):
            raise BadInput(f"{path} is called more than once for one text, so {NOT_ALONE}")
        if self.passed and hidden is not self.passed[-1]:
            raise BadInput(
                f"the model changes the output of {self.calls[-1].path} before {path} gets it, so {NOT_ALONE}"
            )
        if kinds:
            raise BadInput(f"{path} gets a {listing(sorted(kinds))}, which may change, so {NOT_ALONE}")
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise BadInput(f"{path} uses other outputs of earlier blocks than the hidden states, so {NOT_ALONE}")

    def _host(self, leaf: Any) -> Any:
        """Return a tensor in CPU memory; one that several blocks take is copied once."""
        if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
            return leaf
        if id(leaf) not in self._moved:
            self._moved[id(leaf)] = (leaf, leaf.cpu())  # both, because an id can be reused when its tensor is freed
        return self._moved[id(leaf)][1]


class StandIn(nn.Module):
    """A module in the place of a block, with the attributes of the block.

    Args:
        path: Path of the block.
        block: The block, which is no longer a submodule: its parameters are not those of the model.
        tapes: The last one is that of the current forward pass.
    """

    def __init__(self, path: str, block: nn.Module, tapes: list[Tape]):
        super().__init__()
        self.path = path
        self.tapes = tapes
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Return what the current tape answers."""
        return self.tapes[-1].answer(self.path, positional, named)
