"""Data files that run-time code reads: thresholds and the calibration behind them."""
