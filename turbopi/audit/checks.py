"""Checks that need no reference: what must hold of any right implementation, asked of the candidate alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from .measure import FLOOR
from .names import place
from .sample import Sample, Subject

SEED = 2026
GAP_FACTOR = 3.0
"""A gap in the prompt, or another place in a batch of images, may cost so many times what the precision itself costs:
sums are grouped otherwise, nothing else may differ."""
FORMATS = {"fp16": (65504.0, 2.0**-24), "bf16": (3.3895e38, 9.2e-41), "e4m3": (448.0, 2.0**-9)}
"""Largest value, and smallest above zero."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was asked.
        passed: None where it could not be asked of this candidate or frame.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Told:
    """A visitor that keeps some tensors and is told of no others."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self.tensors: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        """See `sample.wanted`."""
        return name in self._names

    def __call__(self, name: str, value: Tensor) -> None:
        """See `sample.Visit`."""
        if name in self._names:
            self.tensors[name] = value.cpu().clone()


def _actions(subject: Subject, sample: Sample) -> Tensor:
    return subject.run(sample, Told()).cpu().clone()


def _changed(sample: Sample, **fields: Tensor) -> Sample:
    return replace(sample, inputs=replace(sample.inputs, **fields))


def _apart(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def run_checks(
    subject: Subject, config: ModelConfig, sample: Sample, other: Sample | None, precision_error: float
) -> list[Check]:
    """All of them on one frame.

    Args:
        subject: the candidate.
        config: of its model.
        sample: a frame.
        other: another frame, to have gone through the engine in between.
        precision_error: of the plain run's actions, relative: how far rounding alone may move them.
    """
    right = _actions(subject, sample)
    return [
        _determinism(subject, sample, right),
        _history(subject, sample, other, right),
        _mask_leak(subject, sample, config, right),
        *_cameras(subject, sample, right, precision_error),
        *_positions(subject, sample, right, precision_error),
    ]


def run_tick_checks(tick: Subject, config: ModelConfig, sample: Sample, other: Sample | None) -> list[Check]:
    """Those that can be asked of a whole tick, which tells of no tensors: same bits again, no memory, no leak.

    Args:
        tick: the engine as it is deployed.
        config: of its model.
        sample: a frame.
        other: another frame, to have gone through the engine in between.
    """
    right = _actions(tick, sample)
    checks = [
        _determinism(tick, sample, right),
        _history(tick, sample, other, right),
        _mask_leak(tick, sample, config, right),
    ]
    return [replace(check, name=f"deployed, {check.name}") for check in checks]


def _determinism(subject: Subject, sample: Sample, right: Tensor) -> Check:
    same = torch.equal(_actions(subject, sample), right)
    return Check("determinism: the same frame twice", same, "bit-identical" if same else "actions differ")


def _history(subject: Subject, sample: Sample, other: Sample | None, right: Tensor) -> Check:
    name = "no memory: the frame again, after another one"
    if other is None:
        return Check(name, None, "needs a second frame")
    _actions(subject, other)
    again = _actions(subject, sample)
    same = torch.equal(again, right)
    return Check(name, same, "bit-identical" if same else f"actions moved by {_apart(again, right):.2e}")


def _mask_leak(subject: Subject, sample: Sample, config: ModelConfig, right: Tensor) -> Check:
    """Other contents where nothing is valid, and one more invalid slot; nothing may move."""
    x, generator = sample.inputs, torch.Generator().manual_seed(SEED)
    noise = torch.randint(3, config.vocab_size, x.tokens.shape, generator=generator)
    images = torch.rand(x.images.shape, generator=generator) * 2 - 1
    seen = x.image_mask[:, :, None, None, None]
    leaky = _changed(
        sample,
        tokens=torch.where(x.token_mask, x.tokens, noise),
        images=torch.where(seen, x.images, images),
    )
    invalid = int((~x.token_mask).sum() + (~x.image_mask).sum())
    name = "mask: other padding and missing cameras' pictures"
    if invalid == 0:
        return Check(name, None, "this frame has no invalid token")
    moved = _actions(subject, leaky)
    same = torch.equal(moved, right)
    return Check(name, same, "nothing moved" if same else f"actions moved by {_apart(moved, right):.2e}")


def _told(subject: Subject, sample: Sample, tensors: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    told = Told(tensors)
    actions = subject.run(sample, told).cpu().clone()
    return told.tensors, actions


def _cameras(subject: Subject, sample: Sample, right: Tensor, precision_error: float) -> list[Check]:
    """Exchanged pictures must exchange tokens, and be noticed."""
    names = ("cameras: each slot encodes its own picture", "cameras: their order reaches the actions")
    if len(sample.cameras) < 2:
        return [Check(name, None, "needs two cameras") for name in names]
    a, b = sample.cameras[:2]
    images = sample.inputs.images.clone()
    images[:, [a, b]] = images[:, [b, a]]
    tokens = [f"vision.cam{camera}.tokens" for camera in (a, b)]
    before, _ = _told(subject, sample, tokens)
    after, swapped = _told(subject, _changed(sample, images=images), tokens)
    checks = []
    if set(before) == set(after) == set(tokens):
        off = max(_apart(after[tokens[1 - i]], before[tokens[i]]) for i in range(2))
        allowed = max(FLOOR, GAP_FACTOR * precision_error)
        checks.append(Check(names[0], off <= allowed, f"tokens of exchanged pictures differ by {off:.1e}"))
    else:
        checks.append(Check(names[0], None, "the candidate tells no image tokens"))
    moved = _apart(swapped, right)
    checks.append(Check(names[1], moved > FLOOR, f"exchanging two cameras moves the actions by {moved:.2e}"))
    return checks


def _positions(subject: Subject, sample: Sample, right: Tensor, precision_error: float) -> list[Check]:
    """Order matters, gaps do not."""
    x = sample.inputs
    valid = torch.nonzero(x.token_mask[0]).flatten()
    names = ("positions: the order of the prompt reaches the actions", "positions: a gap in the prompt does not count")
    if len(valid) < 2:
        return [Check(name, None, "needs two prompt tokens") for name in names]
    middle = int(valid[len(valid) // 2])
    different = torch.nonzero(x.tokens[0, valid] != x.tokens[0, middle]).flatten()
    checks = [Check(names[0], None, "all prompt tokens are alike")]
    if len(different):
        tokens = x.tokens.clone()
        pair = [middle, int(valid[different[0]])]
        tokens[:, pair] = tokens[:, pair[::-1]]
        moved = _apart(_actions(subject, _changed(sample, tokens=tokens)), right)
        checks[0] = Check(names[0], moved > 0, f"exchanging two tokens moves the actions by {moved:.2e}")
    gap = torch.zeros_like(x.tokens[:, :1])
    parts = [torch.cat((t[:, :middle], g, t[:, middle:]), dim=1) for t, g in ((x.tokens, gap), (x.token_mask, gap > 0))]
    moved = _apart(_actions(subject, _changed(sample, tokens=parts[0], token_mask=parts[1])), right)
    allowed = max(FLOOR, GAP_FACTOR * precision_error)
    detail = f"an invalid slot in the middle moves the actions by {moved:.2e}, allowed {allowed:.2e}"
    return [*checks, Check(names[1], moved <= allowed, detail)]


def not_finite(told: Mapping[str, Tensor]) -> Check:
    """NaN or infinite values in any tensor."""
    flags = {name: torch.isfinite(value).all() for name, value in told.items() if value.is_floating_point()}
    finite = torch.stack([flag.to("cpu") for flag in flags.values()])
    bad = [name for name, good in zip(flags, finite.tolist(), strict=True) if not good]
    detail = f"all {len(flags)} tensors" if not bad else f"{len(bad)} tensors, the first is {bad[0]}"
    return Check("finite: no NaN, no infinity", not bad, detail)


def ranges(told: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How each tensor uses a format's range; tensors of the steps together.

    Returns:
        By tensor: "amax", "crest" (amax over root mean square: how far outliers stand out), for each format
        "<format>_saturates" (whether amax is beyond it), and "e4m3_lost": the part of the values that becomes zero in
        E4M3 if one scale puts amax at its limit.
    """
    found: dict[str, list[Tensor]] = {}
    for name, value in told.items():
        where = place(name)
        if value.is_floating_point() and not name.endswith(".logits"):
            key = f"expert.{name.partition('.')[2]}" if where.tower == "expert" else name
            found.setdefault(key, []).append(_reach(value.float()))
    rows = []
    for name, parts in found.items():
        amax, square, lost, count = (float(v) for v in _joined(torch.stack(parts).cpu()))
        rms = (square / count) ** 0.5
        row: dict[str, Any] = {"tensor": name, "amax": amax, "crest": amax / rms if rms else 0.0}
        row |= {f"{fmt}_saturates": amax > largest for fmt, (largest, _) in FORMATS.items()}
        rows.append(row | {"e4m3_lost": lost / count})
    return rows


def _reach(value: Tensor) -> Tensor:
    largest, smallest = FORMATS["e4m3"]
    size = value.abs()
    amax = size.amax()
    lost = (size > 0) & (size * largest < amax * smallest / 2)
    return torch.stack([amax, size.square().sum(), lost.sum().float(), torch.full_like(amax, size.numel())])


def _joined(parts: Tensor) -> list[Tensor]:
    return [parts[:, 0].amax(), *(parts[:, i].double().sum() for i in range(1, 4))]
