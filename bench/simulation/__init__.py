"""Modelled vLLM workers on a virtual clock, in front of which the real scheduler and the real policies run."""
