"""Reading and writing raw records: every ending, damaged files, places, atomic writes, folders and the hub."""
import csv
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import files
from data_tools.fields import DataError
from data_tools.files import resolve, write
from data_tools.formats import load

ROWS = [{"prompt": f"prompt {n}\n\"é\" ,☃", "chosen": f"a{n}", "rejected": f"b\n{n}"} for n in range(5)]


def read(source, **settings):
    return [record for s in resolve(source, **settings) for _, record in s.records()]


def places(source):
    return [place for s in resolve(source) for place, _ in s.records()]


def save(path, ending, rows=ROWS):
    """The rows in a file of this ending, written by other means than data_tools."""
    if ending == ".jsonl":
        data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    elif ending == ".json":
        data = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    elif ending == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        data = Path(path).read_bytes()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
        data = Path(path).read_bytes()
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", files.KINDS)
def test_every_ending_reads_the_same_records_and_says_where(tmp_path, ending, zipped):
    path = save(tmp_path / f"rows{ending}{zipped}", ending)
    assert read(path) == ROWS
    lines = {".jsonl": [1, 2, 3, 4, 5], ".json": [2, 7, 12, 17, 22],                # indent=1: five lines a record
             ".csv": [2, 5, 8, 11, 14],                                            # header, then three lines a record
             ".parquet": [1, 2, 3, 4, 5]}[ending]
    assert places(path) == [f"{path}:{n}" for n in lines]


# ----------------------------------------------------------------------------------------------------------------- json
@pytest.mark.parametrize("layout", [
    lambda rows: json.dumps(rows), lambda rows: json.dumps(rows, indent=4), lambda rows: "\ufeff" + json.dumps(rows),
    lambda rows: "\n".join(map(json.dumps, rows)), lambda rows: "\n\n".join(json.dumps(r, indent=2) for r in rows)])
@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 1 << 20])
def test_json_in_chunks_equals_json_at_once(tmp_path, layout, chunk):
    rows = [*ROWS, {"n": [1.5e-3, True, None, {"deep": "\\\"]"}], "surrogate": "\ud83d"}, {}]
    path = tmp_path / "rows.json"
    path.write_text(layout(rows), encoding="utf-8")
    assert [record for _, record in files._json(str(path), chunk)] == rows


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
@pytest.mark.parametrize("end", [1, 30, 60, -1])
def test_a_json_list_cut_short_is_an_error(tmp_path, chunk, end):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": "x" * 10, "b": n} for n in range(4)])[:end])
    with pytest.raises(DataError, match=r"rows.json:1: malformed json: .*(ends before|near)"):
        list(files._json(str(path), chunk))


def test_malformed_json_is_found_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": 1},\n{"a" 2},\n' + '{"a": 3},\n' * 1000 + "]")
    found = files._json(str(path), 64)
    assert next(found) == (f"{path}:2", {"a": 1})
    with pytest.raises(DataError, match=r"rows.json:3: malformed json: Expecting ':' delimiter"):
        next(found)


def test_what_is_no_object_is_an_error_that_lets_reading_go_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[1, 2]\n\n   \n{"a": 2}\n"text"\n')
    found = read(tmp_path / "rows.jsonl")
    assert [found[0], found[2]] == [{"a": 1}, {"a": 2}]
    assert str(found[1]) == f"{tmp_path / 'rows.jsonl'}:2: a record should be an object, found [1, 2] (list)"
    assert found[3].place.endswith(":6")
    (tmp_path / "rows.json").write_text('[{}, "text", {"a": 1}]')
    assert [type(found) for found in read(tmp_path / "rows.json")] == [dict, DataError, dict]
    (tmp_path / "rows.json").write_text("[[{}]]")
    assert "should be an object, found [{}] (list)" in str(read(tmp_path / "rows.json")[0])


def test_malformed_jsonl_names_the_line_and_shows_the_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 1,, "b": 2}\n{"a": 3}\n')
    one, wrong, three = read(tmp_path / "rows.jsonl")
    assert (one, three) == ({"a": 1}, {"a": 3})
    assert wrong.place.endswith("rows.jsonl:2") and '{"a": 1,, "b": 2}' in wrong.message


