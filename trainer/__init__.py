"""Training: from a composed configuration to a trained, evaluated and resumable run."""

from pipelines.console import end_quietly_when_interrupted

end_quietly_when_interrupted()
