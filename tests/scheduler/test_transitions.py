from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.transitions import MOST_CONTEXTS, Context, Transitions

roles = st.sampled_from(["a", "b", "c"])
contexts = st.builds(Context, roles, st.frozensets(st.sampled_from(["read", "write"])), st.none() | roles)


@given(st.lists(st.tuples(contexts, st.none() | roles)), contexts)
def test_probabilities_sum_to_one_with_what_is_left_for_a_role_never_seen(seen: list, context: Context) -> None:
    transitions = Transitions()
    for one, role in seen:
        transitions.observe(one, role)
    predicted = transitions.predict(context)
    assert all(0 < p < 1 for p in predicted.values())
    assert sum(predicted.values()) < 1 + 1e-9
    assert predicted.keys() == {role for _, role in seen}


def test_after_one_run_the_next_goes_as_it_went() -> None:
    transitions = Transitions()
    transitions.observe(Context("plan"), "act")
    transitions.observe(Context("act", before="plan"), None)
    assert max(transitions.predict(Context("plan")).items(), key=lambda one: one[1])[0] == "act"
    predicted = transitions.predict(Context("act", before="plan"))
    assert max(predicted, key=lambda role: predicted[role]) is None


def test_the_role_before_tells_what_the_role_alone_does_not() -> None:
    transitions = Transitions()
    for _ in range(20):
        transitions.observe(Context("plan", before="first"), "second")
        transitions.observe(Context("plan", before="second"), None)
    assert transitions.predict(Context("plan", before="first"))["second"] > 0.9
    assert transitions.predict(Context("plan", before="unknown"))["second"] == pytest.approx(0.5, abs=0.01)


def test_the_tools_called_tell_who_comes_next() -> None:
    transitions = Transitions()
    for _ in range(20):
        transitions.observe(Context("act", frozenset({"search"})), "read")
        transitions.observe(Context("act", frozenset({"edit", "test"})), "review")
    assert transitions.predict(Context("act", frozenset({"test", "edit"})))["review"] > 0.9


def test_a_habit_that_changed_is_forgotten() -> None:
    transitions = Transitions()
    for n in range(4000):
        transitions.observe(Context("a"), "old" if n < 2000 else "new")
    assert transitions.predict(Context("a"))["new"] > 0.9


def test_contexts_and_outcomes_are_bounded() -> None:
    transitions = Transitions()
    for n in range(3 * MOST_CONTEXTS):
        transitions.observe(Context("a", frozenset({str(n)})), str(n))
        transitions.observe(Context("b"), "a")
    assert len(transitions.dump()) <= MOST_CONTEXTS
    assert len(transitions.predict(Context("a"))) < 2000
    assert transitions.predict(Context("b"))["a"] > 0.9


def test_a_dump_loads_as_the_same() -> None:
    transitions = Transitions()
    transitions.observe(Context("a", frozenset({"x", "y"}), "b"), None)
    transitions.observe(Context("a", frozenset(), None), "b")
    again = Transitions.load(json.loads(json.dumps(transitions.dump())))
    for context in (Context("a", frozenset({"x", "y"}), "b"), Context("a"), Context("c")):
        assert again.predict(context) == transitions.predict(context)
