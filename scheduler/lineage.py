"""Descent without a name: which run a prompt goes on with, by what it repeats of earlier prompts and answers.

Evidence, the strongest first: a tool call that a worker minted, a worker's own answer after an earlier prompt, the
messages of an earlier prompt alone, an assistant turn with what answered it, an output handed over as a whole. What
fits two runs is no evidence, and what is short enough to be anybody's must be followed by the worker's own answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from scheduler.graph import CANCELLED, FAILED, FINISHED, PLACED, REJECTED, Branch, Session, Step, Workflow
from scheduler.handover import RECENT_SECONDS, Handovers, Source
from scheduler.prompt import Answer, Message, Prompt, call_key, said

CONTINUES, REPEATS, FORKS, PARTS = "continues", "repeats", "forks", "parts"
REWRITES, JOINS, SPAWNED = "rewrites", "joins", "spawned"

RESAMPLE_SECONDS = 2.0
"""How long after an answer the same opening still counts as the same run, sampled again."""
MOST_SAMPLES = 8
MOST_ENDS = 1024
TRANSFERS = ("transfer_to_", "handoff_to_")
DISTINCT = 128  # characters from which messages are one run's own
MOST_MARKS = 4096
MOST_RECENT = 32
MOST_AMBIGUOUS = 65_536

Scope = Session | Workflow | None


@dataclass(frozen=True, slots=True)
class Kin:
    """How a prompt descends from `branch`.

    It continues it, repeats its latest prompt, forks off it, rewrites its history (a compaction), joins its workflow as
    another agent, was spawned by it (its tool call's task), or parts from its run (it was a twin). `known` messages of
    the prompt are not new; `step` is the one whose answer it goes on from, `shared` one of another agent that has more
    of its history; `asked` are the words of the task.
    """

    how: str
    rule: str
    branch: Branch
    known: int = 0
    step: Step | None = None
    shared: Step | None = None
    asked: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Ends:
    """The steps with the same messages; some are `lost` where there were too many."""

    steps: list[Step] = field(default_factory=list)
    lost: bool = False


class _Unsure(Exception):
    """Two runs fit."""


class Lineage:
    """What is remembered of prompts and answers, by digests that differ between tenants. Bounded per session."""

    def __init__(self) -> None:
        self.handovers = Handovers()
        self._ends: dict[int, _Ends] = {}
        self._calls: dict[int, Step] = {}
        self._exchanges: dict[int, Step] = {}
        self._ambiguous: OrderedDict[int, None] = OrderedDict()

    def find(self, prompt: Prompt, scope: Scope, now: float) -> Kin | None:
        """The closest kin of a prompt in a session or workflow, or among all the tenant's. Linear in its messages.

        Where the latest tool call in it that is known was minted in one workflow, only in that one.
        """
        named, minted = scope is not None, self._minted(prompt)
        if scope is None and minted:
            scope = minted.session.workflow
        shared: Step | None = None
        try:
            for i in range(len(prompt.links) - 1, -1, -1):
                if (ends := self._ends.get(prompt.links[i])) is None:
                    continue
                mine = [s for s in ends.steps if s.branch.look == prompt.role and _within(s, scope)]
                if i == len(prompt.links) - 1:
                    kin = self._again(prompt, mine, scope, minted, named, now)
                else:
                    kin = self._onward(prompt, i, mine, isinstance(scope, Session), ends.lost)
                if kin and shared and shared.session.workflow is kin.branch.session.workflow:
                    return replace(kin, shared=shared)
                if kin:
                    return kin
                others = [s for s in ends.steps if _within(s, scope)]
                shared = shared or _sharing(prompt, i, others, minted is not None, now)
        except _Unsure:
            return None
        found = [kin for kin in (self._by_call(prompt, scope), self._by_exchange(prompt, scope)) if kin]
        if shared:
            found.append(Kin(JOINS, "lineage:history", shared.branch, len(prompt.messages) - 1, shared))
        return min(found, key=lambda kin: kin.how != REWRITES, default=None)

    def arrived(self, step: Step, prompt: Prompt, opening: bool) -> None:
        """Remember the prompt of a step that has been linked; an `opening` has no known history."""
        session, link = step.session, prompt.links[-1]
        step.branch.end = step.link = link
        step.head, step.opening = prompt.head, opening
        ends = self._ends.setdefault(link, _Ends())
        ends.steps.append(step)
        if len(ends.steps) > MOST_ENDS:
            del ends.steps[0]
            ends.lost = True
        self._mark(session, link)
        for _, key in prompt.exchanges():
            self._remember(self._exchanges, key, step)
            break

    def finished(self, step: Step, answer: Answer) -> None:
        """Remember what a step has put out."""
        tenant = step.session.workflow.tenant
        step.said = said(tenant, answer)
        for call in answer.calls:
            if key := call_key(tenant, call.id):
                self._remember(self._calls, key, step)
        beside = step.opening and step.taken is None
        self.handovers.offer(step, answer, beside)

    def parted(self, step: Step, old: Session) -> None:
        """The step was another run's than that session's, and has a session of its own now: so have its answers."""
        session = step.session
        self._mark(session, step.link)
        for key in [key for key in old.recent if self._calls.get(key) is step]:
            old.recent.remove(key)
            session.recent.append(key)
        mine = [source for source in old.outputs if source.step == step.id]
        old.outputs = [source for source in old.outputs if source.step != step.id]
        session.outputs += mine
        for source in mine:
            source.branch = step.branch

    def fed(self, prompt: Prompt, known: int, now: float) -> list[Source]:
        """The outputs that a prompt's messages after the `known` ones hold as a whole."""
        return self.handovers.find(prompt.tenant, (message.text for message in prompt.messages[known:]), now)

    def _mark(self, session: Session, link: int) -> None:
        """The session is among those that the link leads to."""
        session.marks.append(link)
        if len(session.marks) > MOST_MARKS:  # not the first, where forks of the whole run would begin
            self._unmark(session, session.marks.pop(1))

    def forget(self, session: Session) -> None:
        """The session is forgotten: so is what it was known by."""
        for link in set(session.marks):
            self._unmark(session, link)
        for key in session.recent:
            self._forget_key(session, key)
        for source in session.outputs:
            self.handovers.forget(source)
        del session.marks[:], session.recent[:], session.outputs[:]

    def _unmark(self, session: Session, link: int) -> None:
        if ends := self._ends.get(link):
            ends.steps = [step for step in ends.steps if step.session is not session]
            if not ends.steps:
                del self._ends[link]

    def _onward(self, prompt: Prompt, i: int, mine: list[Step], told: bool, lost: bool) -> Kin | None:
        """Kin whose prompt was messages 0 to i, and whose answer the next message is; in a session that is `told`."""
        turn = prompt.messages[i + 1]
        minted = [step for key in turn.calls if (step := self._calls.get(key)) and step in mine]
        for sure in (minted, [s for s in mine if s.said == turn.digest], [s for s in mine if s.taken == turn.digest]):
            if sure:
                return _goes_on(_the_one(sure, prompt.head), prompt, i)
        mine = [s for s in mine if s.state in (PLACED, FINISHED)]
        if not mine:
            return None
        # No answer that is known: the client has rewritten it, if this is that run at all.
        if told:
            return _goes_on(max(mine, key=lambda s: s.branch.end == s.link), prompt, i)
        waiting = [s for s in mine if s.taken is None and not _is_taken_up(s)] if mine[0].opening else mine
        if lost or not waiting or len({s.session for s in mine}) > 1 or _length(prompt, i) < DISTINCT:
            raise _Unsure
        return _goes_on(waiting[-1] if waiting[-1].branch.end == prompt.links[i] else waiting[0], prompt, i)

    def _again(
        self, prompt: Prompt, mine: list[Step], scope: Scope, minted: Step | None, named: bool, now: float
    ) -> Kin | None:
        """Kin that had the very same prompt, unless a run waits that has come to it just now."""
        if minted:
            mine = [s for s in mine if not s.after or minted.id in s.after]
        mine = [s for s in mine if s.head == prompt.head or not s.opening]
        if not mine:
            return None
        if mine[-1].opening:
            step = _sampled_again(mine, now, named)
            return Kin(REPEATS, "lineage:repeat", step.branch, len(prompt.links)) if step else None
        if rival := self._rival(prompt, scope, mine):
            return rival
        if len({s.session for s in mine}) > 1:
            mine = [s for s in mine if s.branch.end == s.link]
        if len({s.session for s in mine}) != 1:
            raise _Unsure
        branch = mine[-1].branch
        if branch.end != mine[-1].link:
            return Kin(FORKS, "lineage:fork", branch, len(prompt.links))
        return Kin(REPEATS, "lineage:repeat", branch, len(prompt.links))

    def _rival(self, prompt: Prompt, scope: Scope, old: list[Step]) -> Kin | None:
        """Another run that waits for just this message. Raises _Unsure where it is not the later of the two."""
        sessions = {s.session for s in old}
        for i in range(len(prompt.links) - 2, -1, -1):
            ends, turn = self._ends.get(prompt.links[i]), prompt.messages[i + 1]
            waiting = [
                s for s in (ends.steps if ends else ())
                if s.branch.look == prompt.role and s.taken is None and s.said == turn.digest
                and s.branch.end == s.link and s.session not in sessions and _within(s, scope)
            ]  # fmt: skip
            if waiting:
                if waiting[-1].arrived < max(s.arrived for s in old):
                    raise _Unsure
                return _goes_on(_the_one(waiting, prompt.head), prompt, i)
            if ends:
                break
        return None

    def _minted(self, prompt: Prompt) -> Step | None:
        """The step that made the latest tool call in the prompt of which one is known."""
        for message in reversed(prompt.messages):
            for key in message.calls:
                if step := self._calls.get(key):
                    return step
        return None

    def _by_call(self, prompt: Prompt, scope: Scope) -> Kin | None:
        """By the latest tool call that a worker minted for an agent of this role, else for any."""
        other: Kin | None = None
        for i in range(len(prompt.messages) - 1, -1, -1):
            for key in prompt.messages[i].calls:
                step = self._calls.get(key)
                if step and _within(step, scope):
                    kin = _rewritten(prompt, step, "lineage:tool-call", i + 1)
                    if kin.how == REWRITES:
                        return kin
                    other = other or kin
        return other

    def _by_exchange(self, prompt: Prompt, scope: Scope) -> Kin | None:
        """By two assistant turns with what answered them, both of one session."""
        found: tuple[Step, int] | None = None
        for last, key in prompt.exchanges():
            step = self._exchanges.get(key)
            if step is None or not _within(step, scope):
                continue
            if found is None:
                found = step, last + 1
            elif step.session is found[0].session and _length(prompt, found[1] - 1) >= DISTINCT:
                return _rewritten(prompt, found[0], "lineage:compaction", found[1])
        return None

    def _remember(self, index: dict[int, Step], key: int, step: Step) -> None:
        """Keep the key for the step; one that two sessions have had says nothing from then on."""
        if key in self._ambiguous:
            self._ambiguous.move_to_end(key)
            return
        old = index.get(key)
        if old is not None and old.session is not step.session:
            del index[key]
            self._ambiguous[key] = None
            if len(self._ambiguous) > MOST_AMBIGUOUS:
                self._ambiguous.popitem(last=False)
            return
        index[key] = step
        if old is None:
            step.session.recent.append(key)
            if len(step.session.recent) > MOST_RECENT:
                self._forget_key(step.session, step.session.recent.pop(0))

    def _forget_key(self, session: Session, key: int) -> None:
        for index in (self._calls, self._exchanges):
            if (step := index.get(key)) and step.session is session:
                del index[key]


def _within(step: Step, scope: Scope) -> bool:
    return scope is None or step.session is scope or step.session.workflow is scope


def _length(prompt: Prompt, i: int) -> int:
    return sum(len(message.text) for message in prompt.messages[: i + 1])


def _is_taken_up(step: Step) -> bool:
    """Whether the run of an opening has gone on from another answer to it."""
    return step.branch.end != step.link


def _the_one(steps: list[Step], head: int) -> Step:
    """The step that a prompt with this system prompt goes on from. Raises _Unsure where two runs fit."""
    if len(steps) == 1:
        return steps[0]
    for narrow in (
        lambda s: True,
        lambda s: s.head == head,
        lambda s: s.head == head and s.taken is None and s.branch.end == s.link,
    ):
        left = [s for s in steps if narrow(s)]
        if len({s.session for s in left}) == 1:
            return next((s for s in left if s.taken is None), left[-1])
    raise _Unsure


def _goes_on(step: Step, prompt: Prompt, i: int) -> Kin:
    """Kin of a prompt that goes on from the answer to a step whose messages were 0 to i."""
    branch = step.branch
    if branch.end == step.link:
        return Kin(CONTINUES, "lineage:prefix", branch, i + 1, step)
    if step.opening and step.taken is None:
        return Kin(PARTS, "lineage:twin", branch, i + 1, step)
    return Kin(FORKS, "lineage:fork", branch, i + 1, step)


def _sampled_again(steps: list[Step], now: float, named: bool) -> Step | None:
    """The latest sample of a run that waits at its opening: it runs, it failed, or its answer is a moment old."""
    latest = steps[-1]
    run = [s for s in steps if s.session is latest.session]
    if any(s.taken is not None for s in run) or (len(run) >= MOST_SAMPLES and not named):
        return None
    failed = latest.state in (FAILED, CANCELLED, REJECTED)
    again = named or failed or latest.finished is None or now - latest.finished <= RESAMPLE_SECONDS
    return latest if again else None


def _sharing(prompt: Prompt, i: int, steps: Iterable[Step], sure: bool, now: float) -> Step | None:
    """The step of another agent's with the same history up to message i; None where two workflows have one.

    `sure`: a tool call in the prompt is known to be of this workflow.
    """
    rest = prompt.messages[i + 1 :]
    same: list[Step] = []
    for step in steps:
        history = not step.opening and (sure or _length(prompt, i) >= DISTINCT)
        answer = rest and step.said == rest[0].digest and (sure or _length(prompt, i + 1) >= DISTINCT)
        if history or answer:
            same.append(step)
        elif step.branch.last and rest and _is_transfer(step.branch.last, rest, now):
            same.append(step.branch.last)
    return same[-1] if len({s.session.workflow for s in same}) == 1 else None


def _is_transfer(step: Step, rest: Sequence[Message], now: float) -> bool:
    """Whether a branch's last step called a tool that hands over to an agent whom these messages name."""
    if step.finished is None or now - step.finished > RECENT_SECONDS:
        return False
    names = [tool.partition(word)[2] for tool in step.tools for word in TRANSFERS if tool.startswith(word)]
    text = " ".join(message.text for message in rest).replace("_", " ")
    return any(name and name.replace("_", " ") in text for name in names)


def _rewritten(prompt: Prompt, step: Step, rule: str, known: int) -> Kin:
    same = step.branch.look == prompt.role
    return Kin(REWRITES if same else JOINS, rule, step.branch, known, step)
