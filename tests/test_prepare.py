import errno
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tokenizers import Letters, fast
from test_collate import same

from data_tools.collate import pad
from data_tools.encoding import Encoding, encode
from data_tools.prepare import Prepared, prepare, tokenizer_fingerprint
from data_tools.records import Group, Response

ROOT = Path(__file__).parents[1]


def words(rng: random.Random, most: int) -> str:
    return "".join(rng.choice("abcdef ") for _ in range(rng.randint(0, most)))


def response(rng: random.Random) -> Response:
    meta = {"degree": rng.randrange(3)} if rng.random() < 0.3 else {}
    if rng.random() < 0.3:
        size = rng.randint(1, 6)
        mask = {"mask": [1, *(rng.randrange(2) for _ in range(size - 1))]} if rng.random() < 0.5 else {}
        tokens, logp = [rng.randrange(9, 99) for _ in range(size)], [-rng.random() for _ in range(size)]
        return Response("", tokens=tokens, logp=logp, meta={**meta, **mask})
    return Response(words(rng, 8), prompt=words(rng, 5) if rng.random() < 0.3 else None, train=rng.random() < 0.8,
                    scores={"reward": rng.random()} if rng.random() < 0.3 else {}, meta=meta)


def mixed(n: int, seed: int = 0) -> list[Group]:
    """Ragged groups with everything a group can have, each only now and then."""
    rng, groups = random.Random(seed), []
    for i in range(n):
        size = rng.randint(1, 4)
        groups.append(Group(words(rng, 9), [response(rng) for _ in range(size)], weight=rng.choice([1.0, 1.0, 0.5]),
                            meta={"place": f"f.jsonl:{i + 1}"}))
        if rng.random() < 0.5:
            groups[-1].relevance = [rng.choice([None, 0, 1, 2]) for _ in range(size)]
        if rng.random() < 0.2:
            groups[-1].wins = [[rng.choice([None, rng.random()]) for _ in range(size)] for _ in range(size)]
    return groups


def pairs(n: int, prefix: str = "p") -> list[Group]:
    return [Group(f"{prefix}{i}", [Response(f"good {i}"), Response("bad")], [1, 0]) for i in range(n)]


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same_but_neutral(stored, made) -> None:
    """Equal, but for columns that a store has in every batch and `pad` only where a row says something."""
    extra = set(stored) - set(made)
    assert extra <= {"degree", "reward", "logp_rollout"}
    for name in extra:
        values = stored[name][stored["mask"]] if stored[name].ndim == 2 else stored[name]
        assert (values == -1).all() if name == "degree" else values.isnan().all()
    same({name: stored[name] for name in made}, {name: made[name] for name in made})


# ------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_random_access_is_sequential_collation(tmp_path, size):
    """Whatever is stored comes back bit by bit, also where an optional array begins in the middle (size 1)."""
    groups = mixed(60)
    encoded = encode(groups, Letters())
    prepared = prepare(groups, Letters(), tmp_path / "data", batch=size)
    assert len(prepared) == len(encoded) == 60
    assert {"mask", "train", "relevance", "wins", "weight"} <= set(prepared.arrays)
    assert {"degree", "reward", "logp_rollout"} == set(prepared.columns)
    same(prepared.batch(range(60)), pad(encoded))
    rng = random.Random(1)
    for _ in range(20):
        chosen = [rng.randrange(60) for _ in range(rng.randint(1, 6))]
        same_but_neutral(prepared.batch(chosen), pad([encoded[n] for n in chosen]))
    same_but_neutral(prepared.batch([5, 3], side="left"), pad([encoded[5], encoded[3]], side="left"))
    assert [g.place for g in prepared] == [f"f.jsonl:{n}" for n in range(1, 61)]


@pytest.mark.parametrize("late", [
    Group("p", [Response("a"), Response("b")], wins=[[0.5, 0.75], [0.25, None]]),
    Group("p", [Response("a"), Response("b")], [1, None]),
    Group("p", [Response("a"), Response("b")], weight=0.5),
    Group("p", [Response("a"), Response("b", train=False)]),
    Group("p", [Response("a", meta={"degree": 1, "rationale": True, "contrast": -1.0}), Response("b")]),
    Group("p", [Response("", tokens=[3, 4, 5], logp=[-1.0, -2.0, -3.0], meta={"mask": [1, 0, 1]}), Response("b")]),
], ids=["wins", "relevance", "weight", "train", "meta", "tokens"])
def test_an_optional_array_may_begin_late(tmp_path, late):
    bare = Group("q", [Response("c"), Response("d"), Response("ee")])
    groups = [bare, bare, late, bare]
    prepared = prepare(groups, Letters(), tmp_path / "data", batch=1)
    same(prepared.batch(range(4)), pad(encode(groups, Letters())))
    same(prepared.batch([3, 2]), pad(encode([bare, late], Letters())))


