"""LangGraph: the prebuilt ReAct agent, streaming tokens."""

from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from script import ANSWER, LOOK, TASK, Script, arguments, tell

url, name = arguments()
script = Script(LOOK, LOOK + LOOK, LOOK, ANSWER)


def look(where: str) -> str:
    """Look somewhere."""
    script.turn()
    return f"In the {where} there is a door."


model = ChatOpenAI(
    model=name, base_url=url, api_key="none", max_tokens=400, temperature=1, extra_body=script.body, streaming=True
)
agent = create_react_agent(model, [look], prompt="You explore.", name="scout")
for kind, state in agent.stream({"messages": [("user", TASK)]}, stream_mode=["messages", "values"]):
    if kind == "values":
        said = state["messages"]
tell([("scout", [[tool["name"] for tool in message.tool_calls] for message in said if message.type == "ai"])])
