"""From encoded shards in an object store to batches of Laplacian bands on the device."""
