"""What other libraries' Swin Transformers V2 store otherwise than timm's."""

import re
from collections.abc import Mapping

import numpy as np


def name_biases(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with a Swin V2's biases as in timm, `q_bias` and `v_bias`.

    Its keys have none. torchvision stores some and doesn't use them.

    Args:
      state: tensors by timm's name, except that the biases of queries and values, or those of
        queries, keys and values in one tensor, have names as in the first version.
    """
    named = {}
    for name, array in state.items():
        found = re.fullmatch(r"(.*\.attn\.)(query|value|qkv)\.bias", name)
        if not found or f"{found[1]}logit_scale" not in state:
            named[name] = array
        elif found[2] == "qkv":
            query, _, value = np.split(array, 3)
            named |= {f"{found[1]}q_bias": query, f"{found[1]}v_bias": value}
        else:
            named[f"{found[1]}{found[2][0]}_bias"] = array
    return named
