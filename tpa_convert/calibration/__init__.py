"""Calibration: text in, moments of what attention does out."""
