import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from checkpoint_tools import FIXTURE_HEADS, edit_json, edit_weights

from turbopi.checkpoint import init_checkpoint, load_model, open_checkpoint
from turbopi.checkpoint.hashweights import hash_parameter
from turbopi.checkpoint.names import EMBEDDING, parameter_shapes, to_lerobot, to_openpi
from turbopi.checkpoint.tensors import read_tensor
from turbopi.config import GemmaConfig, ModelConfig, VisionConfig, preset
from turbopi.errors import CheckpointError
from turbopi.model.numerics import parameter_dtype

TINY = ModelConfig(
    kind="pi05",
    vision=VisionConfig(width=96, depth=2, mlp_dim=144, heads=4, patch_size=14, image_size=56),
    vlm=GemmaConfig(width=128, depth=3, mlp_dim=192, heads=8, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=64, depth=3, mlp_dim=96, heads=8, kv_heads=1, head_dim=32),
    vocab_size=320,
    horizon=10,
    max_tokens=200,
)


def test_upstream_openpi_file(copy_of):
    path = copy_of("upstream-openpi")
    model = load_model(path)
    assert model.config == TINY
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, hash_parameter(name, tuple(parameter.shape), 7)), name
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_upstream_lerobot_directories(copy_of, kind):
    path = copy_of(f"fixture-{kind}")
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "lerobot"
    expected = dataclasses.replace(
        TINY, kind=kind, state_in_prompt=kind == "pi05", max_tokens={"pi0": 48, "pi05": 200}[kind]
    )
    model = load_model(path)
    assert model.config == expected
    stored = safetensors.torch.load_file(path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[to_lerobot(name)]), name


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_lerobot_directories_as_they_are_declare_other_sizes(copy_of, kind):
    path = copy_of(f"fixture-{kind}")
    edit_json(path / "config.json", turbopi=None)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    message = str(error.value)
    assert "paligemma_variant 'gemma_2b', but the weights have width 128 instead of 2048" in message
    assert "action_expert_variant 'gemma_300m'" in message
    assert "vision.heads is unknown" in message
    assert json.dumps({"turbopi": FIXTURE_HEADS}) in message
    assert str(path) in message


def test_embedding_wins_over_the_head_where_both_are(copy_of):
    path = copy_of("fixture-pi05")
    head = to_lerobot("vlm.lm_head.weight")
    edit_weights(path, lambda weights: weights.__setitem__(head, weights[head] + 1))
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert torch.equal(load_model(path).vlm.embed_tokens.weight, stored[to_lerobot(EMBEDDING)])
    edit_weights(path, lambda weights: weights.pop(to_lerobot(EMBEDDING)))
    assert torch.equal(load_model(path).vlm.embed_tokens.weight, stored[head])


def test_lerobot_reads_openpis_names(copy_of):
    path = copy_of("fixture-pi0")
    before = {name: p.clone() for name, p in load_model(path).named_parameters()}
    stored = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file({n.removeprefix("model."): t for n, t in stored.items()}, path / "model.safetensors")
    assert open_checkpoint(path).format == "lerobot"
    assert all(torch.equal(p, before[name]) for name, p in load_model(path).named_parameters())


@pytest.mark.parametrize("numerics", ["exact", "openpi", "lerobot"])
def test_dtypes_follow_the_profile(copy_of, numerics):
    path = copy_of("openpi-pi05")
    model = load_model(path, dtype=torch.bfloat16, numerics=numerics, invalid_tokens="masked")
    assert (model.config.numerics, model.config.invalid_tokens) == (numerics, "masked")
    source = open_checkpoint(path).tensors
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter_dtype(name, numerics, torch.bfloat16)
        assert torch.equal(parameter, read_tensor(source, name).to(parameter.dtype))


@pytest.mark.parametrize("layout", ["openpi", "lerobot", "jax"])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_our_own_checkpoints_load_from_every_layout(copy_of, layout, kind):
    model = load_model(copy_of(f"{layout}-{kind}"))
    assert model.config == preset(f"{kind}-tiny")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, hash_parameter(name, tuple(parameter.shape), 7)), name


def test_the_path_does_not_decide_the_kind(copy_of, tmp_path):
    path = copy_of("jax-pi0").rename(tmp_path / "my-pi05-run")
    assert load_model(path).config.kind == "pi0"


@pytest.mark.gpu
def test_weights_reach_a_gpu_as_they_are(copy_of):
    path = copy_of("openpi-pi05")
    on_cpu = dict(load_model(path, dtype=torch.bfloat16).named_parameters())
    for name, parameter in load_model(path, "cuda", torch.bfloat16).named_parameters():
        assert parameter.device.type == "cuda"
        assert torch.equal(parameter.cpu(), on_cpu[name])


