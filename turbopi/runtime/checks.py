"""Settings against the engine and the model that are to honour them, before the first tick."""

from __future__ import annotations

from ..config import ModelConfig
from ..engine import Engine
from ..engine.integrate import IntegratingEngine
from ..engine.partial import PartialEngine
from ..engine.reuse import AgainEngine, PromptEngine
from .config import ChunkingConfig, ReuseConfig, RtcConfig, RuntimeConfig


def check_engine(engine: Engine, config: RuntimeConfig) -> None:
    """Raise ValueError if the engine or its model cannot do what is asked; the message names what can."""
    model = engine.config
    if config.reuse is not None:
        _check_reuse(engine, config.reuse)
    if config.prompt_cache and not isinstance(engine, PromptEngine):
        raise ValueError(
            f"prompt_cache needs an engine that takes an embedded prompt, such as 'eager', not {_name(engine)}"
        )
    if (config.times is not None or config.rtc is not None) and not isinstance(engine, IntegratingEngine):
        what = "rtc" if config.rtc is not None else "times"
        raise ValueError(
            f"{what} needs an engine that takes its steps one by one: 'eager' or 'turbo', not {_name(engine)}"
        )
    chunking = config.chunking
    if config.rtc is not None:
        _check_rtc(engine, config.rtc, chunking, model)
    if chunking is not None and chunking.replan > model.horizon:
        raise ValueError(f"chunking.replan {chunking.replan} is beyond the model's horizon of {model.horizon} actions")
    if chunking is not None and chunking.delay >= model.horizon:
        raise ValueError(
            f"chunking.delay {chunking.delay} leaves nothing of a chunk of {model.horizon} actions; a chunk must "
            "outlast the inference that makes the next"
        )


def check_robot(config: RuntimeConfig, action_dims: int | None) -> None:
    """Raise ValueError for a setting that speaks of actions which the robot does not have; None: any number."""
    if action_dims is None:
        return
    phase = None if config.reuse is None else config.reuse.phase
    if phase is not None and phase.gripper >= action_dims:
        raise ValueError(f"PhaseGate.gripper is {phase.gripper}, the robot's actions have {action_dims} dimensions")
    if config.chunking is not None and len(config.chunking.hold) not in (0, action_dims):
        raise ValueError(
            f"chunking.hold has {len(config.chunking.hold)} numbers, the robot's actions have {action_dims}; give one "
            "a dimension, null to keep the last action's, or none at all"
        )


def _check_reuse(engine: Engine, reuse: ReuseConfig) -> None:
    model = engine.config
    spelled = model.kind == "pi05" and model.state_in_prompt is not False
    if reuse.mode == "state_only" and model.kind == "pi05" and not spelled:
        raise ValueError("reuse mode 'state_only' needs a state in the model's input; this π0.5 has none in its prompt")
    if reuse.layers is not None and reuse.layers > model.vlm.depth:
        raise ValueError(f"reuse.layers is {reuse.layers}, the prefix has {model.vlm.depth} layers")
    whole = reuse.mode == "full" and reuse.synchronised
    if whole or (reuse.mode == "state_only" and model.kind == "pi0"):
        return
    asked = f"mode {reuse.mode!r}" if reuse.synchronised else "synchronised=False"
    if not isinstance(engine, PartialEngine):
        raise ValueError(
            f"reuse with {asked} recomputes part of a prefix, which the engine 'eager' can and {_name(engine)} cannot; "
            "use mode 'full', or 'eager'"
        )
    if model.invalid_tokens != "dropped":
        raise ValueError(f"reuse with {asked} needs invalid_tokens='dropped', the model has {model.invalid_tokens!r}")


def _check_rtc(engine: Engine, rtc: RtcConfig, chunking: ChunkingConfig | None, model: ModelConfig) -> None:
    if rtc.method != "guided" and isinstance(engine, AgainEngine):
        raise ValueError(
            f"rtc.method {rtc.method!r} needs the model itself, which the engine 'eager' runs; {_name(engine)} does "
            "'guided'"
        )
    # A controller knows how far it has come, whatever rtc says, and tells of chunks that end too soon.
    executed, setting = (rtc.executed, "rtc.executed") if chunking is None else (chunking.replan, "chunking.replan")
    if executed >= model.horizon:
        raise ValueError(
            f"rtc: {setting} {executed} leaves nothing of a chunk of {model.horizon} actions to continue from; "
            "infer again before the chunk is over"
        )
    if chunking is None and rtc.executed + rtc.delay > model.horizon:
        raise ValueError(
            f"rtc: {rtc.executed} actions executed and a delay of {rtc.delay} exceed the model's horizon of "
            f"{model.horizon}: the chunk would be over before the next one is there"
        )
    if rtc.horizon is not None and rtc.horizon > model.horizon:
        raise ValueError(f"rtc.horizon {rtc.horizon} is beyond the model's horizon of {model.horizon} actions")


def _name(engine: Engine) -> str:
    return f"engine {engine.name!r}"
