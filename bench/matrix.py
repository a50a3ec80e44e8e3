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

from bench.cells import Cell, Done, Ledger
from bench.errors import BenchError
from bench.metrics import Metrics, measure
from bench.records import Played

Runner = Callable[[Cell], Played]
"""Plays one cell. To be used in other processes it must be picklable."""

Guess = Callable[[Cell], float]
"""About how many seconds a cell takes."""


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
    """Seconds that the missing cells will take: as cells of the same system and size did, else as guessed."""
    spent = defaultdict(list)
    for cell, done in known.items():
        spent[cell.system, cell.workers].append(done.seconds)
    past = {size: math.fsum(seconds) / len(seconds) for size, seconds in spent.items()}
    each = (past.get((cell.system, cell.workers)) or guess(cell) for cell in missing)
    return math.fsum(each) / min(jobs, max(1, len(missing)))


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

    `origin` is the revision of the code and the machine. `jobs` processes play at once. Progress and failures go to
    `say`, standard error by default. A KeyboardInterrupt, or a BenchError, which no rerun would mend, ends it; all that
    had ended is written down.
    """
    say = say or Console(file=sys.stderr)
    known = ledger.read()
    missing = [cell for cell in cells if cell not in known]
    kept = [known[cell] for cell in cells if cell in known]
    _tell(say, kept, missing, origin[0], expected(missing, known, guess, jobs))
    done, failed = kept, []
    with _bar(say) as bar, contextlib.closing(_played(missing, runner, jobs)) as played:
        task = bar.add_task("", total=len(missing))
        for cell, figures, error in played:
            if error is None and figures is not None:
                metrics, seconds = figures
                done.append(Done(cell, metrics, seconds, *origin))
                ledger.append(done[-1])
            else:
                failed.append(cell)
                say.print(f"weft: {cell}: {error}", markup=False, highlight=False)
            bar.update(task, advance=1, description=str(cell))
            if not say.is_terminal:
                say.print(f"{len(done) + len(failed)}/{len(cells)} {cell}", markup=False, highlight=False)
    return done, failed


def _tell(say: Console, kept: Sequence[Done], missing: Sequence[Cell], revision: str, seconds: float) -> None:
    counts = f"cells to play: {len(missing)}, there already: {len(kept)}"
    say.print(f"{counts}; expected: {spoken(seconds)}", highlight=False)
    if others := {done.revision for done in kept} - {revision}:
        number = sum(done.revision in others for done in kept)
        say.print(
            f"weft: {number} of them were played by other code ({', '.join(sorted(others))}, not {revision}): "
            "use another --out to play them again",
            highlight=False,
        )


def spoken(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bar(say: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=say, transient=True, disable=not say.is_terminal)


Figures = tuple[Metrics, float]


def _one(runner: Runner, cell: Cell) -> Figures:
    began = time.perf_counter()
    metrics = measure(runner(cell))
    return metrics, round(time.perf_counter() - began, 3)


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
