"""lm-evaluation-harness: the model "chai", its tasks from local files, and scoring for tables.

Only this package imports `lm_eval`, which comes with the extra ``eval``.
"""

from __future__ import annotations

import importlib.util

from chai_attention.errors import EvaluationError

NAME = "chai"


def require() -> None:
    """Check that lm-eval is installed.

    Raises:
        EvaluationError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("evaluation needs lm-eval: pip install 'chai-attention[eval]'")


def register() -> None:
    """Let lm-eval's registry know the model "chai"; releases with plugins find it themselves."""
    require()
    # the import fires lm-eval's decorator, and fills its registry with its own models first
    from chai_attention.integrations.lm_eval.model import ChaiLM

    del ChaiLM
