"""Weight folding: the reference's weights rewritten so that fewer operations give the same numbers (SPEC 1.6).

Pure functions. Every fold is an identity in exact arithmetic; it is computed in float32 (or wider) and rounded once, by
a `Rounding`, which decides how a matrix is kept. The reference model is only read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..model import Pi0
from ..model.flow import time_embedding, time_schedule
from ..model.gemma import AdaRMSNorm, Block, RMSNorm
from ..model.siglip import Block as VisionBlock

W = TypeVar("W")
"""A matrix as a `Rounding` keeps it: a tensor, or what stands for one."""


@dataclass(frozen=True, eq=False)
class Affine:
    """x Wᵀ + b: weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor


class Rounding:
    """Keeps every folded matrix as a tensor of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def brings_bias(self, product: str) -> bool:
        """Whether a product that is added to the residual stream has its own bias, not in the way of the next one."""
        return False

    def keep(self, product: str, weight: Tensor, bias: Tensor | None = None) -> Any:
        """A matrix (out, in) float32 of the product with this name (`product_names`), and its bias if it brings one."""
        return weight.to(self.dtype, copy=True).contiguous()

    def keep_affine(self, product: str, linear: Affine) -> FoldedAffine:
        """The same of a linear whose bias is added by the product itself."""
        return FoldedAffine(self.keep(product, linear.weight), linear.bias.to(self.dtype).contiguous())


@dataclass(frozen=True, eq=False)
class FoldedAffine(Generic[W]):
    """An `Affine` whose weight a `Rounding` has kept."""

    weight: W
    bias: Tensor


CONSTANT = 16.0
"""What the constant hidden unit holds: tanh-GELU leaves it as it is, and dividing by it loses nothing."""


@dataclass(frozen=True, eq=False)
class FoldedVisionBlock(Generic[W]):
    """A SigLIP block behind norms without affine, whose two products onto the residual stream need no bias.

    Attributes:
        qkv: gives q (already scaled), k, v one after the other.
        out: (width, width), without its bias: the stream lacks it from here to the block's end.
        out_bias: (1, width) float32, for the norm in between, which adds it to what it reads.
        fc1: (hidden, width), hidden of `hidden_width`. Unit mlp_dim is `CONSTANT`, those behind it are 0.
        fc2: (width, hidden). Behind the constant unit stand its own bias and `out_bias`.

    A product that brings its bias (`Rounding.brings_bias`) has it beside its weight, and the stream never lacks it:
    `out_bias` is then 0, or the column behind the constant unit.
    """

    qkv: FoldedAffine[W]
    out: W
    out_bias: Tensor
    fc1: FoldedAffine[W]
    fc2: W


@dataclass(frozen=True, eq=False)
class FoldedVision:
    """The SigLIP tower and the projector.

    Attributes:
        patch: (width, 3·p·p) float32, the convolution as a product.
        position: (tokens, width) float32, learned positions plus the convolution's bias.
        blocks: in the tower's dtype.
        projector: with the last LayerNorm's affine in it.
    """

    patch: Tensor
    position: Tensor
    blocks: tuple[FoldedVisionBlock[Any], ...]
    projector: Affine


@dataclass(frozen=True, eq=False)
class FoldedGemmaBlock(Generic[W]):
    """A Gemma block behind norms without weight.

    Attributes:
        qkv: ((heads + 2·kv_heads)·head_dim, width), queries scaled by head_dim^-0.5.
        out: (width, heads·head_dim).
        gate_up: (2·mlp_dim, width), the gate's rows first, unless the `Rounding` keeps them in another order.
        down: (width, mlp_dim).
    """

    qkv: W
    out: W
    gate_up: W
    down: W


@dataclass(frozen=True, eq=False)
class FoldedPrefix:
    """The prefix tower. Of its last layer only keys and values are ever read.

    Attributes:
        embedding: (vocabulary, width), the model's own tensor.
        scale: by which its rows are multiplied.
        blocks: every layer but the last.
        last_keys_values: (2·kv_heads·head_dim, width).
    """

    embedding: Tensor
    scale: float
    blocks: tuple[FoldedGemmaBlock[Any], ...]
    last_keys_values: Any


@dataclass(frozen=True, eq=False)
class FoldedState:
    """π0 only: the state token, and the second linear of the action-time MLP, both float32."""

    state: Affine
    mix: Affine


@dataclass(frozen=True, eq=False)
class FoldedExpert:
    """The action expert. `state` is None for π0.5."""

    blocks: tuple[FoldedGemmaBlock[Any], ...]
    state: FoldedState | None


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything that depends on the number of steps and not on the observation, all float32.

    Attributes:
        action_in: weight (width, action_dim), and a bias for each step (steps, width). For π0 it is action_in_proj
            and the action half of action_time_mlp_in in one, the time half being the bias.
        modulation: π0.5: (steps, 2·depth+1, 3, width), scale, shift and gate of each norm in the order in which they
            run (layer 0 input, layer 0 post, …, final). None for π0.
        action_out: scaled by -1/steps, so that its output is what a step adds to x_t.
    """

    action_in: Affine
    modulation: Tensor | None
    action_out: Affine

    @property
    def steps(self) -> int:
        """Evaluations of the velocity."""
        return self.action_in.bias.shape[0]


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _affine(linear: nn.Linear) -> Affine:
    return Affine(_float(linear.weight), _float(linear.bias))


