"""Logs, summaries and reports of runs, and the check for non-finite values."""
