"""Models on torch, with the library's own layers: every family, every device, and training."""