def fold_rms_norm(weight: Tensor, norm: RMSNorm) -> Tensor:
    """(out, in) float32 such that its product with the bare normed x is weight's with x times (1 + w)."""
    return _float(weight) * (1.0 + _float(norm.weight))


def fold_layer_norm(linear: Affine, norm: nn.LayerNorm) -> Affine:
    """The norm's weight and bias moved into the linear that reads it, float32."""
    weight, bias = _float(norm.weight), _float(norm.bias)
    return Affine(linear.weight * weight, linear.bias + linear.weight @ bias)


def compose(second: Affine, first: Affine) -> Affine:
    """second ∘ first as one linear, multiplied in float64."""
    weight = second.weight.double() @ first.weight.double()
    bias = second.weight.double() @ first.bias.double() + second.bias.double()
    return Affine(weight.float(), bias.float())


def scale_affine(linear: Affine, scale: float) -> Affine:
    """The linear with its output multiplied by `scale`."""
    return Affine(linear.weight * scale, linear.bias * scale)


def _stack(linears: tuple[Affine, ...]) -> Affine:
    return Affine(torch.cat([part.weight for part in linears]), torch.cat([part.bias for part in linears]))


def _to(linear: Affine, dtype: torch.dtype) -> Affine:
    return Affine(linear.weight.to(dtype).contiguous(), linear.bias.to(dtype).contiguous())


