"""A seeded simulator: the real kernel and the real services on a virtual clock, with every fault by dice.

``python -m tests.simulator 7`` runs seed 7 and says what came of it. ``docs/decisions/0014-simulator.md`` says why the
ports have a third adapter here, and nowhere else.
"""
