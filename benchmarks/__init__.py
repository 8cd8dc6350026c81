"""Ours beside the peers: `python -m benchmarks` (see __main__.py)."""


class Skip(Exception): "This benchmark cannot run here; its text says why."
