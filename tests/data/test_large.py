"""Large data: tokens on disk are those of data in memory, made once, and never trusted when they are damaged."""

import json
import os
import signal
import tracemalloc

import pytest
from datasets import config
from pyarrow import Table, parquet

from qsvd.commands.demo import MODEL
from qsvd.data import examples
from qsvd.data.examples import Home, open_tokenizer, read_run_data
from qsvd.data.large import blocks, cache
from qsvd.data.large.mapped import MappedTokens
from qsvd.data.read import read_rows
from qsvd.errors import BadInput
from qsvd.options import Train
from tests.runs import TEXTS, write_rows

PAIRS = [{"prompt": text[:25], "completion": text[25:]} for text in TEXTS]
CHATS = [{"messages": [{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:]}]} for t in TEXTS]
KINDS = {"text": [{"text": text} for text in TEXTS], "pair": PAIRS, "chat": CHATS}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every file is large, a block has a few rows, and tokens are kept here."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(blocks, "BLOCK", 500)
    monkeypatch.setattr(blocks, "LARGE", 0)
    return tmp_path / "cache" / "qsvd-tokens"


def read(data, **options):
    options = {"max_length": 40} | options
    return read_run_data(Train(str(MODEL), str(data), "RUN", **options), Home("m", MODEL, "LlamaForCausalLM"))


def in_memory(monkeypatch, data, **options):
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "LARGE", 10**9)
        return read(data, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_data_in_memory(tmp_path, monkeypatch, kind):
    data = write_rows(tmp_path / "rows.jsonl", KINDS[kind])
    template = {"chat_template": "zephyr"} if kind == "chat" else {}
    small, large = in_memory(monkeypatch, data, **template), read(data, **template)
    for one, other in ((small.train, large.train), (small.held_out, large.held_out)):
        assert isinstance(other.input_ids, MappedTokens)
        assert [*other.input_ids] == [*one.input_ids] == other.input_ids[:]
        assert [*other.labels] == [*one.labels]
        assert other.digest == one.digest, "a run goes on with either"
        for name in ("kind", "truncated", "dropped", "cut_tokens", "columns", "has_template", "num_tokens"):
            assert getattr(other, name) == getattr(one, name), name
        assert other.num_trained == one.num_trained
        assert [other.where(n) for n in range(len(one.input_ids))] == [one.where(n) for n in range(len(one.input_ids))]
    assert large.lengths == small.lengths
    assert large.dataset[:] == small.dataset[:]


def test_a_second_start_tokenizes_nothing_and_reads_one_block(tmp_path, monkeypatch, place):
    data, asked = write_rows(tmp_path / "rows.jsonl", PAIRS), []
    tokenize_part = cache.tokenize_part
    monkeypatch.setattr(cache, "tokenize_part", lambda *a, **k: asked.append(a) or tokenize_part(*a, **k))
    first = read(data)
    assert len(asked) > 2, "blocks"
    asked.clear()
    monkeypatch.setattr(blocks.RowBlocks, "columns", None)
    again = read(data, seed=1, held_out=0.2)
    assert asked == []
    assert {*map(tuple, again.train.input_ids)} < {*map(tuple, first.train.input_ids)} | {
        *map(tuple, first.held_out.input_ids)
    }
    monkeypatch.undo()
    assert sorted(path.name for folder in place.iterdir() for path in folder.iterdir()) == [
        "tokens.arrow",
        "tokens.json",
    ]


def test_whatever_decides_the_tokens_has_files_of_its_own(tmp_path, place):
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    read(data)
    for number, change in enumerate(({"max_length": 30}, {"loss_on": "all"}, {"map": ("prompt=text",)}), 2):
        read(data, **change)
        assert len([*place.iterdir()]) == number, change
    write_rows(tmp_path / "rows.jsonl", PAIRS[:-1])
    read(data)
    assert len([*place.iterdir()]) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "gone"])
