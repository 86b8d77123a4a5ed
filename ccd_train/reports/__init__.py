"""Reads run folders and results; trains nothing."""
