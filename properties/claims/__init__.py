"""Claims of the literature, each with a check that computes its finding. One module a subject."""
