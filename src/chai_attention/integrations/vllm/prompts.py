"""How long the prompts of running requests are.

A request that vLLM preempted starts anew with its prompt and all it has generated. Its membership
has to be what it was, so what was generated must not be taken for prompt. vLLM tells attention
backends how many tokens a request has, but not how many of them are its prompt; the model runner
that makes the metadata builders knows.
"""

from __future__ import annotations

import inspect
from typing import Any

from chai_attention.errors import UnsupportedModelError


class PromptLengths:
    """The table of prompts of a model runner.

    Args:
        runner: vLLM's, the older one (``input_batch``) or the newer one (``req_states``).
    """

    def __init__(self, runner: Any):
        self._runner = runner

    @classmethod
    def of_caller(cls) -> PromptLengths:
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
            "online memberships need to know the lengths of prompts, which this version of vLLM "
            "keeps elsewhere: use a static profile, or a version that docs/serving.md names"
        )

    def of(self, row: int, req_idx: Any) -> int:
        """Tokens of the prompt of a step's request.

        Args:
            row: the request's row in the step.
            req_idx: ``[B]``, the requests' rows in the runner's table; None where they are the
                step's.
        """
        if req_idx is None:
            return int(self._runner.input_batch.num_prompt_tokens[row])
        return int(self._runner.req_states.prompt_len.np[req_idx[row]])