def test_plain_pairs_are_stored_without_the_optional_arrays(tmp_path):
    prepared = prepare(pairs(10), fast(), tmp_path / "data")
    assert set(prepared.arrays) == {"group_prompt", "lengths", "place", "place_at", "prompt", "prompt_at", "relevance",
                                    "response", "response_at", "row_at", "row_prompt"}
    same(prepared.batch(torch.tensor([9, 0, 4])), pad(encode([pairs(10)[n] for n in (9, 0, 4)], fast())))
    assert left(tmp_path) == ["data"]


def test_lengths_and_counts(tmp_path):
    prepared = prepare(mixed(30), Letters(), tmp_path / "data")
    for n in range(30):
        assert prepared.lengths[n] == prepared.batch([n])["attend"].sum()
    assert prepared.counts.tokens == prepared.lengths.sum() and (prepared.counts.read, prepared.counts.kept) == (30, 30)
    with pytest.raises(IndexError, match="no group 30: .*data holds 30"):
        prepared[30]
    with pytest.raises(IndexError, match="no group -1"):
        prepared[-1]


def test_columns_asked_for(tmp_path):
    prepared = prepare(mixed(30), Letters(), tmp_path / "data")
    plain = next(n for n, g in enumerate(mixed(30)) if not any("degree" in r.meta for r in g.responses))
    assert (prepared.batch([plain], columns=["degree"])["degree"] == -1).all()
    with pytest.raises(KeyError, match="no row has the column 'degrees', did you mean 'degree'?"):
        prepared.batch([0], columns=["degrees"])


def test_dropped_and_cut_are_counted_and_reported(tmp_path):
    settings = Encoding(max_prompt=3, long_prompt="drop", max_response=4)
    with pytest.warns(UserWarning, match=r"20 groups read, 10 kept .* max_prompt=3: 10 \(first: group 11\)"):
        prepared = prepare(pairs(20), Letters(), tmp_path / "data", encoding=settings, batch=3)
    assert len(prepared) == 10 and prepared.counts.notes["responses cut to max_response=4"] == [10, "group 1"]
    with pytest.warns(UserWarning, match="20 groups read, 10 kept"):        # also when the folder is used again
        prepare(pairs(20), Letters(), tmp_path / "data", encoding=settings)
    with pytest.raises(ValueError, match="no group is left to prepare: 20 groups read, 0 kept"):
        prepare(pairs(20), Letters(), tmp_path / "none", encoding=Encoding(max_prompt=1, long_prompt="drop"))
    with pytest.raises(ValueError, match="no group is left to prepare: 0 groups read"):
        prepare([], Letters(), tmp_path / "none")
    assert left(tmp_path) == ["data"]


def test_progress(tmp_path):
    seen = []
    prepare(pairs(25), Letters(), tmp_path / "data", batch=10, progress=seen.append)
    assert seen == [10, 20, 25]


# -------------------------------------------------------------------------------------------------- several processes
def _read(prepared: Prepared) -> dict:
    return {name: value.numpy() for name, value in prepared.batch([3, 1, 2]).items()}


def test_pickles_as_a_path_and_works_in_other_processes(tmp_path):
    prepared = prepare(pairs(2000), fast(), tmp_path / "data")
    before = prepared.batch([3, 1, 2])                        # arrays are open
    raw = pickle.dumps(prepared)
    assert len(raw) < 500 and pickle.loads(raw) == prepared
    with get_context("fork").Pool(2) as pool:
        for found in pool.map(_read, [prepared] * 4):
            for name in before:
                np.testing.assert_array_equal(found[name], before[name])


# -------------------------------------------------------------------------------------------------------- interruption
def failing(error: BaseException, n: int):
    yield from pairs(n)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bad record"), MemoryError()])
