"""What every library without collectives would write alike."""

from __future__ import annotations

from ..runtime.types import Case, Collective, Moe
from .base import CollectiveCall, Facts, why_not


class MoeOnly:
    """For a backend that declares `facts`, and tells its own limits in `limit`."""

    facts: Facts

    def why_not(self, case: Case) -> str | None:
        reason = why_not(self.facts, case)
        if reason is not None:
            return reason
        assert isinstance(case.shape, Moe)  # of all others the facts have told
        return self.limit(case, case.shape)

    def limit(self, case: Case, shape: Moe) -> str | None:
        """One sentence why the library cannot run what its facts allow, or None."""
        raise NotImplementedError

    def collective(self, case: Case, shape: Collective) -> CollectiveCall:
        raise NotImplementedError(f"{self.facts.name} has no collectives")
