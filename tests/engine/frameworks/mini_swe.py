"""mini-swe-agent on a toy task in a temporary folder."""

import os
import tempfile
from pathlib import Path

os.environ |= {"MSWEA_SILENT_STARTUP": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

import minisweagent
import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel
from script import TASK, Script, arguments, call, tell

url, name = arguments()
script = Script(
    call("bash", command=r"sleep 0\.05; ls"),
    call("bash", command=r"echo (one|two) > note; sleep 0\.05"),
    call("bash", command=r"sleep 0\.05; cat note"),
    call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),
)
config = yaml.safe_load((Path(minisweagent.__file__).parent / "config" / "mini.yaml").read_text())


class Agent(DefaultAgent):
    """After each command the next one is due."""

    def execute_actions(self, message: dict) -> list[dict]:
        script.turn()
        return super().execute_actions(message)


with tempfile.TemporaryDirectory() as folder:
    options = {"api_base": url, "api_key": "none", "max_tokens": 400, "temperature": 1, "extra_body": script.body}
    model = LitellmModel(
        **{**config["model"], "model_name": f"openai/{name}", "model_kwargs": options, "cost_tracking": "ignore_errors"}
    )
    task = {key: config["agent"][key] for key in ("system_template", "instance_template")}
    agent = Agent(model, LocalEnvironment(cwd=folder), **task)
    agent.run(TASK)
said = [message for message in agent.messages if message["role"] == "assistant"]
tell([("mini", [[tool["function"]["name"] for tool in message["tool_calls"] or []] for message in said])])
