"""AIPerf, unmodified, beside our own player: the same sessions, as many at once, through the same running server.

    make aiperf
    weft serve --replicas 2
    python -m bench.aiperf --workload mini-swe-agent --trace mini_swe_agent.tar.xz --url http://127.0.0.1:8000 --out DIR

Each repetition draws sessions, and each player gets them with a line in front that no cache has seen; who begins
alternates. AIPerf's figures are those that it reports itself, but for the time of a session, which it does not: that is
from its records, first request sent to last one ended. Its calls end with their last chunk that has text, ours with the
end of the stream. While it plays it keeps a core busy, which engines on the same machine feel: with `--spin` our player
does so, too. `--sessions-only` writes DIR/sessions.jsonl, to run AIPerf by hand: docs/measuring.md has the command.
Only runs of one session can be written so: AIPerf replays a session as a list of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from bench import machine
from bench.attached import Attached, afresh
from bench.cells import write_json
from bench.errors import BenchError
from bench.metrics import mean, percentile, rounded
from bench.play import Player
from bench.records import Played
from bench.rivals.chat import request
from bench.rivals.front import Stock
from bench.rivals.texts import Texts, calibrate
from bench.runners import parsed
from bench.workloads import catalog
from bench.workloads.runs import Call, Run, Workload

OURS, THEIRS = "weft bench", "aiperf"
SESSION_HEADER = "x-session-id"
LONGEST = 3600.0
MILLISECONDS = 1000.0

FIGURES = (
    "calls", "errors", "prompt_tokens", "output_tokens", "cached_share", "text_p50", "text_p90", "text_p99",
    "call_mean", "call_p50", "call_p99", "session_mean", "session_p95", "calls_per_second",
    "output_tokens_per_second",
)  # fmt: skip
"""Tokens are sums; text, call and session are seconds: to the first chunk with text (AIPerf calls it the first token),
to the last chunk, and of a whole session."""

TOKENS = {"prompt": "prompt_tokens", "output": "completion_tokens", "cached": "prompt_cache_read_tokens"}

Figures = dict[str, float | None]


def lines(runs: Iterable[Run], texts: Texts, model: str) -> Iterable[bytes]:
    """The runs as AIPerf's `mooncake_trace` with whole request bodies, a line for each call.

    Raises BenchError for a run that is no single list of turns.
    """
    for run in runs:
        before: Call | None = None
        for call in run.calls:
            if call.after != ((before,) if before else ()) or call.session != run.calls[0].session:
                raise BenchError(f"{run.id} is no list of turns: AIPerf cannot replay it as one session")
            body = orjson.loads(request(model, texts.messages(run, call), call.output))
            line = {"session_id": run.id, "payload": body}
            if before:
                line["delay"] = call.gap * MILLISECONDS
            yield orjson.dumps(line) + b"\n"
            before = call


def command(asked: argparse.Namespace, model: str, sessions: Path, count: int, out: Path) -> list[str]:
    """How AIPerf is called: a closed loop of `live` sessions, each turn sent when the one before has ended."""
    options = {
        "model": model, "url": asked.url, "endpoint-type": "chat", "input-file": str(sessions),
        "custom-dataset-type": "mooncake_trace", "concurrency": str(asked.live), "num-sessions": str(count),
        "dataset-sampling-strategy": "sequential", "session-header": SESSION_HEADER, "tokenizer": asked.tokenizer,
        "request-timeout-seconds": "600", "artifact-dir": str(out), "ui": "none",
    }  # fmt: skip
    flags = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics"]
    named = itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())
    return [str(asked.aiperf), "profile", *named, *flags]


def reported(out: Path) -> Figures:
    """AIPerf's own figures, from the files that it wrote."""
    summary = json.loads((out / "profile_export_aiperf.json").read_bytes())
    with (out / "profile_export.jsonl").open("rb") as file:
        records = [orjson.loads(line) for line in file]
    seconds = _sessions(
        (row["metadata"]["conversation_id"], row["metadata"]["request_start_ns"] / 1e9,
         row["metadata"]["request_end_ns"] / 1e9) for row in records
    )  # fmt: skip
    tokens = {name: sum(_value(row, f"usage_{tag}") for row in records) for name, tag in TOKENS.items()}
    return {
        "calls": float(len(records)),
        "errors": float(sum(row.get("error") is not None for row in records)),
        "prompt_tokens": tokens["prompt"],
        "output_tokens": tokens["output"],
        "cached_share": tokens["cached"] / tokens["prompt"] if tokens["prompt"] else None,
        **{f"text_{one}": _summed(summary, "time_to_first_token", one, MILLISECONDS) for one in ("p50", "p90", "p99")},
        "call_mean": _summed(summary, "request_latency", "avg", MILLISECONDS),
        **{f"call_{one}": _summed(summary, "request_latency", one, MILLISECONDS) for one in ("p50", "p99")},
        **_spread(seconds),
        "calls_per_second": _summed(summary, "request_throughput", "avg"),
        "output_tokens_per_second": _summed(summary, "output_token_throughput", "avg"),
    }


