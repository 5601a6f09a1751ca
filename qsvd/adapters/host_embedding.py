"""Token embeddings that stay in host memory: 2 GB of a 70B model, of which a batch needs a few rows."""

import torch
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """The embedding of a model, looked up on the host; its rows go to the device.

    Args:
        embedding: On the CPU. It is kept outside of torch's list of modules, so that `model.to` leaves it there.
    """

    def __init__(self, embedding: nn.Module, device: torch.device):
        super().__init__()
        self._outside = (embedding,)
        self._device = device

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden], on the CPU."""
        return self._outside[0].get_parameter("weight")

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] to [..., hidden]."""
        return self._outside[0](tokens.cpu()).to(self._device, non_blocking=True)

    def __deepcopy__(self, memo: dict) -> "HostEmbedding":
        """Itself: it is frozen."""
        return self
