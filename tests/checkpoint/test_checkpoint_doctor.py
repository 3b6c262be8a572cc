import json
import re
import shutil

import pytest
import safetensors.numpy
import torch
from checkpoint_tools import FIXTURE_HEADS, edit_json, edit_weights

from turbopi.checkpoint import Check, Report, examine
from turbopi.checkpoint.names import EMBEDDING, TIED_HEAD, to_lerobot, to_openpi
from turbopi.errors import CheckpointError
from turbopi.transforms import shipped_tokenizer

STATS = "assets/physical-intelligence/libero/norm_stats.json"


@pytest.fixture(autouse=True)
def _no_cached_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "no-cache"))


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


@pytest.mark.parametrize("layout", ["openpi", "lerobot", "jax"])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_good_checkpoint_passes_and_is_described(copy_of, layout, kind):
    report = examine(copy_of(f"{layout}-{kind}"))
    # openpi's pi0 for LIBERO has horizon 50; the tiny preset's 10 is worth a warning.
    assert {check.name for check in report.warned} == ({"horizon"} if kind == "pi0" else set())
    assert report.failed == ()
    assert report.fact("format") == layout
    assert report.fact("model") == kind
    assert report.fact("horizon") == "10 actions of 32"
    assert report.fact("robot") == "libero"
    assert report.fact("dtypes") == "float32 100.0%"
    assert "base_0_rgb ← observation/image" in report.fact("camera slots")
    assert report.fact("state stats").startswith("8 numbers, quantile" if kind == "pi05" else "8 numbers, mean_std")
    assert report.fact("tokenizer").endswith("(1,024 ids)")
    spelled = "state spelled in the prompt" if kind == "pi05" else "the robot decides"
    assert spelled in report.fact("prompt")
    assert report.fact("parameters") == {"pi0": "961,120", "pi05": "1,041,824"}[kind]
    assert report.fact("weight bytes") == f"{4 * int(report.fact('parameters').replace(',', '')):,}"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    with pytest.raises(KeyError):
        report.fact("colour")


def edit_stats(change):
    def spoil(path):
        file = path / STATS
        value = json.loads(file.read_text())
        change(value["norm_stats"])
        file.write_text(json.dumps(value))

    return spoil


def set_value(vector, field, index, value):
    return edit_stats(lambda stats: stats[vector][field].__setitem__(index, value))


def resize(vector, length):
    def change(stats):
        for field, values in stats[vector].items():
            stats[vector][field] = (values * 9)[:length]

    return edit_stats(change)


def spoil_weight(name, index, value):
    def change(weights):
        weights[to_openpi(name)].view(-1)[index] = value

    return lambda path: edit_weights(path, change)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def declare_turbopi(**changes):
    def spoil(path):
        value = json.loads((path / "config.json").read_text())
        value["turbopi"].update(changes)
        (path / "config.json").write_text(json.dumps(value))

    return spoil


def untie(path):
    edit_weights(path, lambda w: w.__setitem__(to_openpi(EMBEDDING), w[to_openpi(TIED_HEAD)] + 1))


