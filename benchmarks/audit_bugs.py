"""Twelve bugs that real ports of π0 have had, each to be put into an engine; `audit_planted.py` does.

Into the eager engine a bug goes as an edit of the reference's source, in a copy that is imported under another name.
Into turbo it goes as an operation of the engine's table that computes something else.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import turbopi
from turbopi import ModelConfig, Pi0, kernels
from turbopi.engine.turbo.denoise import Schedules
from turbopi.engine.turbo.ops import Ops
from turbopi.model import flow
from turbopi.model.gemma import ROPE_BASE
from turbopi.quant.fold import Schedule, make_schedule

PACKAGE = Path(turbopi.__file__).parent
STALE_LAYER = 1
_serial = itertools.count()


@dataclass(frozen=True)
class SourceEdit:
    """An edit of the reference: `old` stands once in a file of turbopi/model, and becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes:
        name: in words.
        edit: what it is in the reference's source.
        eager_place: the first tensor that is wrong then.
        turbo: what it is in turbo's table of operations.
        turbo_place: the first tensor that is wrong then, of those that turbo tells.
        schedules: what it is in turbo's schedule, where it is not in an operation.
        masked: the eager engine must compute invalid tokens for the bug to exist.
        kv_heads: key and value heads that it takes.
        needs_earlier_frame: another frame must have gone through the engine before.
    """

    name: str
    edit: SourceEdit
    eager_place: str
    turbo_place: str
    turbo: Callable[[Ops], Ops] = lambda ops: ops
    schedules: Callable[[Pi0], Schedules] | None = None
    masked: bool = False
    kv_heads: int = 1
    needs_earlier_frame: bool = False


# Into turbo


def unmasked(ops: Ops) -> Ops:
    """The prefix attends to the padding of its bucket."""

    def attention(q: Any, keys: Tensor, values: Tensor, lengths: Any, out: Tensor, rows: int, **rest: Any) -> None:
        ops.attention(q, keys[:, :, :rows], values[:, :, :rows], None, out, rows, **rest)

    return replace(ops, attention=attention)


def causal_chunk(ops: Ops) -> Ops:
    """An action sees only itself and those before it."""

    def split(
        q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, out: Tensor, rows: int, *_: Any, **__: Any
    ) -> None:
        length = int(lengths[0])
        for row in range(rows):
            one = slice(row, row + 1)
            seen = slice(0, length + row + 1)
            kernels.attention_ref(q[one], keys[:, :, seen], values[:, :, seen], None, out[one], 1)

    return replace(ops, attention_split=split)


def silu_gate(ops: Ops) -> Ops:
    """SiLU where the gate has a tanh-GELU."""

    def geglu(x: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor, inverse: float = 1.0) -> None:
        gate, up = F.linear(x, weight).float().chunk(2, dim=-1)
        out.copy_(F.silu(gate) * up)

    return replace(ops, geglu_matmul=geglu)


def no_action_bias(ops: Ops) -> Ops:
    """The action projection without its bias."""

    def action_out(out_norm: Tensor, weight: Tensor, bias: Tensor, x_t: Tensor, horizon: int) -> None:
        ops.action_out(out_norm, weight, torch.zeros_like(bias), x_t, horizon)

    return replace(ops, action_out=action_out)


def bf16_frequencies(ops: Ops) -> Ops:
    """Rotary frequencies rounded to bf16."""

    def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
        positions, half = cos.shape
        exponents = torch.arange(half, dtype=torch.float32, device=cos.device) / half
        frequencies = (1.0 / ROPE_BASE**exponents).bfloat16().float()
        angles = torch.arange(positions, dtype=torch.float32, device=cos.device)[:, None] * frequencies
        ops.rotate_and_store(qkv, angles.cos(), angles.sin(), *rest)

    return replace(ops, rotate_and_store=rotate)


def suffix_shifted(ops: Ops) -> Ops:
    """The suffix's positions are one too high."""

    def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor, *rest: Any) -> None:
        if bool((first > 0).any()):
            cos, sin = cos.roll(-1, 0), sin.roll(-1, 0)
        ops.rotate_and_store(qkv, cos, sin, first, *rest)

    return replace(ops, rotate_and_store=rotate)


