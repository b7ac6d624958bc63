"""One folder for both libraries: runs, checkpoints and what transformers saves."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hugging import END, build, config, generated, tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, pipeline

import moemamba
from moemamba import MoEMamba, TrainConfig, load, save, train
from moemamba.config import FOREIGN, ExpertsConfig, MambaConfig, ModelConfig
from moemamba.host.progress import Report
from moemamba.integrations.transformers import MoEMambaForCausalLM
from moemamba.reading import from_dict, read_config
from moemamba.text import ByteTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps, with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the river carries the boat over the stones\n" * 300)
    model = config("ME", d_model=16, n_blocks=1, tie_embeddings=True)
    options = {"data": str(folder / "text.txt"), "run": str(folder / "run"), "steps": 3, "batch_size": 2, "context": 32}
    train(replace(TrainConfig(), model=model, device="cpu", eval_tokens=64, **options), report=Report(silent=True))
    return folder / "run"


def test_a_run_goes_to_transformers_and_back(run, tmp_path):
    native, _ = load(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    assert isinstance(model, MoEMambaForCausalLM) and same(model.native(), native)
    assert model.lm_head.weight is model.model.embedding.weight
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path / "saved")
    again, own = load(tmp_path / "saved")
    assert same(again, native) and again.config == native.config and own.encode("the") == list(b"the")
    x = tokens()
    with torch.no_grad():
        assert model.eval()(x).logits.equal(again(x).logits)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "after step 3" in card and "bits a byte" in card and "library_name: transformers" in card
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pattern", ["ME", "(MA)R"])
def test_checkpoints_have_the_same_names(pattern, tied, tmp_path):
    """Of tensors, whoever writes them; later options and biases too."""
    options = {"mamba": MambaConfig(inner_norm="rmsnorm"), "norm_eps": 1e-6, "head_bias": True}
    native = MoEMamba(config(pattern, tie_embeddings=tied, experts=ExpertsConfig(4, bias=True), **options)).eval()
    save(tmp_path / "ours", native, ByteTokenizer())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and same(model.native(), native)
    model.save_pretrained(tmp_path / "theirs")
    from safetensors import safe_open

    names = []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]
    below = AutoModel.from_pretrained(tmp_path / "theirs")
    assert same(below, model.model)
    below.save_pretrained(tmp_path / "below")
    assert same(AutoModel.from_pretrained(tmp_path / "below"), below)


def test_missing_weights_are_drawn_as_in_a_new_model(tmp_path):
    build().model.save_pretrained(tmp_path)  # without a head
    model, info = MoEMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["missing_keys"]) == ["lm_head.weight"]
    assert 0.015 < model.lm_head.weight.std() < 0.025 and same(model.model, build().model)


def test_missing_weights_are_drawn_wherever_the_model_is_built(tmp_path, monkeypatch):
    """Not on the meta device, but in memory: what takes the place of a drawn weight is not drawn."""
    build().model.save_pretrained(tmp_path)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch.utils._device, "_device_constructors", set)
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    model = MoEMambaForCausalLM.from_pretrained(tmp_path)
    assert 0.015 < model.lm_head.weight.std() < 0.025 and same(model.model, build().model)


def test_half_precision_keeps_what_needs_float32(tmp_path):
    build("ME", experts=ExpertsConfig(4, router_bias=True)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert exact == {"A_log", "D", "bias", "weight"}  # of routers and dt_proj
    wide = [name for name, p in model.named_parameters() if p.dtype == torch.float32 and name.endswith("weight")]
    assert all(name.endswith("router.weight") for name in wide)
    assert model(tokens()).logits.isfinite().all() and model.dtype == torch.bfloat16
    assert generated(model.eval(), tokens()).shape == (2, 8)
    model.save_pretrained(tmp_path / "narrow")
    (tmp_path / "narrow" / "tokenizer.json").write_text(ByteTokenizer().to_json())
    wide_again, _ = load(tmp_path / "narrow")  # in float32, with the numbers that there are
    assert all(a.equal(b.float()) for a, b in zip(wide_again.parameters(), model.native().parameters(), strict=True))


def test_a_config_of_ours_is_read_by_both():
    """What transformers adds is no field of ours, and of another kind of model there is nothing to read."""
    added = {name for name in PreTrainedConfig().to_dict() if not name.startswith("_")}
    assert added <= FOREIGN and not FOREIGN & set(vars(ModelConfig()))
    theirs = build().config
    assert from_dict(ModelConfig, json.loads(theirs.to_json_string())) == theirs.native()
    assert from_dict(ModelConfig, json.loads(theirs.to_json_string(use_diff=False))) == theirs.native()
    with pytest.raises(ValueError, match="describes a model of the type 'jamba', not moemamba"):
        from_dict(ModelConfig, {"model_type": "jamba", "hidden_size": 3})
    with pytest.raises(ValueError, match="unknown key 'd_modle'"):
        from_dict(ModelConfig, {"model_type": "moemamba", "d_modle": 3})


def test_tokenizer_and_pipeline(run):
    own = AutoTokenizer.from_pretrained(run)
    assert own("héllo").input_ids == list("héllo".encode()) and own.eos_token_id == own.pad_token_id == END
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.generation_config.eos_token_id == END
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    pair = pipeline("text-generation", model=model, tokenizer=own)(["the ", "the river"], batch_size=2, **options)
    native, tokenizer = load(run)
    prompts = [tokenizer.encode("the "), tokenizer.encode("the river")]
    expected = moemamba.generate(native, prompts, 6, temperature=0)
    assert [each[0]["generated_text"] for each in pair] == [tokenizer.decode(ids) for ids in expected]


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "moemamba" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__ == "moemamba.integrations.transformers.causal"
assert model(torch.load(sys.argv[1] + "/x.pt")).logits.equal(torch.load(sys.argv[1] + "/y.pt"))
"""


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moemamba":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_remote_code(tmp_path):
    """In a process that has imported nothing of ours, and in one that cannot."""
    model, x = build(), tokens()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    torch.save(x, tmp_path / "x.pt")
    torch.save(model(x).logits.detach(), tmp_path / "y.pt")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without = BLOCKED + REMOTE.replace("assert", "0 and")
    command = [sys.executable, "-c", without, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, check=False)
    assert "pip install moemamba" in done.stderr


def test_push_to_hub(monkeypatch):
    """What is uploaded is such a folder; a card that is there already stays."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    sent, there = {}, []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})()

        def file_exists(self, repo_id, name, revision):
            return name in there

        def upload_folder(self, repo_id, folder_path, **others):
            sent[repo_id] = {file.name: file.read_bytes() for file in folder_path.iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    build().push_to_hub("model", commit_message="first")
    (folder,) = sent.values()
    assert folder.keys() >= {"config.json", "model.safetensors", "README.md", "modeling_moemamba.py"}
    assert b'from_pretrained("someone/model")' in folder["README.md"]
    there.append("README.md")
    build().push_to_hub("model")
    assert "README.md" not in sent["someone/model"]


def test_old_configs_are_read(tmp_path):
    """Of versions that wrote nothing for transformers."""
    save(tmp_path / "model", MoEMamba(config()), ByteTokenizer())
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    for name in FOREIGN:
        values.pop(name, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    assert read_config(ModelConfig, tmp_path / "model" / "config.json") == config()
    assert same(MoEMambaForCausalLM.from_pretrained(tmp_path / "model").native(), load(tmp_path / "model")[0])
