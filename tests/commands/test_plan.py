"""`qsvd plan` from its flags to its tables and its exit code."""

import json
import shutil

import huggingface_hub
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import qsvd
from qsvd.cli import parse, run
from qsvd.memory.placement import Cell
from qsvd.plan.weights import plan_model
from qsvd.prepare.plan import prepare_plan
from tests.checkpoints import write_checkpoint
from tests.memory.large import CONFIG
from tests.mixed import modules_of, write_table

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
BLOCKS = 4


def write_config(folder, **changes):
    """The config.json of Llama-3-70B but for these changes, and nothing beside it: fewer blocks, all as wide."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | CONFIG | changes))
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """BLOCKS of its 80 blocks."""
    return write_config(tmp_path_factory.mktemp("few"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """More blocks than a ring of pages has slots."""
    return write_config(tmp_path_factory.mktemp("twelve"), num_hidden_layers=12)


def planned(capsys, *words):
    """Exit code, and what is printed as JSON."""
    code = run(["plan", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_does_not_fit_at_once_fits_with_pages_in_host_memory(capsys, twelve):
    words = ("--gpu", 10, "--host", 64, "--max-length", 4096, "--batch-size", 1, "--adapter-dtype", "bfloat16")
    code, found = planned(capsys, twelve, *words)
    train = found["train"]
    assert code == 0
    assert train["fits"]
    assert 0 < train["placement"]["resident"] < 12
    assert train["placement"]["pages"] == "host"
    assert train["total"]["gpu"] + train["left"]["gpu"] == train["limits"]["gpu"] == 10e9
    assert 4096 < train["longest_tokens"] < 8192
    assert train["highest_rank"] > 64
    assert {item["name"] for item in train["items"]} >= {"residual codes", "page slots", "pages", "CUDA context"}
    assert found["quantize"]["fits"]
    assert found["serve"]["fits"]


def test_what_does_not_fit_ends_with_3_after_its_tables(capsys, few):
    words = ["--gpu", "5GB", "--rank", "128", "--optimizer", "adamw", "--for", "train", "--max-length", "64"]
    code = run(["plan", str(few), *words])
    shown = capsys.readouterr()
    assert code == 3
    assert "does not fit: too little GPU memory" in shown.out
    assert "trained parameters" in shown.out
    assert "highest rank that fits:" in shown.out
    assert "advice: --rank" in shown.out
    assert shown.err.startswith("qsvd: qsvd train needs ")
    assert shown.err.endswith(" more GPU memory\n")


def test_the_tables_say_what_everything_means(capsys, few):
    assert run(["plan", str(few), "--gpu", "24GB", "--host", "64GB", "--max-length", "512"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "qsvd quantize: fits",
        "qsvd train: fits",
        "generating text: fits",
        "estimated time:",
        "assumed: 100 TFLOP/s",
    ):
        assert words in shown
    assert "blocks that stay on the GPU:" in shown
    assert "The CUDA context takes 0.6 GB (assumed), workspaces of cuBLAS 0.07 GB." in shown


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_config_is_enough(capsys, few, name):
    code, found = planned(capsys, few / name, "--for", "quantize", "--max-length", 64)
    assert code == 0
    assert found["quantize"]["limits"]["disk"] is None
    assert found["blocks"] == BLOCKS


def test_only_the_config_of_a_hub_model_is_downloaded(capsys, monkeypatch, tmp_path, few):
    asked = []

    def snapshot_download(model, *, revision, allow_patterns, ignore_patterns):
        asked.append((model, revision, allow_patterns, ignore_patterns))
        shutil.copyfile(few / "config.json", tmp_path / "config.json")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, found = planned(capsys, "owner/name", "--for", "serve", "--gpu", "80GB", "--host", "64GB")
    assert code == 0
    assert asked == [("owner/name", None, ["config.json"], ["*/*"])]
    assert "train" not in found


def test_a_hub_model_without_a_config_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert run(["plan", "owner/name"]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_the_stored_ranks_of_a_result_count(capsys, language):
    _, found = planned(capsys, language, "--for", "train", "--max-length", 32)
    sizes = {item["name"]: item["gpu"] for item in found["train"]["items"]}
    config = AutoConfig.from_pretrained(language)
    wide = config.hidden_size
    shapes = [(wide, wide)] * 2 + [(wide // 2, wide)] * 2 + [(768, wide)] * 2 + [(wide, 768)]
    assert sizes["trained parameters"] == 4 * 16 * sum(sum(shape) for shape in shapes)
    assert "is quantized already" in found["notes"][0]
    assert found["train"]["highest_rank"] == 16
    _, found = planned(capsys, language, "--for", "train", "--max-length", 32, "--method", "lora", "--rank", 8)
    sizes = {item["name"]: item["gpu"] for item in found["train"]["items"]}
    assert sizes["trained parameters"] == 4 * 8 * sum(sum(shape) for shape in shapes)
    assert sizes["frozen components"] == 2 * 16 * sum(sum(shape) for shape in shapes)


def test_lora_on_a_16_bit_model_is_qlora(capsys, few):
    _, found = planned(capsys, few, "--for", "train", "--method", "lora", "--rank", 16)
    items = {item["name"] for item in found["train"]["items"]}
    assert "frozen components" not in items
    assert "as in QLoRA" in found["notes"][0]


def test_a_plan_says_how_much_is_quantized_and_what_makes_it_more(capsys, tmp_path):
    """Counted tensor by tensor of transformers' own models; tied and untied."""
    for tied, flags in ((False, ("--embedding-bits 8", "--head-bits 8")), (True, ("--embedding-bits 8",))):
        folder = tmp_path / str(tied)
        write_checkpoint(folder, tie_word_embeddings=tied, vocab_size=1024)
        sizes = {n: p.numel() for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
        layers = sum(size for name, size in sizes.items() if name.endswith("proj.weight"))
        tables = 1024 * 64 * (1 if tied else 2)
        shares = [100 * part / sum(sizes.values()) for part in (layers, layers + tables)]
        words = (folder, "--for", "quantize", "--rank", 4)
        more = f"with {' '.join(flags)} it is {shares[1]:.1f} %."
        said = f"{shares[0]:.1f} % of the elements of the model are quantized; {more}"
        assert said in planned(capsys, *words)[1]["notes"]
        assert shares[1] > 90
        _, found = planned(capsys, *words, *(word for flag in flags for word in flag.split()))
        assert not any("of the elements" in note for note in found["notes"])


def test_the_table_of_cards_has_a_share_or_no(capsys, tmp_path):
    model = write_config(tmp_path, num_hidden_layers=BLOCKS, max_position_embeddings=2048)
    words = ["--explore", "--for", "train", "--gpu", "80GB", "--host", "64GB", "--max-length", "64", "--json"]
    assert run(["plan", str(model), *words]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [line.partition(",")[0] for line in shown.err.splitlines()] == [f"{done}/4 ranks" for done in (1, 2, 3, 4)]
    cells = {(cell["rank"], cell["tokens"], cell["gpu"]): cell["share"] for cell in found["explore"]}
    assert len(cells) == 4 * 2 * 6
    assert cells[16, 1024, 80 * 10**9] == 1.0
    assert cells[128, 1024, 8 * 10**9] == 0.0
    assert cells[128, 2048, 8 * 10**9] is None
    assert set(found["explore"][0]) == set(Cell.__dataclass_fields__)


def test_several_gpus_have_a_row_for_each_strategy_and_a_command(capsys, twelve):
    words = ["--gpus", 2, "--gpu", "12GB", "--host", "128GB", "--batch-size", 1]
    code, found = planned(capsys, twelve, *words, "--max-length", 4096, "--interconnect", 50)
    rows = {row["strategy"]: row for row in found["gpus"]["strategies"]}
    assert code == 0
    assert [(name, row["fits"]) for name, row in rows.items()] == [
        ("whole", False),
        ("sharded", True),
        ("offloaded", True),
    ]
    assert rows["whole"]["lacking"] == ["gpu"]
    assert found["gpus"]["best"] == "sharded"
    assert found["gpus"]["interconnect"] == {"value": 50e9, "source": "given"}
    assert "train" not in found
    assert run(["plan", str(twelve), *map(str, words), "--max-length", "4096"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Best on 2 GPUs: the residual is sharded over the GPUs (--shard yes), ")
    assert "it receives 12.5 GB/s from the others (assumed)" in " ".join(shown.out.split())
    assert shown.err.startswith("Next: torchrun --nproc-per-node 2 -m qsvd train ")
    assert " --shard yes  # DATA" in shown.err
    assert "--host" not in shown.err, "the processes divide what is free"


def test_several_gpus_divide_the_batches_that_are_chosen(capsys, few):
    words = ["--gpus", "8", "--gpu", "80GB", "--host", "128GB", "--batch-size", "auto", "--max-length", "64"]
    assert run(["plan", str(few), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Best on 8 GPUs: every GPU holds the whole model, ")
    assert "--batch-size 2 --accumulate 8 " in shown.err, "16 sequences, the largest batches that 8 can divide"


def test_several_gpus_that_are_too_small_end_with_3(capsys, few):
    assert run(["plan", str(few), "--gpus", "2", "--gpu", "4GB", "--host", "8GB", "--max-length", "64"]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("Does not fit 2 GPUs in any way\n")
    assert shown.err.startswith("qsvd: each process of qsvd train needs, whole: ")


def test_experts_that_were_excluded_are_said_to_be_counted_in_16_bits(capsys, tmp_path):
    write_checkpoint(tmp_path / "made", "MixtralForCausalLM", max_position_embeddings=64)
    model = tmp_path / "made"
    code, found = planned(capsys, model, "--rank", 4, "--for", "train", "--max-length", 16)
    assert code == 0
    assert not any("xperts" in note for note in [*found["notes"], *found["train"]["notes"]])
    out = qsvd.quantize(model, out=tmp_path / "out", rank=4, iterations=1, device="cpu", exclude=["*.experts.*"])
    code, found = planned(capsys, out.path, "--for", "train", "--max-length", 16)
    assert "Experts that are not quantized are counted in 16 bits and frozen." in found["train"]["notes"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "24X"], "--gpu '24X' is not a size: give a number of GB, or one and KB, MB, GB or TB"),
        (["--host", "much"], "--host 'much' is not a size"),
        (["--max-length", "0"], "--max-length 0 is below 2"),
        (
            ["--max-length", "-5", "--batch-size", "0"],
            "--batch-size 0 is neither auto nor a number of at least 1; --max-length -5 is below 2",
        ),
        (["--rank", "-1"], "--rank -1 is below 0"),
        (["--rank", "2000"], "--rank 2000 is above 1024, the shorter side of the smallest layer"),
        (["--accumulate", "0"], "--accumulate 0 is below 1"),
        (["--resident", "1.5"], "--resident 1.5 is neither auto nor a number from 0 to 1"),
        (["--tflops", "0"], "--tflops 0.0 is not a finite number above 0"),
        (["--link", "-3"], "--link -3.0 is not a finite number above 0"),
        (["--gpus", "1"], "--gpus 1 is below 2"),
        (["--gpus", "2", "--interconnect", "0"], "--interconnect 0.0 is neither nvlink nor pcie nor a finite number"),
        (["--interconnect", "nvlink"], "--interconnect nvlink is for several GPUs: give --gpus N too"),
        (["--gpus", "2", "--for", "serve"], "--gpus plans training on GPUs: leave out --for serve, which one GPU does"),
        (["--gpus", "2", "--device", "cpu"], "--gpus plans training on GPUs: leave out --device cpu"),
        (
            ["--gpus", "8"],
            "8 processes divide the batches of a step among them, and --accumulate is 4, not a multiple of 8; give "
            "--batch-size 2 --accumulate 8, the same step",
        ),
        (["--max-length", "9000"], "--max-length 9000 is above the context length of the model, 8192"),
        (
            ["--method", "edora", "--rank", "0"],
            "edora trains stored components, and the quantized model has none (rank 0)",
        ),
        (
            ["--layer-major", "--no-gradient-checkpointing"],
            "--layer-major needs gradient checkpointing: leave out --no-gradient-checkpointing",
        ),
    ],
)
def test_bad_numbers_are_refused_in_one_sentence(capsys, few, words, sentence):
    assert run(["plan", str(few), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"qsvd: {sentence}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "no-such-model"}, "transformers cannot read"),
        (
            {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 24, "num_attention_heads": 4},
            "has no linear layer inside repeated blocks",
        ),
        (LLAMA | CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized already"),
    ],
)
def test_models_that_cannot_be_planned_are_refused(capsys, tmp_path, config, sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(["plan", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_pissa_keeps_its_stored_rank(capsys, language):
    assert run(["plan", str(language), "--rank", "8"]) == 2
    assert "--rank 8 is not 16, the stored rank, which pissa trains" in capsys.readouterr().err


def test_what_is_not_given_has_no_limit(few):
    job = prepare_plan(parse(["plan", str(few)]))
    assert job.limits.gpu is None or job.limits.gpu > 0
    assert job.training.optimizer == "paged_adamw_8bit"
    assert (job.source.rank, job.source.most_rank, job.context) == (64, 1024, 8192)


def test_a_budget_is_planned_to_the_byte_that_it_allows(capsys, few):
    words = ("--budget", "2.75bits", "--rank", 64, "--gpu", "24GB", "--host", "64GB", "--max-length", 64)
    _, found = planned(capsys, few, *words, "--batch-size", 1, "--adapter-dtype", "bfloat16")
    disk = {item["name"]: item["disk"] for item in found["quantize"]["items"]}
    elements = BLOCKS * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    stored = disk["residual"] + disk["factors, there twice while they are collected"] / 2
    assert 2.74 < 8 * stored / elements <= 2.7501, "level tables of nested scales, 1 kB a weight, are there beside them"
    gpu = {item["name"]: item["gpu"] for item in found["train"]["items"]}
    loaded = gpu["residual codes"] + gpu["residual scales"] + gpu["trained parameters"]
    assert found["train"]["placement"]["resident"] == BLOCKS
    assert 2.74 < 8 * loaded / elements <= 2.7501


def test_a_table_says_the_ranks(capsys, tmp_path):
    write_checkpoint(tmp_path / "model", max_position_embeddings=64)
    chosen = write_table(tmp_path / "table.txt", modules_of(tmp_path / "model"), ranks=(3, 0, 7))
    words = (
        tmp_path / "model",
        "--allocation",
        tmp_path / "table.txt",
        "--max-length",
        16,
        "--for",
        "train",
        "--method",
        "pissa",
    )
    _, found = planned(capsys, *words)
    shapes = {spec.module: spec.shape for spec in plan_model(AutoConfig.from_pretrained(tmp_path / "model")).weights}
    numbers = sum(rank * sum(shapes[module]) for module, (_, rank) in chosen.items())
    items = {item["name"]: item["gpu"] for item in found["train"]["items"]}
    assert items["trained parameters"] == 4 * numbers
    _, beside = planned(capsys, *words[:-2], "--rank", 5)  # lora, whose rank is its own
    items = {item["name"]: item["gpu"] for item in beside["train"]["items"]}
    assert items["trained parameters"] == 4 * 5 * sum(sum(shape) for shape in shapes.values())
    assert run(["plan", *map(str, words), "--rank", "3"]) == 2
    assert "--rank 3 is not 7, the rank in --allocation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--budget", "2.5bits", "--allocation", "x"],
            "--budget and --allocation both set the bits of each layer: give one of them",
        ),
        (["--budget", "2.2bits", "--rank", "64"], "--rank 64 is above 57, the highest rank in --budget 2.2bits"),
        (["--budget", "1bits"], "--budget 1bits is too small"),
        (["--budget", "17bits"], "above 16 bits"),
        (["--budget", "20 apples"], "is not a budget"),
        (["--allocation", "nowhere.txt"], "--allocation nowhere.txt cannot be read"),
    ],
)
def test_budgets_and_tables_that_cannot_be_used_are_refused(capsys, few, words, sentence):
    assert run(["plan", str(few), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_what_is_split_already_takes_no_budget(capsys, language):
    assert run(["plan", str(language), "--budget", "3bits"]) == 2
    assert "is quantized already" in capsys.readouterr().err
