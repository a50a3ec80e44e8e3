"""What each workflow counts for on each worker: its claim in tokens, what recomputing it would cost, and its lease."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from scheduler.awaited import RETURNING
from scheduler.gaps import Gap
from scheduler.graph import Branch, Session, Step, Workflow
from scheduler.habits import Course, Stops
from scheduler.rates import Rates
from scheduler.workers import Worker

SHARE = 1.0  # of the capacity, that claims may take
KEPT = 0.5  # of the capacity, that is kept free at most for what contexts grow by
OVERLAP = 0.5  # of the device memory, that counts beside a host tier
SHORTEST = 60.0  # seconds; no hold is overdue sooner
# A hold is overdue after PATIENCE times what computing all once more takes, times the overload to the power of SLOPE;
# near capacity, where plain queueing costs little, after down to NEAR of that.
PATIENCE, SLOPE, NEAR = 1.7, 0.3, 0.25
LIKELY = 0.6  # of the chance of a return that it stopped with, down to which a workflow is taken to be there
WORTH, SOONEST = 0.1, 0.05  # of an idle time, for which an index holds; seconds that it counts as at least
SLIM = 1e-6  # a chance that is none
GROWTH, MOST = 256, 1 / 64  # tokens, and share of the device memory


@dataclass(slots=True, eq=False)
class Held:
    """A step at the gate. It waits since `since`, is overdue from `overdue` on, and is let in by `deadline`.

    `place` is the time that its place in line goes by; `tokens` the context that its session will have with it, `cost`
    the seconds to compute that; `new` where its session counts for nothing yet. `plain`: seconds to its first token at
    its worker if nobody were held, and the KV of all that wait there had been evicted.
    """

    step: Step
    tokens: int
    since: float
    place: float
    overdue: float
    deadline: float
    cost: float = 0.0
    plain: float = 0.0
    new: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """A held step that may go now, to which worker, and why."""

    step: Step
    worker: Worker
    tokens: int
    waited: float
    plain: float
    why: str


@dataclass(slots=True, eq=False)
class Account:
    """A workflow on a worker. `contexts` are the tokens of its sessions there that no other session counts for, and
    `shared` what each found there when its first step came, and others count for: of those that have ended one.

    It is idle since `since`, after a step of `branch`, with `gap` as what is known of its return by now. `alive` is the
    chance that it makes another call, `hoped` that with which it stopped; `course` is how such workflows go on, `last`
    its tokens when it stopped. `live`, `claim`, `cost`, `present`, `grows` and `ends` are what it counts for in its
    book.
    """

    workflow: Workflow
    contexts: dict[Session, int] = field(default_factory=dict)
    shared: dict[Session, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)  # steps, with the context that each will have
    held: dict[str, Held] = field(default_factory=dict)
    leased: bool = False
    flex: bool = False  # offline work: its leases are the first to be revoked
    waits: float = 0.0  # seconds that steps of it were held, those of holds that are over
    told: bool | None = False  # whether its engine knows of the lease; None: it is to be told anew
    branch: Branch | None = None
    gap: Gap | None = None
    since: float = 0.0
    course: Course | None = None
    last: int | None = None
    stood: Stops | None = None  # how it stopped, while it has not come back
    followed: bool = False  # whether another run has begun since, while it was the last to have stopped
    late: bool = False  # whether its usual gap has passed
    left: dict[Session, Stops] = field(default_factory=dict)  # how its agents did
    alive: float = 1.0
    hoped: float = 1.0
    worth: float = 0.0  # its index, until `worth_until`
    worth_until: float = 0.0
    tokens: int = 0
    live: int = 0
    claim: int = 0
    cost: float = 0.0
    present: bool = False
    grows: float = 0.0
    ends: float = 0.0

    def count(self, session: Session, tokens: int) -> None:
        """So many tokens are this session's own."""
        self.tokens += tokens - self.contexts.get(session, 0)
        self.contexts[session] = tokens

    def drop(self, session: Session) -> None:
        """The session counts for nothing any more."""
        self.tokens -= self.contexts.pop(session)
        self.shared.pop(session, None)
        if (stops := self.left.pop(session, None)) is not None:
            stops.stopped += 1

    def stop(self, branch: Branch, stood: Stops | None, now: float) -> None:
        """None of its steps runs any more, the last one of this branch; `stood` counts whether it comes back."""
        self.branch, self.stood, self.since, self.worth_until = branch, stood, now, 0.0
        self.alive = self.hoped = self.returning
        if stood is not None and self.course is not None:
            self.course.stop(None if self.last is None else self.tokens - self.last)
            self.last = self.tokens

    def back(self, session: Session) -> None:
        """A step of the session has come: it is back, and its workflow with it."""
        if self.stood is not None:
            self.stood.returned += 1
            if self.course is not None:
                self.course.returned += 1
            if self.followed and self.late:
                self.stood.followed[1] += 1
            elif self.followed:
                self.stood.resolved(True)
        self.stood, self.followed, self.late = None, False, False
        if (stops := self.left.pop(session, None)) is not None:
            stops.stopped, stops.returned = stops.stopped + 1, stops.returned + 1

    def forget(self, session: Session) -> None:
        """What the session had is lost: whether it and its workflow would have come back nobody will know."""
        self.left.pop(session, None)
        if self.stood is not None and self.course is not None:
            self.stood.stopped -= 1
            self.course.stopped -= 1
        self.stood = None

    def follow(self) -> None:
        """Another run of its program has begun, and it was the last to have stopped."""
        self.followed = True
        if self.late and self.stood is not None:
            self.stood.resolved(False)

    def waited(self, idle: float) -> None:
        """It has not come back for so long: most that do would have."""
        if self.stood is None or self.gap is None or self.late or idle <= self.gap.quantile(RETURNING):
            return
        self.late = True
        if self.followed:
            self.stood.resolved(False)

    @property
    def returning(self) -> float:
        """The share of workflows that come back after such a stop."""
        if self.stood is None:
            return 1.0
        return self.stood.share_of_followed if self.followed else self.stood.share

    def returns(self, idle: float) -> float:
        """The chance that it makes another call, now that it has been idle for so many seconds.

        How many come back after such a stop is known long before any is given up, as the gap's own estimate waits for.
        """
        if self.gap is None:
            return 1.0
        return 1.0 - self.gap.unlikely(1.0 - self.returning).never_after(idle)

    def index(self, rates: Rates, now: float) -> float:
        """What keeping its KV while it is idle saves: worker seconds for each second and token."""
        if self.gap is None or not self.tokens:
            return 0.0
        if now >= self.worth_until:
            idle = max(now - self.since, SOONEST)
            chance = self.returns(idle) / max(1.0 - self.gap.never_after(idle), SLIM)
            self.worth = self.gap.index(idle) * chance * rates.recompute(self.tokens) / self.tokens
            self.worth_until = now + WORTH * idle
        return self.worth

    @property
    def place(self) -> float:
        """The place in line of the first of its held steps."""
        return min(held.place for held in self.held.values())

    @property
    def came(self) -> float:
        """When the first of its held steps came."""
        return min(held.since for held in self.held.values())

    @property
    def overdue(self) -> float:
        """When the first of its held steps is overdue."""
        return min(held.overdue for held in self.held.values())


