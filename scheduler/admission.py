"""The gate: which workflows may run on a worker, so that what they hold fits its memory (design §7).

A workflow with a lease passes. One without is given room, which, once somebody waits, must leave enough for what others
will have grown by when one of them ends. Or the leases of idle ones are revoked, those first whose KV is worth least
for each second and token, as long as that is under the going price; else its steps are held. The line is first come,
first served, one for all workers of a pool; who lost what it had, or was held before, stands ahead. A hold is overdue
after about as long as it would take to compute once more what all live workflows hold, which is what plain queueing
would cost it; then any idle lease may go for it, and at the deadline it passes whatever there is room for. Below
capacity nothing is ever held. Leases end with their workflow, or fade with the chance that it returns.

There is no cycle of waits: only running steps hold what cannot be revoked, and a step that runs waits for no gate.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from itertools import count

from scheduler.accounts import SHARE, SHORTEST, Account, Admitted, Book, Held, Line, bound
from scheduler.gaps import Gap
from scheduler.graph import Session, Step
from scheduler.habits import Habits, answers
from scheduler.knowledge import Knowledge
from scheduler.successions import Successions
from scheduler.workers import Worker

STATED = 2.0  # times that: its deadline
FLOOR, PRICE, EASING = 0.5, 1.0, 0.25  # least price, that with nobody held, how fast it falls; prefill a second for all
IDLE = 1.0  # the price of a second in which a worker has nothing to do: KV may cost that to recompute
AHEAD = 0.15  # of what computing a held step's context anew takes: prefill before it when it is let in
LEAST_AHEAD = 0.2  # seconds of it that never matter: a busy front hears of a first token late
LOSS, WAITED = 3.0, 0.5  # places in line, in seconds, for each of computing anew what it had, and of holds before
SETTLED = 1.0  # seconds idle, from which on what is known of a gap is renewed
GONE = 0.05  # the chance of a return below which a workflow has no lease
FIRST_LOOK, RENEWED = 0.1, 1.5  # seconds until that chance is looked at; the growth of the idle time until the next
AGES, AWAY = 10_000, 120.0  # steps that left while held, the latest; seconds within which one takes over its age
TICK = 1.0  # seconds from one look at all workers to the next
INFINITY = float("inf")


class Gate:
    """Leases, claims and holds on all workers. It knows of a step by `arrived`, `first_token` and `ended` alone."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self.books: dict[str, Book] = {}
        self.held: dict[str, tuple[Held, Book, Account]] = {}
        self._running: dict[str, tuple[Book, Account]] = {}
        self._lines: dict[str, Line] = {}  # by pool
        self._touched: dict[str, None] = {}  # workers where somebody might get in now
        self._ages: OrderedDict[tuple[str, int], tuple[float, float]] = OrderedDict()
        self.habits = Habits()
        self._successions = Successions()
        self._lost: dict[str, Held] = {}  # the holds of steps whose worker was lost
        self._leased: dict[Account, Book] = {}  # that got a lease while steps of theirs were held
        self._fading: list[tuple[float, int, Book, Account, float]] = []
        self._number = count()
        self._due: list[tuple[float, int, str]] = []  # deadlines

    def book(self, worker: Worker) -> Book:
        """The accounts of a worker."""
        book = self.books.get(worker.id)
        if book is None:
            book = self.books[worker.id] = Book(worker)
        return book

    def came(self, worker: Worker) -> None:
        """The worker is up, or has changed: who is held may go there."""
        self._touched[self.book(worker).worker.id] = None

    def arrived(
        self, step: Step, worker: Worker, tokens: int, now: float, *, back: float = 0.0, passes: bool = False
    ) -> bool:
        """A step that will make its session's context `tokens` long comes to the gate of a worker.

        Whether it may go now, as it must with `passes`. Else it is held until `admitted` names it or it has `ended`,
        and stands `back` so many seconds in line.
        """
        book = self.book(worker)
        account = book.account(step.session)
        account.back(step.session)
        before = self._lost.pop(step.id, None)
        since, left = self._ages.pop((step.branch.id, step.link), (now, now))
        free = not book.capacity or (not book.waiting and self._fits(book, account, step, tokens))
        if passes or account.leased or free:
            self._begin(step, book, tokens, now)
            return True
        since = before.since if before else since if now - left < AWAY else now
        cost = worker.rates.recompute(tokens)
        plain, most = book.pending(now) + book.owed + cost, bound(book, self.books.values())
        overdue, deadline = since + back + most, since + back + STATED * most
        if before:  # what was stated holds
            overdue, deadline = min(overdue, before.overdue), min(deadline, before.deadline)
        new = not (account.contexts[step.session] or step.session in {h.step.session for h in account.held.values()})
        ahead = LOSS * worker.rates.recompute(min(tokens, account.contexts[step.session]))
        ahead = min(ahead + min(WAITED * account.waits, SHORTEST), most)
        place = min(since + back - ahead, before.place if before else INFINITY)
        held = Held(step, tokens, since, place, overdue, max(now + TICK, deadline), cost, plain, new)
        account.held[step.id] = held
        self.held[step.id] = held, book, account
        heapq.heappush(self._due, (held.deadline, next(self._number), step.id))
        book.hold(held)
        book.settle(account)
        self._line_up(book, account)
        return False

    def _line_up(self, book: Book, account: Account) -> None:
        """The account has a place in line, or another one."""
        book.line.add(book, account)
        self._lines.setdefault(book.worker.pool, Line()).add(book, account)
        self._touched[book.worker.id] = None

    def first_token(self, step: Step) -> None:
        """The step's prefill is over."""
        if (found := self._running.get(step.id)) is not None and found[0].prefills.pop(step.id, None) is not None:
            self._touched[found[0].worker.id] = None

    def ended(self, step: Step, now: float) -> None:
        """The step has left its worker, or the gate: its usage is known if it ended well. Its session counts it."""
        self._lost.pop(step.id, None)
        if (held := self._unhold(step)) is not None:
            self._ages[step.branch.id, step.link] = held.since, now
            if len(self._ages) > AGES:
                self._ages.popitem(last=False)
            return
        if (found := self._running.pop(step.id, None)) is None:
            return
        book, account = found
        del account.running[step.id]
        book.prefills.pop(step.id, None)
        if (home := book.of.get(step.session)) is not None and step.usage.prompt:
            if step.session not in home.shared:
                self.habits.opened(step)
            shared = home.shared.setdefault(step.session, step.usage.cached)
            own = max(0, step.usage.prompt + step.usage.output - shared)
            if step.session.running == 1 and step.session.id != step.session.workflow.id:  # an agent, now idle
                home.left[step.session] = left = self.habits.left(step)
                own = int(own * self.habits.counting(step, left))
            # A sub-agent that has answered is done, as a rule.
            home.count(step.session, 0 if answers(step) else own)
            book.settle(home)
        if not account.running:
            account.stop(step.branch, self.habits.stopped(step) if step.usage.prompt else None, now)
            self._successions.stopped(book, account, step.flex)
            self._look_again(book, account, now)
        book.settle(account)
        self._touched[book.worker.id] = None

    def stands(self, step: Step) -> Gap:
        """The time until the session's next step, now that the step has ended well and all that it tells is known."""
        gap = self._knowledge.gap(step.branch)
        if step.decision and (account := self._account(step.session, step.decision.worker)) is not None:
            account.gap = gap
        return gap

    def gone(self, session: Session, worker: str | None = None) -> None:
        """The session makes no further call, or none on one worker."""
        for name in [worker] if worker is not None else [name for name, _ in session.seats.values()]:
            if (book := self.books.get(name)) is not None:
                book.drop(session)
                self._touched[name] = None

    def moved(self, session: Session, old: str, new: str) -> None:
        """The session sits at another worker; at another life of the same one what it held is lost already."""
        if old != new:
            if (account := self._account(session, old)) is not None:
                account.back(session)
            self.gone(session, old)

    def lost(self, worker: Worker) -> list[Step]:
        """What the worker held is gone. Returns the steps that were held there, which are not any more."""
        book = self.books.get(worker.id)
        if book is None:
            return []
        for session, account in list(book.of.items()):
            account.forget(session)
            book.drop(session)
        steps = [step for account in list(book.waiting) for step in account.held.values()]
        for held in steps:
            self._unhold(held.step)
            self._lost[held.step.id] = held
        return [held.step for held in steps]

    def admitted(self, now: float, *, everywhere: bool) -> list[Admitted]:
        """The held steps that go now: on workers of which something has changed, or everywhere."""
        names = list(self.books if everywhere else self._touched)
        self._touched = {}
        if not self.held:
            return []
        leased, self._leased = self._leased, {}
        due = [
            one for account, book in leased.items() if account.leased and account.held
            for one in self._grant(book, account, book, now, "leased")
        ]  # fmt: skip
        due += self._overdue(now) if everywhere else []
        return due + [one for name in names for one in self._let_in(self.books[name], now)]

    def faded(self, now: float) -> None:
        """Count idle workflows for less as the chance of their return sinks."""
        while self._fading and self._fading[0][0] <= now:
            _, _, book, account, since = heapq.heappop(self._fading)
            if account.running or account.since != since or account.branch is None or not account.contexts:
                continue
            if now - since >= SETTLED and account.branch.session in account.contexts:
                account.gap = self._knowledge.gap(account.branch)
            account.waited(now - since)
            self._fade(book, account, now)
            if account.alive >= GONE:
                self._look_again(book, account, now)

    def begins(self, step: Step, now: float) -> None:
        """A step has come. If a run begins with it, the one that stopped last may have ended, as habits tell."""
        if len(step.session.workflow.steps) == 1 and (found := self._successions.latest(step)) is not None:
            book, account = found
            account.follow()
            account.worth_until, account.told = 0.0, None
            self._fade(book, account, now)

    def leased(self, session: Session, worker: str) -> bool:
        """Whether the session's workflow has a lease on the worker."""
        account = self._account(session, worker)
        return account is not None and account.leased

    def returning(self, session: Session, worker: str) -> float:
        """The share of workflows that come back after the kind of stop at which the session's stands on the worker."""
        account = self._account(session, worker)
        return 1.0 if account is None else account.returning

    def changed(self) -> list[tuple[Session, str]]:
        """The idle sessions that got or lost a lease since the last call, and where."""
        found = []
        for name, book in self.books.items():
            for account in book.changed:
                account.told = account.leased
                found += [(session, name) for session in account.contexts if not session.running]
            book.changed.clear()
        return found

    def check(self) -> None:
        """Raise AssertionError where a sum and what it counts disagree. For tests."""
        for book in self.books.values():
            book.check()
        assert self.held.keys() == {name for book in self.books.values() for one in book.waiting for name in one.held}
        accounts = [account for book in self.books.values() for account in book.accounts.values()]
        assert self._running.keys() == {name for account in accounts for name in account.running}
        lined = {id(book): book.line.first() for book in self.books.values()}
        assert all((lined[id(book)] is not None) == bool(book.waiting) for book in self.books.values()), "out of line"

    def _begin(self, step: Step, book: Book, tokens: int, now: float) -> None:
        """The step goes to the book's worker: its workflow has a lease there."""
        account, session = book.account(step.session), step.session
        account.leased, account.alive, account.flex, account.course = True, 1.0, step.flex, self.habits.course(step)
        account.running[step.id] = tokens
        self._running[step.id] = book, account
        had = sum(book.worker.residency.tokens(step.branch.id))
        seconds = book.worker.rates.seconds(had, tokens)
        book.prefills[step.id] = seconds, now + 2 * (book.pending(now) + seconds) + 1.0
        own = self._own(book, account, step, tokens)
        account.count(session, max(account.contexts[session], own))
        book.settle(account)
        if account.held:
            self._leased[account] = book
        if book.capacity and book.room < 0:
            self._revoke(book, book.victims(now), 0)

    def _account(self, session: Session, worker: str) -> Account | None:
        return self.books[worker].of.get(session) if worker in self.books else None

    def _own(self, book: Book, account: Account, step: Step, tokens: int) -> int:
        """What a session of so many tokens will count for itself."""
        shared = account.shared.get(step.session)
        return max(0, tokens + book.growth - (self.habits.shares(step, tokens) if shared is None else shared))

    def _unhold(self, step: Step) -> Held | None:
        """The step is not held any more."""
        found = self.held.pop(step.id, None)
        if found is None:
            return None
        held, book, account = found
        del account.held[step.id]
        book.hold(held, -1)
        book.settle(account)
        if account.held:
            self._line_up(book, account)
        self._touched[book.worker.id] = None
        return held

    def _fade(self, book: Book, account: Account, now: float) -> None:
        account.alive = account.returns(now - account.since)
        account.leased = account.leased and account.alive >= GONE
        book.settle(account)
        self._touched[book.worker.id] = None

    def _look_again(self, book: Book, account: Account, now: float) -> None:
        idle = now - account.since
        again = account.since + max(FIRST_LOOK, RENEWED * idle)
        heapq.heappush(self._fading, (again, next(self._number), book, account, account.since))

    def _fits(self, book: Book, account: Account, step: Step, tokens: int) -> bool:
        """Whether there is room for a workflow without a lease, one of whose sessions grows to `tokens`."""
        more = self._own(book, account, step, tokens) - account.contexts[step.session]
        return not book.claimed or account.tokens + max(0, more) <= book.room

    def _need(self, book: Book, account: Account) -> int:
        """The tokens that a workflow without a lease will count for with all its held steps, or all there are."""
        more: dict[Session, int] = {}
        for held in account.held.values():
            session = held.step.session
            own = self._own(book, account, held.step, held.tokens) - account.contexts.get(session, 0)
            more[session] = max(own, more.get(session, 0))
        need = account.tokens + sum(more.values())
        return min(need, int(SHARE * book.capacity)) if book.capacity else need

    def _let_in(self, book: Book, now: float) -> list[Admitted]:
        """Let in who has waited longest, as long as the worker has little to prefill and there is room."""
        admitted: list[Admitted] = []
        while True:
            moved: list[Admitted] = []
            pending = book.pending(now)
            for home, account in self._heads(book, now):
                if pending <= max(LEAST_AHEAD, AHEAD * book.worker.rates.recompute(self._need(book, account))):
                    moved = self._try(book, home, account, now)
                if moved:
                    break
            if not moved:
                break
            admitted += moved
        return admitted

    def _overdue(self, now: float) -> list[Admitted]:
        """Let in whose deadline comes before the next look."""
        admitted: list[Admitted] = []
        while self._due and self._due[0][0] <= now + TICK:
            found = self.held.get(heapq.heappop(self._due)[2])
            if found is not None:
                _, book, account = found
                self._revoke(book, book.victims(now), self._need(book, account))
                admitted += self._grant(book, account, book, now, "deadline")
        return admitted

    def _heads(self, book: Book, now: float) -> list[tuple[Book, Account]]:
        """The first in line at the worker, and the first at others of its pool if it may come, in their order."""
        own, far = book.line.first(), self._lines[book.worker.pool].first() if book.worker.pool in self._lines else None
        found = [own] if own is not None else []
        if far is not None and far[0] is not book and book.worker.state == "up":
            home, head = far
            models = {held.step.model for held in head.held.values()}
            if models <= book.worker.models and now - head.came > home.leaves(head):
                found.insert(0, far)
        return found

    def _try(self, book: Book, home: Book, account: Account, now: float) -> list[Admitted]:
        """Let a workflow's held steps in on a worker, if there is or can be made room for them; else none."""
        need, late = self._need(book, account), account.overdue <= now
        if not book.claimed or not book.capacity:
            return self._grant(home, account, book, now, "room")
        if (victims := self._payable(book, need, now, late)) is None:
            return []
        why = "room" if need <= book.room else "overdue" if late else "revoked idle"
        self._revoke(book, victims, need)
        return self._grant(home, account, book, now, why)

    def _payable(self, book: Book, need: int, now: float, late: bool = False) -> list[tuple[float, Account]] | None:
        """Whose leases may go for so many tokens, and what others grow by, at the going price; None: it takes more."""
        grows, ends = (0.0, 0.0) if late else (book.grows, book.ends)
        if need + book.reserve(grows, ends) <= book.room:
            return []
        victims = book.victims(now)
        price = max(FLOOR, PRICE / (1.0 + EASING * book.wanted / max(1, book.worker.kv_tokens)))
        limit = INFINITY if late else price / book.capacity
        idle, freed, cost = not book.worker.running, 0, 0.0
        back = book.soonest(victims) if idle else 0.0
        for number, (index, victim) in enumerate(victims, 1):
            freed, cost = freed + victim.claim, cost + victim.cost
            if index >= limit and not (idle and cost * back < IDLE):
                break
            grows, ends = grows - victim.grows, ends - victim.ends
            if need + book.reserve(grows, ends) <= book.room + freed:
                return victims[:number]
        return None

    def _grant(self, book: Book, account: Account, to: Book, now: float, why: str) -> list[Admitted]:
        granted, waits = [], account.waits + now - account.came
        for held in list(account.held.values()):
            self._unhold(held.step)
            if to is not book:
                book.drop(held.step.session)
            self._begin(held.step, to, held.tokens, now)
            to.account(held.step.session).waits = waits
            granted.append(Admitted(held.step, to.worker, held.tokens, now - held.since, held.plain, why))
        return granted

    def _revoke(self, book: Book, victims: list[tuple[float, Account]], need: int) -> None:
        """Take leases from these, in their order, until there is room."""
        for _, victim in victims:
            if book.room >= need:
                return
            victim.leased = False
            book.settle(victim)
