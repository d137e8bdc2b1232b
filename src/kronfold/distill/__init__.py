"""Teacher signals and named losses. No model is changed here and nothing is stored in the student."""

from kronfold.distill.chunked import chunked_loss, head_parameters
from kronfold.distill.losses import IGNORE, LOSSES, Loss, count_tokens
from kronfold.distill.objective import Objective, ObjectiveConfig
from kronfold.distill.pairs import check_head, check_pair

__all__ = [
    "IGNORE",
    "LOSSES",
    "Loss",
    "Objective",
    "ObjectiveConfig",
    "check_head",
    "check_pair",
    "chunked_loss",
    "count_tokens",
    "head_parameters",
]
