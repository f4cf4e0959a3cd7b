"""What one GPU does: the machine's own speed, kernels beside it, the Lite model, and a peer.

python -m loadtest.gpu --out DIRECTORY

Runs on a machine that has PyTorch, Triton and transformers alone.
"""
