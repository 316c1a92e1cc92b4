"""Verifiable rewards: hand-written cases, real data with official labels, and errors for what a row lacks."""
import gzip
import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_tools.records import Group, Response
from rewards import verifiable
from rewards.base import MissingField, ScoringError, as_reward, rows_of, score
from rewards.combine import tiers, weighted
from rewards.sandbox import protections
from rewards.verifiable import (
    boxed,
    candidates,
    choice,
    choice_share,
    chosen,
    final_answer,
    has_boxed,
    is_json,
    is_tool_call,
    math_equal,
    number,
    pass_at_k,
    passed_share,
    tagged,
    tags_once,
    unit_tests,
    verify,
)

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.exists(), reason="real data are not here")
algebra = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")
sandboxed = pytest.mark.skipif(protections()[0][0] == "missing", reason="no sandbox on this machine")


def records(name):
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("text, reference, want", [
    ("It is 12.", "12", 1), ("It is 12.", 12.0, 1), ("12, then 13", "13", 1), ("12, then 13", "12", 0), ("", "3", 0),
    ("no number", "3", 0), ("#### 1,234", "1234", 1), ("#### 7\nand 8", "7", 1), ("The answer is 5 apples, not 6.", "5", 1),
    ("The answer is 4. No: the answer is 5.", "5", 1), (r"\boxed{4} or \boxed{5}", "5", 1),
    (r"the answer is 4 \boxed{5}", "4", 0),
    ("-$1,000.50", "-1000.5", 1), ("1/2", "0.5", 1), ("the answer is 3/4.", ".75", 1), (r"\boxed{2\frac{1}{2}}", "5/2", 1),
    (r"\boxed{-1\frac12}", "-1.5", 1), (r"\boxed{1.5 \times 10^{3}}", "1500", 1), ("1e999", "5", 0), ("2e3", "2000", 1),
    (r"\boxed{5\text{ cm}}", "5", 1), (r"\boxed{5 km/h}", "5", 1), (r"\boxed{2x}", "2", 0), ("50%", "50", 1), ("1/0", "0", 0),
    ("5 - 3", "3", 1), ("3-5", "-5", 0), ("0.3333333", "1/3", 1), ("0.333", "1/3", 0), ("9" * 5000, "9", 0),
    ("answer: **18**", "#### 18", 1), ("1 200", "200", 1), ("x = 5", "5", 1)])
def test_final_answers(text, reference, want):
    assert final_answer(text, reference) == want
    if not final_answer(text, reference) and number(text) is None:
        return
    assert math_equal(text, reference) == want or "not 6" in text


def test_percent_and_tolerance():
    assert final_answer("50%", "0.5", percent=True) == 1 and final_answer("50%", "0.5") == 0
    assert final_answer("3.142", math.pi, absolute=0.0005) == 1 and final_answer("3.142", math.pi) == 0


@pytest.mark.parametrize("answer, reference, want", [
    (r"(1,2)", "(1, 2)", 1), ("(2,1)", "(1,2)", 0), (r"\{2,1\}", r"\{1,2\}", 1), (r"\{1,1\}", r"\{1,2\}", 0),
    ("[0,1)", "[0,1)", 1),
    ("[0,1)", "[0,1]", 0), ("1,2", "(1,2)", 1), ("1,2", "12", 0), (r"(\frac12, 3)", "(0.5,3)", 1), (r"\{4\}", "4", 0),
    (r"\text{Tuesday}", "tuesday", 1), ("Monday", "Tuesday", 0), ("1,234", "1234", 1), ("(1,2,3)", "(1,2)", 0)])
def test_tuples_sets_and_words(answer, reference, want):
    assert math_equal(rf"\boxed{{{answer}}}", reference) == want


@algebra
@pytest.mark.parametrize("answer, reference, want", [
    (r"2\sqrt{2}", r"\sqrt{8}", 1), ("x+1", "1+x", 1), ("x^2", "x", 0), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", 1),
    (r"\pi", "3.14", 0), (r"(\sqrt{4}, 1)", "(2,1)", 1), ("50+51=101", "101", 1), ("__import__('os').getcwd()", "4", 0)])
