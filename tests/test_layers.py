"""Who may import whom: every import of every file of the package is held against the law below."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "atomq"
FILES = sorted(PACKAGE.rglob("*.py"))

# Importable from anywhere. A part is a module or package right under atomq/.
EVERYWHERE = {
    "",
    "errors",
    "config",
    "checks",
    "resources",
    "presets",
    "progress",
    "units",
    "distributed",
}  # "": the version in atomq/__init__.py
BELOW_COMMANDS = {
    "estimate",
    "numerics",
    "kernels",
    "method",
    "models",
    "formats",
    "eval",
    "block_loop",
    "block_quantizer",
    "clip_choice",
    "key_statistics",
    "assist",
    "pipeline",
    "checkpoints",
    "export",
    "hf",
    "progress",
    "report",
    "environment",
    "runtime",
    "opening",
    "api",
    "ladder",
    "ablation",
    "memory",
}
# Part -> what it may import besides its own modules and EVERYWHERE. A dotted name allows that module only.
LAW = {
    "errors": set(),
    "config": set(),
    "checks": set(),
    "resources": set(),
    "presets": set(),
    "numerics": set(),
    "kernels": {"numerics"},
    "environment": {"kernels"},
    "opening": {"checkpoints", "hf", "kernels", "models"},
    "api": BELOW_COMMANDS - {"api"},
    "method": {"numerics", "kernels"},
    "models": {"numerics", "memory"},
    "formats": {"numerics", "models.families"},
    "runtime": {"numerics", "kernels", "models"},
    "eval": {"numerics", "kernels", "models", "formats", "runtime"},
    "rotation_choice": {"block_loop", "eval", "formats", "models"},
    "block_quantizer": {"clip_choice", "key_statistics", "method", "models", "numerics"},
    "key_statistics": {"method", "models", "numerics"},
    "clip_choice": {"method", "models", "numerics"},
    "block_loop": {"block_quantizer", "method", "models", "numerics"},
    "report": {"formats", "numerics"},
    "memory": set(),
    "background": set(),
    "estimate": {
        "assist",
        "background",
        "block_loop",
        "formats",
        "memory",
        "models",
        "pipeline",
        "rotation_choice",
    },
    "ladder": set(),
    "ablation": {"assist", "block_loop", "eval", "facts", "formats", "hf", "ladder", "models", "pipeline"},
    "facts": {"memory", "block_loop", "eval", "formats", "models", "numerics", "rotation_choice"},
    "assist": {"block_loop", "block_quantizer", "models", "eval", "numerics", "rotation_choice"},
    "pipeline": {
        *(
            "assist",
            "background",
            "facts",
            "memory",
            "block_loop",
            "block_quantizer",
            "rotation_choice",
            "models",
            "formats",
            "eval",
            "numerics",
            "report",
        ),
    },
    "checkpoints": {"models", "formats", "numerics"},
    "integrations": {"kernels", "models.families", "formats", "numerics"},
    "export": {"checkpoints", "models", "formats", "numerics"},
    "hf": {"checkpoints", "models", "formats", "numerics"},
    "progress": set(),
    "units": set(),
    "distributed": set(),
    "commands": BELOW_COMMANDS,
    "cli": {"commands"},
    "__main__": {"cli"},
    "": {"api"},  # for type checkers only, see test below
}
ALWAYS, LAZILY, TYPES = "module", "function", "typing"
# Library -> module or part -> how it may be imported there: "module" is at the top and everything weaker,
# "function" inside functions only, "typing" for type checkers only. Elsewhere: never.
LIBRARIES = {
    "torch": dict.fromkeys(
        (
            "numerics",
            "kernels",
            "method",
            "models",
            "formats",
            "eval",
            "block_loop",
            "pipeline",
            "hf",
            "facts",
            "memory",
            "estimate",
        ),
        ALWAYS,
    )
    | {"checkpoints": ALWAYS, "block_quantizer": ALWAYS, "export": ALWAYS, "integrations": ALWAYS}
    | {"clip_choice": ALWAYS, "key_statistics": ALWAYS}
    | {"report.facts": ALWAYS, "distributed": ALWAYS, "assist": ALWAYS, "rotation_choice": ALWAYS}
    | {"environment": LAZILY, "runtime": ALWAYS, "ablation": ALWAYS}
    | {"api": ALWAYS}
    | {"commands": LAZILY},
    "numpy": dict.fromkeys(("kernels", "models", "eval"), ALWAYS),
    "transformers": dict.fromkeys(
        ("models", "hf", "checkpoints", "pipeline", "assist", "block_loop", "facts", "estimate"), ALWAYS
    )
    | {"opening": ALWAYS, "api": ALWAYS, "ablation": ALWAYS}
    | {"commands": LAZILY, "eval": TYPES, "runtime": TYPES},
    "huggingface_hub": {"models": ALWAYS},
    "tokenizers": {"models": ALWAYS},
    "gguf": {"models": ALWAYS},
    "safetensors": {"formats": ALWAYS, "models.weights": ALWAYS, "facts": ALWAYS},
    "typer": {"cli": ALWAYS, "commands": ALWAYS},
    "rich": {"cli": ALWAYS, "commands": ALWAYS},
    "matplotlib": {
        "formats.ablation_plot": ALWAYS,
        "formats.channel_plot": ALWAYS,
        "formats.e2e_plot": ALWAYS,
        "formats.gemm_plot": ALWAYS,
    },
    "datasets": {"eval.corpora": LAZILY},
    "lm_eval": {"eval.tasks": LAZILY},
    "vllm": {"integrations.vllm_method": ALWAYS},
    "pyarrow": {"eval.corpora": LAZILY},
    "cupy": {"kernels.loader": LAZILY, "kernels.probe": LAZILY},
    "humming": {"eval.gemm_peers": LAZILY},
    "flash_attn": {"eval.attention_peers": LAZILY},
    "flashinfer": {"eval.attention_peers": LAZILY},
    "cuda": {"kernels.loader": LAZILY},
}
WEAKER = {ALWAYS: {ALWAYS, LAZILY, TYPES}, LAZILY: {LAZILY, TYPES}, TYPES: {TYPES}}


class Import(NamedTuple):
    """One imported module, and how: ALWAYS, LAZILY or TYPES."""

    name: str
    how: str
    line: int


def module_name(path: Path) -> str:
    """ "numerics.scales" of atomq/numerics/scales.py; "" of atomq/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, how: str) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            how = LAZILY if how == ALWAYS else how
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            how = TYPES
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, how, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                is_module = whole in MODULES or alias.name == "*"
                yield Import(whole if is_module else module, how, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, how)

    yield from walk(ast.parse(source), ALWAYS)


