"""transformers' own models on our kernels: the same outputs, gradients and tokens, and back again."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from moemamba import ops
from moemamba.integrations.transformers import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")
COMMON = {"vocab_size": 61, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
OWN = {"num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3, "expand": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
JAMBA = {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2} | HEADS
JAMBA |= {"mamba_d_state": 5, "mamba_dt_rank": 3, "expert_layer_period": 2, "expert_layer_offset": 1}
MODELS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**COMMON, **OWN)),
    "mamba, no conv bias": lambda: MambaForCausalLM(MambaConfig(**COMMON, **OWN, use_conv_bias=False, use_bias=True)),
    "falcon-mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**COMMON, **OWN, use_bias=True)),
    "falcon-mamba, no bias": lambda: FalconMambaForCausalLM(FalconMambaConfig(**COMMON, **OWN)),
    "jamba": lambda: JambaForCausalLM(JambaConfig(**COMMON, **JAMBA)),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # initial weights are too small to show a difference
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def tokens(rows=2, length=13):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def outputs(model, x, mask=None):
    model.zero_grad()
    out = model(x, attention_mask=mask, labels=x, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1e-3, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, training):
    model, x = build(name).train(training), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    expected = [outputs(model, x), outputs(model, x, mask)]
    used, choose = [], ops.scan.compute
    with accelerate(model) as accelerated, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.scan, "compute", lambda op, *args: used.append(op) or choose(op, *args))
        found = [outputs(model, x), outputs(model, x, mask)]
    mixers = [name for name in accelerated.names if name.endswith(("mixer", "mamba"))]
    assert len(used) == 2 * len(mixers) > 0
    for pair in zip(found, expected, strict=True):
        assert_same(*pair)
    assert_same(outputs(model, x), expected[0])  # what it was
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens(name):
    """Greedy, by beams, of rows of different lengths, and from a cache that the model itself began."""
    model, x = build(name), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    ways = [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
    expected = [model.generate(x, **options, **way) for way in ways]
    with torch.no_grad(), accelerate(model):
        assert all(model.generate(x, **options, **way).equal(e) for way, e in zip(ways, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_caches_change_hands(name):
    """A state of theirs is one of ours, and the other way round."""
    model, x = build(name), tokens()

    def read(part, **cache):
        """Logits, and the cache by the name that the model has for it."""
        out = model(part, use_cache=True, **cache)
        return out.logits, {name: out[name] for name in ("cache", "past_key_values", "cache_params") if name in out}

    def continued(first, second):
        with torch.no_grad():
            undo = accelerate(model).undo if first else lambda: None
            _, cache = read(x[:, :9])
            undo()
            undo = accelerate(model).undo if second else lambda: None
            found = []
            for t in range(9, 13):
                logits, cache = read(x[:, t : t + 1], **cache)
                found.append(logits)
            undo()
        return torch.cat(found, 1)

    with torch.no_grad():
        expected = model(x, use_cache=False).logits[:, 9:]
    for first in (False, True):
        for second in (False, True):
            torch.testing.assert_close(continued(first, second), expected, rtol=1e-3, atol=1e-4)


def begun(model):
    """Tokens, and the cache after most of them, by the name that the model has for it."""
    x = tokens()
    out = model(x[:, :9], use_cache=True)
    return x, {name: out[name] for name in ("cache", "past_key_values", "cache_params") if name in out}


FUSED = {"mamba": 2, "falcon-mamba, no bias": 2, "jamba": 3, "mamba, no conv bias": 0}


@pytest.mark.parametrize("name", FUSED)
def test_a_token_is_one_kernel_a_layer(name, monkeypatch):
    """Made ready once, as long as weights stay where they are."""
    model, made, taken = build(name), [], []
    plain = ops.mamba_step_of

    def counted(*args):
        made.append(1)
        step = plain(*args)
        return lambda *given: taken.append(1) or step(*given)

    monkeypatch.setattr(ops, "mamba_step_of", counted)
    with torch.no_grad():
        x, cache = begun(model)
        expected, mine = [], deepcopy(cache)
        for t in range(9, 13):
            expected.append(model(x[:, t : t + 1], use_cache=True, **cache).logits)
        with accelerate(model):
            found = [model(x[:, t : t + 1], use_cache=True, **mine).logits for t in range(9, 13)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (len(made), len(taken)) == (FUSED[name], 4 * FUSED[name])


def renewed(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(parameter * 1.1))


def written(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # the version of the parameter stays


def moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def loaded(model):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def hooked(kind):
    def change(model):
        for module in model.modules():
            if type(module).__name__.endswith(kind):
                module.register_forward_hook(lambda module, inputs, output: 1.5 * output)

    return change


def forwarded(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x: 0.9 * x


def looser(model):
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 0.3)


CHANGES = {
    "eps of norms": looser,
    "renewed": renewed,
    "written": written,
    "moved": moved,
    "loaded": loaded,
    "double": lambda model: model.double(),
    "forward of a norm": forwarded,
} | {f"hook on {kind}": hooked(kind) for kind in ("Mixer", "RMSNorm", "Linear", "Conv1d", "Block")}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["mamba", "falcon-mamba, no bias", "jamba"])
def test_a_change_between_two_tokens_is_seen(name, change):
    if (name, change) == ("jamba", "double"):
        pytest.skip("experts of transformers know no float64")
    model = build(name)
    with torch.no_grad():
        x, cache = begun(model)
        accelerated = accelerate(model)
        model(x[:, 9:10], use_cache=True, **cache)
        CHANGES[change](model)
        theirs = deepcopy(cache)
        found = model(x[:, 10:11], use_cache=True, **cache).logits
        accelerated.undo()
        if change == "forward of a norm":
            forwarded(model)  # undoing took it away
        expected = model(x[:, 10:11], use_cache=True, **theirs).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_copy_has_weights_of_its_own(tmp_path):
    model = build("mamba")
    with torch.no_grad(), accelerate(model):
        x, cache = begun(model)
        expected = model(x[:, 9:10], use_cache=True, **deepcopy(cache)).logits
        torch.save(model, tmp_path / "model.pt")
        copies = [deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
        written(model)
        for copy in copies:
            assert copy(x[:, 9:10], use_cache=True, **deepcopy(cache)).logits.equal(expected)
            written(copy)
            wanted = model(x[:, 9:10], use_cache=True, **deepcopy(cache)).logits
            assert copy(x[:, 9:10], use_cache=True, **deepcopy(cache)).logits.equal(wanted)
        assert (wanted - expected).abs().max() > 1e-3


def test_what_theirs_gets_wrong():
    """A cached call of several tokens begins the scan again with them."""
    model, x = build("mamba"), tokens()

    def two_calls():
        out = model(x[:, :6], use_cache=True)
        name = next(n for n in ("cache", "cache_params") if n in out)
        return torch.cat([out.logits, model(x[:, 6:], **{name: out[name]}).logits], 1)

    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        assert (two_calls() - expected).abs().max() > 1e-3
        with accelerate(model):
            torch.testing.assert_close(two_calls(), expected, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_accelerated_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(**COMMON, **HEADS, num_hidden_layers=1))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer to accelerate"):
        accelerate(llama)
    other = MambaForCausalLM(MambaConfig(**COMMON, **OWN, hidden_act="gelu"))
    with pytest.raises(ValueError, match="has the activation 'gelu'; the kernels know silu alone"):
        accelerate(other)
    model = build("mamba")
    accelerated = accelerate(model)
    with pytest.raises(ValueError, match="accelerated already; undo that first"):
        accelerate(model)
    accelerated.undo()
    accelerated.undo()
    accelerate(model).undo()


def test_a_forward_of_ones_own_comes_back():
    model = build("mamba")
    mixer = model.backbone.layers[0].mixer
    mine = mixer.forward = lambda *args, **kwargs: torch.zeros_like(args[0])
    accelerate(model).undo()
    assert mixer.forward is mine


def test_adapters():
    """LoRA on the projections that transformers lets have some."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, x = build("mamba"), tokens()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = outputs(adapted, x)
    with accelerate(adapted):
        assert_same(outputs(adapted, x), expected)
    with torch.no_grad():
        tokens_before = adapted.generate(input_ids=x, max_new_tokens=5, do_sample=False)
        with accelerate(adapted):
            assert adapted.generate(input_ids=x, max_new_tokens=5, do_sample=False).equal(tokens_before)
