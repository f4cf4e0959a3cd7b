"""What serving costs beside the model: tokens on their way out, streams, leases, plans.

`python -m loadtest.costs` measures all of it, with ranks that compute nothing: see
`loadtest.costs.paced_rank`.
"""
