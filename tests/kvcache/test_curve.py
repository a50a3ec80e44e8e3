from __future__ import annotations

import msgspec
import pytest

from kvcache.curve import LogCurve


def test_each_value_holds_for_its_step_and_the_outer_ones_beyond() -> None:
    curve = LogCurve.of(1.0, 8.0, [3.0, 2.0, 1.0])
    assert [curve.index(idle) for idle in (0.0, 0.5, 1.9, 2.1, 3.9, 4.1, 7.9, 100.0)] == [3, 3, 3, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("first", "last", "values"),
    [(0.0, 1.0, [1.0]), (5e-324, 1.0, [1.0]), (1.0, float("inf"), [1.0]), (2.0, 1.0, [1.0]), (1.0, 2.0, [])],
)
def test_what_is_no_curve_is_an_error(first: float, last: float, values: list[float]) -> None:
    with pytest.raises(ValueError, match="first"):
        LogCurve.of(first, last, values)


def test_a_curve_comes_out_of_a_message_as_it_went_in() -> None:
    curve = LogCurve.of(1.0, 8.0, [3.0, 0.1, 1e-9])
    sent = msgspec.json.decode(msgspec.json.encode(curve), type=LogCurve)
    assert [sent.index(idle) for idle in (1.0, 3.0, 9.0)] == pytest.approx([3.0, 0.1, 1e-9])
