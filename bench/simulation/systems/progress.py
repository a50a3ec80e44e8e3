"""The figures of vllm-router's Progress-TTL: what it measures on a worker, and what it concludes. Seconds and tokens.

Models of documented behaviour, not its code. The engine's true costs take the place of the seven coefficients that an
operator measures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulation.profile import Profile

MOST_ROUNDS = 14  # max_segment_rounds
LONGEST_TTL, SHORTEST_TTL = 10.0, 0.05  # max_acting_ttl_seconds
RETAINED = 0.15  # decode_throughput_alpha: the share of decoding that goes on beside a prefill
CANDIDATES = 32  # times to live that are weighed


@dataclass(frozen=True, slots=True)
class Sample:
    """One call that has ended. `growth` is over the context of the program's call before, 0 where there is none to
    compare with."""

    finished: float
    output: int
    growth: int
    rounds: int
    decoding: float


class Progress:
    """The latest calls of one worker, and the latest intervals between two calls of a program there.

    Means over the calls: `output` tokens, `growth` tokens of those contexts that grew, `decoding` seconds from first
    token to end, `throughput` in calls a second. `rounds` is how many calls in a row a program is to be let make, twice
    the mean and 1 to 14; 0 while there are fewer than `size` calls, and then nothing is concluded.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.output = self.growth = self.decoding = self.throughput = self.rounds = 0.0
        self._samples: deque[Sample] = deque(maxlen=size)
        self._intervals: deque[float] = deque(maxlen=size)

    def ended(self, sample: Sample) -> None:
        """A call has ended."""
        self._samples.append(sample)
        calls = len(self._samples)
        self.output = sum(s.output for s in self._samples) / calls
        self.decoding = sum(s.decoding for s in self._samples) / calls
        grown = [s.growth for s in self._samples if s.growth > 0]
        self.growth = sum(grown) / len(grown) if grown else 0.0
        span = sample.finished - self._samples[0].finished
        self.throughput = (calls - 1) / span if span > 0 else 0.0
        if self.mature:
            mean = sum(s.rounds for s in self._samples) / calls
            self.rounds = min(max(math.ceil(2 * mean), 1.0), MOST_ROUNDS)

    def returned(self, seconds: float) -> None:
        """A program has come back after so long."""
        self._intervals.append(seconds)

    @property
    def mature(self) -> bool:
        """Whether there are as many calls as the estimates want."""
        return len(self._samples) == self.size

    def reserve(self, remaining: Sequence[float]) -> float:
        """Tokens by which the active programs, with so many rounds left each, and a new one are going to grow."""
        return self.growth * (self.rounds + sum(remaining)) if self.rounds else 0.0

    def ttl(self, impact: float) -> float:
        """Seconds to keep a program that makes a tool call, where losing its KV costs `impact` seconds.

        The time d that brings most, P(T < d) impact - E[T; T < d] - d P(T >= d), for a log-normal interval T.
        """
        logs = [math.log(t) for t in self._intervals if t > 0]
        longest = min(LONGEST_TTL, impact)
        if len(self._intervals) < self.size or not logs or longest <= 0:
            return 0.0
        mu = sum(logs) / len(logs)
        sigma = max(math.sqrt(sum((x - mu) ** 2 for x in logs) / len(logs)), 1e-6)
        mean = math.exp(mu + sigma * sigma / 2)
        shortest = min(SHORTEST_TTL, longest)
        best, gain = 0.0, 0.0
        for step in range(CANDIDATES):
            d = shortest * (longest / shortest) ** (step / (CANDIDATES - 1))
            back = _below((math.log(d) - mu) / sigma)
            waited = mean * _below((math.log(d) - mu - sigma * sigma) / sigma)
            value = impact * back - waited - d * (1 - back)
            if value >= gain:
                best, gain = d, value
        return best


def impact(profile: Profile, tokens: int) -> float:
    """What it costs to compute so many tokens again: the time itself, and what decoding loses in it."""
    return (profile.step + profile.recompute(0, tokens)) * (2 - RETAINED) if tokens else 0.0


def batch_gain(profile: Profile, progress: Progress, contexts: Sequence[int], candidate: int) -> float:
    """Seconds of decoding that one more sequence in the batch saves, by the throughput of a step with and without."""

    def rate(batch: int, context: int) -> float:
        return batch / (profile.step + profile.decode * batch + profile.context * context)

    if not contexts or not progress.mature:
        return 0.0
    before, after = rate(len(contexts), sum(contexts)), rate(len(contexts) + 1, sum(contexts) + candidate)
    return progress.decoding * max(0.0, after / before - 1)


def _below(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
