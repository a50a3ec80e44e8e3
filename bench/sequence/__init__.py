"""What an engine keeps, call by call: real vLLM in this process, one call at a time, on a virtual clock."""
