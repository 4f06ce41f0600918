"""Mutants of the core: each check is taken away, turned round or moved by one, and a Rust test must fail.

All of them are compiled at once, into a copy of the sources in `target/mutants`: where a check stood there is a choice,
which a number in the environment makes when a test starts. So the core is built once, and a mutant costs no more than
the tests that reach it; a first run of every test, without any, notes which those are. Kinds:

* **away**: the condition of an `if` or of a match's guard never holds; **round**: it holds when it does not;
* **less**: one operand of an `&&` or an `||` is left out; **not**: a `!` is;
* **edge**: `<` for `<=`, `>` for `>=`, and the other way;
* **try**: what a call found is let go; **ok**, **true**, **false**: a function gives that and does nothing.

What runs for too long twice is killed as well, and is shown. Constants and what only macros make of their arguments
stay as they are. What survives with a reason in `tests/mutants_rust.txt` is shown as equivalent. Usage: ``python -m
tests.mutants_rust [part of a file's path …] [--jobs N] [--list]``; the exit status is 1 if any other survives, or the
mutant of a reason is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import tree_sitter_rust
from tree_sitter import Language, Node, Parser

from tests import reasons

ROOT: Final = Path(__file__).parents[1]
SCRATCH: Final = ROOT / "target/mutants"
REASONS: Final = ROOT / "tests/mutants_rust.txt"
SECONDS: Final = 20  # beside twenty times what a test takes without a mutant

_TOO_LONG: Final = 128 + signal.SIGKILL
_PARSER: Final = Parser(Language(tree_sitter_rust.language()))
_EDGES: Final = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_AS_IT_IS: Final = {"const_item", "static_item", "array_type", "attribute_item", "token_tree", "use_declaration"}
_CALLED_BY_CONSTANTS: Final = ("mem/lost.rs", "mem/sigbus.rs")


class Mutant(NamedTuple):
    """Where a check is, what is done to it, and what stands there."""

    file: str
    line: int
    function: str
    kind: str
    text: str

    @property
    def name(self) -> str:
        """What it is called wherever its lines move to."""
        return f"{self.file} {self.function} {self.kind}: {self.text}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function} {self.kind}: {self.text}"


# --- the choices ---------------------------------------------------------------------------------------------------


class Source:
    """One text, part of `file` from byte `start` on, with a choice in the place of each check."""

    def __init__(self, file: str, whole: bytes, found: list[Mutant], part: bytes | None = None, start: int = 0) -> None:
        self.file, self.whole, self.found, self.start = file, whole, found, start
        self.named = list[str]()
        self.source = whole if part is None else part
        # What a macro calls its arguments parses as a name.
        self.root = _PARSER.parse(self.source.replace(b"$", b"_")).root_node

    def text(self, node: Node) -> str:
        return self.source[node.start_byte : node.end_byte].decode()

    def between(self, start: int, end: int) -> str:
        return self.source[start:end].decode()

    def new(self, node: Node, kind: str) -> str:
        line = self.whole.count(b"\n", 0, node.start_byte + self.start) + 1
        text = " ".join(self.text(node).split())
        self.found.append(Mutant(self.file, line, self.named[-1] if self.named else "-", kind, text))
        return f"crate::mutant({len(self.found)})"

    def inside(self, node: Node, changed: dict[int, str] | None = None) -> str:
        """A node with its children changed, some of them as it is said."""
        parts, at = list[str](), node.start_byte
        for child in node.children:
            parts += self.between(at, child.start_byte), (changed or {}).get(child.id) or self.change(child)
            at = child.end_byte
        return "".join([*parts, self.between(at, node.end_byte)])

    def change(self, node: Node) -> str:
        match node.type:
            case "macro_definition":
                rules = [rule for rule in node.children if rule.type == "macro_rule"]
                with self.within(self.text(_field(node, "name"))):
                    return self.inside(node, {rule.id: self.macro_rule(rule) for rule in rules})
            case "mod_item" if self.text(_field(node, "name")) == "tests":
                return self.text(node)
            case "if_expression":
                condition = _field(node, "condition")
                return self.inside(node, {condition.id: self.condition(condition)})
            case "match_pattern" if node.child_by_field_name("condition"):
                condition = _field(node, "condition")
                return self.between(node.start_byte, condition.start_byte) + self.condition(condition)
            case "binary_expression":
                return self.binary(node)
            case "unary_expression" if self.text(node).startswith("!") and "<<" not in self.text(node):
                return f"crate::not({self.new(node, 'not')}, {self.change(node.children[1])})"
            case "expression_statement" if node.children[0].type == "try_expression":
                call = self.change(node.children[0].children[0])
                return f"{{ let found = {call}; if !{self.new(node, 'try')} {{ found?; }} }}"
            case "function_item":
                with self.within(self.text(_field(node, "name"))):
                    return self.function(node)
            case kind if kind in _AS_IT_IS:
                return self.text(node)
            case _:
                return self.inside(node)

    @contextmanager
    def within(self, name: str) -> Generator[None]:
        """What is found meanwhile is found in a function of this name."""
        self.named.append(name)
        yield
        self.named.pop()

    def condition(self, node: Node) -> str:
        if node.type in ("let_condition", "let_chain"):
            return self.inside(node)
        text = self.change(node)
        if node.type not in ("binary_expression", "unary_expression"):
            text = f"({self.new(node, 'round')} != ({text}))"
        return f"(!{self.new(node, 'away')} && {text})"

    def binary(self, node: Node) -> str:
        operator = self.text(_field(node, "operator"))
        if operator in ("==", "!="):
            return f"({self.new(node, 'round')} != ({self.inside(node)}))"
        if operator not in ("&&", "||", *_EDGES):
            return self.inside(node)
        left, right = _field(node, "left"), _field(node, "right")
        one, other = self.change(left), self.change(right)
        if operator in _EDGES:
            edge, turned = self.new(node, "edge"), self.new(node, "round")
            moved = f"if {edge} {{ {one} {_EDGES[operator]} {other} }} else {{ {one} {operator} {other} }}"
            return f"({turned} != ({moved}))"
        one_less, other_less = self.new(left, "less"), self.new(right, "less")
        if operator == "&&":
            return f"(({one_less} || {one}) && ({other_less} || {other}))"
        return f"((!{one_less} && {one}) || (!{other_less} && {other}))"

    def function(self, node: Node) -> str:
        name, body = _field(node, "name"), _field(node, "body")
        result = node.child_by_field_name("return_type")
        gives = "" if result is None else self.text(result)
        early, does = "", self.text(body).strip("{} \n")
        if gives == "bool":
            early = "".join(
                f"if {self.new(name, kind)} {{ return {kind}; }}" for kind in ("true", "false") if does != kind
            )
        elif re.match(r"(io::)?Result<\(\)", gives) and does != "Ok(())":
            early = f"if {self.new(name, 'ok')} {{ return Ok(()); }}"
        head = self.between(node.start_byte, body.start_byte)
        if self.text(name) != "new" or not self.file.endswith(_CALLED_BY_CONSTANTS):
            head = re.sub(r"\bconst (?=(unsafe )?fn)", "", head)
        return f"{head}{{{early}{self.inside(body)[1:]}"

    def macro_rule(self, node: Node) -> str:
        """What a macro makes is read as what an impl holds, or else as the body of a function."""
        right = _field(node, "right")
        for before in (b"impl X ", b"fn x() "):
            part = before + self.source[right.start_byte : right.end_byte]
            inner = Source(self.file, self.whole, self.found, part, right.start_byte - len(before))
            if not inner.root.has_error:
                body = _field(inner.root.children[0], "body")
                return self.between(node.start_byte, right.start_byte) + inner.inside(body)
        return self.text(node)


def _field(node: Node, name: str) -> Node:
    child = node.child_by_field_name(name)
    assert child is not None
    return child


def everywhere() -> tuple[list[Mutant], dict[str, str]]:
    """All mutants, whose numbers count from 1, and the texts of the files that have them."""
    found, texts = list[Mutant](), dict[str, str]()
    for path in sorted((ROOT / "rust/src").rglob("*.rs")):
        file = str(path.relative_to(ROOT / "rust/src"))
        if not file.startswith("py/") and file not in ("lib.rs", "mem/tests.rs"):
            source = Source(file, path.read_bytes(), found)
            texts[file] = source.inside(source.root)
    return found, texts


def write() -> list[Mutant]:
    """Write the copy; its mutants."""
    for folder in ("rust", "benches/peers"):
        shutil.copytree(ROOT / folder, SCRATCH / folder, dirs_exist_ok=True)
    for file in ("Cargo.toml", "Cargo.lock"):
        shutil.copy(ROOT / file, SCRATCH)
    found, texts = everywhere()
    for file, text in texts.items():
        (SCRATCH / "rust/src" / file).write_text(text, encoding="utf-8")
    library = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "rust/src/lib.rs", ROOT / "tools/mutant.rs"))
    library = f"#![allow(warnings, missing_docs)]\n{library}".replace("SIZE", str(len(found) + 1))
    (SCRATCH / "rust/src/lib.rs").write_text(library, encoding="utf-8")
    return found


# --- running them --------------------------------------------------------------------------------------------------


class Test(NamedTuple):
    """One test: its program and name; seconds without a mutant, and what it reached."""

    program: str
    name: str
    seconds: float = 0.0
    reached: frozenset[int] = frozenset()


def build() -> Iterator[Test]:
    """Build the copy; its tests."""
    command = "cargo test --no-default-features --lib --tests --no-run --message-format=json-render-diagnostics"
    environment = {**os.environ, "RUSTFLAGS": "--cap-lints=warn", "CARGO_TARGET_DIR": str(SCRATCH / "target")}
    done = subprocess.run(command.split(), cwd=SCRATCH, env=environment, stdout=subprocess.PIPE, check=True)
    for program in filter(None, (json.loads(line).get("executable") for line in done.stdout.splitlines())):
        listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
        yield from (Test(program, line.removesuffix(": test")) for line in listed if line.endswith(": test"))


def run(test: Test, mutant: int, **more: str) -> int:
    """Its exit status; 137 when it takes too long."""
    command = ["timeout", "--signal=KILL", f"{SECONDS + 20 * test.seconds}", test.program, "--exact", test.name]
    environment = {**os.environ, "MUTANT": str(mutant), **more}
    return subprocess.call(command, env=environment, cwd=SCRATCH, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def look(test: Test) -> Test:
    """A test without any mutant."""
    path = SCRATCH / "reached" / re.sub(r"\W", "_", f"{Path(test.program).name} {test.name}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("", encoding="utf-8")
    begin = time.monotonic()
    if run(test, 0, REACHED=str(path)) != 0:
        sys.exit(f"{test.name} fails without any mutant")
    reached = frozenset(int(number) for number in path.read_text(encoding="utf-8").split())
    return test._replace(seconds=time.monotonic() - begin, reached=reached)


def judge(tests: Sequence[Test], mutant: int) -> str:
    """What becomes of a mutant; nothing when a test notices."""
    reaching = [test for test in tests if mutant in test.reached]
    for test in reaching:
        status = run(test, mutant)
        if status == _TOO_LONG:
            # Once more: others may have had the processor.
            status = run(test, mutant)
        if status:
            return f"ended by time alone, in {test.name}" if status == _TOO_LONG else ""
    return f"SURVIVES {len(reaching)} tests" if reaching else "NOT REACHED"


def say(what: str, mutant: Mutant, reason: str | None) -> str:
    """What is worth a line of a mutant that was judged."""
    if what.startswith(("SURVIVES", "NOT")):
        return f"equivalent: {mutant}: {reason}" if reason else f"{what}: {mutant}"
    if reason:
        return f"noticed, though it has a reason: {mutant}"
    return f"{what}: {mutant}" if what else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="parts of paths in rust/src")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only show them")
    arguments = parser.parse_args()
    parts = arguments.files or [""]
    found, _ = everywhere()
    chosen = [number for number, one in enumerate(found, 1) if any(part in one.file for part in parts)]
    if arguments.list:
        print("\n".join(str(found[number - 1]) for number in chosen))
        return 0
    why = reasons.read(REASONS)
    names = reasons.numbered(mutant.name for mutant in found)
    stale = reasons.stale(why, (mutant.name for mutant in found))
    for name in stale:
        print(f"no such mutant, though it has a reason: {name}")
    write()
    survive = equivalent = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tests = sorted(pool.map(look, build()), key=lambda test: test.seconds)
        for number, what in zip(chosen, pool.map(partial(judge, tests), chosen), strict=True):
            mutant = found[number - 1]
            line = say(what, mutant, why.get(names[number - 1]))
            survive += line.startswith(("SURVIVES", "NOT"))
            equivalent += line.startswith("equivalent")
            if line:
                print(line, flush=True)
    print(f"{len(chosen)} mutants, {survive} survive {len(tests)} tests, {equivalent} are equivalent")
    return 1 if survive or stale else 0


if __name__ == "__main__":
    sys.exit(main())
