"""Successions: who keeps a fixed number of runs going begins one when one has ended, and tells of that end by it.

Which one has ended is not said; it is looked for where it would be if the client lost no time: in the workflow of the
same program that stopped last. Whether that is so is learned as all stops are, by who comes back (`scheduler.habits`):
where runs begin by themselves, most do, and a beginning tells nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from scheduler.accounts import Account, Book
from scheduler.graph import Step, Workflow
from scheduler.knowledge import program_of

MOST_PROGRAMS, MOST_IDLE = 1000, 16

Program = tuple[str, str, bool]
"""Tenant, name, and whether its runs are offline work."""


class Successions:
    """The idle workflows of each program, the last to stop at the end. O(1) a stop; bounded, the oldest forgotten."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Program, OrderedDict[Workflow, tuple[Book, Account]]] = OrderedDict()

    def stopped(self, book: Book, account: Account, flex: bool) -> None:
        """A workflow is idle on a worker now, and whether it comes back is awaited."""
        if account.stood is None:
            return
        key = *program_of(account.workflow), flex
        idle = self._idle.setdefault(key, OrderedDict())
        idle[account.workflow] = book, account
        idle.move_to_end(account.workflow)
        self._idle.move_to_end(key)
        if len(idle) > MOST_IDLE:
            idle.popitem(last=False)
        if len(self._idle) > MOST_PROGRAMS:
            self._idle.popitem(last=False)

    def latest(self, step: Step) -> tuple[Book, Account] | None:
        """Take the workflow that stopped last before this step began another, of those of which no step has come."""
        key = *program_of(step.session.workflow), step.flex
        idle = self._idle.get(key, OrderedDict())
        for workflow, found in list(reversed(idle.items())):
            if workflow.running:
                continue
            del idle[workflow]
            if found[1].stood is not None and found[1].contexts:
                return found
        return None
