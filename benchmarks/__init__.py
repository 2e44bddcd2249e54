"""How fast the operators are, measured against their references, torch.compile, other libraries and the device's own ceilings."""
