"""Stand-ins in the place of a model's blocks: what lies around the blocks runs, and they are called by themselves.

A block is an element of a list of modules that takes the hidden states of the one before it. Everything else that a
block is called with (masks, rotary embeddings, which differ between the blocks of some models) is kept as it was given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from qsvd.errors import BadInput, listing

HIDDEN = "hidden_states"  # what the argument is called where it is given by name
VALUES = (bool, int, float, str, torch.dtype, torch.device)  # other objects could carry something from block to block
NOT_ALONE = "the blocks cannot be run one at a time; calibrate a model whose blocks are a plain chain"


class AllCalled(Exception):
    """Every block has been called: what comes after them is not wanted."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block, the hidden states apart.

    Args:
        path: Of the block in the model.
        positional, named: The other arguments, tensors on the host.
        is_named: Whether the hidden states are given by name; else they come first.
    """

    path: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    is_named: bool

    def run(self, block: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor) -> Any:
        """What the block returns with these weights; differentiable in them and in the hidden states.

        Raises:
            BadInput: the block hands something to later blocks beside the hidden states.
        """
        positional, named = _on(hidden.device, (self.positional, dict(self.named)))
        before = len(tree_leaves((positional, named)))
        given = ((), {HIDDEN: hidden}) if self.is_named else ((hidden,), {})
        returned = functional_call(block, dict(weights), (*given[0], *positional), {**given[1], **named})
        if len(tree_leaves((positional, named))) != before:
            raise BadInput(f"{self.path} hands tensors to later blocks beside the hidden states, so {NOT_ALONE}")
        return returned


@dataclass
class Tape:
    """What the stand-ins of one run saw, and what they return.

    Args:
        num_blocks: That are to be called, each once.
        last: What the last of them returns; None stops the run there.
        returns: Length of the tuple that a block returns, or 0 where it returns the hidden states alone.
        keep: Whether the arguments are kept.
        hidden: What the first was called with.
        calls: In order.
        passed: What each returned: leaves, of which nothing may depend but the next block.
    """

    num_blocks: int
    last: Tensor | None
    returns: int
    keep: bool
    hidden: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    passed: list[Tensor] = field(default_factory=list)
    _moved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def answer(self, path: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Take the call of a block down, and give the model something to go on with.

        Raises:
            AllCalled: this was the last block, and nothing after it is wanted.
            BadInput: the block is called again, or with more of the earlier ones than their output.
        """
        is_named = HIDDEN in named
        hidden: Any = named.pop(HIDDEN) if is_named else next(iter(positional), None)
        others = (positional if is_named else positional[1:], named)
        self._check_alone(path, hidden, others)
        if self.hidden is None:
            self.hidden = hidden.detach()
        kept = tree_map(self._host, others) if self.keep else ((), {})
        self.calls.append(Call(path, kept[0], kept[1], is_named))
        is_last = len(self.calls) == self.num_blocks
        if is_last and self.last is None:
            raise AllCalled
        passed = self.last if is_last and self.last is not None else torch.zeros_like(hidden)
        self.passed.append(passed if passed.requires_grad else passed.requires_grad_())
        return self.passed[-1] if not self.returns else (self.passed[-1], *[None] * (self.returns - 1))

    def _check_alone(self, path: str, hidden: Any, others: Any) -> None:
        """Refuse a call that depends on more than the output of the block before it."""
        if not isinstance(hidden, Tensor):
            raise BadInput(f"{path} is not given hidden states first, so {NOT_ALONE}")
        leaves = [leaf for leaf in tree_leaves(others) if leaf is not None]
        kinds = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *VALUES))}
        if any(call.path == path for call in self.calls):
            raise BadInput(f"{path} is called more than once for one text, so {NOT_ALONE}")
        if self.passed and hidden is not self.passed[-1]:
            raise BadInput(f"the model changes what {self.calls[-1].path} gives before {path} gets it, so {NOT_ALONE}")
        if kinds:
            raise BadInput(f"{path} is given a {listing(sorted(kinds))}, which may change, so {NOT_ALONE}")
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise BadInput(f"{path} takes more of earlier blocks than what the one before it returns, so {NOT_ALONE}")

    def _host(self, leaf: Any) -> Any:
        """A tensor on the host, once however many blocks take it."""
        if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
            return leaf
        if id(leaf) not in self._moved:
            self._moved[id(leaf)] = (leaf, leaf.cpu())  # both, since an id may come again when its tensor is gone
        return self._moved[id(leaf)][1]


class StandIn(nn.Module):
    """Takes the place of a block; looks like it to whoever asks for an attribute.

    Args:
        path: Of the block.
        block: Is not a part of the model any more: its parameters are not found.
        tapes: The tape of the run that goes on is the last of them.
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
        """What the tape says."""
        return self.tapes[-1].answer(self.path, positional, named)


def _on(device: torch.device, arguments: Any) -> Any:
    """The same arguments with all tensors on a device; containers are new ones."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, arguments)
