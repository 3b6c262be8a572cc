"""`turbo-pi info`: this machine and this installation."""

from __future__ import annotations

import os
import platform
from importlib import util

from rich.console import Console
from rich.table import Table

EXTRAS = {"serve": "websockets", "jax": "tensorstore", "client": "openpi_client"}


def info() -> int:
    """Print versions, devices, and which extras are installed."""
    import torch

    from .. import __version__
    from ..config import PRESETS

    table = Table("what", "value", title="turbo-pi")
    table.add_row("version", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        table.add_row(f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")
    if not torch.cuda.is_available():
        table.add_row("cuda", "none")
    for extra, module in EXTRAS.items():
        missing = f"not installed; pip install 'turbo-pi\\[{extra}]'"
        table.add_row(f"extra {extra}", "installed" if util.find_spec(module) else missing)
    table.add_row("presets", ", ".join(PRESETS))
    Console().print(table)
    return 0
