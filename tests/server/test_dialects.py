from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import StreamReader
from hypothesis import given
from hypothesis import strategies as st

from scheduler.events import Usage
from scheduler.prompt import Answer, ToolCall
from server import sse
from server.dialects import LONGEST_ANSWER, Chat, Completions, Dialect, Messages, Responses
from tests.fake_worker import chat_events


class _Protocol:
    _reading_paused = False
    connected = True

    def pause_reading(self) -> None: ...

    def resume_reading(self, resume_parser: bool = True) -> None: ...


async def relayed(pieces: list[bytes], dialect: Chat) -> bytes:
    reader = StreamReader(_Protocol(), limit=1 << 20, loop=asyncio.get_running_loop())  # type: ignore[arg-type]
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return b"".join([dialect.feed(block) async for block in sse.blocks(reader)])


@given(st.integers(0, 6), st.lists(st.integers(1, 400), max_size=30), st.booleans())
def test_however_a_stream_is_cut_it_comes_out_whole(chunks: int, cuts: list[int], drop: bool) -> None:
    whole = b"".join(chat_events(chunks, True))
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(whole[at : at + cut])
        at += cut
    pieces = [piece for piece in [*pieces, whole[at:]] if piece]
    dialect = Chat(drop_usage=drop)
    out = asyncio.run(relayed(pieces, dialect))
    assert out == b"".join(chat_events(chunks, not drop))
    assert dialect.usage == Usage(20, 16, 3)
    assert dialect.stop == "stop"
    assert dialect.content == (chunks > 0)


def test_an_event_without_end_is_not_buffered_without_bound() -> None:
    async def blocks() -> list[int]:
        reader = StreamReader(_Protocol(), limit=1 << 20, loop=asyncio.get_running_loop())  # type: ignore[arg-type]
        task = asyncio.create_task(_sizes(reader))
        for _ in range(5):
            reader.feed_data(b"x" * (sse.LARGEST_EVENT // 2))
            await asyncio.sleep(0.01)
        reader.feed_eof()
        return await task

    sizes = asyncio.run(blocks())
    assert len(sizes) > 1
    assert sum(sizes) == 5 * (sse.LARGEST_EVENT // 2)


async def _sizes(reader: StreamReader) -> list[int]:
    return [len(block) async for block in sse.blocks(reader)]


def test_tool_calls_and_reasoning_are_content() -> None:
    for delta in ({"tool_calls": [{"index": 0}]}, {"reasoning": "hm"}, {"content": "x"}):
        dialect = Chat()
        dialect.feed(
            b"data: " + json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}).encode() + b"\n\n"
        )
        assert (dialect.prefilled, dialect.content) == (True, False)
        dialect.feed(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
        assert dialect.content


def test_completions_read_text() -> None:
    dialect = Completions(drop_usage=True)
    kept = dialect.feed(
        b'data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":4}}\n\n'
    )
    assert kept.count(b"data:") == 1
    assert (dialect.content, dialect.stop, dialect.usage.prompt) == (True, "length", 4)


def test_messages_count_all_parts_of_the_prompt() -> None:
    dialect = Messages()
    dialect.feed(Messages.ping)
    assert not dialect.prefilled
    stream = [
        ("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 20, "output_tokens": 0}}}),
        ("content_block_delta", {"type": "content_block_delta", "delta": {"text": "x"}}),
        ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "tool_use"},
                           "usage": {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 9}}),
    ]  # fmt: skip
    block = b"".join(f"event: {n}\ndata: {json.dumps(d, separators=(',', ':'))}\n\n".encode() for n, d in stream)
    assert dialect.feed(block) == block
    assert dialect.usage == Usage(20, 16, 9)
    assert (dialect.prefilled, dialect.content, dialect.stop) == (True, True, "tool_use")


