"""The traps of SPEC section 1 as edits of the reference's source, and what each does to a golden record.

Each mutation replaces text in one file of `turbopi/model`, imports the edited copy as a package of its own, and
measures the tap that must notice. `scripts/trap_table.py` prints the table for docs/parity.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import turbopi
from turbopi.audit.golden import Golden, TapError, compare, open_golden, tap_error
from turbopi.model import Pi0

DATA = Path(__file__).parents[1] / "data"
PACKAGE = Path(turbopi.__file__).parent
_serial = itertools.count()


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        trap: its number in TRAPS.md.
        mistake: what it is, in words.
        file, old, new: the edit; `old` occurs exactly once.
        tap: the intermediate that must notice.
        record: golden record that is compared; "{kind}" runs both kinds.
        tolerance: the tap's relative error without the mistake stays below it and with the mistake rises above.
        kinds: model kinds that can make the mistake.
        invalid_tokens: treatment under which it is made.
    """

    trap: int
    mistake: str
    file: str
    old: str
    new: str
    tap: str
    record: str = "tiny/openpi_{kind}_tiny_f32"
    tolerance: float = 1e-5
    kinds: tuple[str, ...] = ("pi05", "pi0")
    invalid_tokens: str = "masked"


PI05, PI0 = ("pi05",), ("pi0",)