class Book:
    """The accounts on one life of a worker, and their sums."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.accounts: dict[Workflow, Account] = {}
        self.of: dict[Session, Account] = {}
        self.idle: dict[Account, None] = {}  # those with a lease and no step
        self.waiting: dict[Account, None] = {}  # those with held steps
        self.changed: dict[Account, None] = {}  # idle ones whose engine is to be told of their lease, or its end
        self.line = Line()
        self.claimed = 0
        self.cost = 0.0
        self.demand = 0  # tokens of all that may still call
        self.present = 0  # workflows that are likely to
        self.grows = 0.0  # tokens by which those with a lease grow until each stops again
        self.ends = 0.0  # how many of them end then
        # Of steps without a first token: the seconds it will take, and the time when it is over at the latest, as the
        # first token of an answer in one piece comes with the last.
        self.prefills: dict[str, tuple[float, float]] = {}
        self.wanted = 0  # tokens of the contexts of held steps
        self.owed = 0.0  # seconds to compute them
        self.coming = 0  # tokens of those of new sessions
        self.coming_seconds = 0.0  # seconds to compute these

    @property
    def capacity(self) -> int:
        """Tokens that claims are measured against; 0: unknown, and nothing is held."""
        worker = self.worker
        if not worker.kv_tokens:
            return 0
        return worker.host_tokens + int(OVERLAP * worker.kv_tokens) if worker.host_tokens else worker.kv_tokens

    @property
    def holds(self) -> int:
        """Steps at the gate."""
        return sum(len(account.held) for account in self.waiting)

    def pending(self, now: float) -> float:
        """Seconds of prefill that the worker has before it."""
        return sum(seconds for seconds, until in self.prefills.values() if until > now)

    @property
    def growth(self) -> int:
        """Tokens that the claim of a running step has beyond its prompt, for its answer."""
        return min(GROWTH, int(MOST * self.worker.kv_tokens))

    @property
    def room(self) -> float:
        """Tokens that are left for claims."""
        return SHARE * self.capacity - self.claimed

    def reserve(self, grows: float, ends: float) -> float:
        """Tokens by which workflows will have grown when the first of them ends, if they grow by so many and so many
        of them end from one stop to the next: what is kept free for that, of what would be left."""
        return min(max(0.0, grows) / ends, KEPT * self.capacity) if ends > SLIM else 0.0

    @property
    def kept(self) -> int:
        """Tokens that are kept free, once somebody waits, for what those with a lease will have grown by."""
        return int(self.reserve(self.grows, self.ends))

    def victims(self, now: float) -> list[tuple[float, Account]]:
        """The idle workflows with a lease, with their index, those first whose KV is worth least."""
        rates = self.worker.rates
        found = [(0.0 if one.flex else one.index(rates, now), number, one) for number, one in enumerate(self.idle)]
        return [(index, one) for index, _, one in sorted(found, key=lambda one: one[:2])]

    def soonest(self, victims: list[tuple[float, Account]]) -> float:
        """How soon one of these comes back by itself, in 1/s: an idle worker waits for the first of them no longer."""
        recompute = self.worker.rates.recompute
        return sum(index * one.tokens / recompute(one.tokens) for index, one in victims if index)

    def leaves(self, account: Account) -> float:
        """Seconds to compute what the held steps would leave here if they went elsewhere."""
        tokens = self.worker.residency.tokens
        return self.worker.rates.recompute(sum(sum(tokens(held.step.branch.id)) for held in account.held.values()))

    def hold(self, held: Held, sign: int = 1) -> None:
        """One more step waits; with -1, one less."""
        self.wanted, self.owed = self.wanted + sign * held.tokens, self.owed + sign * held.cost
        if held.new:
            self.coming, self.coming_seconds = self.coming + sign * held.tokens, self.coming_seconds + sign * held.cost

    def account(self, session: Session) -> Account:
        """That of the session's workflow, where the session counts from now on: lineage may have moved it."""
        account = self.of.get(session)
        if account is not None and account.workflow is session.workflow:
            return account
        context, shared, left = 0, None, None
        if account is not None:
            context, shared = account.contexts.get(session, 0), account.shared.get(session)
            left = account.left.pop(session, None)
            self.drop(session)
        account = self.accounts.get(session.workflow)
        if account is None:
            account = self.accounts[session.workflow] = Account(session.workflow)
        account.count(session, context)
        if shared is not None:
            account.shared[session] = shared
        if left is not None:
            account.left[session] = left
        self.of[session] = account
        return account

    def drop(self, session: Session) -> None:
        """The session counts for nothing here any more."""
        account = self.of.pop(session, None)
        if account is not None:
            account.drop(session)
            self.settle(account)

    def settle(self, account: Account) -> None:
        """Something of the account has changed: count it anew. One without sessions is gone."""
        rates = self.worker.rates
        busy = bool(account.running or account.held)
        live = account.tokens if busy else int(account.tokens * account.alive)
        claim = live if account.leased else 0
        cost = rates.recompute(account.tokens) * live / account.tokens if live else 0.0
        self.demand += live - account.live
        account.live = live
        self.claimed += claim - account.claim
        present = busy or (bool(account.contexts) and account.alive >= LIKELY * account.hoped)
        self.present += present - account.present
        self.cost += cost - account.cost
        account.claim, account.cost, account.present = claim, cost, present
        over = not account.contexts and not busy
        course = account.course if account.leased and not over else None
        grows = ends = 0.0
        if course is not None:
            chance = 1.0 if busy else account.alive
            grows, ends = course.grown * chance, course.ends * chance
        self.grows, self.ends = self.grows + grows - account.grows, self.ends + ends - account.ends
        account.grows, account.ends = grows, ends
        _list(self.idle, account, account.leased and not account.running and bool(account.contexts))
        _list(self.waiting, account, bool(account.held))
        _list(self.changed, account, account.leased != account.told and not account.running and bool(account.contexts))
        if over and self.accounts.get(account.workflow) is account:
            del self.accounts[account.workflow]

    def check(self) -> None:
        """Raise AssertionError where a sum and what it counts disagree."""
        accounts = self.accounts.values()
        assert all(one.tokens == sum(one.contexts.values()) for one in accounts), "contexts are miscounted"
        assert self.claimed == sum(one.claim for one in accounts), "claims are miscounted"
        assert abs(self.cost - sum(one.cost for one in accounts)) < 1e-6 * (1 + self.cost), "costs are miscounted"
        assert abs(self.grows - sum(one.grows for one in accounts)) < 1e-6 * (1 + self.grows), "growth is miscounted"
        assert abs(self.ends - sum(one.ends for one in accounts)) < 1e-6 * (1 + self.ends), "ends are miscounted"
        assert self.present == sum(one.present for one in accounts), "workflows are miscounted"
        assert all(session in one.contexts for session, one in self.of.items()), "a session counts elsewhere"
        assert sum(len(one.contexts) for one in accounts) == len(self.of), "a session is counted twice, or lost"
        assert all(one.left.keys() <= one.contexts.keys() for one in accounts), "one that left is not here"
        assert set(self.idle) == {one for one in accounts if one.leased and not one.running and one.contexts}
        assert set(self.waiting) == {one for one in accounts if one.held}
        held = [one for account in accounts for one in account.held.values()]
        assert self.wanted == sum(one.tokens for one in held), "held steps are miscounted"
        assert self.coming == sum(one.tokens for one in held if one.new), "new sessions are miscounted"
        assert abs(self.owed - sum(one.cost for one in held)) < 1e-6 * (1 + self.owed), "held steps cost otherwise"
        assert all(one.leased for one in accounts if one.running), "a step runs without a lease"


