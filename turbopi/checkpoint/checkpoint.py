"""One opened checkpoint directory of any of the three formats: everything that can be asked of it, read when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import ModelConfig, ModelKind
from ..errors import CheckpointError
from ..transforms import ROBOTS
from ..transforms.normalize import CONVENTIONS, NORM_MODES, Convention, DatasetStats, NormMode
from ..transforms.stats_file import load_norm_stats
from . import lerobot
from .infer_config import infer_config, kind_of_tensors, tensor_problems
from .names import LEROBOT_PREFIX, from_lerobot
from .orbax import OrbaxSource, is_jax
from .tensors import INDEX, WEIGHTS, TensorSource, open_safetensors, read_json, some

Format = Literal["openpi", "lerobot", "jax"]
FORMATS: tuple[Format, ...] = get_args(Format)
CONFIG = "config.json"
ASSETS = "assets"
NORM_STATS = "norm_stats.json"
ORIGIN = "turbopi_origin"
"""Key beside `turbopi`: what a conversion must remember of its source and the target's format cannot say."""

VECTORS = ("state", "actions")
UNNAMED = "lerobot"
"""Asset id of a lerobot directory's one set of statistics, where no conversion remembered another."""


def robot_assets(robot: str) -> tuple[str, ...]:
    """Asset ids under which openpi's released checkpoints keep this robot's statistics; () for unknown robots."""
    if robot not in ROBOTS:
        return ()
    return tuple(dict.fromkeys(d.asset_id for d in ROBOTS[robot].defaults.values() if d.asset_id))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; weights, statistics and configuration are read and checked only when asked for.

    Attributes:
        path: its directory.
        format: "openpi", "lerobot" or "jax".
        declared: config.json, with `turbopi.json` laid over it.
        tensors: the weights under our names, lazily.
    """

    path: Path
    format: Format
    declared: Mapping[str, Any]
    tensors: TensorSource

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration, checked against the tensors' shapes.

        Raises CheckpointError that lists what contradicts, what is unknown, and every missing, unexpected or
        misshapen tensor.
        """
        try:
            config = infer_config(self.declared, self.tensors.infos, self.heads)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        self.check(config)
        return config

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless the tensors are exactly those of `config`."""
        problems = tensor_problems(self.tensors.infos, self.tensors.unknown, config)
        if problems:
            raise CheckpointError(f"{self.path} does not fit its configuration: {some(problems, 8, '; ')}")

    @property
    def heads(self) -> Mapping[str, Mapping[str, int]]:
        """Head counts that the format spells out; only JAX arrays do."""
        return self.tensors.heads if isinstance(self.tensors, OrbaxSource) else {}

    @property
    def origin(self) -> Mapping[str, Any]:
        """What a conversion remembered of its source: asset_id, convention, norm_modes, lerobot_config."""
        return self.declared.get(ORIGIN, {})

    @property
    def lerobot_config(self) -> Mapping[str, Any] | None:
        """The config.json of the lerobot directory that this is or was converted from; None if there was none.

        It describes the robot: cameras, lengths, and whether actions are relative to the state.
        """
        if self.format == "lerobot" and self.convention == "lerobot":
            return self.declared
        return self.origin.get("lerobot_config")

    @property
    def asset_ids(self) -> tuple[str, ...]:
        """Names of the statistics that the directory holds: paths below assets/; lerobot has one set, often unnamed."""
        if self.format == "lerobot":
            return (str(self.origin.get("asset_id", UNNAMED)),) if lerobot.has_processors(self.path) else ()
        root = self.path / ASSETS
        return tuple(sorted(file.parent.relative_to(root).as_posix() for file in root.rglob(NORM_STATS)))

    @property
    def robot(self) -> str | None:
        """The robot that the asset id names, or None if it names no known one or several sets are there."""
        if len(self.asset_ids) != 1:
            return None
        asset = self.asset_ids[0]
        last = asset.rpartition("/")[2]
        return next((robot for robot in ROBOTS if last == robot or asset in robot_assets(robot)), None)

    def asset_id(self, chosen: str | None = None) -> str:
        """The set of statistics to use: `chosen` (an asset id or a robot's name), or the only one.

        Raises CheckpointError that lists the sets if `chosen` is not among them or none was chosen of several.
        """
        ids = self.asset_ids
        if chosen is not None:
            for wanted in (chosen, *robot_assets(chosen)):
                if wanted in ids:
                    return wanted
            if ids == (UNNAMED,):
                return UNNAMED
        if not ids:
            place = "policy_preprocessor.json" if self.format == "lerobot" else f"{ASSETS}/ASSET_ID/{NORM_STATS}"
            raise CheckpointError(
                f"{self.path} has no normalisation statistics; copy {place} (and what it names) from the training run"
            )
        if chosen is None and len(ids) == 1:
            return ids[0]
        want = f"no statistics {chosen!r}" if chosen else f"{len(ids)} sets of statistics"
        raise CheckpointError(f"{self.path} has {want}; choose one of {', '.join(map(repr, ids))}")

    def norm_stats(self, asset_id: str | None = None) -> DatasetStats:
        """The statistics of `asset_id` (an asset id or a robot's name; needed only where there are several).

        Raises CheckpointError or FileNotFoundError that names the file and what it lacks.
        """
        chosen = self.asset_id(asset_id)
        if self.format == "lerobot":
            return self.processors.stats()
        try:
            return load_norm_stats(self.path / ASSETS / chosen / NORM_STATS)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    @cached_property
    def processors(self) -> lerobot.Processors:
        """lerobot's processor files. Raises as `lerobot.read_processors`."""
        return lerobot.read_processors(self.path)

    @property
    def convention(self) -> Convention:
        """Whose arithmetic of normalisation, images and prompts the weights were trained with."""
        convention: Convention = self.origin.get("convention", "lerobot" if self.format == "lerobot" else "openpi")
        return convention

    @property
    def norm_modes(self) -> dict[str, NormMode]:
        """How "state" and "actions" are normalised: openpi decides by the kind, lerobot by its norm_map (SPEC 2.3)."""
        if "norm_modes" in self.origin:
            return dict(self.origin["norm_modes"])
        if self.format == "lerobot":
            return {"state": self.processors.mode("STATE"), "actions": self.processors.mode("ACTION")}
        mode: NormMode = "quantile" if kind_of_tensors(self.tensors.infos) == "pi05" else "mean_std"
        return {"state": mode, "actions": mode}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint directory `path`, telling its format from its files.

    Raises FileNotFoundError if there is no such directory, CheckpointError if its format is unknown or ambiguous or a
    file is corrupt, ImportError if a JAX checkpoint is given without the extra `turbo-pi[jax]`.
    """
    directory = Path(path)
    if not directory.is_dir():
        hint = "give its directory, not a file" if directory.exists() else "check the path"
        raise FileNotFoundError(f"no checkpoint directory at {directory}; {hint}")
    declared = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if (directory / lerobot.SIDE_FILE).is_file():
        declared = {**declared, **read_json(directory / lerobot.SIDE_FILE)}
    _check_declared(directory, declared)
    torch_files, jax_files = any((directory / name).is_file() for name in (WEIGHTS, INDEX)), is_jax(directory)
    if torch_files and jax_files:
        raise CheckpointError(f"{directory} holds both {WEIGHTS} and params/; move one of them away")
    if jax_files:
        return Checkpoint(directory, "jax", declared, OrbaxSource(directory))
    if not torch_files:
        raise CheckpointError(
            f"{directory} is no checkpoint that can be read: expected {WEIGHTS} or {INDEX} (openpi, lerobot), "
            "or params/_METADATA (openpi's JAX layout)"
        )
    kind = declared.get("type")
    if kind is not None and kind not in get_args(ModelKind):
        raise CheckpointError(f"{directory} holds a lerobot policy of type {kind!r}, expected pi0 or pi05")
    tensors = open_safetensors(directory, from_lerobot)
    prefixed = any(name.startswith(LEROBOT_PREFIX) for name in tensors.stored_names)
    if kind is not None or prefixed or lerobot.has_processors(directory):
        return Checkpoint(directory, "lerobot", declared, tensors)
    return Checkpoint(directory, "openpi", declared, tensors)


def _check_declared(directory: Path, declared: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a part of config.json that is read later has another form than it must have."""
    origin = declared.get(ORIGIN, {})
    if not isinstance(origin, Mapping):
        raise CheckpointError(f"{directory}: {ORIGIN} is {origin!r}, expected an object; remove it")
    modes, convention = origin.get("norm_modes", {}), origin.get("convention", CONVENTIONS[0])
    bad_modes = not isinstance(modes, Mapping) or (
        modes and [modes.get(v) in NORM_MODES for v in VECTORS] != [True, True]
    )
    if convention not in CONVENTIONS or bad_modes or not isinstance(origin.get("lerobot_config", {}), Mapping):
        raise CheckpointError(
            f"{directory}: {ORIGIN} is {dict(origin)!r}; expected a convention of {', '.join(CONVENTIONS)}, norm_modes "
            f"of {', '.join(NORM_MODES)} for state and actions, and a lerobot_config object; convert again"
        )
    features = declared.get("input_features", {})
    if not isinstance(features, Mapping) or not all(isinstance(value, Mapping) for value in features.values()):
        raise CheckpointError(f"{directory}: input_features in config.json is {features!r}, expected objects by name")
