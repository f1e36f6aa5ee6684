"""From tar shards to batches: manifest, order, draws, loader."""
