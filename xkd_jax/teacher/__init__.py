"""The frozen teacher: its classes, its forward pass in a step, and a cache of its outputs."""
