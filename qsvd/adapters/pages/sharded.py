"""Pages that several processes hold together: each keeps a part, and FSDP2 gathers a page while its block computes.

A page is one frozen parameter of its block, uint8. All other parameters are left out: every process has them whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsvd.errors import BadInput
from qsvd.files.readers import PageReader

PAGE = "page"  # the name of the parameter


class ShardedPages:
    """Pages in parts, one for each process. `moved_bytes` counts a page when another was read before it.

    Args:
        sizes: Bytes of each page.
        in_host: Whether the parts are kept in CPU memory.
    """

    def __init__(self, reader: PageReader, sizes: Sequence[int], device: torch.device, *, in_host: bool):
        self._reader, self._sizes, self._device, self._in_host = reader, sizes, device, in_host
        self._blocks: dict[int, tuple[str, nn.Module]] = {}
        self._current: int | None = None
        # On a CPU, where NumPy decodes, which forbids FSDP2 to empty what NumPy has seen.
        self._copy = torch.empty(max(sizes), dtype=torch.uint8) if device.type == "cpu" else None
        self.moved_bytes = 0

    def attach(self, model: nn.Module, root: nn.Module, blocks: Sequence[tuple[str, int]]) -> None:
        """Give each block its page, of which this process keeps its part.

        Args:
            root: The module inside the model whose forward pass calls all blocks.
            blocks: The path of each block, and the number of its page, once for each layer that reads it.

        Raises:
            BadInput: layers of several blocks read one page.
        """
        from torch.distributed import get_world_size  # slow, and for several processes alone
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        owners: dict[int, str] = {}
        for path, page in blocks:
            if owners.setdefault(page, path) != path:
                raise BadInput(f"--shard cannot divide this model: {path} and {owners[page]} have weights in common")
        mesh = init_device_mesh(self._device.type, (get_world_size(),))
        policy = CPUOffloadPolicy(pin_memory=self._device.type == "cuda") if self._in_host else OffloadPolicy()
        for page, path in owners.items():
            block = model.get_submodule(path)
            others = set(block.parameters())
            block.register_parameter(PAGE, nn.Parameter(self._read(page), requires_grad=False))
            fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=others)
            self._blocks[page] = path, block
        fully_shard(root, mesh=mesh, reshard_after_forward=True, ignored_params=set(root.parameters()))

    def get(self, page: int, *, backward_follows: bool) -> Tensor:
        """Return a page, uint8 on the device, valid while its block computes.

        Raises:
            BadInput: the block does not compute.
        """
        del backward_follows
        path, block = self._blocks[page]
        found: Any = block.get_parameter(PAGE)
        if hasattr(found, "to_local"):  # a part
            raise BadInput(f"--shard cannot train this model: its forward pass reads weights of {path} outside of it")
        if page != self._current:
            self.moved_bytes += self._sizes[page]
            self._current = page
            if self._copy is not None:
                self._copy[: len(found)] = found
        return found.detach() if self._copy is None else self._copy[: len(found)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts of this process on the device, without gathered pages."""
        return 0 if self._in_host else sum(page.to_local().nbytes for page in self.pages())

    def pages(self) -> list[Any]:
        """Return the parameter of each page; `to_local` gives the part of this process."""
        return [block.get_parameter(PAGE) for _, block in self._blocks.values()]

    def __deepcopy__(self, memo: dict) -> "ShardedPages":
        """Return itself: frozen residuals are shared."""
        return self

    def _read(self, page: int) -> Tensor:
        """Return a whole page on the device."""
        whole = torch.empty(self._sizes[page], dtype=torch.uint8)
        self._reader.read_into(page, whole)
        return whole.to(self._device, copy=True)
