"""LangGraph: a supervisor hands over to two agents, one after the other, and ends."""

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph_supervisor import create_supervisor
from script import ANSWER, LOOK, TASK, Script, arguments, call, tell

url, name = arguments()
told: dict[str, list[list[str]]] = {}
boss = Script(call("transfer_to_scout"), call("transfer_to_writer"), ANSWER)


def model(script: Script) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=url, api_key="none", max_tokens=400, temperature=1, extra_body=script.body)


def agent(role: str, *answers: str):
    script = Script(*answers, caller=boss)

    def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    return create_agent(model(script), [look], system_prompt=f"You are the {role}.", name=role)


agents = [agent("scout", LOOK, LOOK, ANSWER), agent("writer", LOOK, ANSWER)]
team = create_supervisor(agents, model=model(boss), prompt="You lead.", supervisor_name="boss")
for path, update in team.compile().stream({"messages": [("user", TASK)]}, stream_mode="updates", subgraphs=True):
    for message in [message for state in update.values() for message in state["messages"] if path]:
        if message.type == "ai":
            told.setdefault(message.name, []).append([tool["name"] for tool in message.tool_calls])
tell(told.items(), handed=[["boss", "scout"], ["scout", "boss"], ["boss", "writer"], ["writer", "boss"]])
