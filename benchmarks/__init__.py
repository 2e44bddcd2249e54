"""Benchmarks of the operators, measured against their references, torch.compile, other libraries and the device's own ceilings."""
