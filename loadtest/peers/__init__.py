"""This project beside what people would run instead: same checkpoint, prompts and machine.

`python -m loadtest.peers` starts one candidate after the other, each in processes and (where it
is not this project's own) an environment of its own, and measures all of them by one definition:
see `loadtest.peers.figures`.
"""