def test_algebra(answer, reference, want):
    assert math_equal(rf"\boxed{{{answer}}}", reference) == want


@algebra
def test_algebra_without_end_is_cut_and_the_next_goes_on():
    began = time.monotonic()
    assert math_equal(r"\boxed{9^{9^{9^9}}}", "5", seconds=0.5) == 0 and time.monotonic() - began < 20
    assert verify(r"\sqrt{8}", r"\boxed{2\sqrt{2}}", seconds=20).method == "math-verify"


def test_without_math_verify_it_says_so(monkeypatch):
    monkeypatch.setattr(verifiable, "find_spec", lambda name: None)
    verifiable.algebra.cache_clear()
    assert math_equal(r"\boxed{\frac12}", "0.5") == 1
    with pytest.raises(ScoringError, match="pip install 'math-verify"):
        math_equal(r"\boxed{2\sqrt{2}}", r"\sqrt{8}")


def test_what_was_taken_and_why():
    found = verify("3", r"\boxed{2}, no, \boxed{4}")
    assert (found.correct, found.extracted, found.method, found.reason, found.multiple) == (False, "4", "number",
                                                                                            "'4' is not '3'", True)
    assert verify("3", "none").reason == "no answer"


@pytest.mark.parametrize("reference", [None, "", "  ", [1], True])
def test_a_missing_reference_is_an_error(reference):
    for reward in (final_answer, math_equal):
        with pytest.raises(ScoringError, match="the reference is"):
            reward("3", reference)
    with pytest.raises(ScoringError, match="use math_equal"):
        final_answer("3", "x + 1")


def test_a_missing_field_is_an_error():
    with pytest.raises(MissingField, match="reads the field 'reference'.*did you mean 'references'"):
        as_reward(final_answer)(rows_of([Group("p", [Response("3")], meta={"references": "3"})]))


@real_data
def test_the_official_flags_of_gsm8k():
    checked = 0
    for record in records("gsm8k/example_model_solutions"):
        for value in record.values():
            if isinstance(value, dict):
                truth = record["ground_truth"].rsplit("A:", 1)[1]
                assert final_answer(value["solution"], truth) == math_equal(value["solution"], truth) == value["is_correct"]
                checked += 1
    assert checked == 1600


@real_data
def test_references_answer_themselves():
    for record in records("gsm8k/train") + records("gsm8k/test"):
        assert final_answer(record["answer"], record["answer"]) == math_equal(record["answer"], record["answer"]) == 1
    for record in records("svamp/SVAMP"):
        assert final_answer(f"So it is {record['Answer']}.", record["Answer"]) == 1


# ------------------------------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("text, want", [
    ("(B)", "B"), ("Answer: B", "B"), ("The answer is (b)", ""), ("(A)? No, (C).", "C"), (r"\boxed{D}", "D"), ("B. Paris", "B"),
    ("A dog is an animal.", ""), ("Answer: A, C", "AC"), ("answer is A and B", "AB"), ("Answer: Because", ""), ("", ""),
    ("answer: A\nanswer: B", "B"), ("**Answer:** C", "C"), ("I choose\nB", "B")])
def test_chosen_letters(text, want):
    assert chosen(text, "ABCD") == set(want)


def test_choice_share_by_enumeration():
    options = ["".join(c) for n in range(5) for c in itertools.combinations("ABCD", n)]
    for right in options[1:]:
        for picked in options:
            text, reference = f"Answer: {', '.join(picked)}", ",".join(right)
            want = len(picked) / len(right) if set(picked) <= set(right) else 0
            assert choice_share(text, reference, letters="ABCD") == want
            assert choice(text, reference, letters="ABCD") == (picked == right)


def test_partial_credit_varies_less_and_leaves_fewer_groups_alike():
    """Card: each right option of 3 is included with p = 0.7, no wrong one; both rewards rank policies alike."""
    probability = {k: math.comb(3, k) * 0.7**k * 0.3**(3 - k) for k in range(4)}
    soft, hard = ({k: f(k) for k in range(4)} for f in (lambda k: k / 3, lambda k: float(k == 3)))
    variance = lambda r: sum(p * r[k]**2 for k, p in probability.items()) - sum(p * r[k] for k, p in probability.items())**2
    alike = lambda r, n: sum(sum(p for k, p in probability.items() if r[k] == x)**n for x in set(r.values()))
    assert variance(soft) == pytest.approx(0.7 * 0.3 / 3) and variance(hard) == pytest.approx(0.343 * 0.657)
    assert alike(soft, 4) < alike(hard, 4)


