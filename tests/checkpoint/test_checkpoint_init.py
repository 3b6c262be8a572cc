import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from turbopi.checkpoint import init_checkpoint, load_model, open_checkpoint
from turbopi.checkpoint.initialise import plausible_stats
from turbopi.checkpoint.names import EMBEDDING, EXPERT_HEAD, TIED_HEAD, head_shapes, parameter_shapes, to_openpi
from turbopi.config import PRESETS, ModelConfig, preset
from turbopi.model import ModelInput
from turbopi.transforms import ROBOTS


def module_of(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module with openpi's parameter names, such as its strict loader fills."""
    root = nn.Module()
    for name, shape in shapes.items():
        *branch, leaf = to_openpi(name).split(".")
        node = root
        for step in branch:
            if not hasattr(node, step):
                node.add_module(step, nn.Module())
            node = getattr(node, step)
        node.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return root


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_openpis_strict_loader_takes_the_file(tmp_path, name):
    config = preset(name)
    path = init_checkpoint(tmp_path / "new", config, weights="hash", seed=7)
    module = module_of(parameter_shapes(config) | head_shapes(config))
    paligemma = module.paligemma_with_expert.paligemma
    paligemma.model.language_model.embed_tokens.weight = paligemma.lm_head.weight
    # The same call as openpi's, strict by default.
    assert safetensors.torch.load_model(module, path / "model.safetensors") == (set(), [])
    ours = dict(load_model(path).named_parameters())
    theirs = dict(module.named_parameters(remove_duplicate=False))
    assert all(torch.equal(parameter, theirs[to_openpi(name)]) for name, parameter in ours.items())
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert to_openpi(EMBEDDING) not in stored
    assert to_openpi(TIED_HEAD) in stored
    assert not stored[to_openpi(EXPERT_HEAD)].any()


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_a_new_checkpoint_is_complete(tmp_path, robot, name):
    path = init_checkpoint(tmp_path / "deep" / "new", name, robot=robot)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == preset(name)
    assert checkpoint.robot == robot
    assert checkpoint.norm_modes["state"] == ("quantile" if name == "pi05-tiny" else "mean_std")
    stats = checkpoint.norm_stats()
    assert (stats.state.dims, stats.actions.dims) == (ROBOTS[robot].state_dim, ROBOTS[robot].action_dim)
    for part in (stats.state, stats.actions):
        assert (part.q99 > part.q01).all()
        assert (part.std > 0).all()
    config = json.loads((path / "config.json").read_text())
    assert config["action_horizon"] == preset(name).horizon
    assert ModelConfig.from_dict(config["turbopi"]) == preset(name)
    assert (path / "tokenizer.model").is_file()
    assert [entry.name for entry in path.parent.iterdir()] == ["new"], "nothing temporary is left"


def test_bfloat16_is_openpis_mixture(tmp_path):
    path = init_checkpoint(tmp_path / "new", "pi05-tiny", dtype=torch.bfloat16)
    infos = open_checkpoint(path).tensors.infos
    assert json.loads((path / "config.json").read_text())["precision"] == "bfloat16"
    assert infos[EMBEDDING].dtype == infos[EXPERT_HEAD].dtype == torch.bfloat16
    assert infos["expert.norm.dense.weight"].dtype == infos["action_in_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-small"])
@pytest.mark.parametrize("weights", ["random", "hash"])
def test_activations_stay_of_order_one(tmp_path, name, weights):
    model = load_model(init_checkpoint(tmp_path / "new", name, weights=weights))
    config = model.config
    torch.manual_seed(0)
    size = config.vision.image_size
    model_input = ModelInput(
        images=torch.rand(1, 3, 3, size, size) * 2 - 1,
        image_mask=torch.ones(1, 3, dtype=torch.bool),
        tokens=torch.randint(3, config.vocab_size, (1, config.max_tokens)),
        token_mask=torch.ones(1, config.max_tokens, dtype=torch.bool),
        state=torch.rand(1, 32) * 2 - 1,
    )
    with torch.no_grad(), model.taps() as taps:
        actions = model.sample_actions(model_input, torch.randn(1, config.horizon, 32))
    assert 0.1 < actions.std() < 10
    for tap, value in taps.items():
        if tap.startswith(("vision", "prefix.hidden", "step0")) and value.is_floating_point():
            assert value.abs().max() < 1e3, tap


def test_same_seed_same_file(tmp_path):
    files = [
        init_checkpoint(tmp_path / str(i), "pi0-tiny", seed=s) / "model.safetensors" for i, s in enumerate((1, 1, 2))
    ]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


def test_paligemmas_vocabulary_gets_no_small_tokenizer(tmp_path):
    config = dataclasses.replace(preset("pi0-tiny"), vocab_size=257152)
    assert not (init_checkpoint(tmp_path / "large", config) / "tokenizer.model").exists()
    config = dataclasses.replace(preset("pi0-tiny"), vocab_size=100)
    assert not (init_checkpoint(tmp_path / "small", config) / "tokenizer.model").exists()


def test_refusals(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="not overwritten"):
        init_checkpoint(tmp_path / "there", "pi0-tiny")
    narrow = dataclasses.replace(preset("pi0-tiny"), state_dim=7)
    for arguments, message in (
        ({"model": "pi9"}, "unknown preset"),
        ({"model": "pi0-tiny", "weights": "zeros"}, "weights must be one of random, hash"),
        ({"model": "pi0-tiny", "dtype": torch.float16}, "dtype is torch.float16"),
        ({"model": "pi0-tiny", "robot": "roomba"}, "unknown robot"),
        ({"model": narrow}, "choose a larger state_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            init_checkpoint(tmp_path / "new", **arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("turbopi.checkpoint.initialise.save_norm_stats", fail)
    with pytest.raises(OSError, match="disk full"):
        init_checkpoint(tmp_path / "new", "pi0-tiny")
    assert list(tmp_path.iterdir()) == []


def test_every_preset_and_robot_has_stats():
    assert {robot: plausible_stats(robot).state.dims for robot in ROBOTS} == {"libero": 8, "droid": 8, "aloha": 14}
    assert set(PRESETS) >= {"pi0", "pi05"}
