"""Deliberate defects by which the power of the suite is measured: see :mod:`tests.quality.mutants.mutant`."""