PLANTED = {
    "stats missing": (lambda p: (p / STATS).unlink(), "norm stats", "no normalisation statistics"),
    "stats not json": (lambda p: (p / STATS).write_text("{"), "norm stats", "not JSON"),
    "stats lack a vector": (edit_stats(lambda s: s.pop("actions")), "norm stats", "no statistics of the actions"),
    "stats NaN": (set_value("state", "q01", 2, float("nan")), "norm stats: state", r"NaN or infinite .*\[2\]"),
    "stats infinite": (set_value("actions", "q99", 1, float("inf")), "norm stats: actions", r"NaN or infinite .*\[1\]"),
    "stats zero width": (set_value("state", "q99", 0, -0.4), "norm stats: state", r"zero width in dimensions \[0\]"),
    "stats upside down": (set_value("actions", "q99", 3, -9.0), "norm stats: actions", r"q99 below q01 .*\[3\]"),
    "stats too short": (resize("state", 7), "norm stats: state length", "7 numbers, robot libero has 8"),
    "stats of another robot": (resize("actions", 14), "norm stats: actions length", "14 numbers, robot libero has 7"),
    "stats too long": (resize("state", 40), "norm stats: state length", "40 numbers, the model takes at most 32"),
    "mean where quantiles are needed": (
        edit_stats(lambda s: s["state"].update(q01=None, q99=None)),
        "norm stats: state",
        "q01 and q99 absent, but this policy normalises by quantile",
    ),
    "tokenizer absent": (lambda p: (p / "tokenizer.model").unlink(), "tokenizer", "no tokenizer found"),
    "tokenizer corrupt": (lambda p: (p / "tokenizer.model").write_text("x"), "tokenizer", "not a sentencepiece model"),
    "untied embeddings": (untie, "embedding", "embed_tokens and lm_head differ"),
    "embedding missing": (
        lambda p: edit_weights(p, lambda w: w.pop(to_openpi(TIED_HEAD))),
        "embedding",
        "neither embed_tokens.weight nor",
    ),
    "truncated": (truncate, "format", "truncated"),
    "tensor missing": (
        lambda p: edit_weights(p, lambda w: w.pop(to_openpi("vlm.norm.weight"))),
        "configuration and tensors",
        r"missing: vlm\.norm\.weight",
    ),
    "misshapen": (
        lambda p: edit_weights(p, lambda w: w.__setitem__("time_mlp_in.bias", torch.zeros(3))),
        "configuration and tensors",
        r"time_mlp_in\.bias has shape \[3\], expected \[64\]",
    ),
    "horizon contradicted": (lambda p: edit_json(p / "config.json", action_horizon=50), "horizon", "action_horizon 50"),
    "horizon absent": (
        lambda p: edit_json(p / "config.json", action_horizon=None, turbopi=FIXTURE_HEADS),
        "configuration and tensors",
        "horizon is unknown",
    ),
    "no heads": (
        declare_turbopi(vlm={"kv_heads": 0}, expert={"head_dim": "32"}),
        "configuration and tensors",
        r"vlm\.kv_heads 0, expert\.head_dim '32', expected integers of at least 1",
    ),
    "kind": (declare_turbopi(kind="pi0"), "model kind", r"weights of pi05, but turbopi\.kind says 'pi0'"),
    "no kind": (
        lambda p: edit_weights(p, lambda w: [w.pop(f"time_mlp_in.{x}") for x in ("weight", "bias")]),
        "model kind",
        "neither of time_mlp_in",
    ),
    "NaN weights": (spoil_weight("vlm.norm.weight", 5, float("nan")), "values", r"1 tensors: vlm\.norm\.weight"),
    "infinite weights": (spoil_weight(TIED_HEAD, -1, float("inf")), "values", r"1 tensors: vlm\.embed_tokens"),
    "config not json": (lambda p: (p / "config.json").write_text("]"), "format", "not valid JSON"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "format", "no checkpoint that can be read"),
    "origin malformed": (lambda p: edit_json(p / "config.json", turbopi_origin=[]), "format", "turbopi_origin"),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defects_are_caught(copy_of, defect):
    spoil, name, detail = PLANTED[defect]
    path = copy_of("openpi-pi05")
    spoil(path)
    report = examine(path)
    failed = {check.name: check for check in report.failed}
    assert name in failed, statuses(report)
    assert re.search(detail, failed[name].detail)
    assert failed[name].remedy
    assert report.to_dict()["ok"] is False


def test_pi0_weights_declared_pi05_in_lerobots_config(copy_of):
    path = copy_of("fixture-pi0")
    edit_json(path / "config.json", type="pi05")
    check = next(c for c in examine(path).failed if c.name == "model kind")
    assert check.detail == "weights of pi0, but type says 'pi05'"
    assert "correct config.json to pi0" in check.remedy


def test_missing_directory(tmp_path):
    report = examine(tmp_path / "nothing")
    assert [check.name for check in report.failed] == ["format"]


def test_mean_std_and_negative_std(copy_of):
    path = copy_of("openpi-pi0")
    set_value("state", "std", 1, 0.0)(path)
    set_value("actions", "std", 2, -1.0)(path)
    details = {check.name: check.detail for check in examine(path).failed}
    assert "zero width in dimensions [1]" in details["norm stats: state"]
    assert "negative std in dimensions [2]" in details["norm stats: actions"]


def test_upstream_lerobot_fixture(copy_of):
    """Its statistics are 0, 1, 2, …: no width in the first dimension. It has no tokenizer, and untied embeddings."""
    report = examine(copy_of("fixture-pi05"))
    assert report.fact("robot") == "lerobot"
    assert report.fact("convention") == "lerobot"
    assert "image ← observation.images.image" in report.fact("camera slots")
    assert {check.name for check in report.failed} == {"norm stats: state", "norm stats: actions", "tokenizer"}
    assert {check.name for check in report.warned} == {"embedding"}
    assert statuses(report)["lerobot processors"] == "pass"


def test_lerobot_fixture_as_it_is(copy_of):
    path = copy_of("fixture-pi05")
    edit_json(path / "config.json", turbopi=None)
    check = next(c for c in examine(path).failed if c.name == "configuration and tensors")
    assert '{"turbopi": {"vision": {"heads": 4}}}' in check.detail


def test_lerobot_processors_that_disagree(copy_of):
    path = copy_of("lerobot-pi05")
    file = next(path.glob("policy_postprocessor*.safetensors"))
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays | {"action.q99": arrays["action.q99"] + 1}, file)
    value = json.loads((path / "policy_preprocessor.json").read_text())
    value["steps"][3]["config"]["eps"] = 1e-3
    (path / "policy_preprocessor.json").write_text(json.dumps(value))
    checks = [check for check in examine(path).checks if check.name == "lerobot processors"]
    assert [check.status for check in checks] == ["fail", "warn"]
    assert "action.q99" in checks[0].detail
    assert "0.001" in checks[1].detail


