"""Fine-tuning a backbone to say pixels: which are text, or how a poor picture would look if it were a good one."""