def played(found: Played) -> Figures:
    """The same figures of what our player saw, of all its calls."""
    done = [call for call in found.calls if call.finished is not None and call.first_token is not None]
    if not done:
        raise BenchError(f"no call was answered: {found.calls[0].error if found.calls else 'none was sent'}")
    first = [(call.first_text or call.finished or 0.0) - call.sent for call in done]
    whole = [(call.finished or 0.0) - call.sent for call in done]
    seconds = _sessions((call.run, call.sent, call.finished or call.sent) for call in done)
    prompt, output = sum(call.prompt for call in done), sum(call.output for call in done)
    elapsed = max(call.finished or 0.0 for call in done) - min(call.sent for call in done)
    return {
        "calls": float(len(found.calls)),
        "errors": float(sum(call.error is not None for call in found.calls)),
        "prompt_tokens": float(prompt),
        "output_tokens": float(output),
        "cached_share": sum(call.cached for call in done) / prompt,
        **{f"text_p{one}": percentile(first, one) for one in (50, 90, 99)},
        "call_mean": mean(whole),
        **{f"call_p{one}": percentile(whole, one) for one in (50, 99)},
        **_spread(seconds),
        "calls_per_second": len(done) / elapsed,
        "output_tokens_per_second": output / elapsed,
    }


def table(found: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Markdown: each figure of both players, mean [least..greatest], and AIPerf's over ours."""
    rows = [f"| | {OURS} | {THEIRS} | ratio, each repetition |", "|---|---:|---:|---|"]
    for name in FIGURES:
        ours, theirs = ([one[name] for one in found[player]] for player in (OURS, THEIRS))
        pairs = [b / a for a, b in zip(ours, theirs, strict=True) if a and b is not None]
        rows.append(f"| {name} | {_spelt(ours)} | {_spelt(theirs)} | {', '.join(f'{one:.3f}' for one in pairs)} |")
    return rows


def _spelt(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, low, high = (f"{value:.4g}" for value in (mean(known) or 0.0, min(known), max(known)))
    return middle if low == high else f"{middle} [{low}..{high}]"


def _sessions(calls: Iterable[tuple[str, float, float]]) -> list[float]:
    """The seconds of each session, from (session, sent, ended) of its calls."""
    spans: dict[str, tuple[float, float]] = {}
    for session, sent, ended in calls:
        begin, end = spans.get(session, (sent, ended))
        spans[session] = min(begin, sent), max(end, ended)
    return [end - begin for begin, end in spans.values()]


def _spread(seconds: Sequence[float]) -> Figures:
    return {"session_mean": mean(seconds), "session_p95": percentile(seconds, 95)}


def _value(row: Mapping[str, Any], tag: str) -> float:
    return float((row["metrics"].get(tag) or {}).get("value") or 0.0)


def _summed(summary: Mapping[str, Any], tag: str, statistic: str, over: float = 1.0) -> float | None:
    value = (summary.get(tag) or {}).get(statistic)
    return None if value is None else value / over


@contextmanager
def _spinning(asked: bool) -> Iterator[None]:
    """Keep a core busy, where that is asked for."""
    if not asked:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


class Pair:
    """Both players before one server, with the sessions of a workload."""

    def __init__(self, server: Attached, workload: Workload, asked: argparse.Namespace) -> None:
        self.server, self.workload, self.asked = server, workload, asked

    async def play(self, rep: int) -> dict[str, Figures]:
        """One repetition: each player in its turn."""
        found: dict[str, Figures] = {}
        for player in (OURS, THEIRS) if rep % 2 == 0 else (THEIRS, OURS):
            runs = self.runs(rep)
            texts = await calibrate(self.server.http, self.server.urls[0], self.server.model, rep, runs)
            print(f"repetition {rep + 1}: {player}, {len(runs)} sessions", flush=True)
            found[player] = await (self._ours(runs, texts) if player == OURS else self._theirs(runs, texts, rep))
        return found

    def write(self, runs: Sequence[Run], texts: Texts, path: Path) -> None:
        """Write the sessions for AIPerf."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(lines(runs, texts, self.server.model))

    def runs(self, rep: int) -> list[Run]:
        """The sessions of a repetition, each time with text that no cache has seen."""
        return list(itertools.islice(afresh(self.workload).draw(self.asked.seed + rep), self.asked.sessions))

    async def _ours(self, runs: Sequence[Run], texts: Texts) -> Figures:
        front = Stock()
        await front.start(self.server, self.workload)
        player = Player(self.server.http, front, texts, self.server.model, 32)
        with _spinning(self.asked.spin):
            return played(await player.closed(runs, [(0.0, 0.0)] * self.asked.live))

    async def _theirs(self, runs: Sequence[Run], texts: Texts, rep: int) -> Figures:
        out, asked = self.asked.out / f"aiperf-{rep}", self.asked
        shutil.rmtree(out, ignore_errors=True)  # what an earlier run wrote must not be read for this one's
        self.write(runs, texts, out / "sessions.jsonl")
        told = command(asked, self.server.model, out / "sessions.jsonl", len(runs), out)
        with (out / "log").open("wb") as log:
            playing = await asyncio.create_subprocess_exec(*told, stdout=log, stderr=subprocess.STDOUT)
            try:
                async with asyncio.timeout(LONGEST):
                    code = await playing.wait()
            finally:
                if playing.returncode is None:
                    playing.terminate()
                    await playing.wait()
        if code:
            raise BenchError(f"AIPerf ended with {code}: see {out / 'log'}")
        return reported(out)


async def _compare(asked: argparse.Namespace) -> None:
    own = parsed(asked.options)
    workload = catalog.load(asked.workload, asked.trace, asked.seed, max_context=asked.max_context, **own)
    async with Attached(asked.url, None, 1 << 30) as server:
        pair = Pair(server, workload, asked)
        if asked.sessions_only:
            runs = pair.runs(0)
            pair.write(runs, await calibrate(server.http, server.urls[0], server.model, asked.seed, runs),
                       asked.out / "sessions.jsonl")  # fmt: skip
            return
        reps = [await pair.play(rep) for rep in range(asked.reps)]
    found = {player: [rep[player] for rep in reps] for player in (OURS, THEIRS)}
    neat = {player: [{k: rounded(v) for k, v in one.items()} for one in each] for player, each in found.items()}
    about = {"revision": machine.revision(), "machine": machine.machine(), "versions": machine.versions()}
    write_json(asked.out / "aiperf.json", {"figures": neat, **about, "live": asked.live, "sessions": asked.sessions})
    text = "\n".join(table(found))
    (asked.out / "aiperf.md").write_text(text + "\n")
    print(text)


def main() -> None:
    """Play both and write DIR/aiperf.json and DIR/aiperf.md."""
    parser = argparse.ArgumentParser(description="AIPerf beside our own player, through one running server.")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--options", default="", help="the workload's own: name=value,...")
    parser.add_argument("--max-context", type=int, help="leave out longer prompts, in tokens")
    parser.add_argument("--url", required=True, help="a running server that answers /tokenize: Weft or vLLM")
    parser.add_argument("--aiperf", type=Path, default=Path(".venv/aiperf/bin/aiperf"))
    parser.add_argument("--tokenizer", default="builtin", help="for AIPerf: a folder; builtin is downloaded")
    parser.add_argument("--live", type=int, default=8, help="sessions at once")
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--spin", action="store_true", help="keep a core busy beside our player, as AIPerf does")
    parser.add_argument("--sessions-only", action="store_true", help="only write DIR/sessions.jsonl")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.live > asked.sessions:
        parser.error("--live is more than --sessions")
    try:
        asyncio.run(_compare(asked))
    except BenchError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
