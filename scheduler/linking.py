"""Joins each step to its run graph: by what the client says of itself, else by descent, else as a run of its own."""

from __future__ import annotations

from dataclasses import replace

from scheduler import lineage as l
from scheduler.events import StepArrived
from scheduler.graph import FINISHED, PLACED, Branch, Graph, Session, Step, Workflow
from scheduler.handover import Source
from scheduler.identity import ANONYMOUS, Identity
from scheduler.lineage import Kin, Lineage
from scheduler.prompt import Answer, Prompt

TASK, HANDOVER = "lineage:task", "lineage:handover"


class Linker:
    """Decides workflow, session, branch and predecessors of a step. When unsure: a workflow of its own."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.lineage = Lineage()

    def link(self, event: StepArrived, now: float) -> tuple[Step, Step | None]:
        """Join the step to its workflow, session and branch, making what is new; and the step that it repeats, if any.

        A step that failed is not repeated but replaced.
        """
        who, prompt = event.identity, event.prompt
        scope = self._scope(who, now)
        kin = self.lineage.find(prompt, scope, now) if prompt else None
        if kin and kin.how == l.REPEATS and who.role and kin.branch.last and kin.branch.last.role != who.role:
            kin = None  # the same words, but another node of the graph
        sources = [s for s in self.lineage.fed(prompt, kin.known if kin else 0) if self._kept(s)] if prompt else []
        if kin is None and prompt and not (isinstance(scope, Session)):
            kin = self._by_content(prompt, scope, sources)
        branch = self._branch(event, scope, kin, now)
        self._describe(branch, who, prompt)
        after = self._after(branch, who, kin, prompt)
        for source in sources:
            self._take(source, branch, now)
        fed = [s.step for s in sources if s.branch.session.workflow is branch.session.workflow and _counts(s, branch)]
        rule = who.rule if who.rule != ANONYMOUS or kin is None else kin.rule
        step = Step(event.step, event.model, rule, branch, tuple(dict.fromkeys((*after, *fed))), now, event.pinned)
        step.role = who.role or branch.look or branch.session.role
        step.gap = _gap(branch, kin, now)
        original = branch.last if kin and kin.how == l.REPEATS else None
        self.graph.add(step, now)
        branch.session.ended = who.final
        if prompt:
            if kin and kin.sample:
                kin.sample.next = prompt.messages[kin.known].digest
            self.lineage.arrived(step, prompt, opening=kin is None or kin.rule in (TASK, HANDOVER))
        return step, original if original and original.state in (PLACED, FINISHED) else None

    def answered(self, step: Step, answer: Answer) -> None:
        """Learn what the step has put out."""
        step.tools = tuple(call.name for call in answer.calls)
        self.lineage.finished(step, answer)

    def knows(self, who: Identity, prompt: Prompt | None, now: float) -> bool:
        """Whether a step of this identity and prompt would continue a workflow rather than begin one."""
        for name in (who.workflow, who.parent, who.session):
            if name and (self.graph.get(who.tenant, name) or self.graph.root_of(who.tenant, name)):
                return True
        named = who.workflow or who.parent or who.session
        return prompt is not None and not named and self.lineage.find(prompt, None, now) is not None

    def _scope(self, who: Identity, now: float) -> Session | Workflow | None:
        """The session or workflow that the client names; None where it names none."""
        names = (who.workflow, who.parent, who.session)
        if not any(names):
            return None
        root = None
        if who.workflow is None:  # harnesses that name a session or its parent, but not the root
            known = (who.session, who.parent)
            root = next((w for s in known if s and (w := self.graph.root_of(who.tenant, s))), None)
        workflow = root or self.graph.workflow(who.tenant, who.workflow or who.parent or who.session or "", now)
        return self.graph.session(workflow, who.session) if who.session else workflow

    def _branch(self, event: StepArrived, scope: Session | Workflow | None, kin: Kin | None, now: float) -> Branch:
        if isinstance(scope, Session):
            return self._in_session(scope, kin, event.prompt)
        if isinstance(scope, Workflow) and (kin is None or kin.how == l.PARTS):
            if event.prompt is None or not scope.sessions:
                return self.graph.session(scope, scope.id).branches[-1]
            return self.graph.session(scope, f"s-{event.step}", named=False).branches[0]
        if kin is None:
            workflow = self.graph.workflow(event.identity.tenant, f"w-{event.step}", now, named=False)
            return self.graph.session(workflow, workflow.id, named=False).branches[0]
        if kin.how == l.PARTS and kin.sample:
            session = kin.sample.step.session
            self.graph.part(kin.sample.step, now)
            self.lineage.parted(kin.sample, session)
            return kin.sample.step.branch
        if kin.how in (l.JOINS, l.SPAWNED):
            session = self.graph.session(kin.branch.session.workflow, f"s-{event.step}", named=False)
            session.parent = kin.branch.session.id if kin.how == l.SPAWNED else None
            return session.branches[0]
        if kin.how == l.CONTINUES and kin.sample:
            kin.branch.last = kin.sample.step
        return self._along(kin)

    def _in_session(self, session: Session, kin: Kin | None, prompt: Prompt | None) -> Branch:
        """The branch within a session that the client names: a prompt that repeats none of it is a new branch."""
        if kin is not None and kin.branch.session is session:
            return self._along(replace(kin, how=l.FORKS) if kin.how == l.PARTS else kin)
        if prompt is None or session.last_step is None:
            return session.branches[-1]
        return self.graph.fork(session.branches[-1])

    def _along(self, kin: Kin) -> Branch:
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
        roles = dict.fromkeys(who.after)
        named = [s.last_step for s in session.workflow.sessions.values() if s.role in roles and s.last_step]
        if kin and kin.how == l.REPEATS and branch.last:
            return branch.last.after
        if branch.last:
            before: list[str | None] = [branch.last.id]
        elif kin and kin.branch.session is session:
            before = [self._step_at(kin, prompt.links[kin.known - 1] if prompt and kin.known else 0)]
        elif kin:
            before = [kin.step or (kin.branch.last.id if kin.branch.last else None)]
        else:
            parent = session.workflow.sessions.get(session.parent or "")
            before = [parent.last_step] if parent and parent.last_step else []
        if kin and kin.shared and kin.shared.last:
            before.append(kin.shared.last.id)
        return tuple(step for step in (*before, *named) if step)

    def _step_at(self, kin: Kin, link: int) -> str | None:
        """The step of a session that a new branch goes on from."""
        session = kin.branch.session
        for step in reversed(session.workflow.steps):
            if step.session is session and (kin.how == l.REWRITES or step.link == link):
                return step.id
        return kin.branch.last.id if kin.branch.last else None

    def _by_content(self, prompt: Prompt, scope: Workflow | None, sources: list[Source]) -> Kin | None:
        """A prompt without history that holds an output as a whole: spawned by it, a summary of it, or fed by it."""
        if scope is not None:
            sources = [s for s in sources if s.branch.session.workflow is scope]
        for source in reversed(sources):
            if source.task and source.waits:
                return Kin(l.SPAWNED, TASK, source.branch, step=source.step)
        for source in reversed(sources):
            session = source.branch.session
            if source.task or session.running or session.last_step != source.step:
                continue
            if source.branch.head == prompt.head:
                return Kin(l.REWRITES, "lineage:compaction", source.branch)
            return Kin(l.JOINS, HANDOVER, source.branch)
        return None

    def _kept(self, source: Source) -> bool:
        workflow = source.branch.session.workflow
        return self.graph.get(workflow.tenant, workflow.id) is workflow

    def _take(self, source: Source, branch: Branch, now: float) -> None:
        """Adopt the workflow whose output this step was fed, where that began and ended while the branch waited."""
        child, own = source.branch.session.workflow, branch.session.workflow
        if child is own or child.named or child.running or source.branch.last is None:
            return
        if source.branch.session.last_step != source.step or source.branch.last.id != source.step:
            return
        since = branch.last.finished if branch.last else now
        if branch.last is None or (since is not None and child.arrived >= since):
            self.graph.adopt(child, own, branch.session.id if branch.last else None)


def _gap(branch: Branch, kin: Kin | None, now: float) -> float | None:
    """Seconds since the step before ended; None for a first step, a fork, and a step that is sent again."""
    if kin is not None and kin.how in (l.REPEATS, l.FORKS):
        return None
    last = branch.last or (branch.parent.last if branch.parent else None)
    return now - last.finished if last and last.finished is not None else None


def _counts(source: Source, branch: Branch) -> bool:
    """Whether a source of the same workflow was needed: what an agent itself has written before is its history."""
    return source.branch.session is not branch.session
