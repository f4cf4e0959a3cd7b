"""What a token costs between the gang and the client, and how many streams one ingress holds.

Everything but the gang is real: Serve, HAProxy, ingress, router, engine. A stub gang gives every
running sequence a token at a set rate, so that no model stands in the way.
"""

STEPS_PER_SECOND = "EXPERTLINE_STUB_STEPS_PER_SECOND"  # environment of the engine's process
