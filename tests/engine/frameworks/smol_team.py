"""smolagents: an agent calls tools; one of them is a managed agent."""

from script import ANSWER, LOOK, SUBTASK, TASK, Script, arguments, call, tell
from smolagents import ActionStep, OpenAIModel, ToolCallingAgent, tool

url, name = arguments()
FINAL = call("final_answer", answer=ANSWER)
told: list[tuple[str, list[list[str]]]] = []


def agent(role: str, script: Script, **options: object) -> ToolCallingAgent:
    @tool
    def look(where: str) -> str:
        """Look somewhere.

        Args:
            where: The room.
        """
        script.turn()
        return f"In the {where} there is a door."

    model = OpenAIModel(
        name, api_base=url, api_key="none", tool_choice="auto", max_tokens=400, temperature=1, extra_body=script.body
    )
    return ToolCallingAgent([look], model, name=role, description=f"Works as {role}.", verbosity_level=0, **options)


def calls(made: ToolCallingAgent) -> list[list[str]]:
    steps = [step for step in made.memory.steps if isinstance(step, ActionStep)]
    return [[called.name for called in step.tool_calls] for step in steps]


script = Script(LOOK, call("helper", task=SUBTASK.format("(cellar|garden)")), FINAL)
helper = agent("helper", Script(LOOK, LOOK, FINAL, caller=script))
boss = agent("boss", script, managed_agents=[helper])
boss.run(TASK)
tell([("boss", calls(boss)), ("helper", calls(helper))], delegated=[["boss", "helper"]])