def test_embeddings_stored_twice_alike(copy_of):
    path = copy_of("openpi-pi05")
    edit_weights(path, lambda w: w.__setitem__(to_openpi(EMBEDDING), w[to_openpi(TIED_HEAD)].clone()))
    assert statuses(examine(path))["embedding"] == "pass"
    lerobot = copy_of("lerobot-pi05")
    assert statuses(examine(lerobot))["embedding"] == "pass"
    edit_weights(lerobot, lambda w: w.__setitem__(to_lerobot(TIED_HEAD), w[to_lerobot(TIED_HEAD)] + 1))
    assert statuses(examine(lerobot))["embedding"] == "warn"


def test_expectations(copy_of):
    path = copy_of("openpi-pi05")
    assert "you expect 50" in next(c for c in examine(path, horizon=50).failed).detail
    assert {c.name for c in examine(path, robot="aloha").failed} == {
        "norm stats: state length",
        "norm stats: actions length",
    }
    with pytest.raises(ValueError, match="unknown robot"):
        examine(path, robot="roomba")
    edit_json(path / "config.json", n_action_steps=11)
    assert "n_action_steps 11 exceeds" in next(c for c in examine(path).failed).detail
    assert "values" not in statuses(examine(path, scan_values=False))


def test_tokenizer_given_or_too_large(copy_of, tmp_path):
    path = copy_of("upstream-openpi")
    assert statuses(examine(path))["tokenizer"] == "fail"
    given = shutil.copyfile(shipped_tokenizer(), tmp_path / "own.model")
    report = examine(path, tokenizer=given)
    assert report.fact("tokenizer") == f"{given} (1,024 ids)"
    assert "gives ids up to 1023, the embedding has 320 rows" in next(c for c in report.failed).detail


def test_what_the_robot_decides(copy_of):
    path = copy_of("upstream-openpi")
    assert statuses(examine(path, robot="droid"))["prompt"] == "pass"
    (path / "assets" / "droid").rename(path / "assets" / "mystery")
    report = examine(path)
    assert report.fact("robot") == "unknown"
    assert statuses(report)["prompt"] == "warn"
    assert statuses(report)["horizon"] == "pass"
    assert statuses(report)["norm stats: state"] == "pass"
    shutil.copytree(path / "assets" / "mystery", path / "assets" / "droid")
    assert statuses(examine(path))["norm stats"] == "fail"
    assert statuses(examine(path, robot="droid"))["norm stats: state"] == "pass"
    assert statuses(examine(path, asset_id="mystery"))["norm stats: state"] == "pass"


def test_a_robot_described_by_lerobots_features(copy_of):
    path = copy_of("lerobot-pi05")
    assert examine(path).fact("robot") == "libero"
    report = examine(path, robot="lerobot")
    assert report.fact("robot") == "lerobot"
    assert "left_wrist_0_rgb ← observation.images.left_wrist_0_rgb" in report.fact("camera slots")
    assert examine(copy_of("openpi-pi05"), robot="lerobot").fact("robot") == "unknown"


def test_lerobot_without_features_has_no_robot(copy_of):
    path = copy_of("fixture-pi05")
    edit_json(path / "config.json", output_features=None)
    assert examine(path).fact("robot") == "unknown"


def test_padded_statistics_have_zero_width_beyond_the_robot(copy_of):
    path = copy_of("openpi-pi05")

    def pad(stats):
        for vector in stats.values():
            for field, values in vector.items():
                vector[field] = values + [0.0] * (32 - len(values))

    edit_stats(pad)(path)
    assert statuses(examine(path))["norm stats: state"] == "pass"
    (path / "assets" / "physical-intelligence").rename(path / "assets" / "someone")
    (path / "assets" / "someone" / "libero").rename(path / "assets" / "someone" / "arm")
    report = examine(path)
    assert report.fact("robot") == "unknown"
    assert statuses(report)["norm stats: state"] == "pass"


def test_damaged_jax_files(copy_of):
    path = copy_of("jax-pi0")
    for file in (path / "params").rglob("d/*"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    assert "copy or download it again" in next(c for c in examine(path).failed if c.name in ("format", "values")).detail


def test_damage_met_while_scanning(copy_of, monkeypatch):
    def cut(source, name):
        raise CheckpointError("it was cut while in use")

    monkeypatch.setattr("turbopi.checkpoint.doctor.read_tensor", cut)
    assert "cut while in use" in next(c for c in examine(copy_of("openpi-pi0")).failed if c.name == "values").detail


def test_a_check_without_remedy_is_a_mistake():
    with pytest.raises(ValueError, match="without a remedy"):
        Check("x", "fail", "bad")
    assert Check("x", "pass", "good").remedy == ""
