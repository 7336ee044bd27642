"""The paper's tables and its ablation: recipes for `python -m xkd_jax.sweep`."""
