"""The package as a researcher meets it: names, help, types, errors, what an own loop and own layers can do."""

import inspect
import pickle
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moemamba as mm
from moemamba import layers

TINY = mm.ModelConfig("MEAR", 1, 16, 31, experts=mm.ExpertsConfig(4), attention=mm.AttentionConfig(2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mm.MoEMamba(TINY).eval()


def tokens(rows=2, length=9):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(1))


def test_tab_and_help_show_what_there_is():
    assert set(dir(mm)) == {*mm.__all__, "__version__"}
    assert all(inspect.getdoc(getattr(mm, name)) for name in mm.__all__)
    for kind in (mm.TrainConfig, mm.ModelConfig, mm.MambaConfig, mm.ExpertsConfig):
        text = inspect.getdoc(kind)
        parts = {"mamba", "experts", "routed", "attention", "feedforward"} if kind is mm.ModelConfig else set()
        assert all(f"{name}: " in text for name in kind.__dataclass_fields__.keys() - parts)
    assert "median norm" in inspect.getdoc(mm.TrainConfig)
    with pytest.raises(TypeError, match=r"generate\(\) has no option temprature; .* temperature, top_k"):
        mm.generate(mm.MoEMamba(TINY), [1], temprature=1)


USER = """
import moemamba as mm
import torch
from moemamba import layers

x = torch.zeros(1, 3, 256)
model = mm.MoEMamba(mm.ModelConfig())
reveal_type(model(x))
reveal_type(model(x).auxiliary)
reveal_type(layers.Mamba(8)(x))
reveal_type(layers.MoE(8, 2)(x))
reveal_type(layers.Attention(8, 2)(x))
reveal_type(layers.FeedForward(8, 2)(x))
reveal_type(layers.RoutedMamba(8, 2)(x))
reveal_type(layers.Router(8, 2)(x))
reveal_type(layers.BaseRouter(2)(x))
reveal_type(layers.Mamba(8, device="meta", dtype=torch.bfloat16)(x))
reveal_type(mm.look(model, x).selection["layers.0"].dt)
reveal_type(mm.TrainConfig().replace(steps=3))
reveal_type(mm.ModelConfig().replace(n_experts=(2, 4)).routers[0].count)
reveal_type(mm.generate(model, [1, 2], temperature=0.5))
reveal_type(mm.generate(model, [[1], [2]], top_k=5))
reveal_type(mm.load("runs/mine"))
reveal_type(mm.layers.Mamba(8).initial_state(2).detach())
mm.generate(model, [1], temprature=0.5)
"""


@pytest.mark.slow
def test_a_checker_sees_types(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    path = {"MYPYPATH": str(Path(mm.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    revealed = [line.partition('Revealed type is "')[2] for line in lines if "Revealed" in line]
    assert len(revealed) == USER.count("reveal_type"), done.stdout
    assert not [kind for kind in revealed if "Any" in kind], done.stdout
    errors = [line for line in lines if ": error:" in line]
    assert {line.split(":")[1] for line in errors} == {str(USER.count(chr(10)))} and "temprature" in errors[0], (
        done.stdout
    )


def test_embedded_inputs_are_inputs(model):
    ids, seq_idx = tokens(), torch.tensor([[0] * 5 + [1] * 4, [0] * 7 + [-1] * 2])
    targets = tokens().roll(1)
    for given in ({}, {"seq_idx": seq_idx}, {"targets": targets, "seq_idx": seq_idx}):
        one, two = model(ids, **given), model(model.embedding(ids), **given)
        assert torch.equal(*((each.loss if "targets" in given else each.logits) for each in (one, two)))
    first = model(ids[:, :4])
    later = model(model.embedding(ids[:, 4:]), first.state).logits
    torch.testing.assert_close(later, model(ids).logits[:, 4:])
    hidden = model.backbone(model.embedding(ids))[0]
    assert hidden.shape == (2, 9, 16)
    assert torch.equal(model(ids.to(torch.uint8)).logits, model(ids).logits)
    series = torch.randn(2, 9, 16, requires_grad=True)
    model(series).logits.sum().backward()
    assert series.grad.abs().sum() > 0
    for wrong in (torch.zeros(2, 9), torch.zeros(2, 9, 8)):
        with pytest.raises(ValueError, match=r"expected integers \(batch, length\), or embedded .* d_model = 16"):
            model(wrong)


def test_auxiliary_is_the_weighed_mean(model):
    out = model(tokens(), targets=tokens())
    torch.testing.assert_close(out.auxiliary, sum(stats.loss() for stats in out.router) / len(out.router))
    assert out.router[0].loss(1.0, 0.0) == out.router[0].balance_loss
    assert model(tokens()).auxiliary is not None  # for a head of one's own
    with torch.no_grad():
        assert model(tokens()).auxiliary is None and model(tokens(), targets=tokens()).auxiliary is not None
    plain = mm.MoEMamba(mm.ModelConfig("M", 1, 8, 31))
    assert plain(tokens(), targets=tokens()).auxiliary == 0 and plain(tokens()).auxiliary is None


def test_a_forgotten_auxiliary_is_said_once(model):
    def steps(model, count, loss, rate=1e-3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                loss(model(tokens(), targets=tokens())).backward()
                if rate:
                    torch.optim.SGD(model.parameters(), rate).step()
        return [str(each.message) for each in caught if each.category is UserWarning]

    said = steps(deepcopy(model), 25, lambda out: out.loss)
    assert len(said) == 1 and "minimise out.loss + out.auxiliary" in said[0]
    assert not steps(deepcopy(model), 15, lambda out: out.loss + out.auxiliary)
    assert not steps(deepcopy(model), 15, lambda out: out.loss + sum(stats.loss() for stats in out.router))
    assert not steps(deepcopy(model), 25, lambda out: out.loss, rate=0)  # gradients that train nothing
    free = mm.MoEMamba(TINY.replace(balance_weight=0.0, z_weight=0.0))
    assert not steps(free, 15, lambda out: out.loss)
    for layer in model.modules():
        if isinstance(layer, layers.Router):
            layer.requires_grad_(False)
    assert not steps(model.requires_grad_(False), 1, lambda out: out.loss.requires_grad_())
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("layer", [layers.Mamba(16), layers.Attention(16, 2)])
def test_states_of_layers_are_values(layer):
    x = torch.randn(3, 7, 16)
    _, state = layer(x[:, :4])
    later = layer(x[:, 4:], state)[0]
    assert torch.equal(layer(x[[2, 0], 4:], state.select([2, 0]))[0], later[[2, 0]])
    assert torch.equal(layer(x.repeat_interleave(2, 0)[:, 4:], state.fork(2))[0], later.repeat_interleave(2, 0))
    assert state.to("cpu")[0].requires_grad and not any(part.requires_grad for part in state.detach())
    assert type(state.select(slice(1))) is type(state.detach()) is type(state)
    start = layer.initial_state(3)
    torch.testing.assert_close(layer(x, start)[0], layer(x)[0])
    assert all(one.dtype == two.dtype for one, two in zip(start, state, strict=True))


def test_a_learned_start_gets_gradients():
    layer = layers.Mamba(8).double()
    start = layer.initial_state(1)
    learned = [torch.nn.Parameter(part[0]) for part in start]
    assert start.ssm.dtype == torch.float64
    state = layers.MambaState(*(part.expand(4, *part.shape) for part in learned))
    layer(torch.randn(4, 5, 8, dtype=torch.float64), state)[0].sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in learned)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_are_the_sequences_alone(side, model):
    lengths = torch.tensor([5, 9, 0])
    seq_idx = layers.padded(lengths, 9, side)
    ids = tokens(3)
    logits = model(ids, seq_idx=seq_idx).logits
    for row, length in enumerate(lengths.tolist()):
        part = slice(0, length) if side == "right" else slice(9 - length, 9)
        assert (seq_idx[row] >= 0).sum() == length and (seq_idx[row, part] == 0).all()
        if length:
            torch.testing.assert_close(logits[row, part], model(ids[row : row + 1, part]).logits[0])
    assert layers.padded(lengths).shape == (3, 9)
    with pytest.raises(ValueError, match=r"expected 0 to length = 4"):
        layers.padded(lengths, 4)


def test_packed_sequences_are_alone(model):
    parts = [tokens()[0, :4], tokens()[1, :7], tokens()[0, 3:]]
    ids, seq_idx = layers.packed(parts)
    found = model(ids, seq_idx=seq_idx).logits[0].split([4, 7, 6])
    for part, logits in zip(parts, found, strict=True):
        torch.testing.assert_close(logits, model(part[None]).logits[0])
    vectors, _ = layers.packed([torch.zeros(2, 5), torch.ones(3, 5)])
    assert vectors.shape == (1, 5, 5)
    with pytest.raises(ValueError, match="give one or more"):
        layers.packed([])


@pytest.mark.parametrize("letter", mm.config.LETTERS)
@pytest.mark.parametrize("stand_in", ["meta", "fake"])
def test_shapes_without_numbers(letter, stand_in):
    """Forward, continued and backward, where nothing is computed: what estimates memory or traces looks like this."""
    config = TINY.replace(pattern=letter)
    mode = torch.device("meta") if stand_in == "meta" else FakeTensorMode()
    with mode:
        model = mm.MoEMamba(config)
        ids = torch.zeros(2, 9, dtype=torch.int64)
        state = model(ids).state
        out = model(ids, state, ids, targets=ids)
        (out.loss + out.auxiliary).backward()
        assert out.loss.shape == () and model(ids).logits.shape == (2, 9, 31)
        assert model.embedding.weight.grad.shape == (31, 16)


@pytest.mark.parametrize("letter", mm.config.LETTERS)
def test_batches_of_nothing(letter):
    model = mm.MoEMamba(TINY.replace(pattern=letter))
    for shape in ((0, 5), (2, 0), (0, 0), (1, 1)):
        ids = torch.zeros(shape, dtype=torch.int64)
        out = model(ids, targets=ids, seq_idx=ids)
        (out.loss + out.auxiliary).backward()
        assert model(ids).logits.shape == (*shape, 31)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("marks", [torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9), torch.zeros(2, 8).long()])
def test_a_mask_is_no_seq_idx(model, marks):
    takes = [lambda **how: model(tokens(), **how), lambda **how: layers.pooled(torch.zeros(2, 9, 16), **how)]
    takes += [partial(layer, torch.zeros(2, 9, 16)) for layer in (layers.Mamba(16), layers.MoE(16, 2))]
    takes += [partial(layer, torch.zeros(2, 9, 16)) for layer in (layers.Attention(16, 2), layers.RoutedMamba(16, 2))]
    for take in takes:
        with pytest.raises(ValueError, match=r"seq_idx (is torch.(bool|float32); .* mask.int\(\) - 1|has shape)"):
            take(seq_idx=marks)
    with pytest.raises(ValueError, match=r"expected integers \(b,\)"):
        layers.padded(torch.ones(2, 9, dtype=torch.bool))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    assert torch.equal(mask.int() - 1, layers.padded(mask.sum(1)))


def test_what_is_no_configuration_says_where_one_is(model):
    for wrong, said in (
        (lambda: mm.ModelConfig(n_experts=4), r"ModelConfig\(experts=ExpertsConfig\(n_experts=4\)\), or .*replace"),
        (lambda: mm.ModelConfig(d_state=4), r"is a field of ModelConfig.mamba"),
        (lambda: mm.ModelConfig(nonsense=4), "unexpected keyword argument 'nonsense'"),
        (lambda: mm.MoEMamba("moe-mamba-tiny"), r"preset\('moe-mamba-tiny'\) is one"),
        (lambda: mm.MoEMamba(mm.TrainConfig()), "a TrainConfig has it as config.model"),
        (lambda: mm.count_parameters(model), "a model has it as model.config"),
        (lambda: mm.train("moe-mamba-tiny"), "expected a TrainConfig"),
        (lambda: model([[1, 2]]), r"tokens is a list; expected a tensor"),
    ):
        with pytest.raises(TypeError, match=said):
            wrong()
    assert mm.ModelConfig("E", experts={"n_experts": 2}) == mm.ModelConfig("E", experts=mm.ExpertsConfig(2))
    config = pickle.loads(pickle.dumps(deepcopy(TINY)))
    assert config == TINY and hash(config) == hash(TINY)
    with pytest.raises(ValueError, match="lerning_rate is no field of TrainConfig"):
        mm.TrainConfig().replace(lerning_rate=1)


def test_states_lie_beside_weights(model, tmp_path):
    out = model(tokens())
    torch.save({"state": out.state.detach(), "stats": out.router[0]}, tmp_path / "mine.pt")
    assert torch.equal(torch.load(tmp_path / "mine.pt")["state"].mixers[0].ssm, out.state.mixers[0].ssm)
