"""The loss attack (Yeom et al. 2018, arXiv 1709.01604): members have lower loss.

    score(x) = - NLL(x) / units(x)

Average-case: it can miss leakage that per-example attacks find, so a pass here proves little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def loss_score(
    nll: npt.NDArray[np.float64], units: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Membership scores, shape (n,); higher means more likely a member.

    >>> loss_score(np.array([2.0, 9.0]), np.array([2, 3])).tolist()
    [-1.0, -3.0]
    """
    return -nll / units
