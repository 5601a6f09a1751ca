"""What is asked of the planner for a run on this machine, and what is said where it does not fit."""

import json
import re
from dataclasses import replace

import pytest
import torch

import qsvd
from qsvd.adapters.start import new_record, planned_base
from qsvd.data import tokens
from qsvd.errors import BadInput, DoesNotFit
from qsvd.files.split_folder import open_split
from qsvd.memory.block_bytes import Batch
from qsvd.memory.items import Limits, Placement
from qsvd.memory.other_tasks import plan_serving
from qsvd.memory.placement import Wish
from qsvd.memory.training import Training, plan_training
from qsvd.memory.twins import LiveBytes
from qsvd.prepare import machine as place_run
from qsvd.prepare.machine import Machine, machine, num_blocks, place_reading, place_training, show_placement
from qsvd.prepare.train import prepare_train
from tests.adapters.results import split_checkpoint
from tests.runs import classifier_base, labelled_rows, language_base, text_rows, training, write_rows
from tests.vision import SIDE, dense, quantized

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS, VOCABULARY = 5, 96
BATCH = Batch(64, 2, is_masked=True, checkpointing=True, device="cpu")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return open_split(split_checkpoint(tmp_path_factory.mktemp("result"), num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def record(split):
    return new_record(split, qsvd.AdapterOptions())


@pytest.fixture
def free(monkeypatch):
    """A machine with 8 GB of a GPU, 5 of them free, and 20 GB of CPU memory free, for a process that has 1."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {CUDA: (5 * 10**9, 8 * 10**9)}[device])
    monkeypatch.setattr(place_run, "free_host_memory", lambda: 20 * 10**9)
    monkeypatch.setattr(place_run, "taken_host_memory", lambda: 10**9)


def there(gpu=None, host=None, device=CPU):
    return Machine(device, torch.float32, Limits(gpu, host))


@pytest.mark.parametrize(
    ("device", "asked", "gpu", "host"),
    [
        (CPU, {}, None, 20 * 10**9),
        (CPU, {"host": "3GB"}, None, 2 * 10**9),
        (CPU, {"host": "30GB"}, None, 20 * 10**9),
        (CUDA, {}, 5 * 10**9, 20 * 10**9),
        (CPU, {"host": "0.5GB"}, None, 0),
        (CUDA, {"gpu": "2GB", "host": "1.5GB"}, 2 * 10**9, 5 * 10**8),
        (CUDA, {"gpu": "24GB"}, 5 * 10**9, 20 * 10**9),
    ],
)
@pytest.mark.usefixtures("free")
def test_a_run_may_take_what_is_free_or_less_if_less_is_given(device, asked, gpu, host):
    assert machine(device, torch.bfloat16, **asked) == Machine(device, torch.bfloat16, Limits(gpu, host))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("device", "asked", "sentence"),
    [
        (CPU, {"gpu": "24GB"}, "--gpu 24GB needs a GPU, and the device is cpu"),
        (CUDA, {"gpu": "24X"}, "--gpu '24X' is not a size"),
        (CPU, {"host": "lots"}, "--host 'lots' is not a size"),
    ],
)
def test_what_is_no_size_or_for_no_gpu_is_refused(device, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        machine(device, torch.float32, **asked)


def test_a_run_that_does_not_fit_is_told_the_longest_that_would(split, record):
    model = planned_base(split, record, torch.float32)
    run = Training(Batch(64, 2, False, True, "cpu"), 2, "adamw")
    most = plan_training(model, run, Placement(0, "disk"), Limits()).total("host")
    assert place_training(model, run, Wish(0.0), there(host=most)).placement == Placement(0, "disk")
    with pytest.raises(DoesNotFit, match=r"needs [\d.]+ MB of CPU memory, where [\d.]+ MB may be used; ") as raised:
        place_training(model, run, Wish(0.0), there(host=most - 1))
    tokens = int(re.fullmatch(r".*; --max-length (\d+) would fit", str(raised.value))[1])
    assert 0 < tokens < 64
    place_training(model, shortened(run, tokens), Wish(0.0), there(host=most - 1))
    with pytest.raises(DoesNotFit):
        place_training(model, shortened(run, tokens + 1), Wish(0.0), there(host=most - 1))
    with pytest.raises(DoesNotFit, match="where 1 MB may be used; no length would fit: "):
        place_training(model, run, Wish(), there(host=10**6))


def shortened(run, tokens):
    return replace(run, batch=replace(run.batch, tokens=tokens))


def test_all_that_lacks_is_said_at_once(split, record):
    model = planned_base(split, record, torch.float32)
    run = Training(replace(BATCH, device="cuda"), 2, "adamw")
    each = r"[\d.]+ MB of GPU memory, where 1 MB may be used, and [\d.]+ KB of CPU memory, where 1 KB may be used;"
    with pytest.raises(DoesNotFit, match=f"needs {each}"):
        place_training(model, run, Wish(0.0), there(10**6, 10**3, CUDA))


def logits(batch):
    """Of every token in float32, and a copy."""
    return 2 * 4 * batch.batch * batch.tokens * VOCABULARY


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_reading_takes_the_logits_of_every_token_too(split, record, share):
    model, placement = planned_base(split, record, torch.float32), Placement(int(share * LAYERS), "disk")
    most = plan_serving(model, BATCH, placement, Limits()).total("host") + logits(BATCH)
    assert place_reading(split, record, BATCH, Wish(share), there(host=most)) == placement
    sentence = r"needs (\d+) MB of CPU memory, where (\d+) MB may be used; give a smaller --batch-size or --window"
    with pytest.raises(DoesNotFit, match=sentence):
        place_reading(split, record, BATCH, Wish(share), there(host=most - 1))


def test_a_classifier_gives_no_logits_of_tokens(tmp_path):
    split = open_split(classifier_base(tmp_path))
    record = new_record(split, qsvd.AdapterOptions(), ("a", "b"))
    most = plan_serving(planned_base(split, record, torch.float32), BATCH, Placement(2, "disk"), Limits()).total("host")
    assert place_reading(split, record, BATCH, Wish(1.0), there(host=most)).resident == 2


def test_a_classifier_of_a_language_model_is_planned_without_an_output_head(split, monkeypatch):
    plans, real = [], place_run.place_serving
    monkeypatch.setattr(place_run, "place_serving", lambda *a, **b: plans.append(real(*a, **b)) or plans[-1])
    place_reading(split, new_record(split, qsvd.AdapterOptions(), ("a", "b")), BATCH, Wish(1.0), there())
    (plan,) = (placed.memory for placed in plans)
    model = qsvd.load(split.folder, labels=("a", "b"), device="cpu", dtype=torch.float32)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    names = ("residual codes", "residual scales", "components and adapters", "embeddings", "output head")
    found = sum(plan[name].host for name in (*names, "norms and the rest"))
    assert found == pytest.approx(sum(held.values()), abs=1024)  # tables of levels, and of positions
    assert VOCABULARY * 64 * 4 > 16 * 1024, "a head is more than this difference"
    assert plan["logits of the last token"].host == 0


def test_reading_images_takes_their_numbers_and_the_encoder(tmp_path):
    """Of 200 images, the numbers that transformers' own encoder makes are above the logits."""
    folder = quantized(tmp_path, "llava")
    split = open_split(folder)
    record, images = new_record(split, qsvd.AdapterOptions()), 200
    model, pixels = planned_base(split, record, torch.float32), torch.randn(images, 3, SIDE, SIDE)
    tower = dense(folder, "llava")
    live = LiveBytes([*tower.parameters(), *tower.buffers(), pixels])
    with torch.no_grad(), live:
        tower.get_image_features(pixel_values=pixels)
    most = plan_serving(model, BATCH, Placement(2, "disk"), Limits()).total("host") + pixels.nbytes + live.peak
    with pytest.raises(DoesNotFit):
        place_reading(split, record, BATCH, Wish(1.0), there(host=most - 1), pixels=pixels.numel())
    place_reading(split, record, BATCH, Wish(1.0), there(host=most + 3 * live.peak), pixels=pixels.numel())


def test_on_a_gpu_the_logits_are_there_and_not_on_the_host(split, record):
    batch, model = replace(BATCH, device="cuda"), planned_base(split, record, torch.float32)
    plan = plan_serving(model, batch, Placement(2, "host", embeddings_on_host=True), Limits())
    gpu, host = plan.total("gpu") + logits(batch), plan.total("host")
    found = place_reading(split, record, batch, Wish(0.4), there(gpu, host, CUDA))
    assert found == Placement(2, "host", embeddings_on_host=True)
    for less in (there(gpu - 1, host, CUDA), there(gpu, 10**3, CUDA)):
        with pytest.raises(DoesNotFit):
            place_reading(split, record, batch, Wish(0.4), less)


def test_less_than_the_logits_alone_is_said_as_it_is(split, record):
    with pytest.raises(DoesNotFit, match=r"needs 3\d\d MB of CPU memory, where 10 KB may be used; give a smaller"):
        place_reading(split, record, BATCH, Wish(), there(host=10**4))


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (Placement(), "all 5 blocks"),
        (Placement(5, "disk"), "all 5 blocks"),
        (Placement(0, "disk"), "0 of 5 blocks, the others on disk"),
        (Placement(4, "host"), "4 of 5 blocks, the others in CPU memory"),
    ],
)
def test_a_placement_in_words(split, placement, said):
    assert show_placement(placement, split) == said
    assert num_blocks(split) == LAYERS


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    texts = write_rows(folder / "texts.jsonl", text_rows())
    same = write_rows(folder / "same.jsonl", [{"text": "one two three four"}] * 4)
    labelled = write_rows(folder / "labelled.jsonl", labelled_rows())
    return language_base(folder / "language"), classifier_base(folder / "bert"), texts, same, labelled


