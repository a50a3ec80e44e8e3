"""Stock vLLM with one thing changed: eviction by the retention index, from gaps that are learned as they go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulation.profile import Profile
from bench.simulation.system import Turn
from bench.simulation.systems.stock import Stock
from bench.workloads.runs import Run
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention
from scheduler.estimates import Estimates, Past, Place, kind

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster


class Gaps:
    """What the estimators of Weft's core learn, fed with turns. That a session is over is learned, not foretold."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.estimates = Estimates()
        self._stands: dict[str, dict[str, tuple[Place, float | None]]] = {}

    def arrived(self, turn: Turn, now: float) -> None:
        """A call of the owner has come: learn how long it took."""
        place, since = self._stand(turn)
        if since is not None:
            self.estimates.returned(place, now - since)
            past = place.past.returned(now - since)
            self._stands[turn.run.id][turn.owner] = Place(place.tenant, place.role, place.tools, past), None

    def finished(self, turn: Turn, now: float) -> Hint:
        """The call has ended: when the owner comes back."""
        call, (place, _) = turn.call, self._stand(turn)
        self.estimates.output(place, call.output)
        past = place.past.ended(kind(call.stop, call.tools), call.output)
        place = Place(turn.run.tenant, call.role, tuple(sorted(call.tools)), past)
        self._stands[turn.run.id][turn.owner] = place, now
        return Hint(now, gap=self.estimates.gap(place), seconds_per_token=recompute_per_token(self.profile, turn))

    def ended(self, run: Run) -> None:
        """The run is over: its sessions did not come back."""
        for place, since in self._stands.pop(run.id, {}).values():
            if since is not None:
                self.estimates.never(place)

    def _stand(self, turn: Turn) -> tuple[Place, float | None]:
        start = Place(turn.run.tenant, turn.call.role, (), Past()), None
        return self._stands.setdefault(turn.run.id, {}).setdefault(turn.owner, start)


def recompute_per_token(profile: Profile, turn: Turn) -> float:
    """Engine seconds for each token to compute the turn's context again."""
    tokens = turn.call.prompt.end + turn.call.output
    return profile.recompute(0, tokens) / tokens


class Index(Stock):
    """Stock placement and order, the retention index in the engine. No release, no gate."""

    name = "index"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.gaps = Gaps(cluster.profile)

    def policy(self) -> Policy:
        return Retention()

    def arrived(self, turn: Turn) -> None:
        self.gaps.arrived(turn, self.cluster.now)
        super().arrived(turn)

    def finished(self, turn: Turn) -> None:
        assert turn.worker is not None
        self.cluster.engines[turn.worker].tell(turn.owner, self.gaps.finished(turn, self.cluster.now))

    def ended(self, run: Run) -> None:
        super().ended(run)
        self.gaps.ended(run)
