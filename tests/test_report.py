"""What people look at: the report page, its findings, and rollouts in the terminal, of run folders made by hand."""
import io
import json
import math
import time
from html.parser import HTMLParser

import pytest
import yaml
from rich.console import Console
from small_tokenizers import fast
from typer.testing import CliRunner

from data_tools.records import Group, Response
from prefopt import cli
from prefopt.report import charts, checks, folders, page, samples, terminal
from prefopt.report.folders import Curve
from prefopt.rollout.sources import measured

HOSTILE = "<script>alert('x')</script> \"quoted\" & {{ 7 * 7 }} </style></pre><img src=x onerror=alert(1)> \ud800 \x1b[2J"
TEXTS = ("It is 4, of course.", "A naïve café – 12345\n日本 <b>bold</b>", "def f(x):\n    return x + 1\n", "It is not 5.")


@pytest.fixture(scope="module")
def words():
    return fast("bytes")


def group(words, n, step, rewards=(1.0, 0.0, 0.5, None), prompt=None, **meta):
    """A dumped group: four responses, the third cut off, the fourth without a reward, tokens with numbers of their own."""
    rows = []
    for k, value in enumerate(rewards):
        ids = words(TEXTS[k % 4], add_special_tokens=False)["input_ids"]
        logp = [-0.1 * (1 + (t + k + n) % 7) for t in range(len(ids))]
        trace = {"advantage": [(value or 0.0) - 0.5] * len(ids), "log_ratio": [1e-3 * (t - 2) for t in range(len(ids))],
                 "logp_ref": [v - 0.01 * step for v in logp]}
        rows.append(Response(TEXTS[k % 4], ids, logp, {"format": 0.25, **({} if value is None else {"reward": value})},
                             meta={"finished": k != 2, "stopped": "length" if k == 2 else "eos", "trace": trace}))
    return Group(f"question {n}" if prompt is None else prompt, rows, meta=meta)


