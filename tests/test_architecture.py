"""The architecture: floors of packages, the number of arrows between them, names, and what no file may contain."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "ssl_vit"
FILES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((CHECKOUT / "tools").glob("*.py"))

# A room is a package or root module of ssl_vit (cli.py with __main__.py as one), or tools. What each may import:
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "runtime": set(),
    "losses": {"runtime"},
    "data": {"config", "runtime"},
    "models": {"config", "runtime"},
    "methods": {"data", "models", "losses", "config", "runtime"},
    "evaluation": {"data", "models", "config", "runtime"},
    "training": {"methods", "evaluation", "data", "models", "config", "runtime"},
    "visualization": {"evaluation", "data", "models", "config", "runtime"},
    "commands": {
        "training", "visualization", "evaluation", "methods", "data", "models", "losses", "config", "runtime"
    },
    "cli": {"commands", "config", "runtime"},
}  # fmt: skip
MOST_ROOMS, MOST_FLOORS, MOST_ARROWS = 13, 7, 48

HYDRA = {"hydra", "omegaconf"}
LIGHTNING = {"lightning", "pytorch_lightning"}
# Libraries that a room, or one file of it, must not import. The longest name that fits a file counts.
FORBIDDEN: dict[str, set[str]] = {
    "__init__": HYDRA | LIGHTNING | {"wandb", "torch", "timm"},
    "config": HYDRA | LIGHTNING | {"wandb", "torch", "timm"},
    "runtime": HYDRA | LIGHTNING | {"wandb", "timm"},
    "runtime.errors": {"torch"},
    "runtime.atomic_io": {"torch"},
    "runtime.launch": {"torch"},
    "losses": HYDRA | LIGHTNING | {"wandb"},
    "models": HYDRA | LIGHTNING | {"wandb"},
    "data": HYDRA | LIGHTNING | {"wandb", "timm"},
    "data.transforms.mixup": HYDRA | LIGHTNING | {"wandb"},  # RandAugment is timm's
    "evaluation": HYDRA | LIGHTNING | {"wandb"},
    "visualization": HYDRA | LIGHTNING | {"wandb"},
    "methods": HYDRA | {"wandb"},
    "training": HYDRA,
    "commands": HYDRA,
    "commands.load_config": LIGHTNING | {"wandb", "torch", "timm"},
    "commands.sweep": LIGHTNING | {"wandb", "torch", "timm"},
    "cli": HYDRA | LIGHTNING | {"wandb", "torch", "timm"},
}


def name_of(file: Path) -> str:
    """`models.backbone` for ssl_vit/models/backbone.py, `models` for its `__init__.py`."""
    name = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def room_of(name: str) -> str:
    room = name.partition(".")[0]
    return "cli" if room == "__main__" else room


def imports_of(tree: ast.AST) -> set[str]:
    """The names of all imported modules; `ssl_vit.x.y` for `from ssl_vit.x import y` where y is a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {name for a in node.names if is_module(name := f"{node.module}.{a.name}")} or {str(node.module)}
    return names


def is_module(name: str) -> bool:
    path = CHECKOUT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def read_imports(file: Path) -> set[str]:
    return imports_of(ast.parse(file.read_text(encoding="utf-8")))


def rooms_imported(file: Path) -> set[str]:
    """The rooms of ssl_vit that a file imports; the package itself (its version and lazy API) is no room."""
    inside = {name.removeprefix("ssl_vit.") for name in read_imports(file) if name.startswith("ssl_vit.")}
    return {room_of(name) for name in inside}


def arrows() -> set[tuple[str, str]]:
    files = [(room_of(name_of(file)), file) for file in FILES if name_of(file) != "__init__"]
    files += [("tools", file) for file in TOOLS]
    return {(room, other) for room, file in files for other in rooms_imported(file) if other != room}


