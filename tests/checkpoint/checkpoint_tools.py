"""What several of these tests do to a checkpoint."""

import json
from pathlib import Path

import safetensors.torch

FIXTURE_HEADS = {"vision": {"heads": 4}}


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.exists() else {}
    for key, change in changes.items():
        value[key] = change
        if change is None:
            del value[key]
    path.write_text(json.dumps(value))


def edit_weights(directory: Path, change) -> None:
    """Rewrite model.safetensors after `change(weights)`."""
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)