MUTATIONS = [
    Mutation(1, "RoPE frequencies rounded to bf16", "gemma.py", "if self.bf16_frequencies and dtype", "if dtype",
             "prefix.k00", "long/openpi_{kind}_long_bf16_ropefp32_slim", 3e-2),
    Mutation(2, "suffix attends to padding and missing cameras", "expert.py", "torch.cat((prefix_visible[:, None]",
             "torch.cat((torch.ones_like(prefix_visible)[:, None]", "step0.v_t"),
    Mutation(3, "missing camera treated as present", "pi0.py", "torch.cat((image_mask.repeat_interleave",
             "torch.cat((torch.ones_like(image_mask).repeat_interleave", "prefix.hidden00"),
    Mutation(4, "positions counted over padding", "prefix.py", "cells.cumsum(dim=1) - 1",
             "torch.ones_like(cells).cumsum(dim=1) - 1", "prefix.position_ids"),
    Mutation(4, "suffix positions start behind the padding", "expert.py", "positions = cache.lengths[:, None] +",
             "positions = cache.keys[0].shape[2] + 0 * cache.lengths[:, None] +", "step0.v_t"),
    Mutation(5, "1-based positions in the prefix only", "prefix.py", "cells.cumsum(dim=1) - 1", "cells.cumsum(dim=1)",
             "prefix.k00"),
    Mutation(6, "causal mask in the prefix", "prefix.py", "attention_bias(valid[:, None, :] & valid[:, :, None])",
             "attention_bias((valid[:, None, :] & valid[:, :, None]).tril())", "prefix.v01"),
    Mutation(6, "causal mask in the action chunk", "expert.py", "dtype=torch.bool, device=prefix_visible.device)",
             "dtype=torch.bool, device=prefix_visible.device).tril()", "step0.v_t"),
    Mutation(7, "state token sees the actions", "expert.py", "own[0, 1:] = False", "own[0, 1:] = True",
             "step0.suffix_out", kinds=PI0),
    Mutation(8, "erf-GELU in SigLIP", "siglip.py", 'F.gelu(self.fc1(x), approximate="tanh")', "F.gelu(self.fc1(x))",
             "vision.cam0.layer00"),
    Mutation(8, "erf-GELU in Gemma", "gemma.py", 'F.gelu(self.gate_proj(x), approximate="tanh")',
             "F.gelu(self.gate_proj(x))", "prefix.hidden00"),
    Mutation(9, "SiLU gate", "gemma.py", 'F.gelu(self.gate_proj(x), approximate="tanh")', "F.silu(self.gate_proj(x))",
             "prefix.hidden00"),
    Mutation(10, "RMSNorm weight w instead of 1 + w", "gemma.py", "(1.0 + self.weight.float())",
             "self.weight.float()", "prefix.k00"),
    Mutation(11, "RMSNorm eps 1e-5", "gemma.py", "RMS_EPS = 1e-6", "RMS_EPS = 1e-5", "prefix.k00", tolerance=1e-6),
    Mutation(11, "LayerNorm eps 1e-5", "siglip.py", "LAYER_NORM_EPS = 1e-6", "LAYER_NORM_EPS = 1e-5",
             "vision.cam0.layer00", tolerance=1e-6),
    Mutation(12, "token embedding not scaled", "prefix.py", "scale = math.sqrt(self.width)", "scale = 1.0",
             "prefix.embs"),
    Mutation(12, "token embedding scaled twice", "prefix.py", "scale = math.sqrt(self.width)", "scale = self.width",
             "prefix.embs"),
    # The width 128 has sqrt(128) = 11.3137, in bf16 11.3125. Image rows carry GEMM noise; the prompt's must be exact.
    Mutation(13, "embedding scale rounded to bf16", "prefix.py", "if self.round_scale else scale", "if True else scale",
             "prefix.embs (prompt)", "tiny/openpi_{kind}_tiny_bf16", 0.0),
    Mutation(14, "image tokens divided by sqrt(width)", "pi0.py", "self.projector(self.vision(images, tap))",
             "self.projector(self.vision(images, tap)) * self.vlm.width**-0.5", "prefix.embs"),
    Mutation(15, "post_layernorm skipped", "siglip.py", "x = self.post_layernorm(x)", "x = x", "vision.cam0.post_ln"),
    Mutation(16, "2π missing in the time embedding", "flow.py", "* 2 * math.pi)", "* 1.0)", "step0.suffix_embs",
             kinds=PI0),
    Mutation(16, "2π missing in the time embedding", "flow.py", "* 2 * math.pi)", "* 1.0)", "step0.adarms_cond",
             kinds=PI05),
    Mutation(16, "cosines before sines", "flow.py", "(angles.sin(), angles.cos())", "(angles.cos(), angles.sin())",
             "step0.adarms_cond", kinds=PI05),
    Mutation(16, "cosines before sines", "flow.py", "(angles.sin(), angles.cos())", "(angles.cos(), angles.sin())",
             "step0.suffix_embs", kinds=PI0),
    Mutation(17, "time angles in float32", "pi0.py", "torch.float32 if self.numerics.float32_time_angles else torch.float64",
             "torch.float32", "step0.adarms_cond", tolerance=1e-6, kinds=PI05),
    Mutation(18, "second SiLU of the time MLP missing", "pi0.py", "F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(te))))",
             "self.time_mlp_out(F.silu(self.time_mlp_in(te)))", "step0.adarms_cond", kinds=PI05),
    Mutation(18, "SiLU after π0's action MLP", "pi0.py", "mixed = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))",
             "mixed = F.silu(self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined))))", "step0.suffix_embs", kinds=PI0),
    Mutation(19, "adaRMS order shift, scale, gate", "gemma.py", "scale, shift, gate = self", "shift, scale, gate = self",
             "step0.hidden00", kinds=PI05),
    Mutation(19, "adaRMS order scale, gate, shift", "gemma.py", "scale, shift, gate = self", "scale, gate, shift = self",
             "step0.hidden00", kinds=PI05),
    Mutation(19, "scale instead of 1 + scale", "gemma.py", "(1.0 + scale.float())", "scale.float()", "step0.hidden00",
             kinds=PI05),
    Mutation(19, "1 + gate instead of gate", "gemma.py", "normed.to(x.dtype), gate.to(x.dtype)",
             "normed.to(x.dtype), 1 + gate.to(x.dtype)", "step0.hidden00", kinds=PI05),
    Mutation(20, "final norm of the expert not modulated", "expert.py", "return self.norm(h, cond)[0]",
             "return self.norm(h, torch.zeros_like(cond))[0]", "step0.suffix_out", kinds=PI05),
    Mutation(20, "gate of the final norm used", "expert.py", "return self.norm(h, cond)[0]",
             "out, gate = self.norm(h, cond); return out * gate", "step0.suffix_out", kinds=PI05),
    Mutation(21, "time before action", "pi0.py", "torch.cat((actions, te[:, None].expand_as(actions)), dim=-1)",
             "torch.cat((te[:, None].expand_as(actions), actions), dim=-1)", "step0.suffix_embs", kinds=PI0),
    Mutation(22, "RoPE on interleaved pairs", "gemma.py", "first, second = x.chunk(2, dim=-1)\n    return x * cos + torch.cat((-second, first), dim=-1) * sin",
             "rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)\n    cos, sin = (t.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for t in (cos, sin))\n    return x * cos + rotated * sin",
             "prefix.k00"),
    Mutation(23, "t = 1 + s·dt instead of accumulating", "flow.py", 'if mode == "indexed":', "if True:", "step9.time",
             tolerance=0.0),
    Mutation(23, "accumulated t instead of 1 + s·dt", "flow.py", 'if mode == "indexed":', "if False:", "step9.time",
             "tiny/lerobot_{kind}_tiny_f32", 0.0),
    Mutation(24, "last step missing", "flow.py", "    return times", "    return times[:-1]", "actions"),
    Mutation(24, "one step too many", "flow.py", "    return times", "    return [*times, 0.0]", "actions"),
    Mutation(25, "x_t rounded to bf16 between steps", "pi0.py", "x_t = x_t + (-1.0 / steps) * v_t",
             "x_t = (x_t + (-1.0 / steps) * v_t).bfloat16().float()", "step1.x_t"),
    Mutation(25, "noise rounded to bf16", "pi0.py", "x_t = noise", "x_t = noise.bfloat16().float()", "step0.x_t",
             "tiny/openpi_{kind}_tiny_bf16", 0.0),
    Mutation(28, "final norms in bf16: the float32 list is a substring match", "numerics.py",
             "(input|post_attention)_layernorm|norm", "(input|post_attention)_layernorm", "parameters.dtype",
             "long/openpi_{kind}_long_bf16_slim", 0.0),
    Mutation(29, "SigLIP in bf16 where lerobot keeps float32", "numerics.py", "if PROFILES[numerics].float32_vision and",
             "if False and", "vision.cam0.projected", "long/lerobot_{kind}_long_bf16_slim", 1e-5),
    Mutation(29, "SigLIP in float32 where openpi has bf16", "numerics.py", "if PROFILES[numerics].float32_vision and",
             "if True and", "vision.cam0.projected.dtype", "long/openpi_{kind}_long_bf16_slim", 0.0),
    Mutation(32, "hidden logits are -inf", "gemma.py", "HIDDEN_LOGIT = -2.3819763e38", 'HIDDEN_LOGIT = float("-inf")',
             "prefix.hidden00"),
    Mutation(33, "dropping keeps the padded length in positions", "expert.py", "positions = cache.lengths[:, None] +",
             "positions = self.config.prefix_slots + 0 * cache.lengths[:, None] +", "actions", invalid_tokens="dropped"),
    Mutation(33, "dropping cuts to the shortest sample", "prefix.py", "longest = int(lengths.max())",
             "longest = int(lengths.min())", "actions", invalid_tokens="dropped"),
]  # fmt: skip


