from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.segments import LONGEST_CHAIN, chain

messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}))


@given(messages, messages)
def test_a_longer_conversation_extends_the_chain_of_the_shorter(first: list, more: list) -> None:
    short, long = chain({"messages": first}), chain({"messages": first + more})
    assert long[: len(short)] == short


def test_a_change_early_on_changes_all_that_follows() -> None:
    one = chain({"messages": [{"content": "a"}, {"content": "b"}]})
    two = chain({"messages": [{"content": "x"}, {"content": "b"}]})
    assert not {s.hash for s in one} & {s.hash for s in two}


def test_the_order_of_a_messages_fields_does_not_matter() -> None:
    assert chain({"messages": [{"role": "user", "content": "a"}]}) == chain(
        {"messages": [{"content": "a", "role": "user"}]}
    )


def test_a_growing_prompt_string_shares_its_beginning() -> None:
    one, two = chain({"prompt": "x" * 2000}), chain({"prompt": "x" * 2000 + "more"})
    assert one[:3] == two[:3]


def test_tools_and_system_come_first() -> None:
    bare = chain({"messages": [{"content": "a"}]})
    assert chain({"messages": [{"content": "a"}], "system": "s"})[-1] != bare[-1]
    assert chain({"messages": [{"content": "a"}], "tools": [{"name": "t"}]})[-1] != bare[-1]


def test_a_400_kb_body_is_cut_and_hashed_in_bounded_pieces() -> None:
    body = {"messages": [{"role": "user", "content": "y" * 4000} for _ in range(100)]}
    assert len(chain(body)) == 100
    assert len(chain({"prompt": list(range(64 * (LONGEST_CHAIN + 10)))})) == LONGEST_CHAIN
