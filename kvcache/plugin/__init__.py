"""What of Weft runs inside vLLM. Needs neither Ray nor a web framework."""
