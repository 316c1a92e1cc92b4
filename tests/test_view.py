"""The page of groups in a real browser: what a person reads, filters and labels, and that no text of the data ever runs."""
import json

import pytest
from headless import CHROMIUM, Page

from data_tools.quality.describe import describe
from data_tools.quality.findings import Finding
from data_tools.quality.page import write_page
from data_tools.quality.view import apply_labels, view
from data_tools.quality.words import identity
from data_tools.records import Group, Response

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
ATTACK = "<script>window.hit=1</script><img src=x onerror='window.hit=2'></script><svg onload=window.hit=3> <!-- {{ window }}"


def made(text, model, **scores):
    return Response(text, scores=scores, meta={"model": model})


GROUPS = [
    Group("What is 2 + 2?", [made("It is four, of course.", "big", rm=2.0), made("It is five, of course.", "small", rm=1.0)],
          [1.0, 0.0], meta={"place": "a.jsonl:1"}),
    Group(f"Say {ATTACK}", [made(ATTACK, ATTACK, **{ATTACK: 0.5}), made("no\n\nline", "small")], [0.0, 3.0],
          meta={"place": ATTACK}),
    Group([{"role": "user", "content": "Order these"}], [made(f"answer {n}", "big", rm=None) for n in range(3)]),
    Group("tie?", [made("yes", "big"), made("no", "small")], wins=[[0.5, 0.6], [0.4, 0.5]])]
FOUND = [Finding("refusal", f"declines {ATTACK}", 0.9, group=2, response=1,
                 id=identity(GROUPS[1])), Finding("length bias", ATTACK)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "view.html"
    write_page(view(GROUPS, findings=FOUND, title=ATTACK), path)
    with Page(path) as page:
        yield page


@pytest.fixture(autouse=True)
def fresh(request):
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        page.run("localStorage.clear()")
        page.load()
        page.errors.clear()


def text(page, selector):
    return page.run(f"document.querySelector({selector!r}).textContent")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def choose(page, name, value):
    page.run(f"(() => {{ const e = document.getElementById({name!r}); e.value = {json.dumps(value)};"
             f" e.dispatchEvent(new Event('input')); }})()")


def tick(page, name):
    page.run(f"document.getElementById({name!r}).click()")


def labels(page):
    return [json.loads(line) for line in text(page, "#lines").splitlines()]


def test_a_group_is_shown(page):
    assert text(page, "#count") == "1 of 4" and text(page, ".group pre") == "What is 2 + 2?"
    assert texts(page, ".said") == ["It is four, of course.", "It is five, of course."]
    assert texts(page, ".row .head b") == ["big", "small"] and "a.jsonl:1" in text(page, ".group header")
    assert "margin 1" in text(page, ".group header") and "rm 2" in texts(page, ".row .head")[0]
    assert page.run("document.querySelectorAll('.row')[0].classList.contains('best')")
    assert page.errors == []


def test_differences_are_marked(page):
    assert texts(page, ".said mark") == ["four", "five"]
    page.press("d")
    assert texts(page, ".said mark") == []
    page.press("d", "ArrowRight", "ArrowRight")
    assert texts(page, ".said mark") == ["1", "2"]             # of three, against the first
    page.run("[...document.querySelectorAll('.row .head button')].find(b => b.textContent === 'compare with this').click()")
    assert texts(page, ".said mark") == ["0", "2"]


@pytest.mark.parametrize("a, b, only", [("", "x", [[], ["x"]]), ("a b c", "a b c", [[], []]), ("a b c d", "a d", [["b c"], []]),
                                        ("x a y", "a", [["x", "y"], []]), ("日本語", "日本", [["日本語"], ["日本"]])])
def test_the_difference_is_a_longest_common_subsequence(page, a, b, only):
    found = page.run(f"(() => {{ const [a, b] = [{a!r}, {b!r}].map(words), both = common(a, b);"
                     "return [a, b].map((list, n) => pieces(list, both[n]).filter(p => p.tagName)"
                     ".map(p => p.textContent.trim())); })()")
    assert found == only


def test_long_texts_have_differences_too(page):
    assert page.run("""(() => { const some = n => Array.from({length: 900}, (_, k) => k % 50 ? "w" + k % 97 : "x" + n);
        return common(some(1), some(2))[0].reduce((sum, kept) => sum + kept, 0); })()""") == 900 - 900 / 50
    assert page.run("(() => { const some = n => Array(2500).fill(n); return common(some(1), some(2)); })()") is None


def test_no_text_of_the_data_runs(page):
    for _ in range(4):
        assert page.run("document.querySelectorAll('#shown script, #shown img, #shown svg, #shown a').length") == 0
        page.press("ArrowRight")
    choose(page, "search", "window")
    assert text(page, "#count") == "1 of 1" and ATTACK in texts(page, ".said")[0] and ATTACK in text(page, ".flags")
    assert page.run("window.hit") is None and text(page, "h1") == ATTACK and page.errors == []


def test_injected_scripts_are_stopped_by_the_policy(page):
    """Even if a text did become HTML."""
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 5\">')")
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hit = 6'}))")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("window.hit") is None and any("Content Security Policy" in json.dumps(e) for e in page.errors)


