"""lerobot's policy directories: the processors' JSON and statistics beside the weights (SPEC 3).

lerobot rejects a config.json with fields it does not know, so what this package adds to such a directory goes into a
file of its own, `turbopi.json`; it is also read from config.json if it stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import ModelConfig
from ..errors import CheckpointError
from ..transforms.normalize import DatasetStats, NormMode, stats_from_lerobot
from .tensors import FLOATS, SafetensorsFile, TensorInfo, read_json, write_safetensors
from .writing import write_json

SIDE_FILE = "turbopi.json"
PREPROCESSOR = "policy_preprocessor"
POSTPROCESSOR = "policy_postprocessor"
NORMALIZER = "normalizer_processor"
UNNORMALIZER = "unnormalizer_processor"
RELATIVE_ACTIONS = "relative_actions_processor"
TOKENIZER_NAME = "google/paligemma-3b-pt-224"
EPS = 1e-8

_MODES: dict[str, NormMode] = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
_MODE_NAMES = {mode: name for name, mode in _MODES.items()}


@dataclass(frozen=True)
class Processors:
    """What the two processor files say.

    Attributes:
        arrays: all statistics, by lerobot's names; the action's are the postprocessor's.
        pre_action: the action's statistics as the preprocessor holds them.
        eps: of the normaliser.
        norm_map: normalisation by feature type, such as {"STATE": "QUANTILES"}.
    """

    arrays: Mapping[str, np.ndarray]
    pre_action: Mapping[str, np.ndarray]
    eps: float
    norm_map: Mapping[str, str]

    def stats(self) -> DatasetStats:
        """The statistics. Raises CheckpointError if a vector has none or malformed ones."""
        try:
            return stats_from_lerobot(self.arrays)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def mode(self, feature: str) -> NormMode:
        """Normalisation of feature type `feature` ("STATE" or "ACTION"). Raises CheckpointError for other schemes."""
        name = self.norm_map.get(feature, "IDENTITY")
        if name not in _MODES:
            raise CheckpointError(
                f"{feature} is normalised by {name!r}, expected {' or '.join(_MODES)}; no π0 or π0.5 policy uses others"
            )
        return _MODES[name]


def has_processors(directory: Path) -> bool:
    """Whether the two processor files are there."""
    return all((directory / f"{name}.json").is_file() for name in (PREPROCESSOR, POSTPROCESSOR))


def read_processors(directory: Path) -> Processors:
    """Read both processor files, finding the normaliser by its name and not by its place in the list.

    Raises FileNotFoundError or CheckpointError that names the file and what it lacks.
    """
    pre_steps, post_steps = (_steps(directory / f"{name}.json") for name in (PREPROCESSOR, POSTPROCESSOR))
    pre = _step(pre_steps, NORMALIZER, directory / f"{PREPROCESSOR}.json")
    post = _step(post_steps, UNNORMALIZER, directory / f"{POSTPROCESSOR}.json")
    before, after = _state(directory, pre), _state(directory, post)
    action = {name: value for name, value in after.items() if name.startswith("action.")}
    rest = {name: value for name, value in before.items() if not name.startswith("action.")}
    eps, modes = pre["config"].get("eps", EPS), pre["config"].get("norm_map", {})
    if not isinstance(eps, (int, float)) or not isinstance(modes, dict):
        raise CheckpointError(
            f"{directory / PREPROCESSOR}.json: {NORMALIZER} has eps {eps!r} and norm_map {modes!r}, expected a number "
            "and an object; restore the file"
        )
    return Processors(
        arrays={**rest, **action},
        pre_action={name: value for name, value in before.items() if name.startswith("action.")},
        eps=float(eps),
        norm_map=modes,
    )


def _steps(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy it from the lerobot policy directory")
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f'{path} has no list of "steps"; restore it from the lerobot policy directory')
    return steps


def _step(steps: list[dict[str, Any]], name: str, path: Path) -> dict[str, Any]:
    found = [step for step in steps if step.get("registry_name") == name]
    if len(found) != 1 or not isinstance(found[0].get("config"), dict):
        raise CheckpointError(
            f"{path} has {len(found)} steps named {name}, expected one, with a config; restore the file"
        )
    return found[0]


def _state(directory: Path, step: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(step.get("state_file"), str):
        raise CheckpointError(
            f"{directory}: step {step['registry_name']} names no state_file, so there are no statistics; "
            "save the policy again together with its dataset's statistics"
        )
    path = directory / Path(step["state_file"]).name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though {step['registry_name']} names it; copy it here")
    file = SafetensorsFile(path)
    arrays = {}
    for name, entry in file.slices.items():
        if entry.info.dtype in FLOATS:
            target = torch.empty(entry.info.shape, dtype=torch.float64)
            file.read_into(name, target)
            arrays[name] = target.numpy()
    return arrays


def config_json(config: ModelConfig, stats: DatasetStats | None, modes: Mapping[str, NormMode]) -> dict[str, Any]:
    """The part of lerobot's config.json that `config` and the statistics decide."""
    size = config.vision.image_size
    slots = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    slots += [f"camera_{index}_rgb" for index in range(len(slots), config.cameras)]
    cameras = {f"observation.images.{slot}": _feature("VISUAL", 3, size, size) for slot in slots[: config.cameras]}
    state, actions = (stats.state.dims, stats.actions.dims) if stats else (config.state_dim, config.action_dim)
    return {
        "type": config.kind,
        "n_obs_steps": 1,
        "input_features": {**cameras, "observation.state": _feature("STATE", state)},
        "output_features": {"action": _feature("ACTION", actions)},
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "min_period": config.min_period,
        "max_period": config.max_period,
        "image_resolution": [size, size],
        "empty_cameras": 0,
        "tokenizer_max_length": config.max_tokens,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": _MODE_NAMES[modes["state"]],
            "ACTION": _MODE_NAMES[modes["actions"]],
        },
        "use_relative_actions": False,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": None,
    }


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def write_processors(directory: Path, config: Mapping[str, Any], stats: DatasetStats) -> None:
    """Write both processor files for lerobot's `config`, and the statistics in float64, so that nothing is lost."""
    arrays = {
        f"{vector}.{name}": torch.tensor(values, dtype=torch.float64)
        for vector, part in (("observation.state", stats.state), ("action", stats.actions))
        for name, values in part.to_dict().items()
        if values is not None
    }
    actions, shared = config["output_features"], {"eps": EPS, "norm_map": config["normalization_mapping"]}
    normalizer = {**shared, "features": {**config["input_features"], **actions}}
    post = [
        _named(UNNORMALIZER, **shared, features=actions),
        _named("absolute_actions_processor", enabled=config["use_relative_actions"]),
        _named("device_processor", device="cpu", float_dtype=None),
    ]
    _write_pipeline(directory, PREPROCESSOR, _preprocessor_steps(config, normalizer), arrays)
    _write_pipeline(directory, POSTPROCESSOR, post, arrays)


