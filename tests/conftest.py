"""What holds for all tests: they run on machines that stand still for seconds at times."""

from importlib.util import find_spec

if find_spec("hypothesis") is not None:  # a GPU machine has none
    from hypothesis import HealthCheck, settings

    # An example may take any time, and so may making one; pytest's own timeout ends what hangs.
    slow = [HealthCheck.too_slow]
    settings.register_profile("slow", deadline=None, suppress_health_check=slow)
    settings.load_profile("slow")