def test_an_explicit_configuration_needs_no_declaration(copy_of):
    path = copy_of("upstream-openpi")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r'horizon is unknown.*state it in config\.json, for example {"turbopi"'):
        load_model(path)
    assert load_model(path, config=TINY).config == TINY
    wider = dataclasses.replace(TINY, action_dim=16, horizon=3)
    with pytest.raises(CheckpointError, match=r"action_in_proj\.weight has shape \[64, 32\], expected \[64, 16\]"):
        load_model(path, config=wider)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "dtype is torch.float16, expected one of"),
        ({"device": "gpu0"}, "no device name"),
        ({"device": "cuda:9999"}, "torch sees"),
        ({"device": "meta"}, "not supported"),
        ({"numerics": "fancy"}, "numerics must be one of"),
    ],
)
def test_unusable_options(copy_of, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(copy_of("openpi-pi05"), **options)


def test_unusable_directories(tmp_path, copy_of):
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or"):
        load_model(tmp_path / "empty")
    both = copy_of("jax-pi0")
    (both / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(both)


def delete(*names):
    return lambda weights: [weights.pop(to_openpi(name)) for name in names]


def replace(name, change):
    return lambda weights: weights.__setitem__(to_openpi(name), change(weights[to_openpi(name)]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            delete("expert.layers.1.mlp.up_proj.weight"),
            r"1 tensors are missing: expert\.layers\.1\.mlp\.up_proj",
        ),
        (delete("projector.weight"), r"missing: projector\.weight"),
        (delete("vision.embeddings.patch_embedding.weight"), "missing or misshapen: vision.embeddings.patch_embedding"),
        (delete("time_mlp_in.weight", "time_mlp_in.bias"), "hold neither of time_mlp_in"),
        (lambda w: w.update({"audio.weight": torch.zeros(1)}), r"belong to no part.*audio\.weight"),
        (lambda w: w.update({"state_proj.bias": torch.zeros(64)}), r"belong to no part.*state_proj\.bias"),
        (lambda w: w.update({"action_time_mlp_in.bias": torch.zeros(64)}), "hold both of time_mlp_in"),
        (
            replace("expert.layers.0.mlp.down_proj.weight", lambda w: w[:, :-1].clone()),
            r"\[64, 95\], expected \[64, 96\]",
        ),
        (replace("vlm.layers.0.self_attn.k_proj.weight", lambda w: w[:-2].clone()), "not whole heads of 30"),
        (replace("vision.embeddings.position_embedding.weight", lambda w: w[:-1].clone()), "expected a square"),
        (replace("vlm.norm.weight", lambda w: w.to(torch.int32)), "dtype torch.int32, expected torch.float64 or"),
        (replace("vlm.norm.weight", lambda w: w.to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn, expected"),
        (replace("vlm.norm.weight", lambda w: torch.zeros(0)), r"shape \[0\]"),
        (replace("expert.lm_head.weight", lambda w: w[:-1].clone()), r"expert\.lm_head\.weight has shape"),
    ],
)
def test_wrong_tensors_are_named(copy_of, spoil, message):
    path = copy_of("upstream-openpi")
    edit_weights(path, spoil)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"turbopi": {"vision": {"heads": 4}, "kind": "pi0"}},
            "declares turbopi.kind 'pi0', but the weights are those of pi05",
        ),
        ({"type": "pi0"}, "declares type 'pi0'"),
        ({"type": "act"}, "lerobot policy of type 'act'"),
        ({"turbopi": {"vision": {"heads": 7}}}, "not divisible by heads 7"),
        ({"turbopi": {"vision": {"heads": "four"}}}, r"has vision\.heads 'four', expected integers"),
        ({"turbopi": {"heads": 4}}, "unknown fields: heads"),
        ({"turbopi": {"vision": {"eyes": 2}}}, r"unknown fields: vision\.eyes"),
        ({"turbopi": {"vision": 4}}, "expected an object of sizes"),
        ({"turbopi": 4}, "expected an object of ModelConfig fields"),
        ({"turbopi": {**FIXTURE_HEADS, "vlm": {"head_dim": 5}}}, "not whole heads of 5"),
        ({"turbopi": {**FIXTURE_HEADS, "vlm": {"width": 99}}}, r"expected \[.*99.*\]"),
        ({"action_dim": 7}, "declares action_dim 7, but action_in_proj takes 32"),
        ({"turbopi": None, "paligemma_variant": "gemma_7b"}, "has paligemma_variant 'gemma_7b', known are"),
        ({"action_horizon": "ten"}, "do not make a model: .*horizon must be an integer"),
        ({"action_horizon": None}, "horizon is unknown"),
        ({"turbopi_origin": 3}, "turbopi_origin is 3"),
        ({"turbopi_origin": {"convention": "mine"}}, "expected a convention of"),
        ({"turbopi_origin": {"norm_modes": {"state": "quantile"}}}, "for state and actions"),
        ({"input_features": {"x": 3}}, "input_features"),
    ],
)
def test_wrong_declarations_are_named(copy_of, changes, message):
    path = copy_of("upstream-openpi")
    edit_json(path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_partial_statements_win_over_shapes(copy_of):
    path = copy_of("upstream-openpi")
    stated = {**FIXTURE_HEADS, "vlm": {"kv_heads": 2}, "expert": {"kv_heads": 2}, "max_tokens": 77, "horizon": 4}
    edit_json(path / "config.json", turbopi=stated, action_horizon=None)
    config = load_model(path).config
    assert (config.vlm.kv_heads, config.vlm.head_dim, config.vlm.heads) == (2, 16, 16)
    assert (config.max_tokens, config.horizon) == (77, 4)


def test_dummy_variant_gives_the_heads(tmp_path):
    gemma = GemmaConfig(width=64, depth=4, mlp_dim=128, heads=8, kv_heads=1, head_dim=16)
    config = dataclasses.replace(preset("pi0-tiny"), vlm=gemma, expert=gemma, state_in_prompt=False, max_tokens=48)
    path = init_checkpoint(tmp_path / "dummy", config)
    written = json.loads((path / "config.json").read_text())
    assert (written["paligemma_variant"], written["action_expert_variant"]) == ("dummy", "dummy")
    edit_json(path / "config.json", turbopi=FIXTURE_HEADS)
    assert open_checkpoint(path).config == config


def test_so400m_is_known_by_its_width(tmp_path):
    vision = VisionConfig(width=1152, depth=1, mlp_dim=16, heads=16, patch_size=14, image_size=14)
    config = dataclasses.replace(preset("pi0-tiny"), vision=vision, state_in_prompt=False, max_tokens=48)
    path = init_checkpoint(tmp_path / "wide", config)
    edit_json(path / "config.json", turbopi=None)
    assert open_checkpoint(path).config == config


def test_sharded_checkpoints_load(copy_of):
    path = copy_of("upstream-openpi")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(part, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, parameter in load_model(path).named_parameters():
        assert torch.equal(parameter, hash_parameter(name, tuple(parameter.shape), 7))


MEASURE = textwrap.dedent(
    """
    import resource, sys, torch
    torch.set_num_threads(1)
    from turbopi.checkpoint import load_model, load_opened, open_checkpoint
    load_model(sys.argv[1])  # the interpreter, torch and every lazy import are in memory from here on

    def resident():
        # VmHWM is this program's own peak; ru_maxrss would start from its parent's, which fork hands down.
        with open("/proc/self/status") as status:
            pairs = [line.split(":", 1) for line in status if line.startswith("Vm")]
        return {key: int(value.split()[0]) * 1024 for key, value in pairs}

    before = resident()["VmRSS"]
    model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    print(max(resident()["VmHWM"] - before, 0) / kept, kept)
    """
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_stays_below_a_fifth_more_than_the_weights(tmp_path, copy_of, dtype):
    """The file is float32; loaded as bfloat16 the largest tensor alone, read whole, would break the bound."""
    small = preset("pi0-small")
    big = dataclasses.replace(
        small,
        vlm=dataclasses.replace(small.vlm, width=768, mlp_dim=3072),
        vocab_size=96_000,
        vision=dataclasses.replace(small.vision, width=384),
    )
    path = init_checkpoint(tmp_path / "big", big)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, copy_of("openpi-pi0"), path, dtype], capture_output=True, text=True, check=True
    )
    ratio, kept = map(float, run.stdout.split())
    assert kept > 200e6
    assert 0.9 < ratio <= 1.2, f"peak is {ratio:.3f} times the {kept / 1e6:.0f} MB kept"


def test_parameter_shapes_are_in_reading_order(copy_of):
    names = list(open_checkpoint(copy_of("jax-pi05")).tensors.infos)
    assert set(names) == set(parameter_shapes(preset("pi05-tiny")))
    gate, up = (names.index(f"vlm.layers.0.mlp.{part}.weight") for part in ("gate_proj", "up_proj"))
    assert up == gate + 1, "both lie in one array, which is read once"
