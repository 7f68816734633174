"""Figures and the offline report. Reads result files only."""
