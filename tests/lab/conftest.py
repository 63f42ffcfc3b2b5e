"""A shared machine may take longer over one example than Hypothesis allows."""

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
