"""`weft_*` metrics. No workflow or session in a label; tenants come from the operator's key file."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.control import Control
from server.core import Attempt, Core

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counts the steps that end; reads the gauges off the core when asked, and off what engines told `control`."""

    def __init__(self, core: Core) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(core))
        self.registry.register(_Engines(self))
        self.control: Control | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"weft_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"weft_{name}_seconds", text, labels, buckets=SECONDS, registry=self.registry)

        self.steps = counter("steps", "Steps that ended, by how", "model", "worker", "tenant", "state")
        self.decisions = counter("decisions", "Steps sent to a worker, by why", "reason")
        self.identity = counter("identity", "Steps by the rule that named their session", "rule")
        self.retries = counter("retries", "Times a step went to another worker because one was lost", "model")
        self.prompt = counter("prompt_tokens", "Prompt tokens, as workers count them", "model", "worker")
        self.cached = counter("cached_tokens", "Prompt tokens found in a prefix cache", "model", "worker")
        self.output = counter("output_tokens", "Generated tokens", "model", "worker")
        self.ttft = seconds("time_to_first_token", "From the step's arrival to its first content", "model")
        self.held = seconds("held", "That steps waited at the gate, of those that did", "model")
        self.duration = seconds("step_duration", "From the step's arrival to its end", "model")

    def watch(self, attempt: Attempt) -> None:
        """Count one step that ended."""
        call, usage = attempt.call, attempt.usage
        decision = attempt.dispatch.decision if attempt.dispatch else None
        # A model that no worker serves is the client's text: not for a label.
        model, worker = (call.model, decision.worker) if decision else ("", "")
        self.steps.labels(model, worker, call.tenant.name, attempt.state).inc()
        self.identity.labels(attempt.rule).inc()
        if decision is None or attempt.finished is None:
            return
        self.decisions.labels(decision.reason).inc()
        self.retries.labels(model).inc(len(attempt.tried) - 1)
        for metric, tokens in ((self.prompt, usage.prompt), (self.cached, usage.cached), (self.output, usage.output)):
            metric.labels(model, worker).inc(tokens)
        if attempt.hold is not None and attempt.dispatched_first is not None:
            self.held.labels(model).observe(attempt.dispatched_first - attempt.arrived)
        self.duration.labels(model).observe(attempt.finished - attempt.arrived)
        if attempt.first_token is not None:
            self.ttft.labels(model).observe(attempt.first_token - attempt.arrived)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterable[Metric]:
        core = self._core
        workers = core.scheduler.workers.values()
        yield _gauge("running_steps", "Steps at a worker now", "worker", {w.id: len(w.running) for w in workers})
        yield _gauge(
            "live_sessions", "Live sessions seated on a worker", "worker", {w.id: len(w.sessions) for w in workers}
        )
        yield _gauge("kv_capacity_tokens", "KV capacity of a worker", "worker", {w.id: w.kv_tokens for w in workers})
        tiers = {w.id: w.host_tokens for w in workers}
        yield _gauge("host_tier_capacity_tokens", "KV capacity of a worker's host tier", "worker", tiers)
        books = {name: book for name, book in core.scheduler.gate.books.items() if book.capacity}
        yield _gauge("held_steps", "Steps at the gate", "worker", {n: book.holds for n, book in books.items()})
        yield _gauge(
            "gate_capacity_tokens", "What the gate measures claims against", "worker",
            {name: book.capacity for name, book in books.items()},
        )  # fmt: skip
        claims = {name: book.claimed for name, book in books.items()}
        yield _gauge("claimed_tokens", "Claims of the workflows with a lease", "worker", claims)
        states = dict.fromkeys(("starting", "up", "draining", "down", "failed"), 0)
        for worker in workers:
            states[worker.state] += 1
        yield _gauge("workers", "Workers by state", "state", states)
        totals = {
            "open_steps": (len(core.attempts), "Steps that have arrived and not ended"),
            "workflows": (len(core.scheduler.graph.workflows), "Workflows remembered"),
            "remembered_steps": (core.scheduler.graph.steps, "Steps remembered in run graphs"),
        }
        for name, (value, text) in totals.items():
            yield GaugeMetricFamily(f"weft_{name}", text, value=value)
        knowledge = core.scheduler.knowledge
        yield GaugeMetricFamily("weft_learned_templates", "Templates learned", value=len(knowledge.programs))
        for name, score in (knowledge.estimates.calibration() | knowledge.scores.values()).items():
            yield GaugeMetricFamily(f"weft_prediction_{name}", "Predictions against the truth, lately", value=score)
        yield CounterMetricFamily("weft_core_failures", "Events on which the core failed", value=core.failures)


class _Engines(Collector):
    """What the engines' plug-ins tell of themselves, and what became of the advice to them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        control = self._metrics.control
        if control is None:
            return
        told = CounterMetricFamily(
            "weft_advice", "Advice to engines, by what became of it", labels=["worker", "status"]
        )
        for (worker, status), number in control.counts.items():
            told.add_metric([worker, status], number)
        yield told
        names = dict.fromkeys(name for gauges in control.gauges.values() for name in gauges)
        for name in names:
            values = {worker: gauges[name] for worker, gauges in control.gauges.items() if name in gauges}
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"weft_engine_{name.removesuffix('_total')}", "As the plug-in tells it", labels=["worker"])
            for worker, value in values.items():
                family.add_metric([worker], value)
            yield family


def _gauge(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"weft_{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