def test_responses_are_known_by_their_id() -> None:
    dialect = Responses()
    dialect.feed(b'event: response.created\ndata: {"type":"response.created"}\n\n')
    assert not dialect.prefilled, "which comes before any is computed"
    done = {"type": "response.completed", "response": {"id": "resp_1", "status": "completed",
            "usage": {"input_tokens": 8, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 2}}}  # fmt: skip
    dialect.feed(b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n')
    dialect.feed(b"event: response.completed\ndata: " + json.dumps(done).encode() + b"\n\n")
    assert (dialect.response_id, dialect.stop, dialect.usage) == ("resp_1", "completed", Usage(8, 4, 2))


@pytest.mark.parametrize("dialect", [Chat, Messages, Responses])
def test_an_error_in_a_workers_stream_is_noticed_and_passed(dialect: type) -> None:
    reader = dialect()
    reader.content = True
    event = b'event: error\ndata: {"type":"error","error":{"type":"x","message":"boom"},"message":"boom"}\n\n'
    assert reader.feed(event) == event
    assert reader.error == "boom"


def said(dialect: Dialect, events: list[dict]) -> Answer:
    for event in events:
        name = f"event: {event['type']}\n" if "type" in event else ""
        dialect.feed(f"{name}data: {json.dumps(event)}\n\n".encode())
    return dialect.answer


def test_what_a_chat_stream_says_is_put_together() -> None:
    def delta(index: int = 0, **fields: object) -> dict:
        return {"choices": [{"index": index, "delta": fields}]}

    def call(index: int, arguments: str, **more: object) -> dict:
        return delta(tool_calls=[{"index": index, "function": {"arguments": arguments, **more}, "id": None}])

    events = [delta(reasoning="hm"), delta(content="I "), delta(1, content="other choice"), delta(content="look.")]
    start = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": ""}}
    events += [delta(tool_calls=[start]), call(0, '{"at":'), call(0, ' "door"}')]
    events += [delta(tool_calls=[{**start, "index": 1, "id": "c2"}]), call(1, "{}")]
    expected = Answer("I look.", (ToolCall("c1", "look", '{"at": "door"}'), ToolCall("c2", "look", "{}")))
    assert said(Chat(), events) == expected
    message = {"content": "I look.", "reasoning": "hm", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "door"}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}}]}  # fmt: skip
    whole = Chat()
    whole.read_whole({"choices": [{"index": 0, "message": message}]})
    assert whole.answer == expected


def test_what_a_message_says_is_put_together() -> None:
    events = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I look."}},
        {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "t1", "name": "look"}},
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"a":1}'}},
    ]
    expected = Answer("I look.", (ToolCall("t1", "look", '{"a":1}'),))
    assert said(Messages(), events) == expected
    whole = Messages()
    blocks = [{"type": "text", "text": "I look."}, {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}}]
    whole.read_whole({"content": blocks})
    assert whole.answer == expected


def test_what_a_response_says_is_read_off_its_end() -> None:
    output = [
        {"type": "reasoning", "content": [{"text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "f1", "name": "look", "arguments": "{}"},
    ]
    events = [{"type": "response.output_text.delta", "delta": "I look."},
              {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": output}}]  # fmt: skip
    assert said(Responses(), events) == Answer("I look.", (ToolCall("f1", "look", "{}"),))


def test_of_a_very_long_answer_the_beginning_is_kept_and_the_rest_is_relayed_unread() -> None:
    chat = Chat()
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 1000}}]}).encode()
    for _ in range(100):
        assert chat.feed(b"data: " + chunk + b"\n\n") == b"data: " + chunk + b"\n\n"
    assert LONGEST_ANSWER <= len(chat.answer.text) < LONGEST_ANSWER + 1000


def test_tool_calls_behind_a_very_long_one_are_still_heard_of() -> None:
    chat = Chat()

    def feed(**fields: object) -> None:
        event = {"choices": [{"index": 0, "delta": {"tool_calls": [fields]}}]}
        chat.feed(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")

    feed(id="chatcmpl-tool-1", index=0, function={"name": "write_file", "arguments": ""})
    for _ in range(30):
        feed(index=0, function={"arguments": "x" * 1000})
    feed(id="chatcmpl-tool-2", index=1, function={"name": "run", "arguments": "{}"})
    assert [(call.id, call.name) for call in chat.answer.calls] == [
        ("chatcmpl-tool-1", "write_file"), ("chatcmpl-tool-2", "run")
    ]  # fmt: skip
