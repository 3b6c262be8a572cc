import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_tools import edit_json, edit_weights

from turbopi.checkpoint import convert, load_model, open_checkpoint
from turbopi.checkpoint.names import EMBEDDING, EXPERT_HEAD, TIED_HEAD, parameter_shapes, to_lerobot, to_openpi
from turbopi.checkpoint.orbax import OrbaxSource
from turbopi.checkpoint.tensors import read_tensor
from turbopi.config import preset
from turbopi.errors import CheckpointError
from turbopi.transforms import save_norm_stats

ORDERS = [
    ("openpi", "lerobot", "jax", "openpi"),
    ("openpi", "jax", "lerobot", "openpi"),
    ("lerobot", "openpi", "jax", "lerobot"),
    ("jax", "openpi", "lerobot", "jax"),
]


def weights_of(path):
    source = open_checkpoint(path).tensors
    return {name: read_tensor(source, name) for name in source.infos}


def assert_same_weights(first, second):
    names = {name for name in first if name not in (TIED_HEAD, EXPERT_HEAD)}
    assert names == {name for name in second if name not in (TIED_HEAD, EXPERT_HEAD)}
    for name in names:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), name


def assert_same_stats(first, second):
    for vector in ("state", "actions"):
        for field in ("mean", "std", "q01", "q99"):
            a, b = (getattr(getattr(stats, vector), field) for stats in (first, second))
            assert (a is None and b is None) or np.array_equal(a, b, equal_nan=True), (vector, field)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_tour_of_all_layouts_changes_no_bit(copy_of, tmp_path, order, kind):
    path = first = copy_of(f"{order[0]}-{kind}")
    config, stats = open_checkpoint(first).config, open_checkpoint(first).norm_stats()
    for stop, layout in enumerate(order[1:]):
        path = convert(path, tmp_path / f"{stop}-{layout}", layout).path
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.config) == (layout, config)
        assert checkpoint.robot == "libero"
        assert checkpoint.convention == "openpi"
        assert set(checkpoint.norm_modes.values()) == {"quantile" if kind == "pi05" else "mean_std"}
        assert_same_stats(checkpoint.norm_stats(), stats)
        assert_same_weights(weights_of(path), weights_of(first))
        assert (path / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()


def test_bfloat16_and_awkward_values_survive(copy_of, tmp_path):
    path = copy_of("openpi-pi05")

    def spoil(weights):
        for name in list(weights):
            weights[name] = weights[name].to(torch.bfloat16)
        odd = weights[to_openpi("vlm.layers.1.self_attn.k_proj.weight")]
        odd[0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])

    edit_weights(path, spoil)
    last = path
    for layout in ("jax", "lerobot", "openpi"):
        last = convert(last, tmp_path / layout, layout).path
        assert_same_weights(weights_of(last), weights_of(path))
    assert json.loads((tmp_path / "openpi" / "config.json").read_text())["precision"] == "bfloat16"


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("way", [("openpi",), ("jax",), ("openpi", "jax"), ("jax", "openpi")], ids="-".join)
def test_lerobots_own_directories_come_back_whole(copy_of, tmp_path, kind, way):
    original = copy_of(f"fixture-{kind}")
    path = original
    for layout in way:
        path = convert(path, tmp_path / layout, layout).path
        between = open_checkpoint(path)
        assert between.convention == "lerobot"
        assert between.lerobot_config["input_features"]["observation.state"]["shape"] == [8]
        assert_same_stats(between.norm_stats(), open_checkpoint(original).norm_stats())
    back = convert(path, tmp_path / "back", "lerobot").path
    assert_same_weights(weights_of(back), weights_of(original))
    assert_same_stats(open_checkpoint(back).norm_stats(), open_checkpoint(original).norm_stats())
    before, after = (json.loads((p / "config.json").read_text()) for p in (original, back))
    before.pop("turbopi")
    assert after == before
    steps = [json.loads((p / "policy_preprocessor.json").read_text())["steps"] for p in (original, back)]
    assert [s["registry_name"] for s in steps[0]] == [s["registry_name"] for s in steps[1]]
    assert steps[0] == steps[1]
    post = [json.loads((p / "policy_postprocessor.json").read_text()) for p in (original, back)]
    assert post[0] == post[1]


def test_lerobot_gets_names_and_fields_it_knows(copy_of):
    path = copy_of("lerobot-pi05")
    stored = set(safetensors.torch.load_file(path / "model.safetensors"))
    expected = {to_lerobot(name) for name in [*parameter_shapes(preset("pi05-tiny")), TIED_HEAD, EXPERT_HEAD]}
    assert stored == expected
    known = json.loads((copy_of("fixture-pi05") / "config.json").read_text())
    config = json.loads((path / "config.json").read_text())
    assert set(config) <= set(known), "lerobot refuses a config.json with fields that it does not know"
    assert config["input_features"].keys() >= {"observation.images.base_0_rgb", "observation.state"}
    assert config["normalization_mapping"]["ACTION"] == "QUANTILES"


