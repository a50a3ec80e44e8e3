"""Plays the cells of a matrix: what is missing in DIR/cells.jsonl, interleaved, each written down when it has ended."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.cells import SIMULATED, Cell, Done, Ledger
from bench.errors import BenchError
from bench.metrics import Metrics, measure
from bench.records import Played

Runner = Callable[[Cell], Played]
"""Plays one cell. To be used in other processes it must be picklable."""

Guess = Callable[[Cell], float]
"""About how many seconds a cell takes."""

PROBLEMS, PROBLEM_LENGTH = 3, 200


def plan(
    base: Cell,
    systems: Sequence[str],
    points: Sequence[Mapping[str, Any]],
    reps: int,
) -> list[Cell]:
    """The cells of a matrix in the order to play them in. A point is what a cell has otherwise than `base`.

    One repetition follows another; in each, at each point, the systems run side by side in an order of their own, so
    that what changes on the machine meanwhile meets all alike. Every system has the same seed in the same repetition.
    """
    cells = []
    for rep in range(reps):
        for number, point in enumerate(points):
            order = list(systems)
            random.Random(f"{base.seed} {rep} {number}").shuffle(order)
            at = replace(base, rep=rep, seed=base.seed + rep, **point)
            cells += [replace(at, system=system) for system in order]
    return cells


def expected(missing: Sequence[Cell], known: Mapping[Cell, Done], guess: Guess, jobs: int = 1) -> float:
    """Seconds that the missing cells will take: as cells of the same system, workers and load did, else as those of
    the same system and workers, else as guessed.
    """
    spent: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for cell, done in known.items():
        for like in _likes(cell):
            spent[like].append(done.seconds)
    past = {like: math.fsum(seconds) / len(seconds) for like, seconds in spent.items()}
    each = (next((past[like] for like in _likes(cell) if like in past), None) or guess(cell) for cell in missing)
    return math.fsum(each) / min(jobs, max(1, len(missing)))


def _likes(cell: Cell) -> tuple[tuple[Any, ...], ...]:
    return (cell.system, cell.workers, cell.load, cell.arrivals), (cell.system, cell.workers)


def play(
    cells: Sequence[Cell],
    ledger: Ledger,
    runner: Runner,
    guess: Guess,
    origin: tuple[str, Mapping[str, Any]],
    jobs: int = 1,
    say: Console | None = None,
) -> tuple[list[Done], list[Cell]]:
    """Play what is missing of the cells; returns those that are done, and those that failed, which a rerun tries again.

    `origin` is the revision of the code and the machine. A simulated cell that another revision played is missing: it
    is cheap to play again; a real one is kept, and said to be other code's, or another machine's. `jobs` processes play
    at once. Progress and failures go to `say`, standard error by default. A KeyboardInterrupt, or a BenchError, which
    no rerun would mend, ends it; all that had ended is written down.
    """
    say = say or Console(file=sys.stderr)
    known = ledger.read()
    kept = [known[cell] for cell in cells if cell in known and not _stale(known[cell], origin[0])]
    there = {one.cell for one in kept}
    missing = [cell for cell in cells if cell not in there]
    again = sum(cell in known for cell in missing)
    _tell(say, kept, len(missing), again, expected(missing, known, guess, jobs))
    _warn(say, kept, origin, ledger.unread)
    done, failed = kept, []
    with _bar(say) as bar, contextlib.closing(_played(missing, runner, jobs)) as played:
        task = bar.add_task("", total=len(missing))
        for cell, figures, error in played:
            if error is None and figures is not None:
                metrics, seconds, extra, problems = figures
                done.append(Done(cell, metrics, seconds, *origin, extra, problems))
                ledger.append(done[-1])
                if problems:
                    told = f"weft: {cell}: {metrics['errors']} calls failed: {' | '.join(problems)}"
                    say.print(told, markup=False, highlight=False)
            else:
                failed.append(cell)
                say.print(f"weft: {cell}: {error}", markup=False, highlight=False)
            bar.update(task, advance=1, description=str(cell))
            if not say.is_terminal:
                say.print(f"{len(done) + len(failed)}/{len(cells)} {cell}", markup=False, highlight=False)
    return done, failed


def _stale(done: Done, revision: str) -> bool:
    return done.cell.engine == SIMULATED and done.revision != revision


def _tell(say: Console, kept: Sequence[Done], missing: int, again: int, seconds: float) -> None:
    counts = f"cells to play: {missing}, there already: {len(kept)}"
    say.print(f"{counts}; expected: {spoken(seconds)}", highlight=False)
    if again:
        say.print(f"weft: {again} of them are played again: other code simulated them before", highlight=False)


def _warn(say: Console, kept: Sequence[Done], origin: tuple[str, Mapping[str, Any]], unread: int) -> None:
    revision, machine = origin
    if number := sum(done.revision != revision for done in kept):
        others = ", ".join(sorted({done.revision for done in kept} - {revision}))
        said = f"{number} of those there were played by other code ({others}, not {revision})"
        say.print(f"weft: {said}: they are compared with none of this code; use another --out", highlight=False)
    if number := sum(done.machine != machine for done in kept):
        said = f"{number} of those there were played on another machine"
        say.print(f"weft: {said}: they are compared with none of this machine; use another --out", highlight=False)
    if unread:
        say.print(f"weft: {unread} lines of cells.jsonl were not understood and are left out", highlight=False)


def spoken(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bar(say: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=say, transient=True, disable=not say.is_terminal)


Figures = tuple[Metrics, float, dict[str, float], list[str]]


def _one(runner: Runner, cell: Cell) -> Figures:
    began = time.perf_counter()
    played = runner(cell)
    metrics = measure(played)
    extra = {name: value for name, value in played.extra.items() if math.isfinite(value)}
    return metrics, round(time.perf_counter() - began, 3), extra, problems(played)


def problems(played: Played) -> list[str]:
    """The first few distinct texts of calls that failed, cut short."""
    texts = dict.fromkeys(call.error[:PROBLEM_LENGTH] for call in played.calls if call.error is not None)
    return list(texts)[:PROBLEMS]


def _played(cells: Sequence[Cell], runner: Runner, jobs: int) -> Generator[tuple[Cell, Figures | None, str | None]]:
    """Each cell when it has ended, with its figures or with what went wrong."""
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            try:
                figures = _one(runner, cell)
            except BenchError:
                raise
            except Exception as error:
                yield cell, None, _told(error)
            else:
                yield cell, figures, None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(jobs, len(cells)), context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        futures: dict[Future[Figures], Cell] = {pool.submit(_one, runner, cell): cell for cell in cells}
        for future in as_completed(futures):
            wrong = future.exception()
            if isinstance(wrong, BenchError):
                raise wrong
            yield futures[future], None if wrong else future.result(), _told(wrong) if wrong else None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
