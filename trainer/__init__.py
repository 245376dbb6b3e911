"""Training: from a composed configuration to a trained, evaluated and resumable run."""

from pipelines.interruption import end_quietly_when_interrupted

end_quietly_when_interrupted()
