"""Self-supervised Character-to-Character Distillation on DeepSpeed."""

__version__ = "0.1.0"