@pytest.mark.parametrize("before", [False, True])
def test_interruption_leaves_nothing_new(tmp_path, error, before):
    if before:
        prepare(pairs(5, "old"), Letters(), tmp_path / "data")
    with pytest.raises(type(error)):
        prepare(failing(error, 25), Letters(), tmp_path / "data", batch=10)
    assert left(tmp_path) == (["data"] if before else [])
    if before:
        assert len(Prepared.open(tmp_path / "data")) == 5
    assert len(prepare(pairs(25), Letters(), tmp_path / "data", batch=10)) == 25
    assert left(tmp_path) == ["data"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            prepare(pairs(25), Letters(), tmp_path / "data")
    assert left(tmp_path) == []
    assert len(prepare(pairs(25), Letters(), tmp_path / "data")) == 25


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_writing(tmp_path, monkeypatch):
    def opened(path, *arguments, **settings):
        return open("/dev/full" if Path(path).name == "response.bin" else path, *arguments, **settings)

    monkeypatch.setattr("data_tools.prepare.open", opened, raising=False)
    with pytest.raises(OSError, match="No space left"):
        prepare(pairs(5000), Letters(), tmp_path / "data", batch=100)
    assert left(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------- reuse
def test_an_up_to_date_folder_is_used(tmp_path):
    first = prepare(pairs(10), Letters(), tmp_path / "data")
    inode = (tmp_path / "data").stat().st_ino
    tokenizer = Letters()
    assert prepare(pairs(10), tokenizer, tmp_path / "data").fingerprint == first.fingerprint
    assert tokenizer.seen == [] and (tmp_path / "data").stat().st_ino == inode
    moved = [Group(g.prompt, g.responses, g.relevance, meta={"place": "elsewhere"}) for g in pairs(10)]
    assert prepare(moved, tokenizer, tmp_path / "data") == first and tokenizer.seen == []       # the same content
    prepare((g for g in pairs(10)), tokenizer, tmp_path / "data")           # a generator is read once, so encoded
    assert tokenizer.seen and (tmp_path / "data").stat().st_ino != inode and left(tmp_path) == ["data"]


def test_a_key_stands_for_the_data(tmp_path):
    prepare(pairs(10), Letters(), tmp_path / "data", key="files abc")
    assert len(prepare(failing(RuntimeError("read"), 0), Letters(), tmp_path / "data", key="files abc")) == 10
    assert len(prepare(pairs(11), Letters(), tmp_path / "data", key="files abd")) == 11
    assert len(prepare(pairs(12), Letters(), tmp_path / "data")) == 12


def test_the_fingerprint_follows_the_data(tmp_path):
    def changed(**settings):
        groups = pairs(9)
        vars(groups[4]).update(settings)
        return groups

    def answered(**settings):
        groups = pairs(9)
        vars(groups[4].responses[1]).update(settings)
        return groups

    data = [pairs(10), pairs(9), pairs(9)[::-1], changed(prompt="q"), changed(relevance=[0, 1]), changed(weight=2.0),
            changed(wins=[[None, 1], [0, None]]), changed(meta={"tools": ["a"]}), changed(meta={"tools": ["b"]}),
            changed(meta={"tools": '["a"]'}), answered(text="baf"), answered(text="ba"), answered(train=False),
            answered(tokens=[5]), answered(tokens=[5], logp=[-1.0]), answered(tokens=[6]), answered(prompt="p"),
            answered(prompt="q"), answered(meta={"degree": 1}), answered(scores={"reward": 1.0})]
    marks = [prepare(groups, Letters(), tmp_path / "data").fingerprint for groups in data]
    assert len(set(marks)) == len(data)
    assert marks == [prepare(groups, Letters(), tmp_path / "other", batch=2).fingerprint for groups in data]


@pytest.mark.filterwarnings("ignore:1 groups read, 1 kept")
def test_the_fingerprint_follows_tokenizer_and_encoding(tmp_path):
    other = fast()
    other.add_tokens(["quick brown"])
    ended = fast()
    ended.eos_token = "<|im_end|>"
    tokenizers = [fast(), fast(bos=True), fast(template="{{ messages }}"), fast("always"), other, ended]
    encodings = [Encoding(max_response=5), Encoding(max_prompt=5), Encoding(add_eos=False), Encoding(system="s"),
                 Encoding(template_settings={"thinking": False})]
    data = [Group([{"role": "user", "content": "x"}], [Response("y")])]
    marks = [tokenizer_fingerprint(t) for t in tokenizers]
    assert len(set(marks)) == len(tokenizers) and tokenizer_fingerprint(fast()) == marks[0]
    found = [prepare(data, fast(), tmp_path / "data").fingerprint]
    for encoding in encodings:
        found.append(prepare(data, fast(), tmp_path / "data", encoding=encoding).fingerprint)
    assert len(set(found)) == len(found)
    assert prepare(data, fast(bos=True), tmp_path / "data").fingerprint not in found
    used = fast()
    used("x " * 9, truncation=True, max_length=3, padding="max_length")     # a state that calls leave behind
    assert tokenizer_fingerprint(used) == marks[0]


# -------------------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("harm, wrong", [
    (lambda f: (f / "meta.json").unlink(), "there is no meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_text("{}"), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_text('{"format": 0}'), "it has format 0, this version reads 1"),
    (lambda f: (f / "response.bin").unlink(), "response.bin should have 584 bytes, found no file"),
    (lambda f: os.truncate(f / "response.bin", 8), "response.bin should have 584 bytes, found 8"),
])
def test_a_damaged_folder_is_named_and_rebuilt(tmp_path, harm, wrong):
    folder = tmp_path / "data"
    # good 0$ has 7 tokens, good 10$ has 8, bad$ has 4: (10 * 7 + 3 * 8 + 13 * 4) * 4 bytes = 584
    whole = prepare(pairs(13), Letters(), folder).batch(range(13))
    harm(folder)
    with pytest.raises(ValueError, match=f"data is not a finished prepared data set: {wrong}.*Run prepare again"):
        Prepared.open(folder)
    same(prepare(pairs(13), Letters(), folder).batch(range(13)), whole)
    assert left(tmp_path) == ["data"]


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="it does not exist"):
        Prepared.open(tmp_path / "nothing")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"exists and is no prepared data set \(thesis.tex\): give the name of a new"):
        prepare(pairs(3), Letters(), tmp_path / "data")
    assert left(tmp_path / "data") == ["thesis.tex"]
    with pytest.raises(ValueError, match="it is a file"):
        prepare(pairs(3), Letters(), tmp_path / "data" / "thesis.tex")


