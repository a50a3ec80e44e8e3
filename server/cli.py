"""The `weft` command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from server import auth, config, local_ray
from server.config import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Weft serves AI agents on vLLM: the workflow, not the request, is what it schedules.",
)


def main() -> None:
    """Run the command. What follows `--` goes to vLLM as it is."""
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        app(args=arguments[:cut], obj=tuple(arguments[cut + 1 :]))
    except ConfigError as error:
        fail(str(error))


def fail(message: str, status: int = 2) -> NoReturn:
    """Say what is wrong in one line and exit."""
    print(f"weft: {message}", file=sys.stderr)
    raise SystemExit(status)


@app.command()
def serve(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL[=REPLICAS] ...]", help="Models to serve; none: the embedded one. [WEFT_MODELS]"),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Workers per model, where MODEL has no number.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="URL,...", help="Attach to vLLM servers that run.")] = None,
    worker_api_key: Annotated[str | None, typer.Option(help="The API key of attached workers.")] = None,
    address: Annotated[str | None, typer.Option(help="Join a Ray cluster (`auto` or HOST:PORT); default: own.")] = None,
    host_tier: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Host memory per worker for KV, 0: off; default: a share of what is left."),
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of hashed API keys and their tenants (`weft key`).")] = None,
    trace_dir: Annotated[Path | None, typer.Option(help="Record a text-free JSONL trace of every step here.")] = None,
    log_format: Annotated[str | None, typer.Option(help="`text` or `json`; default text.")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long a stop waits for steps; default 30.")] = None,
    hold_commit_seconds: Annotated[
        float | None, typer.Option(help="How long a stream that waits keeps its status open; default 10.")
    ] = None,
    hold_unary_seconds: Annotated[
        float | None, typer.Option(help="How long a step that is not streamed may be held; default 50.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Models, logs and state; default ~/.cache/weft.")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="YAML file with these same keys.")] = None,
) -> None:
    """Serve models on vLLM workers that Ray runs: `weft serve [MODEL ...] [options] [-- any vLLM flags]`.

    Every option can be given as WEFT_<OPTION> or in the YAML file too: flag > environment > file > default.
    """
    given: dict[str, Any] = {
        "models": models, "replicas": replicas, "host": host, "port": port, "workers": workers,
        "worker_api_key": worker_api_key, "address": address, "host_tier": host_tier, "keys": keys,
        "trace_dir": trace_dir, "log_format": log_format, "drain_seconds": drain_seconds, "home": home,
        "hold_commit_seconds": hold_commit_seconds, "hold_unary_seconds": hold_unary_seconds,
        "vllm_args": ctx.obj or None,
    }  # fmt: skip
    flags = {name: value for name, value in given.items() if value is not None}
    settings = config.load(flags, os.environ, config_file)

    if not settings.workers and settings.address is None:
        local_ray.prepare(settings.home, settings.port)
    from server.serve import run  # imports Ray

    raise SystemExit(run(settings))


@app.command()
def down(
    port: Annotated[int | None, typer.Option(help="The port of the `weft serve` to end; default 8000.")] = None,
    address: Annotated[str | None, typer.Option(help="End Weft's workers in this Ray cluster instead.")] = None,
    home: Annotated[Path | None, typer.Option(help="As given to `weft serve`.")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="As given to `weft serve`.")] = None,
) -> None:
    """End the workers: of a `weft serve` on this machine, with its front end and its Ray; or of a cluster."""
    given = {"port": port, "home": home, "address": address}
    settings = config.load({k: v for k, v in given.items() if v is not None}, os.environ, config_file)
    if settings.address is not None:
        from server import ray_fleet

        local_ray.join(settings.address)
        names = ray_fleet.list_workers()
        ray_fleet.end_workers(names)
        print(f"ended {len(names)} workers")
        return
    local = local_ray.prepare(settings.home, settings.port)
    if local is None:
        print(f"nothing of Weft's runs for port {settings.port}")
        return
    if local.front_alive():
        os.kill(local.front, signal.SIGTERM)
        local_ray.await_front(local)
    if local.alive():
        from server import ray_fleet

        try:
            local_ray.join(local.address)
            ray_fleet.end_workers(ray_fleet.list_workers())
        finally:
            local_ray.end(settings.home, settings.port, local)
    print("down")


@app.command()
def explain(
    workflow: Annotated[str, typer.Argument(help="A workflow's id, as in `x-weft-workflow`.")],
    url: Annotated[str, typer.Option(help="Where Weft serves.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="WEFT_API_KEY", help="A key of the workflow's tenant.")] = None,
) -> None:
    """Tell why each step of a workflow went where it went, how long it was held, and what was found in the cache."""
    from server.explain import explained, fetched

    print(explained(fetched(url, workflow, api_key)))


@app.command()
def key(tenant: Annotated[str, typer.Argument(help="Who the key is for.")] = "default") -> None:
    """Make an API key: the key itself for the client, and the entry with its hash for the file of keys."""
    made = auth.new_key()
    print(f"# the key, shown only here: {made}")
    print(f'tenants:\n  - name: {tenant}\n    keys: ["{auth.hashed(made)}"]')


if __name__ == "__main__":
    main()
