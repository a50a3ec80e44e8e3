"""Fair shares of tenants: whose steps stand back for how long, by what each has been served (design §7).

Start-time fair queueing (Goyal et al., 1996) with a bound: a tenant's virtual time grows with the tokens computed for
it over its weight, and a step stands back in every line by as many seconds as its tenant is ahead of the one served
least among those that have steps, at most `MOST`. Only what workers counted is charged, so that nothing a client says
of itself moves it; no step is overtaken for its tenant's sake by one that came more than `MOST` seconds after it.
"""

from __future__ import annotations

from scheduler.events import Usage

OUTPUT = 4.0  # what a generated token counts for, in tokens of prefill
RATE = 4000.0  # tokens over weight that are worth a second in line
MOST = 60.0  # seconds that a step stands back for its tenant
FLEX = 3600.0  # seconds that offline work stands back
MOST_TENANTS = 10_000


class Shares:
    """What each tenant has been served. O(active tenants) for each step."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}  # of tenants whose weight is not 1
        self._served: dict[str, float] = {}  # virtual time, the latest active last
        self._open: dict[str, int] = {}  # steps
        self._latest = 0.0  # the largest virtual time that any has come to

    def arrived(self, tenant: str) -> None:
        """A step of the tenant has come. One that comes back after a while has saved up nothing."""
        if tenant not in self._open:
            least = min((self._served[one] for one in self._open), default=self._latest)
            self._served[tenant] = max(self._served.pop(tenant, least), least)
            if len(self._served) > MOST_TENANTS:
                idle = (one for one in self._served if one not in self._open and one != tenant)
                self._served.pop(next(idle, ""), None)
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def ended(self, tenant: str, usage: Usage) -> None:
        """A step of the tenant is over; a worker counted so much for it."""
        work = max(0, usage.prompt - usage.cached) + OUTPUT * usage.output
        self._served[tenant] += work / self.weights.get(tenant, 1.0)
        self._latest = max(self._latest, self._served[tenant])
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]

    def behind(self, tenant: str) -> float:
        """Seconds by which a step of the tenant stands back."""
        if len(self._open) < 2:
            return 0.0
        least = min(self._served[one] for one in self._open)
        return min(MOST, (self._served[tenant] - least) / RATE)
