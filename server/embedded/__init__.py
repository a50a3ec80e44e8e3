"""The embedded model: a small Llama with random weights, so that Weft runs where no model is at hand.

Its replies are noise. It is made on first use, from a fixed seed and a fixed text.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from server.config import ConfigError

NAME = "weft-embedded"
POSITIONS = 32768
VLLM_ARGS = (
    *("--served-model-name", NAME),
    *("--max-model-len", str(POSITIONS)),
    *("--block-size", "32"),
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "hermes"),
)

WIDE = "avx512f"
"""What an x86 CPU computes bfloat16 with."""

_SOURCES = ("__main__.py", "corpus.txt", "chat_template.jinja")


def dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """In which numbers the model is quickest here: an x86 CPU without AVX-512 takes four times as long to prefill in
    bfloat16 as in float32."""
    try:
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), WIDE)
    except OSError:
        flags = WIDE
    return "bfloat16" if WIDE in flags.split() else "float32"


def folder(home: Path) -> Path:
    """Where the model lies: another place for another recipe."""
    recipe = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES)).hexdigest()
    return home / "models" / f"{NAME}-{recipe[:12]}"


def ensure(home: Path) -> Path:
    """Make the model where it does not exist yet; takes some seconds then. Raises ConfigError where that fails."""
    made = folder(home)
    if not made.exists():
        part = made.with_name(made.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "server.embedded", str(part)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError(f"the embedded model could not be made: {done.stderr.strip()[-500:]}")
        part.rename(made)
    return made
