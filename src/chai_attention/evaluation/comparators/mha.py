"""The unchanged model: what every other row of a table is compared to."""

from __future__ import annotations

from chai_attention.evaluation.comparators.base import Comparator


class Mha(Comparator):
    """Every head with its own scores, in the attention that the model was loaded with.

    Of a grouped-query model this is its grouped-query attention: K,V bytes of all comparators are
    shares of what the model itself keeps.
    """

    name = "mha"
    source = "Vaswani et al. 2017, section 3.2: the model as it is"