def bf16_softmax(ops: Ops) -> Ops:
    """Every step of the prefix's softmax rounded to bf16."""

    def attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Any, out: Tensor, rows: int, **_: Any) -> None:
        length = rows if lengths is None else int(lengths[0])
        head_dim = keys.shape[-1]
        heads = q.shape[-1] // head_dim
        k, v = (t[:, :, :length].float().repeat_interleave(heads // t.shape[1], dim=1) for t in (keys, values))
        logits = q.float().view(1, rows, heads, head_dim).transpose(1, 2) @ k.transpose(2, 3)
        out.copy_((rounded_softmax(logits) @ v).transpose(1, 2).flatten(2)[0])

    return replace(ops, attention=attention)


def rounded_softmax(logits: Tensor) -> Tensor:
    """Maximum, difference, exponential, sum and quotient, each in bf16."""
    low = logits.bfloat16()
    powers = (low - low.amax(dim=-1, keepdim=True)).exp()
    return (powers / powers.sum(dim=-1, keepdim=True)).float()


def stale_layer(ops: Ops) -> Ops:
    """What the expert reads of one layer is what that layer held for the first frame."""
    held: dict[str, Tensor] = {}
    layer = {"prefix": -1, "suffix": -1}

    def rotate(*arguments: Any) -> None:
        first, keys = arguments[3], arguments[5]
        if not bool((first > 0).any()):
            layer["prefix"] = 0 if layer["suffix"] >= 0 else layer["prefix"] + 1
            layer["suffix"] = -1
            ops.rotate_and_store(*arguments)
            if layer["prefix"] == STALE_LAYER and "first" not in held:
                held["first"] = keys.clone()
            return
        layer["suffix"] += 1
        if layer["suffix"] == STALE_LAYER:
            keys[:, :, : int(first[0])] = held["first"][:, :, : int(first[0])]
        ops.rotate_and_store(*arguments)

    return replace(ops, rotate_and_store=rotate)


def swapped_heads(ops: Ops) -> Ops:
    """Key and value heads in the wrong order."""

    def swapped(attention: Callable[..., None]) -> Callable[..., None]:
        def call(q: Tensor, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> None:
            attention(q, keys.flip(1), values.flip(1), *rest, **named)

        return call

    return replace(ops, attention=swapped(ops.attention), attention_split=swapped(ops.attention_split))


def rounded_actions(ops: Ops) -> Ops:
    """x_t kept in bf16 between the steps."""

    def action_out(out_norm: Tensor, weight: Tensor, bias: Tensor, x_t: Tensor, horizon: int) -> None:
        ops.action_out(out_norm, weight, bias, x_t, horizon)
        x_t.copy_(x_t.bfloat16())

    return replace(ops, action_out=action_out)


class BrokenSchedules(Schedules):
    """Schedules that `make` folds."""

    def __init__(self, model: Pi0, make: Callable[[Pi0, int], Schedule]) -> None:
        super().__init__(model)
        self._broken, self._of = make, model

    def __call__(self, steps: int) -> Schedule:
        """The broken schedule of `steps`."""
        if steps not in self._made:
            self._made[steps] = self._broken(self._of, steps)
        return self._made[steps]


def without_two_pi(model: Pi0, steps: int) -> Schedule:
    """The time embedding's angles lack 2π."""
    right = flow.time_embedding

    def wrong(time: Tensor, *rest: Any) -> Tensor:
        # The angles are proportional to the time.
        return right((time.double() / (2 * torch.pi)).float(), *rest)

    with (
        mock.patch("turbopi.model.pi0.time_embedding", wrong),
        mock.patch("turbopi.quant.fold.time_embedding", wrong),
    ):
        return make_schedule(model, steps)


def scales_swapped(model: Pi0, steps: int) -> Schedule:
    """Shift and scale of every adaRMS norm exchanged."""
    schedule = make_schedule(model, steps)
    assert schedule.modulation is not None
    return replace(schedule, modulation=schedule.modulation[:, :, [1, 0, 2]].contiguous())


# Into the reference's source

FIRST_PREFIX, FIRST_STEP = "prefix.layers.0.", "step0.layers.0."
BUGS: tuple[Bug, ...] = (
    Bug(
        "missing mask: the prefix attends to padding",
        SourceEdit(
            "prefix.py",
            "bias = None if valid is None else attention_bias(valid[:, None, :] & valid[:, :, None])",
            "bias = None",
        ),
        f"{FIRST_PREFIX}probs",
        f"{FIRST_PREFIX}attended",
        unmasked,
        masked=True,
    ),
    Bug(
        "extra mask: causal within the action chunk",
        SourceEdit(
            "expert.py",
            "dtype=torch.bool, device=prefix_visible.device)",
            "dtype=torch.bool, device=prefix_visible.device).tril()",
        ),
        f"{FIRST_STEP}logits",
        f"{FIRST_STEP}attended",
        causal_chunk,
        masked=True,
    ),
    Bug(
        "SiLU for tanh-GELU",
        SourceEdit("gemma.py", 'F.gelu(self.gate_proj(x), approximate="tanh")', "F.silu(self.gate_proj(x))"),
        f"{FIRST_PREFIX}hidden",
        f"{FIRST_PREFIX}hidden",
        silu_gate,
    ),
    Bug(
        "bias dropped from the action projection",
        SourceEdit(
            "pi0.py",
            "self.action_out_proj(out[:, -self.config.horizon :].float())",
            "F.linear(out[:, -self.config.horizon :].float(), self.action_out_proj.weight)",
        ),
        "step0.v_t",
        "step1.x_t",
        no_action_bias,
    ),
    Bug(
        "RoPE in bf16",
        SourceEdit("gemma.py", "if self.bf16_frequencies and dtype == torch.bfloat16:", "if True:"),
        f"{FIRST_PREFIX}q",
        f"{FIRST_PREFIX}q",
        bf16_frequencies,
    ),
    Bug(
        "RoPE off by one in the suffix",
        SourceEdit("expert.py", "positions = cache.lengths[:, None] +", "positions = 1 + cache.lengths[:, None] +"),
        f"{FIRST_STEP}q",
        f"{FIRST_STEP}q",
        suffix_shifted,
    ),
    Bug(
        "2π missing in the time embedding",
        SourceEdit("flow.py", "* 2 * math.pi)", "* 1.0)"),
        "step0.cond",
        f"{FIRST_STEP}norm1",
        schedules=lambda model: BrokenSchedules(model, without_two_pi),
    ),
    Bug(
        "softmax in bf16",
        SourceEdit(
            "gemma.py",
            "weights = logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)",
            "low = logits.bfloat16()\n"
            "        powers = (low - low.amax(dim=-1, keepdim=True)).exp()\n"
            "        weights = (powers / powers.sum(dim=-1, keepdim=True)).to(q.dtype)",
        ),
        f"{FIRST_PREFIX}probs",
        f"{FIRST_PREFIX}attended",
        bf16_softmax,
    ),
    Bug(
        "adaRMS scales in the wrong order",
        SourceEdit("gemma.py", "scale, shift, gate = self", "shift, scale, gate = self"),
        f"{FIRST_STEP}norm1",
        f"{FIRST_STEP}norm1",
        schedules=lambda model: BrokenSchedules(model, scales_swapped),
    ),
    Bug(
        "stale cache of one layer",
        SourceEdit(
            "prefix.py",
            "        return PrefixCache(tuple(keys),",
            f"        self.stale = getattr(self, 'stale', keys[{STALE_LAYER}])\n"
            f"        keys[{STALE_LAYER}] = self.stale\n"
            "        return PrefixCache(tuple(keys),",
        ),
        f"cache.layers.{STALE_LAYER}.k",
        f"cache.layers.{STALE_LAYER}.k",
        stale_layer,
        needs_earlier_frame=True,
    ),
    Bug(
        "key and value heads swapped",
        SourceEdit(
            "gemma.py",
            "t.repeat_interleave(self.group, dim=1) for t in (keys, values)",
            "t.flip(1).repeat_interleave(self.group, dim=1) for t in (keys, values)",
        ),
        f"{FIRST_PREFIX}logits",
        f"{FIRST_PREFIX}attended",
        swapped_heads,
        kv_heads=2,
    ),
    Bug(
        "x_t in bf16 between the steps",
        SourceEdit(
            "pi0.py", "x_t = x_t + (-1.0 / steps) * v_t", "x_t = (x_t + (-1.0 / steps) * v_t).bfloat16().float()"
        ),
        "step1.x_t",
        "step1.x_t",
        rounded_actions,
    ),
)


def with_heads(config: ModelConfig, bug: Bug) -> ModelConfig:
    """A configuration in which the bug can exist."""
    vlm, expert = (replace(tower, kv_heads=bug.kv_heads) for tower in (config.vlm, config.expert))
    return replace(config, vlm=vlm, expert=expert)


def edited_model(model: Pi0, edit: SourceEdit, directory: Path) -> Pi0:
    """The model's weights in an edited copy of the reference, which is written below `directory`.

    Raises ValueError if the edit no longer fits the source.
    """
    name = f"planted_{next(_serial)}"
    package = directory / name
    shutil.copytree(PACKAGE / "model", package / "model", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("config.py", "errors.py"):
        shutil.copy(PACKAGE / file, package / file)
    (package / "__init__.py").touch()
    target = package / "model" / edit.file
    source = target.read_text()
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.file} holds {edit.old!r} {source.count(edit.old)} times, expected once")
    target.write_text(source.replace(edit.old, edit.new))
    sys.path.insert(0, str(directory))
    try:
        importlib.invalidate_caches()
        edited = importlib.import_module(f"{name}.model.pi0").Pi0(model.config)
    finally:
        sys.path.remove(str(directory))
    edited.load_state_dict(model.state_dict())
    dtypes = {key: parameter.dtype for key, parameter in model.named_parameters()}
    for key, parameter in edited.named_parameters():
        parameter.data = parameter.data.to(dtypes[key])
    return edited.eval()  # type: ignore[no-any-return]
