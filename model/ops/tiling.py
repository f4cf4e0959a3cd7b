"""What tiles of Triton kernels can be."""

MATRIX_SIDE = 16  # the least that a matrix instruction takes


def powers_of_two(*sides: int, least: int = 1) -> bool:
    """Whether tiles can have these sides: powers of two from `least` on."""
    return all(side >= least and side & (side - 1) == 0 for side in sides)
