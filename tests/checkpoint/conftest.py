import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_tools import FIXTURE_HEADS, edit_json

from turbopi.checkpoint import convert, init_checkpoint
from turbopi.checkpoint.initialise import plausible_stats
from turbopi.transforms import save_norm_stats

DATA = Path(__file__).parents[1] / "data" / "io"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _originals(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint of each layout and kind, made once; tests copy them."""
    root = tmp_path_factory.mktemp("originals")
    made = {}
    for kind in ("pi0", "pi05"):
        made[f"openpi-{kind}"] = init_checkpoint(root / f"openpi-{kind}", f"{kind}-tiny", weights="hash", seed=7)
        for layout in ("lerobot", "jax"):
            made[f"{layout}-{kind}"] = convert(made[f"openpi-{kind}"], root / f"{layout}-{kind}", layout).path
        fixture = root / f"fixture-{kind}"
        shutil.copytree(DATA / f"ckpt_lerobot_{kind}_tiny", fixture, copy_function=shutil.copyfile)
        edit_json(fixture / "config.json", turbopi=FIXTURE_HEADS)
        made[f"fixture-{kind}"] = fixture
    upstream = root / "upstream-openpi"
    upstream.mkdir()
    shutil.copyfile(DATA / "openpi_pi05_tiny_model.safetensors", upstream / "model.safetensors")
    config = {"action_dim": 32, "action_horizon": 10, "precision": "float32", "turbopi": FIXTURE_HEADS}
    (upstream / "config.json").write_text(json.dumps(config))
    save_norm_stats(upstream / "assets" / "droid" / "norm_stats.json", plausible_stats("droid"))
    made["upstream-openpi"] = upstream
    return made


@pytest.fixture
def copy_of(_originals, tmp_path):
    """A fresh copy of the named original that a test may spoil."""

    def copy(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(_originals[name], target)
        return target

    return copy