def make_run(path, lines, *, settings=None, departures=None, rollouts=None, words=None, steps=None):
    """A run folder as training writes it."""
    path.mkdir(parents=True)
    run = {"recipe": "grpo", "policy": {"name": "nowhere/at-all"}, "data": {"train": "prompts.jsonl"}, "out": str(path),
           "train": {"lr": 1e-6, "clip": 1.0}, **(settings or {})}
    (path / "run.yaml").write_text(yaml.safe_dump(run))
    (path / "departures.yaml").write_text(yaml.safe_dump({"recipe": run["recipe"], **(departures or {})}))
    (path / "versions.json").write_text(json.dumps({"python": "3.11", "steps": steps or 9, "data": {"eval_groups": 100}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "timing.jsonl").write_text("".join(json.dumps({"step": line["step"], "tokens": 100, "seconds": 0.5}) + "\n"
                                               for line in lines if "loss" in line))
    for name, groups in (rollouts or {}).items():
        (path / "rollouts").mkdir(exist_ok=True)
        (path / "rollouts" / name).write_text("".join(json.dumps(g.to_json()) + "\n" for g in groups))
    if words is not None:
        words.save_pretrained(path / "model")
    return path


def wave(n, **metrics):
    """n logged steps; a metric is a number or a function of the step from 0 to 1."""
    value = lambda m, t: m(t) if callable(m) else m
    return [{"step": s, "epoch": s / n, **{k: value(m, s / n) for k, m in metrics.items()}} for s in range(1, n + 1)]


ONPOLICY = {"recipe": "grpo", "rollout": {"k": 4, "rewards": ["format"], "max_new_tokens": 32, "eval_k": 1}}


@pytest.fixture
def online(tmp_path, words):
    lines = wave(9, loss=lambda t: 1 - t / 3, reward=lambda t: t ** 2 / 3, entropy=0.5, lr=1e-6)
    lines += [{"step": s, "eval/reward": s / 30} for s in (3, 6, 9)]
    dumped = {f"step-{s:08d}.jsonl": [group(words, n, s, (1.0, n / 10, 0.5, None)) for n in range(10)] for s in range(1, 10)}
    return make_run(tmp_path / "online", lines, settings=ONPOLICY, rollouts=dumped, words=words)


@pytest.fixture
def offline(tmp_path):
    lines = wave(50, loss=lambda t: 0.69 - 0.4 * t, accuracy=lambda t: 0.5 + 0.4 * t, margin=lambda t: 2 * t, displaced=0.1,
                 grad_norm=lambda t: 2 - t, **{"shift/chosen": lambda t: t, "shift/rejected": lambda t: -t})
    lines.insert(25, {"step": 25, "eval/loss": 0.51, "eval/accuracy": 0.66})
    return make_run(tmp_path / "offline", [*lines, {"step": 50, "eval/loss": 0.35, "eval/accuracy": 0.8125}],
                    settings={"recipe": "dpo"}, departures={"score": {"recipe": {"log_ratio": {"beta": 0.1}},
                                                                      "here": {"log_ratio": {"beta": 0.5}}}})


class Page(HTMLParser):
    """Tags, attributes and texts of a page; whether all tags are closed in order; its curves and its data."""
    VOID = {"meta", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.text, self.figure, self.curves = [], [], [], [], "", {}
        self.scripts, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        found = dict(attrs)
        if "data-name" in found:
            numbers = lambda key: [float(v) for v in found[key].split()]
            self.curves[found["data-name"]] = list(zip(numbers("data-steps"), numbers("data-values"), strict=True))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def rollouts(self):
        return json.loads(self.scripts[0])

    def row(self, title):
        return next(c[1:] for c in self.cells if c and c[0] == title)


def read(*runs, sizes=None):
    """The page of these runs, checked to need nothing from outside and to run nothing of the data."""
    out = runs[0].parent / "page.html"
    page.write(runs, out, sizes or samples.Sizes())
    text = out.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == [] and found.tags.count("script") == len(found.scripts) <= 2
    assert not {"img", "iframe", "link", "object", "a"} & set(found.tags)
    assert not [a for a in found.attributes if a[0].startswith("on") or a[0] in ("src", "href")]
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text
    assert not any("nan" in str(value) for name, value in found.attributes if name in ("points", "d", "x1", "data-values"))
    found.source = text
    return found


# ---------------------------------------------------------------------------------------------------------------- page
def test_the_curves_are_the_numbers_of_the_files(offline):
    found = read(offline)
    lines = [json.loads(line) for line in (offline / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "accuracy", "margin", "shift/chosen", "shift/rejected", "grad_norm"):
        for name, have in ((key, key), (f"{key} held out", f"eval/{key}")):
            points = [(line["step"], line[have]) for line in lines if have in line]
            assert bool(points) == (name in found.curves)
            for (step, value), (x, y) in zip(points, found.curves.get(name, []), strict=True):
                assert step == x and math.isclose(value, y, rel_tol=1e-4)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert found.row("loss") == [f"{sum(losses[:10]) / 10:.4g}", f"{sum(losses[-10:]) / 10:.4g}", "0.35"]
    assert found.row("accuracy")[2] == "0.8125"
    assert found.curves["tokens/s"] == [(step, 200.0) for step in range(1, 51)]


def test_the_page_begins_with_the_recipe_its_departures_and_the_findings(offline):
    found = read(offline)
    words = "".join(found.text)
    places = [words.index(w) for w in ("dpo: offline", "{log_ratio: {beta: 0.5}}", "{log_ratio: {beta: 0.1}}", "Findings",
                                       "Nothing to worry about", "Curves", "Settings")]
    assert places == sorted(places) and "Rollouts" not in words and found.scripts == [found.scripts[0]]
    assert "displaced, which is 0.1" in words                 # says why it is not drawn
    assert found.row("train.lr") == ["1e-06"] and ("class", "text other") in found.attributes


def test_settings_that_differ_from_the_default_stand_first(online):
    rows = page.settings([folders.load(online)])
    changed = [key for key, _, other in rows if other]
    assert rows[:len(changed)] == [r for r in rows if r[2]] and {"recipe", "rollout.k", "policy.name"} <= set(changed)
    assert "train.lr" not in changed and "train.clip" not in changed                   # as by default
    assert "rollout.eval_k" not in changed


def test_the_rollouts_are_those_of_the_dump(online, words):
    found = read(online).rollouts()
    run, = found["runs"]
    assert [v["title"] for v in run["views"]] == [f"step {s}" for s in (1, 3, 4, 6, 7, 9)] + ["the same prompts over time"]
    for view in run["views"][:-1]:
        dumped = {g.prompt: g for g in folders.rollouts([online / "rollouts" / f"step-{view['groups'][0]['step']:08d}.jsonl"])}
        means = [g["mean"] for g in view["groups"]]
        everyone = sorted(((1.5 + n / 10) / 3 for n in range(10)), reverse=True)
        assert means == sorted(means, reverse=True) and len(means) == 6
        assert math.isclose(means[0], everyone[0]) and math.isclose(means[-1], everyone[-1])       # the best and the worst
        for shown in view["groups"]:
            rows = dumped[shown["prompt"]].responses
            assert shown["of"] == 4 and len(shown["rows"]) == len({r.text for r in rows})
            for row in shown["rows"]:
                source = rows[row["n"][0]]
                assert (row["reward"], row["length"]) == (source.scores.get("reward"), len(source.tokens))
                assert row["scores"] == {"format": 0.25} and "".join(row["pieces"]) == source.text
                assert row["values"]["advantage"] == float(f"{source.meta['trace']['advantage'][0]:.3g}")
                for t, (a, b) in enumerate(zip(source.logp, source.meta["trace"]["logp_ref"], strict=True)):
                    assert samples.at(row, "reference", t) == float(f"{a - b:.3g}")
                    assert samples.at(row, "logp", t) == float(f"{a:.3g}")
                notes = {2: ["truncated"], 3: ["no reward"]}
                assert row["notes"] == notes.get(row["n"][0], [])
        expected = measured(list(dumped.values()))
        assert view["words"] == "6 of 10 groups. All of them: " + ", ".join(f"{k} {v:.4g}" for k, v in expected.items()) + "."
    again = run["views"][-1]["groups"]
    assert [(g["prompt"], g["step"]) for g in again] == [(f"question {n}", s) for n in range(4) for s in (1, 4, 6, 9)]
    assert {m["key"]: m["scale"] for m in found["measures"]}["advantage"] == 0.5


def test_every_text_is_escaped(tmp_path, words):
    rows = [Response(HOSTILE, [5, 6], [-1.0, -2.0], {HOSTILE: 1.0, "reward": k}, meta={"error": HOSTILE}) for k in range(3)]
    asked = [{"role": "user", "content": HOSTILE}, {"role": HOSTILE, "content": None}]
    lines = wave(9, loss=lambda t: t, **{HOSTILE: lambda t: -t})
    runs = [make_run(tmp_path / name, lines, settings={**ONPOLICY, "recipe": HOSTILE, "set": {HOSTILE: HOSTILE}},
                     departures={HOSTILE: {"recipe": HOSTILE, "here": [HOSTILE]}},
                     rollouts={"step-00000001.jsonl": [Group(asked, rows, meta={"key": 1})]}, words=w)
            for name, w in (("a", None), ("<b>b</b>", words))]
    found = read(*runs)
    texts = [r["text"] for g in found.rollouts()["runs"][0]["views"][0]["groups"] for r in g["rows"]]
    assert texts == [HOSTILE] * 3                             # in JSON as it is, and nowhere as markup
    assert "<script>alert" not in found.source and "<b>b</b>" not in found.source
    assert found.row("recipe")[0] == HOSTILE.replace("\ud800", "?")


def test_several_runs_are_overlaid_and_told_apart(tmp_path, offline):
    other = make_run(tmp_path / "deep" / "offline", wave(20, loss=lambda t: 1 - t, accuracy=0.5), settings={"recipe": "ipo"})
    found = read(offline, other)
    names = [f"{offline.parent.name}/offline", "deep/offline"]
    assert found.cells[1][0] == names[0] and found.cells[2][0] == names[1]
    loss = [dict(zip(("x", "y"), p, strict=True)) for p in found.curves[names[1]]]
    assert len(loss) == 20 and f"{names[0]} held out" in found.curves
    assert [c for c in found.row("loss") if c][:2] != [c for c in found.row("loss") if c][3:]
    assert found.row("recipe") == ["dpo", "ipo"]


def test_what_is_shown_has_bounds_and_says_what_is_left_out(tmp_path, words):
    ids = words("word " * 700, add_special_tokens=False)["input_ids"]
    rows = [Response("word " * 700 + str(k), [*ids, k], [-0.123456 * k] * (len(ids) + 1), {"reward": k}) for k in range(20)]
    big = {f"step-{s:08d}.jsonl": [Group(f"{n} " * 9000, rows)] * 3 for n, s in enumerate(range(10, 13))}
    run = make_run(tmp_path / "big", wave(12, loss=lambda t: t), settings=ONPOLICY, rollouts=big, words=words)
    sizes = samples.Sizes(steps=2, groups=2, responses=5, tokens=90)
    found = read(run, sizes=sizes)
    views = found.rollouts()["runs"][0]["views"]
    assert [v["title"] for v in views] == ["step 10", "step 12"] and [len(v["groups"]) for v in views] == [2, 2]
    shown = views[0]["groups"][0]
    assert [r["reward"] for r in shown["rows"]] == [19, 18, 17, 1, 0] and shown["distinct"] == 20
    assert all(len(r["pieces"]) == 90 and r["left"] == len(ids) + 1 - 90 and r["length"] == len(ids) + 1 for r in shown["rows"])
    assert len(shown["prompt"]) < 6100 and len(found.source) < 200_000
    assert "2 of 3 dumped steps" in "".join(found.text) and "2 of 3 groups" in views[0]["words"]


def test_a_hundred_thousand_lines_are_thinned_and_no_spike_is_lost(tmp_path):
    path = make_run(tmp_path / "long", [])
    spike = 76_543
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {s}, "loss": {900.0 if s == spike else 1 + s % 7}, "accuracy": {s / 1e5}}}\n'
                        for s in range(1, 100_001))
    started = time.perf_counter()
    found = read(path)
    assert time.perf_counter() - started < 8 and len(found.source) < 200_000
    assert len(found.curves["loss"]) == len(found.curves["accuracy"]) == 200
    for n, (step, value) in enumerate(found.curves["accuracy"]):
        assert step == 500 * n + 250.5 and math.isclose(value, step / 1e5, rel_tol=1e-4)
    thin = folders.thinned(folders.load(path).curves["loss"])
    assert max(thin.high) == 900 and thin.low[(spike - 1) // 500] == 1 and thin.stretch == 500
    assert abs(math.fsum(v * 500 for v in thin.values) - (900 - 1 - spike % 7 + sum(1 + s % 7 for s in range(1, 100_001)))) < 1e-3


# ------------------------------------------------------------------------------------------------------ broken folders
def broken(path, what):
    lines = '{"step": 1, "loss": 1.0}\n'
    if what == "no folder":
        return path.with_name("onlin")
    if what == "no run":
        return path.parent
    if what == "no departures":
        (path / "departures.yaml").unlink()
    if what == "bad yaml":
        (path / "run.yaml").write_text("recipe: [")
    if what == "no recipe":
        (path / "run.yaml").write_text("policy: {name: a}")
    if what == "a list":
        (path / "versions.json").write_text("[1]")
    if what == "no metrics":
        (path / "metrics.jsonl").unlink()
    if what == "empty metrics":
        (path / "metrics.jsonl").write_text("")
    if what == "bad line":
        (path / "metrics.jsonl").write_text(lines + "{oops\n" + lines)
    if what == "no step":
        (path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    if what == "text":
        (path / "metrics.jsonl").write_text('{"step": 1, "loss": "high"}\n')
    if what == "bad rollout":
        (path / "rollouts" / "step-00000001.jsonl").write_text('{"prompt": "x"}\n')
    if what == "torn rollout":
        (path / "rollouts" / "step-00000001.jsonl").write_text('{"prompt": "x", "respon')
    if what == "short trace":
        row = Response("a", [1, 2], [-1.0, -1.0], {"reward": 1.0}, meta={"trace": {"advantage": [1.0]}})
        (path / "rollouts" / "step-00000001.jsonl").write_text(json.dumps(Group("x", [row]).to_json()) + "\n")
    return path


@pytest.mark.parametrize("what, told", [
    ("no folder", "no run folder .*did you mean 'online'"), ("no run", "holds no run .*but these in it do: online"),
    ("no departures", "departures.yaml is missing"), ("bad yaml", "run.yaml cannot be read"), ("a list", "found list"),
    ("no recipe", "has no 'recipe'"),
    ("no metrics", "has logged no step"), ("empty metrics", "has logged no step"), ("bad line", r"metrics.jsonl:2 is not JSON"),
    ("no step", r"metrics.jsonl:1 should be an object with a number step"), ("text", "loss at step 1 .*'high'"),
    ("bad rollout", r"step-00000001.jsonl:1 is no group"), ("torn rollout", r"step-00000001.jsonl:1 is no group"),
    ("short trace", "2 tokens and 1 numbers of advantage")])
def test_what_is_broken_is_said_with_its_place(online, what, told):
    with pytest.raises(ValueError, match=told):
        page.render([folders.load(broken(online, what))])


def test_a_run_that_is_still_written_can_be_read(online):
    with (online / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    (online / "timing.jsonl").unlink()
    (online / "rollouts" / ".step-00000010.jsonl.tmp").write_text("half")
    run = folders.load(online)
    assert run.step == 9 and run.speed == {} and max(folders.rollout_files(online)) == 9
    assert "tokens/s" not in read(online).curves


def test_dumps_of_several_processes_are_one_step(tmp_path, words):
    parts = {f"step-00000004-{r}of2.jsonl": [group(words, 2 * r + n, 4) for n in range(2)] for r in range(2)}
    run = make_run(tmp_path / "two", wave(4, loss=lambda t: t), settings=ONPOLICY, rollouts=parts)
    view, = samples.sample(folders.load(run))["views"]
    assert sorted(g["prompt"] for g in view["groups"]) == [f"question {n}" for n in range(4)] and view["of"] == 4
    assert view["groups"][0]["rows"][0]["text"] == TEXTS[0]   # no tokenizer at hand: the text alone
    assert "its tokenizer is not at hand" in "".join(read(run).text)


def test_values_that_are_not_finite_are_gaps_and_a_finding(tmp_path):
    lines = wave(9, loss=lambda t: t)
    lines[4]["loss"] = None
    run = make_run(tmp_path / "nan", lines)
    assert [s for s, _ in read(run).curves["loss"]] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [(f.level, f.topic) for f in checks.findings(folders.load(run))] == [("error", "not finite")]


# -------------------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("kind", ["bytes", "always", "first"])
def test_pieces_put_together_are_the_text(kind):
    made = fast(kind)
    decode = lambda ids: made.decode(ids, clean_up_tokenization_spaces=False)
    for text in (*TEXTS, "日本語 🎉🎉 naïve", "a  b   c\n\n", ""):
        ids = made(text, add_special_tokens=False)["input_ids"]
        pieces = folders.pieces(ids, decode)
        assert len(pieces) == len(ids) and "".join(pieces) == decode(tuple(ids))


def test_bytes_that_are_no_character_end_somewhere(words):
    lone = words.convert_tokens_to_ids("æ")                   # the first byte of three, over and over
    decode = lambda ids: words.decode(ids, clean_up_tokenization_spaces=False)
    pieces = folders.pieces([lone] * 9, decode)
    assert "".join(pieces) == decode([lone] * 9) and set(pieces[-1]) == {"\ufffd"}


# ------------------------------------------------------------------------------------------------------------ findings
def said(path, lines, **settings):
    return {f.topic for f in checks.findings(folders.load(make_run(path, lines, settings={**ONPOLICY, **settings})))}


def noisy(t, size=0.02):
    return size * math.sin(1000 * t)


HEALTHY = {"reward": lambda t: 0.3 + 0.5 * t + noisy(t), "length": lambda t: 100 + 5 * t, "groups/contrast": 0.8,
           "entropy": lambda t: 0.6 - 0.2 * t, "kl/ref": lambda t: 0.05 * t, "kl/old": 0.001, "gap/rollout": 1e-4,
           "clip/high": 0.05, "clip/low": 0.05, "ratio/effective": 0.95, "truncated": 0.02, "unscored": 0.0, "loss": 0.1,
           "grad_norm": lambda t: 0.5 + noisy(t, 0.2)}
SICK = {"contrast": {"groups/contrast": lambda t: 0.9 - 0.6 * t}, "entropy": {"entropy": lambda t: 0.6 * math.exp(-4 * t)},
        "KL": {"kl/ref": lambda t: 0.5 * t}, "sampler": {"gap/rollout": lambda t: 0.02 * t}, "clipping": {"clip/high": 0.25},
        "ratio": {"ratio/effective": lambda t: 1 - 0.7 * t}, "truncated": {"truncated": lambda t: 0.3 * t},
        "unscored": {"unscored": lambda t: 0.1 * (t == 0.5)}, "length": {"length": lambda t: 100 + 200 * t},
        "reward": {"reward": lambda t: 0.5 + noisy(t)}, "gradient": {"grad_norm": lambda t: 50.0 if t == 0.5 else 0.5},
        "not finite": {"loss": lambda t: None if t == 0.5 else 0.1}}


def test_a_healthy_run_warns_of_nothing(tmp_path):
    lines = wave(100, **HEALTHY) + [{"step": s, "eval/reward": 0.3 + s / 250, "eval/reward/std": 0.4} for s in range(10, 101, 10)]
    assert said(tmp_path / "run", lines, expect={"eval/reward": ">= 0.65"}) == set()


@pytest.mark.parametrize("topic", SICK)
def test_every_illness_is_found_and_no_other(tmp_path, topic):
    assert said(tmp_path / "run", wave(100, **{**HEALTHY, **SICK[topic]})) == {topic}


def test_gradients_of_zero_and_updates_that_go_far_are_found(tmp_path):
    lines = wave(100, **{**HEALTHY, "grad_norm": lambda t: 0.5 * (t != 0.5), "kl/old": lambda t: -0.1 * (t == 0.25)})
    run = folders.load(make_run(tmp_path / "run", lines, settings=ONPOLICY))
    texts = [f.text for f in checks.findings(run)]
    assert len(texts) == 2 and "0.1 nats per token from where it sampled (step 25)" in texts[0] and "0 at step 50" in texts[1]


@pytest.mark.parametrize("drop, found", [(0.02, False), (0.2, True)])
def test_overoptimisation_is_told_from_noise(tmp_path, drop, found):
    """Rewards of 100 held-out responses with a deviation of 0.4: two standard errors of a difference are 0.113."""
    lines = wave(100, **HEALTHY) + [{"step": s, "eval/reward": v, "eval/reward/std": 0.4}
                                    for s, v in ((25, 0.5), (50, 0.7), (75, 0.7 - drop / 2), (100, 0.7 - drop))]
    assert ("over-optimised" in said(tmp_path / "run", lines)) == found


@pytest.mark.parametrize("last, found", [(0.75, False), (0.6, True)])
def test_accuracies_wobble_by_chance(tmp_path, last, found):
    """Of 100 pairs, 80 right: two standard errors of a difference are 0.113."""
    lines = wave(100, loss=1.0, accuracy=lambda t: 0.6 + 0.3 * t)
    lines += [{"step": s, "eval/accuracy": v} for s, v in ((25, 0.7), (50, 0.8), (100, last))]
    run = folders.load(make_run(tmp_path / "run", lines, settings={"recipe": "dpo"}))
    assert bool(checks.findings(run)) == found


def test_overfitting_is_found_offline(tmp_path):
    lines = wave(100, loss=lambda t: 0.69 - 0.6 * t, accuracy=lambda t: 0.5 + t / 2, **{"shift/chosen": lambda t: -t,
                                                                                         "displaced": lambda t: 0.9 * t})
    lines += [{"step": s, "eval/loss": v} for s, v in ((25, 0.6), (50, 0.5), (75, 0.55), (100, 0.7))]
    run = folders.load(make_run(tmp_path / "run", lines, settings={"recipe": "dpo", "expect": {"eval/loss": "< 0.6",
                                                                                               "eval/margin": "> 0"}}))
    found = checks.findings(run)
    assert [f.topic for f in found] == ["expect", "expect", "over-optimised", "displaced"]
    assert "eval/loss is 0.7 at step 100, expected < 0.6" in found[0].text and "never measured" in found[1].text
    assert "best at step 50 (0.5)" in found[2].text


def test_start_end_and_noise_by_hand():
    curve = Curve(list(range(10)), [0.0, 2.0, 1.0, 5, 5, 5, 5, 7.0, 9.0, 8.0], [])
    assert (checks.span(curve), checks.start(curve), checks.end(curve)) == (3, 1.0, 8.0)
    assert math.isclose(checks.noise(curve), math.sqrt((2 / 3 + 2 / 3) / 2), rel_tol=1e-12) and checks.moved(curve) == 7.0
    assert checks.moved(Curve(curve.steps, [0.0, 9.0] * 5, [])) == 0.0


# -------------------------------------------------------------------------------------------------------------- charts
def test_points_stand_where_their_numbers_are():
    svg = charts.chart([charts.Line("a", 0, Curve([0, 10], [0.0, 1.0], []))], label="a", share=True)
    found = Page(svg)
    points = next(v for k, v in found.attributes if k == "points")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    frame = [float(v) for v in dict(found.attributes)["data-frame"].split()]
    assert [x0, x1] == frame[:2] and y0 == frame[3] and frame[2] < y1 < y0 and ("aria-label", "a") in found.attributes


def test_one_point_and_equal_values_and_logarithms_are_drawn():
    assert "NaN" not in charts.chart([charts.Line("a", 0, Curve([5], [0.0], []))], label="a")
    svg = charts.chart([charts.Line("a", 0, Curve([1, 2, 3, 4], [0.0, 1e-4, 1e-2, 1.0], []))], label="a", log=True)
    ys = [float(p.split(",")[1]) for p in next(v for k, v in Page(svg).attributes if k == "points").split()]
    assert len(ys) == 3 and abs((ys[0] - ys[1]) - (ys[1] - ys[2])) < 0.25           # written to a tenth
    assert charts.logarithmic([1e-4, 1e-2, 1.0]) and not charts.logarithmic([-1.0, 1.0]) and not charts.logarithmic([1.0, 50.0])
    assert charts.ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]


# ------------------------------------------------------------------------------------------------------------ terminal
def print_out(folder, **settings):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    terminal.show(console, folder, **settings)
    return console.file.getvalue()


def test_the_terminal_shows_the_best_and_the_worst_of_the_last_step(online):
    text = print_out(online, count=2)
    assert "grpo, step 9: 10 groups, 40 responses" in text and "8 groups between" in text
    assert text.index("question 9") < text.index("question 0") and "question 5" not in text
    assert "[truncated]" in text and "[no reward]" in text and "format 0.25" in text and "\x1b" not in text
    reward = measured(folders.rollouts([online / "rollouts" / "step-00000009.jsonl"]))["reward"]
    assert TEXTS[0] in text and f"reward {reward:.4g}" in text and text.count("mean reward") == 2


def test_the_terminal_takes_steps_orders_and_searches(online):
    assert "step 3:" in print_out(online, step=3)
    assert print_out(online, search="question 4", count=9).count("mean reward") == 1
    assert "no group of this step holds 'xyzzy'" in print_out(online, search="xyzzy")
    contrast = print_out(online, sort="contrast", count=1)
    assert "question" in contrast and contrast.count("spread") == 1
    for settings, told in (({"step": 99}, "nearest are 7, 8, 9"), ({"sort": "rewrad"}, "did you mean 'reward'"),
                           ({"colour": "advantages"}, "did you mean 'advantage'")):
        with pytest.raises(ValueError, match=told):
            print_out(online, **settings)


def test_the_terminal_colours_tokens_by_sign_and_shows_no_control_characters(tmp_path, words):
    rows = [group(words, 0, 1, (1.0, 0.0)).responses[k] for k in range(2)] + [Response(HOSTILE, scores={"reward": 0.2})]
    dump = {"step-00000002.jsonl": [Group(HOSTILE, rows)]}
    run = make_run(tmp_path / "run", wave(2, loss=1.0), settings=ONPOLICY, rollouts=dump, words=words)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor", highlight=False)
    terminal.show(console, run)
    text = console.file.getvalue()
    assert "48;2;40;110;210m" in text and "48;2;205;95;15m" in text                     # 0.5 and -0.5, the largest of the group
    assert "\x1b[2J" not in text and text.count("\u241b[2J") == 2
    assert "48;2" not in print_out(run) and "<b>bold</b>" in print_out(run)


def test_runs_without_rollouts_say_so(offline):
    with pytest.raises(ValueError, match="holds no rollouts"):
        print_out(offline)


# -------------------------------------------------------------------------------------------------------- command line
def test_the_commands(online, offline, monkeypatch):
    invoke = lambda *words: CliRunner().invoke(cli.app, [str(w) for w in words], env={"COLUMNS": "150"})
    done = invoke("report", online)
    assert done.exit_code == 0 and "report.html" in done.output and "grpo: online" in (online / "report.html").read_text()
    monkeypatch.chdir(online.parent)
    assert invoke("report", online, offline, "--steps", 2, "--groups", 1).exit_code == 0
    data = Page((online.parent / "report.html").read_text()).rollouts()
    assert [len(v["groups"]) for v in data["runs"][0]["views"][:2]] == [1, 1]
    assert invoke("report", online, "-o", online / "new" / "page.html").exit_code == 0 and (online / "new" / "page.html").exists()
    shown = invoke("rollouts", online, "--show", 1, "--step", 2)
    assert shown.exit_code == 0 and "step 2:" in shown.output
    assert invoke("report", online.parent / "nothing").exit_code == 2
    assert invoke("rollouts", offline).exit_code == 2


def test_watching_shows_each_new_step_once(online, monkeypatch):
    shown, rounds = [], iter([lambda: None, lambda: (online / "rollouts" / "step-00000010.jsonl").write_text(
        (online / "rollouts" / "step-00000009.jsonl").read_text()), lambda: None])

    def sleep(_):
        act = next(rounds, None)
        if act is None:
            raise KeyboardInterrupt
        act()

    show = terminal.show
    monkeypatch.setattr(terminal, "show", lambda *a, **k: shown.append(show(*a, **k)) or shown[-1])
    monkeypatch.setattr(time, "sleep", sleep)
    done = CliRunner().invoke(cli.app, ["rollouts", str(online), "--watch"])
    assert done.exit_code == 130 and shown == [9, 10]
