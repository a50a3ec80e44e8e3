"""AutoGen: a swarm, in which one agent hands over to another."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import Handoff
from autogen_agentchat.conditions import TextMessageTermination
from autogen_agentchat.teams import Swarm
from autogen_core.tools import BaseTool, FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from script import ANSWER, LOOK, TASK, Script, arguments, call, tell

url, name = arguments()
INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown"}


class Loose(Handoff):
    """Not strict: vLLM would put the schema of a strict tool above the regular expression."""

    @property
    def handoff_tool(self) -> BaseTool:
        return FunctionTool(lambda: self.message, name=self.name, description=self.description, strict=False)


def agent(role: str, *answers: str, **options: object) -> AssistantAgent:
    script = Script(*answers)

    async def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    model = OpenAIChatCompletionClient(
        model=name, base_url=url, api_key="none", model_info=INFO, max_tokens=400, temperature=1, extra_body=script.body
    )
    return AssistantAgent(
        role, model, tools=[look], system_message=f"You are the {role}.", max_tool_iterations=5, **options
    )


async def main() -> None:
    scout = agent("scout", LOOK, LOOK, call("transfer_to_writer"), handoffs=[Loose(target="writer")])
    team = Swarm([scout, agent("writer", LOOK, ANSWER)], termination_condition=TextMessageTermination("writer"))
    told: dict[str, list[list[str]]] = {}
    for said in (await team.run(task=TASK)).messages:
        if said.models_usage:
            called = said.content if said.type == "ToolCallRequestEvent" else []
            told.setdefault(said.source, []).append([tool.name for tool in called])
    tell(told.items(), handed=[["scout", "writer"]])


asyncio.run(main())
