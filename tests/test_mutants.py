"""Planted bugs must be seen: every mutant's check passes on the real code and fails under the mutant."""

import pytest
from mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_the_planted_bug_is_killed(mutant, monkeypatch):
    mutant.check()
    original = getattr(mutant.target, mutant.attribute)
    monkeypatch.setattr(mutant.target, mutant.attribute, mutant.make(original))
    with pytest.raises(AssertionError):
        mutant.check()
