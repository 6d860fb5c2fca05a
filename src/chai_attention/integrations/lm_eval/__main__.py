"""lm-eval's command line with the model "chai", for releases without plugins.

``python -m chai_attention.integrations.lm_eval --model chai --model_args
pretrained=MODEL,profile=FILE --tasks piqa``
"""

from __future__ import annotations

import sys

from chai_attention.errors import ChaiError
from chai_attention.integrations.lm_eval import register


def main() -> None:
    """Register "chai", then do what ``lm_eval`` does."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except ChaiError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
