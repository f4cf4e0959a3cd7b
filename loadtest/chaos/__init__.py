"""Faults under load: is anything lost when something dies?

`python -m loadtest.chaos` starts servers of its own on the loopback, sends them an open-loop load
of mixed requests, kills, freezes and starves their processes by a seeded schedule, and compares
every answer token for token with what the same request got undisturbed. See
`loadtest.chaos.table` for what is to be reached.
"""
