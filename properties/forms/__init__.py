"""The equal forms of attention with a state: recurrent, parallel, chunkwise, over any numbers.

One head of one sequence: q, k (N, D), v (N, E), states (D, E), as numpy arrays whose entries may be flint's
``fmpq`` or ``arb``, ``Fraction``, mpmath's ``mpf``, the numbers of :mod:`.numbers` (all in object arrays), or
plain floats. Decays are factors and not logarithms, so that over the rationals the forms are *equal*: a
difference is an error of algebra, not of rounding. No scale: it is q's.
"""
