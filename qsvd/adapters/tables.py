"""A token embedding and an output head whose weight is packed, in a model of qsvd.load and in one of transformers.

The embedding decodes the rows that are looked up. Modules that share its weight (a tied head, the embeddings of encoder
and decoder) hold no tensors and use those of the embedding.

Shape suffixes: N = tokens, O = rows of the table, I = hidden size.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.adapters.packed_linear import Packed, PackedLinear, product
from qsvd.errors import BadInput
from qsvd.files.layout import PARTS
from qsvd.numerics.codec import Codec, PackedBlocks
from qsvd.numerics.normal_float import NormalFloat, rows_of

NOT_KEPT = (
    "the weight of a packed output head is decoded when it is read, so a change of it would be lost; call dequantize() "
    "on the transformers model first, or merge with `qsvd export`"
)


class Decoded(Tensor):
    """The weight of a packed head as other libraries read it: a dense copy without a gradient, which refuses `.data`.

    PEFT merges an adapter through `.data`.
    """

    _is_param = True  # lets torch's get_parameter find it
    _is_hf_initialized = True  # keeps transformers from filling it with random numbers

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function on the numbers; raise BadInput for `.data`."""
        del types
        if getattr(func, "__self__", None) is Tensor.data:
            raise BadInput(NOT_KEPT)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _decoded(packed: PackedBlocks, dtype: torch.dtype) -> Decoded:
    return packed.decode(dtype=dtype).as_subclass(Decoded)


class PackedHead(PackedLinear):
    """An output head with a weight of its own; `weight` is the dense one, for losses that read it past `forward`.

    Args:
        linear: The head before.
        codec: Of the weight.
    """

    like: Tensor

    def __init__(self, linear: nn.Linear, codec: NormalFloat):
        bias = None if linear.bias is None else linear.bias.dtype
        super().__init__(linear.in_features, linear.out_features, codec, bias_dtype=bias)
        self.register_buffer("like", torch.empty(0, dtype=linear.weight.dtype), persistent=False)

    def __getattr__(self, name: str) -> Any:
        codes = self._parameters.get("weight")
        if name == "weight" and "like" in self._buffers and codes is not None and not codes.is_meta:
            return _decoded(self.packed, self.like.dtype)
        return super().__getattr__(name)


class PackedEmbedding(Packed, nn.Embedding):
    """The part of an embedding that looks up in packed rows; `pack_embedding` puts it before the embedding's own class.

    The forward of that class, which may scale the rows, sees the rows that were asked for as its weight.
    """

    like: Tensor
    rows_NI: Tensor | None  # while a lookup runs
    source: tuple["PackedEmbedding", ...]  # whose tensors it uses, in a tuple that hides it from torch; empty: its own

    @property
    def packed(self) -> PackedBlocks:
        """The weight [O, I]."""
        return self.source[0].packed if self.source else super().packed

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return (self.source[0] if self.source else self).like.dtype

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Embedding's
        """Map tokens [...] to [..., I] in the dtype of the model."""
        tokens_N = input.reshape(-1)
        self.rows_NI = rows_of(self.packed, tokens_N).to(self.model_dtype)
        try:
            return super().forward(torch.arange(len(tokens_N), device=input.device).view(input.shape))
        finally:
            self.rows_NI = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("rows_NI") is not None:
            return self.rows_NI
        if name == "weight" and self.__dict__.get("source"):
            return self.source[0].weight
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not self.__dict__.get("source"):  # transformers ties by setting it
            super().__setattr__(name, value)


def pack_embedding(embedding: nn.Embedding, codec: NormalFloat, source: PackedEmbedding | None = None) -> None:
    """Give an embedding a packed weight, empty, in place; it stays an instance of its class.

    Args:
        source: The packed embedding whose weight it shares.
    """
    shape, dtype = (embedding.num_embeddings, embedding.embedding_dim), embedding.weight.dtype
    embedding.__class__ = _packed_class(type(embedding))
    assert isinstance(embedding, PackedEmbedding), "the line above"
    embedding.rows_NI = None
    embedding.padding_idx = None  # of gradients alone, and the rows of a lookup have other numbers
    embedding.source = () if source is None else (source,)
    if source is not None:
        del embedding._parameters["weight"]
        _stand_in(embedding)
        return
    embedding.make_empty(shape, codec, "meta")
    codes = embedding._parameters["weight"]
    assert codes is not None, "just made"
    embedding._parameters["weight"] = nn.Parameter(codes.view(shape), requires_grad=False)
    embedding.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)


