"""Plots and pages from profiles and result files."""
