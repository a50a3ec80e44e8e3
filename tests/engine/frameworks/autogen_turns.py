"""AutoGen: two agents take turns in a group chat; each is told what the other said."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from script import ANSWER, LOOK, TASK, Script, arguments, tell

url, name = arguments()
INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown"}


def agent(role: str, *answers: str) -> AssistantAgent:
    script = Script(*answers)

    async def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    model = OpenAIChatCompletionClient(
        model=name, base_url=url, api_key="none", model_info=INFO, max_tokens=400, temperature=1, extra_body=script.body
    )
    return AssistantAgent(role, model, tools=[look], system_message=f"You are the {role}.", max_tool_iterations=5)


async def main() -> None:
    team = RoundRobinGroupChat([agent("scout", LOOK, LOOK, ANSWER), agent("critic", ANSWER)], max_turns=4)
    told: dict[str, list[list[str]]] = {}
    for said in (await team.run(task=TASK)).messages:
        if said.models_usage:
            called = said.content if said.type == "ToolCallRequestEvent" else []
            told.setdefault(said.source, []).append([tool.name for tool in called])
    tell(told.items(), handed=[["scout", "critic"], ["critic", "scout"]])


asyncio.run(main())
