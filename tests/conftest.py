"""Settings of all tests."""

from hypothesis import settings

# A shared machine may take longer over one example than Hypothesis allows.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
