"""Device by name, with an error that lists the available ones."""

from __future__ import annotations

import torch

from scc_fast.config import nearest, shown

_KINDS = ("cpu", "cuda", "mps", "xpu")  # devices for a model's weights


def there() -> tuple[str, ...]:
    """Devices of this machine, by torch's names."""
    found = ["cpu"]
    for kind in _KINDS[1:]:
        module = getattr(torch, kind)
        if module.is_available():
            found += [kind, *(f"{kind}:{index}" for index in range(module.device_count()))]
    return tuple(found)


def find(device: torch.device | str) -> torch.device:
    """Available device of a name such as "cpu" or "cuda:0".

    Raises:
        TypeError: neither a name nor a torch.device. ValueError: unknown or unavailable.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: a name such as 'cpu' or 'cuda:0' is needed, got {shown(device)}")
    name = str(device)
    available = there()
    if name in available:
        return torch.device(name)
    kind = name.partition(":")[0]
    absent = kind in _KINDS and kind not in available
    sees = f"no {kind.upper()} device" if absent else "none of this name that a model can be on"
    hint = "" if absent else nearest(name, _KINDS)
    if kind in ("gpu", "hip"):
        hint = "; GPUs of NVIDIA and AMD are 'cuda'"
    raise ValueError(
        f"device: {shown(name)} asked for, but torch sees {sees}; "
        f"available: {', '.join(available)}{hint}"
    )
