"""Help of every command, and output that is read in part only."""

import subprocess
import sys

import pytest

from experiments.main import COMMANDS, main
from experiments.progress import BROKEN_PIPE
from experiments.studies.commands import REPORTS, STUDIES


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        (name,) for name in COMMANDS if name != "study"
    ] + [("study", name) for name in (*STUDIES, *REPORTS)]
    + [("survey", "report"), ("survey", "query")],
)  # fmt: skip
def test_every_command_says_what_it_does(command, capsys):
    """A sentence between the usage and the options."""
    text = help_of(capsys, *command)
    sentence = text.split("\n\n")[1].strip()
    assert sentence[0].isupper() and len(sentence) > 20
    assert "options" not in sentence


def test_commands_are_described(capsys):
    top, study = help_of(capsys), help_of(capsys, "study")
    for text, names in ((top, COMMANDS), (study, (*STUDIES, *REPORTS))):
        lines = [line.split(None, 1) for line in text.splitlines()]
        told = {line[0]: line[1] for line in lines if len(line) == 2}
        assert all(len(told[name]) > 20 for name in names)


def piped(code):
    """Status and errors of a program whose output is closed after one line."""
    arguments = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        return process.wait(), process.stderr.read().decode()


@pytest.mark.parametrize("flush", [True, False])
def test_a_closed_pipe_is_no_error(flush):
    """Whether the program meets it itself, or only with what is left at the end."""
    code = f"""
import sys, time
from experiments.progress import ended
def main():
    print("first", flush=True)
    time.sleep(0.5)
    print("x" * 100, flush={flush})
    return 0
sys.exit(ended(main))
"""
    assert piped(code) == (BROKEN_PIPE, "")
    plain = code.replace("ended(main)", "main()")
    assert "BrokenPipeError" in piped(plain)[1]
