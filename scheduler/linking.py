"""Joins each step to its run graph: by what the client says of itself, else by descent, else as a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler import lineage as l
from scheduler.events import StepArrived
from scheduler.graph import FINISHED, PLACED, Branch, Graph, Session, Step, Workflow
from scheduler.handover import Source
from scheduler.identity import ANONYMOUS, Identity
from scheduler.lineage import Kin, Lineage, Scope
from scheduler.prompt import Answer, Prompt

TASK, HANDOVER = "lineage:task", "lineage:handover"
SHORTEST_SUMMARY = 256


@dataclass(frozen=True, slots=True)
class Linked:
    """A step in its run graph; the step that it repeats and that still counts; and the one that parted for it.

    `rewritten` is the branch of which it begins with a summary: nobody goes on with that.
    """

    step: Step
    original: Step | None = None
    parted: Step | None = None
    rewritten: Branch | None = None


class Linker:
    """Decides workflow, session, branch and predecessors of a step. When unsure: a workflow of its own."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.lineage = Lineage()

    def link(self, event: StepArrived, now: float) -> Linked:
        """Join the step to its workflow, session and branch, making what is new. A step that failed is replaced."""
        who, prompt = event.identity, event.prompt
        scope = self._scope(who, now)
        kin = self.lineage.find(prompt, scope, now) if prompt else None
        if kin and kin.how == l.REPEATS and who.role and kin.branch.last and kin.branch.last.role != who.role:
            kin = None  # the same words, but another node of the graph
        sources = self.lineage.fed(prompt, kin.known if kin else 0, now) if prompt else []
        if kin is None and prompt and not isinstance(scope, Session):
            kin = _by_content(prompt, scope, sources)
        original = kin.branch.last if kin and kin.how == l.REPEATS else None
        branch = self._branch(event, scope, kin, now)
        self._describe(branch, who, prompt)
        after = self._after(branch, who, kin, prompt)
        for source in sources:
            if branch.last is not None or (prompt and source.head != prompt.head):
                self._take(source, branch)
        session = branch.session
        fed = [s.step for s in sources if s.branch.session is not session
               and s.branch.session.workflow is session.workflow]  # fmt: skip
        rule = who.rule if who.rule != ANONYMOUS or kin is None else kin.rule
        step = Step(event.step, event.model, rule, branch, tuple(dict.fromkeys((*after, *fed))), now, event.pinned)
        step.role = who.role or branch.look or branch.session.role
        step.gap = _gap(branch, kin, now)
        self.graph.add(step, now)
        branch.session.ended = who.final
        if prompt:
            if kin and kin.step and kin.how in (l.CONTINUES, l.FORKS, l.PARTS):
                kin.step.taken = prompt.messages[kin.known].digest
            opening = kin is None or kin.rule in (TASK, HANDOVER)
            self.lineage.arrived(step, prompt, opening or bool(original and original.opening))
        counts = original is not None and original.state in (PLACED, FINISHED)
        parted = kin.step if kin and kin.how == l.PARTS and not isinstance(scope, Session) else None
        rewritten = kin.branch if kin and kin.how == l.REWRITES and kin.branch is not branch else None
        return Linked(step, original if counts else None, parted, rewritten)

    def answered(self, step: Step, answer: Answer) -> None:
        """Learn what the step has put out."""
        if step.link:
            self.lineage.finished(step, answer)

    def knows(self, who: Identity, prompt: Prompt | None, now: float) -> bool:
        """Whether a step of this identity and prompt would continue a workflow rather than begin one."""
        for name in (who.workflow, who.parent, who.session):
            if name and (self.graph.get(who.tenant, name) or self.graph.root_of(who.tenant, name)):
                return True
        named = who.workflow or who.parent or who.session
        return prompt is not None and not named and self.lineage.find(prompt, None, now) is not None

    def _scope(self, who: Identity, now: float) -> Scope:
        """The session or workflow that the client names; None where it names none."""
        if not (who.workflow or who.parent or who.session):
            return None
        root = None
        if who.workflow is None:  # harnesses that name a session or its parent, but not the root
            known = (who.session, who.parent)
            root = next((w for s in known if s and (w := self.graph.root_of(who.tenant, s))), None)
        name = who.workflow or who.parent or who.session or ""
        workflow = root or self.graph.workflow(who.tenant, name, now)
        return self.graph.session(workflow, who.session) if who.session else workflow

    def _branch(self, event: StepArrived, scope: Scope, kin: Kin | None, now: float) -> Branch:
        if isinstance(scope, Session):
            return self._in_session(scope, kin, event.prompt)
        if kin is None and isinstance(scope, Workflow):
            if event.prompt is None or not scope.sessions:
                return self.graph.session(scope, scope.id).branches[-1]
            return self.graph.session(scope, f"s-{event.step}", named=False).branches[0]
        if kin is None:
            workflow = self.graph.workflow(event.identity.tenant, f"w-{event.step}", now, named=False)
            return self.graph.session(workflow, workflow.id, named=False).branches[0]
        if kin.how == l.PARTS and kin.step:
            self.lineage.parted(kin.step, self.graph.part(kin.step, now))
            return kin.step.branch
        if kin.how in (l.JOINS, l.SPAWNED):
            session = self.graph.session(kin.branch.session.workflow, f"s-{event.step}", named=False)
            session.parent = kin.branch.session.id if kin.how == l.SPAWNED else None
            session.asked = kin.asked
            return session.branches[0]
        return self._along(kin)

    def _in_session(self, session: Session, kin: Kin | None, prompt: Prompt | None) -> Branch:
        """The branch within a session that the client names: a prompt that repeats none of it is a new branch."""
        if kin is not None and kin.branch.session is session:
            return self._along(replace(kin, how=l.FORKS) if kin.how == l.PARTS else kin)
        if prompt is None or session.last_step is None:
            return session.branches[-1]
        return self.graph.fork(session.branches[-1])

    def _along(self, kin: Kin) -> Branch:
        if kin.how == l.CONTINUES and kin.step:
            kin.branch.last = kin.step
        return kin.branch if kin.how in (l.CONTINUES, l.REPEATS) else self.graph.fork(kin.branch)

    def _describe(self, branch: Branch, who: Identity, prompt: Prompt | None) -> None:
        session = branch.session
        branch.look = branch.look or (prompt.role if prompt else None)
        session.role = session.role or who.role or branch.look
        session.parent = who.parent or session.parent
        session.workflow.template = who.template or session.workflow.template

    def _after(self, branch: Branch, who: Identity, kin: Kin | None, prompt: Prompt | None) -> tuple[str, ...]:
        """The steps that this one follows: on its branch, where it forked, who handed over, whom the client names."""
        session = branch.session
        if kin and kin.how == l.REPEATS and branch.last:
            return branch.last.after
        parent = session.workflow.sessions.get(session.parent or "")
        before: list[str | None]
        if branch.last:
            before = [branch.last.id]
        elif kin and kin.step:
            before = [kin.step.id]
        elif kin:
            before = [self._step_at(kin, prompt.links[kin.known - 1] if prompt and kin.known else 0)]
        else:
            before = [session.last_step or (parent.last_step if parent else None)]
        if kin and kin.shared:
            before.append(kin.shared.id)
        if who.after:
            before += [s.last_step for s in session.workflow.sessions.values() if s.role in who.after]
        return tuple(step for step in before if step)

    def _step_at(self, kin: Kin, link: int) -> str | None:
        """The step of a session that a new branch goes on from, where only its prompt is known."""
        session = kin.branch.session
        for step in reversed(session.workflow.steps):
            if step.session is session and step.link == link:
                return step.after[0] if step.after else None
        return kin.branch.last.id if kin.branch.last else None

    def _take(self, source: Source, branch: Branch) -> None:
        """Adopt the workflow whose output this step was fed, where that began and ended while the branch waited.

        Of another workflow, take the session that was spawned by just the task that this branch had given out.
        """
        child, own = source.branch.session.workflow, branch.session.workflow
        if source.branch.session.parent == branch.session.id:
            source.branch.session.asked = frozenset()  # its answer has come back: nobody else called it
        if child is own or child.named or not _is_last(source) or any(s.named for s in child.sessions.values()):
            return
        if branch.last and _fits(source.branch.session, branch):
            self.graph.give(source.branch.session, branch.last)
            return
        if child.running or self.graph.workflows.get((child.tenant, child.id)) is not child:
            return
        since = branch.last.finished if branch.last else None
        if branch.last is None or (since is not None and child.arrived >= since):
            self.graph.adopt(child, own, branch.session.id if branch.last else None)