def bound(book: Book, all_books: Iterable[Book]) -> float:
    """Seconds after which a step that is held now is overdue, from what there is at all that share a line. O(books)"""
    others = (one for one in all_books if one is not book and one.worker.up and one.capacity)
    books = [book, *(one for one in others if one.worker.pool == book.worker.pool)]
    overload = max(1.0, sum(one.demand + one.coming for one in books) / sum(one.capacity for one in books))
    once = sum(one.cost + one.coming_seconds for one in books) / len(books)  # to compute all that live or wait there
    return max(SHORTEST, PATIENCE * once * float(overload**SLOPE) * min(1.0, NEAR + overload - 1.0))


class Line:
    """Accounts with held steps, in the order of their places. Amortised O(log n). Who changes place is added anew."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Book, Account]] = []  # stale entries stay until they come up
        self._number = count()

    def add(self, book: Book, account: Account) -> None:
        """The account has a place in line, or another one."""
        heapq.heappush(self._heap, (account.place, next(self._number), book, account))

    def first(self) -> tuple[Book, Account] | None:
        """Who is first, and at which worker's gate."""
        while self._heap:
            place, _, book, account = self._heap[0]
            if account in book.waiting and account.place == place:
                return book, account
            heapq.heappop(self._heap)
        return None


def _list(listed: dict[Account, None], account: Account, belongs: bool) -> None:
    if belongs:
        listed[account] = None
    else:
        listed.pop(account, None)