# ---------------------------------------------------------------------------------------------------- attached columns
def reference(batch) -> torch.Tensor:
    """Some number for every token that depends on the row alone."""
    return batch["tokens"].double().cumsum(1) / 7


def test_attached_column_by_token(tmp_path):
    prepared = prepare(mixed(30), Letters(), tmp_path / "data")
    assert not prepared.has_column("logp_ref", "model a")
    order = random.Random(3).sample(range(30), 30)
    with prepared.column_writer("logp_ref", "model a") as write:
        for start in range(0, 30, 4):
            write(order[start:start + 4], reference(prepared.batch(order[start:start + 4])))
    attached = pickle.loads(pickle.dumps(prepared.with_column("logp_ref", "model a")))
    assert "logp_ref" not in prepared.batch([0]) and prepared.has_column("logp_ref", "model a")
    for chosen in ([7, 2, 29], [0], range(30)):
        batch = attached.batch(chosen, columns=("logp_ref",))
        answer = torch.arange(batch["tokens"].shape[1]) >= batch["prompt_length"][:, None]
        expected = reference(batch).float() * (answer & batch["attend"])
        torch.testing.assert_close(batch["logp_ref"], expected, rtol=0, atol=0)


def test_attached_column_by_row(tmp_path):
    prepared = prepare(mixed(30), Letters(), tmp_path / "data")
    with prepared.column_writer("mismatched", "m") as write:
        for n in range(29, -1, -1):
            write([n], prepared.batch([n])["tokens"].sum(1))
    batch = prepared.with_column("mismatched", "m").batch([4, 11, 3])
    torch.testing.assert_close(batch["mismatched"], batch["tokens"].sum(1).float())