@pytest.mark.parametrize(
    ("changes", "is_masked"),
    [
        ({"batch_size": 1, "accumulate": 4}, False),
        ({"batch_size": 2, "accumulate": 2}, True),
        ({"batch_size": 1, "accumulate": 4, "layer_major": True}, True),  # which pads the four to one length
        ({"batch_size": 1, "accumulate": 1, "layer_major": True}, False),
        ({"batch_size": 1, "packing": True}, True),
    ],
)
def test_the_planner_counts_a_mask_where_rows_are_padded_or_packed(bases, tmp_path, monkeypatch, changes, is_masked):
    base, _, texts, same, _ = bases
    assert asked(monkeypatch, base, texts, tmp_path, **changes).batch.is_masked is is_masked
    if not changes.get("packing"):
        assert not asked(monkeypatch, base, same, tmp_path, **changes).batch.is_masked


def test_the_planner_is_told_what_is_trained(bases, tmp_path, monkeypatch):
    base, bert, texts, _, labelled = bases
    found = asked(monkeypatch, base, texts, tmp_path, batch_size=3, accumulate=4, layer_major=True, max_length=11)
    assert (found.batch.tokens, found.batch.batch, found.accumulate) == (11, 3, 4)
    assert (found.layer_major, found.has_loss, found.optimizer) == (True, True, "adamw")
    packed = asked(monkeypatch, base, texts, tmp_path, packing=True, max_length=500)
    assert 450 < packed.batch.tokens <= 500  # the longest row
    assert asked(monkeypatch, base, texts, tmp_path, max_length=500).batch.tokens < 200
    assert not asked(monkeypatch, bert, labelled, tmp_path).has_loss


