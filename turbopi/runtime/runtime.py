"""One control loop's decisions over the three stages: which of them run at a tick, and with what."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine, TickEngine
from ..engine.integrate import EulerStep, IntegratingEngine, Steering, steps_at, uniform_steps
from ..engine.partial import OldRows, PartialCache, PartialEngine
from ..engine.reuse import AgainEngine, HoldingEngine, PromptEngine, SteppingEngine, copied
from ..model import ModelInput, PrefixCache
from .checks import check_engine, check_robot
from .config import ReuseConfig, RuntimeConfig, Signal
from .deadline import Deadline
from .events import EventLog
from .reuse import Decision, ReuseStatistics, Similar, decide
from .similarity import eventful, image_similarity, state_similarity, token_similarity
from .snapshot import STATE, PrefixInput, Snapshot, check_mixture
from .stream import StreamWatch
from .ticks import StageClock, TickReport


class Runtime:
    """The runtime of one client over an engine that others may use, too. Not for two threads at once.

    Args:
        engine: that runs the stages.
        config: what a tick computes.
        state_dims: dimensions of the robot's state, the first of the model's. None: all of them.
        action_dims: likewise of its actions.

    Raises ValueError for settings that the engine, the model or the robot cannot honour; names those that can.
    """

    def __init__(
        self, engine: Engine, config: RuntimeConfig, state_dims: int | None = None, action_dims: int | None = None
    ) -> None:
        check_engine(engine, config)
        check_robot(config, action_dims)
        self.engine, self.config = engine, config
        self._state_dims, self._action_dims = state_dims, action_dims
        # What the engine offers; asking its protocols takes longer than a decision may.
        self._ticking = engine if isinstance(engine, TickEngine) else None
        self._again = engine if isinstance(engine, AgainEngine) else None
        self._holding = engine if isinstance(engine, HoldingEngine) else None
        self.events = EventLog()
        self.statistics = ReuseStatistics()
        self.deadline = None if config.deadline is None else Deadline(config.deadline, self.events)
        self.watch = None if config.stream is None else StreamWatch(config.stream, self.events)
        self._times = None if config.times is None else steps_at(config.times)
        self.reset()

    def reset(self) -> None:
        """Forget the episode: snapshots, statistics, degradations, events."""
        self.tick = 0
        self._held: Snapshot | None = None
        self._prompt: tuple[bytes, Tensor] | None = None
        self._last_chunk: np.ndarray | None = None
        self._image_tokens: Tensor | None = None
        self.statistics = ReuseStatistics()
        self.events.clear()
        for part in (self.deadline, self.watch):
            if part is not None:
                part.reset()

    def warm_up(self, cameras: int, images: torch.dtype) -> None:
        """Let the engine prepare for prompts of any length with `cameras` valid cameras, so that no tick has to."""
        engine, config = self._ticking, self.config
        if engine is None:
            return
        levels = () if self.deadline is None else self.deadline.levels
        counts = sorted({config.steps, *(level.steps or config.steps for level in levels)})
        if isinstance(engine, SteppingEngine):
            for steps, limit in self._integrated(counts):
                engine.warm_up_stages(cameras, images, steps, limit)
        for count in counts:
            if self._times is None:
                engine.warm_up(cameras, count, images=images)
            if self._again is not None:
                self._again.warm_up_again(cameras, count)

    def _integrated(self, counts: list[int]) -> list[tuple[tuple[EulerStep, ...], float | None]]:
        """The steps, and the limits of their guidance, with which stages will run one by one."""
        if self._times is not None:
            schedules = [self._times]
        else:
            schedules = [uniform_steps(self.engine.config, count) for count in counts]
        if self.config.rtc is not None:
            return [(steps, self.config.rtc.limit) for steps in schedules]
        if self._times is not None:
            return [(self._times, None)]
        return [((), None)] if self._needs_stages else []

    # What is in force

    @property
    def steps(self) -> int:
        """Evaluations at this tick."""
        economy = None if self.deadline is None else self.deadline.economy.steps
        return economy or self.config.steps

    @property
    def reuse(self) -> ReuseConfig | None:
        """Reuse at this tick."""
        every = None if self.deadline is None else self.deadline.economy.reuse_every
        configured = self.config.reuse
        if every is None or (configured is not None and (configured.every is None or configured.every >= every)):
            return configured
        return ReuseConfig(every=every) if configured is None else replace(configured, every=every)

    @property
    def keeps(self) -> bool:
        """Whether a snapshot may have to outlive other clients' ticks."""
        deadline = self.config.deadline
        return self.config.reuse is not None or (deadline is not None and "reuse" in deadline.order)

    # A tick

    def sample(
        self,
        inputs: ModelInput,
        noise: Tensor,
        text: int | None = None,
        steering: Steering | None = None,
        stage_ms: dict[str, float] | None = None,
    ) -> tuple[Tensor, TickReport]:
        """The actions of one observation.

        Args:
            inputs: checked, one observation on the CPU, which nobody writes into afterwards.
            noise: (1,H,32) float32.
            text: prompt tokens that do not depend on the state; None where all are text.
            steering: of real-time chunking.
            stage_ms: where given, the stages that ran one by one are waited for, and their times put in.

        Returns:
            normalised actions (1,H,32) float32 on the CPU, and what was done.

        Raises:
            MixtureError: parts of ticks that the mode does not let stand together.
            NonFiniteActionsError: of engines that look.
        """
        begin = time.perf_counter()
        clock = StageClock(self.engine, stage_ms)
        seen = self.seen(inputs, text)
        self._image_tokens = None
        decision = decide(self.reuse, seen, self.held, self.tick, self.similarity(seen, inputs, clock), self.event)
        if decision.kind == "exact" and not (self._held and self._usable(self._held)):
            decision = Decision("full", frozenset(), "identical, but computed over")
        decision_ms = 1e3 * (time.perf_counter() - begin) - clock.total_ms
        actions = self._whole(decision, inputs, seen, noise, steering)
        if actions is None:
            cache = self._cache(decision, inputs, seen, clock)
            with clock.stage("denoise"):
                actions = self._denoise(cache, self._state(inputs), noise, steering)
        # An engine that leaves no cache behind computes everything at every tick.
        age = 0 if self._held is None else self.tick - self._held.tick
        self.statistics.add(decision, age)
        self._last_chunk = actions[0, :, : self._action_dims].numpy()
        report = TickReport(decision, self.steps, age, decision_ms, clock.stage_ms)
        self.tick += 1
        return actions, report

    def finished(self, ms: float) -> None:
        """A tick that took `ms` milliseconds in all is over."""
        if self.deadline is not None:
            self.deadline.observe(self.tick - 1, ms)

    def report(self) -> dict[str, Any]:
        """Statistics of the episode so far, as JSON values."""
        return {
            **self.statistics.to_dict(),
            "events": dict(self.events.counts),
            **({} if self.deadline is None else {"level": self.deadline.economy.name}),
        }

    # What a decision is made from

    @property
    def held(self) -> Snapshot | None:
        """What may be used again."""
        return self._held

    def seen(self, inputs: ModelInput, text: int | None) -> PrefixInput:
        """The prefix of this tick; arguments as of `sample`."""
        return PrefixInput.of(inputs, self.engine.config, text)

    def similarity(self, seen: PrefixInput, inputs: ModelInput, clock: StageClock | None = None) -> Similar:
        """How like what is held this tick is, by signal; image tokens are encoded when they are asked for."""
        return partial(self._similar, seen, inputs, clock or StageClock(self.engine, None))

    def _similar(self, seen: PrefixInput, inputs: ModelInput, clock: StageClock, signal: Signal) -> float:
        held = self._held
        assert held is not None
        if signal == "state":
            dims = self._state_dims  # padding never differs, and would make every state like every other
            return state_similarity(seen.state[:dims], held.seen.state[:dims])
        if signal == "images":
            return image_similarity(seen.pixels, held.seen.pixels, lambda: seen.same_frames(held.seen))
        now = self._encoded(inputs, clock)
        assert held.image_tokens is not None
        return token_similarity(now, held.image_tokens, seen.cameras)

    def event(self) -> bool:
        """Whether the last chunk is at a delicate place, as the phase gate sees it."""
        reuse = self.reuse
        assert reuse is not None
        assert reuse.phase is not None
        return self._last_chunk is not None and eventful(self._last_chunk, reuse.phase)

    # Its parts

    def _usable(self, held: Snapshot) -> bool:
        return held.kept is not held.cache or self._holds(held.cache)

    def _holds(self, cache: PrefixCache) -> bool:
        """Whether the engine can take this cache as it is; where nobody can tell, it has been computed over."""
        return _is_its_own(cache) or (self._holding is not None and self._holding.holds(cache))

    def _whole(
        self, decision: Decision, inputs: ModelInput, seen: PrefixInput, noise: Tensor, steering: Steering | None
    ) -> Tensor | None:
        """A full or a fast tick in one piece, on engines that can; None where the stages must run one by one."""
        plain = steering is None and self._times is None
        if not plain or self._ticking is None or (decision.kind == "full" and self._needs_stages):
            return None
        if decision.kind == "full":
            actions = self._ticking.sample_actions(inputs, noise, self.steps)
            if self._again is not None:
                self._hold(self._again.last_cache(), seen)
            return actions
        if decision.kind == "part" or self._again is None:
            return None
        return self._again.sample_again(self._reused(decision, seen), self._state(inputs), noise, self.steps)

    @property
    def _needs_stages(self) -> bool:
        """Whether a full tick leaves more behind than a cache."""
        reuse = self.config.reuse
        tokens = reuse is not None and reuse.gate is not None and reuse.gate.signal == "tokens"
        leaves_nothing = self.keeps and self._again is None
        return tokens or leaves_nothing or self._layers is not None or self.config.prompt_cache

    @property
    def _layers(self) -> int | None:
        """Up to which layer rows may be taken over from this tick's cache; None where only whole caches are reused."""
        reuse = self.config.reuse
        if reuse is None or (reuse.mode == "full" and reuse.synchronised):
            return None
        if reuse.mode == "state_only" and self.engine.config.kind == "pi0":
            return None
        return reuse.layers if reuse.layers is not None else self.engine.config.vlm.depth

    @property
    def _old_state(self) -> bool:
        """Whether π0's state token, which is not in the prefix, may be an old one."""
        reuse = self.config.reuse
        return reuse is not None and reuse.mode == "state_only" and self.engine.config.kind == "pi0"

    def _state(self, inputs: ModelInput) -> Tensor:
        """What stage 3 is told: this tick's state, or the snapshot's."""
        if not self._old_state or self._held is None:
            return inputs.state
        return torch.from_numpy(self._held.seen.state)[None]

    def _ids(self, seen: PrefixInput) -> dict[str, int]:
        """Everything from this tick."""
        return dict.fromkeys((*seen.parts, *((STATE,) if self._old_state else ())), self.tick)

    def _reused(self, decision: Decision, seen: PrefixInput) -> PrefixCache:
        """The snapshot's cache, wherever it is still good, checked against the mode."""
        held = self._held
        assert held is not None
        if decision.kind == "exact":
            held = self._held = replace(held, seen=seen, ids=self._ids(seen))
        check_mixture(held.ids, self.tick, self.reuse)
        return held.cache if self._holds(held.cache) else held.kept

    def _cache(self, decision: Decision, inputs: ModelInput, seen: PrefixInput, clock: StageClock) -> PrefixCache:
        if decision.kind in ("fast", "exact"):
            return self._reused(decision, seen)
        if self._layers is not None:
            return self._partial(decision, inputs, seen, clock)
        tokens = self._encoded(inputs, clock)
        with clock.stage("prefill"):
            cache = self._prefill(tokens, inputs)
        held, ids = self._held, self._ids(seen)
        if decision.kind == "part" and held is not None:  # π0's old state, beside a prefix that is all new
            seen, ids = replace(seen, state=held.seen.state), ids | {STATE: held.ids[STATE]}
        check_mixture(ids, self.tick, self.reuse)
        self._hold(cache, seen, ids, tokens)
        return cache

    def _partial(self, decision: Decision, inputs: ModelInput, seen: PrefixInput, clock: StageClock) -> PrefixCache:
        """A prefix of which some rows come from the snapshot."""
        engine, held, layers, old = self.engine, self._held, self._layers, None
        assert isinstance(engine, PartialEngine)
        assert layers is not None
        mask, ids = inputs.image_mask, self._ids(seen)
        if decision.kind == "part" and held is not None:
            assert isinstance(held.cache, PartialCache)
            ids |= {part: held.ids[part] for part in decision.reused}
            if STATE in decision.reused:
                seen = replace(seen, tokens=np.concatenate((seen.tokens[: seen.text], held.seen.tokens[seen.text :])))
            old = OldRows(held.cache, seen.reused(decision.reused))
            mask = mask.clone()
            mask[0, [slot for slot in seen.cameras if f"camera{slot}" in decision.reused]] = False
        check_mixture(ids, self.tick, self.reuse)
        tokens = self._encoded(replace(inputs, image_mask=mask), clock)
        prompt = torch.from_numpy(seen.tokens)[None]
        with clock.stage("prefill"):
            cache = engine.prefill_partial(
                tokens, inputs.image_mask, prompt, torch.ones_like(prompt, dtype=torch.bool), layers, old
            )
        if old is None or not self.config.reuse or not self.config.reuse.synchronised:
            self._hold(cache, seen, ids, tokens)
        return cache

    def _encoded(self, inputs: ModelInput, clock: StageClock) -> Tensor:
        if self._image_tokens is None:
            with clock.stage("encode_images"):
                self._image_tokens = self.engine.encode_images(inputs.images, inputs.image_mask)
        return self._image_tokens

    def _prefill(self, tokens: Tensor, inputs: ModelInput) -> PrefixCache:
        engine = self.engine
        if not self.config.prompt_cache:
            return engine.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        assert isinstance(engine, PromptEngine)
        key = inputs.tokens.numpy().tobytes()
        if self._prompt is None or self._prompt[0] != key:
            self._prompt = (key, engine.embed_prompt(inputs.tokens))
        return engine.prefill_embedded(tokens, inputs.image_mask, self._prompt[1], inputs.token_mask)

    def _hold(
        self, cache: PrefixCache, seen: PrefixInput, ids: dict[str, int] | None = None, tokens: Tensor | None = None
    ) -> None:
        safe = copied(cache) if self.keeps and not _is_its_own(cache) else cache
        self._held = Snapshot(cache, safe, seen, ids or self._ids(seen), tokens)

    def _denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steering: Steering | None) -> Tensor:
        engine = self.engine
        if steering is None and self._times is None:
            return engine.denoise(cache, state, noise, self.steps).cpu()
        assert isinstance(engine, IntegratingEngine)
        steps: tuple[EulerStep, ...] = self._times or uniform_steps(engine.config, self.steps)
        return engine.integrate(cache, state, noise, steps, steering).cpu()


def _is_its_own(cache: PrefixCache) -> bool:
    """Whether a cache's memory is its own; what engines hand out of theirs is of a class of its own."""
    return type(cache) in (PrefixCache, PartialCache)
