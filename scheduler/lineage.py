"""Descent without a name: which run a prompt goes on with, by what it repeats of earlier prompts and answers.

Evidence, the strongest first: the messages of an earlier prompt, a tool call that a worker minted, an assistant turn
with what answered it, an output handed over as a whole. Where the evidence fits two runs, there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from scheduler.graph import FINISHED, PLACED, Branch, Session, Step, Workflow
from scheduler.handover import Handovers, Source
from scheduler.prompt import ASSISTANT, Answer, Message, Prompt, call_key, said

CONTINUES, REPEATS, FORKS, PARTS = "continues", "repeats", "forks", "parts"
REWRITES, JOINS, SPAWNED = "rewrites", "joins", "spawned"

RESAMPLE_SECONDS = 2.0
"""How long after an answer the same opening still counts as the same run, sampled again."""
MOST_SAMPLES = 8
MOST_OPENINGS = 64
TRANSFERS = ("transfer_to_", "handoff_to_")
SHORTEST_EXCHANGE = 128
MOST_MARKS = 4096
MOST_RECENT = 32


@dataclass(slots=True, eq=False)
class Sample:
    """One answer to an opening. `said` names it once it is known, `next` the turn that took it up."""

    step: Step
    head: int
    said: int | None = None
    text: str = ""
    calls: frozenset[int] = frozenset()
    next: int | None = None


@dataclass(slots=True)
class Opening:
    """All that began with the same messages: the same run sampled again, twins, other roles with the same task."""

    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Kin:
    """How a prompt descends from `branch`.

    It continues it, repeats its latest prompt, forks off it, rewrites its history (a compaction), joins its
    workflow as another agent, was spawned by it (its tool call's task), or parts from its run (it was a twin).
    `known` messages of the prompt are not new; `sample` is the answer that the prompt takes up; `step` the one that
    it follows, where that is not the branch's last; `shared` the branch of another agent that has more of its history.
    """

    how: str
    rule: str
    branch: Branch
    known: int = 0
    sample: Sample | None = None
    shared: Branch | None = None
    step: str | None = None


class Lineage:
    """What is remembered of prompts and answers, by digests that differ between tenants. Bounded a session."""

    def __init__(self) -> None:
        self.handovers = Handovers()
        self._ends: dict[int, tuple[Branch, ...]] = {}
        self._openings: dict[int, Opening] = {}
        self._calls: dict[int, Branch | None] = {}
        self._exchanges: dict[int, Branch | None] = {}
        self._sampled: dict[int, Sample] = {}

    def find(self, prompt: Prompt, scope: Session | Workflow | None, now: float) -> Kin | None:
        """The closest kin of a prompt in a session or workflow, or among all the tenant's. Linear in its messages.

        Where the latest tool call in it that is known was minted in one workflow, only in that one.
        """
        named = scope is not None
        key, minted = self._minted(prompt)
        if scope is None and minted:
            scope = minted.session.workflow
        kin = self._by_history(prompt, scope, now, named)
        sample = self._sampled.get(key)
        if sample is None or sample.next is not None or not _within(sample.step.branch, scope):
            return kin
        if sample.head != prompt.head or sample.step.link not in prompt.links[:-1]:
            return kin
        shared = kin.branch if kin and kin.how == JOINS else kin.shared if kin else None
        return replace(_from_sample(sample, prompt.links.index(sample.step.link)), shared=shared)

    def _by_history(self, prompt: Prompt, scope: Session | Workflow | None, now: float, named: bool) -> Kin | None:
        """The closest kin by messages in common, else by a tool call or an exchange of its own."""
        shared: Branch | None = None
        for i in range(len(prompt.links) - 1, -1, -1):
            link = prompt.links[i]
            if link not in self._ends and link not in self._openings:
                continue
            kin = self._at_end(prompt, i, scope) or self._at_opening(prompt, i, scope, now, named)
            if kin and (shared is None or shared.session.workflow is kin.branch.session.workflow):
                if i == len(prompt.links) - 1:
                    kin = self._rerun(prompt, kin, scope, now, named) or kin
                return replace(kin, shared=shared)
            if kin:
                break
            shared = shared or self._sharing(prompt, i, scope)
        found = [kin for kin in (self._by_call(prompt, scope), self._by_exchange(prompt, scope)) if kin]
        if shared:
            found.append(Kin(JOINS, "lineage:history", shared, len(prompt.messages) - 1))
        return min(found, key=lambda kin: kin.how != REWRITES, default=None)

    def arrived(self, step: Step, prompt: Prompt, opening: bool) -> None:
        """Remember the prompt of a step that has been linked; an `opening` has no known history."""
        session, link = step.session, prompt.links[-1]
        step.branch.head, step.branch.end, step.link = prompt.head, link, link
        if opening or link in self._openings:
            samples = self._openings.setdefault(link, Opening()).samples
            samples.append(Sample(step, prompt.head))
            if len(samples) > MOST_OPENINGS:
                for call in samples.pop(0).calls:
                    self._sampled.pop(call, None)
            self._mark(session, link)
            return
        known = self._ends.get(link, ())
        if step.branch not in known:
            self._ends[link] = (*known, step.branch)
            self._mark(session, link)
        for _, key in prompt.exchanges():
            self._remember(self._exchanges, key, step.branch)
            break

    def finished(self, step: Step, answer: Answer) -> None:
        """Remember what a step has put out."""
        tenant = step.session.workflow.tenant
        keys = frozenset(call_key(tenant, call.id, call.name) for call in answer.calls)
        for key in keys:
            self._remember(self._calls, key, step.branch)
        opening = self._openings.get(step.link)
        for sample in opening.samples if opening else ():
            if sample.step is step:
                sample.said, sample.text, sample.calls = said(tenant, answer), answer.text.strip()[:1024], keys
                self._sampled.update(dict.fromkeys(keys, sample))
        self.handovers.offer(step, answer, beside=opening is not None)

    def parted(self, sample: Sample, session: Session) -> None:
        """The sample was another run's than that session's, and has a branch of its own now: so have its answers."""
        branch = sample.step.branch
        for key in sample.calls:
            if self._calls.get(key):
                self._calls[key] = branch
        mine = [source for source in session.outputs if source.step == sample.step.id]
        session.outputs = [source for source in session.outputs if source.step != sample.step.id]
        branch.session.outputs += mine
        for source in mine:
            source.branch = branch

    def fed(self, prompt: Prompt, known: int) -> list[Source]:
        """The outputs that a prompt's messages after the `known` ones hold as a whole."""
        return self.handovers.find(prompt.tenant, (message.text for message in prompt.messages[known:]))

    def forget(self, session: Session) -> None:
        """The session is forgotten: so is what it was known by."""
        for key in session.marks:
            rest = tuple(b for b in self._ends.get(key, ()) if b.session is not session)
            if rest:
                self._ends[key] = rest
            else:
                self._ends.pop(key, None)
            if opening := self._openings.get(key):
                for sample in opening.samples:
                    for call in sample.calls if sample.step.session is session else ():
                        self._sampled.pop(call, None)
                opening.samples = [s for s in opening.samples if s.step.session is not session]
                if not opening.samples:
                    del self._openings[key]
        for key in session.recent:
            self._calls.pop(key, None)
            self._exchanges.pop(key, None)
        for source in session.outputs:
            self.handovers.forget(source)

    def _at_end(self, prompt: Prompt, i: int, scope: Session | Workflow | None) -> Kin | None:
        """Kin whose prompt was messages 0 to i, an answer among them."""
        link, last = prompt.links[i], i == len(prompt.links) - 1
        found = [b for b in self._ends.get(link, ()) if b.look == prompt.role and _within(b, scope)]
        if not found:
            return None
        branch = next((b for b in found if b.end == link), found[0])
        if branch.end != link:
            return Kin(FORKS, "lineage:fork", branch, i + 1)
        return (
            Kin(REPEATS, "lineage:repeat", branch, i + 1) if last else Kin(CONTINUES, "lineage:prefix", branch, i + 1)
        )

    def _at_opening(
        self, prompt: Prompt, i: int, scope: Session | Workflow | None, now: float, named: bool
    ) -> Kin | None:
        """Kin that began with messages 0 to i, if it can be told which."""
        opening = self._openings.get(prompt.links[i])
        if opening is None:
            return None
        mine = [s for s in opening.samples if s.step.branch.look == prompt.role and _within(s.step.branch, scope)]
        exact = [s for s in mine if s.head == prompt.head]
        if not mine or (i == len(prompt.links) - 1 and not exact):
            return None
        if i == len(prompt.links) - 1:
            sample = _sampled_again(exact, now, named)
            return Kin(REPEATS, "lineage:repeat", sample.step.branch, i + 1) if sample else None
        sample = _taken_up(exact or mine, prompt.messages[i + 1], bool(exact))
        if sample is None:
            return None
        return _from_sample(sample, i)

    def _rerun(self, prompt: Prompt, old: Kin, scope: Session | Workflow | None, now: float, named: bool) -> Kin | None:
        """The run that has come to a prompt which an older run had word for word: it waits, and is the later one."""
        since = _arrived_at(old.branch, prompt.links[-1])
        for i in range(len(prompt.links) - 2, -1, -1):
            kin = self._at_end(prompt, i, scope) or self._at_opening(prompt, i, scope, now, named)
            if kin and kin.branch.session is not old.branch.session:
                last = kin.sample.step if kin.sample else kin.branch.last
                return kin if kin.how == CONTINUES and last and last.arrived > since else None
        return None

    def _sharing(self, prompt: Prompt, i: int, scope: Session | Workflow | None) -> Branch | None:
        """The branch of another role with the same history up to message i, an answer of its own included."""
        for branch in self._ends.get(prompt.links[i], ()):
            if _within(branch, scope):
                return branch
        if i + 1 == len(prompt.messages) or (opening := self._openings.get(prompt.links[i])) is None:
            return None
        rest = prompt.messages[i + 1 :]
        same = [s.step.branch for s in opening.samples if _within(s.step.branch, scope)
                and (_is_answer(s, rest[0]) or _is_transfer(s.step.branch, rest))]  # fmt: skip
        return same[0] if len({b.session.workflow for b in same}) == 1 else None

    def _minted(self, prompt: Prompt) -> tuple[int, Branch | None]:
        """The latest tool call in the prompt that is known to be one branch's, and that branch."""
        for message in reversed(prompt.messages):
            for key in message.calls:
                if branch := self._calls.get(key):
                    return key, branch
        return 0, None

    def _by_call(self, prompt: Prompt, scope: Session | Workflow | None) -> Kin | None:
        """By the latest tool call that a worker minted for an agent of this role, else for any."""
        other: Kin | None = None
        for i in range(len(prompt.messages) - 1, -1, -1):
            for key in prompt.messages[i].calls:
                branch = self._calls.get(key)
                if branch and _within(branch, scope):
                    kin = self._rewritten(prompt, branch, "lineage:tool-call", i + 1)
                    if kin.how == REWRITES:
                        return kin
                    other = other or kin
        return other

    def _by_exchange(self, prompt: Prompt, scope: Session | Workflow | None) -> Kin | None:
        size, found, upto = 0, None, 0
        for last, key in prompt.exchanges():
            branch = self._exchanges.get(key)
            if branch is None or not _within(branch, scope) or (found and branch.session is not found.session):
                continue
            found, upto = found or branch, upto or last + 1
            size += sum(len(m.text) for m in _exchange(prompt, last))
            if size >= SHORTEST_EXCHANGE:
                return self._rewritten(prompt, found, "lineage:compaction", upto)
        return None

    def _rewritten(self, prompt: Prompt, branch: Branch, rule: str, known: int) -> Kin:
        same = branch.look == prompt.role
        return Kin(REWRITES if same else JOINS, rule, branch, known)

    def _mark(self, session: Session, key: int) -> None:
        session.marks.append(key)
        if len(session.marks) > MOST_MARKS:
            self._ends.pop(session.marks[1], None)  # not the first, where forks of the whole run would begin
            del session.marks[1]

    def _remember(self, index: dict[int, Branch | None], key: int, branch: Branch) -> None:
        """Keep the key for the branch; one that two sessions have says nothing from then on."""
        session = branch.session
        if key in index:
            old = index[key]
            index[key] = branch if old and old.session is session else None
            return
        index[key] = branch
        session.recent.append(key)
        if len(session.recent) > MOST_RECENT:
            oldest = session.recent.pop(0)
            self._calls.pop(oldest, None)
            self._exchanges.pop(oldest, None)


def _within(branch: Branch, scope: Session | Workflow | None) -> bool:
    return scope is None or branch.session is scope or branch.session.workflow is scope


def _from_sample(sample: Sample, i: int) -> Kin:
    """Kin of a prompt that goes on from an answer to the opening that its messages 0 to i are."""
    branch = sample.step.branch
    how = CONTINUES if branch.end == sample.step.link else FORKS if sample.next is not None else PARTS
    rule = {CONTINUES: "lineage:prefix", FORKS: "lineage:fork", PARTS: "lineage:twin"}[how]
    return Kin(how, rule, branch, i + 1, sample)


def _sampled_again(samples: list[Sample], now: float, sure: bool) -> Sample | None:
    """The latest sample of a run that waits at its opening: it runs, it failed, or its answer is a moment old."""
    latest = samples[-1]
    run = [s for s in samples if s.step.session is latest.step.session]
    if any(s.next is not None for s in run) or (len(run) >= MOST_SAMPLES and not sure):
        return None
    ended = latest.step.finished
    again = sure or latest.said is None or ended is None or now - ended <= RESAMPLE_SECONDS
    return latest if again else None


def _taken_up(samples: list[Sample], turn: Message, exact: bool) -> Sample | None:
    """The sample that a prompt goes on from, if its next message is `turn`; None where that cannot be told.

    First the one whose tool calls these are; then the answer itself; as clients may rewrite it then a run that waits,
    if the system prompt is `exact` or there is no other; then one that was taken up with this very turn; then another
    sample of one that was taken up.
    """
    taken = {s.step.session for s in samples if s.next is not None}
    waiting = [s for s in samples if s.next is None and s.step.state in (PLACED, FINISHED)]
    waiting.sort(key=lambda s: s.step.session in taken)
    alone = len({s.step.session for s in samples}) == 1
    sure = exact or alone
    for group in (
        [s for s in samples if not s.calls.isdisjoint(turn.calls)],
        [s for s in waiting if s.said == turn.digest],
        [s for s in waiting if s.step.session not in taken and sure],
        [s for s in samples if s.next == turn.digest],
        [s for s in waiting if sure],
    ):
        if group:
            return group[0]
    return max(samples, key=lambda s: s.next is not None) if alone else None


def _is_answer(sample: Sample, message: Message) -> bool:
    if message.speaker == ASSISTANT and sample.said == message.digest:
        return True
    return bool(sample.text) and message.text.strip()[:1024] == sample.text


def _arrived_at(branch: Branch, link: int) -> float:
    """When the branch's session last had the prompt of that link, in seconds."""
    steps = branch.session.workflow.steps
    return max((s.arrived for s in steps if s.link == link and s.session is branch.session), default=0.0)


def _is_transfer(branch: Branch, rest: Sequence[Message]) -> bool:
    """Whether the branch waits for a tool that hands over to an agent that these messages name (AutoGen's swarm)."""
    tools = branch.last.tools if branch.last and not branch.session.running else ()
    names = [tool.partition(word)[2].replace("_", " ") for tool in tools for word in TRANSFERS if tool.startswith(word)]
    text = " ".join(message.text for message in rest).replace("_", " ") if names else ""
    return any(name and name in text for name in names)


def _exchange(prompt: Prompt, last: int) -> Iterator[Message]:
    for i in range(last, -1, -1):
        yield prompt.messages[i]
        if prompt.messages[i].speaker == ASSISTANT:
            return
