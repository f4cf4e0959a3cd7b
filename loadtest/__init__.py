"""Load against servers, and measurements without one.

Nothing is imported here: `loadtest.gpu` runs on machines that have nothing but torch's world.

>>> from loadtest.runner import LoadPlan, run_load
>>> report = run_load(LoadPlan(url="http://127.0.0.1:8000", rate=2.0, requests=20))
"""
