"""Detection power: mutants and correct kernels before this suite and before the rules in use today."""
