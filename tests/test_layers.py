"""The house: imports point down, folders and files are small enough to read, and few floors touch the outside."""

import ast
from functools import cache
from pathlib import Path

import qsvd

PACKAGE = Path(qsvd.__file__).parent
FLOORS = (  # bottom up; folders of one floor do not import from each other, except where a line says so
    {"errors"},
    {"option_types", "other_names", "inputs", "records", "ranks"},
    {"arguments", "options"},
    {"option_file", "option_form", "numerics"},
    {"decompose"},
    {"plan"},
    {"memory"},
    {"files"},
    {"export", "report"},
    {"adapters"},
    {"data", "hf"},
    {"training", "evaluate", "calibrate", "prune"},
    {"prepare"},
    {"console"},
    {"commands"},
    {"method_options"},
    {"api"},
    {"cli"},
)
ABOVE_ALL = {"__init__", "__main__"}
CLOCKS = {"time", "datetime", "timeit"}
# The machine measures the speed of the GPU; templates of a cache of tokens may write the date.
READERS_OF_THE_CLOCK = {"commands", "console", "prepare/machine.py", "data/large/cache.py"}
ONE_FILE_EACH = {"adapters/methods", "commands"}  # a file for each method or command, however many there are
MOST_FILES, MOST_LINES, MOST_OF_A_FUNCTION = 12, 350, 60
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ABOVE_ALL)
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def nodes_of(path):
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def imported(path):
    """Every module that a file imports, at its head, in a function or for type checkers; ("qsvd", "plan", "budget")."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by a relative name"
            yield from ((*str(node.module).split("."), alias.name) for alias in node.names)


def folder_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path):
    return str(path.relative_to(PACKAGE))


def floor_of(folder):
    return next(number for number, folders in enumerate(FLOORS) if folder in folders)


def test_imports_point_down():
    upward = []
    for path in MODULES:
        folder = folder_of(path)
        if folder == "demo":
            continue
        used = {parts[1] for parts in imported(path) if parts[0] == "qsvd" and len(parts) > 1} - {folder}
        upward += [(name_of(path), other) for other in used if floor_of(other) >= floor_of(folder)]
    assert upward == []


def test_few_read_the_clock():
    others = [path for path in MODULES if not {folder_of(path), name_of(path)} & READERS_OF_THE_CLOCK]
    assert [name_of(path) for path in others if CLOCKS & {parts[0] for parts in imported(path)}] == []


def test_no_module_imports_itself_in_a_circle():
    """A circle of imports, lazy ones too, is a pair of files that are one idea."""
    names = {".".join(("qsvd", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    below = {
        name: {".".join(parts[:end]) for parts in imported(path) for end in (2, 3) if ".".join(parts[:end]) in names}
        - {name}
        for name, path in names.items()
    }
    while leaves := {name for name, needs in below.items() if not needs & below.keys()}:
        below = {name: needs for name, needs in below.items() if name not in leaves}
    assert set(below) == set()


def test_a_folder_has_at_most_twelve_files():
    folders = {path.parent for path in FILES}
    sizes = {str(f.relative_to(PACKAGE)): len([p for p in f.glob("*.py") if p.stem != "__init__"]) for f in folders}
    assert {folder: size for folder, size in sizes.items() if size > MOST_FILES and folder not in ONE_FILE_EACH} == {}


def test_a_file_has_at_most_350_lines():
    sizes = {name_of(path): path.read_text().count("\n") for path in FILES}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def test_a_function_has_at_most_60_lines():
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in FILES
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_OF_A_FUNCTION
    ]
    assert long == []


def test_the_walk_finds_the_modules_and_their_imports():
    assert {folder_of(path) for path in MODULES} >= {"numerics", "files", "commands", "cli", "options"}
    lines = {".".join(parts) for parts in imported(PACKAGE / "commands" / "quantize.py")}
    assert "qsvd.files.quantize_folder.OutputFolder" in lines


@cache
def calls_in(path):
    """Every call in a file, with the name of what is called."""
    return tuple((ast.unparse(node.func), node) for node in nodes_of(path) if isinstance(node, ast.Call))


def calls_of(name, path):
    """The calls of a function or method in a file: what it belongs to, and its keywords."""
    for called, node in calls_in(path):
        if called.rpartition(".")[2] == name:
            yield called, {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked_to():
    """Only model_files.py opens what lies in a folder; PEFT runs no code of an adapter."""
    names = ("from_pretrained", "from_config")
    found = [(path, *call) for path in FILES for name in names for call in calls_of(name, path)]
    calls = [one for one in found if one[1] != "PeftModel.from_pretrained"]
    assert len(calls) >= 3
    assert [one for one in calls if one[2].get("trust_remote_code") != "False"] == []
    assert {name_of(path) for path, name, _ in calls if name.endswith("from_pretrained")} == {
        "inputs/model_files.py",
        "prepare/models.py",  # tensors and config that are read already
    }


def test_pickles_are_tensors_and_plain_values_only():
    loads = [(name_of(path), *call) for path in FILES for call in calls_of("load", path)]
    torches = [words for _, name, words in loads if name == "torch.load"]
    assert len(torches) >= 2
    assert {words.get("weights_only") for words in torches} == {"True"}
    others = {"pickle.load", "pickle.loads", "np.load", "numpy.load", "marshal.loads", "joblib.load", "dill.load"}
    words = ("load", "loads", "Unpickler", "eval", "exec", "system", "Popen", "check_output", "load_from_disk")
    found = [(name_of(path), call[0]) for path in FILES for word in words for call in calls_of(word, path)]
    code = {"eval", "exec", "os.system", "pickle.Unpickler", "subprocess.Popen", "datasets.load_from_disk"}
    assert [one for one in found if one[1] in others | code] == []
    assert [name_of(path) for path in FILES if ("subprocess",) in imported(path)] == []


def test_text_reaches_a_terminal_by_two_functions_only():
    """Which show markup and control characters as they are; the command line prints its own texts, too."""
    consoles = [(path, words) for path in FILES for name, words in calls_of("_Terminal", path)]
    assert [words.get("markup") for path, words in consoles] == ["False"]
    assert [name_of(path) for path in FILES for name, _ in calls_of("Console", path)] == []
    calls = [name_of(path) for path in FILES for name, _ in calls_of("print", path) if name == "print"]
    assert sorted(set(calls)) == ["cli.py", "console/progress.py"]
