"""What is known of runs beyond their own steps: templates, declared and learned, estimates, and what they foretell."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scheduler.calibration import Calibration
from scheduler.estimates import TOOL, Estimates, Past, Place, kind
from scheduler.expectation import Expectation, Remaining
from scheduler.foresight import Foresight
from scheduler.gaps import Gap
from scheduler.graph import FINISHED, Branch, Session, Step, Workflow
from scheduler.learned import Learned
from scheduler.prospect import Dice, Game, Line, Rest, side_by_side
from scheduler.template import RARE, Template
from scheduler.transitions import Context, Transitions

MOST_TEMPLATES = 4096
MOST_ENDS = 256
MOST_LINES = 8  # sessions of a run whose rest is drawn, the latest
DOUBT = 5.0  # ended sessions of a role, from which on what is drawn of it is believed by half
GROWN = 1.1  # times what a template was learned from, until it is looked at anew
DECLARED, LEARNED, ESTIMATES = "declared", "learned", "estimates"

Key = tuple[str, str]
"""Tenant and name of a template."""


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to keep over a restart: plain JSON values, or None where it is to be deleted."""

    kind: str
    tenant: str
    name: str
    document: Any


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is expected of a run: tokens, seconds, and per role its steps-to-execution, next use and probability.

    `next` says what follows the step that ended last, None for the end.

    `confidence` in 0..1 is that of the template; `remaining` is drawn towards what sessions of these roles usually do
    as far as that is missing.
    """

    template: str
    declared: bool
    remaining: Remaining
    steps_to_execution: Mapping[str, float]
    next_use_seconds: Mapping[str, float]
    probability: Mapping[str, float]
    next: Mapping[str | None, float]


@dataclass(slots=True)
class Program:
    """What the runs of one agent program have shown: their graph, and what follows what."""

    learned: Learned
    transitions: Transitions = field(default_factory=Transitions)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A template made ready for evaluation, as long as neither it nor its declaration changes."""

    version: int
    declared: Template | None
    foresight: Foresight
    expectation: Expectation


