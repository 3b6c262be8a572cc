"""Named combinations exist, can be built, and claim nothing."""

import json
from pathlib import Path

import pytest

from turbopi.cli.options import PolicyOptions
from turbopi.runtime import ReuseConfig, RuntimeConfig
from turbopi.runtime.presets import NOTES, PRESETS, RECOMMENDED, Preset, Success, find_preset, find_runtime

NAMES = [
    "pytorch",
    "pytorch_text_cache",
    "pytorch_kv_reuse",
    "pytorch_kv_reuse_2",
    "pytorch_kv_reuse_4",
    "flash_fp16",
    "flash_fp16_freq1",
    "tensorrt",
    "tensorrt_pipelined",
    "full_trt_benchmark",
    "tensorrt_w8a16",
    "turbo_titan",
    "turbo_titan_freq1",
    "turbo_titan_freq3",
]


def test_every_back_end_of_the_notes_has_its_combination() -> None:
    assert list(NOTES) == NAMES
    assert list(RECOMMENDED) == ["safe", "balanced", "fast"]


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_claimed_before_it_is_measured(name: str) -> None:
    preset = PRESETS[name]
    assert RuntimeConfig.from_dict(preset.runtime.to_dict()) == preset.runtime
    if preset.success is None:
        with pytest.raises(ValueError, match="has not been measured: nothing is claimed for it"):
            preset.stated()


def test_what_is_claimed_stands_in_the_receipt() -> None:
    claimed = {name: preset for name, preset in RECOMMENDED.items() if preset.success is not None}
    assert claimed
    for preset in claimed.values():
        success = preset.success
        assert success is not None
        rows = json.loads((Path(__file__).parents[2] / success.receipt).read_text())["results"]["settings"]
        row = next(row for row in rows if RuntimeConfig.from_dict(row["runtime"]) == preset.runtime)
        assert (row["successes"], row["episodes"]) == (success.successes, success.episodes)
        assert row["engine"] == preset.engine
        assert row["interval"] == pytest.approx([success.low, success.high], abs=1e-4)


def test_a_measured_preset_states_its_interval() -> None:
    preset = Preset("eager", "fp32", RuntimeConfig(), "x", Success(190, 200, 0.91, 0.97, "r.json"))
    assert preset.stated() == "190/200, 91.0 to 97.0 % (r.json)"


def test_by_name_or_file(tmp_path: Path) -> None:
    assert find_runtime("turbo_titan_freq3").reuse == ReuseConfig(every=3)
    (tmp_path / "r.json").write_text(json.dumps({"steps": 2}))
    assert find_runtime(str(tmp_path / "r.json")) == RuntimeConfig(2)
    with pytest.raises(FileNotFoundError, match="'quick' is neither a file nor a preset; presets: safe, balanced"):
        find_runtime("quick")
    with pytest.raises(ValueError, match="unknown preset 'quick'; known: safe"):
        find_preset("quick")


def test_options_of_commands() -> None:
    options = PolicyOptions(Path("ck"), preset="turbo_titan_freq3").keywords()
    assert (options["engine"], options["precision"], options["runtime"].reuse.every) == ("turbo", "bf16", 3)
    assert PolicyOptions(Path("ck"), runtime="fast").keywords()["engine"] == "eager"
    assert PolicyOptions(Path("ck")).keywords()["runtime"] is None
    with pytest.raises(ValueError, match="a preset has a runtime of its own"):
        PolicyOptions(Path("ck"), runtime="fast", preset="fast").keywords()
    with pytest.raises(ValueError, match="preset 'fast' is engine 'turbo' in bf16; leave --engine"):
        PolicyOptions(Path("ck"), preset="fast", engine="eager").keywords()
