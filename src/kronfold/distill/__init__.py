"""Teacher signals, named losses, one file per method. No model is changed here and nothing is stored in the student."""

from kronfold.distill.chunked import chunked_loss, head_parameters
from kronfold.distill.losses import IGNORE, LOSSES, Loss, count_tokens
from kronfold.distill.method import Method
from kronfold.distill.methods import METHODS
from kronfold.distill.objective import Objective
from kronfold.distill.pairs import check_head, check_pair, is_classifier
from kronfold.distill.signals import Batch, Moment, Signals
from kronfold.options.healing import ObjectiveConfig

__all__ = [
    "IGNORE",
    "LOSSES",
    "METHODS",
    "Batch",
    "Loss",
    "Method",
    "Moment",
    "Objective",
    "ObjectiveConfig",
    "Signals",
    "check_head",
    "check_pair",
    "chunked_loss",
    "count_tokens",
    "head_parameters",
    "is_classifier",
]
