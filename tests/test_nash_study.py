"""The study of styles in a circle: its mathematics by hand, and what its results say."""
import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest

from cookbook.nash import study, styles

RESULTS = Path(study.__file__).parent / "results.json"


def test_doctests():
    found = doctest.testmod(styles)
    assert found.attempted and not found.failed


def test_every_answer_has_one_style():
    """12^3 answers; all of one style's words are that style's, and styles are alike in number."""
    every = study.answers()
    assert len(every) == len(set(every)) == 12 ** 3
    counts = study.by_style(np.append(np.full(1728, 1 / 1728), 0.0))
    assert counts[3] == 0 and counts[:3] == pytest.approx([1 / 3] * 3)
    assert study.by_style(np.append(np.zeros(1728), 1.0)).tolist() == [0, 0, 0, 1]


def test_the_first_policy_writes_as_it_should():
    """A style's text keeps it where at least two of three words do, or the first of three different ones: .9 + .1 / 3 each."""
    found = [styles.style(text) for text in styles.texts(4000, np.random.default_rng(0))]
    own = 0.9 + 0.1 / 3
    other = (1 - own) / 2
    kept = own ** 3 + 3 * own ** 2 * 2 * other + own * other * other * 2              # of three different ones it comes first
    flipped = 3 * other ** 2 * (own + other) - 2 * other ** 3 + own * other * other * 2
    expected = 0.6 * kept + 0.4 * flipped
    assert abs(found.count("terse") / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_exploitability_by_hand():
    """A terse policy loses to formal, nine of ten; the middle to nobody."""
    assert study.exploitability([1, 0, 0, 0]) == pytest.approx(0.4)
    assert study.exploitability([1 / 3, 1 / 3, 1 / 3, 0]) == pytest.approx(0.0)


def test_bradley_terry_fits_win_rates():
    """Its stationarity: the expected wins of every style are those observed."""
    p = np.array([0.6, 0.2, 0.19, 0.01])
    r = study.fitted(p)
    observed = np.array(styles.PAYOFF) @ p
    expected = (1 / (1 + np.exp(r[None] - r[:, None]))) @ p
    assert expected == pytest.approx(observed, abs=1e-3) and p @ r == pytest.approx(0)
    assert study.best_tilt(p) <= study.exploitability(p) and study.best_tilt(np.array([1, 1, 1, 1e-6]) / 3) < 1e-3


def test_the_study_holds_its_claims():
    """The results beside the study are whole, and its page has their numbers."""
    results = json.loads(RESULTS.read_text())
    assert len(results["seeds"]) == 3 and all(results["claims"].values()) and len(results["claims"]) == 12
    page = (RESULTS.parent / "README.md").read_text()
    for name in results["seeds"][0]["methods"]:
        for summary in results["summaries"]:
            assert f"{summary['exploitability'][name]:.3f}" in page, name


@pytest.mark.study
def test_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "--out", str(tmp_path)])
    assert study.main() == 0
