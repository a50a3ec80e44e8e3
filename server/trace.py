"""The trace: one JSON line a step, without text. What an operator records here, the simulator replays.

Prompts are chains of segment hashes, keyed with a secret that is drawn for each file and kept nowhere: equal
prefixes are equal within a file and mean nothing outside it. Names that clients chose are hashed the same way.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import structlog

from scheduler.segments import Segment, chain
from server.core import Attempt

log = structlog.get_logger("weft")

FORMAT = 1
LARGEST_FILE = 256 * 1024 * 1024
REMEMBERED = 200_000


class Trace:
    """Writes `weft-<time>.jsonl` files into a directory, another one when a file has grown past `LARGEST_FILE`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._open()

    def watch(self, attempt: Attempt) -> None:
        """Write the line of a step that ended. A disk that fails costs the trace, never a step."""
        try:
            if self._file.tell() > LARGEST_FILE:
                self._file.close()
                self._open()
            self._file.write(orjson.dumps(self._record(attempt)) + b"\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            log.warning("the trace could not be written", error=str(error))

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _open(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._tokens: OrderedDict[bytes, int] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.path = self._directory / f"weft-{stamp}-{secrets.token_hex(3)}.jsonl"
        self._file = self.path.open("ab")
        header = {"kind": "header", "format": FORMAT, "weft": version("weft"), "started": time.time()}
        self._file.write(orjson.dumps(header) + b"\n")

    def _record(self, attempt: Attempt) -> dict[str, Any]:
        call, dispatch, usage = attempt.call, attempt.dispatch, attempt.usage
        session = self._name(f"{dispatch.workflow}\0{dispatch.session}") if dispatch else None
        segments = chain(call.fields)
        last = self._ended.get(session) if session else None
        if session and attempt.finished is not None:
            _remember(self._ended, session, attempt.finished)
        who = call.identity
        return {
            "kind": "step",
            "step": call.id,
            "after": attempt.after,
            "tenant": call.tenant.name,
            "workflow": self._name(dispatch.workflow) if dispatch else None,
            "session": session,
            "parent": self._name(f"{dispatch.workflow}\0{who.parent}") if dispatch and who.parent else None,
            "role": self._name(attempt.role) if attempt.role else None,
            "template": self._name(who.template) if who.template else None,
            "rule": attempt.rule,
            "model": call.model if dispatch else None,
            "worker": dispatch.decision.worker if dispatch else None,
            "decision": dispatch.decision.reason if dispatch else None,
            "terms": dict(dispatch.decision.terms) if dispatch else None,
            "tries": len(attempt.tried),
            "state": attempt.state,
            "status": attempt.status,
            "arrived": attempt.arrived,
            "first_token": attempt.first_token,
            "finished": attempt.finished,
            "gap_seconds": None if last is None else max(0.0, attempt.arrived - last),
            "segments": self._counted(segments, usage.prompt),
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "output_tokens": usage.output,
            "stop": call.dialect.stop,
        }

    def _counted(self, segments: list[Segment], prompt_tokens: int) -> list[tuple[str, int]]:
        """Each segment's keyed hash and its tokens.

        A chain's token count is exact where a prompt ended there before; what lies between two known ends is
        shared out by bytes, so that the counts of one prompt always add up to its `prompt_tokens`.
        """
        ends = [self._tokens.get(segment.hash) for segment in segments]
        if segments and prompt_tokens:
            ends[-1] = prompt_tokens
            _remember(self._tokens, segments[-1].hash, prompt_tokens)
        counts: list[int] = []
        start = known = 0
        for index, end in enumerate(ends):
            if end is None or end < known:
                continue
            counts += _share(end - known, [s.size for s in segments[start : index + 1]])
            start, known = index + 1, end
        counts += [0] * (len(segments) - len(counts))
        return [(self._name(s.hash), n) for s, n in zip(segments, counts, strict=True)]

    def _name(self, plain: str | bytes) -> str:
        data = plain.encode("utf-8", "surrogatepass") if isinstance(plain, str) else plain
        return hashlib.blake2b(data, digest_size=8, key=self._secret).hexdigest()


def _share(total: int, sizes: list[int]) -> list[int]:
    """Split `total` in proportion to `sizes`; the parts add up to it."""
    whole, done, given = sum(sizes), 0, 0
    parts = []
    for size in sizes:
        done += size
        upto = total * done // whole if whole else total
        parts.append(upto - given)
        given = upto
    return parts


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