# ---------------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_text_that_is_not_utf8_names_line_and_byte(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"prompt\n" * (name == "rows.csv") + b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    before = len(b"prompt\n") * (name == "rows.csv") + len(b'{"prompt": "a"}\n')
    line = 3 if name == "rows.csv" else 2
    with pytest.raises(DataError) as caught:
        for record in read(path):
            if isinstance(record, DataError):
                raise record
    assert caught.value.place == f"{path}:{line}" and caught.value.problem == "not utf-8"
    assert f"byte 16 of the line (byte {before + 16} of the file) is 0xe9" in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    for ending in (".jsonl", ".json", ".csv"):
        path = Path(save(tmp_path / f"rows{ending}", ending))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == ROWS


@pytest.mark.parametrize("ending", files.KINDS)
def test_a_damaged_archive_names_the_file(tmp_path, ending):
    path = save(tmp_path / f"rows{ending}.gz", ending)
    raw = Path(path).read_bytes()
    for data in (raw[:len(raw) // 2], b"not gzip at all"):
        Path(path).write_bytes(data)
        with pytest.raises(DataError, match="gzip archive is damaged") as caught:
            read(path)
        assert caught.value.place == path


def test_a_file_that_is_not_parquet_says_so(tmp_path):
    (tmp_path / "rows.parquet").write_text("not parquet, but long enough to hold a footer")
    with pytest.raises(DataError, match="not a parquet file"):
        read(tmp_path / "rows.parquet")


# ------------------------------------------------------------------------------------------------------------------ csv
def test_csv_rows_of_the_wrong_width_are_errors(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3\n4,5,6\n7,8\n")
    first, short, long, last = read(tmp_path / "rows.csv")
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "7", "b": "8"})
    assert short.place.endswith(":3") and long.place.endswith(":4") and "2 cells of the header" in long.message


@pytest.mark.parametrize("text, message", [("a,a\n1,2\n", "names a column twice"), ('a,b\n1,"2"x\n', "malformed csv")])
def test_malformed_csv(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv")


def test_csv_cells_may_be_large(tmp_path):
    path = save(tmp_path / "rows.csv", ".csv", [{"prompt": "x" * 300_000}])
    assert len(read(path)[0]["prompt"]) == 300_000


# -------------------------------------------------------------------------------------------------------------- sources
def test_globs_lists_and_folders(tmp_path):
    for name in ("b.jsonl", "a.json", "notes.txt"):
        save(tmp_path / name, ".json" if name == "a.json" else ".jsonl")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")
    assert [s.name for s in resolve(tmp_path)] == [a, b] == [s.name for s in resolve(str(tmp_path / "*.js*"))]
    assert [s.name for s in resolve([b, tmp_path / "a.json"])] == [b, a]


def test_split_picks_the_files_of_a_folder_by_a_word_in_the_name(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl", "trained.jsonl"):
        save(tmp_path / name, ".jsonl")
    assert [Path(s.name).name for s in resolve(tmp_path, split="train")] == ["train-00000.jsonl", "train-00001.jsonl"]
    with pytest.raises(FileNotFoundError, match="no file has 'dev' in its name; files: .*test.jsonl"):
        resolve(tmp_path, split="dev")


@pytest.mark.parametrize("source, error, message", [
    ("trian.jsonl", FileNotFoundError, "does not exist, did you mean 'train.jsonl'"),
    ("*.csv", FileNotFoundError, "does not exist"),
    ("notes.text", ValueError, "unknown file ending. Known: .jsonl, .json, .csv, .parquet"),
    ("empty", FileNotFoundError, "no file ends in")])
def test_sources_that_cannot_be_found(tmp_path, source, error, message):
    save(tmp_path / "train.jsonl", ".jsonl")
    (tmp_path / "notes.text").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        load(tmp_path / source)


def test_split_of_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is a file: leave it out"):
        load(save(tmp_path / "rows.jsonl", ".jsonl"), split="train")


# ------------------------------------------------------------------------------------------------------------------ hub
@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset replaced; records the calls."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, name=None, *, split=None, streaming=False):
        calls.append((path, name, split, streaming))
        if path == "owner/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/none' doesn't exist on the Hub")
        data = datasets.Dataset.from_list(ROWS)
        data = data.to_iterable_dataset() if streaming else data
        if split:
            return data
        return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(
            {"train": data, **({} if path == "owner/one" else {"test": data})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_ids_configurations_and_splits(hub):
    assert [g.meta["place"] for g in load("hub:owner/name", split="train", limit=2)] == [
        "owner/name[train]:1", "owner/name[train]:2"]
    assert len(list(load("owner/name/main", split="test", streaming=True))) == 5
    assert len(list(load("owner/one"))) == 5
    assert hub == [("owner/name", None, "train", False), ("owner/name", "main", "test", True),
                   ("owner/one", None, None, False)]


def test_hub_needs_a_split_where_there_are_several(hub):
    for streaming in (False, True):
        with pytest.raises(ValueError, match="owner/name has the splits train, test: name one"):
            load("owner/name", streaming=streaming)


def test_what_is_neither_file_nor_hub_says_both(hub):
    with pytest.raises(FileNotFoundError, match="no such file or folder here, and as a hub data set .*doesn't exist"):
        load("owner/none", split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder_through_datasets(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "train.jsonl", ".jsonl")
    found = load(f"hub:{tmp_path / 'data'}", split="train", streaming=streaming)
    assert [g.responses[0].text for g in found] == ["a0", "a1", "a2", "a3", "a4"] == [
        g.responses[0].text for g in found]                   # a second pass starts anew


def test_data_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == ROWS and len(read(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match="has the splits train, test"):
        resolve(tmp_path / "two")


# -------------------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_written_records_are_read_back(tmp_path, name):
    rows = [{"a": f"é☃{n}", "b": [n, 2.5], "c": {"role": "x"}} for n in range(2500)]         # more than two batches
    assert write(iter(rows), tmp_path / "new" / name) == 2500
    assert read(tmp_path / "new" / name) == rows
    assert os.listdir(tmp_path / "new") == [name]


def test_jsonl_is_plain_utf8_and_archives_are_reproducible(tmp_path):
    write([{"a": "é"}, {"a": "\ud83d"}], tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == '{"a": "é"}\n{"a": "\\ud83d"}\n'.encode()
    assert read(tmp_path / "a.jsonl") == [{"a": "é"}, {"a": "\ud83d"}]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write(ROWS, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_parquet_columns_that_come_late_or_change_from_whole_to_broken_numbers(tmp_path):
    rows = [{"a": 1}] * 1500 + [{"a": 2.5, "late": "x"}]
    write(rows, tmp_path / "out.parquet")
    assert read(tmp_path / "out.parquet") == rows
    with pytest.raises(DataError, match="do not fit common parquet columns .*write .jsonl"):
        write([{"a": "text"}, {"a": [{"role": "user"}]}], tmp_path / "other.parquet")
    assert write([], tmp_path / "none.parquet") == 0 and read(tmp_path / "none.parquet") == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name):
    write([{"a": "old"}], tmp_path / name)

    def broken():
        yield from ({"a": "new"} for _ in range(3000))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(broken(), tmp_path / name)
    assert read(tmp_path / name) == [{"a": "old"}] and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_json_cannot_hold_names_the_record(tmp_path, value):
    with pytest.raises(DataError, match="record 2 cannot be written as JSON"):
        write([{"a": 1}, {"a": value}], tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.parquet.gz", "out"])
def test_endings_that_are_not_written(tmp_path, name):
    with pytest.raises(ValueError, match="known: .jsonl, .jsonl.gz, .parquet"):
        write(ROWS, tmp_path / name)


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_reading_holds_one_piece_at_a_time(tmp_path, name):
    import tracemalloc
    rng, path = random.Random(0), tmp_path / name
    rows = ({"prompt": rng.randbytes(4000).hex(), "chosen": "a", "rejected": "b"} for _ in range(1500))
    with open(path, "w") as stream:                           # 12 MB
        stream.writelines(itertools.chain("[" * (name == "rows.json"), [json.dumps(next(rows))],
                                          (("," if name == "rows.json" else "\n") + json.dumps(r) for r in rows),
                                          "]" * (name == "rows.json")))
    tracemalloc.start()
    assert sum(1 for _ in load(path)) == 1500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7e6                                         # the json reader's piece of 1 MiB, a few times over


def test_the_data_layer_imports_no_heavy_library():
    code = ("import sys, data_tools, data_tools.formats, data_tools.labels, data_tools.validate, data_tools.describe\n"
            "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'pyarrow', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"
