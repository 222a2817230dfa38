"""Parameters whose values are still in files, so that a model can be built, changed and spread over ranks
without ever being whole in one memory."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class UnreadParameter(nn.Parameter):
    """A parameter on the meta device: shape and dtype without values. `read` returns its values on the CPU.

    `fill` makes it an ordinary parameter and keeps its identity, so tied layers and lists of parameters still
    hold the same object.
    """

    read: Callable[[], torch.Tensor]

    def fill(self, values: torch.Tensor) -> None:
        """Turn this object into a parameter that holds `values`, of the same shape and dtype."""
        assert values.shape == self.shape and values.dtype == self.dtype
        torch.utils.swap_tensors(self, nn.Parameter(values, requires_grad=self.requires_grad))


def unread(parameter: nn.Parameter, read: Callable[[], torch.Tensor]) -> UnreadParameter:
    """Return an unread parameter in the place of `parameter`, which is on the meta device."""
    replacement = UnreadParameter(parameter.data, requires_grad=parameter.requires_grad)
    replacement.read = read
    return replacement


def read_all(parameters: Iterable[nn.Parameter]) -> None:
    """Read those of the parameters that are unread into host memory."""
    for parameter in parameters:
        if isinstance(parameter, UnreadParameter):
            parameter.fill(parameter.read())


def values_of(parameter: nn.Parameter) -> torch.Tensor:
    """Return a parameter's values, from its file if it is unread; it then stays unread."""
    return parameter.read() if isinstance(parameter, UnreadParameter) else parameter.data
