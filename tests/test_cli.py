"""The commands as a user meets them: names, exit codes, one line on stderr."""

import argparse
import importlib.metadata
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tqdit import __version__
from tqdit.cli import main as cli
from tqdit.errors import CheckpointError, UsageError


@pytest.fixture
def verb(monkeypatch):
    """A verb whose `run` the test chooses: call it with a function of (args, console)."""

    def install(run):
        module = types.SimpleNamespace(
            SUMMARY="do a thing",
            EXAMPLES="examples:\n  tqdit-export a.onnx",
            add_arguments=lambda parser: parser.add_argument("file", nargs="?", type=Path, default=Path("out.onnx")),
            run=run,
        )
        monkeypatch.setattr(cli, "_load", lambda _: module)

    return install


def raising(error):
    def run(args, console):
        raise error

    return run


def exit_code(function, *arguments):
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    return stopped.value.code


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_both_spellings_of_a_verb_have_the_same_help(name, capsys):
    assert exit_code(cli.main, [name, "--help"]) == 0
    one = capsys.readouterr().out
    assert exit_code(cli.run, name, ["--help"]) == 0
    other = capsys.readouterr().out
    assert " ".join(one.replace(f"tqdit {name}", f"tqdit-{name}").split()) == " ".join(other.split())
    assert "examples:" in other
    assert "--quiet" in other


def test_every_verb_is_installed_as_a_command():
    scripts = {
        point.name: point.value for point in importlib.metadata.entry_points(group="console_scripts")
        if point.value.startswith("tqdit.")
    }  # fmt: skip
    assert set(scripts) >= {"tqdit", *(f"tqdit-{name}" for name in ("export", "build", "sample", "inspect"))}
    assert {name.removeprefix("tqdit-") for name in scripts} - {"tqdit"} <= set(cli.VERBS)
    for name, value in scripts.items():
        function = getattr(cli, value.split(":")[1])
        assert callable(function), name


@pytest.mark.parametrize("name", cli.VERBS)
def test_the_installed_commands_run_their_verb(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"tqdit-{name}", "--help"])
    assert exit_code(getattr(cli, name)) == 0
    assert capsys.readouterr().out.startswith(f"usage: tqdit-{name} ")


def test_an_interruption_while_libraries_are_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: raising(KeyboardInterrupt)(None, None))
    assert cli.run("inspect", []) == 130
    assert capsys.readouterr().err.strip() == (
        "tqdit-inspect: interrupted; nothing was changed. Run the same command again."
    )


def test_an_unknown_verb_is_a_usage_error(capsys):
    assert exit_code(cli.main, ["explode"]) == 2
    errors = capsys.readouterr().err
    assert "invalid choice: 'explode'" in errors
    assert "export" in errors


def test_no_verb_is_a_usage_error(capsys):
    assert exit_code(cli.main, []) == 2
    assert "usage: tqdit" in capsys.readouterr().err


def test_help_lists_every_verb_with_what_it_does(capsys):
    assert exit_code(cli.main, ["--help"]) == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    for name in cli.VERBS:
        assert "".join(f"{name} {cli._load(name).SUMMARY}".split()) in text


@pytest.mark.parametrize("arguments", [["--version"], ["export", "--version"]])
def test_the_version_is_printed(arguments, capsys):
    assert exit_code(cli.main, arguments) == 0
    assert capsys.readouterr().out == f"tqdit {__version__}\n"


def test_the_last_line_of_stdout_is_the_path_written(verb, capsys):
    verb(lambda args, _: args.file)
    assert cli.main(["export", "some.onnx"]) == 0
    assert capsys.readouterr().out == "some.onnx\n"


def test_a_verb_that_writes_nothing_prints_no_path(verb, capsys):
    verb(lambda *_: None)
    assert cli.run("export", []) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [(CheckpointError("a.pt: damaged. Get it again."), 1), (UsageError("--steps is 0. Pass a number."), 2)],
)
def test_our_errors_are_one_line_and_an_exit_code(verb, capsys, error, code):
    verb(raising(error))
    assert cli.run("export", []) == code
    assert capsys.readouterr() == ("", f"tqdit-export: {error}\n")


def test_the_line_names_the_command_as_it_was_typed(verb, capsys):
    verb(raising(CheckpointError("a.pt: damaged.")))
    cli.main(["export"])
    assert capsys.readouterr().err == "tqdit export: a.pt: damaged.\n"


