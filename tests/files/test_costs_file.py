"""Measurements are kept line by line; what a kill leaves is used, what is of something else is refused."""

import json

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from qsvd.decompose.candidates import CandidateErrors
from qsvd.errors import BadInput, Damaged
from qsvd.files.atomic import file_sha256
from qsvd.files.statistics import CostsFile

STAMPS = {"model.safetensors": (100, 1795866552690613848)}
IDENTITY = {"source_fingerprint": "abc", "codecs": ["nf4-64-fp16"], "ranks": None, "seed": 0}
ONE = CandidateErrors((0, 2), ((0.1, 1 / 3), (1e-300, 0.0)), 123.456, (2.5, 1.25), 17.0)
TWO = CandidateErrors((0,), ((7.0,),), 8.0, (), 9.0)


def fill(path, identity=IDENTITY):
    with CostsFile(path, identity, STAMPS) as file:
        file.keep("layers.0.q", ONE)
        file.keep("layers.0.k", TWO)
    return path


def test_what_is_kept_is_read_again(tmp_path):
    path = fill(tmp_path / "costs")
    content = path.read_bytes()
    with CostsFile(path, IDENTITY, STAMPS) as file:
        assert file.measured == {"layers.0.q": ONE, "layers.0.k": TWO}
        assert list(file.measured) == ["layers.0.q", "layers.0.k"]
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["costs"]


@given(st.lists(st.floats(min_value=0, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("costs") / "costs"
    made = CandidateErrors((0,), (tuple(numbers),), numbers[0], tuple(numbers), numbers[1])
    with CostsFile(path, IDENTITY, STAMPS) as file:
        file.keep("m", made)
    with CostsFile(path, IDENTITY, STAMPS) as file:
        assert file.measured["m"] == made


def test_a_line_is_in_the_file_before_the_next_is_measured(tmp_path):
    with CostsFile(tmp_path / "costs", IDENTITY, STAMPS) as file:
        file.keep("m", ONE)
        lines = (tmp_path / "costs").read_text().splitlines()
        assert json.loads(lines[0]).items() >= IDENTITY.items()
        assert json.loads(lines[1])["module"] == "m"


def test_wherever_a_kill_cuts_the_last_line_the_rest_is_used_and_the_same_file_comes_out(tmp_path):
    whole = fill(tmp_path / "whole").read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    path = tmp_path / "torn"
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        with CostsFile(path, IDENTITY, STAMPS) as file:
            assert list(file.measured) == ["layers.0.q"]
            file.keep("layers.0.k", TWO)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [b"", b"{", b'{"source_fingerprint": "abc"'])
def test_a_file_that_was_cut_in_its_first_line_begins_anew(tmp_path, left):
    whole = fill(tmp_path / "whole").read_bytes()
    path = tmp_path / "torn"
    path.write_bytes(left)
    assert fill(path).read_bytes() == whole


def test_measurements_with_other_options_are_refused_with_what_differs(tmp_path):
    path = fill(tmp_path / "costs")
    content = path.read_bytes()
    other = IDENTITY | {"seed": 1, "codecs": ["nf2-16-2x64"]}
    sentence = (
        r'was written with other options: codecs \["nf4-64-fp16"\] there, \["nf2-16-2x64"\] now; seed 0 there, '
        r"1 now; give the same options to continue, or delete the file, or give another --out$"
    )
    with pytest.raises(ValueError, match=sentence):
        CostsFile(path, other, STAMPS)
    assert path.read_bytes() == content
    fill(path)  # it is not left locked


@pytest.mark.parametrize("line", [b"no json", b"[]", b'{"module": "m"}', b"\xff"])
@pytest.mark.parametrize("place", [1, 2])
def test_a_damaged_line_is_named(tmp_path, line, place):
    path = fill(tmp_path / "costs")
    lines = path.read_bytes().splitlines()
    lines[place - 1] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    advice = "delete the line, its weight is measured again" if place == 2 else "delete the file, or give another --out"
    sentence = rf"line {place} of .*costs is damaged.*{advice}|was written with other"
    with pytest.raises(ValueError, match=sentence):
        CostsFile(path, IDENTITY, STAMPS)


def test_a_changed_digit_is_found_and_what_older_versions_wrote_is_read(tmp_path):
    path = fill(tmp_path / "costs")
    content = path.read_text()
    path.write_text(content.replace(f'"norm": {ONE.norm}', f'"norm": {ONE.norm + 1}'))
    with pytest.raises(Damaged, match=r"line 2 of .*costs is damaged: its digest differs; delete the line"):
        CostsFile(path, IDENTITY, STAMPS)
    lines = [json.loads(line) for line in content.splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "qsvd_digest"}) + "\n" for line in lines))
    with CostsFile(path, IDENTITY, STAMPS) as file:
        assert file.measured == {"layers.0.q": ONE, "layers.0.k": TWO}
    spoilt = dict(lines[1], ranks=3, norm=-1.0)
    path.write_text(f"{json.dumps(IDENTITY)}\n{json.dumps({k: v for k, v in spoilt.items() if k != 'qsvd_digest'})}\n")
    with pytest.raises(BadInput, match=r"ranks is 3, not a list; norm is -1\.0, not a finite number of 0 or more"):
        CostsFile(path, IDENTITY, STAMPS)


def test_measurements_of_a_model_that_was_changed_since_are_refused(tmp_path):
    path = fill(tmp_path / "costs")
    now = {"model.safetensors": (100, 1), "config.json": (5, 5)}
    said = r"^config.json, model.safetensors of the 16-bit model changed after .*costs was begun; restore"
    with pytest.raises(BadInput, match=said):
        CostsFile(path, IDENTITY, now)


def test_two_runs_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "costs"
    with (
        FileLock(f"{path}.lock"),
        pytest.raises(ValueError, match=r"another qsvd process is writing to .*costs; wait for it"),
    ):
        CostsFile(path, IDENTITY, STAMPS)
    fill(path)


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-2, appendix B.1
