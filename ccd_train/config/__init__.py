"""Settings: frozen dataclasses, recipes, and how they are read."""
