"""Recipes: one file each, whose `get_config(variant)` returns a run's config.

`xkd-jax train --config NAME` finds them from any folder.
"""
