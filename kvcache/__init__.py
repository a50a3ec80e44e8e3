"""Ranks and tracks KV blocks. Pure, like `scheduler`; its plug-in for vLLM needs neither Ray nor a web framework."""
