"""From shards to batches: records, shards, order, masks, loader."""
