"""Device meshes, shardings, and processes that train together."""
