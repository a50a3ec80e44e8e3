"""The simulated systems: fronts, and what evicts behind them."""

from __future__ import annotations

from bench.simulation.system import System
from bench.simulation.systems.continuum import Continuum
from bench.simulation.systems.index import Index
from bench.simulation.systems.kvflow import KVFlow
from bench.simulation.systems.oracle import Belady, OracleGate
from bench.simulation.systems.program import RouterProgram, RouterProgramHinted
from bench.simulation.systems.router import RouterCacheAware, RouterConsistentHash
from bench.simulation.systems.saga import Saga
from bench.simulation.systems.semaphore import Semaphore
from bench.simulation.systems.stock import (
    Stock,
    StockHash,
    StockLeastLoaded,
    StockRelease,
    StockRoundRobin,
    StockThreshold,
    Unlimited,
)
from bench.simulation.systems.thunderagent import ThunderAgent
from bench.simulation.systems.weft import (
    Weft,
    WeftAlone,
    WeftAttached,
    WeftHinted,
    WeftNoEvict,
    WeftNoGate,
    WeftNoPrefetch,
    WeftNoRelease,
)

SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (
        Stock,
        StockThreshold,
        StockRoundRobin,
        StockLeastLoaded,
        StockHash,
        StockRelease,
        Unlimited,
        Semaphore,
        RouterCacheAware,
        RouterConsistentHash,
        RouterProgram,
        RouterProgramHinted,
        Saga,
        KVFlow,
        Continuum,
        ThunderAgent,
        Belady,
        OracleGate,
        Index,
        Weft,
        WeftAttached,
        WeftNoEvict,
        WeftNoGate,
        WeftNoRelease,
        WeftNoPrefetch,
        WeftAlone,
        WeftHinted,
    )
}
"""By name."""
