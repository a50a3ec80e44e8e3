"""Pydantic AI: an agent delegates to another one inside a tool, twice, one after the other."""

from pydantic_ai import Agent, ModelMessage, ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from script import ANSWER, LOOK, SUBTASK, TASK, Script, arguments, call, tell

url, name = arguments()
model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=url, api_key="none"))
helpers: list[tuple[str, list[list[str]]]] = []


def calls(messages: list[ModelMessage]) -> list[list[str]]:
    return [[tool.tool_name for tool in said.tool_calls] for said in messages if isinstance(said, ModelResponse)]


def agent(instructions: str, script: Script) -> Agent:
    return Agent(model, instructions=instructions, model_settings={"max_tokens": 400, "extra_body": script.body})


asked = [call("ask", task=SUBTASK.format(rooms)) for rooms in ("(cellar|garden)", "(attic|kitchen)")]
script = Script(*asked, ANSWER)
boss = agent("You have others work for you.", script)


@boss.tool_plain(strict=False)
async def ask(task: str) -> str:
    """Have someone do a task."""
    own = Script(LOOK, LOOK, ANSWER, caller=script)
    helper = agent("You explore.", own)

    @helper.tool_plain(strict=False)
    def look(where: str) -> str:
        """Look somewhere."""
        own.turn()
        return f"In the {where} there is a door."

    done = await helper.run(task)
    helpers.append(("helper", calls(done.all_messages())))
    return done.output


done = boss.run_sync(TASK)
tell([("boss", calls(done.all_messages())), *helpers], delegated=[["boss", "helper"]])
