"""The OpenAI and Anthropic SDKs, unmodified, against real vLLM through Weft."""

from __future__ import annotations

import anthropic
import openai
import pytest

from server.embedded import NAME
from tests.engine.conftest import Served

SAID = [{"role": "user", "content": "Look around."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
        },
    }
]
# A random model is made to call the tool by vLLM itself.
CALL = {
    "structured_outputs": {
        "regex": r'<tool_call>\n\{"name": "look", "arguments": \{"where": "(here|there)"\}\}\n</tool_call>'
    }
}


@pytest.fixture
def oai(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def test_models(oai: openai.OpenAI) -> None:
    assert [model.id for model in oai.models.list()] == [NAME]
    assert oai.models.retrieve(NAME).id == NAME


def test_chat(oai: openai.OpenAI) -> None:
    done = oai.chat.completions.create(model=NAME, messages=SAID, max_tokens=8)
    assert done.choices[0].message.content
    assert done.usage
    assert done.usage.completion_tokens <= 8


@pytest.mark.parametrize("asks", [True, False])
def test_chat_stream(oai: openai.OpenAI, asks: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asks else {}
    chunks = list(oai.chat.completions.create(model=NAME, messages=SAID, max_tokens=8, stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c for c in chunks if c.choices][-1].choices[0].finish_reason
    assert [bool(c.usage) for c in chunks].count(True) == asks
    assert all(c.choices for c in chunks) != asks


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls_and_their_results(oai: openai.OpenAI, stream: bool) -> None:
    made = oai.chat.completions.create(
        model=NAME, messages=SAID, tools=TOOLS, max_tokens=60, stream=stream, extra_body=CALL
    )
    if stream:
        deltas = [t for c in made if c.choices for t in c.choices[0].delta.tool_calls or []]
        call_id = next(t.id for t in deltas if t.id)
        arguments = "".join(t.function.arguments or "" for t in deltas)
    else:
        assert made.choices[0].finish_reason == "tool_calls"
        call_id = made.choices[0].message.tool_calls[0].id
        arguments = made.choices[0].message.tool_calls[0].function.arguments
    assert arguments in ('{"where": "here"}', '{"where": "there"}')
    messages = [
        *SAID,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": "look", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": call_id, "content": "a door"},
    ]  # fmt: skip
    done = oai.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, max_tokens=4)
    assert done.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_completions(oai: openai.OpenAI, stream: bool) -> None:
    made = oai.completions.create(model=NAME, prompt="Once", max_tokens=8, stream=stream)
    text = "".join(c.choices[0].text for c in made) if stream else made.choices[0].text
    assert text


def test_responses_and_what_follows_them(oai: openai.OpenAI, served: Served) -> None:
    events = list(oai.responses.create(model=NAME, input="Hello", max_output_tokens=8, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    first = oai.responses.with_raw_response.create(model=NAME, input="Good day", max_output_tokens=8, store=True)
    made = first.parse()
    assert oai.responses.retrieve(made.id).id == made.id
    for _ in range(3):
        follow = oai.responses.with_raw_response.create(
            model=NAME, input="And?", previous_response_id=made.id, max_output_tokens=8, store=True
        )
        for name in ("x-weft-worker", "x-weft-workflow"):
            assert follow.headers[name] == first.headers[name]
        made = follow.parse()
    workflow = served.get(f"/v1/workflows/{first.headers['x-weft-workflow']}")
    assert [step["rule"] for step in workflow["steps"]] == ["anonymous"] + ["previous_response_id"] * 3


def test_messages(claude: anthropic.Anthropic) -> None:
    done = claude.messages.create(model=NAME, max_tokens=8, system="Be brief.", messages=SAID)
    assert done.content[0].text
    assert done.usage.output_tokens <= 8


def test_messages_stream(claude: anthropic.Anthropic, served: Served) -> None:
    before = served.metric("weft_output_tokens_total")
    with claude.messages.stream(model=NAME, max_tokens=8, messages=SAID) as stream:
        assert "".join(stream.text_stream)
        done = stream.get_final_message()
    assert done.stop_reason in ("max_tokens", "end_turn")
    assert served.metric("weft_output_tokens_total") - before == done.usage.output_tokens


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    assert claude.messages.count_tokens(model=NAME, messages=SAID).input_tokens > 3


@pytest.mark.parametrize(
    ("wrong", "status"),
    [({"messages": 5}, 400), ({"temperature": "hot"}, 400), ({"max_tokens": -1}, 400), ({"model": "nobody"}, 404)],
)
def test_a_wrong_request_is_the_apis_own_error(oai: openai.OpenAI, wrong: dict, status: int) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        oai.chat.completions.create(**{"model": NAME, "messages": SAID, **wrong})
    assert error.value.status_code == status
    assert error.value.body["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long_is_a_400(oai: openai.OpenAI, claude: anthropic.Anthropic, stream: bool) -> None:
    long = [{"role": "user", "content": "word " * 60_000}]
    with pytest.raises(openai.BadRequestError, match="context length"):
        oai.chat.completions.create(model=NAME, messages=long, stream=stream)
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=NAME, max_tokens=5, messages=long, stream=stream)
