"""What is known of runs beyond their own steps: templates, declared and learned, estimates, and what they foretell."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.estimates import Estimates, Place, kind
from scheduler.expectation import Expectation, Remaining
from scheduler.foresight import Foresight
from scheduler.gaps import Gap
from scheduler.graph import Branch, Session, Step, Workflow
from scheduler.learned import Learned
from scheduler.template import Template

MOST_TEMPLATES = 4096
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

    `confidence` in 0..1 is that of the template; `remaining` is drawn towards what sessions of these roles usually do
    as far as that is missing.
    """

    template: str
    declared: bool
    remaining: Remaining
    steps_to_execution: Mapping[str, float]
    next_use_seconds: Mapping[str, float]
    probability: Mapping[str, float]


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
        self.learned: OrderedDict[Key, Learned] = OrderedDict()
        self._ready: OrderedDict[Key, _Ready] = OrderedDict()
        self._changed: set[tuple[str, Key]] = set()

    def declare(self, tenant: str, template: Template) -> None:
        """From now on the runs of that name go so. Raises ValueError where the tenant has declared too many."""
        key = (tenant, template.name)
        if key not in self.declared and sum(t == tenant for t, _ in self.declared) >= MOST_TEMPLATES:
            raise ValueError(f"at most {MOST_TEMPLATES} templates can be declared")
        self.declared[key] = template
        self._changed.add((DECLARED, key))

    def template(self, tenant: str, name: str) -> tuple[Template, bool] | None:
        """The template of that name and whether it was declared; where it leaves figures open, with learned ones."""
        declared, learned = self.declared.get((tenant, name)), self.learned.get((tenant, name))
        if declared is None:
            return (learned.template(), False) if learned else None
        return (declared.filled(learned.template()) if learned else declared), True

    def arrived(self, step: Step, original: Step | None) -> None:
        """A step was linked to its run. `original`: it was sent again, and that one still counts."""
        workflow, branch = step.session.workflow, step.branch
        if original is not None:
            workflow.repeats[step.id] = workflow.repeats.get(original.id, original.id)
            return
        after = [workflow.repeats.get(name, name) for name in step.after]
        roles, siblings = workflow.progress.came(step.id, step.role or "", after)
        learned = self._learned(workflow)
        if roles:
            learned.follows(roles, step.role or "", siblings)
            if step.gap is not None:
                learned.gap(roles[0], step.role or "", step.gap)
        else:
            learned.begins(step.role or "")
        if branch.past.steps:
            self.estimates.returned(self._place(branch), step.gap)
            if step.gap is not None:
                branch.past = branch.past.returned(step.gap)

    def finished(self, step: Step) -> None:
        """A step has ended well: its usage, stop and tools are known."""
        workflow, branch = step.session.workflow, step.branch
        if step.id in workflow.repeats:
            return
        workflow.progress.finished(step.id)
        usage, started = step.usage, step.dispatched if step.dispatched is not None else step.arrived
        seconds = (step.finished or started) - started
        self._learned(workflow).spent(step.role or "", usage.prompt, usage.output, seconds, step.model)
        if usage.output:
            self.estimates.output(self._place(branch), usage.output)
        branch.past = branch.past.ended(kind(step.stop, step.tools), usage.output)
        branch.tools = step.tools

    def failed(self, step: Step) -> None:
        """A step has ended without an answer."""
        step.session.workflow.progress.failed(step.id)

    def over(self, workflow: Workflow) -> None:
        """The run makes no further call, as far as can be known: its lines end where they are."""
        if workflow.over or not workflow.steps:
            return
        workflow.over = True
        learned = self._learned(workflow)
        for role in workflow.progress.leaves():
            learned.ended(role)

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
        key = _key(workflow)
        ready = self._evaluated(key)
        position = workflow.progress.position(ready.foresight.template)
        return Ahead(
            template=key[1],
            declared=ready.declared is not None,
            remaining=self._drawn(workflow, ready.expectation.remaining(position)),
            steps_to_execution=ready.foresight.steps_to_execution(position),
            next_use_seconds=ready.foresight.next_use(position),
            probability=ready.expectation.reach(position),
        )

    def changes(self) -> list[Record]:
        """What has changed since the last call, to be kept over a restart."""
        records = [Record(ESTIMATES, "", "", self.estimates.dump())]
        for what, (tenant, name) in sorted(self._changed):
            known = (self.declared if what == DECLARED else self.learned).get((tenant, name))
            document = known.document() if isinstance(known, Template) else known.dump() if known else None
            records.append(Record(what, tenant, name, document))
        self._changed.clear()
        return records

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
                    self.learned[key] = Learned.load(record.document)
                elif record.kind == ESTIMATES:
                    self.estimates.load(record.document)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                wrong.append(f"{record.kind} {record.name}: {error!r}")
        return wrong

    def _learned(self, workflow: Workflow) -> Learned:
        key = _key(workflow)
        learned = self.learned.get(key)
        if learned is None:
            learned = self.learned[key] = Learned(key[1])
            if len(self.learned) > MOST_TEMPLATES:
                oldest, _ = self.learned.popitem(last=False)
                self._changed.add((LEARNED, oldest))
        self.learned.move_to_end(key)
        self._changed.add((LEARNED, key))
        return learned

    def _evaluated(self, key: Key) -> _Ready:
        learned, declared = self.learned.get(key), self.declared.get(key)
        version = learned.version if learned else -1
        kept = self._ready.get(key)
        if kept is None or kept.version != version or kept.declared is not declared:
            known = self.template(*key)
            template = known[0] if known else Template(key[1], {}, (), ())
            kept = self._ready[key] = _Ready(version, declared, Foresight(template), Expectation(template))
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


def _key(workflow: Workflow) -> Key:
    """A run without a template's name is one of the runs that its first agent makes."""
    first = next(iter(workflow.sessions.values()), None)
    return workflow.tenant, workflow.template or (first.role if first else None) or ""


def latest(session: Session) -> Branch | None:
    """The branch on which the session's last step came."""
    used = [branch for branch in session.branches if branch.last is not None]
    return max(used, key=lambda branch: branch.last.arrived if branch.last else -math.inf, default=None)
