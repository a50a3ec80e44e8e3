"""OpenAI Agents SDK, streaming: an agent has two others work for it at the same time, as tools, and joins what they say."""

import asyncio

import agents
from script import ANSWER, LOOK, SUBTASK, TASK, Script, arguments, call, tell

url, name = arguments()
agents.set_tracing_disabled(True)
model = agents.OpenAIChatCompletionsModel(name, agents.AsyncOpenAI(base_url=url, api_key="none"))
asked = [call(f"ask_{room}", input=SUBTASK.format(f"{room} or the (attic|kitchen)")) for room in ("cellar", "garden")]
boss_script = Script("".join(asked), ANSWER)
helpers: list[tuple[str, list[list[str]]]] = []


def settings(script: Script) -> agents.ModelSettings:
    return agents.ModelSettings(max_tokens=400, temperature=1, extra_body=script.body)


def calls(result: agents.result.RunResultBase) -> list[list[str]]:
    return [[item.name for item in made.output if item.type == "function_call"] for made in result.raw_responses]


async def report(result: agents.result.RunResultBase) -> str:
    helpers.append((result.last_agent.name, calls(result)))
    return str(result.final_output)


def helper(room: str) -> agents.Tool:
    script = Script(LOOK, LOOK, ANSWER, caller=boss_script)

    @agents.function_tool(strict_mode=False)
    def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    made = agents.Agent(f"{room}_helper", instructions=f"You know the {room}.", model=model, tools=[look])
    made.model_settings = settings(script)
    made_tool = made.as_tool(f"ask_{room}", f"Ask about the {room}.", custom_output_extractor=report)
    made_tool.strict_json_schema = False
    return made_tool


boss = agents.Agent("boss", instructions="You have others work for you.", model=model)
boss.tools = [helper("cellar"), helper("garden")]
boss.model_settings = settings(boss_script)


async def main() -> None:
    result = agents.Runner.run_streamed(boss, TASK)
    async for _ in result.stream_events():
        pass
    tell([("boss", calls(result)), *helpers], delegated=[["boss", helper] for helper, _ in helpers])


asyncio.run(main())
