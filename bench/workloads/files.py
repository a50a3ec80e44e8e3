"""Reading trace files: what cannot be read is a ValueError that names file and line."""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


def documents(path: Path, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, JSON object) of the `prefix*.json` files of a directory or a tar archive, in the order of their names."""
    for name, data in sorted(_files(path, prefix)):
        yield name, _parsed(data, f"{path}: {name}")


def lines(path: Path, cut: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of a JSON lines file, perhaps packed with xz. `cut`: its last line may be cut off."""
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    rows = data.split(b"\n")
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            parsed = _parsed(row, f"{path}: line {number}")
        except ValueError:
            if cut and number == len(rows):
                return
            raise
        yield number, parsed


def _files(path: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            yield from ((one.name, one.read_bytes()) for one in path.glob(f"{prefix}*.json"))
            return
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name.startswith(prefix) and name.endswith(".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: not a JSON object")
    return parsed
