"""From encoded shards in an object store to batches of Laplacian bands on the device."""

from pipelines.interruption import end_quietly_when_interrupted

end_quietly_when_interrupted()
