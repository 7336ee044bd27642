"""What frozen features know of the classes: linear probes, k-NN, and what a run is watched by."""
