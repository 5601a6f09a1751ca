"""Where the bytes of a training run are."""

from typing import Any

from torch import Tensor

from qsvd.adapters.model import split_linears


def memory_by_item(model: Any, optimizer: Any, peak_bytes: int) -> dict[str, int]:
    """Bytes by item, in the order of a table; the last is what the peak has beyond the others."""
    linears = [module for _, module in split_linears(model)]
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    inside = sum(buffer.nbytes for module in linears for buffer in module.adapter.buffers())
    states = optimizer.state.values() if optimizer is not None else ()
    items = {
        "residual": sum(module.codec.num_bytes((module.out_features, module.in_features)) for module in linears),
        "frozen components": inside,
        "embeddings, norms, head": sum(p.nbytes for p in parameters if not p.requires_grad),
        "trained parameters": trained,
        "gradients": trained,
        "optimizer state": sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor)),
    }
    return items | {"activations and all else": max(peak_bytes - sum(items.values()), 0), "peak": peak_bytes}
