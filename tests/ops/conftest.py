from hypothesis import HealthCheck, settings

# Deterministic, and without a deadline because the first example compiles the kernels.
settings.register_profile(
    "ops", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ops")