def test_unused_expert_head_is_carried_or_zeros(copy_of, tmp_path):
    path = copy_of("fixture-pi05")
    head = weights_of(path)[EXPERT_HEAD]
    assert head.any()
    carried = convert(path, tmp_path / "openpi", "openpi")
    assert torch.equal(weights_of(carried.path)[EXPERT_HEAD], head)
    jax = convert(path, tmp_path / "jax", "jax")
    assert any("the JAX tree has none" in note for note in jax.notes)
    zeros = convert(jax.path, tmp_path / "zeros", "openpi")
    assert any("zeros are written" in note for note in zeros.notes)
    assert not weights_of(zeros.path)[EXPERT_HEAD].any()


def notes(copy_of, tmp_path, name, to, change=None):
    path = copy_of(name)
    if change:
        change(path)
    return " | ".join(convert(path, tmp_path / "target", to).notes)


def untie(path):
    head = to_lerobot(TIED_HEAD)
    edit_weights(path, lambda weights: weights.__setitem__(head, weights[head] + 1))


def tie(path):
    head, embedding = to_lerobot(TIED_HEAD), to_lerobot(EMBEDDING)
    edit_weights(path, lambda weights: weights.__setitem__(head, weights[embedding].clone()))


def relative(path):
    edit_json(path / "config.json", use_relative_actions=True)


def by_mean(path):
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        pipeline = json.loads((path / name).read_text())
        for step in pipeline["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"] = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
        (path / name).write_text(json.dumps(pipeline))


@pytest.mark.parametrize(
    ("name", "to", "change", "expected"),
    [
        ("fixture-pi05", "openpi", untie, "differs from its embedding and is dropped"),
        ("fixture-pi05", "openpi", by_mean, "openpi itself would normalise by quantile"),
        ("fixture-pi05", "openpi", None, "this policy's actions are absolute"),
        (
            "fixture-pi0",
            "jax",
            lambda p: edit_json(p / "config.json", use_relative_actions=True),
            "actions are relative",
        ),
        ("fixture-pi0", "jax", None, "openpi itself adds 1e-6"),
        ("openpi-pi05", "lerobot", None, "lerobot normalises without openpi's 1e-6"),
        ("upstream-openpi", "lerobot", None, "does not say that it was trained so"),
        ("openpi-pi0", "lerobot", None, "set use_relative_actions there"),
        ("openpi-pi0", "jax", lambda p: (p / "assets").rename(p / "no"), "has no normalisation statistics"),
        ("openpi-pi0", "lerobot", lambda p: (p / "assets").rename(p / "no"), "has no normalisation statistics"),
    ],
)
def test_what_the_target_cannot_carry_is_said(copy_of, tmp_path, name, to, change, expected):
    assert expected in notes(copy_of, tmp_path, name, to, change)


def test_nothing_is_said_where_nothing_is_lost(copy_of, tmp_path):
    said = notes(copy_of, tmp_path, "fixture-pi05", "openpi", tie)
    assert "head" not in said
    assert "normalise by" not in said


def test_asset_ids(copy_of, tmp_path):
    path = copy_of("openpi-pi05")
    stats = open_checkpoint(path).norm_stats()
    save_norm_stats(path / "assets" / "trossen" / "norm_stats.json", stats)
    with pytest.raises(CheckpointError, match="2 sets of statistics; choose one of"):
        convert(path, tmp_path / "a", "lerobot")
    assert not (tmp_path / "a").exists()
    with pytest.raises(CheckpointError, match="no statistics 'moon'"):
        convert(path, tmp_path / "a", "lerobot", asset_id="moon")
    chosen = convert(path, tmp_path / "a", "lerobot", asset_id="aloha").path
    assert open_checkpoint(chosen).asset_ids == ("trossen",)
    assert open_checkpoint(convert(path, tmp_path / "b", "jax").path).asset_ids == open_checkpoint(path).asset_ids
    assert open_checkpoint(path).robot is None
    assert open_checkpoint(path).asset_id("libero") == "physical-intelligence/libero"
    own = convert(copy_of("fixture-pi0"), tmp_path / "c", "openpi", asset_id="my/droid").path
    assert open_checkpoint(own).asset_ids == ("my/droid",)
    assert open_checkpoint(own).robot == "droid"
    assert open_checkpoint(tmp_path / "fixture-pi0").asset_id("libero") == "lerobot"


def test_refusals(copy_of, tmp_path):
    path = copy_of("openpi-pi0")
    with pytest.raises(ValueError, match="known layouts: openpi, lerobot, jax"):
        convert(path, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="in layout 'openpi' already"):
        convert(path, tmp_path / "x", "openpi")
    (tmp_path / "x").mkdir()
    with pytest.raises(FileExistsError, match="not overwritten"):
        convert(path, tmp_path / "x", "jax")


def test_stats_without_mean_cannot_become_openpis(copy_of, tmp_path):
    path = copy_of("fixture-pi05")
    for file in path.glob("policy_*.safetensors"):
        stats = safetensors.torch.load_file(file)
        safetensors.torch.save_file({n: v for n, v in stats.items() if ".mean" not in n}, file)
    with pytest.raises(CheckpointError, match="no mean and std"):
        convert(path, tmp_path / "x", "openpi")
    assert not (tmp_path / "x").exists()


