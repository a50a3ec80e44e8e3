"""The house rules of the design that a machine can check: which way imports point, and how large things may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("scheduler", "kvcache", "server", "bench")
ALLOWED = {
    "kvcache": set(),
    "scheduler": {"kvcache"},
    "server": {"scheduler", "kvcache"},
    "bench": {"server", "scheduler", "kvcache"},
}
PURE = ("scheduler", "kvcache")
IMPURE_LIBRARIES = {
    "ray", "vllm", "torch", "fastapi", "starlette", "uvicorn", "aiohttp", "asyncio", "socket", "time", "datetime",
    "threading", "subprocess", "os", "pathlib", "random", "secrets", "uuid",
}  # fmt: skip
LONGEST_MODULE = 400
LONGEST_FUNCTION = 50

MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """The top-level names of everything a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert set(imported(path)) & set(PACKAGES) <= ALLOWED[package] | {package}


@pytest.mark.parametrize("path", [p for p in MODULES if p.relative_to(ROOT).parts[0] in PURE], ids=name)
def test_the_core_is_pure(path: Path) -> None:
    if "plugin" not in path.parts:
        assert not set(imported(path)) & IMPURE_LIBRARIES


def test_the_plug_in_loads_without_ray_or_our_web_libraries() -> None:
    for path in (ROOT / "kvcache").rglob("*.py"):
        assert not set(imported(path)) & {"ray", "fastapi", "starlette", "uvicorn", "aiohttp", "server", "scheduler"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} is too long"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_public_function_and_class_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    nodes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))]
    silent = [getattr(n, "name", "module") for n in nodes if not ast.get_docstring(n)]
    assert not [s for s in silent if not s.startswith("_")] or not path.read_text().strip()
