"""Compares what people and their files rely on with the JSON files in data/public_face, and rewrites these files.

    python tests/public_face.py --write   accept what the code does now as the public face; review it with git diff
    python tests/public_face.py --keep    let this code write the folders and the LoRA in data/public_face/kept again

`--write` includes the nodes where it finds ComfyUI (see `Checkout`). `--keep` is needed only after the embedded weights
have changed: until then those files must stay as earlier code wrote them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data" / "public_face"
KEPT = DATA / "kept"
WRITE = "LONGCAT_WRITE_PUBLIC_FACE"
# Longer diffs are cut.
SHOWN_LINES = 80

_SMALL = ("--size", "16x32", "--device", "cpu")
# Name -> command, run in the folder `kept`, that wrote the files there and can continue from them.
KEEPING = {
    "train-lora": ("train-lora", "clips", "-o", "lora.safetensors", "--frames", "5", "--rank", "1", "--layers",
                   "attn.proj", "--steps", "1", *_SMALL),
    "long": ("long", "a red circle moves right", "--segments", "2", "--frames", "9", "--overlap", "5", "--steps", "1",
             "--video", "clips/clip.mkv", "--cond-frames", "5", "--lora", "lora.safetensors:0.5", "--lora-mode",
             "runtime", *_SMALL),
    "refine": ("refine", "clips/clip.mkv", "--folder", "pieces", "--steps", "12", "--piece", "5", "--overlap", "1",
               "--sparsity", "0.5", *_SMALL),
}  # fmt: skip
GENERATE = ("generate", "a red circle moves right", "--frames", "5", "--steps", "1", *_SMALL)
COMPARE = ("compare", "a red circle moves right", "--versus", "--guidance 3", "--floor", "off", *GENERATE[2:])


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def assert_frozen(name: str, found: Any) -> None:
    """Fail with a unified diff unless data/public_face/NAME.json holds `found`, a JSON value.

    With LONGCAT_WRITE_PUBLIC_FACE set, write the file instead.
    """
    path, text = DATA / f"{name}.json", dumps(found)
    if os.environ.get(WRITE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    frozen = path.read_text(encoding="utf-8")
    if text == frozen:
        return
    lines = list(difflib.unified_diff(frozen.splitlines(), text.splitlines(), f"{name}.json", "this code", "", "", 4))
    cut = [f"... {len(lines) - SHOWN_LINES} more lines"] if len(lines) > SHOWN_LINES else []
    diff = "\n".join([*lines[:SHOWN_LINES], *cut])
    raise AssertionError(
        f"the public face has changed:\n{diff}\nif this is intended, run: python tests/public_face.py --write"
    )


def schema(value: Any) -> Any:
    """Keys and leaf types of a JSON value. All items of a list are merged into one."""
    return _shown(_merged([value]))


def _merged(values: list[Any]) -> dict[str, Any]:
    """Type -> content for the types among `values`: fields by key of objects, merged items of lists, else None."""
    kinds: dict[str, Any] = {}
    objects = [value for value in values if isinstance(value, dict)]
    lists = [value for value in values if isinstance(value, list | tuple)]
    if objects:
        keys = sorted({key for value in objects for key in value})
        kinds["object"] = {key: _merged([value[key] for value in objects if key in value]) for key in keys}
    if lists:
        kinds["list"] = _merged([item for value in lists for item in value])
    for value in values:
        if value is None:
            kinds["null"] = None
        elif isinstance(value, bool):
            kinds["yes or no"] = None
        elif isinstance(value, int | float):
            kinds["number"] = None
        elif isinstance(value, str):
            kinds["text"] = None
    return kinds


def _shown(kinds: dict[str, Any]) -> Any:
    shown: list[Any] = []
    for kind, inside in kinds.items():
        if kind == "object":
            shown.append({key: _shown(found) for key, found in inside.items()})
        elif kind == "list":
            shown.append([_shown(inside)])
        else:
            shown.append(kind)
    if all(isinstance(item, str) for item in shown):
        return " or ".join(sorted(shown)) or "nothing"
    return shown[0] if len(shown) == 1 else {"one of": shown}


def write() -> int:
    """Run the comparing tests with LONGCAT_WRITE_PUBLIC_FACE set."""
    sys.path.insert(0, str(ROOT))
    from tests.nodes.checkout import INSIDE, Checkout

    environment = os.environ | {WRITE: "1"}
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    tests = ROOT / "tests" / "test_public_face.py"
    code = subprocess.run([sys.executable, "-m", "pytest", *options, tests], cwd=ROOT, env=environment).returncode
    try:
        checkout = Checkout.find()
    except FileNotFoundError as error:
        print(f"nodes.json is unchanged: {error}")
        return code
    environment |= {INSIDE: "1", "COMFYUI_PATH": str(checkout.path), "LONGCAT_PYTHON": sys.executable}
    tests = ROOT / "tests" / "nodes" / "inside" / "test_public_face.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [checkout.python, "-P", "-m", "pytest", *options, tests]
        return code or subprocess.run(command, cwd=folder, env=environment).returncode


def keep() -> int:
    """Run the commands of `KEEPING` on the clips in `kept` and replace what they wrote before."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kept"
        shutil.copytree(KEPT / "clips", made / "clips")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for command in KEEPING.values():
            subprocess.run([sys.executable, "-m", "longcat_core", *command], cwd=made, env=environment, check=True)
        for path in [*made.rglob("*.mp4"), *made.rglob(".lock")]:
            path.unlink()
        shutil.rmtree(KEPT)
        shutil.copytree(made, KEPT)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", action="store_const", dest="run", const=write)
    group.add_argument("--keep", action="store_const", dest="run", const=keep)
    return parser.parse_args().run()


if __name__ == "__main__":
    sys.exit(main())
