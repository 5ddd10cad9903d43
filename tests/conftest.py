"""What every test may use: the example data, one torch thread, and one local Ray for the whole session."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before Ray is imported, and inherited by the commands that tests start: no token in the home folder, no reports.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # nor writes to anyone's tracking server
os.environ.pop("RAY_ADDRESS", None)  # nor joins anyone's cluster

import pytest
import torch
from hypothesis import settings

# Ignored where the tests run in the background of a shell, and inherited by the commands that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile("dpo-ray", deadline=None)  # a timing is no test
settings.load_profile("dpo-ray")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of larger example data, outside the repository."""
    path = Path(os.environ.get("DPO_RAY_SHARED") or REPOSITORY.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"no example data at {path}; DPO_RAY_SHARED names another place")
    return path


@pytest.fixture(scope="session")
def ray_tmpdir() -> Iterator[Path]:
    """A short folder of our own for Ray's sockets (their paths are limited to 107 characters), also of commands."""
    path = Path(tempfile.mkdtemp(prefix="dpo-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(path))
        yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(ray_tmpdir: Path) -> Iterator[None]:
    """One local Ray with two CPUs. It ends with `ray.shutdown()`: `ray stop` would end everyone's."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 1024**2,
        log_to_driver=False,
        _temp_dir=str(ray_tmpdir),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a tokenizer of bytes, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
