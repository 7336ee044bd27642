"""What a training step costs: `xkd-jax bench`, against its limit and part by part."""
