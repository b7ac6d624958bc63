"""What is done with a model that has the letter S; see `test_letter`."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moemamba as mm
from moemamba.config import AttentionConfig
from moemamba.counting import flops_per_token, state_bytes
from moemamba.distributed import sharding
from moemamba.distributed.processes import Processes
from moemamba.host.progress import Report
from moemamba.layers import LAYERS, roles
from moemamba.training.spread import build

folder = sys.argv[1]
CONFIG = mm.ModelConfig("SA", 2, 16, vocab_size=257, attention=AttentionConfig(2)).replace(d_smooth=12)
TOKENS = torch.randint(257, (4, 9), generator=torch.Generator().manual_seed(1))


def counting():
    count, model = mm.count_parameters(CONFIG), mm.MoEMamba(CONFIG)
    assert count.total + count.embedding == sum(p.numel() for p in model.parameters())
    assert model(TOKENS[:1]).state.nbytes == state_bytes(CONFIG, 9)
    others = CONFIG.replace(pattern="A")  # without the weights of S, its norm and its mean, twice each
    assert flops_per_token(CONFIG, 0) - flops_per_token(others, 0) == 2 * (2 * 33 * 12 + 2 * 16 + 4 * 12)
    role = roles(model)["layers.0.branches.0.decay"]
    assert not role.decays and not role.muon and roles(model)["layers.0.branches.0.in_proj.weight"].muon
    for changes, message in (({"d_smooth": 1000}, "d_smooth is 1000"), ({"d_smoth": 1}, "is no field")):
        try:
            CONFIG.replace(**changes)
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError(changes)
    try:
        model(TOKENS, mm.MoEMamba(CONFIG.replace(pattern="A"))(TOKENS).state)
    except ValueError as error:
        assert "(A attention, M Mamba, S smoothing), and this model's are 'SASA'" in str(error)


def train():
    text = os.path.join(folder, "text.txt")
    with open(text, "w") as file:
        file.writelines(f"line {k} of the text\n" for k in range(999))
    for optimizer in ("adamw", "muon"):
        run = os.path.join(folder, optimizer)
        config = mm.TrainConfig(
            model=CONFIG,
            data=text,
            run=run,
            steps=3,
            batch_size=4,
            context=16,
            device="cpu",
            optimizer=optimizer,
            eval_tokens=256,
        )
        mm.train(config, report=Report(silent=True))
        model, _tokenizer = mm.load(run)
        assert model.config == CONFIG
        state = model(TOKENS).state
        state.save(os.path.join(run, "state"))
        again = mm.State.load(os.path.join(run, "state"))
        assert all(
            torch.equal(a, b)
            for x, y in zip(state.mixers, again.mixers, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert [type(x).__name__ for x in again.mixers] == ["SmoothingState", "AttentionState"] * 2
    return model


@torch.no_grad()
def decode(model):
    prompts = [[5, 6, 7], [8], [1, 2]]
    expected = mm.generate(model, prompts, 7, temperature=0)
    for prompt, row in zip(prompts, expected, strict=True):  # one by one, and all at once
        for _ in range(7):
            prompt = [*prompt, int(model(torch.tensor([prompt])).logits[0, -1].argmax())]
        assert prompt[-7:] == row
    # from buffers, where rows come, go and change places
    kinds = [LAYERS[letter] for letters in CONFIG.layers for letter in letters]
    states = [model(TOKENS[row : row + 1, : 3 + row]).state for row in range(3)]
    buffers = [kind.allocate(3, 32, like) for kind, like in zip(kinds, states[0].mixers, strict=True)]
    for row, state in enumerate(states):
        for kind, buffer, mixer in zip(kinds, buffers, state.mixers, strict=True):
            kind.put(buffer, slice(row, row + 1), mixer)
    for kind, buffer in zip(kinds, buffers, strict=True):
        kind.move(buffer, torch.tensor([2]), torch.tensor([0]))
    live, states = 2, [states[2], states[1]]
    place = torch.tensor([5, 4])
    for t in range(3):
        x = model.embedding(TOKENS[:live, t : t + 1])
        for layer, own in zip(model.layers, buffers, strict=True):
            x = layer.step(x, [own], live, place)
        place += 1
        for row in range(live):
            out = model(TOKENS[row : row + 1, t : t + 1], states[row])
            states[row] = out.state
            torch.testing.assert_close(model.head(model.norm(x))[row], out.logits[0])
    for row, length in enumerate(place.tolist()):
        for kind, buffer, mixer in zip(kinds, buffers, states[row].mixers, strict=True):
            torch.testing.assert_close(kind.take(buffer, slice(row, row + 1), length), mixer)


def gradients(processes, rows, dtype=torch.float32):
    config = mm.TrainConfig(model=CONFIG, shard="parameters" if processes.distributed else "none", batch_size=4)
    model = build(config, processes, dtype)
    (sharding.summing(model, processes)(TOKENS[rows], targets=TOKENS[rows]).loss * len(TOKENS[rows]) / 4).backward()
    return {name: sharding.gathered(p.grad) for name, p in model.named_parameters()}, model


def sharded(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "store"), 2), rank=rank, world_size=2)
    processes = Processes(torch.device("cpu"), rank, 2, True)
    found, model = gradients(processes, slice(2 * rank, 2 * rank + 2))
    assert sharding.sharded(model)
    narrow = {name for name, m in model.layers[0].named_modules() if m in sharding.narrow_modules(model.layers[0])}
    assert narrow == {"branches.0.in_proj", "branches.0.out_proj"}, narrow
    expected, _ = gradients(Processes(torch.device("cpu")), slice(None))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    counting()
    decode(train())
    mp.spawn(sharded, (folder,), 2)
