"""Records of errors.jsonl: lossless, and strict about what they hold."""

import copy
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsvd.records import Norms, WeightError
from qsvd.report.errors import from_record, to_record

MEASURES = st.floats(min_value=0, allow_nan=False, allow_infinity=False, allow_subnormal=True)
COUNTS = st.integers(0, 10**6)
SIZES = st.integers(1, 10**6)
NORMS = st.builds(Norms, MEASURES, MEASURES, MEASURES, MEASURES)
ERRORS = st.builds(
    WeightError, st.text(), st.text(), st.tuples(SIZES, SIZES), COUNTS, MEASURES, COUNTS, MEASURES, NORMS, NORMS
)


@given(ERRORS)
def test_a_line_of_json_brings_back_every_bit(error):
    line = json.dumps(to_record(error), allow_nan=False)
    back = from_record(json.loads(line))
    assert back == error
    assert isinstance(back.shape, tuple)
    assert struct.pack("<d", back.after.nuclear) == struct.pack("<d", error.after.nuclear)


def test_the_fields_of_a_line_are_these(samples):
    assert to_record(samples.errors[1]) == {
        "name": "layers.0.self_attn.q_proj.weight",
        "role": "q",
        "shape": [6, 6],
        "rank": 2,
        "bits": 5.25,
        "iteration": 3,
        "weight_frobenius": samples.errors[1].weight_frobenius,
        "before": dict(vars(samples.errors[1].before)),
        "after": dict(vars(samples.errors[1].after)),
    }


def test_a_whole_number_is_a_float_where_one_is_due(samples):
    record = to_record(samples.errors[0])
    record["bits"], record["after"]["nuclear_error"] = 4, 0  # as JavaScript writes 4.0 and 0.0
    back = from_record(record)
    assert (type(back.bits), type(back.after.nuclear_error), type(back.rank)) == (float, float, int)


MEASURE = "a finite number of 0 or more"
WHOLE = "a whole number of 0 or more"
FAULTS = [
    (lambda record: record.pop("rank"), "rank is missing"),
    (lambda record: record["before"].pop("nuclear"), "before.nuclear is missing"),
    (lambda record: record.update(loss=1), "loss is unknown"),
    (lambda record: record["after"].update(trace=1), "after.trace is unknown"),
    (lambda record: record.update(name=7), "name is 7, not a string"),
    (lambda record: record.update(rank=1.5), f"rank is 1.5, not {WHOLE}"),
    (lambda record: record.update(rank=True), f"rank is True, not {WHOLE}"),
    (lambda record: record.update(iteration=-1), f"iteration is -1, not {WHOLE}"),
    (lambda record: record.update(bits="4"), f"bits is '4', not {MEASURE}"),
    (lambda record: record.update(bits=float("nan")), f"bits is nan, not {MEASURE}"),
    (lambda record: record["after"].update(spectral=float("inf")), f"after.spectral is inf, not {MEASURE}"),
    (lambda record: record["after"].update(frobenius=-0.5), f"after.frobenius is -0.5, not {MEASURE}"),
    (lambda record: record.update(before=[1]), "before is [1], not an object"),
    *(
        (
            lambda record, shape=shape: record.update(shape=shape),
            f"shape is {shape!r}, not a list of two positive whole numbers",
        )
        for shape in ([4], [4, 0], [4, 2.0], "4x2")
    ),
]


@pytest.mark.parametrize(("spoil", "fault"), FAULTS, ids=[fault for _, fault in FAULTS])
def test_a_record_with_a_fault_is_refused_by_name(samples, spoil, fault):
    record = copy.deepcopy(to_record(samples.errors[0]))
    spoil(record)
    with pytest.raises(ValueError, match="record of a weight's error") as refusal:
        from_record(record)
    assert str(refusal.value) == f"not a record of a weight's error: {fault}"


def test_all_faults_are_named_at_once(samples):
    record = to_record(samples.errors[0]) | {"extra": 0, "rank": None, "after": {}}
    del record["name"]
    with pytest.raises(ValueError, match="record of a weight's error") as refusal:
        from_record(record)
    assert str(refusal.value) == (
        "not a record of a weight's error: name is missing; extra is unknown; "
        f"rank is None, not {WHOLE}; after.frobenius is missing; after.nuclear is missing; "
        "after.nuclear_error is missing; after.spectral is missing"
    )


def test_what_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"^not a record of a weight's error: the record is \[3\], not an object$"):
        from_record([3])
