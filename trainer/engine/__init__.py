"""Engines: one narrow protocol, a plain torch reference and DeepSpeed ZeRO behind it."""
