"""DeepSpeed files: ZeRO stage, precision and communication, nothing else. Chosen with `--deepspeed NAME_OR_FILE`."""
