"""What surrounds the networks in training: optimizer, average, checkpoint, processes, metrics."""