def test_damaged_files_are_made_again_with_a_sentence(tmp_path, place, caplog, damage):
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    wanted = read(data).train.digest
    (folder,) = place.iterdir()
    path = folder / ("tokens.json" if damage == "record" else "tokens.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    caplog.clear()
    assert read(data).train.digest == wanted
    assert any("tokens.j" in line or "tokens.arrow" in line for line in caplog.messages)
    assert "the data are tokenized again" in caplog.text
    caplog.clear()
    read(data)
    assert caplog.messages == []


def test_a_start_that_is_killed_while_it_writes_leaves_nothing_that_is_read(tmp_path, monkeypatch, place):
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    tokenize_part, done = cache.tokenize_part, []

    def killed(*given, **named):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize_part(*given, **named)

    process = os.fork()
    if not process:
        monkeypatch.setattr(cache, "tokenize_part", killed)
        read(data)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    (folder,) = place.iterdir()
    assert (folder / "tokens.arrow.partial").exists()
    assert not (folder / "tokens.json").exists()
    assert read(data).train.digest == in_memory(monkeypatch, data).train.digest
    assert {path.name for path in folder.iterdir()} == {"tokens.arrow", "tokens.json"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_of_a_folder_are_read_in_order(tmp_path, suffix):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, rows in enumerate((PAIRS[:6], PAIRS[6:])):
        path = folder / f"train-{number:05}-of-00002{suffix}"
        if suffix == ".jsonl":
            write_rows(path, rows)
        else:
            parquet.write_table(Table.from_pylist(rows), path)
    whole = write_rows(tmp_path / "rows.jsonl", PAIRS)
    found = read(folder, held_out=0)
    assert [*found.train.input_ids] == [*read(whole, held_out=0).train.input_ids]
    unit = "line" if suffix == ".jsonl" else "row"
    assert found.train.where(7) == f"{folder}, train-00001-of-00002{suffix}, {unit} 2"
    assert read_rows(folder).rows == PAIRS


def test_two_files_and_two_kinds_of_shards_are_refused(tmp_path):
    for names in (("train.jsonl", "train-0.jsonl"), ("train-0.jsonl", "train-1.parquet")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}\n")
        with pytest.raises(BadInput, match=f"several files for one split, .*{names[1]}: keep one, or shards with one"):
            read_rows(folder)


def test_faults_of_any_block_are_found(tmp_path, place):
    data = tmp_path / "rows.jsonl"
    write_rows(data, [*PAIRS, {"prompt": 3, "completion": "x"}])
    with pytest.raises(BadInput, match=r"line 15 \(prompt is .*3"):
        read(data)
    data.write_text(f"{json.dumps(PAIRS[0])}\n" * 20 + "{broken\n")
    with pytest.raises(BadInput, match="1 broken line: line 21"):
        read(data)
    write_rows(data, PAIRS * 2)
    with pytest.raises(BadInput, match=r"no example has a trained token within max_length 2; the shortest has \d+"):
        read(data, max_length=2)
    write_rows(data, [{"prompt": "", "completion": text} for text in TEXTS])
    assert not any((folder / "tokens.json").exists() for folder in place.iterdir())


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "rows.jsonl")
    with pytest.raises(
        BadInput, match=r"cannot be made \(Not a directory\): set the environment variable HF_DATASETS_C"
    ):
        read(data)


def test_labelled_texts_stay_in_memory(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(TEXTS)])
    assert isinstance(read(data, task="classification").train.input_ids, list)
    assert isinstance(read(data, task="causal").train.input_ids, MappedTokens)


def test_the_memory_does_not_grow_with_the_tokens(tmp_path, monkeypatch):
    """Of Python's objects, at their peak: eight times the rows take hardly more; lists grow with the tokens."""
    peaks, tokenizer = {}, open_tokenizer(MODEL)
    monkeypatch.setattr(examples, "open_tokenizer", lambda *_: tokenizer)  # which takes more than the data here
    for times in (5, 40):
        data = write_rows(tmp_path / f"{times}.jsonl", [{"text": " ".join(TEXTS)}] * times)
        for name, how in (("mapped", read), ("lists", lambda one: in_memory(monkeypatch, one))):
            tracemalloc.start()
            found = how(data)
            assert found.train.digest
            peaks[name, times] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    more = {name: peaks[name, 40] - peaks[name, 5] for name in ("mapped", "lists")}
    assert more["mapped"] < more["lists"] / 20, peaks
