"""LangGraph: a graph of two agents; what the first one says is put into the prompt of the second."""

from langchain.agents import create_agent
from langchain_core.messages import AnyMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from script import ANSWER, LOOK, TASK, Script, arguments, tell

url, name = arguments()
told: list[tuple[str, list[list[str]]]] = []


class State(MessagesState):
    notes: str


def worker(role: str, instructions: str, *answers: str):
    script = Script(*answers)

    def look(where: str) -> str:
        """Look somewhere."""
        script.turn()
        return f"In the {where} there is a door."

    model = ChatOpenAI(model=name, base_url=url, api_key="none", max_tokens=400, temperature=1, extra_body=script.body)
    agent = create_agent(model, [look], system_prompt=instructions)

    def run(prompt: str) -> str:
        said: list[AnyMessage] = agent.invoke({"messages": [("user", prompt)]})["messages"]
        told.append((role, [[tool["name"] for tool in m.tool_calls] for m in said if m.type == "ai"]))
        return said[-1].text

    return run


scout = worker("scout", "You explore.", LOOK, LOOK, ANSWER)
writer = worker("writer", "You write reports.", LOOK, ANSWER)
graph = StateGraph(State)
graph.add_node("scout", lambda state: {"notes": scout(state["messages"][0].text)})
graph.add_node(
    "writer", lambda state: {"messages": writer(f"Write a report. These are the notes:\n\n{state['notes']}")}
)
graph.add_edge(START, "scout")
graph.add_edge("scout", "writer")
graph.add_edge("writer", END)
graph.compile().invoke({"messages": [("user", TASK)]})
tell(told, handed=[["scout", "writer"]])
