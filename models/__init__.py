"""The method: pyramid, flow and transformer of LapFlow, in pure PyTorch."""
