"""Analysis of networks and compiled steps: error rates, FLOPs, memory, collectives."""
