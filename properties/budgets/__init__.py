"""Computed tolerances: how far a correct kernel of a declared precision may be from the exact result.

``certain`` budgets are worst cases over every algorithm whose roundings are among the declared ones;
``probable`` budgets estimate the standard deviation of a healthy kernel's error. One module a family;
``rounding`` has the formats, ``rows`` the perturbation of a row of softmax weights.
"""