def _named(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _preprocessor_steps(config: Mapping[str, Any], normalizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    relative = _named(
        RELATIVE_ACTIONS,
        enabled=config["use_relative_actions"],
        exclude_joints=config["relative_exclude_joints"],
        action_names=config["action_feature_names"],
    )
    tokenizer = _named(
        "tokenizer_processor",
        max_length=config["tokenizer_max_length"],
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name=TOKENIZER_NAME,
    )
    first = [_named("rename_observations_processor", rename_map={}), _named("to_batch_processor")]
    device = _named("device_processor", device="cpu", float_dtype=None)
    normalize = _named(NORMALIZER, **normalizer)
    if config["type"] == "pi0":
        return [*first, _named("pi0_new_line_processor"), tokenizer, device, relative, normalize]
    return [*first, relative, normalize, _named("pi05_prepare_state_tokenizer_processor_step"), tokenizer, device]


def _write_pipeline(
    directory: Path, name: str, steps: list[dict[str, Any]], arrays: Mapping[str, torch.Tensor]
) -> None:
    for index, step in enumerate(steps):
        if step["registry_name"] in (NORMALIZER, UNNORMALIZER):
            step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
            infos = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in arrays.items()}
            write_safetensors(directory / step["state_file"], infos, arrays.__getitem__, {})
    write_json(directory / f"{name}.json", {"name": name, "steps": steps})
