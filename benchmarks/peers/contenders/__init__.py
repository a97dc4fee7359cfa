"""A file per program that is compared: `prepare(task)` returns a function that does one step of it.

Each runs as a process of its own, with the Python of its own environment: `worker.serve`.
"""