def hidden_width(mlp_dim: int) -> int:
    """Hidden units of a folded vision block: at least one more than there were, in multiples of 64."""
    return (mlp_dim // 64 + 1) * 64


def fold_vision_mlp(fc1: Affine, fc2: Affine) -> tuple[Affine, Tensor]:
    """fc1 with a constant unit and zeros behind its own, and fc2 with its bias as that unit's weights; float32."""
    units, width = fc1.weight.shape
    more = hidden_width(units) - units
    constant = fc1.bias.new_zeros(more)
    constant[0] = CONSTANT
    grown = Affine(torch.cat((fc1.weight, fc1.weight.new_zeros(more, width))), torch.cat((fc1.bias, constant)))
    return grown, torch.cat((fc2.weight, torch.outer(fc2.bias, constant / CONSTANT**2)), dim=1)


def fold_vision_block(block: VisionBlock, rounding: Rounding, name: str) -> FoldedVisionBlock[Any]:
    """Both LayerNorms into the linears behind them, q, k, v merged, the softmax's scale into q, two biases into fc2.

    `name` is the block's, such as "vision.layers.0".
    """
    attention = block.self_attn
    head_dim = attention.q_proj.out_features // attention.heads
    query = scale_affine(_affine(attention.q_proj), head_dim**-0.5)
    qkv = _stack((query, _affine(attention.k_proj), _affine(attention.v_proj)))
    out, second = _affine(attention.out_proj), _affine(block.mlp.fc2)
    carried = torch.zeros_like(out.bias) if rounding.brings_bias(f"{name}.out") else out.bias
    last = second.bias + carried
    within = torch.zeros_like(last) if rounding.brings_bias(f"{name}.fc2") else last
    first = fold_layer_norm(_affine(block.mlp.fc1), block.layer_norm2)
    fc1, fc2 = fold_vision_mlp(first, Affine(second.weight, within))
    return FoldedVisionBlock(
        qkv=rounding.keep_affine(f"{name}.qkv", fold_layer_norm(qkv, block.layer_norm1)),
        out=rounding.keep(f"{name}.out", out.weight, out.bias),
        out_bias=carried.clone()[None],
        fc1=rounding.keep_affine(f"{name}.fc1", fc1),
        fc2=rounding.keep(f"{name}.fc2", fc2, last),
    )


def fold_vision(model: Pi0, rounding: Rounding | None = None) -> FoldedVision:
    """The tower; without a `rounding` in its own dtype (float32 under numerics that keep vision there)."""
    tower, embeddings = model.vision, model.vision.embeddings
    rounding = rounding or Rounding(tower.dtype)
    convolution = embeddings.patch_embedding
    assert convolution.bias is not None
    blocks = cast("list[VisionBlock]", list(tower.encoder.layers))
    return FoldedVision(
        patch=_float(convolution.weight).flatten(1).contiguous(),
        position=_float(embeddings.position_embedding.weight) + _float(convolution.bias),
        blocks=tuple(fold_vision_block(block, rounding, f"vision.layers.{i}") for i, block in enumerate(blocks)),
        projector=_to(fold_layer_norm(_affine(model.projector), tower.post_layernorm), tower.dtype),
    )


def _folded(weight: Tensor, norm: nn.Module) -> Tensor:
    """With the norm's weight in it; an adaRMS norm has none."""
    return fold_rms_norm(weight, norm) if isinstance(norm, RMSNorm) else _float(weight)


def keys_values(block: Block) -> Tensor:
    """(2·kv_heads·head_dim, width) float32: the rows of k and v, the input norm folded in."""
    attention = block.self_attn
    merged = torch.cat((attention.k_proj.weight, attention.v_proj.weight))
    return _folded(merged, block.input_layernorm)


def fold_gemma_block(block: Block, rounding: Rounding, name: str) -> FoldedGemmaBlock[Any]:
    """Norm weights (where the norms have any) into q, k, v and gate, up; both merged; the softmax's scale into q.

    `name` is the block's, such as "prefix.layers.0".
    """
    attention, mlp = block.self_attn, block.mlp
    query = _folded(attention.q_proj.weight, block.input_layernorm) * attention.head_dim**-0.5
    merged = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    return FoldedGemmaBlock(
        qkv=rounding.keep(f"{name}.qkv", torch.cat((query, keys_values(block)))),
        out=rounding.keep(f"{name}.out", _float(attention.o_proj.weight)),
        gate_up=rounding.keep(f"{name}.gate_up", _folded(merged, block.post_attention_layernorm)),
        down=rounding.keep(f"{name}.down", _float(mlp.down_proj.weight)),
    )


def fold_prefix(model: Pi0, rounding: Rounding | None = None) -> FoldedPrefix:
    """The prefix tower; the embedding table is shared with the model, not copied."""
    vlm = model.vlm
    rounding = rounding or Rounding(vlm.dtype)
    table = vlm.embed_tokens.weight.detach()
    scale = math.sqrt(vlm.width)
    if vlm.round_scale:
        scale = float(torch.tensor(scale, dtype=table.dtype))
    *blocks, last = vlm.blocks
    return FoldedPrefix(
        embedding=table,
        scale=scale,
        blocks=tuple(fold_gemma_block(block, rounding, f"prefix.layers.{i}") for i, block in enumerate(blocks)),
        last_keys_values=rounding.keep(f"prefix.layers.{len(blocks)}.qkv", keys_values(last)),
    )


def fold_expert(model: Pi0, rounding: Rounding | None = None) -> FoldedExpert:
    """The expert's layers, and for π0 what does not depend on the step."""
    expert = model.expert
    rounding = rounding or Rounding(expert.dtype)
    blocks = tuple(fold_gemma_block(block, rounding, f"expert.layers.{i}") for i, block in enumerate(expert.blocks))
    if model.config.kind == "pi05":
        return FoldedExpert(blocks, None)
    return FoldedExpert(blocks, FoldedState(_affine(model.state_proj), _affine(model.action_time_mlp_out)))


def schedule_part(model: Pi0) -> Pi0:
    """The model as `make_schedule` reads it: its parameters for time, actions, state and the expert's norms.

    All others stand on the device "meta", so that who keeps this part does not keep the towers' weights.
    """
    with torch.device("meta"):
        part = Pi0(model.config)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        at_the_top = "." not in owner and owner != "projector"
        if at_the_top or (owner.startswith("expert.") and "norm" in owner):
            setattr(part.get_submodule(owner), leaf, parameter)
    return part


def modulations(model: Pi0, times: list[float]) -> Tensor:
    """π0.5: (steps, 2·depth+1, 3, width) float32 from the reference's own time MLP and adaRMS linears."""
    config = model.config
    device = model.action_in_proj.weight.device
    norms = [norm for block in model.expert.blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    norms.append(model.expert.norm)
    state = torch.zeros(1, config.state_dim, device=device)
    x_t = torch.zeros(1, config.horizon, config.action_dim, device=device)
    table = torch.empty(len(times), len(norms), 3, config.expert.width, device=device)
    for step, t in enumerate(times):
        _, cond = model.embed_suffix(state, x_t, torch.full((1,), t, device=device))
        for row, norm in zip(table[step], norms, strict=True):
            assert isinstance(norm, AdaRMSNorm)
            row.copy_(norm.dense(cond).view(3, -1))
    return table


def _action_time(model: Pi0, times: list[float]) -> Affine:
    """π0: action_in_proj and action_time_mlp_in in one; the bias has a row a step."""
    config, mlp = model.config, _affine(model.action_time_mlp_in)
    width = config.expert.width
    angles = torch.float32 if model.numerics.float32_time_angles else torch.float64
    time = torch.tensor(times, dtype=torch.float32, device=mlp.weight.device)
    embedded = time_embedding(time, width, config.min_period, config.max_period, angles)
    actions = compose(Affine(mlp.weight[:, :width], mlp.bias), _affine(model.action_in_proj))
    bias = actions.bias.double() + embedded.double() @ mlp.weight[:, width:].double().T
    return Affine(actions.weight, bias.float())


def make_schedule(model: Pi0, steps: int) -> Schedule:
    """Fold the times of `steps` evaluations. Raises ValueError if `steps` is less than 1."""
    return fold_times(model, time_schedule(steps, model.numerics.time), -1.0 / steps)


@torch.no_grad()
def fold_times(model: Pi0, times: list[float], delta: float) -> Schedule:
    """Fold evaluations at `times`, each adding `delta` times its velocity; "-1/steps" in `Schedule` is `delta`."""
    steps = len(times)
    action_out = scale_affine(_affine(model.action_out_proj), delta)
    norm = model.expert.norm
    if isinstance(norm, RMSNorm):
        action_out = Affine(fold_rms_norm(action_out.weight, norm), action_out.bias)
        return Schedule(_action_time(model, times), None, action_out)
    action_in = _affine(model.action_in_proj)
    bias = action_in.bias.expand(steps, -1).contiguous()
    return Schedule(Affine(action_in.weight, bias), modulations(model, times), action_out)
