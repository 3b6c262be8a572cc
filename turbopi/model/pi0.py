"""π0 and π0.5, the reference: images, prompt and state in, a chunk of actions out (SPEC 1).

Three stages: `encode_images` → `prefill` → `denoise`. Everything here is plain PyTorch and runs on any device in
float32 or bfloat16. Fast engines are judged against it; it is not itself optimised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from .expert import ActionExpert, suffix_visibility
from .flow import noised, time_embedding, time_schedule
from .gemma import RotaryEmbedding
from .inputs import ModelInput, check_noise
from .numerics import PROFILES
from .prefix import PrefixCache, PrefixTower, drop_invalid
from .siglip import SiglipTower
from .taps import Tap, scoped


class Pi0(nn.Module):
    """A π0 or π0.5 policy network. Parameter names are openpi's with shortened prefixes (`checkpoint/names.py`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.numerics = PROFILES[config.numerics]
        self._tap: Tap | None = None
        rope = RotaryEmbedding(config.vlm.head_dim, self.numerics.bf16_rope_frequencies)
        width = config.expert.width
        self.vision = SiglipTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.vlm.width)
        self.vlm = PrefixTower(
            config.vlm, config.vocab_size, rope, round_scale=self.numerics.embed_scale_in_model_dtype
        )
        self.expert = ActionExpert(config, rope)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.kind == "pi0":
            self.state_proj = nn.Linear(config.state_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        else:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)

    @contextmanager
    def taps(self, sink: Tap | None = None) -> Iterator[dict[str, Tensor]]:
        """Within this context every intermediate goes to `sink(name, tensor)`, or into the yielded dict.

        Names are those of `taps.py`. Under "dropped", camera taps hold only the samples that have the camera, and
        prefix taps only the packed valid tokens. Not re-entrant and not for use from two threads at once.
        """
        if self._tap is not None:
            raise RuntimeError("this model is already being tapped")
        record: dict[str, Tensor] = {}
        self._tap = sink or record.__setitem__
        try:
            yield record
        finally:
            self._tap = None

    def encode_images(self, images: Tensor, image_mask: Tensor) -> Tensor:
        """Stage 1. images (B,cameras,3,S,S) float32, image_mask (B,cameras) bool -> (B,cameras,S_i,vlm width).

        Under "dropped", missing cameras are not computed: their tokens are zeros, and nothing reads them.
        """
        cameras = []
        for camera in range(self.config.cameras):
            tap = scoped(self._tap, f"vision.cam{camera}.")
            if self.config.invalid_tokens == "masked":
                cameras.append(self._encode_camera(images[:, camera], tap))
                continue
            present = image_mask[:, camera]
            shape = (len(present), self.config.vision.tokens, self.config.vlm.width)
            if not bool(present.any()):
                cameras.append(torch.zeros(shape, dtype=self.projector.weight.dtype, device=images.device))
                continue
            encoded = self._encode_camera(images[present, camera], tap)
            tokens = encoded.new_zeros(shape)
            tokens[present] = encoded
            cameras.append(tokens)
        return torch.stack(cameras, dim=1)

    def _encode_camera(self, images: Tensor, tap: Tap | None) -> Tensor:
        projected = self.projector(self.vision(images, tap))
        if tap:
            tap("projected", projected)
        return projected

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2. Image tokens of stage 1 and the prompt -> the PrefixCache that `denoise` reads.

        image_tokens (B,cameras,S_i,width), image_mask (B,cameras) bool, tokens (B,T) int64, token_mask (B,T) bool.
        """
        embs = torch.cat((image_tokens.flatten(1, 2), self.vlm.embed(tokens)), dim=1)
        valid = torch.cat((image_mask.repeat_interleave(image_tokens.shape[2], dim=1), token_mask), dim=1)
        packed_valid: Tensor | None = valid
        if self.config.invalid_tokens == "dropped":
            embs, packed_valid = drop_invalid(embs, valid)
        return self.vlm(embs, packed_valid, scoped(self._tap, "prefix."))

    def embed_suffix(self, state: Tensor, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens (B,N,width) float32 and the adaRMS condition (B,width) float32, None for π0.

        state (B,32), x_t (B,H,32), time (B,), all float32.
        """
        config = self.config
        angle_dtype = torch.float32 if self.numerics.float32_time_angles else torch.float64
        te = time_embedding(time, config.expert.width, config.min_period, config.max_period, angle_dtype)
        actions = self.action_in_proj(x_t)
        if config.kind == "pi05":
            return actions, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(te))))
        joined = torch.cat((actions, te[:, None].expand_as(actions)), dim=-1)
        mixed = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))
        return torch.cat((self.state_proj(state)[:, None], mixed), dim=1), None

    def velocity(self, cache: PrefixCache, state: Tensor, x_t: Tensor, time: Tensor, tap: Tap | None = None) -> Tensor:
        """One evaluation of the flow field: (B,H,32) float32 at x_t (B,H,32) and time (B,), both float32."""
        embs, cond = self.embed_suffix(state, x_t, time)
        out = self.expert(cache, embs, cond, tap)
        v_t = self.action_out_proj(out[:, -self.config.horizon :].float())
        if tap:
            tap("time", time)
            tap("x_t", x_t)
            if cond is not None:
                tap("adarms_cond", cond)
            tap("suffix_embs", embs)
            tap("suffix_out", out)
            tap("v_t", v_t)
        return v_t

    def denoise(self, cache: PrefixCache, state: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
        """Stage 3. Integrate the velocity from noise (t = 1) to actions (t = 0) in Euler steps.

        state (B,32) float32, noise (B,H,32) float32 -> actions (B,H,32) float32, still normalised.
        """
        tap = self._tap
        if tap:
            n = self.config.suffix_tokens
            tap("suffix.position_ids", cache.lengths[:, None] + torch.arange(n, device=noise.device))
            tap("suffix.attn_mask", suffix_visibility(self.config, cache.visible)[:, None])
        x_t = noise
        for step, t in enumerate(time_schedule(steps, self.numerics.time)):
            time = torch.full((noise.shape[0],), t, dtype=torch.float32, device=noise.device)
            v_t = self.velocity(cache, state, x_t, time, scoped(tap, f"step{step}."))
            x_t = x_t + (-1.0 / steps) * v_t
        if tap:
            tap("actions", x_t)
        return x_t

    @torch.no_grad()
    def sample_actions(self, input: ModelInput, noise: Tensor, steps: int = 10) -> Tensor:  # noqa: A002
        """All three stages. noise (B,H,32) float32 -> normalised actions (B,H,32) float32.

        Raises InputError if the input or the noise does not fit the model.
        """
        input.check(self.config)
        check_noise(noise, input.state.shape[0], self.config)
        image_tokens = self.encode_images(input.images, input.image_mask)
        cache = self.prefill(image_tokens, input.image_mask, input.tokens, input.token_mask)
        return self.denoise(cache, input.state, noise, steps)

    def loss(self, input: ModelInput, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # noqa: A002
        """Flow-matching loss of each action: squared error of the velocity, mean over action dims (SPEC 1.5).

        actions and noise (B,H,32) float32, time (B,) float32 from `flow.sample_time` -> (B,H) float32, differentiable.
        Raises InputError if the input or the noise does not fit the model.
        """
        input.check(self.config)
        check_noise(noise, input.state.shape[0], self.config)
        return self.unchecked_loss(input, actions, noise, time)

    def unchecked_loss(self, input: ModelInput, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:  # noqa: A002
        """`loss` without looking at the values, which makes a GPU wait."""
        x_t, target = noised(actions, noise, time)
        image_tokens = self.encode_images(input.images, input.image_mask)
        cache = self.prefill(image_tokens, input.image_mask, input.tokens, input.token_mask)
        return (self.velocity(cache, input.state, x_t, time) - target).square().mean(dim=-1)
