"""The I/O around the core: HTTP in, vLLM workers out, Ray for their lives."""
