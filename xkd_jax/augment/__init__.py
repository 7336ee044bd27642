"""Augmentation on the device: operations, policies, mixing, the multi-view generator."""