def test_a_reference_that_is_no_letter():
    for reference in ("", "Paris", "F", None):
        with pytest.raises(ScoringError, match="letters A, B"):
            choice("(A)", reference)


# ------------------------------------------------------------------------------------------------------------- formats
GOOD = "<think>a</think><answer>b</answer>"


@pytest.mark.parametrize("text, strict, quarter", [
    (GOOD, 1, 1), (f" \r\n{GOOD}\u00a0\n", 1, 1), (GOOD.replace("b", " "), 0, 1), (GOOD + "x", 0, 1), ("x" + GOOD, 0, 1),
    (GOOD + GOOD, 0, 0), ("<answer>b</answer><think>a</think>", 0, 1),
    ("<think><think>a</think></think><answer>b</answer>", 0, 0.5),
    ("<think>a<answer>b</answer></think>", 0, 1), ("", 0, 0), ("<think>a</think>", 0, 0.5),
    ("</think><think><answer>b</answer>", 0, 1),
    ("<think>a</think>x<answer>b</answer>", 0, 1), ("<think></think><answer>b</answer>", 1, 1),
    ("<think>a</answer><answer>b</think>", 0, 1),
    ("```\n" + GOOD + "\n```", 0, 1), ("<THINK>a</THINK><answer>b</answer>", 0, 0.5), ("a</think><answer>b</answer>", 0, 0.75)])
def test_tags(text, strict, quarter):
    assert (tagged(text), tags_once(text)) == (strict, quarter)
    if text.startswith("<think>"):
        assert (tagged(text[7:], prefilled_open=True), tags_once(text[7:], prefilled_open=True)) == (strict, quarter)


@pytest.mark.parametrize("reward, text, want", [
    (has_boxed, r"\boxed{\{1\}}", 1), (has_boxed, r"\boxed{", 0), (has_boxed, "boxed{1}", 0), (is_json, "[1]", 1),
    (is_json, "```json\n[1]\n```", 1), (is_json, "[1", 0), (is_json, "[" * 10**5, 0),
    (is_tool_call, '{"name": "a", "arguments": {}}', 1),
    (is_tool_call, '{"name": "a"}', 0), (is_tool_call, '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', 1),
    (is_tool_call, "[]", 0), (is_tool_call, "", 0)])
def test_other_formats(reward, text, want):
    assert reward(text) == want


@pytest.mark.parametrize("hostile", ["<think>" * 10**5, r"\boxed{" * 10**5, "answer is " * 10**5, "1,111" * 10**5, "1 " * 10**5,
                                     "```\n" * 10**5, "(A" * 10**5, "-" * 10**6, "1" * 10**6])
def test_hostile_texts_take_linear_time(hostile):
    began = time.process_time()
    tagged(hostile), tags_once(hostile), has_boxed(hostile), is_tool_call(hostile), candidates(hostile), chosen(hostile, "ABCD")
    final_answer(hostile, "3")
    assert time.process_time() - began < 20                  # quadratic time would be minutes


def test_boxes_nest():
    assert boxed(r"\boxed{a \boxed{b}} \fbox{x} \boxed {\{c}") == ["b", r"a \boxed{b}", r"\{c"]


