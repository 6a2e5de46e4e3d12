"""Reads the text of TTIR, as Triton's front end prints it, into plain objects.

The custom assembly formats of the dialects are regular enough for one rule: an operation's operands are the
`%names` before the types, its attributes are `{key = value}` and `, key = value`, its types follow the last `
: ` outside brackets. Operations with regions (`scf.*`, `tt.reduce`, `tt.scan`, `tt.map_elementwise`) span
several lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from attnproof.emulator.errors import EmulationError
from attnproof.emulator.types import Type, parse_type


@dataclass(eq=False)
class Op:
    """One operation: SSA names of results and operands, attributes as text, types as printed."""

    name: str
    results: list[str]
    operands: list[str]
    attributes: dict[str, str]
    operand_types: list[Type]
    result_types: list[Type]
    location: str
    regions: list[Region] = field(default_factory=list)
    text: str = ""
    successors: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def type(self) -> Type:
        """The type of the first result, or of the first operand where there is none."""
        return (self.result_types or self.operand_types)[0]


@dataclass(eq=False)
class Block:
    """A label (empty for a first block), its arguments (name, type) and its operations."""

    label: str
    arguments: list[tuple[str, Type]]
    ops: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Region:
    """The blocks of one pair of braces; the first is the entry."""

    blocks: list[Block]


@dataclass(eq=False)
class Function:
    """A `tt.func`: arguments with their Python names, and a body."""

    name: str
    public: bool
    arguments: list[tuple[str, Type]]
    argument_names: list[str]
    body: Region


_RESULTS = re.compile(r"^(%[\w$.\-]+(?::\d+)?(?:, %[\w$.\-]+(?::\d+)?)*) = ")
_NAME = re.compile(r"%[\w$.\-]+(?:#\d+)?")
_LOC_DEFINITION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_ARGUMENT = re.compile(r"(%[\w$.\-]+)(?:#\d+)?: ")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def _expand_result(token: str) -> list[str]:
    name, _, count = token.partition(":")
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside every kind of bracket and outside strings."""
    parts, depth, start, i, quoted = [], 0, 0, 0, False
    while i < len(text):
        c = text[i]
        if quoted:
            i += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "<([{":
            depth += 1
        elif c in ")]}" or (c == ">" and text[i - 1] != "-"):
            depth -= 1
        elif depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i].strip())
            start = i + len(separator)
            i = start - 1
        i += 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _matching(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    pairs = {"(": ")", "{": "}", "<": ">", "[": "]"}
    close, depth, i = pairs[text[start]], 0, start
    while i < len(text):
        c = text[i]
        if c == '"':
            match = _STRING.match(text, i)
            assert match is not None
            i = match.end()
            continue
        if c == text[start]:
            depth += 1
        elif c == close and not (c == ">" and text[i - 1] == "-"):
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise EmulationError(f"unbalanced {text[start]!r} in TTIR: {text!r}")


class _Locations:
    """Resolves `#loc12` to `file:line`, following names and call sites to the innermost file."""

    def __init__(self, lines: list[str]) -> None:
        self.definitions = {m.group(1): m.group(2) for line in lines if (m := _LOC_DEFINITION.match(line))}
        self.resolved: dict[str, str] = {}

    def resolve(self, text: str, depth: int = 0) -> str:
        if text not in self.resolved:
            self.resolved[text] = self._resolve(text, depth)
        return self.resolved[text]

    def _resolve(self, text: str, depth: int) -> str:
        if depth > 40:
            return "unknown"
        if text.startswith("#loc"):
            return self.resolve(self.definitions.get(text, "unknown"), depth + 1)
        if text.startswith("callsite("):
            inner, outer = text[len("callsite(") : -1].split(" at ", 1)
            called = self.resolve(inner, depth + 1)
            # A line inside Triton's own library says little: the line that called it is the kernel's.
            if called == "unknown" or "/triton/language/" in called:
                return self.resolve(outer, depth + 1)
            return called
        if text.startswith("fused"):
            return self.resolve(split_top(text[text.rindex("[") + 1 : -1])[0], depth + 1)
        place = re.match(r'"([^"]*)":(\d+)', text)
        if place:
            return f"{place.group(1)}:{place.group(2)}"
        named = re.match(r'"[^"]*"\((.*)\)$', text)
        return self.resolve(named.group(1), depth + 1) if named else "unknown"


def _cut_location(line: str) -> tuple[str, str]:
    """Separate a trailing ` loc(...)` from a line."""
    at = line.rfind(" loc(")
    while at >= 0:
        if _matching(line, at + 4) == len(line) - 1:
            return line[:at].rstrip(), line[at + 5 : -1]
        at = line.rfind(" loc(", 0, at)
    return line, ""


def _drop_inner_locations(text: str) -> str:
    while (at := text.find(" loc(")) >= 0:
        text = text[:at] + text[_matching(text, at + 4) + 1 :]
    return text


def _arguments(text: str) -> list[tuple[str, Type]]:
    """Block or function arguments: `%a: f32, %b: i32 {tt.divisibility = 16 : i32}`."""
    arguments = []
    for part in split_top(_drop_inner_locations(text)):
        name, _, kind = part.partition(":")
        arguments.append((name.strip(), parse_type(re.sub(r"\s*\{.*\}$", "", kind))))
    return arguments


def _argument_labels(text: str) -> list[str]:
    return re.findall(r'loc\("((?:[^"\\]|\\.)*)"', text)


def _attributes(text: str) -> dict[str, str]:
    attributes = {}
    for part in split_top(text):
        key, separator, value = part.partition("=")
        value = value.strip()
        if re.match(r"^-?[\w.+\-\"]+ : \w+$", value):
            value = value.split(" : ")[0]
        attributes[key.strip()] = value if separator else "true"
    return attributes


def _signature(text: str) -> tuple[list[Type], list[Type]]:
    """The types after the last top-level ` : `; `a -> b` and `a to b` separate operands from results."""
    for arrow in ("->", " to "):
        sides = split_top(text, arrow)
        if len(sides) == 2:
            return _types(sides[0]), _types(sides[1])
    return _types(text), []


def _types(text: str) -> list[Type]:
    text = text.strip()
    if text.startswith("(") and _matching(text, 0) == len(text) - 1:
        text = text[1:-1]
    return [parse_type(part) for piece in split_top(text) for part in split_top(piece, "*")]


class Parser:
    """A reader over the lines of one TTIR module."""

    def __init__(self, text: str) -> None:
        self.lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
        self.locations = _Locations(self.lines)
        self.at = 0

    def module(self) -> list[Function]:
        """All functions of the module, in order."""
        functions = []
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("tt.func"):
                functions.append(self._function(line))
        return functions

    def _function(self, line: str) -> Function:
        match = re.match(r"tt\.func (public |private )?@(\"[^\"]*\"|[\w$.]+)\(", line)
        if match is None:
            raise EmulationError(f"cannot read this function header of the TTIR: {line!r}")
        start = match.end() - 1
        end = _matching(line, start)
        inner = line[start + 1 : end]
        arguments = _arguments(inner)
        labels = _argument_labels(inner)
        names = labels if len(labels) == len(arguments) else [name.lstrip("%") for name, _ in arguments]
        body = self._region()[0]
        body.blocks[0].arguments = arguments
        return Function(match.group(2).strip('"'), match.group(1) != "private ", arguments, names, body)

    def _region(self) -> tuple[Region, str]:
        """Blocks up to the closing brace; returns the region and the rest of the closing line after `}`."""
        blocks = [Block("", [])]
        while True:
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("}"):
                return Region(blocks if blocks[0].ops or blocks[0].arguments else blocks[1:] or blocks), line[
                    1:
                ].strip()
            if line.startswith("^"):
                line = line.split("  // ")[0].rstrip().removesuffix(":")
                label, bracket, rest = line.partition("(")
                arguments = _arguments(rest[: rest.rindex(")")]) if bracket else []
                blocks.append(Block(label, arguments))
            elif not line.startswith("#loc"):
                blocks[-1].ops.append(self._op(line))

    def _op(self, line: str) -> Op:
        results: list[str] = []
        if match := _RESULTS.match(line):
            for token in match.group(1).split(", "):
                results += _expand_result(token)
            line = line[match.end() :]
        opens_region = line.endswith("{")
        if opens_region:
            return self._op_with_regions(line[:-1].rstrip(), results)
        body, location = _cut_location(line)
        return self._plain(body, results, self.locations.resolve(location))

    def _op_with_regions(self, header: str, results: list[str]) -> Op:
        generic = header.endswith("(")
        regions, rest = [], "{"
        while rest.endswith("{"):
            region, rest = self._region()
            regions.append(region)
        tail, location = _cut_location(" " + rest)
        where = self.locations.resolve(location)
        if generic:  # "tt.reduce"(%x) <{axis = 1 : i32}> ({ ... }) : (types) -> types
            signature = tail.strip().lstrip(")").strip()
            op = self._plain(header[:-1].rstrip() + " " + signature, results, where)
        else:
            op = self._structured(header, results, where)
            op.attributes.update(_attributes(tail.strip().removeprefix("attributes").strip(" {}")))
        op.regions = regions
        self._bind(op, header)
        return op

    @staticmethod
    def _bind(op: Op, header: str) -> None:
        """Loop variables and carried names of the custom scf formats become arguments of the entry block."""
        entry = op.regions[0].blocks[0] if op.regions[0].blocks else Block("", [])
        if op.name == "scf.for":
            variable = re.match(r"scf\.for (?:unsigned )?(%[\w$.\-]+) =", header)
            assert variable is not None
            carried = re.findall(r"(%[\w$.\-]+) = ", header.partition("iter_args(")[2])
            kind = (
                parse_type(header.rpartition(" : ")[2])
                if re.search(r" : \w+$", header)
                else parse_type("index")
            )
            entry.arguments = [(variable.group(1), kind), *zip(carried, op.result_types, strict=True)]
        elif op.name == "scf.while" and not entry.arguments:
            carried = re.findall(r"(%[\w$.\-]+) = ", header)
            entry.arguments = list(zip(carried, op.operand_types, strict=True))

    def _structured(self, header: str, results: list[str], where: str) -> Op:
        """scf.for, scf.if, scf.while and anything else that opens a region in its custom format."""
        name, _, rest = header.partition(" ")
        operand_types: list[Type] = []
        result_types: list[Type] = []
        if name == "scf.for":
            bounds, _, carried = rest.partition("iter_args(")
            operands = _NAME.findall(bounds)[1:4]
            if carried:
                inner = carried[: _matching("(" + carried, 0) - 1]
                operands += [part.split("=")[1].strip() for part in split_top(inner)]
                arrow = carried.index("->", len(inner))
                open_ = carried.index("(", arrow)
                result_types = _types(carried[open_ : _matching(carried, open_) + 1])
        elif name == "scf.if":
            operands = _NAME.findall(rest.partition("->")[0])
            result_types = _types(rest.partition("->")[2]) if "->" in rest else []
        elif name == "scf.while":
            inner = rest[1 : _matching(rest, 0)] if rest.startswith("(") else ""
            operands = [part.split("=")[1].strip() for part in split_top(inner)]
            operand_types, result_types = _signature(rest.rpartition(" : ")[2])
        else:
            operands = _NAME.findall(rest)
        return Op(name, results, operands, {}, operand_types, result_types, where, text=header)

    def _plain(self, body: str, results: list[str], where: str) -> Op:
        text = body
        if body.startswith('"'):
            end = body.index('"', 1)
            name, body = body[1:end], body[end + 1 :]
        else:
            match = re.match(r"[\w.]+", body)
            if match is None:
                raise EmulationError(f"cannot read this line of the TTIR: {body!r}")
            name, body = match.group(0), body[match.end() :]
        if name == "arith.constant":
            return self._constant(body, results, where, text)
        pieces = split_top(body, " : ") or [""]
        head = " : ".join(pieces[:-1] or pieces) if not body.lstrip().startswith(":") else ""
        operand_types, result_types = _signature(pieces[-1]) if len(pieces) > 1 or not head else ([], [])
        attributes: dict[str, str] = {}
        head, successors = self._successors(name, head)
        bare = head
        # `<{…}>` and `{…}` hold attributes; their contents must not be taken for operands.
        for opening in ("<{", "{"):
            while (at := _outside_strings(bare, opening)) >= 0:
                inner = at + len(opening) - 1
                end = _matching(bare, inner)
                attributes.update(_attributes(bare[inner + 1 : end]))
                bare = bare[:at] + " " + bare[end + len(opening) :]
        for key, value in re.findall(r"([\w.]+) = (\"(?:[^\"\\]|\\.)*\"|[\w.\-]+|\[[^\]]*\])", bare):
            attributes[key] = value
        for position, value in enumerate(_STRING.findall(bare)):
            attributes[f"string{position}"] = value[1:-1]
        bare = _STRING.sub(" ", bare)
        words = re.findall(r"(?<![%\w#@.])([a-z_]+)(?![\w.]* =)", bare)
        attributes["words"] = " ".join(words)
        if called := re.search(r"@(\"[^\"]*\"|[\w$.]+)", head):
            attributes["callee"] = called.group(1).strip('"')
        operands = _NAME.findall(bare)
        if not result_types and results:
            result_types = operand_types[-1:]
        # tt.split prints the type of its two results once.
        result_types = result_types + result_types[-1:] * (len(results) - len(result_types))
        return Op(
            name, results, operands, attributes, operand_types, result_types, where, [], text, successors
        )

    @staticmethod
    def _successors(name: str, head: str) -> tuple[str, list[tuple[str, list[str]]]]:
        """`cf.cond_br %c, ^bb1(%x : i32), ^bb2` keeps its condition as operand, its targets apart."""
        if not name.startswith("cf."):
            return head, []
        targets = []
        kept = []
        for part in split_top(head):
            if part.startswith("^"):
                label, bracket, rest = part.partition("(")
                values = _NAME.findall(rest.partition(" : ")[0]) if bracket else []
                targets.append((label, values))
            else:
                kept.append(part)
        return ", ".join(kept), targets

    @staticmethod
    def _constant(body: str, results: list[str], where: str, text: str) -> Op:
        body = body.strip()
        attributes: dict[str, str] = {}
        if body.startswith("{"):
            end = _matching(body, 0)
            attributes, body = _attributes(body[1:end]), body[end + 1 :].strip()
        pieces = split_top(body, " : ") or [""]
        value = pieces[0]
        kind = parse_type(pieces[1]) if len(pieces) > 1 else parse_type("i1")
        attributes["value"] = value
        return Op("arith.constant", results, [], attributes, [], [kind], where, [], text)


def _outside_strings(text: str, token: str) -> int:
    i = 0
    while i < len(text):
        if text[i] == '"':
            match = _STRING.match(text, i)
            assert match is not None
            i = match.end()
        elif text.startswith(token, i):
            return i
        else:
            i += 1
    return -1


def parse(text: str) -> list[Function]:
    """All functions of a TTIR module.

    Raises EmulationError where the text has a form that this reader does not know.
    """
    return Parser(text).module()
