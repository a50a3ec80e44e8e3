"""Holds a running Weft to its own OpenAPI document: `python -m tests.server.schema URL`."""

from __future__ import annotations

import sys

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance


def check_all(url: str) -> None:
    """Raises what Schemathesis finds."""
    operations = [found.ok() for found in schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations()]
    assert len(operations) >= 8
    for operation in operations:
        check(operation, url)


def check(operation, url: str) -> None:
    """What fits the schema, and what does not, is answered as it says."""
    fitting = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    unfitting = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    # No JSON schema can say that edges join roles that exist.
    excluded = [positive_data_acceptance] if operation.method.upper() == "PUT" else []

    @given(case=fitting | unfitting)
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    def answers(case) -> None:
        case.call_and_validate(base_url=url, excluded_checks=excluded)

    answers()


if __name__ == "__main__":
    check_all(sys.argv[1])
