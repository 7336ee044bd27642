"""Device meshes, shardings and multi-process training."""
