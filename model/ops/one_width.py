"""Keys and values of one width, as flash kernels want them.

Values are read together with their neighbours in memory; the surplus columns of the result are
dropped.
"""

from torch import Tensor


def one_width(key: Tensor, shared_key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and, at the ends of rows as wide, values: [m, heads, nope + rope] each.

    Args:
        key: [m, heads, nope].
        shared_key: [m, rope], of all heads.
        value: [m, heads, v], no wider than a key.
    """
    (keys, heads, nope), v = key.shape, value.shape[-1]
    width = nope + shared_key.shape[-1]
    both = key.new_empty(keys, heads, width + v)  # [m, heads, nope | rope | v]
    both[..., :nope] = key
    both[..., nope:width] = shared_key[:, None]
    both[..., width:] = value
    return both[..., :width], both[..., v:]


def heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, D] as [1, heads, tokens, D]."""
    return x.transpose(0, 1)[None]
