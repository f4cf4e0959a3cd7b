"""Open-loop load against any OpenAI-compatible server.

>>> from loadtest import LoadPlan, run_load
>>> report = run_load(LoadPlan(url="http://127.0.0.1:8000", rate=2.0, requests=20))
"""

from loadtest.report import LoadReport
from loadtest.runner import LoadError, LoadPlan, run_load
from loadtest.workload import WorkloadError

__all__ = ["LoadError", "LoadPlan", "LoadReport", "WorkloadError", "run_load"]
