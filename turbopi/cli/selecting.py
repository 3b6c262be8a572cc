"""An order of engines on the command line, as in --engine "tensorrt>turbo>eager": the first that passes its audit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from ..transforms import Robot
    from .options import PolicyOptions


def camera_masks(robot: Robot, slots: int) -> list[Tensor]:
    """Two of (1,slots) bool: the cameras that the robot must send, at least one; and all that it has.

    An engine may run other kernels or graphs for each number of cameras: it is audited with those that it will be sent.
    """
    import torch

    required = [camera.required for camera in robot.cameras]
    if robot.missing_last:
        required.sort(reverse=True)
    if not any(required):
        required[0] = True
    empty = [False] * (slots - len(required))
    return [torch.tensor([[*sent, *empty]]) for sent in (required, [True] * len(required))]


def choose_engine(options: PolicyOptions, keywords: dict[str, Any]) -> str:
    """Audit the engines of `options.engine` in their order on this machine; the name of the one to take.

    The frames are noise, with the robot's cameras: they tell a wrong engine from a right one, not how far a quantised
    one may go. For that there is `turbo-pi audit`.

    Args:
        options: that were given.
        keywords: of `load_policy` for these options; their engine is an order.

    Raises ValueError that tells what spoke against each engine, if none can be taken.
    """
    from ..audit.gate import audit_gate
    from ..audit.sample import Sample
    from ..checkpoint import load_model
    from ..engine import create_engine
    from ..engine.selection import parse_priority, select_engine
    from ..policy import load_policy, load_quantisation
    from ..quant.observe import synthetic_batches

    console = Console(stderr=True, soft_wrap=True)
    names = parse_priority(keywords["engine"])
    policy = load_policy(options.checkpoint, **{**keywords, "engine": "eager"})
    engine: Any = policy.engine
    model, precision = engine.model, engine.precision
    quantisation = load_quantisation(options.checkpoint, precision, model.config, options.plan, options.calibration)
    if quantisation is not None:
        # The eager engine holds a quantised copy; the others start from the weights.
        model = load_model(
            options.checkpoint, engine.device, dtype=model.vlm.embed_tokens.weight.dtype, config=model.config
        )
    reference = load_model(options.checkpoint, engine.device, config=model.config)
    masks = camera_masks(policy.transforms.robot, model.config.cameras)
    samples = [
        Sample(replace(inputs, image_mask=mask), noise, policy.runtime.steps, "noise")
        for (inputs, noise), mask in zip(synthetic_batches(model.config, len(masks)), masks, strict=True)
    ]
    gate = audit_gate(model, precision, reference, samples, quantisation)
    with console.status(f"auditing {' > '.join(names)}"):
        selection = select_engine(names, lambda name: create_engine(name, model, precision, quantisation), gate)
    for tried in selection.tried:
        console.print(f"{'[green]takes' if tried.selected else '[yellow]leaves'} {tried.name}[/]: {tried.why}")
    return selection.name
