import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turbopi import load_model, preset
from turbopi.checkpoint import convert, open_checkpoint, save_checkpoint
from turbopi.checkpoint.doctor import examine
from turbopi.checkpoint.initialise import plausible_stats
from turbopi.model import Pi0
from turbopi.transforms import shipped_tokenizer


@pytest.mark.parametrize("max_shard_bytes", [None, 500_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_model(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int | None) -> None:
    torch.manual_seed(0)
    model, stats = Pi0(preset("pi05-tiny")), plausible_stats("libero")
    path = save_checkpoint(
        tmp_path / "ck", model, stats, "libero", shipped_tokenizer(), dtype=dtype, max_shard_bytes=max_shard_bytes
    )
    loaded = load_model(path)
    assert loaded.config == model.config
    for (name, saved), (other, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(found, saved.to(dtype).float()), name
    assert np.array_equal(open_checkpoint(path).norm_stats().actions.q99, stats.actions.q99)
    assert not examine(path).failed
    shards = sorted(path.glob("*.safetensors"))
    if max_shard_bytes is None:
        assert [shard.name for shard in shards] == ["model.safetensors"]
    else:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert {shard.name for shard in shards} == set(index["weight_map"].values())
        assert len(shards) > 2
        assert max(shard.stat().st_size for shard in shards) < 1.1 * max_shard_bytes + 20_000
    convert(path, tmp_path / "lerobot", "lerobot")


def test_saving_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    model = Pi0(preset("pi0-tiny"))
    with pytest.raises(FileExistsError, match="already exists"):
        save_checkpoint(tmp_path / "ck", model, plausible_stats("libero"), "libero", shipped_tokenizer())