def test_filters(page):
    for name, value, expected in (("stratum", "preferred: big", 2), ("flag", "refusal", 1), ("model", "small", 3),
                                  ("search", "ORDER", 1), ("search", "a.jsonl:1", 1), ("low", "0.5", 2), ("high", "1", 2),
                                  ("state", "labelled", 0), ("search", "nothing like it", 0)):
        choose(page, name, value)
        assert text(page, "#count") == (f"1 of {expected}" if expected else "no group fits"), (name, value)
        choose(page, name, "")
    assert text(page, "#count") == "1 of 4" and page.errors == []


def test_orders(page):
    for name, first in (("narrow", "tie?"), ("wide", "Say"), ("flags", "Say"), ("sure", "Say"), ("data", "What")):
        choose(page, "order", name)
        assert text(page, ".group pre").startswith(first)
    choose(page, "search", "four")
    assert texts(page, "mark.hit") == ["four"]


def test_labels_by_keys(page):
    page.press("2")
    assert labels(page) == [{"id": identity(GROUPS[0]), "group": 1, "place": "a.jsonl:1", "relevance": [0, 1]}]
    assert text(page, ".mine") and texts(page, ".group .mine") == ["your label: 2"] and text(page, "#done") == "1 labelled"
    page.press("1")
    assert labels(page)[0]["relevance"] == [1, 0]              # of two, the other digit is the other answer
    page.press("1")
    assert labels(page) == []                                  # and the same again takes it back
    page.press("t", "ArrowRight", "x", "ArrowRight", "3", "1", "ArrowRight", "9", "q")
    assert [x.get("relevance", "dropped") for x in labels(page)] == [[0, 0], "dropped", [1, 0, 2]]
    page.press("ArrowLeft", "u")
    assert len(labels(page)) == 2
    page.press("2", "3", "1")
    assert labels(page)[2]["relevance"] == [1, 0, 0]           # two were placed, so a third key begins anew
    choose(page, "state", "open")
    assert text(page, "#count") == "1 of 1" and page.errors == []


def test_keys_while_typing_are_text(page):
    page.press("/")
    page.press("2", "x")
    assert page.run("document.getElementById('search').value") in ("2x", "/2x") and labels(page) == []
    page.press("Escape")
    assert page.run("document.activeElement === document.body")


def test_blind_hides_what_leads(page):
    page.press("b")
    shown = text(page, "#shown")
    assert "big" not in shown and "label" not in shown and "rm" not in shown and "margin" not in shown
    assert page.run("document.querySelectorAll('.row.best').length") == 0
    page.press("b")
    assert "big" in text(page, "#shown")


def test_blind_order_has_no_meaning_and_labels_follow_the_response(page, tmp_path):
    groups = [Group(f"prompt {n}", [made(f"good {n}", "big"), made(f"bad {n}", "small")], [1.0, 0.0]) for n in range(60)]
    write_page(view(groups), tmp_path / "view.html")
    with Page(tmp_path / "view.html") as other:
        other.press("b")
        first = []
        for _ in groups:
            first.append(texts(other, ".said")[0].startswith("good"))
            other.press("1", "ArrowRight")
        assert 15 < sum(first) < 45
        assert [x["relevance"] for x in labels(other)] == [[1, 0] if good else [0, 1] for good in first]


def test_going_on_after_a_label(page):
    tick(page, "onward")
    page.press("1", "2")
    assert text(page, "#count") == "3 of 4" and [x["relevance"] for x in labels(page)] == [[1, 0], [0, 1]]


def test_labels_survive_a_reload(page):
    page.press("2")
    page.load()
    assert [x["relevance"] for x in labels(page)] == [[0, 1]]


def test_export_and_back(page, tmp_path):
    page.press("2", "ArrowRight", "x", "ArrowRight", "3", "1")
    page.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tick(page, "export")
    page.wait(lambda: (tmp_path / "labels.jsonl").exists() and (tmp_path / "labels.jsonl").stat().st_size)
    found = list(apply_labels(GROUPS, tmp_path / "labels.jsonl"))
    assert [g.relevance for g in found] == [[0, 1], [1, 0, 2], None]
    assert [g.meta.get("relabelled") for g in found] == [True, True, None]


def test_clicks(page):
    page.run("document.querySelectorAll('.row .head button')[1].click()")
    assert labels(page)[0]["relevance"] == [0, 1]
    page.run("document.getElementById('next').click()")
    assert text(page, "#count") == "2 of 4"


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_window(tmp_path, width):
    long = Group("word " * 300 + "x" * 500, [made("y" * 3000, "big", rm=1.0), made("z z " * 500, "small", rm=0.0)], [1.0, 0.0])
    write_page(describe([*GROUPS, long], findings=FOUND, title="A title"), tmp_path / "index.html")
    with Page(tmp_path / "index.html", (width, 900)) as page:
        assert page.run("document.documentElement.scrollWidth") <= width
        numbers = page.run("[...document.querySelectorAll('td.soft ~ td.text')].map(e => e.getBoundingClientRect().toJSON())")
        assert len(numbers) > 10 and all(n["right"] <= width and n["width"] > 60 for n in numbers)        # none is out of sight
        page.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
        assert page.run("document.documentElement.scrollWidth") <= width and page.run("window.hit") is None
        assert text(page, "#count") == "5 of 5" and page.errors == []


def test_an_empty_page(tmp_path):
    write_page(view([]), tmp_path / "view.html")
    with Page(tmp_path / "view.html") as page:
        page.press("1", "ArrowRight", "x")
        assert text(page, "#count") == "no group fits" and page.errors == []
