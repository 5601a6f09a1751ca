"""Files of rows against datasets.load_dataset on the same files, and the places of rows against a count by hand."""

import csv
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import Table, parquet

from qsvd.data.read import read_pair, read_rows
from qsvd.data.row_files import read_file

ROWS = [
    {"prompt": "Ein Käse?\u2028Ja\x85.", "completion": 'He said "no",\nand left.'},
    {"prompt": "  spaces  ", "completion": ""},
    {"prompt": "🙂", "completion": "\ttab"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_as(folder, suffix, rows):
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path)
        return path
    if suffix == ".csv":
        return write_csv(path, rows)
    text = json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return write(path, text)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_are_those_of_the_datasets_library(tmp_path, suffix):
    path = write_as(tmp_path, suffix, ROWS)
    builder = "json" if suffix == ".jsonl" else suffix[1:]
    options = {"keep_default_na": False} if suffix == ".csv" else {}  # its CSV reader takes "" for a missing number
    theirs = datasets.load_dataset(builder, data_files=str(path), cache_dir=str(tmp_path / "cache"), **options)
    assert read_rows(path).rows == theirs["train"].to_list() == ROWS


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(st.lists(st.fixed_dictionaries({"text": TEXTS, "more": TEXTS}), min_size=1, max_size=8))
def test_whatever_a_library_writes_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("drawn")
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        assert read_file(write_as(folder, suffix, rows)).rows == rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_counted_as_an_editor_counts_them(tmp_path, end):
    path = write(tmp_path / "a.jsonl", end.join(["\ufeff" + LINES[0], "", "   ", LINES[1], LINES[2], ""]))
    rows = read_rows(str(path))
    assert [rows.places.where(index) for index in range(3)] == [f"{path}, line 1", f"{path}, line 4", f"{path}, line 5"]
    assert rows.rows == ROWS
    table = end.join(["\ufeffa,b", '1,"two', 'lines"', "", "2,x", ""])
    rows = read_rows(write(tmp_path / "a.csv", table))
    assert [rows.places.short(index) for index in range(2)] == ["line 2", "line 5"]
    assert rows.rows == [{"a": "1", "b": f"two{end}lines"}, {"a": "2", "b": "x"}]


def test_items_and_rows_are_counted_from_1(tmp_path):
    assert read_rows(write_as(tmp_path, ".json", ROWS)).places.short(2) == "item 3"
    assert read_rows(write_as(tmp_path, ".parquet", ROWS)).places.short(2) == "row 3"


def test_a_json_file_may_hold_an_object_per_line(tmp_path):
    rows = read_rows(write(tmp_path / "a.json", "\n".join(LINES)))
    assert (rows.rows, rows.places.short(2)) == (ROWS, "line 3")


def test_a_text_file_is_one_document(tmp_path):
    path = write(tmp_path / "Story.TXT", "\ufeffOne.\r\n\n two \n")
    assert read_rows(path).rows == [{"text": "One.\r\n\n two \n"}]
    assert read_rows(path).places.where(0) == str(path)


def test_a_cell_may_be_longer_than_python_allows_at_first(tmp_path):
    before = csv.field_size_limit()
    assert read_rows(write(tmp_path / "a.csv", "text\n" + "x" * 200_000)).rows == [{"text": "x" * 200_000}]
    assert csv.field_size_limit() == before == 131072


def refused(sentence):
    return pytest.raises(ValueError, match=sentence)


def test_all_broken_lines_are_counted_and_the_first_five_shown(tmp_path):
    lines = [LINES[0], "{", "[1]", b'{"a": "\xff"}', '{"a": "\\ud800"}', "7", "x", "", LINES[1]]
    raw = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    path = write(tmp_path / "a.jsonl", raw)
    with refused(
        r"a\.jsonl: 6 broken lines: line 2 \(not JSON: Expecting property name enclosed in double quotes at column 2"
        r"\), line 3 \(a JSON list, not an object with a value for each column\), "
        r"line 4 \(not UTF-8: byte 0xff at position 8\), "
        r"line 5 \(half of a surrogate pair, which is not a character\), line 6 \(a JSON int, .*\) and 1 more$"
    ):
        read_rows(path)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", DEEP, r"1 broken line: line 1 \(nested too deeply\)"),
        ("a.json", DEEP, r"a\.json is not a list of rows: it is nested too deeply"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json is not JSON: Expecting value at line 2, column 8"),
        ("a.json", '[{"a": "\\ud800"}, 3]', r"2 broken items: item 1 \(half of .*\), item 2 \(a JSON int, not"),
        ("a.json", '{"rows":\n []}', r"2 broken lines: line 1 \(.*; a \.json file holds a list of objects, \[\{"),
        ("a.json", b"[\xe9]", r"a\.json is not UTF-8: byte 0xe9 at position 2; save it as UTF-8"),
        ("a.txt", b"\xff\xfeh\0", r"a\.txt is not UTF-8: byte 0xff at position 1; save it as UTF-8"),
        ("a.csv", "a,a, \n1,2,3", r"the first line must name each column once, but .* repeated: 'a', ' '$"),
        ("a.csv", '"a"x,b\n', r"a\.csv has a broken header: ',' expected after '\"'"),
        (
            "a.csv",
            'a,b\n1\n"x"y,2\n1,2\n3,"4\n5\n',
            r"3 broken lines: line 2 \(1 cells under 2 column names\), line 3 ",
        ),
        ("a.csv", b"a,b\n1,2\n\xe9,3\n", r"1 broken line: line 3 \(not UTF-8: byte 0xe9 at position 1\)"),
        ("a.parquet", "PAR1", r"a\.parquet is not a Parquet file, or is truncated: "),
        (
            "a.xlsx",
            "",
            r"a\.xlsx has the suffix '\.xlsx'; known suffixes are \.jsonl, \.json, \.csv, \.parquet, \.txt$",
        ),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty: it has no row"),
        ("a.json", "[]", r"a\.json is empty: it has no row"),
        ("a.csv", "a,b\n", r"a\.csv is empty: it has no row"),
        ("a.txt", " \n", r"a\.txt is empty: it has no row"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name_and_place(tmp_path, name, text, sentence):
    with refused(sentence):
        read_file(write(tmp_path / name, text))


def test_an_open_quote_is_charged_to_the_line_where_its_row_begins(tmp_path):
    with refused(r"1 broken line: line 3 \(unexpected end of data\)"):
        read_rows(write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n'))


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    return tmp_path


def test_a_folder_has_a_file_for_each_split(folder):
    train, valid = read_pair(folder)
    assert (train.rows, valid.rows) == ([{"text": "train"}], [{"text": "dev"}])
    assert read_rows(folder, split="test").rows == [{"text": "test"}]
    assert read_rows(folder, split="validation").rows == [{"text": "dev"}]
    write(folder / "valid.txt", "best")
    assert read_pair(folder)[1].rows == [{"text": "best"}]


def test_a_file_has_no_second_split(folder):
    assert read_pair(folder / "train.jsonl")[1] is None
    (folder / "dev.jsonl").unlink()
    assert read_pair(folder)[1].rows == [{"text": "test"}]
    with refused(r"train\.jsonl is one file and has no split 'dev'; leave the split out, or give the folder"):
        read_rows(folder / "train.jsonl", split="dev")


def test_a_folder_without_the_split_or_with_two_files_for_it_is_refused(folder):
    with refused(r"has no file extra with a suffix of \.jsonl.*; in it: dev\.jsonl, test\.jsonl, train\.jsonl"):
        read_rows(folder, split="extra")
    write(folder / "train.csv", "text\nx")
    with refused(r"several files for one split, train\.jsonl, train\.csv: keep one"):
        read_rows(folder)
    (folder / "empty").mkdir()
    with refused(r"has no file train with a suffix of .*; in it: nothing"):
        read_pair(folder / "empty")


@pytest.mark.parametrize("source", ["./absent", "~/absent", "/absent", "a/b/c", "a\\b", "absent.csv", "b/absent.JSONL"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(source):
    with refused(r"^no such file or folder: "):
        read_rows(source)


def test_a_name_that_is_neither_is_refused():
    with refused(r"no file or folder 'my data' here, and a hub id looks like 'owner/name' or 'owner/name:config'"):
        read_rows("my data")


@pytest.fixture
def hub(monkeypatch):
    """The datasets library's one loading function, replaced by what it returns or by its errors."""
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation", "test", "extra")}
    empty = datasets.Dataset.from_dict({"text": []})
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if name == "owner/several":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'other']")
        if name == "owner/absent":
            raise ConnectionError("Couldn't reach 'owner/absent' on the Hub (OfflineModeIsEnabled)")
        return datasets.DatasetDict({"train": empty} if name == "owner/empty" else splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_id_gives_its_splits(hub):
    train, valid = read_pair("owner/name:main")
    assert (train.rows, valid.rows) == ([{"text": "train"}], [{"text": "validation"}])
    assert train.places.where(0) == "owner/name:main (train), row 1"
    assert read_rows("owner/name", split="dev").rows == [{"text": "validation"}]
    assert set(hub) == {("owner/name", "main"), ("owner/name", None)}


def test_what_the_hub_does_not_have_is_said(hub):
    with refused(r"'owner/name' on the hub has no split part; it has extra, test, train, validation"):
        read_rows("owner/name", split="part")
    with refused(r"the split 'train' of 'owner/empty' on the hub is empty"):
        read_rows("owner/empty")
    with refused(r"has several configurations; choose owner/several:CONFIG of \['main', 'other'\]"):
        read_rows("owner/several")
    with refused(r"no file or folder 'owner/absent' here, and no data set of that name on the hub: Couldn't reach"):
        read_rows("owner/absent")
    assert hub
