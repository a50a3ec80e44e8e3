"""The embedded model on the CPU at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import embedded


@pytest.mark.parametrize(
    ("cpuinfo", "numbers"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n", "float32"),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "bfloat16"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "bfloat16"),
        (None, "bfloat16"),
    ],
)
def test_a_cpu_that_only_emulates_bfloat16_computes_in_float32(
    tmp_path: Path, cpuinfo: str | None, numbers: str
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert embedded.dtype(path) == numbers
