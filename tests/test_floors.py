"""The house: imports point downwards only, and what must never stand in the package does not."""

import ast
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "ssl_vit"
FILES = sorted(PACKAGE.rglob("*.py"))

HYDRA = {"hydra", "omegaconf"}
HEAVY = HYDRA | {"lightning", "pytorch_lightning", "wandb"}
SMALL = HEAVY | {"torch", "timm"}

CONFIG = {
    "__init__",
    "errors",
    "durable",
    "processes",
    "config",
    "config_evaluation",
    "config_pictures",
    "config_values",
    "training.schedules",
}
TENSORS = CONFIG | {"distributed", "precision", "timing", "transforms", "models", "losses"}
MEASURING = TENSORS | {"data", "evaluation", "records", "training.hardware"}

# What each part of the package may import of the package, and which libraries it may not import.
# The longest name that fits a file counts.
FLOORS: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), SMALL),
    "errors": (set(), SMALL),
    "durable": (set(), SMALL),
    "processes": (set(), SMALL),
    "training.schedules": (set(), SMALL),
    "config": (CONFIG, SMALL),
    "config_evaluation": ({"config", "config_values"}, SMALL),
    "config_pictures": ({"config", "config_evaluation", "config_values"}, SMALL),
    "config_values": ({"training.schedules"}, SMALL),
    "distributed": (CONFIG, HEAVY | {"timm"}),
    "precision": (set(), HEAVY | {"timm"}),
    "timing": (set(), HEAVY | {"timm"}),
    "transforms": (CONFIG | {"transforms"}, HEAVY),
    "models": (
        CONFIG
        | {"distributed", "precision", "transforms.randomness", "transforms.transfer", "models", "losses.logits"},
        HEAVY,
    ),
    "losses": (CONFIG | {"distributed", "precision", "losses"}, HEAVY),
    "data": (CONFIG | {"distributed", "transforms", "data"}, HYDRA | {"wandb", "timm"}),
    "methods": (TENSORS | {"training", "methods"}, HYDRA | {"wandb"}),
    "records": (CONFIG | {"data", "models", "records", "training.hardware"}, HEAVY),
    "evaluation": (MEASURING, HEAVY),
    "attention": (MEASURING | {"attention"}, HEAVY),
    "video": (MEASURING | {"attention", "video"}, HEAVY),
    "inspection": (MEASURING | {"attention", "inspection"}, HEAVY),
    "report": (MEASURING | {"attention", "inspection", "report"}, HEAVY),
    "training": (MEASURING | {"attention", "inspection", "methods", "training"}, HYDRA),
    "commands": (MEASURING | {"attention", "video", "inspection", "report", "methods", "training", "commands"}, HYDRA),
    "commands.compose": (CONFIG | {"commands"}, SMALL - HYDRA),
    "commands.sweep": (CONFIG | {"commands"}, SMALL - HYDRA),
    "cli": ({"__init__", "durable", "errors", "processes", "commands"}, SMALL),
    "__main__": ({"cli"}, SMALL),
}


def name_of(file: Path) -> str:
    """`models.backbone` for ssl_vit/models/backbone.py, `models` for its `__init__.py`."""
    name = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


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


def floor_of(name: str) -> tuple[set[str], set[str]]:
    parts = name.split(".")
    return next(FLOORS[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in FLOORS)


def parametrized(files: list[Path]):
    return pytest.mark.parametrize("file", files, ids=[file.relative_to(CHECKOUT).as_posix() for file in files])


@parametrized(FILES)
def test_imports_point_downwards(file):
    allowed, forbidden = floor_of(name_of(file))
    for module in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
        root, _, rest = module.partition(".")
        if root == "ssl_vit":
            parts = (rest or "__init__").split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert prefixes & allowed, f"{name_of(file)} imports {module}"
        else:
            assert root not in forbidden, f"{name_of(file)} imports {module}"


def test_upward_imports_would_be_found():
    tree = ast.parse("import torch\ndef f():\n    from ssl_vit.methods.dino import DINO\n    from ssl_vit import data")
    assert imports_of(tree) == {"torch", "ssl_vit.methods.dino", "ssl_vit.data"}
    assert not {"methods", "data"} & floor_of("models.heads")[0]
    assert floor_of("training.schedules")[0] == set()
    assert "lightning" in floor_of("losses.dino")[1]


def test_no_import_goes_round_in_a_circle():
    waiting = {}
    for file in FILES:
        imported = imports_of(ast.parse(file.read_text(encoding="utf-8")))
        waiting[name_of(file)] = {name.removeprefix("ssl_vit.") for name in imported}
    while ready := {name for name, modules in waiting.items() if not modules & waiting.keys()}:
        waiting = {name: modules for name, modules in waiting.items() if name not in ready}
    assert not waiting, f"a cycle among {sorted(waiting)}"


def test_only_two_files_know_hydra():
    knowing = {
        name_of(file)
        for file in FILES
        if {"hydra", "omegaconf"} & {name.split(".")[0] for name in imports_of(ast.parse(file.read_text("utf-8")))}
    }
    assert knowing == {"commands.compose", "commands.sweep"}


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
    assert len(text.splitlines()) <= (450 if file.name == "config.py" else 300)  # config.py is a table of keys
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
