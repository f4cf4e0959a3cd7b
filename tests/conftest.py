"""What holds for all tests: they run on machines that stand still for seconds at times."""

from hypothesis import HealthCheck, settings

# An example may take any time, and so may making one; pytest's own timeout ends what hangs.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slow")
