"""What all verbs print, and where that cannot be printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import ragstone

from ragstone import KnowledgeBase, Passage


@pytest.fixture
def base(tmp_path):
    """A base of two passages in a folder whose name looks like rich's markup."""
    kb = KnowledgeBase.create(tmp_path / "kb [old] [red]", encoder=None, width=2)
    kb.add([Passage("1", text="north"), Passage("2", text="east")], vectors=[[0, 1], [1, 0]])
    return kb.path


def test_names_in_square_brackets_are_printed_as_they_are(base, tmp_path):
    name = str(base)
    assert f"{name}: version" in ragstone("tag", base, "spring").stdout
    assert f"{name}: the tag" in ragstone("tag", base, "spring", "--delete").stdout
    assert "".join(name.split()) in "".join(ragstone("info", base).stdout.split())
    assert ragstone("compact", base).stdout.startswith(f"{name}: ")
    exported = ragstone("export", base, tmp_path / "o[/x].jsonl")
    assert (exported.returncode, exported.stdout.split(":")[0]) == (0, str(tmp_path / "o[/x].jsonl"))
    assert ragstone("delete", base, "1").stdout.startswith(f"{name}: 1 passage deleted")


def test_ids_that_are_not_there_are_named(base):
    done = ragstone("delete", base, "1", "nope", "[red]")
    assert "1 passage deleted, 1 left" in done.stdout
    assert done.stderr.splitlines() == ["There is no passage 'nope'.", "There is no passage '[red]'."]
    again = json.loads(ragstone("delete", base, "1", "2", "1", "--json").stdout)
    assert (again["deleted"], again["missing"]) == (1, ["1"])


@pytest.mark.parametrize("verb", [["info"], ["info", "--json"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_sentence(base, verb):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ragstone", *verb, base]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "the disk is full" in done.stderr


def test_ctrl_c_while_modules_are_read_is_no_traceback(monkeypatch, capsys):
    from ragstone import cli

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "error: Interrupted.\n"


def test_a_name_of_nothing_is_said_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ragstone.models.RagConfig.load", lambda *_: pytest.fail("the hub was asked"))
    done = ragstone("info", "misspelt")
    assert (done.returncode, done.stdout) == (1, "")
    assert "neither a knowledge base nor a model 'misspelt'" in done.stderr