MODULES = {f"atomq.{module_name(path)}".rstrip(".") for path in FILES}


def place_in(name: str, places) -> str | None:
    """The longest of `places` that is `name` or a package around it."""
    found = [place for place in places if name == place or (place and name.startswith(f"{place}."))]
    return max(found, key=len, default=None)


def violation(importer: str, found: Import) -> str | None:
    """What is wrong with an import in the module `importer` (without "atomq."), or None."""
    part, top = importer.partition(".")[0], found.name.partition(".")[0]
    where = f"atomq/{importer.replace('.', '/')}:{found.line} imports {found.name}"
    if found.name.startswith(".") or found.name.endswith(".*"):
        return f"{where}: by its full name, please"
    if top == "atomq":
        target = found.name.removeprefix("atomq").removeprefix(".")
        if target.partition(".")[0] in EVERYWHERE | {part} or place_in(target, LAW[part]) is not None:
            return None
        return f"{where}: {part or '__init__'} may not know it"
    if top in sys.stdlib_module_names:
        return None
    if top not in LIBRARIES:
        return f"{where}: a library that this law does not know"
    place = place_in(importer, LIBRARIES[top])
    if place is None:
        return f"{where}: only {', '.join(LIBRARIES[top])} may"
    allowed = LIBRARIES[top][place]
    return None if found.how in WEAKER[allowed] else f"{where}: there only by '{allowed}'"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_keeps_the_law(path):
    importer = module_name(path)
    assert [
        v for found in imports_of(path.read_text(encoding="utf-8")) if (v := violation(importer, found))
    ] == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("errors", "import torch"),
        ("config", "from atomq.numerics import scales"),
        ("presets", "import transformers"),
        ("numerics.scales", "from atomq.formats.schema import FORMAT_VERSION"),
        ("numerics.scales", "from atomq import pipeline"),
        ("numerics.scales", "import atomq.hf"),
        ("numerics.kv", "import transformers"),
        ("method.gptq", "from atomq.models.families import find_family"),
        ("method.gptq", "def f():\n    from atomq.eval import windows"),
        ("kernels.gptq", "from atomq.method.gptq import gptq_quantize"),
        ("kernels.gptq", "import cupy"),
        ("kernels.loader", "import cupy"),
        ("models.blocks", "from atomq.formats.checkpoint import read_config"),
        ("models.blocks", "import safetensors"),
        ("formats.schema", "from atomq.models.blocks import blocks_of"),
        ("formats.schema", "from atomq.models import blocks"),
        ("formats.schema", "import matplotlib"),
        ("formats.checkpoint", "import transformers"),
        ("eval.corpora", "import datasets"),
        ("eval.tasks", "import lm_eval"),
        ("eval.corpora", "import pyarrow.parquet"),
        ("eval.windows", "def f():\n    import datasets"),
        ("eval.perplexity", "from atomq import pipeline"),
        ("eval.perplexity", "from transformers import PreTrainedModel"),
        ("block_loop", "from atomq.formats.schema import code_bytes"),
        ("block_loop", "from atomq.eval.windows import TokenWindows"),
        ("pipeline", "from atomq.hf import load"),
        ("pipeline", "from rich.console import Console"),
        ("hf", "from atomq.pipeline import quantize"),
        ("hf", "import safetensors"),
        ("export.gptq", "from atomq.pipeline import quantize"),
        ("export.gptq", "import gptqmodel"),
        ("commands.quantize", "import torch"),
        ("commands.quantize", "from transformers import AutoConfig"),
        ("commands.quantize", "from atomq.cli import main"),
        ("cli", "from atomq.pipeline import quantize"),
        ("cli", "import click"),
        ("cli", "from atomq.commands import *"),
        ("cli", "from .commands import quantize"),
        ("models.source", "import requests"),
    ],
)
def test_the_law_would_notice(importer, line):
    assert [v for found in imports_of(line) if (v := violation(importer, found))]


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("numerics.scales", "from atomq.errors import ConfigError\nimport json"),
        ("formats.schema", "from atomq.models.families import ModelFamily"),
        ("commands.quantize", "def f():\n    import torch"),
        ("commands.eval_ppl", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("eval.corpora", "def f():\n    import datasets"),
        ("pipeline", "import atomq\nfrom atomq import __version__"),
    ],
)
def test_the_law_lets_through_what_is_right(importer, line):
    assert not [v for found in imports_of(line) if (v := violation(importer, found))]