# ---------------------------------------------------------------------------------------------------------- unit tests
@sandboxed
def test_shapes_of_tests():
    right, wrong = "Here:\n```python\ndef f(x):\n    return (x, x + 1)\n```", "def f(x): return 0"
    shapes = [["assert f(1) == (1, 2)"], {"test_list": ["assert f(1) == (1, 2)"], "test_setup_code": "import math"},
              {"inputs": [[1], [2]], "outputs": [[1, 2], [2, 3]], "fn_name": "f"},
              {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == (1, 2)"}]
    for tests in shapes:
        assert (unit_tests(right, tests), unit_tests(wrong, tests)) == (1.0, 0.0)
    assert unit_tests("    return (x, x + 1)", shapes[3]) == 1.0                                         # a completion
    assert unit_tests("print(int(input()) * 2)", {"inputs": ["2\n", "3"], "outputs": ["4", "6 \n\n"]}) == 1.0
    assert passed_share("print(4)", {"inputs": ["2\n", "3"], "outputs": ["4", "6"]}) == 0.5
    assert unit_tests("this is no Python", shapes[0]) == 0.0


def test_unknown_tests_are_an_error():
    for tests in ([], None, {}, {"input": ["1"], "outputs": ["2"]}, [1]):
        with pytest.raises(ScoringError, match="tests"):
            unit_tests("x", tests)
    with pytest.raises(ScoringError, match="did you mean 'inputs'"):
        unit_tests("x", {"input": ["1"], "outputs": ["2"]})
    with pytest.raises(ScoringError, match="2 inputs and 1 outputs"):
        unit_tests("x", {"inputs": ["1", "2"], "outputs": ["2"]})


def solution(record):
    """MBPP's solutions are indented otherwise than the prompt's description, which is left out."""
    return record["prompt"].split("'''")[0].rstrip(" ") + record["canonical_solution"]


def judged(pairs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda pair: unit_tests(*pair, seconds=30), pairs))


@real_data
@sandboxed
def test_some_canonical_solutions_pass_and_wrong_ones_do_not():
    human, basic = records("humaneval/HumanEval"), records("mbpp/mbpp_sanitized")[:8]
    human = human[::10] + human[32:33]                                            # 32 has a helper in its prompt
    assert judged([(r["prompt"] + r["canonical_solution"], r) for r in human] + [(solution(r), r) for r in basic]) == [1.0] * 19
    assert judged([(r["prompt"] + "    return None\n", r) for r in human + basic]) == [0.0] * 19


@pytest.mark.slow
@real_data
@sandboxed
def test_all_canonical_solutions_pass_and_wrong_ones_do_not():
    human, basic = records("humaneval/HumanEval"), records("mbpp/mbpp_sanitized")
    assert judged([(r["prompt"] + r["canonical_solution"], r) for r in human]) == [1.0] * 100
    passed = judged([(solution(r), r) for r in basic])
    assert [r["task_id"] for r, p in zip(basic, passed, strict=True) if not p] == ["MbppEval/56"]   # it is itself named `check`
    assert judged([(r["prompt"] + "    return None\n", r) for r in human]) == [0.0] * 100


def test_pass_at_k_by_enumeration():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations(range(n), k))
                want = sum(min(draw) < correct for draw in draws) / len(draws)
                assert pass_at_k(n, correct, k) == pytest.approx(want, abs=1e-12)
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(3, 4, 1)


# --------------------------------------------------------------------------------------------------------- composition
def test_composition():
    texts = [r"<think>a</think><answer>\boxed{3}</answer>", r"\boxed{3}", "<think>a</think><answer>4</answer>", "4"]
    parts = {"right": final_answer, "format": tagged}
    gated = weighted(parts=parts, weights={"right": 1.0, "format": 0.0}, gates={"format": 0.5})
    ordered = tiers(parts=parts, weights={"right": 1.0, "format": 0.2}, steps={"right": 1.0},
                    ranges={"right": [0, 1], "format": [0, 1]})
    for reward, want in ((weighted(parts={"right": final_answer}, weights={"right": 1.0}), [1, 1, 0, 0]), (gated, [1, 0, 0, 0]),
                         (ordered, [1.2, 1, 0.2, 0])):
        group = Group("p", [Response(t) for t in texts], meta={"reference": "3"})
        score([group], {"total": reward})
        assert [r.scores["total"] for r in group.responses] == pytest.approx(want)
        assert all("right" in r.scores for r in group.responses)                                     # every component is kept
    with pytest.raises(ValueError, match="overturn"):
        tiers(parts=parts, weights={"right": 1.0, "format": 2.0}, steps={"right": 1.0},
              ranges={"right": [0, 1], "format": [0, 1]})
