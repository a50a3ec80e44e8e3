from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import StreamReader
from hypothesis import given
from hypothesis import strategies as st

from scheduler.events import Usage
from server import sse
from server.dialects import Chat, Completions, Messages, Responses
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
        assert not dialect.content
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
    stream = [
        ("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 20, "output_tokens": 0}}}),
        ("content_block_delta", {"type": "content_block_delta", "delta": {"text": "x"}}),
        ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "tool_use"},
                           "usage": {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 9}}),
    ]  # fmt: skip
    block = b"".join(f"event: {n}\ndata: {json.dumps(d, separators=(',', ':'))}\n\n".encode() for n, d in stream)
    assert dialect.feed(block) == block
    assert dialect.usage == Usage(20, 16, 9)
    assert (dialect.content, dialect.stop) == (True, "tool_use")


def test_responses_are_known_by_their_id() -> None:
    dialect = Responses()
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
