from pathlib import Path

import numpy as np
import pytest

from turbopi import load_policy
from turbopi.checkpoint import init_checkpoint

pytestmark = pytest.mark.gpu


def test_a_policy_on_the_gpu_gives_the_cpus_actions(tmp_path: Path, data: Path) -> None:
    checkpoint = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="libero")
    z = np.load(data / "libero_frames.npz")
    observation = {
        "observation/image": z["agentview"][0][::-1, ::-1],
        "observation/wrist_image": z["wrist"][0][::-1, ::-1],
        "observation/state": z["state"][0],
        "prompt": str(z["prompt"][0]),
    }
    cpu = load_policy(checkpoint, device="cpu").infer(observation)["actions"]
    gpu = load_policy(checkpoint, device="cuda", precision="fp32").infer(observation)["actions"]
    assert np.abs(gpu - cpu).max() <= 1e-4
    default = load_policy(checkpoint)
    assert (str(default.engine.device).partition(":")[0], default.engine.precision) == ("cuda", "bf16")
    assert np.array_equal(default.infer(observation)["actions"], default.fork().infer(observation)["actions"])
