"""The networks against the same ones in PyTorch, with the same weights.

`goldens` (checked by tests/models/test_goldens.py, without PyTorch) holds what `make_goldens`
recorded of the references; `test_timm` and `table` compare with them live.
"""
