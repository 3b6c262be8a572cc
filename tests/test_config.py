import dataclasses

import pytest

from turbopi import RuntimeConfig
from turbopi.config import PRESETS, GemmaConfig, ModelConfig, VisionConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_published_sizes() -> None:
    pi0, pi05 = preset("pi0"), preset("pi05")
    assert (pi0.prefix_slots, pi05.prefix_slots) == (816, 968)
    assert (pi0.suffix_tokens, pi05.suffix_tokens) == (51, 50)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown preset 'pi1'; known: pi0, pi05, pi0-small"):
        preset("pi1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pi1"}, "ModelConfig.kind must be one of 'pi0', 'pi05', got 'pi1'"),
        ({"numerics": "fast"}, "numerics must be one of 'exact'"),
        ({"invalid_tokens": "kept"}, "invalid_tokens must be one of"),
        ({"state_in_prompt": 1.5}, "state_in_prompt must be one of"),
        ({"horizon": 0}, "horizon must be an integer of at least 1, got 0"),
        ({"horizon": True}, "horizon must be an integer"),
        ({"min_period": 5.0}, "need 0 < min_period < max_period"),
        ({"expert": GemmaConfig(64, 2, 96, 8, 1, 32)}, "vlm.depth 3 differs from expert.depth 2"),
        ({"expert": GemmaConfig(65, 3, 96, 8, 1, 32)}, "expert.width must be even"),
    ],
)
def test_model_config_checks_itself(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("pi05-tiny"), **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(10, 1, 4, 3), "width 10 is not divisible by heads 3"),
        (lambda: VisionConfig(12, 1, 4, 3, 14, 57), "image_size 57 is not a multiple of patch 14"),
        (lambda: GemmaConfig(8, 1, 4, 3, 2, 4), "heads 3 is not a multiple of kv_heads 2"),
        (lambda: GemmaConfig(8, 1, 4, 2, 1, 5), "head_dim must be even"),
        (lambda: RuntimeConfig(steps=0), "RuntimeConfig.steps must be"),
        (lambda: RuntimeConfig(seed=-1), "RuntimeConfig.seed must be"),
    ],
)
def test_parts_check_themselves(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_from_dict_names_unknown_and_missing_fields() -> None:
    values = preset("pi0-tiny").to_dict()
    del values["horizon"]
    values["chunk"] = 3
    with pytest.raises(ValueError, match="unknown field chunk, missing field horizon"):
        ModelConfig.from_dict(values)
    values = preset("pi0-tiny").to_dict()
    values["vision"] = {"width": 3}
    with pytest.raises(ValueError, match=r"missing field vision\.depth"):
        ModelConfig.from_dict(values)
