"""Pretraining: self-supervised character-to-character distillation."""
