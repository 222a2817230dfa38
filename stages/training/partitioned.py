"""ZeRO-3 over a model whose parameters are still in files: read and spread over the ranks one by one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from stages.training.lean_deepspeed import deepspeed
from vico.model.unread import UnreadParameter


def spread_unread(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Read the module's parameters and leave each rank its part of them, if there are unread ones.

    No rank holds more than one whole parameter at a time. Rank 0 reads the files and sends the values, which
    DeepSpeed does at every start. `config` is DeepSpeed's config of the engine that takes the module
    afterwards, and finds it partitioned. Parameters that are not unread are spread in the same way. Buffers
    move to the device.
    """
    if not any(isinstance(parameter, UnreadParameter) for parameter in module.parameters()):
        return
    dtype = next(module.parameters()).dtype
    init = deepspeed.zero.Init(module=_OneByOne(module), config_dict_or_path=dict(config), dtype=dtype)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(init.local_device)


class _OneByOne(nn.Module):
    """What DeepSpeed partitions: the parameters of a module, each of which gets its values at its turn."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._whole = (module,)  # a tuple: modules in it stay unregistered

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the module's parameters; DeepSpeed partitions each before it takes the next."""
        reads = torch.distributed.get_rank() == 0
        for parameter in self._whole[0].parameters(recurse):
            if isinstance(parameter, UnreadParameter):
                parameter.fill(parameter.read() if reads else torch.empty_like(parameter.data, device="cpu"))
            yield parameter
