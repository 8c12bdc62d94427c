"""The pack's prose keeps out the phrases that it used to overuse, and keeps to American spelling.

Read are the pages, and the comments and strings of the code; names in the code are not prose.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Written by a command from results: their prose is in the code.
GENERATED = (
    "docs/gpu.md",
    "docs/performance.md",
    "docs/sparse-mini.md",
    *(f"docs/fidelity{which}.md" for which in ("", "-skipping", "-distilled")),
)

TICS = {
    r"\btold\b": "say who says what: 'prints', 'reports', 'receives'",
    r"\banew\b": "write 'again', or 're-' with the verb",
    r"\bforetold\b": "write 'predicted'",
    r"\bneed be\b": "write 'if necessary'",
    r"\bso many\b": "name the number",
    r"\bwhatever\b": "write 'any', 'regardless of' or 'everything that'",
    # What follows in brackets before or after a phrase is plain English: "all of them", "there is no", "is no longer".
    r"(?<!\b[Aa]ll )(?<!\beach )(?<!\bone )(?<!\bsome )(?<!\bany )\bof them\b": "repeat the noun, or drop it",
    r"(?<!\bthere )\b(?:is|are) (?:no|none)\b(?! (?:longer|more|less|larger|smaller|better|worse)\b)": "write "
    "'is not a', 'has no' or 'cannot'",
}
# Looked for in every text of the repository, in names too, so that they match inside a word.
BRITISH = re.compile(
    r"(?:behavi|col|endeav|fav|flav|hon|lab|neighb|rum|vap)our|(?:cent|fib|lit|met|theat)re(?![a-z])|grey|artef|"
    r"(?:burn|lean|learn|smel|spel|spoil)t(?![a-z])|(?:cata|dia)logue|(?:de|of)fence|licence|judgement|programme|"
    r"(?:cancel|channel|label|level|model|signal|travel)l(?:ed|ing)|(?:fulfil|skilful|towards)(?![a-z])|"
    r"(?:anal|paral)yse|(?:capital|categor|central|character|custom|emphas|equal|final|general|initial|local|maxim|"
    r"memor|minim|normal|optim|organ|parallel|prior|quant|random|real|recogn|serial|special|stabil|standard|summar|"
    r"symbol|synchron|token|util|vector|visual)is(?:e|ing|ation)",
    re.IGNORECASE,
)
# Captions of the nano world may be spelled either way, and scripts import a function by its older spelling.
BRITISH_WORDS = dict.fromkeys(
    ("longcat_core/nano/world.py", "tests/nano/test_lesson.py", "tests/generate/test_segments.py"), "grey"
) | dict.fromkeys(("longcat_core/checkpoints/umt5.py", "tests/checkpoints/test_umt5.py"), "quantise")
RULES = [(re.compile(pattern.replace(" ", r"\s")), advice) for pattern, advice in TICS.items()]


def read_files() -> list[Path]:
    """The pages and the code, except pages written from results."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages += sorted((ROOT / "web" / "docs").glob("*.md"))
    code = [path for package in ("longcat_core", "nodes") for path in sorted((ROOT / package).rglob("*.py"))]
    names = {path: path.relative_to(ROOT).as_posix() for path in pages + code}
    return [path for path, name in names.items() if not name.startswith(GENERATED)]


