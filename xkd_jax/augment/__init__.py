"""Augmentation on the device: operations, policies, mixup, the multi-view generator."""
