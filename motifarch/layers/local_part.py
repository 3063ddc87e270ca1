"""What a rank computes with of a parameter that ranks share."""

from torch import Tensor


def local_part(parameter: Tensor) -> Tensor:
    """This rank's rows of a DTensor, with gradients for these; another tensor itself.

    For layers whose work falls apart into that of rows, such as experts.
    """
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[no-any-return]
