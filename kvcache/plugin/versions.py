"""The versions of vLLM that the plug-in was made for. With another it works as far as its self-test finds its seams."""

from __future__ import annotations

import re

SUPPORTED = ">=0.32,<0.34"


def supported(version: str) -> bool:
    """Whether a version of vLLM is one of those."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (0, 32) <= (int(found[1]), int(found[2])) < (0, 34)
