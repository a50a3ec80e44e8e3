"""What outlives a restart: declared templates, learned ones, and estimates, in one SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock

import orjson
import structlog

from scheduler.knowledge import Record
from server.core import Core

log = structlog.get_logger("weft")

SAVE_SECONDS = 60.0
ESTIMATES_SAVES = 10  # estimates are kept every so many saves: to write them down holds up the event loop

_SCHEMA = """
CREATE TABLE IF NOT EXISTS memory (
    kind TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, document BLOB NOT NULL,
    PRIMARY KEY (kind, tenant, name)
) WITHOUT ROWID
"""


class Memory:
    """The file. Each call opens it anew, so that any thread may make it; a file that is broken is put aside."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writing = Lock()

    def read(self) -> list[Record]:
        """Everything that was saved; what cannot be read is left out and logged."""
        try:
            with closing(self._open()) as file:
                rows = file.execute("SELECT kind, tenant, name, document FROM memory").fetchall()
        except sqlite3.OperationalError as error:  # locked, or the disk fails: it may well be sound
            log.error("the memory file cannot be read", path=str(self._path), error=str(error))
            return []
        except sqlite3.DatabaseError as error:
            log.error("the memory file is broken; starting anew", path=str(self._path), error=str(error))
            for ending in ("", "-wal", "-shm"):
                with suppress(OSError):
                    self._path.with_name(self._path.name + ending).replace(
                        self._path.with_name(self._path.name + ".broken" + ending)
                    )
            return []
        records = []
        for kind, tenant, name, document in rows:
            with suppress(orjson.JSONDecodeError):
                records.append(Record(kind, tenant, name, orjson.loads(document)))
        return records

    def write(self, records: Iterable[Record]) -> None:
        """Save records in one transaction; one without a document is deleted. Raises sqlite3.Error."""
        with self._writing, closing(self._open()) as file, file:
            for record in records:
                key = (record.kind, record.tenant, record.name)
                if record.document is None:
                    file.execute("DELETE FROM memory WHERE kind = ? AND tenant = ? AND name = ?", key)
                else:
                    document = orjson.dumps(record.document, option=orjson.OPT_NON_STR_KEYS)
                    file.execute("INSERT OR REPLACE INTO memory VALUES (?, ?, ?, ?)", (*key, document))

    def _open(self) -> sqlite3.Connection:
        file = sqlite3.connect(self._path, timeout=10)
        file.execute("PRAGMA journal_mode = WAL")
        file.execute(_SCHEMA)
        return file


async def save(core: Core, memory: Memory, estimates: bool = False) -> bool:
    """Save what has changed; False where the disk failed: it costs what was learned, never a step."""
    knowledge = core.scheduler.knowledge
    records = knowledge.changes()
    extra = [knowledge.estimated()] if estimates else []
    try:
        await asyncio.to_thread(memory.write, [*records, *extra])
    except sqlite3.Error as error:
        log.error("what was learned could not be saved", error=str(error))
        knowledge.unsaved(records)
        return False
    return True


async def keep(core: Core, memory: Memory) -> None:
    """Save again and again, until cancelled, and then once more."""
    saves = 0
    try:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            saves += 1
            await save(core, memory, estimates=saves % ESTIMATES_SAVES == 0)
    finally:
        knowledge = core.scheduler.knowledge
        with suppress(sqlite3.Error):
            memory.write([*knowledge.changes(), knowledge.estimated()])
