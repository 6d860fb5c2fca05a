"""What the model runner knows of requests, and attention backends are not told.

A request that vLLM preempted starts anew with its prompt and all it has generated. Its membership
has to be what it was, so what was generated must not be taken for prompt: how long the prompt is,
only the runner knows.
"""

from __future__ import annotations

import inspect
from typing import Any

from chai_attention.errors import UnsupportedModelError


class RequestTable:
    """The requests of the model runner that makes the metadata builders.

    Args:
        runner: vLLM's, the older one (``input_batch``) or the newer one (``req_states``).
    """

    def __init__(self, runner: Any):
        self._runner = runner

    @classmethod
    def of_caller(cls) -> RequestTable:
        """The table of the model runner that is calling.

        Raises:
            UnsupportedModelError: no caller is a model runner.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            older, newer = (getattr(caller, name, None) for name in ("input_batch", "req_states"))
            if hasattr(older, "num_prompt_tokens") or hasattr(newer, "prompt_len"):
                return cls(caller)
            frame = frame.f_back
        raise UnsupportedModelError(
            "online memberships need the lengths of prompts, which this version of vLLM keeps "
            "elsewhere: use a static profile, or a version that docs/serving.md names"
        )

    def prompt(self, row: int, req_idx: Any) -> int:
        """Tokens of the prompt of a step's request.

        Args:
            row: the request's row in the step.
            req_idx: ``[B]``, the requests' rows in the runner's table; None where they are the
                step's.
        """
        if req_idx is None:
            return int(self._runner.input_batch.num_prompt_tokens[row])
        return int(self._runner.req_states.prompt_len.np[req_idx[row]])