def test_a_column_is_only_found_under_its_key(tmp_path):
    prepared = prepare(pairs(6), Letters(), tmp_path / "data")

    def write_all(key, value):
        with prepared.column_writer("logp_ref", key) as write:
            write(range(6), torch.full(prepared.batch(range(6))["tokens"].shape, value))

    write_all("model a", -1.0)
    with pytest.raises(KeyError, match="has no column 'logp_ref' made by 'model b': write it with column_writer"):
        prepared.with_column("logp_ref", "model b")
    write_all("model b", -2.0)
    one, two = prepared.with_column("logp_ref", "model a"), prepared.with_column("logp_ref", "model b")
    assert one.batch([0])["logp_ref"].min() == -1 and two.batch([0])["logp_ref"].min() == -2
    assert one.with_column("logp_ref", "model b").batch([0])["logp_ref"].min() == -2            # the last one counts
    assert len(prepare(pairs(6), Letters(), tmp_path / "data")) == 6 and prepared.has_column("logp_ref", "model a")
    prepare(pairs(7), Letters(), tmp_path / "data")           # other data: the columns are gone with the old
    assert not Prepared.open(tmp_path / "data").has_column("logp_ref", "model a")


def test_an_unfinished_column_does_not_exist(tmp_path):
    prepared = prepare(pairs(6), Letters(), tmp_path / "data")
    files = left(tmp_path / "data")
    message = "written for 2 of 6 groups, the first without it is group 1"
    with pytest.raises(ValueError, match=message), prepared.column_writer("logp_ref", "a") as write:
        write([0, 3], reference(prepared.batch([0, 3])))
    with pytest.raises(KeyboardInterrupt), prepared.column_writer("logp_ref", "a") as write:
        write(range(6), reference(prepared.batch(range(6))))
        raise KeyboardInterrupt
    assert not prepared.has_column("logp_ref", "a") and left(tmp_path / "data") == files
    for name, values, message in (("logp_ref", torch.zeros(2, 3), "found values of shape .2, 3. for a batch of 2 rows"),
                                  ("mismatched", torch.zeros(2, 3), "should be .N. of the batch of these groups"),
                                  ("wins", torch.zeros(2), r"'wins' is \(B K K\); only columns \(N\) and \(N T\)")):
        with pytest.raises(ValueError, match=message), prepared.column_writer(name, "a") as write:
            write([0], values)
    assert left(tmp_path / "data") == files


# -------------------------------------------------------------------------------------------------------------- memory
STREAM = """
    import json, sys, time
    import numpy as np
    from small_tokenizers import Letters, fast
    from cookbook.benchmarks.bench import peak_mb
    from data_tools.prepare import prepare
    from data_tools.records import Group, Response

    def stream(n):
        for i in range(n):
            responses = [Response(f" It is {i + 2}."), Response(" 5")]
            yield Group(f"Question {i}: what is {i} + 2?\\nAnswer:", responses, [1, 0],
                        meta={"place": f"train.jsonl:{i + 1}"})

    def run(n, tokenizer, folder, batch, read):
        start = time.process_time()
        prepared = prepare(stream(n), tokenizer, folder, batch=batch)
        made, tokens = time.process_time(), 0
        for some in np.random.default_rng(0).permutation(n).reshape(-1, read):
            tokens += int(prepared.batch(some)["attend"].sum())
        assert tokens == prepared.lengths.sum() == prepared.counts.tokens and len(prepared) == n
        print(json.dumps({"mb": peak_mb(), "prepare_cpu_s": made - start, "read_cpu_s": time.process_time() - made}))
"""


def streamed(script: str, folder: Path) -> list[dict]:
    """What the script prints, in a process of its own: peak memory only ever rises."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(STREAM) + script, str(folder)], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_memory_does_not_grow_with_the_data(tmp_path):
    """10,000 groups need what 1,000 need. Held at once, their Groups alone would be 9 MB more, encoded 27 MB."""
    small, large = streamed("""
tokenizer = Letters()
tokenizer.seen = type("Forgetful", (list,), {"__iadd__": lambda self, other: self})()
for n in (1_000, 10_000):
    run(n, tokenizer, f"{sys.argv[1]}/{n}", 100, 200)
""", tmp_path)
    assert large["mb"] - small["mb"] < 5


@pytest.mark.slow
def test_a_million_groups_in_less_than_2_gb(tmp_path):
    found, = streamed("run(1_000_000, fast(bos=True), sys.argv[1] + '/data', 1000, 50)", tmp_path)
    print(found)
    assert found["mb"] < 2048
