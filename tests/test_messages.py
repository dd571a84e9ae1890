"""Remedies name flags that exist: of the command that a message speaks of, or of the commands that can raise it."""

import argparse
import ast
import re
from pathlib import Path

import pytest

import tqdit
from tqdit.cli import main as cli

SOURCE = Path(tqdit.__file__).parent
# Folder or file -> commands that its messages come from. A flag must be one of each of them, unless the sentence names
# another command.
COMMANDS = {
    **{f"cli/{verb}": (verb,) for verb in cli.VERBS},
    "calibration": ("calibrate",), "exporter": ("export",), "models": ("calibrate", "export"),
    "engines/run": ("sample",), "engines/build": ("build",), "engines/config": ("build",),
    "engines/bundle": ("build",), "engines/backends": ("build",),
    "evaluate": ("evaluate",), "sampling": ("calibrate", "export", "sample", "evaluate"),
    "serve": ("serve",), "quantization/summary": ("inspect",), "quantization": ("calibrate",), "lint": ("export",),
}  # fmt: skip
# Words that name another command in a sentence before a flag.
WORDS = {
    "calibrate": "calibrat", "export": "export", "build": "buil[dt]", "sample": "sampl", "serve": "serv",
    "evaluate": "evaluat",
    "inspect": "tqdit-inspect",
}  # fmt: skip
OTHER_PROGRAMS = r"\b(pip|ray start|gunicorn|uvicorn)\b|python -m tqdit.demo"
END = r"\.\s|\n|; "  # of a sentence
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")


SAMPLES = {int: "1", float: "1", None: "x", Path: "x"}  # values of a type; any other type reads a list of numbers


def parser_of(verb):
    parser = argparse.ArgumentParser()
    cli._load(verb).add_arguments(parser)
    for common in ("--quiet", "--debug", "--version"):
        parser.add_argument(common, action="store_true")
    return parser


PARSERS = {verb: parser_of(verb) for verb in cli.VERBS}
KNOWN = {
    verb: {option: action for action in parser._actions for option in action.option_strings}
    for verb, parser in PARSERS.items()
}


def parses(verb, flag, said):
    """Whether the command takes the flag with the number or the choice that a message gives it, or with a sample."""
    action = KNOWN[verb][flag]
    literal = re.match(r"[ =]([\w.-]+\w|\w)", said)
    value = literal[1] if literal and (literal[1][0].isdigit() or literal[1] in (action.choices or ())) else None
    sample = value or next(iter(action.choices or ()), None) or SAMPLES.get(action.type, "1,2")
    count = 0 if action.nargs == 0 else action.nargs if isinstance(action.nargs, int) else 1
    needed = ["x"] * sum(not each.option_strings and each.nargs is None for each in PARSERS[verb]._actions)
    try:
        PARSERS[verb].parse_args([*needed, flag, *[sample] * count])
    except SystemExit as ended:
        return ended.code == 0  # --help
    return True


def texts(tree):
    """The strings of a module except for docstrings; what is filled in is {}."""
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docstrings | inner):
            yield node.value


def commands_in(sentence, word=""):
    """Commands that a sentence names, with this word before them."""
    return [verb for verb in re.findall(rf"{word}tqdit[- ](\w+)", sentence) if verb in KNOWN]


def spoken_of(sentence):
    """Commands that a sentence speaks of, in their order."""
    found = [
        (match.start(), verb) for verb, word in WORDS.items()
        for match in re.finditer(rf"\b{word}", sentence, re.IGNORECASE)
    ]  # fmt: skip
    return [verb for _, verb in sorted(found)]


def named(place, source):
    """(text, flag, commands that must know it, what follows) of each flag in a module; no commands: any may."""
    default = next((verbs for start, verbs in COMMANDS.items() if place.startswith(start)), ())
    for text in texts(ast.parse(source)):
        for match in FLAG.finditer(text):
            before, after = (re.split(END, text[: match.start()])[-1], re.split(END, text[match.end() :])[0])
            if re.search(OTHER_PROGRAMS, before):
                continue
            said = commands_in(before)[-1:] or commands_in(after, "to ")[:1] or spoken_of(before)[-1:]
            yield text, match[0], tuple(said) or default, text[match.end() :]


def wrong_flags(place, source):
    return [
        f"{flag} is not of {' and '.join(verbs) or 'any command'}: {text!r}"
        for text, flag, verbs, said in named(place, source)
        if not (verbs and all(flag in KNOWN[verb] and parses(verb, flag, said) for verb in verbs))
        and not (not verbs and any(flag in KNOWN[verb] and parses(verb, flag, said) for verb in KNOWN))
    ]


PROGRAMS = {"demo/captions.py"}  # with a parser of their own
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize(
    "place", [place for place, source in FILES.items() if place not in PROGRAMS and FLAG.search(source)]
)
def test_every_flag_in_a_message_is_one_of_its_command(place):
    assert not wrong_flags(place, FILES[place])


@pytest.mark.parametrize(("place", "message", "wrong"), [
    ("models/x.py", "{x}: no. Pass --heads 2, or --sampler ddim.", ["--sampler"]),
    ("calibration/x.py", "no. Pass --sampler.", ["--sampler"]), ("calibration/x.py", "no. Pass --groups {x}.", []),
    ("engines/run/x.py", "no. Export it again with --vae DIR, or pass --seed.", ["--seed"]),
    ("engines/run/x.py", "no. Run: tqdit-build --nonsense", ["--nonsense"]),
    ("engines/run/x.py", "no. Pass --sampler euler.", []), ("engines/run/x.py", "no. Pass --steps 2.5.", ["--steps"]),
    ("engines/run/x.py", "no. Start one: ray start --head", []), ("files.py", "Pass --nonsense.", ["--nonsense"]),
])  # fmt: skip
def test_a_flag_that_its_command_does_not_have_is_found(place, message, wrong):
    source = f'def f(x):\n    """--docstring"""\n    raise ValueError(f"{message}")\n'
    assert [line.split()[0] for line in wrong_flags(place, source)] == wrong
