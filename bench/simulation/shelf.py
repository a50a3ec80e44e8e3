"""One tier of a worker's KV memory: which prompt pieces it holds, on whose account, and what goes next."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.workloads.runs import Piece, meeting
from kvcache.order import Order
from kvcache.policy import Policy


@dataclass(slots=True, eq=False)
class Held:
    """What a shelf holds of a piece: its first `blocks` blocks. A block belongs to the piece in which it ends.

    `users` counts the requests that use it and the pieces below it that are in use; `below` all pieces below it that
    are held. One without either is a tip: the next to go of its line, and a stack of the eviction order.
    """

    piece: Piece
    above: Held | None
    blocks: int = 0
    users: int = 0
    below: int = 0
    freed: float = 0.0
    block: int = 1
    owners: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Tokens that it holds."""
        return self.blocks * self.block


class Shelf:
    """Blocks of `block` tokens under one eviction policy. What is held is always a prefix of each line.

    vLLM frees a request's blocks at once, tail first, and a prefix is touched with all that uses it, so that no block
    outlives the one before it in vLLM either.
    """

    def __init__(self, blocks: int, block: int, policy: Policy) -> None:
        self.blocks, self.block, self.policy = blocks, block, policy
        self.free = blocks
        self.pinned = 0
        self.private = 0
        self.held: dict[Piece, Held] = {}
        self.order: Order[Held] = Order(policy)
        self._tips: dict[str, Held] = {}
        self._count: dict[str, int] = {}
        self._roles: dict[str, tuple[str, Piece]] = {}

    @property
    def room(self) -> int:
        """Blocks that are free or can be evicted."""
        return self.blocks - self.used

    @property
    def used(self) -> int:
        """Blocks that are in use."""
        return self.private + self.pinned

    def depth(self, piece: Piece | None) -> int:
        """Tokens of the prompt that ends with `piece` which are held, a multiple of the block."""
        while piece is not None:
            held = self.held.get(piece)
            if held is not None and held.blocks:
                return (piece.start // self.block + held.blocks) * self.block
            piece = piece.parent
        return 0

    def size(self, piece: Piece) -> int:
        """The blocks that end in the piece."""
        return piece.end // self.block - piece.start // self.block

    def pin(self, piece: Piece, now: float) -> Held:
        """Keep what is held of the prompt until `unpin`. Adds no blocks."""
        held = self._line(piece, now)
        self._use(held)
        return held

    def unpin(self, held: Held, now: float) -> None:
        """The request has ended: what it used was last used now."""
        held.freed = now
        self._leave(held, now)

    def affords(self, piece: Piece, more: int) -> bool:
        """Whether there is room for what a prompt lacks here and so many blocks more, its own hits not evicted."""
        own, at = 0, self._deepest(piece)
        while at is not None and not at.users:
            own += at.blocks
            at = at.above
        return self._lacks(piece) + more <= self.room - own

    def fill(self, held: Held, now: float) -> None:
        """Make the line down to a pinned piece whole, by eviction if need be; `affords` has said that it can be."""
        need = self._lacks(held.piece)
        self.take(need, now)
        self.private -= need  # they are the line's now
        self._grow(held, need)

    def take(self, blocks: int, now: float) -> None:
        """Allocate blocks that belong to no piece; there must be room."""
        assert blocks <= self.room, "there is no room"
        if blocks > self.free:
            self._evict(blocks - self.free, now)
        self.free -= blocks
        self.private += blocks

    def give(self, blocks: int) -> None:
        """Free blocks that belong to no piece."""
        self.free += blocks
        self.private -= blocks

    def keep(self, piece: Piece, blocks: int, now: float) -> tuple[Held, int]:
        """Make up to `blocks` private blocks the first ones of a piece below a whole line.

        Returns it, pinned, and the number that it took.
        """
        held = self.pin(piece, now)
        more = max(0, min(blocks, self.size(piece)) - held.blocks)
        self.private -= more
        self._resize(held, more)
        self.pinned += more
        return held, more

    def drop(self, held: Held, tokens: int) -> None:
        """Free what a pinned line holds beyond `tokens` and nobody else uses: it was never computed."""
        one: Held | None = held
        while one is not None and one.users == 1 and one.below == (one is not held):
            keep = max(0, tokens // self.block - one.piece.start // self.block)
            lost = max(0, one.blocks - keep)
            self._resize(one, -lost)
            self.pinned -= lost
            self.free += lost
            one = one.above

    def store(self, piece: Piece, now: float) -> int:
        """Copy a line in, as much of its start as there is room for; it was used now. Returns the blocks added."""
        held = self.pin(piece, now)
        added = min(self._lacks(piece), self.room)
        self.take(added, now)
        self.private -= added
        self._grow(held, added)
        self.unpin(held, now)
        return added

    def own(self, owner: str, role: str, piece: Piece, now: float) -> None:
        """The owner's latest step is this prompt. What it no longer contains is superseded.

        `role`, an owner too, has what the role's last steps have in common.
        """
        self._move(owner, self._deepest(piece), now)
        last = self._roles.get(role)
        self._roles[role] = (owner, piece)
        if last is not None and last[0] != owner:
            line = meeting(last[1], piece)
            self._move(role, self._deepest(line), now)

    def release(self, owner: str, now: float) -> None:
        """The owner's KV is dead."""
        if owner in self._count:
            self.policy.released(owner, now)
            self._move(owner, None, now)
        self.policy.forgotten(owner)

    def changed(self, owner: str, now: float) -> None:
        """Something was told of the owner."""
        self.order.changed(owner, now)

    def check(self) -> None:
        """Raise AssertionError where a counter and what it counts disagree."""
        total = sum(h.blocks for h in self.held.values())
        assert self.free >= 0
        assert self.free + self.private + total == self.blocks, "blocks are lost or doubled"
        assert self.pinned == sum(h.blocks for h in self.held.values() if h.users), "pinned blocks are miscounted"
        for held in self.held.values():
            assert held.above is None or self.depth(held.above.piece) >= held.above.piece.end // self.block * self.block
            assert held.blocks <= self.size(held.piece)

    def _resize(self, held: Held, by: int) -> None:
        """More or less of the piece is held."""
        held.blocks += by

    def _lacks(self, piece: Piece) -> int:
        return piece.end // self.block - self.depth(piece) // self.block

    def _deepest(self, piece: Piece | None) -> Held | None:
        """The last piece of a prompt that is held."""
        while piece is not None and piece not in self.held:
            piece = piece.parent
        return self.held[piece] if piece is not None else None

    def _line(self, piece: Piece, now: float) -> Held:
        """The holding of a piece, made with all above it where there is none."""
        new: list[Piece] = []
        at: Piece | None = piece
        while at is not None and at not in self.held:
            new.append(at)
            at = at.parent
        held = self.held[at] if at is not None else None
        for one in reversed(new):
            if held is not None:
                if not held.below and not held.users:
                    self.order.discard(held)
                held.below += 1
            held = self.held[one] = Held(one, held, block=self.block, freed=now)
        assert held is not None
        return held

    def _use(self, held: Held) -> None:
        at: Held | None = held
        while at is not None:
            at.users += 1
            if at.users > 1:
                return
            if not at.below:
                self.order.discard(at)
            self.pinned += at.blocks
            at = at.above

    def _leave(self, held: Held, now: float) -> None:
        at: Held | None = held
        while at is not None:
            at.users -= 1
            if at.users:
                break
            self.pinned -= at.blocks
            at = at.above
        self._settle(held, now)

    def _settle(self, held: Held, now: float) -> None:
        """Let a holding that nobody uses join the order if it is a tip; what is empty goes, and so on upwards."""
        at: Held | None = held
        while at is not None and not at.users and not at.below:
            if at.blocks:
                self.order.add(at, now)
                return
            del self.held[at.piece]
            for owner in at.owners:
                self._lost(owner, at)
            above = at.above
            if above is not None:
                above.below -= 1
                above.freed = max(above.freed, at.freed)  # whoever used the tail used the rest
            at = above

    def _grow(self, held: Held, blocks: int) -> None:
        """Share out so many new blocks over a pinned line, from its start."""
        lacking = []
        at: Held | None = held
        while at is not None:
            if size := self.size(at.piece):
                if at.blocks == size:
                    break
                lacking.append(at)
                if at.blocks:
                    break
            at = at.above
        for one in reversed(lacking):
            more = min(blocks, self.size(one.piece) - one.blocks)
            self._resize(one, more)
            self.pinned += more
            blocks -= more
        assert not blocks, "more blocks than the line lacks"

    def _evict(self, blocks: int, now: float) -> None:
        self.policy.pressed(1 - self.free / self.blocks)
        while blocks > 0:
            stack = self.order.first(now)
            assert isinstance(stack, Held), "there is room, so there is a tip"
            taken = min(blocks, stack.blocks)
            self.free += taken
            blocks -= taken
            self._resize(stack, -taken)
            if not stack.blocks:
                self.order.discard(stack)
                self._settle(stack, now)

    def _move(self, owner: str, tip: Held | None, now: float) -> None:
        """The owner's line ends at `tip` now: tag what is new on it, untag what it no longer goes through."""
        old = self._tips.pop(owner, None)
        if tip is not None:
            self._tips[owner] = tip
        meeting = tip
        while meeting is not None and owner not in meeting.owners:
            self._tag(meeting, owner, now)
            meeting = meeting.above
        while old is not None and old is not meeting:
            self._untag(old, owner, now)
            old = old.above

    def _tag(self, held: Held, owner: str, now: float) -> None:
        held.owners.add(owner)
        self._count[owner] = self._count.get(owner, 0) + 1
        self._reorder(held, now)

    def _untag(self, held: Held, owner: str, now: float) -> None:
        held.owners.discard(owner)
        self._uncount(owner)
        self._reorder(held, now)

    def _lost(self, owner: str, held: Held) -> None:
        """The end of an owner's line is gone."""
        if self._tips.get(owner) is held:
            del self._tips[owner]
            if held.above is not None:
                self._tips[owner] = held.above
        self._uncount(owner)

    def _uncount(self, owner: str) -> None:
        self._count[owner] -= 1
        if not self._count[owner]:
            del self._count[owner]
            self.policy.forgotten(owner)

    def _reorder(self, held: Held, now: float) -> None:
        if not held.users and not held.below and held.blocks:
            self.order.discard(held)
            self.order.add(held, now)
