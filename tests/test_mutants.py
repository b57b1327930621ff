"""The tests would notice: every planted bug is killed by its check, which passes without it."""

from collections import OrderedDict

import pytest
from mutants import MUTANTS

from models import kaf_table


@pytest.fixture(autouse=True)
def no_kept_tables(monkeypatch):
    """Tables of sound checks must not hide a planted bug, nor those of a bug outlive it."""
    monkeypatch.setattr(kaf_table, "_kept", OrderedDict())


# A set would be in an order of its own in every process, and pytest-xdist refuses that.
CHECKS = list(dict.fromkeys(mutant.check for mutant in MUTANTS))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_sound_engine_passes(check):
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_the_planted_bug_is_killed(mutant, monkeypatch):
    mutant.plant(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):  # a crash is as good as a failure
        mutant.check()