def test_a_message_of_a_library_with_several_lines_becomes_one(verb, capsys):
    verb(raising(CheckpointError("a.pt: damaged (first\n  second\r\n\tthird).")))
    cli.run("export", [])
    assert capsys.readouterr().err == "tqdit-export: a.pt: damaged (first second third).\n"


def test_what_the_system_refuses_is_one_line(verb, capsys):
    verb(raising(FileNotFoundError(2, "No such file or directory", "model.onnx.data")))
    assert cli.run("export", []) == 1
    assert capsys.readouterr().err == (
        "tqdit-export: model.onnx.data: cannot be used (No such file or directory). Check the path.\n"
    )


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 8.00 EiB")])
def test_a_lack_of_memory_is_one_line(verb, capsys, error):
    verb(raising(error))
    assert cli.run("export", []) == 1
    detail = f" ({error})" if str(error) else ""
    assert capsys.readouterr().err.startswith(f"tqdit-export: out of memory{detail}. Ask for less")


@pytest.mark.slow
def test_a_path_that_the_terminal_cannot_show_is_printed_in_another_way():
    program = "import sys; from tqdit.cli import main, sample; sample.run = lambda args, _: args.output; "
    command = [sys.executable, "-c", f"{program}sys.exit(main.run('sample', sys.argv[1:]))", "-o", "\u00fcber.npz"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xfcber.npz\n", "")


@pytest.mark.parametrize("error", [CheckpointError("x"), UsageError("x"), OSError(5, "x")])
def test_debug_shows_the_traceback(verb, error):
    verb(raising(error))
    with pytest.raises(type(error)):
        cli.run("export", ["--debug"])


def test_our_own_mistakes_are_not_hidden(verb):
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.run("export", [])


def test_interruption_is_one_line_and_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.run("export", []) == 130
    assert capsys.readouterr().err == "\ntqdit-export: interrupted; nothing was changed. Run the same command again.\n"


def talk(args, console):
    console.say("loading")
    with console.bar(2, "sampling", "steps") as bar:
        bar.update(2)
    return args.file


def test_quiet_leaves_only_the_path(verb, capsys):
    verb(talk)
    assert cli.run("export", ["-q"]) == 0
    assert capsys.readouterr() == ("out.onnx\n", "")


def test_progress_goes_to_stderr(verb, capsys):
    verb(talk)
    assert cli.run("export", []) == 0
    out, errors = capsys.readouterr()
    assert out == "out.onnx\n"
    assert errors.startswith("loading\n")
    assert "sampling: 100 %, 2 of 2 steps" in errors


def run(*arguments, **options):
    command = [sys.executable, "-m", "tqdit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.slow
def test_a_real_process_fails_with_one_line(tmp_path):
    done = run("inspect", tmp_path / "missing.npz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"tqdit inspect: {tmp_path / 'missing.npz'}: no such file or folder. Pass a file, a folder, 'demo' or 'text'.\n"
    )


@pytest.mark.slow
def test_a_real_process_shows_its_traceback_with_debug(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"bad")
    done = run("inspect", tmp_path / "bad.npz", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "tqdit.errors.FileFormatError: " in done.stderr


def without(libraries, *arguments):
    """The command on a machine where these libraries are not installed."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({libraries!r})); "
        "from tqdit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


HEAVY = ["torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "safetensors"]


@pytest.mark.slow
def test_the_help_needs_only_the_libraries_of_the_runtime():
    done = without(HEAVY, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  sample     sample images" in done.stdout


@pytest.mark.slow
def test_sampling_needs_only_the_libraries_of_the_runtime():
    done = without(HEAVY, "sample", "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "onnx_ir"])
def test_a_missing_library_is_answered_with_the_pip_command(library):
    done = without([library], "export")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    command = line.removeprefix(
        f"tqdit export: tqdit-export needs {library}, which is not installed. Run: pip install "
    )
    assert {name.split(">")[0] for name in shlex.split(command)} >= {"torch", "onnx", "onnx-ir", "onnxscript"}


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    import numpy as np

    np.savez(tmp_path / "s.npz", **{f"array_{i:05}": np.zeros(1) for i in range(3000)})
    command = f"{sys.executable} -m tqdit.cli inspect {tmp_path / 's.npz'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("kind")
    assert done.stderr == ""


def test_every_verb_offers_what_the_commands_expect():
    for name in cli.VERBS:
        module = cli._load(name)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert module.SUMMARY[0].islower()
        assert not module.SUMMARY.endswith(".")
        assert callable(module.run)