def test_the_front_of_the_package_imports_the_rest_for_type_checkers_only():
    own = [f for f in imports_of((PACKAGE / "__init__.py").read_text()) if f.name.startswith("atomq")]
    assert own
    assert {found.how for found in own} == {TYPES}


def test_every_part_of_the_package_is_under_the_law():
    assert {module_name(path).partition(".")[0] for path in FILES} == set(LAW)


def test_no_drawer_for_odds_and_ends():
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "misc", "helpers", "base"}


WRITING = {
    *("write_text", "write_bytes", "save_file", "copyfile", "copytree", "move", "touch", "symlink_to"),
    *("mkdir", "makedirs", "rename", "unlink", "rmtree", "rmdir", "fsync"),
}


def writes_of(source: str) -> list[str]:
    """Calls that change files, by name; `open` counts if its mode is none of reading."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            modes = [ast.unparse(a) for a in [*node.args, *(k.value for k in node.keywords)]]
            if name in WRITING or (name == "open" and any(m in ("'w'", "'wb'", "'a'", "'x'") for m in modes)):
                found.append(name)
    return found


def test_all_files_are_written_by_the_file_layer():
    layer = PACKAGE / "formats" / "files.py"
    assert {path.name: names for path in FILES if (names := writes_of(path.read_text()))} == {
        "files.py": writes_of(layer.read_text())
    }
    assert {"rename", "fsync"} <= set(writes_of(layer.read_text()))
    assert writes_of("open(x, 'wb'); p.open('w'); p.write_text(''); open(x, 'rb')") == [
        "open",
        "open",
        "write_text",
    ]


@pytest.mark.parametrize("module", ["atomq", "atomq.cli", "atomq.commands.quantize", "atomq.presets"])
def test_the_front_loads_no_torch(module):
    script = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "[]\n", result.stderr
