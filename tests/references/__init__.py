"""Independent transcriptions: each family's formula as plain scalar loops in mpmath, from the contract.

They share no code with ``properties/``: a mistake in a shared definition would show as a disagreement with
these. Inputs are nested lists of Python floats, results nested lists of mpmath numbers. Slow on purpose; keep
sizes small.
"""
