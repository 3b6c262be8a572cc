import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from turbopi.checkpoint import lerobot, open_checkpoint
from turbopi.checkpoint.lerobot import read_processors
from turbopi.errors import CheckpointError


def pipeline(path, change, name="policy_preprocessor"):
    file = path / f"{name}.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def normalizer(value):
    return next(step for step in value["steps"] if step["registry_name"].endswith("normalizer_processor"))


@pytest.mark.parametrize(("kind", "mode"), [("pi0", "mean_std"), ("pi05", "quantile")])
def test_upstream_processors(copy_of, kind, mode):
    checkpoint = open_checkpoint(copy_of(f"fixture-{kind}"))
    assert checkpoint.convention == "lerobot"
    assert checkpoint.norm_modes == {"state": mode, "actions": mode}
    assert checkpoint.processors.eps == 1e-8
    assert checkpoint.asset_ids == ("lerobot",)
    assert checkpoint.robot is None
    stats = checkpoint.norm_stats()
    assert np.array_equal(stats.state.q99, np.arange(8, dtype=np.float64))
    assert np.array_equal(stats.actions.std, np.arange(7, dtype=np.float64))
    assert np.allclose(stats.actions.mean, np.arange(7) / 10)


def test_the_normaliser_is_found_wherever_it_stands(copy_of):
    path = copy_of("fixture-pi05")
    before = read_processors(path)
    pipeline(path, lambda value: value["steps"].reverse())
    assert read_processors(path).arrays.keys() == before.arrays.keys()


def test_actions_are_the_postprocessors(copy_of):
    path = copy_of("fixture-pi05")
    file = next(path.glob("policy_postprocessor*.safetensors"))
    arrays = load_file(file)
    save_file(arrays | {"action.q99": arrays["action.q99"] + 5, "count": np.array([3])}, file)
    processors = read_processors(path)
    assert np.array_equal(processors.stats().actions.q99, np.arange(7) + 5.0)
    assert np.array_equal(processors.pre_action["action.q99"], np.arange(7))
    assert "count" not in processors.arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("steps"), 'no list of "steps"'),
        (lambda v: v["steps"].append(3), 'no list of "steps"'),
        (lambda v: v["steps"].remove(normalizer(v)), "has 0 steps named normalizer_processor, expected one"),
        (lambda v: v["steps"].append(normalizer(v)), "has 2 steps named normalizer_processor"),
        (lambda v: normalizer(v).pop("config"), "with a config"),
        (lambda v: normalizer(v).pop("state_file"), "names no state_file"),
        (lambda v: normalizer(v)["config"].update(eps="tiny"), "has eps 'tiny'"),
        (lambda v: normalizer(v)["config"].update(norm_map=[]), r"norm_map \[\]"),
        (lambda v: normalizer(v)["config"]["norm_map"].update(STATE="MIN_MAX"), "STATE is normalised by 'MIN_MAX'"),
    ],
)
def test_broken_processors_are_named(copy_of, change, message):
    path = copy_of("fixture-pi05")
    pipeline(path, change)
    with pytest.raises(CheckpointError, match=message):
        _ = open_checkpoint(path).norm_modes


def test_missing_files_are_named(copy_of):
    path = copy_of("fixture-pi0")
    next(path.glob("policy_preprocessor_*")).unlink()
    with pytest.raises(FileNotFoundError, match="though normalizer_processor names it"):
        read_processors(path)
    (path / "policy_preprocessor.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy_preprocessor\.json does not exist"):
        read_processors(path)
    with pytest.raises(CheckpointError, match=r"no normalisation statistics; copy policy_preprocessor\.json"):
        open_checkpoint(path).norm_stats()


def test_missing_vectors_are_named(copy_of):
    path = copy_of("fixture-pi0")
    file = next(path.glob("policy_preprocessor_*"))
    save_file({n: v for n, v in load_file(file).items() if not n.startswith("observation")}, file)
    with pytest.raises(CheckpointError, match=r"no observation\.state\.mean"):
        open_checkpoint(path).norm_stats()


def test_more_cameras_than_slots(copy_of):
    path = copy_of("fixture-pi0")
    value = json.loads((path / "config.json").read_text())
    for index in range(3):
        value["input_features"][f"observation.images.extra{index}"] = {"type": "VISUAL", "shape": [3, 64, 80]}
    (path / "config.json").write_text(json.dumps(value))
    config = open_checkpoint(path).config
    assert config.cameras == 5
    names = lerobot.config_json(config, None, {"state": "quantile", "actions": "quantile"})["input_features"]
    assert list(names)[3:] == [
        "observation.images.camera_3_rgb",
        "observation.images.camera_4_rgb",
        "observation.state",
    ]
