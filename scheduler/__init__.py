"""The pure core: decides which worker runs which step. No I/O, no clock; time is an argument, in seconds."""
