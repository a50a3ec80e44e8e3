"""What a prefix cache without limit would have had of each call that was played, in the engine's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.records import CallRecord
from bench.workloads.runs import ASSISTANT, Call, Piece


def fill(played: Sequence[tuple[Call, CallRecord]], block: int, tail: int, lengths: Mapping[Piece, int]) -> None:
    """Set `ideal` of the records: the longest prefix that a call sent before had too, in full blocks, less the block of
    the last token, which is always computed. What starts an answer also starts a later message of the assistant.

    The engine counts whole prompts, of which the last `tail` tokens start the answer; `lengths` are the tokens before
    the ends of other pieces where they are known. Elsewhere they are taken to lie between the nearest that are known as
    the pieces' own lengths have it.
    """
    answered = [(call, record) for call, record in played if record.error is None and record.finished is not None]
    prompts = {call.prompt: record.prompt - tail for call, record in answered}
    known = dict(lengths) | prompts
    seen: set[Piece] = set()
    for call, record in sorted(answered, key=lambda pair: pair[1].sent):
        path = call.prompt.path()
        shared = next((place for place in reversed(range(len(path))) if path[place] in seen), None)
        if shared is not None:
            tokens = _length(path, shared, known)
            if path[shared] in prompts and [piece.speaker for piece in path[shared + 1 : shared + 2]] == [ASSISTANT]:
                tokens += tail
            record.ideal = int(min(tokens, record.prompt - 1)) // block * block
        seen.update(path)


def _length(path: list[Piece], place: int, known: Mapping[Piece, int]) -> float:
    """Tokens from the start to the end of path[place]; the end of the path is known."""
    piece = path[place]
    if piece in known:
        return known[piece]
    below = next((one for one in reversed(path[:place]) if one in known), None)
    above = next(one for one in path[place:] if one in known)
    low, begin = (known[below], below.end) if below else (0, 0)
    share = (piece.end - begin) / (above.end - begin) if above.end > begin else 0.0
    return low + share * (known[above] - low)