def test_mixed_dtypes_do_not_fit_one_jax_array(copy_of, tmp_path):
    path = copy_of("openpi-pi0")
    name = to_openpi("vlm.layers.1.mlp.up_proj.weight")
    edit_weights(path, lambda weights: weights.__setitem__(name, weights[name].half()))
    with pytest.raises(CheckpointError, match=r"have dtypes torch\.float16, torch\.float32; store them in one dtype"):
        convert(path, tmp_path / "x", "jax")


def save_tree(directory, tree):
    import orbax.checkpoint

    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / "params").resolve(), tree)


def restore(path):
    import orbax.checkpoint

    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore((path / "params").resolve())


def test_orbax_reads_what_we_write(copy_of):
    path = copy_of("jax-pi05")
    tree = restore(path)["params"]
    model = load_model(path)
    gating = tree["PaliGemma"]["llm"]["layers"]["mlp"]["gating_einsum"]
    assert gating.shape == (3, 2, 128, 192)
    assert np.array_equal(gating[1, 0].T, model.vlm.layers[1].mlp.gate_proj.weight.detach().numpy())
    assert np.array_equal(tree["time_mlp_in"]["kernel"].T, model.time_mlp_in.weight.detach().numpy())


@pytest.mark.parametrize("root", [True, False])
def test_trees_saved_in_training_wrap_each_array_in_a_value(copy_of, tmp_path, root):
    path = copy_of("jax-pi0")

    def wrap(node):
        return {k: wrap(v) if isinstance(v, dict) else {"value": v} for k, v in node.items()}

    tree = wrap(restore(path)["params"])
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    save_tree(wrapped, {"params": tree} if root else tree)
    assert_same_weights({n: read_tensor(OrbaxSource(wrapped), n) for n in OrbaxSource(wrapped).infos}, weights_of(path))


def test_released_jax_checkpoints_say_nothing_but_their_shapes(copy_of):
    """openpi's own have no config.json: everything but the horizon follows from the arrays, heads included."""
    path = copy_of("jax-pi0")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert str(error.value).count("unknown") == 1
    (path / "config.json").write_text('{"turbopi": {"horizon": 10, "max_tokens": 64, "state_in_prompt": null}}')
    assert load_model(path).config == preset("pi0-tiny")


def spoil_metadata(path, **changes):
    edit_json(path / "params" / "_METADATA", **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "params" / "manifest.ocdbt").unlink(), "only Orbax checkpoints in OCDBT form"),
        (lambda p: spoil_metadata(p, tree_metadata={}), "names no arrays"),
        (lambda p: spoil_metadata(p, tree_metadata={"a": 3}), "no readable tree_metadata"),
        (lambda p: spoil_metadata(p, use_zarr3=True), "cannot be opened"),
        (lambda p: [f.unlink() for f in (p / "params").rglob("d/*")], "cannot be (opened|read)"),
    ],
)
def test_broken_jax_checkpoints_are_named(copy_of, spoil, message):
    path = copy_of("jax-pi0")
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path)
    assert str(path / "params") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["action_in_proj"].update(kernel=np.zeros((32, 64), np.int32)), "dtype int32, expected a floating"),
        (
            lambda t: t["action_in_proj"].update(extra=np.zeros(3, np.float32)),
            r"belong to no part.*in_proj/extra",
        ),
        (lambda t: t["PaliGemma"]["llm"]["layers"]["mlp"].update(gating_einsum_lora_a=np.zeros(3, np.float32)), "LoRA"),
        (lambda t: t["PaliGemma"]["img"].pop("head"), r"missing: projector\.weight"),
    ],
)
def test_wrong_jax_arrays_are_named(copy_of, tmp_path, change, message):
    original = copy_of("jax-pi0")
    tree = restore(original)
    change(tree["params"])
    path = tmp_path / "changed"
    path.mkdir()
    save_tree(path, tree)
    (path / "config.json").write_bytes((original / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_an_unreadable_array_is_named(copy_of, monkeypatch):
    class Broken:
        def read(self):
            raise ValueError("DATA_LOSS: checksum")

    source = OrbaxSource(copy_of("jax-pi0"))
    source._opened["PaliGemma/img/pos_embedding"] = Broken()
    with pytest.raises(CheckpointError, match="array PaliGemma/img/pos_embedding cannot be read"):
        read_tensor(source, "vision.embeddings.position_embedding.weight")


@pytest.mark.parametrize("module", ["tensorstore", "orbax.checkpoint"])
def test_without_the_extra_the_error_names_it(copy_of, tmp_path, monkeypatch, module):
    paths = copy_of("jax-pi0"), copy_of("openpi-pi0")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"turbo-pi\[jax\]"):
        load_model(paths[0]) if module == "tensorstore" else convert(paths[1], tmp_path / "x", "jax")
