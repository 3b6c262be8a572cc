"""`examine`: what a checkpoint is, and everything about it that would make a policy fail or, worse, move wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import ModelConfig
from ..errors import CheckpointError
from ..transforms import ROBOTS, Robot, find_tokenizer, get_robot, load_tokenizer, robot_from_lerobot
from .checkpoint import Checkpoint, open_checkpoint
from .infer_config import declared_kinds, kind_of_tensors
from .names import EMBEDDING, EXPERT_HEAD, HEADS, TIED_HEAD
from .report import Check, Fact, Report
from .stats_checks import check_stats
from .tensors import read_tensor, some
from .writing import dtype_name

LEROBOT = "lerobot"
SCAN_PIECE = 1 << 22


def examine(
    path: str | Path,
    *,
    robot: str | None = None,
    horizon: int | None = None,
    tokenizer: str | Path | None = None,
    asset_id: str | None = None,
    scan_values: bool = True,
) -> Report:
    """Examine the checkpoint directory `path`. Never raises for what is wrong with it: that is in the report.

    Args:
        path: a directory.
        robot: whose policy it should be, "lerobot" for what a lerobot config.json describes; None takes the robot
            that the directory names, if it names one.
        horizon: actions per chunk that you expect.
        tokenizer: the tokenizer file that you will use; None looks where the policy would.
        asset_id: which statistics to look at where there are several.
        scan_values: read every weight in search of NaN and infinity.

    Raises:
        ValueError: `robot` names no known robot.
    """
    directory = Path(path)
    named = get_robot(robot) if robot and robot != LEROBOT else None
    try:
        checkpoint = open_checkpoint(directory)
    except (CheckpointError, FileNotFoundError, ImportError) as error:
        remedy = "give a directory with whole, uncut files; the detail names the one at fault"
        return Report(directory, (), (Check("format", "fail", str(error), remedy),))
    found = named or _robot_of(checkpoint, described=robot == LEROBOT)
    facts, checks = [Fact("format", checkpoint.format)], [Check("format", "pass", f"{checkpoint.format} checkpoint")]
    config, config_checks = _configuration(checkpoint)
    checks += config_checks
    facts += _weight_facts(checkpoint)
    if config:
        facts += _config_facts(config)
        checks += _horizon(checkpoint, config, found, horizon)
        checks += _prompt(config, found)
    checks += _embedding(checkpoint)
    if scan_values:
        checks.append(_values(checkpoint))
    asset = asset_id or (robot if len(checkpoint.asset_ids) > 1 else None)
    stats_facts, stats_checks = check_stats(checkpoint, config, found, asset)
    facts += [*_robot_facts(checkpoint, found), *stats_facts]
    tokenizer_fact, tokenizer_check = _tokenizer(checkpoint, config, Path(tokenizer) if tokenizer else None)
    return Report(directory, (*facts, tokenizer_fact), (*checks, *stats_checks, tokenizer_check))


def _robot_of(checkpoint: Checkpoint, *, described: bool) -> Robot | None:
    """The robot that the asset id names, else (or if `described` is asked for) the one of a lerobot config.json."""
    if checkpoint.robot and not described:
        return ROBOTS[checkpoint.robot]
    features = checkpoint.declared if checkpoint.format == LEROBOT else checkpoint.lerobot_config
    try:
        return None if features is None else robot_from_lerobot(features)
    except ValueError:
        return None


def _configuration(checkpoint: Checkpoint) -> tuple[ModelConfig | None, list[Check]]:
    try:
        kind = kind_of_tensors(checkpoint.tensors.infos)
    except CheckpointError as error:
        return None, [Check("model kind", "fail", str(error), "restore the file: it is not a whole π0 or π0.5 model")]
    wrong = [f"{where} says {k!r}" for where, k in declared_kinds(checkpoint.declared).items() if k != kind]
    if wrong:
        remedy = f"correct config.json to {kind}, or put the right weights here"
        return None, [Check("model kind", "fail", f"weights of {kind}, but {', '.join(wrong)}", remedy)]
    checks = [Check("model kind", "pass", f"{kind}, by its tensors and its declaration")]
    try:
        config = checkpoint.config
    except CheckpointError as error:
        remedy = "correct config.json as the detail says, or restore the tensors at fault from the original file"
        return None, [*checks, Check("configuration and tensors", "fail", str(error), remedy)]
    return config, [*checks, Check("configuration and tensors", "pass", "every tensor is there and has its shape")]


def _weight_facts(checkpoint: Checkpoint) -> Iterator[Fact]:
    infos = {name: info for name, info in checkpoint.tensors.infos.items() if name not in HEADS}
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[dtype_name(info.dtype)] += info.numel
    count = sum(dtypes.values())
    yield Fact("parameters", f"{count:,}")
    yield Fact("weight bytes", f"{sum(info.nbytes for info in infos.values()):,}")
    yield Fact("dtypes", ", ".join(f"{name} {n / max(count, 1):.1%}" for name, n in dtypes.most_common()))
    unused = [name for name in (TIED_HEAD, EXPERT_HEAD) if name in checkpoint.tensors.infos]
    yield Fact("unused heads", ", ".join(unused) or "none")


def _config_facts(config: ModelConfig) -> Iterator[Fact]:
    vision = config.vision
    yield Fact("model", config.kind)
    yield Fact(
        "vision",
        f"width {vision.width}, {vision.depth} layers, mlp {vision.mlp_dim}, {vision.heads} heads, "
        f"{vision.image_size} px in patches of {vision.patch_size}",
    )
    for tower in ("vlm", "expert"):
        g = getattr(config, tower)
        heads = f"{g.heads} heads on {g.kv_heads} of {g.head_dim}"
        yield Fact(tower, f"width {g.width}, {g.depth} layers, mlp {g.mlp_dim}, {heads}")
    yield Fact("vocabulary", f"{config.vocab_size:,}")
    yield Fact("horizon", f"{config.horizon} actions of {config.action_dim}")
    spelled = {
        True: "state spelled in the prompt",
        False: "no state in the prompt",
        None: "the robot decides on the state",
    }
    yield Fact("prompt", f"{config.max_tokens} tokens at most, {spelled[config.state_in_prompt]}")
    yield Fact("numerics", f"{config.numerics}, invalid tokens {config.invalid_tokens}")


def _robot_facts(checkpoint: Checkpoint, robot: Robot | None) -> Iterator[Fact]:
    yield Fact("robot", robot.name if robot else "unknown")
    yield Fact("asset ids", ", ".join(checkpoint.asset_ids) or "none")
    yield Fact("convention", checkpoint.convention)
    if robot:
        slots = [f"{camera.slot} ← {robot.image_name(camera)}" for camera in robot.cameras]
        yield Fact("camera slots", ", ".join(slots))


def _horizon(checkpoint: Checkpoint, config: ModelConfig, robot: Robot | None, expected: int | None) -> Iterator[Check]:
    """Nothing in the weights shows the horizon, so every statement of it must agree."""
    stated = {key: checkpoint.declared[key] for key in ("action_horizon", "chunk_size") if key in checkpoint.declared}
    replan = checkpoint.declared.get("n_action_steps")
    wrong = {key: value for key, value in stated.items() if value != config.horizon}
    if wrong:
        detail = f"used: {config.horizon}, but config.json has {', '.join(f'{k} {v}' for k, v in wrong.items())}"
        yield Check("horizon", "fail", detail, "make both the horizon that the policy was trained with")
    elif expected is not None and expected != config.horizon:
        detail = f"the checkpoint has {config.horizon}, you expect {expected}"
        yield Check("horizon", "fail", detail, "state the trained horizon in config.json, or correct your expectation")
    elif isinstance(replan, int) and replan > config.horizon:
        detail = f"n_action_steps {replan} exceeds the horizon {config.horizon}"
        yield Check("horizon", "fail", detail, "lower n_action_steps, or correct chunk_size")
    else:
        usual = robot.defaults[config.kind].horizon if robot and config.kind in robot.defaults else config.horizon
        if usual != config.horizon:
            detail = f"{config.horizon} actions; openpi's {config.kind} for {robot.name if robot else ''} has {usual}"
            yield Check("horizon", "warn", detail, "make sure that the policy was trained with this horizon")
        else:
            yield Check("horizon", "pass", f"{config.horizon} actions")


def _prompt(config: ModelConfig, robot: Robot | None) -> Iterator[Check]:
    if config.kind == "pi05" and config.state_in_prompt is None and robot is None:
        yield Check(
            "prompt",
            "warn",
            "whether the prompt spells the state is not said, and the robot that would decide is unknown",
            'name the robot, or state it in config.json: {"turbopi": {"state_in_prompt": true}}',
        )
    else:
        yield Check("prompt", "pass", "the prompt's form is known")


def _embedding(checkpoint: Checkpoint) -> Iterator[Check]:
    infos, name = checkpoint.tensors.infos, "embedding"
    if EMBEDDING not in infos:
        detail = "neither embed_tokens.weight nor paligemma.lm_head.weight is in the file"
        yield Check(name, "fail", detail, "restore the file; openpi's holds the embedding under paligemma.lm_head only")
    elif TIED_HEAD not in infos:
        yield Check(name, "pass", "one embedding, tied to the output head")
    elif infos[TIED_HEAD] == infos[EMBEDDING] and _same(checkpoint, TIED_HEAD, EMBEDDING):
        yield Check(name, "pass", "stored twice, under embed_tokens and lm_head, with equal values")
    elif checkpoint.format == "lerobot":
        detail = "embed_tokens and lm_head differ (lerobot trains them untied); embed_tokens is used"
        yield Check(
            name, "warn", detail, "nothing to do, if embed_tokens is the trained one, as lerobot's training leaves it"
        )
    else:
        detail = "embed_tokens and lm_head differ, though openpi ties them: which one was trained cannot be told"
        yield Check(name, "fail", detail, "save the model again, or delete the wrong one from the file")


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    # As bytes: a NaN would make equal tensors unequal.
    a, b = (read_tensor(checkpoint.tensors, name).view(torch.uint8) for name in (first, second))
    return torch.equal(a, b)


def _values(checkpoint: Checkpoint) -> Check:
    """Read every weight that inference uses, in search of NaN and infinity."""
    bad = []
    for name in (name for name in checkpoint.tensors.infos if name not in HEADS):
        try:
            tensor = read_tensor(checkpoint.tensors, name)
        except CheckpointError as error:
            return Check("values", "fail", str(error), "copy or download the damaged file again")
        if not all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(SCAN_PIECE)):
            bad.append(name)
    if bad:
        detail = f"NaN or infinite weights in {len(bad)} tensors: {some(bad)}"
        return Check("values", "fail", detail, "go back to a checkpoint from before training diverged")
    return Check("values", "pass", "all weights are finite")


def _tokenizer(checkpoint: Checkpoint, config: ModelConfig | None, explicit: Path | None) -> tuple[Fact, Check]:
    try:
        path = find_tokenizer(explicit, checkpoint.path)
        size = load_tokenizer(path).vocab_size
    except (FileNotFoundError, ValueError) as error:
        remedy = "copy PaliGemma's tokenizer into the checkpoint as tokenizer.model or tokenizer.json"
        return Fact("tokenizer", "none"), Check("tokenizer", "fail", str(error), remedy)
    fact = Fact("tokenizer", f"{path} ({size:,} ids)")
    if config and size > config.vocab_size:
        detail = f"{path} gives ids up to {size - 1}, the embedding has {config.vocab_size} rows"
        return fact, Check("tokenizer", "fail", detail, "use the tokenizer that the model was trained with")
    return fact, Check("tokenizer", "pass", f"{path.name}, {size:,} ids")
