"""Three arithmetics behind one interface, and the enclosure that each of them can state its values as.

============================ ======================================= ========================================
arithmetic                   a value is                              its enclosure is
============================ ======================================= ========================================
:class:`MpmathArithmetic`    an array of multiprecision numbers      an estimate from the working precision
:class:`ArbArithmetic`       an array of Arb balls                   proved, at any precision
:class:`EnclosureArithmetic` float64 centres with float64 radii      proved, as narrow as float64 allows
============================ ======================================= ========================================
"""

from attnproof.properties.arithmetic.balls import ArbArithmetic
from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import Ball, EnclosureArithmetic
from attnproof.properties.arithmetic.multiprecision import MpmathArithmetic

__all__ = ["ArbArithmetic", "Arithmetic", "Ball", "Enclosure", "EnclosureArithmetic", "MpmathArithmetic", "V"]
