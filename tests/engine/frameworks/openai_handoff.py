"""OpenAI Agents SDK: an agent looks around, then hands over to a second one that does so too."""

import asyncio

import agents
from script import ANSWER, LOOK, TASK, Script, arguments, call, tell

url, name = arguments()
agents.set_tracing_disabled(True)
model = agents.OpenAIChatCompletionsModel(name, agents.AsyncOpenAI(base_url=url, api_key="none"))
calls: dict[str, list[list[str]]] = {}


class Record(agents.RunHooks):
    async def on_llm_end(self, context, agent, response) -> None:
        calls.setdefault(agent.name, []).append([item.name for item in response.output if item.type == "function_call"])


def agent(name: str, instructions: str, *answers: str, **options: object) -> agents.Agent:
    script = Script(*answers)

    @agents.function_tool(strict_mode=False)
    def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    settings = agents.ModelSettings(max_tokens=400, temperature=1, extra_body=script.body)
    return agents.Agent(name, instructions=instructions, model=model, model_settings=settings, tools=[look], **options)


writer = agent("writer", "You write down what others have found.", LOOK, ANSWER)
to_writer = agents.handoff(writer)
to_writer.strict_json_schema = False
scout = agent(
    "scout", "You explore. Hand over when done.", LOOK, LOOK + LOOK, call("transfer_to_writer"), handoffs=[to_writer]
)
asyncio.run(agents.Runner.run(scout, TASK, hooks=Record()))
tell(calls.items(), handed=[["scout", "writer"]])