@cache
def prose(path: Path) -> str:
    """The file's text, line for line; in code all but comments and strings is blanked out by a sign of its own."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    lines = text.splitlines(keepends=True)
    kept = [[sign if sign.isspace() else "\0" for sign in line] for line in lines]
    for row, line, first, last in pieces(path, lines):
        # Prefixes, quotes and hashes become blanks, so that a phrase is found across two comments or two strings.
        found = re.sub(r"\b[rbfu]{1,2}(?=[\"'])|[\"'#]", lambda match: " " * len(match[0]), line[first:last])
        kept[row][first:last] = re.sub(r"\{[^{}]*\}", lambda match: "\0" * len(match[0]), found)
    return "".join("".join(line) for line in kept)


def pieces(path: Path, lines: list[str]) -> Iterator[tuple[int, str, int, int]]:
    """Row, line, first and last column of every piece of a comment or string."""
    kinds = {tokenize.COMMENT, tokenize.STRING}
    kinds |= {getattr(tokenize, f"FSTRING_{part}", tokenize.STRING) for part in ("START", "MIDDLE", "END")}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in kinds:
                (start, first), (stop, last) = token.start, token.end
                for row in range(start, stop + 1):
                    line = lines[row - 1]
                    yield row - 1, line, first if row == start else 0, last if row == stop else len(line)


def findings(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, words and advice of everything in `text` that breaks a rule."""
    # One blank between words, wherever a line ends, with the line of each sign kept beside it.
    flat, numbers, line = [], [], 1
    for sign in text:
        if not (sign.isspace() and flat and flat[-1] == " "):
            flat.append(" " if sign.isspace() else sign)
            numbers.append(line)
        line += sign == "\n"
    joined = re.sub("`[^`]*`", lambda match: "\0" * len(match[0]), "".join(flat))
    for rule, advice in RULES:
        for match in rule.finditer(joined):
            yield numbers[match.start()], match[0], advice


def test_pages_and_code_are_plain_american_english():
    wrong = sorted(
        f"{path.relative_to(ROOT)}:{line}: '{words}': {advice}"
        for path in read_files()
        for line, words, advice in findings(prose(path))
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "sentence",
    [
        "The user is told.",
        "made\n    anew",
        "as if need be",
        "A file that is\nno checkpoint",
        "the halves of them",
    ],
)
def test_a_tic_is_found(sentence):
    assert list(findings(sentence))


@pytest.mark.parametrize("sentence", ["if there is no cache", "there\nare no frames", "is no longer", "all of them"])
def test_plain_english_passes(sentence):
    assert not list(findings(sentence))


def test_code_is_not_prose(tmp_path):
    file = tmp_path / "code.py"
    file.write_text('told = x is none  # of\n# them\nraise Error("it is "\n    f"no {told} file `told`")\n')
    assert [(line, words) for line, words, _ in findings(prose(file))] == [(1, "of them"), (3, "is no")]


def texts() -> Iterator[tuple[str, str]]:
    """Path from the root and text of every page, code file and test."""
    for folder, names in (
        (ROOT, ("*.md", "*.py", "Makefile", "pyproject.toml")),
        *((ROOT / folder, ("**/*.md", "**/*.py")) for folder in ("docs", "longcat_core", "nodes", "tests", "web")),
    ):
        for path in (path for name in names for path in sorted(folder.glob(name))):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_every_text_and_every_name_keeps_to_american_spelling():
    wrong = [
        f"{name}:{number}: {match[0]}"
        for name, text in texts()
        if name not in (*GENERATED, Path(__file__).relative_to(ROOT).as_posix())
        for number, line in enumerate(text.splitlines(), 1)
        for match in BRITISH.finditer(line)
        if match[0] != BRITISH_WORDS.get(name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("word", ["colour", "quantise_rows", "_neighbours", "is_spoilt", "GREY", "centre"])
def test_british_spelling_is_found(word):
    assert BRITISH.search(word)


@pytest.mark.parametrize("word", ["LongCatModelLoader", "parameter", "otherwise", "color", "quantize"])
def test_american_spelling_passes(word):
    assert not BRITISH.search(word)


def message(node: ast.expr) -> str:
    """The text of a string in code, with {} for each value in it; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_errors_are_lower_case_without_a_period():
    messages = {
        f"{path.relative_to(ROOT)}:{node.lineno}": message(node.exc.args[0])
        for package in ("longcat_core", "nodes")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    }
    assert len(messages) > 200
    # A capital is right in a name, which has another one: VAE, LoRA.
    wrong = {at: text for at, text in messages.items() if re.match(r"[A-Z](?!\w*[A-Z])", text) or text.endswith(".")}
    assert not wrong, "\n".join(f"{at}: {text}" for at, text in wrong.items())


def test_links_between_pages_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken, "\n".join(broken)
