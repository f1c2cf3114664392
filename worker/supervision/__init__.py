"""Several worker processes under one: `embedq worker --processes N`, `--device cuda:all`, and `embedq up`.

Begin at `supervise`. Knows processes, signals and probes; loads no model and asks nothing of Redis.
"""