def test_a_packed_run_has_the_steps_and_the_tokens_that_are_planned(bases, tmp_path, monkeypatch):
    base, _, texts, _, _ = bases
    options = training(
        base, texts, tmp_path / "run", packing=True, steps=None, epochs=2.0, max_length=160, accumulate=1
    )
    planned = prepare_train(options)
    assert planned.total_steps < prepare_train(replace(options, packing=False)).total_steps
    qsvd.train(options)
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert (len(steps), steps[-1]["tokens"]) == (planned.total_steps, 2 * planned.data.train.num_tokens)
    monkeypatch.setattr(tokens, "why_mixed", lambda config: f"{config.model_type} mixes")
    with pytest.raises(BadInput, match=r"--packing cannot be used for .*: llama mixes; leave it out"):
        prepare_train(options)


def asked(monkeypatch, base, data, folder, **changes):
    """The training that the planner is asked to place for a run."""
    seen = []
    real = place_run.place

    def place(model, training, limits, wish):
        seen.append((training, wish))
        return real(model, training, limits, wish)

    monkeypatch.setattr(place_run, "place", place)
    job = prepare_train(training(base, data, folder / "run", **changes))
    monkeypatch.setattr(place_run, "place", real)
    ((found, wish),) = seen
    assert wish == Wish("auto", "no" if job.data.train.label_names else "auto", "auto")
    return found