class Knowledge:
    """Learns from every step that arrives and ends. Bounded; soft, but for what `changes` hands out to be kept."""

    def __init__(self) -> None:
        self.estimates = Estimates()
        self.declared: dict[Key, Template] = {}
        self.programs: OrderedDict[Key, Program] = OrderedDict()
        self.scores = Calibration()
        self._count: Counter[str] = Counter()
        self._ready: OrderedDict[Key, _Ready] = OrderedDict()
        self._changed: set[tuple[str, Key]] = set()

    def declare(self, tenant: str, template: Template) -> None:
        """The runs of that name go so, until they show otherwise. ValueError where the tenant has declared too many."""
        key = (tenant, template.name)
        if key not in self.declared and sum(t == tenant for t, _ in self.declared) >= MOST_TEMPLATES:
            raise ValueError(f"at most {MOST_TEMPLATES} templates can be declared")
        self.declared[key] = template
        self._changed.add((DECLARED, key))

    def template(self, tenant: str, name: str) -> Template | None:
        """What is believed of the runs of that name: what was declared, tempered by what was seen, or that alone."""
        declared, program = self.declared.get((tenant, name)), self.programs.get((tenant, name))
        learned = program.learned.template() if program else None
        return declared.tempered(learned) if declared and learned else declared or learned

    def arrived(self, step: Step, original: Step | None) -> None:
        """A step was linked to its run. `original`: it was sent again, and that one still counts."""
        workflow, branch = step.session.workflow, step.branch
        if original is not None:
            workflow.repeats[step.id] = workflow.repeats.get(original.id, original.id)
            return
        after = [workflow.repeats.get(name, name) for name in step.after]
        role = step.role or ""
        roles, siblings = workflow.progress.came(step.id, role, after, step.arrived)
        program = self._program(workflow)
        for name in after:
            if context := workflow.ends.pop(name, None):
                self._followed(program.transitions, context, role)
        if roles:
            step.before = roles[0]
            program.learned.follows(roles, role, siblings)
            if step.gap is not None:
                program.learned.gap(roles[0], role, step.gap)
        else:
            program.learned.begins(role)
        if branch.past.steps:
            self.estimates.returned(self._place(branch), step.gap)
            if step.gap is not None:
                branch.past = branch.past.returned(step.gap)

    def finished(self, step: Step) -> None:
        """A step has ended well: its usage, stop and tools are known."""
        workflow, branch = step.session.workflow, step.branch
        if step.id in workflow.repeats:
            return
        workflow.progress.finished(step.id, step.finished or step.arrived)
        usage, started = step.usage, step.dispatched if step.dispatched is not None else step.arrived
        seconds = (step.finished or started) - started
        self._program(workflow).learned.spent(step.role or "", usage.prompt, usage.output, seconds, step.model)
        workflow.ends[step.id] = Context(step.role or "", frozenset(step.tools), step.before)
        if len(workflow.ends) > MOST_ENDS:
            del workflow.ends[next(iter(workflow.ends))]
        if usage.output:
            self.estimates.output(self._place(branch), usage.output)
        branch.past = branch.past.ended(kind(step.stop, step.tools), usage.output)
        branch.tools = step.tools

    def parted(self, step: Step) -> None:
        """A first step, held to repeat another run's, has a run of its own now."""
        workflow, branch = step.session.workflow, step.branch
        workflow.progress.came(step.id, step.role or "", (), step.arrived)
        self._program(workflow).learned.begins(step.role or "")
        if step.state == FINISHED:
            workflow.progress.finished(step.id, step.finished or step.arrived)
            workflow.ends[step.id] = Context(step.role or "", frozenset(step.tools), None)
            branch.past, branch.tools = Past().ended(kind(step.stop, step.tools), step.usage.output), step.tools

    def failed(self, step: Step) -> None:
        """A step has ended without an answer."""
        step.session.workflow.progress.failed(step.id)

    def over(self, workflow: Workflow) -> None:
        """The run makes no further call, as far as can be known: its lines end where they are."""
        if workflow.over or not workflow.steps:
            return
        workflow.over = True
        program = self._program(workflow)
        for role in workflow.progress.leaves():
            program.learned.ended(role)
        for context in workflow.ends.values():
            self._followed(program.transitions, context, None)
        workflow.ends.clear()

    def gone(self, session: Session) -> None:
        """The session made no further call."""
        branch = latest(session)
        if branch is not None and branch.past.steps and not session.gone:
            session.gone = True
            self.estimates.never(self._place(branch))

    def gap(self, branch: Branch) -> Gap:
        """The time from the end of the branch's last step to its next one."""
        return self.estimates.gap(self._place(branch))

    def ahead(self, workflow: Workflow) -> Ahead:
        """What is expected of a run from now on."""
        key = program_of(workflow)
        ready = self._evaluated(key)
        position = workflow.progress.position(ready.foresight.template)
        return Ahead(
            template=key[1],
            declared=ready.declared is not None,
            remaining=self._drawn(workflow, ready.expectation.remaining(position)),
            steps_to_execution=ready.foresight.steps_to_execution(position),
            next_use_seconds=ready.foresight.next_use(position),
            probability=ready.expectation.reach(position),
            next=self._next(workflow),
        )

    def next_uses(self, workflow: Workflow, now: float) -> Mapping[str, float]:
        """Seconds from `now` until each role of the run's template can run, at the earliest.

        Cheaper than `ahead`, as it waits until a tenth more has been learned before it looks at the template anew.
        """
        foresight = self._lately(program_of(workflow)).foresight
        return foresight.next_use(workflow.progress.position(foresight.template, now))

    def repeats(self, workflow: Workflow, role: str) -> bool:
        """Whether in the run's template a step of the role can come right after another one. As `several_roles`."""
        return self._lately(program_of(workflow)).foresight.repeats(role)

    def several_roles(self, workflow: Workflow) -> bool:
        """Whether the run's template knows more than one role. O(1), but for what `next_uses` has to look at anew."""
        return len(self._lately(program_of(workflow)).foresight.template.order) > 1

    def prospects(self, workflow: Workflow, now: float, dice: Dice, draws: int) -> tuple[list[Rest], float]:
        """So many ways in which a run may go on from now, and the confidence in what they are drawn from, in 0..1."""
        ready = self._lately(program_of(workflow))
        position = workflow.progress.position(ready.foresight.template, now)
        if len(ready.foresight.template.order) > 1:
            game, confidence = Game(ready.foresight.template), ready.expectation.remaining(position).confidence
            return [game.draw(position, dice) for _ in range(draws)], confidence
        branches = _live(workflow, now)
        lines = [self._line(branch, ready.foresight.template) for branch in branches[-MOST_LINES:]]
        ended = min((self.estimates.ended(self._place(branch)) for branch in branches), default=0.0)
        return [side_by_side(lines, dice) for _ in range(draws)], ended / (ended + DOUBT)

    def _line(self, branch: Branch, template: Template) -> Line:
        place = self._place(branch)
        node = template.nodes.get(place.role)
        goes_on = place if place.past.steps else replace(place, past=place.past.ended(TOOL, 0))  # as it mostly will
        usual = (node.prompt_tokens or 0.0) + (node.output_tokens or 0.0) if node else 0.0
        return Line(
            bool(branch.session.running), self.estimates.steps_left(place), self.estimates.gap(goes_on),
            (node.seconds if node else None) or 0.0, max(branch.tokens, usual),
        )  # fmt: skip

    def _lately(self, key: Key) -> _Ready:
        program, kept = self.programs.get(key), self._ready.get(key)
        if kept is None or kept.declared is not self.declared.get(key) or (
            program is not None and program.learned.version > kept.version * GROWN
        ):  # fmt: skip
            kept = self._evaluated(key)
        return kept

    def _next(self, workflow: Workflow) -> Mapping[str | None, float]:
        program = self.programs.get(program_of(workflow))
        if program is None or not workflow.ends:
            return {}
        return program.transitions.predict(next(reversed(workflow.ends.values())))

    def changes(self) -> list[Record]:
        """The templates that have changed since the last call, to be kept over a restart."""
        records = []
        for what, (tenant, name) in sorted(self._changed):
            document: Any = None
            if what == DECLARED:
                document = self.declared[tenant, name].document()
            elif program := self.programs.get((tenant, name)):
                document = {"graph": program.learned.dump(), "next": program.transitions.dump()}
            records.append(Record(what, tenant, name, document))
        self._changed.clear()
        return records

    def estimated(self) -> Record:
        """All estimates, to be kept over a restart. O(roles and tools): some 50 ms per 3,000."""
        return Record(ESTIMATES, "", "", self.estimates.dump())

    def unsaved(self, records: Iterable[Record]) -> None:
        """These could not be kept: hand them out again."""
        self._changed |= {(r.kind, (r.tenant, r.name)) for r in records if r.kind != ESTIMATES}

    def restore(self, records: Iterable[Record]) -> list[str]:
        """Take up what was kept. Returns what was wrong with the records that could not be read."""
        wrong = []
        for record in records:
            key = (record.tenant, record.name)
            try:
                if record.kind == DECLARED:
                    self.declared[key] = Template.parse(record.name, record.document)
                elif record.kind == LEARNED:
                    graph, following = record.document["graph"], record.document["next"]
                    self.programs[key] = Program(Learned.load(graph), Transitions.load(following))
                    self._count[key[0]] += 1
                elif record.kind == ESTIMATES:
                    self.estimates.load(record.document)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                wrong.append(f"{record.kind} {record.name}: {error!r}")
        return wrong

    def _program(self, workflow: Workflow) -> Program:
        key = program_of(workflow)
        program = self.programs.get(key)
        if program is None:
            program = self.programs[key] = Program(Learned(key[1]))
            self._count[key[0]] += 1
            if self._count[key[0]] > MOST_TEMPLATES:  # a tenant's own, and its oldest
                oldest = next(known for known in self.programs if known[0] == key[0])
                del self.programs[oldest]
                self._count[key[0]] -= 1
                self._changed.add((LEARNED, oldest))
        self.programs.move_to_end(key)
        self._changed.add((LEARNED, key))
        return program

    def _followed(self, transitions: Transitions, context: Context, role: str | None) -> None:
        """Score what would have been said to come after a step, and learn what did: None for the end."""
        predicted = transitions.predict(context)
        if predicted:
            best = max(predicted, key=lambda one: (predicted[one], one or ""))
            self.scores.score("next_role_right_ratio", float(best == role))
        transitions.observe(context, role)

    def _evaluated(self, key: Key) -> _Ready:
        program, declared = self.programs.get(key), self.declared.get(key)
        version = program.learned.version if program else -1
        kept = self._ready.get(key)
        if kept is None or kept.version != version or kept.declared is not declared:
            template = self.template(*key) or Template(key[1], {}, (), ())
            kept = self._ready[key] = _Ready(version, declared, Foresight(template, RARE), Expectation(template))
            if len(self._ready) > MOST_TEMPLATES:
                self._ready.popitem(last=False)
        return kept

    def _drawn(self, workflow: Workflow, told: Remaining) -> Remaining:
        """As far as the template is not known, each session goes on as sessions of its role do."""
        if told.confidence >= 1.0 or workflow.over:
            return told
        steps = tokens = 0.0
        for session in workflow.sessions.values():
            branch = latest(session)
            if branch is None or session.ended:
                continue
            left = self.estimates.steps_left(self._place(branch)).mean()
            steps += left
            tokens += left * self.estimates.output_tokens(self._place(branch)).mean()
        share = 1.0 - told.confidence
        return Remaining(
            steps=told.steps + share * (steps - told.steps),
            prompt_tokens=told.prompt_tokens,
            output_tokens=told.output_tokens + share * (tokens - told.output_tokens),
            work_seconds=told.work_seconds,
            critical_seconds=told.critical_seconds,
            critical_path=told.critical_path,
            confidence=told.confidence,
        )

    def _place(self, branch: Branch) -> Place:
        session = branch.session
        role = branch.last.role if branch.last else session.role
        return Place(session.workflow.tenant, role or "", tuple(sorted(branch.tools)), branch.past)


def program_of(workflow: Workflow) -> Key:
    """A run without a template's name is one of the runs that its first agent makes."""
    first = next(iter(workflow.sessions.values()), None)
    return workflow.tenant, workflow.template or (first.role if first else None) or ""


def latest(session: Session) -> Branch | None:
    """The branch on which the session's last step came."""
    used = [branch for branch in session.branches if branch.last is not None]
    return max(used, key=lambda branch: branch.last.arrived if branch.last else -math.inf, default=None)


def _live(workflow: Workflow, now: float) -> list[Branch]:
    """The latest branches of the sessions that run, or are expected back."""
    sessions = workflow.sessions.values()
    found = (latest(one) for one in sessions if one.running or (one.due > now and not one.ended))
    return [branch for branch in found if branch is not None]
