"""The command line as a user meets it: help, exit codes and one-line errors."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trtforge import cli
from trtforge.errors import TrtforgeError

HEAVY = {"grpc", "numpy", "tritonclient", "torch", "transformers", "onnx", "openvino", "pydantic"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, standard output and standard error of `trtforge`."""

    def run(*arguments: str, command: Callable[[], None] = cli.main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            command()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


def test_help_imports_nothing_heavy() -> None:
    program = "\n".join(
        [
            "import sys",
            "from trtforge import cli",
            "sys.argv = ['trtforge', '--help']",
            "try:",
            "    cli.main()",
            "except SystemExit:",
            "    print(*{name.partition('.')[0] for name in sys.modules})",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "serve" in result.stdout
    assert HEAVY.isdisjoint(result.stdout.splitlines()[-1].split())


def test_help_documents_every_exit_code(run: Run) -> None:
    status, output, _ = run("--help")
    assert status == 0
    lines = [line.strip() for line in output.splitlines()]
    for error in TrtforgeError.__subclasses__():
        assert f"{error.exit_code}  {(error.__doc__ or '').splitlines()[0]}" in lines


def test_version(run: Run) -> None:
    assert run("--version") == (0, "trtforge 0.1.0\n", "")


def test_python_m_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "trtforge", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == "trtforge 0.1.0\n"


@pytest.mark.parametrize("command", [cli.main, cli.build_engine])
def test_both_build_commands_take_the_builder_s_options(run: Run, command: Callable[[], None]) -> None:
    prefix = ("build",) if command is cli.main else ()
    status, output, _ = run(*prefix, "--help", command=command)
    assert status == 0
    assert "--max-num-batched-tokens" in output
    status, _, errors = run(*prefix, "no-such-model", "--output", "repo", "--tp", "0", command=command)
    assert status == 2
    assert "--tp" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "no-such-folder"), "no-such-folder is not a folder"),
        (("serve", "repo", "--verbose", "--log-file", "log"), "--log-file and --verbose"),
        (("ask", "  "), "empty"),
        (("ask", "hi", "--raw", "--system", "be kind"), "--system"),
        (("ask", "not UTF-8: \udcff"), "not UTF-8"),
    ],
)
def test_wrong_arguments_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, output, errors = run(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("trtforge: error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_repository_without_models_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.py").touch()  # what a model's own folder looks like
    status, _, errors = run("serve", str(tmp_path))
    assert status == 2
    assert f"{tmp_path} holds no model" in errors


def test_a_question_from_stdin_that_is_not_utf8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    status, _, errors = run("ask", "-")
    assert status == 2
    assert "not UTF-8" in errors


def test_no_server(run: Run) -> None:
    status, _, errors = run("ask", "hi", "--url", "127.0.0.1:1")
    assert status == 8
    assert "127.0.0.1:1" in errors
    assert errors.count("\n") == 1


def test_debugging_shows_where_an_error_comes_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTFORGE_DEBUG", "1")
    status, _, errors = run("serve", "no-such-folder")
    assert status == 2
    assert "Traceback" in errors


def test_unknown_options_are_refused(run: Run) -> None:
    for arguments in (("serve", "repo", "--gprc-port", "1"), ("ask", "hi", "--tempreature", "1")):
        status, _, errors = run(*arguments)
        assert status == 2
        assert arguments[2] in errors
