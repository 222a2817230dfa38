"""The device that a model is put on, checked before the model is read."""

from vico.errors import UserError


def usable_device(device: str, field: str = "device") -> str:
    """Return `device` if torch can use it; `field` names the option in the message.

    Raises UserError for a name that torch does not know, and for a CUDA device that is not here.
    """
    import torch

    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError as error:
        raise UserError(f"{field}={device} is not supported; give cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise UserError(f"{field}={device} is not supported; give cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{field}={device}: torch sees no CUDA device here; give cpu")
    if kind == "cuda" and index is not None and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{field}={device}: torch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return device
