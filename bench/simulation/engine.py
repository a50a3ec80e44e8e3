"""A modelled vLLM engine: continuous batching with chunked prefill over a block pool, in jumps between events.

Within a jump the batch does not change, so that the time of its n steps has a closed form. As in vLLM 0.32: running
sequences come first and share the step's token budget; waiting ones join in order while budget and blocks last, and
nothing overtakes the first that does not fit; a prompt's blocks are allocated whole; where decoding finds no block, the
sequence that joined last is preempted and recomputed, and is then the first that waits, but where they have an order.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.simulation.guard import Guard
from bench.simulation.joint import Lower, Upper
from bench.simulation.jump import Jump, Sequence, computed, dealt, fitting
from bench.simulation.profile import Profile
from bench.simulation.shelf import Held, Shelf
from bench.simulation.system import Turn, role_of
from bench.workloads.runs import Piece
from kvcache.chunks import longest, shortest
from kvcache.policy import Hint, Policy

Key = Callable[[Turn], float | None]


class Engine:
    """One worker. `clock` tells the time in seconds; `wake` asks that `advance` and `plan` be called at another."""

    def __init__(
        self,
        index: int,
        profile: Profile,
        tier_tokens: int,
        clock: Callable[[], float],
        wake: Callable[[Engine, float], None],
    ) -> None:
        self.index, self.profile = index, profile
        self.kv_tokens, self.tier_tokens = profile.kv_tokens, tier_tokens
        self._clock, self._wake = clock, wake
        self._queue: list[Sequence] = []
        self._batch: list[Sequence] = []
        self._loading: list[tuple[float, Sequence]] = []
        self._arriving: dict[Piece, float] = {}
        self._fetched: list[tuple[float, Held]] = []
        self._jump: Jump | None = None
        self._most = profile.budget
        self._link_free = 0.0
        self.up = True
        self.busy_seconds = 0.0
        self.prefilled_tokens = 0
        self.preemptions = 0

    def obey(self, device: Policy, host: Policy, key: Key, ours: bool = False, threshold: float = 1.0) -> None:
        """Take the policies of the two tiers and the order of the waiting queue; before anything else.

        `ours`: our plug-in is in, with its guard. The tiers are ranked as one, where there are two (else all goes to
        the host that it can take), and short prefills pass long ones. Else one may take `threshold` of a step where
        there are two.
        """
        block = self.profile.block
        blocks, below = self.kv_tokens // block, self.tier_tokens // block
        self._guard = Guard(device, host, max(blocks, below), block, self._rerank) if ours else None
        if self._guard is not None:
            device, host = self._guard.device, self._guard.host
        lower = Lower(below, block, host, self._clock) if ours and below else None
        self.host: Shelf = lower or Shelf(below, block, host)
        self.device = Upper(blocks, block, device, lower) if lower else Shelf(blocks, block, device)
        self._tiers = (self.device, self.host) if self.host.blocks else (self.device,)
        self._key, self._ours, self._threshold = key, ours, threshold

    def lose(self) -> list[Turn]:
        """The engine dies with all that it held. Returns its turns. It must `obey` anew before it is up."""
        turns = [*self.waiting, *self.running, *(one.turn for _, one in self._loading)]
        self._queue, self._batch, self._loading, self._fetched = [], [], [], []
        self._arriving, self._jump, self._link_free, self.up = {}, None, 0.0, False
        return turns

    @property
    def waiting(self) -> list[Turn]:
        """Turns that have no blocks yet, in their order."""
        return [one.turn for one in self._queue]

    @property
    def running(self) -> list[Turn]:
        """Turns in the batch."""
        return [one.turn for one in self._batch]

    @property
    def load(self) -> int:
        """Turns that wait, load or run."""
        return len(self._queue) + len(self._batch) + len(self._loading)

    def resident(self, piece: Piece) -> tuple[int, int]:
        """Tokens of a prompt's start on the device, and in all with what follows them in the host tier."""
        device = self.device.depth(piece)
        return device, max(device, self.host.depth(piece))

    def tell(self, owner: str, hint: Hint) -> None:
        """The core foretells something of an owner."""
        now = self._clock()
        for shelf in self._tiers:
            shelf.policy.told({owner: hint}, now)
            shelf.changed(owner, now)

    def release(self, owner: str) -> None:
        """The owner's KV is dead."""
        now = self._clock()
        for shelf in self._tiers:
            shelf.release(owner, now)

    def prefetch(self, piece: Piece) -> int:
        """Load the pieces of a prompt that the host tier has whole, where there is room. Returns the tokens."""
        now, block = self._clock(), self.profile.block
        hosted, at = self.host.depth(piece), piece
        while at.end // block * block > hosted:
            if at.parent is None:
                return 0
            at = at.parent
        more = (at.end - self.device.depth(at)) // block
        if more <= 0 or at in self._arriving or not self.device.affords(at, self._promised()):
            return 0
        line = self.device.pin(at, now)
        self.device.fill(line, now)
        self._link_free = max(self._link_free, now) + self.profile.restore(more * block)
        self._arriving[at] = self._link_free
        self._fetched.append((self._link_free, line))
        self._wake(self, self._link_free)
        return more * block

    def submit(self, turn: Turn, now: float) -> None:
        """A turn joins the waiting queue."""
        for shelf in self._tiers:
            shelf.policy.started(turn.owner, now)
            shelf.changed(turn.owner, now)
        size = turn.call.prompt.end
        blocked = bool(self._queue)
        self._queue.append(Sequence(turn, size, size))
        if self._jump is None:
            self._wake(self, now)
        elif not blocked or self._key(turn) is not None:
            self._cut(now)

    def withdraw(self, turn: Turn) -> None:
        """Take back a turn that still waits, to serve it elsewhere. ValueError where it does not wait here."""
        one = next((s for s in self._queue if s.turn is turn), None)
        if one is None:
            raise ValueError("the turn does not wait here")
        self._queue.remove(one)
        now = self._clock()
        for shelf in self._tiers:
            shelf.policy.finished(turn.owner, 0, now)
        self.release(turn.owner)

    def advance(self, now: float) -> tuple[list[Turn], list[Turn]]:
        """Apply what has happened until `now`. Returns the turns with a first token, and those that have ended."""
        for _, held in [f for f in self._fetched if f[0] <= now]:
            self._arriving.pop(held.piece, None)
            self.device.unpin(held, now)
        self._fetched = [f for f in self._fetched if f[0] > now]
        if ready := [one for at, one in self._loading if at <= now]:
            self._loading = [entry for entry in self._loading if entry[0] > now]
            self._cut(now)
            self._batch += ready
        jump = self._jump
        if jump is None or now < jump.start + jump.seconds(jump.steps) - 1e-9:
            return [], []
        self._jump = None
        return self._apply(jump, now)

    def plan(self, now: float) -> None:
        """Begin the next jump, if the engine is idle and there is something to do."""
        for _ in range(2):  # a preempted sequence may be all there is: it enters again
            if self._jump is not None:
                return
            if self._queue and self._key(self._queue[0].turn) is not None:
                self._queue.sort(key=self._place)
            self._most = self._longest()
            if self._ours:
                self._batch.sort(key=self._long())
            self._admit(now)
            self._jump = self._next(now)
            if self._jump is not None:
                self._wake(self, now + self._jump.seconds(self._jump.steps))

    def _cut(self, now: float) -> None:
        """End the jump at the next step boundary, where a newcomer may join."""
        jump = self._jump
        if jump is None or jump.steps == 1:
            return
        if self._threshold == 1 and not self._ours and jump.chunks and self._left(jump.chunks) <= 0:
            return  # prefill takes the whole budget until the end of the jump
        steps = max(1, jump.covering(now - jump.start))
        if steps < jump.steps:
            jump.steps = steps
            self._wake(self, jump.start + jump.seconds(steps))

    def _left(self, chunks: list[tuple[Sequence, int]]) -> int:
        """The budget of a step that decoding and these chunks leave."""
        decoding = sum(one.done >= one.target for one in self._batch)
        return self.profile.budget - decoding - sum(chunk for _, chunk in chunks)

    def _chunks(self) -> list[tuple[Sequence, int]]:
        """What each prefilling sequence gets in the next step, in the order of the batch."""
        return dealt((one for one in self._batch if one.left > 0), self._left([]), self._most)

    def _long(self) -> Callable[[Sequence], bool]:
        bound = shortest(self._left([]))
        return lambda one: one.left > bound

    def _longest(self) -> int:
        """The most tokens that one sequence may prefill in the next step."""
        if not self._ours:
            return int(self._threshold * self.profile.budget) if self.load > 1 else self.profile.budget
        room = self._left([])
        left = [one.left for one in self._batch if one.left > 0]
        return longest(room, left, self._coming() if left else ())

    def _coming(self) -> list[int]:
        """What the first that waits has to compute when it joins, 1 where it is to be loaded; none if it cannot."""
        first = self._queue[0] if self._queue and self._places > 0 else None
        if first is None or not self.device.affords(first.turn.call.prompt, first.needs(self.profile.block)):
            return []
        on_device, in_all = self._found(first)
        return [1 if in_all > on_device else first.target - on_device]

    def _found(self, one: Sequence) -> tuple[int, int]:
        """Tokens of a sequence that need not be computed, on the device and in all: of what is there, in whole blocks.

        What another sequence is computing is there as far as that has come.
        """
        on_device, in_all = self.resident(one.turn.call.prompt)
        if (come := computed(one, on_device, self._batch)) < on_device:
            on_device = in_all = come
        block, most = self.profile.block, one.target - 1
        return min(on_device, most) // block * block, min(in_all, most) // block * block

    @property
    def _places(self) -> int:
        return self.profile.sequences - len(self._batch) - len(self._loading)

    def _place(self, one: Sequence) -> tuple[float, float]:
        return self._key(one.turn) or 0.0, one.turn.sent

    def _admit(self, now: float) -> None:
        left = self._left(self._chunks()) if self._queue else 0
        while self._queue and left > 0 and self._places > 0:
            one = self._queue[0]
            if not self._enter(one, now):
                return
            self._queue.pop(0)
            if one in self._batch:
                left -= min(left, one.left, self._most)

    def _enter(self, one: Sequence, now: float) -> bool:
        """Give a sequence its blocks, and what the caches have of its prompt; it joins the batch or loads."""
        piece, private, used = one.turn.call.prompt, one.needs(self.profile.block), self.device.used
        if not self.device.affords(piece, private):
            return False
        on_device, in_all = self._found(one)
        line = self.device.pin(piece, now)
        self.device.fill(line, now)
        self.device.take(private, now)
        one.line, one.private, one.done = line, private, in_all
        for shelf in self._tiers:
            shelf.own(one.turn.owner, role_of(one.turn.run.tenant, one.turn.call.role), piece, now)
        if self._guard is not None:
            self._guard.looked(one, piece, one.target - 1, in_all, (used, self.device.used), now)
        if not one.tries:
            one.turn.record.cached, one.turn.record.hosted = on_device, in_all - on_device
        ready = self._ready(piece, in_all - on_device, now)
        if ready > now:
            self._loading.append((ready, one))
            self._wake(self, ready)
        else:
            self._batch.append(one)
        return True

    def _ready(self, piece: Piece, load: int, now: float) -> float:
        """When the tokens to load, and those that are on their way already, are there."""
        ready = now
        at: Piece | None = piece
        while self._arriving and at is not None:
            ready = max(ready, self._arriving.get(at, now))
            at = at.parent
        if load:
            self._link_free = max(self._link_free, now) + self.profile.restore(load)
            ready = max(ready, self._link_free)
        return ready

    def _next(self, now: float) -> Jump | None:
        """The longest jump from here; sequences are preempted until one step at least has its blocks."""
        preempted = False
        while self._batch:
            chunks = self._chunks()
            decoding = [one for one in self._batch if one.done >= one.target]
            steps = 1 if preempted else min((one.turn.call.output - one.generated for one in decoding), default=1 << 30)
            if chunks:
                first, chunk = chunks[0]
                whole = chunk + len(decoding) == self.profile.budget and self._most == self._longest()
                whole &= not self._ours or all(map(self._long(), (one for one in self._batch if one.left > 0)))
                steps = min(steps, first.left // chunk if whole else 1)
            steps = self._affordable(decoding, steps)
            if steps:
                return self._timed(now, chunks, decoding, steps)
            self._preempt(now)
            preempted = True  # it may enter again after the next step
        return None

    def _timed(self, now: float, chunks: list[tuple[Sequence, int]], decoding: list[Sequence], steps: int) -> Jump:
        p, n = self.profile, len(decoding)
        tokens = sum(chunk for _, chunk in chunks)
        attended = sum(chunk * (one.done + chunk / 2) for one, chunk in chunks)
        context = sum(one.size + one.generated for one in decoding)
        base = p.step + p.decode * n + p.context * context + p.prefill * tokens + p.attention * attended
        growth = chunks[0][1] ** 2 if chunks else 0
        return Jump(now, steps, base, p.context * n + p.attention * growth, chunks)

    def _promised(self) -> int:
        """The blocks that the jump in progress will need."""
        steps = self._jump.steps if self._jump else 0
        return sum(one.growth(steps, self.profile.block) for one in self._batch if one.done >= one.target)

    def _affordable(self, decoding: list[Sequence], steps: int) -> int:
        """The most steps, up to `steps`, for whose tokens there are blocks."""
        room, block = self.device.room, self.profile.block
        return fitting(steps, lambda n: sum(one.growth(n, block) for one in decoding) <= room)

    def _preempt(self, now: float) -> None:
        last = self._batch[-1]
        one = last if self._key(last.turn) is None else max(self._batch, key=self._place)
        self._batch.remove(one)
        assert one.line is not None
        self.preemptions += 1
        used = self.device.used
        self.device.give(one.private)
        self.device.drop(one.line, one.done)
        self.device.unpin(one.line, now)
        if self._guard is not None:
            self._guard.freed(one, one.turn.call.prompt, one.done, used, now)
        one.line, one.private, one.done = None, 0, 0
        one.target = one.size + one.generated
        one.tries += 1
        self._queue.insert(0, one)

    def _apply(self, jump: Jump, now: float) -> tuple[list[Turn], list[Turn]]:
        self.busy_seconds += jump.seconds(jump.steps)
        first: list[Turn] = []
        for one in self._batch:
            if one.done >= one.target:
                grown = one.growth(jump.steps, self.profile.block)
                if grown:
                    self.device.take(grown, now)
                    one.private += grown
                one.generated += jump.steps
        for one, chunk in jump.chunks:
            one.done += chunk * jump.steps
            self.prefilled_tokens += chunk * jump.steps
            if one.done >= one.target:
                one.generated += 1
                if not one.seen:
                    one.seen = True
                    first.append(one.turn)
        over = [one for one in self._batch if one.done >= one.target and one.generated >= one.turn.call.output]
        if over:
            self._batch = [one for one in self._batch if one not in over]
            for one in over:
                self._end(one, now)
        return first, [one.turn for one in over]

    def _end(self, one: Sequence, now: float) -> None:
        """Free the sequence's blocks into the cache. What it generated is cached too, needed again or not."""
        call, block, line = one.turn.call, self.profile.block, one.line
        role = role_of(one.turn.run.tenant, call.role)
        assert line is not None
        before = self.device.used
        full = (one.size + one.generated - 1) // block - one.size // block
        tail = call.answer or Piece("", one.generated, call.prompt)
        answer, used = self.device.keep(tail, min(full, one.private), now)
        self.device.give(one.private - used)
        self.device.own(one.turn.owner, role, tail, now)
        self.device.unpin(line, now)
        self.device.unpin(answer, now)
        if self._guard is not None:
            self._guard.freed(one, tail, one.size + one.generated - 1, before, now)
        if self.host.blocks:
            stored = call.answer if call.answer is not None and answer.blocks else call.prompt
            self.host.store(stored, now)
            self.host.own(one.turn.owner, role, stored, now)
        for shelf in self._tiers:
            shelf.policy.finished(one.turn.owner, one.size + one.generated, now)
            shelf.changed(one.turn.owner, now)

    def _rerank(self, now: float) -> None:
        for shelf in self._tiers:
            shelf.order.rerank(now)
