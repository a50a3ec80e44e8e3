"""Pydantic AI: the program runs a second agent on the message history of the first."""

from pydantic_ai import Agent, ModelMessage, ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from script import ANSWER, LOOK, TASK, Script, arguments, tell

url, name = arguments()
model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=url, api_key="none"))


def calls(messages: list[ModelMessage]) -> list[list[str]]:
    return [[tool.tool_name for tool in said.tool_calls] for said in messages if isinstance(said, ModelResponse)]


def agent(instructions: str, *answers: str) -> Agent:
    script = Script(*answers)
    made = Agent(model, instructions=instructions, model_settings={"max_tokens": 400, "extra_body": script.body})

    @made.tool_plain(strict=False)
    def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    return made


found = agent("You explore.", LOOK, LOOK, ANSWER).run_sync(TASK)
written = agent("You write reports.", LOOK, ANSWER).run_sync("Write a report.", message_history=found.all_messages())
tell(
    [("scout", calls(found.new_messages())), ("writer", calls(written.new_messages()))],
    handed=[["scout", "writer"]],
)
