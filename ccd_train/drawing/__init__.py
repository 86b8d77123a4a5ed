"""Draws what it is given; knows no run."""
