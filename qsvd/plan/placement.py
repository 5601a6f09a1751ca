"""Where the parts of a model are while it trains or serves."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Placement:
    """What stays on the device, and where the rest waits.

    Args:
        resident: Blocks whose residuals stay on the device; None is all of them.
        pages: Where the residuals of the others are, "host" memory or the shards on "disk".
        embeddings_on_host: Look tokens up in host memory.
        activation_offload: Keep the checkpoints of activations in host memory.
    """

    resident: int | None = None
    pages: Literal["host", "disk"] = "host"
    embeddings_on_host: bool = False
    activation_offload: bool = False


EVERYTHING = Placement()
