"""Our models inside transformers: the same numbers and the same tokens as by ourselves."""

import subprocess
import sys

import pytest
import torch
from hugging import END, PATTERNS, build, config, generated, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationConfig

from moemamba import ModelConfig, MoEMamba, generate
from moemamba.config import ExpertsConfig, MambaConfig
from moemamba.integrations.transformers import MoEMambaConfig, MoEMambaModel, StateCache

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_and_greedy_tokens(pattern):
    model, x = build(pattern), tokens(3, 11)
    with torch.no_grad():
        assert model(x).logits.equal(model.native()(x).logits)
        assert model(inputs_embeds=model.get_input_embeddings()(x)).logits.equal(model(x).logits)
        assert model(x, logits_to_keep=2).logits.equal(model(x).logits[:, -2:])
        assert model(x, return_dict=False)[0].equal(model(x).logits)
    expected = generate(model.native(), x.tolist(), 8, temperature=0)
    assert generated(model, x).tolist() == expected
    assert generated(model, x, use_cache=False).tolist() == expected
    assert generated(model, x, prefill_chunk_size=4).tolist() == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_different_lengths(pattern):
    """Padded on the left, as generate wants it, and on the right for a loss."""
    model, prompts = build(pattern), [[5, 6, 7], list(range(10, 22)), [200]]
    longest = max(map(len, prompts))
    left = torch.tensor([[END] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(left, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=END)
    assert out[:, longest:].tolist() == generate(model.native(), prompts, 8, temperature=0)
    right = torch.tensor([p + [END] * (longest - len(p)) for p in prompts])
    with torch.no_grad():
        logits = model(right, attention_mask=mask.flip(1)).logits
        for row, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(row[: len(prompt)], model(torch.tensor([prompt])).logits[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_beams_samples_and_several_continuations(pattern):
    model, x = build(pattern), tokens(2, 9)
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 3, "num_beam_groups": 1}):
        assert generated(model, x, **options).equal(generated(model, x, use_cache=False, **options))
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(1)
    first = generated(model, x, **options)
    torch.manual_seed(1)
    assert first.equal(generated(model, x, use_cache=False, **options)) and first.shape == (6, 8)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_goes_on(pattern):
    """A conversation: the whole of it is given, and what is in the cache is not read again."""
    model, x, cache = build(pattern), tokens(2, 9), StateCache()
    first = generated(model, x, 3, past_key_values=cache)
    more = torch.cat([x, first, tokens(2, 4, seed=8)], 1)
    read, forward = [], model.model.through
    model.model.through = lambda x, *args, **kwargs: read.append(x.shape[1]) or forward(x, *args, **kwargs)
    second = generated(model, more, 3, past_key_values=cache)
    assert read == [5, 1, 1]  # of which one was written but not yet read
    assert second.tolist() == generate(model.native(), more.tolist(), 3, temperature=0)
    with torch.no_grad():  # a call of several tokens continues, as one of one does
        half = model(x[:, :5])
        rest = model(x[:, 5:], past_key_values=half.past_key_values)
        torch.testing.assert_close(torch.cat([half.logits, rest.logits], 1), model(x).logits)
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_a_cache_of_another_kind_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="is a DynamicCache; this model's is a StateCache"):
        generated(build(), tokens(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"stateful|assist"):  # nothing that was read can be taken back
        generated(build(), tokens(1), assistant_model=build())


@pytest.mark.parametrize("pattern", ["ME", "MEAE"])
def test_packed_rows_are_kept_apart(pattern):
    """However a collator says where they begin."""
    model, a, b = build(pattern), tokens(1, 7), tokens(1, 9, seed=4)
    row = torch.cat([a, b], 1)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    ways = [
        {"position_ids": positions},
        {"seq_idx": torch.tensor([[0] * 7 + [1] * 9], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 7, 16], dtype=torch.int32)},
    ]
    with torch.no_grad():
        expected = torch.cat([model(a).logits, model(b).logits], 1)
        assert (model(row).logits - expected).abs().max() > 1e-3
        for way in ways:
            torch.testing.assert_close(model(row, use_cache=False, **way).logits, expected)
        mask = torch.tensor([[0, 0] + [1] * 16])
        padded, marks = torch.cat([a[:, :2], row], 1), torch.cat([torch.ones(1, 2).long(), positions], 1)
        found = model(padded, attention_mask=mask, position_ids=marks).logits[:, 2:]
        torch.testing.assert_close(found, expected)


def test_hidden_states():
    model, x = build("MEA"), tokens()
    out = model.model(x, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.model.layers) + 1 and out.hidden_states[-1] is out.last_hidden_state
    assert out.hidden_states[0].equal(model.get_input_embeddings()(x))
    torch.testing.assert_close(model.model.norm(_after(model, out.hidden_states[-2])), out.last_hidden_state)
    with pytest.raises(ValueError, match="keeps no attention weights"):
        model(x, output_attentions=True)


def _after(model, x):
    x, y, _, _ = model.model.layers[-1](x, None, None, None)
    return x + y


def test_configurations_go_there_and_back():
    for own in (config("ME(MA)R"), config("M", norm_eps=1e-6, mamba=MambaConfig(inner_norm="rmsnorm"))):
        theirs = MoEMambaConfig.of(own, eos_token_id=END, pad_token_id=END)
        assert theirs.native() == own and theirs.hidden_size == own.d_model
        assert MoEMambaConfig.from_dict(theirs.to_dict()).native() == own
        assert len(theirs.layer_types) == theirs.num_hidden_layers == len(own.layers)
    assert MoEMambaConfig(pattern="AMEF").layer_types[:4] == ["full_attention", "linear_attention", "moe", "moe"]
    assert MoEMambaConfig().native() == ModelConfig()
    with pytest.raises(ValueError, match="d_stat"):
        MoEMambaConfig(mamba={"d_stat": 3})
    with pytest.raises(ValueError, match="pattern 'X'"):
        MoEMambaConfig(pattern="X")


def test_auto_classes_build_them():
    theirs = MoEMambaConfig.of(config())
    assert isinstance(AutoConfig.for_model("moemamba"), MoEMambaConfig)
    assert isinstance(AutoModel.from_config(theirs), MoEMambaModel)
    model = AutoModelForCausalLM.from_config(theirs)
    assert model.num_parameters() == sum(p.numel() for p in model.native().parameters())


def test_a_new_model_has_our_initial_weights():
    theirs = build().native().state_dict()
    torch.manual_seed(0)
    ours = MoEMamba(config()).state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabularies_grow(tied):
    model, x = build(tie_embeddings=tied), tokens()
    before = model(x).logits.detach()
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300 and model(x).logits.shape[-1] == 300
    torch.testing.assert_close(model(x).logits[..., :257], before)
    loss = model.train()(x, labels=x).loss
    loss.backward()
    assert model.get_output_embeddings().weight.grad.isfinite().all()
    assert (model.lm_head.weight is model.model.embedding.weight) == tied


def test_float32_is_kept_where_it_matters():
    model = build("MEA", experts=ExpertsConfig(4, router_bias=True)).to(torch.bfloat16)
    assert torch.isfinite(model(tokens()).logits).all()


def test_what_is_generated_says_so():
    """Scores, a state that goes on, and an end."""
    model, x = build(), tokens(2, 5)
    out = generated_with(model, x)
    assert isinstance(out.past_key_values, StateCache) and len(out.scores) == 4
    stops = GenerationConfig(eos_token_id=int(generated(model, x[:1], 1)), max_new_tokens=5, pad_token_id=END)
    assert model.generate(x[:1], generation_config=stops).shape[1] == 6


def generated_with(model, x):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": END}
    return model.generate(x, output_scores=True, return_dict_in_generate=True, **options)


def test_without_transformers_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None\nimport moemamba.integrations.transformers"
    code = code.replace(
        "sys.modules['transformers'] = None", "import importlib.util as u; u.find_spec = lambda n: None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("needs the package transformers: pip install 'moemamba[hf]'")
