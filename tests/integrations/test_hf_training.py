"""Our models in transformers' Trainer, in PEFT and in TRL."""

import re

import pytest
import torch
from hugging import END, build, config, generated, tokenizer, tokens
from torch.utils.data import Dataset

from moemamba.config import ExpertsConfig
from moemamba.integrations.transformers import BalanceBias, MoEMambaConfig, MoEMambaForCausalLM
from moemamba.layers import Router

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import Trainer, TrainingArguments  # noqa: E402


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = tokens(1, 16, seed=index)[0]
        return {"input_ids": row, "labels": row.clone()}


def trainer(folder, model, callbacks=(), **options):
    common = {"max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    common |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no", "seed": 1}
    arguments = TrainingArguments(output_dir=str(folder), **common | options)
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks))


def logged(found):
    return [line["loss"] for line in found.state.log_history if "loss" in line]


def native_losses(model, x, labels):
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return model.native()(x, targets=targets)


def test_the_loss_is_ours():
    model, x = build().train(), tokens(4, 16)
    labels = x.clone()
    labels[0, 3:] = -100
    ours = native_losses(model, x, labels)
    out = model(x, labels=labels)
    torch.testing.assert_close(out.loss, ours.loss + ours.auxiliary)
    torch.testing.assert_close(out.aux_loss, ours.auxiliary)
    assert out.logits is None and ours.auxiliary > 0
    count = (labels[:, 1:] != -100).sum()
    parts = [model(x[part], labels=labels[part], num_items_in_batch=count) for part in (slice(0, 2), slice(2, 4))]
    weights = [(labels[part, 1:] != -100).sum() / count for part in (slice(0, 2), slice(2, 4))]
    mean = sum(weight * part.aux_loss for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), ours.loss + mean)
    evaluated = model.eval()(x, labels=labels)
    torch.testing.assert_close(evaluated.loss, ours.loss)
    assert evaluated.logits.shape == (4, 16, 257)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert model(x, shift_labels=shifted).loss.equal(evaluated.loss)


def test_whoever_makes_the_loss_gets_the_routers_losses_too():
    """Of hidden states, as TRL does, or of logits, as for preferences."""
    x = tokens(4, 16)
    wanted = gradients(lambda model: model(x, labels=x).loss)
    hidden = lambda model: cross_entropy(model.lm_head(model.base_model(input_ids=x).last_hidden_state), x)  # noqa: E731
    for other in (hidden, lambda model: cross_entropy(model(x).logits, x)):
        found = gradients(other)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    without = gradients(lambda model: cross_entropy(model.lm_head(model.model(x, carries_auxiliary=False)[0]), x))
    name = next(name for name in wanted if name.endswith("router.weight"))
    assert (without[name] - wanted[name]).norm() > 1e-3 * wanted[name].norm()


def cross_entropy(logits, x):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def gradients(loss):
    model = build(experts=ExpertsConfig(4, top_k=2, balance_weight=0.5)).train()
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_trainer_accumulates_and_checkpoints(tmp_path):
    """In parts or whole, activations kept or computed again: the same steps."""
    found = {}
    for name, options in {
        "whole": {},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "again": {"gradient_checkpointing": True},
    }.items():
        model = build(experts=ExpertsConfig(4, top_k=2, balance_weight=0, z_weight=0))
        run = trainer(tmp_path / name, model, **options)
        run.train()
        found[name] = logged(run)
        assert model.is_activation_checkpointing == model.model.recompute == (name == "again")
    assert found["again"] == found["whole"]
    assert found["parts"] == pytest.approx(found["whole"], abs=1e-4)
    assert run.evaluate()["eval_loss"] < found["whole"][0]


def test_trainer_saves_and_resumes(tmp_path):
    run = trainer(tmp_path, build(), max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    again = trainer(tmp_path, build(), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again)[-2:] == logged(run)[-2:]


def test_balancing_by_a_bias(tmp_path):
    model = build(experts=ExpertsConfig(4, top_k=2, bias_rate=0.125))
    with pytest.warns(UserWarning, match=re.escape("callbacks=[moemamba.integrations.transformers.BalanceBias()]")):
        model.train()(tokens(), labels=tokens())
    trainer(tmp_path, model, [BalanceBias()], gradient_accumulation_steps=2, max_steps=1).train()
    biases = torch.stack([module.balance_bias for module in model.modules() if isinstance(module, Router)])
    assert set(biases.unique().tolist()) <= {-0.125, 0.0, 0.125} and biases.abs().sum() > 0  # one step of two parts


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="adapters need peft")


TARGETS = ["in_proj", "x_proj", "dt_proj", "out_proj", "qkv_proj", "branches.0.up_proj", "branches.0.down_proj"]


def test_adapters_on_projections_routers_and_experts(peft, tmp_path):
    base, x = build("MEAF"), tokens()
    with torch.no_grad():
        before = base(x).logits
    stacked = ["experts.up_proj", "experts.down_proj", "router.weight"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS, target_parameters=stacked))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=x, labels=x).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
    with torch.no_grad():
        adapted = model.eval()(x).logits
    assert (adapted - before).abs().max() > 1e-3
    assert generated(model, x).equal(generated(model, x, use_cache=False))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("MEAF"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, adapted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, adapted, rtol=1e-4, atol=1e-4)
    assert type(merged.native()(x).logits) is torch.Tensor


def test_adapters_of_a_step_in_half_precision(peft):
    """Biases that are kept in float32 do not stand in the way."""
    model = MoEMambaForCausalLM(MoEMambaConfig.of(config())).to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "dt_proj"):
            module.dt_proj.bias.data = module.dt_proj.bias.data.float()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["dt_proj", "in_proj"]))
    assert adapted(input_ids=tokens()).logits.isfinite().all()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)
TALK = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
    for i in range(16)
]
PAIRS = [{"prompt": f"say {i}", "completion": f" {i}!"} for i in range(16)]
WAYS = {
    "talk": (TALK, {"assistant_only_loss": True}, False),
    "pairs": (PAIRS, {}, False),
    "adapters": (PAIRS, {}, True),
    "packed": (PAIRS, {"packing": True}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_supervised_fine_tuning_with_the_balance_loss(way, tmp_path, peft):
    trl = pytest.importorskip("trl", reason="supervised fine-tuning needs trl")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    rows, options, adapted = WAYS[way]
    own = tokenizer(tmp_path)
    own.chat_template = TEMPLATE
    model = build(experts=ExpertsConfig(4, balance_weight=1.0), n_blocks=1)
    model.config.pad_token_id = model.config.eos_token_id = END
    stacked = ["experts.up_proj", "experts.down_proj", "router.weight"]
    lora = peft.LoraConfig(r=4, target_modules=["in_proj"], target_parameters=stacked) if adapted else None
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "use_cpu": True}
    common |= {"bf16": False, "disable_tqdm": True, "save_strategy": "no", "max_length": 64}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **common | options)
    data = datasets.Dataset.from_list(rows)
    run = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=own, peft_config=lora)
    assert (next(iter(run.get_train_dataloader()))["labels"] == -100).any()
    reached = []
    routers = [module for module in run.model.modules() if isinstance(module, Router)]
    for router in routers:
        router.register_forward_hook(
            lambda _, inputs, out: out.stats.balance_loss.register_hook(reached.append) and None
        )
    run.train()
    assert len(logged(run)) == 3 and torch.tensor(logged(run)).isfinite().all()
    assert reached == [1.0] * 3 * len(routers)  # balance_weight, whoever makes the loss
