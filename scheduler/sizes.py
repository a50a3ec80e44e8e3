"""How long a step's context will be, in tokens, before anything has counted it."""

from __future__ import annotations

from scheduler.graph import Branch, Step

RECENT = 0.02  # the least weight of a new sample
MOST_MODELS = 1024


class Sizes:
    """Learns, for each model, how many tokens a unit of size is: a step is measured by its branch's last one."""

    def __init__(self) -> None:
        self._ratios: dict[str, tuple[float, int]] = {}  # tokens a unit, samples
        self._usual = 0.0  # tokens of a prompt

    def learn(self, step: Step) -> None:
        """The step has ended, and its usage is known."""
        branch, usage = step.branch, step.usage
        if not usage.prompt:
            return
        branch.tokens, branch.size = usage.prompt + usage.output, step.size
        branch.answer = usage.output
        self._usual += RECENT * (usage.prompt - self._usual)
        if step.size:
            ratio, samples = self._ratios.pop(step.model, (0.0, 0))
            share = max(1 / (samples + 1), RECENT)
            ratio += share * (usage.prompt / step.size - ratio)
            self._ratios[step.model] = ratio, samples + 1
            if len(self._ratios) > MOST_MODELS:
                del self._ratios[next(iter(self._ratios))]

    def expected(self, step: Step) -> int:
        """The tokens of its prompt: without a size as many as there are already, of a new branch as is usual."""
        branch: Branch = step.branch
        ratio, samples = self._ratios.get(step.model, (0.0, 0))
        if not step.size or not samples:
            return branch.tokens or int(self._usual)
        if not branch.size:
            return int(ratio * step.size)
        return max(0, branch.tokens - branch.answer + int(ratio * (step.size - branch.size)))
