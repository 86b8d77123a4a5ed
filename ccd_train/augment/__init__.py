"""Views of a crop: geometry, severities, photometric operations."""