def _unpack(embedding: PackedEmbedding, dtype: torch.dtype) -> None:
    """Give a packed embedding a dense weight, in place; one with a source takes that of the source, unpacked before."""
    weight = embedding.source[0]._parameters["weight"] if embedding.source else None
    if weight is None:
        weight = nn.Parameter(embedding.packed.decode(dtype=dtype), requires_grad=False)
    for name in (*PARTS, "like", "weight"):
        embedding._buffers.pop(name, None)
    embedding._non_persistent_buffers_set -= {"like", "weight"}
    embedding.__class__ = _own_class(embedding)
    embedding._parameters["weight"] = weight


def _own_class(embedding: PackedEmbedding) -> Any:
    """Return the class that an embedding had before it was packed."""
    return type(embedding).__mro__[3]  # after the class of both, PackedEmbedding and Packed


@cache
def _packed_class(kind: type[nn.Embedding]) -> type[PackedEmbedding]:
    return type(f"Packed{kind.__name__}", (PackedEmbedding, kind), {"__module__": kind.__module__})


class TiedHead(nn.Module):
    """An output head with the weight of the embedding; `weight` is the dense one.

    Args:
        linear: The head before.
        embedding: It is hidden from torch's list of modules, since it is in the model at its own place.
    """

    def __init__(self, linear: nn.Linear, embedding: PackedEmbedding):
        super().__init__()
        self.source = (embedding,)
        _stand_in(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    @property
    def weight(self) -> Tensor:
        """W [O, I] in the dtype of the model."""
        return _decoded(self.source[0].packed, self.source[0].model_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # transformers ties by setting it
            super().__setattr__(name, value)

    def dense(self) -> nn.Linear:
        """Return a frozen nn.Linear with the weight of the embedding, which is not packed any more."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.source[0].weight, self.bias
        return linear.train(self.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        packed = self.source[0].packed
        if packed.codes.device != hidden.device:
            raise BadInput(
                "the token embedding is also the output head, and a device_map put them on different devices, "
                f"{packed.codes.device} and {hidden.device}; put both on one, or load with qsvd.load"
            )
        return product(hidden, packed, self.bias)


def _stand_in(module: nn.Module) -> None:
    """Give a module that shares a weight an empty buffer of that name: transformers looks for it when it ties."""
    module._buffers["weight"] = torch.empty(0, device="cpu")  # also where a model is made without memory
    module._non_persistent_buffers_set.add("weight")


def pack_table(model: Any, path: str, codec: Codec) -> tuple[str, ...]:
    """Replace an embedding, or an output head with a weight of its own, by a packed one that is empty.

    Modules that are tied to an embedding share its tensors.

    Returns:
        The names of the parameters that are tied to it.

    Raises:
        BadInput: the module is not an embedding and not a linear layer, or one of another kind is tied to it.
    """
    assert isinstance(codec, NormalFloat), "bitsandbytes' NF4 is for linear layers of blocks"
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        pack_embedding(module, codec)
        assert isinstance(module, PackedEmbedding), "the line above"
        return _tie(model, path, module, codec)
    if type(module) is not nn.Linear:
        raise BadInput(f"{path} of {type(model).__name__} is a {type(module).__name__}, which cannot be quantized")
    model.set_submodule(path, PackedHead(module, codec), strict=True)
    return ()


def _tie(model: Any, path: str, embedding: PackedEmbedding, codec: NormalFloat) -> tuple[str, ...]:
    own, tied = f"{path}.weight", model.all_tied_weights_keys
    source = tied.get(own, own)
    names = {source, *(name for name, other in tied.items() if other == source)} - {own}
    for name in names:
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        if type(module) is nn.Linear:
            model.set_submodule(owner, TiedHead(module, embedding), strict=True)
        elif isinstance(module, nn.Embedding) and module is not embedding:
            pack_embedding(module, codec, embedding)
        elif module is not embedding:
            raise BadInput(f"{name} of {type(model).__name__} shares the token embedding, which cannot be quantized")
    return tuple(sorted(names))


def unpack_tables(model: Any, dtype: torch.dtype) -> None:
    """Replace packed embeddings and heads, and what shares their weight, by dense ones."""
    heads = [(path, module) for path, module in model.named_modules() if isinstance(module, (PackedHead, TiedHead))]
    embeddings = [module for module in model.modules() if isinstance(module, PackedEmbedding)]
    for embedding in sorted(embeddings, key=lambda embedding: len(embedding.source)):
        _unpack(embedding, dtype)
    for path, head in heads:
        model.set_submodule(path, head.dense(dtype) if isinstance(head, PackedHead) else head.dense(), strict=True)
