"""Analysis of trained networks and compiled steps: transferability, robustness, FLOPs, memory."""