def floors(edges: set[tuple[str, str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports."""
    below = {room: {b for a, b in edges if a == room} for edge in edges for room in edge}
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = {room for room, others in below.items() if room not in found and others <= found.keys()}
        assert ready, f"imports go in a circle among {sorted(below.keys() - found.keys())}"
        found |= {room: 1 + max((found[other] for other in below[room]), default=0) for room in ready}
    return found


def parametrized(files: list[Path]):
    return pytest.mark.parametrize("file", files, ids=[file.relative_to(CHECKOUT).as_posix() for file in files])


@parametrized(FILES)
def test_imports_point_downwards(file):
    name = name_of(file)
    if name != "__init__":
        assert rooms_imported(file) <= ROOMS[room_of(name)] | {room_of(name)}
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    forbidden = next((FORBIDDEN[prefix] for prefix in prefixes if prefix in FORBIDDEN), set())
    assert not {module.partition(".")[0] for module in read_imports(file)} & forbidden


def test_rooms_floors_and_arrows_stay_few():
    edges = arrows()
    heights = floors(edges)
    print(f"{len(heights)} rooms, {max(heights.values())} floors, {len(edges)} arrows")
    assert len(heights) <= MOST_ROOMS
    assert max(heights.values()) <= MOST_FLOORS
    assert len(edges) <= MOST_ARROWS


def test_upward_imports_would_be_found():
    tree = ast.parse("import torch\ndef f():\n    from ssl_vit.methods.dino import DINO\n    from ssl_vit import data")
    assert imports_of(tree) == {"torch", "ssl_vit.methods.dino", "ssl_vit.data"}
    assert not {"methods", "evaluation"} & ROOMS["models"]
    with pytest.raises(AssertionError, match="circle"):
        floors({("a", "b"), ("b", "a")})


def test_no_import_goes_round_in_a_circle():
    waiting = {}
    for file in FILES:
        waiting[name_of(file)] = {name.removeprefix("ssl_vit.") for name in read_imports(file)}
    while ready := {name for name, modules in waiting.items() if not modules & waiting.keys()}:
        waiting = {name: modules for name, modules in waiting.items() if name not in ready}
    assert not waiting, f"a cycle among {sorted(waiting)}"


def test_tools_and_tests_do_not_import_each_other():
    tools = {file.stem for file in TOOLS}
    for file in (CHECKOUT / "tests").rglob("*.py"):
        assert not tools & {name.partition(".")[0] for name in read_imports(file)}, file.name
    for file in TOOLS:
        assert "tests" not in {name.partition(".")[0] for name in read_imports(file)}, file.name


def test_only_two_files_know_hydra():
    knowing = {name_of(f) for f in FILES if HYDRA & {name.partition(".")[0] for name in read_imports(f)}}
    assert knowing == {"commands.load_config", "commands.sweep"}


def test_only_models_touch_the_timm_module():
    for file in FILES:
        if room_of(name_of(file)) != "models":
            assert not re.search(r"\.vit\b", file.read_text(encoding="utf-8")), file.name


def test_module_names_are_unique():
    # A command has its own name; a method, its loss and its configuration have the method's.
    shared = {"commands", "config", "methods", "losses"}
    names = Counter(file.stem for file in FILES if file.stem != "__init__" and room_of(name_of(file)) not in shared)
    assert not [name for name, count in names.items() if count > 1]
    packages = Counter(file.parent.name for file in FILES if file.stem == "__init__")
    assert not [name for name, count in packages.items() if count > 1]


NOUNS_IN_ING = {
    "gradient_clipping",
    "checkpointing",
    "activation_checkpointing",
    "distributed",
    "uncertainty_weighting",
    "object_tracking",
}


def test_module_names_are_nouns():
    """No participles: nothing ends in -ed or -ing but the field's own nouns."""
    odd = {file.stem for file in FILES if re.search(r"(ed|ing)$", file.stem)}
    assert odd <= NOUNS_IN_ING
    packages = {file.parent.name for file in FILES if re.search(r"(ed|ing)$", file.parent.name)}
    assert packages <= {"loading", "training"}


@parametrized(FILES)
def test_a_configuration_cannot_run_code_and_a_checkpoint_cannot_either(file):
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not {"cloudpickle", "dill", "joblib", "shelve", "marshal"} & imports_of(tree)
    assert set(re.findall(r"pickle\.(\w+)", text)) <= {"UnpicklingError"}
    assert "_target_" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in ("instantiate", "eval_resolver", "unsafe_load", "exec")
            unchecked = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) != "True"]
            assert not unchecked, f"line {node.lineno}: weights_only must be True"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or not broad, f"line {node.lineno}: every error is swallowed"


def test_no_yaml_names_code():
    for file in [*(CHECKOUT / "conf").rglob("*.yaml"), *(CHECKOUT / "recipes").rglob("*.yaml")]:
        assert not re.search(r"_target_|_partial_|\$\{oc\.", file.read_text(encoding="utf-8")), file.name


@parametrized(FILES)
def test_first_line_says_what_the_file_is_for(file):
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith('"""')
    assert len(first) > 20


@parametrized(FILES)
def test_files_and_functions_stay_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (450 if file.parent.name == "config" else 300)  # config holds tables of keys
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
            if node.name == "__init__":
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 9, f"line {node.lineno}: too many arguments"


def test_no_attics():
    names = {file.stem for file in FILES} | {file.parent.name for file in FILES}
    assert not names & {"utils", "util", "misc", "common", "helpers", "registry"}


def test_one_base_class_of_methods_and_none_above_it():
    bases = {}
    for file in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]
    assert len(bases["SSLMethod"]) == 1
    assert bases["SSLMethod"][0].endswith("LightningModule")
    assert bases["DINO"] == bases["SiT"] == ["SSLMethod"]
