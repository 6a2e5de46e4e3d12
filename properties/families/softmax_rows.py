"""Softmax of rows: y_j = e^{x_j} / Σ_k e^{x_k}; −∞ entries get 0, and so does every entry of an empty row.

Source: contract.md, "Calls" and "The edges". The rows are those of ``logsumexp``.
"""

from __future__ import annotations

from attnproof.properties.families.logsumexp import RowsFamily

__all__ = ["SOFTMAX_ROWS"]

SOFTMAX_ROWS = RowsFamily("softmax_rows")
