"""Measurements on networks."""
