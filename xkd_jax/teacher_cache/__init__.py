"""A frozen teacher's outputs for fixed views of the training images, computed once.

`plan` finds out what a method reads, `store` keeps it in files, `cache` writes the files and
identifies them, `loader` adds their rows to the training batches.
"""
