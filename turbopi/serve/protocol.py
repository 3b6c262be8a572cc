"""What the server asks of a policy, and the fixed words of openpi's websocket protocol (SPEC 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

# A client written for openpi may compare this text; the server sends it as the close reason after an error frame.
ERROR_CLOSE_REASON = "Internal server error. Traceback included in previous frame."
# Ours: true beside an episode's first observation. openpi's clients send no such key, and connect anew instead.
RESET_KEY = "reset"
SHUTDOWN_CLOSE_REASON = "The server is shutting down."


class ServedPolicy(Protocol):
    """A policy as the server sees it; `turbopi.policy.Policy` is one.

    The server never calls `infer` on the policy it was given, only on forks of it: one per connection, each starting
    as after a reset, so that what one client receives does not depend on the others. `fork` and `infer` are called
    in one worker thread, never two at a time.
    """

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What a client receives on connecting; packable with `wire.encode`."""

    def infer(self, observation: dict[str, Any], /) -> dict[str, Any]:
        """Return {"actions": (H, dim), "policy_timing": {"infer_ms": …}, …} for one observation.

        Raises `turbopi.errors.InputError` where the observation is at fault; any other exception counts as the
        server's own fault and is reported with its traceback.
        """

    def fork(self) -> ServedPolicy:
        """Return a policy with the same weights and a fresh state."""

    def reset(self) -> None:
        """Forget the episode."""
