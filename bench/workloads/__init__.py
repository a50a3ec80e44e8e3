"""What the benchmarks play: agent runs, made by a seeded generator or read from a trace, all of the same types."""
