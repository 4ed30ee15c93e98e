"""Whatever is wrong with a file: it loads, or gives a one-line error."""

import pytest

from dev import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_damaged_file_loads_or_is_one_line(kind):
    mutations = 25 if fuzz.KINDS[kind][0] is fuzz.make_model else 100
    refused = fuzz.fuzz(kind, mutations, seed=1)
    assert refused > 0 or kind == "training.json"
