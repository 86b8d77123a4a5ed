"""Fine-tuning a backbone to read."""