def _by_content(prompt: Prompt, scope: Scope, sources: list[Source]) -> Kin | None:
    """A prompt without history that holds an output as a whole: spawned by it, a summary of it, or fed by it."""
    if isinstance(scope, Workflow):
        sources = [s for s in sources if s.branch.session.workflow is scope]
    for source in reversed(sources):
        if source.task and source.waits and source.head != prompt.head:
            return Kin(l.SPAWNED, TASK, source.branch, step=source.made_by, asked=source.words)
    for source in reversed(sources):
        if source.task or source.branch.session.running or not _is_last(source):
            continue
        if source.head != prompt.head:
            return Kin(l.JOINS, HANDOVER, source.branch, step=source.made_by)
        if source.length >= SHORTEST_SUMMARY and source.branch.session.taken > 1:
            return Kin(l.REWRITES, "lineage:compaction", source.branch, step=source.made_by)
    return None


def _fits(child: Session, branch: Branch) -> bool:
    """Whether the last step of a branch called for what a session elsewhere was spawned to do, and that has done it."""
    tasks = {source.words for source in branch.session.outputs if source.task and source.branch is branch}
    return not child.running and child.asked in tasks


def _is_last(source: Source) -> bool:
    return source.branch.session.last_step == source.step


def _gap(branch: Branch, kin: Kin | None, now: float) -> float | None:
    """Seconds since the step before ended; None for a first step, a fork, and a step that is sent again."""
    if kin is not None and kin.how in (l.REPEATS, l.FORKS):
        return None
    last = branch.last or (branch.parent.last if branch.parent else None)
    return now - last.finished if last and last.finished is not None else None
