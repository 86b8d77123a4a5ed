"""Submitting runs to a cluster."""
