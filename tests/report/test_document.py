"""The JSON report."""

import json

from qsvd.report.errors import from_record, to_json


def test_json_has_stable_keys_and_numbers_in_full(samples, header):
    document = json.loads(json.dumps(to_json(header, samples.errors, worst_count=2), allow_nan=False))
    assert list(document) == [
        *("model", "codec", "rank", "order", "iterations", "end", "coverage", "least_rank", "residual_bits"),
        *("quantizer", "objective", "rounding", "sensitivity", "texts", "totals", "worst", "weights"),
    ]
    assert document["coverage"] == {
        "weights": 5,
        "elements_split": 231,
        "elements": 1495,
        "left": [
            {"pattern": "embed_tokens.weight", "count": 1, "elements": 1200, "reason": ""},
            {"pattern": "layers.*.norm.weight", "count": 4, "elements": 64, "reason": ""},
        ],
        "unknown": [],
        "share": 231 / 1495,
    }
    derived = {"relative_before", "relative_after", "reduction_percent"}
    assert set(document["totals"][-1]) == derived | {
        *("role", "weights", "elements", "bits", "weight_frobenius", "before", "after"),
    }
    assert document["totals"][-1]["role"] == "model"
    assert set(document["totals"][-1]["reduction_percent"]) == {"frobenius", "nuclear", "spectral"}
    for weight, error in zip(document["weights"], samples.errors, strict=True):
        assert from_record({key: value for key, value in weight.items() if key not in derived}) == error
        assert weight["relative_before"] == error.before.frobenius / error.weight_frobenius
        assert weight["relative_after"] == error.after.frobenius / error.weight_frobenius
    by_name = {weight["name"]: weight for weight in document["weights"]}
    assert [by_name[weight["name"]] for weight in document["worst"]] == document["worst"]
    assert len(document["worst"]) == 2