def golden_of(mutation: Mutation, kind: str) -> Golden:
    """The record that the mutation is measured on."""
    return open_golden(DATA / (mutation.record.format(kind=kind) + ".safetensors"))


def measure(golden: Golden, model: Pi0, mutation: Mutation) -> TapError:
    """The error of the mutation's tap; for "….dtype" 1 if the dtype, or any parameter's, is not the record's.

    "… (prompt)" is the tap's rows of the prompt.
    """
    if mutation.tap.endswith(" (prompt)"):
        name, start = mutation.tap.removesuffix(" (prompt)"), golden.config.cameras * golden.config.vision.tokens
        record = next(value for tap, _, value in golden.records() if tap == name)
        inputs, noise = golden.inputs()
        with model.taps() as taps:
            model.sample_actions(inputs, noise, 1)
        return tap_error(mutation.tap, taps[name][:, start:], record[:, start:])
    if mutation.tap == "parameters.dtype":
        held = {name: parameter.dtype for name, parameter in model.named_parameters()}
        wrong = held != golden.parameter_dtypes()
        return TapError(mutation.tap, float(wrong), float(wrong), not wrong)
    if mutation.tap.endswith(".dtype"):
        name = mutation.tap.removesuffix(".dtype")
        inputs, noise = golden.inputs()
        with model.taps() as taps:
            model.sample_actions(inputs, noise, 1)
        wanted = next(value.dtype for tap, _, value in golden.records() if tap == name)
        wrong = taps[name].dtype != wanted
        return TapError(mutation.tap, float(wrong), float(wrong), not wrong)
    return next(e for e in compare(golden, model, only=(mutation.tap,)) if e.name == mutation.tap)


def mutated_model(mutation: Mutation, golden: Golden, directory: Path) -> Pi0:
    """The record's model, built from an edited copy of the reference."""
    name = f"mutant_{next(_serial)}"
    package = directory / name
    shutil.copytree(PACKAGE / "model", package / "model", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("config.py", "errors.py"):
        shutil.copy(PACKAGE / file, package / file)
    (package / "__init__.py").touch()
    target = package / "model" / mutation.file
    source = target.read_text()
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.old!r} {source.count(mutation.old)} times, expected once")
    target.write_text(source.replace(mutation.old, mutation.new))
    sys.path.insert(0, str(directory))
    try:
        importlib.invalidate_caches()
        pi0 = importlib.import_module(f"{name}.model.pi0")
        float32 = dataclasses.replace(golden, dtype=torch.float32)
        reference = float32.build(numerics=golden.numerics, invalid_tokens=mutation.invalid_tokens)
        model = pi0.Pi0(reference.config)
        model.load_state_dict(reference.state_dict())
        parameter_dtype = importlib.import_module(f"{name}.model.numerics").parameter_dtype
        for parameter_name, parameter in model.named_parameters():
            dtype = parameter_dtype(parameter_name, model.config.numerics, golden.dtype)
            parameter.data = parameter.data.to(dtype)
        return model.eval()
    finally:
        sys.path.remove(str(directory))
